"""Proves that an exported vision tower gives a VLM the hidden states of the robust CLIP, every layer and every patch, and that another tower is told."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_pictures, save_tiny_clip, weights
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.publishing.export import export
from hpt_hf.publishing.vision_tower import export_tower, resize_positions, tower_parity, vision_tower

LAYERS = 2  # of the tests' student: hidden states before, between and after them
SIZES = (32, 40, 64, 16)  # its own, one patch more, twice, half


@pytest.fixture(scope="module")
def model(student_path):
    return ZeroShotClassifier.from_pretrained(student_path)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """The full checkpoint, as the stock classes open it."""
    return export(model, tmp_path_factory.mktemp("tower") / "whole")


@pytest.fixture(scope="module")
def towers(model, tmp_path_factory) -> dict[int, Path]:
    """The tower at every size."""
    place = tmp_path_factory.mktemp("towers")
    for size in SIZES:
        export_tower(model, place / str(size), image_size=size)
    return {size: place / str(size) for size in SIZES}


def shown(count=3, seed=0):
    rng = np.random.default_rng(seed)
    sizes = ((48, 32), (40, 90), (70, 71))
    return [Image.fromarray(rng.integers(0, 256, (*sizes[i % 3], 3), dtype=np.uint8)) for i in range(count)]


@torch.no_grad()
def hidden(tower, pixels, **more):
    out = tower.eval()(pixel_values=pixels, output_hidden_states=True, **more)
    return [*out.hidden_states, out.last_hidden_state, out.pooler_output]


# --- the same hidden states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_every_hidden_state_is_that_of_the_stock_tower_of_the_whole_checkpoint(whole, towers, size):
    opened, stock = CLIPVisionModel.from_pretrained(towers[size]), CLIPVisionModel.from_pretrained(whole)
    pixels = AutoImageProcessor.from_pretrained(towers[size])(shown(), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, size, size) and opened.config.image_size == size
    ours, theirs = hidden(opened, pixels), hidden(stock, pixels, interpolate_pos_encoding=size != 32)
    assert len(ours) == LAYERS + 3
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        assert a.shape == b.shape == (3, 1 + (size // 8) ** 2, 32), "class token and patches"
        assert float(b[:, 0].std()) > 0.01 and float(b[:, 1:].std(1).mean()) > 0.01, "states that tell something"
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours[-1], theirs[-1], atol=1e-5, rtol=1e-4)


def test_at_its_own_size_the_tower_holds_the_very_weights(model, whole, towers):
    tower = CLIPVisionModel.from_pretrained(towers[32])
    stock = CLIPVisionModel.from_pretrained(whole)
    assert tower.state_dict().keys() == stock.state_dict().keys()
    assert all(torch.equal(t, stock.state_dict()[n]) for n, t in tower.state_dict().items())
    ours, theirs = tower.config.to_diff_dict(), stock.config.to_diff_dict()
    assert ours.pop("architectures") == ["CLIPVisionModel"] and ours == theirs


@pytest.mark.parametrize("size", [s for s in SIZES if s != 32])
def test_at_another_size_the_position_embeddings_alone_are_others(towers, size):
    own, other = load_file(towers[32] / "model.safetensors"), load_file(towers[size] / "model.safetensors")
    assert own.keys() == other.keys()
    (changed,) = [n for n in own if own[n].shape != other[n].shape or not torch.equal(own[n], other[n])]
    assert changed.endswith("position_embedding.weight") and other[changed].shape == (1 + (size // 8) ** 2, 32)
    assert torch.equal(own[changed][0], other[changed][0]), "the class token has no place in the grid"


def test_position_embeddings_resized_to_their_own_grid_are_the_same():
    table = torch.randn(1 + 49, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resize_positions(table, 7), table, atol=1e-6, rtol=1e-5)
    flat = torch.ones(1 + 49, 8)
    torch.testing.assert_close(resize_positions(flat, 11), torch.ones(1 + 121, 8), atol=1e-5, rtol=0)


def test_a_resized_grid_keeps_rows_and_columns_apart():
    """Rows go up in one number and columns in another: whoever transposes the grid mixes them up."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    table = torch.cat([torch.zeros(1, 2), torch.stack([rows.flatten(), columns.flatten()], 1)])
    larger = resize_positions(table, 8)[1:].view(8, 8, 2)
    assert (larger.diff(dim=0)[..., 0] > -0.2).all() and larger[-1, :, 0].min() > larger[0, :, 0].max() + 2
    assert larger[:, -1, 1].min() > larger[:, 0, 1].max() + 2 and torch.allclose(
        larger[..., 0], larger[..., 1].T, atol=1e-5
    )


