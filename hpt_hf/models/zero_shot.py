"""A dual encoder as a zero-shot classifier of images in [0, 1]: what is attacked, trained and measured.

Logits are `scale * cosine(image, class prompts)` (CLIP, arXiv 2103.00020, section 3.1.2), equal to the model's own.
Class prompts are embedded once, into the head; resizing and normalisation happen inside, with the processor's numbers.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from hpt_hf.models.families import FAMILIES
from hpt_hf.models.fast_layers import use_fast_layers
from hpt_hf.models.pretrained import load_pretrained
from hpt_hf.types import Embeds, Images, InputImages, ZeroShotOutput

RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers -> torch's names
TEMPLATE = "This is a photo of a {}"  # the paper's prompt


def check_classes(classes: Sequence[str]) -> None:
    """Raise ValueError unless `classes` can be told apart: at least two, none blank, none twice."""
    if len(classes) < 2:
        raise ValueError(f"a classifier needs at least two class names, got {len(classes)}: {list(classes)!r}")
    seen: dict[str, int] = {}
    for index, name in enumerate(classes):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"class {index} has the name {name!r}: expected words that a prompt can hold")
        if name in seen:
            raise ValueError(f"classes {seen[name]} and {index} are both called {name!r}: expected different names")
        seen[name] = index


def check_templates(templates: Sequence[str]) -> None:
    """Raise ValueError unless every template has a place for the class name."""
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise ValueError(f"templates: got {list(templates)}, expected '{{}}' exactly once in each")


@torch.no_grad()
def build_zero_shot_head(
    model: PreTrainedModel, tokenizer, classes: Sequence[str], templates: Sequence[str] = (TEMPLATE,)
) -> torch.Tensor:
    """(classes, dim) unit vectors: the mean of the templates' normalised embeddings, normalised again (section 3.1.4).

    Raises:
        ValueError: no or duplicate names, a template without {}, or prompts longer than the text tower's context.
    """
    check_classes(classes)
    check_templates(templates)
    family, context = FAMILIES[model.config.model_type], model.config.text_config.max_position_embeddings
    total = torch.zeros(len(classes), model.config.projection_dim, device=model.device)
    for template in templates:
        prompts = [template.replace("{}", c) for c in classes]  # a template may hold other braces
        tokens = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
        if tokens["input_ids"].shape[1] > context:
            lengths = tokens["attention_mask"].sum(1)
            longest = prompts[int(lengths.argmax())]
            raise ValueError(f"the prompt {longest!r} has {int(lengths.max())} tokens: the text tower reads {context}")
        chunks = [{k: v[i : i + 256] for k, v in tokens.items()} for i in range(0, len(prompts), 256)]
        with torch.autocast(model.device.type, enabled=False):
            total += F.normalize(torch.cat([family.text_features(model, chunk) for chunk in chunks]), dim=-1)
    head = F.normalize(total, dim=-1)
    for start in range(0, len(head), 256):
        same = torch.cdist(head[start : start + 256], head, p=torch.inf) < 1e-6
        if (pairs := same.triu(start + 1).nonzero()).numel():
            first, second = (classes[i] for i in (pairs[0] + torch.tensor([start, 0], device=pairs.device)).tolist())
            raise ValueError(
                f"the classes {first!r} and {second!r} have equal embeddings: they cannot be told apart. Fix: other "
                "names; or the tokenizer, or eos_token_id of the text tower, is not the model's own"
            )
    return head


@functools.lru_cache(4096)
def height_first(size: tuple[int, int], target: tuple[int, int], resample: int) -> bool:
    """Does Pillow resize the height before the width? Asked of Pillow itself, whose versions choose otherwise."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 2, size, dtype=np.uint8) * 255)
    (_, width), (tall, wide) = size, target
    by_height = image.resize((width, tall), resample).resize((wide, tall), resample)
    return np.array_equal(by_height, image.resize((wide, tall), resample))


