"""A push sends what it should and nothing else, refuses what it must, and whatever goes wrong loses nothing."""

import json
import shutil

import pytest
import torch
from conftest import CLASSES, contents, make_images, make_result, write_image_folder
from huggingface_hub import ModelCard, constants
from loopback_hub import FakeHub, card_data
from transformers import pipeline

from hpt_hf.commands import convert, train
from hpt_hf.commands import push as push_command
from hpt_hf.commands.convert import ConvertArguments
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing.convert_checkpoint import write_open_clip
from hpt_hf.publishing.export import export
from hpt_hf.publishing.hub import holds_model, open_repo, push, push_checkpoint
from hpt_hf.utils import write_json, write_text

NAME = "alice/robust"


@pytest.fixture
def hub(monkeypatch):
    return FakeHub(monkeypatch)


def put_results(folder, *results):
    for result in results:
        write_json(folder / "results" / result.file_name, result.to_json())


@pytest.fixture(scope="module")
def run(student_path, tmp_path_factory):
    """A model with two results of its own, as a run leaves it: beside logs, a checkpoint, the Trainer's pickle."""
    student = ZeroShotClassifier.from_pretrained(student_path)
    record = {"source": "/home/me/x.pt", "base": None, "license": "mit"}
    folder = export(student, tmp_path_factory.mktemp("hub") / "robust", records={"convert.json": record})
    own = {"fingerprint": fingerprint(student), "model": str(folder), "source": {"path": str(folder), "limit": None}}
    put_results(folder, *(make_result(**own, eps=eps) for eps in ("1/255", "4/255")), make_result(dataset="theirs"))
    for name in ("training_args.bin", "checkpoint-3/optimizer.pt", ".env", "runs/events.out", "model_old.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"hf_a_secret")
    return folder


@pytest.fixture
def folder(run, tmp_path):
    return shutil.copytree(run, tmp_path / "robust")


@pytest.fixture(scope="module")
def other(student_path, tmp_path_factory):
    """Another model."""
    student = ZeroShotClassifier.from_pretrained(student_path)
    with torch.no_grad():
        student.model.visual_projection.weight.mul_(1.5)
    return export(student, tmp_path_factory.mktemp("hub") / "other")


def test_what_is_sent_is_what_may_be_sent(hub, folder, run):
    before = contents(folder)
    assert NAME in push(folder, NAME)
    files = hub.files(NAME)
    assert len(hub.repos[NAME].branches["main"]) == 2, "in one commit"
    named = {"README.md", "config.json", "convert.json", "model.safetensors", "parity.json", "processor_config.json"}
    named |= {"tokenizer.json", "tokenizer_config.json", ".gitattributes"}
    results = files.keys() - named
    assert named < files.keys() and len(results) == 2 and all(r.startswith("results/") for r in results)
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes() and contents(folder) == before
    everything = b"".join(files.values())
    assert not any(secret in everything for secret in (b"hf_a_secret", b"/home/me", str(run.parent).encode()))
    text = files["README.md"].decode()
    assert f'model="{NAME}"' in text and card_data(text)["license"] == "mit"
    assert len(card_data(text)["model-index"][0]["results"][0]["metrics"]) == 3


def test_a_link_out_of_the_folder_is_not_followed(hub, folder, tmp_path):
    (folder / "tokenizer.json").rename(tmp_path / "secret")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="tokenizer.json is a link to .*secret, outside of what is pushed"):
        push(folder, NAME)
    assert not hub.files(NAME).keys() - {".gitattributes"}


def test_a_push_can_be_repeated_and_told_anew_and_results_of_others_stay(hub, folder, student):
    hub.fault, before = RuntimeError("upload"), contents(folder)
    with pytest.raises(RuntimeError):
        push(folder, "robust")  # a name of one's own
    assert set(hub.files(NAME)) == {".gitattributes"} and contents(folder) == before
    hub.fault = None
    push(folder, "robust")
    put_results(folder, make_result(fingerprint=fingerprint(student), dataset="dogs"))
    (folder / "README.md").unlink()
    push(folder, NAME)
    assert len(ModelCard(hub.files(NAME)["README.md"].decode()).data.eval_results) == 5
    hub.files(NAME)["results/measured-elsewhere.json"] = b"{}"
    with pytest.raises(ValueError, match="results/measured-elsewhere.json"):
        push(folder, NAME)


