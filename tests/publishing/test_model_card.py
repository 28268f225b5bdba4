"""A model card holds every figure of its results and no other, and tells no path of this machine."""

import ast
import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import make_images, make_result, make_trainer, single_schedule
from huggingface_hub import ModelCard
from loopback_hub import card_data

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

RECIPE = {"model": "openai/clip-vit-base-patch32", "dataset": "zh-plus/tiny-imagenet", "license": "mit"}
DOUBT = {"name": "gradient_masking", "raised": True, "value": 3, "limit": 0, "found": "more", "look_at": ""}
READ = {"source": "their/clip", "base": None, "license": None}
DIAL = {"weight": 0.3, "origin": "owner/base", "robust": "/home/me/x", "rule": "This point was chosen."}


@pytest.fixture(scope="module")
def sealed(student_path, tmp_path_factory) -> Path:
    return export(ZeroShotClassifier.from_pretrained(student_path), tmp_path_factory.mktemp("card") / "robust")


@pytest.fixture
def folder(sealed, tmp_path) -> Path:
    """An exported folder without records and results, its card still to be written."""
    return shutil.copytree(sealed, tmp_path / "robust", ignore=shutil.ignore_patterns("README.md"))


@pytest.fixture(scope="module")
def made(sealed):
    return functools.partial(make_result, fingerprint=json.loads((sealed / SEAL).read_text())["fingerprint"])


@pytest.fixture(scope="module")
def record(student_path, tmp_path_factory) -> dict:
    """What a trainer says of itself, and what a recipe adds."""
    student = ZeroShotClassifier.from_pretrained(student_path).set_classes(make_images().classes)
    trainer = make_trainer(tmp_path_factory.mktemp("run"), student, single_schedule("tecoa", steps=7))
    return json.loads(json.dumps(trainer.record())) | {
        "method": "hpt_gpd",
        "student": {"source": RECIPE["model"], "revision": "3d74acf9", "fingerprint": "0" * 16},
        "recipe": dict(RECIPE),
        "held_out": {"eval_clean_accuracy": 61.25, "eval_robust_accuracy": 43.75},
    }


def put_results(folder: Path, *results) -> list:
    for number, result in enumerate(results):
        write_json(folder / "results" / f"{number:03d}.json", result.to_json())
    return own_results(folder)


def card_of(folder: Path, records: dict) -> str:
    """The card with these records, whose text reads as sentences do."""
    for name, content in records.items():
        write_json(folder / name, content)
    text = card(folder)
    words = [line for line in text.split("\n---\n", 1)[1].splitlines() if not line.startswith(("|", " ", "```"))]
    assert not [line for line in words if re.search(r" ,|[^ ]  +[^ ]| \.", line)] and "\n\n\n" not in text
    return text


def claims(text: str) -> list[tuple]:
    """(data set, metric, value, arguments) of every figure in `model-index`."""
    results = [r for model in card_data(text).get("model-index", []) for r in model["results"]]
    return [(r["dataset"]["name"], m["name"], m["value"], m["args"]) for r in results for m in r["metrics"]]


ANSWERS = [  # data set, attack, eps, norm, protocol
    ("cats", "pgd-20", "1/255", "linf", "input"),
    ("dogs", "pgd-20", "1/255", "linf", "input"),
    ("cats", "standard", "4/255", "linf", "native"),
    ("birds", "apgd-ce-100", "0.5", "l2", "input"),
]


def test_every_figure_of_the_card_is_its_results(folder, made):
    answers = []
    for n, (dataset, attack, eps, norm, protocol) in enumerate(ANSWERS):
        counts = {"cat": (50 + n, 40 - n, 30), "dog": (50, 20, n)}
        asked = {"attack": attack, "eps": eps, "norm": norm, "protocol": protocol}
        answers.append(made(per_class=counts, dataset=dataset, **asked, **source(f"owner/{dataset}")))
    results = put_results(folder, *answers)
    text = card(folder)
    found = claims(text)
    assert len(found) == 2 * len(results) == check_figures(text, results) == 8
    for r in results:
        mine = {c[1]: c for c in found if c[0] == r.dataset and c[3]["n"] == r.n and c[3]["protocol"] == r.protocol}
        _, _, clean, about = mine["clean accuracy, %"]
        _, _, robust, told = mine[f"robust accuracy, % ({r.attack}, {r.norm} {r.eps})"]
        assert (clean, robust) == (r.clean, r.robust) and "attack" not in about, "a clean figure is of no attack"
        assert about["interval_95"] == list(r.clean_interval) and told["interval_95"] == list(r.interval)
        asked = {"attack": r.attack, "norm": r.norm, "eps": r.eps, "verdict": "unchecked", "doubts": [], "seed": 0}
        assert asked.items() <= told.items() and told["after_each_attack"]
        assert f"### {r.question}\n" in text and f" {r.robust:.1f} | {r.interval[0]:.1f}–" in text
    index = card_data(text)["model-index"][0]
    assert index["name"] == "robust"
    assert {r["dataset"]["type"] for r in index["results"]} == {"owner/cats", "owner/dogs", "owner/birds"}


