"""Pre-training learns, the shipped pair is what the docs say, and the quickstart compares methods at one budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.common import load_model, open_images
from hpt_hf.commands.parser import parse
from hpt_hf.commands.quickstart import overrides
from hpt_hf.commands.train import RECIPE, build_schedule
from hpt_hf.data.dataset import DatasetSpec
from hpt_hf.evaluation.evaluator import attack_all
from hpt_hf.lab.datasets import LAB_SUITE, WEIGHTS, lab_images
from hpt_hf.lab.glyphs import GlyphWorld
from hpt_hf.lab.pretrain import (
    contrastive_loss,
    new_clip,
    new_processor,
    pretrain,
    pretraining_arguments,
    row_batches,
    train_tokenizer,
    world_batches,
)


def test_contrastive_loss_is_clips_own_when_no_caption_repeats():
    torch.manual_seed(0)
    images, texts, scale = torch.randn(6, 8), torch.randn(6, 8), torch.tensor(10.0)
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    clip = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    torch.testing.assert_close(contrastive_loss(images, texts, scale, torch.arange(6)), clip)


def test_pictures_with_one_caption_are_positives_of_each_other():
    """Nothing is to be told apart, so moving an image towards its twin's caption cannot raise the loss."""
    embeds = torch.eye(3)
    captions = torch.tensor([0, 0, 1])
    good = contrastive_loss(torch.stack([embeds[0], embeds[0], embeds[1]]), embeds[:2], torch.tensor(20.0), captions)
    bad = contrastive_loss(torch.stack([embeds[0], embeds[1], embeds[1]]), embeds[:2], torch.tensor(20.0), captions)
    # Text -> image of a caption with two pictures cannot fall below log 2, weighted by its share of the batch.
    assert good < bad and abs(good - (2 / 3) * np.log(2) / 2) < 1e-3


def test_pretraining_learns_and_repeats_itself(tmp_path):
    world = GlyphWorld(0, groups=("dice",))
    tokenizer = train_tokenizer([world[i].caption for i in range(200)])
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = new_clip(tokenizer, vision={**size, "patch_size": 8}, text=size)
        how = {"max_steps": 12, "learning_rate": 1e-3, "warmup_steps": 2, "logging_steps": 6, "save_strategy": "no"}
        args = pretraining_arguments(str(tmp_path), **how)
        log = pretrain(model, new_processor(tokenizer), world_batches(world, 16), args)
        losses = [entry["loss"] for entry in log if "loss" in entry]
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert losses[-1] < losses[0]
    assert torch.equal(*weights)


def test_end_of_text_has_the_highest_id():
    """CLIP's legacy pooling reads the text at the highest id; with it elsewhere a CLIP trains on a random word."""
    tokenizer = train_tokenizer(["a red cat", "a blue dog"] * 5)
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer("a red cat")["input_ids"][-1] == tokenizer.eos_token_id


def test_the_context_fits_the_longest_caption_or_says_how_many_it_cuts(caplog):
    captions = ["a cat"] * 5 + ["a very long caption about a cat and a dog and a house"]
    fitting = train_tokenizer(captions, max_length=None)
    assert fitting.model_max_length == max(len(fitting(c)["input_ids"]) for c in captions) < 77
    assert train_tokenizer(captions, max_length=8).model_max_length == 8
    assert "1 of 2 different captions are longer" in caplog.text


def test_jitter_goes_from_the_picture_itself_to_another_hand_and_hangs_on_seed_and_step():
    rows = [(GlyphWorld(0)[i].image, ("one", "two")) for i in range(5)]
    first, again, other = (row_batches(rows, 8, seed=s)(3) for s in (0, 0, 1))
    assert np.array_equal(first[0], again[0]) and first[1] == again[1] and not np.array_equal(first[0], other[0])
    assert first[0].shape == (8, 32, 32, 3) and first[0].dtype == np.uint8
    row = [(GlyphWorld(0)[3].image, ("one",))]
    spreads = []
    for jitter in (0.0, 0.25, 1.0):
        pictures = row_batches(row, 16, jitter=jitter)(0)[0].astype(float)
        spreads.append(np.abs(pictures - pictures.mean(0)).mean())
    assert spreads[0] == 0 and 1 < spreads[1] < spreads[2]
    still = row_batches(row, 1, jitter=0.0)(0)[0][0].astype(float)
    original = np.asarray(row[0][0].convert("RGB").resize((32, 32)), float)
    assert np.abs(still - original).mean() < 12, "without jitter it is the picture, resized"


def test_the_shipped_pair():
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*")) <= 12_000_000
    student, proxy = load_model("lab:student"), load_model("lab:proxy")
    assert student.config.vision_config.patch_size != proxy.config.vision_config.patch_size
    attack = EvaluationAttack(ThreatModel("linf", "8/255"), steps=5)
    pictures = lab_images("digits", 40, faces="test", seed=5)
    for model in (student, proxy):
        after = attack_all(model.set_classes(pictures.classes, pictures.templates), pictures, attack).after(0)
        assert after["n_clean"] > 28 and after["n_robust"] < 16, "it reads, and is a vanilla CLIP"


def test_no_name_of_the_suite_is_cut_all_prompts_differ_and_none_is_seen_in_fine_tuning():
    trained = set(lab_images("letters", 176, faces="train").classes)
    assert len(trained) == 176 and len(LAB_SUITE) >= 15
    for name in ("lab:student", "lab:proxy"):
        model = load_model(name)
        for task in LAB_SUITE:
            pictures = lab_images(task.removeprefix("lab:"), 1, faces="test")
            embeds = model.set_classes(pictures.classes, pictures.templates).head  # raises for a name that is too long
            assert (embeds @ embeds.T).fill_diagonal_(-1).max() < 0.9999 and not trained & set(pictures.classes), task


@pytest.mark.parametrize("method", ["hpt", "tecoa"])
def test_the_quickstart_gives_every_method_as_many_steps(method):
    totals = []
    for flags in (overrides("hpt_gpd"), overrides(method)):
        _, recipe, training = parse(RECIPE, ["--config", "quickstart", *flags])
        totals.append(training.resolve(build_schedule(recipe), 73).total_steps)
    assert totals[0] == totals[1] > 73


def test_real_sets_need_their_folder(tmp_path):
    with pytest.raises(ValueError, match="--data_dir"):
        open_images(DatasetSpec("real:digits"), training=False)
    with pytest.raises(FileNotFoundError, match="--data_dir must hold"):
        open_images(DatasetSpec("real:digits"), training=False, data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="no task 'klingon'"):
        open_images(DatasetSpec("lab:klingon"), training=False)
