"""The page ranks what was measured, keeps apart what is not comparable, and reads at every width; the zoo is sound."""

import json
import shlex
from pathlib import Path

import pytest
from conftest import make_result

from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands import leaderboard
from hpt_hf.commands.convert import ConvertArguments
from hpt_hf.commands.evaluate import EvaluateArguments
from hpt_hf.commands.leaderboard import ZooModel, images_key, main, rows
from hpt_hf.commands.parser import parse
from hpt_hf.utils import write_json, write_text

ZOO = Path(__file__).parents[2] / "zoo"
FILES = sorted(ZOO.glob("*.json"))
ENTRY = {
    "name": "A model",
    "model": "owner/name",
    "method": "FARE",
    "architecture": "ViT-B/32",
    "command": "hpt-hf convert owner/name out --base b && hpt-hf evaluate --model out --suite lab",
}
EVIL = '<img src=x onerror="document.title=1">'
CLEAR, DOUBT = ({"name": name, "raised": name == "more_steps", "detail": ""} for name in ("detached", "more_steps"))


def write_results(folder, results) -> str:
    for result in results:
        write_json(Path(folder) / "results" / result.file_name, result.to_json())
    return str(folder)


def several() -> list:
    """Two models on two sets at two radii; one more under another protocol; one on other images."""
    made = [
        make_result(10 * i + 50, 10 * i, model=f"m/{m}", fingerprint=m * 8, dataset=d, eps=e, sanity_checks=(c,))
        for i, (m, c) in enumerate((("a", CLEAR), ("b", DOUBT)), 1)
        for d in ("cats", "dogs")
        for e in ("1/255", "10/255")
    ]
    made += [make_result(40.0, 15.0, model="m/c", fingerprint="cccccccc", protocol="native")]
    return [*made, make_result(90.0, 80.0, model="m/d", fingerprint="dddddddd", attack="standard")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page of several results and the whole zoo."""
    place = tmp_path_factory.mktemp("leaderboard")
    main([write_results(place / "made", several()), "--zoo", str(ZOO), "--output_dir", str(place)])
    return place


@pytest.fixture
def open_page(browser):
    """A page in the browser; it may write nothing to the console and ask for nothing but itself."""
    opened, said = [], []

    def open_file(place, **how):
        opened.append(page := browser.new_page(**how))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
        page.goto((Path(place) / "index.html").as_uri())
        return page

    yield open_file
    [page.close() for page in opened]
    assert said == []


def column(page, name: str) -> list[str]:
    """The cells of the rows that are visible."""
    heads = page.locator("th").evaluate_all("all => all.map(one => one.dataset.column)")
    cells = page.locator(f"tbody tr:not([hidden]) > :nth-child({heads.index(name) + 1})")
    return [text.split("\n")[0] for text in cells.all_inner_texts()]


def test_a_row_is_a_model_and_a_question_with_the_means_and_the_worst_verdict():
    made = {(r["model"], r["protocol"], r["attack"], r["eps"]): r for r in rows(several(), [])}
    row = made["b", "input", "pgd-20", "linf 10/255"]
    assert (row["clean"], row["robust"], row["n"], row["sets"], row["verdict"]) == (70, 20, 20_000, 2, "suspicious")
    assert len(made) == 6 and row["weights"] == "bbbbbbbb"


def test_the_key_of_the_images_differs_where_rows_are_not_comparable():
    for change, same in (
        ({"images_digest": "0" * 16, "model": "m/other", "eps": "2/255"}, True),  # another size of the same images
        ({"dataset": "dogs"}, False),
        ({"templates": ("a drawing of a {}",)}, False),
        ({"source": {"path": "pictures/cats", "split": "train", "limit": None}}, False),
        ({"per_class": {"cat": (50, 40, 30), "wolf": (50, 20, 10)}}, False),
        ({"per_class": {"cat": (50, 40, 30), "dog": (51, 20, 10)}}, False),
    ):
        assert (images_key([make_result()]) == images_key([make_result(**change)])) == same, change


def test_seed_and_target_and_weights_are_rows_of_their_own_and_a_copy_is_not():
    changes = ({}, {}, {"seed": 1}, {"target": "cat"}, {"fingerprint": "f" * 16})
    made = rows([make_result(**change) for change in changes], [])
    assert sorted(r["attack"] for r in made) == ["pgd-20", "pgd-20", "pgd-20, for 'cat'", "pgd-20, seed 1"]
    assert len({r["model"] for r in made}) == 2, "equal names are told apart by their weights"


def test_a_click_on_a_head_sorts_and_a_second_one_turns_it_round(folder, open_page):
    page = open_page(folder)
    head = page.locator("th[data-column=robust]")
    for state, down in (("descending", True), ("ascending", False)):
        head.get_by_role("button").click()
        figures = [float(cell.split()[0]) for cell in column(page, "robust")]
        assert figures == sorted(figures, reverse=down) and head.get_attribute("aria-sort") == state
    page.locator("th[data-column=eps]").get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert list(dict.fromkeys(column(page, "eps"))) == ["linf 1/255", "linf 6/255", "linf 10/255"]
    assert head.get_attribute("aria-sort") is None, "only one column is the order"


def test_a_filter_hides_the_other_rows_and_all_brings_them_back(folder, open_page):
    page = open_page(folder)
    images = page.locator("[data-filter=images] option").all_inner_texts()
    assert page.inner_text("#said").startswith("9 of 9 rows, of 5 questions or image sets that are not comparable")
    lab = {"lab:student", "lab:proxy", "lab:convolution"}
    for name, value, models, said in (
        ("eps", "linf 10/255", {"a", "b"}, "2 of 9 rows"),
        ("attack", "standard", {"d"} | lab, "4 of 9 rows, of 2 questions"),
        ("images", next(option for option in images if option.startswith("15 × 20")), lab, "3 of 9 rows"),
    ):
        page.select_option(f"[data-filter={name}]", value)
        assert set(column(page, "model")) == models and set(column(page, name)) == {value}
        assert page.inner_text("#said").startswith(said) and (" of 2" in said or page.inner_text("#said") == said)
        page.select_option(f"[data-filter={name}]", "")
        assert len(column(page, "model")) == 9
    cards = page.locator(".card:visible")
    waiting = [file for file in FILES if "results" not in json.loads(file.read_text())]
    assert cards.count() == len(waiting) > 15
    page.fill("#text", "TECOA")
    assert column(page, "model") == [] and 0 < cards.count() < len(waiting)
    page.fill("#text", "convnext")
    assert column(page, "model") == ["lab:convolution"], "what the zoo says of a measured model is found, too"


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_nothing_is_cut_off_at_any_width(folder, open_page, width, scheme):
    page = open_page(folder, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    out = "all => all.filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.textContent)"
    assert page.locator("td, .card, pre").evaluate_all(out) == []
    wide = page.evaluate("(([box]) => box.scrollWidth > box.clientWidth)(document.getElementsByClassName('scroll'))")
    assert page.locator(".hint").is_visible() == wide == (width == 390), "a table that is wider says so"
    ground, ink = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    assert (sum(map(int, ground[4:-1].split(","))) < sum(map(int, ink[4:-1].split(",")))) == (scheme == "dark")


def test_names_are_text_and_never_html(tmp_path, open_page):
    evil = make_result(model=EVIL, fingerprint=EVIL, attack=EVIL, eps="1/255", target=EVIL, images_digest=EVIL)
    entry = ENTRY | {"name": EVIL, "method": EVIL, "command": f"{ENTRY['command']} {EVIL}"}
    write_json(tmp_path / "zoo" / "a.json", entry)
    main([write_results(tmp_path / "made", [evil]), "--zoo", str(tmp_path / "zoo"), "--output_dir", str(tmp_path)])
    page = open_page(tmp_path)
    assert page.locator("img").count() == 0 and page.title() != "1"
    assert EVIL in page.inner_text("tbody td") and page.locator(".card b").inner_text() == EVIL


def test_the_page_is_the_same_each_time(folder, tmp_path):
    main([str(folder / "made"), "--zoo", str(ZOO), "--output_dir", str(tmp_path)])
    assert (tmp_path / "index.html").read_bytes() == (folder / "index.html").read_bytes()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_of_the_zoo_can_be_read_and_its_command_parses(file):
    model = ZooModel.read(file)
    *first, last = (shlex.split(part) for part in model.command.split(" && "))
    (asked,) = parse((EvaluateArguments,), last[2:])
    assert last[:2] == ["hpt-hf", "evaluate"] and asked.limit and asked.suite and asked.model == [model.measured_as]
    for words in first:
        if words[:2] == ["hpt-hf", "convert"]:
            (given,) = parse((ConvertArguments,), words[2:], positional=("model", "output_dir"))
            assert [given.output_dir] == asked.model and given.base
        else:
            assert words[:3] == ["hf", "download", model.model]
    ThreatModel(*(model.trained_for or "linf 1/255").split())


def test_what_the_zoo_calls_measured_was_measured_by_its_command():
    models, results = leaderboard.read_zoo(ZOO)
    measured = {m.measured_as: parse((EvaluateArguments,), shlex.split(m.command)[2:])[0] for m in models if m.results}
    assert {r.model for r in results} == set(measured) == {"lab:student", "lab:proxy", "lab:convolution"}
    for r in results:
        asked = measured[r.model]
        assert ([r.attack], [r.eps], r.norm, r.n) == (asked.attack, asked.eps, asked.norm, asked.limit)
    assert len({images_key([r for r in results if r.model == name]) for name in measured}) == 1
    assert sum(f.stat().st_size for f in ZOO.glob("results/*/results/*.json")) < 150_000


BAD = {
    r"unknown field: got 'papr', expected one of name, .*Fix: delete it; did you mean paper\?": {"papr": "x"},
    r"name: got no such field, expected a name. Fix: add it\.": {"name": ...},
    "name: got 3, expected a name. Fix: write it so": {"name": 3},
    "name: got '', expected a name": {"name": ""},
    "model: got 'a/b/c', expected a Hub id": {"model": "a/b/c"},
    "model: got 'javascript:x'": {"model": "javascript:x"},
    "paper: got 'arXiv 1', expected an arXiv id": {"paper": "arXiv 1"},
    "trained_for: got '4/255', expected norm and eps": {"trained_for": "4/255"},
    "command: got 'hpt-hf evaluate --suite lab', expected `.*`": {"command": "hpt-hf evaluate --suite lab"},
    "results: got '../../x', expected a folder of the zoo": {"results": "../../x"},
    "got .*results/none, expected a folder with results/": {"results": "results/none"},
    "bad.json is damaged": "{",
}


@pytest.mark.parametrize("says", BAD)
def test_a_bad_file_of_the_zoo_is_one_clear_line_and_nothing_is_written(tmp_path, says):
    bad = BAD[says]
    if isinstance(bad, dict):
        bad = json.dumps({name: value for name, value in (ENTRY | bad).items() if value is not ...})
    write_text(tmp_path / "zoo" / "bad.json", bad)
    with pytest.raises(SystemExit, match=f"^hpt-hf leaderboard: .*{says}") as error:
        main(["--zoo", str(tmp_path / "zoo"), "--output_dir", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
