"""Proves that a stream is a data set like others: the same pictures, an order that hangs on seed, epoch and place alone, and resumption in the middle of an epoch."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import datasets
import pytest
import torch
from conftest import CLASSES, gpd_schedule, make_images, make_trainer, weights
from PIL import Image

from hpt_hf.data import streaming as stream
from hpt_hf.data.collator import Collator
from hpt_hf.data.dataset import DatasetSpec
from hpt_hf.data.streaming import open_stream
from hpt_hf.models.zero_shot import ZeroShotClassifier


def write_parquet(folder, pictures, *, files=3, labels=None, feature=None):
    """Shards of unequal length, as the Hub has them."""
    folder.mkdir(parents=True, exist_ok=True)
    total = len(pictures)
    cuts = [round(total * (i / files) ** 1.5) for i in range(files + 1)]
    kinds = {"image": datasets.Image(), "label": feature or datasets.ClassLabel(names=list(pictures.classes))}
    for number, (a, b) in enumerate(itertools.pairwise(cuts)):
        rows = [pictures[i] for i in range(a, b)]
        columns = {"image": [r["image"] for r in rows], "label": labels[a:b] if labels else [r["label"] for r in rows]}
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        table.to_parquet(str(folder / f"train-{number:05}-of-{files:05}.parquet"))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("shards") / "data", make_images(40))


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """`datasets` waits five seconds at the end of every pass over several shards, for Arrow's threads."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 7)


def opened(folder, **changes):
    pictures = open_stream(DatasetSpec(folder))
    for name, value in changes.items():
        setattr(pictures, name, value)
    return pictures


def seen(pictures) -> list[tuple[bytes, int]]:
    return [(row["image"], row["label"]) for row in pictures]


def test_a_stream_holds_every_picture_once_with_its_label(folder, small_blocks):
    pictures, stored = opened(folder), make_images(40)
    rows = seen(pictures)
    assert len(pictures) == len(rows) == 40 and pictures.classes == CLASSES and pictures.labelled
    found = {(Image.open(io.BytesIO(image)).tobytes(), label) for image, label in rows}
    assert found == {(stored[i]["image"].tobytes(), stored[i]["label"]) for i in range(40)}


def test_the_order_hangs_on_seed_and_epoch_and_on_nothing_else(folder, small_blocks):
    first = seen(opened(folder))
    assert first == seen(opened(folder))
    others = [seen(opened(folder, seed=1)), seen(opened(folder, epoch=1))]
    assert all(sorted(o) == sorted(first) and o != first for o in others) and others[0] != others[1]
    stored = [row[0] for row in sorted(first)]
    assert [row[0] for row in first] != stored, "shuffled"


@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 20, 39])
def test_taken_up_anywhere_it_goes_on_as_it_would_have(folder, small_blocks, start):
    whole, rest = seen(opened(folder)), seen(opened(folder, start=start))
    assert len(rest) == 40 and rest[start:] == whole[start:]
    assert all(isinstance(image, Image.Image) for image, _ in rest[:start]), "nothing was decoded for these"


def test_the_next_epoch_begins_at_its_beginning(folder, small_blocks):
    pictures = opened(folder, epoch=2, start=20)
    pictures.set_epoch(2)
    assert pictures.start == 20
    pictures.set_epoch(3)
    assert pictures.start == 0 and seen(pictures) == seen(opened(folder, epoch=3))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_batches_that_one_process_makes(folder, small_blocks, student, workers):
    def batches(count):
        pictures = opened(folder, chunk=8)
        loader = torch.utils.data.DataLoader(
            pictures, batch_size=8, collate_fn=Collator(student.processor), num_workers=count, drop_last=True
        )
        return [b["image_ids"].tolist() for b in loader]

    alone = batches(0)
    assert len(alone) == 5 and len(set(sum(alone, []))) == 40
    assert batches(workers) == alone


def test_an_epoch_ends_with_the_last_whole_batch(folder, small_blocks):
    """The Trainer's own drop_last does not reach streams."""
    pictures = opened(folder, chunk=12)
    assert len(pictures) == len(seen(pictures)) == 36 and seen(pictures) == seen(opened(folder))[:36]


def test_fewer_pictures_than_there_are_can_be_asked_for_and_more_cannot(folder):
    assert len(seen(open_stream(DatasetSpec(folder), pictures=12))) == 12
    with pytest.raises(ValueError, match="--images 41: .* has 40"):
        open_stream(DatasetSpec(folder), pictures=41)
    for count in (0, -3):
        with pytest.raises(ValueError, match=f"--images {count}: expected at least 1"):
            open_stream(DatasetSpec(folder), pictures=count)


def test_splits_are_never_mixed(tmp_path):
    """Whoever asks for one split gets its files alone; whoever asks for one that is not there gets none."""
    folder = Path(write_parquet(tmp_path / "data", make_images(12), files=1))
    (folder / "train-00000-of-00001.parquet").rename(folder / "test-00000-of-00001.parquet")
    write_parquet(folder, make_images(20), files=2)
    assert len(seen(open_stream(DatasetSpec(str(folder), split="test")))) == 12
    assert len(seen(open_stream(DatasetSpec(str(folder))))) == 20
    with pytest.raises(ValueError, match="has no split 'val'; it has test, train: choose one with --split"):
        open_stream(DatasetSpec(str(folder), split="val"))


