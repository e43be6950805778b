"""Pages, tables and lines made from a folder that is damaged, or that a stranger made."""

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from proxytune.cli.guard import guarded
from proxytune.errors import UserError
from proxytune.experiment.watching import Watcher
from proxytune.files import ROOT, read_json, read_jsonl
from proxytune.records import Metric, MetricInfo, Score
from proxytune.results import stats, tables
from proxytune.results.comparison import comparison
from proxytune.results.folder import read_csv
from proxytune.results.report import page_of
from proxytune.secrets import RedactingFormatter
from tests import report_folder

sys.path.insert(0, str(ROOT / "scripts"))
from rescore import main as rescore_main

STEERS = "\x1b]0;pwned\x07\x9b31m\u202e\ud800"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return report_folder.make(tmp_path_factory.mktemp("made") / "run", examples=3, tokens=4)


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def run_json(*way: str | int, value: Any) -> Callable[[Path], None]:
    """Sets a value of run.json."""

    def edit(folder: Path) -> None:
        whole = node = json.loads((folder / "run.json").read_text())
        for key in way[:-1]:
            node = node[key]
        node[way[-1]] = value
        (folder / "run.json").write_text(json.dumps(whole))

    return edit


def table(column: str, value: object) -> Callable[[Path], None]:
    """Sets a cell of table.csv."""

    def edit(folder: Path) -> None:
        found = pd.read_csv(folder / "table.csv", dtype=object)
        found.loc[0, column] = value
        found.to_csv(folder / "table.csv", index=False)

    return edit


def trace(value: Any) -> Callable[[Path], None]:
    """Sets the trace of the first completion."""

    def edit(folder: Path) -> None:
        path = folder / "gsm8k" / "proxy" / "completions.jsonl"
        first, *rest = path.read_text().splitlines(keepends=True)
        row = json.loads(first)
        found = row["extra"]["trace"]
        found[0] = found[0] | value if isinstance(value, dict) else value
        path.write_text(json.dumps(row) + "\n" + "".join(rest))

    return edit


