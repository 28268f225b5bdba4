"""Proves that the double answers the real client as the Hub does: what is pushed comes back, and every refusal is the client's own exception.

Run as a script this file is the client's process: the tests' own is offline, and its client read so when it was imported.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    EvalResult,
    ModelCard,
    ModelCardData,
)
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash
from loopback_hub import LoopbackHub, card_problems


def work() -> None:
    """Make the calls that arrive on stdin with the real HfApi, and send back what they return or raise."""
    from huggingface_hub import HfApi

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            endpoint, token, name, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = getattr(HfApi(endpoint=endpoint, token=token), name)(*args, **kwargs)
            answer = True, list(answer) if isinstance(answer, Iterator) else answer
        except Exception as error:
            answer = False, error
        pickle.dump(answer, answers)
        answers.flush()


class Client:
    """One user's HfApi, in another process and called as if it were here."""

    def __init__(self, process: subprocess.Popen, hub: LoopbackHub, token: str | bool):
        self.process, self.hub, self.token = process, hub, token

    def __getattr__(self, name: str):
        def call(*args, **kwargs):
            pickle.dump((self.hub.url, self.token, name, args, kwargs), self.process.stdin)
            self.process.stdin.flush()
            worked, answer = pickle.load(self.process.stdout)
            if not worked:
                raise answer
            return answer

        return call


def start(env: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning", __file__],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    with LoopbackHub() as gone:
        # The endpoint of the environment answers no more: each call has to name its own.
        env = gone.env(tmp_path_factory.mktemp("hf"), token=None)
    with start(env) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub
    assert hub.unknown == []


@pytest.fixture
def alice(process, hub):
    return Client(process, hub, "hf_alice")


@pytest.fixture
def bob(process, hub):
    return Client(process, hub, "hf_bob")


@pytest.fixture
def reader(process, hub):
    """Alice's, but with a token that only reads."""
    return Client(process, hub, "hf_reader")


@pytest.fixture
def nobody(process, hub):
    return Client(process, hub, False)


CARD = """---
license: apache-2.0
pipeline_tag: zero-shot-image-classification
base_model: openai/clip-vit-base-patch32
tags: [clip]
---
# Robust
"""
LARGE = bytes(range(256)) * 2000


@pytest.fixture
def folder(tmp_path):
    """A model as it is pushed: text, text in a folder, large by its name, and large because it is no text."""
    place = tmp_path / "robust"
    (place / "sub" / "deep").mkdir(parents=True)
    (place / "README.md").write_text(CARD)
    (place / "config.json").write_text('{"model_type": "clip"}')
    (place / "sub" / "deep" / "notes with spaces.txt").write_text("ä\r\nb")
    (place / "empty.txt").touch()
    (place / "model.safetensors").write_bytes(LARGE)
    (place / "picture.png").write_bytes(b"\x89PNG\0" + LARGE[:999])
    return place


def contents(folder: Path) -> dict[str, bytes]:
    files = (f for f in Path(folder).rglob("*") if f.is_file() and ".cache" not in f.parts)
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


def without_rules(files: dict) -> dict:
    return {path: content for path, content in files.items() if path != ".gitattributes"}


@pytest.fixture
def pushed(hub, alice, folder):
    alice.create_repo("alice/robust")
    return alice.upload_folder(repo_id="alice/robust", folder_path=folder)


def asked(hub: LoopbackHub, method: str, part: str = "") -> list:
    return [r for r in hub.requests if r.method == method and part in r.path]


def status_of(error: pytest.ExceptionInfo) -> int:
    return error.value.response.status_code


# --- repositories and users -----------------------------------------------------------------------------------------------


def test_a_repository_is_made_once(hub, alice):
    url = alice.create_repo("alice/robust")
    assert url == f"{hub.url}/alice/robust" and url.repo_id == "alice/robust"
    with pytest.raises(HfHubHTTPError, match="You already created this model repo") as error:
        alice.create_repo("alice/robust")
    assert status_of(error) == 409
    assert alice.create_repo("robust", exist_ok=True).repo_id == "alice/robust"
    assert [c.title for c in hub.commits("alice/robust")] == ["initial commit"] and not hub.repos[
        "alice/robust"
    ].private


def test_nobody_makes_a_repository_where_they_may_not(hub, bob, reader, nobody, process):
    stranger = Client(process, hub, "hf_made_up")
    for who, status, message in (
        (bob, 403, "namespace"),
        (reader, 403, "namespace"),
        (nobody, 401, "Invalid username"),
        (stranger, 401, "credentials"),
    ):
        with pytest.raises(HfHubHTTPError, match=message) as error:
            who.create_repo("alice/robust")
        assert status_of(error) == status
    assert hub.repos == {}


def test_a_token_that_may_not_create_still_finds_what_exists(alice, reader):
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.create_repo("alice/robust", exist_ok=True)
    alice.create_repo("alice/robust")
    assert reader.create_repo("alice/robust", exist_ok=True).repo_id == "alice/robust"


def test_tokens_have_a_user_and_a_role(hub, process, alice, reader):
    assert [c.whoami()["name"] for c in (alice, reader)] == ["alice", "alice"]
    assert [c.whoami()["auth"]["accessToken"]["role"] for c in (alice, reader)] == ["write", "read"]
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        Client(process, hub, "hf_made_up").whoami()


def test_a_wrong_token_is_refused_even_what_anyone_may_read(hub, process, pushed, nobody):
    assert nobody.model_info("alice/robust").sha == pushed.oid
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        Client(process, hub, "hf_made_up").model_info("alice/robust")


def test_a_private_repository_is_there_for_its_owner_only(hub, alice, reader, bob, nobody, tmp_path):
    alice.create_repo("alice/secret", private=True)
    alice.upload_file(path_or_fileobj=LARGE, path_in_repo="model.safetensors", repo_id="alice/secret")
    assert alice.model_info("alice/secret").private and reader.repo_exists("alice/secret")
    kept = reader.hf_hub_download("alice/secret", "model.safetensors", cache_dir=tmp_path / "reader")
    assert Path(kept).read_bytes() == LARGE
    for stranger, status in ((bob, 404), (nobody, 401)):
        assert not stranger.repo_exists("alice/secret")
        calls = (
            lambda who: who.model_info("alice/secret"),
            lambda who: who.hf_hub_download("alice/secret", "model.safetensors", cache_dir=tmp_path / "stranger"),
            lambda who: who.snapshot_download("alice/secret", cache_dir=tmp_path / "stranger"),
            lambda who: who.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="alice/secret"),
            lambda who: who.auth_check("alice/secret"),
            lambda who: who.delete_repo("alice/secret") if who is bob else who.list_repo_refs("alice/secret"),
        )
        for call in calls:
            with pytest.raises(RepositoryNotFoundError) as error:
                call(stranger)
            assert status_of(error) == status
    with pytest.raises(HTTPError, match="403"):
        urlopen(
            asked(hub, "GET", "/storage/")[0].path.replace("/storage", f"{hub.storage_url}/storage") + "?signature=0"
        )
    alice.update_repo_settings("alice/secret", private=False)
    assert nobody.repo_exists("alice/secret")