def test_a_stream_that_ends_early_says_so(folder):
    with pytest.raises(
        ValueError, match="ended after 40 pictures, and was said to have 44: give the number with --images"
    ):
        seen(opened(folder, length=44))


def test_names_are_matched_as_those_of_stored_data(folder):
    turned = tuple(reversed(CLASSES))
    pictures = open_stream(DatasetSpec(folder, classes=turned))
    truth = {image: CLASSES[label] for image, label in seen(opened(folder))}
    assert {image: turned[label] for image, label in seen(pictures)} == truth and pictures.classes == turned
    with pytest.raises(ValueError, match="2 class names were given and .* has 5 classes"):
        open_stream(DatasetSpec(folder, classes=("a", "b")))


def test_what_cannot_be_streamed_is_refused_with_the_reason(tmp_path):
    pictures = make_images(6)
    (tmp_path / "images").mkdir()
    pictures[0]["image"].save(tmp_path / "images" / "a.png")
    plain = write_parquet(tmp_path / "plain", pictures, files=1, feature=datasets.Value("int64"))
    words = write_parquet(tmp_path / "words", pictures, files=1, labels=["cat"] * 6, feature=datasets.Value("string"))
    wrong = write_parquet(
        tmp_path / "wrong", pictures, files=1, labels=[0, 1, 2, 3, 4, 9], feature=datasets.Value("int64")
    )
    with pytest.raises(ValueError, match="cannot be streamed: expected a Hub id, a parquet file"):
        open_stream(DatasetSpec(str(tmp_path / "images")))
    with pytest.raises(FileNotFoundError, match="no data at"):
        open_stream(DatasetSpec(str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="names no classes"):
        open_stream(DatasetSpec(plain))
    with pytest.raises(ValueError, match="of type string: a stream's must be numbers"):
        open_stream(DatasetSpec(words))
    with pytest.raises(ValueError, match=r"row \d of epoch 0 of wrong has the label 9, and there are 5 classes"):
        seen(open_stream(DatasetSpec(wrong, classes=CLASSES)))
    assert len(seen(open_stream(DatasetSpec(plain, classes=CLASSES)))) == 6


def test_a_damaged_picture_is_named_by_whoever_decodes_it(folder, student):
    row = next(iter(opened(folder))) | {"image": b"no picture"}
    with pytest.raises(ValueError, match=r"row \d+ of epoch 0 of data cannot be read .*repair or remove it"):
        Collator(student.processor)([row])


def train(folder, student_path, proxy_path, data, *, resume=None, **changes):
    student, proxy = (ZeroShotClassifier.from_pretrained(p).set_classes(CLASSES) for p in (student_path, proxy_path))
    settings = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3} | changes
    trainer = make_trainer(folder, student, gpd_schedule(), proxy=proxy, data=data, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("step", [1, 3, 4, 5, 7, 9])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_in_the_middle_of_an_epoch_it_ends_as_if_never_stopped(
    tmp_path, folder, small_blocks, student_path, proxy_path, step, workers
):
    """40 pictures, 8 a step, ten steps: epochs of five, of which most cuts fall into the middle; GPD's switch after the fifth."""
    settings = {"dataloader_num_workers": workers}
    whole = train(tmp_path, student_path, proxy_path, opened(folder), **settings)
    again = train(
        tmp_path / "again",
        student_path,
        proxy_path,
        opened(folder),
        resume=str(tmp_path / f"checkpoint-{step}"),
        **settings,
    )
    ours, theirs = weights(again.model), weights(whole.model)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert again.state.global_step == 10 and again.state.epoch == whole.state.epoch == 2.0


def test_accumulated_batches_equal_whole_ones(tmp_path, folder, small_blocks, student_path, proxy_path):
    whole = train(tmp_path / "a", student_path, proxy_path, opened(folder))
    parts = train(
        tmp_path / "b",
        student_path,
        proxy_path,
        opened(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    resumed = train(
        tmp_path / "c",
        student_path,
        proxy_path,
        opened(folder),
        resume=str(tmp_path / "b" / "checkpoint-3"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    a, b, c = (weights(t.model) for t in (whole, parts, resumed))
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-5
    assert all(torch.equal(b[n], c[n]) for n in b)


def test_the_recipe_streams_and_refuses_what_a_stream_cannot_give(tmp_path, folder, student_path, proxy_path):
    from hpt_hf.commands.parser import RecipeError, parse
    from hpt_hf.commands.train import RECIPE, build

    flags = ["--method", "hpt", "--dataset", folder, "--streaming", "true", "--model", student_path]
    flags += ["--proxy", proxy_path, "--use_cpu", "true", "--output_dir", str(tmp_path), "--disable_tqdm", "true"]
    flags += ["--per_device_train_batch_size", "8", "--num_train_epochs", "2"]
    trainer = build(*parse(RECIPE, flags))
    trainer.train()
    assert (
        trainer.state.global_step == 10 and trainer.record()["images"] == 40 and trainer.record()["dataset"] == "data"
    )
    with pytest.raises(RecipeError, match="--images says how long a stream is"):
        build(*parse(RECIPE, [*flags, "--streaming", "false", "--images", "12"]))
    with pytest.raises(RecipeError, match="not looked at before training"):
        build(*parse(RECIPE, [*flags, "--held_out", "0.1"]))
