"""How far the resize inside the model is from each family's own processor, in 255ths of the pixel range.

    python benchmarks/preprocessing.py --photos FOLDER_OF_PARQUET_FILES --output docs/results

Binary noise, squares and photographs at six aspect ratios. Pillow rounds to bytes after each of its two passes, so about 1/255 is
rounding.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from hpt_hf.data.collator import to_images, to_rgb
from hpt_hf.data.dataset import DatasetSpec, load_images
from hpt_hf.models.preprocessing import Preprocessing
from hpt_hf.utils import hardware, markdown, versions, write_json

ASPECTS = (1, 1.25, 4 / 3, 1.5, 2, 3)
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PROCESSORS = {
    "CLIP, MetaCLIP 2, AltCLIP: shortest side and crop, bicubic": CLIPImageProcessorPil(),
    "SigLIP: squash, bicubic": SiglipImageProcessorPil(**HALF),
    "SigLIP 2: squash, bilinear": SiglipImageProcessorPil(**HALF, resample=2),
    "SigLIP 2 NaFlex: aspect kept, bilinear": Siglip2ImageProcessorPil(),
    "ALIGN: squash and crop, bilinear": EfficientNetImageProcessorPil(
        size={"height": 346, "width": 346}, crop_size={"height": 289, "width": 289}, do_center_crop=True, resample=2,
        rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False, include_top=False,
    ),
    "Chinese CLIP: squash, bicubic": CLIPImageProcessorPil(size={"height": 224, "width": 224}, do_center_crop=False),
}  # fmt: skip


def pictures(photos: str | None) -> dict[str, list[Image.Image]]:
    """Kind -> images of all aspect ratios, wide and tall."""
    sizes = [(round(130 * a), 130) for a in ASPECTS] + [(300, round(300 * a)) for a in ASPECTS]
    rng, found = np.random.default_rng(0), {"binary noise": [], "squares": []}
    for width, height in sizes:
        noise = rng.integers(0, 2, (height, width, 3), np.uint8) * 255
        rows, columns = np.mgrid[:height, :width]
        board = np.repeat(((rows // 7 + columns // 7) % 2 * 255).astype(np.uint8)[:, :, None], 3, 2)
        found["binary noise"].append(Image.fromarray(noise))
        found["squares"].append(Image.fromarray(board))
    if photos:
        files = sorted(Path(photos).glob("*-test.parquet"))
        taken = [load_images(DatasetSpec(str(f), split="test")) for f in files if "flickr" not in f.name]
        whole = [to_rgb(images[i]["image"]) for images in taken for i in range(6)]
        found["photographs"] = whole + [
            image.crop((0, 0, *(max(8, round(min(image.size) * side / max(size))) for side in size)))
            for image, size in zip(whole, itertools.cycle(sizes), strict=False)  # cut to the aspects
        ]
    return found


@torch.no_grad()
def difference(processor, images: list[Image.Image]) -> tuple[float, float]:
    """(largest, mean) of |inside the model - processor|, in 255ths."""
    read, largest, total = Preprocessing.of(processor), 0.0, []
    for image in images:
        if read.reads(image.height, image.width):  # is taken as it is, by rule
            continue
        inside = read(to_images(np.array(image)[None]))
        own = to_images(np.array(read.cut(image))[None])
        theirs = np.asarray(processor([image], return_tensors="np")["pixel_values"][0])
        if theirs.ndim == 3:  # the cut with Pillow is the processor's own
            mean, std = (np.array(v)[:, None, None] for v in (read.mean, read.std))
            assert np.allclose((own[0].numpy() - mean) / std, theirs, atol=1e-5)
        off = (inside - own).abs() * 255
        largest = max(largest, float(off.max()))
        total.append(float(off.mean()))
    return largest, sum(total) / len(total)


def table(found: dict) -> str:
    kinds = list(next(iter(found.values())))
    rows = [(name, *(f"{m:.2f} / {a:.3f}" for m, a in (each[k] for k in kinds))) for name, each in found.items()]
    return markdown(("processor", *(f"{kind}: most / mean" for kind in kinds)), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos")
    parser.add_argument("--output", default="outputs/preprocessing")
    args = parser.parse_args()
    images = pictures(args.photos)
    found = {name: {k: difference(p, part) for k, part in images.items()} for name, p in PROCESSORS.items()}
    counts = {kind: len(part) for kind, part in images.items()}
    about = {"images": counts, "versions": versions(), "hardware": hardware()}
    write_json(Path(args.output, "preprocessing.json"), {"found": found, **about})
    print(table(found), counts)


if __name__ == "__main__":
    main()
