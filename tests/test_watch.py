"""`proxytune watch`: what it tells of a run in progress, to whom, and its page in a browser."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import requests

import proxytune.cli
from proxytune.cli.watch import as_text
from proxytune.cli.watch_server import WatchServer
from proxytune.errors import UserError
from proxytune.experiment.watched_cell import scoring_of
from proxytune.experiment.watching import Watcher
from proxytune.files import ROOT, JsonlFollower
from proxytune.records import Completion
from tests.browsing import click, picture, resize, wait
from tests.runs_folder import make_run

SECONDS_AGO = {"expert": 400, "base": 300, "proxy": 100}


def cut(path: Path, lines: int, half: bytes = b"") -> None:
    """Keeps so many lines, and half of a next one."""
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]) + half)


def write_run(folder: Path, **session: object) -> None:
    run = json.loads((folder / "run.json").read_text())
    began = {
        f"{system}/gsm8k": {"began": ago(seconds), "before": 0}
        for system, seconds in SECONDS_AGO.items()
    }
    run["config"] |= {"systems": ["base", "expert", "proxy", "tuned"], "task": run["tasks"]}
    run["sessions"] = [{"started": ago(500), "cells": began} | session]
    (folder / "run.json").write_text(json.dumps(run))


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


@pytest.fixture
def folder(tmp_path):
    """Expert and base are done, the proxy has 5 of 20, and a killed writer's half line."""
    made = make_run(tmp_path / "run", scored=False, texts="#### NUMBER.")
    gsm = made / "gsm8k"
    cut(gsm / "proxy" / "completions.jsonl", 5, b'{"example_id": "5", "sam')
    (gsm / "tuned" / "completions.jsonl").unlink()
    write_run(made)
    for system, seconds in (("expert", 300), ("base", 200), ("proxy", 10)):
        then = time.time() - seconds
        os.utime(gsm / system / "completions.jsonl", (then, then))
    return made


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_it_tells_progress_speed_scores_and_what_is_left(folder):
    before = contents(folder)
    state = Watcher(folder).look()
    assert [(cell.system, cell.done, cell.total) for cell in state.cells] == [
        ("expert", 20, 20),
        ("base", 20, 20),
        ("proxy", 5, 20),
        ("tuned", 0, 20),
    ]
    assert state.phase == "generating" and state.since == pytest.approx(500, abs=5)
    expert, base, proxy, tuned = state.cells
    assert [expert.speed, base.speed] == pytest.approx([20 * 5 / 100] * 2, rel=0.05)
    assert proxy.speed == pytest.approx(5 * 5 / 90, rel=0.05)
    assert tuned.speed is None and tuned.value is None
    assert (proxy.value, proxy.scored, proxy.metric) == (100.0, 5, "accuracy")
    assert proxy.low == pytest.approx(56.6, abs=0.1) and proxy.high == 100.0
    # 15 at 18 s each; the tuned model's 20 take the median of the others' 5, 5 and 18 s
    assert state.left == pytest.approx(15 * 18 + 20 * 5, rel=0.05)
    assert state.latest[0].system == "proxy" and state.latest[0].example == "4"
    assert contents(folder) == before


def test_the_metrics_of_a_judged_task_have_their_names_and_its_headline():
    settings = {"_target_": "tasks.humaneval.HumanEval", "headline": "pass@1"}
    assert next(iter(scoring_of("humaneval", settings).metrics)) == "pass@1"
    usual = scoring_of("toxigen", {"_target_": "tasks.toxigen.ToxiGen"})
    assert usual.task is None and usual.metrics["toxicity"].label == "toxic"


def test_what_comes_is_seen_and_read_once(folder):
    watcher = Watcher(folder)
    assert watcher.look().cells[2].done == 5
    path = folder / "gsm8k" / "proxy" / "completions.jsonl"
    with path.open("ab") as file:  # the rest of the half line, and another half
        file.write(b'ple": 0, "text": "#### 0.", "raw_text": "", "token_ids": [1, 2], ')
        file.write(b'"finish_reason": "stop"}\n{"example_id": "6"')
    state = watcher.look()
    proxy = state.cells[2]
    assert proxy.done == 6 and proxy.value == 83.3
    assert state.latest[0].example == "5" and state.latest[0].value == 0.0
    cut(path, 2)  # another file: the run was begun anew
    proxy = watcher.look().cells[2]
    assert (proxy.done, proxy.scored) == (2, 2)


