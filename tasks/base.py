"""What a benchmark is.

`Task`         its examples are asked by us; it scores the completions.
`SelfRunTask`  it asks and scores by itself (another harness).
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from proxytune.errors import UserError
from proxytune.hashes import sha256_json
from proxytune.records import Decoding, Example, Metric, MetricInfo, Score


@dataclass(frozen=True)
class Edition:
    """The dataset that the paper's numbers rest on.

    Attributes:
        examples: how many it has.
        sha256: the hash of their contents (`contents_sha256`); None where we have no copy.
    """

    examples: int
    sha256: str | None = None


class Task(ABC):
    """One benchmark. A subclass is a frozen dataclass whose fields are its conf/task/*.yaml keys.

    Every metric is the mean, over examples, of the values in `Score.values`; so intervals,
    paired tests and tables need no knowledge of the task.

    Attributes:
        name: the task's name in tables and folders; a variant that changes a number has its own.
        metrics: metric -> how it is shown; the first one is the task's headline.
        path: a local copy of the dataset; None takes the hub's.
        paper_dataset: False for a task on data of one's own, of which nothing is said where it
            differs from the paper's.
        decoding: how the paper draws completions for this task, as the field's default. A
            mapping (from a configuration file) replaces single settings of that default.
        runs_itself: False; tells the runner that this is no `SelfRunTask`.
        of_this_machine: settings that decide what this machine opens, runs or asks. When a
            results folder from elsewhere is scored again, they do not come from it
            (tasks/stored.py).
        former_stops: the stop strings that earlier editions of the task had; a results folder that
            was begun with them goes on with them.
    """

    runs_itself: ClassVar[bool] = False
    of_this_machine: ClassVar[frozenset[str]] = frozenset(
        {
            *("path", "revision", "allow_code_execution", "python"),
            *("timeout_s", "memory_bytes", "workers"),
            *("judge", "truth_judge", "info_judge", "classifier"),
        }
    )
    former_stops: ClassVar[Sequence[tuple[str, ...]]] = ()
    name: str
    metrics: ClassVar[dict[str, MetricInfo]]
    decoding: Decoding
    path: str | None = None
    paper_dataset: bool = True

    def __post_init__(self) -> None:
        given: Any = self.decoding
        if not isinstance(given, Decoding):
            # The field's default, the paper's setting, is still an attribute of the class.
            merged = _override(type(self).decoding, given or {})
            object.__setattr__(self, "decoding", merged)

    def _lead_with(self, headline: str) -> None:
        """Puts one metric first, as the headline that a configuration chooses.

        Raises:
            UserError: the task has no such metric.
        """
        known = type(self).metrics
        if headline not in known:
            raise UserError(f"task.{self.name}.headline={headline} is none of {', '.join(known)}")
        object.__setattr__(self, "metrics", {headline: known[headline]} | known)

    def check(self) -> None:  # noqa: B027 - most tasks need nothing
        """Refuses, before a model is loaded, a run whose completions could not be scored.

        Raises:
            UserError: a judge has no key, or code execution is not allowed; the message says
                what to do.
        """

    @classmethod
    def scores_texts_alone(cls) -> bool:
        """Whether `score` needs no judge and runs no program, so that it costs nothing."""
        return cls.score_all is Task.score_all

    def judged_by(self) -> dict[str, Any]:
        """The judges that the scores depend on, as JSON; {} for a task without judges."""
        return {}

    @abstractmethod
    def examples(self) -> list[Example]:
        """Loads the dataset and returns its examples in the dataset's order.

        Raises:
            UserError: the file or the dataset cannot be loaded; the message says how to get it.
        """

    @abstractmethod
    def score(self, example: Example, texts: Sequence[str]) -> Score:
        """Scores the n completions (texts cut before the stop string) of one example."""

    def edition(self) -> Edition | None:
        """The paper's dataset; None for a task that the paper does not have."""
        return None

    def contents(self, example: Example) -> list[Any]:
        """What an example asks and how it is graded, whatever the form of the prompt."""
        return [example.prompt.user, example.target]

    def contents_sha256(self, examples: Sequence[Example]) -> str:
        """A hash of the contents in order, without line endings and white space at their ends."""
        digest = hashlib.sha256()
        for example in examples:
            digest.update(sha256_json(_stripped(self.contents(example))).encode())
        return digest.hexdigest()

    def other_dataset(self, examples: Sequence[Example]) -> str:
        """How the examples differ from the paper's dataset; "" if they do not, as far as we know.

        A file's contents are compared. The hub's copy is known by its commit in the configuration,
        and we had none to take a hash of: of that, the size is compared.

        Args:
            examples: all of the dataset, whatever the limit of a run.
        """
        edition = self.edition() if self.paper_dataset else None
        if edition is None:
            return ""
        if len(examples) != edition.examples:
            return f"{len(examples):,} examples, the paper's has {edition.examples:,}"
        if self.path and edition.sha256 not in (None, self.contents_sha256(examples)):
            return f"{len(examples):,} examples as the paper's, with other contents"
        return ""

    def score_all(self, examples: Sequence[Example], texts: Sequence[Sequence[str]]) -> list[Score]:
        """Scores many examples; tasks with a judge or a sandbox override it to work in parallel.

        Args:
            examples: [example]
            texts: [example][sample]
        """
        return [self.score(e, t) for e, t in zip(examples, texts, strict=True)]


@dataclass(frozen=True)
class Outcome:
    """The numbers that a `SelfRunTask` found for one system.

    Attributes:
        metrics: its aggregates, with its standard errors.
        scores: per document, the metrics that are means over documents; for paired tests.
        infos: metric -> how it is shown.
    """

    metrics: list[Metric]
    scores: list[Score]
    infos: dict[str, MetricInfo]


class SelfRunTask(ABC):
    """A benchmark that asks a system and scores its answers by itself.

    Attributes:
        runs_itself: True; tells the runner to call `run` instead of asking examples.
    """

    runs_itself: ClassVar[bool] = True

    @property
    @abstractmethod
    def name(self) -> str:
        """The task's name in tables and folders."""

    @abstractmethod
    def check(self) -> None:
        """Refuses, before a model is loaded, a run that could not be finished.

        Raises:
            UserError: the message names the mistake and the way out.
        """

    def conversations(self) -> list[Sequence[Mapping[str, str]]]:
        """A conversation of each form in which it asks members with a chat format.

        They are rendered before a model is loaded; [] for a task that asks in none.
        """
        return []

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The settings and versions that the answers depend on besides the system, as JSON."""

    @abstractmethod
    def finished(self, folder: Path, limit: int | None) -> bool:
        """Whether the folder of one system holds the result for this limit."""

    @abstractmethod
    def run(
        self,
        generator: Any,
        folder: Path,
        system: str,
        *,
        limit: int | None = None,
        seed: int = 0,
        batch_size: int | str = "auto",
    ) -> Outcome:
        """Asks one system, scores its answers, and stores the result in its folder.

        Args:
            generator: a `proxytune.api.Generator`.
            folder: of this system and task; a killed run goes on from what it kept there.
            system: the system's name, for the metrics.
            limit: first documents only; None is all of them.
            seed: of everything that is drawn at random.
            batch_size: rows at once, or "auto".
        """

    @abstractmethod
    def result(self, folder: Path) -> Outcome:
        """The stored result of one system.

        Raises:
            UserError: there is none yet.
        """


def _stripped(value: Any) -> Any:
    """A JSON value whose texts have Unix line endings and no white space at their ends."""
    if isinstance(value, str):
        return value.replace("\r\n", "\n").strip()
    return [_stripped(each) for each in value] if isinstance(value, list | tuple) else value


def _override(decoding: Decoding, changes: Mapping[str, Any]) -> Decoding:
    known = [f.name for f in fields(Decoding)]
    unknown = [key for key in changes if key not in known]
    if unknown:
        raise UserError(f"decoding has no setting {unknown[0]!r}; it has {', '.join(known)}")
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    return replace(decoding, **plain)
