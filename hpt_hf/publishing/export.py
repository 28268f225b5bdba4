"""Export: a folder that `pipeline` opens with nothing else, checked against the evaluator and sealed.

What is written is opened afresh and must give the evaluator's logits through the pipeline's own resize and prompt.
Those logits are kept beside it (`parity.json`), so that a later change of the folder can be told.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from hpt_hf.data.collator import Collator
from hpt_hf.models.lora import save_adapter
from hpt_hf.models.preprocessing import Preprocessing
from hpt_hf.models.zero_shot import TEMPLATE, ZeroShotClassifier, build_zero_shot_head, digest, fingerprint
from hpt_hf.publishing.model_card import RECORDS, SEAL, card, for_pipeline, read_results_of
from hpt_hf.utils import file_digests, read_json, sha256, write_json, write_text, written_whole

TOLERANCE = 1e-4  # of a logit, which is about a hundred cosines
TOLERANCE_ELSEWHERE = 1e-3  # on another machine, whose kernels add up in another order
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What from_pretrained would open: other files of weights are the user's.
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
LABELS = ("a cat", "a dog", "a tall house", "two red cars", "the letter q", "a white king")
SEALED = ("fingerprint", "mean", "std", "vocabulary")  # what must not change, beside the logits
FIX = "Fix: export it again, or take it through `hpt-hf convert` if the change was meant"


def export(classifier, folder: str | Path, *, records=None, dtype: str = "float32", max_shard_size="5GB") -> Path:
    """Write weights (safetensors), config, processor, records, seal and card: all of it, checked, or nothing.

    What else lies in the folder stays, but for weights that would be opened in place of these and records of others.

    Args:
        classifier: a `ZeroShotClassifier`; it is not changed.
        records: file name -> content: how the model was made, for the card (`hpt_hf.publishing.model_card.RECORDS`).
        dtype: of the stored weights, a key of `DTYPES`; the stock classes compute in it.

    Raises:
        ValueError: what would be written does not answer as the classifier does; it lies in `<folder>-refused`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    folder = Path(folder).absolute()
    if classifier.config.model_type == "open_clip":
        return _export_open_clip(classifier, folder, records or {}, dtype)
    stored = classifier
    if classifier.model.dtype != DTYPES[dtype]:
        stored = copy.deepcopy(classifier).to(DTYPES[dtype])
    for part in (stored.config, stored.config.text_config, stored.config.vision_config):
        part.dtype = stored.model.dtype  # each tower's own is what CLIPVisionModel opens it in
    with written_whole(folder, last=SEAL) as stage:
        stored.save_pretrained(stage, max_shard_size=max_shard_size)
        for name, content in (records or {}).items():
            write_json(stage / name, content)
        try:
            seal = _checked_seal(classifier, stored, stage, dtype)
        except ValueError as error:
            refused = folder.with_name(f"{folder.name}-refused")
            shutil.rmtree(refused, ignore_errors=True)
            shutil.copytree(stage, refused)
            raise ValueError(f"{folder} was not written: {error}. What would have been lies in {refused}") from error
        seal_and_card(stage, folder, seal)
        written = {file.name for file in stage.iterdir()}
    for old in [f for f in folder.iterdir() if f.name in RECORDS or WEIGHTS.fullmatch(f.name)]:
        if old.name not in written:
            old.unlink()
    return folder


def _export_open_clip(classifier: ZeroShotClassifier, folder: Path, records: dict, dtype: str) -> Path:
    """What only open_clip can hold, in its form: read back bit for bit, with the same answers."""
    if dtype != "float32":
        raise ValueError(f"dtype {dtype!r}: open_clip's form holds float32, and casts on loading (precision=...)")
    with written_whole(folder, last=SEAL) as stage:
        classifier.save_pretrained(stage)
        opened = ZeroShotClassifier.from_pretrained(stage)
        if fingerprint(opened) != fingerprint(classifier):
            raise ValueError(f"{folder} was not written: opened afresh it holds other weights")
        template = classifier.templates[0] if classifier.templates else TEMPLATE
        off = float((logits(opened, template) - logits(classifier, template)).abs().max())
        if not off <= TOLERANCE:
            raise ValueError(f"{folder} was not written: opened afresh its logits differ by {off:.2g}")
        seal_form(stage, folder, "open_clip", classifier, records, difference=off)
    return folder


