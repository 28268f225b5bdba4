"""Contrastive pre-training of small CLIPs of any architecture on any captioned images (Radford et al. 2021, arXiv 2103.00020).

It makes the vanilla models that the lab starts from, and nothing else: `hpt-hf pretrain --help`.
One difference from CLIP: images with the same caption are positives of each other (UniCL, Yang et al. 2022, arXiv
2204.03610), because a small world repeats its captions within a batch.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    Trainer,
    TrainingArguments,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hpt_hf.lab.glyphs import GlyphWorld

logger = logging.get_logger(__name__)
# A batch of captioned images: step -> (uint8 array (batch, size, size, 3), captions).
Batches = Callable[[int], tuple[np.ndarray, list[str]]]
Rows = list[tuple[Image.Image, tuple[str, ...]]]  # images, each with its captions


def _transformer(width: int, layers: int, heads: int, **more) -> dict:
    size = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return size | {"num_attention_heads": heads} | more


def _convnext(widths: list[int], depths: list[int], **more) -> dict:
    """`hidden_size` is what a VisionTextDualEncoder asks of any tower."""
    size = {"num_stages": 4, "hidden_sizes": widths, "depths": depths, "hidden_size": widths[-1]}
    return {"model_type": "convnext"} | size | more


# The proxy sees a grid four times as fine as the student, so the two fail on different pixels; the convolution has no attention and
# no patches of the student's: the H in HPT.
_TEXT = _transformer(64, 2, 2)
ARCHITECTURES: dict[str, dict[str, dict]] = {
    "student": {"text": _TEXT, "vision": _transformer(128, 4, 4, patch_size=8)},
    "proxy": {"text": _TEXT, "vision": _transformer(96, 4, 3, patch_size=4)},
    "convolution": {"text": _TEXT, "vision": _convnext([32, 64, 128, 256], [1, 1, 2, 1], patch_size=2)},
}
# The photographs' world has more words and 48 pixels; its models are a size up.
_LONGER_TEXT = _transformer(128, 2, 4)
# A layer scale of 1e-6 is made for long training: a short one is half spent growing it.
_LARGER = _convnext([40, 80, 160, 320], [1, 1, 3, 1], patch_size=3, layer_scale_init_value=0.1)
PHOTOGRAPH_ARCHITECTURES: dict[str, dict[str, dict]] = {
    "student": {"text": _LONGER_TEXT, "vision": _transformer(128, 5, 4, patch_size=8)},
    "proxy": {"text": _LONGER_TEXT, "vision": _transformer(96, 5, 3, patch_size=6)},
    "convolution": {"text": _LONGER_TEXT, "vision": _LARGER},
}


def train_tokenizer(captions: Iterable[str], *, vocab_size: int = 640, max_length: int | None = 24) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's form, learned from `captions`.

    End of text gets the highest id: CLIPTextModel's legacy pooling looks there, and its newer one is told the id.

    Args:
        max_length: the context in tokens; None: as long as the longest caption, at most CLIP's 77. Captions beyond it are cut in
            pre-training, which is said, with their number.
    """
    captions = list(captions)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(alphabet) - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    state = json.loads(bpe.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in state["merges"]]
    vocab: dict[str, int] = {}
    whole = ("".join(m) for m in merges)
    for token in (*alphabet, *(a + "</w>" for a in alphabet), *whole, "<|startoftext|>", "<|endoftext|>"):
        vocab.setdefault(token, len(vocab))
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=10_000)
    lengths = [len(ids) for ids in tokenizer(sorted(set(captions)))["input_ids"]]
    tokenizer.model_max_length = min(77, max(lengths)) if max_length is None else max_length
    if cut := sum(length > tokenizer.model_max_length for length in lengths):
        logger.warning(
            f"{cut} of {len(lengths)} different captions are longer than the context of {tokenizer.model_max_length} tokens and are cut"
        )
    return tokenizer


def new_clip(
    tokenizer: CLIPTokenizer, *, vision: dict, text: dict, image_size: int = 32, projection_dim: int = 64
) -> CLIPModel | VisionTextDualEncoderModel:
    """A CLIP with random weights that fits `tokenizer`; `vision` and `text` are fields of transformers' configs.

    A `model_type` in `vision` makes it a dual encoder around a tower of that kind.
    """
    # GELU instead of CLIP's quick_gelu: one fused kernel instead of three, a quarter faster on a CPU.
    # The towers' own `projection_dim` is what CLIPVisionModelWithProjection reads when it opens the same folder.
    common = {"hidden_act": "gelu", "projection_dim": projection_dim}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    words = common | sizes | ids | text
    if "model_type" in vision:
        towers = AutoConfig.for_model(**vision, image_size=image_size), CLIPTextConfig(**words)
        both = VisionTextDualEncoderConfig.from_vision_text_configs(*towers, projection_dim=projection_dim)
        return VisionTextDualEncoderModel(both)
    pixels = common | {"image_size": image_size} | vision
    return CLIPModel(CLIPConfig(text_config=words, vision_config=pixels, projection_dim=projection_dim))


