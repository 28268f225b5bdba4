"""The photographs' world on a small folder of its layout: images and names of each set, and pre-training on it."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, CLIPTokenizer

from hpt_hf.commands.common import load_model, open_images
from hpt_hf.commands.pretrain import main
from hpt_hf.data.dataset import DatasetSpec
from hpt_hf.lab.photographs import GROUPS, PHOTO_SUITE, PHOTO_VALIDATION, captioned_photographs
from hpt_hf.lab.pretrain import photograph_batches

NAMES = ("collie", "tabby cat", "lion", "goldfish", "robin", "school bus", "pizza", "abacus")
CHAINS = ("dog", "cat, feline", "feline", "fish, sea creature", "bird", "bus, vehicle", "food", "object")


def images(count: int, seed: int) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 255, (count, 16, 20, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


def write(file, count: int, seed: int, **columns) -> None:
    """`columns`: name -> (class names, values), or values alone."""
    features, values = {"image": datasets.Image()}, {"image": images(count, seed)}
    for name, given in columns.items():
        values[name] = given[1] if isinstance(given, tuple) else given
        text = datasets.Value("string")
        kind = text if isinstance(values[name][0], str) else datasets.List(text)
        features[name] = datasets.ClassLabel(names=list(given[0])) if isinstance(given, tuple) else kind
    datasets.Dataset.from_dict(values, features=datasets.Features(features)).to_parquet(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("photos")
    for split, count, seed in (("train", 24, 0), ("val", 16, 1)):
        labels = [i % 8 for i in range(count)]
        wnids = [f"n{label}" for label in labels]
        write(place / f"tiny_imagenet-{split}.parquet", count, seed, label=(NAMES, labels), wnid=wnids)
    kinds = {
        f"n{i}": {"name": name, "synonyms": [f"old {name}"], "hypernyms": chain.split(", ")}
        for i, (name, chain) in enumerate(zip(NAMES, CHAINS, strict=True))
    }
    (place / "tiny_imagenet_hypernyms.json").write_text(json.dumps(kinds))
    write(place / "flickr8k-train.parquet", 4, 2, caption=[[f"a dog runs {i}", "grass"] for i in range(4)])
    domains = (("art painting", "cartoon", "photo", "sketch"), [i // 2 for i in range(8)])
    write(place / "pacs-test.parquet", 8, 3, label=(("dog", "horse"), [i % 2 for i in range(8)]), domain=domains)
    for split, seed in (("train", 4), ("test", 5)):
        write(place / f"cifar10-{split}.parquet", 6, seed, label=(("cat", "ship"), [0, 1] * 3))
    return place


def opened(name: str, folder, *, training=False):
    return open_images(DatasetSpec(f"photos:{name}"), training=training, data_dir=str(folder))


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("tiny_imagenet", NAMES, 16),
        ("tiny_imagenet narrow", ("collie", "robin"), 4),
        ("tiny_imagenet held out", ("tabby cat", "school bus"), 4),
        ("tiny_imagenet seen", ("collie", "lion", "robin", "pizza"), 8),
        ("tiny_imagenet unseen", ("goldfish", "abacus"), 4),
        ("pacs cartoon", ("dog", "horse"), 2),
        ("cifar10", ("cat", "ship"), 6),
    ],
)
def test_a_set_holds_its_classes_and_its_own_split(name, classes, count, folder):
    tests, training = opened(name, folder), opened(name, folder, training=True)
    assert tests.classes == classes and len(tests) == count and set(tests.labels) == set(range(len(classes)))
    assert (tests.digest != training.digest) == name.startswith(("tiny", "cifar")), "pacs has no training images"


def test_a_class_is_asked_for_by_the_first_kind_in_its_chain_and_what_is_not_there_is_an_error(folder):
    found = opened("tiny_imagenet groups", folder)
    told = [GROUPS[label] for label in found.labels[:7]]
    assert told == ["dog", "feline", "feline", "sea creature", "bird", "vehicle", "food"]
    assert found.classes == GROUPS and len(found) == 14, "an abacus is no kind"
    assert not set(PHOTO_VALIDATION) & set(PHOTO_SUITE), "settings are not chosen on what they are measured on"
    for name, says in (("cifar", "did you mean cifar10"), ("food101", "no .*food101-test.parquet")):
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            opened(name, folder)


def test_models_are_pretrained_on_training_images_alone_under_all_their_names(folder):
    rows = captioned_photographs(str(folder))
    assert len(rows) == 28
    asked = {"collie", "a collie, a kind of dog", "This is a photo of a feline", "This is a photo of a old lion"}
    assert asked <= {c for _, cs in rows[:24] for c in cs} and rows[24][1] == ("a dog runs 0", "grass")
    seen = {np.asarray(image).tobytes() for image, _ in rows}
    for name in ("tiny_imagenet", "cifar10", "pacs photo"):
        assert not seen & {np.asarray(row["image"]).tobytes() for row in opened(name, folder)}


def test_every_photograph_is_seen_once_an_epoch_cropped_alike_at_the_same_step(folder):
    rows = [(image, (str(i),)) for i, (image, _) in enumerate(captioned_photographs(str(folder)))]
    one, again, other = (photograph_batches(rows, 7, image_size=12, seed=s) for s in (0, 0, 1))
    assert np.array_equal(one(3)[0], again(3)[0]) and not np.array_equal(one(3)[0], other(3)[0])
    assert one(0)[0].shape == (7, 12, 12, 3) and one(0)[0].dtype == np.uint8
    for epoch in (0, 1):
        assert sorted(int(c) for step in range(4) for c in one(4 * epoch + step)[1]) == list(range(28))
    assert one(0)[1] != one(4)[1]


def test_a_killed_pretraining_goes_on_from_its_checkpoint(folder, tmp_path, monkeypatch):
    flags = f"--architecture convolution --world photographs --data_dir {folder} --vocab_size 600 --batch_size 8"
    flags += " --max_steps 4 --save_steps 2 --output_dir"
    main([*flags.split(), str(tmp_path / "whole")])
    asked = []

    def dying_once(*args, **kwargs):
        def batch(step):
            asked.append(step)
            if asked == [0, 1, 2, 3]:
                raise KeyError("killed")
            return photograph_batches(*args, **kwargs)(step)

        return batch

    monkeypatch.setattr("hpt_hf.commands.pretrain.photograph_batches", dying_once)
    with pytest.raises(KeyError, match="killed"):
        main([*flags.split(), str(tmp_path / "killed")])
    main([*flags.split(), str(tmp_path / "killed")])
    assert asked == [0, 1, 2, 3, 2, 3] and not list(tmp_path.glob("*.checkpoints"))
    whole, resumed = (AutoModel.from_pretrained(tmp_path / run).state_dict() for run in ("whole", "killed"))
    texts = [CLIPTokenizer.from_pretrained(tmp_path / run)("an old lion runs") for run in ("whole", "killed")]
    assert texts[0] == texts[1] and all(torch.equal(whole[name], resumed[name]) for name in whole)
    record = json.loads((tmp_path / "killed" / "pretrain.json").read_text())
    assert record["arguments"]["architecture"] == "convolution"
    classifier = load_model(str(tmp_path / "killed"))
    assert classifier.image_size == 48 and len(classifier.set_classes(NAMES).head) == 8
