"""Proves that an evaluation that is killed, at whatever moment, ends as if it had been left alone, and answers nothing twice."""

from __future__ import annotations

import functools
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CLASSES, make_images, relabelled, write_image_folder
from PIL import Image

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.evaluate import main
from hpt_hf.data.dataset import load_images
from hpt_hf.evaluation import evaluator as evaluation
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.result import read_results
from hpt_hf.evaluation.resume import Findings
from hpt_hf.models.zero_shot import ZeroShotClassifier

ROOT = Path(__file__).parent.parent.parent
EPS = "16/255"  # breaks about half of what the trained student knows
QUESTION = {"model": "abc", "attack": ["pgd", 20]}
FOUND = {
    f"batch {i}": {"ends": [-1, i], "name": 'Ä\u2028\x85 "quoted"\\n'} for i in range(4)
}  # what line breaks could be taken for


def noted(folder, question=QUESTION, rank=0, found=FOUND) -> Path:
    """The file of a journal that holds `found`."""
    known = Findings(folder, question, rank)
    for name, finding in found.items():
        assert known.note(name, finding) == finding == known.get(name)
    return known.file


# --- the file -------------------------------------------------------------------------------------------------------------


def test_findings_survive_reopening(tmp_path):
    noted(tmp_path / "some" / "where")
    assert Findings(tmp_path / "some" / "where", QUESTION).findings == FOUND
    assert Findings(tmp_path / "some" / "where", dict(reversed(QUESTION.items()))).findings == FOUND, (
        "the order of keys says nothing"
    )
    assert Findings(tmp_path / "some" / "where", QUESTION).get("batch 9") is None


@pytest.mark.parametrize("other", [{"model": "abd"}, {"attack": ["pgd", 21]}, {"seed": 0}], ids=str)
def test_another_question_is_another_journal(other, tmp_path):
    noted(tmp_path)
    assert Findings(tmp_path, QUESTION | other).findings == {}
    noted(tmp_path, QUESTION | other, found={"batch 0": {"ends": []}})
    assert Findings(tmp_path, QUESTION).findings == FOUND


def test_a_line_torn_at_any_byte_does_not_count_and_is_not_continued(tmp_path):
    file = noted(tmp_path)
    whole = file.read_bytes()
    *kept, last = whole.splitlines(keepends=True)
    start = len(whole) - len(last)
    assert len(kept) == 3 and len(last) > 20
    for cut in range(start, len(whole)):
        file.write_bytes(whole[:cut])
        known = Findings(tmp_path, QUESTION)
        assert list(known.findings.items()) == list(FOUND.items())[:3], cut
        known.note("batch 3", FOUND["batch 3"])
        assert file.read_bytes() == whole and Findings(tmp_path, QUESTION).findings == FOUND, cut
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_a_process_reads_what_all_have_found_and_writes_only_its_own_file(tmp_path):
    files = [noted(tmp_path, rank=rank, found={f"batch {rank}": {"ends": [rank]}}) for rank in (0, 1, 2)]
    before = [f.read_bytes() for f in files]
    assert len(set(files)) == 3
    for rank in (0, 1, 5):
        assert Findings(tmp_path, QUESTION, rank).findings == {f"batch {r}": {"ends": [r]} for r in (0, 1, 2)}
    Findings(tmp_path, QUESTION, 1).note("batch 4", {})
    assert [f.read_bytes() == b for f, b in zip(files, before, strict=True)] == [True, False, True]
    # The line that another process is just writing is not there yet, and not mine to cut off.
    files[2].write_bytes(before[2][:-4])
    assert "batch 2" not in Findings(tmp_path, QUESTION, 0).findings and files[2].read_bytes() == before[2][:-4]


def test_without_a_folder_it_remembers_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert noted(None) is None and list(tmp_path.iterdir()) == []


