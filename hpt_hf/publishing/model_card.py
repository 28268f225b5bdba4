"""The model card: what a stranger must know about a checkpoint, every figure taken from the results beside it.

Metadata as the Hub reads it (`model-index` included); the text is `model_card.md.j2`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult as HubEvalResult
from huggingface_hub import ModelCard, ModelCardData

from hpt_hf.evaluation.result import EvalResult, read_results_of, told_apart
from hpt_hf.evaluation.tables import result_table
from hpt_hf.models.families import FAMILIES
from hpt_hf.models.zero_shot import TEMPLATE
from hpt_hf.utils import escaped, progress, read_json, slug, write_text

SEAL = "parity.json"  # what `hpt_hf.publishing.export` checked
TRAINED, CONVERTED, MIXED = "train.json", "convert.json", "interpolate.json"  # how a model was made
MIXED_BEFORE = "dial.json"  # what 0.1 called it
RECORDS = (TRAINED, CONVERTED, MIXED, MIXED_BEFORE)
CURVE = "training.png"  # which `hpt_hf.training.tracking` draws
TASK = "zero-shot-image-classification"

_RENAMED = {"model_name_or_path": "model", "proxy_name_or_path": "proxy", "dataset_split": "split"}  # since 0.1
_NEEDED = {"method", "student", "proxy", "dataset", "images", "phases", "attack", "versions"}  # of train.json
_MARK = "<!-- written by hpt_hf, "

# Method -> title and arXiv id of the paper that it comes from.
_HPT = ("Proxy Robustness in Vision Language Models is Effortlessly Transferable", "2601.12865")
PAPERS = {"hpt": _HPT, "ga": _HPT, "hpt_gpd": _HPT}
PAPERS["tecoa"] = ("Understanding Zero-Shot Adversarial Robustness for Large-Scale Models", "2212.07016")
PAPERS["pmg_aft"] = ("Pre-trained Model Guided Fine-Tuning for Zero-Shot Adversarial Robustness", "2401.04350")
PAPERS["fare"] = (
    "Robust CLIP: Unsupervised Adversarial Fine-Tuning of Vision Embeddings for Robust Large Vision-Language Models",
    "2402.12336",
)
PAPERS["agft"] = (
    "AGFT: Alignment-Guided Fine-Tuning for Zero-Shot Adversarial Robustness of Vision-Language Models",
    "2603.29410",
)
PAPERS["ucat"] = ("Calibrating Uncertainty for Zero-Shot Adversarial CLIP", "2512.12997")
PAPERS["lore"] = ("LORE: Lagrangian-Optimized Robust Embeddings for Visual Encoders", "2505.18884")


def for_pipeline(template: str) -> str:
    """A template as `hypothesis_template` takes it, which is `str.format`'s: other braces are doubled."""
    return template.replace("{", "{{").replace("}", "}}").replace("{{}}", "{}")


def card(folder: str | Path, *, results=None, repo_id: str | None = None, revision: str | None = None) -> str:
    """README.md of a folder, from its records and results (None: its `own_results`); one edited by hand as it is.

    `repo_id` and `revision` are where readers will open the model; None: the folder's own name, and main.
    """
    folder = Path(folder)
    file = folder / "README.md"
    if file.is_file():
        text = file.read_text(encoding="utf-8")
        body, _, mark = text.rpartition(_MARK)
        if mark != f"{_digest(body)} -->\n":
            progress(f"{file} was edited by hand: kept as it is; delete it to have it written anew")
            return text
    results = own_results(folder) if results is None else results
    name = repo_id or folder.resolve().name
    trained, converted, mixed = (read_record(folder, record) for record in (TRAINED, CONVERTED, MIXED))
    tables: dict[str, list[EvalResult]] = {}
    for result in results:
        tables.setdefault(str(result.question), []).append(dataclasses.replace(result, model="this model"))
    for result in vanilla_results(folder, results):
        tables[str(result.question)].append(dataclasses.replace(result, model="vanilla"))
    seal = read_json(folder / SEAL)
    # Those that the figures were measured with, else those of training, else the checked one.
    templates = trained.get("decided_by", {}).get("templates") or [seal.get("template", TEMPLATE)]
    if len(measured := {r.templates for r in results}) == 1:
        (templates,) = measured
    form = seal.get("form", "transformers")
    text = ModelCard.from_template(
        _metadata(trained, converted, results, name.split("/")[-1], seal),
        Path(__file__).with_name("vision_tower.md.j2" if form == "vision_tower" else "model_card.md.j2"),
        **{"name": name, "revision": revision, "results": results, "plain": _plain},
        **{"trained": trained, "recipe": trained.get("recipe", {}), "converted": converted, "mixed": mixed},
        **{"seal": seal, "prompts": templates, "prompt": json.dumps(for_pipeline(templates[0]))},
        family=FAMILIES[seal.get("family", "clip")],
        curve=CURVE if (folder / CURVE).is_file() and not mixed else None,
        paper=PAPERS.get(trained.get("method")),
        vision=seal.get("vision") or read_json(folder / "config.json")["vision_config"],
        tables={question: result_table(part) for question, part in tables.items()},
    ).content.rstrip()
    return f"{text}\n\n{_MARK}{_digest(text)} -->\n"


def write_model_card(folder: str | Path) -> Path:
    return write_text(Path(folder) / "README.md", card(folder))


def own_results(folder: str | Path) -> list[EvalResult]:
    """The folder's results that were measured on its own weights; others are named and left out."""
    weights, results = read_json(Path(folder) / SEAL)["fingerprint"], read_results_of(folder)
    if others := sorted({r.dataset for r in results if r.fingerprint not in (weights, vanilla(folder))}):
        progress(f"{folder}: results of other weights are left out ({', '.join(others[:4])})")
    return [r for r in results if r.fingerprint == weights]


