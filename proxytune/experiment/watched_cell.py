"""One (system, task) of a run in progress, as far as its files have been read."""

import importlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxytune.errors import UserError
from proxytune.files import JsonlFollower, read_json, read_jsonl
from proxytune.records import Completion, Example, Metric, MetricInfo, Score
from proxytune.results import stats
from proxytune.results.packed import short

SILENT = 600.0  # seconds without a completion after which a run may have been stopped
LATEST = 8  # completions that are shown
_SHOWN = 1_500  # characters of a prompt's end, and of a completion


@dataclass(frozen=True)
class Latest:
    """A completion as people read it.

    Attributes:
        system, task, example: whose it is.
        prompt: its end, where it is long.
        text: its beginning.
        ended: see `records.Completion.finish_reason`.
        value: the headline's value of the example; None where it is not known.
    """

    system: str
    task: str
    example: str
    prompt: str
    text: str
    ended: str
    value: float | None


@dataclass(frozen=True)
class CellState:
    """How far one system is on one task.

    Attributes:
        done, total: examples; the total is 0 before the run has written which.
        speed: tokens per second since the cell began in this session; None before that.
        metric: the headline's name; "" where nothing can be scored yet.
        value, low, high: of the examples that are done, with one decimal; percent where
            `percent` is true.
        scored: how many examples the value is of.
        problem: why the cell cannot be read or scored.
    """

    system: str
    task: str
    done: int
    total: int
    speed: float | None = None
    metric: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    percent: bool = True
    scored: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Scoring:
    """How a task's samples are scored while the run goes on.

    Attributes:
        task: scores them from their texts alone; None for one that needs a judge, runs programs,
            or asks by itself.
        metrics: of the task, the headline first; empty where they are not known.
        whole: whether it asks by itself, so that its examples are not counted.
        problem: why there is no task.
    """

    task: Any = None
    metrics: Mapping[str, MetricInfo] = field(default_factory=dict)
    whole: bool = False
    problem: str = ""


def scoring_of(name: str, settings: Any) -> Scoring:
    """How a task of a run.json is scored.

    Args:
        name: the task's.
        settings: run.json's entry; anything may stand there.
    """
    stored = importlib.import_module("tasks.stored")  # the library knows no benchmark
    try:
        kind = stored.task_class(name, settings)
        if kind.runs_itself:
            return Scoring(whole=True)
        if not kind.scores_texts_alone():
            return Scoring(metrics=_metrics(kind, settings))
        task = stored.stored_task(name, settings, allow_code_execution=False)
        return Scoring(task, task.metrics)
    except UserError as error:
        return Scoring(problem=str(error))


def _metrics(kind: Any, settings: Mapping[str, Any]) -> Mapping[str, MetricInfo]:
    """The metrics of a task that is not made, which would load its judge."""
    headline = settings.get("headline", getattr(kind, "headline", ""))
    first = {name: info for name, info in kind.metrics.items() if name == headline}
    return first | kind.metrics