def test_only_the_owner_writes(hub, pushed, alice, bob, reader, nobody):
    for who, status in ((bob, 403), (reader, 403), (nobody, 401)):
        for write in (
            lambda who: who.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="alice/robust"),
            lambda who: who.create_branch("alice/robust", branch="theirs"),
            lambda who: who.create_tag("alice/robust", tag="theirs"),
            lambda who: who.update_repo_settings("alice/robust", private=True),
            lambda who: who.auth_check("alice/robust", write=True),
            lambda who: who.delete_repo("alice/robust"),
        ):
            with pytest.raises(HfHubHTTPError) as error:
                write(who)
            assert status_of(error) == status
        who.auth_check("alice/robust")
    alice.auth_check("alice/robust", write=True)
    assert hub.commits("alice/robust")[0].sha == pushed.oid and list(hub.repos["alice/robust"].branches) == ["main"]


def test_a_deleted_repository_is_gone(hub, pushed, alice):
    alice.delete_repo("alice/robust")
    assert hub.repos == {} and not alice.repo_exists("alice/robust")
    alice.delete_repo("alice/robust", missing_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        alice.delete_repo("alice/robust")


# --- files ----------------------------------------------------------------------------------------------------------------


def test_a_folder_comes_back_byte_for_byte(hub, pushed, alice, nobody, folder, tmp_path):
    assert without_rules(hub.files("alice/robust")) == contents(folder)
    for path, content in contents(folder).items():
        got = nobody.hf_hub_download("alice/robust", path, cache_dir=tmp_path / "one by one")
        assert Path(got).read_bytes() == content, path
    snapshot = Path(nobody.snapshot_download("alice/robust", cache_dir=tmp_path / "at once"))
    assert without_rules(contents(snapshot)) == contents(folder) and snapshot.name == pushed.oid
    # The client's own check: git and LFS hashes of what is on disk against those that the Hub tells.
    verified = nobody.verify_repo_checksums("alice/robust", local_dir=snapshot)
    assert verified.checked_count == 7 and not (verified.mismatches or verified.missing_paths or verified.extra_paths)


def test_large_files_go_to_the_store_and_no_token_with_them(hub, pushed, nobody, tmp_path):
    nobody.hf_hub_download("alice/robust", "model.safetensors", cache_dir=tmp_path)
    stored = asked(hub, "PUT") + asked(hub, "GET", "/storage/")
    assert [r.method for r in stored] == ["PUT", "PUT", "GET"] and {r.path.split("/")[1] for r in stored} == {
        "storage"
    }
    assert {r.status for r in stored} == {200} and not any("authorization" in r.headers for r in stored)
    assert [r.user for r in asked(hub, "POST", "/commit/")] == ["alice"] and not hub.saw(b"hf_alice")
    assert len(asked(hub, "POST", "/lfs/verify")) == 2


def test_a_tree_tells_of_each_file_what_the_client_compares(hub, pushed, nobody, folder):
    tree = {e.path: e for e in nobody.list_repo_tree("alice/robust", recursive=True)}
    assert set(tree) == {*contents(folder), ".gitattributes", "sub", "sub/deep"}
    assert {p for p, e in tree.items() if getattr(e, "lfs", None)} == {"model.safetensors", "picture.png"}
    assert tree["config.json"].blob_id == git_hash(b'{"model_type": "clip"}') and tree["config.json"].size == 22
    lfs = tree["model.safetensors"].lfs
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{lfs.sha256}\nsize {len(LARGE)}\n".encode()
    assert lfs.size == tree["model.safetensors"].size == len(LARGE) and lfs.pointer_size == len(pointer)
    assert tree["model.safetensors"].blob_id == git_hash(pointer)
    assert {e.path for e in nobody.list_repo_tree("alice/robust")} == {p for p in tree if "/" not in p}
    assert [e.path for e in nobody.list_repo_tree("alice/robust", "sub")] == ["sub/deep"]
    told = nobody.get_paths_info("alice/robust", ["sub", "config.json", "absent"])
    assert [e.path for e in told] == ["sub", "config.json"]
    # Large for what it holds and not for its name: the Hub notes it down, else git would take it for text.
    assert b"picture.png filter=lfs" in hub.files("alice/robust")[".gitattributes"]


def test_the_model_page_knows_the_card(pushed, nobody):
    info = nobody.model_info("alice/robust", files_metadata=True)
    assert info.pipeline_tag == "zero-shot-image-classification" and info.tags == ["clip"] and info.author == "alice"
    assert info.card_data.license == "apache-2.0" and info.created_at < info.last_modified
    large = next(s for s in info.siblings if s.rfilename == "model.safetensors")
    assert large.lfs.size == large.size == len(LARGE) and large.blob_id


def test_what_has_not_changed_is_not_sent_again(hub, pushed, alice, folder):
    again = alice.upload_folder(repo_id="alice/robust", folder_path=folder)
    assert again.oid == pushed.oid and len(hub.commits("alice/robust")) == 2
    (folder / "config.json").write_text("{}")
    (folder / "copy.safetensors").write_bytes(LARGE)
    alice.upload_folder(repo_id="alice/robust", folder_path=folder)
    sent = [json.loads(line) for line in asked(hub, "POST", "/commit/")[-1].body.splitlines()]
    assert [s["value"].get("path") for s in sent] == [None, "config.json", "copy.safetensors"]
    assert len(asked(hub, "PUT")) == 2 and without_rules(hub.files("alice/robust")) == contents(folder)


def test_files_and_folders_are_deleted_and_copied(hub, pushed, alice):
    alice.upload_file(path_or_fileobj=b"x", path_in_repo="submarine", repo_id="alice/robust")
    alice.delete_file("config.json", "alice/robust")
    alice.delete_folder("sub", "alice/robust")
    copy = CommitOperationCopy(src_path_in_repo="model.safetensors", path_in_repo="old/model.safetensors")
    alice.create_commit(
        "alice/robust", [copy, CommitOperationDelete("picture.png")], commit_message="Keep the old one"
    )
    files = without_rules(hub.files("alice/robust"))
    assert set(files) == {"README.md", "empty.txt", "model.safetensors", "old/model.safetensors", "submarine"}
    assert files["old/model.safetensors"] == LARGE
    assert without_rules(hub.files("alice/robust", pushed.oid)).keys() >= {"config.json", "picture.png"}
    for absent in (CommitOperationDelete("config.json"), CommitOperationDelete("sub/"), CommitOperationDelete("old")):
        with pytest.raises(RemoteEntryNotFoundError, match="file and folder paths"):
            alice.create_commit("alice/robust", [CommitOperationAdd("new", b"x"), absent], commit_message="Half of it")
    assert "new" not in hub.files("alice/robust")


def test_a_data_set_and_a_model_of_one_name_are_two(hub, alice, tmp_path):
    alice.create_repo("alice/both", repo_type="dataset")
    with pytest.raises(RepositoryNotFoundError):
        alice.model_info("alice/both")
    alice.create_repo("alice/both")
    for content, kind in ((b"rows", "dataset"), (b"weights", "model")):
        alice.upload_file(path_or_fileobj=content, path_in_repo="a.bin", repo_id="alice/both", repo_type=kind)
    got = alice.hf_hub_download("alice/both", "a.bin", repo_type="dataset", cache_dir=tmp_path)
    assert Path(got).read_bytes() == hub.files("datasets/alice/both")["a.bin"] == b"rows"
    assert hub.files("alice/both")["a.bin"] == b"weights" and alice.dataset_info("alice/both").id == "alice/both"


def test_a_download_goes_on_where_it_stopped(hub, pushed):
    def get(part: str) -> tuple[int, str | None, bytes]:
        with urlopen(
            Request(f"{hub.url}/alice/robust/resolve/main/{file}", headers={"Range": f"bytes={part}"})
        ) as answer:
            return answer.status, answer.headers["Content-Range"], answer.read()

    for file, size in (("model.safetensors", len(LARGE)), ("config.json", 22)):
        content = hub.files("alice/robust")[file]
        assert get("10-") == (206, f"bytes 10-{size - 1}/{size}", content[10:])
        assert get("3-5") == (206, f"bytes 3-5/{size}", content[3:6])
        with pytest.raises(HTTPError, match="416"):
            get(f"{size}-")


# --- revisions ------------------------------------------------------------------------------------------------------------


def test_branches_tags_and_commits_name_what_stood_there(hub, pushed, alice, nobody, tmp_path):
    alice.create_tag("alice/robust", tag="v1")
    alice.create_branch("alice/robust", branch="eps/4")
    mine = alice.upload_file(
        path_or_fileobj=b"{1}", path_in_repo="config.json", repo_id="alice/robust", revision="eps/4"
    )
    later = alice.upload_file(
        path_or_fileobj=b"{2}", path_in_repo="config.json", repo_id="alice/robust", commit_message="Two"
    )

    def config(revision: str) -> bytes:
        return Path(
            nobody.hf_hub_download("alice/robust", "config.json", revision=revision, cache_dir=tmp_path)
        ).read_bytes()

    stood = {
        "v1": b'{"model_type": "clip"}',
        pushed.oid: b'{"model_type": "clip"}',
        "eps/4": b"{1}",
        mine.oid: b"{1}",
        "main": b"{2}",
    }
    for revision, content in stood.items():
        assert config(revision) == hub.files("alice/robust", revision)["config.json"] == content
    refs = nobody.list_repo_refs("alice/robust")
    assert {b.name: b.target_commit for b in refs.branches} == {"main": later.oid, "eps/4": mine.oid}
    assert [(t.ref, t.target_commit) for t in refs.tags] == [("refs/tags/v1", pushed.oid)]
    log = nobody.list_repo_commits("alice/robust")
    assert [c.commit_id for c in log] == [c.sha for c in hub.commits("alice/robust")]
    assert [c.title for c in log] == ["Two", "Upload folder using huggingface_hub", "initial commit"] and log[
        0
    ].authors == ["alice"]
    assert nobody.model_info("alice/robust", revision=mine.oid[:7]).sha == mine.oid


def test_branches_and_tags_are_made_once_and_deleted(hub, pushed, alice):
    alice.create_branch("alice/robust", branch="old", revision=hub.commits("alice/robust")[-1].sha)
    alice.create_tag("alice/robust", tag="v1", revision="old")
    assert list(hub.files("alice/robust", "v1")) == [".gitattributes"]
    for make in (
        lambda **k: alice.create_branch("alice/robust", branch="old", **k),
        lambda **k: alice.create_tag("alice/robust", tag="v1", **k),
    ):
        make(exist_ok=True)
        with pytest.raises(HfHubHTTPError, match="already exists") as error:
            make()
        assert status_of(error) == 409
    alice.delete_branch("alice/robust", branch="old")
    alice.delete_tag("alice/robust", tag="v1")
    for again in (
        lambda: alice.delete_branch("alice/robust", branch="old"),
        lambda: alice.delete_tag("alice/robust", tag="v1"),
    ):
        with pytest.raises(RevisionNotFoundError):
            again()
    with pytest.raises(HfHubHTTPError, match="403"):
        alice.delete_branch("alice/robust", branch="main")


def test_a_commit_on_top_of_another_than_the_last_is_refused(hub, pushed, alice):
    first = alice.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="alice/robust", parent_commit=pushed.oid)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        alice.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id="alice/robust", parent_commit=pushed.oid)
    assert status_of(error) == 412
    assert hub.commits("alice/robust")[0].sha == first.oid and hub.files("alice/robust")["a"] == b"1"


