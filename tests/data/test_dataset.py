"""Proves that every picture arrives as the processor would show it, upright RGB, with the right label, or as an error that names its row."""

import io
import json
import os
import tarfile

import datasets
import numpy as np
import pytest
import torch
from conftest import CLASSES, Rows, make_images
from PIL import Image
from transformers import AutoProcessor

from hpt_hf.data.class_names import read_classes
from hpt_hf.data.collator import Collator, image_id, to_png, to_rgb
from hpt_hf.data.dataset import DatasetSpec, LabelledImages, held_out, load_images
from hpt_hf.models.zero_shot import TEMPLATE

NAMES = ("cat", "dog", "house")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """datasets remembers files by path and time: a cache shared between tests could answer for another file."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width=24, height=20, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def plain(colour, size=(8, 8)):
    return Image.new("RGB", size, colour)


def damaged():
    """A JPEG that ends in the middle, as after a broken download."""
    whole = encode(noise(64, 64), "JPEG")
    return whole[: len(whole) // 2]


def write_parquet(file, pictures, labels=None, *, names=NAMES, image="image", label="label"):
    """As the Hub serves them: encoded images, labels as ClassLabel (names) or plain numbers (names=None)."""
    columns = {image: [None if p is None else {"bytes": p, "path": None} for p in pictures]}
    features = {image: datasets.Image()}
    if labels is not None:
        columns[label] = labels
        features[label] = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(file)
    return str(file)


def write_folder(folder, **classes):
    for name, pictures in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, encoded in enumerate(pictures):
            (folder / name / f"{i}.png").write_bytes(encoded)
    return str(folder)


def three():
    return [encode(plain(c)) for c in ("red", "green", "blue")]


def colours(pictures):
    return [pictures[i]["image"].getpixel((0, 0)) for i in range(len(pictures))]


RGB = [(255, 0, 0), (0, 128, 0), (0, 0, 255)]


# --- where pictures come from


def test_a_parquet_file_brings_pictures_labels_and_names(tmp_path):
    pictures = load_images(write_parquet(tmp_path / "set.parquet", three(), [2, 0, 1]))
    assert pictures.classes == NAMES and pictures.labelled and pictures.name == "set"
    assert [pictures[i]["label"] for i in range(3)] == [2, 0, 1] and colours(pictures) == RGB


def test_a_folder_of_parquet_files_is_one_set(tmp_path):
    for part in range(2):
        write_parquet(tmp_path / "set" / f"train-{part:05d}-of-00002.parquet", [three()[part]], [part])
    pictures = load_images(str(tmp_path / "set"))
    assert [pictures[i]["label"] for i in range(2)] == [0, 1] and colours(pictures) == RGB[:2]


def test_an_image_folder_has_a_class_a_folder_in_alphabetical_order(tmp_path):
    red, green, blue = three()
    pictures = load_images(write_folder(tmp_path / "set", zebra=[red], ant=[green, blue]))
    assert pictures.classes == ("ant", "zebra")
    assert [pictures[i]["label"] for i in range(3)] == [0, 0, 1] and colours(pictures) == [RGB[1], RGB[2], RGB[0]]


@pytest.mark.parametrize("columns", [{"image": "img", "label": "fine"}, {"image": "photo", "label": "cls"}])
def test_columns_are_found_by_type_or_named(tmp_path, columns):
    file = write_parquet(tmp_path / "set.parquet", three(), [0, 1, 2], **columns)
    for spec in (DatasetSpec(file), DatasetSpec(file, **columns)):
        pictures = load_images(spec)
        assert [pictures[i]["label"] for i in range(3)] == [0, 1, 2] and colours(pictures) == RGB


def test_a_column_that_is_not_there_or_not_unique_lists_those_that_are(tmp_path):
    file = write_parquet(tmp_path / "set.parquet", three(), [0, 1, 2])
    with pytest.raises(ValueError, match="no column 'picture'.*image, label"):
        load_images(DatasetSpec(file, image="picture"))
    with pytest.raises(ValueError, match="no column 'y'.*image, label"):
        load_images(DatasetSpec(file, label="y"))
    two = datasets.Dataset.from_dict(
        {"left": [{"bytes": three()[0], "path": None}], "right": [{"bytes": three()[1], "path": None}]},
        features=datasets.Features({"left": datasets.Image(), "right": datasets.Image()}),
    )
    two.to_parquet(tmp_path / "two.parquet")
    with pytest.raises(ValueError, match="2 columns of images.*left, right.*--image_column"):
        load_images(DatasetSpec(str(tmp_path / "two.parquet"), classes=NAMES))
    datasets.Dataset.from_dict({"label": [0]}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="0 columns of images.*label"):
        load_images(DatasetSpec(str(tmp_path / "none.parquet"), classes=NAMES))


# --- what its classes are called


def test_given_names_stand_in_for_missing_or_worse_ones(tmp_path):
    plain_numbers = write_parquet(tmp_path / "numbers.parquet", three(), [0, 1, 2], names=None)
    wordnet = write_parquet(tmp_path / "wordnet.parquet", three(), [0, 1, 2], names=("n01", "n02", "n03"))
    for file in (plain_numbers, wordnet):
        assert load_images(DatasetSpec(file, classes=NAMES)).classes == NAMES
    with pytest.raises(ValueError, match="names no classes.*--classes"):
        load_images(plain_numbers)


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_names_are_read_from_a_file_whole(tmp_path, suffix):
    names = ("cat", "dog's life", "tête-à-tête", "red  car")  # spaces, quotes and accents are not ours to mend
    file = tmp_path / f"names.{suffix}"
    file.write_text(json.dumps(names) if suffix == "json" else "\n".join(names) + "\n\n", encoding="utf-8")
    assert read_classes(file) == names
    with pytest.raises(FileNotFoundError, match="no class names"):
        read_classes(tmp_path / f"other.{suffix}")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("cat", "", "house"), "class 1"),
        (("cat", "dog", "cat"), "classes 0 and 2 are both called 'cat'"),
        (("cat",), "at least two"),
        ((), "at least two"),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused_before_any_work(tmp_path, classes, message):
    file = write_parquet(tmp_path / "set.parquet", three(), [0, 1, 2], names=None)
    with pytest.raises(ValueError, match=message):
        load_images(DatasetSpec(file, classes=classes))


def test_a_template_without_a_place_is_refused_before_any_work():
    with pytest.raises(ValueError, match="exactly once"):
        load_images(DatasetSpec("/nowhere", templates=("a photo",)))


def test_names_are_matched_by_name_so_that_none_can_shift(tmp_path):
    """An empty folder, which no picture stands for, or another order must not push names one place on."""
    red, green, _ = three()
    folder = write_folder(tmp_path / "set", cat=[], dog=[red], house=[green])
    for given in (NAMES, ("house", "cat", "dog")):
        pictures = load_images(DatasetSpec(folder, classes=given))
        assert pictures.classes == given and [given[pictures[i]["label"]] for i in range(2)] == ["dog", "house"]
    assert load_images(DatasetSpec(folder, classes=("hound", "home"))).classes == ("hound", "home")  # renamed in order
    with pytest.raises(ValueError, match="3 class names were given.*2 classes.*dog, house"):
        load_images(DatasetSpec(folder, classes=("feline", "hound", "home")))


def test_a_map_renames_each_class_and_says_which_it_lacks(tmp_path):
    file = write_parquet(tmp_path / "set.parquet", three(), [2, 0, 1], names=("n03", "n01", "n02"))
    names = {"n01": "cat", "n02": "dog", "n03": "house", "n04": "tree"}
    pictures = load_images(DatasetSpec(file, classes=names))
    assert [pictures.classes[pictures[i]["label"]] for i in range(3)] == ["dog", "house", "cat"]
    del names["n02"]
    with pytest.raises(ValueError, match="no entry for .*n02"):
        load_images(DatasetSpec(file, classes=names))
    (tmp_path / "names.json").write_text(json.dumps(names))
    assert read_classes(tmp_path / "names.json") == names


def test_splits_of_an_image_folder_are_told_from_classes(tmp_path):
    red, green, blue = three()
    write_folder(tmp_path / "set" / "train", ant=[red], bee=[green])
    write_folder(tmp_path / "set" / "test", ant=[blue], bee=[blue])
    for split, expected in (("train", RGB[:2]), ("test", [RGB[2]] * 2)):
        pictures = load_images(DatasetSpec(str(tmp_path / "set"), split=split))
        assert pictures.classes == ("ant", "bee") and colours(pictures) == expected
    # A railway among vehicles is no split: PASCAL VOC and COCO have a class called "train".
    vehicles = load_images(write_folder(tmp_path / "vehicles", bus=[red], train=[green, blue]))
    assert vehicles.classes == ("bus", "train") and vehicles.labelled and len(vehicles) == 3


# --- labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3, 1], "1 labels.*row 1 has label 3.*3 classes"),
        ([0, 1, -2], "row 2 has label -2"),
        ([7, 7, 7], "3 labels.*row 0 has label 7"),
    ],
)
def test_labels_out_of_range_name_the_first_row(tmp_path, labels, message):
    file = write_parquet(tmp_path / "set.parquet", three(), labels, names=None)
    with pytest.raises(ValueError, match=message):
        load_images(DatasetSpec(file, classes=NAMES))


@pytest.mark.parametrize("missing", [None, -1])
def test_all_or_none_must_be_labelled(tmp_path, missing):
    file = write_parquet(tmp_path / "mixed.parquet", three(), [0, missing, 1])
    with pytest.raises(ValueError, match="1 of 3 rows.*no label"):
        load_images(file)
    pictures = load_images(write_parquet(tmp_path / "none.parquet", three(), [missing] * 3))
    assert not pictures.labelled and pictures[0]["label"] is None


def test_pictures_without_any_labels_are_a_set_if_the_classes_are_named(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, encoded in enumerate(three()):
        (folder / f"{i}.png").write_bytes(encoded)
    table = write_parquet(tmp_path / "set.parquet", three())
    for path in (str(folder), table):
        pictures = load_images(DatasetSpec(path, classes=NAMES))
        assert (
            not pictures.labelled
            and [pictures[i]["label"] for i in range(3)] == [None] * 3
            and colours(pictures) == RGB
        )
        with pytest.raises(ValueError, match="names no classes"):
            load_images(path)


def test_pictures_beside_class_folders_have_no_clear_class(tmp_path):
    folder = write_folder(tmp_path / "set", a=three(), b=three())
    (tmp_path / "set" / "loose.png").write_bytes(three()[0])
    with pytest.raises(ValueError, match=r"loose\.png.*which class"):
        load_images(folder)


def test_labels_that_are_words_become_classes_in_alphabetical_order_or_in_the_order_given(tmp_path):
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": b, "path": None} for b in three()], "label": ["dog", "cat", "dog"]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")}),
    )
    table.to_parquet(tmp_path / "set.parquet")
    pictures = load_images(DatasetSpec(str(tmp_path / "set.parquet")))
    assert pictures.classes == ("cat", "dog") and [pictures[i]["label"] for i in range(3)] == [1, 0, 1]
    # Matched by name: a list in another order, or with more names, cannot shift a label.
    pictures = load_images(DatasetSpec(str(tmp_path / "set.parquet"), classes=("dog", "bird", "cat")))
    assert pictures.classes == ("dog", "bird", "cat") and [pictures[i]["label"] for i in range(3)] == [0, 2, 0]
    with pytest.raises(ValueError, match="3 class names were given and .* has 2 classes"):
        load_images(DatasetSpec(str(tmp_path / "set.parquet"), classes=("a", "b", "c")))


# --- nothing there


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "nowhere", "a/b/c"])
def test_a_path_that_does_not_exist_is_named(path):
    with pytest.raises(FileNotFoundError, match=f"no data at {path}"):
        load_images(path)


def test_a_folder_without_pictures_an_empty_set_and_a_foreign_file_say_so(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no parquet file and no picture"):
        load_images(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no data|no pictures"):
        load_images(write_parquet(tmp_path / "set.parquet", [], []))
    (tmp_path / "set.csv").write_text("a,b")
    with pytest.raises(ValueError, match="not a parquet file"):
        load_images(str(tmp_path / "set.csv"))


# --- damaged pictures


def sources(tmp_path, pictures):
    """The same pictures as rows of a table and as files of folders: (path, how row 1 is called)."""
    folder = tmp_path / "folder"
    for i, encoded in enumerate(pictures):
        (folder / NAMES[i % 2]).mkdir(parents=True, exist_ok=True)
        # Sorted by class and then by file name: keep the order of the rows.
        (folder / NAMES[i % 2] / f"{i}.png").write_bytes(b"" if encoded is None else encoded)
    return {"table": write_parquet(tmp_path / "set.parquet", pictures, [0] * len(pictures)), "folder": str(folder)}


@pytest.mark.parametrize("broken", ["truncated", "text", "empty", "missing"])
def test_an_unreadable_picture_names_its_row_or_is_skipped_and_listed(tmp_path, broken):
    bad = {"truncated": damaged(), "text": b"<html>404</html>", "empty": b"", "missing": None}[broken]
    red, _, blue = three()
    file = write_parquet(tmp_path / "set.parquet", [red, bad, blue, bad], [0, 1, 2, 0])
    pictures = load_images(file)
    assert len(pictures) == 4 and colours([pictures[0]]) == RGB[:1]  # read when asked for
    with pytest.raises(ValueError, match="^row 1 of set cannot be read .*--on_corrupt skip"):
        pictures[1]
    kept = load_images(file, on_corrupt="skip")
    assert len(kept) == 2 and [row for row, _ in kept.skipped] == [1, 3]
    assert all(f"row {row} of set" in reason for row, reason in kept.skipped)
    # What is left keeps its own label and remembers its own row.
    assert [kept[i]["label"] for i in range(2)] == [0, 2] and colours(kept) == [RGB[0], RGB[2]]
    assert [kept.row_id(i) for i in range(2)] == [0, 2]
    with pytest.raises(ValueError, match="none of the 2 pictures.*row 0"):
        load_images(write_parquet(tmp_path / "all.parquet", [bad, bad], [0, 1]), on_corrupt="skip")


def test_an_unreadable_file_of_a_folder_is_called_by_its_name(tmp_path):
    red, green, _ = three()
    folder = write_folder(tmp_path / "set", a=[red, damaged()], b=[green])
    pictures = load_images(folder)
    with pytest.raises(ValueError, match=r"file 1\.png of set cannot be read"):
        pictures[1]
    kept = load_images(folder, on_corrupt="skip")
    assert [kept[i]["label"] for i in range(2)] == [0, 1] and kept.skipped[0][0] == 1
    (tmp_path / "set" / "b" / "0.png").unlink()  # gone since it was listed
    with pytest.raises(ValueError, match="row 2 of set cannot be read.*FileNotFoundError"):
        pictures[2]


def test_skipping_says_how_many_once(tmp_path, caplog):
    import logging

    logger = logging.getLogger("hpt_hf.data.dataset")
    logger.addHandler(caplog.handler)
    try:
        load_images(write_parquet(tmp_path / "set.parquet", [damaged(), *three()], [0, 0, 1, 2]), on_corrupt="skip")
        said = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    finally:
        logger.removeHandler(caplog.handler)
    assert len(set(said)) == 1 and "1 of 4 pictures of set are skipped: row 0" in said[0]


def test_on_corrupt_knows_two_words():
    with pytest.raises(ValueError, match="'error' or 'skip'"):
        load_images("/nowhere", on_corrupt="ignore")


# --- every mode becomes upright RGB


def sixteen(*values):
    return Image.fromarray(np.array([values] * 2, dtype=np.uint16))


def palette(*colours, **options):
    image = Image.new("P", (len(colours), 2))
    image.putpalette([v for c in colours for v in c])
    image.putdata(list(range(len(colours))) * 2)
    return encode(image, **options)


MODES = {
    "RGB": (encode(plain((10, 20, 30))), (10, 20, 30)),
    "L": (encode(Image.new("L", (4, 4), 100)), (100, 100, 100)),
    "1, white": (encode(Image.new("1", (4, 4), 1)), (255, 255, 255)),
    "1, black": (encode(Image.new("1", (4, 4), 0)), (0, 0, 0)),
    "P": (palette((200, 10, 20), (0, 0, 0)), (200, 10, 20)),
    "P, transparent": (palette((200, 10, 20), (0, 0, 0), transparency=0), (255, 255, 255)),
    "L, transparent": (encode(Image.new("L", (4, 4), 7), transparency=7), (255, 255, 255)),
    "RGB, transparent": (encode(plain((7, 8, 9)), transparency=(7, 8, 9)), (255, 255, 255)),
    "LA, half black on white": (encode(Image.new("LA", (4, 4), (0, 128))), (127, 127, 127)),
    "LA, opaque": (encode(Image.new("LA", (4, 4), (60, 255))), (60, 60, 60)),
    "RGBA, clear": (encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0))), (255, 255, 255)),
    "RGBA, half red on white": (encode(Image.new("RGBA", (4, 4), (255, 0, 0, 128))), (255, 127, 127)),
    "RGBA, opaque": (encode(Image.new("RGBA", (4, 4), (1, 2, 3, 255))), (1, 2, 3)),
    "CMYK, cyan": (encode(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
    "CMYK, paper": (encode(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "TIFF"), (255, 255, 255)),
    "I;16, white": (encode(sixteen(65535, 65535)), (255, 255, 255)),
    "I;16, middle": (encode(sixteen(128 * 257, 65535)), (128, 128, 128)),
    "I;16, dark grey": (encode(sixteen(1000, 65535)), (4, 4, 4)),
    "I, 16 bits": (encode(Image.fromarray(np.array([[128 * 257, 65535]], dtype=np.int32)), "TIFF"), (128, 128, 128)),
    "GIF": (encode(plain((0, 0, 255)), "GIF"), (0, 0, 255)),
}


@pytest.mark.parametrize("case", MODES)
def test_every_mode_becomes_the_colours_a_person_sees(case):
    encoded, expected = MODES[case]
    image = to_rgb(encoded)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == expected
    already = Image.open(io.BytesIO(encoded))  # an image in memory is treated as one on disk
    assert np.array_equal(np.asarray(to_rgb(already)), np.asarray(image))


def test_the_modes_are_the_ones_they_are_called():
    """The control of the table above: Pillow does open these as what their names say."""
    for case in ("L", "1, white", "P", "LA, opaque", "RGBA, opaque", "CMYK, cyan", "I;16, white"):
        mode = Image.open(io.BytesIO(MODES[case][0])).mode
        assert mode == case.split(",")[0] or (mode, case) == ("I", "I;16, white")


def test_sixteen_bits_keep_their_order_and_fill_the_range():
    values = [257 * k for k in range(256)]
    grey = np.asarray(to_rgb(encode(sixteen(*values))))[0, :, 0]
    assert grey.tolist() == list(range(256))  # clipped, all but the first would be 255


def test_jpeg_in_cmyk_is_not_inverted():
    colour = to_rgb(encode(plain((255, 40, 40), (16, 16)).convert("CMYK"), "JPEG", quality=95)).getpixel((8, 8))
    assert np.abs(np.array(colour) - (255, 40, 40)).max() < 12


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_270),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_90),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_cameras_that_were_held_aslant(orientation, undo, kind):
    stored = plain("white", (32, 16))
    stored.paste((255, 0, 0), (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = to_rgb(encode(stored, kind, exif=exif))
    expected = stored if undo is None else stored.transpose(undo)
    assert upright.size == expected.size
    difference = np.abs(np.asarray(upright).astype(int) - np.asarray(expected).astype(int))
    assert (np.median(difference) <= 3) and (difference > 60).mean() < 0.02  # JPEG blurs the red corner's edge


# --- batches


@pytest.mark.parametrize("size", [(32, 32), (45, 37), (37, 45), (200, 60), (17, 90)])
def test_a_batch_holds_the_processor_s_pixels_before_normalisation(student_path, size):
    processor = AutoProcessor.from_pretrained(student_path, backend="pil")
    pictures = [noise(*size, seed=s) for s in range(3)]
    batch = Collator(processor)([{"image": p, "label": i} for i, p in enumerate(pictures)])
    theirs = processor(images=pictures, return_tensors="pt", do_normalize=False)["pixel_values"]
    assert batch["images"].dtype == torch.float32 and batch["images"].shape == (3, 3, 32, 32)
    assert torch.allclose(batch["images"], theirs, rtol=0, atol=1e-7)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1)
        for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    whole = processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert torch.allclose((batch["images"] - mean) / std, whole, atol=1e-5)
    assert batch["labels"].tolist() == [0, 1, 2]


def test_native_keeps_the_picture_s_own_pixels(student):
    picture = noise(50, 20)
    batch = Collator(student.processor, native=True)([{"image": picture, "label": None}])
    assert batch["images"].shape == (1, 3, 20, 50) and "labels" not in batch
    assert torch.equal((batch["images"] * 255).round().byte()[0].permute(1, 2, 0), torch.from_numpy(np.array(picture)))


@pytest.mark.parametrize("native", [False, True])
def test_equal_pictures_have_equal_keys_however_stored_and_wherever_they_stand(student, native):
    picture, other = noise(40, 40), noise(40, 40, seed=1)
    nearly = picture.copy()
    nearly.putpixel((20, 20), tuple(255 - v for v in picture.getpixel((20, 20))))
    copies = [to_rgb(encode(picture, kind)) for kind in ("PNG", "BMP", "TIFF")] + [
        to_rgb(encode(picture.convert("RGBA")))
    ]
    collate = Collator(student.processor, native=native)

    def keys(*pictures):
        return collate([{"image": p, "label": None} for p in pictures])["image_ids"].tolist()

    assert len(set(keys(*copies))) == 1
    assert keys(other, picture, nearly) == [*keys(other), *keys(picture), *keys(nearly)]
    assert len(set(keys(other, picture, nearly))) == 3
    assert all(0 <= k < 2**63 for k in keys(*copies, other))


def test_a_key_is_of_the_pixels_and_not_of_their_memory_layout():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    assert image_id(pixels) == image_id(np.asfortranarray(pixels)) == image_id(pixels[::-1][::-1])
    assert image_id(pixels) != image_id(pixels.transpose(1, 0, 2))


# --- the held-out slice


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_the_held_out_slice_is_fixed_by_its_seed_and_disjoint(share):
    pictures = make_images(60)
    train, held = held_out(pictures, share, seed=0)
    assert sorted([*train.kept, *held.kept]) == list(range(60)) and len(held) == round(share * 60)
    again, again_held = held_out(make_images(60), share, seed=0)
    assert (again.kept, again_held.kept) == (train.kept, held.kept)
    assert held_out(pictures, share, seed=1)[1].kept != held.kept
    # Sets are sorted by class: a slice of the end would hold one class alone.
    assert len({pictures[i]["label"] for i in held.kept}) > 1
    assert held[0]["image"].tobytes() == pictures[held.kept[0]]["image"].tobytes()


def test_nothing_held_out_and_everything_held_out():
    pictures = make_images(10)
    train, held = held_out(pictures, 0.0, seed=0)
    assert held is None and train is pictures
    with pytest.raises(ValueError, match="none of the 10 pictures"):
        held_out(pictures, 0.99, seed=0)
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            held_out(pictures, share, seed=0)


def test_rows_in_memory_are_pictures_too():
    pictures = LabelledImages(Rows([noise(), encode(noise(seed=1))], [0, 1]), CLASSES)
    assert len(pictures) == 2 and pictures.labelled and pictures[1]["image"].mode == "RGB"


# --- tar shards, as clip-benchmark lays them out


def write_tar(file, members):
    """`members`: (name, content) in order, as webdataset's writer leaves them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def samples(*rows, kind="png", start=0):
    """(encoded picture, label) -> the two members of each, called as clip-benchmark calls them."""
    return [
        m
        for i, (p, y) in enumerate(rows, start)
        for m in ((f"s{i:07d}.{kind}", p), (f"s{i:07d}.cls", f"{y}\n".encode()))
    ]


