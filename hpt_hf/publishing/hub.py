"""Push: an exported folder to the Hub, checked before anything leaves this machine. Only files on a list are sent.

A pickle, a log or `training_args.bin`, in which the Trainer stores tokens in clear, is never among them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile

from hpt_hf.method.gpd import PIVOT_FILE
from hpt_hf.models.lora import WEIGHTS as ADAPTER_WEIGHTS
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing.convert_checkpoint import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, read_checkpoint
from hpt_hf.publishing.export import check
from hpt_hf.publishing.model_card import CURVE, RECORDS, SEAL, card, check_figures, own_results, vanilla_results
from hpt_hf.utils import progress, read_json, sha256, write_json, write_text

# What may leave this machine, as patterns of names in the folder; and the results that were measured on its weights.
SENT = (
    *("README.md", SEAL, CURVE, *RECORDS, OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS),
    *("config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", ADAPTER_WEIGHTS),
    *("processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
)
# Of a checkpoint to resume from, beside SENT.
RESUMED = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json", PIVOT_FILE)
WEIGHTS = (".safetensors", ".bin", ".pt", ".h5", ".msgpack", ".safetensors.index.json")
LOG_IN = "Fix: log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
PUSH_AGAIN = "Fix: push again; what was sent is not sent twice"


def push(
    folder: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    overwrite: bool = False,
    message: str = "Robust CLIP, exported by hpt_hf",
    token: str | None = None,
) -> str:
    """Check an exported folder, write its card and upload it. Returns the address of the commit. It can be repeated.

    Args:
        repo_id: `owner/name`, or `name` of one's own; made if there is none, as is the branch `revision`.
        overwrite: replace another model that stands there. Its commits stay in the repository's history.

    Raises:
        ValueError: the folder is not what was exported, or the repository holds something else.
        PermissionError: no token, or none that may write there. ConnectionError: no Hub to be reached.
    """
    folder = Path(folder)
    if not [f for name in ("model*.safetensors", OPEN_CLIP_WEIGHTS, ADAPTER_WEIGHTS) for f in folder.glob(name)]:
        raise ValueError(f"{folder} holds no model*.safetensors. Fix: `hpt-hf convert` writes them, from pickles too")
    seal = check(folder)
    if (folder / OPEN_CLIP_CONFIG).is_file() and "files" not in seal:
        twin, _ = read_checkpoint(folder / OPEN_CLIP_WEIGHTS, ZeroShotClassifier.from_pretrained(folder))
        if fingerprint(twin) != seal["fingerprint"]:
            raise ValueError(f"{folder / OPEN_CLIP_WEIGHTS} holds other weights. Fix: hpt-hf convert --to open_clip")
    check_figures(card(folder), own_results(folder))
    repo_id, api = open_repo(repo_id, private=private, token=token), HfApi(token=token, library_name="hpt_hf")
    with tempfile.TemporaryDirectory() as stage, _explained(repo_id):
        sent = _stage(folder, Path(stage), SENT, repo_id, revision)
        if revision:  # from the first commit, so that main's files do not stand in a new branch
            first = api.list_repo_commits(repo_id)[-1].commit_id
            api.create_branch(repo_id, branch=revision, revision=first, exist_ok=True)
        there = _files(api, repo_id, revision)
        ours = {p: sha256(folder / p) for p in sent if p.endswith(".safetensors")}
        same = ours == {p: digest for p, digest in there.items() if p.endswith(WEIGHTS[:-1]) and "/" not in p}
        other = [p for p in there if p not in sent and p.startswith("results/")]
        if not same:
            other += [p for p in there if p in sent or _weights(p)]
        if other and not overwrite:
            holds = f"{repo_id} ({revision or 'main'}) holds another model or card ({', '.join(other[:4])})"
            raise ValueError(f"{holds}: nothing was sent. Fix: another name or --revision, or --overwrite")
        stale = [p for p in there if p not in sent and (p.startswith(("results/", "scores/")) or _weights(p))]
        return api.upload_folder(
            repo_id=repo_id, folder_path=stage, commit_message=message, revision=revision, delete_patterns=stale
        ).commit_url


def open_repo(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """The full name of a repository that the token may write to; made if there is none."""
    if not (token or get_token()):  # said without a network, too
        raise PermissionError(f"no token for {constants.ENDPOINT}. {LOG_IN}")
    api = HfApi(token=token, library_name="hpt_hf")
    with _explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)  # a token that may only read is not stopped by a repository that exists
    return repo_id


def holds_model(repo_id: str, revision: str | None = None, *, token: str | None = None) -> list[str]:
    """The files of weights that stand in a repository; none if the branch is still to be made."""
    api = HfApi(token=token)
    with _explained(repo_id):
        if revision and not api.revision_exists(repo_id, revision):
            return []
        return [path for path in _files(api, repo_id, revision) if _weights(path)]


def push_checkpoint(
    folder: str | Path, repo_id: str, *, message: str, path: str | None = None, revision: str | None = None
) -> None:
    """A checkpoint in the middle of training, unchecked; with `path`, into that folder, with all that resuming needs.

    What goes wrong is said and training goes on: the checkpoint lies here, too.
    """
    try:
        with tempfile.TemporaryDirectory() as stage, _explained(repo_id):
            _stage(Path(folder), Path(stage), (*SENT, *(RESUMED if path else ())), repo_id, revision)
            HfApi(library_name="hpt_hf").upload_folder(
                repo_id=repo_id, folder_path=stage, path_in_repo=path, commit_message=message, revision=revision
            )
    except OSError as error:
        progress(f"{folder} could not be pushed, training goes on: {error}")


def _stage(folder: Path, stage: Path, patterns: tuple[str, ...], repo_id: str, revision: str | None) -> set[str]:
    """Lay out what is sent: links to files, records and results without this machine's folders, the card."""
    inside = folder.resolve()
    if inside.parent.name == "snapshots":  # the Hub's cache: links to its own blobs
        inside = inside.parent.parent
    for file in sorted(f for pattern in patterns for f in folder.glob(pattern)):
        if not (real := file.resolve()).is_relative_to(inside) or not real.is_file():
            raise ValueError(f"{file} is a link to {real}, outside of what is pushed. Fix: a copy of the file")
        if file.name in (*RECORDS, "trainer_state.json"):
            write_json(stage / file.name, _without_folders(read_json(file)))
        elif file.name == OPEN_CLIP_CONFIG:
            content = read_json(file)
            text = content["model_cfg"]["text_cfg"]
            text |= {"hf_tokenizer_name": repo_id} if "hf_tokenizer_name" in text else {}  # it lies beside the model
            write_json(stage / file.name, content)
        else:
            (stage / file.name).symlink_to(file.absolute())
    if (folder / SEAL).is_file():
        results = own_results(folder)
        for result in (*results, *vanilla_results(folder, results)):
            write_json(stage / "results" / result.file_name, _without_folders(result.to_json()))
        write_text(stage / "README.md", card(folder, results=results, repo_id=repo_id, revision=revision))
    return {file.relative_to(stage).as_posix() for file in stage.rglob("*")}


