"""Proves that a Score is a property of model, pictures and attack: not of batch size, order of calls, or the global random state."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, Rows, gpd_schedule, make_pictures, make_trainer, single_schedule
from PIL import Image

from hpt_hf.attacks import cross_entropy, pgd
from hpt_hf.data import Collate, LabelledPictures
from hpt_hf.evaluation import EvaluationAttack, Score, answer, batches, evaluate, mean, sample, transfer, wilson
from hpt_hf.search import ATTACKS
from hpt_hf.threat import Noise, ThreatModel
from hpt_hf.zero_shot import ZeroShotCLIP

EPS = "20/255"  # where about half of what the trained student below gets right withstands the attack
VOLATILE = ("seconds", "versions", "hardware")


@pytest.fixture(scope="module")
def able_path(tmp_path_factory, student_path):
    """A student that gets some pictures right and some of those right under attack; the tests below need both kinds."""
    student = ZeroShotCLIP.load(student_path).set_classes(CLASSES)
    make_trainer(tmp_path_factory.mktemp("training"), student, single_schedule("tecoa", steps=40), eps="2/255").train()
    path = tmp_path_factory.mktemp("able")
    student.save_pretrained(path)
    return str(path)


@pytest.fixture
def able(able_path):
    return ZeroShotCLIP.load(able_path).set_classes(CLASSES)


def attack(name="pgd", steps=5, eps=EPS, **changes) -> EvaluationAttack:
    return EvaluationAttack(ThreatModel("linf", eps), name, steps, **changes)


def stable(score: Score) -> dict:
    return {k: v for k, v in score.to_json().items() if k not in VOLATILE}


def mixed_pictures(count=24, sizes=((32, 32), (48, 40), (40, 64))) -> LabelledPictures:
    """Pictures of several sizes, one after another, the class in the colour as in `make_pictures`."""
    even = make_pictures(count, seed=0)
    images = [even[i]["image"].resize(sizes[i // 2 % len(sizes)], Image.Resampling.BICUBIC) for i in range(count)]
    return LabelledPictures(Rows(images, [even[i]["label"] for i in range(count)]), CLASSES, name="mixed")


# --- invariances ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "norm", "eps"), [("pgd", "linf", EPS), ("cw", "linf", EPS), ("pgd", "l2", "4")])
@pytest.mark.parametrize("resolution", ["input", "native"])
def test_a_score_does_not_depend_on_the_batch_size(name, norm, eps, resolution, able):
    pictures = mixed_pictures() if resolution == "native" else make_pictures(40)
    chosen = EvaluationAttack(ThreatModel(norm, eps), name, 5, resolution)
    scores = [stable(evaluate(able, pictures, chosen, name="m", batch_size=b)) for b in (1, 7, 64)]
    assert scores[0] == scores[1] == scores[2]
    assert 0 < scores[0]["robust"] < scores[0]["clean"], "an attack that does all or nothing proves no invariance"


def test_answers_are_deterministic_and_leave_no_trace(able):
    able.train()  # evaluate must not depend on the mode it finds
    torch.manual_seed(1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    gradients = [p.requires_grad for p in able.parameters()]
    before = {n: t.clone() for n, t in able.state_dict().items()}
    first = evaluate(able, make_pictures(), attack(), name="m")
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)
    assert not able.training and [p.requires_grad for p in able.parameters()] == gradients
    assert all(p.grad is None for p in able.parameters())
    assert all(torch.equal(t, before[n]) for n, t in able.state_dict().items())
    torch.manual_seed(2)
    torch.rand(7)
    assert stable(evaluate(able, make_pictures(), attack(), name="m")) == stable(first)


def test_the_attacks_seed_changes_its_start_and_the_score_says_so(able):
    pictures = make_pictures(8)
    batch = Collate(able.processor)([pictures[i] for i in range(8)])
    x, y = (attack(seed=s, steps=1).craft(able, batch["images"], batch["keys"], batch["labels"]) for s in (0, 1))
    assert not torch.equal(x, y)
    assert evaluate(able, pictures, attack(seed=1), name="m").seed == 1


def test_robust_never_exceeds_clean_picture_by_picture(able):
    """Also where the attack itself would turn a wrong answer into the right one: those pictures are not attacked."""
    answers = answer(able, make_pictures(60, seed=4), attack(steps=1))
    assert not (answers.robust & ~answers.clean).any() and answers.clean.sum() > answers.robust.sum()


def test_a_larger_ball_is_no_safer_and_a_huge_one_leaves_nothing(able):
    robust = [evaluate(able, make_pictures(), attack(eps=e, steps=20), name="m").robust for e in ("0", "12/255", EPS, "64/255")]
    clean = evaluate(able, make_pictures(), attack(), name="m").clean
    assert robust[0] == clean and robust == sorted(robust, reverse=True) and robust[-1] == 0 and len(set(robust)) == 4


# --- against a plain loop ---------------------------------------------------------------------------------------------------


def plain_loop(model, pictures, chosen: EvaluationAttack) -> tuple[float, float]:
    """One picture at a time, in float32, with backward() instead of the package's attack loop."""
    eps, clean, robust = chosen.threat.radius, 0, 0
    for index in range(len(pictures)):
        row = pictures[index]
        if chosen.resolution == "native":
            pixels = np.asarray(row["image"])
        else:
            pixels = np.asarray(
                model.processor.image_processor(row["image"], do_normalize=False, do_rescale=False)["pixel_values"][0]
            )
            pixels = np.clip(np.rint(pixels), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        x0 = torch.tensor(pixels / 255, dtype=torch.float32).permute(2, 0, 1)[None].contiguous()
        y = torch.tensor([row["label"]])
        right = model.classify(x0).logits.argmax().item() == row["label"]
        clean += right
        keys = Collate(model.processor, native=chosen.resolution == "native")([row])["keys"]
        x = chosen.threat.random_start(x0, Noise(keys, chosen.seed))
        for _ in range(chosen.steps):
            x = x.detach().requires_grad_(True)
            logits = model.classify(x).logits
            right = right and logits.argmax().item() == row["label"]  # one wrong iterate is enough
            if chosen.name == "pgd":
                loss = F.cross_entropy(logits, y)
            else:
                others = [c for c in range(logits.shape[1]) if c != row["label"]]
                loss = logits[0, others].max() - logits[0, row["label"]]
            loss.backward()
            x = (x + 2.5 * eps / chosen.steps * x.grad.sign()).detach()
            x = torch.clamp(torch.minimum(torch.maximum(x, x0 - eps), x0 + eps), 0, 1)
        robust += right and model.classify(x).logits.argmax().item() == row["label"]
    model.zero_grad()
    return round(100 * clean / len(pictures), 2), round(100 * robust / len(pictures), 2)


@pytest.mark.parametrize("name", ["pgd", "cw"])
@pytest.mark.parametrize("resolution", ["input", "native"])
def test_a_score_equals_a_plain_loops(name, resolution, able):
    pictures, chosen = mixed_pictures(), attack(name, resolution=resolution, seed=3)
    score = evaluate(able, pictures, chosen, name="m")
    assert (score.clean, score.robust) == plain_loop(able, pictures, chosen)
    assert 0 < score.robust < score.clean


def test_native_resolution_attacks_the_pictures_own_pixels(able):
    """The ball then lies around pixels that the model has yet to resize, so the two protocols are not one."""
    pictures = mixed_pictures(sizes=((64, 64),))
    collate = [Collate(able.processor, native=n)([pictures[0]]) for n in (False, True)]
    assert [tuple(c["images"].shape) for c in collate] == [(1, 3, 32, 32), (1, 3, 64, 64)]
    scores = [evaluate(able, pictures, attack(resolution=r), name="m") for r in ("input", "native")]
    assert [s.protocol for s in scores] == ["input", "native"]
    assert scores[0].rows != scores[1].rows, "other pixels are other pictures"


def test_native_batches_hold_one_size_and_keep_the_order(able):
    pictures = mixed_pictures(24)
    got = list(batches(pictures, Collate(able.processor, native=True), 3))
    assert torch.cat([b["labels"] for b in got]).tolist() == pictures.rows.labels
    assert len(got) == 12 and {tuple(b["images"].shape[2:]) for b in got} == {(32, 32), (40, 48), (64, 40)}
    assert [len(b["labels"]) for b in batches(make_pictures(20), Collate(able.processor), 8)] == [8, 8, 4]


# --- samples, sets, names ----------------------------------------------------------------------------------------------------


def test_limit_is_a_fixed_sample_spread_over_the_set(able):
    assert sample(10, None) == sample(10, 10) == sample(10, 99) == list(range(10))
    kept = sample(1000, 50)
    assert kept == sample(1000, 50) == sorted(set(kept)) and len(kept) == 50 and kept[0] >= 0 and kept[-1] < 1000
    assert 300 < np.mean(kept) < 700 and kept != list(range(50)), "the first fifty of a set sorted by class are one class"
    state = np.random.get_state()[1].copy()
    sample(1000, 50)
    assert np.array_equal(np.random.get_state()[1], state)
    pictures = make_pictures(40)
    limited = evaluate(able, pictures, attack(), name="m", limit=11)
    by_hand = dataclasses.replace(pictures, kept=sample(40, 11))
    assert stable(limited) == stable(evaluate(able, by_hand, attack(), name="m")) and limited.n == 11
    assert limited.rows != evaluate(able, pictures, attack(), name="m", limit=12).rows


def test_a_set_without_labels_is_an_error(able):
    with pytest.raises(ValueError, match="made has no labels: accuracy cannot be measured"):
        evaluate(able, make_pictures(4, labelled=False), attack(), name="m")


def test_evaluate_asks_for_the_sets_own_classes(student):
    """The classes set before belong to another data set; those of the pictures are set, with their templates."""
    student.set_classes(("zebra", "car"))
    pictures = dataclasses.replace(make_pictures(4), templates=("a photo of the {}", "{}"))
    score = evaluate(student, pictures, attack(steps=1), name="m")
    assert student.classes == CLASSES and score.classes == 5 and score.templates == ("a photo of the {}", "{}")
    assert torch.equal(student.class_embeds, student.embed_classes(CLASSES, pictures.templates))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "pgdd"}, "no attack is called 'pgdd'; did you mean pgd"),
        ({"resolution": "full"}, "resolution='full': expected 'input'"),
        ({"steps": 0}, "steps=0: expected at least 1"),
    ],
)
def test_an_attack_that_does_not_exist_is_an_error(settings, says):
    with pytest.raises(ValueError) as error:
        attack(**settings)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [("apgd_ce", "did you mean apgd-ce"), ("squares", "did you mean square?"), ("standart", "did you mean standard?")],
)
def test_an_unknown_attack_names_its_nearest(name, near):
    with pytest.raises(ValueError, match=f"no attack is called '{name}'") as error:
        attack(name)
    assert near in str(error.value)
    with pytest.raises(ValueError) as error:
        attack("zzz")
    assert str(error.value).endswith(f"there are {', '.join(ATTACKS)}, standard"), "nothing is near: all are named"


