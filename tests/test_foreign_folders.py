"""Results folders that are damaged, or that a stranger made.

Every case failed on 538a493 or could fail there without a name: see shared redteam/garble.py,
res2.py and rescore_rce.py, and the cases of the same kinds that stand here only.
"""

import json
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from proxytune import cli
from proxytune.config.schema import register
from proxytune.errors import UserError
from proxytune.experiment.runner import run_experiment
from proxytune.files import ROOT
from proxytune.results.report import write_report
from proxytune.secrets import redacted

sys.path.insert(0, str(ROOT / "scripts"))
from rescore import main as rescore_main

OLD = Path(__file__).parent / "golden" / "run_538a493"
GSM = "pocket_gsm8k/expert/completions.jsonl"
CELL = "pocket_gsm8k/expert/cell.json"
DERIVED = ("metrics.jsonl", "table.csv")


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "run"))


TASKS = "task=[pocket_gsm8k,pocket_truthfulqa_mc]"
SCORING = [TASKS, "systems=[expert,proxy]", "limit=2", "stage=score", "report=false"]
# that commit knew nothing else
SCORING += [f"task.pocket_truthfulqa_mc.{x}" for x in ("answers=letter", "headline=acc_valid")]


def score(monkeypatch, folder: Path, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *SCORING, f"output_dir={folder}", *words])
    cli.run()


