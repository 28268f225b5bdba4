"""The tests' own small world: two random CLIPs of different architecture that share a tokenizer, and images that fit them.

Shapes of every public function are checked while the tests run (jaxtyping + beartype), and warnings are errors.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import io
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

# Before anything imports the Hub's client: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tensors this small only lose by more threads, and where other programs use the cores, fifty times over.
os.environ["OMP_NUM_THREADS"] = "1"
# Test files that are started as programs find this file.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))

from jaxtyping import install_import_hook

_hook = install_import_hook(
    ["hpt_hf.attacks", "hpt_hf.models.zero_shot", "hpt_hf.method.objectives"], "beartype.beartype"
)

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402

from hpt_hf.attacks.pgd import TrainingAttack  # noqa: E402
from hpt_hf.attacks.threat_model import ThreatModel  # noqa: E402
from hpt_hf.data.collator import Collator  # noqa: E402
from hpt_hf.data.dataset import LabelledImages  # noqa: E402
from hpt_hf.evaluation.result import EvalResult  # noqa: E402
from hpt_hf.lab.pretrain import new_clip, new_processor, train_tokenizer  # noqa: E402
from hpt_hf.method.objectives import OBJECTIVES, Divergence  # noqa: E402
from hpt_hf.method.schedule import Schedule  # noqa: E402
from hpt_hf.models.zero_shot import ZeroShotClassifier  # noqa: E402
from hpt_hf.training.config import HPTConfig  # noqa: E402
from hpt_hf.training.trainer import HPTTrainer  # noqa: E402

CLASSES = ("cat", "dog", "house", "tree", "red car")


def pytest_collection_finish():
    """What was imported is never garbage; the end of every training looks through all that is not frozen."""
    gc.freeze()


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium of the machine's; no test is skipped for the want of one where NEEDS_BROWSER is set (.ci/run)."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None and not os.environ.get("NEEDS_BROWSER"):
        pytest.skip("there is no chromium")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=flags)
        yield opened
        opened.close()


# Each word twice as often as the one before: BPE breaks ties between equal counts by chance, and no two runs would have one tokenizer.
WORDS = [w for i, w in enumerate(sorted(set(f"this is a photo of {' '.join(CLASSES)}".split()))) for _ in range(2**i)]


def save_tiny_clip(folder, *, patch_size=8, image_size=32, width=32, layers=2, seed=0) -> str:
    """A random CLIP of about 40,000 parameters with its processor, saved as a user would find it."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(WORDS, vocab_size=600)
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    text, sizes = size | {"num_attention_heads": 2}, {"image_size": image_size, "projection_dim": 24}
    model = new_clip(tokenizer, vision={**text, "patch_size": patch_size}, text=text, **sizes)
    model.logit_scale.data.fill_(float(np.log(50)))
    model.save_pretrained(folder)
    new_processor(tokenizer, image_size).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def student_path(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("student"), patch_size=8, seed=1)


@pytest.fixture(scope="session")
def proxy_path(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("proxy"), patch_size=16, width=24, layers=1, seed=2)


@pytest.fixture(scope="session")
def paths(student_path, proxy_path):
    return student_path, proxy_path


def classifier(path) -> ZeroShotClassifier:
    return ZeroShotClassifier.from_pretrained(path).set_classes(CLASSES)


@pytest.fixture
def student(student_path):
    return classifier(student_path)


@pytest.fixture
def proxy(proxy_path):
    return classifier(proxy_path)


def make_images(count: int = 40, *, labelled: bool = True, size: int = 32, seed: int = 0) -> LabelledImages:
    """Random images whose class can be learned: the class sets the mean colour."""
    rng = np.random.default_rng(seed)
    labels = [i % len(CLASSES) for i in range(count)]
    base = rng.integers(40, 216, (len(CLASSES), 3))
    pixels = [np.clip(base[y] + rng.normal(0, 30, (size, size, 3)), 0, 255) for y in labels]
    images = [Image.fromarray(p.astype(np.uint8)) for p in pixels]
    return LabelledImages.from_images(images, labels if labelled else None, CLASSES, name="made")