def test_every_attack_has_its_name_its_own_steps_and_says_both():
    """The names and numbers under which robust accuracies are compared in print; a record that says less cannot be repeated."""
    default = {name: str(EvaluationAttack(ThreatModel(), name)) for name in (*ATTACKS, "standard")}
    assert default == {
        "pgd": "pgd-20",
        "cw": "cw-20",
        "apgd-ce": "apgd-ce-100",
        "apgd-t": "apgd-t-100",
        "square": "square-5000",
        "standard": "standard",
    }
    assert str(attack("cw", 50)) == "cw-50" and str(attack("standard", 7)) == "standard-7"
    assert attack("standard").parts == ("apgd-ce", "apgd-t", "square") and attack("cw").parts == ("cw",)


@pytest.mark.parametrize("name", [*ATTACKS, "standard"])
def test_left_out_steps_are_the_attacks_own_and_given_ones_are_everybodys(monkeypatch, able, name):
    """That what `str` says is what runs: every part writes down the steps that it was given."""
    ran = []

    def spy(part):
        def run(logits_fn, images, labels, threat, steps, noise):
            ran.append((part, steps))
            return images.clone(), torch.zeros(len(images), dtype=torch.bool)

        return run

    for part, (_, own) in list(ATTACKS.items()):
        monkeypatch.setitem(ATTACKS, part, (spy(part), own))
    batch = Collate(able.processor)([make_pictures(2)[i] for i in range(2)])
    parts = ("apgd-ce", "apgd-t", "square") if name == "standard" else (name,)
    for steps in (None, 3):
        attack(name, steps).breaks(able, batch["images"], batch["keys"], batch["labels"])
        assert ran == [(part, steps or ATTACKS[part][1]) for part in parts]
        ran.clear()


