"""Push: an exported folder to the Hub, checked before anything leaves this machine, in one commit or not at all.

Only files on a short list are sent. A pickle, a log or `training_args.bin`, in which the Trainer stores tokens in clear, is never among them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from safetensors import SafetensorError, safe_open

from hpt_hf.evaluation.result import EvalResult
from hpt_hf.method.gpd import PIVOT_FILE
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing.convert_checkpoint import read_checkpoint
from hpt_hf.publishing.export import check
from hpt_hf.publishing.model_card import RECORDS, SEAL, card, check_figures, own_results
from hpt_hf.utils import progress

# What may leave this machine, as patterns of the path in the folder.
SENT = (
    *("README.md", SEAL, *RECORDS, "front.json", "front.svg"),
    *(
        "config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ),
    *("processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
)


RESUMED = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state*.pth",
    "trainer_state.json",
    PIVOT_FILE,
)  # of a checkpoint, beside SENT


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
    """Check an exported folder, write its card and upload it. Returns the address of the commit.

    It can be repeated: what the Hub already has is not sent again, and until the one commit at the end readers see what stood there before.

    Args:
        repo_id: `owner/name`, or `name` of one's own; made if there is none.
        revision: branch, made if there is none; None: main.
        private: of a new repository; None: what the account says.
        overwrite: replace another model that stands there. Its commits stay in the repository's history.
        token: None: the one of `hf auth login` or HF_TOKEN.

    Raises:
        ValueError: the folder is not what was exported, or the repository holds something else.
        PermissionError: no token, or none that may write there. ConnectionError: no Hub to be reached.
    """
    folder = Path(folder)
    _readable(folder)
    seal = check(folder)
    if (folder / "open_clip_config.json").is_file():
        twin, _ = read_checkpoint(folder, ZeroShotClassifier.from_pretrained(folder))
        if fingerprint(twin) != seal["fingerprint"]:
            raise ValueError(
                f"{folder / 'open_clip_model.safetensors'} holds other weights than {folder}: recipes/convert.py --to open_clip writes it anew"
            )
    scores = own_results(folder)
    check_figures(card(folder, scores=scores), scores)
    api, repo_id = open_repo(repo_id, private=private, token=token)
    sent, kept = contents(folder, scores)
    sent["README.md"] = card(folder, scores=scores, repo_id=repo_id, revision=revision).encode()
    if "open_clip_config.json" in sent:
        sent["open_clip_config.json"] = _json(_with_tokenizer(folder / "open_clip_config.json", repo_id))
    if kept:
        progress(f"{folder}: stays on this machine: {', '.join(kept[:8])}{' …' if len(kept) > 8 else ''}")
    with _explained(repo_id):
        if revision:
            # From the first commit, so that main's files do not stand in a new branch.
            first = api.list_repo_commits(repo_id)[-1].commit_id
            api.create_branch(repo_id, branch=revision, revision=first, exist_ok=True)
        added = [CommitOperationAdd(path, content) for path, content in sent.items()]
        other = _others(standing(api, repo_id, revision), added)
        if other and not overwrite:
            raise ValueError(
                f"{repo_id} ({revision or 'main'}) holds other content than {folder}: {', '.join(other[:4])}{' …' if len(other) > 4 else ''}. Nothing was changed. "
                "Choose another name or --revision, or pass --overwrite to replace it (its commits stay in the history)"
            )
        deleted = [CommitOperationDelete(path) for path in other if path not in sent]
        commit = api.create_commit(repo_id, [*added, *deleted], commit_message=message, revision=revision)
        now = standing(api, repo_id, revision)
    if missing := [add.path_in_repo for add in added if not _same(add, now.get(add.path_in_repo))]:
        raise OSError(
            f"{repo_id} has taken the commit, but {', '.join(missing[:4])} do not stand there as they were sent: push again"
        )
    return commit.commit_url


def open_repo(repo_id: str, *, private: bool | None = None, token: str | None = None) -> tuple[HfApi, str]:
    """The Hub's client and the full name of a repository that its token may write to; made if there is none."""
    if not (token or get_token()):
        raise PermissionError(
            f"no token for {constants.ENDPOINT}: log in with `hf auth login`, or set HF_TOKEN to a token that may write; nothing was sent"
        )
    api = HfApi(token=token, library_name="hpt_hf")
    with _explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)  # a token that may only read is not stopped by a repository that exists
    return api, repo_id


def contents(folder: Path, scores: Sequence[EvalResult]) -> tuple[dict[str, Path | bytes], list[str]]:
    """(path in the repository -> file or content, names that stay here).

    Scores and records go without the folders of this machine: of an absolute path only its last part.
    """
    sent: dict[str, Path | bytes] = {}
    kept = []
    for file in sorted(folder.iterdir()):
        if file.is_file() and any(PurePath(file.name).match(pattern) for pattern in SENT):
            record = file.name in RECORDS
            sent[file.name] = _json(_named(json.loads(file.read_text(encoding="utf-8")))) if record else file
        elif file.name != "scores":
            kept.append(file.name + "/" * file.is_dir())
    sent |= {f"scores/{score.file_name}": _json(_named(score.to_json())) for score in scores}
    return sent, kept


