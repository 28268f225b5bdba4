"""Proves that a result is a property of model, images and attack: not of batch size, order of calls, or the global random state."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, make_images, make_trainer, single_schedule, weights, write_image_folder
from PIL import Image

from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.common import open_sets, reopen
from hpt_hf.commands.evaluate import EvaluateArguments
from hpt_hf.commands.parser import parse
from hpt_hf.data.collator import Collator
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.evaluation import evaluator as evaluation
from hpt_hf.evaluation.evaluator import attack_all, batches, evaluate, sample
from hpt_hf.evaluation.result import EvalResult
from hpt_hf.models.zero_shot import ZeroShotClassifier, build_zero_shot_head
from hpt_hf.utils import write_json

EPS = "20/255"  # where about half of what the trained student below gets right withstands the attack
VOLATILE = ("seconds", "versions", "hardware")


@pytest.fixture(scope="module")
def able_path(tmp_path_factory, student_path):
    """A student that gets some images right and some of those right under attack; the tests below need both kinds."""
    student = ZeroShotClassifier.from_pretrained(student_path).set_classes(CLASSES)
    make_trainer(tmp_path_factory.mktemp("training"), student, single_schedule("tecoa", steps=40), eps="2/255").train()
    path = tmp_path_factory.mktemp("able")
    student.save_pretrained(path)
    return str(path)


@pytest.fixture
def able(able_path):
    return ZeroShotClassifier.from_pretrained(able_path).set_classes(CLASSES)


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


# --- invariances


@pytest.mark.parametrize(("name", "norm", "eps"), [("pgd", "linf", EPS), ("cw", "linf", EPS), ("pgd", "l2", "4")])
@pytest.mark.parametrize("protocol", ["input", "native"])
def test_a_result_does_not_depend_on_the_batch_size(name, norm, eps, protocol, able):
    images = mixed_images() if protocol == "native" else make_images(40)
    chosen = EvaluationAttack(ThreatModel(norm, eps), name, 5, protocol)
    results = [stable(measure(able, images, chosen, batch_size=b)) for b in (1, 7, 64)]
    assert results[0] == results[1] == results[2]
    assert 0 < results[0]["robust"] < results[0]["clean"], "an attack that does all or nothing proves no invariance"


def test_answers_are_deterministic_and_leave_no_trace(able):
    able.train()  # evaluate must not depend on the mode it finds
    torch.manual_seed(1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    gradients, before = [p.requires_grad for p in able.parameters()], weights(able)
    first = measure(able, make_images(), attack())
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)
    assert not able.training and [p.requires_grad for p in able.parameters()] == gradients
    assert all(p.grad is None for p in able.parameters())
    assert all(torch.equal(t, before[n]) for n, t in weights(able).items())
    torch.manual_seed(2)
    torch.rand(7)
    assert stable(measure(able, make_images(), attack())) == stable(first)


def test_the_attacks_seed_changes_its_start_and_the_result_says_so(able):
    images = make_images(8)
    batch = Collator(able.processor)([images[i] for i in range(8)])
    x, y = (attack(seed=s, steps=1).craft(able, batch["images"], batch["image_ids"], batch["labels"]) for s in (0, 1))
    assert not torch.equal(x, y)
    assert measure(able, images, attack(seed=1)).seed == 1


def test_robust_never_exceeds_clean_image_by_image(able):
    """Also where the attack itself would turn a wrong answer into the right one: those images are not attacked."""
    outcomes = attack_all(able, make_images(60, seed=4), attack(steps=1))
    after = outcomes.after(0)
    assert after["n"] == 60 > after["n_clean"] > after["n_robust"]
    assert all(clean >= robust for _, clean, robust in after["per_class"].values())


def test_a_larger_ball_is_no_safer_and_a_huge_one_leaves_nothing(able):
    robust = [measure(able, make_images(), attack(eps=e, steps=20)).robust for e in ("0", "12/255", EPS, "64/255")]
    clean = measure(able, make_images(), attack()).clean
    assert robust[0] == clean and robust == sorted(robust, reverse=True) and robust[-1] == 0 and len(set(robust)) == 4


# --- against a plain loop


def plain_loop(model, images, chosen: EvaluationAttack) -> tuple[float, float]:
    """One image at a time, in float32, with backward() instead of the package's attack loop."""
    eps, clean, robust = chosen.threat.radius, 0, 0
    target = None if chosen.target is None else images.classes.index(chosen.target)
    for index in range(len(images)):
        row = images[index]
        if chosen.protocol == "native":
            pixels = np.asarray(row["image"])
        else:
            pixels = np.asarray(
                model.processor.image_processor(row["image"], do_normalize=False, do_rescale=False)["pixel_values"][0]
            )
            pixels = np.clip(np.rint(pixels), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        x0 = torch.tensor(pixels / 255, dtype=torch.float32).permute(2, 0, 1)[None].contiguous()
        y = torch.tensor([row["label"]])
        stands = model.classify(x0).logits.argmax().item() == row["label"]
        clean += stands
        keys = Collator(model.processor, native=chosen.protocol == "native")([row])["image_ids"]
        x = chosen.threat.random_start(x0, Noise(keys, chosen.seed))
        for _ in range(chosen.steps):
            x = x.detach().requires_grad_(True)
            logits = model.classify(x).logits
            stands = stands and withstands(logits, row["label"], target)  # one iterate is enough to lose it
            if target is not None:
                loss = -F.cross_entropy(logits, torch.tensor([target]))
            elif chosen.name == "pgd":
                loss = F.cross_entropy(logits, y)
            else:
                others = [c for c in range(logits.shape[1]) if c != row["label"]]
                loss = logits[0, others].max() - logits[0, row["label"]]
            loss.backward()
            x = (x + 2.5 * eps / chosen.steps * x.grad.sign()).detach()
            x = torch.clamp(torch.minimum(torch.maximum(x, x0 - eps), x0 + eps), 0, 1)
        robust += stands and withstands(model.classify(x).logits, row["label"], target)
    model.zero_grad()
    return round(100 * clean / len(images), 2), round(100 * robust / len(images), 2)


def withstands(logits, label: int, target: int | None) -> bool:
    answer = logits.argmax().item()
    return answer == label if target is None else answer != target


@pytest.mark.parametrize("name", ["pgd", "cw"])
@pytest.mark.parametrize("protocol", ["input", "native"])
def test_a_result_equals_a_plain_loops(name, protocol, able):
    images, chosen = mixed_images(), attack(name, protocol=protocol, seed=3)
    result = measure(able, images, chosen)
    assert (result.clean, result.robust) == plain_loop(able, images, chosen)
    assert 0 < result.robust < result.clean


def test_native_protocol_attacks_the_images_own_pixels(able):
    """The ball then lies around pixels that the model has yet to resize, so the two protocols are not one."""
    images = mixed_images(sizes=((64, 64),))
    collate = [Collator(able.processor, native=n)([images[0]]) for n in (False, True)]
    assert [tuple(c["images"].shape) for c in collate] == [(1, 3, 32, 32), (1, 3, 64, 64)]
    results = [measure(able, images, attack(protocol=r)) for r in ("input", "native")]
    assert [s.protocol for s in results] == ["input", "native"]
    assert results[0].images_digest != results[1].images_digest, "other pixels are other images"


def test_native_batches_hold_one_size_and_keep_the_order(able):
    images = mixed_images(24)
    got = list(batches(images, Collator(able.processor, native=True), 3))
    assert torch.cat([b["labels"] for b in got]).tolist() == images.labels
    assert len(got) == 12 and {tuple(b["images"].shape[2:]) for b in got} == {(32, 32), (40, 48), (64, 40)}
    assert [len(b["labels"]) for b in batches(make_images(20), Collator(able.processor), 8)] == [8, 8, 4]


# --- samples, sets, names


def test_limit_is_a_fixed_sample_spread_over_the_set(able):
    assert sample(10, None) == sample(10, 10) == sample(10, 99) == list(range(10))
    kept = sample(1000, 50)
    assert kept == sample(1000, 50) == sorted(set(kept)) and len(kept) == 50 and kept[0] >= 0 and kept[-1] < 1000
    assert 300 < np.mean(kept) < 700, "the first fifty of a set sorted by class are one class"
    images = make_images(40)
    limited = measure(able, images, attack(), limit=11)
    by_hand = images.select(sample(40, 11))
    same = dataclasses.replace(measure(able, by_hand, attack()), source=limited.source)
    assert stable(limited) == stable(same) and (limited.n, limited.source["limit"]) == (11, 11)
    assert limited.images_digest != measure(able, images, attack(), limit=12).images_digest


def test_evaluate_asks_for_the_sets_own_classes(student):
    """The classes set before belong to another data set; those of the images are set, with their templates."""
    student.set_classes(("zebra", "car"))
    images = dataclasses.replace(make_images(4), templates=("a photo of the {}", "{}"))
    result = measure(student, images, attack(steps=1))
    assert student.classes == CLASSES and result.classes == 5 and result.templates == ("a photo of the {}", "{}")
    head = build_zero_shot_head(student.model, student.processor.tokenizer, CLASSES, images.templates)
    assert torch.equal(student.head, head)


# --- towards a target


def test_a_targeted_result_equals_a_plain_loops_on_the_other_classes(able):
    """Robust then means never taken for the target: images that only become some other wrong class still stand."""
    images, chosen = make_images(40), attack(steps=8, eps="22/255", target="cat", seed=1)
    others = images.select([i for i, label in enumerate(images.labels) if label != CLASSES.index("cat")])
    result = measure(able, images, chosen)
    assert (result.n, result.classes, result.target) == (32, 5, "cat") and "cat" not in result.per_class
    assert (result.clean, result.robust) == plain_loop(able, others, chosen)
    assert 0 < result.robust < result.clean and result.attack == "pgd-8 towards cat"
    untargeted = measure(able, others, attack(steps=8, eps="22/255", seed=1))
    assert untargeted.robust < result.robust


# --- what cannot be measured


REFUSED = {
    "made has no labels: accuracy cannot be measured": (make_images(4, labelled=False), None),
    "'hose' is none of the 5 classes of made; did you mean house?": (make_images(5), "hose"),
    "made holds no image of another class than 'cat'": (make_images(10).select([0, 5]), "cat"),
}


@pytest.mark.parametrize("says", REFUSED)
def test_a_set_without_labels_or_without_the_target_is_an_error(says, able):
    images, target = REFUSED[says]
    with pytest.raises(ValueError, match=re.escape(says)):
        measure(able, images, attack(target=target))


def test_logits_that_are_not_finite_are_an_error_that_names_the_images(able, monkeypatch):
    classify, images = able.classify, make_images(12)
    bad = Collator(able.processor)([images[i] for i in (5, 9)])["images"]

    def broken(images):
        said = classify(images)
        said.logits[[any(torch.equal(image, b) for b in bad) for image in images], 2] = torch.inf
        return said

    monkeypatch.setattr(able, "classify", broken, raising=False)
    for size, named in ((64, r"\[5, 9\]"), (4, r"\[5\]")):
        with pytest.raises(ValueError, match=f"logits are not finite on images {named}"):
            measure(able, images, attack(), batch_size=size)


# --- the checks get what they need


@pytest.mark.parametrize("protocol", ["input", "native"])
def test_the_checks_see_few_images_of_the_right_kind_whatever_the_batch_size(able, monkeypatch, protocol):
    images, chosen, probes = mixed_images(), attack(protocol=protocol), []

    def spy(probe):
        probes.append(probe)
        return False, f"{len(probe.clean_images['images'])} clean, {len(probe.robust_images['images'])} robust"

    monkeypatch.setattr(evaluation, "CHECKS", (spy,))
    results = [measure(able, images, chosen, probe=3, batch_size=b, baseline=able) for b in (1, 5, 64)]
    assert stable(results[0]) == stable(results[1]) == stable(results[2]) and results[0].verdict == "clear"
    for probe, result in zip(probes, results, strict=True):
        assert probe.result == dataclasses.replace(result, sanity_checks=(), seconds=probe.result.seconds)
        for part in (probe.clean_images, probe.robust_images):
            assert 0 < len(part["images"]) <= 3
            assert torch.equal(able.classify(part["images"]).logits.argmax(1), part["labels"])
        assert (chosen.run(able, **probe.robust_images)[1] == -1).all()
        assert 0 < len(probe.baseline_images["images"]) <= 6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_that_leaves_its_ball_is_a_defect_of_ours(norm, able):
    @dataclasses.dataclass(frozen=True)
    class Outside(EvaluationAttack):
        """Allows itself a hair more than the ball."""

        def run(self, *given):
            wider = dataclasses.replace(self, threat=ThreatModel(self.threat.norm, self.threat.radius * 1.01))
            return EvaluationAttack.run(wider, *given)

    threat = ThreatModel(norm, EPS if norm == "linf" else 4)
    with pytest.raises(AssertionError, match="left its ball"):
        measure(able, make_images(), Outside(threat, steps=3))


# --- the record


def test_a_result_tells_its_settings(able):
    chosen = attack("cw", 7, eps="3/255", seed=5)
    told = json.loads(json.dumps(measure(able, make_images(10), chosen, name="mine").to_json()))
    expected = {"model": "mine", "dataset": "made", "n": 10, "classes": 5, "attack": "cw-7", "steps": 7, "seed": 5}
    assert expected | {"norm": "linf", "eps": "3/255", "protocol": "input", "target": None} == {
        k: told[k] for k in (*expected, "norm", "eps", "protocol", "target")
    }
    assert {"torch", "transformers", "hpt_hf"} <= told["versions"].keys() and told["hardware"]


def test_another_model_or_other_images_are_another_record(able, student):
    a, b = (measure(m, make_images(6), attack()) for m in (able, student))
    assert a.fingerprint != b.fingerprint and a.images_digest == b.images_digest
    assert measure(able, make_images(6, seed=9), attack()).images_digest != a.images_digest


def test_the_classes_counts_sum_to_the_whole(able):
    images = make_images(40).select([i for i in range(40) if i % 5 != 2 and i != 0])
    result, outcomes = measure(able, images, attack()), attack_all(able, images, attack())
    assert list(result.per_class) == ["cat", "dog", "tree", "red car"], "a class without images has no accuracy"
    sums = tuple(sum(counts[i] for counts in result.per_class.values()) for i in range(3))
    assert sums == (31, result.n_clean, result.n_robust) and result.n == 31
    assert (result.clean, result.robust) == tuple(round(100 * count / 31, 2) for count in sums[1:])
    assert outcomes.labels.tolist() == [images[i]["label"] for i in range(31)]
    assert outcomes.indices.tolist() == list(range(31)) and result.per_class["cat"][0] == 7
    assert all(a >= b >= c >= 0 for a, b, c in result.per_class.values())


def test_each_stage_leaves_no_more_than_the_one_before_and_the_last_leaves_what_is_robust(able):
    result = measure(able, make_images(60), attack("standard", 3, eps="26/255", seed=4))
    left = list(result.accuracy_after.values())
    assert list(result.n_after) == ["apgd-ce", "apgd-t", "square"] and left == sorted(left, reverse=True)
    assert left[-1] == result.robust < left[0] < result.clean
    assert left[0] == measure(able, make_images(60), attack("apgd-ce", 3, eps="26/255", seed=4)).robust
    assert measure(able, make_images(), attack()).n_after.keys() == {"pgd"}


def unpack(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))).transpose(2, 0, 1) / 255


