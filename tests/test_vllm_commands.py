"""The commands with engine=vllm: a run that is killed and resumed, and both servers over HTTP.

Marked `vllm`; see tests/test_vllm.py. One engine runs at a time.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import proxytune
from tests import vllm_cases
from tests.test_vllm import ON_CPU, ROOT, V2
from tests.test_vllm import pytestmark as _marks

pytestmark = _marks
TASKS = "task=[pocket_gsm8k,pocket_truthfulqa_mc]"
PROMPTS = list(vllm_cases.TEXTS[:4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("family")
    vllm_cases.family(place)
    roles = ("base", "expert", "antiexpert")
    lines = [f"{role}: {{id: {place / role}, dtype: float32}}\n" for role in roles]
    (place / "mine.yaml").write_text("".join(lines))
    return place


def command(folder: Path, *arguments: str) -> list[str]:
    """An experiment on the family."""
    given = [f"triple={folder / 'mine.yaml'}", "name=t", "report=false", "machine=cpu", TASKS]
    given += ["decoding=default", "limit=4", "decoding.max_new_tokens=12", "systems=[base,proxy]"]
    given += ["decoding.temperature=0.7", "decoding.n=2"]
    return [sys.executable, str(ROOT / "run.py"), *given, *arguments]


def completions(output: Path) -> dict[str, list[Any]]:
    """Cell -> its completions, sorted."""
    return {
        str(path.parent.relative_to(output)): sorted(
            (json.loads(line) for line in path.read_text().splitlines()),
            key=lambda each: (each["example_id"], each["sample"]),
        )
        for path in sorted(output.glob("*/*/completions.jsonl"))
    }


def test_a_killed_run_resumes_to_what_our_own_engine_writes(folder, tmp_path):
    output, env = tmp_path / "run", os.environ | ON_CPU
    given = command(folder, "engine=vllm", f"output_dir={output}", "decoding.batch_size=1")
    first = subprocess.Popen(given, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None:
        if sum(map(len, completions(output).values())) >= 3:
            first.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    first.wait()
    assert first.returncode == -signal.SIGKILL, "it ended before it was killed"
    again = subprocess.run(given, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    own = subprocess.run(
        command(folder, f"output_dir={tmp_path / 'own'}"), env=env, capture_output=True, text=True
    )
    assert own.returncode == 0, own.stderr[-2000:]
    assert completions(output) == completions(tmp_path / "own")
    cell = json.loads((output / "pocket_gsm8k" / "proxy" / "cell.json").read_text())
    assert cell["engine"]["name"] == "vllm" and cell["engine"]["version"]
    other = subprocess.run(
        command(folder, f"output_dir={output}"), env=env, capture_output=True, text=True
    )
    assert other.returncode == 1 and "another configuration" in other.stderr


def test_the_pocket_family_writes_what_our_own_engine_writes(tmp_path):
    """Its members read prompts of their own, so the runner is V2."""
    given = [sys.executable, str(ROOT / "run.py"), "report=false", "machine=cpu", "limit=4"]
    given += ["decoding=default", "task=[pocket_gsm8k,pocket_truthfulqa_mc]"]
    for engine, env in (("own", {}), ("vllm", V2)):
        line = [*given, f"engine={engine}", f"output_dir={tmp_path / engine}"]
        done = subprocess.run(line, env=os.environ | ON_CPU | env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert len(completions(tmp_path / "own")) == 8
    assert completions(tmp_path / "vllm") == completions(tmp_path / "own")
    tables = [(tmp_path / engine / "table.csv").read_bytes() for engine in ("own", "vllm")]
    assert tables[0] == tables[1]


@contextmanager
def started(given: list[str], said: str, env: dict[str, str]) -> Iterator[str]:
    """A server as a process; yields what the pattern `said` finds in its output."""
    with subprocess.Popen(
        given, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        lines = []
        try:
            assert server.stdout is not None
            for line in server.stdout:
                lines.append(line)
                if found := re.search(said, line):
                    yield found[1]
                    break
            else:
                pytest.fail(f"no server: {''.join(lines[-20:])}")
        finally:
            server.send_signal(signal.SIGINT)
            server.stdout and server.stdout.close()
            server.wait(timeout=600)


@contextmanager
def listening(given: list[str], health: str, env: dict[str, str], log: Path) -> Iterator[None]:
    """A server as a process that answers at `health`: vLLM's prints no line once it listens."""
    with log.open("w") as output:
        server = subprocess.Popen(given, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        while not answers(health):
            assert server.poll() is None, f"no server: {log.read_text()[-3000:]}"
            time.sleep(0.5)
        yield
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=600)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def own_texts(folder: Path, **settings: Any) -> list[str]:
    own = proxytune.load(**vllm_cases.specs(folder))
    return [each.text for each in own.generate(PROMPTS, max_new_tokens=12, **settings)]