def test_another_model_or_card_is_left_alone_until_asked_and_then_nothing_of_it_is_opened(hub, folder, other):
    push(other, NAME)
    stood = dict(hub.files(NAME))
    with pytest.raises(ValueError, match="README.md, .*model.safetensors.*nothing was sent.*--overwrite"):
        push(folder, NAME)
    assert hub.files(NAME) == stood
    hub.files(NAME).update({"pytorch_model.bin": b"", "scores/old.json": b"{}", "last-checkpoint/optimizer.pt": b""})
    export(ZeroShotClassifier.from_pretrained(folder), folder, max_shard_size="50KB")
    push(folder, NAME, overwrite=True)
    files = hub.files(NAME)
    shards = {name for name in files if name.endswith(".safetensors")}
    assert not {"model.safetensors", "pytorch_model.bin", "scores/old.json"} & files.keys() and len(shards) > 1
    assert set(json.loads(files["model.safetensors.index.json"])["weight_map"].values()) == shards
    assert "last-checkpoint/optimizer.pt" in files
    open_repo("alice/words")
    hub.files("alice/words")["README.md"] = b"my own words"
    with pytest.raises(ValueError, match="README.md"):
        push(folder, "alice/words")


def test_open_clips_form_goes_along_if_it_holds_the_same_weights(hub, folder, student, other, tmp_path):
    write_open_clip(student, folder)
    push(folder, NAME)
    files = hub.files(NAME)
    assert files["open_clip_model.safetensors"] == (folder / "open_clip_model.safetensors").read_bytes()
    assert json.loads(files["open_clip_config.json"])["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == NAME
    mixed = shutil.copytree(other, tmp_path / "other")
    for file in ("open_clip_config.json", "open_clip_model.safetensors"):
        shutil.copy(folder / file, mixed)
    with pytest.raises(ValueError, match="open_clip_model.safetensors holds other weights"):
        push(mixed, "alice/other")


FORMS = [  # form, how it is opened, by what, what is sent of it
    ("open_clip", f'create_model_and_transforms("hf-hub:{NAME}")', "open_clip", ("open_clip_config", "tokenizer")),
    ("vision_tower", f'from_pretrained("{NAME}")', "transformers", ("config", "preprocessor_config")),
]


@pytest.mark.parametrize("form, opens, library, sent", FORMS)
def test_every_form_of_convert_can_be_pushed_with_its_results(hub, folder, tmp_path, form, opens, library, sent):
    out = tmp_path / form
    convert.run(ConvertArguments(str(folder), str(out), to=form))
    push_command.adopt(out, folder)
    push(out, NAME)
    files, weights = hub.files(NAME), next(out.glob("*.safetensors"))
    assert {"README.md", *(f"{name}.json" for name in ("parity", "convert", *sent))} <= files.keys()
    assert files[weights.name] == weights.read_bytes()
    assert not any(str(tmp_path).encode() in content for content in files.values())
    text = files["README.md"].decode()
    assert opens in text and "pipeline(" not in text and card_data(text)["library_name"] == library
    assert len([name for name in files if name.startswith("results/")]) == 2
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=f"is not what was checked: {weights.name} changed"):
        push(out, NAME)


def test_revisions_are_branches_that_do_not_hold_each_others_files(hub, folder, other):
    push(folder, NAME, private=True)
    assert holds_model(NAME) == ["model.safetensors"] and holds_model(NAME, "w0.50") == []
    push(other, NAME, revision="w0.50")
    main, branch = hub.files(NAME), hub.files(NAME, "w0.50")
    assert main["model.safetensors"] == (folder / "model.safetensors").read_bytes() and hub.repos[NAME].private
    assert branch["model.safetensors"] == (other / "model.safetensors").read_bytes()
    assert not any(name.startswith("results/") for name in branch)
    assert 'revision="w0.50"' in branch["README.md"].decode()


