"""Proves that each of the 17 zero-shot sets opens, by its name, from a Hub cache that holds its repository at its commit, and from no other.

The repositories are tiny and made here, in the layouts of the real ones; the cache is the Hub client's own layout and is read by that client.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from PIL import Image
from test_dataset import samples, write_parquet, write_tar

from hpt_hf.commands.common import open_sets, reopen
from hpt_hf.commands.evaluate import EvaluateArguments, main
from hpt_hf.data import zero_shot_sets as sets
from hpt_hf.data.zero_shot_sets import SETS, open_set
from hpt_hf.evaluation.result import EvalResult
from hpt_hf.models.zero_shot import TEMPLATE, check_classes

WORDNET = json.loads((Path(sets.__file__).parent / "imagenet_wordnet.json").read_text())
NOT_ILSVRC = list(WORDNET)[1000:]
EUROSAT = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"]
EUROSAT += ["Pasture", "PermanentCrop", "Residential", "River", "SeaLake"]
NEWEST = "6adfe4d" + "0" * 33  # of a repository that nobody pins
OFFERED = [(n, p) for n, entry in SETS.items() for p in ("input", "native") if getattr(entry, p)]


def picture(number):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def names_in(name, source) -> list[str]:
    """The class names as the repository of that set has them."""
    count = SETS[name].classes
    if name == "tiny_imagenet":
        others = [i for i in list(WORDNET)[:1000] if WORDNET[i] not in {WORDNET[other] for other in NOT_ILSVRC}]
        return sorted([*NOT_ILSVRC, *others[: count - len(NOT_ILSVRC)]])
    if name == "caltech256":
        return [
            f"{i + 1:03d}.{'t-shirt' if i == 7 else f'thing{i}'}{'-101' if i % 9 == 0 else ''}" for i in range(count)
        ]
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

    def repository(self, source):
        return self.folder / f"datasets--{source.repository.replace('/', '--')}"

    def publish(self, name, source, *, commit=None, names=None, labels=None, split=None, damaged=None):
        commit = commit or source.revision or NEWEST
        draft = self.folder / "draft" / hashlib.sha256(f"{name} {commit}".encode()).hexdigest()
        names = names_in(name, source) if names is None else names
        rows = [(picture(y), y) for y in (labels_in(name) if labels is None else labels)]
        if damaged is not None:
            rows[damaged] = (b"<html>404</html>", rows[damaged][1])
        if source.shards:
            parts = rows[:2], rows[2:]
            for number, part in enumerate(parts):
                write_tar(draft / "test" / f"{number}.tar", samples(*part, kind="png", start=2 * number))
            (draft / "test" / "nshards.txt").write_text("2\n")
            (draft / "classnames.txt").write_text("\n".join(names) + "\n")
            (draft / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na drawing of {c}.\n")
        else:
            splits = (split or source.split).split("+")
            for k, one in enumerate(splits):
                own = rows[k * len(rows) // len(splits) : (k + 1) * len(rows) // len(splits)]
                file = draft / "data" / f"{one}-00000-of-00001-70d52db3c749a935.parquet"
                if name == "caltech256":  # label: a number; text: the name
                    columns = {"image": [{"bytes": p, "path": None} for p, _ in own], "label": [y for _, y in own]}
                    types = datasets.Features(
                        image=datasets.Image(), label=datasets.Value("int64"), text=datasets.Value("string")
                    )
                    file.parent.mkdir(parents=True, exist_ok=True)
                    columns["text"] = [names[y] for _, y in own]
                    datasets.Dataset.from_dict(columns, features=types).to_parquet(file)
                else:
                    write_parquet(file, [p for p, _ in own], [y for _, y in own], names=names)
        repository = self.repository(source)
        for file in (f for f in draft.rglob("*") if f.is_file()):
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            link = repository / "snapshots" / commit / file.relative_to(draft)
            for place in (blob, link):
                place.parent.mkdir(parents=True, exist_ok=True)
            file.rename(blob)
            link.symlink_to(blob)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        return commit


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An own empty Hub cache, and sets as small as the repositories made here; their numbers of classes are the real ones."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, entry in SETS.items():
        small = {
            p: source and replace(source, pictures=len(labels_in(name)))
            for p, source in (("input", entry.input), ("native", entry.native))
        }
        monkeypatch.setitem(SETS, name, replace(entry, **small))
    return Cache(tmp_path / "hub")


def offered(name, protocol):
    return getattr(SETS[name], protocol)


# --- the table


def test_seventeen_sets_are_pinned_to_full_commits_or_known_not_to_be():
    assert len(SETS) == 17
    sources = {source for entry in SETS.values() for source in (entry.input, entry.native) if source}
    assert len({s.repository for s in sources}) == len(
        sources
    )  # no two sets from one repository, nor one at two commits
    pins = [s.revision for s in sources if s.revision]
    assert len(set(pins)) == len(pins) and all(re.fullmatch("[0-9a-f]{40}", p) for p in pins)
    assert [s.repository for s in sources if s.revision is None] == ["ilee0022/Caltech-256"]
    assert [n for n, entry in SETS.items() if entry.native is None] == ["caltech101"]


def test_every_word_of_wordnet_that_tiny_imagenet_uses_has_a_name():
    """The Hub's copy calls 18 of its 200 classes by ids that are none of ILSVRC's thousand: other senses of the same words."""
    assert len(WORDNET) == 1018 and len(NOT_ILSVRC) == 18
    known = list(WORDNET.values())[:1000]
    check_classes(known)
    assert {WORDNET[i] for i in NOT_ILSVRC} <= set(known) and len({WORDNET[i] for i in NOT_ILSVRC}) == 18
    assert all(re.fullmatch(r"n\d{8}", i) for i in WORDNET)
    # (Tiny-ImageNet's id, the word, ILSVRC's id)
    for hub, word, ilsvrc in (
        ("n02666347", "abacus", "n02666196"),
        ("n07975909", "bee", "n02206856"),
        ("n08742578", "Chihuahua", "n02085620"),
        ("n13652994", "chain", "n02999410"),
    ):
        assert hub in NOT_ILSVRC and WORDNET[hub] == WORDNET[ilsvrc] == word


# --- opening


@pytest.mark.parametrize(("name", "protocol"), OFFERED)
def test_every_set_opens_by_name_from_its_commit_and_opens_again(cache, name, protocol):
    source = offered(name, protocol)
    commit = cache.publish(name, source)
    pictures = open_set(name, protocol)
    assert pictures.name == name and len(pictures) == len(labels_in(name))
    assert [pictures[i]["label"] for i in range(len(pictures))] == labels_in(name)
    shown = [pictures[i]["image"].getpixel((0, 0)) for i in range(len(pictures))]
    assert shown == [(y % 256, y // 256, 7) for y in labels_in(name)]
    assert len(pictures.classes) == SETS[name].classes
    check_classes(pictures.classes)
    own = ("a photo of a {}.", "a drawing of {}.")
    assert pictures.templates == (own if protocol == "input" and source.shards else (TEMPLATE,))
    assert pictures.source == {
        "set": name,
        "protocol": protocol,
        "repository": source.repository,
        "revision": source.revision or NEWEST,
        "pinned": name != "caltech256",
    }
    again = reopen(json.loads(json.dumps(pictures.source)) | {"limit": 3})
    assert (again.name, again.classes, again.templates, again.source, again.rows.labels) == (
        pictures.name,
        pictures.classes,
        pictures.templates,
        pictures.source,
        pictures.rows.labels,
    )
    assert again[1]["image"].tobytes() == pictures[1]["image"].tobytes()
    assert commit == pictures.source["revision"]


def test_class_names_are_read_as_words_and_none_is_cut(cache):
    """The copies in the field write `maple_tree`, `AnnualCrop`, `008.t-shirt`, and Caltech101's names there have lost letters."""
    for name, protocol, some in (
        ("cifar100", "input", {11: "maple tree", 12: "thing 12"}),
        ("eurosat", "input", {0: "thing 0"}),
        ("eurosat", "native", {0: "annual crop", 1: "forest", 9: "sea lake"}),
        ("caltech256", "input", {0: "thing0", 1: "thing1", 7: "t shirt", 256: "thing256"}),
        (
            "imagenet1k",
            "native",
            {657: "missile", 744: "projectile missile", 836: "sunglass", 837: "sunglasses", 999: "thing 999"},
        ),
        ("tiny_imagenet", "native", {0: "tench"}),
    ):
        cache.publish(name, offered(name, protocol))
        classes = open_set(name, protocol).classes
        assert {i: classes[i] for i in some} == some
    long = [
        "Faces_easy",
        "car_side",
        "cougar_body",
        "crocodile_head",
        "inline_skate",
        *(f"{'o' * i}x_y" for i in range(97)),
    ]
    cache.publish("caltech101", offered("caltech101", "input"), names=long)
    assert open_set("caltech101", "input").classes == tuple(n.replace("_", " ") for n in long)


