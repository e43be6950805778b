"""The points of a sweep as jobs of SLURM, or as processes of this machine, by submitit.

A line on the terminal says where each job writes, and one more each time that its state changes.
What a job itself prints is in the folder `.submitit`. SLURM (or a test) sends SIGUSR2 before it
takes a job's machine away: the job is queued again, and goes on where it stopped.
"""
# pyright: reportMissingImports=false

import os
import pickle
import subprocess
import sys
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, filter_overrides
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import (
    BaseSubmititLauncher,
    LocalLauncher,
    SlurmLauncher,
)

from proxytune.cli.sweep import point_folder
from proxytune.config import given
from proxytune.errors import UserError
from proxytune.secrets import redacted
from proxytune.terminal import visible

_LOOK_S = 2.0  # between two looks at the jobs
_GRACE_S = 30.0  # between the end of a job and its result on a shared file system
_BASE = ("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes")
_MISTAKE = 1  # the exit code of `guard.guarded` for a person's mistake


class _Jobs(BaseSubmititLauncher):
    """What both kinds of jobs have in common."""

    def __call__(self, sweep_overrides: list[str], *more: Any) -> JobReturn | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One job.

        Returns:
            None for a person's mistake, which the job has explained.
        """
        sys.argv[:] = ["run.py", *sweep_overrides]  # for run.json
        given.FILES.update(self._files)
        try:
            returned = super().__call__(sweep_overrides, *more)
            returned.return_value  # noqa: B018  raises what the job raised, for its own log
            return returned
        except SystemExit as end:
            if end.code == _MISTAKE:
                return None
            raise  # submitit ends a job that is queued again

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Submits a job for each point, says what becomes of it, and waits for all.

        Raises:
            UserError: a job has failed; the others have ended.
        """
        self._files = dict(given.FILES)
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        executor = self._executor()
        with _without("HYDRA_FULL_ERROR"):  # set for this process; a job's mistake is a line
            jobs = executor.map_array(
                self,
                [list(each) for each in job_overrides],
                ["hydra.sweep.dir"] * len(numbers),
                numbers,
                [f"job_id_for_{number}" for number in numbers],
                [Singleton.get_state()] * len(numbers),
            )
        for job, overrides in zip(jobs, job_overrides, strict=True):
            words, folder = " ".join(filter_overrides(overrides)), self._folder(overrides)
            _say(f"job {job.job_id}: {words} writes to {folder}")
        try:
            self._wait(jobs)
        except KeyboardInterrupt:
            _say(f"the jobs go on; {self._way_to_end(jobs)}")
            raise
        returned = [_result(job) for job in jobs]
        failed = [job for job, each in zip(jobs, returned, strict=True) if each is None]
        if failed:
            why = _last_line(failed[0].paths.stderr)
            raise UserError(
                f"{len(failed)} of {len(jobs)} jobs failed; job {failed[0].job_id}: {why} "
                f"(all that it said: {failed[0].paths.stderr})"
            )
        return [each for each in returned if each is not None]

    def _executor(self) -> Any:
        import submitit

        given_here = dict(self.params)
        folder = given_here.pop("submitit_folder")
        timeouts = {f"{self._EXECUTOR}_max_num_timeout": given_here.pop("max_num_timeout")}
        try:
            executor = submitit.AutoExecutor(folder=folder, cluster=self._EXECUTOR, **timeouts)
        except RuntimeError as error:  # no sbatch
            raise UserError(f"hydra/launcher={self._EXECUTOR}: {error}") from error
        named = {"name": given_here.pop("name")} | {
            key if key in _BASE else f"{self._EXECUTOR}_{key}": value
            for key, value in given_here.items()
        }
        executor.update_parameters(**named)
        return executor

    def _folder(self, overrides: Sequence[str]) -> Path:
        """The results folder of a point."""
        assert self.config is not None and self.hydra_context is not None
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        return point_folder(str(cfg.output_dir), cfg.hydra.job.override_dirname)

    def _wait(self, jobs: Sequence[Any]) -> None:
        """Waits for all jobs; says each change of a job's state."""
        said: dict[str, str] = {}
        gone: dict[str, float] = {}
        while True:
            states = self._states(jobs)
            for job in jobs:
                state = "FINISHED" if job.paths.result_pickle.exists() else states.get(job.job_id)
                if state is None:
                    since = gone.setdefault(job.job_id, time.monotonic())
                    state = "LOST" if time.monotonic() - since > _GRACE_S else said.get(job.job_id)
                else:
                    gone.pop(job.job_id, None)
                if state is not None and said.get(job.job_id) != state:
                    said[job.job_id] = state
                    _say(f"job {job.job_id}: {state}")
            if all(said.get(job.job_id) in ("FINISHED", "LOST") for job in jobs):
                return
            time.sleep(_LOOK_S)

    @abstractmethod
    def _states(self, jobs: Sequence[Any]) -> dict[str, str]:
        """Job id -> state, of those that the queue knows."""

    @abstractmethod
    def _way_to_end(self, jobs: Sequence[Any]) -> str:
        """How a person ends the jobs."""


class SlurmJobs(_Jobs, SlurmLauncher):
    """Jobs of SLURM."""

    def _states(self, jobs: Sequence[Any]) -> dict[str, str]:
        """By squeue: sacct needs a database, which not every cluster has."""
        ids = ",".join(job.job_id for job in jobs)
        listed = ["squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={ids}"]
        said = subprocess.run(listed, capture_output=True, text=True, check=False).stdout
        return dict(line.split(maxsplit=1) for line in said.splitlines() if " " in line)

    def _way_to_end(self, jobs: Sequence[Any]) -> str:
        return f"`scancel {jobs[0].job_id.partition('_')[0]}` ends them"


class LocalJobs(_Jobs, LocalLauncher):
    """Processes of this machine."""

    def _states(self, jobs: Sequence[Any]) -> dict[str, str]:
        return {job.job_id: "RUNNING" for job in jobs if job.state == "RUNNING"}

    def _way_to_end(self, jobs: Sequence[Any]) -> str:
        return "`kill` ends them"


@contextmanager
def _without(name: str) -> Iterator[None]:
    """Leaves a variable out of the environment that jobs inherit."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


def _say(line: str) -> None:
    """To the terminal: the launcher runs before logging is set up."""
    print(visible(redacted(line)), file=sys.stderr, flush=True)


def _result(job: Any) -> JobReturn | None:
    """What a job returned; None if it made no result, or explained a mistake."""
    if not job.paths.result_pickle.exists():
        return None
    outcome, result = _loaded(job.paths.result_pickle)
    return result if outcome == "success" else None


def _loaded(path: Path) -> tuple[str, Any]:
    with path.open("rb") as file:
        return pickle.load(file)


def _last_line(path: Path) -> str:
    """The last line that a job wrote to stderr that is not submitit's own."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return "it wrote nothing"
    lines = [line for line in lines if line.strip() and not line.startswith("submitit ")]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it wrote nothing"])[-1]