def test_what_is_missing_has_the_clients_own_names(hub, pushed, alice, nobody, tmp_path):
    for who, status in ((alice, 404), (nobody, 401)):
        for call in (who.model_info, who.list_repo_tree, who.list_repo_commits, who.list_repo_refs):
            with pytest.raises(RepositoryNotFoundError) as error:
                call("alice/absent")
            assert status_of(error) == status
    for call in (nobody.model_info, nobody.list_repo_tree, nobody.list_repo_commits):
        with pytest.raises(RevisionNotFoundError, match="Invalid rev id: absent"):
            call("alice/robust", revision="absent")
    with pytest.raises(RevisionNotFoundError):
        nobody.hf_hub_download("alice/robust", "config.json", revision="absent", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        alice.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="alice/robust", revision="absent")
    with pytest.raises(RemoteEntryNotFoundError):
        nobody.hf_hub_download("alice/robust", "absent.json", cache_dir=tmp_path)
    with pytest.raises(RemoteEntryNotFoundError):
        nobody.list_repo_tree("alice/robust", "absent")
    assert nobody.file_exists("alice/robust", "config.json") and not nobody.file_exists("alice/robust", "absent.json")


# --- interruptions --------------------------------------------------------------------------------------------------------


def test_a_push_that_is_killed_leaves_no_commit_and_a_repeat_succeeds(hub, alice, folder, tmp_path):
    alice.create_repo("alice/robust")
    # The killed client would otherwise be done before anyone could kill it.
    hub.drop("PUT", "/storage/", after_bytes=1000, times=99)
    with start(hub.env(tmp_path / "hf")) as doomed:
        push = (hub.url, "hf_alice", "upload_folder", (), {"repo_id": "alice/robust", "folder_path": folder})
        pickle.dump(push, doomed.stdin)
        doomed.stdin.flush()
        deadline = time.monotonic() + 20
        while len(asked(hub, "PUT")) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        doomed.kill()
    assert {(r.status, r.size) for r in asked(hub, "PUT")} == {(None, 1000)}
    assert len(hub.commits("alice/robust")) == 1 and not hub.repos["alice/robust"].uploaded
    hub.faults.clear()
    alice.upload_folder(repo_id="alice/robust", folder_path=folder)
    assert without_rules(hub.files("alice/robust")) == contents(folder) and len(hub.commits("alice/robust")) == 2


