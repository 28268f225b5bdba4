"""Export: a folder that `pipeline`, the Auto classes and `CLIPModel` open with nothing else, checked against the evaluator and sealed.

What is written is opened afresh and must give the evaluator's logits through the pipeline's own resize, crop, tokenizer and prompt. Those
logits are kept beside it (`parity.json`), so that whoever holds the folder later can tell whether it is still the model that was checked.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from hpt_hf.data.collator import Collator
from hpt_hf.evaluation.result import read_results
from hpt_hf.models.zero_shot import TEMPLATE, ZeroShotClassifier, build_zero_shot_head, digest, fingerprint
from hpt_hf.publishing.model_card import RECORDS, SEAL, card
from hpt_hf.utils import write_json, write_text

TOLERANCE = 1e-4  # of a logit, which is about a hundred cosines


AGAIN = 1e-3  # of the same logits on another machine, whose kernels add up in another order


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*")  # what from_pretrained would open


LABELS = ("a cat", "a dog", "a tall house", "two red cars", "the letter q", "a white king")


def export(
    model: ZeroShotClassifier,
    folder: str | Path,
    *,
    records: dict[str, dict] | None = None,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
) -> Path:
    """Write weights (safetensors), config, processor, tokenizer, `records`, seal and card: all of it, once it has been checked, or nothing.

    What else lies in the folder stays, but for weights that would be opened in place of these and records of others.

    Args:
        records: file name -> content: how the model was made, which the card tells (`hpt_hf.publishing.model_card`).
        dtype: of the stored weights, a key of `DTYPES`; the stock classes compute in what is stored.
        max_shard_size: larger weights are split into several files, as "200MB".

    Raises:
        ValueError: what would be written does not answer as the model does. It lies in `<folder>-refused`, for whoever looks for the reason.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    folder = Path(folder).absolute()
    was_there = folder.is_dir()
    stage = folder / ".export.part"  # inside: the folder may be a link to another disk
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        stored = model if model.model.dtype == DTYPES[dtype] else copy.deepcopy(model).to(DTYPES[dtype])
        for part in (stored.config, stored.config.text_config, stored.config.vision_config):
            part.dtype = stored.model.dtype  # each tower's own is what CLIPVisionModel opens it in
        stored.save_pretrained(stage, max_shard_size=max_shard_size)
        for name, content in (records or {}).items():
            write_json(stage / name, content)
        if reason := _unlike(model, stored, stage):
            refused = folder.with_name(f"{folder.name}-refused")
            shutil.rmtree(refused, ignore_errors=True)
            shutil.move(stage, refused)
            raise ValueError(f"{folder} was not written: {reason}. What would have been written lies in {refused}")
        if (folder / "README.md").is_file():  # for whoever edited it
            shutil.copy(folder / "README.md", stage)
        weights = json.loads((stage / SEAL).read_text(encoding="utf-8"))["fingerprint"]
        scores = [s for s in read_results(folder / "scores") if s.fingerprint == weights]
        write_text(stage / "README.md", card(stage, scores=scores, repo_id=folder.name))
        fresh = {file.name for file in stage.iterdir()}
        for name in sorted(fresh, key=lambda name: name == SEAL):  # the seal last: it vouches for the others
            os.replace(stage / name, folder / name)
        for old in [f for pattern in (*WEIGHTS, *RECORDS) for f in folder.glob(pattern) if f.name not in fresh]:
            old.unlink()
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if not was_there and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return folder


def _unlike(model: ZeroShotClassifier, stored: ZeroShotClassifier, folder: Path) -> str | None:
    """Why the folder may not be used, in words; None if it may, and then it is sealed."""
    opened = ZeroShotClassifier.from_pretrained(folder)
    for name in ("mean", "std"):
        ours, theirs = (getattr(m, name).flatten().float().tolist() for m in (model, opened))
        if ours != theirs:
            return (
                f"the model normalises its pictures with {name} {_numbers(ours)} and the processor that goes with it says {_numbers(theirs)}, "
                "so `pipeline` would show it other pictures than it was trained on"
            )
    weights = fingerprint(opened)
    if weights != digest({k: v.to(torch.float32) for k, v in stored.model.state_dict().items()}):
        return "opened afresh it holds other weights than the model in memory"
    try:
        expected = logits(opened)
        difference = float((expected - pipeline_logits(folder)).abs().max())
    except (RuntimeError, ValueError) as error:
        return f"its processor makes pictures that the model cannot read ({error})"
    if not difference <= TOLERANCE:  # also NaN
        return f"opened afresh its logits differ by {difference:.2g} between the evaluator and `pipeline`, more than {TOLERANCE}"
    seal = {
        "what": "the logits that `pipeline` must give for hpt_hf.export.pictures(); recipes/push.py asks for them again",
        "fingerprint": weights,
        "dtype": str(stored.model.dtype).removeprefix("torch."),
        "mean": opened.mean.flatten().tolist(),
        "std": opened.std.flatten().tolist(),
        "image_size": opened.image_size,
        "vocabulary": vocabulary(opened),
        "labels": LABELS,
        "template": TEMPLATE,
        "logits": expected.tolist(),
        "difference": difference,
        "difference_as_stored": float((expected - pipeline_logits(folder, "auto")).abs().max()),
    }
    write_json(folder / SEAL, seal)
    return None