def test_tiny_imagenet_is_named_by_the_wordnet_id_of_each_label(cache):
    source = offered("tiny_imagenet", "native")
    ids = names_in("tiny_imagenet", source)
    places = [ids.index(i) for i in (*NOT_ILSVRC[:4], ids[-1])]
    cache.publish("tiny_imagenet", source, labels=places)
    pictures = open_set("tiny_imagenet", "native")
    assert [pictures.classes[pictures[i]["label"]] for i in range(5)] == [WORDNET[ids[p]] for p in places]


def test_imagenet_s_two_pairs_of_equal_names_keep_their_pictures_apart(cache):
    cache.publish("imagenet1k", offered("imagenet1k", "input"), labels=[657, 744, 836, 837, 837])
    pictures = open_set("imagenet1k", "input")
    assert [pictures[i]["label"] for i in range(5)] == [657, 744, 836, 837, 837]
    assert [pictures[i]["image"].getpixel((0, 0))[0] for i in range(5)] == [y % 256 for y in (657, 744, 836, 837, 837)]


def test_names_that_are_no_longer_equal_are_left_as_they_are(cache):
    mended = [f"thing {i}" for i in range(1000)]
    cache.publish("imagenet1k", offered("imagenet1k", "input"), names=mended)
    assert open_set("imagenet1k", "input").classes == tuple(mended)


