"""One (system, task) cell of an experiment: what to generate, where, and what it rests on."""

import copy
import dataclasses
import fcntl
import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from proxytune import provenance
from proxytune.config.schema import to_dict
from proxytune.files import read_jsonl, write_json, write_jsonl
from proxytune.records import (
    Completion,
    Decoding,
    Example,
    Metric,
    Score,
)
from proxytune.roles import MEMBERS, ORDER

log = logging.getLogger(__name__)

DECODING_OVERRIDES = ("max_new_tokens", "temperature", "top_p", "top_k", "n")

_API_IDENTITY = ("model", "top_logprobs", "endpoint", "foreign_tokenizer")


@dataclasses.dataclass
class Cell:
    """One system on one task: what to generate, and where it is kept."""

    task: Any
    task_name: str
    system: str
    examples: list[Example]
    decoding: Decoding
    folder: Path
    identity: dict[str, Any]

    @property
    def total(self) -> int:
        """How many steps its progress bar has."""
        return len(self.examples)

    @property
    def infos(self) -> Any:
        """Metric -> how it is shown."""
        return self.task.metrics

    @property
    def completions_path(self) -> Path:
        """Where finished completions are appended."""
        return self.folder / "completions.jsonl"

    def completions(self) -> dict[str, dict[int, Completion]]:
        """The stored completions: example id -> sample -> completion."""
        found: dict[str, dict[int, Completion]] = defaultdict(dict)
        for completion in read_jsonl(self.completions_path, Completion):
            found[completion.example_id][completion.sample] = completion
        return found

    def missing(self) -> list[Example]:
        """Examples that still lack a sample."""
        done = self.completions()
        return [e for e in self.examples if len(done.get(e.id, ())) < self.decoding.n]

    def score(self) -> tuple[list[Metric], list[Score]]:
        """Scores the examples that have all their completions."""
        from proxytune.results import stats

        done = self.completions()
        complete = [e for e in self.examples if len(done.get(e.id, ())) >= self.decoding.n]
        if len(complete) < len(self.examples):
            log.warning(
                "%s/%s: %d of %d examples have their completions; only they are scored",
                self.task_name,
                self.system,
                len(complete),
                len(self.examples),
            )
        texts = [[done[e.id][i].text for i in range(self.decoding.n)] for e in complete]
        scores: list[Score] = self.task.score_all(complete, texts)
        return stats.metrics(self.task_name, self.system, scores), scores


@dataclasses.dataclass
class HarnessCell:
    """One system on a task that asks and scores by itself (lm-evaluation-harness).

    The task has `identity()`, `finished(folder, limit)`, `run(generator, folder, system, ...)`
    and `result(folder)`; see `tasks.lm_eval_task.LmEvalTask`.
    """

    task: Any
    task_name: str
    system: str
    limit: int | None
    folder: Path
    identity: dict[str, Any]
    total: int = 1

    @cached_property
    def _result(self) -> Any:
        return self.task.result(self.folder)

    @property
    def infos(self) -> Any:
        """Metric -> how it is shown."""
        return self._result.infos

    def missing(self) -> list[str]:
        """The task's name, unless its result is there."""
        return [] if self.task.finished(self.folder, self.limit) else [self.task_name]

    def score(self) -> tuple[list[Metric], list[Score]]:
        """What the task itself found."""
        return self._result.metrics, self._result.scores