Standing = tuple[str, str | None]  # git's digest, and SHA-256 if it is a large file


def standing(api: HfApi, repo_id: str, revision: str | None = None) -> dict[str, Standing]:
    """Path -> digests of the files that a repository holds."""
    tree = api.list_repo_tree(repo_id, revision=revision, recursive=True)
    return {f.path: (f.blob_id, f.lfs.sha256 if f.lfs else None) for f in tree if isinstance(f, RepoFile)}


def holds_model(api: HfApi, repo_id: str, revision: str | None = None) -> list[str]:
    """The files of weights that stand in a repository; none if the branch is still to be made."""
    with _explained(repo_id):
        try:
            return [path for path in standing(api, repo_id, revision) if _is_weights(path)]
        except RevisionNotFoundError:
            return []


def push_checkpoint(
    folder: str | Path, repo_id: str, *, message: str, path: str | None = None, revision: str | None = None
) -> None:
    """A checkpoint in the middle of training: what opens as a model; with `path`, into that folder and with all that resuming needs.

    It is neither checked nor given a card. What goes wrong is said and training goes on: the checkpoint lies here, too.
    """
    try:
        with _explained(repo_id):
            HfApi(library_name="hpt_hf").upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=path,
                commit_message=message,
                allow_patterns=[*SENT, *(RESUMED if path else ())],
                revision=revision,
            )
    except OSError as error:
        progress(f"{folder} could not be pushed, training goes on: {error}")


def _readable(folder: Path) -> None:
    """Raise ValueError unless the folder's weights are whole safetensors files."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: expected a folder that hpt_hf exported")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        pickles = [f.name for f in [*folder.glob("*.bin"), *folder.glob("*.pt")] if f.name != "training_args.bin"]
        raise ValueError(
            f"{folder} holds no safetensors"
            + (
                f", only {', '.join(pickles)}: pickles are not published; recipes/convert.py turns them into safetensors"
                * bool(pickles)
            )
        )
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): export or download it again; nothing was sent") from None


def _is_weights(path: str) -> bool:
    return "/" not in path and path.endswith(
        (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".h5", ".msgpack")
    )


def _others(theirs: dict[str, Standing], added: list[CommitOperationAdd]) -> list[str]:
    """What stands there and is not of this folder: files that would be replaced, weights that would be opened beside these, Scores of others.

    The same weights with another card and other records are the same model, told anew.
    """
    ours = {add.path_in_repo: add for add in added}
    weights = {p for p in theirs if _is_weights(p)}
    known = (
        bool(weights)
        and weights == {p for p in ours if _is_weights(p)}
        and all(_same(ours[p], theirs[p]) for p in weights)
    )
    return sorted(
        path
        for path, stands in theirs.items()
        if path != ".gitattributes"
        and (
            path not in ours
            and (path in weights or path.startswith("scores/"))
            or path in ours
            and not known
            and not _same(ours[path], stands)
        )
    )


def _same(add: CommitOperationAdd, stands: Standing | None) -> bool:
    if stands is None:
        return False
    blob, sha256 = stands
    if sha256 is not None:
        return add.upload_info.sha256.hex() == sha256
    with add.as_file() as file:
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == blob


def _with_tokenizer(file: Path, repo_id: str) -> dict:
    """open_clip's config; a vocabulary that is not OpenAI's is found where the model is."""
    config = json.loads(file.read_text(encoding="utf-8"))
    text = config["model_cfg"]["text_cfg"]
    if "hf_tokenizer_name" in text:
        text["hf_tokenizer_name"] = repo_id
    return config


def _named(value):
    """The same JSON value, of absolute paths the last part alone: what is published names no folder of this machine."""
    if isinstance(value, dict):
        return {k: _named(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_named(v) for v in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


@contextlib.contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """What the Hub's client raises, as what to do about it. Everything on this machine is as it was."""
    try:
        try:
            yield
        except RuntimeError as error:  # how the client wraps whatever broke an upload
            raise error.__cause__ or error from error
    except LocalTokenNotFoundError as error:
        raise PermissionError(
            f"no token for {constants.ENDPOINT}: log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = str(error.server_message or error).splitlines()[0]
        advice = {
            401: (PermissionError, "the token is not valid there: log in again with `hf auth login`, or set HF_TOKEN"),
            403: (
                PermissionError,
                "the token may not write there: take one with the role 'write', or a name of your own",
            ),
            404: (PermissionError, "there is no such repository or branch, or the token may not see it"),
            412: (OSError, "somebody else has pushed in the meantime: push again"),
        }
        kind, what = advice.get(status, (OSError, "what was sent so far is kept there and not sent again: push again"))
        raise kind(
            f"{repo_id}: {constants.ENDPOINT} answered {status} ({said}); {what}. The folder is as it was"
        ) from error
    except HTTPError as error:
        raise ConnectionError(
            f"{repo_id}: the connection to {constants.ENDPOINT} failed ({error or type(error).__name__}). The folder is as it was: push again"
        ) from error
