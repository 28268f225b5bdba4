"""The record of a run: what `train.json` holds and the model card tells."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging

from hpt_hf.attacks.pgd import TrainingAttack
from hpt_hf.evaluation.statistics import wilson
from hpt_hf.method.objectives import Objective, Views
from hpt_hf.models.ensemble import Ensemble, members
from hpt_hf.models.families import FAMILIES
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing.model_card import TRAINED
from hpt_hf.types import Labels
from hpt_hf.utils import commit, hardware, read_json, versions

logger = logging.get_logger(__name__)


# Arguments that decide the weights, beside schedule, attack, models and data; all others may change in a resumed run.
ARGUMENTS = ["optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"]
ARGUMENTS += ["bf16", "fp16", "tf32", "seed", "data_seed", "dataloader_drop_last", "train_sampling_strategy"]
ARGUMENTS += ["layer_rate_decay"]


def decided_by(trainer) -> dict:
    """All that decides the weights, field by field, as JSON: a checkpoint goes on only under the same."""
    args, data, phases = trainer.args, trainer.train_dataset, trainer.schedule.phases
    student = trainer.accelerator.unwrap_model(trainer.model)
    fields = {name: getattr(args, name) for name in ARGUMENTS}
    for name in ("student", "proxy"):
        fields[name] = (trainer.beginning[name] or {}).get("fingerprint")
    fields["lora"] = [student.lora.r, student.lora.lora_alpha] if student.lora else None
    fields["proxy_weights"] = trainer.proxy.weights if len(members(trainer.proxy)) > 1 else None
    fields["proxy_dtype"] = ", ".join(sorted({str(m.dtype).removeprefix("torch.") for m in members(trainer.proxy)}))
    fields |= {f"attack {name}": value for name, value in trainer.beginning["attack"].items()}
    for number, phase in enumerate(phases, 1):
        settings = {k: v for k, v in vars(phase).items() if k not in ("objective", "epochs", "rate_divisor")}
        fields |= {f"phase {number} {k}": v for k, v in (settings | phase.objective.settings).items()}
    fields |= {"interval": trainer.schedule.interval, "classes": student.classes, "templates": student.templates}
    fields |= {"batch": total_batch(args), "images": len(data), "data": getattr(data, "digest", None)}
    return json.loads(json.dumps(fields, default=str))


def total_batch(args) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def differences(checkpoint: str | Path, now: dict, told: str = "decided_by") -> list[str]:
    """What a run's record tells otherwise than `now`, by field; empty where it does not say."""
    file = Path(checkpoint, TRAINED)
    then = read_json(file).get(told, {}) if file.is_file() else {}
    return [f"{k}: got {_short(now[k])}, expected {_short(then[k])}" for k in now if k in then and then[k] != now[k]]


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _origin(models: Sequence[ZeroShotClassifier]) -> dict | None:
    """Where one model came from, or several as one."""
    told = [(str(m.model.name_or_path), m.revision, fingerprint(m)) for m in models]
    sources, revisions, prints = zip(*told, strict=True) if told else ((), (), ())
    revision = " + ".join(map(str, revisions)) if any(revisions) else None
    return {"source": " + ".join(sources), "revision": revision, "fingerprint": "+".join(prints)} if told else None


def beginning(
    student: ZeroShotClassifier, proxy: ZeroShotClassifier | Ensemble | None, attack: TrainingAttack
) -> dict:
    """What training begins with: the models before it, and the attack."""
    models = {"student": _origin([student]), "proxy": _origin(members(proxy))}
    settings = {name: getattr(attack, name, None) for name in ("steps", "step_size", "random_start")}
    settings["name"] = type(attack).__name__
    return models | {"attack": asdict(attack.threat) | settings}


def agreements(proxy: ZeroShotClassifier | Ensemble | None, views: Views, labels: Labels | None) -> dict:
    """How many of the batch's labels each proxy names, on the images that it was asked about: name -> share."""
    asked = vars(views.proxy) if proxy is not None else {}
    output = asked.get("adversarial", asked.get("clean"))
    if labels is None or output is None:
        return {}
    each = output.logits[None] if output.members is None else output.members
    names = [f"agreement_{Path(str(m.model.name_or_path)).name}" for m in members(proxy)]
    names = [n if names.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(names)]
    return {n: (logits.argmax(1) == labels).float().mean() for n, logits in zip(names, each, strict=True)}


def check_student(student: ZeroShotClassifier) -> None:
    """Raise ValueError for a model that can only teach, or one without classes."""
    if not student.family.student:
        known = ", ".join(repr(name) for name, family in FAMILIES.items() if family.student)
        raise ValueError(
            f"student: got a model of the family {student.config.model_type!r}, expected one of {known}: "
            "others can be measured, and teach as --proxy"
        )
    if not student.classes:
        raise ValueError("the student has no classes. Fix: student.set_classes(names, templates)")


