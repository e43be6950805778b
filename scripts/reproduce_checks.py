"""Checks the steps of scripts/reproduce.py before anything runs."""

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, scan_cache_dir, try_to_load_from_cache
from huggingface_hub.errors import CacheNotFound
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from proxytune.cli.guard import explain
from proxytune.config import schema
from proxytune.errors import UserError
from proxytune.experiment.checks import check_before_models
from proxytune.files import ROOT, read_json
from proxytune.roles import MEMBERS
from proxytune.training import config as train_config
from proxytune.training import train

RUN = "run.py"
TRAIN = "scripts/train_expert.py"


@dataclass(frozen=True)
class Step:
    """One command of a target, and estimates of the hardware and time that it needs.

    Attributes:
        command: a script of this repository and its arguments.
        gpu_memory_gb: of all GPUs together.
        disk_gb: of downloads and checkpoints.
        gpu_hours: on A100-80GB cards.
    """

    command: str
    gpu_memory_gb: float = 0
    disk_gb: float = 0
    gpu_hours: float = 0

    def needs(self) -> str:
        """The estimates in words; "" where there are none."""
        if not (self.gpu_memory_gb or self.disk_gb or self.gpu_hours):
            return ""
        return (
            f"estimate: {self.gpu_memory_gb:,g} GB of GPU memory, {self.disk_gb:,g} GB of disk, "
            f"up to {self.gpu_hours:g} A100 hours"
        )


@dataclass
class Checker:
    """Checks targets in the order in which they will run.

    Attributes:
        online: whether the model hub can be reached.
        made: the folders that the steps checked so far will make.
    """

    online: bool
    made: set[Path] = field(default_factory=set)

    def check(self, steps: Sequence[Step]) -> tuple[list[Step], list[str]]:
        """Checks one target.

        Returns:
            Its steps, with the estimates of their experiments, and one line for each problem.
        """
        found = _Found()
        filled = []
        for step in steps:
            script, *overrides = shlex.split(step.command)
            try:
                if script == RUN:
                    step = self._run(step, [o for o in overrides if o != "-m"], found)
                elif script == TRAIN:
                    step = self._train(step, overrides, found)
                else:
                    found.needs(step, ROOT)
            except (UserError, OSError, HydraException, OmegaConfBaseException) as error:
                found.problems.append(explain(error))
            filled.append(step)
        return filled, found.lines()

    def _train(self, step: Step, overrides: list[str], found: "_Found") -> Step:
        cfg = OmegaConf.to_object(_compose("train", overrides))
        assert isinstance(cfg, train_config.TrainConfig)
        output = Path(ROOT, cfg.output_dir)
        self.made.add(output)
        record = output / train.RECORD
        if record.is_file() and read_json(record).get("status") == "finished":
            return Step(step.command)
        found.needs(step, ROOT, cards=training_cards())
        if not self._absent(cfg.model, cfg.revision, found):
            found.refusal(train.check, cfg)
        return step

    def _run(self, step: Step, overrides: list[str], found: "_Found") -> Step:
        # The points of a sweep differ in values that need no check, so only the first is checked.
        cfg = _compose("config", [o if "=[" in o else o.split(",")[0] for o in overrides])
        need = cfg.needs
        step = Step(step.command, need.gpu_memory_gb, need.disk_gb, need.gpu_hours)
        roles = dict.fromkeys(r for s in cfg.systems for r in MEMBERS[s].values())
        members = {r: cfg.triple[r] for r in roles if cfg.triple[r]}
        ids = [m.id for m in members.values()]
        if cfg.machine.device == "cpu":
            step = replace(step, gpu_memory_gb=0)
        found.needs(step, Path(constants.HF_HUB_CACHE), ids)
        there = [
            role
            for role, member in members.items()
            if not self._to_be_made(member) and not self._absent(member.id, member.revision, found)
        ]
        # Each model alone, so that every missing licence is named; then their common vocabulary.
        good = [not found.refusal(_check, cfg, [role]) for role in there]
        if all(good) and len(there) == len(roles):
            found.refusal(_check, cfg, list(cfg.systems))
        for name in map(str, cfg.task):
            if cfg.stage != "generate":
                self._of_task(_check_task, cfg, name, f"the judge of {name}", found)
            self._of_task(_load_data, cfg, name, f"the data of {name}", found)
        return step

    def _of_task(self, check: Any, cfg: DictConfig, name: str, what: str, found: "_Found") -> None:
        """Notes what a task lacks. Without the hub, all missing downloads share one line."""
        try:
            check(cfg, name)
        except (UserError, OSError) as error:
            # A failed download has a cause; a missing key or permission has none.
            if self.online or error.__cause__ is None:
                found.problems.append(explain(error))
            else:
                found.absent.append(what)

    def _to_be_made(self, member: DictConfig) -> bool:
        """Whether an earlier step will make a model or its adapter."""
        places = [Path(ROOT, str(place)) for place in (member.id, member.adapter) if place]
        return any(place in self.made and not place.exists() for place in places)

    def _absent(self, model: str, revision: str | None, found: "_Found") -> bool:
        """Whether a model is only on the hub, which cannot be reached; notes it."""
        if self.online or model.count("/") != 1 or Path(ROOT, model).exists():
            return False
        if isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
            return False
        found.absent.append(model)
        return True