def test_a_checkpoint_on_the_way_sends_only_what_it_may(hub, folder, tmp_path, capsys):
    open_repo(NAME)
    for name in ("optimizer.pt", "rng_state.pth", "trainer_state.json", "scaler.pt"):
        write_json(folder / name, {"best_model_checkpoint": str(tmp_path / "checkpoint-3")})
    push_checkpoint(folder, NAME, message="step 3")
    assert not any(name.endswith((".pt", ".bin", ".pth")) for name in hub.files(NAME))
    push_checkpoint(folder, NAME, message="step 3", path="last")
    sent = {name for name in hub.files(NAME) if name.startswith("last/")}
    assert {"last/optimizer.pt", "last/trainer_state.json"} < sent
    assert not sent & {"last/training_args.bin", "last/scaler.pt"}
    assert json.loads(hub.files(NAME)["last/trainer_state.json"]) == {"best_model_checkpoint": "checkpoint-3"}
    hub.fault = OSError("no space")
    push_checkpoint(folder, NAME, message="step 6")
    assert "could not be pushed, training goes on: no space" in capsys.readouterr().err


@pytest.mark.parametrize("token, message", [(None, "no token.*hf auth login"), ("hf_reader", "403.*may write")])
@pytest.mark.parametrize("exists", [False, True])
def test_who_may_not_write_is_told_so_and_nothing_is_sent(hub, folder, monkeypatch, token, message, exists):
    if exists:
        open_repo(NAME)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PermissionError, match=message) as raised:
        push(folder, NAME)
    assert not token or token not in str(raised.value)
    assert not hub.sent and (NAME in hub.repos) == exists


def test_no_hub_there(folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConnectionError, match="no connection to http://127.0.0.1:9.*push again"):
        push(folder, NAME, token="hf_alice")


TAMPERED = [  # what `check` tells stands in test_export.py
    (lambda f: write_text(f / "README.md", "---\nmodel-index: []\n---\n"), "disagree about 3 figures"),
    (lambda f: [file.unlink() for file in f.glob("model*")], r"no model\*.safetensors.*hpt-hf convert"),
]


@pytest.mark.parametrize("tamper, message", TAMPERED)
def test_a_folder_that_is_not_what_was_exported_is_not_sent(hub, folder, tamper, message):
    tamper(folder)
    with pytest.raises(ValueError, match=message):
        push(folder, NAME)
    assert hub.sent == [] and not hub.repos


def test_the_command_takes_results_along_and_refuses_those_of_other_weights(hub, folder, other, tmp_path, capsys):
    bare = export(ZeroShotClassifier.from_pretrained(folder), tmp_path / "bare")
    push_command.main([str(bare), "alice/bare", "--results", str(folder), "--private", "true"])
    assert "2 results in its card" in capsys.readouterr().out and hub.repos["alice/bare"].private
    assert len(ModelCard(hub.files("alice/bare")["README.md"].decode()).data.eval_results) == 3
    with pytest.raises(SystemExit, match="hpt-hf push: no result in .* was measured"):
        push_command.main([str(other), NAME, "--results", str(folder)])
    assert NAME not in hub.repos


def test_from_training_to_the_hub_to_the_pipeline_of_a_stranger(hub, student_path, proxy_path, tmp_path):
    data = write_image_folder(tmp_path / "images", make_images(8))
    said = f"--method hpt --dataset {data} --model {student_path} --proxy {proxy_path} --output_dir {tmp_path}/out"
    said += " --use_cpu true --num_train_epochs 1 --per_device_train_batch_size 8 --save_strategy epoch --license mit"
    said += f" --report_to none --push_to_hub true --hub_model_id {NAME} --hub_strategy checkpoint"
    with pytest.raises(SystemExit, match="403.*a name of your own"):
        train.main(said.replace(NAME, "bob/robust").split())
    assert not (tmp_path / "out" / "model.safetensors").exists(), "it fails before its first step"
    train.main(said.split())
    files = hub.files(NAME)
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert {"README.md", "parity.json", "train.json", "last-checkpoint/optimizer.pt"} <= set(files)
    assert not any("training_args" in name for name in hub.sent)
    assert not any(secret in content for secret in (b"hf_alice", str(tmp_path).encode()) for content in files.values())
    assert card_data(files["README.md"].decode())["license"] == "mit"
    for path, content in files.items():
        (tmp_path / "pulled" / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "pulled" / path).write_bytes(content)
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "pulled"))
    assert len(classify(make_images(1)[0]["image"], candidate_labels=list(CLASSES))) == len(CLASSES)
    with pytest.raises(SystemExit, match=f"{NAME} holds a model already.*--hub_overwrite"):
        train.main(said.split())
    assert hub.files(NAME) == files