class ZeroShotClassifier(torch.nn.Module):
    """Images in [0, 1] of any size -> logits over a class list, through `model`, a plain dual encoder of transformers.

    The head belongs to the classifier, so that what is saved is the plain model of its own class. The model computes
    with faster layers (`hpt_hf.models.fast_layers`): its vision tower gives the class token alone.

    Args:
        model: of a family in `hpt_hf.models.families`; changed in place.
        processor: gives tokenizer, mean, standard deviation and sizes.
        revision: the Hub's commit that the model came from.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, *, revision: str | None = None):
        super().__init__()
        use_fast_layers(model)
        self.model, self.processor, self.revision = model, processor, revision
        self.family = FAMILIES[model.config.model_type]
        self.classes: tuple[str, ...] = ()
        self.templates: tuple[str, ...] = ()
        image = processor.image_processor
        self.squash, self.resample = not image.do_center_crop, int(image.resample)
        self.shortest = image.size.get("shortest_edge") or self.image_size
        for name, value in (("mean", image.image_mean), ("std", image.image_std)):
            self.register_buffer(name, torch.tensor(value, device=model.device).view(1, 3, 1, 1), persistent=False)
        empty = torch.empty(0, model.config.projection_dim, device=model.device)
        self.register_buffer("head", empty, persistent=False)

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub) -> ZeroShotClassifier:
        """From one folder or Hub id, in float32 and eval mode. `hub`: revision, cache_dir, token.

        Raises:
            OSError, ValueError: nothing there, or no whole model of a known family.
        """
        model, processor, commit = load_pretrained(source, **hub)
        return cls(model, processor, revision=commit).eval()

    def with_weights(self, state: Mapping[str, torch.Tensor]) -> ZeroShotClassifier:
        """A twin in eval mode with these weights of the model; the two share processor and head."""
        model = type(self.model)(self.model.config).to(self.device)
        model.load_state_dict(state)
        twin = ZeroShotClassifier(model, self.processor)
        twin.head, twin.classes, twin.templates = self.head, self.classes, self.templates
        return twin.eval()

    @property
    def config(self):
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def image_size(self) -> int:
        """Side in pixels of what the vision tower sees."""
        return self.model.config.vision_config.image_size

    def set_classes(self, classes: Sequence[str], templates: Sequence[str] = (TEMPLATE,)) -> ZeroShotClassifier:
        """Embed the class prompts, once; every later forward uses them. Returns self."""
        self.head = build_zero_shot_head(self.model, self.processor.tokenizer, classes, templates)
        self.classes, self.templates = tuple(classes), tuple(templates)
        return self

    def resize_and_crop(self, images: Images) -> InputImages:
        """As the processor resizes and cuts, differentiable: one side after the other, with a clamp after each.

        Within 1/255 of Pillow, which rounds in between. In one pass hard edges would be up to 28/255 off.
        """
        size, (height, width) = self.image_size, images.shape[-2:]
        if (height, width) == (size, size):
            return images
        tall, wide = size, size
        if not self.squash:  # the processor's own order: shortest / short * long may fall one pixel short of it
            tall, wide = (int(self.shortest * side / min(height, width)) for side in (height, width))
        first = (tall, width) if height_first((height, width), (tall, wide), self.resample) else (height, wide)
        for target in (first, (tall, wide)):
            if images.shape[-2:] != target:
                images = F.interpolate(
                    images, size=target, mode=RESAMPLE[self.resample], antialias=True, align_corners=False
                ).clamp(0, 1)
        top, left = (tall - size) // 2, (wide - size) // 2
        return images[..., top : top + size, left : left + size]

    def embed_images(self, images: Images) -> Embeds:
        """(batch, dim) embeddings, not normalised, float32 whatever the weights are."""
        return self.family.image_features(self.model, (self.resize_and_crop(images) - self.mean) / self.std).float()

    def classify(self, images: Images) -> ZeroShotOutput:
        """Logits and embeds. Attacks call this: nothing wraps it in autocast, as `forward` is."""
        if not self.classes:
            raise RuntimeError("no classes yet: call set_classes(names, templates) before classifying")
        embeds = self.embed_images(images)
        # A hundredfold cosine in bfloat16 is wrong in its first decimal, so the head stays float32 under autocast.
        with torch.autocast(images.device.type, enabled=False):
            logits = self.family.scale(self.model) * F.normalize(embeds, dim=-1) @ self.head.T
        return ZeroShotOutput(logits=logits, embeds=embeds)

    def forward(self, images: Images) -> ZeroShotOutput:
        """`classify`, as what DDP and autocast wrap: the training loss must come through here."""
        return self.classify(images)

    def freeze_text(self) -> ZeroShotClassifier:
        """Only the vision side is trained (the authors' choice). Returns self."""
        self.model.requires_grad_(True)
        for name in self.family.frozen_in_training:
            getattr(self.model, name).requires_grad_(False)
        return self

    def activation_checkpointing_enable(self, **options) -> None:
        """What the Trainer asks of a model for `--activation_checkpointing`."""
        self.model.activation_checkpointing_enable(**options)

    def save_pretrained(self, folder: str | Path, **options) -> None:
        """A plain checkpoint of the model's own class with its processor: `pipeline` needs nothing else."""
        self.model.save_pretrained(folder, **options)
        if options.get("is_main_process", True):
            self.processor.save_pretrained(folder)


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of named tensors: equal digests = equal names and values."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def fingerprint(classifier: ZeroShotClassifier) -> str:
    """A digest of the model's weights: equal digests = equal models."""
    return digest(classifier.model.state_dict())