def write_shards(folder, *shards, split="test", names="cat\ndog\nhouse\n", templates=None):
    """A repository of clip-benchmark: `shards` are lists of members. -> DatasetSpec"""
    for number, members in enumerate(shards):
        write_tar(folder / split / f"{number}.tar", members)
    (folder / split / "nshards.txt").write_text(f"{len(shards)}\n")
    if names is not None:
        (folder / "classnames.txt").write_text(names, encoding="utf-8")
    if templates is not None:
        (folder / "zeroshot_classification_templates.txt").write_text(templates, encoding="utf-8")
    return DatasetSpec(str(folder), split=split)


def read(spec, **options):
    pictures = load_images(spec, **options)
    return [(pictures[i]["label"], pictures[i]["image"].getpixel((0, 0))) for i in range(len(pictures))]


def one(colour, label, **options):
    return samples((encode(plain(colour)), label), **options)


@pytest.mark.parametrize("kind", ["webp", "jpg", "png"])
def test_a_single_shard_is_read_as_pictures_and_not_as_the_text_beside_it(tmp_path, kind):
    how = {"webp": ("WEBP", {"lossless": True}), "jpg": ("JPEG", {"quality": 100}), "png": ("PNG", {})}[kind]
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    rows = [(encode(plain(c, (16, 16)), how[0], **how[1]), y) for c, y in zip(colours, (2, 0, 1), strict=True)]
    spec = write_shards(tmp_path / "wds_cats", samples(*rows, kind=kind), templates="a photo of a {c}.\na {c}\n")
    pictures = load_images(spec)
    assert (pictures.name, pictures.classes, len(pictures)) == ("wds_cats", NAMES, 3)
    assert pictures.templates == ("a photo of a {}.", "a {}")
    for (label, colour), expected in zip(read(spec), zip((2, 0, 1), colours, strict=True), strict=True):
        assert label == expected[0] and np.abs(np.subtract(colour, expected[1])).max() < 8
    assert pictures.source == {"path": str(tmp_path / "wds_cats"), "split": "test"}


