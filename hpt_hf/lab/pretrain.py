"""Contrastive pre-training of small CLIPs of any architecture on any captioned images (Radford et al. 2021, arXiv 2103.00020).

It makes the vanilla models that the lab starts from, and nothing else: `python -m hpt_hf.lab.pretrain --help`.
One difference from CLIP: images with the same caption are positives of each other (UniCL, Yang et al. 2022, arXiv
2204.03610), because a small world repeats its captions within a batch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable

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
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging

from hpt_hf.lab.glyphs import GlyphWorld

logger = logging.get_logger(__name__)


# A batch of captioned images: step -> (uint8 array (batch, size, size, 3), captions).
Batches = Callable[[int], tuple[np.ndarray, list[str]]]


# The lab's two architectures. The proxy sees a grid four times as fine, so the two fail on different pixels.
# GELU instead of CLIP's quick_gelu: one fused kernel instead of three, a quarter faster on a CPU.
_TEXT = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}


ARCHITECTURES: dict[str, dict[str, dict]] = {
    "student": {
        "text": _TEXT,
        "vision": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "patch_size": 8,
        },
    },
    "proxy": {
        "text": _TEXT,
        "vision": {
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "patch_size": 4,
        },
    },
    # No attention and no patches of the student's: the H in HPT.
    "convolution": {
        "text": _TEXT,
        "vision": {
            "model_type": "convnext",
            "patch_size": 2,
            "num_stages": 4,
            "hidden_sizes": [32, 64, 128, 256],
            "depths": [1, 1, 2, 1],
            "hidden_size": 256,  # which a VisionTextDualEncoder asks of any tower
        },
    },
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
    for token in (
        *alphabet,
        *(a + "</w>" for a in alphabet),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ):
        vocab.setdefault(token, len(vocab))
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=10_000)
    lengths = [len(ids) for ids in tokenizer(sorted(set(captions)))["input_ids"]]
    tokenizer.model_max_length = min(77, max(lengths)) if max_length is None else max_length
    if cut := sum(length > tokenizer.model_max_length for length in lengths):
        logger.warning(
            f"{cut} of {len(lengths)} different captions are longer than the context of {tokenizer.model_max_length} tokens and will be cut"
        )
    return tokenizer


def new_clip(
    tokenizer: CLIPTokenizer, *, vision: dict, text: dict, image_size: int = 32, projection_dim: int = 64
) -> CLIPModel | VisionTextDualEncoderModel:
    """A CLIP with random weights that fits `tokenizer`; `vision` and `text` are fields of transformers' configs.

    A `model_type` in `vision` makes it a dual encoder around a tower of that kind.
    """
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    if "model_type" in vision:
        tower = AutoConfig.for_model(**vision, image_size=image_size)
        words = CLIPTextConfig(**sizes, **ids, hidden_act="gelu", projection_dim=projection_dim, **text)
        both = VisionTextDualEncoderConfig.from_vision_text_configs(tower, words, projection_dim=projection_dim)
        return VisionTextDualEncoderModel(both)
    return CLIPModel(
        CLIPConfig(
            # The towers' own `projection_dim` is what CLIPVisionModelWithProjection reads when it opens the same folder.
            text_config={**sizes, **ids, "hidden_act": "gelu", "projection_dim": projection_dim, **text},
            vision_config={"image_size": image_size, "hidden_act": "gelu", "projection_dim": projection_dim, **vision},
            projection_dim=projection_dim,
        )
    )


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
    cosines = F.normalize(image_embeds, dim=-1) @ F.normalize(text_embeds, dim=-1).T
    logits = scale * cosines
    # Image -> text: one right caption, as often a candidate as the batch holds it (its log count is its prior).
    counts = torch.bincount(captions, minlength=len(text_embeds)).to(logits.dtype)
    image_to_text = F.cross_entropy(logits + counts.log(), captions)
    positives = F.one_hot(captions, len(text_embeds)).T.to(logits.dtype)
    text_to_image = -(positives * logits.T.log_softmax(dim=-1)).sum() / len(captions)
    return (image_to_text + text_to_image) / 2


def pretrain(
    model: CLIPModel,
    processor: CLIPProcessor,
    batches: Batches,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    warmup_steps: int = 200,
    seed: int = 0,
    bf16: bool = False,
    log_every: int = 100,
) -> list[dict[str, float]]:
    """Train `model` in place with AdamW, linear warm-up and cosine decay to zero; returns the log.

    Args:
        batches: the images of a step, a pure function of the step.
        bf16: autocast the towers to bfloat16; the loss stays fp32.
    """
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    mean, std = (
        torch.tensor(v, device=device).view(1, 3, 1, 1)
        for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )

    def rate(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + float(np.cos(np.pi * (step - warmup_steps) / max(1, steps - warmup_steps))))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    log: list[dict[str, float]] = []
    loss_sum, start = 0.0, time.time()
    for step in range(steps):
        pixels, captions = batches(step)
        distinct = sorted(set(captions))
        row = {c: i for i, c in enumerate(distinct)}
        targets = torch.tensor([row[c] for c in captions], device=device)
        images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255
        tokens = processor.tokenizer(distinct, padding=True, truncation=True, return_tensors="pt").to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            image_embeds = model.get_image_features((images - mean) / std).pooler_output
            text_embeds = model.get_text_features(**tokens).pooler_output
        loss = contrastive_loss(image_embeds.float(), text_embeds.float(), model.logit_scale.exp(), targets)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the contrastive loss is {loss.item()} at step {step}: lower the learning rate ({learning_rate})"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))  # CLIP's own bound
        loss_sum += loss.item()
        if (step + 1) % log_every == 0 or step + 1 == steps:
            done = (step % log_every) + 1
            log.append(
                {
                    "step": step + 1,
                    "loss": loss_sum / done,
                    "scale": model.logit_scale.exp().item(),
                    "seconds": time.time() - start,
                }
            )
            print("  ".join(f"{k} {v:.4g}" for k, v in log[-1].items()), file=sys.stderr, flush=True)
            loss_sum = 0.0
    model.eval()
    return log


def world_batches(world: GlyphWorld, batch_size: int) -> Batches:
    """Batches of the endless world: step k shows images k*batch_size onwards, each image once."""

    def batch(step: int) -> tuple[np.ndarray, list[str]]:
        images = [world[step * batch_size + i] for i in range(batch_size)]
        return np.stack([np.asarray(p.image) for p in images]), [p.caption for p in images]

    return batch


def row_batches(
    rows: list[tuple[Image.Image, tuple[str, ...]]],
    batch_size: int,
    *,
    image_size: int = 32,
    seed: int = 0,
    jitter: float = 1.0,
) -> Batches:
    """Batches of a finite list of (image, its captions): drawn with replacement, one caption at random, redrawn in another hand.

    A small model learns a few thousand images by heart; what it should learn is what survives another drawing style. So every image
    is turned, sheared, moved and scaled a little, its colours and contrast are mixed, and some lose fine detail or shades.

    Args:
        jitter: how far from the original, 0 (not at all) to 1.
    """
    side = image_size + image_size // 4
    store = np.stack(
        [np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)) for image, _ in rows]
    )

    def batch(step: int) -> tuple[np.ndarray, list[str]]:
        rng = np.random.default_rng([seed, step])
        chosen = rng.integers(len(rows), size=batch_size)
        images = np.stack([_warped(store[i], image_size, jitter, rng) for i in chosen]).astype(np.float32) / 255
        contrast = rng.uniform(1 - 0.25 * jitter, 1 + 0.2 * jitter, (batch_size, 1, 1))
        mixing = np.eye(3) * contrast + jitter * rng.normal(0, 0.07, (batch_size, 3, 3))
        shift = jitter * rng.normal(0, 0.07, (batch_size, 1, 1, 1))
        images = np.clip(np.einsum("bhwc,bdc->bhwd", images - 0.5, mixing) + 0.5 + shift, 0, 1)
        shades = (
            np.where(rng.random(batch_size) < 0.35 * jitter, rng.integers(3, 9, batch_size), 256)[:, None, None, None]
            - 1
        )
        images = np.rint(np.rint(images * shades) / shades * 255).astype(np.uint8)
        return images, [rows[i][1][rng.integers(len(rows[i][1]))] for i in chosen]

    return batch


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