@pytest.mark.parametrize("size", SIZES)
def test_all_of_them_were_counted_and_compared(model, towers, size):
    worst, count = tower_parity(model, towers[size])
    # Five pictures; for each the hidden states, the pooled one, and at its own size the evaluator's embedding.
    assert count == 5 * (LAYERS + 2 + (size == 32)) and 0 <= worst < 1e-5


def test_the_count_is_what_export_gives_back(model, tmp_path):
    assert export_tower(model, tmp_path / "tower") == 5 * (LAYERS + 3)
    assert export_tower(model, tmp_path / "larger", image_size=64) == 5 * (LAYERS + 2)


def test_the_stock_classes_open_it_with_no_other_argument(towers):
    for size, folder in towers.items():
        tower, info = CLIPVisionModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(AutoModel.from_pretrained(folder)) is CLIPVisionModel and not tower.training
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "clip_vision_model" and config["image_size"] == size
        assert {f.name for f in folder.iterdir()} == {
            "README.md",
            "config.json",
            "model.safetensors",
            "preprocessor_config.json",
        }


@pytest.mark.parametrize("size", SIZES)
def test_the_image_processor_makes_pictures_of_the_new_size_as_the_old_one_did(model, towers, size):
    processor, own = AutoImageProcessor.from_pretrained(towers[size]), model.processor.image_processor
    assert processor.size == {"shortest_edge": size} and processor.crop_size == {"height": size, "width": size}
    for name in (
        "image_mean",
        "image_std",
        "resample",
        "do_center_crop",
        "do_resize",
        "do_normalize",
        "rescale_factor",
    ):
        assert getattr(processor, name) == getattr(own, name), name
    for picture in (*shown(), shown()[0].convert("L")):
        assert processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"].shape == (1, 3, size, size)


def test_the_model_and_its_processor_are_not_touched(model, tmp_path):
    before, processor, config = (
        weights(model),
        copy.deepcopy(model.processor.image_processor),
        copy.deepcopy(model.config),
    )
    export_tower(model, tmp_path / "tower", image_size=64, dtype=torch.bfloat16)
    assert all(torch.equal(t, before[n]) and t.dtype == torch.float32 for n, t in model.state_dict().items())
    assert model.image_size == 32 and model.config.to_dict() == config.to_dict()
    assert model.processor.image_processor.to_dict() == processor.to_dict()


def test_a_tower_in_memory_shares_no_weights_with_the_model(model):
    tower = vision_tower(model)
    ours = {t.data_ptr() for t in model.state_dict().values()}
    assert not ours & {t.data_ptr() for t in tower.state_dict().values()} and not tower.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_same_tower_rounded_once(towers, model, tmp_path, dtype):
    export_tower(model, tmp_path / "tower", image_size=64, dtype=dtype)
    half, full = load_file(tmp_path / "tower" / "model.safetensors"), load_file(towers[64] / "model.safetensors")
    assert half.keys() == full.keys() and all(torch.equal(half[n], full[n].to(dtype)) for n in full)
    assert CLIPVisionModel.from_pretrained(tmp_path / "tower").dtype == dtype


def test_a_tower_of_another_patch_and_depth(tmp_path):
    other = ZeroShotClassifier.from_pretrained(
        save_tiny_clip(tmp_path / "other", patch_size=16, width=24, layers=3, image_size=48, seed=5)
    )
    assert export_tower(other, tmp_path / "own") == 5 * (3 + 3)
    assert export_tower(other, tmp_path / "larger", image_size=80) == 5 * (3 + 2)


def test_a_processor_that_squashes_is_kept_as_it_is(student_path, tmp_path):
    """Not every CLIP cuts: one that squashes must not begin to cut because its tower goes alone."""
    model = ZeroShotClassifier.from_pretrained(student_path)
    image = model.processor.image_processor
    image.size, image.do_center_crop = type(image.size)(height=32, width=32), False
    export_tower(model, tmp_path / "tower")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "tower")
    for picture in shown():
        ours = processor(picture, return_tensors="pt")["pixel_values"]
        assert torch.equal(ours, image(picture, return_tensors="pt")["pixel_values"])


