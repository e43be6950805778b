"""What stands in the way of a step of scripts/reproduce.py, found out before anything runs."""

import json
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
from proxytune.experiment.checks import check_before_models
from proxytune.files import ROOT
from proxytune.roles import MEMBERS
from proxytune.training import config as train_config
from proxytune.training import train

RUN = "run.py"
TRAIN = "scripts/train_expert.py"


@dataclass(frozen=True)
class Step:
    """One command of a target, and what it takes (estimates).

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
        """What it takes, in words; "" for nothing worth saying."""
        if not (self.gpu_memory_gb or self.disk_gb or self.gpu_hours):
            return ""
        return (
            f"estimate: {self.gpu_memory_gb:,g} GB of GPU memory, {self.disk_gb:,g} GB of disk, "
            f"up to {self.gpu_hours:g} A100 hours"
        )


@dataclass
class Checker:
    """Checks targets in the order in which they would run.

    Attributes:
        online: whether the model hub can be reached.
        made: folders that the steps checked so far will make.
    """

    online: bool
    made: set[Path] = field(default_factory=set)

    def check(self, steps: Sequence[Step]) -> tuple[list[Step], list[str]]:
        """A target's steps with their needs filled in, and what stands in its way, a line each."""
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
            except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
                found.problems.append(explain(error))
            filled.append(step)
        return filled, found.lines()

    def _train(self, step: Step, overrides: list[str], found: "_Found") -> Step:
        cfg = OmegaConf.to_object(_compose("train", overrides))
        assert isinstance(cfg, train_config.TrainConfig)
        output = Path(ROOT, cfg.output_dir)
        self.made.add(output)
        record = output / train.RECORD
        if record.is_file() and json.loads(record.read_text()).get("status") == "finished":
            return Step(step.command)
        found.needs(step, ROOT, cards=training_cards())
        if not self._absent(cfg.model, cfg.revision, found):
            found.refusal(train.check, cfg)
        return step

    def _run(self, step: Step, overrides: list[str], found: "_Found") -> Step:
        # a sweep's points differ in values that need no check: its first one stands for all
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
        # each model for itself, so that every missing licence is named; then their vocabulary
        good = [not found.refusal(_check, cfg, [role]) for role in there]
        if all(good) and len(there) == len(roles):
            found.refusal(_check, cfg, list(cfg.systems))
        for name in map(str, cfg.task):
            if cfg.stage != "generate":
                self._of_task(_check_task, cfg, name, f"the judge of {name}", found)
            self._of_task(_load_data, cfg, name, f"the data of {name}", found)
        return step

    def _of_task(self, check: Any, cfg: DictConfig, name: str, what: str, found: "_Found") -> None:
        """Notes what a task lacks; without the hub, all that only it could give in one line."""
        try:
            check(cfg, name)
        except (ValueError, OSError) as error:
            # a key or a leave that is missing has no cause; a failed download has
            if self.online or error.__cause__ is None:
                found.problems.append(explain(error))
            else:
                found.absent.append(what)

    def _to_be_made(self, member: DictConfig) -> bool:
        places = [Path(ROOT, str(place)) for place in (member.id, member.adapter) if place]
        return any(place in self.made and not place.exists() for place in places)

    def _absent(self, model: str, revision: str | None, found: "_Found") -> bool:
        """Whether a model is on the hub alone, and that cannot be reached; notes it."""
        if self.online or model.count("/") != 1 or Path(ROOT, model).exists():
            return False
        if isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
            return False
        found.absent.append(model)
        return True


@dataclass
class _Found:
    """What stands in the way of one target; the largest need speaks for the smaller ones."""

    problems: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    gpu_memory_gb: dict[int, float] = field(default_factory=dict)  # by cards in use
    disk_gb: dict[Path, float] = field(default_factory=dict)

    def needs(
        self, step: Step, folder: Path, models: Sequence[str] = (), *, cards: int | None = None
    ) -> None:
        """Notes a step's memory on so many cards (all), and what a disk lacks of these models."""
        if cards is None:
            cards = torch.cuda.device_count()
        self.gpu_memory_gb[cards] = max(self.gpu_memory_gb.get(cards, 0), step.gpu_memory_gb)
        need = step.disk_gb - _cached_gb(models)
        self.disk_gb[folder] = max(self.disk_gb.get(folder, 0), need)

    def refusal(self, check: Any, *arguments: Any) -> bool:
        """Notes what a check refuses; returns whether it did."""
        try:
            check(*arguments)
        except (ValueError, OSError) as error:
            self.problems.append(explain(error))
            return True
        return False

    def lines(self) -> list[str]:
        """Everything, each once."""
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
    """A GPU's memory."""
    return torch.cuda.get_device_properties(card).total_memory / 1e9


def training_cards() -> int:
    """How many of the GPUs share out the paper's batch of 128, four examples at a time."""
    cards = torch.cuda.device_count()
    return max((n for n in (1, 2, 4, 8, 16, 32) if n <= cards), default=0)


def _compose(name: str, overrides: Sequence[str]) -> DictConfig:
    schema.register()
    train_config.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(name, list(overrides))


def _check(cfg: DictConfig, systems: list[str]) -> None:
    """The settings and models of some systems."""
    part = cfg.copy()
    part.systems, part.stage = systems, "generate"
    check_before_models(part)


def _check_task(cfg: DictConfig, name: str) -> None:
    """The judge, the key, the leave to run programs that one task needs."""
    part = cfg.copy()
    part.stage, part.task = "score", {name: cfg.task[name]}
    check_before_models(part)


def _load_data(cfg: DictConfig, name: str) -> None:
    """One task's data."""
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
