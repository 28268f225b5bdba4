"""Scores: the accuracy of one model on one set under one attack, with all that is needed to doubt it and to measure it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from hpt_hf.utils import slug

FORMAT = 2  # of a EvalResult file; a file of another format is refused and not guessed at


VERDICTS = ("clear", "suspicious", "unchecked")


class Question(NamedTuple):
    """What was asked of a model: only Scores of one question may stand in one table."""

    protocol: str
    attack: str
    norm: str
    eps: str
    limit: int | None
    seed: int

    def __str__(self) -> str:
        extra = f", {self.limit} pictures a set" * bool(self.limit) + f", seed {self.seed}" * bool(self.seed)
        return f"{self.attack}, {self.norm} {self.eps}, protocol “{self.protocol}”{extra}"


@dataclass(frozen=True)
class EvalResult:
    """Accuracies in percent; intervals are Wilson's, 95%.

    Args:
        fingerprint: digest of the weights. `revision`: the model's commit on the Hub, if it came from there.
        source: how to open the data again (`hpt_hf.data.dataset.LabelledImages.source`), its `revision` and the `limit` included.
        rows: digest of the pictures as the model saw them, in order.
        attack, norm, eps, protocol, seed, target: the attack. `protocol` says on which pixels eps counts (`hpt_hf.attacks.threat_model.PROTOCOLS`).
        parts: robust accuracy after each of the attacks that ran in turn.
        per_class: class -> (pictures, right, robust), as counts.
        verdict: one of `VERDICTS`: were the checks run, and was one raised? `suspicions` holds those, `checks` all.
        skipped: pictures that could not be read and were left out.
        seconds: of computing, summed over processes.
    """

    model: str
    fingerprint: str
    revision: str | None
    dataset: str
    source: dict
    classes: int
    templates: tuple[str, ...]
    n: int
    rows: str
    attack: str
    steps: int | None
    norm: str
    eps: str
    protocol: str
    seed: int
    target: str | None
    clean: float
    robust: float
    clean_interval: tuple[float, float]
    interval: tuple[float, float]
    robust_is: str
    parts: dict[str, float]
    per_class: dict[str, tuple[int, int, int]]
    verdict: str
    suspicions: tuple[dict, ...]
    checks: tuple[dict, ...]
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    format: int = FORMAT

    @property
    def worst_class(self) -> tuple[str, int, int]:
        """(name, pictures, robust) of the class with the lowest robust accuracy."""
        name, (count, _, robust) = min(self.per_class.items(), key=lambda item: (item[1][2] / item[1][0], -item[1][0]))
        return name, count, robust

    @property
    def question(self) -> Question:
        return Question(self.protocol, self.attack, self.norm, self.eps, self.source.get("limit"), self.seed)

    @property
    def file_name(self) -> str:
        """One name for each model, set and question, so that one folder can hold the Scores of several models.

        The readable parts alone would not keep any two apart: a slug has neither case nor accents, and is cut short.
        """
        parts = (Path(self.model).name or self.model, self.dataset, self.attack, self.norm, self.eps, self.protocol)
        digest = hashlib.sha256(json.dumps([self.fingerprint, *parts, *self.question]).encode()).hexdigest()
        return "--".join(slug(p)[:40] or "x" for p in parts) + f"--{digest[:8]}.json"

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def read(cls, file: str | Path) -> EvalResult:
        """A EvalResult from its file.

        Raises:
            ValueError: not a EvalResult, or one of another format; the message says which version wrote it.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not a EvalResult: it holds no JSON ({error})") from None
        if not isinstance(content, dict) or "robust" not in content:
            raise ValueError(f"{file} is not a EvalResult: it has no key 'robust'")
        names = {f.name for f in fields(cls)}
        if content.get("format") != FORMAT or content.keys() != names:
            writer = dict(content.get("versions") or {}).get("hpt_hf", "an unknown version")
            odd = sorted(content.keys() ^ names)
            raise ValueError(
                f"{file} was written by hpt_hf {writer} in format {content.get('format', 1)}, this version reads format {FORMAT}"
                + (f" (keys that differ: {', '.join(odd[:6])})" if odd else "")
                + ": evaluate again, or read it with the version that wrote it"
            )
        if not all(isinstance(content[k], int | float) and 0 <= content[k] <= 100 for k in ("clean", "robust")):
            raise ValueError(
                f"{file} claims {content['clean']!r} clean and {content['robust']!r} robust: expected percentages"
            )
        return cls(**{name: _tuples(value) for name, value in content.items()})


def _tuples(value):
    """JSON knows only lists; a EvalResult holds tuples, so that two equal Scores are equal."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def read_results(folder: str | Path) -> list[EvalResult]:
    """All Scores of a folder, in the order of their names."""
    return [EvalResult.read(file) for file in sorted(Path(folder).glob("*.json"))]


def mean(scores: Sequence[EvalResult]) -> dict[str, float]:
    """Unweighted means over data sets, in percent."""
    return {key: sum(getattr(s, key) for s in scores) / len(scores) for key in ("clean", "robust")}
