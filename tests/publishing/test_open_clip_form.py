"""A folder's config says what its model is, and open_clip's form is written so that it is read back bit for bit."""

import copy
import shutil

import numpy as np
import pytest
import torch
from openai_clip import IMAGENET, MEAN, STD, assert_close, changed, embeds, pooled_elsewhere, reference_embeds
from safetensors.torch import load_file
from transformers import CLIPModel

from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing import convert_checkpoint
from hpt_hf.publishing.convert_checkpoint import read_checkpoint, write_open_clip
from hpt_hf.utils import read_json, write_json


@pytest.fixture(scope="module")
def theirs(open_clip_folder):
    return load_file(open_clip_folder / "open_clip_model.safetensors")


def file_of(content, folder):
    torch.save(content, folder / "a.pt")
    return folder / "a.pt"


def refused(message, place, base):
    with pytest.raises(ValueError, match=message):
        read_checkpoint(place, base)


def edited(name, change):
    def edit(folder):
        content = read_json(folder / name)
        change(content)
        write_json(folder / name, content)

    return edit


def says(part="", **values):
    return edited("open_clip_config.json", lambda c: (c["model_cfg"][part] if part else c["model_cfg"]).update(values))


def towers(**values):
    return edited("config.json", lambda c: [c[f"{tower}_config"].update(values) for tower in ("text", "vision")])


@pytest.fixture
def folder_of(open_clip_folder, stock, tmp_path):
    """open_clip's folder, or that of a stock CLIPModel, where something else stands."""

    def changed(*changes, form="open_clip"):
        place = tmp_path / form
        if form == "open_clip":
            shutil.copytree(open_clip_folder, place)
        else:
            stock.save_pretrained(place, max_shard_size="80KB")
        for change in changes:
            change(place)
        return place

    return changed


def test_the_activation_is_the_folders_own_and_of_a_bare_file_the_bases(base, theirs, folder_of, tmp_path):
    place = folder_of(towers(hidden_act="quick_gelu"), form="transformers")
    model, reading = read_checkpoint(place, base)
    assert str(reading).count("hidden_act is 'quick_gelu' in the checkpoint's") == 2
    quick = ZeroShotClassifier(CLIPModel.from_pretrained(place), base.processor).eval()
    assert_close(embeds(model), embeds(quick))
    model, reading = read_checkpoint(file_of(theirs, tmp_path), quick)
    assert_close(embeds(model), reference_embeds(theirs, quick, quick=True))
    assert "Activation (quick_gelu)" in str(reading)


def test_there_and_back_is_bit_equal_and_the_config_says_what_the_model_is(base, stock, folder_of, theirs):
    place = folder_of()
    written = read_json(place / "open_clip_config.json")
    says("vision_cfg", **DEFAULTS, pool_type="tok")(place)
    model, reading = read_checkpoint(place, base)
    assert all(torch.equal(t, stock.state_dict()[n]) for n, t in model.model.state_dict().items())
    assert (reading.read, reading.from_base, reading.ignored) == (62, (), 0)
    assert reading.notes == ("Tokenizer and processor are the base's.",), "no difference where there is none"
    (place / "open_clip_model.safetensors").unlink()
    torch.save(theirs, place / "open_clip_pytorch_model.bin")
    assert fingerprint(read_checkpoint(place, base)[0]) == fingerprint(model)
    tower = {"width": 32, "layers": 2, "mlp_ratio": 2.0}
    context = {"context_length": base.config.text_config.max_position_embeddings}
    text = context | {"vocab_size": len(base.processor.tokenizer), "heads": 2, "hf_tokenizer_name": "model"}
    vision = {"image_size": 32, "patch_size": 8, "head_width": 16}
    cfg = {"embed_dim": 24, "quick_gelu": False, "vision_cfg": tower | vision, "text_cfg": tower | text}
    pixels = {"size": 32, "mean": [*MEAN], "std": [*STD], "interpolation": "bicubic", "resize_mode": "shortest"}
    assert written == {"model_cfg": cfg, "preprocess_cfg": pixels}
    assert (place / "tokenizer.json").is_file()


# What open_clip writes of parts that are not there.
DEFAULTS = {"timm_pool": "avg", "timm_model_name": None, "attn_pooler_heads": 8, "attentional_pool": False}
ANOTHER = [
    ("open_clip", says("vision_cfg", qk_norm={"a": 1}), "cannot hold: vision_cfg.qk_norm = "),
    ("open_clip", says("vision_cfg", pool_type="avg"), "cannot hold: vision_cfg.pool_type = "),
    ("open_clip", says("text_cfg", hf_model_name="x"), "cannot hold: text_cfg.hf_model_name = "),
    ("open_clip", says(init_logit_bias=-10), "cannot hold: init_logit_bias = "),
    # As in open_clip's XLM-V models: transformers would take 2 for the highest id.
    ("open_clip", says("text_cfg", pool_type="eos", eos_id=2), "cannot hold: text_cfg.pool_type = 'eos' at id 2"),
    ("open_clip", says("vision_cfg", head_width=8), "vision_config.num_attention_heads is 4 in the checkpoint's"),
    ("open_clip", says("text_cfg", heads=8), "text_config.num_attention_heads is 8 in the checkpoint's"),
    ("transformers", towers(num_attention_heads=4), "num_attention_heads is 4 in the checkpoint's .* 2 in the base"),
    ("transformers", edited("config.json", lambda c: c.update(model_type="siglip")), "'siglip': expected 'clip'"),
    ("transformers", lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "model-00002-of.*is missing"),
]


