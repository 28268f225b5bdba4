"""Proves that a model card holds every figure of its Scores and no other, that the Hub can read it, and that it tells no path of this machine."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import make_pictures, make_result, make_trainer, single_schedule
from huggingface_hub import ModelCard, ModelCardData
from loopback_hub import card_problems

from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.publishing.export import SEAL, export
from hpt_hf.publishing.model_card import (
    CONVERTED,
    MIXED,
    TRAINED,
    card,
    check_figures,
    own_results,
    read_record,
    write_model_card,
)
from hpt_hf.utils import write_json

RECIPE = {"model_name_or_path": "openai/clip-vit-base-patch32", "dataset": "zh-plus/tiny-imagenet", "license": "mit"}
DOUBT = {
    "name": "gradient_masking",
    "raised": True,
    "value": 3,
    "limit": 0,
    "found": "Square breaks more",
    "look_at": "it",
}
ODD_NAMES = (
    *(
        "a|b || c",
        "she said \"cat\" and 'dog'",
        "naïve – Ωμέγα 猫 🐈",
        "#hash: colon, - dash",
        "{brace} [list] `tick` *star* _under_",
    ),
    *(
        "<!-- written by hpt_hf, 0123456789ab -->",
        "---",
        "true",
        "null",
        "~",
        "1e3",
        "007",
        "2024-01-01",
        "1/255",
        "%50",
        "@at !bang &and",
    ),
    *("back\\slash", "trailing ", " leading", "{{ jinja }} {% raw %}", "? key", "<b>bold</b>", "word " * 60),
)


@pytest.fixture(scope="module")
def sealed(student_path, tmp_path_factory) -> Path:
    return export(ZeroShotClassifier.from_pretrained(student_path), tmp_path_factory.mktemp("card") / "robust")


@pytest.fixture(scope="module")
def fingerprint(sealed) -> str:
    return json.loads((sealed / SEAL).read_text())["fingerprint"]


@pytest.fixture
def folder(sealed, tmp_path) -> Path:
    """An exported folder without records and Scores, its card still to be written."""
    copied = shutil.copytree(sealed, tmp_path / "robust")
    (copied / "README.md").unlink()
    return copied


@pytest.fixture(scope="module")
def record(student_path, proxy_path, tmp_path_factory) -> dict:
    """What a trainer says of itself, and what a recipe adds."""
    student = ZeroShotClassifier.from_pretrained(student_path).set_classes(make_pictures().classes)
    trainer = make_trainer(tmp_path_factory.mktemp("run"), student, single_schedule("tecoa", steps=7))
    said = json.loads(json.dumps(trainer.record()))
    return said | {
        "method": "hpt_gpd",
        "student": {"source": RECIPE["model_name_or_path"], "revision": "3d74acf9", "fingerprint": "0" * 16},
        "recipe": dict(RECIPE),
        "held_out": {"eval_clean_accuracy": 61.25, "eval_robust_accuracy": 43.75},
    }


def put_scores(folder: Path, *scores) -> list:
    for number, score in enumerate(scores):
        write_json(folder / "scores" / f"{number:03d}.json", score.to_json())
    return own_results(folder)


def metadata(text: str) -> dict:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match, "the card has no metadata"
    return yaml.safe_load(match[1])


def claims(text: str) -> list[tuple]:
    """(data set, metric, value, arguments) of every figure in `model-index`."""
    found = []
    for model in metadata(text).get("model-index", []):
        for result in model["results"]:
            assert result["task"]["type"] == "zero-shot-image-classification"
            found += [(result["dataset"]["name"], m["name"], m["value"], m["args"]) for m in result["metrics"]]
    return found


def rows(text: str) -> list[list[str]]:
    """The cells of all rows of tables, escapes undone."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|-")]
    return [[c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


# --- figures ----------------------------------------------------------------------------------------------------------------


def many(fingerprint):
    return [
        make_result(fingerprint=fingerprint, dataset=dataset, source={"path": f"owner/{dataset}", "split": "test", "limit": limit},
                   attack=attack, eps=eps, norm=norm, protocol=protocol, per_class=counts, parts={"apgd-ce": 33.3, "square": 31.0})
        for dataset, limit, attack, eps, norm, protocol, counts in [
            ("cats", None, "pgd-20", "1/255", "linf", "input", {"cat": (50, 40, 30), "dog": (50, 20, 10)}),
            ("dogs", None, "pgd-20", "1/255", "linf", "input", {"cat": (7, 6, 0), "dog": (5, 5, 1)}),
            ("cats", 30, "standard", "4/255", "linf", "native", {"cat": (15, 9, 8), "dog": (15, 0, 0)}),
            ("birds", None, "apgd-ce-100", "0.5", "l2", "input", {"cat": (1, 1, 1), "dog": (2, 2, 2)}),
        ]
    ]  # fmt: skip


def test_every_figure_of_the_card_is_its_score_s(folder, fingerprint):
    scores = put_scores(folder, *many(fingerprint))
    text = card(folder)
    assert card_problems(text) == ([], [])
    found = claims(text)
    assert len(found) == 2 * len(scores) == 8
    for score in scores:
        mine = [c for c in found if c[0] == score.dataset and c[3]["n"] == score.n]
        ((_, _, clean, about),) = [c for c in mine if c[1] == "clean accuracy, %"]
        robust_name = f"robust accuracy, % ({score.attack}, {score.norm} {score.eps})"
        ((_, _, robust, told),) = [c for c in mine if c[1] == robust_name]
        assert (clean, robust) == (score.clean, score.robust)
        for arguments, interval in ((about, score.clean_interval), (told, score.interval)):
            assert arguments["interval_95"] == list(interval) and interval[0] <= interval[1]
            assert (arguments["n"], arguments["seed"], arguments["protocol"]) == (score.n, score.seed, score.protocol)
        asked = {"attack": score.attack, "norm": score.norm, "eps": score.eps, "verdict": "unchecked", "doubts": []}
        assert asked.items() <= told.items() and told["after_each_attack"] == score.parts
        assert "eps" not in about and "attack" not in about, "a clean figure is of no attack"
    data = metadata(text)
    assert data["metrics"] == ["accuracy"] and data["model-index"][0]["name"] == "robust"
    types = {
        r["dataset"]["name"]: (r["dataset"]["type"], r["dataset"].get("split"))
        for r in data["model-index"][0]["results"]
    }
    assert types == {name: (f"owner/{name}", "test") for name in ("cats", "dogs", "birds")}
    assert check_figures(text, scores) == 8
    parsed = ModelCard(text).data
    assert isinstance(parsed, ModelCardData) and len(parsed.eval_results) == 8 and parsed.model_name == "robust"


def test_the_tables_say_the_same_one_for_each_question(folder, fingerprint):
    scores = put_scores(folder, *many(fingerprint))
    text = card(folder)
    headings = [line.removeprefix("### ") for line in text.splitlines() if line.startswith("### ")]
    assert sorted(headings) == sorted({str(s.question) for s in scores}) and len(headings) == 3
    table = [r for r in rows(text) if len(r) == 8]
    for s in scores:
        row = [s.dataset, str(s.n), str(s.classes), f"{s.clean:.1f}", "{:.1f}–{:.1f}".format(*s.clean_interval)]
        assert [*row, f"{s.robust:.1f}", "{:.1f}–{:.1f}".format(*s.interval), s.verdict] in table
    assert sum(r[0] == "mean" for r in table) == 3 and sum(r[0] == "data set" for r in table) == 3 and len(table) == 10


@pytest.mark.parametrize(
    ("changes", "figures"),
    [
        ({}, 2),
        ({"attack": "cw-20"}, 3),  # the clean figure of the same pictures stands once
        ({"attack": "cw-20", "verdict": "clear"}, 3),
        ({"eps": "4/255"}, 3),
        ({"norm": "l2"}, 3),
        ({"dataset": "dogs", "source": {"path": "pictures/dogs", "split": "test", "limit": None}}, 4),
        ({"protocol": "native"}, 4),
        ({"seed": 1}, 4),
        (
            {
                "source": {"path": "pictures/cats", "split": "test", "limit": 10},
                "per_class": {"cat": (5, 4, 3), "dog": (5, 2, 1)},
            },
            4,
        ),
        ({"source": {"path": "pictures/cats", "split": "train", "limit": None}}, 4),
        ({"source": {"path": "owner/cats", "split": "test", "revision": "abc", "limit": None}}, 4),
    ],
)
def test_a_figure_that_two_scores_share_stands_once_and_another_twice(folder, fingerprint, changes, figures):
    scores = put_scores(folder, make_result(fingerprint=fingerprint), make_result(fingerprint=fingerprint, **changes))
    text = card(folder)
    assert len(scores) == 2 and len(claims(text)) == figures and card_problems(text) == ([], [])
    check_figures(text, scores)


@pytest.mark.parametrize("names", [("Cats", "cats"), ("my cats", "my-cats"), ("a:b", "a-b")])
def test_two_sets_whose_names_are_alike_are_not_taken_for_one(folder, fingerprint, names):
    scores = [
        make_result(fingerprint=fingerprint, dataset=n, source={"path": f"/data/{n}", "split": "test"}) for n in names
    ]
    scores = put_scores(folder, *scores)
    text = card(folder)
    assert len(claims(text)) == 4 and {c[0] for c in claims(text)} == set(names)
    assert check_figures(text, scores) == 4


def test_scores_of_other_weights_are_left_out_and_said(folder, fingerprint, capsys):
    others = [
        make_result(fingerprint="f" * 16, dataset=n, per_class={"cat": (100, 99, 98)}) for n in ("theirs", "others")
    ]
    scores = put_scores(folder, make_result(fingerprint=fingerprint), *others)
    capsys.readouterr()
    text = card(folder)
    assert [s.dataset for s in scores] == ["cats"] and len(claims(text)) == 2
    assert "theirs" not in text and "99" not in text.split("<!--")[0]
    assert "2 of 3 Scores in scores/ are of other weights and left out (others, theirs)" in capsys.readouterr().err


def test_a_card_without_scores_claims_nothing(folder):
    text = card(folder)
    data = metadata(text)
    assert not {"model-index", "metrics"} & data.keys() and card_problems(text) == ([], [])
    assert "None has been measured on these weights, so nothing is claimed." in text
    assert "No record came with the weights." in text and not {"base_model", "license", "datasets"} & data.keys()
    assert not re.search(r"\d+(\.\d+)?\s?%", text) and check_figures(text, []) == 0
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "zero-shot-image-classification"


def test_a_suspicious_verdict_stands_in_the_card(folder, fingerprint):
    doubted = make_result(fingerprint=fingerprint, verdict="suspicious", suspicions=(DOUBT,), checks=(DOUBT,))
    source = {"path": "pictures/dogs", "split": "test", "limit": None}
    clear = make_result(
        fingerprint=fingerprint, dataset="dogs", source=source, verdict="clear", checks=({**DOUBT, "raised": False},)
    )
    text = card(folder)
    assert "Doubts" not in text and "gradient_masking" not in text
    put_scores(folder, doubted, clear)
    text = write_model_card(folder).read_text()
    assert "- `gradient_masking`: cats (pgd-20, 1/255)" in text and "1 suspicious" in text
    verdicts = {c[0]: (c[3]["verdict"], c[3]["doubts"]) for c in claims(text) if "robust" in c[1]}
    assert verdicts == {"cats": ("suspicious", ["gradient_masking"]), "dogs": ("clear", [])}
    assert {r[0]: r[-1] for r in rows(text) if r[0] in ("cats", "dogs")} == {"cats": "suspicious", "dogs": "clear"}


def test_pictures_that_were_left_out_are_counted(folder, fingerprint):
    put_scores(
        folder, make_result(fingerprint=fingerprint, skipped=("row 3 of /home/me/cats cannot be read", "row 9"))
    )
    assert "2 unreadable pictures were left out." in card(folder) and "/home/me" not in card(folder)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_with_any_characters_comes_back(folder, fingerprint, name):
    scores = put_scores(
        folder,
        make_result(fingerprint=fingerprint, dataset=name, per_class={name: (50, 40, 30), "o\"'": (50, 20, 10)}),
    )
    text = write_model_card(folder).read_text(encoding="utf-8")
    assert card_problems(text) == ([], []) and check_figures(text, scores) == 2
    assert {c[0] for c in claims(text)} == {name} == {r.dataset_name for r in ModelCard(text).data.eval_results}
    assert [r for r in rows(text) if r[0] == name.strip()], "its row is whole"
    assert card(folder) == text, "what was written is known as ours again"
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    calls = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.keyword) and n.arg == "candidate_labels"]
    assert ast.literal_eval(calls[0].value) == [name, "o\"'"]