def test_a_line_that_breaks_once_is_mended_by_the_client(hub, alice):
    alice.create_repo("alice/robust")
    hub.drop("PUT", "/storage/", after_bytes=100_000)
    alice.upload_file(path_or_fileobj=LARGE, path_in_repo="model.safetensors", repo_id="alice/robust")
    assert [(r.status, r.size) for r in asked(hub, "PUT")] == [(None, 100_000), (200, len(LARGE))]
    assert hub.files("alice/robust")["model.safetensors"] == LARGE


def test_a_commit_that_is_cut_off_changes_nothing_and_what_was_stored_stays(hub, alice, folder):
    alice.create_repo("alice/robust")
    hub.drop("POST", "/commit/", after_bytes=300)
    with pytest.raises(Exception, match="(?i)reset|disconnect|broken pipe"):
        alice.upload_folder(repo_id="alice/robust", folder_path=folder)
    assert len(hub.commits("alice/robust")) == 1
    alice.upload_folder(repo_id="alice/robust", folder_path=folder)
    assert without_rules(hub.files("alice/robust")) == contents(folder) and len(asked(hub, "PUT")) == 2


def test_a_store_that_refuses_leaves_no_commit(hub, alice, folder):
    alice.create_repo("alice/robust")
    hub.fail("PUT", "/storage/", status=403, times=2)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        alice.upload_folder(repo_id="alice/robust", folder_path=folder)
    assert len(hub.commits("alice/robust")) == 1
    alice.upload_folder(repo_id="alice/robust", folder_path=folder)
    assert without_rules(hub.files("alice/robust")) == contents(folder)


