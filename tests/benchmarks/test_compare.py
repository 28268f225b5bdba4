"""Proves that settings are chosen on classes the tuning run never saw, by the rule, and that real pictures keep their roles apart."""

from __future__ import annotations

import compare
import datasets
import numpy as np
import pytest
from PIL import Image

from hpt_hf.commands.common import open_images
from hpt_hf.data.dataset import DatasetSpec
from hpt_hf.lab.datasets import EMOJI_CATEGORIES, LAB_VALIDATION, REAL_VALIDATION, captioned_rows, real_suite

DIGITS = [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory) -> str:
    """A folder in the form of the real one: two pictures a class, three emoji a category, two vendors."""
    folder, rng = tmp_path_factory.mktemp("real"), np.random.default_rng(0)

    def write(name: str, columns: dict, **classes: list[str]) -> None:
        pixels = rng.integers(0, 256, (len(next(iter(columns.values()))), 28, 28), dtype=np.uint8)
        data = datasets.Dataset.from_dict({"image": [Image.fromarray(p) for p in pixels], **columns})
        for column, names in classes.items():
            data = data.cast_column(column, datasets.ClassLabel(names=names))
        data.to_parquet(folder / f"{name}.parquet")

    for split in ("train", "test"):
        write(f"digits-{split}", {"label": [*range(10)] * 2}, label=DIGITS)
        write(f"fashion_mnist-{split}", {"label": [*range(10)] * 2}, label=[f"Garment {d}" for d in DIGITS])
    names = [f"{category.split()[0].lower()} {i}" for category in EMOJI_CATEGORIES for i in range(3)]
    categories = [i for i in range(len(EMOJI_CATEGORIES)) for _ in range(3)]
    columns = {"caption": names, "category": categories, "subcategory": categories}
    for vendor in ("noto", "twemoji"):
        kinds = [f"kind-{i}" for i in range(9)]
        write(f"emoji_{vendor}", columns, category=list(EMOJI_CATEGORIES), subcategory=kinds)
    return str(folder)


def test_lab_tuning_and_validation_share_no_class_and_together_are_the_training_data():
    whole, tuning = (
        set(open_images(DatasetSpec(f"lab:{n}"), training=True, limit=176).classes)
        for n in ("letters", "tuning letters")
    )
    held_out = [set(open_images(DatasetSpec(n), training=True, limit=1).classes) for n in LAB_VALIDATION]
    assert not tuning & set.union(*held_out) and tuning | set.union(*held_out) == whole
    assert all(len(classes) > 10 for classes in (tuning, *held_out))


def test_real_tuning_and_validation_share_no_name(real_folder):
    whole, tuning = (
        open_images(DatasetSpec(f"real:{n}"), training=True, data_dir=real_folder) for n in ("noto", "noto tuning")
    )
    held_out = [open_images(DatasetSpec(n), training=True, data_dir=real_folder) for n in REAL_VALIDATION]
    assert (len(whole), len(tuning), [len(h) for h in held_out]) == (27, 21, [3, 3])
    assert {*tuning.classes}.isdisjoint({c for h in held_out for c in h.classes})
    assert tuning[0]["image"].mode == "RGB" and tuning.classes[tuning[0]["label"]] == "activities 0"


def test_the_real_suite_opens_and_pretraining_never_sees_its_vendor_or_its_splits(real_folder):
    sets = [open_images(DatasetSpec(n), training=False, data_dir=real_folder) for n in real_suite()]
    assert [len(s) for s in sets] == [20, 20, 27] + 9 * [3]
    assert sets[1].classes[7] == "the handwritten digit 7" and sets[0].classes[0] == "garment 0"
    seen = {np.asarray(image.convert("RGB")).tobytes() for image, _ in captioned_rows(real_folder)}
    tested = {np.asarray(s[i]["image"]).tobytes() for s in sets for i in range(len(s))}
    assert len(seen) == 20 + 20 + 27 and not seen & tested
    captions = {c for _, cs in captioned_rows(real_folder) for c in cs}
    assert {"a picture of garment 3", "flags 1", "This is a photo of kind 8."} <= captions and not any(
        "{" in c for c in captions
    )


def test_a_category_that_is_not_there_is_named(real_folder):
    with pytest.raises(ValueError, match="no category 'Spoons' among the emoji; there are Activities"):
        open_images(DatasetSpec("real:noto Spoons"), training=True, data_dir=real_folder)
    with pytest.raises(ValueError, match="no real set is called 'openmoji'"):
        open_images(DatasetSpec("real:openmoji"), training=True, data_dir=real_folder)


def test_the_rule_takes_the_best_mean_and_of_equals_the_lower_rate():
    rates = {"0.01": {"clean": 60.0, "robust": 20.0}, "0.03": {"clean": 50.0, "robust": 30.0}}
    rates |= {"0.1": {"diverged": "nan"}}
    assert compare.choose(rates) == "0.01"
    rates["0.03"]["robust"] += 1
    assert compare.choose(rates) == "0.03"


def test_tables_show_the_spread_over_seeds_and_a_rate_that_diverged():
    record = {"attack": "pgd-20", "rates": {"0.1": {"diverged": "nan"}, "0.03": {"clean": 50.0, "robust": 30.0}}}
    record["runs"] = [{"learning_rate": 0.03, "clean": 70.0 + seed, "robust": 30.0} for seed in (0, 1, 2)]
    rows = (*compare.table({"hpt": record}).splitlines()[2:], *compare.rate_table({"hpt": record}).splitlines()[2:])
    told = [" ".join(line.replace("|", " ").split()) for line in rows]
    assert told == ["hpt 0.03 3 71.0 ± 1.0 30.0 ± 0.0", "hpt 0.03 50.0 30.0", "hpt 0.1 diverged"]
