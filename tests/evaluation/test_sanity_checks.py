"""Proves that every check raises on a model, an attack or an experiment broken in its way, and lets honest ones pass."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, make_images, relabelled, weights, write_image_folder

from hpt_hf.attacks.suite import ATTACKS, EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands import evaluate as recipe
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.evaluation import evaluator as evaluation
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.result import VERDICTS, EvalResult
from hpt_hf.evaluation.sanity_checks import CHECKS, FEW_CLASSES, FEW_SAMPLES, Batch, Check, Probe
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.types import ZeroShotOutput

NAMES = [check.__name__ for check in CHECKS]
EPS = 18 / 255  # where PGD, APGD-CE, APGD-T and Square agree that two fifths of what the trained model knows withstand
NOT_RUN = None


def attack(name="pgd", steps=None, eps=EPS, kind=EvaluationAttack, norm="linf", **changes) -> EvaluationAttack:
    return kind(ThreatModel(norm, eps), name, steps, **changes)


def look(model, *names, pictures=None, chosen=None, **changes) -> dict[str, Check]:
    """Name -> what the check of that name says in a EvalResult; all of them, or those named only, which is quicker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "CHECKS", tuple(c for c in CHECKS if not names or c.__name__ in names))
        changes = {"probe": 12, "limit": None, **changes}
        score = evaluate(model, pictures or make_images(50), chosen or attack(), name="m", **changes)
    assert score.suspicions == tuple(c for c in score.checks if c["raised"])
    return {c["name"]: Check(**c) for c in score.checks}


def raised(*args, **changes) -> set[str]:
    return {name for name, check in look(*args, **changes).items() if check.raised}


def remade(model, kind) -> ZeroShotClassifier:
    """A model of another class with the same weights."""
    return kind(copy.deepcopy(model.model), model.processor).eval()


@pytest.fixture(scope="module")
def undefended(student_path):
    """The model before its training: it knows a few pictures, and loses them at the first step."""
    return ZeroShotClassifier.from_pretrained(student_path)


@pytest.fixture(scope="module")
def honest(trained, undefended):
    """What all checks say of the trained model."""
    return look(trained, baseline=undefended)


# --- broken models ----------------------------------------------------------------------------------------------------------


def seeing(change):
    """A model that sees something else than it is shown."""

    class Broken(ZeroShotClassifier):
        def classify(self, images):
            return super().classify(change(images))

    return Broken


def saying(change):
    """A model that says something else than it thinks."""

    class Broken(ZeroShotClassifier):
        def classify(self, images):
            found = super().classify(images)
            return ZeroShotOutput(logits=change(found.logits), embeds=found.embeds)

    return Broken


def autocast(dtype):
    class Broken(ZeroShotClassifier):
        def classify(self, images):
            with torch.autocast(images.device.type, dtype):
                return super().classify(images)

    return Broken


def straight_through(change):
    return lambda x: x + (change(x) - x).detach()


def levels(x):
    return (x * 15).round() / 15


def through_bytes(x):
    return torch.from_numpy((x.detach().numpy() * 255).round().astype(np.uint8).astype(np.float32) / 255)


class QuantisedInFit(ZeroShotClassifier):
    def resize_and_crop(self, images):
        return straight_through(levels)(super().resize_and_crop(images))


# what is broken -> (the model, the check that must see it; others may too).
MODELS = {
    "16 levels": (seeing(levels), "quantised"),
    "16 levels, straight through": (seeing(straight_through(levels)), "quantised"),
    "16 levels after resizing": (QuantisedInFit, "quantised"),
    "noise on the picture": (seeing(lambda x: x + 0.1 * torch.randn_like(x)), "stochastic"),
    "dropout left on": (seeing(lambda x: F.dropout(x, 0.05)), "stochastic"),
    "mean of the batch off the logits": (saying(lambda logits: logits - logits.mean(0)), "batch_size"),
    "statistics of the batch": (seeing(lambda x: (x - x.mean(0) + 0.5).clamp(0, 1)), "batch_size"),
    "detached": (seeing(torch.detach), "detached"),
    "round trip through bytes": (seeing(through_bytes), "detached"),
    "logits a thousandfold": (saying(lambda logits: 1e3 * logits), "saturated"),
    "cross-entropy of saturated logits": (saying(lambda logits: 1e4 * logits), "zero_gradient"),
    "steep sigmoid on the pixels": (seeing(lambda x: (400 * (x - 0.5)).sigmoid()), "zero_gradient"),
    "autocast to bfloat16 inside": (autocast(torch.bfloat16), "half_precision"),
    "autocast to float16 inside": (autocast(torch.float16), "half_precision"),
    "logits in bfloat16": (saying(lambda logits: logits.bfloat16().float()), "half_precision"),
    "logits in float16": (saying(lambda logits: logits.half().float()), "half_precision"),
    "the margin works, the cross-entropy does not": (saying(lambda logits: 1e4 * logits), "other_loss"),
    "gradient of the wrong sign": (seeing(lambda x: 2 * x.detach() - x), "large_ball"),
    "a gradient that leads nowhere": (seeing(lambda x: 2 * x.detach() - x), "black_box"),
    "no gradient for the search without one": (seeing(torch.detach), "black_box"),
}


