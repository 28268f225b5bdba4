"""From encoded images of any mode to a batch: RGB in [0, 1], cut as the model's processor cuts, and the noise's ids."""

from __future__ import annotations

import functools
import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from hpt_hf.models.preprocessing import Preprocessing
from hpt_hf.types import Images

# What may be opened, whatever a file is called: some of Pillow's other readers start programs.
Image.init()
FORMATS = {"PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "BMP", "GIF", "TIFF", "PPM", "TGA"} & Image.OPEN.keys()
MAX_PIXELS, MAX_ASPECT = 100_000_000, 200  # a header of a few bytes can claim any size


def encoded(cell: dict) -> bytes:
    """What a cell of an image column that is not decoded holds, or points to."""
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


def to_rgb(image: Image.Image | bytes) -> Image.Image:
    """Any image -> 8-bit RGB, upright. Transparency is laid on white, 16 bits are scaled to 8, not cut off."""
    if isinstance(image, bytes):
        image = _opened(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        # Integers are 16 bits, however dark the image; floats say by their range whether 1 or 255 is white.
        top = 65535 if image.mode != "F" else 1 if values.max() <= 1 else 255
        return Image.fromarray(np.rint(np.clip(values / top, 0, 1) * 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _opened(content: bytes) -> Image.Image:
    with warnings.catch_warnings():  # of sizes that are refused here, and of damaged EXIF
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(content), formats=list(FORMATS))
        width, height = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(f"{width} × {height} pixels, expected at most {MAX_PIXELS:,}, and 1 to {MAX_ASPECT}")
        image.load()  # decode now: a truncated file fails here and not in the middle of a batch
        try:
            return ImageOps.exif_transpose(image)
        except Exception:  # damaged EXIF says nothing about the pixels; Pillow raises many types on it
            return image


def read_image(cell: dict, where: str, fix: str) -> Image.Image:
    """The RGB image of a cell. Raises ValueError, with where it lies and what to do, if it cannot be read."""
    try:
        return to_rgb(encoded(cell))
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise ValueError(f"{where} cannot be read ({type(error).__name__}: {error}). Fix: {fix}.") from error


def image_id(pixels: np.ndarray) -> int:
    """A 63-bit digest of a uint8 image: the same image always draws the same noise (`hpt_hf.attacks.noise.Noise`)."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Collator:
    """Rows -> a batch: `images` float32 (batch, 3, height, width) in [0, 1], `image_ids` (batch,), and `labels` (batch,) if there are any.

    Args:
        processor: the student's; its resize and crop are applied, its normalisation is not (it lies in the model).
        native: keep every image's own size instead; a batch must then hold images of one size.
    """

    processor: object
    native: bool = False

    @functools.cached_property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing.of(self.processor.image_processor)

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        images, like = [_decoded(r) for r in rows], self.preprocessing
        # Of an own size that the model would take for cut already, no one could tell.
        images = [like.cut(i) if not self.native or like.reads(i.height, i.width) else i for i in images]
        if len(sizes := {i.size for i in images}) > 1:
            raise ValueError(
                f"got a batch of {len(sizes)} sizes, expected one. Fix: --protocol native or square images"
            )
        pixels = np.stack([np.asarray(i) for i in images])
        batch = {"images": to_images(pixels), "image_ids": torch.tensor([image_id(p) for p in pixels])}
        if rows[0]["label"] is not None:
            batch["labels"] = torch.tensor([r["label"] for r in rows])
        return batch


def _decoded(row: dict) -> Image.Image:
    """The image of a row; a stream's are decoded here, by the process that asks for them."""
    if not isinstance(row["image"], bytes):
        return row["image"]
    cell = {"bytes": row["image"], "path": None}
    return read_image(cell, row["where"], "repair or remove it; a stream cannot leave images out")


def to_images(pixels: np.ndarray) -> Images:
    """uint8 (batch, height, width, 3) -> float32 (batch, 3, height, width) in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255


def to_png(image: torch.Tensor) -> bytes:
    """(3, height, width) in [0, 1] -> PNG."""
    file = io.BytesIO()
    Image.fromarray((image.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy()).save(file, "PNG")
    return file.getvalue()
