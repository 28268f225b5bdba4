"""Evaluation: clean and robust zero-shot accuracy of a model on a set, as Scores that carry their interval and their settings.

Attacks run in float32 with random starts that hang on the picture, so a Score does not depend on batch size or device count.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version

import numpy as np
import torch

from hpt_hf.attacks import cross_entropy, frozen, pgd
from hpt_hf.data import Collate
from hpt_hf.search import ATTACKS, STANDARD, even_steps, in_turn
from hpt_hf.shapes import Images, Keys, Labels
from hpt_hf.threat import Noise, ThreatModel
from hpt_hf.zero_shot import ZeroShotCLIP, fingerprint


@dataclass(frozen=True)
class EvaluationAttack:
    """An attack by the field's name, in a ball, on pixels of a stated resolution.

    Args:
        threat: the ball.
        name: a row of `hpt_hf.search.ATTACKS`, or `"standard"`: APGD-CE, APGD-T and Square, the worst case of the three.
        steps: gradient steps, or queries of Square; None: each attack's own number (PGD and CW 20, APGD 100, Square 5000).
        resolution: `"input"`: eps counts on the pixels the model reads (FARE's protocol); `"native"`: on the picture's own, which the
            model then resizes (TeCoA's and the paper's protocol).
        seed: of the random starts.
    """

    threat: ThreatModel
    name: str = "pgd"
    steps: int | None = None
    resolution: str = "input"
    seed: int = 0

    def __post_init__(self) -> None:
        known = (*ATTACKS, "standard")
        if self.name not in known:
            near = difflib.get_close_matches(self.name, known, n=2)
            raise ValueError(
                f"no attack is called {self.name!r}"
                + (f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(known)}")
            )
        if self.resolution not in ("input", "native"):
            raise ValueError(
                f"resolution={self.resolution!r}: expected 'input' (the model's size) or 'native' (the picture's own)"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps}: expected at least 1")

    @property
    def parts(self) -> tuple[str, ...]:
        """The attacks it consists of, in the order in which they run."""
        return STANDARD if self.name == "standard" else (self.name,)

    def notes(self, classes: int) -> tuple[str, ...]:
        """What a reader must know of this attack on so many classes."""
        if "apgd-t" in self.parts and classes < 4:
            return (
                f"apgd-t: the DLR loss needs four classes and there are {classes}; the plain difference of logits took its place",
            )
        return ()

    def breaks(self, model: ZeroShotCLIP, images: Images, keys: Keys, labels: Labels) -> tuple[Images, torch.Tensor]:
        """(perturbed images, which of them are answered wrongly): a picture is lost at the first query that is."""

        def part(name):
            attack, steps = ATTACKS[name]
            return lambda x, rows, noise: attack(logits_fn, x, labels[rows], self.threat, self.steps or steps, noise)

        def logits_fn(x):
            return model.classify(x).logits

        with frozen(model):
            return in_turn([part(name) for name in self.parts], images, Noise(keys, self.seed))

    def craft(self, model: ZeroShotCLIP, images: Images, keys: Keys, labels: Labels) -> Images:
        """The last iterates of PGD on the cross-entropy, whatever the name: for showing, and for transfer to other models.

        What stops at its first success is as weak as its source allows, so transfer needs the whole length.
        """
        steps = self.steps or ATTACKS["pgd"][1]
        with frozen(model):
            return pgd(
                lambda perturbed: cross_entropy(model.classify(perturbed).logits, labels),
                images,
                self.threat,
                steps=steps,
                step_size=even_steps(steps, self.threat).step_size,
                noise=Noise(keys, self.seed),
            )

    def __str__(self) -> str:
        """`pgd-20`, `apgd-ce-100`, `standard`: the name, with the number of steps where it is one."""
        steps = self.steps or (None if self.name == "standard" else ATTACKS[self.name][1])
        return self.name if steps is None else f"{self.name}-{steps}"


@dataclass(frozen=True)
class Score:
    """Accuracies of one model on one set under one attack, in percent, with all that is needed to measure them again."""

    model: str
    fingerprint: str
    dataset: str
    classes: int
    templates: tuple[str, ...]
    n: int
    rows: str  # digest of the pictures, in order
    attack: str
    norm: str
    eps: str
    protocol: str
    seed: int
    clean: float
    robust: float
    clean_interval: tuple[float, float]
    interval: tuple[float, float]
    notes: tuple[str, ...] = ()
    robust_is: str = "right on the clean picture and on every iterate of the attack"
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""

    def to_json(self) -> dict:
        return asdict(self)


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a proportion, in percent (Wilson 1927): honest near 0 and 100, where n p (1 - p) is not."""
    if n == 0:
        return (0.0, 100.0)
    p = right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (round(100 * max(0.0, centre - half), 2), round(100 * min(1.0, centre + half), 2))


def sample(size: int, limit: int | None) -> list[int]:
    """Which pictures `limit` keeps: a fixed random sample, in order. Many sets are sorted by class, so the first so many would not do."""
    if limit is None or limit >= size:
        return list(range(size))
    return sorted(np.random.default_rng(0).permutation(size)[:limit].tolist())


def batches(pictures, collate: Collate, batch_size: int, limit: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
    """The set in order, in batches; at native resolution a batch ends where the picture size changes."""
    rows: list[dict] = []
    for index in sample(len(pictures), limit):
        row = pictures[index]
        if rows and (len(rows) == batch_size or (collate.native and row["image"].size != rows[0]["image"].size)):
            yield collate(rows)
            rows = []
        rows.append(row)
    if rows:
        yield collate(rows)


@dataclass(frozen=True)
class Answers:
    """Per picture, in the order of the set: was the model right, and a digest of what it was asked."""

    clean: torch.Tensor
    robust: torch.Tensor
    rows: str
    seconds: float


@torch.no_grad()
def answer(
    model: ZeroShotCLIP, pictures, attack: EvaluationAttack, *, batch_size: int = 128, limit: int | None = None
) -> Answers:
    """Run clean and attacked predictions. Pictures already wrong are not attacked: they cannot become right."""
    start = time.time()
    collate = Collate(model.processor, native=attack.resolution == "native")
    device = model.logit_scale.device
    clean, robust, keys = [], [], []
    for batch in batches(pictures, collate, batch_size, limit):
        keys.append(batch["keys"])
        batch = {k: v.to(device) for k, v in batch.items()}
        right = model.classify(batch["images"]).logits.argmax(1) == batch["labels"]
        after = right.clone()
        if right.any():
            target = {k: v[right] for k, v in batch.items()}
            perturbed, broken = attack.breaks(model, target["images"], target["keys"], target["labels"])
            assert attack.threat.contains(perturbed, target["images"]).all(), (
                "the attack left its ball: this is a defect of hpt_hf, please report it"
            )
            after[right] = ~broken
        clean.append(right.cpu())
        robust.append(after.cpu())
    digest = fingerprint_rows(torch.cat(keys))
    return Answers(torch.cat(clean), torch.cat(robust), digest, time.time() - start)


def fingerprint_rows(keys: Keys) -> str:
    """A digest of pictures in order, from their keys."""
    return hashlib.sha256(keys.numpy().tobytes()).hexdigest()[:16]


def evaluate(
    model: ZeroShotCLIP,
    pictures,
    attack: EvaluationAttack,
    *,
    name: str,
    batch_size: int = 128,
    limit: int | None = None,
) -> Score:
    """Clean and robust accuracy of `model`, whose classes are set to the picture set's first.

    Args:
        pictures: `hpt_hf.data.LabelledPictures`.
        name: what the Score calls the model.
        limit: a fixed random sample of so many pictures (`sample`); the recorded digest says which.

    Raises:
        ValueError: the set has no labels.
    """
    if not pictures.labelled:
        raise ValueError(f"{pictures.name} has no labels: accuracy cannot be measured on it")
    model.eval()
    model.set_classes(pictures.classes, pictures.templates)
    answers = answer(model, pictures, attack, batch_size=batch_size, limit=limit)
    n, clean, robust = len(answers.clean), int(answers.clean.sum()), int(answers.robust.sum())
    return Score(
        model=name,
        fingerprint=fingerprint(model),
        dataset=pictures.name,
        classes=len(pictures.classes),
        templates=tuple(pictures.templates),
        n=n,
        rows=answers.rows,
        attack=str(attack),
        norm=attack.threat.norm,
        eps=str(attack.threat.eps),
        protocol=attack.resolution,
        seed=attack.seed,
        clean=round(100 * clean / n, 2),
        robust=round(100 * robust / n, 2),
        clean_interval=wilson(clean, n),
        interval=wilson(robust, n),
        notes=attack.notes(len(pictures.classes)),
        seconds=round(answers.seconds, 2),
        versions=versions(),
        hardware=hardware(),
    )


@torch.no_grad()
def transfer(
    source: ZeroShotCLIP,
    target: ZeroShotCLIP,
    pictures,
    attack: EvaluationAttack,
    *,
    batch_size: int = 128,
    limit: int | None = None,
) -> dict[str, float]:
    """Accuracy of `target` on clean pictures and on those crafted on `source`, in percent: proxy adversarial robustness (arXiv 2601.12865).

    Also `kl`, the mean KL( p_target(x_adv) || p_target(x) ) in nats: near 0, HPT and GA are the same objective.
    """
    for model in (source, target):
        model.eval()
        model.set_classes(pictures.classes, pictures.templates)
    collate = Collate(source.processor, native=attack.resolution == "native")
    device = source.logit_scale.device
    n, clean, adversarial, kl = 0, 0, 0, 0.0
    for batch in batches(pictures, collate, batch_size, limit):
        batch = {k: v.to(device) for k, v in batch.items()}
        perturbed = attack.craft(source, batch["images"], batch["keys"], batch["labels"])
        before, after = target.classify(batch["images"]).logits, target.classify(perturbed).logits
        n += len(before)
        clean += int((before.argmax(1) == batch["labels"]).sum())
        adversarial += int((after.argmax(1) == batch["labels"]).sum())
        log_after = after.log_softmax(1)
        kl += float((log_after.exp() * (log_after - before.log_softmax(1))).sum())
    return {"clean": 100 * clean / n, "adversarial": 100 * adversarial / n, "kl": kl / n, "n": n}


def mean_transfer(
    source: ZeroShotCLIP, target: ZeroShotCLIP, sets: Sequence, attack: EvaluationAttack, **kwargs
) -> dict[str, float]:
    """`transfer`, as unweighted means over data sets."""
    crossed = [transfer(source, target, pictures, attack, **kwargs) for pictures in sets]
    return {key: sum(c[key] for c in crossed) / len(crossed) for key in ("clean", "adversarial", "kl")}


def mean(scores: Sequence[Score]) -> dict[str, float]:
    """Unweighted means over data sets, in percent."""
    return {"clean": sum(s.clean for s in scores) / len(scores), "robust": sum(s.robust for s in scores) / len(scores)}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "datasets", "accelerate", "Pillow", "hpt_hf")}


def hardware() -> str:
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    return device
