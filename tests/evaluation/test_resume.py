"""Proves that an evaluation that is killed, whenever, ends as if it had been left alone, and asks nothing twice."""

from __future__ import annotations

import copy
import functools
import re
import shutil
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import CLASSES, make_images, write_image_folder
from PIL import Image

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.evaluate import main
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.evaluation import evaluator as evaluation
from hpt_hf.evaluation import resume
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.resume import Findings
from hpt_hf.evaluation.sanity_checks import CHECKS
from hpt_hf.models import zero_shot
from hpt_hf.models.zero_shot import ZeroShotClassifier

EPS = "16/255"  # breaks about half of what the trained student knows
QUESTION = {"model": "abc", "attack": ["pgd", 20]}
# With what line breaks could be taken for.
FOUND = {f"batch {i}": {"ends": [-1, i], "name": 'Ä\u2028\x85 "quoted"\\n'} for i in range(4)}


def noted(folder, question=QUESTION, rank=0, found=FOUND) -> Path:
    """The file that holds `found`."""
    known = Findings(folder, question, rank)
    for count, (name, finding) in enumerate(found.items(), 1):
        assert known.note(name, finding) == finding == known.get(name)
        if folder:
            assert len(Findings(folder, question, rank=7).findings) >= count, "on disk when note returns"
    return known.file


def test_findings_survive_reopening_and_belong_to_one_question(tmp_path, monkeypatch):
    for other in ({"model": "abd"}, {"attack": ["pgd", 21]}, {"seed": 0}):
        noted(tmp_path / "here", QUESTION | other, found={"batch 0": {"ends": []}})
        assert Findings(tmp_path / "here", QUESTION).findings == {}
    noted(tmp_path / "here")
    assert Findings(tmp_path / "here", dict(reversed(QUESTION.items()))).findings == FOUND
    monkeypatch.chdir(tmp_path)
    assert noted(None) is None and [f.name for f in tmp_path.iterdir()] == ["here"], "without a folder it remembers"


def test_a_line_torn_at_any_byte_does_not_count_and_is_not_continued(tmp_path):
    file = noted(tmp_path)
    whole = file.read_bytes()
    for cut in range(whole[:-1].rfind(b"\n") + 1, len(whole)):
        file.write_bytes(whole[:cut])
        known = Findings(tmp_path, QUESTION)
        assert list(known.findings.items()) == list(FOUND.items())[:3], cut
        known.note("batch 3", FOUND["batch 3"])
        assert file.read_bytes() == whole and Findings(tmp_path, QUESTION).findings == FOUND, cut


def test_a_process_reads_what_all_have_found_and_writes_only_its_own_file(tmp_path):
    files = [noted(tmp_path, rank=rank, found={f"batch {rank}": {"ends": [rank]}}) for rank in (0, 1, 2)]
    before = [f.read_bytes() for f in files]
    for rank in (0, 1, 5):
        assert Findings(tmp_path, QUESTION, rank).findings == {f"batch {r}": {"ends": [r]} for r in (0, 1, 2)}
    Findings(tmp_path, QUESTION, 1).note("batch 4", {})
    assert [f.read_bytes() == b for f, b in zip(files, before, strict=True)] == [True, False, True]
    # The line that another process is just writing is not there yet, and not mine to cut off.
    files[2].write_bytes(before[2][:-4])
    assert "batch 2" not in Findings(tmp_path, QUESTION, 0).findings and files[2].read_bytes() == before[2][:-4]


def test_lines_that_are_no_findings_are_passed_over(tmp_path):
    file = noted(tmp_path)
    first, *rest = file.read_bytes().splitlines(keepends=True)
    garbage = b'\n{\n[1, 2]\n7\n"name"\n{"name": "batch 9"}\n\xff\xfe\0\n{"finding": {}}\n' + first[:30] + b"\n"
    file.write_bytes(first + garbage + b"".join(rest) + b"\0\0\0\0")
    Findings(tmp_path, QUESTION).note("batch 4", {})
    assert Findings(tmp_path, QUESTION).findings == FOUND | {"batch 4": {}}


