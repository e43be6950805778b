"""The picture of one example's answers."""

import shutil
import xml.etree.ElementTree as ET

import pytest
import report_folder

from proxytune.errors import UserError
from proxytune.files import ROOT
from proxytune.results.picture import picture

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return report_folder.make(tmp_path_factory.mktemp("run"), examples=30)


def texts(svg: str) -> list[str]:
    return [each.text or "" for each in ET.fromstring(svg).iter(f"{SVG}text")]


def test_it_shows_the_first_example_that_tells_the_systems_apart(run):
    # base is right on the first 6 of 30, expert on 15, proxy on 18, tuned on 21
    svg = picture(run, "gsm8k")
    shown = texts(svg)
    assert shown[0] == "Answer:"  # the prompt's last line
    assert [each for each in shown if each in ("base", "expert", "proxy", "tuned")] == [
        "base",
        "expert",
        "proxy",
        "tuned",
    ]
    assert shown.count("✓ right") == shown.count("✗ wrong") == 2
    tree = ET.fromstring(svg)
    assert len(list(tree.iter(f"{SVG}rect"))) == 12  # every token of the proxy was raised
    assert 0 < len([each for each in tree.iter(f"{SVG}line") if each.get("class") == "under"]) < 12


def test_an_example_can_be_named_and_its_markup_stays_text(run):
    assert "Who met <b>Zanzibar</b>?" in texts(picture(run, "gsm8k", "29"))
    with pytest.raises(UserError, match="no example 'x'"):
        picture(run, "gsm8k", "x")


def test_what_a_run_lacks_is_named(run, tmp_path):
    with pytest.raises(UserError, match="is missing"):
        picture(run, "triviaqa")
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    shutil.rmtree(copied / "gsm8k" / "tuned")
    with pytest.raises(UserError, match=r"tuned/completions\.jsonl is missing"):
        picture(copied, "gsm8k")


def test_the_readme_has_a_picture_that_can_be_read():
    shown = texts((ROOT / "docs" / "answers.svg").read_text())
    assert {"base", "expert", "proxy", "tuned"} <= set(shown)
    assert "docs/answers.svg" in (ROOT / "README.md").read_text()
