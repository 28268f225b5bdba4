"""Proves that an evaluation that is killed, at whatever moment, ends as if it had been left alone, and asks nothing twice."""

from __future__ import annotations

import functools
import re
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
from hpt_hf.evaluation.resume import Findings
from hpt_hf.models import zero_shot
from hpt_hf.models.zero_shot import ZeroShotClassifier

ROOT = Path(__file__).parent.parent.parent
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


# --- the file


def test_findings_survive_reopening_and_belong_to_one_question(tmp_path):
    noted(tmp_path / "some" / "where")
    for question in (QUESTION, dict(reversed(QUESTION.items()))):
        assert Findings(tmp_path / "some" / "where", question).findings == FOUND
    for other in ({"model": "abd"}, {"attack": ["pgd", 21]}, {"seed": 0}):
        assert Findings(tmp_path / "some" / "where", QUESTION | other).findings == {}
        noted(tmp_path / "some" / "where", QUESTION | other, found={"batch 0": {"ends": []}})
    assert Findings(tmp_path / "some" / "where", QUESTION).findings == FOUND


def test_a_line_torn_at_any_byte_does_not_count_and_is_not_continued(tmp_path):
    file = noted(tmp_path)
    whole = file.read_bytes()
    *kept, last = whole.splitlines(keepends=True)
    assert len(kept) == 3 and len(last) > 20
    for cut in range(len(whole) - len(last), len(whole)):
        file.write_bytes(whole[:cut])
        known = Findings(tmp_path, QUESTION)
        assert list(known.findings.items()) == list(FOUND.items())[:3], cut
        known.note("batch 3", FOUND["batch 3"])
        assert file.read_bytes() == whole and Findings(tmp_path, QUESTION).findings == FOUND, cut
    assert list(tmp_path.iterdir()) == [file]


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


def test_without_a_folder_it_remembers_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert noted(None) is None and list(tmp_path.iterdir()) == []


def test_lines_that_are_no_findings_are_passed_over(tmp_path):
    file = noted(tmp_path)
    first, *rest = file.read_bytes().splitlines(keepends=True)
    garbage = b'\n{\n[1, 2]\n7\n"name"\n{"name": "batch 9"}\n\xff\xfe\0\n{"finding": {}}\n' + first[:30] + b"\n"
    file.write_bytes(first + garbage + b"".join(rest) + b"\0\0\0\0")
    known = Findings(tmp_path, QUESTION)
    assert known.findings == FOUND
    known.note("batch 4", {})
    assert Findings(tmp_path, QUESTION).findings == FOUND | {"batch 4": {}}


@pytest.mark.parametrize("written", [0, 5])
def test_a_full_disk_is_an_error_and_loses_nothing_noted_before(written, tmp_path, monkeypatch):
    noted(tmp_path)
    opened = Path.open

    def full(self, mode="r", **settings):
        with opened(self, mode, **settings) as disk:
            disk.write('{"name": '[:written])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        known = Findings(tmp_path, QUESTION)
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match="No space left"):
            known.note("batch 4", {})
    again = Findings(tmp_path, QUESTION)
    assert again.findings == FOUND
    again.note("batch 4", {})
    assert Findings(tmp_path, QUESTION).findings == FOUND | {"batch 4": {}}


# --- what an evaluation makes of it


@pytest.fixture(scope="module")
def trained_path(tmp_path_factory, trained):
    path = tmp_path_factory.mktemp("resume") / "trained"
    trained.save_pretrained(path)
    return str(path)


@pytest.fixture
def data(tmp_path):
    return write_image_folder(tmp_path / "data", make_images())


CHEAP = ("quantised", "zero_gradient", "detached", "few_images", "baseline")