def new_processor(tokenizer: CLIPTokenizer, image_size: int = 32) -> CLIPProcessor:
    """The processor to be saved beside a lab model: CLIP's own mean and standard deviation, its own size."""
    square = {"height": image_size, "width": image_size}
    return CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=square), tokenizer)


def contrastive_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, scale: torch.Tensor, captions: torch.Tensor
) -> torch.Tensor:
    """Symmetric cross-entropy over the batch; images that share a caption share the target's mass.

    Args:
        image_embeds: (batch, dim), not normalised.
        text_embeds: (distinct captions, dim), not normalised.
        scale: the positive factor of the cosines.
        captions: (batch,) for each image its row of `text_embeds`.
    """
    logits = scale * (F.normalize(image_embeds, dim=-1) @ F.normalize(text_embeds, dim=-1).T)
    # Image -> text: one right caption, as often a candidate as the batch holds it (its log count is its prior).
    counts = torch.bincount(captions, minlength=len(text_embeds)).to(logits.dtype)
    image_to_text = F.cross_entropy(logits + counts.log(), captions)
    positives = F.one_hot(captions, len(text_embeds)).T.to(logits.dtype)
    text_to_image = -(positives * logits.T.log_softmax(dim=-1)).sum() / len(captions)
    return (image_to_text + text_to_image) / 2


class _Steps(torch.utils.data.Dataset):
    """The batch of every step, as the model reads it."""

    def __init__(self, batches: Batches, steps: int, processor: CLIPProcessor):
        self.batches, self.steps, self.tokenizer = batches, steps, processor.tokenizer
        images = processor.image_processor
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (images.image_mean, images.image_std))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        pixels, captions = self.batches(step)
        distinct = sorted(set(captions))
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        tokens = self.tokenizer(distinct, padding=True, truncation=True, return_tensors="pt")
        targets = torch.tensor([distinct.index(c) for c in captions])
        return {"pixel_values": (images - self.mean) / self.std, "targets": targets, **tokens}


