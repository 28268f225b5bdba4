"""A Hub in memory behind the six calls of `HfApi` that a push makes; `upload_folder` itself is the client's own.

It shows what would be sent and how refusals are told, not that the real Hub accepts.
"""

from __future__ import annotations

import fnmatch
import hashlib
from dataclasses import dataclass
from types import SimpleNamespace

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

LARGE = ("*.safetensors", "*.bin", "*.pt", "*.pth")  # what goes to the store for large files


def http_error(status: int, kind=HfHubHTTPError):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} for a request", response=response, server_message=f"refused with {status}")


@dataclass
class Repo:
    private: bool | None
    branches: dict[str, list[dict[str, bytes]]]  # name -> the files of each of its commits, the oldest first


class FakeHub:
    """`roles`: token -> (owner, may it write). `fault`: raised in place of the next commits."""

    roles = {"hf_alice": ("alice", True), "hf_reader": ("alice", False), "hf_bob": ("bob", True)}

    def __init__(self, monkeypatch):
        self.repos: dict[str, Repo] = {}
        self.sent: list[str] = []  # every path of every commit
        self.fault: Exception | None = None
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        calls = "create_repo auth_check list_repo_commits create_branch list_repo_tree create_commit"
        for name in calls.split():
            call = getattr(self, name)
            monkeypatch.setattr(HfApi, name, lambda api, *args, call=call, **more: call(api, *args, **more))
        monkeypatch.setattr(HfApi, "revision_exists", lambda api, repo_id, name: name in self.repos[repo_id].branches)
        monkeypatch.setattr(HfApi, "_validate_yaml", lambda api, content, **_: card_data(content))

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo_id].branches[branch][-1]

    def may_write(self, api, repo_id: str) -> None:
        owner, writes = self.roles.get(api.token or get_token(), (None, False))
        if owner is None:
            raise http_error(401)
        if not writes or repo_id.split("/")[0] != owner:
            raise http_error(403)

    def create_repo(self, api, repo_id, *, private=None, exist_ok=False):
        assert exist_ok
        repo_id = repo_id if "/" in repo_id else f"{self.roles[api.token or get_token()][0]}/{repo_id}"
        if repo_id not in self.repos:
            self.may_write(api, repo_id)
            self.repos[repo_id] = Repo(private, {"main": [{".gitattributes": b""}]})
        return SimpleNamespace(repo_id=repo_id)

    def auth_check(self, api, repo_id, *, write):
        self.may_write(api, repo_id)

    def branch(self, repo_id, revision):
        if (revision or "main") not in self.repos[repo_id].branches:
            raise http_error(404, RevisionNotFoundError)
        return self.repos[repo_id].branches[revision or "main"]

    def list_repo_commits(self, api, repo_id):
        return [SimpleNamespace(commit_id=str(i)) for i in reversed(range(len(self.branch(repo_id, None))))]

    def create_branch(self, api, repo_id, *, branch, revision, exist_ok):
        self.repos[repo_id].branches.setdefault(branch, [self.branch(repo_id, None)[int(revision)]])

    def list_repo_tree(self, api, repo_id, *, revision=None, recursive=False, **_):
        for path, content in self.branch(repo_id, revision)[-1].items():
            large = any(fnmatch.fnmatch(path, pattern) for pattern in LARGE)
            lfs = {"size": len(content), "oid": hashlib.sha256(content).hexdigest(), "pointerSize": 1}
            yield RepoFile(path=path, size=len(content), oid="0", lfs=lfs if large else None)

    def create_commit(self, api, repo_id, *, operations, revision=None, **_):
        self.may_write(api, repo_id)
        branch = self.branch(repo_id, revision)
        if self.fault:
            raise self.fault
        files = dict(branch[-1])
        for operation in operations:
            if isinstance(operation, CommitOperationAdd):
                with operation.as_file() as file:
                    files[operation.path_in_repo] = file.read()
                self.sent.append(operation.path_in_repo)
            else:
                files.pop(operation.path_in_repo)
        branch.append(files)
        return SimpleNamespace(commit_url=f"{constants.ENDPOINT}/{repo_id}/commit/{len(branch)}")


def card_data(text: str) -> dict:
    """A card's metadata, with what the Hub demands of it: lists of strings, ids of the form owner/name, whole figures."""
    assert text.startswith("---\n")
    data = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert all(isinstance(tag, str) for tag in data.get("tags", []))
    for name in [*filter(None, [data.get("base_model")]), *data.get("datasets", [])]:
        assert name.count("/") == 1 and not name.startswith(("/", ".", "~"))
    for result in [result for model in data.get("model-index", []) for result in model["results"]]:
        assert result["task"]["type"] == "zero-shot-image-classification"
        assert result["dataset"]["type"] and result["dataset"]["name"]
        assert result["metrics"] and {m["type"] for m in result["metrics"]} == {"accuracy"}
        assert all(isinstance(m["value"], float) for m in result["metrics"])
    return data
