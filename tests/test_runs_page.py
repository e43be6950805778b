"""One page over several runs: what is compared, shared and flagged, and the page in a browser."""

import base64
import gzip
import json
import re
from typing import Any

import pytest

from proxytune.errors import UserError
from proxytune.files import read_json, write_json
from proxytune.results import runs_page
from proxytune.results.curves import axis_of, curves
from proxytune.results.runs import differing, groups, read_run
from proxytune.results.runs_page import write_runs, write_sweep
from scripts.make_report import main as make_report
from tests.browsing import click, picture, resize, wait
from tests.runs_folder import make_run, make_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    make_sweep(folder)
    make_run(folder / "short", 1.0, examples=8, limit=8)
    return folder


@pytest.fixture(scope="module")
def page(sweep):
    return write_sweep(sweep)


def unpacked(page, name):
    found = re.search(rf'id="{name}">([^<]*)<', page.read_text())
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def shown(page):
    """The page without its packed data, its style and its script."""
    return re.sub(r"<(script|style).*?</\1>", "", page.read_text(), flags=re.S)


def group_of(*folders, task="gsm8k"):
    (group, *others) = groups([read_run(each, each.name) for each in folders], task)
    assert not others
    return group


def test_the_page_takes_nothing_from_elsewhere(page):
    assert not re.search(r"(src|href)=[\"'](?!data:|#|\./)", shown(page))
    text = re.sub(r'<script type="text/plain".*?</script>', "", page.read_text(), flags=re.S)
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest", text)


def test_the_same_runs_give_the_same_page(sweep, page):
    before = page.read_bytes()
    assert write_sweep(sweep).read_bytes() == before


def test_what_all_points_share_is_shown_and_stored_once(tmp_path):
    page = write_runs(make_sweep(tmp_path), tmp_path / "runs.html")
    text = shown(page)
    assert text.count("20.0<span") == 1 and text.count("80.0<span") == 1  # base, tuned
    assert ">all runs<" in text
    (task,) = unpacked(page, "tasks-data")
    blocks = {(cell["system"], cell["block"]) for cell in task["cells"]}
    assert sorted(system for system, _ in blocks) == ["base", "expert", *["proxy"] * 3, "tuned"]
    assert len(task["cells"]) == 12


def test_a_sweep_is_a_curve_and_the_others_lie_flat(tmp_path):
    group = group_of(*make_sweep(tmp_path, alphas=(1.5, 0.5, 1.0)))
    assert axis_of(group) == "alpha"
    lines = {line.label: line for line in curves(group, "alpha")}
    assert lines["proxy"].x == [0.5, 1.0, 1.5]
    assert lines["proxy"].y == [30.0, 60.0, 90.0]
    assert lines["base"].x == [] and lines["base"].y == [20.0]
    low, high = lines["proxy"].low[1], lines["proxy"].high[1]
    assert 30 < low < 60 < high < 90


def test_seeds_are_an_axis_or_lines_of_their_own(tmp_path):
    seeds = [make_run(tmp_path / f"s{seed}", 1.0, seed=seed) for seed in (0, 1, 2)]
    assert axis_of(group_of(*seeds)) == "decoding.seed"
    both = [
        make_run(tmp_path / f"{alpha}-{seed}", alpha, seed=seed)
        for alpha in (0.5, 1.0)
        for seed in (0, 1)
    ]
    group = group_of(*both)
    assert axis_of(group) == "alpha"
    proxies = [line for line in curves(group, "alpha") if line.label.startswith("proxy")]
    assert [line.label for line in proxies] == [f"proxy, decoding.seed={s}" for s in (0, 1)]
    assert all(line.x == [0.5, 1.0] for line in proxies)


def test_two_numbers_of_one_setting_are_never_in_one_curve(tmp_path):
    runs = [*make_sweep(tmp_path), make_run(tmp_path / "again", 1.0, right=3)]
    lines = [line for line in curves(group_of(*runs), "alpha") if line.label.startswith("proxy")]
    assert [(line.label, line.x) for line in lines] == [
        ("proxy", [0.5, 1.0, 1.5]),
        ("proxy (2)", [1.0]),
    ]
    assert lines[0].y[1] == 60.0 and lines[1].y == [15.0]


ODD = {
    "examples: 8 in odd; 20 in the others": {"examples": 8, "limit": 8},
    "limit: 20 in odd; none in the others": {"limit": 20},
    "dataset (SHA-256): ": {"dataset": "0ther"},
    "task.gsm8k.shots: 5 in odd; – in the others": {"settings": {"shots": 5}},
    "base: scored: 17 of 20 examples in odd": {"unfinished": 3},
}


@pytest.mark.thinned(1)
@pytest.mark.parametrize("flag", ODD)
def test_runs_that_were_asked_otherwise_are_flagged_and_stand_apart(flag, tmp_path):
    runs = make_sweep(tmp_path, alphas=(0.5, 1.0))
    odd = make_run(tmp_path / "odd", 2.0, right=20, **ODD[flag])
    text = shown(write_runs([*runs, odd], tmp_path / "runs.html"))
    assert "Not all of these runs are comparable" in text
    assert f"gsm8k, {flag}" in text
    assert "gsm8k, part 1 of 2" in text and "gsm8k, part 2 of 2" in text
    apart = groups([read_run(each, each.name) for each in (*runs, odd)], "gsm8k")
    assert [[run.name for run in group.runs] for group in apart] == [
        ["alpha=0.5", "alpha=1.0"],
        ["odd"],
    ]


