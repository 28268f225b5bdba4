"""Export: a folder that `pipeline`, the Auto classes and `CLIPModel` open with nothing else, checked before anyone relies on it.

The seam to huggingface_hub.
"""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

from hpt_hf.zero_shot import ZeroShotCLIP

_CARD = """
# {title}

A CLIP fine-tuned by [hpt_hf](https://arxiv.org/abs/2601.12865) to withstand adversarial images. It opens like any CLIP:

```python
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="{folder}")
classify("picture.png", candidate_labels={labels})
```

## How it was made

{facts}
"""


def export(model: ZeroShotCLIP, folder: str | Path, *, base_model: str, facts: dict[str, object]) -> Path:
    """Write weights (safetensors), config, processor, tokenizer and a card, then open the folder afresh and compare logits.

    Args:
        base_model: what the student started from.
        facts: lines of the card's "how it was made".

    Raises:
        RuntimeError: what stands on disk does not answer as the model in memory does.
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    # A path of the machine that trained it says nothing to whoever reads the card.
    is_id = not Path(base_model).exists()
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "adversarial-robustness", "hpt-gpd"],
        base_model=base_model if is_id else None,
    )
    text = _CARD.format(title=folder.name, folder=folder.name, labels=list(model.classes[:3]), facts=lines)
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(folder / "README.md")
    difference = parity(model, folder)
    if difference > 1e-4:
        raise RuntimeError(
            f"{folder} was written, but opened afresh its logits differ by {difference:.2g} from the trained model's: do not use it, and please report this"
        )
    return folder


@torch.no_grad()
def parity(model: ZeroShotCLIP, folder: str | Path) -> float:
    """The largest difference between the evaluator's logits and those of the stock classes opened from `folder`."""
    from hpt_hf.data import Collate

    device = model.logit_scale.device
    generator = torch.Generator().manual_seed(0)
    side = model.image_size + 7
    pixels = (torch.rand(side, side + 5, 3, generator=generator) * 255).to(torch.uint8).numpy()
    image = Image.fromarray(pixels)
    ours = model.eval().classify(Collate(model.processor)([{"image": image, "label": None}])["images"].to(device)).logits.cpu()
    stock = AutoModelForZeroShotImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = processor(images=image, return_tensors="pt")
    embeds = stock.get_image_features(**inputs).pooler_output
    embeds = embeds / embeds.norm(dim=-1, keepdim=True)
    theirs = stock.logit_scale.exp() * embeds @ model.class_embeds.cpu().T
    return float((ours - theirs).abs().max())
