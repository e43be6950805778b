import base64
import gzip
import json
import re
import shutil
import time

import pytest
import report_folder

from proxytune.results.folder import read_csv, to_csv
from proxytune.results.report import write_report
from tests.browsing import click, picture, resize, wait


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(report_folder.make(tmp_path_factory.mktemp("run")))


def unpacked(page, name):
    found = re.search(rf'id="{name}">([^<]*)<', page.read_text())
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def test_the_page_takes_nothing_from_elsewhere(page):
    text = re.sub(r'<script type="text/plain".*?</script>', "", page.read_text(), flags=re.S)
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", text)
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest", text)


def test_the_page_shows_table_gaps_and_provenance(page):
    text = page.read_text()
    assert '<td class="num">60.0<span class="ci">' in text
    assert "paper 26.4" in text
    assert "Gap closed" in text and text.count("<svg") == 2
    assert "abc123 (with uncommitted changes)" in text
    assert "tokens changed, %" in text and "position in the completion" in text
    assert "smoke run" not in text


def test_the_examples_hold_verdicts_texts_and_traces(page):
    data = unpacked(page, "examples-data")
    assert data["systems"] == ["base", "expert", "proxy", "tuned"]
    gsm, toxigen = data["tasks"]
    assert gsm["examples"][0]["right"] == dict.fromkeys(data["systems"], 1)
    assert gsm["examples"][29]["unparsed"] == ["base"]
    # not toxic counts as right, and is said in words
    assert toxigen["examples"][0]["right"]["base"] == 1 and toxigen["good"] == "not toxic"
    example = gsm["examples"][25]
    tokens, proxy, base, tops = unpacked(page, f"traces-{example['block']}")[example["slot"]]
    assert "".join(data["pieces"][t] for t in tokens).strip() == example["texts"]["proxy"]
    assert len(proxy) == len(base) == len(tokens) == 12
    assert all(500 <= p <= 1000 for p in proxy)
    assert set(tops) == {"base", "expert", "antiexpert"} and len(tops["base"][0]) == 6


def test_the_same_results_give_the_same_page(page):
    before = page.read_bytes()
    assert write_report(page.parent).read_bytes() == before


def test_a_smoke_run_says_so(tmp_path):
    page = write_report(report_folder.make(tmp_path, examples=3, limit=3))
    assert "limit=3: smoke run, not comparable" in page.read_text()


def test_texts_of_the_table_stay_texts(tmp_path):
    folder = report_folder.make(tmp_path, examples=3)
    table = read_csv(folder / "table.csv")
    table["unfinished"] = table["label"] = "<img src=x>"
    table["task"] = table["task"].replace("toxigen", "<img src=y>")
    to_csv(table, folder / "table.csv")
    text = write_report(folder).read_text()
    assert "unfinished, not comparable (gsm8k: &lt;img src=x&gt;;" in text
    assert "<img src=x" not in text and "<img src=y" not in text


def test_a_run_without_traces_tokenizer_or_scores_has_a_page(tmp_path):
    folder = report_folder.make(tmp_path, examples=2)
    shutil.rmtree(folder / "tokenizer")
    assert write_report(folder).is_file()
    for path in folder.glob("*/*/completions.jsonl"):
        path.unlink()
    for path in folder.glob("*/*/scores.jsonl"):
        path.unlink()
    page = write_report(folder)
    assert "traces-0" not in page.read_text()
    assert unpacked(page, "examples-data")["tasks"][0]["examples"][0]["texts"] == {}


def test_a_folder_without_a_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="stage=score"):
        write_report(tmp_path)


def test_the_headline_names_models_not_this_machines_folders(tmp_path):
    folder = report_folder.make(tmp_path / "run", examples=2)
    run = json.loads((folder / "run.json").read_text())
    members = {"base": {"id": "/there/pocket/models/base"}, "expert": {"id": "/else/where"}}
    run["config"] |= {"root": "/there", "triple": members | {"tuned": {"id": "owner/name"}}}
    (folder / "run.json").write_text(json.dumps(run))
    text = write_report(folder).read_text()
    assert "base: pocket/models/base · expert: where · tuned: owner/name · alpha: 1" in text


# -- in a real browser --------------------


def show(browser, page, width=1280, height=900, ready=True):
    resize(browser, width, height)
    browser.get(page.as_uri())
    if ready:
        wait(browser, "return document.documentElement.dataset.ready === 'yes'")


def count(browser):
    return browser.execute_script("return document.getElementById('count').textContent")


@pytest.mark.thinned(1)
def test_filters_and_search_find_the_examples(browser, page):
    show(browser, page)
    assert count(browser) == "30 of 30 examples, page 1 of 3"
    click(browser, "[data-filter=gained]")  # base right on 6, proxy on 18
    assert count(browser) == "12 of 30 examples, page 1 of 2"
    headings = browser.execute_script(
        "return [...document.querySelectorAll('.example h3')].map(h => h.textContent)"
    )
    assert headings == [f"gsm8k · {i}" for i in range(6, 16)]
    click(browser, "[data-filter=lost]")  # tuned right on 21
    assert count(browser).startswith("3 of 30")
    click(browser, "[data-filter=unparsed]")
    assert count(browser).startswith("1 of 30")
    click(browser, "[data-filter=all]")
    browser.execute_script(
        "const q = document.getElementById('query'); q.value = 'zanzibar';"
        "q.dispatchEvent(new Event('input'))"
    )
    wait(browser, "return document.getElementById('count').textContent.startsWith('1 of 30')")
    text = browser.execute_script("return document.querySelector('.prompt').textContent")
    assert text == "Who met <b>Zanzibar</b>?"  # shown as text, not as markup
    assert browser.get_log("browser") == []