def test_check_figures_counts_them_and_needs_all(folder, fingerprint):
    scores = put_scores(folder, *many(fingerprint))
    text = card(folder)
    assert check_figures(text, scores) == 8
    with pytest.raises(
        ValueError, match="disagree about 2 figures, such as .* on birds.*: 100.0 stands in the card alone"
    ):
        check_figures(text, [s for s in scores if s.dataset != "birds"])
    more = make_result(fingerprint=fingerprint, dataset="fish")
    with pytest.raises(
        ValueError, match="disagree about 2 figures, such as .* on fish.*: .* stands in the Scores alone"
    ):
        check_figures(text, [*scores, more])
    with pytest.raises(ValueError, match="disagree about 8 figures"):
        check_figures(text, [])


def edited(change):
    """The card with its metadata changed and written as YAML again, as a person with a script would."""

    def edit(text: str) -> str:
        data = metadata(text)
        change(data)
        return f"---\n{yaml.safe_dump(data, allow_unicode=True, sort_keys=False)}---\n" + text.split("\n---\n", 1)[1]

    return edit


def metric(position: int, **changes):
    def change(data):
        metrics = [m for r in data["model-index"][0]["results"] for m in r["metrics"]]
        metrics[position].update({k: v for k, v in changes.items() if k != "args"})
        metrics[position]["args"].update(changes.get("args", {}))

    return edited(change)


