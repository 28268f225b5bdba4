"""Proves that every check raises on a model, an attack or an experiment broken in its way, and lets honest ones pass."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, make_images, make_result, relabelled, weights, write_image_folder

from hpt_hf.attacks.suite import ATTACKS, EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands import evaluate as command
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.evaluation import evaluator as evaluation
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.result import EvalResult
from hpt_hf.evaluation.sanity_checks import CHECKS, FEW_CLASSES, FEW_IMAGES, Probe, Seen, collapsed, run_check
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
        changes = {"probe": 12, **changes}
        result = evaluate(model, images or make_images(50), chosen or attack(), name="m", **changes)
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
def honest(trained, undefended):
    """What all checks say of the trained model."""
    return look(trained, baseline=undefended)


# --- broken models


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


class QuantisedAfterResizing(ZeroShotClassifier):
    def resize_and_crop(self, images):
        return straight_through(levels)(super().resize_and_crop(images))


class HalfFeatures(ZeroShotClassifier):
    """Features in half precision look like float32 under a float32 head: only their steps give them away."""

    def classify(self, images):
        embeds = super().classify(images).embeds.bfloat16().float()
        logits = self.family.scale(self.model) * F.normalize(embeds, dim=-1) @ self.head.T
        return ZeroShotOutput(logits=logits, embeds=embeds)


# what is broken -> (the model, the check that must see it; others may too).
MODELS = {
    "16 levels": (seeing(levels), "quantised"),
    "16 levels, straight through": (seeing(straight_through(levels)), "quantised"),
    "16 levels after resizing": (QuantisedAfterResizing, "quantised"),
    "features in half precision": (HalfFeatures, "quantised"),
    "noise on the image": (seeing(lambda x: x + 0.1 * torch.randn_like(x)), "stochastic"),
    "dropout left on": (seeing(lambda x: F.dropout(x, 0.05)), "stochastic"),
    "mean of the batch off the logits": (saying(lambda logits: logits - logits.mean(0)), "batch_size"),
    "statistics of the batch": (seeing(lambda x: (x - x.mean(0) + 0.5).clamp(0, 1)), "batch_size"),
    "detached": (seeing(torch.detach), "detached"),
    "round trip through bytes": (seeing(through_bytes), "detached"),
    "logits a thousandfold": (saying(lambda logits: 1e3 * logits), "zero_gradient"),
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
    assert honest[name]["raised"] is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_and_autocast_around_are_seen(dtype, trained):
    seen = look(remade(trained, ZeroShotClassifier).to(dtype), "half_precision")["half_precision"]
    assert seen["raised"] and f"weights in {dtype}" in seen["detail"]
    with torch.autocast("cpu", dtype):
        seen = look(trained, "half_precision", chosen=attack(steps=3))["half_precision"]
    assert seen["raised"] and f"autocast in {dtype}" in seen["detail"]


def test_a_checkpoint_with_a_large_logit_scale_is_doubted_by_the_command(trained, tmp_path, capsys):
    """As it comes from disk: the weights alone are at fault."""
    broken = remade(trained, ZeroShotClassifier)
    broken.model.logit_scale.data.fill_(float(np.log(1e4)))
    broken.save_pretrained(tmp_path / "model")
    data = write_image_folder(tmp_path / "data", make_images(10))
    flags = ["--model", str(tmp_path / "model"), "--dataset", data, "--eps", "24/255"]
    command.main([*flags, "--output_dir", str(tmp_path / "out")])
    (file,) = (tmp_path / "out" / "results").glob("*.json")
    names = {c["name"] for c in EvalResult.read(file).raised}
    told = capsys.readouterr().err
    assert {"zero_gradient", "few_images"} <= names and "suspicious: " in told and all(n in told for n in names)


def test_where_square_ran_as_part_of_the_attack_it_need_not_run_again(trained, monkeypatch):
    """`standard` ends with Square, so the check counts what it broke after two attacks that follow gradients."""
    chosen, images = attack("standard", 60, eps=48 / 255), make_images(20)
    assert look(trained, "black_box", chosen=attack("square", 2), images=images)["black_box"]["raised"] is NOT_RUN
    for white_box in ("apgd-ce", "apgd-t"):
        passed = look(trained, "black_box", chosen=chosen, images=images)["black_box"]
        assert passed["raised"] is False and "Square broke 0.0 points" in passed["detail"]
        monkeypatch.setitem(ATTACKS, white_box, (idle, 1))
    assert look(trained, "black_box", chosen=chosen, images=images)["black_box"]["raised"]


# --- weak attacks


@dataclasses.dataclass(frozen=True)
class Idle(EvaluationAttack):
    """Leaves every image as it is."""

    def run(self, classifier, images, image_ids, labels):
        return images.clone(), torch.full_like(labels, -1)


@dataclasses.dataclass(frozen=True)
class Short(EvaluationAttack):
    """One step of a thousandth of the radius, and only its end counts."""

    def run(self, classifier, images, image_ids, labels):
        with torch.enable_grad():
            x = images.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(classifier.classify(x).logits, labels), x)
        x = self.threat.project(images + self.threat.radius / 1000 * gradient.sign(), images)
        return x, torch.where(classifier.classify(x).logits.argmax(1) == labels, -1, 0)


def idle(logits_fn, images, labels, threat, steps, noise):
    return images.clone(), torch.zeros(len(images), dtype=torch.bool)


@pytest.mark.parametrize("kind", [Idle, Short])
def test_an_attack_that_stops_short_is_found_by_every_stronger_one(kind, trained, honest):
    stronger, eps = ("more_steps", "other_loss", "black_box"), 48 / 255
    assert raised(trained, *stronger, chosen=attack(eps=eps, kind=kind)) == set(stronger)
    assert not raised(trained, *stronger, chosen=attack(eps=eps)) and not any(honest[n]["raised"] for n in stronger)


@pytest.mark.parametrize(
    ("robust", "count", "n", "points", "raises"),
    [(50.0, 2, 24, 4.2, False), (50.0, 3, 24, 6.2, True), (40.0, 3, 24, 5.0, True), (90.0, 1, 9, 10.0, False)],
)
def test_what_a_stronger_attack_breaks_is_weighed_by_how_far_the_figure_would_fall(robust, count, n, points, raises):
    """Three of 24 robust images are much of a high figure and little of a low one; one image alone is chance."""
    result = make_result(clean=100.0, robust=robust)
    probe = Probe(classifier=None, attack=attack(), result=result, clean_images={}, robust_images={})
    parts = iter((torch.arange(n) < count).split(5))  # of images of several sizes, added up
    found, detail = run_check(lambda probe: Seen(next(parts), "fall", None), [probe] * math.ceil(n / 5))
    assert found is raises and f"{count} of {n} robust images fall" in detail and f"{points:.1f} points" in detail


# --- broken experiments


def only(kept, classes=CLASSES) -> LabelledImages:
    """Those of fifty images whose label passes, under the first few classes."""
    whole = make_images(50)
    part = whole.select([i for i, label in enumerate(whole.labels) if kept(label)])
    return relabelled(part, part.labels, classes)


def wrong(images: LabelledImages) -> LabelledImages:
    """Every label is false."""
    return relabelled(images, [(label + 1) % 5 for label in images.labels])


def test_few_classes_and_few_images_are_told_at_their_number(trained):
    for n in (1, FEW_IMAGES - 1, FEW_IMAGES):
        assert raised(trained, "few_images", limit=n) == ({"few_images"} if n < FEW_IMAGES else set())
    for n in (FEW_CLASSES - 1, FEW_CLASSES):
        images = only(lambda label, n=n: label < n, CLASSES[:n])
        images = images.select([i % len(images) for i in range(60)])
        assert raised(trained, "few_images", images=images) == ({"few_images"} if n < FEW_CLASSES else set())


def test_a_baseline_that_withstands_the_attack_is_told_and_without_one_nobody_knows(trained, undefended):
    def seen(**changes):
        return look(trained, "baseline", **changes)["baseline"]["raised"]

    assert seen(baseline=undefended) is False
    assert seen(baseline=trained, chosen=attack(eps=1 / 255)) and seen(baseline=trained, chosen=attack(kind=Idle))
    assert seen() is NOT_RUN
    assert not seen(baseline=trained, images=wrong(make_images(20))), "it knows none that it could withstand"
    masked = remade(trained, seeing(torch.detach))
    assert raised(masked, "baseline", baseline=undefended) == set(), "not the evaluated model is asked"
    assert raised(trained, "baseline", baseline=masked) == {"baseline"}


# --- the verdict


@pytest.mark.parametrize("name", ["pgd", "standard"])
def test_an_honest_evaluation_is_clear_and_every_check_has_its_say(name, trained, undefended):
    steps = None if name == "pgd" else 30  # Square alone would take its 5000 queries
    result = evaluate(trained, make_images(60), attack(name, steps), name="m", baseline=undefended)
    assert (result.verdict, result.raised) == ("clear", ()), result.raised
    assert [c["name"] for c in result.sanity_checks] == NAMES
    assert {c["raised"] for c in result.sanity_checks} == {False} and all(c["detail"] for c in result.sanity_checks)
    assert 0 < result.robust < result.clean, "with none or all robust, half of the checks have nothing to look at"


def test_the_checks_look_and_change_nothing(trained):
    sizes = ((50, 0, "unchecked"), (50, 6, "clear"), (20, 6, "remark"), (20, 0, "unchecked"))
    results = [evaluate(trained, make_images(n), attack("pgd", 3), name="m", probe=p) for n, p, _ in sizes]
    assert [r.verdict for r in results] == [verdict for _, _, verdict in sizes]
    assert [c["name"] for c in results[2].raised] == ["few_images"] and results[0].sanity_checks == ()
    assert len({(r.n, r.n_clean, r.n_robust) for r in results}) == 2


# --- edges


def resized(*sizes, count: int = 12) -> LabelledImages:
    even = make_images(count)
    images = [even[i]["image"].resize(sizes[i // 2 % len(sizes)]) for i in range(count)]
    return LabelledImages.from_images(images, even.labels, CLASSES, name="sizes")


EDGES = {
    "none right": (wrong(make_images(6)), attack()),
    "none robust": (make_images(6), attack(eps=0.5)),
    "all robust": (make_images(20), attack(eps=0)),
    "one image": (make_images(1), attack()),
    "two classes, all attacks": (only(lambda label: label < 2, CLASSES[:2]), attack("standard", 3)),
    "native sizes": (resized((32, 32), (48, 40), (40, 64)), attack(protocol="native")),
    "native and elongated": (resized((100, 40)), attack(protocol="native", eps=40 / 255)),
    "native, none right": (wrong(resized((48, 40), (32, 32))), attack(protocol="native")),
    "l2": (make_images(10), attack("standard", 10, norm="l2", eps=4)),
    "l2, none right": (wrong(make_images(6)), attack(norm="l2", eps=4)),
    "towards a class": (make_images(20), attack(target="cat", eps=28 / 255)),
    "towards a class, with APGD": (make_images(10), attack("apgd-ce", 10, target="dog", eps=0.4)),
}


@pytest.mark.parametrize("edge", EDGES)
def test_at_the_edges_an_honest_model_raises_only_what_is_true(edge, trained, undefended):
    images, chosen = EDGES[edge]
    found = look(trained, images=images, chosen=chosen, baseline=undefended, probe=10)
    names = {name for name, check in found.items() if check["raised"]}
    assert list(found) == NAMES
    assert ("collapsed" in names) == ("none right" in edge)
    names -= {"collapsed"}
    assert names == {"few_images", *(["baseline"] if edge == "all robust" else [])}, {n: found[n] for n in names}


def test_at_native_sizes_the_checks_add_up_what_they_see_and_fewer_than_eight_images_prove_nothing(trained):
    """A weak attack is as weak on images of their own sizes as on the same ones at one size."""
    weak = attack(eps=48 / 255, kind=Idle, protocol="native")
    for sizes in (((40, 40),), ((40, 40), (48, 40), (40, 64), (56, 56), (40, 48))):
        found = look(trained, "more_steps", images=resized(*sizes, count=40), chosen=weak, probe=24)["more_steps"]
        assert found["raised"] and " of 24 robust images" in found["detail"]
    few = look(trained, "more_steps", "stochastic", images=make_images(5), chosen=attack(eps=48 / 255, kind=Idle))
    assert all(check["raised"] is None and "expected at least 8" in check["detail"] for check in few.values())


@pytest.mark.parametrize(
    ("per_class", "raises"),
    [
        ({"a": (20, 20, 20), "b": (20, 0, 0), "c": (20, 0, 0), "d": (20, 0, 0)}, True),
        ({"a": (20, 6, 1), "b": (20, 4, 1), "c": (20, 5, 1), "d": (20, 6, 1)}, True),
        ({"a": (20, 12, 1), "b": (20, 14, 1), "c": (20, 15, 1), "d": (20, 16, 1)}, False),
    ],
)
def test_a_collapsed_model_is_called_so(per_class, raises):
    result = make_result(per_class=per_class)
    found, seen = collapsed(Probe(None, attack(), result, {}, {}))
    assert found is raises and "chance 25.0%" in seen and make_result(sanity_checks=()).verdict == "unchecked"


def test_what_stands_towards_a_target_need_not_withstand_every_other_attack(trained):
    """'Never taken for a cat' is all that such a result claims; that another answer is easily had is no fault of it."""
    chosen, images = attack(target="cat"), make_images(60)
    targeted, any_wrong = (evaluate(trained, images, a, name="m", probe=0) for a in (chosen, attack()))
    assert targeted.robust > any_wrong.robust
    assert not raised(trained, "more_steps", "other_loss", "black_box", images=images, chosen=chosen)
    unattacked = attack(target="cat", eps=48 / 255, kind=Idle)
    assert raised(trained, "more_steps", "other_loss", images=images, chosen=unattacked) == {
        "more_steps",
        "other_loss",
    }


# --- no trace


def test_the_checks_leave_no_trace(trained):
    model = remade(trained, ZeroShotClassifier).freeze_text()
    torch.manual_seed(1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    before, asked = weights(model), [p.requires_grad for p in model.parameters()]
    assert list(look(model, baseline=trained, probe=4, images=make_images(10))) == NAMES
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)
    assert [p.requires_grad for p in model.parameters()] == asked and len(set(asked)) == 2
    assert all(p.grad is None for one in (model, trained) for p in one.parameters())
    after = weights(model)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert not any(m.training or m._forward_hooks for m in model.modules())
    assert not torch.nn.modules.module._global_forward_hooks
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_a_check_that_fails_leaves_no_trace_either(trained):
    """A model that gives up in the midst of a check: weights ask for gradients again, and no hook stays."""

    def gives_up(x):
        if x.requires_grad:
            raise RuntimeError("no gradients here")
        return x

    model = remade(trained, seeing(gives_up))
    asked = [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="no gradients here"):
        look(model, "half_precision", "detached", chosen=attack(kind=Idle))
    assert not torch.nn.modules.module._global_forward_hooks and torch.is_grad_enabled()
    assert [p.requires_grad for p in model.parameters()] == asked


# --- the field's faults; those of training have their tests beside the trainer's


def test_the_batch_size_counts_neither_in_figures_nor_in_samples(trained):
    """For cosines that are not scaled too: the loss is summed, and nothing underflows by a division."""
    for one in (trained, remade(trained, saying(lambda logits: logits / 50))):
        sizes = [{"batch_size": b, "limit": 11, "probe": 0, "name": "m"} for b in (1, 7, 64)]
        found = [evaluate(one, make_images(30), attack("pgd", 3), **size) for size in sizes]
        assert len({(r.n, r.n_clean, r.n_robust, r.images_digest, str(r.per_class)) for r in found}) == 1
        assert found[0].n == 11 and found[0].interval[0] < found[0].interval[1]


def test_an_attack_that_returns_nothing_is_none(trained, monkeypatch):
    """Neither None nor the clean images pass for an attack; and `standard` has a targeted part."""
    assert "apgd-t" in attack("standard").stages
    monkeypatch.setitem(ATTACKS, "pgd", (lambda *given: None, 20))
    with pytest.raises(TypeError):
        evaluate(trained, make_images(4), attack(), name="m", probe=0)


def test_prompts_are_read_once_and_letter_by_letter(trained, monkeypatch):
    """Not once more for all images, attacks and checks; and the result reports the classes under the same names."""
    read, runs, tokenizer = [], [], trained.processor.tokenizer
    monkeypatch.setattr(trained.processor, "tokenizer", lambda p, **options: read.extend(p) or tokenizer(p, **options))
    hook = trained.model.text_model.register_forward_hook(lambda *given: runs.append(1))
    try:
        result = evaluate(trained, make_images(20), attack("standard", 3), name="m", batch_size=5, probe=4)
    finally:
        hook.remove()
    assert len(runs) == 1 and read == [f"This is a photo of a {name}" for name in CLASSES]
    assert tuple(result.per_class) == CLASSES


def test_every_check_has_its_paragraph_and_no_paragraph_speaks_of_another():
    text = (Path(__file__).parent.parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    paragraphs = {part.splitlines()[0]: " ".join(part.splitlines()[1:]) for part in text.split("\n### ")[1:]}
    assert list(paragraphs) == NAMES
    assert all("Raised " in p and len(p) > 100 for p in paragraphs.values())