@pytest.fixture
def counted(monkeypatch):
    """How often batches were asked, batches attacked, and checks run; of the checks only the cheap ones, for time."""
    count = {"batches": 0, "attacks": 0, "checks": 0}

    def counting(call, name):
        @functools.wraps(call)
        def wrapped(*args, **kwargs):
            count[name] += 1
            return call(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(evaluation, "attack_batch", counting(evaluation.attack_batch, "batches"))
    monkeypatch.setattr(EvaluationAttack, "run", counting(EvaluationAttack.run, "attacks"))
    cheap = tuple(counting(c, "checks") for c in evaluation.CHECKS if c.__name__ in CHEAP)
    monkeypatch.setattr(evaluation, "CHECKS", cheap)
    return count


def taken(count: dict) -> tuple[int, ...]:
    """The counts, which begin again at 0."""
    result = tuple(count.values())
    count.update(dict.fromkeys(count, 0))
    return result


def measure(model, data, folder, *, seed=0, **settings):
    attack = EvaluationAttack(ThreatModel("linf", EPS), "pgd", 5, seed=seed)
    images = load_images(data) if isinstance(data, str) else data
    return evaluate(model, images, attack, **{"name": "m", "batch_size": 8, "probe": 4, "folder": folder} | settings)


def stable(result) -> dict:
    return {k: v for k, v in result.to_json().items() if k not in ("seconds", "source")}


def without_seconds(lines: list[bytes]) -> list[bytes]:
    return sorted(re.sub(rb'"seconds": [^,]+', b"", line) for line in lines)


def test_a_restart_asks_only_what_is_not_known(trained, data, tmp_path, counted):
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
        left = max(0, 5 - kept)
        assert taken(counted) == (left, left, min(checks, len(lines) - kept)), kept
        assert without_seconds(place.read_bytes().splitlines(keepends=True)) == without_seconds(lines)


def test_an_evaluation_that_fails_in_the_middle_goes_on_from_there(trained, data, tmp_path, counted, monkeypatch):
    attack_batch = evaluation.attack_batch

    def failing(*args, **kwargs):
        if counted["batches"] == 3:
            raise RuntimeError("out of memory")
        return attack_batch(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(evaluation, "attack_batch", failing)
        measure(trained, data, tmp_path / "out")
    assert taken(counted) == (3, 3, 0)
    result = measure(trained, data, tmp_path / "out")
    assert taken(counted)[0] == 2 and stable(result) == stable(measure(trained, data, None))


def test_changed_images_under_the_same_path_are_asked_afresh(trained, data, tmp_path, counted):
    before = measure(trained, data, tmp_path / "out", probe=0)
    taken(counted)
    Image.new("RGB", (32, 32), (200, 30, 30)).save(sorted(Path(data).glob("*/*.png"))[19])
    after = measure(trained, data, tmp_path / "out", probe=0)
    assert taken(counted)[0] == 1, "one batch holds it"
    assert after.images_digest != before.images_digest
    assert stable(after) == stable(measure(trained, data, None, probe=0))


def test_corrected_labels_are_asked_afresh(trained, tmp_path, counted):
    """The images are the same ones to the last bit, in the same order, so only the labels tell."""
    images = make_images()
    before = measure(trained, images, tmp_path / "out")
    taken(counted)
    images = relabelled(images, [4, 4, 4, *images.labels[3:]])
    after = measure(trained, images, tmp_path / "out")
    assert taken(counted) == (1, 1, len(CHEAP))
    assert after.images_digest == before.images_digest and after.clean < before.clean
    assert stable(after) == stable(measure(trained, images, None))


@pytest.mark.parametrize("change", ["weights", "mean", "seed", "classes", "baseline", "fewer"])
def test_another_model_attack_or_set_is_another_question(change, trained_path, student_path, tmp_path, counted):
    model, images, more = ZeroShotClassifier.from_pretrained(trained_path), make_images(), {}
    measure(model, images, tmp_path)
    first = taken(counted)[0]
    if change == "weights":
        model.model.visual_projection.weight.data[0, 0] += 1e-6
    elif change == "mean":
        model.mean += 0.1
    elif change == "classes":
        images = images.with_classes((*CLASSES[1:], CLASSES[0]))
    elif change == "fewer":
        images = images.select(range(39))
    else:
        more = {"seed": 1} if change == "seed" else {"baseline": ZeroShotClassifier.from_pretrained(student_path)}
    measure(model, images, tmp_path, **more)
    assert taken(counted)[0] == first == 5


def command_line(model: str, data: str, folder) -> list[str]:
    flags = f"--batch_size 8 --attack apgd-ce square --attack_steps 20 --probe 4 --eps {EPS}"
    return [*flags.split(), "--model", model, "--dataset", data, "--output_dir", str(folder)]


def test_a_second_run_writes_the_same_files_without_any_attack(trained_path, data, tmp_path, counted, capsys):
    found = []
    for asked in ((10, 10, 2 * len(CHEAP)), (0, 0, 0)):
        main(command_line(trained_path, data, tmp_path / "out"))
        assert taken(counted) == asked
        files = {f: f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()}
        found.append((files, capsys.readouterr().out))
    assert len(files) == 8 and found[0] == found[1], "to the last byte, `seconds` too"


def test_another_tokenizer_is_another_question(trained, tmp_path, monkeypatch):
    """Equal weights, configuration and names: only the class embeddings tell that the prompts were read otherwise."""
    images, attack = make_images(20), EvaluationAttack(ThreatModel("linf", EPS), "pgd", 2)
    first = evaluate(trained, images, attack, name="m", probe=0, folder=tmp_path)
    build = zero_shot.build_zero_shot_head
    monkeypatch.setattr(zero_shot, "build_zero_shot_head", lambda *a, **k: build(*a, **k).roll(1, 0))
    cached = evaluate(trained, images, attack, name="m", probe=0, folder=tmp_path)
    afresh = evaluate(trained, images, attack, name="m", probe=0)
    assert (cached.n_clean, cached.n_robust) == (afresh.n_clean, afresh.n_robust)
    assert cached.n_clean != first.n_clean
