"""Proves that every check raises on what is broken in its way (model, attack, experiment) and lets honesty pass."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, largest_difference, make_images, make_result, relabelled, weights

from hpt_hf.attacks.suite import ATTACKS, EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.evaluation import evaluator as evaluation
from hpt_hf.evaluation import sanity_checks as checks
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.result import EvalResult
from hpt_hf.evaluation.sanity_checks import CHECKS, FEW_CLASSES, FEW_IMAGES, Probe, Seen, run_check
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.types import ZeroShotOutput

NAMES = [check.__name__ for check in CHECKS]
EPS = 18 / 255  # where PGD, APGD-CE, APGD-T and Square agree that two fifths of what the trained model knows withstand
NOT_RUN = None


def attack(name="pgd", steps=None, eps=EPS, kind=EvaluationAttack, norm="linf", **changes) -> EvaluationAttack:
    return kind(ThreatModel(norm, eps), name, steps, **changes)


def look(model, *names, images=None, chosen=None, **changes) -> dict[str, dict]:
    """Name -> what the check of that name says in a result; all of them, or those named only, which is quicker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "CHECKS", tuple(c for c in CHECKS if not names or c.__name__ in names))
        result = evaluate(model, images or make_images(50), chosen or attack(), name="m", **{"probe": 12} | changes)
    return {c["name"]: c for c in result.sanity_checks}


def raised(*args, **changes) -> set[str]:
    return {name for name, check in look(*args, **changes).items() if check["raised"]}


def remade(model, kind) -> ZeroShotClassifier:
    """A classifier of another class with the same weights."""
    return kind(copy.deepcopy(model.model), model.processor).eval()


@pytest.fixture(scope="module")
def undefended(student_path):
    """The model before its training: it knows a few images, and loses them at the first step."""
    return ZeroShotClassifier.from_pretrained(student_path)


@pytest.fixture(scope="module")
def honest(trained, undefended) -> EvalResult:
    return evaluate(trained, make_images(50), attack(), name="m", probe=12, baseline=undefended)


def broken(sees=lambda images: images, says=lambda logits: logits, within=contextlib.nullcontext):
    """A model that sees something else than it is shown, says something else than it thinks, or thinks otherwise."""

    class Broken(ZeroShotClassifier):
        def classify(self, images):
            with within():
                found = super().classify(sees(images))
            return ZeroShotOutput(logits=says(found.logits), embeds=found.embeds)

    return Broken


def straight_through(x):
    return x + ((x * 15).round() / 15 - x).detach()


def through_bytes(x):
    return torch.from_numpy((x.detach().numpy() * 255).round().astype(np.uint8).astype(np.float32) / 255)


class QuantisedAfterResizing(ZeroShotClassifier):
    def resize_and_crop(self, images):
        return straight_through(super().resize_and_crop(images))


class HalfFeatures(ZeroShotClassifier):
    """Features in half precision look like float32 under a float32 head: only their steps give them away."""

    def classify(self, images):
        embeds = super().classify(images).embeds.bfloat16().float()
        logits = self.family.scale(self.model) * F.normalize(embeds, dim=-1) @ self.head.T
        return ZeroShotOutput(logits=logits, embeds=embeds)


# what is broken -> (the model, the check that must see it; others may too).
MODELS = {
    "16 levels, straight through": (broken(straight_through), "quantised"),
    "16 levels after resizing": (QuantisedAfterResizing, "quantised"),
    "features in half precision": (HalfFeatures, "quantised"),
    "noise on the image": (broken(lambda x: x + 0.1 * torch.randn_like(x)), "stochastic"),
    "mean of the batch off the logits": (broken(says=lambda logits: logits - logits.mean(0)), "batch_size"),
    "detached": (broken(torch.detach), "detached"),
    "round trip through bytes": (broken(through_bytes), "detached"),
    "logits a thousandfold": (broken(says=lambda logits: 1e3 * logits), "zero_gradient"),
    "steep sigmoid on the pixels": (broken(lambda x: (400 * (x - 0.5)).sigmoid()), "zero_gradient"),
    "autocast to bfloat16 inside": (broken(within=lambda: torch.autocast("cpu", torch.bfloat16)), "half_precision"),
    "logits in bfloat16": (broken(says=lambda logits: logits.bfloat16().float()), "half_precision"),
    "logits in float16": (broken(says=lambda logits: logits.half().float()), "half_precision"),
    "the margin works, the cross-entropy does not": (broken(says=lambda logits: 1e4 * logits), "other_loss"),
    "gradient of the wrong sign": (broken(lambda x: 2 * x.detach() - x), "large_ball"),
    "no gradient for the search without one": (broken(torch.detach), "black_box"),
}


