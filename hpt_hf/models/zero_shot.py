"""A dual encoder as a zero-shot classifier of images in [0, 1]: what is attacked, trained and measured.

Logits are `scale * cosine(image, class prompts)` (CLIP, arXiv 2103.00020, section 3.1.2), equal to the model's own.
Class prompts are embedded once, into the head; resizing and normalisation happen inside, with the processor's numbers.
Of a sigmoid model (SigLIP, 2303.15343) the bias is added, too; it cancels in a softmax over the classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.dropout import _DropoutNd as Dropout

from hpt_hf.models.families import FAMILIES, Encoder
from hpt_hf.models.fast_layers import use_fast_layers
from hpt_hf.models.preprocessing import Preprocessing
from hpt_hf.models.pretrained import load_pretrained
from hpt_hf.types import Embeds, Images, InputImages, ZeroShotOutput

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


def tokenize(model: Encoder, tokenizer, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Prompts as the model's family pads them: name of an input -> (prompts, tokens).

    Raises:
        ValueError: a prompt longer than the text tower's context.
    """
    family = FAMILIES[model.config.model_type]
    context = family.context or model.config.text_config.max_position_embeddings
    tokens = tokenizer(prompts, padding=family.padding, max_length=family.context)
    if max(map(len, tokens["input_ids"])) > context:
        masks = tokens.get("attention_mask") or [[1] * len(row) for row in tokens["input_ids"]]
        count, prompt = max(zip(map(sum, masks), prompts, strict=True))
        raise ValueError(f"the prompt {prompt!r} has {count} tokens: the text tower reads {context}")
    return {name: torch.tensor(tokens[name], device=model.device) for name in family.prompts if name in tokens}


@torch.no_grad()
def build_zero_shot_head(
    model: Encoder, tokenizer, classes: Sequence[str], templates: Sequence[str] = (TEMPLATE,)
) -> torch.Tensor:
    """(classes, dim) unit vectors: the mean of the templates' normalised embeddings, normalised again (section 3.1.4).

    Raises:
        ValueError: no or duplicate names, a template without {}, or prompts longer than the text tower's context.
    """
    check_classes(classes)
    check_templates(templates)
    family, total = FAMILIES[model.config.model_type], 0.0
    for template in templates:
        prompts = [template.replace("{}", c) for c in classes]  # a template may hold other braces
        tokens = tokenize(model, tokenizer, prompts)
        chunks = [{k: v[i : i + 256] for k, v in tokens.items()} for i in range(0, len(prompts), 256)]
        with torch.autocast(model.device.type, enabled=False):
            embeds = torch.cat([family.text_features(model, chunk) for chunk in chunks]).float()
        total = total + F.normalize(embeds, dim=-1)
    head = F.normalize(total, dim=-1)
    for start in range(0, len(head), 256):
        same = torch.cdist(head[start : start + 256], head, p=torch.inf) < 1e-6
        if (pairs := same.triu(start + 1).nonzero()).numel():
            row, column = pairs[0].tolist()
            both = f"{classes[start + row]!r} and {classes[column]!r} have equal embeddings"
            raise ValueError(f"the classes {both}. Fix: other names; or the model's own tokenizer and eos_token_id")
    return head