def check_proxy(student: ZeroShotClassifier, proxy: ZeroShotClassifier) -> None:
    """Raise ValueError for other classes than the student's; warn of a proxy that attacks on the student fool, too."""
    if proxy.classes != student.classes:
        raise ValueError(
            f"student and proxy have different classes ({len(student.classes)} and {len(proxy.classes)} names). "
            "Fix: set_classes with the same list on both"
        )
    if fingerprint(proxy) == fingerprint(student):
        fix = "Fix: one of another architecture; the control without one is --method anchor_clean"
        raise ValueError(f"proxy: got the student itself, expected another model. {fix}")
    if proxy.config.vision_config.to_dict() == student.config.vision_config.to_dict():
        logger.warning("proxy and student have the same architecture: attacks transfer between such models")
    if proxy.image_size != student.image_size:
        logger.warning(
            f"the student's {student.image_size} px images are resized to the proxy's {proxy.image_size} px"
        )


def check_attack(objectives: Iterable[Objective], attack: TrainingAttack) -> None:
    """Raise ValueError for an attack that cannot move: from the image itself, where the loss has no gradient."""
    still = [o.name for o in objectives if o.attack.needs_random_start]
    if still and not attack.random_start:
        raise ValueError(
            f"{still[0]}: got an attack that starts from the image itself, where its gradient is 0. "
            "Fix: --attack_random_start true"
        )


def training_record(trainer) -> dict:
    """How the model was made, as JSON. `seconds` are this run's: one that was resumed leaves out what came before."""
    args, data, phases = trainer.args, trainer.train_dataset, trainer.schedule.phases
    told = ("steps", "learning_rate", "warmup_steps", "decay")
    measured: dict = next((log for log in trainer.state.log_history[::-1] if "eval_clean_accuracy" in log), {})
    record = {
        "method": "+".join(p.objective.name for p in phases),
        **trainer.beginning,
        "dataset": getattr(data, "name", type(data).__name__),
        "images": len(data),
        "classes": len(trainer.accelerator.unwrap_model(trainer.model).classes),
        "phases": [{"objective": p.objective.name} | {name: getattr(p, name) for name in told} for p in phases],
        "steps": trainer.state.global_step,
        "learning_rate": phases[-1].learning_rate,
        "batch": total_batch(args),
        "processes": args.world_size,
        "seed": args.seed,
        "decided_by": decided_by(trainer),
        "seconds": round(trainer.stopwatch.elapsed, 1),
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
        "held_out": {k: v for k, v in measured.items() if k.endswith("accuracy")},
        "held_out_vanilla": trainer.vanilla,
        "held_out_images": len(trainer.eval_dataset or ()),
        "largest_class_share": measured.get("eval_largest_class_share"),
    }
    return record | (trainer.recipe or {})


def accuracies(prediction: EvalPrediction) -> dict[str, float]:
    """Clean and robust accuracy and the share of the most frequent clean answer, in percent, on the held-out slice."""
    logits: dict = dict(zip(("robust", "clean"), prediction.predictions, strict=True))
    found = {f"{k}_accuracy": 100 * float((v.argmax(1) == prediction.label_ids).mean()) for k, v in logits.items()}
    answers = logits["clean"].argmax(1)
    return found | {"largest_class_share": 100 * float(np.bincount(answers).max() / len(answers))}


def held_out_report(record: dict) -> tuple[str, list[str]]:
    """(accuracies on the held-out slice with intervals beside the vanilla student's, reasons to doubt the model)."""
    n, after, before = record["held_out_images"], record["held_out"], record["held_out_vanilla"]
    if not after:
        return "", []

    def told(found: dict, prefix: str) -> str:
        parts = []
        for kind in ("clean", "robust"):
            value = found[f"{prefix}_{kind}_accuracy"]
            parts.append("{} {:.1f}% ({:.1f}–{:.1f})".format(kind, value, *wilson(round(value * n / 100), n)))
        return ", ".join(parts)

    text, doubts = f"; held-out slice, n = {n}: {told(after, 'eval')}", []
    clean, chance = after["eval_clean_accuracy"], 100 / record["classes"]
    if wilson(round(clean * n / 100), n)[0] <= chance:
        doubts.append(f"it is at chance: {clean:.1f}% clean of {record['classes']} classes")
    if (record["largest_class_share"] or 0) > 95 > 2 * chance:
        doubts.append(f"it predicts one class for {record['largest_class_share']:.0f}% of the images")
    if before:
        text += f"; vanilla student: {told(before, 'vanilla')}"
        if all(after[f"eval_{kind}_accuracy"] < before[f"vanilla_{kind}_accuracy"] for kind in ("clean", "robust")):
            doubts.append("it is worse than the vanilla student, clean and robust")
    return text, doubts