def test_a_metric_that_one_run_alone_has_is_a_dash_in_the_others(tmp_path):
    group = group_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", alpha=0.5))
    touched = {**group.runs[1].rows["gsm8k"][0], "metric": "touched", "proxy": 12.5}
    group.runs[1].rows["gsm8k"].append(touched)
    table: Any = runs_page._table(group, "touched")
    values = {row["name"]: row["cells"][-1]["value"] for row in table["rows"] if row["cells"][-1]}
    assert values["a"] == "–" and "b" in values


def test_another_judge_is_flagged(tmp_path):
    one, two = make_sweep(tmp_path, alphas=(0.5, 1.0))
    for folder, model in ((one, "a"), (two, "b")):
        for system in ("base", "proxy"):
            write_json(folder / "gsm8k" / system / "judges.json", {"judge": model})
    assert "gsm8k, judges: " in shown(write_runs([one, two], tmp_path / "runs.html"))


def test_where_the_files_lie_and_who_knows_the_hash_is_no_difference():
    flat = [{"triple.base.id": "a", "triple.base.weights": "x", "triple.base.revision": None}]
    flat += [{"triple.base.id": "b", "triple.base.weights": "y", "triple.base.revision": None}]
    assert differing(flat) == ["triple.base.id"]  # another model has other weights
    assert differing([flat[0], {"triple.base.id": "a", "triple.base.revision": None}]) == []
    named = [flat[0] | {"triple.base.commit": "c", "triple.base.revision": r} for r in ("v1", "v2")]
    assert differing(named) == []  # two names of one commit
    assert differing([{"trace": True}, {"trace": 1}]) == ["trace"]


def test_a_cell_without_its_configuration_is_like_no_other(tmp_path):
    runs = make_sweep(tmp_path, alphas=(1.0, 1.5))
    (runs[0] / "gsm8k" / "base" / "cell.json").unlink()
    text = shown(write_runs(runs, tmp_path / "runs.html"))
    assert "unknown (alpha=1.0 has no cell.json)" in text
    assert text.count("20.0<span") == 2


def test_models_are_named_by_their_role_in_the_triple(tmp_path):
    runs = make_sweep(tmp_path, alphas=(1.0, 1.5))
    path = runs[0] / "gsm8k" / "tuned" / "cell.json"
    cell = read_json(path)
    cell["members"]["base"]["id"] = "other"
    write_json(path, cell)
    assert '<th scope="col">triple.tuned.id</th>' in shown(write_runs(runs, tmp_path / "r.html"))


HOSTILE = "<img src=x>$\\frac{"


def test_texts_of_foreign_folders_stay_texts(tmp_path):
    runs = make_sweep(tmp_path, alphas=(0.5, 1.0), texts=HOSTILE + "SYSTEM")
    for number, folder in enumerate(runs):
        cell = folder / "gsm8k" / "proxy" / "cell.json"
        write_json(cell, read_json(cell) | {HOSTILE: number, "formula": {"_target_": HOSTILE}})
        for path in (folder / "table.csv", folder / "table.md"):
            path.write_text(path.read_text().replace("accuracy", f'"{HOSTILE}"'))
    named = [folder.rename(folder.with_name(f"{HOSTILE}{i}")) for i, folder in enumerate(runs)]
    page = write_runs(named, tmp_path / "runs.html")
    assert "<img" not in shown(page) and "&lt;img src=x&gt;" in shown(page)
    assert "<img" not in re.sub(r"<style.*?</style>", "", page.read_text(), flags=re.S)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("task", ["../other", "/etc", "~", "a/b"])
def test_a_task_s_name_leads_nowhere_else(task, tmp_path):
    runs = make_sweep(tmp_path, alphas=(0.5, 1.0))
    table = runs[0] / "table.csv"
    table.write_text(table.read_text().replace("gsm8k,", f"{task},"))
    with pytest.raises(UserError, match="plain name"):
        write_runs(runs, tmp_path / "runs.html")


DAMAGED = {
    "run.json": ["", "[]", "{}"],
    "table.csv": ["", "a,b\n1,2\n"],
    "gsm8k/examples.jsonl": ['{"id": 5}\n', "\xff\n"],
    "gsm8k/proxy/cell.json": ["[]", '{"members": [], "system": "proxy"}'],
    "gsm8k/proxy/scores.jsonl": ['{"example_id": 1}\n'],
    "gsm8k/proxy/completions.jsonl": ['{"text": null}\n'],
    "gsm8k/proxy/judges.json": ["{"],
}


@pytest.mark.thinned(1)
@pytest.mark.parametrize(("name", "text"), [(n, t) for n, each in DAMAGED.items() for t in each])
def test_a_damaged_file_is_named(name, text, tmp_path):
    runs = make_sweep(tmp_path, alphas=(0.5, 1.0))
    (runs[1] / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=name.rpartition("/")[2]):
        write_runs(runs, tmp_path / "runs.html")