def export_adapter(classifier: ZeroShotClassifier, folder: Path, records: dict) -> Path:
    """The adapters alone, for peft; what they merge to has been checked beside."""
    with written_whole(folder, last=SEAL) as stage:
        save_adapter(classifier, stage)
        seal_form(stage, folder, "adapter", classifier, records)
    return folder


def seal_and_card(stage: Path, folder: Path, seal: dict) -> None:
    """The last two files of a folder of any form, into its `written_whole` stage. A card that was edited is kept."""
    write_json(stage / SEAL, seal)
    if (folder / "README.md").is_file():
        shutil.copy(folder / "README.md", stage)
    results = [r for r in read_results_of(folder) if r.fingerprint == seal["fingerprint"]]
    write_text(stage / "README.md", card(stage, results=results, repo_id=folder.name))


def seal_form(stage: Path, folder: Path, form: str, classifier: ZeroShotClassifier, records: dict, **facts) -> None:
    """Records, seal and card of a form that `pipeline` does not open: digests of files that were read back."""
    for name, content in records.items():
        write_json(stage / name, content)
    seal = {
        "form": form,
        "family": classifier.config.model_type,
        "fingerprint": fingerprint(classifier),
        "files": file_digests(stage, but=(SEAL, "README.md")),
        "vision": classifier.config.vision_config.to_dict(),
        "template": classifier.templates[0] if classifier.templates else TEMPLATE,
        "image_size": classifier.image_size,
    }
    seal_and_card(stage, folder, seal | facts)


def _checked_seal(classifier: ZeroShotClassifier, stored: ZeroShotClassifier, folder: Path, dtype: str) -> dict:
    opened = ZeroShotClassifier.from_pretrained(folder)
    for name in ("mean", "std"):
        ours, saved = (_numbers(getattr(m, name)) for m in (classifier, opened))
        if ours != saved:
            raise ValueError(f"the model normalises with {name} {ours} and its processor says {saved}")
    if fingerprint(opened) != digest({k: v.float() for k, v in stored.model.state_dict().items()}):
        raise ValueError("opened afresh it holds other weights than the model in memory")
    seal = _seal(opened, folder, classifier.templates[0] if classifier.templates else TEMPLATE)
    seal |= {"dtype": dtype, "difference_as_stored": seal["difference"]}
    if dtype != "float32":
        as_stored = pipeline_logits(folder, seal["template"], "auto") - torch.tensor(seal["logits"])
        seal["difference_as_stored"] = float(as_stored.abs().max())
    if not seal["difference"] <= TOLERANCE:  # also NaN
        raise ValueError(f"its logits differ by {seal['difference']:.2g} between the evaluator and `pipeline`")
    return seal


def _seal(opened: ZeroShotClassifier, folder: str | Path, template: str) -> dict:
    """What is sealed of a folder that was opened afresh: answers through the prompt that its card tells to use."""
    try:
        expected, found = logits(opened, template), pipeline_logits(folder, template)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"it cannot answer ({error})") from None
    tokens = json.dumps(sorted(opened.processor.tokenizer.get_vocab().items()))
    return {
        "fingerprint": fingerprint(opened),
        "mean": _numbers(opened.mean),
        "std": _numbers(opened.std),
        "image_size": opened.image_size,
        "family": opened.config.model_type,
        "vocabulary": hashlib.sha256(tokens.encode()).hexdigest()[:16],
        "labels": LABELS,
        "template": template,
        "logits": expected.tolist(),
        "difference": float((expected - found).abs().max()),
    }