@pytest.mark.parametrize("target", [None, "tree"])
@pytest.mark.parametrize("protocol", ["input", "native"])
def test_the_gallery_shows_the_first_broken_images_as_they_were_attacked(able, tmp_path, protocol, target):
    images, chosen = mixed_images(sizes=((40, 40),)), attack(protocol=protocol, eps="26/255", target=target)
    result = measure(able, images, chosen, folder=tmp_path)
    (file,) = (tmp_path / "gallery").iterdir()
    shown = json.loads(file.read_text())
    assert file.name == result.file_name and len(shown) == 2
    others = images.without_class(target)
    batch = Collator(able.processor, native=protocol == "native")([others[i] for i in range(len(others))])
    with torch.no_grad():
        right = able.classify(batch["images"]).logits.argmax(1) == batch["labels"]
    images, keys, labels = (batch[k][right] for k in ("images", "image_ids", "labels"))
    attacked, by = chosen.run(able, images, keys, labels)
    for one, i in zip(shown, (by >= 0).nonzero()[:2, 0].tolist(), strict=True):
        assert np.abs(unpack(one["clean"]) - images[i].numpy()).max() < 1e-6
        assert np.abs(unpack(one["attacked"]) - attacked[i].numpy()).max() <= 0.5 / 255 + 1e-6
        delta = (attacked[i] - images[i]).numpy()
        assert np.abs((unpack(one["perturbation"]) - 0.5) * 2 - delta / np.abs(delta).max()).max() <= 1 / 255 + 1e-6
        assert one["truth"] == CLASSES[labels[i]] and one["said"].startswith(f"{one['truth']} (")
        said = one["said_attacked"].rsplit(" (", 1)[0]
        assert said in CLASSES and said != one["truth"] and target in (None, said)


