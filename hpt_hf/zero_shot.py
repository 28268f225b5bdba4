"""A CLIP as a zero-shot classifier of images in [0, 1]: the one seam to transformers' model classes.

Logits are `logit_scale * cosine(image, class prompts)` (CLIP, arXiv 2103.00020, section 3.1.2), equal to `CLIPModel`'s own. Class prompts
are embedded once; resizing and normalisation happen inside, with the numbers of the saved processor.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import AutoProcessor, CLIPConfig, CLIPModel, CLIPProcessor
from transformers.utils import cached_file

from hpt_hf.kernels import quicken
from hpt_hf.shapes import Embeds, Images, InputImages, ZeroShotOutput

TEMPLATE = "This is a photo of a {}"  # the paper's prompt


def check_classes(classes: Sequence[str]) -> None:
    """Raise ValueError unless `classes` can be told apart: at least two, none blank, none twice."""
    if len(classes) < 2:
        raise ValueError(f"a classifier needs at least two class names, got {len(classes)}: {list(classes)!r}")
    seen: dict[str, int] = {}
    for index, name in enumerate(classes):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"class {index} has the name {name!r}: every class needs a name that a prompt can hold")
        if name in seen:
            raise ValueError(
                f"classes {seen[name]} and {index} are both called {name!r}: equal prompts cannot be told apart; rename one"
            )
        seen[name] = index


def check_templates(templates: Sequence[str]) -> None:
    """Raise ValueError unless every template has a place for the class name."""
    if not templates:
        raise ValueError("no prompt template was given; expected at least one, such as 'This is a photo of a {}'")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"the template {template!r} must hold '{{}}' exactly once, where the class name goes")


class ZeroShotCLIP(CLIPModel):
    """`CLIPModel` that maps images in [0, 1] of any size to zero-shot logits.

    A subclass without parameters of its own, so that the stock Trainer saves, resumes and pushes a plain CLIP checkpoint. Make one with
    `ZeroShotCLIP.load(folder or Hub id)`, then name the classes with `set_classes`. Its vision tower gives the class token alone: who wants all
    hidden states opens the checkpoint with `CLIPVisionModel`.
    """

    processor: CLIPProcessor | None = None
    classes: tuple[str, ...] = ()
    revision: str | None = None  # the Hub's commit it was loaded from, whatever branch or tag was asked for

    def __init__(self, config: CLIPConfig):
        super().__init__(config)
        quicken(self)

    @classmethod
    def load(cls, source: str | Path, *, revision: str | None = None, **kwargs) -> ZeroShotCLIP:
        """Model and processor from one folder or Hub id, in float32 and eval mode.

        Raises:
            OSError, ValueError: nothing there, or not a CLIP; the message says what was looked for.
        """
        path = Path(source)
        if path.is_dir() and not (path / "config.json").is_file():
            raise ValueError(
                f"{source} holds no config.json: expected a folder written by save_pretrained, found {sorted(p.name for p in path.iterdir())[:8]}"
            )
        if not path.exists() and (path.is_absolute() or str(source).count("/") > 1 or str(source).startswith(".")):
            raise ValueError(f"no model at {source}: the folder does not exist (and it is not a Hub id of the form owner/name)")
        try:
            config = CLIPConfig.get_config_dict(source, revision=revision, **kwargs)[0]
        except OSError as error:  # offline, transformers' own message does not say what it looked for
            raise OSError(f"no CLIP could be loaded from {source}: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(
                f"the config.json of {source} holds a {type(config).__name__}: expected the names and values of a CLIP"
            )
        if config.get("model_type") != "clip":  # transformers would only warn, and fill a whole CLIP with random weights
            raise ValueError(
                f"{source} holds a model of type {config.get('model_type')!r}: expected 'clip', with both towers (CLIPModel)"
            )
        try:
            # dtype: the default is the checkpoint's own, and a half-precision model weakens every attack.
            model, report = cls.from_pretrained(
                source, revision=revision, dtype=torch.float32, output_loading_info=True, **kwargs
            )
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, TypeError) as error:
            raise ValueError(f"the weights of {source} cannot be used: {_why_not(error)}") from error
        except OSError as error:
            if error.errno is None:  # transformers' own: a file is missing, and the message says which
                raise
            raise ValueError(f"the weights of {source} cannot be used: a file is damaged or cannot be read ({error})") from error
        if report["missing_keys"]:  # transformers only warns, and fills them with random numbers
            absent = sorted(report["missing_keys"])
            raise ValueError(
                f"the weights of {source} lack {len(absent)} tensors of a whole CLIP, such as {', '.join(absent[:3])}: a checkpoint of one tower, "
                "or of another code, is read by recipes/convert.py with --base"
            )
        beyond = sorted(k for k in report["unexpected_keys"] if not k.endswith("position_ids"))
        if beyond:  # transformers leaves them out, and what is left is another model
            raise ValueError(
                f"the weights of {source} hold {len(beyond)} tensors that config.json has no place for, such as {', '.join(beyond[:3])}: they belong to another model"
            )
        # backend: torchvision's bicubic differs from Pillow's by up to 2/255, more than some threat models.
        try:
            processor = AutoProcessor.from_pretrained(source, revision=revision, backend="pil", **kwargs)
        except OSError as error:
            raise OSError(
                f"{source} has weights but no processor that can be read: recipes/convert.py with --base adds that of the model it came from ({error})"
            ) from error
        except (ValueError, KeyError) as error:
            raise ValueError(f"the tokenizer or processor of {source} is damaged ({type(error).__name__}: {error})") from error
        if len(processor.tokenizer) <= len(processor.tokenizer.all_special_ids):  # what transformers makes where there is no file
            raise ValueError(
                f"{source} has weights but no tokenizer: recipes/convert.py with --base adds that of the model it came from"
            )
        file = Path(cached_file(source, "config.json", revision=revision, **kwargs))
        model.revision = file.parent.name if file.parent.parent.name == "snapshots" else None  # so the Hub's cache is laid out
        return model.attach(processor).eval()

    def attach(self, processor: CLIPProcessor) -> ZeroShotCLIP:
        """Take mean, standard deviation, sizes and tokenizer from `processor`. Returns self."""
        image = processor.image_processor
        device = self.logit_scale.device
        self.register_buffer("mean", torch.tensor(image.image_mean, device=device).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(image.image_std, device=device).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("class_embeds", torch.empty(0, self.config.projection_dim, device=device), persistent=False)
        self.processor = processor
        return self

    @property
    def image_size(self) -> int:
        """Side in pixels of what the vision tower sees."""
        return self.config.vision_config.image_size

    @torch.no_grad()
    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
        """(classes, dim) unit vectors: the mean of the templates' normalised embeddings, normalised again (CLIP, section 3.1.4).

        Raises:
            ValueError: no or duplicate names, a template without {}, or prompts longer than the text tower's context.
        """
        check_classes(classes)
        check_templates(templates)
        context = self.config.text_config.max_position_embeddings
        total = torch.zeros(len(classes), self.config.projection_dim, device=self.device)
        for template in templates:
            prompts = [template.replace("{}", c) for c in classes]  # a template may hold other braces
            tokens = self.processor.tokenizer(prompts, padding=True, return_tensors="pt").to(self.device)
            if tokens["input_ids"].shape[1] > context:
                lengths = tokens["attention_mask"].sum(1)
                raise ValueError(
                    f"the prompt {prompts[int(lengths.argmax())]!r} has {int(lengths.max())} tokens, the text tower reads {context}: shorten the class name or the template"
                )
            chunks = [{k: v[i : i + 256] for k, v in tokens.items()} for i in range(0, len(prompts), 256)]
            with torch.autocast(self.device.type, enabled=False):
                embeds = torch.cat([self.get_text_features(**chunk).pooler_output for chunk in chunks])
            total += F.normalize(embeds, dim=-1)
        return F.normalize(total, dim=-1)

    def set_classes(self, classes: Sequence[str], templates: Sequence[str] = (TEMPLATE,)) -> ZeroShotCLIP:
        """Embed the class prompts, once; every later forward uses them. Returns self."""
        if self.processor is None:
            raise RuntimeError("this model has no processor: make it with ZeroShotCLIP.load, or call attach(processor) first")
        self.class_embeds = self.embed_classes(classes, templates)
        self.classes = tuple(classes)
        return self

    def fit(self, images: Images) -> InputImages:
        """Resize (bicubic, antialiased, differentiable) and centre-crop to the tower's input size, as the processor does; no-op at that size."""
        size, (height, width) = self.image_size, images.shape[-2:]
        if (height, width) == (size, size):
            return images
        # The processor's own order of operations: size / short * long may fall one pixel short of it.
        target = (int(size * height / min(height, width)), int(size * width / min(height, width)))
        resized = F.interpolate(images, size=target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        return resized[..., top : top + size, left : left + size]

    def embed_images(self, images: Images) -> Embeds:
        """(batch, dim) embeddings, not normalised, float32 whatever the weights are."""
        normalised = (self.fit(images) - self.mean) / self.std
        return self.visual_projection(self.vision_model(pixel_values=normalised).pooler_output).float()

    def classify(self, images: Images) -> ZeroShotOutput:
        """Logits and embeds in the precision of the weights. Attacks call this: unlike `forward`, nothing wraps it in autocast."""
        if self.class_embeds.numel() == 0:
            raise RuntimeError("no classes yet: call set_classes(names, templates) before classifying")
        embeds = self.embed_images(images)
        # A hundredfold cosine in bfloat16 is wrong in its first decimal, so the head stays float32 under autocast.
        with torch.autocast(images.device.type, enabled=False):
            logits = self.logit_scale.exp() * F.normalize(embeds, dim=-1) @ self.class_embeds.T
        return ZeroShotOutput(logits=logits, embeds=embeds)

    def forward(self, images: Images) -> ZeroShotOutput:
        """`classify`, as the module's forward: what DDP and autocast wrap, so the training loss must come through here."""
        return self.classify(images)

    def freeze_text(self) -> ZeroShotCLIP:
        """Only the vision side is trained (the authors' choice): text tower, its projection and the logit scale stay. Returns self."""
        self.requires_grad_(True)
        self.text_model.requires_grad_(False)
        self.text_projection.requires_grad_(False)
        self.logit_scale.requires_grad_(False)
        return self

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """A plain `CLIPModel` checkpoint with its processor and tokenizer: the Auto classes and `pipeline` need nothing else."""
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            self.config.architectures = ["CLIPModel"]
            self.config.save_pretrained(save_directory)
            if self.processor is not None:
                self.processor.save_pretrained(save_directory)


def _why_not(error: Exception) -> str:
    """In words, why a file of weights was refused."""
    if isinstance(error, SafetensorError):
        return f"the safetensors file is damaged or not one ({error}): download or export it again"
    if isinstance(error, pickle.UnpicklingError):
        return "they are a pickle that is damaged or holds more than tensors; what it holds was not run. Ask its author for safetensors"
    if "ignore_mismatched_sizes" in str(error):
        return "they do not have the shapes that config.json says: they belong to a CLIP of another architecture (the report above names the tensors)"
    return str(error)


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of named tensors: equal digests = equal names and values."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def fingerprint(model: torch.nn.Module) -> str:
    """A digest of a model's weights: equal digests = equal models."""
    return digest(model.state_dict())