def test_a_full_disk_is_an_error_and_loses_nothing_noted_before(tmp_path, monkeypatch):
    noted(tmp_path)
    monkeypatch.setattr(resume.os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        Findings(tmp_path, QUESTION).note("batch 4", {})
    assert Findings(tmp_path, QUESTION).findings.items() >= FOUND.items()


CHEAP = tuple(c for c in CHECKS if c.__name__ in ("quantised", "zero_gradient", "detached", "few_images", "baseline"))


@pytest.fixture
def counted(monkeypatch):
    """Returns how often since the last call batches were asked and attacked, and checks run, of these the cheap ones."""
    count = Counter()

    def counting(call, name):
        return functools.wraps(call)(lambda *args, **kwargs: count.update([name]) or call(*args, **kwargs))

    monkeypatch.setattr(evaluation, "attack_batch", counting(evaluation.attack_batch, "batches"))
    monkeypatch.setattr(EvaluationAttack, "run", counting(EvaluationAttack.run, "attacks"))
    monkeypatch.setattr(evaluation, "CHECKS", tuple(counting(c, "checks") for c in CHEAP))
    return lambda: tuple(count.pop(name, 0) for name in ("batches", "attacks", "checks"))


def measure(model, images, folder, *, seed=0, **settings):
    attack = EvaluationAttack(ThreatModel("linf", EPS), "pgd", 5, seed=seed)
    return evaluate(model, images, attack, name="m", batch_size=8, probe=4, folder=folder, **settings)


def stable(result) -> dict:
    return result.to_json() | {"seconds": None}


@pytest.fixture(scope="module")
def known(tmp_path_factory, trained) -> Path:
    """The folder of a whole evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "CHECKS", CHEAP)
        whole = measure(trained, make_images(), folder := tmp_path_factory.mktemp("known"))
    assert 0 < whole.robust < whole.clean
    return folder


def without_seconds(lines: list[bytes]) -> list[bytes]:
    return sorted(re.sub(rb'"seconds": [^,]+', b"", line) for line in lines)


@pytest.mark.parametrize("kept", [0, 1, 5, 9, 10])
def test_a_restart_asks_only_what_is_not_known(kept, known, trained, tmp_path, counted):
    (file,) = (known / "progress").iterdir()
    lines, place = file.read_bytes().splitlines(keepends=True), tmp_path / "progress" / file.name
    assert len(lines) == 5 + len(CHEAP) == 10
    place.parent.mkdir()
    place.write_bytes(b"".join(lines[:kept]))
    result = measure(trained, make_images(), tmp_path)
    left = max(0, 5 - kept)
    assert counted() == (left, left, min(5, 10 - kept))
    assert stable(result) == stable(measure(trained, make_images(), None))
    assert without_seconds(place.read_bytes().splitlines(keepends=True)) == without_seconds(lines)


@pytest.mark.parametrize(
    "change", ["weights", "mean", "tokenizer", "seed", "classes", "baseline", "fewer", "image", "labels"]
)
def test_what_has_changed_is_asked_afresh(change, known, trained, student_path, tmp_path, counted, monkeypatch):
    folder, model = shutil.copytree(known, tmp_path / "known"), copy.deepcopy(trained)
    images, more, asked = make_images(), {}, 5
    if change == "weights":
        model.model.visual_projection.weight.data[0, 0] += 1e-6
    elif change == "mean":
        model.mean += 0.1
    elif change == "tokenizer":  # only the class embeddings tell that the prompts were read otherwise
        build = zero_shot.build_zero_shot_head
        monkeypatch.setattr(zero_shot, "build_zero_shot_head", lambda *a, **k: build(*a, **k).roll(1, 0))
    elif change == "classes":
        images = images.with_classes((*CLASSES[1:], CLASSES[0]))
    elif change == "fewer":
        images = images.select(range(39))
    elif change in ("image", "labels"):  # of one batch
        pictures, labels, asked = [row["image"] for row in images], list(images.labels), 1
        if change == "image":
            pictures[19] = Image.new("RGB", (32, 32), (200, 30, 30))
        else:
            labels[:3] = [4, 4, 4]
        images = LabelledImages.from_images(pictures, labels, CLASSES, name="made")
    else:
        more = {"seed": 1} if change == "seed" else {"baseline": ZeroShotClassifier.from_pretrained(student_path)}
    result = measure(model, images, folder, **more)
    assert counted()[::2] == (asked, len(CHEAP))
    assert stable(result) == stable(measure(model, images, None, **more))


def test_a_second_run_writes_the_same_files_without_any_attack(trained, tmp_path, counted, capsys):
    trained.save_pretrained(tmp_path / "trained")
    data, out, found = write_image_folder(tmp_path / "data", make_images()), tmp_path / "out", []
    flags = f"--batch_size 8 --attack apgd-ce square --attack_steps 20 --probe 4 --eps {EPS} --dataset {data}"
    for asked in ((10, 10, 2 * len(CHEAP)), (0, 0, 0)):
        main([*flags.split(), "--model", str(tmp_path / "trained"), "--output_dir", str(out)])
        assert counted() == asked
        said = capsys.readouterr()
        found.append(({f: f.read_bytes() for f in out.rglob("*") if f.is_file()}, said.out))
        assert "few_images" in said.err, "what is raised is told at once"
    assert len(found[0][0]) == 8 and found[0] == found[1], "to the last byte, `seconds` too"