def test_of_other_weights_only_those_it_was_trained_from_stand_beside_it(folder, made, record, capsys):
    write_json(folder / TRAINED, record)
    own, asked_more = made(), make_result(fingerprint="0" * 16, eps="4/255")
    before = make_result(fingerprint="0" * 16, per_class={"cat": (50, 45, 3), "dog": (50, 44, 1)})
    others = [make_result(fingerprint="f" * 16, dataset=n) for n in ("theirs", "others")]
    assert put_results(folder, own, before, asked_more, *others) == [own]
    assert "left out (others, theirs)" in capsys.readouterr().err
    text = card(folder)
    (vanilla,) = [line for line in text.splitlines() if line.startswith("| cats ") and "vanilla" in line]
    assert "89.0" in vanilla and len(claims(text)) == check_figures(text, [own]) == 2
    assert "4/255" not in text.split("## Results")[1][:400] and "theirs" not in text


def source(path="pictures/cats", split="test", **more):
    return {"source": {"path": path, "split": split, "limit": None, **more}}


# What another result of the same weights asks otherwise; the clean figure of the same images stands once.
OF_THE_SAME_IMAGES = ({"attack": "cw-20"}, {"eps": "4/255"})
OF_OTHERS = (
    {"dataset": "Cats"},  # not taken for one although their slugs are alike
    {"protocol": "native"},
    {"seed": 1},
    {"per_class": {"cat": (5, 4, 3), "dog": (5, 2, 1)}},
    source(split="train"),
    source("owner/cats", revision="abc"),
)
SHARED = [({}, 2), *((c, 3) for c in OF_THE_SAME_IMAGES), *((c, 4) for c in OF_OTHERS)]


@pytest.mark.parametrize("changes, figures", SHARED)
def test_a_figure_that_two_results_share_stands_once_and_another_twice(folder, made, changes, figures):
    results = put_results(folder, made(), made(**changes))
    text = card(folder)
    assert len(results) == 2 and len(claims(text)) == figures == check_figures(text, results)


def test_a_card_without_results_claims_nothing(folder):
    text = card_of(folder, {})
    data = card_data(text)
    assert not {"model-index", "metrics", "base_model", "license", "datasets"} & data.keys()
    assert "nothing is claimed" in text and "No record came with the weights." in text
    assert not re.search(r"\d+(\.\d+)?\s?%", text) and check_figures(text, []) == 0
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "zero-shot-image-classification"


def test_doubts_and_unreadable_images_stand_in_the_card(folder, made):
    assert "Doubts" not in card(folder)
    clear = {"sanity_checks": ({**DOUBT, "raised": False},), "skipped": ("row 3 of /home/me/x", "row 9")}
    put_results(folder, made(sanity_checks=(DOUBT,)), made(dataset="dogs", **source("pictures/dogs"), **clear))
    text = card(folder)
    assert "- `gradient_masking`: cats (pgd-20, 1/255)" in text and "1 suspicious" in text
    assert "2 unreadable images were left out." in text and "/home/me" not in text
    verdicts = {c[0]: (c[3]["verdict"], c[3]["doubts"]) for c in claims(text) if "robust" in c[1]}
    assert verdicts == {"cats": ("suspicious", ["gradient_masking"]), "dogs": ("clear", [])}


# What YAML, Markdown, HTML, Jinja, Python and our own mark would each take for theirs.
ODD_NAMES = (
    "a|b || c", "she said \"cat\" and 'dog'", "naïve – Ωμέγα 猫 🐈", "#hash: colon, - dash", "true", "---", "trailing ",
    "{brace} [list] `tick` *star*", "{{ jinja }} {% raw %}", "<!-- written by hpt_hf, 0123456789ab -->", "<b>bold</b>",
    "back\\slash", "word " * 60,
)  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_with_any_characters_comes_back(folder, made, name):
    results = put_results(folder, made(dataset=name, per_class={name: (50, 40, 30), "o\"'": (50, 20, 10)}))
    text = write_model_card(folder).read_text(encoding="utf-8")
    assert check_figures(text, results) == 2 and card(folder) == text, "what was written is known as ours again"
    assert {c[0] for c in claims(text)} == {name} == {r.dataset_name for r in ModelCard(text).data.eval_results}
    cell = name.strip().replace("|", "\\|").replace("<", "&lt;")
    assert f"\n| {cell} " in text, "its row is whole, and no HTML"
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    calls = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.keyword) and n.arg == "candidate_labels"]
    assert ast.literal_eval(calls[0].value) == [name, "o\"'"]