def test_lines_that_are_no_findings_are_passed_over(tmp_path):
    file = noted(tmp_path)
    first, *rest = file.read_bytes().splitlines(keepends=True)
    garbage = [
        b"\n",
        b"{\n",
        b"[1, 2]\n",
        b"7\n",
        b'"name"\n',
        b'{"name": "batch 9"}\n',
        b"\xff\xfe\0\n",
        b'{"finding": {}}\n',
        first[:30] + b"\n",
    ]
    file.write_bytes(first + b"".join(garbage) + b"".join(rest) + b"\0\0\0\0")
    known = Findings(tmp_path, QUESTION)
    assert known.findings == FOUND
    known.note("batch 4", {})
    assert Findings(tmp_path, QUESTION).findings == FOUND | {"batch 4": {}}


@pytest.mark.parametrize("written", [0, 5])
def test_a_full_disk_is_an_error_and_loses_nothing_noted_before(written, tmp_path, monkeypatch):
    file = noted(tmp_path)
    opened = Path.open

    def full(self, mode="r", **settings):
        with opened(self, mode, **settings) as disk:
            disk.write('{"name": '[:written])
        raise OSError(28, "No space left on device")

    known = Findings(tmp_path, QUESTION)
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left"):
        known.note("batch 4", {})
    monkeypatch.undo()
    assert file.stat().st_size > 0 and Findings(tmp_path, QUESTION).findings == FOUND
    Findings(tmp_path, QUESTION).note("batch 4", {})
    assert Findings(tmp_path, QUESTION).findings == FOUND | {"batch 4": {}}


def test_a_finding_is_on_disk_when_note_returns(tmp_path):
    known = Findings(tmp_path, QUESTION)
    for count, (name, finding) in enumerate(FOUND.items(), 1):
        known.note(name, finding)
        assert len(Findings(tmp_path, QUESTION, rank=1).findings) == count


# --- what an evaluation makes of it ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_path(tmp_path_factory, trained):
    path = tmp_path_factory.mktemp("journal") / "trained"
    trained.save_pretrained(path)
    return str(path)


@pytest.fixture
def data(tmp_path):
    return write_image_folder(tmp_path / "data", make_images())


CHEAP = [
    c for c in evaluation.CHECKS if c.__name__ in ("quantised", "zero_gradient", "detached", "few_images", "baseline")
]