@pytest.mark.parametrize("fault", MODELS)
def test_a_broken_model_raises_its_check_and_the_honest_one_does_not(fault, trained, honest):
    kind, name = MODELS[fault]
    assert raised(remade(trained, kind), name) == {name}
    assert {c["name"]: c["raised"] for c in honest.sanity_checks}[name] is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_and_autocast_around_are_seen(dtype, trained):
    seen = look(remade(trained, ZeroShotClassifier).to(dtype), "half_precision")["half_precision"]
    assert seen["raised"] and f"weights in {dtype}" in seen["detail"]
    with torch.autocast("cpu", dtype):
        seen = look(trained, "half_precision", chosen=attack(steps=3))["half_precision"]
    assert seen["raised"] and f"autocast in {dtype}" in seen["detail"]


def test_where_square_ran_as_part_of_the_attack_it_need_not_run_again(trained, monkeypatch):
    """`standard` ends with Square, so the check counts what it broke after two attacks that follow gradients."""
    chosen, images = attack("standard", 60, eps=48 / 255), make_images(20)
    assert look(trained, "black_box", chosen=attack("square", 2), images=images)["black_box"]["raised"] is NOT_RUN
    for white_box in ("apgd-ce", "apgd-t"):
        passed = look(trained, "black_box", chosen=chosen, images=images)["black_box"]
        assert passed["raised"] is False and "Square broke 0.0 points" in passed["detail"]
        monkeypatch.setitem(ATTACKS, white_box, (idle, 1))
    assert look(trained, "black_box", chosen=chosen, images=images)["black_box"]["raised"]


class Short(EvaluationAttack):
    """Uses a thousandth of its ball."""

    def run(self, *given):
        threat = dataclasses.replace(self.threat, eps=self.threat.radius / 1000)
        return EvaluationAttack.run(dataclasses.replace(self, threat=threat), *given)


def idle(logits_fn, images, labels, threat, steps, noise):
    return images.clone(), torch.zeros(len(images), dtype=torch.bool)


def test_an_attack_that_stops_short_is_found_by_every_stronger_one(trained):
    stronger = {"more_steps", "other_loss", "black_box"}
    assert raised(trained, *stronger, chosen=attack(eps=48 / 255, kind=Short)) == stronger


def test_what_a_stronger_attack_breaks_is_weighed_by_how_far_the_figure_would_fall():
    """Three of 24 robust images are much of a high figure and little of a low one; one image alone is chance."""
    for robust, count, n, points, raises in (
        (50.0, 2, 24, 4.2, False),
        (50.0, 3, 24, 6.2, True),
        (40.0, 3, 24, 5.0, True),
        (90.0, 1, 9, 10.0, False),
    ):
        probe = Probe(None, attack(), make_result(clean=100.0, robust=robust), {}, {})
        parts = iter((torch.arange(n) < count).split(5))  # of images of several sizes, added up
        found, detail = run_check(lambda _, parts=parts: Seen(next(parts), "fall", None), [probe] * math.ceil(n / 5))
        assert found is raises and f"{count} of {n} robust images fall" in detail and f"{points:.1f} points" in detail


def wrong(images: LabelledImages) -> LabelledImages:
    """Every label is false."""
    return relabelled(images, [(label + 1) % 5 for label in images.labels])


def even(n: int, classes: int, *more: int) -> dict:
    """So many images of each class, of which so many are right and robust."""
    return {f"class {i}": (n, *more) for i in range(classes)}


def test_few_images_few_classes_and_a_collapse_are_told_from_the_counts():
    for check, per_class, raises in (
        (checks.few_images, even(20, FEW_CLASSES - 1, 9, 5), True),
        (checks.few_images, even(20, FEW_CLASSES, 9, 5), False),
        (checks.few_images, even(1, FEW_IMAGES - 1, 1, 1), True),
        (checks.few_images, even(1, FEW_IMAGES, 1, 1), False),
        (checks.collapsed, even(20, 4, 0, 0) | {"class 0": (20, 20, 20)}, True),
        (checks.collapsed, even(20, 4, 5, 1), True),
        (checks.collapsed, even(20, 4, 14, 1), False),
    ):
        assert check(Probe(None, attack(), make_result(per_class=per_class), {}, {}))[0] is raises, per_class


def test_a_baseline_that_withstands_the_attack_is_told_and_without_one_nobody_knows(trained, undefended):
    def seen(**changes):
        return look(trained, "baseline", **changes)["baseline"]["raised"]

    assert seen(baseline=undefended) is False
    assert seen(baseline=trained, chosen=attack(eps=1 / 255)) and seen(baseline=trained, chosen=attack(kind=Short))
    assert seen() is NOT_RUN
    assert not seen(baseline=trained, images=wrong(make_images(20))), "it knows none that it could withstand"
    masked = remade(trained, broken(torch.detach))
    assert raised(masked, "baseline", baseline=undefended) == set(), "not the evaluated model is asked"
    assert raised(trained, "baseline", baseline=masked) == {"baseline"}


