"""The tasks of a results folder that somebody else may have made, for scoring it again.

A stranger's run.json may choose a task of this package and say how it scores. What this machine
opens, runs, asks or pays for comes from this machine's own settings (conf/task/NAME.yaml), and
consent to run programs from the command line.
"""

import importlib
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from proxytune.errors import UserError
from proxytune.files import ROOT, check_name, shipped
from tasks.base import SelfRunTask, Task

_TARGET = re.compile(r"(tasks\.[a-z][a-z0-9_]*)\.([A-Z][A-Za-z0-9_]*)")


def stored_task(
    name: str, settings: Any, *, allow_code_execution: bool
) -> Task | type[SelfRunTask]:
    """Makes the task that a run.json names.

    Args:
        name: the task's name in the folder.
        settings: run.json's entry; anything may stand there.
        allow_code_execution: whether the person who scores lets programs run in the sandbox.

    Returns:
        The task; of a task that scores while it asks, the class.

    Raises:
        UserError: the entry names no task of this package, or has a setting that the task lacks.
    """
    kind = task_class(name, settings)
    if issubclass(kind, SelfRunTask):
        return kind
    own = _own_settings(name, settings["_target_"])
    known = {field.name for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    given = {key: value for key, value in settings.items() if key != "_target_"}
    if unknown := sorted(map(str, given.keys() - known)):
        raise UserError(f"run.json: task {name} has an unknown setting {unknown[0]!r}")
    theirs = {key: value for key, value in given.items() if key not in kind.of_this_machine}
    # how answers are read is the folder's: what it does not say is as the class has it
    kept = kind.of_this_machine | {"paper_dataset"}
    merged = {key: value for key, value in own.items() if key in kept} | theirs
    if "allow_code_execution" in known:
        merged["allow_code_execution"] = allow_code_execution
    try:
        return kind(**merged)
    except TypeError as error:
        raise UserError(f"run.json: task {name} cannot be made ({error})") from error


def task_class(name: str, settings: Any) -> type[Task] | type[SelfRunTask]:
    """The class of the task that a run.json names; see `stored_task`.

    Raises:
        UserError: the entry names no task of this package.
    """
    check_name("a task of run.json", name)
    if not isinstance(settings, Mapping):
        raise UserError(f"run.json: task {name} is {settings!r}, not its settings")
    target = settings.get("_target_")
    match = _TARGET.fullmatch(target) if isinstance(target, str) else None
    folder = Path(__file__).parent
    if match is None or not (folder / f"{match[1].partition('.')[2]}.py").is_file():
        raise UserError(
            f"run.json: task {name} is {target!r}; only the tasks of this package are scored"
        )
    found = getattr(importlib.import_module(match[1]), match[2], None)
    if not (isinstance(found, type) and issubclass(found, (Task, SelfRunTask))):
        raise UserError(f"run.json: task {name} is {target!r}, which is no task")
    return found


def _own_settings(name: str, target: str) -> dict[str, Any]:
    """What this machine's own conf/task/NAME.yaml says of the task, judges made; {} without one."""
    path = shipped("conf") / "task" / f"{name}.yaml"
    if not path.is_file():
        return {}
    config: Any = OmegaConf.merge({"root": str(ROOT)}, OmegaConf.load(path))
    settings = config.get(name)
    if settings is None or settings.get("_target_") != target:
        return {}
    return {
        key: instantiate(value, _convert_="all") if OmegaConf.is_config(value) else value
        for key, value in settings.items()
        if key not in ("_target_", "decoding")
    }