def _files(api: HfApi, repo_id: str, revision: str | None) -> dict[str, str | None]:
    """Path -> SHA-256 if it is a large file, of what a repository holds."""
    tree = api.list_repo_tree(repo_id, revision=revision, recursive=True)
    return {f.path: f.lfs.sha256 if f.lfs else None for f in tree if isinstance(f, RepoFile)}


def _weights(path: str) -> bool:
    return "/" not in path and path.endswith(WEIGHTS)


def _without_folders(value):
    """The same JSON value, of absolute paths the last part alone: no folder of this machine is published."""
    if isinstance(value, dict):
        return {k: _without_folders(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(v) for v in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


@contextlib.contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """What the Hub's client raises, in one line with what to do about it."""
    try:
        try:
            yield
        except RuntimeError as error:  # how the client wraps whatever broke an upload
            raise error.__cause__ or error from error
    except HfHubHTTPError as error:
        status, said = error.response.status_code, str(error.server_message or error).splitlines()[0]
        denied = {401: LOG_IN, 403: f"{LOG_IN}, or choose a name of your own", 404: f"{LOG_IN}, or check the name"}
        message = f"{repo_id}: {constants.ENDPOINT} answered {status} ({said}). {denied.get(status, PUSH_AGAIN)}"
        raise (PermissionError if status in denied else OSError)(message) from error
    except HTTPError as error:
        reason = str(error) or type(error).__name__
        raise ConnectionError(f"{repo_id}: no connection to {constants.ENDPOINT} ({reason}). {PUSH_AGAIN}") from error