def test_a_failure_asked_for_comes_as_often_as_asked(hub, pushed, nobody):
    hub.fail("GET", "/api/models/alice/robust$", status=503, times=2)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="503"):
            nobody.model_info("alice/robust")
    assert nobody.model_info("alice/robust").sha == pushed.oid


def post(hub: LoopbackHub, path: str, body: bytes, method: str = "POST"):
    return urlopen(Request(hub.url + path, body, {"Authorization": "Bearer hf_alice"}, method=method))


def test_a_large_file_that_was_never_stored_cannot_be_committed(hub, pushed, alice):
    value = {"path": "weights.bin", "algo": "sha256", "oid": "0" * 64, "size": 3}
    lines = [{"key": "header", "value": {"summary": "s"}}, {"key": "lfsFile", "value": value}]
    with pytest.raises(HTTPError, match="400"):
        post(hub, "/api/models/alice/robust/commit/main", "\n".join(map(json.dumps, lines)).encode())
    assert hub.commits("alice/robust")[0].sha == pushed.oid


def test_a_client_that_goes_away_in_the_middle_of_a_commit_changes_nothing(hub, pushed):
    lines = [{"key": "header", "value": {"summary": "s"}}, {"key": "deletedFile", "value": {"path": "config.json"}}]
    body = "\n".join(map(json.dumps, lines)).encode()
    head = f"POST /api/models/alice/robust/commit/main HTTP/1.1\r\nAuthorization: Bearer hf_alice\r\nContent-Length: {len(body) + 1}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(hub.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + body)
        connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert hub.requests[-1].status is None and hub.requests[-1].size == len(body)
    assert hub.commits("alice/robust")[0].sha == pushed.oid


