"""Several results folders side by side: what their settings differ in, and what can be compared.

Two things are read of each cell (one system on one task). Its *settings*, from cell.json: what its
completions depend on; they may differ, for that is what a comparison of runs shows. And what was
*asked*: which examples, and how they are scored; numbers of runs that were asked different things
are not comparable.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from proxytune.errors import UserError
from proxytune.files import check_plain_files, read_json, read_jsonl
from proxytune.hashes import FACTS, sha256_json
from proxytune.records import Example, Score
from proxytune.results.comparison import AVERAGE, caveat, is_number, records, shown, systems_of
from proxytune.results.folder import read_csv
from proxytune.results.run_json import read_run_json
from proxytune.roles import MEMBERS

Settings = Mapping[str, Any]  # name -> a number, a text, a truth value or None

# settings of a task that change no score (`tasks.base.Task.of_this_machine` has their meanings)
_OF_MACHINE = {"path", "workers", "memory_bytes", "python", "allow_code_execution"}


@dataclass(frozen=True)
class Run:
    """A scored run.

    Attributes:
        name: what the page calls it.
        folder: its results folder.
        caveat: why its numbers are not comparable with the paper's; "" if they are.
        systems: those of its table.
        rows: task -> its rows of the comparison, the headline first.
    """

    name: str
    folder: Path
    caveat: str
    systems: list[str]
    rows: dict[str, list[dict[str, Any]]]
    _cells: dict[tuple[str, str], Settings] = field(default_factory=dict)

    def settings(self, task: str, system: str) -> Settings:
        """What a cell's completions depend on, by the names that the command line uses.

        A cell without a cell.json has settings of its own, which no other cell has.

        Raises:
            UserError: cell.json is damaged.
        """
        if (task, system) not in self._cells:
            path = self.folder / task / system / "cell.json"
            self._cells[task, system] = (
                _settings(read_json(path, members=dict, system=str), system)
                if path.is_file()
                else {"settings": f"unknown ({self.name} has no cell.json)"}
            )
        return self._cells[task, system]

    def has(self, task: str, system: str) -> bool:
        """Whether the table has a number of this system on this task."""
        return is_number(self.rows.get(task, [{}])[0].get(system))

    def examples(self, task: str) -> list[Example]:
        """The examples that were asked.

        Raises:
            UserError: the file is damaged.
        """
        return list(read_jsonl(self.folder / task / "examples.jsonl", Example))

    def scores(self, task: str, system: str) -> list[Score]:
        """The scores of a cell.

        Raises:
            UserError: the file is damaged.
        """
        return list(read_jsonl(self.folder / task / system / "scores.jsonl", Score))

    @cached_property
    def _run_json(self) -> dict[str, Any]:
        return read_run_json(self.folder)

    def asked(self, task: str) -> dict[str, Any]:
        """What has to agree before the numbers of two runs on a task may be compared."""
        examples = self.examples(task)
        head = self.rows[task][0]
        limit = head.get("limit")
        found: dict[str, Any] = {
            "examples": len(examples) or int(head["n_examples"]),
            "limit": int(limit) if is_number(limit) else "none",
            "which examples (SHA-256)": sha256_json([[e.id, vars(e.prompt)] for e in examples])[
                :12
            ],
            "metric": f"{head['metric']}{' (%)' if head['percent'] else ''}",
        }
        found |= {f"task.{task}.{key}": each for key, each in self._scoring(task).items()}
        for system in self.systems:
            found |= _once(found, "dataset (SHA-256)", self._dataset(task, system))
            found |= _once(found, "judges", self._judges(task, system))
            scored = {score.example_id for score in self.scores(task, system)}
            if examples and scored and scored != {example.id for example in examples}:
                found[f"{system}: scored"] = f"{len(scored)} of {len(examples)} examples"
        return found

    def _scoring(self, task: str) -> dict[str, Any]:
        """How the task scores: its settings, without those of decoding and of the machine."""
        tasks = self._run_json.get("tasks")
        settings = tasks.get(task) if isinstance(tasks, Mapping) else None
        kept = settings.items() if isinstance(settings, Mapping) else ()
        return {
            str(key): leaf(value)
            for key, value in kept
            if key not in _OF_MACHINE and not isinstance(value, Mapping) and value is not None
        }

    def _dataset(self, task: str, system: str) -> str | None:
        path = self.folder / task / system / "cell.json"
        cell = read_json(path, system=str) if path.is_file() else {}
        version = cell.get("dataset", cell.get("lm_eval"))  # of lm-eval: its version and settings
        return None if version is None else sha256_json(version)[:12]

    def _judges(self, task: str, system: str) -> str | None:
        path = self.folder / task / system / "judges.json"
        return leaf(read_json(path)) if path.is_file() else None


def _once(found: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A fact that a task's systems share; several values, if they do not."""
    if value is None or found.get(name) == value:
        return {}
    return {name: f"{found[name]}, {value}" if name in found else value}


