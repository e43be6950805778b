"""Hydra's launcher of jobs (`hydra/launcher=slurm`, `local_jobs`); submitit comes when it runs."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from proxytune.errors import need

_NAMES = {"slurm": "slurm", "local": "local_jobs"}  # executor -> its file of conf/hydra/launcher


class JobsLauncher(Launcher):
    """Runs each point of a sweep as a job; `hydra_plugins._jobs` does it.

    Args:
        executor: "slurm" or "local".
        params: of hydra-submitit-launcher.
    """

    def __init__(self, executor: str, **params: Any) -> None:
        self._executor = executor
        self._params = params
        self._jobs: Launcher | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Refuses to go on without the extra."""
        for package in ("submitit", "hydra_plugins.hydra_submitit_launcher"):
            need(package, "slurm", f"hydra/launcher={_NAMES[self._executor]}")
        from hydra_plugins._jobs import LocalJobs, SlurmJobs

        kind = {"slurm": SlurmJobs, "local": LocalJobs}[self._executor]
        jobs: Launcher = kind(**self._params)
        jobs.setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self._jobs = jobs

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Submits the jobs and waits for them."""
        assert self._jobs is not None
        return self._jobs.launch(job_overrides, initial_job_idx)