@pytest.mark.parametrize("broken", MODELS)
def test_a_broken_model_raises_its_check_and_the_honest_one_does_not(broken, trained, honest):
    kind, name = MODELS[broken]
    assert raised(remade(trained, kind), name) == {name}
    assert honest[name].raised is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_seen(dtype, trained):
    seen = look(remade(trained, ZeroShotClassifier).to(dtype), "half_precision")["half_precision"]
    assert seen.raised and f"weights in {dtype}" in seen.seen


def test_half_precision_features_under_a_float32_head_are_seen(trained):
    """As values, they look like float32: only that they come in steps gives them away."""

    class Broken(ZeroShotClassifier):
        def classify(self, images):
            embeds = super().classify(images).embeds.bfloat16().float()
            return ZeroShotOutput(
                logits=self.family.scale(self.model) * F.normalize(embeds, dim=-1) @ self.head.T, embeds=embeds
            )

    assert raised(remade(trained, Broken), "half_precision", "quantised") == {"quantised"}


def test_a_checkpoint_with_a_large_logit_scale_is_saturated(trained, tmp_path, capsys):
    """As it comes from disk and through the recipe: the weights alone are at fault."""
    broken = remade(trained, ZeroShotClassifier)
    broken.model.logit_scale.data.fill_(float(np.log(1e4)))
    broken.save_pretrained(tmp_path / "model")
    data = write_image_folder(tmp_path / "data", make_images(10))
    recipe.main(
        [
            "--model",
            str(tmp_path / "model"),
            "--output_dir",
            str(tmp_path / "out"),
            "--dataset",
            data,
            "--eps",
            "24/255",
        ]
    )
    (file,) = (tmp_path / "out" / "scores").glob("*.json")
    names = {s["name"] for s in EvalResult.read(file).suspicions}
    assert {"saturated", "zero_gradient", "few_samples"} <= names
    told = capsys.readouterr().err
    assert "suspicious: " in told and all(name in told for name in names)


def test_where_square_ran_as_part_of_the_attack_it_need_not_run_again(trained, monkeypatch):
    """`standard` ends with Square, so the check counts what it broke after two attacks that follow gradients."""
    chosen, pictures = attack("standard", 60, eps=48 / 255), make_images(20)
    assert look(trained, "black_box", chosen=attack("square", 2), pictures=pictures)["black_box"].raised is NOT_RUN
    for white_box in ("apgd-ce", "apgd-t"):
        honest = look(trained, "black_box", chosen=chosen, pictures=pictures)["black_box"]
        assert honest.raised is False and "Square broke 0.0 points" in honest.seen
        monkeypatch.setitem(ATTACKS, white_box, (idle, 1))
    part = look(trained, "black_box", chosen=chosen, pictures=pictures)["black_box"]
    assert part.raised and part.seen.startswith("Square broke ")


def test_a_gradient_that_saturates_one_loss_only_is_not_called_detached(trained):
    """The logits' own gradient is there, so the two checks name two causes."""
    model = remade(trained, saying(lambda logits: 1e4 * logits))
    assert raised(model, "detached", "zero_gradient", "saturated") == {"zero_gradient", "saturated"}


# --- broken attacks ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Idle(EvaluationAttack):
    """Leaves every picture as it is."""

    def run(self, model, images, keys, labels):
        return images.clone(), torch.full_like(labels, -1)


