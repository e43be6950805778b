"""run.json, checked when it is read: a results folder may be damaged, or a stranger's."""

from pathlib import Path
from typing import Any, TypedDict

from proxytune.files import read_json


class Place(TypedDict, total=False):
    """The table and the column of the paper whose numbers stand beside a run's."""

    table: str
    size: str


class Config(TypedDict, total=False):
    """The configuration of the latest session, as far as pages and tables read it."""

    name: str
    root: str
    alpha: float
    paper: Place | None
    systems: list[str]
    task: dict[str, Any]
    triple: dict[str, Any]


class Git(TypedDict, total=False):
    """The commit of a session."""

    commit: str | None
    dirty: bool | None


class Hardware(TypedDict, total=False):
    """The machine of a session."""

    gpus: list[str]


class Replica(TypedDict, total=False):
    """Where a replica ran; see `experiment.replicas.Ran.to_dict`."""

    places: list[str]


class Session(TypedDict, total=False):
    """One call of run.py."""

    command: list[str]
    git: Git
    hardware: Hardware
    replicas: list[Replica]
    versions: dict[str, str]


class RunJson(TypedDict, total=False):
    """What readers of run.json rely on; other keys may hold anything."""

    name: str
    config: Config
    sessions: list[Session]
    tasks: dict[str, Any]
    datasets: dict[str, str]
    other_datasets: dict[str, str]
    models: dict[str, dict[str, Any]]


def read_run_json(folder: Path) -> dict[str, Any]:
    """The run.json of a results folder; it has a configuration, and may lack everything else.

    Raises:
        UserError: it is damaged.
        OSError: it cannot be read.
    """
    return read_json(folder / "run.json", RunJson, config=Config)
