"""Proves that every picture arrives as the processor would show it, upright RGB, with the right label, or as an error that names its row."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from conftest import CLASSES, Rows, make_pictures
from PIL import Image
from transformers import AutoProcessor

from hpt_hf.data import Collate, DatasetSpec, LabelledPictures, held_out, image_key, load_pictures, read_classes, to_rgb

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
    pictures = load_pictures(write_parquet(tmp_path / "set.parquet", three(), [2, 0, 1]))
    assert pictures.classes == NAMES and pictures.labelled and pictures.name == "set"
    assert [pictures[i]["label"] for i in range(3)] == [2, 0, 1] and colours(pictures) == RGB


def test_a_folder_of_parquet_files_is_one_set(tmp_path):
    for part in range(2):
        write_parquet(tmp_path / "set" / f"train-{part:05d}-of-00002.parquet", [three()[part]], [part])
    pictures = load_pictures(str(tmp_path / "set"))
    assert [pictures[i]["label"] for i in range(2)] == [0, 1] and colours(pictures) == RGB[:2]


def test_an_image_folder_has_a_class_a_folder_in_alphabetical_order(tmp_path):
    red, green, blue = three()
    pictures = load_pictures(write_folder(tmp_path / "set", zebra=[red], ant=[green, blue]))
    assert pictures.classes == ("ant", "zebra")
    assert [pictures[i]["label"] for i in range(3)] == [0, 0, 1] and colours(pictures) == [RGB[1], RGB[2], RGB[0]]


@pytest.mark.parametrize("columns", [{"image": "img", "label": "fine"}, {"image": "photo", "label": "cls"}])
def test_columns_are_found_by_type_or_named(tmp_path, columns):
    file = write_parquet(tmp_path / "set.parquet", three(), [0, 1, 2], **columns)
    for spec in (DatasetSpec(file), DatasetSpec(file, **columns)):
        pictures = load_pictures(spec)
        assert [pictures[i]["label"] for i in range(3)] == [0, 1, 2] and colours(pictures) == RGB


def test_a_column_that_is_not_there_or_not_unique_lists_those_that_are(tmp_path):
    file = write_parquet(tmp_path / "set.parquet", three(), [0, 1, 2])
    with pytest.raises(ValueError, match="no column 'picture'.*image, label"):
        load_pictures(DatasetSpec(file, image="picture"))
    with pytest.raises(ValueError, match="no column 'y'.*image, label"):
        load_pictures(DatasetSpec(file, label="y"))
    two = datasets.Dataset.from_dict(
        {"left": [{"bytes": three()[0], "path": None}], "right": [{"bytes": three()[1], "path": None}]},
        features=datasets.Features({"left": datasets.Image(), "right": datasets.Image()}),
    )
    two.to_parquet(tmp_path / "two.parquet")
    with pytest.raises(ValueError, match="2 columns of images.*left, right.*--image_column"):
        load_pictures(DatasetSpec(str(tmp_path / "two.parquet"), classes=NAMES))
    datasets.Dataset.from_dict({"label": [0]}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="0 columns of images.*label"):
        load_pictures(DatasetSpec(str(tmp_path / "none.parquet"), classes=NAMES))


# --- what its classes are called


def test_given_names_stand_in_for_missing_or_worse_ones(tmp_path):
    plain_numbers = write_parquet(tmp_path / "numbers.parquet", three(), [0, 1, 2], names=None)
    wordnet = write_parquet(tmp_path / "wordnet.parquet", three(), [0, 1, 2], names=("n01", "n02", "n03"))
    for file in (plain_numbers, wordnet):
        assert load_pictures(DatasetSpec(file, classes=NAMES)).classes == NAMES
    with pytest.raises(ValueError, match="names no classes.*--classes"):
        load_pictures(plain_numbers)


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
        load_pictures(DatasetSpec(file, classes=classes))


def test_a_template_without_a_place_is_refused_before_any_work():
    with pytest.raises(ValueError, match="exactly once"):
        load_pictures(DatasetSpec("/nowhere", templates=("a photo",)))


def test_names_are_matched_by_name_so_that_none_can_shift(tmp_path):
    """An empty folder, which no picture stands for, or another order must not push names one place on."""
    red, green, _ = three()
    folder = write_folder(tmp_path / "set", cat=[], dog=[red], house=[green])
    for given in (NAMES, ("house", "cat", "dog")):
        pictures = load_pictures(DatasetSpec(folder, classes=given))
        assert pictures.classes == given and [given[pictures[i]["label"]] for i in range(2)] == ["dog", "house"]
    assert load_pictures(DatasetSpec(folder, classes=("hound", "home"))).classes == ("hound", "home")  # renamed in order
    with pytest.raises(ValueError, match="3 class names were given.*2 classes.*dog, house"):
        load_pictures(DatasetSpec(folder, classes=("feline", "hound", "home")))


def test_a_map_renames_each_class_and_says_which_it_lacks(tmp_path):
    file = write_parquet(tmp_path / "set.parquet", three(), [2, 0, 1], names=("n03", "n01", "n02"))
    names = {"n01": "cat", "n02": "dog", "n03": "house", "n04": "tree"}
    pictures = load_pictures(DatasetSpec(file, classes=names))
    assert [pictures.classes[pictures[i]["label"]] for i in range(3)] == ["dog", "house", "cat"]
    del names["n02"]
    with pytest.raises(ValueError, match="no entry for .*n02"):
        load_pictures(DatasetSpec(file, classes=names))
    (tmp_path / "names.json").write_text(json.dumps(names))
    assert read_classes(tmp_path / "names.json") == names


def test_splits_of_an_image_folder_are_told_from_classes(tmp_path):
    red, green, blue = three()
    write_folder(tmp_path / "set" / "train", ant=[red], bee=[green])
    write_folder(tmp_path / "set" / "test", ant=[blue], bee=[blue])
    for split, expected in (("train", RGB[:2]), ("test", [RGB[2]] * 2)):
        pictures = load_pictures(DatasetSpec(str(tmp_path / "set"), split=split))
        assert pictures.classes == ("ant", "bee") and colours(pictures) == expected
    # A railway among vehicles is no split: PASCAL VOC and COCO have a class called "train".
    vehicles = load_pictures(write_folder(tmp_path / "vehicles", bus=[red], train=[green, blue]))
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
        load_pictures(DatasetSpec(file, classes=NAMES))


@pytest.mark.parametrize("missing", [None, -1])
def test_all_or_none_must_be_labelled(tmp_path, missing):
    file = write_parquet(tmp_path / "mixed.parquet", three(), [0, missing, 1])
    with pytest.raises(ValueError, match="1 of 3 rows.*no label"):
        load_pictures(file)
    pictures = load_pictures(write_parquet(tmp_path / "none.parquet", three(), [missing] * 3))
    assert not pictures.labelled and pictures[0]["label"] is None


def test_pictures_without_any_labels_are_a_set_if_the_classes_are_named(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, encoded in enumerate(three()):
        (folder / f"{i}.png").write_bytes(encoded)
    table = write_parquet(tmp_path / "set.parquet", three())
    for path in (str(folder), table):
        pictures = load_pictures(DatasetSpec(path, classes=NAMES))
        assert not pictures.labelled and [pictures[i]["label"] for i in range(3)] == [None] * 3 and colours(pictures) == RGB
        with pytest.raises(ValueError, match="names no classes"):
            load_pictures(path)


def test_pictures_beside_class_folders_have_no_clear_class(tmp_path):
    folder = write_folder(tmp_path / "set", a=three(), b=three())
    (tmp_path / "set" / "loose.png").write_bytes(three()[0])
    with pytest.raises(ValueError, match=r"loose\.png.*which class"):
        load_pictures(folder)


def test_labels_that_are_words_become_classes_in_alphabetical_order_or_in_the_order_given(tmp_path):
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": b, "path": None} for b in three()], "label": ["dog", "cat", "dog"]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")}),
    )
    table.to_parquet(tmp_path / "set.parquet")
    pictures = load_pictures(DatasetSpec(str(tmp_path / "set.parquet")))
    assert pictures.classes == ("cat", "dog") and [pictures[i]["label"] for i in range(3)] == [1, 0, 1]
    # Matched by name: a list in another order, or with more names, cannot shift a label.
    pictures = load_pictures(DatasetSpec(str(tmp_path / "set.parquet"), classes=("dog", "bird", "cat")))
    assert pictures.classes == ("dog", "bird", "cat") and [pictures[i]["label"] for i in range(3)] == [0, 2, 0]
    with pytest.raises(ValueError, match="3 class names were given and .* has 2 classes"):
        load_pictures(DatasetSpec(str(tmp_path / "set.parquet"), classes=("a", "b", "c")))


# --- nothing there


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "nowhere", "a/b/c"])
def test_a_path_that_does_not_exist_is_named(path):
    with pytest.raises(FileNotFoundError, match=f"no data at {path}"):
        load_pictures(path)


def test_a_folder_without_pictures_an_empty_set_and_a_foreign_file_say_so(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no parquet file and no picture"):
        load_pictures(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no data|no pictures"):
        load_pictures(write_parquet(tmp_path / "set.parquet", [], []))
    (tmp_path / "set.csv").write_text("a,b")
    with pytest.raises(ValueError, match="not a parquet file"):
        load_pictures(str(tmp_path / "set.csv"))


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
    pictures = load_pictures(file)
    assert len(pictures) == 4 and colours([pictures[0]]) == RGB[:1]  # read when asked for
    with pytest.raises(ValueError, match="^row 1 of set cannot be read .*--on_corrupt skip"):
        pictures[1]
    kept = load_pictures(file, on_corrupt="skip")
    assert len(kept) == 2 and [row for row, _ in kept.skipped] == [1, 3]
    assert all(f"row {row} of set" in reason for row, reason in kept.skipped)
    # What is left keeps its own label and remembers its own row.
    assert [kept[i]["label"] for i in range(2)] == [0, 2] and colours(kept) == [RGB[0], RGB[2]]
    assert [kept.row_id(i) for i in range(2)] == [0, 2]
    with pytest.raises(ValueError, match="none of the 2 pictures.*row 0"):
        load_pictures(write_parquet(tmp_path / "all.parquet", [bad, bad], [0, 1]), on_corrupt="skip")


def test_an_unreadable_file_of_a_folder_is_called_by_its_name(tmp_path):
    red, green, _ = three()
    folder = write_folder(tmp_path / "set", a=[red, damaged()], b=[green])
    pictures = load_pictures(folder)
    with pytest.raises(ValueError, match=r"file 1\.png of set cannot be read"):
        pictures[1]
    kept = load_pictures(folder, on_corrupt="skip")
    assert [kept[i]["label"] for i in range(2)] == [0, 1] and kept.skipped[0][0] == 1
    (tmp_path / "set" / "b" / "0.png").unlink()  # gone since it was listed
    with pytest.raises(ValueError, match="row 2 of set cannot be read.*FileNotFoundError"):
        pictures[2]


def test_skipping_says_how_many_once(tmp_path, caplog):
    import logging

    logger = logging.getLogger("hpt_hf.data")
    logger.addHandler(caplog.handler)
    try:
        load_pictures(write_parquet(tmp_path / "set.parquet", [damaged(), *three()], [0, 0, 1, 2]), on_corrupt="skip")
        said = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    finally:
        logger.removeHandler(caplog.handler)
    assert len(set(said)) == 1 and "1 of 4 pictures of set are skipped: row 0" in said[0]


def test_on_corrupt_knows_two_words():
    with pytest.raises(ValueError, match="'error' or 'skip'"):
        load_pictures("/nowhere", on_corrupt="ignore")


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
    batch = Collate(processor)([{"image": p, "label": i} for i, p in enumerate(pictures)])
    theirs = processor(images=pictures, return_tensors="pt", do_normalize=False)["pixel_values"]
    assert batch["images"].dtype == torch.float32 and batch["images"].shape == (3, 3, 32, 32)
    assert torch.allclose(batch["images"], theirs, rtol=0, atol=1e-7)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    whole = processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert torch.allclose((batch["images"] - mean) / std, whole, atol=1e-5)
    assert batch["labels"].tolist() == [0, 1, 2]


def test_native_keeps_the_picture_s_own_pixels(student):
    picture = noise(50, 20)
    batch = Collate(student.processor, native=True)([{"image": picture, "label": None}])
    assert batch["images"].shape == (1, 3, 20, 50) and "labels" not in batch
    assert torch.equal((batch["images"] * 255).round().byte()[0].permute(1, 2, 0), torch.from_numpy(np.array(picture)))


@pytest.mark.parametrize("native", [False, True])
def test_equal_pictures_have_equal_keys_however_stored_and_wherever_they_stand(student, native):
    picture, other = noise(40, 40), noise(40, 40, seed=1)
    nearly = picture.copy()
    nearly.putpixel((20, 20), tuple(255 - v for v in picture.getpixel((20, 20))))
    copies = [to_rgb(encode(picture, kind)) for kind in ("PNG", "BMP", "TIFF")] + [to_rgb(encode(picture.convert("RGBA")))]
    collate = Collate(student.processor, native=native)

    def keys(*pictures):
        return collate([{"image": p, "label": None} for p in pictures])["keys"].tolist()

    assert len(set(keys(*copies))) == 1
    assert keys(other, picture, nearly) == [*keys(other), *keys(picture), *keys(nearly)]
    assert len(set(keys(other, picture, nearly))) == 3
    assert all(0 <= k < 2**63 for k in keys(*copies, other))


def test_a_key_is_of_the_pixels_and_not_of_their_memory_layout():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    assert image_key(pixels) == image_key(np.asfortranarray(pixels)) == image_key(pixels[::-1][::-1])
    assert image_key(pixels) != image_key(pixels.transpose(1, 0, 2))


# --- the held-out slice


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_the_held_out_slice_is_fixed_by_its_seed_and_disjoint(share):
    pictures = make_pictures(60)
    train, held = held_out(pictures, share, seed=0)
    assert sorted([*train.indices, *held.indices]) == list(range(60)) and len(held) == round(share * 60)
    again, again_held = held_out(make_pictures(60), share, seed=0)
    assert (list(again.indices), list(again_held.indices)) == (list(train.indices), list(held.indices))
    assert list(held_out(pictures, share, seed=1)[1].indices) != list(held.indices)
    # Sets are sorted by class: a slice of the end would hold one class alone.
    assert len({pictures[i]["label"] for i in held.indices}) > 1
    assert held[0]["image"].tobytes() == pictures[held.indices[0]]["image"].tobytes()


def test_nothing_held_out_and_everything_held_out():
    pictures = make_pictures(10)
    train, held = held_out(pictures, 0.0, seed=0)
    assert held is None and list(train.indices) == list(range(10))
    with pytest.raises(ValueError, match="none of the 10 pictures"):
        held_out(pictures, 0.99, seed=0)
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            held_out(pictures, share, seed=0)


def test_rows_in_memory_are_pictures_too():
    pictures = LabelledPictures(Rows([noise(), encode(noise(seed=1))], [0, 1]), CLASSES)
    assert len(pictures) == 2 and pictures.labelled and pictures[1]["image"].mode == "RGB"
