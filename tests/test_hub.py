"""Proves that an exported folder answers as the trained model does, that a folder which does not is caught, and that its card parses."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from hpt_hf.hub import export, parity
from hpt_hf.zero_shot import ZeroShotCLIP

FACTS = {"method": "hpt_gpd", "threat": "linf 1/255", "odd": "a: b {c} | d"}


@pytest.fixture
def exported(student, tmp_path):
    return student, export(student, tmp_path / "robust", base_model="openai/clip-vit-base-patch32", facts=FACTS)


def change_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def shift_mean(folder):
    change_json(
        folder / "processor_config.json",
        lambda c: c["image_processor"].update(image_mean=[m + 0.01 for m in c["image_processor"]["image_mean"]]),
    )


def widen_std(folder):
    change_json(folder / "processor_config.json", lambda c: c["image_processor"].update(image_std=[0.3, 0.3, 0.3]))


def leave_out_the_crop(folder):
    change_json(
        folder / "processor_config.json",
        lambda c: c["image_processor"].update(size={"height": 32, "width": 32}, do_center_crop=False),
    )


def scale_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"] *= 1.01
    weights["visual_projection.weight"][0] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cool_the_logits(folder):
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"] -= 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_is_exported_answers_as_the_model_in_memory(exported):
    model, folder = exported
    assert parity(model, folder) < 1e-5
    assert parity(ZeroShotCLIP.load(folder).set_classes(model.classes), folder) < 1e-5


@pytest.mark.parametrize("tamper", [shift_mean, widen_std, leave_out_the_crop, scale_a_weight, cool_the_logits])
def test_parity_sees_a_folder_that_is_not_what_was_trained(exported, tamper):
    model, folder = exported
    tamper(folder)
    assert parity(model, folder) > 1e-4


def test_export_refuses_a_model_that_its_own_files_do_not_describe(student, tmp_path):
    """As if training had normalised with other numbers than the processor's: the fault that makes a checkpoint wrong under pipeline."""
    student.mean += 0.05
    with pytest.raises(RuntimeError, match="opened afresh its logits differ"):
        export(student, tmp_path / "robust", base_model="a/b", facts={})


def test_parity_is_measured_in_eval_mode_without_gradients(exported):
    model, folder = exported
    parity(model, folder)
    assert all(p.grad is None for p in model.parameters())


def test_the_random_state_of_training_is_not_touched(exported):
    model, folder = exported
    torch.manual_seed(3)
    before = torch.get_rng_state()
    parity(model, folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_card_says_what_the_hub_reads(exported):
    model, folder = exported
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert card.data.library_name == "transformers" and card.data.base_model == "openai/clip-vit-base-patch32"
    assert {"clip", "adversarial-robustness"} <= set(card.data.tags)
    for name, value in FACTS.items():
        assert f"- {name}: {value}" in card.text
    assert f"# {folder.name}" in card.text and str(list(model.classes[:3])) in card.text


def test_a_path_of_the_training_machine_does_not_reach_the_card(student, student_path, tmp_path):
    folder = export(student, tmp_path / "robust", base_model=student_path, facts={})
    assert ModelCard.load(folder / "README.md").data.base_model is None
    assert student_path not in (folder / "README.md").read_text()
    assert all(student_path not in f.read_text() for f in folder.glob("*.json"))


def test_no_pickles_and_no_code_are_exported(exported):
    _, folder = exported
    assert {f.suffix for f in folder.iterdir()} <= {".safetensors", ".json", ".md", ".txt", ".jinja"}
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["CLIPModel"]


def test_exporting_twice_into_one_folder_leaves_the_second(exported):
    model, folder = exported
    with torch.no_grad():
        model.visual_projection.weight.mul_(torch.linspace(0.5, 1.5, model.visual_projection.weight.shape[0])[:, None])
    assert parity(model, folder) > 1e-4
    export(model, folder, base_model="a/b", facts={})
    assert parity(model, folder) < 1e-5 and ModelCard.load(folder / "README.md").data.base_model == "a/b"