def client(url: str) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=url, api_key="x", max_retries=2, timeout=600)


def bad_request(call: Any) -> str:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_our_server(folder, runner):
    given = [sys.executable, "-c", "from proxytune.cli import main; main()", "serve"]
    given += ["engine=vllm", f"triple={folder / 'mine.yaml'}", "port=0", "model=m"]
    env = os.environ | ON_CPU | (V2 if runner == "V2" else {})
    with started(given, r"serving m on (http\S+)", env) as url:
        ask = client(url).completions.create
        same = {"model": "m", "prompt": PROMPTS, "max_tokens": 12}
        assert [c.text for c in ask(**same, temperature=0).choices] == own_texts(folder)
        drawn = ask(**same, temperature=0.8, seed=5, logprobs=2, echo=True)
        assert all(choice.logprobs.token_logprobs for choice in drawn.choices)
        half: Any = {"extra_body": {"alpha": 0.5}}
        words = bad_request(lambda: ask(**same, extra_body={"alpha": "much"}))
        assert "alpha" in words
        if runner == "V1":
            assert "VLLM_USE_V2_MODEL_RUNNER" in bad_request(lambda: ask(**same, **half))
        else:
            assert [c.text for c in ask(**same, temperature=0, **half).choices]
        assert "vocabulary" in bad_request(lambda: ask(model="m", prompt=[[3, 9999]]))


def test_plain_vllm_with_the_printed_command(folder):
    given = ["-c", "from proxytune.cli import main; main()", "vllm-command", "model=m"]
    given += [f"triple={folder / 'mine.yaml'}", "port=8137"]
    env = os.environ | ON_CPU | {"VLLM_LOGGING_LEVEL": "INFO"}
    printed = subprocess.run([sys.executable, *given], env=env, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr[-2000:]
    switch, program, *rest = shlex.split(printed.stdout.splitlines()[-1])
    assert switch == "VLLM_USE_V2_MODEL_RUNNER=0"
    name, _, value = switch.partition("=")
    line = [sys.executable if program == "python" else program, *rest]
    with listening(line, "http://127.0.0.1:8137/health", env | {name: value}, folder / "log"):
        ask = client("http://127.0.0.1:8137/v1").completions.create
        same = {"model": "m", "max_tokens": 12, "temperature": 0}
        ids: Any = {"extra_body": {"return_token_ids": True}}
        got = [ask(prompt=each, **same, **ids).choices[0].token_ids for each in PROMPTS]
        own = proxytune.load(**vllm_cases.specs(folder))
        wanted = own.generate(PROMPTS, max_new_tokens=12)
        assert [[i for i in each if i != 2] for each in got] == [w.token_ids for w in wanted]
        for bad in ({"alpha": "much"}, {"alpha": 0.5}, {"expert_prompt": [3, 4]}):
            words = bad_request(lambda b=bad: ask(prompt="x", extra_body={"vllm_xargs": b}, **same))
            assert next(iter(bad)) in words