@dataclasses.dataclass(frozen=True)
class Short(EvaluationAttack):
    """One step of a thousandth of the radius, and only its end counts."""

    def run(self, model, images, keys, labels):
        with torch.enable_grad():
            x = images.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(model.classify(x).logits, labels), x)
        x = self.threat.project(images + self.threat.radius / 1000 * gradient.sign(), images)
        return x, torch.where(model.classify(x).logits.argmax(1) == labels, -1, 0)


@dataclasses.dataclass(frozen=True)
class Outside(EvaluationAttack):
    """Allows itself a hair more than the ball."""

    def run(self, model, images, keys, labels):
        wider = dataclasses.replace(self, threat=ThreatModel(self.threat.norm, self.threat.radius * 1.01))
        return EvaluationAttack.run(wider, model, images, keys, labels)


def idle(logits_fn, images, labels, threat, steps, noise):
    return images.clone(), torch.zeros(len(images), dtype=torch.bool)


@pytest.mark.parametrize("kind", [Idle, Short])
def test_an_attack_that_stops_short_is_found_by_every_stronger_one(kind, trained, honest):
    stronger = ("more_steps", "restarts", "other_loss", "smaller_ball", "black_box")
    eps = 48 / 255  # half of it breaks most
    found = look(trained, *stronger, chosen=attack(eps=eps, kind=kind))
    assert {name for name in stronger if found[name].raised} == set(stronger)
    assert not raised(trained, *stronger, chosen=attack(eps=eps)) and not any(honest[name].raised for name in stronger)


@pytest.mark.parametrize("row", ["apgd-ce", "apgd-t"])
def test_a_stronger_attack_that_leaves_more_is_broken(row, trained, honest, monkeypatch):
    monkeypatch.setitem(ATTACKS, row, (idle, 1))
    found = look(trained, "attack_order")["attack_order"]
    assert found.raised and f"12 after {row.upper()}" in found.seen
    assert honest["attack_order"].raised is False


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_that_leaves_the_ball_is_told(norm, trained, honest):
    eps = EPS if norm == "linf" else 4
    seen = look(trained, "outside_ball", chosen=attack(norm=norm, eps=eps, kind=Outside))["outside_ball"]
    assert seen.raised and seen.seen.endswith("of 50 perturbed pictures left the ball or [0, 1]")
    assert raised(trained, "outside_ball", chosen=attack(norm=norm, eps=eps)) == set()
    assert honest["outside_ball"].raised is False


# --- broken experiments -----------------------------------------------------------------------------------------------------


def first_classes(count: int, pictures: int = 20) -> LabelledImages:
    """A set of the first `count` classes only."""
    whole = make_images(pictures)
    kept = [i for i in range(pictures) if whole[i]["label"] < count]
    few = whole.select(kept)
    return relabelled(few, few.labels, CLASSES[:count], name="few")


def wrong(pictures: LabelledImages) -> LabelledImages:
    """Every label is false."""
    return relabelled(pictures, [(y + 1) % 5 for y in pictures.labels], name="wrong")


def test_few_classes_and_few_pictures_are_told_at_their_number(trained):
    classes = {n: raised(trained, "few_classes", pictures=first_classes(n)) for n in (2, 3, 4, 5)}
    assert classes == {n: {"few_classes"} if n < FEW_CLASSES else set() for n in classes}
    limits = {n: raised(trained, "few_samples", limit=n) for n in (1, FEW_SAMPLES - 1, FEW_SAMPLES)}
    assert limits == {1: {"few_samples"}, FEW_SAMPLES - 1: {"few_samples"}, FEW_SAMPLES: set()}


def test_a_baseline_that_withstands_the_attack_is_told_and_without_one_nobody_knows(trained, undefended):
    def seen(**changes):
        return look(trained, "baseline", **changes)["baseline"]

    assert seen(baseline=undefended).raised is False
    assert (
        seen(baseline=trained, chosen=attack(eps=1 / 255)).raised
        and seen(baseline=trained, chosen=attack(kind=Idle)).raised
    )
    assert seen().raised is NOT_RUN and "no undefended model was given" in seen().seen
    assert seen(baseline=trained, pictures=wrong(make_images(20))).raised is not True, (
        "it knows none that it could withstand"
    )