def check(folder: str | Path) -> dict:
    """Open an exported folder as a stranger would and compare with its seal. Returns the seal.

    Raises:
        ValueError: never sealed, or no longer what was sealed; the message says what changed.
    """
    folder = Path(folder)
    if not (folder / SEAL).is_file():
        raise ValueError(
            f"{folder} has no {SEAL}: it was never checked against `pipeline`; recipes/convert.py checks it and writes a folder that can be published"
        )
    try:
        seal = dict(json.loads((folder / SEAL).read_text(encoding="utf-8")))
        missing = {"fingerprint", "mean", "std", "vocabulary", "logits"} - seal.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        sealed = torch.tensor(seal["logits"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / SEAL} is damaged ({error}): recipes/convert.py writes the folder anew") from None
    model = ZeroShotClassifier.from_pretrained(folder)
    advice = "export it again, or take it through recipes/convert.py if the change was meant"
    if fingerprint(model) != seal["fingerprint"]:
        raise ValueError(f"the weights in {folder} are not those that were checked when it was written: {advice}")
    for name in ("mean", "std"):
        now = getattr(model, name).flatten().tolist()
        if not np.allclose(now, seal[name], atol=1e-6):
            raise ValueError(
                f"the processor in {folder} says {name} {_numbers(now)}; the model was trained and checked with {_numbers(seal[name])}: {advice}"
            )
    if vocabulary(model) != seal["vocabulary"]:
        raise ValueError(f"the tokenizer in {folder} has another vocabulary than the one that was checked: {advice}")
    try:
        answers = {"evaluator": logits(model), "pipeline": pipeline_logits(folder)}
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the processor in {folder} makes pictures that its model cannot read ({error}): {advice}"
        ) from None
    for whose, found in answers.items():
        difference = float((found - sealed).abs().max()) if found.shape == sealed.shape else float("nan")
        if not difference <= AGAIN:
            raise ValueError(
                f"the {whose}'s logits for {folder} differ by {difference:.2g} from those that were checked when it was written, though the weights are "
                f"the same: its processor, tokenizer or config was changed; {advice}"
            )
    return seal


def pictures(side: int) -> list[Image.Image]:
    """The pictures that parity is measured on: exact, smaller and larger than the model's `side`, upright, wide and grey."""
    generator = np.random.default_rng(0)
    sizes = [
        (side, side),
        (side * 2 + 7, side + 5),
        (side + 3, side * 3 - 2),
        (side // 2, side // 2 + 3),
        (side + 7, side),
    ]
    made = []
    for height, width in sizes:
        rows, columns = np.mgrid[0:height, 0:width]
        waves = [128 + 90 * np.sin(rows / (3 + c) + columns / (5 - c) + c) for c in range(3)]
        noisy = np.stack(waves, axis=-1) + generator.normal(0, 30, (height, width, 3))
        made.append(Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)))
    return [*made[:-1], made[-1].convert("L")]


@torch.no_grad()
def logits(model: ZeroShotClassifier) -> torch.Tensor:
    """(pictures, labels): what the evaluator computes for `pictures`, in float32."""
    collate = Collator(model.processor)
    batches = [collate([{"image": p.convert("RGB"), "label": None}])["images"] for p in pictures(model.image_size)]
    embeds = torch.cat(
        [torch.nn.functional.normalize(model.embed_images(b.to(model.device)), dim=-1) for b in batches]
    )
    head = build_zero_shot_head(model.model, model.processor.tokenizer, LABELS, [TEMPLATE])
    return (model.family.scale(model.model) * embeds @ head.T).cpu()


def pipeline_logits(folder: str | Path, dtype: str = "float32") -> torch.Tensor:
    """(pictures, labels): what transformers' own pipeline computes for `pictures`, with its resize, crop, tokenizer and prompt.

    Its processor is Pillow's on every machine: torchvision's bicubic differs by up to 2/255 where that is installed.
    """
    classify = pipeline(
        "zero-shot-image-classification",
        model=str(folder),
        image_processor=AutoImageProcessor.from_pretrained(folder, backend="pil"),
        dtype=dtype,
        device="cpu",
    )
    side = classify.model.config.vision_config.image_size
    rows = []
    for picture in pictures(side):
        inputs = classify.preprocess(picture, candidate_labels=list(LABELS), hypothesis_template=TEMPLATE)
        rows.append(classify.forward(inputs)["logits"][0].float())
    return torch.stack(rows)


def vocabulary(model: ZeroShotClassifier) -> str:
    """A digest of which token has which number."""
    tokens = sorted(model.processor.tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def _numbers(values: list[float]) -> str:
    return "(" + ", ".join(f"{v:.7g}" for v in values) + ")"