def test_an_earlier_session_tells_no_speed(folder):
    write_run(folder, cells={"proxy/gsm8k": {"began": ago(90), "before": 4}})
    expert, _, proxy, _ = Watcher(folder).look().cells
    assert expert.speed is None
    assert proxy.speed == pytest.approx(5 / 80, rel=0.05)  # one example of five tokens


def test_a_run_of_an_older_edition_is_measured_from_when_it_is_watched(folder):
    write_run(folder, cells=None)
    watcher = Watcher(folder)
    path = folder / "gsm8k" / "proxy" / "completions.jsonl"
    os.utime(path)
    for _ in range(2):
        assert watcher.look().cells[2].speed is None
    line = path.read_bytes().splitlines(keepends=True)[0].replace(b'"0"', b'"9"')
    cut(path, 5, line)
    then = time.time() + 5
    os.utime(path, (then, then))
    assert watcher.look().cells[2].speed == pytest.approx(1.0, rel=0.1)


def test_a_killed_a_scored_and_a_finished_run_say_so(folder):
    long_ago = time.time() - 7200
    for path in folder.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    said = Watcher(folder).look().said
    assert "Nothing has come for 2 h 0 min" in said and "the same command goes on" in said
    make_run(folder, scored=False)
    write_run(folder)
    assert Watcher(folder).look().phase == "scoring"
    make_run(folder, alpha=0.5)
    write_run(folder, finished=ago(1))
    state = Watcher(folder).look()
    assert state.phase == state.said == "finished" and state.report


def test_what_needs_a_judge_or_runs_programs_is_not_scored_meanwhile(folder):
    run = json.loads((folder / "run.json").read_text())
    for target in ("tasks.humaneval.HumanEval", "tasks.toxigen.ToxiGen"):
        run["config"]["task"] = {"gsm8k": {"_target_": target, "allow_code_execution": True}}
        (folder / "run.json").write_text(json.dumps(run))
        cells = Watcher(folder).look().cells
        assert all(cell.value is None and not cell.problem for cell in cells)
    scores = '{"example_id": "1", "values": {"pass@1": 0.5}}\n'
    (folder / "gsm8k" / "proxy" / "scores.jsonl").write_text(scores)
    proxy = Watcher(folder).look().cells[2]  # what the run itself has scored
    assert (proxy.metric, proxy.value, proxy.scored) == ("pass@1", 50.0, 1)


def test_a_task_that_asks_by_itself_is_done_with_its_result(folder):
    run = json.loads((folder / "run.json").read_text())
    run["config"]["task"] = {"gsm8k": {"_target_": "tasks.lm_eval_task.LmEvalTask"}}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "gsm8k" / "base" / "result.json").write_text("{}")
    cells = Watcher(folder).look().cells
    assert [(cell.done, cell.total) for cell in cells] == [(0, 1), (1, 1), (0, 1), (0, 1)]


# -- folders of strangers --------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"_target_": "os.system", "_args_": ["touch PWNED"]},
        {"_target_": "tasks.gsm8k.GSM8K", "zzz": 1},
        "tasks.gsm8k.GSM8K",
        None,
    ],
)
def test_a_folder_names_tasks_and_nothing_else(settings, folder, monkeypatch):
    run = json.loads((folder / "run.json").read_text())
    run["config"]["task"] = {"gsm8k": settings}
    (folder / "run.json").write_text(json.dumps(run))
    monkeypatch.chdir(folder)
    cell = Watcher(folder).look().cells[2]
    assert "run.json: task gsm8k" in cell.problem and cell.done == 5 and cell.value is None
    assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    "config",
    [{}, {"systems": "base", "task": {}}, {"systems": [["base"]], "task": []}, {"systems": None}],
)
def test_a_run_that_names_no_systems_is_refused(config, folder):
    (folder / "run.json").write_text(json.dumps({"config": config, "sessions": []}))
    with pytest.raises(UserError, match=r"run\.json"):
        Watcher(folder).look()