def test_the_store_takes_only_what_its_name_promises(hub, alice):
    alice.create_repo("alice/robust")
    address = hub._signed("PUT", hub.repos["alice/robust"], "0" * 64)
    with pytest.raises(HTTPError, match="400"):
        urlopen(Request(address, b"other", method="PUT"))
    for forged in (
        address + "0",
        address.partition("=")[0] + "=",
        address.partition("?")[0],
        address.replace("0" * 64, "1" * 64),
    ):
        with pytest.raises(HTTPError, match="403"):
            urlopen(Request(forged, b"other", method="PUT"))
    assert not hub.repos["alice/robust"].uploaded


# --- cards ----------------------------------------------------------------------------------------------------------------


def results(**changes) -> str:
    result = {
        "task": {"type": "x"},
        "dataset": {"type": "cifar10", "name": "CIFAR-10"},
        "metrics": [{"type": "accuracy", "value": 0.0}],
    }
    return f"model-index: {json.dumps([{'name': 'm', 'results': [result | changes]}])}"


GOOD = {
    "all the basics": CARD.split("---")[1],
    "several": "license: [mit, other]\nbase_model: [gpt2, a/b.c-d_e]\ndatasets: [cifar10, uoft-cs/cifar10]",
    "results": results(),
    "no results yet": "model-index: [{name: m, results: []}]",
}
BROKEN = {
    "yaml": ("a: [1", "Invalid YAML"),
    "no object": ("- a\n- b", "must be an object"),
    "licence": ("license: apache-2", "apache-2.0"),
    "pipeline": ("pipeline_tag: zero-shot", "zero-shot-image-classification"),
    "path as base model": ("base_model: /home/me/outputs/clip", "Use a model id"),
    "relative path": ("base_model: ./clip", "Use a model id"),
    "prefix": ("base_model: lab:student", "Use a model id"),
    "three parts": ("datasets: [a/b/c]", "Use a dataset id"),
    "number as tag": ("tags: [4]", "must be a string"),
    "no name": ("model-index: [{results: []}]", '"model-index[0].name" is required'),
    "no results": ("model-index: [{name: m}]", '"model-index[0].results" is required'),
    "no task": (results(task={}), '"model-index[0].results[0].task.type" is required'),
    "no data set": (results(dataset=None), '"model-index[0].results[0].dataset" is required'),
    "no type": (results(dataset={"name": "x"}), '"model-index[0].results[0].dataset.type" is required'),
    "no list": ("model-index: {name: m, results: []}", '"model-index" must be an array'),
    "no value": (results(metrics=[{"type": "accuracy"}]), '"model-index[0].results[0].metrics[0].value" is required'),
}


