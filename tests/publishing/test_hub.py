"""Proves, over real HTTP against the loopback double, that a push sends what it should and nothing else, and that whatever goes wrong loses nothing.

It proves that the Hub's protocol is used rightly, not that the real Hub accepts.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, make_pictures
from huggingface_hub import ModelCard, constants
from loopback_hub import LoopbackHub, card_problems
from safetensors.torch import load_file, save_file

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands import push as push_main
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.result import EvalResult
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.publishing.convert_checkpoint import write_open_clip
from hpt_hf.publishing.export import export
from hpt_hf.publishing.hub import push
from hpt_hf.publishing.model_card import own_results
from hpt_hf.utils import write_json

# The client streams weights to the store in a way its own HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("default:Use .content=:DeprecationWarning")
ROOT = Path(__file__).parent.parent.parent
TOKENS = {"hf_alice": "alice", "hf_bob": "bob", "hf_reader": ("alice", "read")}


@pytest.fixture
def hub(monkeypatch):
    """A Hub, and this process's client pointed at it: what HF_ENDPOINT, HF_TOKEN and HF_HUB_DISABLE_XET would say in a process of its own."""
    with LoopbackHub(TOKENS) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        monkeypatch.setattr(
            "huggingface_hub.utils._http.time", types.SimpleNamespace(sleep=lambda _: None, time=time.time)
        )  # tries again at once
        yield hub
        assert hub.unknown == []


@pytest.fixture
def folder(student, tmp_path):
    """An exported model with two Scores of its own, as a run leaves it: beside logs, a checkpoint and the Trainer's pickle."""
    folder = export(
        student,
        tmp_path / "robust",
        records={"convert.json": {"source": "/home/me/x.pt", "base": None, "license": "mit"}},
    )
    for eps in ("1/255", "4/255"):
        attack = EvaluationAttack(ThreatModel("linf", eps), steps=2)
        score = evaluate(student, make_pictures(10), attack, name=str(tmp_path / "robust"), probe=0)
        write_json(folder / "scores" / score.file_name, score.to_json())
    (folder / "training_args.bin").write_bytes(b"hf_a_secret")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"state")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def another(model, folder: Path) -> Path:
    with torch.no_grad():
        model.visual_projection.weight.mul_(torch.linspace(0.5, 1.5, len(model.visual_projection.weight))[:, None])
    return export(model, folder)