def check(folder: str | Path) -> dict:
    """Open an exported folder as a stranger would and compare with its seal. Returns the seal.

    Raises:
        ValueError: never sealed, or no longer what was sealed; the message says what changed.
    """
    file = Path(folder) / SEAL
    if not file.is_file():
        raise ValueError(f"{folder} has no {SEAL}: it was never checked. Fix: take it through `hpt-hf convert`")
    seal = read_json(file)
    if "files" in seal:
        for name, digest in seal["files"].items():
            if not (place := Path(folder) / name).is_file() or sha256(place) != digest:
                raise ValueError(f"{folder} is not what was checked: {name} changed. {FIX}")
        return seal
    try:
        now = _seal(ZeroShotClassifier.from_pretrained(folder), folder, seal.get("template", TEMPLATE))
    except ValueError as error:
        raise ValueError(f"{folder} is not what was checked: {error}. {FIX}") from error
    for key in SEALED:
        if not _close(now[key], seal.get(key), 1e-6):
            raise ValueError(f"{folder} has another {key} than was checked: {now[key]}, not {seal.get(key)}. {FIX}")
    same = _close(now["logits"], seal.get("logits"), TOLERANCE_ELSEWHERE)
    if not same or not now["difference"] <= TOLERANCE_ELSEWHERE:
        raise ValueError(f"{folder} answers otherwise: its processor, tokenizer or config was changed. {FIX}")
    return seal


def _close(a, b, tolerance: float) -> bool:
    return a == b or np.shape(a) == np.shape(b) != () and np.allclose(a, b, rtol=0, atol=tolerance)


def probe_images(side: int) -> list[Image.Image]:
    """What parity is measured on: of the model's `side`, smaller, larger, upright, wide and grey."""
    generator, s, images = np.random.default_rng(0), side, []
    for height, width in ((s, s), (s * 2 + 7, s + 5), (s + 3, s * 3 - 2), (s // 2, s // 2 + 3), (s + 7, s)):
        rows, columns = np.mgrid[0:height, 0:width]
        waves = [128 + 90 * np.sin(rows / (3 + c) + columns / (5 - c) + c) for c in range(3)]
        noisy = np.stack(waves, axis=-1) + generator.normal(0, 30, (height, width, 3))
        images.append(Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)))
    return [*images[:-1], images[-1].convert("L")]


@torch.no_grad()
def logits(classifier: ZeroShotClassifier, template: str = TEMPLATE) -> torch.Tensor:
    """(probe images, labels): what the evaluator computes, in float32."""
    collate, images = Collator(classifier.processor), probe_images(classifier.image_size)
    batches = [collate([{"image": i.convert("RGB"), "label": None}])["images"] for i in images]
    for image, batch in zip(images, batches, strict=True):  # inside the model, where eps is counted on own pixels
        own = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        off = float((classifier.resize_and_crop(own) - batch).abs().max()) if own.shape != batch.shape else 0
        if off > 2 / 255:
            raise ValueError(f"images of {image.size} are resized otherwise inside the model, by {255 * off:.1f}/255")
    embeds = torch.cat([classifier.embed_images(b.to(classifier.device)) for b in batches])
    head = build_zero_shot_head(classifier.model, classifier.processor.tokenizer, LABELS, [template])
    scale, bias = classifier.family.scale(classifier.model), classifier.family.bias(classifier.model)
    return (scale * F.normalize(embeds, dim=-1) @ head.T + bias).cpu()


def pipeline_logits(folder: str | Path, template: str = TEMPLATE, dtype: str = "float32") -> torch.Tensor:
    """(probe images, labels): what transformers' pipeline computes, with its resize, crop, tokenizer and prompt.

    Its processor is Pillow's on every machine: torchvision's bicubic differs by up to 2/255 where that is installed.
    """
    classify = pipeline(
        "zero-shot-image-classification",
        model=str(folder),
        image_processor=AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False),
        trust_remote_code=False,
        dtype=dtype,
        device="cpu",
    )
    rows = []
    for image in probe_images(Preprocessing.of(classify.image_processor).side):
        inputs = classify.preprocess(image, candidate_labels=list(LABELS), hypothesis_template=for_pipeline(template))
        rows.append(classify.forward(inputs)["logits"][0].float())
    return torch.stack(rows)


def check_apart(output: str | Path, **sources: str | Path | None) -> None:
    """Raise ValueError for an output in the place of, or inside, a folder that is read: `sources`, by flag."""
    place = Path(output).resolve()
    for flag, source in sources.items():
        if source and Path(source).exists() and Path(source).resolve() in (place, *place.parents):
            raise ValueError(f"--output_dir {output} lies in --{flag} {source}, which is read. Fix: another folder")


def _numbers(values: torch.Tensor) -> list[float]:
    return values.flatten().float().tolist()
