"""LoRA: adapters alone are trained, merged they are a plain checkpoint, and every property of a full run holds."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import (
    CLASSES,
    classifier,
    gpd_schedule,
    largest_difference,
    make_batch,
    make_images,
    make_trainer,
    single_schedule,
    weights,
    write_image_folder,
)
from families import save_family
from loopback_hub import FakeHub
from peft import PeftModel
from transformers import CLIPModel

from hpt_hf.commands import train
from hpt_hf.models.lora import ADAPTER, add_lora, anchor_of
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing.export import check
from hpt_hf.publishing.hub import push

# peft asks transformers for what will have another name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def adapted(path):
    return add_lora(ZeroShotClassifier.from_pretrained(path), 4).set_classes(CLASSES)


def test_it_begins_at_the_model_itself_and_trains_adapters_of_the_vision_side_alone(student_path, student):
    lora, batch = adapted(student_path), make_batch(student)
    assert fingerprint(lora) == fingerprint(student)
    torch.testing.assert_close(lora(batch["images"]).logits, student(batch["images"]).logits, atol=1e-5, rtol=1e-5)
    trained = {n for n, p in lora.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (2 * 6 + 1) and all(".lora_" in n and n.startswith("vis") for n in trained)


@pytest.mark.parametrize("schedule", [single_schedule("fare", learning_rate=1e-3), gpd_schedule()])
def test_a_run_resumes_bit_by_bit_and_its_merged_export_is_the_adapted_model(schedule, paths, tmp_path, proxy):
    options = {"proxy": proxy, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", adapted(paths[0]), schedule, **options)
    before = weights(whole.model)
    whole.train()
    whole.save_model()
    changed = {n for n, t in weights(whole.model).items() if not torch.equal(t, before[n])}
    assert changed and all(".lora_" in n for n in changed)
    again = make_trainer(tmp_path / "again", adapted(paths[0]), schedule, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert largest_difference(weights(again.model), weights(whole.model)) == 0
    images, plain = make_batch(proxy)["images"], classifier(tmp_path / "whole")
    torch.testing.assert_close(plain(images).logits, whole.model(images).logits, atol=1e-5, rtol=1e-5)
    assert check(tmp_path / "whole")["fingerprint"] == fingerprint(whole.model) and plain.lora is None
    base = CLIPModel.from_pretrained(paths[0])
    merged = PeftModel.from_pretrained(base, tmp_path / "whole" / ADAPTER).merge_and_unload().state_dict()
    assert largest_difference(merged, dict(plain.model.state_dict())) < 1e-6


def test_the_anchor_is_the_model_without_its_adapters_and_no_copy(student_path, student):
    lora, batch = adapted(student_path), make_batch(student)
    with torch.no_grad():
        for name, parameter in lora.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    anchor, vanilla = anchor_of(lora), student(batch["images"]).logits
    torch.testing.assert_close(anchor(batch["images"]).logits, vanilla, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(lora(batch["images"]).logits, vanilla, atol=0.1), "and they are on again"
    assert fingerprint(lora) != fingerprint(student)


@pytest.mark.parametrize("family", ["siglip", "metaclip_2", "siglip2"])
def test_other_families_take_adapters_too(family, tmp_path, proxy):
    student = adapted(save_family(family, tmp_path / "model"))
    trainer = make_trainer(tmp_path / "out", student, single_schedule("hpt", steps=2, learning_rate=0.3), proxy=proxy)
    trainer.train()
    trainer.save_model()
    images = torch.rand(3, 3, 32, 32)
    exported = classifier(tmp_path / "out")
    torch.testing.assert_close(exported(images).logits, student(images).logits, atol=1e-5, rtol=1e-4)


def test_the_recipe_trains_adapters_and_both_forms_can_be_pushed(paths, tmp_path, monkeypatch):
    hub, data = FakeHub(monkeypatch), write_image_folder(tmp_path / "data", make_images(24))
    flags = f"--method hpt_gpd --model {paths[0]} --proxy {paths[1]} --dataset {data} --max_steps 4 --use_cpu true"
    flags += " --eps 8/255 --per_device_train_batch_size 8 --disable_tqdm true --lora_r 2 --lora_alpha 8 --output_dir"
    train.main([*flags.split(), str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "train.json").read_text())["decided_by"]["lora"] == [2, 8]
    push(tmp_path / "out", "alice/merged")
    push(tmp_path / "out" / ADAPTER, "alice/adapter")
    assert not any("adapter" in name for name in hub.files("alice/merged"))
    sent = hub.files("alice/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= sent.keys()
    assert b'PeftModel.from_pretrained(base, "alice/adapter")' in sent["README.md"]
    assert str(tmp_path).encode() not in b"".join(sent.values())


def test_what_cannot_be_is_one_line(paths, student, tmp_path):
    for r, alpha in ((0, None), (2, 0)):
        with pytest.raises(
            ValueError, match="lora_r, lora_alpha: got .*expected a rank of at least 1 and more than 0"
        ):
            add_lora(student, r, alpha)
    data = write_image_folder(tmp_path / "data", make_images(24))
    argv = f"--method tecoa --model {paths[0]} --dataset {data} --use_cpu true --per_device_train_batch_size 8"
    with pytest.raises(SystemExit, match="lora_alpha: got one without adapters. Fix: --lora_r"):
        train.main([*argv.split(), "--lora_alpha", "3", "--output_dir", str(tmp_path / "out")])
