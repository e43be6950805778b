"""The points of a sweep as jobs: on a real SLURM of one node where its packages are installed.

538a493 has no such launcher (`hydra/launcher=slurm` is unknown there).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from proxytune import cli
from proxytune.files import ROOT
from tests.commands import call

needs_submitit = pytest.mark.skipif(
    find_spec("submitit") is None, reason="pip install 'proxytune[slurm]'"
)
needs_slurm = pytest.mark.skipif(
    not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))) or os.getuid() != 0,
    reason="needs root, and Debian's slurmctld, slurmd, slurm-client and munge",
)
RUN = ["task=[pocket_triviaqa]", "systems=[expert,proxy]", "report=false", "stage=generate",
       "machine.threads=1"]  # fmt: skip


def start(tmp_path: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), "-m", *RUN, f"output_dir={tmp_path}/out",
         f"hydra.sweep.dir={tmp_path}", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob("completions.jsonl"))


def samples(folder: Path) -> dict[str, list[tuple[str, int, str]]]:
    return {
        str(path.parent.relative_to(folder)): sorted(
            (row["example_id"], row["sample"], row["raw_text"])
            for row in map(json.loads, path.read_text().splitlines())
        )
        for path in sorted(folder.rglob("completions.jsonl"))
    }


def wait_until(what) -> None:
    deadline = time.monotonic() + 600
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("launcher", ["slurm", "local_jobs"])
def test_without_the_extra_the_line_says_what_to_install(launcher, monkeypatch, tmp_path):
    monkeypatch.setattr("proxytune.errors.find_spec", lambda name: None)
    done = call(cli.run, "-m", f"hydra/launcher={launcher}", f"output_dir={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: hydra/launcher={launcher}")
    assert "proxytune[slurm]" in done.stderr and len(done.stderr.splitlines()) == 1


@needs_submitit
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_local_job_that_is_pre_empted_goes_on(tmp_path):
    process = start(tmp_path, "hydra/launcher=local_jobs", "limit=60", "decoding.batch_size=1")
    wait_until(lambda: lines(tmp_path / "out") > 3 or process.poll() is not None)
    assert process.poll() is None and lines(tmp_path / "out") < 120
    (job,) = {
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if str(tmp_path).encode() in path.read_bytes()
        and b"submitit.core._submit" in path.read_bytes()
    }
    os.kill(job, signal.SIGUSR2)
    said = process.communicate(timeout=900)[1]
    assert process.returncode == 0, said
    assert lines(tmp_path / "out") == 120
    sessions = json.loads(next(tmp_path.rglob("run.json")).read_text())["sessions"]
    assert len(sessions) == 2 and sessions[0]["command"][0] == "run.py"


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    """A SLURM of one node, unless one runs already."""
    ours = subprocess.run(["sinfo"], capture_output=True).returncode != 0
    if ours:
        pytest.skip("no SLURM answers here: start one (docs/scale.md)")
    yield


@needs_submitit
@needs_slurm
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_array_of_slurm_that_is_pre_empted_and_queued_again(slurm, tmp_path):
    process = start(
        tmp_path, "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "alpha=0.5,1.5",
        "limit=60", "decoding.batch_size=1",
    )  # fmt: skip
    wait_until(lambda: lines(tmp_path / "out") > 3 or process.poll() is not None)
    assert process.poll() is None and lines(tmp_path / "out") < 240
    jobs = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i"], capture_output=True, text=True
    ).stdout.split()
    for job in jobs:
        subprocess.run(["scancel", "--signal=USR2", job], check=True)
    said = process.communicate(timeout=1200)[1]
    assert process.returncode == 0, said
    for point in ("alpha=0.5", "alpha=1.5"):
        assert f"{point}" in said
    assert said.count(": FINISHED") == 2
    found = samples(tmp_path / "out")
    assert {len(each) for each in found.values()} == {60} and len(found) == 4
    assert all(len({s[:2] for s in each}) == 60 for each in found.values())


@needs_submitit
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_s_mistake_is_the_sweep_s_line(tmp_path):
    process = start(tmp_path, "hydra/launcher=local_jobs", "limit=0")
    said = process.communicate(timeout=500)[1]
    assert process.returncode == 1
    last = said.splitlines()[-1]
    assert last.startswith("error: 1 of 1 jobs failed") and "limit=0: it must be at least 1" in last