@pytest.mark.parametrize("metadata", GOOD.values(), ids=GOOD.keys())
def test_a_good_card_has_no_problems(metadata):
    assert card_problems(f"---\n{metadata}\n---\n# Robust") == ([], [])


@pytest.mark.parametrize(("metadata", "problem"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_card_is_named_for_what_is_broken(metadata, problem):
    (error,), warnings = card_problems(f"---\n{metadata}\n---\n# Robust")
    assert problem in error and warnings == []


def test_the_client_hears_of_a_broken_card_before_it_sends_anything(hub, alice):
    alice.create_repo("alice/robust")

    def push(card: str):
        return alice.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="alice/robust")

    with pytest.raises(ValueError, match="Invalid metadata in README.md(?s:.*)base_model(?s:.*)is not valid"):
        push("---\nbase_model: /home/me/clip\n---\n")
    with pytest.raises(UserWarning, match="empty or missing yaml metadata"):
        push("# Robust")
    assert len(hub.commits("alice/robust")) == 1 and not asked(hub, "POST", "/preupload/")
    evaluated = EvalResult(
        task_type="zero-shot-image-classification",
        dataset_type="cifar10",
        dataset_name="CIFAR-10",
        metric_type="accuracy",
        metric_value=36.0,
        metric_name="robust accuracy",
        metric_args={"eps": "4/255"},
    )
    data = ModelCardData(
        license="apache-2.0", eval_results=[evaluated], model_name="robust", base_model="openai/clip-vit-base-patch32"
    )
    push(f"---\n{data.to_yaml()}\n---\n# Robust")
    assert hub.files("alice/robust")["README.md"].startswith(b"---") and len(hub.commits("alice/robust")) == 2


# --- what the double tells a test -----------------------------------------------------------------------------------------


def test_a_secret_is_found_wherever_it_was_sent(hub, alice):
    alice.create_repo("alice/robust")
    secret = b'hf_do/not"tell'
    places = {
        "notes.txt": {"path_or_fileobj": b"x" * 1000 + secret, "path_in_repo": "notes.txt"},
        "weights.bin": {"path_or_fileobj": b"\0" * 1000 + secret, "path_in_repo": "weights.bin"},
        "": {"path_or_fileobj": b"x", "path_in_repo": "a", "commit_message": f"with {secret.decode()}"},
    }
    for name, upload in places.items():
        assert not hub.saw(secret)
        alice.upload_file(repo_id="alice/robust", **upload)
        assert [p.partition(" ")[2] for p in hub.saw(secret)] == [name]
        hub.requests.clear()
    hub.drop("POST", "/commit/", after_bytes=1200)
    with pytest.raises(Exception, match="(?i)reset|disconnect|broken pipe"):
        alice.upload_file(
            repo_id="alice/robust", path_or_fileobj=b"y" * 600 + secret + b"z" * 9000, path_in_repo="b.txt"
        )
    assert hub.saw(secret) == ["/api/models/alice/robust/commit/main"]
    assert not hub.saw(b"hf_alice"), "the header that carries the token is no body"


def test_what_the_double_does_not_know_is_noted(hub, alice, nobody):
    alice.create_repo("alice/robust")
    with pytest.raises(HfHubHTTPError, match="404"):
        nobody.list_models(author="alice")
    with pytest.raises(BadRequestError, match="no pull requests"):
        alice.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="alice/robust", create_pr=True)
    assert hub.unknown == ["GET /api/models", "POST /api/models/alice/robust/commit/main?create_pr"]
    hub.unknown.clear()