def test_shards_are_counted_in_numbers_and_rows_keep_their_order(tmp_path):
    rows = [((i, 0, 0), i % 3) for i in range(22)]
    shards = [[m for j in (0, 1) for m in one(*rows[2 * k + j], start=j)] for k in range(11)]
    spec = write_shards(tmp_path / "set", *shards)
    assert read(spec) == [(y, c) for c, y in rows]  # by name, 10.tar would come before 2.tar


def test_shards_bring_templates_unless_others_are_given(tmp_path):
    bare = write_shards(tmp_path / "bare", one("red", 0))
    own = write_shards(tmp_path / "own", one("red", 0), templates="\n a {c} of {braces}\n\n")
    assert load_images(bare).templates == (TEMPLATE,)
    assert load_images(own).templates == ("a {} of {braces}",)
    assert load_images(DatasetSpec(own.path, "test", templates=("my {}",))).templates == ("my {}",)


@pytest.mark.parametrize("template", ["a {c} beside a {c}", "a photo", "a {}, a {c}"])
def test_a_template_of_the_shards_without_one_place_is_refused_before_any_work(tmp_path, template):
    spec = write_shards(tmp_path / "set", one("red", 0), templates=template)
    with pytest.raises(ValueError, match="exactly once"):
        load_images(spec)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cat\ndog\n", "1 labels.*row 1 has label 2.*2 classes"),
        ("cat\ndog\ncat\n", "classes 0 and 2 are both called 'cat'"),
        ("cat\n\nhouse\n", "class 1 has the name ''"),  # left out, it would call the house's pictures by the next name
        ("", "there are 0 classes"),
        (None, "names no classes"),
    ],
)
def test_a_class_list_that_does_not_fit_the_shards_is_refused(tmp_path, names, message):
    spec = write_shards(tmp_path / "set", [*one("red", 0), *one("blue", 2, start=1)], names=names)
    with pytest.raises(ValueError, match=message):
        load_images(spec)