LIES = {
    "a higher value": (metric(1, value=95.0), "disagree about 2 figures"),
    "a value a little higher": (metric(1, value=40.01), "disagree about 2 figures"),
    "another clean value": (metric(0, value=99.0), "disagree about 2 figures"),
    "a narrower interval": (metric(1, args={"interval_95": [39.9, 40.1]}), "disagree about 2 figures"),
    "more pictures": (metric(1, args={"n": 10_000}), "disagree about 2 figures"),
    "a larger eps": (metric(1, args={"eps": "8/255"}), "disagree about 2 figures"),
    "a stronger attack": (metric(1, name="robust accuracy, % (standard, linf 1/255)"), "disagree about 2 figures"),
    "a better verdict": (metric(1, args={"verdict": "clear"}), "disagree about 2 figures"),
    "a removed result": (edited(lambda d: d["model-index"][0]["results"][0]["metrics"].pop()), "disagree about 1 figures"),
    "all removed": (edited(lambda d: d.pop("model-index")), "disagree about 2 figures"),
    "an added result": (
        edited(lambda d: d["model-index"][0]["results"][0]["metrics"].append({"type": "accuracy", "value": 99.0, "name": "x"})),
        "such as x on cats.*: 99.0 stands in the card alone",
    ),
    "another data set": (
        edited(lambda d: d["model-index"][0]["results"][0]["dataset"].update(name="imagenet")),
        "disagree about 4 figures",
    ),
    "another data set's id": (
        edited(lambda d: d["model-index"][0]["results"][0]["dataset"].update(type="imagenet-1k")),
        "disagree",
    ),
    "no metadata": (lambda text: text.split("\n---\n", 1)[1], "disagree about 2 figures"),
    "broken YAML": (lambda text: text.replace("library_name: ", "library_name: [: {", 1), "no model card that the Hub can read"),
    "a list": (lambda text: "---\n- a\n- b\n---\nwords", "no model card that the Hub can read"),
    "an index of nonsense": (edited(lambda d: d.update({"model-index": [{"name": "x"}]})), "no model card that the Hub can read"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_card_that_says_other_than_the_scores_is_refused(folder, fingerprint, lie):
    scores = put_scores(folder, make_result(fingerprint=fingerprint))
    text = card(folder)
    change, message = LIES[lie]
    assert check_figures(edited(lambda d: None)(text), scores) == 2, "rewriting alone is no change"
    with pytest.raises(ValueError, match=message):
        check_figures(change(text), scores)


# --- edited by hand ---------------------------------------------------------------------------------------------------------


def test_a_card_that_was_not_edited_is_written_anew(folder, fingerprint):
    first = write_model_card(folder).read_text()
    assert card(folder) == first
    put_scores(folder, make_result(fingerprint=fingerprint))
    write_json(folder / CONVERTED, {"source": "their/clip", "base": None, "license": "mit"})
    second = write_model_card(folder).read_text()
    assert len(claims(second)) == 2 and "their/clip" in second and card(folder) == second != first
    shutil.rmtree(folder / "scores")
    (folder / CONVERTED).unlink()
    assert write_model_card(folder).read_text() == first


def test_any_edit_of_one_character_is_kept(folder, fingerprint, capsys):
    """At every place, be it in the mark. Only blank lines before the mark are nobody's words."""
    put_scores(folder, make_result(fingerprint=fingerprint))
    text = write_model_card(folder).read_text()
    end = len(text[: text.rindex("<!-- written by")].rstrip())
    put_scores(folder, make_result(fingerprint=fingerprint), make_result(fingerprint=fingerprint, dataset="new"))
    assert card(folder) != text
    for place in {*range(0, len(text), 23), *range(end - 3, len(text))}:
        kinds = [text[:place] + "§" + text[place:], text[:place] + "§" + text[place + 1 :]]
        kinds += [text[:place] + text[place + 1 :]] if place < end else []
        for edit in kinds:
            (folder / "README.md").write_text(edit, encoding="utf-8")
            assert card(folder) == edit, (place, edit[place - 10 : place + 10])
            assert "README.md was edited by hand: kept as it is; delete it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "my own words\n", "---\nlicense: mit\n---\n# Mine\n", "<!-- written by hpt_hf, -->\n"]
)
def test_a_card_of_somebody_s_own_is_kept(folder, text):
    (folder / "README.md").write_text(text)
    assert card(folder) == text and write_model_card(folder).read_text() == text


def test_text_below_the_mark_is_an_edit(folder):
    text = write_model_card(folder).read_text()
    for more in ("\n", "more\n", " "):
        (folder / "README.md").write_text(text + more)
        assert card(folder) == text + more


# --- how it was made --------------------------------------------------------------------------------------------------------


def test_a_trained_model_s_card_tells_its_recipe(folder, record, fingerprint):
    write_json(folder / TRAINED, record)
    put_scores(folder, make_result(fingerprint=fingerprint))
    text = card(folder)
    data = metadata(text)
    assert card_problems(text) == ([], [])
    assert data["base_model"] == "openai/clip-vit-base-patch32" and data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["zh-plus/tiny-imagenet"] and data["license"] == "mit"
    assert data["tags"] == ["clip", "adversarial-robustness", "hpt-gpd"]
    told = {r[0]: r[1] for r in rows(text) if len(r) == 2}
    assert (
        told["method"] == "hpt_gpd" and told["pictures"] == "40" and told["batch"] == "8" and told["proxy"] == "none"
    )
    assert (
        told["student"].startswith("openai/clip-vit-base-patch32")
        and record["student"]["fingerprint"] in told["student"]
    )
    assert told["data"] == "zh-plus/tiny-imagenet" and told["seed"] == str(record["seed"])
    assert "tecoa: 7 steps at up to 0.01" in told["phases"] and "PGD-2, linf 8/255" in told["attack in training"]
    assert told["held-out slice of the training data"] == "clean accuracy 61.2%, robust accuracy 43.8%"
    assert record["versions"]["torch"] in told["libraries"] and record["versions"]["hpt_hf"] in told["code"]
    assert "Trained against perturbations of the picture within linf 8/255" in text and "A toy" not in text


def test_a_model_of_the_python_interface_has_a_card_too(folder, record):
    """Without a recipe: what the trainer alone says."""
    write_json(
        folder / TRAINED, {k: v for k, v in record.items() if k not in ("recipe", "held_out")} | {"method": "tecoa"}
    )
    text = card(folder)
    assert card_problems(text) == ([], []) and not {"license", "datasets"} & metadata(text).keys()
    assert (
        metadata(text)["base_model"] == RECIPE["model_name_or_path"]
        and metadata(text)["tags"][-1] == "tecoa"
        and "| data | made |" in text
        and "held-out" not in text
    )


def test_two_models_of_the_hub_are_named_with_their_commits(folder, record):
    origin = {"source": "owner/base", "revision": "abc123", "fingerprint": "1" * 16}
    recipe = {"model_name_or_path": "owner/base", "proxy_name_or_path": "owner/proxy", "dataset": "owner/data"}
    write_json(
        folder / TRAINED, record | {"student": origin, "proxy": origin | {"source": "owner/proxy"}, "recipe": recipe}
    )
    text = card(folder)
    assert (
        f"| student | owner/base at abc123, weights {'1' * 16} |" in text
        and "| proxy | owner/proxy at abc123," in text
    )


def test_a_toy_is_called_one(folder, record):
    local = {"source": "lab:student", "revision": None, "fingerprint": "1" * 16}
    write_json(
        folder / TRAINED,
        record | {"student": local, "recipe": {"model_name_or_path": "lab:student", "dataset": "lab:letters"}},
    )
    text = card(folder)
    assert "**A toy**" in text and "lab:letters" in text and not {"base_model", "datasets"} & metadata(text).keys()
    assert card_problems(text) == ([], [])


def test_a_converted_model_s_card_tells_what_was_read(folder):
    told = {
        "source": "their/robust-clip",
        "base": "openai/clip-vit-base-patch32",
        "license": "apache-2.0",
        "form": "the vision tower",
    }
    write_json(
        folder / CONVERTED,
        told | {"read": 200, "from_base": 198, "notes": ["Tokenizer and processor are the base's."]},
    )
    text = card(folder)
    data = metadata(text)
    assert data["base_model"] == "openai/clip-vit-base-patch32" and data["license"] == "apache-2.0"
    assert "base_model_relation" not in data and card_problems(text) == ([], [])
    for part in (
        "their/robust-clip",
        "(the vision tower)",
        "200 tensors",
        "198 from the base",
        "- Tokenizer and processor",
    ):
        assert part in text
    write_json(folder / CONVERTED, {"source": "their/clip", "base": None, "license": None})
    assert "The weights of their/clip, as they are." in card(folder) and "base_model" not in metadata(card(folder))


def test_an_interpolated_model_s_card_tells_the_weight(folder, record):
    write_json(folder / TRAINED, record)
    write_json(
        folder / MIXED,
        {"weight": 0.3, "origin": "owner/base", "robust": "/home/me/x", "rule": "This point was chosen."},
    )
    text = card(folder)
    assert "0.30 × the robust weights + 0.70 × the original's (owner/base). This point was chosen." in text
    assert "61.2" not in text and "43.8" not in text


def test_a_record_of_another_version_is_refused_with_what_it_lacks(folder, record):
    old = {k: v for k, v in record.items() if k not in ("phases", "commit")}
    write_json(folder / TRAINED, old)
    for call in (lambda: card(folder), lambda: write_model_card(folder), lambda: read_record(folder, TRAINED)):
        with pytest.raises(
            ValueError, match=r"train.json lacks commit, phases: another version of hpt_hf wrote it, or it was edited"
        ):
            call()
    assert not (folder / "README.md").exists()
    (folder / TRAINED).unlink()
    assert read_record(folder, TRAINED) == {} and card(folder)


# --- nothing of this machine ------------------------------------------------------------------------------------------------


PLACES = {
    "absolute": "/home/me/secret/clip",
    "absolute, of two parts": "/secret/clip",
    "relative": "./secret/clip",
    "above": "../secret/clip",
    "home": "~/secret/clip",
    "deep": "a/secret/clip",
}


@pytest.mark.parametrize("place", PLACES)
def test_no_path_of_the_machine_that_trained_it_is_taken_for_a_name_on_the_hub(folder, record, fingerprint, place):
    path = PLACES[place]
    local = {"source": path, "revision": None, "fingerprint": "1" * 16}
    recipe = {
        "model_name_or_path": path,
        "proxy_name_or_path": path,
        "dataset": path,
        "data_dir": path,
        "classes_file": path,
    }
    write_json(folder / TRAINED, record | {"student": local, "proxy": local, "dataset": path, "recipe": recipe})
    write_json(folder / MIXED, {"weight": 0.5, "origin": path, "robust": path, "rule": ""})
    source = {"path": path, "split": "test", "limit": None, "data_dir": path}
    put_scores(folder, make_result(fingerprint=fingerprint, model=path, source=source, skipped=(path,)))
    text = card(folder)
    assert card_problems(text) == ([], []) and not {"base_model", "datasets"} & metadata(text).keys()
    assert all(path not in str(r["dataset"]) for r in metadata(text)["model-index"][0]["results"])
    if path.startswith("/"):
        assert path not in text and "secret" not in text and "/home/me" not in text


@pytest.mark.parametrize("base", [None, "/home/me/secret/base"])
def test_no_path_of_the_machine_that_converted_it(folder, base):
    told = {
        "source": "/home/me/secret/x.pt",
        "base": base,
        "license": None,
        "form": "both towers",
        "read": 1,
        "from_base": 0,
        "notes": [],
    }
    write_json(folder / CONVERTED, told)
    text = card(folder)
    assert "secret" not in text and "x.pt" in text and "base_model" not in metadata(text)


def test_a_folder_that_looks_like_a_name_on_the_hub_is_none(folder, record, fingerprint, tmp_path, monkeypatch):
    """Where it was trained, and read anywhere else: a record knows whether its model came from the Hub, it has a commit then."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "clip").mkdir(parents=True)
    local = {"source": "models/clip", "revision": None, "fingerprint": "1" * 16}
    recipe = {"model_name_or_path": "models/clip", "proxy_name_or_path": None, "dataset": "models/clip"}
    write_json(folder / TRAINED, record | {"student": local, "recipe": recipe})
    assert not {"base_model", "datasets"} & metadata(card(folder)).keys()
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    assert "base_model" not in metadata(card(folder))


def test_the_card_of_this_very_machine_names_no_folder_of_it(
    student_path, proxy_path, folder, record, fingerprint, tmp_path
):
    recipe = {"model_name_or_path": student_path, "proxy_name_or_path": proxy_path, "dataset": str(tmp_path)}
    write_json(folder / TRAINED, record | {"recipe": recipe})
    put_scores(
        folder, make_result(fingerprint=fingerprint, model=str(folder), source={"path": str(tmp_path), "limit": None})
    )
    text = card(folder)
    for path in (student_path, proxy_path, str(tmp_path), str(Path.home()) + "/"):
        assert path not in text


# --- for readers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo_id", [None, "alice/my-robust.clip_1"])
def test_the_snippet_of_the_card_names_the_model_as_readers_will(folder, fingerprint, repo_id):
    put_scores(folder, make_result(fingerprint=fingerprint))
    text = card(folder, repo_id=repo_id)
    name = repo_id or "robust"
    assert f'model="{name}"' in text and f"python recipes/verify.py {name}\n" in text
    assert f"# {name.split('/')[-1]}\n" in text and metadata(text)["model-index"][0]["name"] == name.split("/")[-1]


def test_the_snippet_of_the_card_runs(folder, fingerprint, monkeypatch):
    put_scores(folder, make_result(fingerprint=fingerprint))
    monkeypatch.chdir(folder.parent)
    make_pictures(1)[0]["image"].save("picture.png")
    (code,) = re.findall(r"```python\n(.*?)```", card(folder), re.DOTALL)
    lines = code.strip().splitlines()
    scope: dict = {}
    exec("\n".join([*lines[:-1], f"said = {lines[-1]}"]), scope)
    assert {a["label"] for a in scope["said"]} == {"cat", "dog"} and sum(
        a["score"] for a in scope["said"]
    ) == pytest.approx(1)


@pytest.mark.parametrize("records", [(), (TRAINED,), (CONVERTED,), (TRAINED, MIXED), (CONVERTED, MIXED)])
def test_the_text_reads_as_sentences(folder, record, fingerprint, records):
    contents = {
        TRAINED: record,
        CONVERTED: {"source": "their/clip", "base": None, "license": None},
        MIXED: {"weight": 0.5, "origin": "owner/base", "robust": "x", "rule": ""},
    }
    for name in records:
        write_json(folder / name, contents[name])
    text = card(folder)
    words = [
        line for line in text.split("\n---\n", 1)[1].splitlines() if not line.startswith(("|", "    ", " ", "```"))
    ]
    assert not [line for line in words if re.search(r" ,|[^ ]  +[^ ]| \.", line)]
    assert ("with its results" in text) <= bool(own_results(folder))