@pytest.fixture
def counted(monkeypatch):
    """How often batches were answered, batches attacked, and checks run; of the checks only the cheap ones, for time."""
    count = {"attack_batch": 0, "breaks": 0, "checks": 0}

    def counting(call, name):
        @functools.wraps(call)
        def wrapped(*args, **kwargs):
            count[name] += 1
            return call(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(evaluation, "attack_batch", counting(evaluation.attack_batch, "attack_batch"))
    monkeypatch.setattr(EvaluationAttack, "run", counting(EvaluationAttack.run, "breaks"))
    monkeypatch.setattr(evaluation, "CHECKS", tuple(counting(c, "checks") for c in CHEAP))
    return count


def taken(count: dict) -> tuple[int, ...]:
    """The counts, which begin again at 0."""
    result = tuple(count.values())
    count.update(dict.fromkeys(count, 0))
    return result


def measure(model, data, folder, *, probe=4, seed=0, baseline=None):
    attack = EvaluationAttack(ThreatModel("linf", EPS), "pgd", 5, seed=seed)
    pictures = load_images(data) if isinstance(data, str) else data
    return evaluate(model, pictures, attack, name="m", batch_size=8, probe=probe, folder=folder, baseline=baseline)


def stable(score) -> dict:
    return {k: v for k, v in score.to_json().items() if k not in ("seconds", "source")}


def test_a_restart_answers_only_what_the_journal_does_not_hold(trained, data, tmp_path, counted):
    checks = len(CHEAP)
    whole = measure(trained, data, tmp_path / "whole")
    assert taken(counted) == (5, 5, checks) and 0 < whole.robust < whole.clean
    (file,) = (tmp_path / "whole" / "progress").iterdir()
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5 + checks
    for kept in (0, 1, 4, 5, 6, len(lines) - 1, len(lines)):
        place = tmp_path / f"kept{kept}" / "progress" / file.name
        place.parent.mkdir(parents=True)
        place.write_bytes(b"".join(lines[:kept]))
        assert stable(measure(trained, data, place.parent.parent)) == stable(whole)
        batches = max(0, 5 - kept)
        assert taken(counted) == (batches, batches, min(checks, len(lines) - kept)), kept
        assert sorted(
            re.sub(rb'"seconds": [^,]+', b"", line) for line in place.read_bytes().splitlines(keepends=True)
        ) == sorted(re.sub(rb'"seconds": [^,]+', b"", line) for line in lines)


def test_an_evaluation_that_fails_in_the_middle_goes_on_from_there(trained, data, tmp_path, counted, monkeypatch):
    attack_batch = evaluation.attack_batch

    def failing(model, batch, attack, **kwargs):
        if counted["attack_batch"] == 3:
            raise RuntimeError("out of memory")
        return attack_batch(model, batch, attack, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "attack_batch", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            measure(trained, data, tmp_path / "out")
    assert taken(counted) == (3, 3, 0)
    score = measure(trained, data, tmp_path / "out")
    assert taken(counted)[0] == 2
    assert stable(score) == stable(measure(trained, data, None))


def replaced(file: Path) -> None:
    Image.new("RGB", (32, 32), (200, 30, 30)).save(file)


def moved(file: Path) -> None:
    """The same picture, under the same name, at the same place in the order, of another class."""
    file.rename(file.parent.parent / "tree" / file.name)


def test_changed_pictures_under_the_same_path_are_answered_afresh(trained, data, tmp_path, counted):
    before = measure(trained, data, tmp_path / "out", probe=0)
    taken(counted)
    replaced(sorted(Path(data).glob("*/*.png"))[19])
    after = measure(trained, data, tmp_path / "out", probe=0)
    assert taken(counted)[0] == 1, "one batch holds it"
    assert after.images_digest != before.images_digest and stable(after) == stable(
        measure(trained, data, None, probe=0)
    )


def test_corrected_labels_are_answered_afresh(trained, tmp_path, counted):
    """The pictures are the same ones to the last bit, in the same order, so only the labels tell."""
    pictures = make_images()
    before = measure(trained, pictures, tmp_path / "out")
    checks = taken(counted)[2]
    pictures = relabelled(pictures, [4, 4, 4, *pictures.labels[3:]])
    after = measure(trained, pictures, tmp_path / "out")
    assert (
        taken(counted) == (1, 1, checks) and after.images_digest == before.images_digest and after.clean < before.clean
    )
    assert stable(after) == stable(measure(trained, pictures, None))


@pytest.mark.parametrize("change", ["weights", "mean", "seed", "classes", "baseline", "fewer"])
def test_another_model_attack_or_set_is_not_answered_from_the_journal(
    change, trained_path, student_path, tmp_path, counted
):
    model, pictures, more = ZeroShotClassifier.from_pretrained(trained_path), make_images(), {}
    measure(model, pictures, tmp_path)
    first = taken(counted)[0]
    if change == "weights":
        model.model.visual_projection.weight.data[0, 0] += 1e-6
    elif change == "mean":
        model.mean += 0.1
    elif change == "classes":
        pictures = pictures.with_classes((*CLASSES[1:], CLASSES[0]))
    elif change == "fewer":
        pictures = pictures.select(range(39))
    else:
        more = {"seed": 1} if change == "seed" else {"baseline": ZeroShotClassifier.from_pretrained(student_path)}
    measure(model, pictures, tmp_path, **more)
    assert taken(counted)[0] == first == 5


def command_line(model: str, data: str, folder) -> list[str]:
    flags = f"--batch_size 8 --attack apgd-ce square --attack_steps 20 --probe 4 --eps {EPS}"
    return [*flags.split(), "--model", model, "--dataset", data, "--output_dir", str(folder)]


def results(folder: Path) -> dict[str, str]:
    """The files an evaluation leaves for its reader, the seconds it took apart."""
    files = [*folder.glob("results/*"), *folder.glob("gallery/*"), folder / "report.md", folder / "report.html"]
    seconds = r'"seconds": [\d.]+|[\d.]+ s on '  # in the results, on the page
    return {str(f.relative_to(folder)): re.sub(seconds, "", f.read_text()) for f in files}


def test_a_second_run_writes_the_same_files_without_any_attack(trained_path, data, tmp_path, counted, capsys):
    main(command_line(trained_path, data, tmp_path / "out"))
    assert taken(counted) == (10, 10, 2 * len(CHEAP))
    first = {f: f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert len(first) == 8
    main(command_line(trained_path, data, tmp_path / "out"))
    assert taken(counted) == (0, 0, 0)
    assert {f: f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()} == first, (
        "to the last byte, `seconds` too"
    )
    said = capsys.readouterr().out
    assert said[: len(said) // 2] == said[len(said) // 2 :]


# --- the real thing ---------------------------------------------------------------------------------------------------------


def start(model, data, folder) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "recipes" / "evaluate.py"), *command_line(model, data, folder)]
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def lines_in(folder: Path) -> int:
    return sum(f.read_bytes().count(b"\n") for f in folder.glob("progress/*.jsonl"))


def killed_at(moments: list[int], model: str, data: str, folder: Path, rng: random.Random) -> list[int]:
    """Start again and again, SIGKILL at each number of lines in the journals and a breath later. Returns the lines that stood then."""
    stood = []
    for moment in moments:
        process = start(model, data, folder)
        deadline = time.time() + 100
        while lines_in(folder) < moment:
            assert process.poll() is None and time.time() < deadline, Path(f"{folder}.log").read_text()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        assert process.wait() == -9, "killed too late to prove anything"
        stood.append(lines_in(folder))
    return stood


def kill_and_compare(moments, model, data, tmp_path, rng) -> None:
    alone = start(model, data, tmp_path / "alone")
    stood = killed_at(moments, model, data, tmp_path / "killed", rng)
    print(f"killed at {stood} lines of the journals")
    assert stood == sorted(stood) and all(line >= moment for line, moment in zip(stood, moments, strict=True))
    for process, name in ((alone, "alone"), (start(model, data, tmp_path / "killed"), "killed")):
        assert process.wait(timeout=200) == 0, (tmp_path / f"{name}.log").read_text()
    ours, theirs = results(tmp_path / "killed"), results(tmp_path / "alone")
    assert len(ours) == 6 and ours == theirs
    robust = {s.attack: s.robust for s in read_results(tmp_path / "killed" / "results")}
    assert set(robust) == {"apgd-ce-20", "square-20"} and 0 < robust["apgd-ce-20"] < 100
    # Nothing that stood was found again: every name once.
    for file in (tmp_path / "killed" / "progress").iterdir():
        names = [json.loads(line)["name"] for line in file.read_text().splitlines()]
        assert len(names) == len(set(names)) == BATCHES + len(evaluation.CHECKS)
    assert not list((tmp_path / "killed").rglob("*.part"))


BATCHES = 5
# Lines of the journals in which each stage of the two attacks lies: batches of the first, its checks, the same of the second.
PER_ATTACK = BATCHES + len(evaluation.CHECKS)
STAGES = ((1, 4), (6, PER_ATTACK - 2), (PER_ATTACK + 1, PER_ATTACK + 3), (PER_ATTACK + 6, 2 * PER_ATTACK - 6))


@pytest.mark.multiprocess
def test_a_killed_evaluation_ends_like_one_left_alone(trained_path, data, tmp_path):
    """SIGKILL in the first attack's batches, in its checks, in the second's batches, in its checks, all in one folder."""
    rng = random.Random(7)
    kill_and_compare([rng.randint(*stage) for stage in STAGES], trained_path, data, tmp_path, rng)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_an_evaluation_killed_ten_times_ends_like_one_left_alone(trained_path, data, tmp_path):
    rng = random.Random(11)
    kill_and_compare(sorted(rng.sample(range(1, 2 * PER_ATTACK - 5), 10)), trained_path, data, tmp_path, rng)
