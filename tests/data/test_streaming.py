"""A stream is a data set like others, in an order that hangs on seed, epoch and place, resumable inside an epoch."""

import io

import datasets
import pytest
import torch
from conftest import CLASSES, largest_difference, make_images, trainer_from_disk, weights, write_stream
from PIL import Image

from hpt_hf.data import streaming
from hpt_hf.data.collator import Collator
from hpt_hf.data.dataset import DatasetSpec
from hpt_hf.data.streaming import open_stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stream(tmp_path_factory.mktemp("shards") / "data", make_images(40))


@pytest.fixture(autouse=True)
def small_blocks_and_no_pause(monkeypatch):
    """`datasets` waits five seconds at the end of every pass over several shards, for Arrow's threads."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    monkeypatch.setattr(streaming, "BLOCK", 7)


def opened(folder, epoch=0, start=0, **how):
    images = open_stream(DatasetSpec(folder), **how)
    images.epoch, images.start = epoch, start
    return images


def seen(images) -> list[tuple[bytes, int]]:
    return [(row["image"], row["label"]) for row in images]


def test_a_stream_holds_every_image_once_with_its_label_in_an_order_of_seed_and_epoch_alone(folder):
    images = opened(folder)
    first = seen(images)
    assert len(images) == len(first) == 40 and images.classes == CLASSES and images.labelled and images.name == "data"
    found = {(Image.open(io.BytesIO(image)).tobytes(), label) for image, label in first}
    assert found == {(row["image"].tobytes(), row["label"]) for row in make_images(40)}
    assert first == seen(opened(folder)) != sorted(first)
    others = [seen(opened(folder, seed=1)), seen(opened(folder, epoch=1))]
    assert all(sorted(o) == sorted(first) and o != first for o in others) and others[0] != others[1]


def test_taken_up_anywhere_it_goes_on_as_it_would_have_and_the_next_epoch_at_its_beginning(folder):
    whole = seen(opened(folder))
    for start in (0, 1, 6, 7, 8, 20, 39):
        rest = seen(opened(folder, start=start))
        assert len(rest) == 40 and rest[start:] == whole[start:]
        assert all(isinstance(image, Image.Image) for image, _ in rest[:start]), "nothing was decoded for these"
    images = opened(folder, batch=4)
    images.fast_forward(2, 5)
    images.set_epoch(2)
    assert images.start == 20
    images.set_epoch(3)
    assert images.start == 0 and seen(images) == seen(opened(folder, epoch=3))


def test_workers_make_the_batches_that_one_process_makes(folder, student):
    def batches(count):
        how = {"batch_size": 8, "collate_fn": Collator(student.processor), "num_workers": count, "drop_last": True}
        return [b["image_ids"].tolist() for b in torch.utils.data.DataLoader(opened(folder, batch=8), **how)]

    alone = batches(0)
    assert len(alone) == 5 and len(set(sum(alone, []))) == 40
    assert batches(1) == batches(2) == alone


def test_an_epoch_ends_with_the_last_whole_batch_of_the_images_asked_for(folder):
    """The Trainer's own drop_last does not reach streams."""
    images = opened(folder, batch=12)
    assert len(images) == len(seen(images)) == 36 and seen(images) == seen(opened(folder))[:36]
    assert len(seen(opened(folder, length=12))) == 12
    for count in (41, 0):
        with pytest.raises(ValueError, match=f"--images {count}: expected 1 to 40"):
            opened(folder, length=count)
    images = opened(folder)
    images.length = 44
    with pytest.raises(ValueError, match="ended after 40 images, expected 44.*--images"):
        seen(images)


def test_splits_are_never_mixed(tmp_path):
    write_stream(tmp_path, make_images(12), files=1, split="test")
    folder = write_stream(tmp_path, make_images(20), files=2)
    for split, count in (("test", 12), ("train", 20), ("test+train", 32)):
        assert len(seen(open_stream(DatasetSpec(folder, split=split)))) == count


def test_names_are_matched_as_those_of_stored_data(folder):
    turned = tuple(reversed(CLASSES))
    images = open_stream(DatasetSpec(folder, classes=turned))
    truth = {image: CLASSES[label] for image, label in seen(opened(folder))}
    assert {image: turned[label] for image, label in seen(images)} == truth and images.classes == turned


def test_what_cannot_be_streamed_is_refused_with_the_reason(tmp_path, folder, student):
    images = make_images(6)
    plain = write_stream(tmp_path / "plain", images, names=None)
    words = write_stream(tmp_path / "words", images, labels=["cat"] * 6)
    wrong = write_stream(tmp_path / "wrong", images, labels=[0, 1, 2, 3, 4, 9], names=None)
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "empty", "cannot be streamed: expected a Hub id, a parquet file"),
        (plain, "names no classes"),
        (words, "of type string, expected numbers"),
        (tmp_path / "nowhere", "no data at"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_stream(DatasetSpec(str(path)))
    with pytest.raises(ValueError, match=r"row \d of epoch 0 of wrong has the label 9, and there are 5 classes"):
        seen(open_stream(DatasetSpec(wrong, classes=CLASSES)))
    assert len(seen(open_stream(DatasetSpec(plain, classes=CLASSES)))) == 6
    row = next(iter(opened(folder))) | {"image": b"no image"}  # which nobody looks at before it is decoded
    with pytest.raises(ValueError, match=r"row \d+ of epoch 0 of data cannot be read .*repair or remove it"):
        Collator(student.processor)([row])


def train(place, paths, folder, *, resume=None, batch=8, **changes):
    settings = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3} | changes
    data = opened(folder, batch=batch)
    trainer = trainer_from_disk(place, paths, data=data, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    return {}


@pytest.mark.parametrize(("workers", "step"), [(0, 1), (0, 4), (0, 5), (0, 7), (2, 3), (2, 5), (2, 9)])
def test_resumed_inside_an_epoch_it_ends_as_if_never_stopped(
    tmp_path, tmp_path_factory, whole_runs, folder, paths, step, workers
):
    """40 images, 8 a step, ten steps: two epochs of five; GPD's switch after the fifth."""
    settings = {"dataloader_num_workers": workers}
    if workers not in whole_runs:
        place = tmp_path_factory.mktemp("whole")
        whole_runs[workers] = place, train(place, paths, folder, **settings)
    place, whole = whole_runs[workers]
    checkpoint = str(place / f"checkpoint-{step}")
    again = train(tmp_path, paths, folder, resume=checkpoint, save_strategy="no", **settings)
    assert largest_difference(weights(again.model), weights(whole.model)) == 0
    assert again.state.global_step == 10 and again.state.epoch == whole.state.epoch == 2.0


def test_accumulated_batches_equal_whole_ones(tmp_path, folder, paths):
    halves = {"batch": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    whole = train(tmp_path / "a", paths, folder, save_strategy="no")
    parts = train(tmp_path / "b", paths, folder, **halves)
    checkpoint = str(tmp_path / "b" / "checkpoint-3")
    resumed = train(tmp_path / "c", paths, folder, resume=checkpoint, save_strategy="no", **halves)
    a, b, c = (weights(t.model) for t in (whole, parts, resumed))
    assert largest_difference(a, b) < 1e-5 and largest_difference(b, c) == 0