@pytest.mark.parametrize("name", ["pgd", "cw", "square", "standard"])
def test_craft_is_full_length_pgd_whatever_the_name(able, name):
    """What stops at its first success hardly fools another model, so what is shown and transferred goes on to the end."""
    batch = Collate(able.processor)([make_pictures(16)[i] for i in range(16)])
    images, keys, labels = batch["images"], batch["keys"], batch["labels"]
    chosen = attack(name, 6, seed=2)
    crafted = chosen.craft(able, images, keys, labels)
    step = 2.5 * chosen.threat.radius / 6
    expected = pgd(
        lambda x: cross_entropy(able.classify(x).logits, labels),
        images,
        chosen.threat,
        steps=6,
        step_size=step,
        noise=Noise(keys, 2),
    )
    assert torch.equal(crafted, expected)
    assert not torch.equal(crafted, attack("pgd", 6, seed=2).breaks(able, images, keys, labels)[0]), "this one stops early"


def test_standard_is_the_worst_case_over_its_parts_picture_by_picture(able):
    """Broken by one part is broken by all together, and nothing else is; each part with the noise that it gets as one of several."""
    batch = Collate(able.processor)([make_pictures(60)[i] for i in range(60)])
    images, keys, labels = batch["images"], batch["keys"], batch["labels"]
    chosen = attack("standard", 3, eps="26/255", seed=4)
    found, broken = chosen.breaks(able, images, keys, labels)
    assert chosen.threat.contains(found, images).all()
    with torch.no_grad():
        assert torch.equal(able.classify(found).logits.argmax(1) != labels, broken)
    first = attack("apgd-ce", 3, eps="26/255", seed=4).breaks(able, images, keys, labels)[1]
    alone = []
    for number, name in enumerate(chosen.parts):
        noise = Noise(keys, 4, draw=number * 1_000_003)
        alone.append(ATTACKS[name][0](lambda x: able.classify(x).logits, images, labels, chosen.threat, 3, noise)[1])
    assert torch.equal(first, alone[0]), "the first part is the attack of that name, to the bit"
    assert torch.equal(broken, alone[0] | alone[1] | alone[2])
    assert first.sum() < broken.sum() < len(images), "a later part adds to the first, or this proves little"