def test_an_honest_evaluation_is_clear_and_every_check_has_its_say_and_changes_nothing(trained, undefended, honest):
    standard = evaluate(trained, make_images(50), attack("standard", 30), name="m", probe=12, baseline=undefended)
    for result in (honest, standard):
        assert result.verdict == "clear" and [c["name"] for c in result.sanity_checks] == NAMES
        assert all(c["raised"] is False and c["detail"] for c in result.sanity_checks), result.sanity_checks
        assert 0 < result.robust < result.clean, "with none or all robust, half of the checks have nothing to look at"
    plain = evaluate(trained, make_images(50), attack(), name="m", probe=0)
    assert dataclasses.replace(honest, sanity_checks=(), seconds=plain.seconds) == plain
    assert (plain.verdict, plain.sanity_checks) == ("unchecked", ())


def resized(*sizes, count: int = 12) -> LabelledImages:
    even = make_images(count)
    images = [even[i]["image"].resize(sizes[i // 2 % len(sizes)]) for i in range(count)]
    return LabelledImages.from_images(images, even.labels, CLASSES, name="sizes")


TWO = make_images(50).select([i for i in range(50) if i % 5 < 2])
EDGES = {
    "none right": (wrong(make_images(6)), attack()),
    "none robust": (make_images(6), attack(eps=0.5)),
    "all robust": (make_images(20), attack(eps=0)),
    "one image": (make_images(1), attack()),
    "two classes, all attacks": (relabelled(TWO, TWO.labels, CLASSES[:2]), attack("standard", 3)),
    "native sizes": (resized((32, 32), (48, 40)), attack(protocol="native")),
    "native and elongated": (resized((100, 40)), attack(protocol="native", eps=40 / 255)),
    "l2": (make_images(10), attack("standard", 10, norm="l2", eps=4)),
    "towards a class, with APGD": (make_images(10), attack("apgd-ce", 10, target="dog", eps=0.4)),
}


@pytest.mark.parametrize("edge", EDGES)
def test_at_the_edges_an_honest_model_raises_only_what_is_true(edge, trained, undefended):
    images, chosen = EDGES[edge]
    found = look(trained, images=images, chosen=chosen, baseline=undefended, probe=10)
    true = {"few_images": True, "collapsed": "none right" in edge, "baseline": edge == "all robust"}
    names = [name for name, check in found.items() if check["raised"]]
    assert list(found) == NAMES and names == [name for name in true if true[name]], found


def test_at_native_sizes_the_checks_add_up_what_they_see_and_fewer_than_eight_images_prove_nothing(trained):
    images = resized((40, 40), (48, 40), (40, 64), (56, 56), (40, 48), count=40)
    weak = attack(eps=48 / 255, kind=Short, protocol="native")
    found = look(trained, "more_steps", images=images, chosen=weak, probe=24)["more_steps"]
    assert found["raised"] and " of 24 robust images" in found["detail"]
    few = look(trained, "more_steps", "stochastic", images=make_images(5), chosen=weak)
    assert all(check["raised"] is None and "expected at least 8" in check["detail"] for check in few.values())


def test_what_stands_towards_a_target_need_not_withstand_every_other_attack(trained):
    """'Never taken for a cat' is all that such a result claims: another answer, easily had, is no fault of it."""
    chosen, images = attack(target="cat"), make_images(40)
    targeted, any_wrong = (evaluate(trained, images, a, name="m", probe=0) for a in (chosen, attack()))
    assert targeted.robust > any_wrong.robust
    assert not raised(trained, "more_steps", "other_loss", "black_box", images=images, chosen=chosen)
    stronger, short = {"more_steps", "other_loss"}, attack(target="cat", eps=48 / 255, kind=Short)
    assert raised(trained, *stronger, images=images, chosen=short) == stronger


def test_the_checks_leave_no_trace(trained):
    model = remade(trained, ZeroShotClassifier).freeze_text().train()
    chance, numpy_chance = torch.get_rng_state(), np.random.get_state()[1].copy()
    before, asked = weights(model), [p.requires_grad for p in model.parameters()]
    assert list(look(model, baseline=trained, probe=4, images=make_images(10))) == NAMES
    assert torch.equal(torch.get_rng_state(), chance) and np.array_equal(np.random.get_state()[1], numpy_chance)
    assert [p.requires_grad for p in model.parameters()] == asked and len(set(asked)) == 2
    assert all(p.grad is None for one in (model, trained) for p in one.parameters())
    assert not largest_difference(weights(model), before) and not any(m.training for m in model.modules())
    assert not torch.nn.modules.module._global_forward_hooks


def test_every_check_has_its_paragraph_and_no_paragraph_speaks_of_another():
    text = (Path(__file__).parent.parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    paragraphs = {part.splitlines()[0]: " ".join(part.splitlines()[1:]) for part in text.split("\n### ")[1:]}
    assert list(paragraphs) == NAMES
    assert all("Raised " in p and len(p) > 100 for p in paragraphs.values())