def test_what_is_pushed_is_the_model_and_its_scores_and_nothing_else(hub, folder):
    before = contents(folder)
    address = push(folder, "alice/robust")
    files = hub.files("alice/robust")
    assert address.startswith(f"{hub.url}/alice/robust/commit/")
    assert set(files) == {
        *(".gitattributes", "README.md", "config.json", "model.safetensors", "parity.json", "convert.json"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
        *(f"scores/{s.file_name}" for s in own_results(folder)),
    }
    assert len(own_results(folder)) == 2 and len(hub.commits("alice/robust")) == 2
    for name in ("model.safetensors", "config.json", "tokenizer.json", "parity.json"):
        assert files[name] == (folder / name).read_bytes()
    assert contents(folder) == before
    for secret in (b"hf_alice", b"hf_a_secret", str(folder.parent).encode(), b"/home/me"):
        assert hub.saw(secret) == []
    assert hub.saw(b"library_name: transformers")  # so `saw` sees


def test_the_card_is_what_the_hub_accepts_and_its_figures_are_the_scores(hub, folder):
    push(folder, "alice/robust")
    text = hub.files("alice/robust")["README.md"].decode()
    assert card_problems(text) == ([], [])
    card = ModelCard(text)
    card.validate()  # the client's own validation, over HTTP
    assert 'model="alice/robust"' in text and card.data.license == "mit" and card.data.model_name == "robust"
    claimed = {(r.metric_name, r.metric_value) for r in card.data.eval_results}
    scores = own_results(folder)
    assert claimed == {("clean accuracy, %", scores[0].clean)} | {
        (f"robust accuracy, % ({s.attack}, {s.norm} {s.eps})", s.robust) for s in scores
    }
    for s in scores:
        (robust,) = [r for r in card.data.eval_results if f"{s.norm} {s.eps}" in r.metric_name]
        assert robust.metric_args["n"] == s.n and robust.metric_args["interval_95"] == list(s.interval)


def test_a_repeated_push_sends_no_weights_and_a_new_score_is_no_other_model(hub, folder, student):
    push(folder, "alice/robust")
    sent = len([r for r in hub.requests if r.method == "PUT"])
    push(folder, "alice/robust")
    score = evaluate(
        student, make_pictures(10), EvaluationAttack(ThreatModel("linf", "8/255"), steps=2), name="x", probe=0
    )
    write_json(folder / "scores" / score.file_name, score.to_json())
    (folder / "README.md").unlink()
    push(folder, "alice/robust")
    assert sent == 1 and len([r for r in hub.requests if r.method == "PUT"]) == 1
    assert len(ModelCard(hub.files("alice/robust")["README.md"].decode()).data.eval_results) == 4


@pytest.mark.parametrize("fault", ["store", "commit", "cut"])
def test_an_interrupted_push_changes_nothing_and_can_be_repeated(hub, folder, fault):
    before = contents(folder)
    if fault == "cut":  # the connection breaks in the middle of the weights, every time the client tries again
        hub.drop("PUT", ".*", after_bytes=20_000, times=20)
    else:
        hub.fail(*(("PUT", ".*") if fault == "store" else ("POST", ".*/commit/main")), status=500, times=20)
    with pytest.raises(OSError, match="push again"):
        push(folder, "alice/robust")
    assert set(hub.files("alice/robust")) == {".gitattributes"} and contents(folder) == before
    hub.faults.clear()
    push(folder, "alice/robust")
    assert hub.files("alice/robust")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_repository_with_another_model_is_left_alone_until_asked(hub, folder, student, tmp_path):
    other = another(student, tmp_path / "other")
    push(other, "alice/robust")
    stood = hub.files("alice/robust")
    with pytest.raises(
        ValueError,
        match=r"holds other content than .*README.md, .*model.safetensors.*Nothing was changed.*--overwrite",
    ):
        push(folder, "alice/robust")
    assert hub.files("alice/robust") == stood
    push(folder, "alice/robust", overwrite=True)
    assert hub.files("alice/robust")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert (
        hub.files("alice/robust", hub.commits("alice/robust")[1].sha)["model.safetensors"]
        == stood["model.safetensors"]
    )


def test_overwriting_takes_away_weights_that_would_be_opened_instead(hub, folder, student):
    push(folder, "alice/robust")
    export(student, folder, max_shard_size="50KB")
    push(folder, "alice/robust", overwrite=True)
    files = hub.files("alice/robust")
    shards = {name for name in files if name.endswith(".safetensors")}
    assert "model.safetensors" not in files and len(shards) > 1
    assert set(json.loads(files["model.safetensors.index.json"])["weight_map"].values()) == shards


def test_a_card_written_by_someone_on_the_hub_is_not_replaced_unasked(hub, folder):
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo("alice/robust")
    api.upload_file(
        path_or_fileobj=b"---\nlicense: mit\n---\nmy own words\n", path_in_repo="README.md", repo_id="alice/robust"
    )
    with pytest.raises(ValueError, match="holds other content than .*: README.md"):
        push(folder, "alice/robust")
    assert hub.files("alice/robust")["README.md"].endswith(b"my own words\n")


def test_open_clips_form_goes_along_if_it_holds_the_same_weights(hub, folder, student, tmp_path):
    write_open_clip(student, folder)
    push(folder, "alice/robust")
    files = hub.files("alice/robust")
    assert files["open_clip_model.safetensors"] == (folder / "open_clip_model.safetensors").read_bytes()
    assert json.loads(files["open_clip_config.json"])["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "alice/robust"
    other = another(student, tmp_path / "other")
    for file in ("open_clip_config.json", "open_clip_model.safetensors"):
        (other / file).write_bytes((folder / file).read_bytes())
    with pytest.raises(ValueError, match="open_clip_model.safetensors holds other weights"):
        push(other, "alice/other")


def test_revisions_are_branches_that_do_not_hold_each_others_files(hub, folder, student, tmp_path):
    push(folder, "alice/robust")
    other = another(student, tmp_path / "other")
    push(other, "alice/robust", revision="w0.50")
    assert hub.files("alice/robust")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert hub.files("alice/robust", "w0.50")["model.safetensors"] == (other / "model.safetensors").read_bytes()
    assert not any(name.startswith("scores/") for name in hub.files("alice/robust", "w0.50"))


def test_a_private_repository_is_private(hub, folder):
    push(folder, "alice/hidden", private=True)
    assert hub.repos["alice/hidden"].private
    with pytest.raises(PermissionError, match="alice/hidden"):
        push(folder, "alice/hidden", token="hf_bob")


@pytest.mark.parametrize(
    "token, name, message",
    [
        (None, "alice/robust", "no token for .*hf auth login"),
        ("hf_nobody", "alice/robust", "401.*hf auth login"),
        ("hf_reader", "alice/robust", "403.*role 'write'"),
        ("hf_bob", "alice/robust", "403.*a name of your own"),
    ],
)
def test_who_may_not_write_is_told_so_and_nothing_is_sent(hub, folder, monkeypatch, token, name, message):
    before = contents(folder)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PermissionError, match=message) as raised:
        push(folder, name)
    assert "hf_" not in str(raised.value).replace("hf_hub", "").replace("hpt_hf", "") and contents(folder) == before
    assert name not in hub.repos and not any(r.method == "PUT" for r in hub.requests)


def test_a_token_that_may_only_read_is_stopped_at_a_repository_that_exists(hub, folder):
    push(folder, "alice/robust")
    requests = len(hub.requests)
    with pytest.raises(PermissionError, match="403.*role 'write'"):
        push(folder, "alice/robust", token="hf_reader")
    assert not any(r.method == "PUT" or "/commit/" in r.path for r in hub.requests[requests:])


def test_no_hub_there(folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConnectionError, match="127.0.0.1:9.*push again"):
        push(folder, "alice/robust", token="hf_alice")


def shift_mean(folder):
    file = folder / "processor_config.json"
    content = json.loads(file.read_text())
    content["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    file.write_text(json.dumps(content))


def cut_weights(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(50_000)


def change_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"] += 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def only_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def claim_more(folder):
    file = next((folder / "scores").iterdir())
    text = (folder / "README.md").read_text().replace("\n---\n", "\nmodel-index:\n- name: x\n  results: []\n---\n", 1)
    (folder / "README.md").write_text(text)
    assert EvalResult.read(file)


@pytest.mark.parametrize(
    "tamper, message",
    [
        (shift_mean, r"processor in .* says mean \(0.5, 0.5, 0.5\)"),
        (cut_weights, "model.safetensors is damaged"),
        (change_weights, "weights in .* are not those that were checked"),
        (only_a_pickle, "no safetensors, only pytorch_model.bin"),
        (lambda f: (f / "parity.json").unlink(), "no parity.json: .*recipes/convert.py"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (claim_more, "disagree about 3 figures"),
    ],
)
def test_a_folder_that_is_not_what_was_exported_is_not_sent(hub, folder, tamper, message):
    tamper(folder)
    with pytest.raises((ValueError, OSError), match=message):
        push(folder, "alice/robust")
    assert not any(r.method == "PUT" for r in hub.requests)
    assert "alice/robust" not in hub.repos or set(hub.files("alice/robust")) == {".gitattributes"}


def test_the_command_takes_scores_along_and_refuses_those_of_other_weights(hub, folder, student, tmp_path, capsys):
    other = another(student, tmp_path / "other")
    with pytest.raises(SystemExit, match="none of the 2 Scores .* was measured on the weights"):
        push_main.main([str(other), "alice/other", "--scores", str(folder)])
    bare = export(ZeroShotClassifier.from_pretrained(folder), tmp_path / "bare")
    push_main.main([str(bare), "alice/bare", "--scores", str(folder)])
    assert "2 Scores in its card" in capsys.readouterr().out
    assert len(ModelCard(hub.files("alice/bare")["README.md"].decode()).data.eval_results) == 3


def test_bad_arguments_of_the_command(tmp_path):
    with pytest.raises(SystemExit, match="no folder at"):
        push_main.main([str(tmp_path / "none"), "alice/x"])
    with pytest.raises(SystemExit, match="--repo_id"):
        push_main.main([str(tmp_path)])


PULL = """
import json, sys, warnings
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor, CLIPVisionModelWithProjection, pipeline
import torch
classify = pipeline("zero-shot-image-classification", model="alice/robust")
said = classify(sys.argv[1], candidate_labels=["cat", "dog", "house"])
model = AutoModelForZeroShotImageClassification.from_pretrained("alice/robust")
AutoProcessor.from_pretrained("alice/robust")
CLIPVisionModelWithProjection.from_pretrained("alice/robust")
print(json.dumps({"said": said, "class": type(model).__name__, "sum": float(sum(p.detach().double().sum() for p in model.parameters()))}))
"""


def run(command: list[str], env: dict[str, str], **kwargs) -> subprocess.CompletedProcess:
    env = {**env, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=240, **kwargs)


@pytest.mark.multiprocess
def test_from_a_recipe_to_the_hub_to_the_pipeline_of_a_stranger(student_path, proxy_path, tmp_path):
    """Three processes that share nothing but HF_ENDPOINT: training with --push_to_hub and checkpoints, then a pull into an empty cache, then verification."""
    for number in range(24):
        (tmp_path / "pictures" / CLASSES[number % 2]).mkdir(parents=True, exist_ok=True)
        make_pictures(24)[number]["image"].save(tmp_path / "pictures" / CLASSES[number % 2] / f"{number}.png")
    recipe = [
        *("recipes/train.py", "--method", "hpt", "--dataset", str(tmp_path / "pictures"), "--use_cpu", "true"),
        *(
            "--model_name_or_path",
            student_path,
            "--proxy_name_or_path",
            proxy_path,
            "--output_dir",
            str(tmp_path / "out"),
        ),
        *(
            "--num_train_epochs",
            "2",
            "--per_device_train_batch_size",
            "8",
            "--save_strategy",
            "epoch",
            "--save_total_limit",
            "1",
        ),
        *(
            "--push_to_hub",
            "true",
            "--hub_model_id",
            "alice/robust",
            "--hub_strategy",
            "checkpoint",
            "--license",
            "mit",
        ),
    ]
    with LoopbackHub(TOKENS) as hub:
        trained = run(recipe, hub.env(tmp_path / "home1"), cwd=ROOT)
        assert trained.returncode == 0, trained.stderr[-3000:]
        files = hub.files("alice/robust")
        assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
        assert {"README.md", "parity.json", "train.json", "last-checkpoint/optimizer.pt"} <= set(files)
        assert (
            not any("training_args" in name for name in files)
            and not hub.saw(b"hf_alice")
            and not hub.saw(str(tmp_path).encode())
        )
        told = [c.title for c in hub.commits("alice/robust")]
        assert (
            told[0] == "End of training"
            and "Training in progress, step 6" in told
            and "hf_alice" not in trained.stderr + trained.stdout
        )
        assert card_problems(files["README.md"].decode())[0] == []

        pulled = run(
            ["-c", PULL, str(next((tmp_path / "pictures").rglob("*.png")))], hub.env(tmp_path / "home2", token=None)
        )
        assert pulled.returncode == 0, pulled.stderr[-3000:]
        answer = json.loads(pulled.stdout)
        ours = ZeroShotClassifier.from_pretrained(tmp_path / "out")
        assert answer["class"] == "CLIPModel" and answer["sum"] == pytest.approx(
            float(sum(p.detach().double().sum() for p in ours.parameters())), abs=1e-9
        )
        assert {a["label"] for a in answer["said"]} == {"cat", "dog", "house"}

        again = run(recipe, hub.env(tmp_path / "home1"), cwd=ROOT)
        assert (
            again.returncode == 1
            and "alice/robust holds a model already" in again.stderr
            and "--hub_overwrite" in again.stderr
        )
        assert hub.files("alice/robust") == files and hub.unknown == []


@pytest.mark.multiprocess
def test_training_that_could_not_push_fails_before_its_first_step(student_path, proxy_path, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(8):
        make_pictures(8)[number]["image"].save(tmp_path / "pictures" / f"{number}.png")
    recipe = [
        *(
            "recipes/train.py",
            "--method",
            "hpt",
            "--dataset",
            str(tmp_path / "pictures"),
            "--classes",
            "cat",
            "dog",
            "--use_cpu",
            "true",
        ),
        *(
            "--model_name_or_path",
            student_path,
            "--proxy_name_or_path",
            proxy_path,
            "--output_dir",
            str(tmp_path / "out"),
        ),
        *(
            "--max_steps",
            "1",
            "--per_device_train_batch_size",
            "8",
            "--push_to_hub",
            "true",
            "--hub_model_id",
            "bob/robust",
        ),
    ]
    with LoopbackHub(TOKENS) as hub:
        refused = run(recipe, hub.env(tmp_path / "home"), cwd=ROOT)
        assert refused.returncode == 1 and "403" in refused.stderr and "a name of your own" in refused.stderr
        assert "Traceback" not in refused.stderr and not (tmp_path / "out" / "model.safetensors").exists()
        told = run([*recipe, "--hub_token", "hf_alice"], hub.env(tmp_path / "home"), cwd=ROOT)
        assert (
            told.returncode == 1 and "training_args.bin" in told.stderr and "hf_alice" not in told.stderr + told.stdout
        )