# --- what is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "near"),
    [(33, 32), (37, 40), (100, 96), (1, 8), (7, 8), (0, 8), (-8, 8), (223, 224), (335, 336), (12, 16)],
)
def test_a_size_that_patches_do_not_fill_is_refused_with_one_that_they_do(model, tmp_path, size, near):
    with pytest.raises(ValueError, match=f"image_size {size}: patches of 8 px do not fill it; {near} would do"):
        export_tower(model, tmp_path / "tower", image_size=size)
    assert not (tmp_path / "tower").exists()
    assert (
        near % 8 == 0 and abs(near - size) <= max(4, 8 - size) and vision_tower(model, near).config.image_size == near
    )


def test_a_folder_that_holds_something_is_refused(model, whole, tmp_path):
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "mine.txt").write_text("mine")
    for folder in (whole, tmp_path / "tower"):
        before = {f.name: f.read_bytes() for f in folder.iterdir()}
        with pytest.raises(ValueError, match=f"{folder} is not empty: a vision tower goes into a folder of its own"):
            export_tower(model, folder)
        assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    (tmp_path / "empty").mkdir()
    assert export_tower(model, tmp_path / "empty")


def rows_of_positions(change):
    def tamper(state):
        name = next(n for n in state if n.endswith("position_embedding.weight"))
        state[name] = change(state[name]).contiguous()

    return tamper


def scaled(name, factor):
    def tamper(state):
        (full,) = [n for n in state if n.endswith(name)]
        state[full] *= factor

    return tamper