def make_cells(cfg: DictConfig, tasks: dict[str, Any], output: Path) -> list[Cell | HarnessCell]:
    """Every cell of a run: systems in the order in which they share models.

    Raises:
        ValueError: a dataset cannot be had, or names two examples alike.
    """
    cells: list[Cell | HarnessCell] = []
    systems = sorted(cfg.systems, key=ORDER.index)
    for name, task in tasks.items():
        if hasattr(task, "run"):
            seed = {"seed": cfg.decoding.seed}
            cells += [
                HarnessCell(
                    task=task,
                    task_name=name,
                    system=system,
                    limit=cfg.limit,
                    folder=output / name / system,
                    identity=task.identity() | seed | _system_identity(cfg, system),
                )
                for system in systems
            ]
            continue
        examples = task.examples()
        if len({e.id for e in examples}) != len(examples):
            raise ValueError(f"task {name}: two examples share an id")
        dataset = {"sha256": provenance.dataset_sha256(examples), "examples": len(examples)}
        overrides = {k: cfg.decoding[k] for k in DECODING_OVERRIDES if cfg.decoding[k] is not None}
        decoding = dataclasses.replace(task.decoding, **overrides)
        shown = examples[: cfg.limit]
        write_jsonl(output / name / "examples.jsonl", shown)
        for system in systems:
            cells.append(
                Cell(
                    task=task,
                    task_name=name,
                    system=system,
                    examples=shown,
                    decoding=decoding,
                    folder=output / name / system,
                    identity={"dataset": dataset}
                    | _system_identity(cfg, system)
                    | {"decoding": _decoding_identity(decoding, cfg.decoding.seed)},
                )
            )
    return cells


def _system_identity(cfg: DictConfig, system: str) -> dict[str, Any]:
    """Everything that a system's completions depend on, and nothing else.

    The device, the batch size, the decoding strategy and the limit are left out: they change
    which completions are made first, not what they say.
    """
    members = {}
    for role, name in MEMBERS[system].items():
        member = to_dict(cfg.triple[name])
        del member["device"]
        member["quantization"] = member["quantization"] or None  # two ways to say none
        member |= provenance.model_facts(member)
        for key in ("id", "adapter"):  # a local folder may move; its weights say what it is
            if member[key] and (Path(member[key]).is_dir() or Path(member[key]).is_absolute()):
                member[key] = Path(member[key]).name
        if member["api"]:  # where it is and what it costs changes no answer
            member["api"] = {key: member["api"][key] for key in _API_IDENTITY}
        members[role] = member
    identity: dict[str, Any] = {"system": system, "members": members}
    if system == "proxy":
        identity |= {"alpha": cfg.alpha, "trace": cfg.decoding.trace}
    return identity


def _decoding_identity(decoding: Decoding, seed: int) -> dict[str, Any]:
    identity = json.loads(json.dumps(dataclasses.asdict(decoding)))
    return identity | ({"seed": seed} if decoding.temperature > 0 else {})


def claim(cell: Cell | HarnessCell, stage: str) -> None:
    """Takes the cell's folder, or refuses it when it holds another configuration's completions.

    Raises:
        ValueError: the folder's completions depend on something else; nothing was changed.
    """
    path = cell.folder / "cell.json"
    if path.exists():
        stored = json.loads(path.read_text())
        changed = provenance.differences(*_comparable(stored, cell.identity))
        if changed:
            raise ValueError(
                f"{cell.folder} holds completions of another configuration ({'; '.join(changed)}); "
                "choose another folder with output_dir=..., or delete this one"
            )
        return
    if stage == "score":
        raise ValueError(f"{cell.folder} holds no completions to score; run with stage=all first")
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, cell.identity)


def _comparable(
    stored: dict[str, Any], identity: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two identities without the facts of their models that only one of them knows.

    Scoring needs no model, so it may be done where the models are not.
    """
    one, other = copy.deepcopy(stored), copy.deepcopy(identity)
    for role in one["members"].keys() & other["members"].keys():
        pair = one["members"][role], other["members"][role]
        for fact, name in provenance.FACTS.items():
            known = [member.get(fact) is not None for member in pair]
            # of a commit that both know, the name by which it was asked for says nothing more
            unused = name if all(known) else fact
            for member in pair:
                member.pop(unused, None)
    return one, other


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keeps other processes from generating into a results folder; a killed one frees it.

    Raises:
        ValueError: another process is at it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is generating into {folder}; wait for it, or choose another "
                "folder with output_dir=..."
            ) from None
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s): start no second run in it", folder, error)
        yield


def models_of(cell: Cell | HarnessCell) -> dict[str, Any]:
    """Role of the triple -> the model that plays it in this cell."""
    return {MEMBERS[cell.system][role]: member for role, member in cell.identity["members"].items()}