@dataclass
class _Found:
    """The problems of one target; of all its steps' needs, the largest counts."""

    problems: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    gpu_memory_gb: dict[int, float] = field(default_factory=dict)  # by cards in use
    disk_gb: dict[Path, float] = field(default_factory=dict)

    def needs(
        self, step: Step, folder: Path, models: Sequence[str] = (), *, cards: int | None = None
    ) -> None:
        """Notes the memory that a step needs, and the disk space for models not in the cache.

        Args:
            step: with its estimates.
            folder: the disk's.
            models: hub ids.
            cards: how many GPUs share the memory; None for all.
        """
        if cards is None:
            cards = torch.cuda.device_count()
        self.gpu_memory_gb[cards] = max(self.gpu_memory_gb.get(cards, 0), step.gpu_memory_gb)
        need = step.disk_gb - _cached_gb(models)
        self.disk_gb[folder] = max(self.disk_gb.get(folder, 0), need)

    def refusal(self, check: Any, *arguments: Any) -> bool:
        """Runs a check and notes its error; returns whether there was one."""
        try:
            check(*arguments)
        except (UserError, OSError) as error:
            self.problems.append(explain(error))
            return True
        return False

    def lines(self) -> list[str]:
        """All problems, each once, a line each."""
        lines = []
        for cards, need in self.gpu_memory_gb.items():
            here = sum(memory_gb(card) for card in range(cards))
            if here < need:
                on = f" on {cards} card(s)" if cards else ""
                lines.append(
                    f"about {need:,g} GB of GPU memory are needed, {here:,.0f} are here{on}"
                )
        for folder, need in self.disk_gb.items():
            free = _free_gb(folder)
            if free < need:
                lines.append(f"about {need:,.0f} GB are needed in {folder}, {free:,.0f} are free")
        if self.absent:
            names = ", ".join(dict.fromkeys(self.absent))
            lines.append(f"the model hub cannot be reached, and not here are: {names}")
        return [*lines, *dict.fromkeys(self.problems)]


def memory_gb(card: int) -> float:
    """A GPU's memory, in GB."""
    return torch.cuda.get_device_properties(card).total_memory / 1e9


def training_cards() -> int:
    """How many of the GPUs can share the paper's batch of 128 evenly, four examples at a time."""
    cards = torch.cuda.device_count()
    return max((n for n in (1, 2, 4, 8, 16, 32) if n <= cards), default=0)


def _compose(name: str, overrides: Sequence[str]) -> DictConfig:
    schema.register()
    train_config.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(name, list(overrides))


def _check(cfg: DictConfig, systems: list[str]) -> None:
    """Checks the settings and models of some systems."""
    part = cfg.copy()
    part.systems, part.stage = systems, "generate"
    check_before_models(part)


def _check_task(cfg: DictConfig, name: str) -> None:
    """Checks what one task needs: its judge, its key, the permission to run programs."""
    part = cfg.copy()
    part.stage, part.task = "score", {name: cfg.task[name]}
    check_before_models(part)


def _load_data(cfg: DictConfig, name: str) -> None:
    """Loads one task's data."""
    instantiate(cfg.task[name], _convert_="all").examples()


def _free_gb(folder: Path) -> float:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 1e9


def _cached_gb(models: Sequence[str]) -> float:
    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return 0.0
    return sum(repo.size_on_disk for repo in repos if repo.repo_id in models) / 1e9
