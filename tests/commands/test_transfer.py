"""Transfer is what it says, pictures attacked for one model and answered by others; and the tables made of it."""

import json

import numpy as np
import pytest
import torch
from conftest import CLASSES, make_images, save_tiny_clip, write_image_folder
from PIL import Image

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.transfer import Transfer, main, matrix, matrix_table, means, ranking, transfer
from hpt_hf.data.collator import Collator
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.evaluation.evaluator import sample
from hpt_hf.evaluation.statistics import wilson
from hpt_hf.models.zero_shot import ZeroShotClassifier

EPS = "16/255"  # breaks about half of what the trained student knows


def attack(eps=EPS, steps=5, **changes) -> EvaluationAttack:
    return EvaluationAttack(ThreatModel("linf", eps), "pgd", steps, **changes)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another architecture that reads pictures of 48 pixels."""
    path = save_tiny_clip(tmp_path_factory.mktemp("other"), patch_size=16, image_size=48, width=24, layers=1, seed=3)
    return ZeroShotClassifier.from_pretrained(path).set_classes(CLASSES)


@pytest.fixture(scope="module")
def trained_path(tmp_path_factory, trained):
    path = tmp_path_factory.mktemp("transfer") / "trained"
    trained.save_pretrained(path)
    return str(path)


def mixed_pictures(count) -> LabelledImages:
    even, sizes = make_images(count), ((32, 32), (48, 40), (40, 64))
    images = [even[i]["image"].resize(sizes[i // 3 % 3], Image.Resampling.BICUBIC) for i in range(count)]
    return LabelledImages.from_images(images, even.labels, CLASSES, name="mixed")


@pytest.mark.parametrize("protocol", ["input", "native"])
def test_transfer_equals_a_plain_loop(protocol, trained, proxy, other):
    """One image at a time; the models read 32 and 48 pixels, and under `native` the images have sizes of their own."""
    images, chosen = mixed_pictures(16), attack(steps=3, protocol=protocol, seed=3)
    models = {"p": proxy, "s": trained.train(), "o": other}
    found = transfer("s", models, images, chosen, batch_size=7)
    assert not trained.training and all(p.grad is None for p in trained.parameters())
    seen = {name: [] for name in models}  # right, right on the attack, KL
    for i in range(len(images)):
        batch = Collator(trained.processor, native=protocol == "native")([images[i]])
        pair = batch["images"], chosen.craft(trained, batch["images"], batch["image_ids"], batch["labels"])
        assert chosen.threat.contains(pair[1], pair[0]).all()
        for name, model in models.items():
            with torch.no_grad():
                before, after = (model.classify(x).logits[0].double().softmax(0) for x in pair)
            answers = [p.argmax().item() == images[i]["label"] for p in (before, after)]
            seen[name].append([*answers, float((after * (after / before).log()).sum())])
    for one in found:
        clean, adversarial, kl = np.sum(seen[one.judge], axis=0)
        assert (one.source, one.dataset, one.n) == ("s", "mixed", 16) and one.interval == wilson(int(adversarial), 16)
        assert (one.clean, one.adversarial) == (pytest.approx(clean / 0.16), pytest.approx(adversarial / 0.16))
        assert one.kl == pytest.approx(kl / 16, abs=1e-3) and one.kl > 0
    assert [one.judge for one in found] == ["p", "s", "o"] and 0 < found[1].adversarial < found[1].clean
    assert len({(t.clean, t.adversarial, t.kl) for t in found}) == 3


def test_a_limit_is_the_same_sample_as_an_evaluations_and_labels_are_needed(trained):
    chosen = make_images().select(sample(40, 15))
    found, expected = (transfer("s", {"s": trained}, images, attack()) for images in (make_images(), chosen))
    limited = transfer("s", {"s": trained}, make_images(), attack(), limit=15)
    assert limited == expected != found and limited[0].n == 15
    with pytest.raises(ValueError, match="has no labels"):
        transfer("s", {"s": trained}, make_images(labelled=False), attack())


def test_the_matrix_holds_every_cell_in_every_set(trained, proxy):
    models, sets = {"s": trained, "p": proxy}, [make_images(10), mixed_pictures(10)]
    found = matrix(models, sets, attack(steps=2), batch_size=5)
    cells = [(t.source, t.judge, t.dataset) for t in found]
    assert sorted(cells) == sorted((s, j, d.name) for s in models for j in models for d in sets)
    assert matrix(models, sets, attack(steps=2), batch_size=5, sources=["p"]) == [t for t in found if t.source == "p"]


def cell(source, judge, dataset, clean, adversarial, kl=0.5, n=10) -> Transfer:
    return Transfer(source, judge, dataset, n, clean, adversarial, (0.0, 100.0), kl)


def test_means_are_unweighted_over_sets_and_the_ranking_is_by_them_without_the_student():
    """The student would be first here, a judge of another student's pictures second."""
    found = [
        *(cell("s", "s", "a", 90.0, 0.0, kl=9.0), cell("s", "s", "b", 90.0, 98.0, kl=9.0, n=1000)),
        *(cell("s", "worse", "a", 80.0, 40.0), cell("s", "worse", "b", 40.0, 10.0, kl=1.5, n=1000)),
        *(cell("s", "better", "a", 60.0, 50.0), cell("s", "better", "b", 60.0, 10.0, n=1000)),
        cell("better", "best elsewhere", "a", 90.0, 90.0),
    ]
    kept = pytest.approx(100 * 25 / 60)
    assert means(found)["s", "worse"] == {"clean": 60.0, "adversarial": 25.0, "kl": 1.0, "kept": kept, "n": 1010}
    assert ranking(means(found), "s") == ["better", "worse"]
    assert means([cell("s", "j", "a", 0.0, 0.0)])["s", "j"]["kept"] == 0


