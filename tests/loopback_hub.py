"""A double of the Hugging Face Hub on loopback: the Hub's HTTP protocol, so that the real, unpatched client pushes and pulls without a network.

Repositories live in memory and end with the process. Nothing but the standard library and PyYAML, which huggingface_hub itself needs.

    with LoopbackHub() as hub:
        subprocess.run(..., env=hub.env(tmp_path))    # a process of its own: the client reads HF_ENDPOINT when it is imported
    python tests/loopback_hub.py --port 8900          # by hand: prints what to export, serves until Ctrl-C

Large files live behind a second origin and signed addresses, as on the Hub. It proves that the protocol is used rightly, not that the Hub
accepts: no Xet, no multipart uploads, no pull requests, no paging, no gates, no listing of repositories, the card's schema only in its basics.
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import functools
import hashlib
import json
import os
import re
import secrets
import signal
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# The Hub writes these into the .gitattributes of every new repository: they go to the store for large files.
LARGE = """*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx *.ot *.parquet *.pb
*.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*"""
LFS_RULE = "{} filter=lfs diff=lfs merge=lfs -text\n"
KNOWN = {
    "license": """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
    artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl
    gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
    pddl llama2 llama3 llama3.1 llama3.2 llama3.3 gemma unknown other""",
    "pipeline_tag": """any-to-any audio-classification audio-text-to-text audio-to-audio automatic-speech-recognition depth-estimation
    document-question-answering feature-extraction fill-mask graph-ml image-classification image-feature-extraction image-segmentation
    image-text-to-text image-to-3d image-to-image image-to-text image-to-video keypoint-detection mask-generation multiple-choice
    object-detection question-answering reinforcement-learning robotics sentence-similarity summarization table-question-answering
    tabular-classification tabular-regression text-classification text-generation text-ranking text-to-3d text-to-audio text-to-image
    text-to-speech text-to-video time-series-forecasting token-classification translation unconditional-image-generation video-classification
    video-text-to-text visual-document-retrieval visual-question-answering voice-activity-detection zero-shot-classification
    zero-shot-image-classification zero-shot-object-detection other""",
}
RESULT = {"task": {"type": None}, "dataset": {"type": None, "name": None}, "metrics": [{"type": None, "value": None}]}
REQUIRED = [{"name": None, "results": [RESULT]}]
HUB_ID = re.compile(r"(?!.*(--|\.\.))\w[\w.-]*(/\w[\w.-]*)?(?<![.-])", re.ASCII)


def card_data(text: str) -> dict | None:
    """The YAML at the head of a card; None where there is none. Raises ValueError where it cannot be read."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?\r?\n)?---[ \t]*(\r?\n|$)", text, re.DOTALL)
    try:
        data = yaml.safe_load(match[1] or "") if match else None
    except yaml.YAMLError as error:
        raise ValueError(f"Invalid YAML: {error}") from error
    if not isinstance(data, dict | None):
        raise ValueError("Invalid YAML: the metadata must be an object")
    return data


def card_problems(text: str) -> tuple[list[str], list[str]]:
    """Errors, for which the Hub would refuse a card, and warnings."""
    try:
        data = card_data(text)
    except ValueError as error:
        return [str(error)], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    for name, known in KNOWN.items():
        errors += [
            f'"{name}" must be one of [{known}], not {v!r}' for v in _listed(data.get(name)) if v not in known.split()
        ]
    for name, what in (("base_model", "model"), ("datasets", "dataset")):
        bad = [v for v in _listed(data.get(name)) if not isinstance(v, str) or not HUB_ID.fullmatch(v)]
        errors += [f'"{name}" with value "{v}" is not valid. Use a {what} id from https://hf.co/{what}s.' for v in bad]
    errors += [f'"tags": {tag!r} must be a string' for tag in _listed(data.get("tags")) if not isinstance(tag, str)]
    return errors + list(_missing(data.get("model-index", []), REQUIRED, "model-index")), []


