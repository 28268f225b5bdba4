"""The model card: what a stranger must know before relying on a checkpoint, every figure of it taken from the Scores beside the weights.

Metadata as the Hub reads it (`model-index` included), threat model, how it was made, results with intervals and verdicts, limits, how to verify.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult as HubEvalResult
from huggingface_hub import ModelCard, ModelCardData

from hpt_hf.evaluation.result import EvalResult, read_results
from hpt_hf.evaluation.tables import result_table
from hpt_hf.utils import progress, write_text

RECORDS = TRAINED, CONVERTED, MIXED = (
    "train.json",
    "convert.json",
    "dial.json",
)  # what a card is written from, beside the Scores


_TOLD = {
    "method",
    "student",
    "proxy",
    "dataset",
    "pictures",
    "phases",
    "attack",
    "batch",
    "processes",
    "seed",
    "seconds",
    "versions",
    "commit",
    "hardware",
}


SEAL = "parity.json"  # what `hpt_hf.publishing.export` checked


_MARK = "<!-- written by hpt_hf, "


def card(
    folder: str | Path,
    *,
    scores: Sequence[EvalResult] | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
) -> str:
    """README.md of an exported folder, from its records and Scores; one that was edited by hand is given back as it is.

    Args:
        scores: None: the folder's `own_results`.
        repo_id, revision: under which name readers will open the model; None: the folder's own, and main.
    """
    folder = Path(folder)
    file = folder / "README.md"
    if file.is_file() and not _ours(text := file.read_text(encoding="utf-8")):
        progress(f"{file} was edited by hand: kept as it is; delete it to have it written anew")
        return text
    scores = own_results(folder) if scores is None else scores
    text = f"---\n{_metadata(folder, scores, repo_id).to_yaml()}\n---\n{_body(folder, scores, repo_id, revision)}".rstrip()
    return f"{text}\n\n{_MARK}{_digest(text)} -->\n"


def write_model_card(folder: str | Path) -> Path:
    return write_text(Path(folder) / "README.md", card(folder))


def own_results(folder: str | Path) -> list[EvalResult]:
    """The Scores in `scores/` that were measured on the folder's own weights; others are named and left out."""
    seal = json.loads((Path(folder) / SEAL).read_text(encoding="utf-8"))
    scores = read_results(Path(folder) / "scores")
    foreign = [s.dataset for s in scores if s.fingerprint != seal["fingerprint"]]
    if foreign:
        progress(
            f"{folder}: {len(foreign)} of {len(scores)} Scores in scores/ are of other weights and left out ({', '.join(sorted(set(foreign))[:4])})"
        )
    return [s for s in scores if s.fingerprint == seal["fingerprint"]]


def check_figures(text: str, scores: Sequence[EvalResult]) -> int:
    """How many figures of the card's metadata were found in the Scores: all of them, and all Scores in it.

    Raises:
        ValueError: the card claims what no EvalResult says, or leaves one out; or it cannot be parsed.
    """
    try:
        data = ModelCard(text).data
    except Exception as error:  # its own, and whatever yaml raises
        raise ValueError(
            f"README.md is no model card that the Hub can read ({error}): delete it to have it written anew"
        ) from None
    claimed = {_figure(r) for r in data.eval_results or ()}
    measured = {_figure(r) for r in _results(scores)}
    if claimed != measured:
        odd = sorted(claimed ^ measured, key=str)[0]
        raise ValueError(
            f"README.md and the Scores in scores/ disagree about {len(claimed ^ measured)} figures, such as {odd[1]} on {odd[0]}: "
            f"{odd[2]} stands in the {'card' if odd in claimed else 'Scores'} alone; delete README.md to have it written anew"
        )
    return len(claimed)


def _figure(result: HubEvalResult) -> tuple:
    where = result.dataset_name, result.metric_name, result.metric_value, result.dataset_type, result.dataset_config
    return *where, result.dataset_split, result.dataset_revision, json.dumps(result.metric_args, sort_keys=True)