def relabelled(images: LabelledImages, labels, classes=CLASSES, name=None) -> LabelledImages:
    return LabelledImages.from_images(images.data, labels, classes, name=name or images.name)


def make_batch(model, count=40):
    return Collator(model.processor)(list(make_images(count)))


@pytest.fixture(scope="module")
def trained(student_path):
    """A student that has learned the made images: on a random one no attack could be told from chance."""
    torch.manual_seed(0)
    model = ZeroShotClassifier.from_pretrained(student_path).set_classes(CLASSES).freeze_text()
    batch = make_batch(model)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 2e-3)
    for _ in range(25):
        optimiser.zero_grad()
        F.cross_entropy(model(batch["images"]).logits, batch["labels"]).backward()
        optimiser.step()
    optimiser.zero_grad()
    return model


@pytest.fixture(scope="module")
def batch(trained):
    return make_batch(trained)


def gpd_schedule(*, divergence=None, **changes):
    """HPT-GPD in ten steps; two epochs of `make_images()` at batch 8. `changes`: of `Schedule.gpd`."""
    ga, hpt = (dataclasses.replace(OBJECTIVES[n], divergence=divergence or Divergence()) for n in ("ga", "hpt"))
    usual = {"warm_up_steps": 5, "steps": 5, "interval": 2, "warm_up_learning_rate": 1e-3, "learning_rate": 1e-2}
    return Schedule.gpd(ga, hpt, **(usual | changes)).resolve(5, epochs=1, learning_rate=1e-2)


def single_schedule(name: str, *, steps: int = 5, learning_rate: float = 1e-2, **changes):
    schedule = Schedule.single(OBJECTIVES[name], steps=steps, learning_rate=learning_rate, **changes)
    return schedule.resolve(5, epochs=1, learning_rate=learning_rate)


def make_trainer(folder, student, schedule, *, data=None, held_out=None, eps="8/255", attack=None, **changes):
    """An HPTTrainer as the recipes make it (SGD with momentum, batch 8), on CPU, saving nothing.

    `changes`: proxy and callbacks; all others are TrainingArguments.
    """
    given = {name: changes.pop(name, None) for name in ("proxy", "callbacks")}
    settings = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "logging_steps": 1}
    settings |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    return HPTTrainer(
        student,
        HPTConfig(output_dir=str(folder), **(settings | changes)),
        schedule=schedule,
        attack=attack or TrainingAttack(ThreatModel("linf", eps)),
        train_dataset=make_images() if data is None else data,
        eval_dataset=held_out,
        data_collator=Collator(student.processor),
        **given,
    )


def trainer_from_disk(folder, paths, schedule=None, **changes):
    """What a new process would build of student and proxy; nothing is shared with a trainer built before."""
    student, proxy = (classifier(path) for path in paths)
    return make_trainer(folder, student, schedule or gpd_schedule(), **{"proxy": proxy, **changes})


def weights(model) -> dict[str, torch.Tensor]:
    """A copy of all weights, to compare with later."""
    plain = model.model if isinstance(model, ZeroShotClassifier) else model
    return {n: t.detach().clone() for n, t in plain.state_dict().items()}