def _listed(value: object) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def _missing(value: object, required: object, where: str) -> Iterator[str]:
    """What a card leaves out of `required`: nested mappings and lists, None for whatever the author writes."""
    if isinstance(required, list):
        if not isinstance(value, list):
            yield f'"{where}" must be an array'
        for i, item in enumerate(_listed(value)):
            yield from _missing(item, required[0], f"{where}[{i}]")
    for name, inner in required.items() if isinstance(required, dict) else ():
        part = value.get(name) if isinstance(value, dict) else None
        if part is None or part == "":
            yield f'"{where}.{name}" is required'
        else:
            yield from _missing(part, inner, f"{where}.{name}")


# --- what a repository holds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blob:
    """A file's content; for an LFS file git itself holds a small text that points to it."""

    data: bytes
    lfs: bool = False

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @functools.cached_property
    def in_git(self) -> bytes:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return pointer.encode() if self.lfs else self.data

    @functools.cached_property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.in_git) + self.in_git).hexdigest()

    def entry(self, path: str) -> dict:
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": len(self.data), "pointerSize": len(self.in_git)}
        return {"type": "file", "path": path, "oid": self.oid, "size": len(self.data)} | (
            {"lfs": lfs} if self.lfs else {}
        )


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Blob]

    def entries(self) -> dict[str, dict]:
        """Files and folders by path, as the Hub lists them."""
        found = {path: blob.entry(path) for path, blob in self.files.items()}
        for folder in {path[:i] for path in self.files for i, c in enumerate(path) if c == "/"}:
            inside = repr(sorted((p, b.oid) for p, b in self.files.items() if p.startswith(f"{folder}/")))
            found[folder] = {
                "type": "directory",
                "path": folder,
                "oid": hashlib.sha1(inside.encode()).hexdigest(),
                "size": 0,
            }
        return dict(sorted(found.items()))


@dataclass
class Repo:
    """Commits, names for some of them, and the large files that were uploaded, committed or not."""

    id: str  # "alice/robust", or "datasets/alice/scores"
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    log: dict[str, Commit] = field(default_factory=dict)
    uploaded: dict[str, bytes] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[-2]

    def at(self, revision: str) -> Commit:
        sha = self.branches.get(revision) or self.tags.get(revision)
        if sha is None and re.fullmatch(r"[0-9a-f]{7,40}", revision):
            sha = next((s for s in self.log if s.startswith(revision)), None)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.log[sha]

    def add(self, branch: str, files: dict[str, Blob], author: str, title: str, message: str = "") -> Commit:
        date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        parent, tree = self.branches.get(branch), sorted((path, blob.oid) for path, blob in files.items())
        sha = hashlib.sha1(repr((parent, len(self.log), date, author, title, message, tree)).encode()).hexdigest()
        self.branches[branch] = sha
        self.log[sha] = Commit(sha, parent, title, message, author, date, files)
        return self.log[sha]

    def history(self, revision: str) -> Iterator[Commit]:
        commit = self.at(revision)
        yield commit
        while commit.parent is not None:
            commit = self.log[commit.parent]
            yield commit


def _is_large(files: dict[str, Blob], path: str, size: int = 0, sample: bytes = b"") -> bool:
    """Whether the Hub wants `path` in its store: by the repository's own .gitattributes, by size, or because it is no text."""
    rules = files[".gitattributes"].data.decode() if ".gitattributes" in files else ""
    patterns = [line.split()[0] for line in rules.splitlines() if "filter=lfs" in line]
    matches = any(fnmatch.fnmatchcase(path if "/" in p else path.split("/")[-1], p) for p in patterns)
    return matches or size > 10 * 1024**2 or b"\0" in sample


# --- requests and answers -------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """What arrived; `status` is None where the connection broke before an answer."""

    method: str
    path: str
    user: str | None
    body: bytes = field(repr=False)
    query: dict[str, list[str]] = field(repr=False)
    headers: dict[str, str] = field(repr=False)
    may_write: bool = False
    status: int | None = None

    @property
    def size(self) -> int:
        return len(self.body)

    @property
    def json(self) -> dict:
        return json.loads(self.body)