def line(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


DAMAGED = {
    "a list": ("run.json", line("run.json", b"[]")),
    "no configuration": ("run.json", line("run.json", b"{}")),
    "a configuration of text": ("run.json", run_json("config", value="x")),
    "alpha of text": ("run.json", run_json("config", "alpha", value="1")),
    "alpha of 400 digits": ("run.json", run_json("config", "alpha", value=10**400)),
    "a triple of text": ("run.json", run_json("config", "triple", value="x")),
    "sessions of text": ("run.json", run_json("sessions", value="x")),
    "a session null": ("run.json", run_json("sessions", 0, value=None)),
    "a command of numbers": ("run.json", run_json("sessions", 0, "command", value=[1])),
    "hardware of text": ("run.json", run_json("sessions", 0, "hardware", value="x")),
    "versions in a list": ("run.json", run_json("sessions", 0, "versions", value=["x"])),
    "a model of text": ("run.json", run_json("models", "base", value="x")),
    "an example without a prompt": (
        "examples.jsonl",
        line("gsm8k/examples.jsonl", b'{"id":"0"}\n'),
    ),
    "an infinite score": (
        "scores.jsonl",
        line("gsm8k/proxy/scores.jsonl", b'{"example_id":"0","values":{"acc":1e999}}\n'),
    ),
    "a trace of numbers": ("completions.jsonl", trace(5)),
    "a token of text": ("completions.jsonl", trace({"id": "x"})),
    "a token of 70 bits": ("completions.jsonl", trace({"id": 2**70})),
    "no probabilities": ("completions.jsonl", trace({"p": None})),
    "candidates of numbers": ("completions.jsonl", trace({"top": {"base": [1]}})),
    "a number of text": ("table.csv", table("proxy", "=cmd|' /C calc'!A1")),
    "an infinite number": ("table.csv", table("n_examples", "inf")),
    "a truth of text": ("table.csv", table("percent", "abc")),
    "half an example": ("table.csv", table("limit", "1.5")),
    "examples without end": ("table.csv", table("limit", "inf")),
    "zeros hidden by a text": ("table.csv", table("hide_zeros", "abc")),
    "no name": ("table.csv", table("metric", None)),
    "another folder's task": ("table.csv", table("task", "../../etc")),
    "a label that steers": ("table.csv", table("label", STEERS[:9])),
    "a label that a spreadsheet runs": ("table.csv", table("label", "=1+1")),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_page_names_the_damaged_file(case, folder):
    name, damage = DAMAGED[case]
    damage(folder)
    with pytest.raises(UserError) as refused:
        page_of(folder)
    said = str(refused.value)
    assert name in said and "\n" not in said and len(said) < 1000


@pytest.mark.parametrize("member", ["x", {"id": 5}, {"id": ["a"]}, {"id": "a/b"}, None])
def test_a_page_without_a_tokenizer_shows_ids_and_asks_nobody(member, folder, monkeypatch):
    """A folder could name any repository of the hub, one with code in it, too."""
    from transformers import AutoTokenizer

    load, asked = AutoTokenizer.from_pretrained, []

    def loading(*given, **settings):
        asked.append(settings)
        return load(*given, **settings)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", loading)
    run_json("config", "triple", "base", value=member)(folder)
    page_of(folder)
    assert all(s["local_files_only"] and not s["trust_remote_code"] for s in asked)
    assert len(asked) == (member == {"id": "a/b"})


@pytest.mark.parametrize("name", ["run.json", "table.csv", "gsm8k/proxy/judges.json", "gsm8k/x"])
def test_a_named_pipe_holds_nobody_up(name, folder, capsys):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    acts: list[Callable[[Path], object]] = [page_of]
    if name != "run.json":
        acts += [Watcher, lambda folder: rescore_main([str(folder)])]
    for act in acts:
        with pytest.raises((UserError, SystemExit)) as refused:
            act(folder)
        said = str(refused.value) if refused.type is UserError else capsys.readouterr().err
        assert f"{folder / name} is neither a file nor a folder" in said


def test_a_sample_of_any_number_takes_no_time(folder, capsys):
    path = folder / "gsm8k" / "proxy" / "completions.jsonl"
    row = json.loads(path.read_text().splitlines()[0]) | {"sample": 10**15}
    path.write_text(json.dumps(row) + "\n")
    run_json("tasks", value={"gsm8k": {"_target_": "tasks.gsm8k.GSM8K"}})(folder)
    rescore_main([str(folder)])
    assert "skipped gsm8k/proxy: 3 of 3 examples lack samples" in capsys.readouterr().out


def test_a_stored_result_of_lm_eval_is_checked(tmp_path):
    path = tmp_path / "result.json"
    for metrics in ([{}], [{"task": "a"}], [5], "x"):
        path.write_text(json.dumps({"metrics": metrics}))
        with pytest.raises(UserError, match=r"result.json is damaged \(its 'metrics'"):
            read_json(path, metrics=list[Metric], infos=dict[str, MetricInfo])


# -- names --------------------


@pytest.mark.parametrize("name", ["=1+1", "@SUM(1)", "-1", "+1", STEERS, "a\nb"])
def test_a_name_that_cannot_stand_in_a_table_is_no_metric(name, tmp_path):
    path = tmp_path / "metrics.jsonl"
    row = {"task": "a", "system": "base", "metric": name, "value": 1, "n": 1, "n_examples": 1}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl:1: .* is no name for a table"):
        list(read_jsonl(path, Metric))


def test_a_name_is_no_html_in_markdown():
    scores = [Score(str(i), {"<img src=x>": float(i)}) for i in range(4)]
    found = [m for s in ("base", "proxy") for m in stats.metrics("a<b>|c", s, scores)]
    text = tables.to_markdown(comparison(found, {}))
    assert "<img" not in text and "<b>" not in text
    assert "| a&lt;b&gt;\\|c | **&lt;img src=x&gt;** |" in text


@pytest.mark.parametrize("name", ["null", "NA", "nan", "None", "true", "2"])
def test_a_task_may_have_the_name_of_a_value(name, tmp_path):
    found = stats.metrics(name, "base", [Score("0", {"acc": 1.0})])
    comparison(found, {}).assign(limit=None).to_csv(tmp_path / "table.csv", index=False)
    assert read_csv(tmp_path / "table.csv")["task"].tolist() == [name]


# -- the terminal --------------------


def test_no_line_steers_the_terminal(capsys):
    def refuse() -> None:
        raise UserError(f"the folder names {STEERS}")

    with pytest.raises(SystemExit):
        guarded(refuse, again="")
    record = logging.LogRecord("x", logging.WARNING, "", 0, f"a\tb\n{STEERS}", None, None)
    for said in (capsys.readouterr().err, RedactingFormatter("%(message)s").format(record)):
        assert r"\x1b]0;pwned\x07\x9b31m\u202e\ud800" in said
        assert said.replace("\n", "").replace("\t", "").isprintable()