# --- transfer ------------------------------------------------------------------------------------------------------------------


def test_transfer_equals_its_definition(able, proxy):
    """All pictures are attacked on the source, also those it gets wrong, and shown to the target."""
    pictures = make_pictures(20)
    result = transfer(able, proxy, pictures, attack(eps="8/255"), batch_size=7)
    batch = Collate(able.processor)([pictures[i] for i in range(20)])
    x = attack(eps="8/255").craft(able, batch["images"], batch["keys"], batch["labels"])
    with torch.no_grad():
        p, q = (proxy.classify(i).logits.double().softmax(1) for i in (x, batch["images"]))
    assert result["n"] == 20
    assert result["clean"] == pytest.approx(100 * (q.argmax(1) == batch["labels"]).double().mean().item())
    assert result["adversarial"] == pytest.approx(100 * (p.argmax(1) == batch["labels"]).double().mean().item())
    assert result["kl"] == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-3) and result["kl"] > 0


def test_transfer_to_itself_is_the_white_box_attack_and_no_attack_changes_nothing(able, proxy):
    pictures = make_pictures(40)
    score = evaluate(able, pictures, attack(), name="m")
    own = transfer(able, able, pictures, attack())
    assert own["clean"] == score.clean and own["adversarial"] >= score.robust and own["adversarial"] < own["clean"]
    still = transfer(able, proxy, pictures, attack(eps="0"))
    assert still["clean"] == still["adversarial"] and still["kl"] == pytest.approx(0, abs=1e-6)