def test_the_worst_surrogate_is_the_lowest_of_the_others_attacks():
    grid = {"a": (1.0, 20.0, 30.0), "b": (40.0, 2.0, 25.0), "c": (50.0, 60.0, 3.0)}
    found = [cell(s, j, "d", 50.0, value) for s, row in grid.items() for j, value in zip(grid, row, strict=True)]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in matrix_table(means(found)).splitlines()]
    shown = [[s, *map(str, row)] for s, row in grid.items()]
    assert rows[2:] == [["(clean)", *["50.0"] * 3], *shown, ["worst surrogate", "40.0", "20.0", "25.0"]]


@pytest.fixture
def flags(tmp_path, trained_path):
    data = write_image_folder(tmp_path / "data", make_images(20))
    return f"--dataset {data} --output_dir {tmp_path / 'out'} --attack_steps 3 --eps {EPS} --limit 15".split()


def test_the_command_writes_the_matrix_and_its_page(flags, tmp_path, trained_path, proxy_path, trained, proxy, capsys):
    main([*flags, "--models", trained_path, proxy_path, trained_path])
    result = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert result["sources"] == result["judges"] == [trained_path, proxy_path], "named twice is meant once"
    assert result["student"] is None and result["ranking"] is None and len(result["cells"]) == 4
    expected = matrix({trained_path: trained, proxy_path: proxy}, [make_images(20)], attack(steps=3), limit=15)
    figures = {(t.source, t.judge): round(t.adversarial, 2) for t in expected}
    assert {(c["source"], c["judge"]): round(c["adversarial"], 2) for c in result["cells"]} == figures
    table = result["table"]
    assert "worst surrogate" in table and table in capsys.readouterr().out
    assert table in (tmp_path / "out" / "report.md").read_text() and (tmp_path / "out" / "report.html").is_file()


def test_with_a_model_the_command_ranks_its_proxies(flags, tmp_path, trained_path, proxy_path, student_path, capsys):
    main([*flags, "--model", trained_path, "--proxies", proxy_path, student_path])
    result = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert result["sources"] == [trained_path] and result["judges"] == [trained_path, proxy_path, student_path]
    figures = {c["judge"]: c["adversarial"] for c in result["cells"]}
    assert result["ranking"] == sorted([proxy_path, student_path], key=lambda name: -figures[name])
    lines = capsys.readouterr().out.splitlines()
    assert all(
        name in line for name, line in zip((*result["ranking"], f"({trained_path} itself)"), lines[2:], strict=True)
    )