def edited(change):
    """The card with its metadata changed and written as YAML again, as a person with a script would."""

    def edit(text: str) -> str:
        data = card_data(text)
        change(data)
        return f"---\n{yaml.safe_dump(data, allow_unicode=True, sort_keys=False)}---\n" + text.split("\n---\n", 1)[1]

    return edit


def metric(args=(), **changes):
    def change(result):
        result["metrics"][-1]["args"].update(args)
        result["metrics"][-1].update(changes)

    return first_result(change), "disagree about 2 figures"


def first_result(change):
    return edited(lambda data: change(data["model-index"][0]["results"][0]))


NO_CARD = "no card that the Hub can read"
MORE = {"type": "accuracy", "value": 99.0, "name": "x"}
LIES = {
    "a value a little higher": metric(value=40.01),
    "a larger eps": metric({"eps": "8/255"}),
    "a removed result": (first_result(lambda r: r["metrics"].pop()), "disagree about 1 figures: the results alone"),
    "all removed": (edited(lambda d: d.pop("model-index")), "disagree about 2 figures"),
    "an added result": (first_result(lambda r: r["metrics"].append(MORE)), "1 figures: the card alone has .*99.0"),
    "another data set": (first_result(lambda r: r["dataset"].update(name="imagenet")), "disagree about 4 figures"),
    "broken YAML": (lambda text: text.replace("library_name: ", "library_name: [: {", 1), NO_CARD),
    "an index of nonsense": (edited(lambda d: d.update({"model-index": [{"name": "x"}]})), NO_CARD),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_card_that_says_other_than_the_results_is_refused(folder, made, lie):
    results = put_results(folder, made())
    text = card(folder)
    change, message = LIES[lie]
    assert check_figures(edited(lambda d: None)(text), results) == 2, "rewriting alone is no change"
    with pytest.raises(ValueError, match=message):
        check_figures(change(text), results)


# --- edited by hand


def test_a_card_that_was_not_edited_is_written_anew(folder, made):
    first = write_model_card(folder).read_text()
    put_results(folder, made())
    write_json(folder / CONVERTED, READ)
    second = write_model_card(folder).read_text()
    assert len(claims(second)) == 2 and "their/clip" in second and card(folder) == second != first
    shutil.rmtree(folder / "results")
    (folder / CONVERTED).unlink()
    assert write_model_card(folder).read_text() == first


def test_any_edit_is_kept(folder, made, capsys):
    """At every place, be it in the mark or below it. Only blank lines before the mark are nobody's words."""
    text = write_model_card(folder).read_text()
    end = len(text[: text.rindex("<!-- written by")].rstrip())
    put_results(folder, made())
    assert card(folder) != text
    edits = [text[:place] + "§" + text[place + 1 :] for place in {*range(0, end, 37), *range(end + 3, len(text))}]
    for edit in (*edits, text + "\n", text + "more\n", "", "my own words\n", "---\nlicense: mit\n---\n# Mine\n"):
        (folder / "README.md").write_text(edit, encoding="utf-8")
        assert card(folder) == edit == write_model_card(folder).read_text()
        assert "README.md was edited by hand: kept" in capsys.readouterr().err


# --- how it was made


def test_a_trained_models_card_tells_its_recipe(folder, record, made):
    put_results(folder, made())
    text = card_of(folder, {TRAINED: record})
    data = card_data(text)
    assert data["base_model"] == RECIPE["model"] and data["base_model_relation"] == "finetune"
    assert data["datasets"] == [RECIPE["dataset"]] and data["license"] == "mit"
    assert data["tags"] == ["clip", "adversarial-robustness", "hpt-gpd"]
    student = f"| student | {RECIPE['model']} at 3d74acf9, weights {'0' * 16} |"
    for row in (student, "| method | hpt_gpd |", "| images | 40 |", "| batch | 8 |", "| proxy | none |"):
        assert f"\n{row}\n" in text
    for said in (f"| data | {RECIPE['dataset']} |", "tecoa: 7 steps at up to 0.01", "PGD-2, linf 8/255"):
        assert said in text
    assert "clean accuracy 61.2%, robust accuracy 43.8%" in text and f"torch {record['versions']['torch']}" in text
    assert "Trained against perturbations of the image within linf 8/255" in text and "A toy" not in text
    of_python = {k: v for k, v in record.items() if k not in ("recipe", "held_out")}
    text = card_of(folder, {TRAINED: of_python})
    assert not {"license", "datasets"} & card_data(text).keys() and card_data(text)["base_model"] == RECIPE["model"]
    assert "| data | made |" in text and "held-out" not in text


def test_the_record_of_the_version_before_is_read_in_todays_names(folder, record):
    old = {"model_name_or_path": "lab:student", "proxy_name_or_path": "lab:proxy", "dataset_split": "train"}
    before = {"pictures" if k == "images" else k: v for k, v in record.items()}
    write_json(folder / TRAINED, before | {"recipe": old | {"eps": "1/255"}})
    assert read_record(folder, TRAINED)["images"] == 40
    new = {"model": "lab:student", "proxy": "lab:proxy", "split": "train", "eps": "1/255"}
    assert read_record(folder, TRAINED)["recipe"] == new and "**A toy**" in card(folder)


def test_a_converted_models_card_tells_what_was_read(folder):
    told = READ | {"base": RECIPE["model"], "license": "apache-2.0", "form": "the vision tower"}
    told |= {"read": 200, "from_base": 198, "notes": ["Tokenizer is the base's."]}
    text = card_of(folder, {CONVERTED: told})
    data = card_data(text)
    assert data["base_model"] == RECIPE["model"] and data["license"] == "apache-2.0"
    assert "base_model_relation" not in data and "Read from their/clip (the vision tower)" in text
    assert all(part in text for part in ("200 tensors", "198 from the base", "\n- Tokenizer is"))
    text = card_of(folder, {CONVERTED: READ})
    assert "The weights of their/clip, as they are." in text and "base_model" not in card_data(text)
    card_of(folder, {MIXED: DIAL})


def test_an_interpolated_models_card_tells_the_weight(folder, record):
    text = card_of(folder, {TRAINED: record, MIXED: DIAL})
    assert "0.30 × the robust weights + 0.70 × the original's (owner/base). This point was chosen." in text
    assert "61.2" not in text and "The robust weights were trained so:" in text and "/home/me" not in text
    assert "0.123456 × the robust weights + 0.876544 ×" in card_of(folder, {MIXED: DIAL | {"weight": 0.123456}})


@pytest.mark.parametrize("path", ["/home/me/secret/clip", "./secret/clip", "~/secret/clip", "a/b/clip"])
def test_no_path_of_the_machine_is_taken_for_a_name_on_the_hub(folder, record, made, path):
    local = {"source": path, "revision": None, "fingerprint": "1" * 16}
    recipe = dict.fromkeys(("model", "proxy", "dataset", "data_dir", "classes_file"), path)
    write_json(folder / TRAINED, record | {"student": local, "proxy": local, "dataset": path, "recipe": recipe})
    write_json(folder / MIXED, DIAL | {"origin": path, "robust": path})
    about = {"form": "", "read": 1, "from_base": 0, "notes": []}
    write_json(folder / CONVERTED, READ | about | {"source": path, "base": path})
    put_results(folder, made(model=path, skipped=(path,), **source(path, data_dir=path)))
    text = card(folder)
    assert not {"base_model", "datasets"} & card_data(text).keys()
    assert all(path not in str(r["dataset"]) for r in card_data(text)["model-index"][0]["results"])
    assert not path.startswith("/") or "secret" not in text


def test_a_folder_that_looks_like_a_name_on_the_hub_is_none(folder, record, tmp_path, monkeypatch):
    """A record knows whether its model came from the Hub: it has a commit then."""
    student, recipe = record["student"] | {"revision": None}, {"model": "models/clip", "dataset": "models/clip"}
    write_json(folder / TRAINED, record | {"student": student, "recipe": recipe})
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in card_data(card(folder)) and card_data(card(folder))["datasets"] == ["models/clip"]
    (tmp_path / "models" / "clip").mkdir(parents=True)
    assert not {"base_model", "datasets"} & card_data(card(folder)).keys()


def test_the_card_names_the_model_as_readers_will(folder, made):
    put_results(folder, made())
    text = card(folder, repo_id="alice/my-robust.clip_1", revision="w0.50")
    assert 'model="alice/my-robust.clip_1", revision="w0.50")' in text and "# my-robust.clip_1\n" in text
    assert "    hpt-hf verify alice/my-robust.clip_1 --model_revision w0.50\n" in text
    assert card_data(text)["model-index"][0]["name"] == "my-robust.clip_1"
    assert "    hpt-hf verify robust\n" in card(folder)
