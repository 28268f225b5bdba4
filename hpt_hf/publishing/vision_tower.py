"""The vision tower for VLMs: a robust CLIP's vision side alone, as `CLIPVisionModel`, at its own or another size.

A LLaVA-style model reads the hidden states of all patches, so all of them are checked, not only the class token.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import AutoImageProcessor, CLIPVisionModel

from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.publishing.export import SEAL, TOLERANCE, probe_images, seal_form
from hpt_hf.utils import read_json, written_whole


def vision_tower(classifier: ZeroShotClassifier, image_size: int | None = None) -> CLIPVisionModel:
    """The stock tower with the classifier's weights at `image_size` pixels, as `interpolate_pos_encoding` resizes.

    Raises:
        ValueError: the patches do not fill such an image.
    """
    config, weights = copy.deepcopy(classifier.config.vision_config), classifier.model.vision_model.state_dict()
    size = config.image_size if image_size is None else image_size
    if size < config.patch_size or size % config.patch_size:
        near = max(1, round(size / config.patch_size)) * config.patch_size
        raise ValueError(f"image_size {size}: patches of {config.patch_size} px do not fill it; {near} would do")
    if size != config.image_size:
        embeddings = classifier.model.vision_model.embeddings
        positions = embeddings.interpolate_pos_encoding(torch.empty(1, 1, config.hidden_size), size, size)
        weights["embeddings.position_embedding.weight"], config.image_size = positions[0], size
    tower = CLIPVisionModel(config)
    tower.load_state_dict(weights)
    return tower.eval()


def export_tower(
    classifier: ZeroShotClassifier,
    folder: str | Path,
    *,
    image_size: int | None = None,
    dtype=torch.float32,
    records=None,
) -> int:
    """Write tower, image processor and card, and open them afresh. Returns how many hidden states were compared.

    Raises:
        ValueError: no such size; or what was written does not give the model's own hidden states, and nothing is left.
    """
    folder, own = Path(folder), classifier.image_size
    if _holds_something_else(folder):
        raise ValueError(f"{folder} is not empty: a vision tower goes into a folder of its own")
    tower = vision_tower(classifier, image_size).to(dtype)
    size, processor = tower.config.image_size, copy.deepcopy(classifier.processor.image_processor)
    for asked in (processor.size, processor.crop_size):  # whether it cuts or squashes
        for side in ("shortest_edge", "height", "width"):
            if asked and asked.get(side):
                asked[side] = round(asked[side] * size / own)
    with written_whole(folder, last=SEAL) as stage:
        tower.save_pretrained(stage)
        processor.save_pretrained(stage)
        worst, count = compare_tower(classifier, stage, dtype)
        if not worst <= TOLERANCE:
            raise ValueError(f"opened afresh, the tower's hidden states differ by {worst:.2g}: nothing was written")
        seal_form(stage, folder, "vision_tower", classifier, records or {}, size=size)
    return count


def _holds_something_else(folder: Path) -> bool:
    """Than a tower, whole or killed while it was written: the same command must go on from either."""
    if (folder / SEAL).is_file():
        return read_json(folder / SEAL).get("form") != "vision_tower"
    return folder.exists() and any(folder.iterdir()) and not (folder / ".part").exists()


@torch.no_grad()
def compare_tower(classifier: ZeroShotClassifier, folder: str | Path, dtype=torch.float32) -> tuple[float, int]:
    """(largest difference relative to the layer's largest value, hidden states compared) of a folder and the model."""
    opened = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    size = opened.config.image_size
    # Rounded weights are what was asked for, and all that may differ.
    own = vision_tower(classifier) if dtype == torch.float32 else vision_tower(classifier, size).to(dtype).float()
    differences = []
    for image in probe_images(size):
        pixels = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        ours = opened(pixels, output_hidden_states=True)
        theirs = own(pixels, output_hidden_states=True, interpolate_pos_encoding=size != own.config.image_size)
        for a, b in zip([*ours.hidden_states, ours[1]], [*theirs.hidden_states, theirs[1]], strict=True):
            differences.append(float((a - b).abs().max() / b.abs().max()))
    return float(torch.tensor(differences).max()), len(differences)