def test_transfer_leaves_the_global_random_state(able, proxy):
    state = torch.get_rng_state()
    transfer(able, proxy, make_pictures(8), attack())
    assert torch.equal(torch.get_rng_state(), state)


# --- intervals and the record ----------------------------------------------------------------------------------------------------


def test_wilson_solves_its_defining_equation():
    """The ends are the p0 at which |p - p0| = z sqrt(p0 (1 - p0) / n)."""
    for right, n in ((1, 10), (37, 100), (999, 1000), (250, 500)):
        for end in wilson(right, n):
            p0 = end / 100
            assert abs(right / n - p0) == pytest.approx(1.959964 * math.sqrt(p0 * (1 - p0) / n), abs=2e-4)
    assert wilson(0, 50)[0] == 0 and wilson(0, 50)[1] > 5 and wilson(50, 50)[1] == 100 and wilson(0, 0) == (0, 100)


def test_a_score_is_json_and_tells_its_settings(able):
    chosen = attack("cw", 7, eps="3/255", seed=5)
    record = json.loads(json.dumps(evaluate(able, make_pictures(10), chosen, name="mine").to_json()))
    told = {k: record[k] for k in ("model", "dataset", "n", "attack", "norm", "eps", "protocol", "seed", "classes")}
    assert told == {
        "model": "mine",
        "dataset": "made",
        "n": 10,
        "attack": "cw-7",
        "norm": "linf",
        "eps": "3/255",
        "protocol": "input",
        "seed": 5,
        "classes": 5,
    }
    assert record["interval"][0] <= record["robust"] <= record["interval"][1]
    assert record["clean_interval"][0] <= record["clean"] <= record["clean_interval"][1]
    assert {"torch", "transformers", "hpt_hf"} <= record["versions"].keys() and record["hardware"]


def test_another_model_or_other_pictures_are_another_record(able, student):
    a, b = (evaluate(m, make_pictures(6), attack(), name="m") for m in (able, student))
    assert a.fingerprint != b.fingerprint and a.rows == b.rows
    assert evaluate(able, make_pictures(6, seed=9), attack(), name="m").rows != a.rows
    assert mean([dataclasses.replace(a, clean=10.0, robust=1.0), dataclasses.replace(a, clean=20.0, robust=2.0)]) == {
        "clean": 15.0,
        "robust": 1.5,
    }


def test_training_moves_the_score(able, able_path, proxy, tmp_path):
    """The measure can tell a trained student from the one before, or all the above would hold for a constant."""
    before = evaluate(able, make_pictures(), attack(), name="m")
    make_trainer(tmp_path, able, gpd_schedule(learning_rate=0.05), proxy=proxy.set_classes(CLASSES)).train()
    assert stable(evaluate(able, make_pictures(), attack(), name="m")) != stable(before)


def test_too_few_classes_for_the_dlr_loss_are_said(able):
    whole = make_pictures(10)
    kept = [i for i in range(10) if whole[i]["label"] < 3]
    pictures = LabelledPictures(
        Rows([whole[i]["image"] for i in kept], [whole[i]["label"] for i in kept]), CLASSES[:3], name="few"
    )
    (note,) = evaluate(able, pictures, attack("apgd-t", 1), name="m").notes
    assert "needs four classes and there are 3" in note
    assert evaluate(able, pictures, attack("pgd", 1), name="m").notes == ()
    assert attack("standard").notes(3) and not attack("standard").notes(4)