@pytest.mark.parametrize("sessions", [[], [5], [{"started": 5, "cells": [1]}]])
def test_sessions_of_any_form_stop_no_look(sessions, folder):
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"sessions": sessions}))
    assert Watcher(folder).look().cells[2].done == 5


@pytest.mark.parametrize("task", ["../x", "/etc", "~"])
def test_a_task_s_name_leads_nowhere_else(task, folder):
    run = json.loads((folder / "run.json").read_text())
    run["config"]["task"] = {task: {}}
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match="plain name"):
        Watcher(folder).look()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("proxy/completions.jsonl", b'{"text": 1}\n'),
        ("proxy/completions.jsonl", b"\xff\n"),
        ("proxy/cell.json", b"[]"),
        ("examples.jsonl", b'{"id": 1}\n'),
    ],
)
def test_a_damaged_file_is_said_of_its_cell_alone(name, content, folder):
    (folder / "gsm8k" / name).write_bytes(content)
    state = Watcher(folder).look()
    assert state.cells[2].problem
    assert name == "examples.jsonl" or not state.cells[0].problem


def test_examples_that_do_not_fit_the_task_are_said_once_and_counted(folder):
    run = json.loads((folder / "run.json").read_text())
    run["config"]["task"] = {"gsm8k": {"_target_": "tasks.triviaqa.TriviaQA"}}
    (folder / "run.json").write_text(json.dumps(run))
    path = folder / "gsm8k" / "examples.jsonl"
    path.write_text(path.read_text().replace('"target": "', '"target": 1, "row": {"x": "')
                    .replace('", "row": {}', '"}'))  # fmt: skip
    watcher = Watcher(folder)
    for _ in range(2):
        cell = watcher.look().cells[2]
        assert "does not fit the task" in cell.problem and (cell.done, cell.value) == (5, None)


def test_links_and_pipes_are_not_read(folder, tmp_path):
    path = folder / "gsm8k" / "tuned" / "completions.jsonl"
    watcher = Watcher(folder)
    os.mkfifo(path)
    assert "is no file" in watcher.look().cells[3].problem  # it came after the first check
    with pytest.raises(UserError, match="neither a file nor a folder"):
        Watcher(folder)
    path.unlink()
    watcher = Watcher(folder)
    path.symlink_to(folder / "gsm8k" / "base" / "completions.jsonl")
    with pytest.raises(OSError, match="symbolic"):
        list(JsonlFollower(path, Completion).new())
    assert watcher.look().cells[3].problem  # it came after the first check
    with pytest.raises(UserError, match="symbolic link"):
        Watcher(folder)


def test_folders_without_a_run_are_refused_with_what_they_hold(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        Watcher(tmp_path / "none")
    with pytest.raises(UserError, match=r"no run\.json"):
        Watcher(tmp_path)
    make_run(tmp_path / "alpha=1.0")
    with pytest.raises(UserError, match=r"one of the runs in it: alpha=1\.0$"):
        Watcher(tmp_path)


# -- the command --------------------


def test_once_prints_text_that_steers_no_terminal(folder, monkeypatch, capsys):
    path = folder / "gsm8k" / "proxy" / "completions.jsonl"
    path.write_text(path.read_text().replace("#### 4.", "\\u001b[2J\\u0007#### 4.\\n\\u009b1m!"))
    monkeypatch.setattr(sys, "argv", ["proxytune", "watch", str(folder), "--once"])
    proxytune.cli.main()
    said = capsys.readouterr().out
    assert said.startswith(
        "pocket: 45 of 80 examples; 8 min since it was started; about 7 min left"
    )
    assert "  proxy   gsm8k   5 of 20       0.2  accuracy 80.0 (" in said and ", of 5" in said
    assert "[2J #### 4.  1m!" in said
    assert all(c.isprintable() or c == "\n" for c in said)


def test_mistakes_end_in_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["proxytune", "watch", str(folder), "--port", "70000"])
    with pytest.raises(SystemExit) as end:
        proxytune.cli.main()
    assert end.value.code == 1
    assert capsys.readouterr().err == (
        "error: --port 70000: a port is a number up to 65535; 0 takes a free one\n"
    )
    with WatchServer(Watcher(folder), 0) as server, pytest.raises(UserError, match="--port"):
        WatchServer(Watcher(folder), server.server_address[1])