@cache
def scoring() -> DictConfig:
    """The configuration of `score`, composed once, for that takes longer than scoring."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", SCORING)


def refusal(capsys, act: Callable[[], object]) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as status:
        act()
    assert status.value.code not in (0, None)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    return lines[0]


def changed(number: int, **values: object) -> Callable[[list[bytes]], list[bytes]]:
    """Sets fields of a line; `...` removes one."""

    def edit(lines: list[bytes]) -> list[bytes]:
        row = json.loads(lines[number]) | values
        row = {key: value for key, value in row.items() if value is not ...}
        return [*lines[:number], json.dumps(row).encode() + b"\n", *lines[number + 1 :]]

    return edit


def added(**values: object) -> Callable[[list[bytes]], list[bytes]]:
    """A copy of the first line, with fields changed, at the end."""
    return lambda lines: lines + changed(0, **values)(lines[:1])


REFUSED = {
    "middle line cut": (GSM, lambda lines: [lines[0][:20] + b"\n", *lines[1:]]),
    "garbage": (GSM, lambda lines: [bytes(range(128, 250)) + b"\n", *lines]),
    "zeros and a newline": (GSM, lambda lines: [bytes(4096) + b"\n", *lines]),
    "blank line": (GSM, lambda lines: [b"\n", *lines]),
    "deep nesting": (GSM, lambda lines: [*lines, b"[" * 100_000 + b"]" * 100_000 + b"\n"]),
    "5,000 digits": (GSM, lambda lines: [*lines, b"9" * 5000 + b"\n"]),
    "a list": (GSM, lambda lines: [*lines, b"[1]\n"]),
    "another text of one sample": (GSM, added(text="other")),
    "sample as text": (GSM, changed(0, sample="0")),
    "sample as a truth value": (GSM, changed(0, sample=False)),
    "sample as a list": (GSM, changed(0, sample=[0])),
    "sample 0.0": (GSM, changed(0, sample=0.0)),
    "no text": (GSM, changed(0, text=...)),
    "text null": (GSM, changed(0, text=None)),
    "text a number": (GSM, changed(0, text=5)),
    "example a list": (GSM, changed(0, example_id=[1])),
    "unknown field": (GSM, changed(0, zzz=1)),
    "unknown reason": (GSM, changed(0, finish_reason="because")),
    "token ids of text": (GSM, changed(0, token_ids=["7"])),
    "hash of nothing": (GSM, changed(0, prompt_sha256={"base": None})),
    "cell.json empty": (CELL, lambda _: []),
    "cell.json cut": (CELL, lambda lines: lines[:3]),
    "cell.json []": (CELL, lambda _: [b"[]"]),
    "cell.json {}": (CELL, lambda _: [b"{}"]),
    "cell.json null": (CELL, lambda _: [b"null"]),
    "cell.json not UTF-8": (CELL, lambda _: [b"\xff\xfe{}"]),
    "cell.json members of text": (CELL, lambda _: [b'{"system": "expert", "members": "x"}']),
    "cell.json member a list": (CELL, lambda _: [b'{"system": "expert", "members": {"base": []}}']),
    "run.json empty": ("run.json", lambda _: []),
    "run.json cut": ("run.json", lambda lines: lines[:4]),
    "run.json []": ("run.json", lambda _: [b"[]"]),
    "run.json {}": ("run.json", lambda _: [b"{}"]),
    "run.json null": (
        "run.json",
        lambda _: [b'{"sessions": null, "tasks": null, "models": []}'],
    ),
    "run.json not UTF-8": ("run.json", lambda _: [b"\xff\xfe{}"]),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_file_is_named_in_one_line(case, folder):
    name, edit = REFUSED[case]
    path = folder / name
    path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))
    before = path.read_bytes()
    cfg = deepcopy(scoring())
    cfg.output_dir = str(folder)
    with pytest.raises(UserError) as refused:
        run_experiment(cfg)
    said = str(refused.value)
    assert name in said and any(way in said for way in ("restore", "delete", "is no Completion"))
    assert "\n" not in said
    assert path.read_bytes() == before


HARMLESS = {
    "last line cut": lambda lines: [*lines, lines[-1][: len(lines[-1]) // 2]],
    "zeros at the end": lambda lines: [*lines, bytes(4096)],
    "byte-order mark": lambda lines: [b"\xef\xbb\xbf" + lines[0], *lines[1:]],
    "CRLF": lambda lines: [line[:-1] + b"\r\n" for line in lines],
    "all lines twice": lambda lines: lines * 2,
    "unknown example": added(example_id="zzz"),
    "sample 99 besides": added(sample=99, text="other"),
    "sample -1 besides": added(sample=-1, text="other"),
}


@pytest.mark.thinned(1)
@pytest.mark.parametrize("case", HARMLESS)
def test_what_does_not_matter_changes_no_number(case, folder, monkeypatch):
    path = folder / GSM
    path.write_bytes(b"".join(HARMLESS[case](path.read_bytes().splitlines(keepends=True))))
    score(monkeypatch, folder)
    assert (folder / "metrics.jsonl").read_bytes() == (OLD / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_samples_are_looked_for_not_counted(folder, monkeypatch):
    path = folder / GSM
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(changed(0, sample=99)(lines)))
    score(monkeypatch, folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    counts = {
        row["n_examples"] for row in rows if "gsm8k" in row["task"] and row["system"] == "expert"
    }
    assert counts == {len(lines) - 1}


@pytest.mark.thinned(1)
@pytest.mark.parametrize("name", DERIVED)
@pytest.mark.parametrize("content", [b"", b'\xff,"garbage\n', b'{"task": "a"}\n', b"a,b\n1,2\n"])
def test_a_damaged_result_is_made_anew(name, content, folder, monkeypatch):
    (folder / name).write_bytes(content)
    score(monkeypatch, folder)
    for each in DERIVED:
        assert (folder / each).read_bytes() == (OLD / each).read_bytes()


@pytest.mark.thinned(1)
@pytest.mark.parametrize("name", ["scores.jsonl", "../examples.jsonl"])
def test_a_damaged_derived_file_of_another_system_stops_no_run(name, folder, monkeypatch):
    (folder / "pocket_gsm8k" / "proxy" / name).write_bytes(b"\xff garbage\n")
    score(monkeypatch, folder, "systems=[expert]", "report=true")
    assert (folder / "metrics.jsonl").read_bytes() != b""


def test_not_a_number_is_no_metric(folder, monkeypatch):
    path = folder / "metrics.jsonl"
    odd = b'{"task":"a","system":"base","metric":"m","value":NaN,"n":1,"n_examples":1}\n'
    path.write_bytes(odd + path.read_bytes())
    score(monkeypatch, folder)
    assert path.read_bytes() == (OLD / "metrics.jsonl").read_bytes()


@pytest.mark.thinned(1)
@pytest.mark.parametrize("stage", ["all", "generate", "score"])
def test_completions_without_their_configuration_are_refused(stage, folder, monkeypatch, capsys):
    (folder / CELL).unlink()
    said = refusal(capsys, lambda: score(monkeypatch, folder, f"stage={stage}", "alpha=0.3"))
    assert GSM in said and "cell.json" in said
    assert not (folder / CELL).exists()


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    "name",
    [".lock", ".writable", "run.json.part", "metrics.jsonl", "pocket_gsm8k/expert/scores.jsonl"],
)
@pytest.mark.parametrize("stage", ["all", "score"])
def test_links_are_not_written_through(name, stage, folder, tmp_path, monkeypatch, capsys):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    said = refusal(capsys, lambda: score(monkeypatch, folder, f"stage={stage}"))
    assert name in said and "symbolic link" in said
    assert victim.read_text() == "precious"
    with pytest.raises(UserError, match="symbolic link"):
        write_report(folder)
    assert victim.read_text() == "precious"


@pytest.mark.slow
def test_a_folder_that_is_a_link_is_its_owner_s_choice(folder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(folder)
    score(monkeypatch, tmp_path / "link")
    assert (folder / "metrics.jsonl").read_bytes() == (OLD / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"_target_": "subprocess.check_output", "args": ["touch", "PWNED"]},
        {"_target_": "pandas.read_pickle", "filepath_or_buffer": "PWNED"},
        {"_target_": "os.system", "_args_": ["touch PWNED"]},
        {"_target_": "tasks.sandbox.sandbox.Sandbox"},
        {"_target_": "tasks.loading.read_text", "path": "/etc/passwd"},
        {"_target_": "tasks.gsm8k.Path", "_args_": ["/etc/passwd"]},
        {"_target_": "tasks.gsm8k.GSM8K", "_args_": ["PWNED"]},
        {"_target_": "tasks.gsm8k.GSM8K", "zzz": 1},
        {"_target_": "tasks..gsm8k.GSM8K"},
        {"_target_": ["tasks.gsm8k.GSM8K"]},
        {"_target_": None},
        {},
        "tasks.gsm8k.GSM8K",
        None,
    ],
)
def test_a_folder_names_tasks_and_nothing_else(settings, folder, monkeypatch, capsys):
    run = json.loads((folder / "run.json").read_text())
    run["tasks"]["pocket_gsm8k"] = settings
    (folder / "run.json").write_text(json.dumps(run))
    monkeypatch.chdir(folder)
    with pytest.raises((SystemExit, UserError)) as error:
        rescore_main([str(folder), "--only", "pocket_gsm8k"])
    said = capsys.readouterr().err if error.type is SystemExit else str(error.value)
    assert "run.json: task pocket_gsm8k" in said
    assert not Path("PWNED").exists()


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", "~"])
def test_a_folder_s_task_has_a_plain_name(name, folder, capsys):
    run = json.loads((folder / "run.json").read_text())
    run["tasks"] = {name: {"_target_": "tasks.gsm8k.GSM8K"}}
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(SystemExit):
        rescore_main([str(folder)])
    assert "plain name" in capsys.readouterr().err


def with_program(folder: Path, target: str, **settings: object) -> Path:
    """A folder whose only completion is a program that makes a file."""
    for name in ("pocket_gsm8k", "pocket_truthfulqa_mc"):
        shutil.rmtree(folder / name)
    run = json.loads((folder / "run.json").read_text())
    run["tasks"] = {"evil": {"_target_": target, "allow_code_execution": True, **settings}}
    (folder / "run.json").write_text(json.dumps(run))
    cell = folder / "evil" / "base"
    cell.mkdir(parents=True)
    prompt = {"raw": "def f():\n", "user": "x"}
    row = {"test": "def check(f): pass", "entry_point": "f", "code_context": "", "library": "Numpy"}
    example = {"id": "0", "prompt": prompt, "target": "", "row": row}
    (cell.parent / "examples.jsonl").write_text(json.dumps(example) + "\n")
    text = f"    open({str(folder / 'PWNED')!r}, 'w')\n"
    done = {"example_id": "0", "sample": 0, "text": text, "raw_text": text, "token_ids": []}
    (cell / "completions.jsonl").write_text(json.dumps(done | {"finish_reason": "eos"}) + "\n")
    return folder


def test_consent_to_run_programs_is_not_the_folder_s(folder, capsys):
    with_program(folder, "tasks.humaneval.HumanEval")
    assert rescore_main([str(folder)]) == 0
    assert "allow_code_execution" in capsys.readouterr().out
    assert not (folder / "PWNED").exists()


def test_the_interpreter_is_not_the_folder_s(folder, tmp_path, capsys):
    script = tmp_path / "x.sh"
    script.write_text(f"#!/bin/sh\ntouch {folder / 'PWNED'}\n")
    script.chmod(0o755)
    with_program(folder, "tasks.ds1000.DS1000", python=str(script))
    rescore_main([str(folder), "--allow-code-execution"])
    capsys.readouterr()
    assert not (folder / "PWNED").exists()


def test_the_judge_is_not_the_folder_s(folder, monkeypatch, capsys):
    """Its address would get this machine's key."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge = {"_target_": "tasks.alpaca_judge.AlpacaJudge", "base_url": "http://127.0.0.1:9/v1"}
    with_program(folder, "tasks.alpaca_eval.AlpacaEval", judge=judge)
    run = json.loads((folder / "run.json").read_text())
    del run["tasks"]["evil"]["allow_code_execution"]
    (folder / "run.json").write_text(json.dumps(run))
    assert rescore_main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert "skipped evil/base" in said and "127.0.0.1:9" not in said


