"""An exported vision tower gives a VLM the hidden states of the robust CLIP, every layer and every patch."""

import copy
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import contents, weights
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
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
from hpt_hf.publishing.vision_tower import compare_tower, export_tower, vision_tower

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
    for size in SIZES:  # five images; for each the hidden states and the pooled one
        assert export_tower(model, place / str(size), image_size=size) == 5 * (LAYERS + 2)
    return {size: place / str(size) for size in SIZES}


def shown():
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((48, 32), (40, 90), (70, 71))
    ]


@torch.no_grad()
def hidden(tower, pixels, **more):
    out = tower.eval()(pixel_values=pixels, output_hidden_states=True, **more)
    return [*out.hidden_states, out.last_hidden_state, out.pooler_output]


@pytest.mark.parametrize("size", SIZES)
def test_every_hidden_state_is_that_of_the_stock_tower_of_the_whole_checkpoint(model, whole, towers, size):
    opened, info = CLIPVisionModel.from_pretrained(towers[size], output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stock, processor = CLIPVisionModel.from_pretrained(whole), AutoImageProcessor.from_pretrained(towers[size])
    for name in ("image_mean", "image_std", "resample", "do_center_crop", "do_normalize", "rescale_factor"):
        assert getattr(processor, name) == getattr(model.processor.image_processor, name), name
    pixels = processor(shown(), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, size, size) and opened.config.image_size == size
    ours, theirs = hidden(opened, pixels), hidden(stock, pixels, interpolate_pos_encoding=size != 32)
    for a, b in zip(ours, theirs, strict=True):
        assert float(b.std()) > 0.01, "states that tell something"
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    names = {"README.md", "parity.json", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert {f.name for f in towers[size].iterdir()} == names
    text = (towers[size] / "README.md").read_text()
    assert f"at {size} px" in text and "with the whole CLIP at 32 px" in text and not re.search(r"\d%", text)
    assert ("position embeddings resized from 32 px" in text) == (size != 32) and "pipeline_tag: image-f" in text


def test_half_precision_is_the_same_tower_rounded_once_and_the_model_is_not_touched(towers, model, tmp_path):
    before, config = weights(model), copy.deepcopy(model.config)
    processor = model.processor.image_processor.to_dict()
    export_tower(model, tmp_path / "tower", image_size=64, dtype=torch.float16)
    half, full = load_file(tmp_path / "tower" / "model.safetensors"), load_file(towers[64] / "model.safetensors")
    assert half.keys() == full.keys() and all(torch.equal(half[n], full[n].half()) for n in full)
    assert CLIPVisionModel.from_pretrained(tmp_path / "tower").dtype == torch.float16
    assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in weights(model).items())
    assert model.config.to_dict() == config.to_dict() and model.processor.image_processor.to_dict() == processor


def test_a_processor_that_squashes_is_kept_as_it_is(student_path, tmp_path):
    """Not every CLIP cuts: one that squashes must not begin to cut because its tower goes alone."""
    model = ZeroShotClassifier.from_pretrained(student_path)
    image = model.processor.image_processor
    image.size, image.do_center_crop = type(image.size)(height=32, width=32), False
    export_tower(model, tmp_path / "tower")
    processors = (image, AutoImageProcessor.from_pretrained(tmp_path / "tower"))
    assert torch.equal(*(p(shown(), return_tensors="pt")["pixel_values"] for p in processors))


@pytest.mark.parametrize(("size", "near"), [(33, 32), (37, 40), (7, 8), (0, 8), (-8, 8)])
def test_a_size_that_patches_do_not_fill_is_refused_with_one_that_they_do(model, tmp_path, size, near):
    with pytest.raises(ValueError, match=f"image_size {size}: patches of 8 px do not fill it; {near} would do"):
        export_tower(model, tmp_path / "tower", image_size=size)
    assert not (tmp_path / "tower").exists() and vision_tower(model, near).config.image_size == near


def test_a_folder_that_holds_something_is_refused(model, whole, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for folder in (whole, tmp_path):
        before = contents(folder)
        with pytest.raises(ValueError, match=f"{folder} is not empty"):
            export_tower(model, folder)
        assert contents(folder) == before


@pytest.mark.parametrize("left", ["nothing", ".part and config.json", "all"])
def test_killed_at_any_moment_it_is_written_again(model, towers, tmp_path, left):
    folder = shutil.copytree(towers[32], tmp_path / "tower") if left == "all" else tmp_path / "tower"
    folder.mkdir(exist_ok=True)
    if ".part" in left:
        (folder / ".part").mkdir()
        (folder / "config.json").write_text("{}")
    export_tower(model, folder)
    assert contents(folder).keys() == contents(towers[32]).keys()


WRONG = {  # a tensor, and what becomes of it
    "two patches swapped": ("position_embedding.weight", lambda t: t[[0, 2, 1, *range(3, len(t))]]),
    "the last layer": ("encoder.layers.1.mlp.fc2.weight", lambda t: 1.05 * t),
    "the last norm": ("post_layernorm.weight", lambda t: 1.05 * t),
}


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("what", WRONG)
def test_a_tower_that_is_another_is_seen(model, towers, tmp_path, size, what):
    folder = shutil.copytree(towers[size], tmp_path / "tower")
    state = load_file(folder / "model.safetensors")
    ending, change = WRONG[what]
    (name,) = [n for n in state if n.endswith(ending)]
    state[name] = change(state[name]).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert compare_tower(model, folder)[0] > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tower_that_was_written_wrongly_is_not_left(model, tmp_path, monkeypatch, dtype):
    save = CLIPVisionModel.save_pretrained

    def wrong(self, folder, **options):
        with torch.no_grad():
            self.embeddings.position_embedding.weight.copy_(self.embeddings.position_embedding.weight.flip(0))
        save(self, folder, **options)

    monkeypatch.setattr(CLIPVisionModel, "save_pretrained", wrong)
    with pytest.raises(ValueError, match="hidden states differ by .*: nothing was written"):
        export_tower(model, tmp_path / "tower", image_size=64, dtype=dtype)
    assert not (tmp_path / "tower").exists()


@pytest.fixture
def llava(student_path):
    """A tiny random LLaVA with its processor, around a vision tower of the student's sizes."""
    tokenizer = AutoTokenizer.from_pretrained(student_path)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    torch.manual_seed(3)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, image_size=32, patch_size=8, hidden_act="gelu"),
        text_config=LlamaConfig(**size, vocab_size=len(tokenizer), max_position_embeddings=512),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
    )
    sizes = {"patch_size": 8, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    processor = LlavaProcessor(AutoImageProcessor.from_pretrained(student_path), tokenizer, **sizes)
    return LlavaForConditionalGeneration(config).eval(), processor


def test_what_the_card_says_makes_a_llava_see_with_the_robust_tower(llava, towers, monkeypatch):
    (llava, processor), tower = llava, towers[64]
    monkeypatch.chdir(tower.parent)
    (code,) = re.findall(r"```python\n(.*?)```", (tower / "README.md").read_text(), re.DOTALL)
    exec(code, {"llava": llava, "processor": processor})
    text = ["<image> this is a photo"] * 2
    inputs = processor(images=shown()[:2], text=text, return_tensors="pt", text_kwargs={"truncation": False})
    assert (inputs["input_ids"] == llava.config.image_token_index).sum() == 2 * (64 // 8) ** 2, "one for every patch"
    with torch.no_grad():
        features = llava.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        states = hidden(CLIPVisionModel.from_pretrained(tower), inputs["pixel_values"])[LAYERS - 1][:, 1:]
        projected = llava.model.multi_modal_projector(states)
        torch.testing.assert_close(torch.stack(list(features)), projected, atol=1e-6, rtol=1e-5)
        assert torch.isfinite(llava(**inputs).logits).all()