class _ContrastiveTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The contrastive loss of a whole batch, in float32, at CLIP's own bound of the scale."""
        pixels, targets = inputs.pop("pixel_values"), inputs.pop("targets")
        images = model.get_image_features(pixels).pooler_output.float()
        texts = model.get_text_features(**inputs).pooler_output.float()
        return contrastive_loss(images, texts, model.logit_scale.clamp(max=float(np.log(100))).exp(), targets)

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def pretrain(
    model: CLIPModel | VisionTextDualEncoderModel, processor: CLIPProcessor, batches: Batches, args: TrainingArguments
) -> list[dict[str, float]]:
    """Train `model` in place for `args.max_steps`; returns the log. A killed run goes on from its last checkpoint.

    Args:
        batches: the images of a step, a pure function of the step.
    """
    trainer = _ContrastiveTrainer(
        model,
        args,
        train_dataset=_Steps(batches, args.max_steps, processor),
        data_collator=operator.itemgetter(0),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    model.to("cpu").eval()
    return trainer.state.log_history


def last_checkpoint(folder: str) -> str | None:
    return get_last_checkpoint(folder) if Path(folder).is_dir() else None


def pretraining_arguments(output_dir: str, **options) -> TrainingArguments:
    """AdamW, linear warm-up and cosine decay to zero; one batch of `Batches` a step."""
    defaults = {
        "per_device_train_batch_size": 1,
        "weight_decay": 0.05,
        "adam_beta2": 0.98,
        "warmup_steps": 200,
        "lr_scheduler_type": "cosine",
        "remove_unused_columns": False,
        "logging_steps": 100,
        "logging_nan_inf_filter": False,
        "save_total_limit": 1,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # unless told, transformers refuses bfloat16 there
    }
    return TrainingArguments(output_dir, **defaults | options)


def world_batches(world: GlyphWorld, batch_size: int) -> Batches:
    """Batches of the endless world: step k shows images k*batch_size onwards, each image once."""

    def batch(step: int) -> tuple[np.ndarray, list[str]]:
        images = [world[step * batch_size + i] for i in range(batch_size)]
        return np.stack([np.asarray(p.image) for p in images]), [p.caption for p in images]

    return batch


def _stored(rows: Rows, side: int) -> np.ndarray:
    """(rows, side, side, 3) of their images, uint8."""
    images = (image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for image, _ in rows)
    return np.stack([np.asarray(image) for image in images])


def row_batches(rows: Rows, batch_size: int, *, image_size: int = 32, seed: int = 0, jitter: float = 1.0) -> Batches:
    """Batches of a finite list of (image, its captions): drawn with replacement, one caption at random, redrawn in another hand.

    A small model learns a few thousand images by heart; what it should learn is what survives another drawing style. So every image
    is turned, sheared, moved and scaled a little, its colours and contrast are mixed, and some lose fine detail or shades.

    Args:
        jitter: how far from the original, 0 (not at all) to 1.
    """
    store = _stored(rows, image_size + image_size // 4)

    def batch(step: int) -> tuple[np.ndarray, list[str]]:
        rng = np.random.default_rng([seed, step])
        chosen = rng.integers(len(rows), size=batch_size)
        images = np.stack([_warped(store[i], image_size, jitter, rng) for i in chosen]).astype(np.float32) / 255
        contrast = rng.uniform(1 - 0.25 * jitter, 1 + 0.2 * jitter, (batch_size, 1, 1))
        mixing = np.eye(3) * contrast + jitter * rng.normal(0, 0.07, (batch_size, 3, 3))
        shift = jitter * rng.normal(0, 0.07, (batch_size, 1, 1, 1))
        images = np.clip(np.einsum("bhwc,bdc->bhwd", images - 0.5, mixing) + 0.5 + shift, 0, 1)
        shades = np.where(rng.random(batch_size) < 0.35 * jitter, rng.integers(3, 9, batch_size), 256) - 1
        shades = shades[:, None, None, None]
        images = np.rint(np.rint(images * shades) / shades * 255).astype(np.uint8)
        return images, [rows[i][1][rng.integers(len(rows[i][1]))] for i in chosen]

    return batch


def photograph_batches(rows: Rows, batch_size: int, *, image_size: int = 48, seed: int = 0) -> Batches:
    """Batches of photographs, each once an epoch: a random crop of a third to all of it, half of them mirrored, one of its captions."""
    store = _stored(rows, image_size + image_size // 3)

    def batch(step: int) -> tuple[np.ndarray, list[str]]:
        rng = np.random.default_rng([seed, step])
        places = np.arange(step * batch_size, (step + 1) * batch_size)
        orders = {e: np.random.default_rng([seed, 1, e]).permutation(len(rows)) for e in set(places // len(rows))}
        chosen = [orders[place // len(rows)][place % len(rows)] for place in places]
        images = np.stack([_cropped(store[i], image_size, rng) for i in chosen]).astype(np.float32)
        contrast, light = rng.uniform(0.7, 1.3, (batch_size, 1, 1, 1)), rng.uniform(-25, 25, (batch_size, 1, 1, 3))
        means = images.mean((1, 2, 3), keepdims=True)
        images = np.clip((images - means) * contrast + means + light, 0, 255).astype(np.uint8)
        return images, [rows[i][1][rng.integers(len(rows[i][1]))] for i in chosen]

    return batch


def _cropped(pixels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    side = len(pixels)
    area, ratio = rng.uniform(0.35, 1), np.exp(rng.uniform(-0.28, 0.28))
    width, height = np.minimum(side, side * np.sqrt([area * ratio, area / ratio]))
    left, top = rng.random(2) * (side - width, side - height)
    box = (left, top, left + width, top + height)
    image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image)[:, :: rng.choice((1, -1))]


def _warped(pixels: np.ndarray, size: int, jitter: float, rng: np.random.Generator) -> np.ndarray:
    """A random affine view of a image, (size, size, 3); what lies beyond its edge has the colour of its corner."""
    side, (angle, shear) = len(pixels), jitter * rng.uniform((-0.2, -0.1), (0.2, 0.1))
    zoom = side / size * rng.uniform(1 - 0.2 * jitter, 1 + 0.15 * jitter, 2)
    turn = np.array([[np.cos(angle), shear - np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * zoom
    centre = side / 2 + jitter * rng.uniform(-0.1, 0.1, 2) * side
    offset = centre - turn @ np.full(2, size / 2)
    image = Image.fromarray(pixels).transform(
        (size, size),
        Image.Transform.AFFINE,
        (*turn[0], offset[0], *turn[1], offset[1]),
        resample=Image.Resampling.BILINEAR,
        fillcolor=tuple(pixels[0, 0].tolist()),
    )
    if rng.random() < 0.25 * jitter:
        coarse = int(rng.integers(size // 2, size))
        image = image.resize((coarse, coarse), Image.Resampling.BOX).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)