WRONG = {
    "patches in another order": rows_of_positions(lambda t: torch.cat([t[:1], t[1:].flip(0)])),
    "rows and columns swapped": rows_of_positions(
        lambda t: torch.cat(
            [t[:1], t[1:].unflatten(0, (round((len(t) - 1) ** 0.5),) * 2).transpose(0, 1).flatten(0, 1)]
        )
    ),
    "shifted by one": rows_of_positions(lambda t: t.roll(1, 0)),
    "two patches swapped": rows_of_positions(lambda t: t[[0, 2, 1, *range(3, len(t))]]),
    "none for the last patch": rows_of_positions(lambda t: torch.cat([t[:-1], 0 * t[-1:]])),
    "the last layer": scaled("encoder.layers.1.mlp.fc2.weight", 1.05),
    "patches alone": scaled("encoder.layers.0.self_attn.v_proj.weight", 1.05),
    "the last norm": scaled("post_layernorm.weight", 1.05),
}


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("what", WRONG)
def test_a_tower_that_is_another_is_seen(model, towers, tmp_path, size, what):
    folder = tmp_path / "tower"
    folder.mkdir()
    for file in towers[size].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    WRONG[what](state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    worst, count = tower_parity(model, folder)
    assert worst > 1e-3 and count == tower_parity(model, towers[size])[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tower_that_was_written_wrongly_is_not_left(model, tmp_path, monkeypatch, dtype):
    save = CLIPVisionModel.save_pretrained

    def wrong(self, folder, **kwargs):
        with torch.no_grad():
            weight = self.get_parameter(
                next(n for n, _ in self.named_parameters() if n.endswith("position_embedding.weight"))
            )
            weight.copy_(weight.flip(0))
        save(self, folder, **kwargs)

    monkeypatch.setattr(CLIPVisionModel, "save_pretrained", wrong)
    with pytest.raises(
        ValueError, match=r"the tower's hidden states differ by .* \(relative\) from the model's: nothing was written"
    ):
        export_tower(model, tmp_path / "tower", image_size=64, dtype=dtype)
    assert not (tmp_path / "tower").exists()


# --- in a LLaVA ---------------------------------------------------------------------------------------------------------------

IMAGE = "<image>"


@pytest.fixture
def llava(student_path):
    """A tiny random LLaVA with its processor, around a vision tower of the student's architecture and other weights."""
    tokenizer = AutoTokenizer.from_pretrained(student_path)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    tokenizer.model_max_length = 512
    torch.manual_seed(3)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **size | {"intermediate_size": 64}, image_size=32, patch_size=8, hidden_act="gelu"
        ),
        text_config=LlamaConfig(**size, **ids, vocab_size=len(tokenizer), max_position_embeddings=512),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    processor = LlavaProcessor(
        AutoImageProcessor.from_pretrained(student_path),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
    return LlavaForConditionalGeneration(config).eval(), processor


def ask(llava, processor):
    """(pixels, features of the pictures, logits, what it generates)."""
    inputs = processor(images=shown(2), text=[f"{IMAGE} this is a photo"] * 2, return_tensors="pt")
    with torch.no_grad():
        features = llava.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        logits = llava(**inputs).logits
        said = llava.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert said.shape == (2, inputs["input_ids"].shape[1] + 4)
    return inputs, torch.stack(list(features)), logits


@pytest.mark.parametrize("size", [32, 64])
def test_what_the_card_says_makes_a_llava_see_with_the_robust_tower(llava, towers, monkeypatch, size):
    llava, processor = llava
    monkeypatch.chdir(towers[size].parent)
    before, features_before, logits_before = ask(llava, processor)
    (code,) = re.findall(r"```python\n(.*?)```", (towers[size] / "README.md").read_text(), re.DOTALL)
    assert f'"{size}"' in code
    exec(code, {"llava": llava, "processor": processor})
    inputs, features, logits = ask(llava, processor)
    patches = (size // 8) ** 2
    assert inputs["pixel_values"].shape == (2, 3, size, size) and features.shape == (2, patches, 32)
    assert (inputs["input_ids"] == llava.config.image_token_index).sum() == 2 * patches, "a token for every patch"
    tower = CLIPVisionModel.from_pretrained(towers[size])
    with torch.no_grad():
        states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        ours = llava.model.multi_modal_projector(states)
    torch.testing.assert_close(features, ours, atol=1e-6, rtol=1e-5)
    assert torch.isfinite(logits).all() and logits.shape[1] == inputs["input_ids"].shape[1]
    if size == 32:
        assert torch.equal(inputs["pixel_values"], before["pixel_values"]) and torch.equal(
            inputs["input_ids"], before["input_ids"]
        )
        assert float((features - features_before).abs().max()) > 0.01 < float((logits - logits_before).abs().max())


def test_the_swapped_tower_has_the_vlm_s_precision(llava, towers, monkeypatch):
    llava, processor = llava
    llava.to(torch.bfloat16)
    monkeypatch.chdir(towers[32].parent)
    (code,) = re.findall(r"```python\n(.*?)```", (towers[32] / "README.md").read_text(), re.DOTALL)
    exec(code, {"llava": llava, "processor": processor})
    assert {p.dtype for p in llava.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("size", [32, 64])
def test_a_llava_with_a_swapped_tower_can_be_saved_and_opened_again(llava, towers, monkeypatch, tmp_path, size):
    llava, processor = llava
    monkeypatch.chdir(towers[size].parent)
    (code,) = re.findall(r"```python\n(.*?)```", (towers[size] / "README.md").read_text(), re.DOTALL)
    exec(code, {"llava": llava, "processor": processor})
    _, features, logits = ask(llava, processor)
    llava.save_pretrained(tmp_path / "llava")
    with warnings.catch_warnings(action="ignore"):
        again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    torch.testing.assert_close(ask(again, processor)[2], logits, atol=1e-5, rtol=1e-4)


def test_the_card_says_for_what_it_was_not_measured(towers):
    for size, folder in towers.items():
        text = (folder / "README.md").read_text()
        assert (
            f"at {size} px" in text
            and "with the whole CLIP at 32 px" in text
            and "nothing is claimed until it is measured there" in text
        )
        assert ("position embeddings resized from 32 px" in text) == (size != 32)
        assert "pipeline_tag: image-feature-extraction" in text and not re.search(r"\d%", text)


def test_pictures_of_the_tests_fit(model):
    """The student of these tests is the one that the sizes above are about."""
    assert (model.config.vision_config.patch_size, model.config.vision_config.num_hidden_layers, model.image_size) == (
        8,
        LAYERS,
        32,
    )
    assert make_pictures(1)[0]["image"].size == (32, 32)
