"""20 kills of a run at random moments: nothing is lost, and nothing is written twice.

One folder, one command; the command is killed while it starts, generates, scores and reports, and
started again. They were tried on 538a493, which lost nothing; the test holds it so.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proxytune.files import ROOT

KILLS = 20
RUN = ["task=[pocket_triviaqa,pocket_truthfulqa_open]", "limit=12", "machine=cpu"]

# Everything is imported once; each line of stdin is one run in a child process.
RUNS = """
import os, sys
from proxytune.cli.guard import guarded
import hydra
from proxytune.config.schema import register
import proxytune.experiment.runner as runner
import transformers, torch

register()
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        with hydra.initialize_config_dir(config_dir=sys.argv[1], version_base="1.3"):
            cfg = hydra.compose("config", overrides=line.split())
            guarded(lambda: runner.run_experiment(cfg))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    """Runs of one process that has everything imported."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUNS, str(ROOT / "conf")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert self._said() == "ready"

    def run(self, folder: Path, kill_after: float | None = None) -> int:
        """Runs the command; the exit code, -9 where the kill came before its end."""
        assert self._process.stdin is not None
        print(*RUN, f"output_dir={folder}", file=self._process.stdin, flush=True)
        child = int(self._said())
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # the run had ended before
                os.kill(child, signal.SIGKILL)
        return int(self._said())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def completions(folder: Path) -> dict[str, list[dict]]:
    """Cell -> its completions, in the order of examples, without the trace's last digits."""
    return {
        str(path.parent.relative_to(folder)): sorted(
            (json.loads(line) | {"extra": None} for line in path.read_text().splitlines()),
            key=lambda each: (each["example_id"], each["sample"]),
        )
        for path in sorted(folder.glob("*/*/completions.jsonl"))
    }


def whole_lines(folder: Path) -> dict[str, list[bytes]]:
    paths = folder.glob("*/*/completions.jsonl")
    return {str(path): path.read_bytes().split(b"\n")[:-1] for path in paths}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 20 runs of some 5 seconds, on an idle machine
def test_twenty_kills_lose_nothing_and_repeat_nothing(tmp_path):
    runs = Runs()
    try:
        began = time.monotonic()
        assert runs.run(tmp_path / "whole") == 0
        seconds = time.monotonic() - began
        choose = random.Random(7)
        kills, folder, fresh = 0, tmp_path / "k0", 0
        while kills < KILLS:
            before = whole_lines(folder)
            # mostly early: every further run has less to do
            code = runs.run(folder, choose.uniform(0.05, 1) * seconds)
            kills += code == -signal.SIGKILL
            for path, lines in before.items():
                assert whole_lines(folder)[path][: len(lines)] == lines
            if code != -signal.SIGKILL or not choose.randrange(6):
                assert runs.run(folder) == 0
                assert completions(folder) == completions(tmp_path / "whole")
                for name in ("metrics.jsonl", "table.csv"):
                    theirs = (tmp_path / "whole" / name).read_bytes()
                    assert (folder / name).read_bytes() == theirs
                fresh += 1
                folder = tmp_path / f"k{fresh}"
        assert runs.run(folder) == 0
        assert completions(folder) == completions(tmp_path / "whole")
    finally:
        runs.close()