@dataclass
class Answer:
    body: object = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An error as the Hub tells it: the client picks its exception by X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        line = " ".join(message.split()).encode("latin-1", "replace").decode("latin-1")
        told = {"X-Error-Message": line} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        self.answer = Answer({"error": message}, status, told)


@dataclass
class Fault:
    method: str
    path: str
    times: int
    status: int | None = None
    after_bytes: int = 0


_ROUTES: list[tuple[str, re.Pattern, str, Callable]] = []
_API, _WEB = "/api/(?P<kind>models|datasets)/(?P<repo>[^/]+(?:/[^/]+)?)", "/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+?)"


def _route(methods: str, pattern: str, needs: str = "nothing") -> Callable:
    """Serve `pattern`, whose <name> is one quoted segment; `needs` is nothing, a user, or to read or write the repository."""

    def register(function: Callable) -> Callable:
        compiled = re.compile(re.sub(r"/<(\w+)>", r"/(?P<\1>[^/]+)", pattern))
        _ROUTES.extend((method, compiled, needs, function) for method in methods.split())
        return function

    return register


class LoopbackHub:
    """The Hub, as far as its clients can tell: users, repositories, faults on request, and a record of all that arrived.

    Args:
        tokens: token -> user, or (user, "read") for a token that may not write.
        port: 0 takes a free one.
    """

    def __init__(self, tokens: dict[str, str | tuple[str, str]] | None = None, port: int = 0):
        tokens = tokens or {"hf_alice": "alice", "hf_bob": "bob", "hf_reader": ("alice", "read")}
        self.tokens = {t: (u, "write") if isinstance(u, str) else u for t, u in tokens.items()}
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.unknown: list[str] = []  # what was asked for and is not served here
        self.errors: list[str] = []  # where the double itself broke
        self.faults: list[Fault] = []  # those that are still to come
        self._key, self._lock = secrets.token_hex(8), threading.Lock()
        self._servers = [
            _Server(("127.0.0.1", port), self, stores=False),
            _Server(("127.0.0.1", 0), self, stores=True),
        ]
        self.url, self.storage_url = (f"http://127.0.0.1:{s.server_address[1]}" for s in self._servers)
        for server in self._servers:
            # At the default interval of half a second every test would take a second to close its hub.
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> LoopbackHub:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close()
        if self.errors and kind is None:
            raise RuntimeError("the double itself failed:\n" + "\n".join(self.errors))

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def env(self, home: str | os.PathLike, token: str | None = "hf_alice") -> dict[str, str]:
        """The environment in which a process takes this for the Hub; `home` is its cache. No setting of ours for the Hub is inherited."""
        kept = {k: v for k, v in os.environ.items() if not re.match("HF_|HUGGING|TRANSFORMERS_(OFFLINE|CACHE)", k)}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        kept |= {f"HF_HUB_DISABLE_{what}": "1" for what in ("XET", "TELEMETRY")}
        return kept | ({"HF_TOKEN": token} if token else {})

    # What a test asks.

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.repos[repo_id].at(revision).files.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Newest first; the last is the Hub's own, which holds .gitattributes."""
        return list(self.repos[repo_id].history(revision))

    def saw(self, secret: bytes) -> list[str]:
        """Where `secret` occurred in what was uploaded, also under base64 or JSON's escapes: paths of requests, and of files where known."""
        needles = {secret, json.dumps(secret.decode(errors="replace"))[1:-1].encode()}
        names = {b.sha256: path for r in self.repos.values() for c in r.log.values() for path, b in c.files.items()}
        places = []
        for request in self.requests:
            stored, commits = request.path.startswith("/storage/"), "/commit/" in request.path
            for part in request.body.split(b"\n") if commits else [request.body]:
                encoded = [] if stored else re.findall(rb"[A-Za-z0-9+/]{8,}={0,2}", part)
                # Groups of four: the last may be cut off with the connection.
                texts = [part, *(base64.b64decode(e[: len(e) // 4 * 4]) for e in encoded)]
                if any(n in text for n in needles for text in texts):
                    named = re.search(rb'"path": ?"([^"]*)"', part) if commits else None
                    file = named[1].decode() if named else names.get(request.path.split("/")[-1], "")
                    places.append(f"{request.path} {file}".strip())
        return places

    def fail(self, method: str, path: str, status: int = 500, times: int = 1) -> None:
        """Answer the next `times` requests whose path this regular expression finds with `status`.

        After 408, 429, 500 or 502 to 504 the client repeats an upload five times, within 23 s; creating and committing it does not repeat.
        """
        self.faults.append(Fault(method, path, times, status=status))

    def drop(self, method: str, path: str, after_bytes: int = 0, times: int = 1) -> None:
        """Break the connection of the next `times` such requests when `after_bytes` of their body have arrived."""
        self.faults.append(Fault(method, path, times, after_bytes=after_bytes))

    def _fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            fault = next((f for f in self.faults if f.method == method and re.search(f.path, path)), None)
            if fault:
                fault.times -= 1
                self.faults = [f for f in self.faults if f.times > 0]
            return fault

    # Who may do what.

    def _serve(self, request: Request) -> Answer:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        for method, pattern, needs, function in _ROUTES:
            match = pattern.fullmatch(request.path) if method == request.method else None
            if match:
                named = {k: unquote(v or "") for k, v in match.groupdict().items() if v or k == "kind"}
                if needs == "user" and request.user is None:
                    raise Refusal(401, "Invalid username or password.")
                if needs in ("read", "write"):
                    kind = "datasets/" if named.pop("kind").startswith("datasets") else ""
                    named["repo"] = self._repo(request, kind + named["repo"], write=needs == "write")
                answer = function(self, request, **named)
                return answer if isinstance(answer, Answer) else Answer(answer)
        # That one is asked now and then about the program that runs the client, who makes do with any answer.
        if request.path != "/api/agent-harnesses":
            self.unknown.append(f"{request.method} {request.path}")
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def _repo(self, request: Request, repo_id: str, *, write: bool) -> Repo:
        """The repository, if the asker may see it; whether a private one exists is not told.

        The Hub's 401 bears no code, and the client takes it for a missing repository where the address begins with https://. Ours does not.
        """
        repo = self.repos.get(repo_id)
        hidden = repo is None or (repo.private and request.user != repo.owner)
        if request.user is None and (hidden or write):
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if hidden:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and not (request.may_write and request.user == repo.owner):
            raise Refusal(403, f"You don't have the rights to write to {repo_id} with this token")
        return repo

    # Users and repositories.

    @_route("GET", "/api/whoami-v2", needs="user")
    def _whoami(self, request: Request) -> dict:
        auth = {
            "type": "access_token",
            "accessToken": {"displayName": "", "role": "write" if request.may_write else "read"},
        }
        return {"type": "user", "id": request.user, "name": request.user, "orgs": [], "auth": auth}

    @_route("POST", "/api/repos/create", needs="user")
    def _create(self, request: Request) -> Answer:
        ask = request.json
        kind, owner = ask.get("type") or "model", ask.get("organization") or request.user
        if kind not in ("model", "dataset"):
            raise Refusal(400, f"the double has no repositories of type {kind}")
        if owner != request.user or not request.may_write:
            raise Refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        repo_id = f"{'datasets/' if kind == 'dataset' else ''}{owner}/{ask['name']}"
        if repo_id in self.repos:
            told = {"error": f"You already created this {kind} repo", "url": f"{self.url}/{repo_id}"}
            return Answer(told, 409, {"X-Error-Message": told["error"]})
        self.repos[repo_id] = repo = Repo(repo_id, private=ask.get("visibility") == "private")
        repo.add(
            "main",
            {".gitattributes": Blob("".join(map(LFS_RULE.format, LARGE.split())).encode())},
            owner,
            "initial commit",
        )
        return Answer({"url": f"{self.url}/{repo_id}", "name": f"{owner}/{ask['name']}"})

    @_route("DELETE", "/api/repos/delete", needs="user")
    def _delete(self, request: Request) -> dict:
        ask = request.json
        kind = "datasets/" if ask.get("type") == "dataset" else ""
        repo = self._repo(request, f"{kind}{ask.get('organization') or request.user}/{ask['name']}", write=True)
        del self.repos[repo.id]
        return {}

    @_route("PUT", f"{_API}/settings", needs="write")
    def _settings(self, request: Request, repo: Repo) -> dict:
        repo.private = request.json.get("visibility", "private" if repo.private else "public") == "private"
        return {}

    @_route("GET", f"{_API}/auth-check", needs="read")
    @_route("GET", f"{_API}/auth-check/write", needs="write")
    def _auth_check(self, request: Request, repo: Repo) -> dict:
        return {}

    # Reading.

    @_route("GET", f"{_API}/revision/<revision>", needs="read")
    @_route("GET", _API, needs="read")
    def _info(self, request: Request, repo: Repo, revision: str = "main") -> dict:
        commit = repo.at(revision)
        try:
            card = card_data(commit.files["README.md"].data.decode()) if "README.md" in commit.files else None
        except ValueError:
            card = None
        # Where the card names no library the Hub guesses from the files.
        about = {"library_name": "transformers"} if "config.json" in commit.files else {}
        about |= {
            k: v for k, v in (card or {}).items() if k in ("pipeline_tag", "library_name", "tags", "model-index")
        }
        about |= {
            "id": repo.id.removeprefix("datasets/"),
            "author": repo.owner,
            "sha": commit.sha,
            "private": repo.private,
        }
        about |= {"createdAt": list(repo.history(revision))[-1].date, "lastModified": commit.date, "gated": False}
        siblings = [{"rfilename": path, "blobId": blob.oid} | blob.entry(path) for path, blob in commit.files.items()]
        return about | {"siblings": siblings, "cardData": card}

    @_route("GET", f"{_API}/tree/<revision>(?:/(?P<path>.+))?", needs="read")
    def _tree(self, request: Request, repo: Repo, revision: str, path: str = "") -> list[dict]:
        entries, under = repo.at(revision).entries(), f"{path}/" if path else ""
        if path and entries.get(path, {}).get("type") != "directory":
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        deep = request.query.get("recursive", [""])[0].lower() == "true"
        return [e for p, e in entries.items() if p.startswith(under) and (deep or "/" not in p[len(under) :])]

    @_route("POST", f"{_API}/paths-info/<revision>", needs="read")
    def _paths_info(self, request: Request, repo: Repo, revision: str) -> list[dict]:
        entries = repo.at(revision).entries()
        return [entries[p] for p in parse_qs(request.body.decode()).get("paths", []) if p in entries]

    @_route("GET HEAD", f"{_WEB}/resolve/<revision>/(?P<path>.+)", needs="read")
    def _resolve(self, request: Request, repo: Repo, revision: str, path: str) -> Answer:
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.sha}
        blob = commit.files.get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        if not blob.lfs:
            return _slice(blob.data, request, headers | {"ETag": f'"{blob.oid}"'})
        headers |= {"X-Linked-Size": str(len(blob.data)), "X-Linked-Etag": f'"{blob.sha256}"'}
        return Answer(b"", 302, headers | {"Location": self._signed("GET", repo, blob.sha256)})

    @_route("GET", f"{_API}/commits/<revision>", needs="read")
    def _commits(self, request: Request, repo: Repo, revision: str) -> list[dict]:
        told = ("title", "message", "date")
        return [
            {"id": c.sha, "authors": [{"user": c.author}]} | {k: getattr(c, k) for k in told}
            for c in repo.history(revision)
        ]

    @_route("GET", f"{_API}/refs", needs="read")
    def _refs(self, request: Request, repo: Repo) -> dict:
        def told(place: str, refs: dict[str, str]) -> list[dict]:
            return [{"name": name, "ref": f"refs/{place}/{name}", "targetCommit": sha} for name, sha in refs.items()]

        return {
            "branches": told("heads", repo.branches),
            "tags": told("tags", repo.tags),
            "converts": [],
            "pullRequests": [],
        }

    # Writing.

    @_route("POST DELETE", f"{_API}/(?P<what>branch|tag)/<name>", needs="write")
    def _ref(self, request: Request, repo: Repo, what: str, name: str) -> dict:
        """Makes or deletes a branch or a tag. A new tag is named in the body, and `name` is the revision it goes to."""
        refs, start = repo.branches if what == "branch" else repo.tags, "main"
        if request.method == "POST":
            name, start = (
                (name, request.json.get("startingPoint") or start) if what == "branch" else (request.json["tag"], name)
            )
            if name in refs:
                raise Refusal(409, f"Reference already exists: {name}")
            refs[name] = repo.at(start).sha
        elif (what, name) == ("branch", "main"):
            raise Refusal(403, "The main branch cannot be deleted")
        elif refs.pop(name, None) is None:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return {}

    @_route("POST", "/api/validate-yaml")
    def _validate_card(self, request: Request) -> Answer:
        errors, warnings = card_problems(request.json["content"])
        told = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
        return Answer(told, 400 if errors else 200)

    @_route("POST", f"{_API}/preupload/<revision>", needs="write")
    def _preupload(self, request: Request, repo: Repo, revision: str) -> dict:
        """How each file is to be sent, and what stands in its place: the client leaves out of a commit what did not change."""
        files, told = repo.at(revision).files, []
        for file in request.json["files"]:
            large = _is_large(files, file["path"], file["size"], base64.b64decode(file["sample"]))
            old = files.get(file["path"])
            oid = {"oid": old.sha256 if old.lfs else old.oid} if old else {}
            told.append(
                {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False} | oid
            )
        return {"files": told}

    @_route("POST", rf"{_WEB}\.git/info/lfs/objects/batch", needs="write")
    def _batch(self, request: Request, repo: Repo) -> dict:
        """Where to put each large file; one that is here already gets no action."""
        verify = {"href": f"{self.url}/{repo.id}.git/info/lfs/verify"}
        objects = [{"oid": o["oid"], "size": o["size"]} for o in request.json["objects"]]
        for o in objects:
            if o["oid"] not in repo.uploaded:
                o["actions"] = {"upload": {"href": self._signed("PUT", repo, o["oid"])}, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    @_route("POST", rf"{_WEB}\.git/info/lfs/verify", needs="write")
    def _verify(self, request: Request, repo: Repo) -> dict:
        if len(repo.uploaded.get(request.json["oid"], b"")) != request.json["size"]:
            raise Refusal(404, "Object does not exist on the server")
        return {}

    @_route("POST", f"{_API}/commit/<branch>", needs="write")
    def _commit(self, request: Request, repo: Repo, branch: str) -> dict:
        """One line a change; all of them or, if one is refused, none."""
        if "create_pr" in request.query:
            self.unknown.append(f"POST {request.path}?create_pr")
            raise Refusal(400, "the double has no pull requests")
        if branch not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header, *changes = [json.loads(line) for line in request.body.split(b"\n") if line]
        if not repo.branches[branch].startswith(header["value"].get("parentCommit", "")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.at(branch).files)
        for key, value in ((c["key"], c["value"]) for c in changes):
            path = value["path"]
            if key == "file":
                files[path] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in repo.uploaded:
                    raise Refusal(400, f"An LFS pointer pointed to a file that does not exist. Offending file: {path}")
                files[path] = Blob(repo.uploaded[value["oid"]], lfs=True)
                if not _is_large(files, path):
                    rules = files[".gitattributes"].data if ".gitattributes" in files else b""
                    files[".gitattributes"] = Blob(rules + LFS_RULE.format(path).encode())
            else:
                left = {p: b for p, b in files.items() if not f"{p}/".startswith(f"{path.rstrip('/')}/")}
                if len(left) == len(files) or (key == "deletedFile" and path not in files):
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                files = left
        title, message = header["value"]["summary"], header["value"].get("description", "")
        commit = repo.add(branch, files, str(request.user), title, message)
        return {"success": True, "commitOid": commit.sha, "commitUrl": f"{self.url}/{repo.id}/commit/{commit.sha}"}

    # The store for large files, at an origin of its own: whoever holds a signed address may use it, and must bring no token.

    def _signed(self, method: str, repo: Repo, oid: str) -> str:
        path = f"/storage/{repo.id}/{oid}"
        return (
            f"{self.storage_url}{path}?signature={hashlib.sha256(f'{self._key} {method} {path}'.encode()).hexdigest()}"
        )

    def _store(self, request: Request) -> Answer:
        if "authorization" in request.headers:
            raise Refusal(400, "Only one auth mechanism allowed")
        repo_id, _, oid = request.path.removeprefix("/storage/").rpartition("/")
        repo, signature = self.repos.get(repo_id), request.query.get("signature", [""])[0]
        if repo is None or signature != self._signed(request.method, repo, oid).partition("=")[2]:
            raise Refusal(403, "SignatureDoesNotMatch")
        if request.method == "GET":
            return _slice(repo.uploaded[oid], request, {"ETag": f'"{oid}"'})
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, "BadDigest")
        repo.uploaded[oid] = request.body
        return Answer(b"")


def _slice(data: bytes, request: Request, headers: dict[str, str]) -> Answer:
    """A file, or the rest of it for a client that goes on with a download."""
    headers = headers | {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if match is None:
        return Answer(data, 200, headers)
    start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
    if start > end:
        return Answer(b"", 416, {"Content-Range": f"bytes */{len(data)}"})
    return Answer(data[start : end + 1], 206, headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"})


# --- HTTP -----------------------------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    request_queue_size = (
        64  # a snapshot's many threads connect at once; one too many for the default of 5 waits a second
    )

    def __init__(self, address: tuple[str, int], hub: LoopbackHub, *, stores: bool):
        super().__init__(address, _Handler)
        self.hub, self.stores = hub, stores

    def handle_error(self, *_: object) -> None:
        """A client that goes away is no fault of the double; anything else is, and fails the test."""
        error = traceback.format_exc()
        if not re.search(r"^(BrokenPipe|ConnectionReset|ConnectionAborted)Error", error, re.MULTILINE):
            self.hub.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = (
        True  # head and body are two writes: otherwise each answer waits 40 ms for the client's receipt
    )

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        fault, length = hub._fault(self.command, url.path), int(headers.get("content-length") or 0)
        broken = fault is not None and fault.status is None
        body = self.rfile.read(min(length, fault.after_bytes) if broken else length)
        user, role = hub.tokens.get(headers.get("authorization", "").removeprefix("Bearer "), (None, "read"))
        query = parse_qs(url.query, keep_blank_values=True)
        request = Request(self.command, url.path, user, body, query, headers, may_write=role == "write")
        hub.requests.append(request)
        if broken or len(body) < length:
            # No time to linger makes closing a reset: the client hears of it at once, as of a line that broke.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        try:
            if fault is not None:
                raise Refusal(fault.status, "a fault that the test asked for")
            if "transfer-encoding" in headers:  # as the Hub's store has it
                self.close_connection = True
                raise Refusal(411, "MissingContentLength")
            with hub._lock:
                answer = hub._store(request) if self.server.stores else hub._serve(request)
        except Refusal as refusal:
            answer = refusal.answer
        except Exception:
            hub.errors.append(traceback.format_exc())
            answer = Answer(
                {"error": traceback.format_exc()}, 501
            )  # not 500, which the client would repeat for half a minute
        request.status = answer.status
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body, default=str).encode()
        self.send_response(answer.status)
        for name, value in {
            "Content-Type": "application/json",
            **answer.headers,
            "Content-Length": len(content),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _handle


def main() -> None:
    # A shell's background job inherits "ignore".
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8900)
    with LoopbackHub(port=parser.parse_args().port) as hub:
        print(f"export HF_ENDPOINT={hub.url}\nexport HF_HUB_DISABLE_XET=1\nexport HF_TOKEN=hf_alice", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(f"{len(hub.requests)} requests; not known here: {hub.unknown or 'none'}")


if __name__ == "__main__":
    main()