class ZeroShotClassifier(torch.nn.Module):
    """Images in [0, 1] of any size -> logits over a class list, through `model`, a plain dual encoder of transformers.

    The head belongs to the classifier, so that what is saved is the plain model of its own class. The model computes
    with faster layers (`hpt_hf.models.fast_layers`): its vision tower gives the class token alone.

    Args:
        model: of a family in `hpt_hf.models.families`; changed in place.
        processor: gives tokenizer, mean, standard deviation and sizes.
        revision: the Hub's commit that the model came from.
    """

    def __init__(self, model: Encoder, processor, *, revision: str | None = None):
        super().__init__()
        use_fast_layers(model, class_token=FAMILIES[model.config.model_type].class_token)
        self.model, self.processor, self.revision = model, processor, revision
        self.family = FAMILIES[model.config.model_type]
        self.lora: Any = None  # the config of its adapters (`hpt_hf.models.lora`)
        self.classes: tuple[str, ...] = ()
        self.templates: tuple[str, ...] = ()
        self.preprocessing = Preprocessing.of(processor.image_processor)
        for name in ("mean", "std"):
            value = torch.tensor(getattr(self.preprocessing, name), device=model.device)
            self.register_buffer(name, value.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("head", torch.empty(0, 0, device=model.device), persistent=False)

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
        model = self.family.blank(self.model).to(self.device)
        model.load_state_dict(state)
        twin = ZeroShotClassifier(model, self.processor)
        twin.head, twin.classes, twin.templates = self.head, self.classes, self.templates
        return twin.eval()

    def plain_state(self) -> dict[str, torch.Tensor]:
        """The weights under the names of the model's own class, adapters merged into them."""
        layers = dict(adapted_layers(self.model))
        if not layers:
            return self.model.state_dict()
        state = {n.replace(".base_layer.", "."): t for n, t in self.model.state_dict().items() if ".lora_" not in n}
        with torch.no_grad():
            for name, layer in layers.items():
                state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight(layer.active_adapters[0])
        return state

    def identity(self) -> list:
        """What decides its answers beside its weights and classes, as JSON."""
        return [self.config.to_json_string(), self.mean.tolist(), self.std.tolist()]

    @property
    def config(self):
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the vision side's weights: the rest is not asked once the classes are set."""
        return next(getattr(self.model, self.family.vision_side[0]).parameters()).dtype

    def in_precision(self, dtype: torch.dtype) -> ZeroShotClassifier:
        """The vision side in another precision; classes, scale and preprocessing stay float32. Returns self."""
        for name in self.family.vision_side:
            if hasattr(self.model, name):
                getattr(self.model, name).to(dtype)
        return self

    @property
    def image_size(self) -> int:
        """Side in pixels of the square that the vision tower sees."""
        return self.preprocessing.side

    def set_classes(self, classes: Sequence[str], templates: Sequence[str] = (TEMPLATE,)) -> ZeroShotClassifier:
        """Embed the class prompts, once; every later forward uses them. Returns self."""
        self.head = build_zero_shot_head(self.model, self.processor.tokenizer, classes, templates)
        self.classes, self.templates = tuple(classes), tuple(templates)
        return self

    def resize_and_crop(self, images: Images) -> InputImages:
        """As the processor resizes and cuts, differentiable; images that the tower can read are not touched."""
        return self.preprocessing(images)

    def embed_images(self, images: Images) -> Embeds:
        """(batch, dim) embeddings, not normalised, float32 whatever the weights are."""
        pixels = (self.resize_and_crop(images) - self.mean) / self.std
        return self.family.image_features(self.model, pixels.to(self.dtype)).float()

    def classify(self, images: Images) -> ZeroShotOutput:
        """Logits and embeds. Attacks call this: nothing wraps it in autocast, as `forward` is."""
        if not self.classes:
            raise RuntimeError("no classes yet: call set_classes(names, templates) before classifying")
        embeds = self.embed_images(images)
        # A hundredfold cosine in bfloat16 is wrong in its first decimal, so the head stays float32 under autocast.
        with torch.autocast(images.device.type, enabled=False):
            scale, bias = self.family.scale(self.model), self.family.bias(self.model)
            logits = scale * F.normalize(embeds, dim=-1) @ self.head.T + bias
        return ZeroShotOutput(logits=logits, embeds=embeds, cosines=(logits - bias) / scale)

    def forward(self, images: Images) -> ZeroShotOutput:
        """`classify`, as what DDP and autocast wrap: the training loss must come through here."""
        return self.classify(images)

    def freeze_text(self) -> ZeroShotClassifier:
        """Only the vision side is trained (the authors' choice), or its adapters. Returns self."""
        for name, parameter in self.model.named_parameters():
            trained = name.startswith(self.family.vision_side)
            parameter.requires_grad_(trained and (self.lora is None or ".lora_" in name))
        return self

    def train(self, mode: bool = True) -> ZeroShotClassifier:
        """As torch's; layers that would compute with statistics of the batch, or at random, stay as in evaluation."""
        super().train(mode)
        for module in self.modules():
            # By name: those of timm and open_clip, which leave out patches and whole layers.
            if isinstance(module, BatchNorm | Dropout) or type(module).__name__ in ("PatchDropout", "DropPath"):
                module.eval()
        return self

    def activation_checkpointing_enable(self, **options) -> None:
        """What the Trainer asks of a model for `--activation_checkpointing`."""
        self.model.activation_checkpointing_enable(**options)

    def save_pretrained(self, folder: str | Path, **options) -> None:
        """A plain checkpoint of the model's own class with its processor: `pipeline` needs nothing else."""
        self.model.save_pretrained(folder, **options)
        if options.get("is_main_process", True):
            self.processor.save_pretrained(folder)


def adapted_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """(name, layer) of peft's layers around linear ones."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "get_delta_weight")]


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of named tensors: equal digests = equal names and values."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def fingerprint(classifier: torch.nn.Module) -> str:
    """A digest of a classifier's weights, its `plain_state`: equal digests = equal models."""
    return digest(classifier.plain_state())
