"""Proves that a result is a property of model, images and attack: not of batch size or the random state."""

from __future__ import annotations

import base64
import copy
import dataclasses
import io
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, make_images
from PIL import Image

from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.data.collator import Collator
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.evaluation import evaluator as evaluation
from hpt_hf.evaluation.evaluator import batches, evaluate, sample
from hpt_hf.evaluation.result import EvalResult

EPS = "20/255"  # where about half of what the trained student gets right withstands the attack
VOLATILE = ("seconds", "versions", "hardware")


@pytest.fixture
def able(trained):
    """It gets some images right and some of those right under attack; the tests below need both kinds."""
    return copy.deepcopy(trained)


def attack(name="pgd", steps=5, eps=EPS, **changes) -> EvaluationAttack:
    return EvaluationAttack(ThreatModel("linf", eps), name, steps, **changes)


def measure(model, images, chosen: EvaluationAttack, **settings) -> EvalResult:
    """`evaluate` without the checks, which have a file of tests of their own."""
    return evaluate(model, images, chosen, **({"name": "m", "probe": 0} | settings))


def stable(result: EvalResult) -> dict:
    return {k: v for k, v in result.to_json().items() if k not in VOLATILE}


def mixed_images(count=24, sizes=((32, 32), (48, 40), (40, 64))) -> LabelledImages:
    """Pictures of several sizes, one after another, the class in the colour as in `make_images`."""
    even = make_images(count, seed=0)
    images = [even[i]["image"].resize(sizes[i // 2 % len(sizes)], Image.Resampling.BICUBIC) for i in range(count)]
    return LabelledImages.from_images(images, even.labels, CLASSES, name="mixed")


@pytest.mark.parametrize(
    ("name", "protocol", "norm", "eps"),
    [
        ("pgd", "input", "linf", EPS),
        ("cw", "native", "linf", EPS),
        ("pgd", "input", "l2", "4"),
        ("pgd", "native", "l2", "4"),
    ],
)
def test_a_result_does_not_depend_on_the_batch_size(name, protocol, norm, eps, able):
    images = mixed_images() if protocol == "native" else make_images(24)
    chosen = EvaluationAttack(ThreatModel(norm, eps), name, 5, protocol)
    results = [stable(measure(able, images, chosen, batch_size=b)) for b in (1, 7, 64)]
    assert results[0] == results[1] == results[2]
    assert 0 < results[0]["robust"] < results[0]["clean"], "an attack that does all or nothing proves no invariance"


def plain_loop(model, images, chosen: EvaluationAttack) -> tuple[float, float]:
    """One image at a time, in float32, with backward() instead of the package's attack loop."""
    eps, clean, robust = chosen.threat.radius, 0, 0
    target, native = chosen.target and images.classes.index(chosen.target), chosen.protocol == "native"
    processor = model.processor.image_processor
    for row in images:
        pixels, label = np.asarray(row["image"]), row["label"]
        if not native:
            pixels = np.asarray(processor(row["image"], do_normalize=False, do_rescale=False)["pixel_values"][0])
            pixels = np.clip(np.rint(pixels), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        x0 = torch.tensor(pixels / 255, dtype=torch.float32).permute(2, 0, 1)[None].contiguous()
        answers, goal = [model.classify(x0).logits.argmax().item()], label if target is None else target
        keys = Collator(model.processor, native=native)([row])["image_ids"]
        x = chosen.threat.random_start(x0, Noise(keys, chosen.seed))
        for _ in range(chosen.steps):
            x = x.detach().requires_grad_(True)
            logits = model.classify(x).logits
            answers.append(logits.argmax().item())
            (F.cross_entropy(logits, torch.tensor([goal])) * (1 if target is None else -1)).backward()
            x = (x + 2.5 * eps / chosen.steps * x.grad.sign()).detach()
            x = torch.clamp(torch.minimum(torch.maximum(x, x0 - eps), x0 + eps), 0, 1)
        answers.append(model.classify(x).logits.argmax().item())
        clean += answers[0] == label
        # One iterate is enough to lose it.
        robust += answers[0] == label and all((answer == goal) == (target is None) for answer in answers)
    model.zero_grad()
    return round(100 * clean / len(images), 2), round(100 * robust / len(images), 2)


@pytest.mark.parametrize("protocol", ["input", "native"])
def test_a_result_equals_a_plain_loops(protocol, able):
    images, chosen = mixed_images(), attack(protocol=protocol, seed=3)
    result = measure(able, images, chosen)
    assert (result.clean, result.robust) == plain_loop(able, images, chosen)
    assert 0 < result.robust < result.clean


def test_another_seed_of_the_attack_is_another_result(able):
    found = {measure(able, make_images(40), attack(steps=1, seed=seed)).ends for seed in range(4)}
    assert len(found) > 1


def test_native_batches_hold_one_size_and_keep_the_order(able):
    images = mixed_images(24)
    got = list(batches(images, Collator(able.processor, native=True), 3))
    assert torch.cat([b["labels"] for b in got]).tolist() == images.labels
    assert len(got) == 12 and {tuple(b["images"].shape[2:]) for b in got} == {(32, 32), (40, 48), (64, 40)}
    assert [len(b["labels"]) for b in batches(make_images(20), Collator(able.processor), 8)] == [8, 8, 4]


def test_limit_is_a_fixed_sample_spread_over_the_set(able):
    assert sample(10, None) == sample(10, 10) == sample(10, 99) == list(range(10))
    kept = sample(1000, 50)
    assert kept == sample(1000, 50) == sorted(set(kept)) and len(kept) == 50
    assert 300 < np.mean(kept) < 700, "the first fifty of a set sorted by class are one class"
    limited = measure(able, make_images(40), attack(), limit=11)
    by_hand = measure(able, make_images(40).select(sample(40, 11)), attack())
    assert stable(limited) == stable(dataclasses.replace(by_hand, source=limited.source | {"limit": 11}))


def test_evaluate_reads_the_sets_own_prompts_once(student, monkeypatch):
    student.set_classes(("zebra", "car"))  # of another set
    read, tokenizer = [], student.processor.tokenizer
    monkeypatch.setattr(student.processor, "tokenizer", lambda p, **options: read.extend(p) or tokenizer(p, **options))
    images = dataclasses.replace(make_images(4), templates=("a photo of the {}", "{}"))
    result = measure(student, images, attack(steps=1), batch_size=2, probe=4)
    assert sorted(read) == sorted(t.format(name) for t in images.templates for name in CLASSES)
    assert student.classes == CLASSES and result.classes == 5 and result.templates == images.templates


def test_a_targeted_result_equals_a_plain_loops_on_the_other_classes(able):
    images, chosen = make_images(40), attack(steps=8, eps="16/255", target="cat", seed=1)
    others = images.select([i for i, label in enumerate(images.labels) if label != CLASSES.index("cat")])
    result = measure(able, images, chosen)
    assert (result.n, result.classes, result.target) == (32, 5, "cat") and "cat" not in result.per_class
    assert (result.clean, result.robust) == plain_loop(able, others, chosen)
    assert measure(able, others, attack(steps=8, eps="16/255", seed=1)).robust < result.robust < result.clean


@pytest.mark.parametrize(
    ("images", "target", "says"),
    [
        (make_images(4, labelled=False), None, "made has no labels: accuracy cannot be measured"),
        (make_images(5), "hose", "'hose' is none of the 5 classes of made; did you mean house?"),
        (make_images(10).select([0, 5]), "cat", "made holds no image of another class than 'cat'"),
    ],
)
def test_a_set_without_labels_or_without_the_target_is_an_error(images, target, says, able):
    with pytest.raises(ValueError, match=re.escape(says)):
        measure(able, images, attack(target=target))


def test_logits_that_are_not_finite_are_an_error_that_names_the_images(able, monkeypatch):
    classify, images = able.classify, make_images(12)
    bad = Collator(able.processor)([images[9]])["images"]

    def broken(images):
        said = classify(images)
        said.logits[[torch.equal(image, bad[0]) for image in images], 2] = torch.inf
        return said

    monkeypatch.setattr(able, "classify", broken, raising=False)
    with pytest.raises(ValueError, match=r"logits are not finite on images \[9\]"):
        measure(able, images, attack(), batch_size=4)


@pytest.mark.parametrize("protocol", ["input", "native"])
def test_the_checks_see_few_images_of_the_right_kind_whatever_the_batch_size(able, monkeypatch, protocol):
    images, chosen, probes = mixed_images(), attack(protocol=protocol), []
    monkeypatch.setattr(evaluation, "CHECKS", (lambda probe: probes.append(probe) or (False, "seen"),))
    results = [measure(able, images, chosen, probe=3, batch_size=b, baseline=able) for b in (5, 64)]
    assert stable(results[0]) == stable(results[1]) and results[0].verdict == "clear"
    for probe, result in zip(probes, results, strict=True):
        assert probe.result == dataclasses.replace(result, sanity_checks=(), seconds=probe.result.seconds)
        for part in (probe.clean_images, probe.robust_images):
            assert 0 < len(part["images"]) <= 3
            assert torch.equal(able.classify(part["images"]).logits.argmax(1), part["labels"])
        assert (chosen.run(able, **probe.robust_images)[1] == -1).all()
        assert 0 < len(probe.baseline_images["images"]) <= 6


def test_an_attack_that_leaves_its_ball_is_not_counted(able):
    class Outside(EvaluationAttack):
        def run(self, *given):
            wider = dataclasses.replace(self, threat=ThreatModel("linf", self.threat.radius * 1.01))
            return EvaluationAttack.run(wider, *given)

    with pytest.raises(AssertionError, match="left its ball"):
        measure(able, make_images(), Outside(ThreatModel("linf", EPS), steps=3))


def test_another_model_or_other_images_are_another_record(able, student):
    """So are the same images in pixels that the model has yet to resize."""
    images = mixed_images(6, sizes=((64, 64),))
    found = [measure(able, images, attack(protocol=protocol)) for protocol in ("input", "native")]
    found += [measure(student, images, attack()), measure(able, make_images(6, seed=9), attack())]
    assert {"torch", "transformers", "hpt_hf"} <= found[0].versions.keys() and found[0].hardware
    assert [r.fingerprint == found[0].fingerprint for r in found] == [True, True, False, True]
    assert [r.images_digest == found[0].images_digest for r in found] == [True, False, True, False]


def test_the_classes_counts_sum_to_the_whole(able):
    result = measure(able, make_images(40).select([i for i in range(40) if i % 5 != 2 and i != 0]), attack())
    assert list(result.per_class) == ["cat", "dog", "tree", "red car"], "a class without images has no accuracy"
    sums = tuple(map(sum, zip(*result.per_class.values(), strict=True)))
    assert sums == (31, result.n_clean, result.n_robust) and result.per_class["cat"][0] == 7


def test_each_stage_leaves_no_more_than_the_one_before_and_the_last_leaves_what_is_robust(able):
    result = measure(able, make_images(60), attack("standard", 3, eps="26/255", seed=4))
    left = list(result.accuracy_after.values())
    assert list(result.n_after) == ["apgd-ce", "apgd-t", "square"] and left == sorted(left, reverse=True)
    assert left[-1] == result.robust < left[0] < result.clean
    assert left[0] == measure(able, make_images(60), attack("apgd-ce", 3, eps="26/255", seed=4)).robust
    assert measure(able, make_images(), attack()).n_after.keys() == {"pgd"}


@pytest.mark.parametrize(("protocol", "target"), [("input", None), ("native", "tree")])
def test_the_gallery_shows_the_first_broken_images_as_they_were_attacked(able, tmp_path, protocol, target):
    images, chosen = mixed_images(sizes=((40, 40),)), attack(protocol=protocol, eps="26/255", target=target)
    result = measure(able, images, chosen, folder=tmp_path)
    shown = json.loads((tmp_path / "gallery" / result.file_name).read_text())
    batch = Collator(able.processor, native=protocol == "native")(list(images.without_class(target)))
    right = able.classify(batch["images"]).logits.argmax(1) == batch["labels"]
    images, keys, labels = (batch[k][right] for k in ("images", "image_ids", "labels"))
    attacked, by = chosen.run(able, images, keys, labels)
    for one, i in zip(shown, (by >= 0).nonzero()[:2, 0].tolist(), strict=True):
        delta = attacked[i] - images[i]
        expected = {"clean": images[i], "attacked": attacked[i], "perturbation": 0.5 + delta / (2 * delta.abs().max())}
        for kind, x in expected.items():
            png = np.asarray(Image.open(io.BytesIO(base64.b64decode(one[kind])))).transpose(2, 0, 1) / 255
            assert np.abs(png - x.numpy()).max() <= 0.5 / 255 + 1e-6, kind
        assert one["truth"] == CLASSES[labels[i]] and one["said"].startswith(f"{one['truth']} (")
        said = one["said_attacked"].rsplit(" (", 1)[0]
        assert said in CLASSES and said != one["truth"] and target in (None, said)
