"""The targets of conf/paper.yaml: what they say, check, run and leave behind."""

import importlib
import json
import os
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from proxytune.files import ROOT, write_jsonl
from proxytune.records import Metric
from proxytune.results.paper_tables_other import table14

TARGETS = yaml.safe_load((ROOT / "conf" / "paper.yaml").read_text())


@pytest.fixture(scope="module")
def scripts():
    """scripts/reproduce.py and its checks."""
    folder = str(ROOT / "scripts")
    sys.path.insert(0, folder)
    yield SimpleNamespace(
        reproduce=importlib.import_module("reproduce"),
        checks=importlib.import_module("reproduce_checks"),
    )
    sys.path.remove(folder)


@pytest.fixture
def ran(scripts, monkeypatch, tmp_path):
    """The commands that a call would have run; all succeed but those named in `ran.fail`."""
    found = SimpleNamespace(commands=[], fail=())

    def run(command):
        line = shlex.join(command[1:])
        found.commands.append(line)
        return not any(word in line for word in found.fail)

    made = tmp_path / "made"
    made.touch()
    monkeypatch.setattr(scripts.reproduce, "_run", run)
    monkeypatch.setattr(scripts.reproduce, "_made", lambda name, pocket: [made])
    monkeypatch.setattr(scripts.reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(scripts.checks.Checker, "check", lambda self, steps: (steps, []))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return found


@pytest.mark.thinned(1)
@pytest.mark.parametrize("pocket", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_every_step_is_a_command_that_composes(scripts, name, pocket):
    from hydra import compose, initialize_config_dir

    from proxytune.config import schema
    from proxytune.training import config as train_config

    schema.register()
    train_config.register()
    steps = scripts.reproduce.steps_of(TARGETS[name], pocket=pocket)
    for step in steps:
        script, *overrides = shlex.split(step.command)
        assert (ROOT / script).is_file()
        if script.startswith("scripts/bench"):
            continue
        entry = "config" if script == "run.py" else "train"
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            first = [o if "=[" in o else o.split(",")[0] for o in overrides if o != "-m"]
            cfg = compose(entry, first)
        if pocket and entry == "run":
            assert cfg.paper.size == "pocket" and not cfg.needs.gpu_memory_gb
    script, *rest = shlex.split(TARGETS[name]["render"])
    assert (ROOT / script).is_file()
    assert rest[-1] == name.removeprefix("table").removeprefix("fig")


def test_the_points_of_a_sweep_have_folders_of_their_own():
    for group in ({"": TARGETS["fig2"]["pocket"]}, TARGETS["fig2"]["steps"]):
        for steps in group.values():
            assert all(shlex.split(step)[-1].endswith("_alpha${alpha}") for step in steps)


def test_a_size_leaves_the_others_out(scripts):
    steps = scripts.reproduce.steps_of(TARGETS["table5"], pocket=False, size="13B")
    assert len(steps) == 6 and not any("70b" in step.command for step in steps)
    both = scripts.reproduce.steps_of(TARGETS["table5"], pocket=False)
    assert len({s.command for s in both}) == len(both) == 10  # the small experts once


def test_a_step_that_fails_stops_its_targets_and_no_others(scripts, ran, capsys):
    ran.fail = ("experiment=pocket_black_box",)
    with pytest.raises(SystemExit) as stopped:
        scripts.reproduce.main(["--all", "--pocket"])
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()[-len(TARGETS) :]
    assert [line.split()[1] for line in lines] == list(TARGETS)
    (bad,) = [line for line in lines if not line.startswith("ok")]
    assert bad.startswith("NO  table7   failed: `python run.py experiment=pocket_black_box`")
    assert ran.commands.count("run.py experiment=pocket") == 1  # five targets rest on it
    assert not any("--table 7" in line for line in ran.commands)


def test_a_rendering_that_writes_nothing_is_said(scripts, ran, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(scripts.reproduce, "_made", lambda name, pocket: [tmp_path / "table2.md"])
    with pytest.raises(SystemExit):
        scripts.reproduce.main(["table2", "--pocket"])
    assert "table2.md was not written" in capsys.readouterr().out


def test_a_target_with_problems_does_not_start_unless_told_to(scripts, ran, monkeypatch, capsys):
    monkeypatch.setattr(scripts.checks.Checker, "check", lambda self, steps: (steps, ["no GPU"]))
    with pytest.raises(SystemExit):
        scripts.reproduce.main(["table2"])
    said = capsys.readouterr().out
    assert "  problem: no GPU" in said and not ran.commands
    scripts.reproduce.main(["table2", "--anyway"])
    assert ran.commands[-1] == "scripts/make_tables.py --table 2"


@pytest.mark.slow
def test_a_dry_run_speaks_in_our_own_words():
    """Neither transformers' Trainer (table5) nor alpaca_eval (table2) gets a word in."""
    done = subprocess.run(
        [sys.executable, "scripts/reproduce.py", "table2", "table5", "--size", "13B", "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"},
    )
    assert done.stderr == ""
    ours = ("table2: ", "table5: ", "  run.py ", "  scripts/", "      estimate: ", "  problem: ")
    lines = [line for line in done.stdout.splitlines() if line]
    assert [line for line in lines if not line.startswith((*ours, "NO  table"))] == []


def test_settings_go_to_every_run_and_programs_run_when_allowed(scripts, ran):
    scripts.reproduce.main(["table4", "--size", "13B", "limit=20", "--allow-code-execution"])
    first = shlex.split(ran.commands[0])
    assert first[:3] == ["run.py", "experiment=llama13b_code", "limit=20"]
    assert first[3:] == [f"task.{t}.allow_code_execution=true" for t in ("humaneval", "ds1000")]
    assert "limit=20" not in ran.commands[-1]


@pytest.mark.parametrize("words", [["table99"], [], ["limit=2"]])
def test_an_unknown_target_is_refused_with_the_known_ones(scripts, words):
    with pytest.raises(ValueError, match=r"targets are table2, .*fig3"):
        scripts.reproduce.main(words)


# -- the checks --------------------


def test_a_hub_that_answers_anything_is_there(scripts, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    quiet = type("Quiet", (BaseHTTPRequestHandler,), {"log_message": lambda *_: None})
    with HTTPServer(("127.0.0.1", 0), quiet) as server:  # every request ends in an error 501
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert scripts.reproduce.hub_answers()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not scripts.reproduce.hub_answers()
        server.shutdown()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not scripts.reproduce.hub_answers()


def lines(scripts, *commands, online=False, **needs):
    checker = scripts.checks.Checker(online)
    return checker.check([scripts.checks.Step(command, **needs) for command in commands])[1]


def test_without_the_hub_what_is_missing_is_one_line(scripts, monkeypatch, tmp_path):
    monkeypatch.setattr(scripts.checks.constants, "HF_HUB_CACHE", str(tmp_path))
    task = "task.gsm8k.path=pocket/data/test/gsm8k.jsonl"
    found = lines(
        scripts, f"run.py experiment=llama13b_gsm {task} machine=cpu triple=llama2_13b_chat"
    )
    absent = [line for line in found if "hub" in line and "GB" not in line]
    assert len(absent) == 1
    assert "cannot be reached, and not here are: meta-llama/Llama-2-13b-hf, " in absent[0]


def test_a_model_that_an_earlier_step_makes_is_not_missed(scripts, tmp_path):
    model = "pocket/models/antiexpert"
    data = "data=gsm8k data_file=pocket/data/train/gsm8k.jsonl"
    train = f"scripts/train_expert.py train=pocket model={model} {data} output_dir={tmp_path}/new"
    run = (
        f"run.py experiment=pocket_gsm systems=[expert] triple.expert.id={tmp_path}/new"
        f" output_dir={tmp_path}/run"
    )
    assert lines(scripts, train, run) == []
    (found,) = lines(scripts, run)
    assert "there is no folder" in found and str(tmp_path / "new") in found


def test_a_finished_training_needs_nothing(scripts, tmp_path):
    (tmp_path / "train.json").write_text(json.dumps({"status": "finished"}))
    train = (
        f"scripts/train_expert.py model=meta-llama/Llama-2-7b-hf data=gsm8k output_dir={tmp_path}"
    )
    assert lines(scripts, train, gpu_memory_gb=1e6, disk_gb=1e9) == []


def test_the_largest_need_is_said_once(scripts):
    found = lines(
        scripts, "scripts/bench.py", "scripts/bench.py --x", gpu_memory_gb=1e5, disk_gb=1e7
    )
    assert len(found) == 2
    assert found[0].startswith("about 100,000 GB of GPU memory are needed, ")
    assert found[1].startswith("about 10,000,000 GB are needed in ")


@pytest.mark.slow
def test_a_judges_key_and_the_leave_to_run_programs_are_asked_for(scripts, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    pocket = "run.py experiment=pocket task=[pocket_humaneval] task.pocket_humaneval"
    (found,) = lines(scripts, f"{pocket}.allow_code_execution=false")
    assert "task.pocket_humaneval.allow_code_execution=true" in found


def test_a_setting_that_does_not_exist_is_one_line(scripts):
    (found,) = lines(scripts, "run.py experiment=pocket alphaa=1")
    assert "alphaa" in found and "\n" not in found


def test_training_takes_the_cards_that_divide_its_batch(scripts, monkeypatch):
    monkeypatch.setattr(scripts.checks.torch.cuda, "device_count", lambda: 6)
    monkeypatch.setattr(scripts.checks, "memory_gb", lambda card: 80)
    train = "scripts/train_expert.py model=a/b data=gsm8k output_dir=x"
    command = scripts.reproduce._command(scripts.checks.Step(train, gpu_memory_gb=220))
    assert command[:3] == ["python", "-m", "accelerate.commands.launch"]
    assert "--use_fsdp" in command and command[command.index("--num_processes") + 1] == "4"
    small = scripts.reproduce._command(scripts.checks.Step(train, gpu_memory_gb=40))
    assert "--use_fsdp" not in small
    found = lines(scripts, train, gpu_memory_gb=400)
    assert found[0] == "about 400 GB of GPU memory are needed, 320 are here on 4 card(s)"


def test_make_knows_every_target_and_says_each_in_a_line():
    makefile = (ROOT / "Makefile").read_text()
    (line,) = [line for line in makefile.splitlines() if line.startswith("TARGETS = ")]
    assert sorted(line.split()[2:]) == sorted(TARGETS)
    for name in (*TARGETS, "paper", "pocket-paper", "report"):
        assert any(s.startswith(f"{name}:") and " ## " in s for s in makefile.splitlines()), name


def test_table_14_puts_training_times_beside_the_papers(scripts, tmp_path):
    record = {
        "status": "finished",
        "config": {"model": "meta-llama/Llama-2-7b-hf", "method": "full", "data": "gsm8k"},
        "data": {"examples": 7473},
        "steps": 117,
        "tokens": 3_000_000,
        "seconds": 7200.0,
        "devices": 4,
        "environment": {"hardware": {"gpus": ["A100"], "processor": "x"}},
    }
    pocket = record | {"config": record["config"] | {"model": "pocket/models/base"}}
    for name, each in (("a", record), ("b", pocket), ("c", record | {"status": "training"})):
        (tmp_path / "experts" / name).mkdir(parents=True)
        (tmp_path / "experts" / name / "train.json").write_text(json.dumps(each))
    table, text = table14(tmp_path, pocket=False)
    assert table["paper_hours"].tolist() == [2.58]
    assert "| 2 h 00 min | 4 x A100 | 2 h 35 min |" in text
    table, text = table14(tmp_path, pocket=True)
    assert table["model"].tolist() == ["pocket/models/base"] and "| – |" in text
    assert table14(tmp_path / "empty", pocket=False) is None


def test_figure_2_draws_one_experiment_and_its_largest_runs(scripts, tmp_path):
    make_figures = importlib.import_module("make_figures")
    for name, alpha, n, value in (
        ("llama70b_chat", 1.0, 100, 0.9),
        ("llama13b_chat", 0.5, 100, 0.5),
        ("llama13b_chat", 1.0, 20, 0.1),
        ("llama13b_chat", 1.0, 100, 0.6),
    ):
        folder = tmp_path / "runs" / f"{name}_{alpha}_{n}"
        metric = Metric("truthfulqa_open", "proxy", "true", value, n, n, ci_low=0.0, ci_high=1.0)
        write_jsonl(folder / "metrics.jsonl", [metric])
        config = {"name": name, "alpha": alpha, "paper": {"table": "2", "size": "13B"}}
        (folder / "run.json").write_text(json.dumps({"config": config}))
    make_figures.figure2(tmp_path, pocket=False)
    drawn = pd.read_csv(tmp_path / "figures" / "fig2.csv")
    assert drawn[["experiment", "alpha", "value"]].to_numpy().tolist() == [
        ["llama13b_chat", 0.5, 0.5],
        ["llama13b_chat", 1.0, 0.6],
    ]