def vanilla(folder: str | Path) -> str | None:
    """The fingerprint of what a model was trained from."""
    return read_record(folder, TRAINED).get("student", {}).get("fingerprint")


def vanilla_results(folder: str | Path, own: Sequence[EvalResult]) -> list[EvalResult]:
    """The folder's results of what it was trained from, to questions and sets that its own answer, too."""
    asked, weights = {(r.question, r.dataset) for r in own}, vanilla(folder)
    return [r for r in read_results_of(folder) if r.fingerprint == weights and (r.question, r.dataset) in asked]


def check_figures(text: str, results: Sequence[EvalResult]) -> int:
    """How many figures the card's metadata holds. Raises ValueError unless they are those of the results."""
    try:
        data = ModelCard(text).data
    except Exception as error:  # its own, and whatever yaml raises
        raise ValueError(f"README.md is no card that the Hub can read ({error}). Fix: delete it") from None
    claimed, measured = ({_figure(f) for f in figures or ()} for figures in (data.eval_results, _figures(results)))
    if odd := sorted(claimed ^ measured):
        where = "card" if odd[0] in claimed else "results"
        disagree = f"README.md and the results disagree about {len(odd)} figures: the {where} alone has {odd[0]}"
        raise ValueError(f"{disagree}. Fix: delete README.md to have it written anew")
    return len(claimed)


def _figure(figure: HubEvalResult) -> str:
    return json.dumps(dataclasses.asdict(figure), sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.rstrip().encode()).hexdigest()[:12]


def read_record(folder: str | Path, name: str) -> dict:
    """How a model was made, from one of `RECORDS`, in today's names; {} without. Raises ValueError if damaged."""
    file = Path(folder) / name
    if name == MIXED and not file.is_file():
        file = file.with_name(MIXED_BEFORE)
    record = read_json(file) if file.is_file() else {}
    if name == TRAINED and record:
        record = {"images" if k == "pictures" else k: v for k, v in record.items()}
        if missing := _NEEDED - record.keys():
            raise ValueError(f"{file} lacks {', '.join(sorted(missing))}. Fix: remove it to go on without this record")
        if "recipe" in record:
            record["recipe"] = {_RENAMED.get(k, k): v for k, v in record["recipe"].items()}
    return record


def _metadata(trained: dict, converted: dict, results: Sequence[EvalResult], name: str, seal: dict) -> ModelCardData:
    recipe, base, form = trained.get("recipe", {}), _hub_id(converted.get("base")), seal.get("form")
    if trained:  # what came from the Hub came at a commit; a folder can be called as a repository is
        origin = trained["student"]
        base = _hub_id(recipe.get("model") or origin["source"]) if origin["revision"] else None
    dataset = _hub_id(recipe.get("dataset"))
    return ModelCardData(
        library_name={"open_clip": "open_clip", "adapter": "peft"}.get(form or "", "transformers"),
        pipeline_tag="image-feature-extraction" if form == "vision_tower" else TASK,
        tags=[
            slug(FAMILIES[seal.get("family", "clip")].called),
            "adversarial-robustness",
            *(["vision-tower"] if form == "vision_tower" else []),
            *([trained["method"].replace("_", "-")] if trained else []),
        ],
        base_model=base,
        base_model_relation="finetune" if base and trained else None,
        datasets=[dataset] if dataset else None,
        license=recipe.get("license") or converted.get("license"),
        metrics=["accuracy"] if results else None,
        model_name=name if results else None,
        eval_results=_figures(results) or None,
    )


def _figures(results: Sequence[EvalResult]) -> list[HubEvalResult]:
    """Clean and robust accuracy of every result; a clean figure that two attacks share stands once."""
    figures: dict[str, HubEvalResult] = {}
    for r in told_apart(results):
        where = {
            "dataset_type": _hub_id(r.source.get("repository") or r.source.get("path")) or slug(r.dataset) or "images",
            "dataset_name": r.dataset,
            "dataset_config": r.source.get("config") or r.dataset,  # the Hub merges equal type, config and split
            "dataset_split": r.source.get("split"),
            "dataset_revision": r.source.get("revision"),
        }
        counted = {"n": r.n, "seed": r.seed, "protocol": r.protocol}
        attack = {"attack": r.attack, "norm": r.norm, "eps": r.eps, "after_each_attack": r.accuracy_after}
        attack |= {"verdict": r.verdict, "doubts": [c["name"] for c in r.raised]}
        robust = f"robust accuracy, % ({r.attack}, {r.norm} {r.eps})"
        for metric, value, interval, more in (
            ("clean accuracy, %", r.clean, r.clean_interval, {}),
            (robust, r.robust, r.interval, attack),
        ):
            arguments = counted | {"interval_95": list(interval)} | more
            task = {"task_type": TASK, "task_name": "Zero-Shot Image Classification", "metric_type": "accuracy"}
            figure = HubEvalResult(**task, **where, metric_name=metric, metric_value=value, metric_args=arguments)
            figures[_figure(figure)] = figure
    return list(figures.values())


def _hub_id(name: str | None) -> str | None:
    """`owner/name`, or None: a path of the machine that trained it says nothing to whoever reads the card."""
    name = name and name.removeprefix("hf-hub:")  # as open_clip calls them
    if name and name.count("/") == 1 and not name.startswith((".", "/", "~", "lab:", "real:", "photos:")):
        return None if Path(name).exists() else name
    return None


def _plain(name: str | list[str]) -> str:
    """A Hub id or a name as it is, of a local path its last part alone; in a cell of a table. Or several."""
    if isinstance(name, list):
        return " + ".join(map(_plain, name))
    name = Path(name).name if Path(name).is_absolute() or Path(name).exists() else name
    return escaped(name)
