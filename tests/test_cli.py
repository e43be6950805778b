"""The command line on the pocket models: resuming after kill -9, and mistakes in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import pytest

from proxytune import cli
from proxytune.experiment import runner
from proxytune.experiment.identity import sole_writer
from proxytune.files import ROOT
from tests.commands import call

TINY = ["task=[pocket_triviaqa,pocket_truthfulqa_open]", "limit=12", "report=false"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """run.py in this process."""
    return call(cli.run, *arguments)


def run_outside(*arguments: str) -> subprocess.CompletedProcess[str]:
    """run.py in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment)


def completions(folder: Path) -> dict[str, list[dict]]:
    """Cell -> its completions in the order of examples, whatever order they finished in.

    The trace is left out: the last digit of a probability depends on the rows beside it.
    """
    return {
        str(path.parent.relative_to(folder)): sorted(
            (json.loads(line) | {"extra": None} for line in path.read_text().splitlines()),
            key=lambda c: (c["example_id"], c["sample"]),
        )
        for path in sorted(folder.glob("*/*/completions.jsonl"))
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = run(*TINY, f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_writes_completions_scores_metrics_table_and_provenance(whole):
    assert len(completions(whole)) == 8  # two tasks x four systems
    assert all(len(found) == 12 for found in completions(whole).values())
    run_json = json.loads((whole / "run.json").read_text())
    assert run_json["config"]["limit"] == 12
    assert set(run_json["models"]) == {"base", "expert", "antiexpert", "tuned"}
    assert "limit=12" in (whole / "table.md").read_text()
    assert len((whole / "metrics.jsonl").read_text().splitlines()) >= 8


@pytest.mark.slow
def test_kill_9_then_the_same_command_gives_the_same_completions(whole, tmp_path):
    process = subprocess.Popen(
        command(*TINY, f"output_dir={tmp_path}", "decoding.batch_size=2"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if sum(len(found) for found in _lines(tmp_path).values()) >= 15:
            break
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = sum(len(found) for found in _lines(tmp_path).values())
    assert 0 < before < 96, "the kill came too early or too late to show anything"
    done = run_outside(*TINY, f"output_dir={tmp_path}", "decoding.batch_size=2")
    assert done.returncode == 0, done.stderr
    assert completions(tmp_path) == completions(whole)


def _lines(folder: Path) -> dict[str, list[bytes]]:
    paths = folder.glob("*/*/completions.jsonl")
    return {str(path): path.read_bytes().splitlines() for path in paths}


@pytest.mark.slow
def test_scoring_again_needs_no_model(whole):
    before = (whole / "metrics.jsonl").read_text()
    done = run(*TINY, f"output_dir={whole}", "stage=score")
    assert done.returncode == 0, done.stderr
    assert (whole / "metrics.jsonl").read_text() == before


def test_another_configuration_s_folder_is_refused_with_the_difference(whole):
    before = completions(whole)
    done = run(*TINY, f"output_dir={whole}", "alpha=0.5")
    assert done.returncode == 1
    assert "alpha: 1.0 -> 0.5" in done.stderr
    assert completions(whole) == before


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["experiment=pokcet"], "unknown experiment 'pokcet' (did you mean pocket?)"),
        (["task=[pocket_gsm9k]"], "unknown task 'pocket_gsm9k'"),
        (["triple.base.id=/no/such/folder"], "/no/such/folder"),
        (["systems=[bas]"], "unknown system ['bas']"),
        (["limit=0"], "limit=0"),
        (["systems=[]"], "no system chosen"),
        (["alpha=nan"], "alpha=nan"),
        (["decoding.batch_size=0"], "decoding.batch_size=0"),
        (["machine.device=cuda:99"], "no device cuda:99 here"),
        (["machine.device=gpu"], "'gpu' is no device"),
        # on 538a493 there are no penalties, and the temperature is found out after a base is served
        (["decoding.min_p=2"], "task pocket_gsm8k: min_p must be from 0 to 1"),
        (["decoding.repetition_penalty=0"], "repetition_penalty must be from 0.001 to 1000"),
        (["decoding.presence_penalty=-2.5"], "presence_penalty must be from -2 to 2"),
        (["decoding.ignore_eos=perhaps"], "ignore_eos"),
        (["triple=pocket_api", "decoding.temperature=-1"], "temperature must be 0"),
        (
            ["triple=pocket_api", "decoding.repetition_penalty=1.2"],
            "a server shows log-probabilities only",
        ),
        (["task.pocket_gsm8k.pth=x"], "no key 'pth' (did you mean path?)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(arguments, said, tmp_path):
    done = run(*arguments, f"output_dir={tmp_path}")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in done.stderr


def test_a_mistake_of_the_command_itself_is_one_line():
    done = run_outside("experiment=pokcet")
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown experiment 'pokcet' (did you mean pocket?)")
    assert done.stderr.count("\n") == 1


def test_an_experiment_without_a_name_is_asked_for_one():
    done = run("experiment=none", "triple=pocket", "task=[pocket_gsm8k]", "limit=1")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("give one: name=my_triple")


def test_a_triple_without_one_vocabulary_names_the_first_differing_token(tmp_path):
    tokenizer = json.loads((ROOT / "pocket/models/expert/tokenizer.json").read_text())
    other = tmp_path / "expert"
    other.mkdir()
    for path in (ROOT / "pocket/models/expert").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    vocabulary = tokenizer["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.get)
    first, second = words[100], words[101]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = run(f"triple.expert.id={other}", f"output_dir={tmp_path / 'out'}")
    assert done.returncode == 1
    assert f"token {vocabulary[second]}" in done.stderr


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    target = tmp_path / "file"
    target.write_text("a file where a folder should be")
    done = run(*TINY, f"output_dir={target}/run")
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1
    assert f"output_dir={target}/run cannot be made" in done.stderr


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    options = ["-t", "tmpfs", "-o", "size=96k", "tmpfs", str(mount)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        done = run_outside("task=[pocket_triviaqa]", "report=false", f"output_dir={mount}/run")
        assert done.returncode == 1
        assert "the disk is full" in done.stderr
        assert "Traceback" not in done.stderr
        for path in mount.glob("run/*/*/completions.jsonl"):
            assert all(json.loads(line) for line in path.read_text().splitlines())
    finally:
        subprocess.run(["umount", str(mount)], check=True)


# -- lm-evaluation-harness --------------------


@pytest.mark.slow
def test_a_task_of_lm_eval_stands_in_the_same_table_and_is_scored_again_without_a_model(tmp_path):
    arguments = [
        "task=[lm_eval/tiny_choice,pocket_triviaqa]",
        f"task.lm_eval_tiny_choice.include_path={ROOT}/tests/lm_eval_tasks",
        "systems=[base,proxy]",
        "limit=3",
        f"output_dir={tmp_path}",
    ]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert "lm_eval_tiny_choice" in table and "pocket_triviaqa" in table
    assert "What is the capital of France?" in (
        tmp_path / "lm_eval_tiny_choice" / "examples.jsonl"
    ).read_text(encoding="utf-8")
    metrics = (tmp_path / "metrics.jsonl").read_text()
    again = run(*arguments, "stage=score", "report=false")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


@pytest.mark.slow
def test_a_run_of_some_tasks_keeps_the_metrics_of_the_others(whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    before = set((folder / "metrics.jsonl").read_text().splitlines())
    done = run("task=[pocket_triviaqa]", *TINY[1:], f"output_dir={folder}", "stage=score")
    assert done.returncode == 0, done.stderr
    assert set((folder / "metrics.jsonl").read_text().splitlines()) == before
    assert "pocket_truthfulqa_open" in (folder / "table.md").read_text()


@pytest.mark.slow
def test_a_stopped_run_can_be_scored_and_says_that_it_is_unfinished(whole, tmp_path):
    folder = tmp_path / "stopped"
    shutil.copytree(whole, folder)
    path = folder / "pocket_triviaqa" / "proxy" / "completions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    done = run(*TINY, f"output_dir={folder}", "stage=score")
    assert done.returncode == 0, done.stderr
    said = "unfinished, not comparable (pocket_triviaqa: proxy 5 of 12)"
    assert said in (folder / "table.md").read_text()
    for left in folder.glob("*/*/completions.jsonl"):
        left.write_text("")
    done = run(*TINY, f"output_dir={folder}", "stage=score")
    assert done.returncode == 1
    assert "no example" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_belongs_to_one_generating_process(tmp_path):
    with sole_writer(tmp_path):
        done = run(*TINY, f"output_dir={tmp_path}")
    assert done.returncode == 1
    assert f"another process is generating into {tmp_path}" in done.stderr
    with sole_writer(tmp_path):
        pass  # the first one left it free


@pytest.mark.slow
def test_scoring_where_the_models_are_not_keeps_what_is_known_of_them(tmp_path):
    models, folder = tmp_path / "models", tmp_path / "run"
    shutil.copytree(ROOT / "pocket" / "models", models)
    members = [f"triple.{role}.id={models / role}" for role in ("base", "expert", "antiexpert")]
    arguments = [*members, "systems=[base,proxy]", "task=[pocket_truthfulqa_mc]", "limit=2"]
    arguments += ["report=false", f"output_dir={folder}"]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    known = json.loads((folder / "run.json").read_text())["models"]
    assert known["expert"]["weights"] and known["expert"]["chat_template_sha256"]
    shutil.rmtree(models)
    done = run(*arguments, "stage=score")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "run.json").read_text())["models"] == known
    done = run(*arguments, "stage=score", "alpha=0.5")
    assert "alpha: 1.0 -> 0.5" in done.stderr


@pytest.mark.slow
def test_the_points_of_a_sweep_are_named_by_what_changes_completions(tmp_path):
    sweep = ["-m", "alpha=0.5,1.0", "task=[pocket_truthfulqa_mc]", "systems=[proxy]", "limit=1"]
    sweep += ["stage=generate", f"output_dir={tmp_path}"]
    for more in (["decoding.batch_size=1"], ["tracking.project=p", "machine.threads=1"]):
        done = run(*sweep, *more)
        assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"alpha={a},systems=[proxy],task=[pocket_truthfulqa_mc]" for a in (0.5, 1.0)]


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ([], ("2", "13B")),
        (["triple.base.id=/models/llama-2-13b-hf"], ("2", "13B")),
        (["alpha=0.5"], None),
        (["decoding.temperature=0.7"], None),
        (["triple=qwen25_7b"], None),
    ],
)
def test_the_papers_numbers_stand_beside_the_papers_experiment_only(changes, place):
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose("config", ["experiment=llama13b_chat", *changes])
    assert runner.paper_place(cfg) == place


@pytest.mark.slow
def test_no_quantization_is_one_configuration_however_it_is_said(whole):
    done = run(*TINY, f"output_dir={whole}", "stage=score", "+triple.base.quantization={}")
    assert done.returncode == 0, done.stderr