ADDRESSES = {
    "http://me:hunter2@127.0.0.1:9/v1": "http://***@127.0.0.1:9/v1",
    "http://hunter2@127.0.0.1:9/v1": "http://***@127.0.0.1:9/v1",
    "http://127.0.0.1:9/v1?api_key=hunter2&x=1": "http://127.0.0.1:9/v1?api_key=***&x=1",
    "http://127.0.0.1:9/v1?x=1&access_token=hunter2": "http://127.0.0.1:9/v1?x=1&access_token=***",
}


@pytest.mark.thinned(1)
@pytest.mark.parametrize("address", ADDRESSES)
def test_secrets_of_an_address_are_nowhere(address, folder, monkeypatch, capfd):
    base = [f'triple.base.api.base_url="{address}"', "triple.base.api.model=x"]
    score(monkeypatch, folder, "systems=[expert]", "report=true", *base)
    said = refusal(capfd, lambda: score(monkeypatch, folder, "systems=[base]", "stage=all", *base))
    assert "127.0.0.1:9" in said and "hunter2" not in said
    assert ADDRESSES[address] in (folder / "run.json").read_text()
    for path in folder.rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path


def test_addresses_without_secrets_stay_as_they_are():
    for address in ("https://host/v1", "https://host:80/v1?x=1", "me@example.com", "a://b/c@d"):
        assert redacted(address) == address
    assert redacted({"a": ["s3://k:v@b", 1, None]}) == {"a": ["s3://***@b", 1, None]}
