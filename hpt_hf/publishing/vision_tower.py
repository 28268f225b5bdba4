"""The vision tower for VLMs: a robust CLIP's vision side alone, as `CLIPVisionModel`, at its own or a larger resolution.

A LLaVA-style model reads the hidden states of all patches, so all of them are checked, not only the class token that CLIP itself reads.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, CLIPVisionModel

from hpt_hf.data.collator import Collator
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.publishing.export import TOLERANCE, pictures
from hpt_hf.utils import write_text

_CARD = """---
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [clip, adversarial-robustness, vision-tower]
---
# {name}

The vision tower of a CLIP made robust by [hpt_hf](https://arxiv.org/abs/2601.12865), at {size} px{resized}. In a LLaVA-style model:

```python
from transformers import AutoImageProcessor, CLIPVisionModel

llava.model.vision_tower = CLIPVisionModel.from_pretrained("{name}").to(llava.device, llava.dtype)
llava.config.vision_config = llava.model.vision_tower.config
processor.image_processor = AutoImageProcessor.from_pretrained("{name}")
```

Robustness was measured for zero-shot classification with the whole CLIP at {own} px. For a VLM, and at another resolution, nothing is claimed until it is measured there.
"""


def resize_positions(weight: torch.Tensor, side: int) -> torch.Tensor:
    """(1 + patches, width) position embeddings -> (1 + side², width): bicubic over the grid, the class token's as it is.

    As transformers' `interpolate_pos_encoding`, so that the resized tower gives the hidden states the original gives with that switch on.
    """
    grid = round((weight.shape[0] - 1) ** 0.5)
    patches = weight[1:].T.reshape(1, -1, grid, grid)
    patches = F.interpolate(patches, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([weight[:1], patches.flatten(2)[0].T])


def vision_tower(model: ZeroShotClassifier, image_size: int | None = None) -> CLIPVisionModel:
    """The stock vision tower with `model`'s weights, all hidden states included; `image_size` in pixels, None: its own.

    Raises:
        ValueError: the patches do not fill such a picture.
    """
    config = copy.deepcopy(model.config.vision_config)
    size = model.image_size if image_size is None else image_size
    if size < config.patch_size or size % config.patch_size:
        near = max(1, round(size / config.patch_size)) * config.patch_size
        raise ValueError(f"image_size {size}: patches of {config.patch_size} px do not fill it; {near} would do")
    config.image_size = size
    tower = CLIPVisionModel(config)
    weights = dict(model.model.vision_model.state_dict())
    if size != model.image_size:
        name = "embeddings.position_embedding.weight"
        weights[name] = resize_positions(weights[name], size // config.patch_size)
    tower.load_state_dict(weights)
    return tower.to(model.device).eval()


def export_tower(
    model: ZeroShotClassifier, folder: str | Path, *, image_size: int | None = None, dtype: torch.dtype = torch.float32
) -> int:
    """Write tower, image processor and card, and open them afresh. Returns how many tensors of hidden states were compared.

    Raises:
        ValueError: no such size; or what was written does not give the model's own hidden states, and then nothing is left.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: a vision tower goes into a folder of its own")
    tower = vision_tower(model, image_size)
    size = tower.config.image_size
    processor = copy.deepcopy(model.processor.image_processor)
    for asked in (processor.size, processor.crop_size):  # whether it cuts or squashes
        for side in ("shortest_edge", "height", "width"):
            if asked and asked.get(side):
                asked[side] = round(asked[side] * size / model.image_size)
    tower.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    resized = "" if size == model.image_size else f", its position embeddings resized from {model.image_size} px"
    write_text(
        folder / "README.md",
        _CARD.format(name=folder.resolve().name, size=size, own=model.image_size, resized=resized),
    )
    worst, count = tower_parity(model, folder)
    if (
        dtype != torch.float32
    ):  # the weights themselves are rounded: that is what was asked for, and all that may differ
        expected = vision_tower(model, image_size).to(dtype).float().state_dict()
        found = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).state_dict()
        worst = max(float((found[name].cpu() - tensor.cpu()).abs().max()) for name, tensor in expected.items())
    if not worst <= TOLERANCE:
        shutil.rmtree(folder)
        raise ValueError(
            f"opened afresh, the tower's hidden states differ by {worst:.2g} (relative) from the model's: nothing was written"
        )
    return count


@torch.no_grad()
def tower_parity(model: ZeroShotClassifier, folder: str | Path) -> tuple[float, int]:
    """(largest difference relative to the layer's largest value, tensors compared): hidden states of the folder's tower against the model's own.

    The model's own are those of the stock tower with its weights, with `interpolate_pos_encoding` where the size differs; and at the model's own size
    also the embedding that its evaluator computes.
    """
    opened = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    original = vision_tower(model).cpu()
    size, worst, count = opened.config.image_size, 0.0, 0
    for picture in pictures(size):
        inputs = processor(picture.convert("RGB"), return_tensors="pt")
        ours = opened(**inputs, output_hidden_states=True)
        theirs = original(**inputs, output_hidden_states=True, interpolate_pos_encoding=size != model.image_size)
        pairs = [
            *zip(ours.hidden_states, theirs.hidden_states, strict=True),
            (ours.pooler_output, theirs.pooler_output),
        ]
        if size == model.image_size:
            images = Collator(model.processor)([{"image": picture.convert("RGB"), "label": None}])["images"].to(
                model.device
            )
            pairs.append(
                (ours.pooler_output @ model.model.visual_projection.weight.T.cpu(), model.embed_images(images).cpu())
            )
        for a, b in pairs:
            worst, count = max(worst, float((a - b).abs().max() / b.abs().max())), count + 1
    return worst, count