@pytest.mark.slow
def test_ctrl_c_ends_it_and_not_the_run(folder):
    code = "from proxytune.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "watch", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        said = process.stdout.readline()
        assert requests.get(said.split()[3] + "state", timeout=20).json()["name"] == "pocket"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == ""


# -- the page --------------------


@pytest.fixture
def home(folder):
    with WatchServer(Watcher(folder), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server.url
        server.shutdown()
        thread.join()


def test_the_page_takes_nothing_from_elsewhere(home):
    answer = requests.get(home, timeout=20)
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert 'src="' not in answer.text and "://" not in answer.text
    assert requests.get(home + "nothing", timeout=20).status_code == 404
    assert requests.get(home + "report", timeout=20).status_code == 404  # nothing is scored yet


@pytest.mark.parametrize("path", ["", "state", "report"])
def test_pages_of_others_are_refused(home, path):
    rebound = requests.get(home + path, headers={"Host": "evil.example"}, timeout=20)
    assert rebound.status_code == 421
    foreign = requests.get(home + path, headers={"Origin": "http://evil.example"}, timeout=20)
    assert foreign.status_code == 403
    assert "pocket" not in rebound.text + foreign.text
    assert requests.post(home + path, timeout=20).status_code == 501


def test_the_report_is_there_once_the_run_is_scored(folder, home):
    make_run(folder)
    answer = requests.get(home + "report", timeout=60)
    assert answer.status_code == 200 and "<h1>pocket</h1>" in answer.text
    assert not (folder / "report.html").exists()


def test_a_folder_that_cannot_be_read_is_said_on_the_page(folder, home):
    (folder / "run.json").write_text("{")
    assert "run.json is not JSON" in requests.get(home + "state", timeout=20).json()["error"]


@pytest.mark.slow
def test_the_page_follows_the_run(browser, folder, home):
    resize(browser)
    browser.get(home)
    wait(browser, "return document.documentElement.dataset.ready === 'yes'")
    cells = "return [...document.querySelectorAll('#cells tr')].map(r => r.textContent)"
    assert browser.execute_script(cells)[2].startswith("proxy · gsm8k5 of 20")
    picture(browser, "watch_desktop.png")
    path = folder / "gsm8k" / "proxy" / "completions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    cut(path, 5, lines[0].replace(b'"0"', b'"7"').replace(b"#### 0.", b"<b>seven</b>"))
    wait(browser, "return document.getElementById('cells').textContent.includes('6 of 20')")
    first = "return document.querySelector('#latest .example .text:not(.prompt)').textContent"
    assert browser.execute_script(first) == "<b>seven</b>"
    click(browser, "#pause")
    cut(path, 6, lines[0].replace(b'"0"', b'"8"').replace(b"#### 0.", b"eight"))
    wait(browser, "return document.getElementById('cells').textContent.includes('7 of 20')")
    assert browser.execute_script(first) == "<b>seven</b>"  # held still
    resize(browser, 390, 844)
    overflow = "return document.documentElement.scrollWidth - window.innerWidth"
    assert browser.execute_script(overflow) <= 0
    picture(browser, "watch_phone.png")
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_the_page_says_when_nobody_watches_any_more(browser, folder):
    with WatchServer(Watcher(folder), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        browser.get(server.url)
        wait(browser, "return document.documentElement.dataset.ready === 'yes'")
        server.shutdown()
        thread.join()
    wait(browser, "return !document.getElementById('problem').hidden")
    assert "has ended" in browser.find_element("id", "problem").text


def test_the_text_of_a_cell_without_numbers(folder):
    write_run(folder, cells=None)
    (folder / "gsm8k" / "examples.jsonl").unlink()
    lines = list(as_text(Watcher(folder).look()))
    assert lines[3].split() == ["expert", "gsm8k", "–"]
