"""What a processor does to an image, as numbers: with Pillow on files, and differentiable inside the model."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from PIL import Image
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from hpt_hf.types import Images, InputImages

RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers -> torch's names


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop, and a scale and shift of each channel.

    Args:
        side: of the square that the vision tower reads; of a NaFlex model, whose images keep their aspect, of the
            largest square.
        resize: pixels of the shorter side; or (height, width), to which an image is squashed.
        crop: cut the centre square of `side` pixels out of what was resized.
        resample: Pillow's number of a filter, of `RESAMPLE`.
        mean, std: what is taken from, and divides, values in [0, 1] of each channel.
        patch_size: of a NaFlex model, else None.
        rounded: where half a pixel must fall, the crop begins at the next even one (torchvision), not at the lower.
    """

    side: int
    resize: int | tuple[int, int]
    crop: bool
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch_size: int | None = None
    rounded: bool = False

    @classmethod
    def of(cls, processor) -> Preprocessing:
        """What one of transformers' image processors does; of what is a `Preprocessing` already, itself.

        Raises:
            ValueError: something else than resize (bilinear or bicubic), centre crop, scale and normalisation.
        """
        if isinstance(processor, Preprocessing):
            return processor
        told = {name: getattr(processor, name, None) for name in ("size", "crop_size", "resample", "rescale_factor")}
        if not (processor.do_resize and processor.do_rescale and int(processor.resample) in RESAMPLE):
            raise ValueError(f"got {told}, expected one that resizes (bilinear or bicubic) and scales")
        mean, std = processor.image_mean, processor.image_std
        check_normalisation(mean, std)
        if not processor.do_normalize:
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if getattr(processor, "include_top", False):  # EfficientNet's: divided by the deviation once more
            std = tuple(s * again for s, again in zip(std, processor.image_std, strict=True))
        # (x factor - offset - mean) / std is (x - mean') / std'.
        factor, offset = 255 * processor.rescale_factor, float(getattr(processor, "rescale_offset", False))
        if not factor > 0:
            raise ValueError(f"rescale_factor: got {processor.rescale_factor}, expected more than 0")
        mean = tuple((m + offset) / factor for m in mean)
        options = {"resample": int(processor.resample), "mean": mean, "std": tuple(s / factor for s in std)}
        if patches := getattr(processor, "max_num_patches", None):
            side = int(patches**0.5) * processor.patch_size
            return cls(side, (side, side), False, patch_size=processor.patch_size, **options)
        size, crop = processor.size, processor.crop_size if getattr(processor, "do_center_crop", False) else None
        resize = size.get("shortest_edge") or (size["height"], size["width"])
        least = resize if isinstance(resize, int) else min(resize)
        side = crop["height"] if crop else least
        if crop and (crop["width"] != side or least < side) or not crop and resize != (side, side):
            raise ValueError(f"got {told}, expected a square of at most the size that is resized to")
        return cls(side, resize, bool(crop), **options)

    def reads(self, height: int, width: int) -> bool:
        """Does the tower take an image of this size as it is?"""
        if not self.patch_size:
            return (height, width) == (self.side, self.side)
        whole = height % self.patch_size == 0 == width % self.patch_size
        return whole and height * width <= self.side**2

    def target(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image is resized to."""
        if self.patch_size:
            patches = (self.side // self.patch_size) ** 2
            return get_image_size_for_max_num_patches(height, width, self.patch_size, patches)
        if isinstance(self.resize, tuple):
            return self.resize
        # The processor's own order: shortest / short * long may fall one pixel short of it.
        return tuple(int(self.resize * length / min(height, width)) for length in (height, width))

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        half = round if self.rounded else int
        return half((height - self.side) / 2), half((width - self.side) / 2)

    def cut(self, image: Image.Image) -> Image.Image:
        """An RGB image as the processor resizes and crops it, to the last bit."""
        height, width = self.target(image.height, image.width)
        if image.size != (width, height):
            image = image.resize((width, height), self.resample)
        if not self.crop or image.size == (self.side, self.side):
            return image
        top, left = self._corner(height, width)
        return image.crop((left, top, left + self.side, top + self.side))

    def __call__(self, images: Images) -> InputImages:
        """The same, differentiable, on images of any one size: one side after the other, with a clamp after each.

        Within 1/255 of Pillow, which rounds in between. In one pass hard edges would be up to 28/255 off.
        """
        height, width = images.shape[-2:]
        if self.reads(height, width):
            return images
        tall, wide = self.target(height, width)
        first = (tall, width) if height_first((height, width), (tall, wide), self.resample) else (height, wide)
        for size in (first, (tall, wide)):
            if images.shape[-2:] != size:
                images = F.interpolate(
                    images, size=size, mode=RESAMPLE[self.resample], antialias=True, align_corners=False
                ).clamp(0, 1)
        if not self.crop:
            return images
        top, left = self._corner(tall, wide)
        return images[..., top : top + self.side, left : left + self.side]


def check_normalisation(mean, std) -> None:
    """Raise ValueError unless they are three numbers each, the deviations above 0."""
    for name, values in (("image_mean", mean), ("image_std", std)):
        numbers = np.asarray(values, dtype=np.float64)
        if numbers.shape != (3,) or not np.isfinite(numbers).all() or (name == "image_std" and numbers.min() <= 0):
            raise ValueError(f"{name}: got {values}, expected three numbers, deviations above 0")


@functools.lru_cache(4096)
def height_first(size: tuple[int, int], target: tuple[int, int], resample: int) -> bool:
    """Does Pillow resize the height before the width? Asked of Pillow itself, whose versions choose otherwise."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 2, size, dtype=np.uint8) * 255)
    (_, width), (tall, wide) = size, target
    by_height = image.resize((width, tall), resample).resize((wide, tall), resample)
    return np.array_equal(by_height, image.resize((wide, tall), resample))