def _ours(text: str) -> bool:
    body, mark, digest = text.rpartition(_MARK)
    return bool(mark) and digest.removesuffix("-->\n").strip() == _digest(body.rstrip())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_record(folder: str | Path, name: str) -> dict:
    """One of the records beside a model; empty if there is none.

    Raises:
        ValueError: it is damaged, or train.json lacks what training writes: another version's, or edited.
    """
    file = Path(folder) / name
    try:
        content = dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): take it away to publish the model without its story") from None
    if name == TRAINED and content and (missing := _TOLD - content.keys()):
        raise ValueError(
            f"{file} lacks {', '.join(sorted(missing))}: another version of hpt_hf wrote it, or it was edited. Train again, or take it away to publish the model "
            "without the story of its training"
        )
    return content


def _metadata(folder: Path, scores: Sequence[EvalResult], repo_id: str | None) -> ModelCardData:
    trained, converted = read_record(folder, TRAINED), read_record(folder, CONVERTED)
    recipe = trained.get("recipe", {})
    # What came from the Hub came at a commit; a folder can be called as a repository is.
    if trained:
        student = trained["student"]
        base = _hub_id(recipe.get("model_name_or_path") or student["source"]) if student["revision"] else None
    else:
        base = _hub_id(converted.get("base"))
    results = _results(scores)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "adversarial-robustness", *([_tag(trained["method"])] if trained else [])],
        base_model=base,
        base_model_relation="finetune" if base and trained else None,
        datasets=[d] if (d := _hub_id(recipe.get("dataset"))) else None,
        license=recipe.get("license") or converted.get("license"),
        metrics=["accuracy"] if results else None,
        model_name=(repo_id or folder.resolve().name).split("/")[-1] if results else None,
        eval_results=results or None,
    )


def _tag(method: str) -> str:
    return method.replace("_", "-")


def _hub_id(name: str | None) -> str | None:
    """`owner/name`, or None: a path of the machine that trained it says nothing to whoever reads the card."""
    is_id = (
        name
        and name.count("/") == 1
        and not name.startswith((".", "/", "~", "lab:", "real:"))
        and not Path(name).exists()
    )
    return name if is_id else None


def _results(scores: Sequence[EvalResult]) -> list[HubEvalResult]:
    """Clean and robust accuracy of every EvalResult as the Hub's `model-index` holds them; a clean figure that two attacks share stands once."""
    results: dict[tuple, HubEvalResult] = {}
    for s in scores:
        where = {
            "task_type": "zero-shot-image-classification",
            "task_name": "Zero-Shot Image Classification",
            "dataset_type": _hub_id(s.source.get("repository") or s.source.get("path"))
            or s.dataset.replace(":", "-").replace(" ", "-").lower(),
            "dataset_name": s.dataset,
            "dataset_config": s.source.get("config")
            or s.dataset,  # the Hub merges what has one type, configuration and split
            "dataset_split": s.source.get("split"),
            "dataset_revision": s.source.get("revision"),
            "metric_type": "accuracy",
        }
        counted = {"n": s.n, "seed": s.seed, "protocol": s.protocol}
        attack = {
            "attack": s.attack,
            "norm": s.norm,
            "eps": s.eps,
            "verdict": s.verdict,
            "doubts": [d["name"] for d in s.suspicions],
        }
        clean = {**counted, "interval_95": list(s.clean_interval)}
        robust = {**counted, "interval_95": list(s.interval), **attack, "after_each_attack": s.parts}
        for name, value, arguments in (
            ("clean accuracy, %", s.clean, clean),
            (f"robust accuracy, % ({s.attack}, {s.norm} {s.eps})", s.robust, robust),
        ):
            result = HubEvalResult(**where, metric_name=name, metric_value=value, metric_args=arguments)
            results[(*result.unique_identifier, *_figure(result))] = result
    return list(results.values())