def contents(folder) -> dict[str, str]:
    """Path -> digest of every file."""
    files = (f for f in sorted(Path(folder).rglob("*")) if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def write_image_folder(folder, images) -> str:
    """`images` as one folder of PNG files a class: data as a user has it."""
    for index, row in enumerate(images):
        place = Path(folder) / images.classes[row["label"]]
        place.mkdir(parents=True, exist_ok=True)
        row["image"].save(place / f"{index:03d}.png")
    return str(folder)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_parquet(file, images, labels=None, *, names=CLASSES, image="image", label="label") -> str:
    """As the Hub serves them: encoded images, labels as ClassLabel (names), plain numbers (names=None) or words."""
    columns = {image: [None if i is None else {"bytes": i, "path": None} for i in images]}
    features = datasets.Features({image: datasets.Image()})
    if labels is not None:
        columns[label] = labels
        words = any(isinstance(v, str) for v in labels)
        plain = datasets.Value("string" if words else "int64")
        features[label] = datasets.ClassLabel(names=list(names)) if names and not words else plain
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(file)
    return str(file)


def write_stream(folder, images, *, files=3, split="train", **how) -> str:
    """Parquet files of unequal length, named as on the Hub."""
    cuts = [round(len(images) * (i / files) ** 1.5) for i in range(files + 1)]
    labels = how.pop("labels", images.labels)
    for number, (a, b) in enumerate(itertools.pairwise(cuts)):
        encoded = [encode(images[i]["image"]) for i in range(a, b)]
        write_parquet(folder / f"{split}-{number:05}-of-{files:05}.parquet", encoded, labels[a:b], **how)
    return str(folder)


def write_tar(file, members) -> None:
    """`members`: (name, content) in order, as webdataset's writer leaves them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def samples(*rows, kind="png", start=0) -> list[tuple[str, bytes]]:
    """(encoded image, label) -> the two members of each, called as clip-benchmark calls them."""
    both = [((f"s{i:07d}.{kind}", c), (f"s{i:07d}.cls", f"{y}\n".encode())) for i, (c, y) in enumerate(rows, start)]
    return [member for pair in both for member in pair]


def make_result(clean: float | None = None, robust: float | None = None, **changes) -> EvalResult:
    """A result that no model was asked for: 60 of 100 images right, 40 robust, or as `per_class` says, or in percent."""
    counts = {"cat": (50, 40, 30), "dog": (50, 20, 10)}
    if clean is not None:
        counts = {"cat": (10_000, round(100 * clean), round(100 * robust))}
    per_class = changes.setdefault("per_class", counts)
    n, right, robust = (sum(counts) for counts in zip(*per_class.values(), strict=True))
    settings = {
        "model": "models/ours",
        "fingerprint": "0123456789abcdef",
        "dataset": "cats",
        "classes": len(per_class),
    }
    settings |= {"source": {"path": "pictures/cats", "split": "test", "limit": None}}
    settings |= {"templates": ("a photo of a {}",), "images_digest": "fedcba9876543210"}
    settings |= {"n": n, "n_clean": right, "n_robust": robust, "n_after": {"pgd": robust}}
    settings |= {"ends": "r" * robust + "0" * (right - robust) + "w" * (n - right)}
    settings |= {"attack": "pgd-20", "steps": None, "norm": "linf", "eps": "1/255", "protocol": "input", "seed": 0}
    settings |= {"seconds": 1.5, "versions": {"torch": "2", "hpt_hf": "0.1.0"}, "hardware": "a CPU"}
    return EvalResult(**(settings | changes))


class Recorder:
    """A classifier of pixels that remembers every batch it was asked about."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, x):
        self.calls.append(x.detach().clone())
        return self.answer(x)

    def who(self, call: int, images) -> list[int]:
        """Which images these were: the nearest ones, in balls far smaller than the distance between images."""
        return torch.cdist(self.calls[call].flatten(1), images.flatten(1)).argmin(1).tolist()


def grey(count, side=8, seed=0):
    """Random images clear of 0 and 1, where balls are whole and optima have closed forms."""
    return 0.3 + 0.4 * torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def linear(classes, side=8, seed=1):
    """(weight, classifier) of random linear logits."""
    weight = torch.randn(classes, 3 * side * side, generator=torch.Generator().manual_seed(seed))
    return weight, lambda x: (x.flatten(1) - 0.5) @ weight.to(x.device).T


def largest_difference(a: dict, b: dict) -> float:
    """Between two sets of weights, which must have the same names."""
    assert a.keys() == b.keys() and len(a) > 20
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


def torchrun(count: int, *command: str) -> list[str]:
    """On a free port; `accelerate launch --cpu --num_processes 2` would silently start one process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = ["--nproc_per_node", str(count), "--master_port", str(port)]
    return [sys.executable, "-m", "torch.distributed.run", *options, *command]


def launch(count: int, *command: str) -> str:
    done = subprocess.run(torchrun(count, *command), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