def read_run(folder: Path, name: str) -> Run:
    """Reads a results folder.

    Args:
        folder: of a run that has been scored.
        name: what the page calls it.

    Raises:
        UserError: it has no table yet, a damaged file, or a symbolic link.
    """
    check_plain_files(folder)
    if not is_scored(folder):
        raise UserError(
            f"{folder} has no table.csv and run.json; score the run first (stage=score)"
        )
    table = read_csv(folder / "table.csv")
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in records(shown(table)):
        if row["task"] == AVERAGE:
            continue
        rows.setdefault(row["task"], []).append(row)
    for of_task in rows.values():
        of_task.sort(key=lambda row: not row["headline"])
    return Run(name, folder, caveat(table), systems_of(table), rows)


def is_scored(folder: Path) -> bool:
    """Whether a folder holds a run with a table."""
    return (folder / "table.csv").is_file() and (folder / "run.json").is_file()


def points_of(sweep: Path) -> list[Path]:
    """The scored runs in the folders of a sweep's points, in the order of their names."""
    return sorted(each for each in sweep.iterdir() if each.is_dir() and is_scored(each))


# -- settings --------------------


def leaf(value: Any) -> Any:
    """A value as it is, or a list or an object as one text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _settings(cell: Mapping[str, Any], system: str) -> dict[str, Any]:
    """The leaves of a cell.json under the names of the command line, without what was asked."""
    found: dict[str, Any] = {}
    for key, value in cell.items():
        if key == "members":
            for role, member in value.items():
                name = MEMBERS.get(system, {}).get(role, role)
                found |= _leaves(member, f"triple.{name}")
        elif key == "seed":  # of a task that runs itself
            found["decoding.seed"] = leaf(value)
        elif key not in ("system", "dataset", "lm_eval"):
            found |= _leaves(value, key)
    return found


def _leaves(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: leaf(value)}
    found: dict[str, Any] = {}
    for key, each in value.items():
        found |= _leaves(each, f"{name}.{key}")
    return found


def differing(cells: Sequence[Settings]) -> list[str]:
    """The settings in which cells of one task and system differ.

    A fact that only some of them know (the hash of weights, of a machine that has them) is no
    difference, and neither is a branch's name where all know the commit.
    """
    found = []
    for name in dict.fromkeys(name for cell in cells for name in cell):
        values = {_plain(cell.get(name)) for cell in cells}
        if len(values) > 1 and not (_is_fact(name) and any(c.get(name) is None for c in cells)):
            found.append(name)
    redundant = {
        f"{role}{setting}"
        for fact, setting in FACTS.items()
        for role in {name.rpartition(".")[0] + "." for cell in cells for name in cell}
        if setting and all(cell.get(f"{role}{fact}") is not None for cell in cells)
    }
    # another model has other weights: its name says enough
    for name in found:
        if name.endswith((".id", ".adapter")):
            redundant |= {f"{name.rpartition('.')[0]}.{fact}" for fact in FACTS}
    return [name for name in found if name not in redundant]


def _is_fact(name: str) -> bool:
    return name.rpartition(".")[2] in FACTS or name == "engine.version"


def _plain(value: Any) -> Any:
    """A value by which two settings are compared: 1 and 1.0 are one, True is not 1."""
    return (isinstance(value, bool), value)


def all_differing(runs: Sequence[Run], tasks: Iterable[str]) -> list[str]:
    """The settings in which any cell of these runs differs from its counterpart in another run."""
    found: dict[str, None] = {}
    for task in tasks:
        for system in MEMBERS:
            cells = [run.settings(task, system) for run in runs if run.has(task, system)]
            found |= dict.fromkeys(differing(cells))
    return list(found)


def value_in(run: Run, tasks: Iterable[str], name: str) -> str:
    """A setting of a run as people read it; several values where its tasks differ in it."""
    cells = [run.settings(t, s) for t in tasks for s in MEMBERS if run.has(t, s)]
    values = dict.fromkeys(as_text(cell[name]) for cell in cells if name in cell)
    return ", ".join(values) or "–"


def as_text(value: Any) -> str:
    """A setting's value as the command line would give it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


# -- what can be compared --------------------


@dataclass(frozen=True)
class Group:
    """Runs that were asked the same on a task, so that their numbers can be compared."""

    task: str
    runs: list[Run]
    asked: dict[str, Any]


def groups(runs: Sequence[Run], task: str) -> list[Group]:
    """The runs of a task in groups of those that were asked the same; the largest first."""
    found: dict[str, Group] = {}
    for run in runs:
        if task in run.rows:
            asked = run.asked(task)
            found.setdefault(sha256_json(asked), Group(task, [], asked)).runs.append(run)
    return sorted(found.values(), key=lambda group: -len(group.runs))


def tells_apart(of_task: Sequence[Group]) -> list[str]:
    """What the groups of a task were asked differently; of a smaller limit, its number alone."""
    names = dict.fromkeys(name for group in of_task for name in group.asked)
    found = [n for n in names if len({_plain(g.asked.get(n)) for g in of_task}) > 1]
    if "examples" in found:
        found = [name for name in found if not name.startswith("which examples")]
    return found