def _body(folder: Path, scores: Sequence[EvalResult], repo_id: str | None, revision: str | None) -> str:
    seal = read_record(folder, SEAL)
    config = read_record(folder, "config.json")
    vision = config["vision_config"]
    questions = {q: [s for s in scores if s.question == q] for q in dict.fromkeys(s.question for s in scores)}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    trained, mixed = read_record(folder, TRAINED), _told(read_record(folder, MIXED))
    return environment.get_template("model_card.md.j2").render(
        name=repo_id or folder.resolve().name,
        revision=revision,
        trained=trained,
        facts=_facts(trained, mixed),
        recipe=trained.get("recipe"),
        converted=_told(read_record(folder, CONVERTED)),
        mixed=mixed,
        shares=[
            f"{w:.2f}" if round(w, 2) == round(w, 9) else f"{w:.9g}" for w in (mixed["weight"], 1 - mixed["weight"])
        ]
        if mixed
        else [],
        seal=seal,
        architecture=f"ViT, patch {vision['patch_size']}, {vision['image_size']} px, {vision['num_hidden_layers']} layers of width {vision['hidden_size']}",
        tables={q: result_table([_short(s) for s in part]) for q, part in questions.items()},
        doubts=_doubts(scores),
        skipped=sum(len(s.skipped) for s in scores),
        toy=trained.get("recipe", {}).get("model_name_or_path", "").startswith("lab:"),
        classes=list(scores[0].per_class)[:3] if scores else ["a cat", "a dog"],
    )


def _doubts(scores: Sequence[EvalResult]) -> dict[str, list[str]]:
    """Check that was raised -> where."""
    found: dict[str, list[str]] = {}
    for score in scores:
        for doubt in score.suspicions:
            found.setdefault(doubt["name"], []).append(f"{score.dataset} ({score.attack}, {score.eps})")
    return found


def _short(score: EvalResult) -> EvalResult:
    """Under one name, whatever path it was evaluated from: they are all of this model."""
    return dataclasses.replace(score, model="this model")


def _facts(trained: dict, mixed: dict) -> dict[str, str]:
    """How it was trained, as rows of a table; empty if it was not trained here."""
    if not trained:
        return {}
    recipe, attack = trained.get("recipe", {}), trained["attack"]
    size = "the whole radius" if attack["step_size"] is None else f"{attack['step_size'] * 255:.3g}/255"
    shown = {
        "method": trained["method"],
        "student": _origin(trained["student"], recipe.get("model_name_or_path")),
        "proxy": _origin(trained["proxy"], recipe.get("proxy_name_or_path")) if trained["proxy"] else "none",
        "data": _plain(recipe.get("dataset", trained["dataset"])),
        "pictures": trained["pictures"],
        "batch": f"{trained['batch']}" + f", on {trained['processes']} processes" * (trained["processes"] > 1),
        "phases": "; ".join(
            f"{p['objective']}: {p['steps']} steps at up to {p['learning_rate']:.3g} ({p['warmup_steps']} of warm-up)"
            for p in trained["phases"]
        ),
        "attack in training": f"PGD-{attack['steps']}, {attack['norm']} {attack['eps']}, step {size}"
        + ", no random start" * (not attack.get("random_start", True)),  # records of before had no choice
        "seed": trained["seed"],
        "time": f"{trained['seconds'] / 3600:.2g} hours on {trained['hardware']}",
        "code": f"hpt_hf {trained['versions']['hpt_hf']}"
        + (f", commit {trained['commit']}" if trained["commit"] else ""),
        "libraries": ", ".join(f"{k} {v}" for k, v in trained["versions"].items() if k != "hpt_hf"),
    }
    if trained.get("held_out") and not mixed:  # a mixture has other accuracies
        shown["held-out slice of the training data"] = ", ".join(
            f"{k.removeprefix('eval_').replace('_', ' ')} {v:.1f}%" for k, v in trained["held_out"].items()
        )
    return shown


def _origin(model: dict, name: str | None) -> str:
    revision = f" at {model['revision']}" if model["revision"] else ""
    return f"{_plain(name or model['source'])}{revision}, weights {model['fingerprint']}"


def _told(record: dict) -> dict:
    return {k: _plain(v) if isinstance(v, str) else v for k, v in record.items()}


def _plain(name: str) -> str:
    """A Hub id or a name as it is; of a local path its last part alone."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name