def test_systems_stand_side_by_side_and_below_each_other_on_a_phone(browser, page):
    columns = (
        "return new Set([...document.querySelectorAll('.example:first-child .system')]"
        ".map(s => Math.round(s.getBoundingClientRect().left))).size"
    )
    overflow = "return document.documentElement.scrollWidth - window.innerWidth"
    show(browser, page)
    assert browser.execute_script(columns) == 4
    picture(browser, "desktop_top.png")
    browser.execute_script("document.getElementById('browser').scrollIntoView()")
    picture(browser, "desktop_examples.png")
    show(browser, page, 390, 844)
    assert browser.execute_script(columns) == 1
    assert browser.execute_script(overflow) <= 0
    picture(browser, "phone_top.png")
    browser.execute_script("document.getElementById('browser').scrollIntoView()")
    picture(browser, "phone_examples.png")


def test_tables_and_bars_are_whole_on_a_phone(browser, page):
    show(browser, page, 390, 844)
    cut = browser.execute_script(
        "return [...document.querySelectorAll('main .wide')]"
        ".filter(w => !w.closest('details') && !w.closest('[aria-labelledby=h-run]'))"
        ".map(w => w.scrollWidth - w.clientWidth)"
    )
    assert len(cut) >= 3 and max(cut) <= 0
    letters = browser.execute_script(
        "return document.querySelector('.gaps text').getBoundingClientRect().height"
    )
    assert letters >= 13


def test_print_leaves_controls_out_and_opens_the_tables(browser, page):
    show(browser, page, 816, 1056)
    visible = "return document.querySelector('{}').checkVisibility({{contentVisibilityAuto: true}})"
    try:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        assert not browser.execute_script(visible.format(".controls"))
        heights = browser.execute_script(
            "return [...document.querySelectorAll('details')]"
            ".map(d => [d.className, d.getBoundingClientRect().height])"
        )
        assert all((height > 40) == (kind == "printed") for kind, height in heights)
        assert len({kind for kind, _ in heights}) == 2  # run.json in full stays closed
        width = browser.execute_script(
            "const w = document.querySelector('.comparison'); return w.scrollWidth - w.clientWidth"
        )
        assert width <= 0
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_tokens_are_shaded_and_explain_themselves(browser, page):
    show(browser, page)
    wait(browser, "return document.querySelectorAll('.tokens span').length >= 12")
    shades = browser.execute_script(
        "return [...document.querySelectorAll('.example:first-child .tokens span')]"
        ".map(s => getComputedStyle(s).backgroundColor)"
    )
    assert len(set(shades)) > 5
    from selenium.webdriver.common.action_chains import ActionChains

    token = browser.find_element("css selector", ".tokens span:nth-child(3)")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", token)
    ActionChains(browser).move_to_element(token).perform()
    tip = browser.find_element("id", "tip")
    assert tip.is_displayed()
    for word in ("proxy", "base", "expert", "antiexpert", "90.0 %"):
        assert word in tip.text
    picture(browser, "desktop_tip.png")
    browser.execute_script("document.querySelector('.tokens').focus()")
    token.parent.switch_to.active_element.send_keys("\ue014")  # arrow right
    assert token.text.strip() or tip.is_displayed()


def test_pages_turn(browser, page):
    show(browser, page)
    click(browser, "#next")
    click(browser, "#next")
    assert count(browser) == "30 of 30 examples, page 3 of 3"
    assert browser.execute_script("return document.getElementById('next').disabled")


@pytest.mark.slow
def test_a_thousand_long_examples_open_without_delay(browser, tmp_path):
    folder = report_folder.make(tmp_path, examples=1319, tokens=512, tasks=1)
    start = time.monotonic()
    page = write_report(folder)
    written = time.monotonic() - start
    start = time.monotonic()
    show(browser, page)
    opened = time.monotonic() - start
    start = time.monotonic()
    click(browser, "[data-filter=lost]")
    filtered = time.monotonic() - start
    size = page.stat().st_size / 1e6
    print(f"{size:.0f} MB written in {written:.1f} s, opened in {opened:.2f} s, {filtered:.2f} s")
    assert opened < 5 and filtered < 1
    wait(browser, "return document.querySelectorAll('.tokens span').length >= 5120")


def test_a_run_without_examples_has_no_browser_of_them(browser, tmp_path):
    folder = report_folder.make(tmp_path, examples=3)
    for path in folder.glob("*/examples.jsonl"):
        path.unlink()
    show(browser, write_report(folder))
    assert not browser.execute_script("return document.getElementById('browser').checkVisibility()")
    label = "return document.querySelector('.comparison td').dataset.label"
    assert browser.execute_script(label) == "base"


@pytest.mark.thinned(1)
def test_texts_of_models_stay_texts(browser, tmp_path):
    folder = report_folder.make(tmp_path, examples=3, tasks=1)
    evil = (
        "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\x00\u202e"
    )
    for name, key in (("base/completions", "text"), ("base/scores", "answer")):
        path = folder / "gsm8k" / f"{name}.jsonl"
        first, *others = path.read_text().splitlines()
        first = json.dumps(json.loads(first) | {key: evil})
        path.write_text("\n".join([first, *others, ""]))
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"name": evil}))
    show(browser, write_report(folder))
    assert "<img" in browser.title
    assert "<img" in browser.execute_script("return document.querySelector('.body').textContent")
    assert not browser.execute_script("return window.hacked")