@dataclass
class WatchedCell:
    """One system on one task, as far as its files have been read.

    Attributes:
        samples: completions of an example.
        before: examples that were done before it began.
        began: when; None while that is unknown.
        changed: when its last completion came; 0 before the first.
    """

    folder: Path
    system: str
    task: str
    scoring: Scoring
    total: int = 0
    samples: int = 1
    before: int = 0
    began: float | None = None
    changed: float = 0.0
    problem: str = ""
    latest: deque[Latest] = field(default_factory=lambda: deque(maxlen=LATEST))
    _examples: dict[str, Example] = field(default_factory=dict)
    _asked: tuple[float, int] | None = None  # time and size of the file
    _stored: tuple[float, int] | None = None
    _texts: dict[str, dict[int, str]] = field(default_factory=dict)  # of unfinished examples
    _done: set[str] = field(default_factory=set)
    _tokens: list[int] = field(default_factory=list)
    _scores: list[Score] = field(default_factory=list)
    _metric: Metric | None = None
    _restarts: int = 0

    def __post_init__(self) -> None:
        self._follower = JsonlFollower(self._own / "completions.jsonl", Completion)

    @property
    def _own(self) -> Path:
        return self.folder / self.system

    @property
    def done(self) -> int:
        """Examples that have all their samples; of a task that asks by itself, 1 at its end."""
        return (self._own / "result.json").is_file() if self.scoring.whole else len(self._done)

    def look(self, begin: tuple[float, int] | None, now: float) -> None:
        """Reads what is new.

        Args:
            begin: when the cell began in this session, and how many examples were done then.
            now: seconds since 1970.
        """
        self.problem = ""
        try:
            self._read_asked()
            for completion in self._follower.new():
                if self._follower.restarts > self._restarts:
                    self._forget()
                self._add(completion)
            self._score()
        except (UserError, OSError) as error:
            self.problem = str(error)
        if begin is not None:
            self.began, self.before = begin
        elif self.began is None and now - self.changed < SILENT:
            # a run of an older edition, which does not note it: measured from now on
            self.began, self.before = now, self.done
        if self._follower.path.is_file():
            self.changed = self._follower.path.stat().st_mtime

    def _read_asked(self) -> None:
        """Reads which examples are asked, and how many samples each gets, where that changed."""
        path = self.folder / "examples.jsonl"
        state = _time_and_size(path)
        if self.scoring.whole:
            self.total = 1
        if state is None or state == self._asked:
            return
        self._examples = {each.id: each for each in read_jsonl(path, Example)}
        self._asked = state
        self.total = 1 if self.scoring.whole else len(self._examples)
        cell = self._own / "cell.json"
        decoding = read_json(cell, system=str).get("decoding") if cell.is_file() else None
        samples = decoding.get("n") if isinstance(decoding, dict) else None
        self.samples = samples if isinstance(samples, int) and samples > 0 else 1

    def _forget(self) -> None:
        """Begins anew: the file is another one."""
        self._restarts = self._follower.restarts
        for each in (self._texts, self._done, self._tokens, self._scores, self.latest):
            each.clear()
        self._metric = None

    def _add(self, completion: Completion) -> None:
        example = self._examples.get(completion.example_id)
        if example is None or example.id in self._done:
            return
        texts = self._texts.setdefault(example.id, {})
        if not 0 <= completion.sample < self.samples or completion.sample in texts:
            return
        texts[completion.sample] = completion.text
        self._tokens.append(len(completion.token_ids))
        value = None
        if len(texts) == self.samples:
            del self._texts[example.id]
            self._done.add(example.id)
            value = self._grade(example, [texts[number] for number in range(self.samples)])
        self.latest.append(
            Latest(
                system=self.system,
                task=self.task,
                example=example.id,
                prompt=_end(example.prompt.raw),
                text=short(completion.text, _SHOWN),
                ended=completion.finish_reason,
                value=value,
            )
        )

    def _grade(self, example: Example, texts: list[str]) -> float | None:
        """The headline's value of an example; None where that needs more than its texts."""
        task = self.scoring.task
        if task is None:
            return None
        try:
            score = task.score(example, texts)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            why = f"{self.folder.name}/examples.jsonl does not fit the task ({error!r})"
            self.scoring = Scoring(problem=why)
            return None
        self._scores.append(score)
        self._metric = None
        return score.values.get(next(iter(task.metrics)))

    def _score(self) -> None:
        """Aggregates the scores of the examples that are done, or those that the run has stored."""
        task, path = self.scoring.task, self._own / "scores.jsonl"
        if task is None and _time_and_size(path) not in (None, self._stored):
            self._stored = _time_and_size(path)
            self._scores, self._metric = list(read_jsonl(path, Score)), None
        if self._metric is None and self._scores:
            found = stats.metrics(self.task, self.system, self._scores)
            headline = next(iter(self.scoring.metrics), None)
            # scores that the run has stored may lack it (pass@10 of fewer samples)
            named = [m for m in found if m.metric == headline] or ([] if task else found)
            self._metric = named[0] if named else None

    def state(self) -> CellState:
        """What is shown of it."""
        return CellState(
            system=self.system,
            task=self.task,
            done=self.done,
            total=self.total,
            speed=self._speed(),
            problem=self.problem or self.scoring.problem,
            **({} if self._metric is None else self._numbers(self._metric)),
        )

    def _numbers(self, metric: Metric) -> dict[str, Any]:
        info = self.scoring.metrics.get(metric.metric)
        values = (metric.value, metric.ci_low, metric.ci_high)
        percent = info.percent if info else all(0 <= (each or 0) <= 1 for each in values)
        # one digit, rounded here as in tables: a browser rounds halves otherwise
        scale = 100 if percent else 1
        value, low, high = (v if v is None else round(stats.scaled(v, scale), 1) for v in values)
        return {
            "metric": info.label if info else metric.metric,
            "value": value,
            "low": low,
            "high": high,
            "percent": percent,
            "scored": metric.n,
        }

    def _speed(self) -> float | None:
        tokens = sum(self._tokens[self.before * self.samples :])
        if self.began is None or not tokens or self.changed <= self.began:
            return None
        return tokens / (self.changed - self.began)


def _time_and_size(path: Path) -> tuple[float, int] | None:
    """By which a change of a file is noticed; None where there is none."""
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_mtime, status.st_size


def _end(text: str) -> str:
    return text if len(text) <= _SHOWN else "…" + text[-_SHOWN:]
