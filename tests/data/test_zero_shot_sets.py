"""Each of the 17 sets opens by name from the Hub client's cache of its commit: tiny repositories in the real layouts."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from conftest import encode, samples, write_parquet, write_tar
from PIL import Image

from hpt_hf.commands.common import open_sets, reopen
from hpt_hf.commands.evaluate import EvaluateArguments
from hpt_hf.data import zero_shot_sets
from hpt_hf.data.zero_shot_sets import SETS, open_set
from hpt_hf.models.zero_shot import TEMPLATE, check_classes

WORDNET = json.loads((Path(zero_shot_sets.__file__).parent / "imagenet_wordnet.json").read_text())
NOT_ILSVRC = list(WORDNET)[1000:]
EUROSAT = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"]
EUROSAT += ["Pasture", "PermanentCrop", "Residential", "River", "SeaLake"]
NEWEST = "6adfe4d" + "0" * 33  # of a repository that nobody pins
OFFERED = [(n, p) for n, entry in SETS.items() for p in ("input", "native") if getattr(entry, p)]


def colour(label):
    return (label % 256, label // 256, 7)


def shown(images):
    return [row["image"].getpixel((0, 0)) for row in images]


def offered(name, protocol):
    return getattr(SETS[name], protocol)


def names_in(name, source) -> list[str]:
    """The class names as the repository of that set has them."""
    count = SETS[name].classes
    if name == "tiny_imagenet":
        others = [i for i in list(WORDNET)[:1000] if WORDNET[i] not in {WORDNET[other] for other in NOT_ILSVRC}]
        return sorted([*NOT_ILSVRC, *others[: count - len(NOT_ILSVRC)]])
    if name == "caltech256":
        things = ["t-shirt" if i == 7 else f"thing{i}" for i in range(count)]
        return [f"{i + 1:03d}.{thing}{'-101' if i % 9 == 0 else ''}" for i, thing in enumerate(things)]
    if not source.shards:
        return EUROSAT
    names = [f"thing {i}" for i in range(count)]
    if name == "imagenet1k":
        names[657] = names[744] = "missile"
        names[836] = names[837] = "sunglasses"
    if name == "cifar100":
        names[11] = "maple_tree"
    return names


def labels_in(name) -> list[int]:
    """The first, the last and some between; every class where the class list is made from the rows."""
    count = SETS[name].classes
    return list(range(count)) if name == "caltech256" else [0, count - 1, count // 2, 1, 0]


class Cache:
    """A Hub cache as the client fills it: datasets--owner--name/{blobs, refs, snapshots/<commit>/<file> -> blob}."""

    def __init__(self, folder):
        self.folder = folder

    def publish(self, name, protocol="input", *, commit=None, names=None, labels=None, split=None, damaged=None):
        source = offered(name, protocol)
        commit = commit or source.revision or NEWEST
        repository = self.folder / f"datasets--{source.repository.replace('/', '--')}"
        draft = repository / "blobs" / commit
        names = names_in(name, source) if names is None else names
        labels = labels_in(name) if labels is None else labels
        rows = [(encode(Image.new("RGB", (8, 8), colour(y))), y) for y in labels]
        if damaged is not None:
            rows[damaged] = (b"<html>404</html>", rows[damaged][1])
        if source.shards:
            for number, part in enumerate((rows[:2], rows[2:])):
                write_tar(draft / "test" / f"{number}.tar", samples(*part, start=2 * number))
            (draft / "test" / "nshards.txt").write_text("2\n")
            (draft / "classnames.txt").write_text("\n".join(names) + "\n")
            (draft / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na drawing of {c}.\n")
        else:
            splits = (split or source.split).split("+")
            for k, one in enumerate(splits):
                own = rows[k * len(rows) // len(splits) : (k + 1) * len(rows) // len(splits)]
                file = draft / "data" / f"{one}-00000-of-00001-70d52db3c749a935.parquet"
                text = name == "caltech256"  # there `label` is a number, and `text` the name
                values = [names[y] if text else y for _, y in own]
                write_parquet(file, [c for c, _ in own], values, names=names, label="text" if text else "label")
        shutil.copytree(draft, repository / "snapshots" / commit, copy_function=os.symlink)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        return commit


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An own empty Hub cache, and sets as small as the repositories made here, of as many classes as the real ones."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, entry in SETS.items():
        sources = {protocol: offered(name, protocol) for protocol in ("input", "native")}
        small = {p: source and replace(source, images=len(labels_in(name))) for p, source in sources.items()}
        monkeypatch.setitem(SETS, name, replace(entry, **small))
    return Cache(tmp_path / "hub")


def test_seventeen_sets_are_pinned_to_full_commits_or_known_not_to_be():
    assert len(SETS) == 17
    sources = {source for entry in SETS.values() for source in (entry.input, entry.native) if source}
    assert len({s.repository for s in sources}) == len(sources)  # none at two commits
    pins = [s.revision for s in sources if s.revision]
    assert len(set(pins)) == len(pins) and all(re.fullmatch("[0-9a-f]{40}", p) for p in pins)
    assert [s.repository for s in sources if s.revision is None] == ["ilee0022/Caltech-256"]
    assert [n for n, entry in SETS.items() if entry.native is None] == ["caltech101"]


def test_every_word_of_wordnet_that_tiny_imagenet_uses_has_a_name():
    """The Hub's copy calls 18 classes by ids that are none of ILSVRC's thousand: other senses of the same words."""
    assert len(WORDNET) == 1018 and all(re.fullmatch(r"n\d{8}", i) for i in WORDNET)
    known = list(WORDNET.values())[:1000]
    check_classes(known)
    assert {WORDNET[i] for i in NOT_ILSVRC} <= set(known) and len({WORDNET[i] for i in NOT_ILSVRC}) == 18
    # Tiny-ImageNet's id, the word, ILSVRC's id
    for hub, word, ilsvrc in (("n02666347", "abacus", "n02666196"), ("n07975909", "bee", "n02206856")):
        assert hub in NOT_ILSVRC and WORDNET[hub] == WORDNET[ilsvrc] == word


@pytest.mark.parametrize(("name", "protocol"), OFFERED)
def test_every_set_opens_by_name_from_its_commit_and_opens_again(cache, name, protocol):
    source = offered(name, protocol)
    missing = rf"{source.repository} \({source.revision or 'newest'}\) is neither in the cache"
    with pytest.raises(OSError, match=missing):
        open_set(name, protocol)
    commit = cache.publish(name, protocol)
    images = open_set(name, protocol)
    assert images.name == name and images.labels == labels_in(name)
    assert shown(images) == [colour(y) for y in labels_in(name)]
    assert len(images.classes) == SETS[name].classes
    check_classes(images.classes)
    own = ("a photo of a {}.", "a drawing of {}.")
    assert images.templates == (own if protocol == "input" and source.shards else (TEMPLATE,))
    origin = {"set": name, "protocol": protocol, "repository": source.repository, "revision": commit}
    assert images.source == origin | {"pinned": name != "caltech256"}
    again = reopen(json.loads(json.dumps(images.source)) | {"limit": 3})
    same = ("name", "classes", "templates", "source", "labels")
    assert all(getattr(again, what) == getattr(images, what) for what in same) and shown(again) == shown(images)


def test_class_names_are_read_as_words_and_none_is_cut(cache):
    """The copies in the field write `maple_tree`, `AnnualCrop`, `008.t-shirt`."""
    missiles = {657: "missile", 744: "projectile missile", 836: "sunglass", 837: "sunglasses", 999: "thing 999"}
    for name, protocol, some in (
        ("cifar100", "input", {11: "maple tree", 12: "thing 12"}),
        ("eurosat", "input", {0: "thing 0"}),
        ("eurosat", "native", {0: "annual crop", 1: "forest", 9: "sea lake"}),
        ("caltech256", "input", {0: "thing0", 1: "thing1", 7: "t shirt", 256: "thing256"}),
        ("imagenet1k", "native", missiles),
        ("tiny_imagenet", "native", {0: "tench"}),
    ):
        cache.publish(name, protocol)
        classes = open_set(name, protocol).classes
        assert {i: classes[i] for i in some} == some


def test_tiny_imagenet_is_named_by_the_wordnet_id_of_each_label_and_read_without_its_other_splits(cache):
    ids = names_in("tiny_imagenet", offered("tiny_imagenet", "native"))
    places = [ids.index(i) for i in (*NOT_ILSVRC[:4], ids[-1])]
    cache.publish("tiny_imagenet", "native", labels=[5, 6, 7, 8, 9, *places], split="train+valid")
    images = open_set("tiny_imagenet", "native")
    assert [images.classes[label] for label in images.labels] == [WORDNET[ids[p]] for p in places]


def test_imagenets_two_pairs_of_equal_names_keep_their_images_apart_and_mended_names_stay(cache):
    cache.publish("imagenet1k", labels=[657, 744, 836, 837, 837])
    images = open_set("imagenet1k", "input")
    assert images.labels == [657, 744, 836, 837, 837] and shown(images) == [colour(y) for y in images.labels]
    mended = [f"thing {i}" for i in range(1000)]
    cache.publish("imagenet1k", names=mended, commit="c" * 40)
    assert open_set("imagenet1k", "input", revision="c" * 40).classes == tuple(mended)


def test_other_contents_than_the_name_promises_other_names_and_protocols_are_refused(cache):
    cache.publish("pets", labels=[0, 1, 2, 3])
    cache.publish("dtd", names=[f"thing {i}" for i in range(48)])
    for name, protocol, message in (
        ("pets", "input", r"pets from .* at .*: got \(classes, images\) \(37, 4\), expected \(37, 5\)"),
        ("dtd", "input", r"got .* \(48, 5\), expected \(47, 5\)"),
        ("cifar", "input", "no set is called 'cifar'; did you mean cifar10.*cifar100"),
        ("caltech101", "native", "caltech101 has no known copy .*'native'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_set(name, protocol)


def test_an_image_that_is_skipped_still_counts_as_one_of_the_set(cache):
    cache.publish("cars", damaged=1)
    with pytest.raises(ValueError, match="row 1 .*of .*cannot be read"):
        open_set("cars", "input")[1]
    images = open_set("cars", "input", on_corrupt="skip")
    assert [row for row, _ in images.skipped] == [1] and (len(images), len(images.classes)) == (4, 196)


def test_another_revision_in_the_cache_is_never_taken_for_the_pinned_one(cache):
    cache.publish("cifar10", commit="f" * 40)  # what refs/main says, too
    with pytest.raises(OSError, match=SETS["cifar10"].native.revision):
        open_set("cifar10", "native")
    cache.publish("cifar10", labels=[9, 8, 7, 6, 5])
    cache.publish("cifar10", commit="e" * 40)
    assert open_set("cifar10", "native").labels == [9, 8, 7, 6, 5]


def test_a_set_that_nobody_pins_is_opened_again_at_the_commit_its_result_names(cache):
    cache.publish("caltech256", commit="a" * 40)
    first = open_set("caltech256", "native")
    cache.publish("caltech256", commit="b" * 40, labels=list(range(256, -1, -1)))
    assert open_set("caltech256", "native").source == first.source | {"revision": "b" * 40}
    again = reopen(first.source)
    assert again.source == first.source and again.labels == first.labels


def test_the_suite_is_all_seventeen(cache):
    for name in SETS:
        cache.publish(name)
    opened = open_sets(EvaluateArguments(output_dir="unused", model="unused", suite="zero-shot-17"))
    assert [p.name for p in opened] == list(SETS) and {p.source["protocol"] for p in opened} == {"input"}