@pytest.mark.parametrize("form, change, message", ANOTHER)
def test_a_folder_of_another_model_or_not_whole_is_refused(base, folder_of, form, change, message):
    refused(message, folder_of(change, form=form), base)


@pytest.mark.parametrize("how", ["open_clip", "buffers", "preprocessor", "processor"])
def test_the_checkpoints_own_normalisation_is_taken_and_exported(how, base, theirs, folder_of, tmp_path):
    other = {"interpolation": "bilinear", "resize_mode": "squash"}
    image = {f"image_{k}": v for k, v in IMAGENET.items()}
    if how == "open_clip":
        place = folder_of(edited("open_clip_config.json", lambda c: c.update(preprocess_cfg=IMAGENET | other)))
    elif how == "buffers":
        buffers = {f"normalize.{k}": torch.tensor(v).view(1, 3, 1, 1) for k, v in IMAGENET.items()}
        place = file_of({f"model.{n}": t for n, t in theirs.items()} | buffers, tmp_path)
    else:
        place = folder_of(form="transformers")
        write_json(place / f"{how}_config.json", {"image_processor": image} if how == "processor" else image)
    model, reading = read_checkpoint(place, base)
    assert_close(embeds(model), reference_embeds(theirs, base, **IMAGENET))
    assert str(reading).count(" the checkpoint's was taken") == 2
    for resized in ("interpolation is 'bilinear', the processor's 'bicubic'", "resize_mode is 'squash'"):
        assert (resized in str(reading)) == (how == "open_clip")
    model.save_pretrained(tmp_path / "out")
    saved = ZeroShotClassifier.from_pretrained(tmp_path / "out")
    assert np.allclose(saved.mean.flatten(), IMAGENET["mean"]) and np.allclose(saved.std.flatten(), IMAGENET["std"])
    assert list(base.processor.image_processor.image_mean) == list(MEAN)


def test_two_normalisations_are_refused_and_the_same_twice_is_none(base, theirs, tmp_path):
    same = {"mean": torch.tensor(MEAN), "std": torch.tensor(STD)}
    assert "taken" not in str(read_checkpoint(file_of(theirs | same, tmp_path), base)[1]).split("\n", 1)[1]
    two = {"mean": torch.tensor(MEAN), "teacher.mean": torch.tensor(IMAGENET["mean"])}
    refused("more than one mean", file_of(theirs | two, tmp_path), base)
    odd = theirs | {"mean": torch.tensor([122.7, 116.7, 104.0])}
    refused(r"mean is \[122.*expected three numbers in \[0, 1\]", file_of(odd, tmp_path), base)


UNSAYABLE = {  # what the message says: the part of a model, and what is changed in it
    r"both .* alike, .* \['gelu', 'quick_gelu'\]": (lambda m: m.config.text_config, {"hidden_act": "quick_gelu"}),
    "resizes to 32 px.*'shortest_edge': 40": (lambda m: m.processor.image_processor, {"size": {"shortest_edge": 40}}),
    "Pillow's filter 1": (lambda m: m.processor.image_processor, {"resample": 1}),
}


@pytest.mark.parametrize("message", UNSAYABLE)
def test_what_open_clip_cannot_express_is_refused_before_anything_is_written(base, tmp_path, message):
    model, (part, changes) = copy.deepcopy(base), UNSAYABLE[message]
    vars(part(model)).update(changes)
    with pytest.raises(ValueError, match=message):
        write_open_clip(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, notes", [(pooled_elsewhere, 1), (changed, 6)])
def test_pooling_activation_epsilon_and_normalisation_go_there_and_back(base, tmp_path, change, notes):
    model = change(base)
    assert write_open_clip(model, tmp_path) == 62
    again, reading = read_checkpoint(tmp_path, base)  # whose own config says otherwise
    assert all(torch.equal(one, two) for one, two in zip(embeds(again), embeds(model), strict=True))
    assert not torch.equal(embeds(again)[1], embeds(base)[1])
    assert str(reading).count("the checkpoint's was taken") == notes


@pytest.mark.parametrize("ids, size, known", [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_openais_vocabulary_is_known_by_its_ids_and_another_goes_along(base, tmp_path, monkeypatch, ids, size, known):
    tokenizer, prompt = base.processor.tokenizer, "a photo of a cat"
    known_as = (prompt, [i + ids for i in tokenizer(prompt)["input_ids"]], len(tokenizer) + size)
    monkeypatch.setattr(convert_checkpoint, "OPENAI_VOCABULARY", known_as)
    write_open_clip(base, tmp_path)
    text = read_json(tmp_path / "open_clip_config.json")["model_cfg"]["text_cfg"]
    assert ("hf_tokenizer_name" not in text) == (not (tmp_path / "tokenizer.json").exists()) == known