def test_the_baseline_is_asked_and_not_the_model(trained, undefended):
    """A defended model that stands and an undefended one that falls is what an evaluation hopes for."""
    masked = remade(trained, seeing(torch.detach))
    assert raised(masked, "baseline", baseline=undefended) == set()
    assert raised(trained, "baseline", baseline=masked) == {"baseline"}


def hand_made(model, **changes) -> Probe:
    empty = Batch(torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    settings = {
        "model": model,
        "logits_fn": lambda x: model.classify(x).logits,
        "standing": empty,
        "right": empty,
        "threat": ThreatModel(),
        "seed": 0,
        "clean": 50.0,
        "robust": 40.0,
        "n": 100,
        "classes": 5,
        "outside": 0,
        "broken_by": {},
    }
    return Probe(**(settings | changes))


def test_robust_above_clean_is_told(trained):
    """No road leads there, since wrong pictures are not attacked; a change of that must not pass in silence."""
    check = next(c for c in CHECKS if c.__name__ == "robust_above_clean")
    assert [check(hand_made(trained, robust=r)).raised for r in (40.0, 50.0, 50.01)] == [False, False, True]


@pytest.mark.parametrize(
    ("robust", "count", "n", "points", "raises"),
    [(50.0, 2, 24, 4.2, False), (50.0, 3, 24, 6.2, True), (40.0, 3, 24, 5.0, True), (90.0, 1, 9, 10.0, False)],
)
def test_what_a_stronger_attack_breaks_is_weighed_by_how_far_the_figure_would_fall(
    robust, count, n, points, raises, trained
):
    """Three of 24 standing pictures are much of a high figure and little of a low one; one picture alone is chance."""
    standing = Batch(torch.zeros(n, 3, 32, 32), torch.arange(n), torch.zeros(n, dtype=torch.long))
    seen = hand_made(trained, robust=robust, standing=standing).stronger("more_steps", torch.arange(n) < count, "fall")
    assert (
        seen.raised is raises
        and f"{count} of {n} standing pictures fall" in seen.seen
        and f"{points:.1f} points" in seen.seen
    )


# --- the verdict ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pgd", "standard"])
def test_an_honest_evaluation_is_clear_and_every_check_has_its_say(name, trained, undefended):
    steps = None if name == "pgd" else 30  # Square alone would take its 5000 queries
    score = evaluate(trained, make_images(60), attack(name, steps), name="m", baseline=undefended)
    assert (score.verdict, score.suspicions) == ("clear", ())
    assert [c["name"] for c in score.checks] == NAMES and len(set(NAMES)) == 19
    assert {c["raised"] for c in score.checks} == {False} and all(c["seen"] for c in score.checks)
    assert 0 < score.robust < score.clean, "with none or all standing, half of the checks have nothing to look at"


def test_the_verdict_follows_the_checks(trained):
    """Unchecked is not clear, a check that was not run raises nothing, and what is raised stands in the EvalResult in full."""
    verdicts = [
        evaluate(trained, make_images(n), attack("pgd", 3), name="m", probe=p)
        for n, p in ((50, 0), (50, 6), (20, 6), (20, 0))
    ]
    assert [s.verdict for s in verdicts] == ["unchecked", "clear", "suspicious", "unchecked"]
    assert {s.verdict for s in verdicts} == set(VERDICTS)
    assert verdicts[0].checks == verdicts[0].suspicions == ()
    (few,) = verdicts[2].suspicions
    assert few["name"] == "few_samples" and few in verdicts[2].checks
    assert [c["name"] for c in verdicts[1].checks] == NAMES
    assert {c["name"] for c in verdicts[1].checks if c["raised"] is NOT_RUN} == {"baseline"}
    accuracies = {(s.n, s.clean, s.robust, tuple(s.interval)) for s in verdicts}
    assert len(accuracies) == 2, "the checks look and change nothing"


# --- edges ------------------------------------------------------------------------------------------------------------------


def resized(*sizes, count: int = 12) -> LabelledImages:
    even = make_images(count)
    images = [even[i]["image"].resize(sizes[i // 2 % len(sizes)]) for i in range(count)]
    return LabelledImages.from_images(images, even.labels, CLASSES, name="sizes")


SMALL = {"few_samples"}
EDGES = {
    "none right": (wrong(make_images(6)), attack(), SMALL),
    "none standing": (make_images(6), attack(eps=0.5), SMALL),
    "all standing": (make_images(6), attack(eps=0), SMALL | {"baseline"}),
    "one picture": (make_images(1), attack(), SMALL),
    "two classes": (first_classes(2), attack(), SMALL | {"few_classes"}),
    "two classes, all attacks": (first_classes(2, 10), attack("standard", 3), SMALL | {"few_classes"}),
    "native sizes": (resized((32, 32), (48, 40), (40, 64)), attack(protocol="native"), SMALL),
    "native and elongated": (resized((100, 40)), attack(protocol="native", eps=40 / 255), SMALL),
    "native, none right": (wrong(resized((48, 40), (32, 32))), attack(protocol="native"), SMALL),
    "l2": (make_images(10), attack("standard", 10, norm="l2", eps=4), SMALL),
    "l2, none right": (wrong(make_images(6)), attack(norm="l2", eps=4), SMALL),
    "towards a class": (make_images(20), attack(target="cat", eps=28 / 255), SMALL),
    "towards a class, with APGD": (make_images(10), attack("apgd-ce", 10, target="dog", eps=0.4), SMALL),
}


@pytest.mark.parametrize("edge", EDGES)
def test_at_the_edges_an_honest_model_raises_only_what_is_true(edge, trained, undefended):
    pictures, chosen, expected = EDGES[edge]
    found = look(trained, pictures=pictures, chosen=chosen, baseline=undefended, probe=6)
    names = {name for name, check in found.items() if check.raised}
    assert list(found) == NAMES
    assert names == expected, {n: found[n].seen for n in names ^ expected}


def test_what_stands_towards_a_target_need_not_withstand_every_other_attack(trained):
    """'Never taken for a cat' is all that such a EvalResult claims; that another answer is easily had is no fault of it."""
    chosen = attack(target="cat")
    pictures = make_images(60)
    assert (
        evaluate(trained, pictures, chosen, name="m", probe=0).robust
        > evaluate(trained, pictures, attack(), name="m").robust
    )
    order = look(
        trained,
        "more_steps",
        "restarts",
        "other_loss",
        "smaller_ball",
        "attack_order",
        pictures=pictures,
        chosen=chosen,
    )
    assert not any(check.raised for check in order.values()) and "APGD-T" not in order["attack_order"].seen
    idle_one = attack(target="cat", eps=48 / 255, kind=Idle)
    assert raised(trained, "more_steps", "smaller_ball", pictures=pictures, chosen=idle_one) == {
        "more_steps",
        "smaller_ball",
    }


# --- no trace ---------------------------------------------------------------------------------------------------------------


def test_the_checks_leave_no_trace(trained):
    model = remade(trained, ZeroShotClassifier).freeze_text()
    torch.manual_seed(1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    before, asked = weights(model), [p.requires_grad for p in model.parameters()]
    found = look(model, baseline=trained, probe=4, pictures=make_images(10))
    assert list(found) == NAMES
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)
    assert [p.requires_grad for p in model.parameters()] == asked and len(set(asked)) == 2
    assert all(p.grad is None for one in (model, trained) for p in one.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert (
        not any(m.training or m._forward_hooks for m in model.modules())
        and not torch.nn.modules.module._global_forward_hooks
    )
    assert (
        torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    )


def test_a_check_that_fails_leaves_no_trace_either(trained):
    """A model that gives up in the midst of a check: weights ask for gradients again, and no hook stays."""
    asked = [p.requires_grad for p in trained.parameters()]

    def gives_up(x):
        if x.requires_grad:
            raise RuntimeError("no gradients here")
        return x

    model = remade(trained, seeing(gives_up))
    with pytest.raises(RuntimeError, match="no gradients here"):
        look(model, "half_precision", "detached", chosen=attack(kind=Idle))
    assert [p.requires_grad for p in model.parameters()] == asked and not torch.nn.modules.module._global_forward_hooks
    assert [p.requires_grad for p in trained.parameters()] == asked and torch.is_grad_enabled()


# --- the field's faults -------------------------------------------------------------------------------------------------------


def stable(score: EvalResult) -> tuple:
    return score.n, score.clean, score.robust, score.rows, score.parts, score.per_class


def fault_1_attack_inside_autocast(model, patch):
    """Inside somebody's autocast the figure is the same, or the EvalResult says that it was."""
    plain = evaluate(model, make_images(20), attack("pgd", 3), name="m", probe=4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = evaluate(model, make_images(20), attack("pgd", 3), name="m", probe=4)
    told = {s["name"]: s["seen"] for s in inside.suspicions}
    assert "autocast to torch.bfloat16" in told["half_precision"] and "half_precision" not in {
        s["name"] for s in plain.suspicions
    }


def fault_2_the_batch_size_counts(model, patch):
    """For cosines that are not scaled too: the loss is summed, and nothing underflows by a division."""
    flat = remade(model, saying(lambda logits: logits / 50))
    for one in (model, flat):
        scores = [
            evaluate(one, make_images(20), attack("pgd", 3), name="m", probe=0, batch_size=b) for b in (1, 7, 64)
        ]
        assert stable(scores[0]) == stable(scores[1]) == stable(scores[2])


def fault_5_resolution_unstated(model, patch):
    """The EvalResult says on which pixels eps counts, and the two protocols are two attacks."""
    scores = [evaluate(model, resized((64, 64)), attack(protocol=p), name="m", probe=0) for p in ("input", "native")]
    assert [s.protocol for s in scores] == ["input", "native"] and len({s.question for s in scores}) == 2
    assert len({s.file_name for s in scores}) == 2


def fault_7_an_attack_that_returns_nothing(model, patch):
    """Neither None nor the clean pictures pass for an attack; and `standard` has a targeted part."""
    with patch.context() as short, pytest.raises(TypeError):
        short.setitem(ATTACKS, "pgd", (lambda *given: None, 20))
        evaluate(model, make_images(4), attack(), name="m", probe=0)
    unchanged = look(model, "more_steps", "baseline", baseline=model, chosen=attack(kind=Idle))
    assert unchanged["more_steps"].raised and unchanged["baseline"].raised
    assert "apgd-t" in attack("standard").stages


def fault_8_samples_by_batches(model, patch):
    """`limit` counts pictures, whatever the batch size, and every figure has its interval."""
    scores = [
        evaluate(model, make_images(30), attack("pgd", 3), name="m", probe=0, limit=11, batch_size=b) for b in (2, 64)
    ]
    assert stable(scores[0]) == stable(scores[1]) and scores[0].n == 11
    assert (
        scores[0].interval[0] <= scores[0].robust <= scores[0].interval[1]
        and scores[0].interval[0] < scores[0].interval[1]
    )


def fault_9_text_tower_in_the_attack(model, patch):
    """Once for each model, and not once more for all pictures, attacks and checks."""
    runs = []
    hook = model.model.text_model.register_forward_hook(lambda *given: runs.append(1))
    try:
        evaluate(model, make_images(20), attack("standard", 3), name="m", batch_size=5, probe=4)
    finally:
        hook.remove()
    assert len(runs) == 1


def fault_10_class_names_damaged(model, patch):
    """The prompts hold the names letter by letter, and the EvalResult reports the classes under them."""
    read = []
    tokenizer = model.processor.tokenizer
    patch.setattr(
        model.processor, "tokenizer", lambda prompts, **options: read.extend(prompts) or tokenizer(prompts, **options)
    )
    score = evaluate(model, make_images(10), attack("pgd", 1), name="m", probe=0)
    assert read == [f"This is a photo of a {name}" for name in CLASSES] and tuple(score.per_class) == CLASSES


FAULTS = {int(name.split("_")[1]): test for name, test in list(globals().items()) if name.startswith("fault_")}


@pytest.mark.parametrize("number", FAULTS)
def test_the_fields_faults_of_evaluation_are_not_ours(number, trained, monkeypatch):
    """Numbers as in the brief's list of twelve; those of training (3, 4, 6, 11, 12) have their tests beside the trainer's."""
    FAULTS[number](trained, monkeypatch)


def test_every_check_has_its_paragraph_and_no_paragraph_speaks_of_another():
    text = (Path(__file__).parent.parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    paragraphs = {part.splitlines()[0]: " ".join(part.splitlines()[1:]) for part in text.split("\n### ")[1:]}
    assert list(paragraphs) == NAMES
    assert all("Raised " in p and len(p) > 100 for p in paragraphs.values())