def test_where_the_double_itself_breaks_the_test_fails():
    with pytest.raises(RuntimeError, match="(?s)the double itself failed.*JSONDecodeError"), LoopbackHub() as hub:
        with pytest.raises(HTTPError, match="501"):
            post(hub, "/api/repos/create", b"no json")
        assert [(r.method, r.path, r.user, r.size, r.status) for r in hub.requests] == [
            ("POST", "/api/repos/create", "alice", 7, 501)
        ]


def test_the_environment_inherits_nothing_that_concerns_the_hub(hub, tmp_path, monkeypatch):
    for name in (
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_HUB_CACHE",
        "HF_DATASETS_OFFLINE",
    ):
        monkeypatch.setenv(name, "1")
    env = hub.env(tmp_path, token=None)
    told = {n: v for n, v in env.items() if n.startswith(("HF_", "HUGGING", "TRANSFORMERS"))}
    assert told.pop("HF_ENDPOINT") == hub.url and told.pop("HF_HOME") == str(tmp_path)
    assert (
        set(told.values()) == {"1"}
        and all(n.startswith("HF_HUB_DISABLE_") for n in told)
        and "HF_HUB_DISABLE_XET" in told
    )
    assert hub.env(tmp_path)["HF_TOKEN"] == "hf_alice" and env["PATH"] == os.environ["PATH"]


def test_by_hand_it_says_what_to_export(process):
    script = Path(__file__).parent.parent / "loopback_hub.py"
    with subprocess.Popen([sys.executable, script, "--port", "0"], stdout=subprocess.PIPE, text=True) as served:
        lines = [served.stdout.readline().split() for _ in range(3)]
        told = dict(line[1].split("=", 1) for line in lines)
        assert {line[0] for line in lines} == {"export"} and set(told) == {
            "HF_ENDPOINT",
            "HF_HUB_DISABLE_XET",
            "HF_TOKEN",
        }
        with urlopen(
            Request(f"{told['HF_ENDPOINT']}/api/whoami-v2", headers={"Authorization": f"Bearer {told['HF_TOKEN']}"})
        ) as answer:
            assert json.load(answer)["name"] == "alice"
        served.send_signal(signal.SIGINT)
        assert "1 requests; not known here: none" in served.stdout.read()


# --- transformers ---------------------------------------------------------------------------------------------------------

USE = """
import sys, torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, CLIPModel, pipeline

assert AutoConfig.from_pretrained("alice/robust").model_type == "clip"
model = CLIPModel.from_pretrained("alice/robust")
classify = pipeline(model="alice/robust")
assert classify.task == "zero-shot-image-classification" and ModelCard.load("alice/robust").validate() is None
model.push_to_hub("alice/again", private=True)
torch.save(model.state_dict(), sys.argv[1])
"""


def test_transformers_opens_a_clip_by_its_id_and_pushes_it_again(hub, alice, student_path, tmp_path):
    import torch
    from safetensors.torch import load, load_file

    alice.create_repo("alice/robust")
    card = ModelCard(CARD)
    alice.upload_folder(repo_id="alice/robust", folder_path=student_path)
    alice.upload_file(repo_id="alice/robust", path_or_fileobj=str(card).encode(), path_in_repo="README.md")
    script = [sys.executable, "-c", USE, str(tmp_path / "weights.pt")]
    done = subprocess.run(script, env=hub.env(tmp_path / "hf"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    original, opened = load_file(Path(student_path) / "model.safetensors"), torch.load(tmp_path / "weights.pt")
    again = load(hub.files("alice/again")["model.safetensors"])
    assert hub.repos["alice/again"].private and original.keys() == again.keys() <= opened.keys()
    assert all(torch.equal(original[n], opened[n]) and torch.equal(original[n], again[n]) for n in original)
    assert not hub.saw(b"hf_alice")
    # ModelCard.validate is the one call that brings no token.
    without_token = {r.path for r in hub.requests if r.user is None and not r.path.startswith("/storage/")}
    assert without_token - {"/api/agent-harnesses"} == {"/api/validate-yaml"}


if __name__ == "__main__":
    work()