def test_shards_without_a_class_list_take_a_given_one(tmp_path):
    spec = write_shards(tmp_path / "set", [*one("red", 0), *one("blue", 2, start=1)], names=None)
    given = DatasetSpec(spec.path, "test", classes=NAMES)
    assert load_images(given).classes == NAMES and read(given) == [(0, RGB[0]), (2, RGB[2])]


def test_an_empty_line_never_moves_the_names_after_it(tmp_path):
    spec = write_shards(tmp_path / "set", one("red", 0), names="\ufeffcat\r\ndog\r\n\r\n")  # as Windows writes it
    assert load_images(spec).classes == ("cat", "dog")
    (tmp_path / "names.txt").write_text("cat\n\nhouse\n\n", encoding="utf-8")
    assert read_classes(tmp_path / "names.txt") == ("cat", "", "house")  # which load_images refuses


@pytest.mark.parametrize("said", ["3\n", "many"])
def test_shards_that_are_missing_are_counted(tmp_path, said):
    spec = write_shards(tmp_path / "set", one("red", 0), one("blue", 1))
    (tmp_path / "set" / "test" / "nshards.txt").write_text(said)
    with pytest.raises(ValueError, match=f"holds 2 shards.*says '{said.strip()}'.*not complete"):
        load_images(spec)


