"""open_clip's own models are measured, attacked, trained and saved so that open_clip reads them (`make interop`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, classifier, make_images, make_trainer, single_schedule, weights, write_image_folder
from PIL import Image

from hpt_hf.commands import convert, evaluate
from hpt_hf.commands.convert import ConvertArguments
from hpt_hf.data.collator import Collator, to_images
from hpt_hf.models.zero_shot import TEMPLATE, ZeroShotClassifier
from hpt_hf.publishing.export import check, export

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TIMM = {"timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
EVA02 = {"image_size": 224, "timm_pool": "token"}
MODELS = {
    "RN": {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}},
    "ConvNeXt": {"vision_cfg": {"timm_model_name": "convnext_atto", **TIMM}},
    "EVA02": {"vision_cfg": {"timm_model_name": "eva02_tiny_patch14_224", **TIMM, **EVA02}},
    "ViT": {"vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}},
}
PREPROCESS = {"RN": {}, "ConvNeXt": {"resize_mode": "squash", "interpolation": "bilinear"}}
PREPROCESS |= {"EVA02": {"mean": [0, 0, 0], "std": [1, 1, 1]}, "ViT": {"mean": [0.5] * 3, "std": [0.5] * 3}}
here = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Random weights, written by open_clip itself."""
    open_clip = pytest.importorskip("open_clip")
    from open_clip.push_to_hf_hub import save_config_for_hf

    place = tmp_path_factory.mktemp("open_clip")
    for name, cfg in MODELS.items():
        torch.manual_seed(0)
        cfg = {"embed_dim": 32, "text_cfg": TEXT, "custom_text": name == "EVA02", **cfg}
        (place / f"{name}.json").write_text(json.dumps(cfg))
        open_clip.add_model_config(place / f"{name}.json")
        side = cfg["vision_cfg"]["image_size"]
        model = open_clip.create_model(name, force_preprocess_cfg={"size": side, **PREPROCESS[name]}).eval()
        (place / name).mkdir()
        torch.save(model.state_dict(), place / name / "open_clip_pytorch_model.bin")
        save_config_for_hf(model, place / name / "open_clip_config.json", model_config=cfg)
    return {name: str(place / name) for name in MODELS}


def opened(folder):
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


def theirs(folder, images):
    model, preprocess, tokenizer = opened(folder)
    with torch.no_grad():
        image = model.encode_image(torch.stack([preprocess(i) for i in images]), normalize=True)
        text = model.encode_text(tokenizer([TEMPLATE.format(c) for c in CLASSES]), normalize=True)
        return model.logit_scale.exp() * image @ text.T


@here
def test_logits_and_pixels_are_open_clips_own(name, folders):
    ours, rng = classifier(folders[name]), np.random.default_rng(1)
    sizes = ((32, 32), (28, 28), (64, 64), (80, 61), (45, 97), (33, 32), (150, 40))
    images = [Image.fromarray(rng.integers(0, 2, (*size, 3), np.uint8) * 255) for size in sizes]
    batches = [Collator(ours.processor)([{"image": i, "label": None}])["images"] for i in images]
    with torch.no_grad():
        found = torch.cat([ours(batch).logits for batch in batches])
    expected = theirs(folders[name], images)
    assert (expected.amax() - expected.amin()) > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    _, preprocess, _ = opened(folders[name])
    for image, batch in zip(images, batches, strict=True):
        assert torch.allclose((batch - ours.mean) / ours.std, preprocess(image)[None], atol=1e-5)
        native = ours.resize_and_crop(to_images(np.array(image)[None]))
        if image.size != (ours.image_size, ours.image_size):
            assert float((native - batch).abs().max()) <= 1.2 / 255


@here
def test_it_is_measured_trained_and_saved_so_that_open_clip_gives_the_same_answers(name, folders, proxy, tmp_path):
    data = write_image_folder(tmp_path / "data", make_images(16))
    flags = f"--model {folders[name]} --dataset {data} --attack pgd --attack_steps 3 --eps 8/255 --probe 4"
    evaluate.main([*flags.split(), "--output_dir", str(tmp_path / "results")])
    student = classifier(folders[name])
    before = weights(student.model)
    options = {"proxy": proxy, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path / "out", student, single_schedule("hpt", steps=2), **options)
    trainer.train()
    trainer.save_model()
    changed = {n for n, t in weights(student.model).items() if not torch.equal(t, before[n])}
    assert changed and all(n.startswith("visual.") and "running" not in n and "num_batches" not in n for n in changed)
    image = make_images(1)[0]["image"]
    batch = Collator(student.processor)([{"image": image, "label": None}])["images"]
    with torch.no_grad():
        torch.testing.assert_close(student(batch).logits, theirs(tmp_path / "out", [image]), atol=1e-4, rtol=1e-4)
    assert check(tmp_path / "out")["form"] == "open_clip"
    again = make_trainer(tmp_path / "out", classifier(folders[name]), single_schedule("hpt", steps=2), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert all(torch.equal(t, weights(student.model)[n]) for n, t in weights(again.model).items())
    assert "create_model_and_transforms" in (tmp_path / "out" / "README.md").read_text()


def test_what_open_clip_alone_can_hold_is_converted_to_nothing_else(folders, tmp_path):
    for to in ("transformers", "vision_tower"):
        with pytest.raises(ValueError, match="no class of transformers is known to hold|expected 'clip'"):
            convert.run(ConvertArguments(folders["RN"], str(tmp_path / to), to=to))
    convert.run(ConvertArguments(folders["RN"], str(tmp_path / "again"), to="open_clip"))
    assert ZeroShotClassifier.from_pretrained(tmp_path / "again").preprocessing.rounded
    with pytest.raises(ValueError, match="dtype 'bfloat16': open_clip's form holds float32"):
        export(classifier(folders["RN"]), tmp_path / "half", dtype="bfloat16")
    with pytest.raises(ValueError, match="has .* tokens: the text tower reads 77"):
        ZeroShotClassifier.from_pretrained(folders["ViT"]).set_classes(("a cat", "a " * 90))


def test_a_folder_without_weights_is_refused_and_without_open_clip_it_is_said(tmp_path, monkeypatch):
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    if "open_clip" in sys.modules:
        with pytest.raises(ValueError, match="open_clip cannot open"):
            ZeroShotClassifier.from_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"is an open_clip model .*Fix: pip install 'hpt_hf\[openclip\]'"):
        ZeroShotClassifier.from_pretrained(tmp_path)
    assert [f.name for f in Path(tmp_path).iterdir()] == ["open_clip_config.json"]