def test_links_are_not_followed(tmp_path):
    runs = make_sweep(tmp_path / "runs", alphas=(0.5, 1.0))
    path = runs[0] / "gsm8k" / "proxy" / "scores.jsonl"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="symbolic link"):
        write_runs(runs, tmp_path / "runs.html")


def test_numbers_that_are_none_are_named(tmp_path):
    runs = make_sweep(tmp_path, alphas=(0.5, 1.0))
    table = runs[0] / "table.csv"
    table.write_text(re.sub(r"(?<=,)30(?=,)", "thirty", table.read_text()))
    with pytest.raises(UserError, match=r"table.csv: the column \w+ is damaged"):
        write_runs(runs, tmp_path / "runs.html")


# -- the command --------------------


def test_the_command_writes_one_page_over_several_runs(capsys, tmp_path):
    runs = [str(run) for run in make_sweep(tmp_path / "sweep", alphas=(0.5, 1.5))]
    make_report(runs)
    assert capsys.readouterr().out.strip() == str(tmp_path / "sweep" / "runs.html")
    make_report([*runs, "--output", str(tmp_path / "mine.html")])
    assert "2 runs in" in (tmp_path / "mine.html").read_text()
    with pytest.raises(UserError, match="given twice"):
        make_report([runs[0], runs[0]])
    with pytest.raises(UserError, match="at least two"):
        make_report([runs[0], "--output", "x.html"])
    with pytest.raises(UserError, match="score the run first"):
        make_report([runs[0], str(tmp_path / "sweep" / "alpha=0.5" / "gsm8k")])


def test_one_folder_of_a_sweep_gets_the_page_over_its_points(tmp_path, capsys):
    folder = tmp_path / "runs"
    make_sweep(folder)
    make_report([str(folder)])
    assert capsys.readouterr().out.split() == [str(folder / "runs.html")]
    make_run(folder, 2.0)  # `python run.py` itself writes there
    make_report([str(folder)])
    assert capsys.readouterr().out.split() == [
        str(folder / n) for n in ("report.html", "runs.html")
    ]
    assert "4 runs in" in (folder / "runs.html").read_text()
    assert '<a href="./report.html">runs</a>' in (folder / "runs.html").read_text()


# -- in a real browser --------------------


def show(browser, page, width=1280, height=900):
    resize(browser, width, height)
    browser.get(page.as_uri())
    wait(browser, "return document.documentElement.dataset.ready === 'yes'")


def count(browser):
    return browser.execute_script("return document.getElementById('count').textContent")


def choose(browser, name, value):
    browser.execute_script(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
        "s.dispatchEvent(new Event('change'))",
        name,
        value,
    )


@pytest.mark.thinned(1)
def test_changed_completions_are_found(browser, page):
    show(browser, page)
    assert count(browser) == "12 of 20 common examples, page 1 of 2"  # right 6 and 18 times
    texts = browser.execute_script(
        "return [...document.querySelectorAll('.example:first-child .body')]"
        ".map(b => b.textContent)"
    )
    assert texts == ["proxy says 0 of 6", "proxy says 1 of 6"]
    mark = browser.execute_script("return document.querySelector('.text .other').textContent")
    assert mark == "1 of 6"
    prompt = browser.execute_script("return document.querySelector('.prompt').textContent")
    assert prompt == "Question 6: <b>what</b>?"  # shown as text, not as markup
    click(browser, "[data-filter=gained]")
    assert count(browser).startswith("12 of 20")
    click(browser, "[data-filter=lost]")
    assert count(browser).startswith("0 of 20")
    click(browser, "[data-filter=all]")
    assert count(browser).startswith("20 of 20")
    choose(browser, "other", "short")  # of other examples, those that both have
    wait(browser, "return document.getElementById('count').textContent.startsWith('8 of 8')")
    choose(browser, "system", "base")
    choose(browser, "other", "alpha=1.0")
    wait(browser, "return !document.getElementById('same').hidden")
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_every_control_can_be_reached_by_tab(browser, page):
    show(browser, page)
    reached = set()
    for _ in range(60):
        browser.switch_to.active_element.send_keys("\ue004")
        name = "const e = document.activeElement; return e.id || e.dataset.filter || e.tagName"
        reached.add(browser.execute_script(name))
    controls = {"task", "system", "one", "other", "query", "next", "scored", "lost", "all"}
    assert controls <= reached and "SUMMARY" in reached


def test_it_fits_a_phone(browser, page):
    show(browser, page)
    picture(browser, "runs_desktop.png")
    show(browser, page, 390, 844)
    overflow = "return document.documentElement.scrollWidth - window.innerWidth"
    assert browser.execute_script(overflow) <= 0
    cut = browser.execute_script(
        "return [...document.querySelectorAll('main .wide')].filter(w => w.checkVisibility())"
        ".map(w => w.scrollWidth - w.clientWidth)"
    )
    assert len(cut) >= 2 and max(cut) <= 0
    picture(browser, "runs_phone.png")
