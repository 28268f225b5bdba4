"""Every image arrives as the processor would show it, upright RGB, and equal images have equal ids."""

import io

import numpy as np
import pytest
import torch
from conftest import encode
from PIL import Image

from hpt_hf.data.collator import Collator, image_id, to_png, to_rgb


def noise(width=24, height=20, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def plain(colour, mode="RGB", size=(4, 4)):
    return Image.new(mode, size, colour)


def sixteen(*values):
    return Image.fromarray(np.array([values] * 2, dtype=np.uint16))


def palette(*colours, **options):
    image = Image.new("P", (len(colours), 2))
    image.putpalette([v for c in colours for v in c])
    image.putdata(list(range(len(colours))) * 2)
    return encode(image, **options)


# name, which begins with the mode that Pillow opens it as -> (file, the colour a person sees at the corner)
MODES = {
    "RGB": (encode(plain((10, 20, 30))), (10, 20, 30)),
    "L": (encode(plain(100, "L")), (100, 100, 100)),
    "1, white": (encode(plain(1, "1")), (255, 255, 255)),
    "P": (palette((200, 10, 20), (0, 0, 0)), (200, 10, 20)),
    "P, transparent": (palette((200, 10, 20), (0, 0, 0), transparency=0), (255, 255, 255)),
    "L, transparent": (encode(plain(7, "L"), transparency=7), (255, 255, 255)),
    "RGB, transparent": (encode(plain((7, 8, 9)), transparency=(7, 8, 9)), (255, 255, 255)),
    "LA, half black on white": (encode(plain((0, 128), "LA")), (127, 127, 127)),
    "RGBA, half red on white": (encode(plain((255, 0, 0, 128), "RGBA")), (255, 127, 127)),
    "CMYK, cyan": (encode(plain((255, 0, 0, 0), "CMYK"), "TIFF"), (0, 255, 255)),
    "I;16, dark grey": (encode(sixteen(1000, 65535)), (4, 4, 4)),
    "I, 16 bits": (encode(Image.fromarray(np.array([[128 * 257, 65535]], dtype=np.int32)), "TIFF"), (128, 128, 128)),
    "RGB, GIF": (encode(plain((0, 0, 255)), "GIF"), (0, 0, 255)),
}


@pytest.mark.parametrize("case", MODES)
def test_every_mode_becomes_the_colours_a_person_sees(case):
    encoded, expected = MODES[case]
    image = to_rgb(encoded)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == expected
    opened = Image.open(io.BytesIO(encoded))  # an image in memory is treated as one on disk
    assert np.array_equal(to_rgb(opened), image)
    assert opened.mode == case.split(",")[0] or case == "RGB, GIF", "the control of this table"


def test_sixteen_bits_fill_the_range_and_floats_say_by_theirs_which_value_is_white():
    grey = np.asarray(to_rgb(encode(sixteen(*(257 * k for k in range(256))))))[0, :, 0]
    assert grey.tolist() == list(range(256))  # clipped, all but the first would be 255
    for top in (1.0, 255.0):
        assert np.asarray(to_rgb(Image.fromarray(np.array([[0, top]], np.float32))))[0, :, 0].tolist() == [0, 255]


def test_jpeg_in_cmyk_is_not_inverted():
    colour = to_rgb(encode(plain((255, 40, 40), size=(16, 16)).convert("CMYK"), "JPEG", quality=95)).getpixel((8, 8))
    assert np.abs(np.array(colour) - (255, 40, 40)).max() < 12


TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"


@pytest.mark.parametrize(("orientation", "turn"), list(enumerate([None, *TURNS.split()], 1)))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_cameras_that_were_held_aslant(orientation, turn, kind):
    stored = plain("white", size=(32, 16))
    stored.paste((255, 0, 0), (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = to_rgb(encode(stored, kind, exif=exif))
    expected = stored if turn is None else stored.transpose(Image.Transpose[turn])
    assert upright.size == expected.size
    difference = np.abs(np.asarray(upright).astype(int) - np.asarray(expected).astype(int))
    assert np.median(difference) <= 3 and (difference > 60).mean() < 0.02  # JPEG blurs the red corner's edge


def test_a_batch_holds_the_processors_pixels_before_normalisation(student):
    """Other sizes and processors: tests/models/test_families.py."""
    images = [noise(45, 37, seed=s) for s in range(3)]
    batch = Collator(student.processor)([{"image": p, "label": i} for i, p in enumerate(images)])
    theirs = student.processor(images=images, return_tensors="pt", do_normalize=False)["pixel_values"]
    assert batch["images"].dtype == torch.float32 and batch["labels"].tolist() == [0, 1, 2]
    assert batch["images"].shape == theirs.shape and torch.allclose(batch["images"], theirs, rtol=0, atol=1e-7)


def test_native_keeps_the_images_own_pixels(student):
    image = noise(50, 20)
    batch = Collator(student.processor, native=True)([{"image": image, "label": None}])
    assert batch["images"].shape == (1, 3, 20, 50) and "labels" not in batch
    assert torch.equal((batch["images"] * 255).round().byte()[0].permute(1, 2, 0), torch.from_numpy(np.array(image)))


@pytest.mark.parametrize("native", [False, True])
def test_equal_images_have_equal_ids_however_stored_and_wherever_they_stand(student, native):
    image, other = noise(40, 40), noise(40, 40, seed=1)
    nearly = image.copy()
    nearly.putpixel((20, 20), tuple(255 - v for v in image.getpixel((20, 20))))
    copies = [to_rgb(encode(image, kind)) for kind in ("PNG", "BMP", "TIFF")] + [to_rgb(encode(image.convert("RGBA")))]
    collate = Collator(student.processor, native=native)

    def ids(*images):
        return collate([{"image": p, "label": None} for p in images])["image_ids"].tolist()

    assert len(set(ids(*copies))) == 1
    assert ids(other, image, nearly) == [*ids(other), *ids(image), *ids(nearly)]
    assert len(set(ids(other, image, nearly))) == 3 and all(0 <= k < 2**63 for k in ids(*copies, other))


def test_an_id_is_of_the_pixels_and_not_of_their_memory_layout():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    assert image_id(pixels) == image_id(np.asfortranarray(pixels)) != image_id(pixels.transpose(1, 0, 2))


def test_an_image_as_png_is_the_pixels_it_shows():
    pixels = torch.arange(12, dtype=torch.float32).view(3, 2, 2) / 255
    image = Image.open(io.BytesIO(to_png(pixels + 0.4 / 255)))
    assert np.array_equal(np.asarray(image), (pixels * 255).round().byte().permute(1, 2, 0).numpy())
    assert Image.open(io.BytesIO(to_png(pixels - 1))).getextrema() == ((0, 0),) * 3


UNOPENED = {
    "a page that Ghostscript would run": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
    "a format that is not named": (encode(plain((1, 2, 3)), "PCX"), "cannot identify"),
    "too many pixels": (encode(plain(0, "1", (10_001, 10_000))), "10001 × 10000 pixels, expected at most"),
    "too thin": (encode(plain(0, "1", (1, 201))), "1 × 201 pixels"),
}


@pytest.mark.parametrize("what", UNOPENED)
def test_only_named_formats_of_sane_sizes_are_opened(what, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("a program was started"))
    content, says = UNOPENED[what]
    with pytest.raises((ValueError, OSError), match=says):
        to_rgb(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "BMP", "GIF", "TIFF", "PPM", "TGA"])
def test_the_named_formats_are_read(kind):
    assert to_rgb(encode(plain((10, 200, 30), size=(16, 16)), kind)).size == (16, 16)


def test_damaged_exif_refuses_no_image():
    damaged = b"Exif\x00\x00MM\x00*\xff\xff\xff\xff"
    assert to_rgb(encode(plain((10, 200, 30), size=(16, 16)), "JPEG", exif=damaged)).size == (16, 16)