def test_a_part_of_a_parquet_repository_is_read_beside_the_rest(cache):
    """Somebody has loaded Tiny-ImageNet whole, or only its card and the training split, into the same cache."""
    source = offered("tiny_imagenet", "input")
    cache.publish("tiny_imagenet", source, split="train+valid", labels=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    pictures = open_set("tiny_imagenet", "input")
    assert [pictures[i]["label"] for i in range(5)] == [5, 6, 7, 8, 9]


# --- what is refused


def test_other_contents_than_the_name_promises_are_refused(cache):
    source = offered("pets", "input")
    cache.publish("pets", source, labels=[0, 1, 2, 3])
    with pytest.raises(
        ValueError, match=f"pets from {source.repository} at {source.revision} has 4 pictures, expected 5"
    ):
        open_set("pets", "input")
    dtd = offered("dtd", "native")
    cache.publish("dtd", dtd, names=[f"thing {i}" for i in range(48)])
    with pytest.raises(ValueError, match="dtd from .* has 48 classes, expected 47"):
        open_set("dtd", "native")
    cache.publish("stl10", offered("stl10", "native"), names=[f"thing {i}" for i in range(5)])
    with pytest.raises(ValueError, match="2 labels .* out of range"):
        open_set("stl10", "native")


def test_an_incomplete_repository_is_refused(cache):
    source = offered("pets", "input")
    commit = cache.publish("pets", source)
    shard = cache.repository(source) / "snapshots" / commit / "test" / "1.tar"
    blob = shard.resolve()
    blob.write_bytes(blob.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"1\.tar cannot be read"):
        open_set("pets", "input")
    shard.unlink()
    with pytest.raises(ValueError, match="holds 1 shards and its nshards.txt says '2'"):
        open_set("pets", "input")


def test_a_picture_that_is_skipped_still_counts_as_one_of_the_set(cache):
    cache.publish("cars", offered("cars", "input"), damaged=1)
    with pytest.raises(ValueError, match=r"row 1 \(s0000001.png in 0.tar\) of .* cannot be read"):
        open_set("cars", "input")[1]
    pictures = open_set("cars", "input", on_corrupt="skip")
    assert len(pictures) == 4 and [row for row, _ in pictures.skipped] == [1] and pictures.name == "cars"


def test_an_unknown_name_lists_the_nearest_or_all():
    with pytest.raises(ValueError, match="no set is called 'cifar'; did you mean cifar10.*cifar100"):
        open_set("cifar", "input")
    with pytest.raises(ValueError, match="no set is called 'xyzzy'; there are cifar10, .*tiny_imagenet"):
        open_set("xyzzy", "input")


def test_a_protocol_that_no_repository_serves_is_refused_without_asking_the_hub(cache):
    cache.publish("caltech101", offered("caltech101", "input"))
    with pytest.raises(ValueError, match="caltech101 has no known copy .*'native'.*--data"):
        open_set("caltech101", "native")


@pytest.mark.parametrize(("name", "protocol"), OFFERED)
def test_offline_and_not_in_the_cache_names_repository_and_revision(cache, name, protocol):
    source = offered(name, protocol)
    with pytest.raises(
        OSError, match=rf"{source.repository} \({source.revision or 'newest'}\) is neither in the cache nor"
    ):
        open_set(name, protocol)


def test_another_revision_in_the_cache_is_never_taken_for_the_pinned_one(cache):
    source = offered("cifar10", "native")
    cache.publish("cifar10", source, commit="f" * 40)  # what refs/main says, too
    with pytest.raises(OSError, match=source.revision):
        open_set("cifar10", "native")
    cache.publish("cifar10", source, labels=[9, 8, 7, 6, 5])
    cache.publish("cifar10", source, commit="e" * 40)
    assert open_set("cifar10", "native").rows.labels == [9, 8, 7, 6, 5]


def test_a_set_that_nobody_pins_is_opened_again_at_the_commit_its_score_names(cache):
    source = offered("caltech256", "native")
    cache.publish("caltech256", source, commit="a" * 40)
    first = open_set("caltech256", "native")
    cache.publish("caltech256", source, commit="b" * 40, labels=list(range(256, -1, -1)))
    assert open_set("caltech256", "native").source == first.source | {"revision": "b" * 40}
    again = reopen(first.source)
    assert again.source == first.source and again.rows.labels == first.rows.labels


# --- through the command line


@pytest.mark.parametrize("protocol", ["input", "native"])
def test_a_score_of_a_named_set_says_from_which_commit_it_is(cache, tmp_path, student_path, protocol, capsys):
    source = offered("cifar10", protocol)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    cache.publish("cifar10", source, names=names, labels=[0, 9, 3, 5, 3])
    flags = [
        "--model",
        student_path,
        "--dataset",
        "cifar10",
        "--protocol",
        protocol,
        "--output_dir",
        str(tmp_path / "out"),
    ]
    main([*flags, "--attack_steps", "1", "--probe", "0", "--batch_size", "5"])
    (file,) = (tmp_path / "out" / "results").glob("*.json")
    score = EvalResult.read(file)
    assert (score.dataset, score.n, score.classes, score.protocol) == ("cifar10", 5, 10, protocol)
    assert score.source["repository"] == source.repository and score.source["revision"] == source.revision
    assert len(score.templates) == (2 if protocol == "input" else 1)
    assert set(score.per_class) == {names[y] for y in (0, 9, 3, 5)}
    assert reopen(score.source).rows.labels == [0, 9, 3, 5, 3]
    assert "cifar10" in capsys.readouterr().out


def test_the_suite_is_all_seventeen(cache):
    for name, entry in SETS.items():
        cache.publish(name, entry.input)
    opened = open_sets(EvaluateArguments(output_dir="unused", suite="zero-shot-17"))
    assert [p.name for p in opened] == list(SETS) and {p.source["protocol"] for p in opened} == {"input"}


def test_a_named_set_that_is_not_to_be_had_ends_in_one_line(cache, tmp_path, student_path):
    with pytest.raises(SystemExit, match="^hpt-hf evaluate: the data set .*wds_vtab-dtd_test .276b0059"):
        main(["--model", student_path, "--dataset", "dtd", "--output_dir", str(tmp_path / "out")])
