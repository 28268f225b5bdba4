"""Small helpers without a home: versions, files written whole, progress, processes."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """ "; did you mean x or y?", or `otherwise` where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else otherwise and f"; {otherwise}"


def processes() -> PartialState:
    """The processes of a launch. Without an accelerator, accelerate takes each for the only one unless told `cpu`."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """The random states of Python, numpy and torch are afterwards what they were."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def shutdown_distributed() -> None:
    """The end of a launch, together: a process that takes its group down while another still talks in it can be aborted by gloo's threads."""
    processes().wait_for_everyone()
    processes().destroy_process_group()


def slug(name: str) -> str:
    """Letters, digits and dashes, for a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "datasets", "accelerate", "Pillow", "hpt_hf")}


def commit() -> str | None:
    """The commit of this code, marked if files differ from it; None where it was installed without its history."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*"],
            cwd=root, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):  # no git, or not ours to read
        return None


def hardware() -> str:
    """The machine, in a word: the same for every process on it."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def read_json(path: str | Path) -> dict:
    """A JSON file of names and values. Raises ValueError if it is damaged."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it holds no JSON of names and values ({error})") from None


def write_json(path: str | Path, value: object) -> Path:
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> Path:
    """Write whole or not at all: a reader, or a full disk, never leaves half a file under the final name.

    Raises:
        OSError: it could not be written; the message says what and why, and nothing half-written is left.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"{path} could not be written ({error.strerror}); what stood there before still does"
        ) from error
    return path


@contextlib.contextmanager
def written_whole(folder: str | Path, *, last: str) -> Iterator[Path]:
    """A place to write files in; afterwards they stand in `folder`, `last` last: it vouches for the others. Or none does.

    Raises:
        OSError: the disk is full; what stood in `folder` before still does.
    """
    folder = Path(folder).absolute()
    # Beside, to be there at one stroke; inside one that exists, which may be a link to another disk.
    stage = folder / ".part" if folder.exists() else folder.with_name(f".{folder.name}.part")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        stage.mkdir(parents=True)
        yield stage
        for file in stage.iterdir():
            file.chmod(stage.stat().st_mode & 0o666)  # safetensors lets nobody else read
        try:
            stage.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # the last: of a link
                raise
            for file in sorted(stage.iterdir(), key=lambda file: file.name == last):
                os.replace(file, folder / file.name)
    except Exception as error:
        if no_space(error):
            raise OSError(
                errno.ENOSPC,
                f"no space left for {folder}; what stood there before still does. Fix: make room, then the same command",
            ) from error
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def file_digests(folder: Path, *, but: Iterable[str]) -> dict[str, str]:
    """Path in the folder -> sha256, of all files but those named `but`."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name not in but]
    return {f.relative_to(folder).as_posix(): sha256(f) for f in files}


def no_space(error: BaseException) -> bool:
    """Is a full disk behind it? safetensors and torch say so in words of their own."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        words in str(error)
        for words in ("No space left", "os error 28", "PytorchStreamWriter failed", "file write failed")
    )


def progress(message: str) -> None:
    """One line for the person watching, apart from what the program prints as its result."""
    print(message, file=sys.stderr, flush=True)


def progress_bar(what: str, total: int, unit: str):
    """A tqdm bar as transformers has it: gone when it is full, silent where nobody watches, or transformers' are disabled."""
    from tqdm.auto import tqdm
    from transformers.utils.logging import is_progress_bar_enabled

    quiet = not (sys.stderr.isatty() and is_progress_bar_enabled() and processes().is_main_process)
    return tqdm(desc=what, total=total, unit=unit, leave=False, disable=quiet, file=sys.stderr)


def escaped(name: str) -> str:
    """A name in Markdown: no end of a cell, and no HTML."""
    return name.replace("|", "\\|").replace("<", "&lt;")


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers are right-aligned and shown with one decimal."""
    rows = [[f"{cell:.1f}" if isinstance(cell, float) else escaped(str(cell)) for cell in row] for row in rows]
    widths = [max(len(str(h)), *(len(r[i]) for r in rows), 3) for i, h in enumerate(header)]
    lines = ["| " + " | ".join(str(h).ljust(w) for h, w in zip(header, widths, strict=True)) + " |"]
    lines += ["|" + "|".join(("-" * (w + 1) + ":") if i else "-" * (w + 2) for i, w in enumerate(widths)) + "|"]
    lines += [
        "| "
        + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        + " |"
        for r in rows
    ]
    return "\n".join(lines)


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: of the GPU's memory, or, on a CPU, of the machine's; 0 where that is not known."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_reserved(device)
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def duration(seconds: float) -> str:
    """`95` -> "1 min 35 s"; the two largest units."""
    rest, said = round(seconds), []
    for name, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if rest >= size or (name == "s" and not said):
            said.append(f"{rest // size} {name}")
        rest %= size
    return " ".join(said[:2])


def load_object(path: str, kinds: type[T] | tuple[type[T], ...]) -> T:
    """An object of the user's own by import path, `my_file.py:my_objective` or `my_package.module:my_objective`.

    Raises:
        ValueError: no such file or module, one that fails on import, no such name, or an object of another kind.
    """
    place, _, name = path.rpartition(":")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        found = getattr(module, name)
    except AttributeError:
        raise ValueError(f"{path}: got no {name!r} in {place}. Fix: the name of an object that it defines") from None
    except Exception as error:  # the file is the user's own: anything may go wrong in it
        raise ValueError(f"{path}: {place} cannot be imported ({type(error).__name__}: {error})") from error
    if not isinstance(found, kinds):
        wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ValueError(f"{path}: got {type(found).__name__}, expected {wanted}")
    return found


def _from_file(file: Path):
    """Imported once: two names of one file share its objects."""
    key = str(file.resolve())
    if key not in sys.modules:
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]
