"""Every image arrives with the right label, or as an error that names its row; the same rows in the same order wherever they lie."""

import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import CLASSES, encode, make_images, samples, write_parquet, write_tar
from PIL import Image

from hpt_hf.data.dataset import DatasetSpec, LabelledImages, load_images, logger
from hpt_hf.data.splits import held_out
from hpt_hf.models.zero_shot import TEMPLATE

NAMES = ("cat", "dog", "house")
RGB = [(255, 0, 0), (0, 128, 0), (0, 0, 255)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def plain(colour):
    return encode(Image.new("RGB", (8, 8), colour))


THREE = RED, GREEN, BLUE = [plain(c) for c in RGB]


def damaged():
    """A JPEG that ends in the middle, as after a broken download."""
    whole = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
    return whole[: len(whole) // 2]


def write_folder(folder, **classes):
    for name, images in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, encoded in enumerate(images):
            (folder / name / f"{i}.png").write_bytes(encoded)
    return str(folder)


def rows(images):
    return [(row["label"], row["image"].getpixel((0, 0))) for row in images]


def read(path, split="train", on_corrupt="error", **how):
    return rows(load_images(DatasetSpec(str(path), split, **how), on_corrupt=on_corrupt))


# --- where images come from


def test_a_parquet_file_brings_images_labels_and_names(tmp_path):
    images = load_images(write_parquet(tmp_path / "set [1].parquet", THREE, [2, 0, 1], names=NAMES))
    assert images.classes == NAMES and images.labelled and images.name == "set [1]" and images.templates == (TEMPLATE,)
    assert rows(images) == list(zip((2, 0, 1), RGB, strict=True)) and images.labels == [2, 0, 1]
    assert images.source == {"path": str(tmp_path / "set [1].parquet"), "split": "train"}
    assert images.data.features["image"] == datasets.Image(decode=False)
    assert images.data.features["label"] == datasets.ClassLabel(names=list(NAMES))


def test_an_image_folder_has_a_class_a_folder_in_alphabetical_order(tmp_path):
    folder = write_folder(tmp_path / "set", zebra=[RED], Aardvark=[BLUE], ant=[GREEN, BLUE])
    (tmp_path / "set" / "ant" / "deeper").mkdir()
    (tmp_path / "set" / "ant" / "deeper" / "a.png").write_bytes(RED)
    images = load_images(folder)
    assert images.classes == ("Aardvark", "ant", "zebra") and images.name == "set"
    assert rows(images) == [(0, RGB[2]), (1, RGB[1]), (1, RGB[2]), (1, RGB[0]), (2, RGB[0])]


def test_splits_of_an_image_folder_are_told_from_classes(tmp_path):
    write_folder(tmp_path / "set" / "train", ant=[RED], bee=[GREEN])
    write_folder(tmp_path / "set" / "test", ant=[BLUE], bee=[BLUE])
    assert read(tmp_path / "set") == list(enumerate(RGB[:2])) and read(tmp_path / "set", "test")[0] == (0, RGB[2])
    # A railway among vehicles is no split: PASCAL VOC and COCO have a class called "train".
    vehicles = load_images(write_folder(tmp_path / "vehicles", bus=[RED], train=[GREEN, BLUE]))
    assert vehicles.classes == ("bus", "train") and len(vehicles) == 3


def test_what_lies_beside_the_images_is_counted_in_one_line(tmp_path, caplog):
    folder = write_folder(tmp_path / "set", cat=[RED], dog=[GREEN, BLUE])
    for name in ("cat/notes.txt", "cat/._0.png", ".ipynb_checkpoints/x.png", "dog/Thumbs.db"):
        Path(folder, name).parent.mkdir(exist_ok=True)
        Path(folder, name).write_bytes(b"x")
    assert len(load_images(folder)) == 3
    (said,) = [r.getMessage() for r in caplog.records]
    assert "3 images; left out as hidden or no image are 4 others (._0.png, .ipynb_checkpoints, Thumbs.db, " in said


def test_a_split_that_is_not_there_or_cannot_be_told_is_an_error_and_hidden_folders_are_none(tmp_path):
    for split, image in (("Train", RED), ("testing", GREEN)):
        write_folder(tmp_path / "set" / split, cat=[image], dog=[image])
    write_folder(tmp_path / "set" / ".cache" / "huggingface", x=[RED])
    assert [len(read(tmp_path / "set", split)) for split in ("train", "test")] == [2, 2]
    with pytest.raises(ValueError, match="no split 'val', it has Train, testing"):
        read(tmp_path / "set", "val")
    write_folder(tmp_path / "set" / "extra", x=[RED])
    with pytest.raises(ValueError, match="folders of splits .* beside others"):
        read(tmp_path / "set", "train")


@pytest.mark.parametrize("columns", [{"image": "img", "label": "fine"}, {"image": "photo", "label": "cls"}])
def test_columns_are_found_by_type_or_named(tmp_path, columns):
    file = write_parquet(tmp_path / "set.parquet", THREE, [0, 1, 2], names=NAMES, **columns)
    assert read(file) == read(file, **columns) == list(enumerate(RGB))


def test_a_column_that_is_not_there_or_not_unique_lists_those_that_are(tmp_path):
    file = write_parquet(tmp_path / "set.parquet", THREE, [0, 1, 2], names=NAMES)
    two = datasets.Features({"left": datasets.Image(), "right": datasets.Image()})
    cells = [{"bytes": RED, "path": None}]
    datasets.Dataset.from_dict({"left": cells, "right": cells}, features=two).to_parquet(tmp_path / "two.parquet")
    datasets.Dataset.from_dict({"label": [0]}).to_parquet(tmp_path / "none.parquet")
    for path, given, message in (
        (file, {"image": "photo"}, "'photo'.*image, label"),
        (file, {"label": "y"}, "'y'.*image, label"),
        (tmp_path / "two.parquet", {}, "'left', 'right'.*--image_column"),
        (tmp_path / "none.parquet", {}, "no one column for the image.*label"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(DatasetSpec(str(path), classes=NAMES, **given))


def test_images_in_memory_are_kept_to_the_last_bit():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    for image in (Image.fromarray(pixels), encode(Image.fromarray(pixels), "BMP")):
        images = LabelledImages.from_images([image], [1], NAMES)
        assert np.array_equal(images[0]["image"], pixels) and images[0]["label"] == 1
    with pytest.raises(IndexError):
        images[1]


# --- splits


def test_splits_named_as_on_the_hub_are_read_alone_or_as_a_union_in_the_order_asked_for(tmp_path):
    for number, split in enumerate(("train", "validation", "test")):
        file = tmp_path / "set" / "data" / f"{split}-00000-of-00001-70d52db3.parquet"
        write_parquet(file, [THREE[number]], [number], names=NAMES)
    # What the Hub's cache holds may be a part of what its README speaks of.
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs: [{config_name: default, data_files: [{split: train, path: data/train-*}, "
        "{split: validation, path: data/validation-*}, {split: gone, path: data/gone-*}]}]\n---\n"
    )
    assert read(tmp_path / "set", "train+validation+test") == list(enumerate(RGB))
    assert read(tmp_path / "set", "test+train") == [(2, RGB[2]), (0, RGB[0])]
    assert read(tmp_path / "set", "test") == [(2, RGB[2])]
    (tmp_path / "set" / "README.md").unlink()
    for split in ("gone", "train+gone"):
        with pytest.raises(ValueError, match="no split 'gone', it has .*train.*--split"):
            read(tmp_path / "set", split)


def test_files_that_name_no_split_are_all_read_and_a_split_that_is_not_there_is_an_error(tmp_path):
    for part in range(2):
        write_parquet(tmp_path / "set" / f"train-0000{part}-of-00002.parquet", [THREE[part]], [part])
    write_parquet(tmp_path / "free" / "rows.parquet", THREE, [0, 1, 2])
    assert read(tmp_path / "set") == read(tmp_path / "set", "Training") == list(enumerate(RGB[:2]))
    assert read(tmp_path / "free", "test") == list(enumerate(RGB))
    for split in ("test", "train+test"):
        with pytest.raises(ValueError, match="no split 'test', it has train"):
            read(tmp_path / "set", split)
    (tmp_path / "set" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="got 1 shards of train, expected 2: number 1 is missing"):
        read(tmp_path / "set")


# --- labels and class names


def test_given_names_are_matched_by_name_or_rename_in_order(tmp_path):
    """An empty folder, which no image stands for, or another order must not push names one place on."""
    folder = write_folder(tmp_path / "set", cat=[], dog=[RED], house=[GREEN])
    for given in (NAMES, ("house", "cat", "dog")):
        images = load_images(DatasetSpec(folder, classes=given))
        assert images.classes == given and [given[label] for label in images.labels] == ["dog", "house"]
    assert load_images(DatasetSpec(folder, classes=("hound", "home"))).classes == ("hound", "home")
    mapped = load_images(DatasetSpec(folder, classes={"dog": "hound", "house": "home", "cat": "x"}))
    assert mapped.classes == ("hound", "home") and mapped.labels == [0, 1]
    numbers = write_parquet(tmp_path / "numbers.parquet", THREE, [0, 1, 2], names=None)
    assert load_images(DatasetSpec(numbers, classes=NAMES)).classes == NAMES
    with pytest.raises(ValueError, match="names no classes.*--classes"):
        load_images(numbers)


def test_labels_that_are_words_become_classes_in_alphabetical_order_or_in_the_order_given(tmp_path):
    file = write_parquet(tmp_path / "set.parquet", THREE, ["dog", "cat", "dog"])
    images = load_images(file)
    assert images.classes == ("cat", "dog") and images.labels == [1, 0, 1]
    images = load_images(DatasetSpec(file, classes=("dog", "bird", "cat")))
    assert images.classes == ("dog", "bird", "cat") and images.labels == [0, 2, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3, 1], "1 labels.*row 1 has 3 of 3 classes"),
        ([0, 1, -2], "row 2 has -2"),
        ([7, 7, 7], "3 labels.*row 0 has 7"),
        ([0, None, 1], "1 of 3 rows.*no label"),
        ([0, -1, 1], "1 of 3 rows.*no label"),
    ],
)
def test_labels_out_of_range_name_the_first_row_and_all_or_none_must_be_labelled(tmp_path, labels, message):
    file = write_parquet(tmp_path / "set.parquet", THREE, labels, names=None)
    with pytest.raises(ValueError, match=message):
        load_images(DatasetSpec(file, classes=NAMES))


@pytest.mark.parametrize("kind", ["folder", "no column", "None", "-1"])
def test_images_without_any_labels_are_a_set_if_the_classes_are_named(tmp_path, kind):
    if kind == "folder":
        path = write_folder(tmp_path, images=THREE) + "/images"
    else:
        labels = {"no column": None, "None": [None] * 3, "-1": [-1] * 3}[kind]
        path = write_parquet(tmp_path / "set.parquet", THREE, labels, names=None)
    images = load_images(DatasetSpec(path, classes=NAMES))
    assert not images.labelled and rows(images) == [(None, c) for c in RGB] and images.classes == NAMES
    with pytest.raises(ValueError, match="names no classes"):
        load_images(path)


# --- refused before any work


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "nowhere", "a/b/c"])
def test_a_path_that_does_not_exist_is_named(path):
    with pytest.raises(FileNotFoundError, match=f"no data at {path}"):
        load_images(path)


def test_what_holds_no_images_says_so(tmp_path):
    folder = write_folder(tmp_path / "set", a=THREE, b=THREE)
    (tmp_path / "set" / "loose.png").write_bytes(RED)
    (tmp_path / "empty").mkdir()
    (tmp_path / "set.csv").write_text("a,b")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 no more")
    for path, message in (
        (folder, r"which class is loose\.png"),
        (tmp_path / "empty", "holds no parquet file and no image"),
        (tmp_path / "set.csv", "not a parquet file"),
        (tmp_path / "torn.parquet", "torn.parquet.* cannot be read"),
        (write_parquet(tmp_path / "none.parquet", [], []), "no data|no images"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(str(path))
    with pytest.raises(ValueError, match="'error' or 'skip'"):
        load_images("/nowhere", on_corrupt="ignore")
    with pytest.raises(ValueError, match="exactly once"):
        load_images(DatasetSpec("/nowhere", templates=("a photo",)))


# --- damaged images


@pytest.mark.parametrize("broken", ["truncated", "text", "empty", "missing"])
def test_an_unreadable_image_names_its_row_or_is_skipped_and_listed(tmp_path, broken, monkeypatch):
    bad = {"truncated": damaged(), "text": b"<html>404</html>", "empty": b"", "missing": None}[broken]
    file = write_parquet(tmp_path / "set.parquet", [RED, bad, BLUE, bad], [0, 1, 2, 0], names=NAMES)
    images = load_images(file)
    assert len(images) == 4 and images[0]["label"] == 0  # read when asked for
    with pytest.raises(ValueError, match="^row 1 of set cannot be read .*--on_corrupt skip"):
        images[1]
    said = []
    monkeypatch.setattr(logger, "warning", said.append)
    kept = load_images(file, on_corrupt="skip")
    assert rows(kept) == [(0, RGB[0]), (2, RGB[2])] and [row for row, _ in kept.skipped] == [1, 3]
    assert all(f"row {row} of set" in reason for row, reason in kept.skipped)
    assert len(said) == 1 and "2 of 4 images of set are skipped: row 1" in said[0]
    rest = kept.without_class("cat")  # what is left keeps its own label and remembers its own row
    assert rows(rest) == [(2, RGB[2])] and rest.data["row"][:] == [2]
    assert (rest.classes, rest.skipped, rest.source) == (kept.classes, kept.skipped, kept.source)
    with pytest.raises(ValueError, match="none of the 2 images.*row 0"):
        load_images(write_parquet(tmp_path / "all.parquet", [bad, bad], [0, 1]), on_corrupt="skip")


def test_an_unreadable_file_of_a_folder_is_called_by_its_name(tmp_path):
    folder = write_folder(tmp_path / "set", a=[RED, damaged()], b=[GREEN])
    images = load_images(folder)
    with pytest.raises(ValueError, match=r"row 1 .*a/1\.png.* of set cannot be read"):
        images[1]
    assert read(folder, on_corrupt="skip") == list(enumerate(RGB[:2]))
    (tmp_path / "set" / "b" / "0.png").unlink()  # gone since it was listed
    with pytest.raises(ValueError, match="row 2 .*cannot be read.*FileNotFoundError"):
        images[2]


# --- parts of a set


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_the_held_out_slice_is_fixed_by_its_seed_and_disjoint(share):
    images = make_images(60)
    train, held = (part.data["row"][:] for part in held_out(images, share, seed=0))
    assert sorted([*train, *held]) == list(range(60)) and len(held) == round(share * 60)
    assert train == sorted(train) and held == sorted(held)
    again = held_out(make_images(60), share, seed=0)
    assert again[1].data["row"][:] == held != held_out(images, share, seed=1)[1].data["row"][:]
    assert len(set(again[1].labels)) > 1  # sets are sorted by class: a slice of the end would hold one class alone
    assert again[1][0]["image"].tobytes() == images[held[0]]["image"].tobytes()


def test_nothing_held_out_and_everything_held_out():
    images = make_images(10)
    assert held_out(images, 0.0, seed=0) == (images, None)
    for share, message in (
        (0.99, "none of the 10 images"),
        (0.01, "keeps none of the 10 images"),
        (-0.1, "at least 0 and below 1"),
        (1.0, "below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            held_out(images, share, seed=0)


def test_leaving_out_a_class_keeps_the_original():
    images = make_images(10)
    rest = images.without_class("cat").without_class("dog")
    assert len(images) == 10 and rest.labels == [2, 3, 4] * 2 and rest.classes == CLASSES
    assert images.without_class(None) is images
    with pytest.raises(ValueError, match="'hose' is none of the 5 classes of made; did you mean house"):
        images.without_class("hose")


def test_other_class_names_keep_images_and_labels():
    images = make_images(10).select([3, 7, 9])
    other = images.with_classes(NAMES + ("tree", "car"))
    assert other.classes == (*NAMES, "tree", "car") and rows(other) == rows(images)


# --- tar shards, as clip-benchmark lays them out


def write_shards(folder, *shards, split="test", names="cat\ndog\nhouse\n", templates=None):
    """A repository of clip-benchmark: `shards` are lists of members. -> DatasetSpec"""
    for number, members in enumerate(shards):
        write_tar(folder / split / f"{number}.tar", members)
    (folder / split / "nshards.txt").write_text(f"{len(shards)}\n")
    for file, text in (("classnames.txt", names), ("zeroshot_classification_templates.txt", templates)):
        if text is not None:
            (folder / file).write_text(text, encoding="utf-8")
    return DatasetSpec(str(folder), split=split)


@pytest.mark.parametrize(
    ("kind", "how"), [("webp", ("WEBP",)), ("jpg", ("JPEG",)), ("png", ("PNG",))], ids=["webp", "jpg", "png"]
)
def test_a_single_shard_is_read_as_images_and_not_as_the_text_beside_it(tmp_path, kind, how):
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    cells = [(encode(Image.new("RGB", (16, 16), c), *how), y) for c, y in zip(colours, (2, 0, 1), strict=True)]
    templates = "\n a photo of a {c}.\na {c} of {braces}\n\n"
    spec = write_shards(tmp_path / "wds [1]", samples(*cells, kind=kind), templates=templates)
    images = load_images(spec)
    assert (images.name, images.classes, images.labels) == ("wds [1]", NAMES, [2, 0, 1])
    assert all(np.abs(np.subtract(c, e)).max() < 16 for (_, c), e in zip(rows(images), colours, strict=True))
    assert images.templates == ("a photo of a {}.", "a {} of {braces}")
    assert images.source == {"path": str(tmp_path / "wds [1]"), "split": "test"}
    assert load_images(DatasetSpec(spec.path, "test", templates=("my {}",))).templates == ("my {}",)


def test_shards_are_counted_in_numbers_and_rows_keep_their_order(tmp_path):
    expected = [(i % 3, (i, 0, 0)) for i in range(22)]
    cells = [(plain(c), y) for y, c in expected]
    spec = write_shards(tmp_path / "set", *(samples(*cells[i : i + 2], start=i) for i in range(0, 22, 2)))
    assert rows(load_images(spec)) == expected  # by name, 10.tar would come before 2.tar
    assert load_images(spec).templates == (TEMPLATE,)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ("cat\ndog\n", None, "1 labels.*row 1 has 2 of 2 classes"),
        ("cat\n\nhouse\n", None, "class 1 has the name ''"),  # left out, the house's images would get the next name
        ("cat\nsunglasses\nsunglasses\n", None, "classes 1 and 2 are both called 'sunglasses'"),
        ("", None, "at least two"),
        (None, None, "names no classes"),
        (None, "a photo", "exactly once"),
        (None, "a {c} beside a {c}", "exactly once"),
    ],
)
def test_names_and_templates_that_do_not_fit_the_shards_are_refused(tmp_path, names, templates, message):
    spec = write_shards(tmp_path / "set", samples((RED, 0), (BLUE, 2)), names=names, templates=templates)
    with pytest.raises(ValueError, match=message):
        load_images(spec)
    if names is None and templates is None or names and names.count("sunglasses") == 2:
        assert read(spec.path, "test", classes=("cat", "sunglass", "sunglasses")) == [(0, RGB[0]), (2, RGB[2])]


@pytest.mark.parametrize("said", ["3\n", "many"])
def test_shards_that_are_missing_are_counted(tmp_path, said):
    spec = write_shards(tmp_path / "set", samples((RED, 0)), samples((BLUE, 1)))
    (tmp_path / "set" / "test" / "nshards.txt").write_text(said)
    with pytest.raises(ValueError, match=f"holds 2 shards.*says '{said.strip()}'"):
        load_images(spec)


def test_a_damaged_shard_is_named_wherever_it_ends(tmp_path):
    """tarfile itself takes most of these for a shorter archive."""
    spec = write_shards(tmp_path / "set", samples((RED, 0)), samples((BLUE, 1), (GREEN, 2)))
    shard = tmp_path / "set" / "test" / "1.tar"
    whole = shard.read_bytes()
    assert len(load_images(spec)) == 3
    torn = [whole[:end] for end in (*range(0, 4096, 256), 4096 + 100)]
    for content in (*torn, b"<html>404</html>" * 99, whole[:2048] + b"x" * 512 + whole[2560:]):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=r"1\.tar cannot be read .*download it again"):
            load_images(spec)


def test_a_damaged_image_in_a_sound_shard_names_its_row_or_is_skipped(tmp_path):
    spec = write_shards(tmp_path / "set", samples((RED, 2), (damaged(), 1), (BLUE, 0)))
    with pytest.raises(ValueError, match=r"^row 1 \(s0000001\.png\) of set cannot be read .*--on_corrupt skip"):
        load_images(spec)[1]
    assert rows(load_images(spec, on_corrupt="skip")) == [(2, RGB[0]), (0, RGB[2])]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*samples((RED, 0)), ("s0000001.png", RED)], r"0\.tar.*cannot be read|no label"),
        ([("s0000000.cls", b"0\n")], "no one column for the image"),
        ([("s0.png", RED)], "no one column for the label"),
        ([*samples((RED, 0)), *samples((RED, 0))], r"0\.tar.*cannot be read.*Duplicate"),
        ([("s0.png", RED), ("s0.cls", b"cat")], r"0\.tar.*cannot be read.*'cat"),
        ([("s0.png", RED), ("s0.cls", b"-2")], "row 0 has -2"),
        ([], r"0\.tar.*cannot be read"),
    ],
)
def test_a_sample_that_is_not_one_image_with_one_label_is_refused(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        load_images(write_shards(tmp_path / "set", members))


def test_other_members_are_passed_over_and_may_be_asked_for(tmp_path):
    other = [("s0.mask.png", BLUE), ("s0.fine", b"1"), ("notes", b"x"), ("._s0.png", b"x"), ("s0.json", b"{}")]
    spec = write_shards(tmp_path / "set", [("s0.png", RED), ("s0.cls", b"0"), *other])
    assert read(spec.path, "test", image="png") == [(0, RGB[0])]
    assert read(spec.path, "test", image="mask.png", label="fine") == [(1, RGB[2])]


def test_a_split_of_shards_that_is_not_there_lists_those_that_are(tmp_path):
    for split in ("test", "train"):
        spec = write_shards(tmp_path / "set", samples((RED, 0)), split=split)
    with pytest.raises(ValueError, match="shards in test, train, none for the split 'valid'"):
        load_images(DatasetSpec(spec.path, "valid"))


@pytest.mark.parametrize("kind", ["shards", "parquet"])
def test_a_file_that_changed_is_read_anew_and_its_folder_left_as_it_was(tmp_path, kind):
    folder = tmp_path / "set"
    for colour, label in ((RED, 0), (BLUE, 1)):
        if kind == "shards":
            spec, file = write_shards(folder, samples((colour, label))), folder / "test" / "0.tar"
        else:
            file = folder / "train.parquet"
            write_parquet(file, [colour], [label])
            spec = DatasetSpec(str(folder))
        os.utime(file, ns=(0, label * 10**6))
        files = sorted(folder.rglob("*"))
        assert rows(load_images(spec)) == [(label, RGB[2 * label])] and sorted(folder.rglob("*")) == files


def test_sets_in_folders_and_files_called_like_splits_keep_their_own_names(tmp_path):
    for place in ("birds/val", "flowers/val", "plain"):
        write_folder(tmp_path / place, cat=[RED], dog=[GREEN])
    write_parquet(tmp_path / "birds2" / "test.parquet", THREE, [0, 1, 2])
    names = [load_images(str(tmp_path / p)).name for p in ("birds/val", "flowers/val", "plain", "birds2/test.parquet")]
    assert names == ["birds/val", "flowers/val", "plain", "birds2/test"]


def test_numbers_sort_as_numbers_and_files_of_other_class_orders_are_not_mixed(tmp_path):
    folder = write_folder(tmp_path / "numbers", **{str(n): [RED] for n in range(12)})
    names = tuple(f"thing {n}" for n in range(12))
    assert load_images(folder).classes == tuple(map(str, range(12)))
    assert load_images(DatasetSpec(folder, classes=names)).classes == names
    for part, order in enumerate((NAMES, NAMES[::-1])):
        write_parquet(tmp_path / "set" / f"train-0000{part}-of-00002.parquet", THREE, [0, 1, 2], names=order)
    with pytest.raises(ValueError, match="its parquet files name their columns or classes otherwise"):
        load_images(str(tmp_path / "set"))


def test_a_parquet_file_cannot_name_files_of_this_machine_and_a_pipe_is_no_image(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(RED)
    cells = [{"bytes": RED, "path": "a.png"}, {"bytes": None, "path": str(secret)}]
    table = pyarrow.table({"image": cells, "label": [0, 1]})
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    table = table.replace_schema_metadata(features.arrow_schema.metadata)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="row 1 of .*rows.parquet holds the path of a file"):
        load_images(str(tmp_path / "rows.parquet"))
    folder = write_folder(tmp_path / "set", cat=[RED], dog=[GREEN])
    os.mkfifo(tmp_path / "set" / "cat" / "pipe.png")
    assert len(load_images(folder)) == 2
    with pytest.raises(ValueError, match="pipe.png"):
        load_images(str(tmp_path / "set" / "cat" / "pipe.png"))


def parquet(path, **columns):
    """Columns as they are, images beside them."""
    features = {k: datasets.ClassLabel(names=["a", "b", "c"]) for k in columns if k == "sex"}
    data = datasets.Dataset.from_dict({"image": [{"bytes": b, "path": None} for b in THREE], **columns})
    for name, feature in {"image": datasets.Image(), **features}.items():
        data = data.cast_column(name, feature)
    data.to_parquet(path)
    return str(path)


@pytest.mark.parametrize(
    ("columns", "labels"),
    [
        ({"labels": [2, 0, 1]}, [2, 0, 1]),
        ({"sex": [0, 0, 1], "label": [2, 0, 1]}, [2, 0, 1]),
        ({"sex": [0, 0, 1], "label": ["c", "a", "b"]}, [2, 0, 1]),
        ({"label": [2.0, 0.0, 1.0]}, [2, 0, 1]),
        ({"label": [2.0, float("nan"), 1.0]}, "row 1 has nan, expected a whole number"),
        ({"label": [[2], [0], [1]]}, "expected one number or word each"),
    ],
)
def test_which_column_holds_the_labels_and_what_may_stand_in_it(tmp_path, columns, labels):
    spec = DatasetSpec(parquet(tmp_path / "set.parquet", **columns), classes=("a", "b", "c"))
    if isinstance(labels, str):
        with pytest.raises(ValueError, match=labels):
            load_images(spec)
    else:
        assert load_images(spec).labels == labels


ODD_PATHS = {"~/nothing/here": "no data at", "nothing/here": "no data at nothing/here", "a/b/c": "no data at a/b/c"}


@pytest.mark.parametrize("path", ODD_PATHS)
def test_what_is_not_there_is_said_so(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((OSError, ValueError), match=ODD_PATHS[path]):
        load_images(path)


@pytest.mark.parametrize("name", ["a [1] set", "a*b", "ä ö"])
def test_folders_of_any_name_and_the_folder_one_stands_in_are_read(name, monkeypatch, tmp_path):
    folder = write_folder(tmp_path / name, cat=[RED], dog=[GREEN])
    write_parquet(tmp_path / name / "files" / "rows.parquet", THREE, [0, 1, 2], names=NAMES)
    assert len(load_images(str(tmp_path / name / "files"))) == 3
    shutil.rmtree(tmp_path / name / "files")
    assert len(load_images(folder)) == 2
    monkeypatch.chdir(folder)
    images = load_images(".")
    assert len(images) == 2 and images.name == name