def test_no_image_is_shown_where_none_was_broken(able, tmp_path):
    result = measure(able, make_images(6), attack(eps="0"), folder=tmp_path)
    assert json.loads((tmp_path / "gallery" / result.file_name).read_text()) == []


# --- opening the same images again


def as_folder(place: Path) -> list[str]:
    return [write_image_folder(place / "set", make_images(20))]


def as_parquet(place: Path) -> list[str]:
    made = make_images(20)
    columns = {"image": [row["image"] for row in made], "label": made.labels}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(place / "set.parquet")
    return [str(place / "set.parquet"), "--classes", *CLASSES, "--templates", "a {}", "{}"]


@pytest.mark.parametrize("flags", [as_folder, as_parquet, lambda _: ["lab:digits"]], ids=["folder", "parquet", "lab"])
@pytest.mark.parametrize("limit", [None, 7])
def test_a_results_source_opens_the_same_images_again(flags, limit, able_path, tmp_path):
    able = ZeroShotClassifier.from_pretrained(able_path)
    sizes = [] if limit is None else ["--limit", str(limit)]
    (args,) = parse((EvaluateArguments,), ["--output_dir", "o", "--dataset", *flags(tmp_path), *sizes])
    (images,) = open_sets(args)
    result = measure(able, images, attack(steps=1), limit=args.limit)
    source = EvalResult.read(write_json(tmp_path / "one.json", result.to_json())).source
    again = reopen(source)
    assert (again.classes, again.templates, again.name) == (images.classes, images.templates, images.name)
    assert stable(measure(able, again, attack(steps=1), limit=source["limit"])) == stable(result)
    assert result.n == (limit or len(images)) and source["limit"] == limit
