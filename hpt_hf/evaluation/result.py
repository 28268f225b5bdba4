"""The accuracy of one model on one data set under one attack, with all that is needed to doubt and to repeat it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import NamedTuple, get_origin, get_type_hints

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.evaluation.statistics import grouped, percent, wilson
from hpt_hf.utils import slug

FORMAT = 3  # of a result's file
REMARKS = ("few_images", "collapsed", "baseline")  # checks that say that a figure means little, not that it is wrong


class Question(NamedTuple):
    """What was asked of a model: only results of one question may stand in one table."""

    protocol: str
    attack: str
    norm: str
    eps: str
    limit: int | None
    seed: int

    @classmethod
    def of(cls, attack: EvaluationAttack, limit: int | None) -> Question:
        threat = attack.threat
        return cls(attack.protocol, str(attack), threat.norm, str(threat.eps), limit, attack.seed)

    def __str__(self) -> str:
        limit = f", {self.limit} images a set" if self.limit else ""
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.attack}, {self.norm} {self.eps}, protocol “{self.protocol}”{limit}{seed}"


@dataclass(frozen=True)
class EvalResult:
    """Counts of images; accuracies (percent), Wilson's 95% intervals and the verdict follow from them."""

    model: str
    fingerprint: str  # digest of the weights
    dataset: str
    source: dict  # how to open the data again, its `revision` and the `limit` included
    classes: int
    templates: tuple[str, ...]
    images_digest: str  # of the images as the model saw them, in order
    n: int
    n_clean: int  # right on the clean image
    n_robust: int  # … and under attack
    n_after: dict[str, int]  # … after each stage of the attack, in the order in which they ran
    per_class: dict[str, tuple[int, int, int]]  # class -> (images, clean, robust)
    attack: str
    steps: int | None
    norm: str
    eps: str
    protocol: str  # on which pixels eps counts, `PROTOCOLS`
    seed: int
    target: str | None = None
    revision: str | None = None  # the model's commit on the Hub, if it came from there
    sanity_checks: tuple[dict, ...] = ()  # each {name, raised (None: not run), detail}
    skipped: tuple[str, ...] = ()  # images that could not be read and were left out
    ends: str = ""  # of each image, in order: w wrong when clean, r right to the end, else the stage that broke it
    seconds: float = 0.0  # of computing, summed over processes
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""

    clean = property(lambda self: percent(self.n_clean, self.n))
    robust = property(lambda self: percent(self.n_robust, self.n))
    clean_interval = property(lambda self: wilson(self.n_clean, self.n))
    interval = property(lambda self: wilson(self.n_robust, self.n))
    accuracy_after = property(lambda self: {stage: percent(count, self.n) for stage, count in self.n_after.items()})
    raised = property(lambda self: tuple(check for check in self.sanity_checks if check["raised"]))

    @property
    def verdict(self) -> str:
        """`suspicious`: the figure is in doubt; `remark`: the set-up says little; `clear`; or `unchecked`."""
        if all(check["raised"] is None for check in self.sanity_checks):
            return "unchecked"
        if any(check["name"] not in REMARKS for check in self.raised):
            return "suspicious"
        return "remark" if self.raised else "clear"

    @property
    def robust_is(self) -> str:
        goal = f"never taken for {self.target!r} on any query" if self.target else "right on every query of the attack"
        return f"right on the clean image and {goal}"

    @property
    def worst_class(self) -> tuple[str, int, int]:
        """(name, images, robust) of the class with the lowest robust accuracy."""
        name, (count, _, robust) = min(self.per_class.items(), key=lambda item: (item[1][2] / item[1][0], -item[1][0]))
        return name, count, robust

    @property
    def question(self) -> Question:
        return Question(self.protocol, self.attack, self.norm, self.eps, self.source.get("limit"), self.seed)

    @property
    def file_name(self) -> str:
        """One name for each model, data set and question: slugs to read, and a digest, since they are cut short."""
        parts = (Path(self.model).name or self.model, self.dataset, self.attack, self.norm, self.eps, self.protocol)
        asked = [self.fingerprint, *parts, *self.question, self.target, self.templates, list(self.per_class)]
        asked += [self.images_digest, self.source.get("split")]
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        return "--".join(slug(p)[:40] or "x" for p in parts) + f"--{digest[:8]}.json"

    def to_json(self) -> dict:
        """All fields, and for human readers what follows from them, which `read` passes over."""
        derived = ("clean", "clean_interval", "robust", "interval", "accuracy_after", "verdict", "robust_is")
        found = {name: getattr(self, name) for name in derived}
        return {"format": FORMAT} | asdict(self) | found | {"raised": [check["name"] for check in self.raised]}

    @classmethod
    def read(cls, file: str | Path) -> EvalResult:
        """A result from its file, also of format 2. Fields that this version does not know are passed over.

        Raises:
            ValueError: no result, one that lacks a field, or counts that cannot be.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            if content.get("format") == 2:
                content = _from_format_2(content)
            known = {f.name for f in fields(cls)}
            result = cls(**{name: _tuples(value) for name, value in content.items() if name in known})
            for name, hint in get_type_hints(cls).items():
                kind = hint if isinstance(hint, UnionType) else get_origin(hint) or hint
                value = getattr(result, name)
                if not isinstance(value, int | float if kind is float else kind):
                    raise ValueError(f"{name} is {str(value)[:60]!r}, expected {hint}")
            if not all({"name", "raised"} <= check.keys() for check in result.sanity_checks):
                raise ValueError("sanity_checks: expected name and raised of each")
            if not result.n_after or not all(len(counts) == 3 for counts in result.per_class.values()):
                raise ValueError("n_after or per_class holds no counts")
            if not 0 <= result.n_robust <= result.n_clean <= result.n != 0:
                raise ValueError(f"it claims {result.n_robust} robust and {result.n_clean} right of {result.n} images")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{error!r}" if isinstance(error, KeyError) else str(error).removeprefix("EvalResult.__init__() ")
            raise ValueError(f"{file} is no result that can be read: {reason}. Fix: evaluate again.") from error
        return result


def _from_format_2(old: dict) -> dict:
    """Format 2 held percentages, and other names."""

    def count(share: float) -> int:
        return round(share * old["n"] / 100)

    checks = [{"name": c["name"], "raised": c["raised"], "detail": c["seen"]} for c in old["checks"]]
    counts = {"n_clean": count(old["clean"]), "n_robust": count(old["robust"])}
    counts["n_after"] = {stage: count(share) for stage, share in old["parts"].items()}
    return old | counts | {"images_digest": old["rows"], "sanity_checks": checks}


def _tuples(value):
    """JSON knows only lists; a result holds tuples, so that two equal results are equal."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def told_apart(results: Sequence[EvalResult]) -> list[EvalResult]:
    """The same results; sets of one name under one question are named by what differs: split, prompts, classes, images."""
    told = list(results)
    asked = [(r.dataset, r.model, r.fingerprint, r.question, r.target) for r in told]
    for places in grouped(range(len(told)), asked.__getitem__).values():
        if len(places) == 1:
            continue
        for what in (
            lambda r: str(r.source.get("split")),
            lambda r: " · ".join(r.templates),
            lambda r: ", ".join(r.per_class),
            lambda r: r.images_digest[:8],
        ):
            names = [what(told[i]) for i in places]
            if len(set(names)) == len(names):
                break
        for i, name in zip(places, names, strict=True):
            told[i] = replace(told[i], dataset=f"{told[i].dataset} ({name if len(name) <= 60 else name[:59] + '…'})")
    return told


def read_results(folder: str | Path) -> list[EvalResult]:
    """All results that lie in a folder, in the order of their names."""
    return [EvalResult.read(file) for file in sorted(Path(folder).glob("*.json"))]


def read_results_of(folder: str | Path) -> list[EvalResult]:
    """The results of a model's or an evaluation's folder; `scores/` is what the version before called `results/`."""
    files = {f.name: f for place in ("scores", "results") for f in Path(folder, place).glob("*.json")}
    return [EvalResult.read(files[name]) for name in sorted(files)]