def test_a_damaged_shard_is_named_wherever_it_ends(tmp_path):
    """tarfile itself takes most of these for a shorter archive."""
    spec = write_shards(tmp_path / "set", one("red", 0), [*one("blue", 1), *one("lime", 2, start=1)])
    shard = tmp_path / "set" / "test" / "1.tar"
    whole = shard.read_bytes()
    assert len(read(spec)) == 3
    for end in (*range(0, 4096, 256), 4096 + 100):
        shard.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"1\.tar cannot be read .*delete it and download it again"):
            load_images(spec)
    for content in (b"<html>404</html>" * 99, whole[:2048] + b"x" * 512 + whole[2560:]):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=r"1\.tar cannot be read"):
            load_images(spec)
    shard.unlink()
    shard.mkdir()
    with pytest.raises(ValueError, match=r"1\.tar cannot be read"):
        load_images(spec)


def test_a_damaged_picture_in_a_sound_shard_names_its_row_or_is_skipped(tmp_path):
    rows = [(encode(plain("red")), 2), (damaged(), 1), (encode(plain("blue")), 0)]
    spec = write_shards(tmp_path / "set", samples(*rows))
    with pytest.raises(
        ValueError, match=r"^row 1 \(s0000001\.png in 0\.tar\) of set cannot be read .*--on_corrupt skip"
    ):
        load_images(spec)[1]
    kept = load_images(spec, on_corrupt="skip")
    assert [r for r, _ in kept.skipped] == [1] and "s0000001.png in 0.tar" in kept.skipped[0][1]
    assert read(spec, on_corrupt="skip") == [(2, RGB[0]), (0, RGB[2])]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*one("red", 0), ("s0000001.png", b"x")], r"0\.tar, s0000001\.png .*\(png\).*label, called 'cls'"),
        ([("s0000000.cls", b"0\n")], r"0\.tar, s0000000\.cls .*\(cls\) should be one picture"),
        ([*one("red", 0), ("s0000000.jpg", b"x")], r"s0000000\.png .*\(png, cls, jpg\) should be one picture"),
        ([*one("red", 0), *one("red", 0)], r"0\.tar has s0000000\.png twice"),
        ([("s0.png", b"x"), ("s0.cls", b"cat")], r"s0\.cls should hold the number of a class, it holds b'cat'"),
        ([("s0.png", b"x"), ("s0.cls", b"-1")], r"s0\.cls should hold the number"),
        ([("s0.png", b"x"), ("s0.cls", b"")], r"s0\.cls should hold the number"),
        ([], "holds no pictures"),
    ],
)
def test_a_sample_that_is_not_one_picture_with_one_label_is_named(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        load_images(write_shards(tmp_path / "set", members))


def test_shards_of_several_kinds_and_with_other_members_are_read(tmp_path):
    """`load_dataset` would refuse the first shard and leave the second's pictures empty."""
    webp = encode(plain("red"), "WEBP", lossless=True)
    mixed = [
        *samples((webp, 0), kind="webp"),
        *one("lime", 1, start=1),
        ("s0000001.json", b"{}"),
        ("notes", b"x"),
        ("._s0000001.png", b"x"),
    ]
    nested = [("./deep.er/a.b/S1.PNG", encode(plain("blue"))), ("./deep.er/a.b/S1.cls", b" 2 \r\n")]
    spec = write_shards(tmp_path / "set [1]", mixed, [], nested)
    assert read(spec) == [(0, RGB[0]), (1, (0, 255, 0)), (2, RGB[2])]
    assert read(DatasetSpec(write_parquet(tmp_path / "x [1].parquet", three(), [0, 1, 2]))) == list(enumerate(RGB))


def test_other_members_can_be_named_as_picture_and_label(tmp_path):
    red, blue = encode(plain("red")), encode(plain("blue"))
    members = [("a.png", red), ("a.mask.png", blue), ("a.jpg", blue), ("a.fine", b"1"), ("a.cls", b"0")]
    write_shards(tmp_path / "set", members)
    for image, label, expected in (("png", None, (0, RGB[0])), ("mask.png", "fine", (1, RGB[2]))):
        assert read(DatasetSpec(str(tmp_path / "set"), "test", image=image, label=label)) == [expected]


def test_a_split_of_shards_that_is_not_there_lists_those_that_are(tmp_path):
    write_shards(tmp_path / "set", one("red", 0), split="test")
    write_shards(tmp_path / "set", one("blue", 1), split="train")
    assert read(DatasetSpec(str(tmp_path / "set"), "train")) == [(1, RGB[2])]
    with pytest.raises(ValueError, match="shards in test, train, none for the split 'valid'"):
        load_images(DatasetSpec(str(tmp_path / "set"), "valid"))


def test_a_shard_that_changed_under_its_name_is_read_anew(tmp_path):
    spec = write_shards(tmp_path / "set", one("red", 0))
    shard = tmp_path / "set" / "test" / "0.tar"
    time = shard.stat().st_mtime_ns
    assert read(spec) == [(0, RGB[0])]
    write_tar(shard, one("blue", 1))
    os.utime(shard, ns=(time, time))  # rsync -t, or a copy within the clock's resolution
    assert read(spec) == [(1, RGB[2])]


@pytest.mark.parametrize("kind", ["shards", "parquet"])
def test_reading_leaves_the_data_s_folder_as_it_was(tmp_path, kind):
    folder = tmp_path / "set"
    if kind == "shards":
        spec = write_shards(folder, one("red", 0))
    else:
        spec = DatasetSpec(str(folder))
        write_parquet(folder / "train.parquet", three(), [0, 1, 2])
    files = sorted(folder.rglob("*"))
    for place in (*files, folder):
        place.chmod(0o555 if place.is_dir() else 0o444)
    try:
        assert read(spec)[0] == (0, RGB[0])
        assert sorted(folder.rglob("*")) == files
    finally:
        for place in (folder, *files):
            place.chmod(0o755)
    assert kind == "parquet" or not (tmp_path / "cache").exists()  # shards are not copied anywhere


# --- unions, renaming, leaving out


def test_a_union_of_splits_is_read_in_the_order_asked_for(tmp_path):
    for number, split in enumerate(("train", "validation", "test")):
        write_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet", [three()[number]], [number])

    def union(split):
        return read(DatasetSpec(str(tmp_path / "set"), split))

    assert union("train+validation+test") == list(enumerate(RGB)) and union("test+train") == [(2, RGB[2]), (0, RGB[0])]
    assert union("test") == [(2, RGB[2])]
    with pytest.raises(ValueError, match="no split 'train\\+dev'; it has .*train"):
        union("train+dev")


def test_a_union_is_never_taken_for_the_only_split_there_is(tmp_path):
    write_parquet(tmp_path / "set" / "train-00000-of-00001.parquet", three(), [0, 1, 2])
    assert len(load_images(DatasetSpec(str(tmp_path / "set"), "test"))) == 3  # one split needs no name
    with pytest.raises(ValueError, match="no split 'train\\+test'; it has train"):
        load_images(DatasetSpec(str(tmp_path / "set"), "train+test"))


def test_a_card_that_speaks_of_splits_not_downloaded_is_no_hindrance(tmp_path):
    """What the Hub's cache holds after `load_dataset` of the whole and `snapshot_download` of a part."""
    write_parquet(tmp_path / "set" / "data" / "valid-00000-of-00001-70d52db3c749a935.parquet", three(), [0, 1, 2])
    card = "splits: [{name: train, num_bytes: 9, num_examples: 9}, {name: valid, num_bytes: 9, num_examples: 3}]"
    configs = "configs: [{config_name: default, data_files: [{split: train, path: data/train-*}, {split: valid, path: data/valid-*}]}]"
    (tmp_path / "set" / "README.md").write_text(f"---\ndataset_info: {{{card}}}\n{configs}\n---\n")
    assert read(DatasetSpec(str(tmp_path / "set"), "valid")) == list(enumerate(RGB))


def test_names_that_occur_twice_never_merge_two_classes(tmp_path):
    """ImageNet has two sunglasses in clip-benchmark's list. Matched by name, the second would become the first."""
    twice = "cat\nsunglasses\nsunglasses\n"
    spec = write_shards(tmp_path / "set", [m for i in range(3) for m in one(RGB[i], i, start=i)], names=twice)
    with pytest.raises(ValueError, match="classes 1 and 2 are both called 'sunglasses'"):
        load_images(spec)
    for given in (
        ("cat", "sunglass", "sunglasses"),
        ("sunglasses", "cat", "sunglass"),
    ):  # the second renames in order as well
        renamed = DatasetSpec(spec.path, "test", classes=given)
        assert load_images(renamed).classes == given and read(renamed) == list(enumerate(RGB))
    for given, message in (
        (("cat", "sunglasses", "sunglass", "dog"), "4 class names were given.*has 3 classes"),
        ({"cat": "a cat", "sunglasses": "shades"}, "classes 1 and 2 are both called 'shades'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(DatasetSpec(spec.path, "test", classes=given))


def test_leaving_out_a_class_keeps_rows_labels_and_names_of_the_others(tmp_path):
    red, green, blue = three()
    file = write_parquet(tmp_path / "set.parquet", [red, damaged(), green, blue, red], [0, 0, 1, 2, 1])
    pictures = load_images(file, on_corrupt="skip")
    rest = pictures.without_class("cat")
    assert [rest.row_id(i) for i in range(len(rest))] == [2, 3, 4] and [rest[i]["label"] for i in range(3)] == [
        1,
        2,
        1,
    ]
    assert (rest.classes, rest.skipped, rest.source) == (pictures.classes, pictures.skipped, pictures.source)
    assert len(pictures) == 4  # the original is as it was
    assert pictures.without_class(None) is pictures and len(rest.without_class("dog").without_class("house")) == 0
    with pytest.raises(ValueError, match="'hose' is none of the 3 classes of set; did you mean house"):
        pictures.without_class("hose")


def test_a_picture_as_png_is_the_pixels_it_shows():
    import base64

    pixels = torch.arange(12, dtype=torch.float32).view(3, 2, 2) / 255
    image = Image.open(io.BytesIO(base64.b64decode(to_png(pixels + 0.4 / 255))))
    assert np.array_equal(np.asarray(image), (pixels * 255).round().byte().permute(1, 2, 0).numpy())
    assert Image.open(io.BytesIO(base64.b64decode(to_png(pixels - 1)))).getextrema() == ((0, 0),) * 3
