"""Every image arrives with the right label, or as an error that names its row, in the same order wherever it lies."""

import os
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
CELLS = [{"bytes": b, "path": None} for b in THREE]
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
DAMAGED = encode(Image.fromarray(NOISE), "JPEG")[:2000]  # ends in the middle, as after a broken download


def write_folder(folder, **classes):
    for name, images in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, encoded in enumerate(images):
            (folder / name / f"{i}.png").write_bytes(encoded)
    return str(folder)


def put(file, content: bytes | str = b"x"):
    """-> the folder that the file lies in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file.parent


def three(folder, labels=(0, 1, 2), names=NAMES, **spec):
    return DatasetSpec(write_parquet(folder / "set.parquet", THREE, list(labels), names=names), **spec)


def table(folder, **columns):
    """A parquet file of columns as they are; `sex` are classes of their own."""
    classes = datasets.ClassLabel(names=list("abc"))
    data = datasets.Dataset.from_dict(columns)
    for name in ("image", "left", "right", "sex"):
        if name in columns:
            data = data.cast_column(name, classes if name == "sex" else datasets.Image())
    data.to_parquet(folder / "set.parquet")
    return DatasetSpec(str(folder / "set.parquet"), classes=NAMES)


def write_shards(folder, *shards, split="test", names="cat\ndog\nhouse\n", templates=None, count=None):
    """A repository of clip-benchmark: `shards` are lists of members. -> DatasetSpec"""
    for number, members in enumerate(shards):
        write_tar(folder / split / f"{number}.tar", members)
    put(folder / split / "nshards.txt", f"{count or len(shards)}\n")
    for file, text in (("classnames.txt", names), ("zeroshot_classification_templates.txt", templates)):
        if text is not None:
            put(folder / file, text)
    return DatasetSpec(str(folder), split=split)


def rows(images):
    return [(row["label"], row["image"].getpixel((0, 0))) for row in images]


def read(path, split="train", on_corrupt="error", **how):
    return rows(load_images(DatasetSpec(str(path), split, **how), on_corrupt=on_corrupt))


def test_a_parquet_file_brings_images_labels_and_names(tmp_path):
    images = load_images(write_parquet(tmp_path / "set [1].parquet", THREE, [2, 0, 1], names=NAMES))
    assert images.classes == NAMES and images.labelled and images.name == "set [1]" and images.templates == (TEMPLATE,)
    assert rows(images) == list(zip((2, 0, 1), RGB, strict=True)) and images.labels == [2, 0, 1]
    assert images.source == {"path": str(tmp_path / "set [1].parquet"), "split": "train"}


def test_an_image_folder_has_a_class_a_folder_in_alphabetical_order(tmp_path):
    folder = write_folder(tmp_path / "set", zebra=[RED], Aardvark=[BLUE], ant=[GREEN, BLUE])
    put(tmp_path / "set" / "ant" / "deeper" / "a.png", RED)
    images = load_images(folder)
    assert images.classes == ("Aardvark", "ant", "zebra") and images.name == "set"
    assert rows(images) == [(0, RGB[2]), (1, RGB[1]), (1, RGB[2]), (1, RGB[0]), (2, RGB[0])]
    numbers = load_images(write_folder(tmp_path / "numbers", **{str(n): [RED] for n in range(12)}))
    assert numbers.classes == tuple(map(str, range(12))), "numbers sort as numbers"


def test_splits_of_an_image_folder_are_told_from_classes(tmp_path):
    for place, train, test in (("set", "train", "test"), ("as one likes", "Train", "testing")):
        write_folder(tmp_path / place / train, ant=[RED], bee=[GREEN])
        write_folder(tmp_path / place / test, ant=[BLUE], bee=[BLUE])
        write_folder(tmp_path / place / ".cache" / "huggingface", x=[RED])  # hidden folders are none
        assert read(tmp_path / place) == list(enumerate(RGB[:2]))
        assert read(tmp_path / place, "test") == [(0, RGB[2]), (1, RGB[2])]
    # A railway among vehicles is no split: PASCAL VOC and COCO have a class called "train".
    vehicles = load_images(write_folder(tmp_path / "vehicles", bus=[RED], train=[GREEN, BLUE]))
    assert vehicles.classes == ("bus", "train") and len(vehicles) == 3


def test_what_lies_beside_the_images_is_counted_in_one_line(tmp_path, caplog):
    folder = write_folder(tmp_path / "set", cat=[RED], dog=[GREEN, BLUE])
    for name in ("cat/notes.txt", "cat/._0.png", ".ipynb_checkpoints/x.png", "dog/Thumbs.db"):
        put(Path(folder, name))
    os.mkfifo(Path(folder, "cat", "pipe.png"))  # whoever opened it would wait for ever
    assert len(load_images(folder)) == 3
    (said,) = [r.getMessage() for r in caplog.records]
    assert "3 images; hidden or no image, and left out, are 5 (._0.png, .ipynb_checkpoints, Thumbs.db, " in said


def test_columns_are_found_by_type_or_named(tmp_path):
    for columns in ({"image": "img", "label": "fine"}, {"image": "photo", "label": "cls"}):
        file = write_parquet(tmp_path / f"{columns['image']}.parquet", THREE, [0, 1, 2], names=NAMES, **columns)
        assert read(file) == read(file, **columns) == list(enumerate(RGB))
    words = {"sex": [0, 0, 1], "label": ["house", "cat", "dog"]}
    for columns in ({"labels": [2, 0, 1]}, words | {"label": [2, 0, 1]}, words, {"label": [2.0, 0.0, 1.0]}):
        assert load_images(table(tmp_path, image=CELLS, **columns)).labels == [2, 0, 1]
    images = load_images(three(tmp_path, ["dog", "cat", "dog"]))
    assert images.classes == ("cat", "dog") and images.labels == [1, 0, 1], "words are classes in alphabetical order"


def test_images_in_memory_are_kept_to_the_last_bit():
    pixels = NOISE[:7, :9]
    for image in (Image.fromarray(pixels), encode(Image.fromarray(pixels), "BMP")):
        images = LabelledImages.from_images([image], [1], NAMES)
        assert np.array_equal(images[0]["image"], pixels) and images[0]["label"] == 1
    with pytest.raises(IndexError):
        images[1]


@pytest.mark.parametrize("name", ["a [1] set", "a*b", "ä ö", "val"])
def test_folders_of_any_name_are_read_and_those_called_like_splits_keep_their_own(name, monkeypatch, tmp_path):
    folder, files = write_folder(tmp_path / "birds" / name, cat=[RED], dog=[GREEN]), tmp_path / name / "files"
    shown = "birds/val" if name == "val" else name
    assert load_images(folder).name == shown
    monkeypatch.chdir(folder)
    images = load_images(".")
    assert len(images) == 2 and images.name == shown
    file = write_parquet(files / "test.parquet", THREE, [0, 1, 2], names=NAMES)
    assert load_images(file).name == "files/test" and len(read(files, "test")) == 3


@pytest.mark.parametrize("kind", ["shards", "parquet"])
def test_a_file_that_changed_is_read_anew_and_its_folder_left_as_it_was(tmp_path, kind):
    folder = tmp_path / "set"
    for colour, label in ((RED, 0), (BLUE, 1)):
        file, spec = folder / "test.parquet", DatasetSpec(str(folder), "test")
        if kind == "shards":
            spec, file = write_shards(folder, samples((colour, label))), folder / "test" / "0.tar"
        else:
            write_parquet(file, [colour], [label])
        os.utime(file, ns=(0, label * 10**6))
        files = sorted(folder.rglob("*"))
        assert rows(load_images(spec)) == [(label, RGB[2 * label])] and sorted(folder.rglob("*")) == files


def hub_splits(folder):
    for number, split in enumerate(("train", "validation", "test")):
        file = folder / "data" / f"{split}-00000-of-00001-70d52db3.parquet"
        write_parquet(file, [THREE[number]], [number], names=NAMES)
    return str(folder)


def train_files(folder, orders=(NAMES, NAMES), gone=()):
    for part in {0, 1} - set(gone):
        write_parquet(folder / f"train-0000{part}-of-00002.parquet", [THREE[part]], [part], names=orders[part])
    return str(folder)


def test_splits_named_as_on_the_hub_are_read_alone_or_as_a_union_in_the_order_asked_for(tmp_path):
    folder = hub_splits(tmp_path / "set")
    # What the Hub's cache holds may be a part of what its README speaks of.
    files = ", ".join(f"{{split: {s}, path: data/{s}-*}}" for s in ("train", "validation", "gone"))
    put(tmp_path / "set" / "README.md", f"---\nconfigs: [{{config_name: default, data_files: [{files}]}}]\n---\n")
    assert read(folder, "train+validation+test") == list(enumerate(RGB))
    assert read(folder, "test+train") == [(2, RGB[2]), (0, RGB[0])] and read(folder, "test") == [(2, RGB[2])]
    folder = train_files(tmp_path / "parts")
    assert read(folder) == read(folder, "Training") == list(enumerate(RGB[:2]))
    assert read(three(tmp_path).path, "test") == list(enumerate(RGB)), "a file is what it is"


def test_files_that_other_programs_wrote_are_read(tmp_path):
    """Without the note of `datasets` on the types of columns."""
    for number in range(2):
        columns = pyarrow.table({"image": [CELLS[number]], "label": [number]})
        pyarrow.parquet.write_table(columns, tmp_path / f"{number}.parquet")
    assert read(tmp_path, image="image", classes=NAMES) == list(enumerate(RGB[:2]))


def test_given_names_are_matched_by_name_or_rename_in_order(tmp_path):
    """An empty folder, which no image stands for, or another order must not push names one place on."""
    folder = write_folder(tmp_path / "set", cat=[], dog=[RED], house=[GREEN])
    for given, labels in ((NAMES, [1, 2]), (("house", "cat", "dog"), [2, 0]), (("hound", "home"), [0, 1])):
        images = load_images(DatasetSpec(folder, classes=given))
        assert images.classes == given and images.labels == labels
    spec = write_shards(tmp_path / "shards", samples((RED, 0), (BLUE, 2)), names="cat\nfox\nfox\n")
    assert read(spec.path, "test", classes=("cat", "fox", "hound")) == [(0, RGB[0]), (2, RGB[2])]


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


@pytest.mark.parametrize(("kind", "form"), [("webp", "WEBP"), ("jpg", "JPEG"), ("png", "PNG")])
def test_a_single_shard_is_read_as_images_and_not_as_the_text_beside_it(tmp_path, kind, form):
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    cells = [(encode(Image.new("RGB", (16, 16), c), form), y) for c, y in zip(colours, (2, 0, 1), strict=True)]
    templates = "\n a photo of a {c}.\na {c} of {braces}\n\n"
    spec = write_shards(tmp_path / "wds [1]", samples(*cells, kind=kind), templates=templates)
    images = load_images(spec)
    assert (images.name, images.classes, images.labels) == ("wds [1]", NAMES, [2, 0, 1])
    assert all(np.abs(np.subtract(c, e)).max() < 16 for (_, c), e in zip(rows(images), colours, strict=True))
    assert images.templates == ("a photo of a {}.", "a {} of {braces}")
    assert load_images(DatasetSpec(spec.path, "test", templates=("my {}",))).templates == ("my {}",)


def test_shards_are_counted_in_numbers_and_rows_keep_their_order(tmp_path):
    expected = [(i % 3, (i, 0, 0)) for i in range(22)]
    cells = [(plain(c), y) for y, c in expected]
    spec = write_shards(tmp_path / "set", *(samples(*cells[i : i + 2], start=i) for i in range(0, 22, 2)))
    assert rows(load_images(spec)) == expected  # by name, 10.tar would come before 2.tar
    assert load_images(spec).templates == (TEMPLATE,)


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


def test_other_members_are_passed_over_and_may_be_asked_for(tmp_path):
    other = [("s0.mask.png", BLUE), ("s0.fine", b"1"), ("notes", b"x"), ("._s0.png", b"x"), ("s0.json", b"{}")]
    spec = write_shards(tmp_path / "set", [("s0.png", RED), ("s0.cls", b"0"), *other])
    assert read(spec.path, "test", image="png") == [(0, RGB[0])]
    assert read(spec.path, "test", image="mask.png", label="fine") == [(1, RGB[2])]


def shards(*members, **how):
    """-> what writes one shard of these members."""
    return lambda folder: write_shards(folder, list(members), **how)


def two_splits_of_shards(folder):
    for split in ("test", "train"):
        write_shards(folder, samples((RED, 0)), split=split)
    return DatasetSpec(str(folder), "valid")


def path_in_a_cell(folder):
    cells = [CELLS[0] | {"path": "a.png"}, {"bytes": None, "path": str(put(folder / "secret.png", RED))}]
    file = write_parquet(folder / "rows.parquet", THREE[:2], [0, 1])
    rows = pyarrow.parquet.read_table(file)
    pyarrow.parquet.write_table(rows.set_column(0, rows.field(0), [pyarrow.array(cells, rows.field(0).type)]), file)
    return file


TWO = samples((RED, 0), (BLUE, 2))
NOWHERE = ("/nowhere/at/all", "./nowhere", "nowhere", "a/b/c", "owner/name", "~/nothing/here")
REFUSED = {
    **{path: (lambda f, p=path: p, f"no data at .*{path[1:]}") for path in NOWHERE},
    "an image beside classes": (lambda f: put(Path(write_folder(f, a=THREE), "b.png")), r"which class is b\.png"),
    "an empty folder": (lambda f: f, "holds no parquet file and no image"),
    "a table of text": (lambda f: put(f / "set.csv") / "set.csv", "not a parquet file"),
    "a torn file": (lambda f: put(f / "t.parquet", b"PAR1 no") / "t.parquet", "t.parquet.* cannot be read"),
    "no rows": (lambda f: write_parquet(f / "none.parquet", [], []), "no data|no images"),
    "a path in a cell": (path_in_a_cell, "row 1 of .*rows.parquet holds the path of a file"),
    "of a folder": (lambda f: DatasetSpec(write_folder(f, Train=[RED], testing=[]), "val"), "no split 'val', it has"),
    "beside others": (lambda f: write_folder(f, Train=[], testing=[], extra=[RED]), "folders of splits beside others"),
    "of two": (lambda f: DatasetSpec(hub_splits(f), "train+gone"), "no split 'gone', it has .*train.*--split"),
    "split of shards": (two_splits_of_shards, "shards in test, train, none for the split 'valid'"),
    "a file of it": (lambda f: train_files(f, gone=[1]), "the shard 1 of 2 of 'train' is missing"),
    "other orders": (
        lambda f: train_files(f, (NAMES, NAMES[::-1])),
        "got 2 kinds of columns or classes, expected one",
    ),
    "no such column": (lambda f: three(f, image="photo"), "'photo'.*image, label"),
    "two images": (lambda f: table(f, left=CELLS, right=CELLS), "'left', 'right'.*--image_column"),
    "no image": (lambda f: table(f, label=[0]), "no one column for the image.*label"),
    # labels: the first row is named, and all or none must have one
    "no names": (lambda f: three(f, names=None), "names no classes.*--classes"),
    "below": (lambda f: three(f, (0, 1, -2), None, classes=NAMES), "row 2 has -2"),
    "some -1": (lambda f: three(f, (0, -1, 1), None, classes=NAMES), "1 of 3 rows.*no label"),
    "NaN": (lambda f: table(f, image=CELLS, label=[2.0, float("nan"), 1.0]), "row 1 has nan, expected a whole number"),
    "lists": (lambda f: table(f, image=CELLS, label=[[2], [0], [1]]), "expected one number or word each"),
    "too few names": (shards(*TWO, names="cat\ndog\n"), "1 labels.*row 1 has 2 of 2 classes"),
    "an empty name": (shards(*TWO, names="cat\n\nhouse\n"), "class 1 has the name ''"),
    "two places for the name": (shards(*TWO, names=None, templates="a {c} beside a {c}"), "exactly once"),
    "fewer shards": (shards(*TWO, count=3), "got 1 shards, expected '3'"),
    "an image without a label": (shards(*TWO, ("s0000009.png", RED)), r"0\.tar.*cannot be read|no label"),
    "labels alone": (shards(("s0000000.cls", b"0\n")), "no one column for the image"),
    "a sample twice": (shards(*TWO[:2], *TWO[:2]), r"0\.tar.*cannot be read.*Duplicate"),
    "a word for a label": (shards(("s0.png", RED), ("s0.cls", b"cat")), r"0\.tar.*cannot be read.*'cat"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_reason(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    make, message = REFUSED[what]
    spec = make(tmp_path / "set")
    with pytest.raises((ValueError, OSError), match=message):
        load_images(spec if isinstance(spec, DatasetSpec) else str(spec))


@pytest.mark.parametrize("bad", [DAMAGED, b"<html>404</html>", b"", None], ids=["truncated", "text", "empty", "none"])
def test_an_unreadable_image_names_its_row_or_is_skipped_and_listed(tmp_path, bad, monkeypatch):
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
    with pytest.raises(ValueError, match="'error' or 'skip'"):
        load_images(file, on_corrupt="ignore")
    with pytest.raises(ValueError, match="none of the 2 images.*row 0"):
        load_images(write_parquet(tmp_path / "all.parquet", [bad, bad], [0, 1]), on_corrupt="skip")


def test_an_unreadable_file_of_a_folder_or_shard_is_called_by_its_name(tmp_path):
    folder = write_folder(tmp_path / "set", a=[RED, DAMAGED], b=[GREEN])
    images = load_images(folder)
    with pytest.raises(ValueError, match=r"row 1 .*a/1\.png.* of set cannot be read"):
        images[1]
    assert read(folder, on_corrupt="skip") == list(enumerate(RGB[:2]))
    (tmp_path / "set" / "b" / "0.png").unlink()  # gone since it was listed
    with pytest.raises(ValueError, match="row 2 .*cannot be read.*FileNotFoundError"):
        images[2]
    spec = write_shards(tmp_path / "shards", samples((RED, 2), (DAMAGED, 1), (BLUE, 0)))
    with pytest.raises(ValueError, match=r"^row 1 \(s0000001\.png\) of shards cannot be read .*--on_corrupt skip"):
        load_images(spec)[1]
    assert rows(load_images(spec, on_corrupt="skip")) == [(2, RGB[0]), (0, RGB[2])]


def test_the_held_out_slice_is_fixed_by_its_seed_and_disjoint():
    images = make_images(60)
    train, held = (part.data["row"][:] for part in held_out(images, 0.25, seed=0))
    assert sorted([*train, *held]) == list(range(60)) and len(held) == 15
    assert train == sorted(train) and held == sorted(held)
    again, other = held_out(make_images(60), 0.25, seed=0)[1], held_out(images, 0.25, seed=1)[1]
    assert again.data["row"][:] == held != other.data["row"][:]
    assert len(set(again.labels)) > 1  # sets are sorted by class: a slice of the end would hold one class alone
    assert again[0]["image"].tobytes() == images[held[0]]["image"].tobytes()
    assert held_out(images, 0.0, seed=0) == (images, None)
    for share, says in ((0.999, "got 60 of 60"), (0.001, "got 0 of 60"), (-0.1, "at least 0"), (1.0, "below 1")):
        with pytest.raises(ValueError, match=says):
            held_out(images, share, seed=0)


def test_leaving_out_a_class_or_renaming_keeps_images_and_labels():
    images = make_images(10)
    rest = images.without_class("cat").without_class("dog").without_class(None)
    assert len(images) == 10 and rest.labels == [2, 3, 4] * 2 and rest.classes == CLASSES
    with pytest.raises(ValueError, match="'hose' is none of the 5 classes of made; did you mean house"):
        images.without_class("hose")
    some = images.select([3, 7, 9])
    other = some.with_classes((*NAMES, "tree", "car"))
    assert other.classes == (*NAMES, "tree", "car") and rows(other) == rows(some)
