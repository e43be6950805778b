"""The cells of an experiment: one system on one task, what it still lacks, and its scores."""

import dataclasses
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.experiment.completions import (
    CompletionStore,
    RenderedPrompt,
    Stored,
    lacks,
    read_completions,
    render_prompts,
)
from proxytune.experiment.given_tasks import check_scores
from proxytune.experiment.progress import CellProgress
from proxytune.experiment.sharing import alike, copy_completions, copy_finished
from proxytune.files import JsonlWriter
from proxytune.records import Completion, Decoding, Example, Metric, MetricInfo, Score
from proxytune.results import stats
from proxytune.roles import MEMBERS

if TYPE_CHECKING:  # they import transformers' models, and most refusals come before those
    from proxytune.generator import Generator

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How a run generates, whatever the task; each as in `config.schema.DecodingConfig`.

    Attributes:
        seed: of sampling.
        batch_size: rows decoded at once, or "auto".
        speculative: "auto", False, or a fixed number of drafted tokens.
        trace: record each token's probabilities under the proxy system's members.
        compare: count the tokens that each of the proxy system's members alone would have chosen.
    """

    seed: int = 0
    batch_size: Any = "auto"
    speculative: Any = "auto"
    trace: bool = False
    compare: bool = False


_TOUCHED = "touched_tokens"
_TOUCHED_INFO = MetricInfo("tokens that the formula touched")
_UNSHIFTED = "unshifted_probability"
_UNSHIFTED_INFO = MetricInfo("probability of tokens that the base lacks", higher_is_better=False)


@dataclasses.dataclass(frozen=True)
class CellScores:
    """The scores of one cell.

    Attributes:
        metrics: one for each metric of the task.
        scores: one for each scored example.
        unfinished: "3 of 5" where only three of five examples have all their completions;
            "" where all have.
    """

    metrics: list[Metric]
    scores: list[Score]
    unfinished: str = ""


@dataclasses.dataclass
class Cell(ABC):
    """One system on one task.

    Attributes:
        task: the benchmark: a `tasks.base.Task` or `tasks.base.SelfRunTask`.
        task_name: its name in folders and tables.
        system: one of `roles.SYSTEMS`.
        folder: where everything about this cell is kept.
        identity: everything that the completions depend on, as in cell.json.
        other_dataset: how the task's dataset differs from the paper's; "" where it does not.
        sweep: the folder of a sweep's points, of which the results folder is one; else None.
        copied: point of the sweep -> how many steps of `total` its completions have saved here.
    """

    task: Any
    task_name: str
    system: str
    folder: Path
    identity: dict[str, Any]
    other_dataset: str = dataclasses.field(default="", kw_only=True)
    sweep: Path | None = dataclasses.field(default=None, kw_only=True)
    copied: dict[str, int] = dataclasses.field(default_factory=dict, kw_only=True)

    def share(self) -> None:
        """Copies what is missing here from the points of the sweep that have it."""
        if self.sweep is None or not self.missing():
            return
        for point, folder in alike(self.sweep, self.folder, self.identity):
            before = len(self.missing())
            if not before:
                return
            self._copy(folder)
            saved = before - len(self.missing())
            if saved:
                self.copied[point] = self.copied.get(point, 0) + saved

    @property
    def members(self) -> dict[str, str]:
        """The engine's role -> the triple's role of the model that plays it here."""
        roles: list[str] = list(self.identity["members"])
        return {role: MEMBERS[self.system].get(role, role) for role in roles}

    def models(self) -> dict[str, Any]:
        """Role of the triple -> the model that plays it here, as in cell.json."""
        return {self.members[role]: each for role, each in self.identity["members"].items()}

    @property
    @abstractmethod
    def total(self) -> int:
        """The number of steps that its progress bar has."""

    @property
    @abstractmethod
    def infos(self) -> Mapping[str, Any]:
        """Metric -> how it is shown (`tasks.base.MetricInfo`)."""

    @property
    @abstractmethod
    def dataset_sha256(self) -> str | None:
        """The hash of the examples, for run.json; None where the task does not show them."""

    @abstractmethod
    def missing(self) -> Sequence[Any]:
        """The steps of `total` that are still to be generated."""

    @abstractmethod
    def conversations(self) -> Iterable[Sequence[Mapping[str, str]]]:
        """What `generate` asks members with a chat format: {"role", "content"} turns.

        A task that runs itself may give one conversation of each form that it asks in.
        """

    @abstractmethod
    def generate(
        self, generator: "Generator", settings: GenerationSettings, progress: CellProgress
    ) -> dict[str, float] | None:
        """Generates what is missing and stores it in the cell's folder.

        Returns:
            {"tokens": ..., "seconds": ...} of this session; None where tokens are not counted.

        Raises:
            OSError: the disk is full; everything finished is kept.
        """

    @abstractmethod
    def _copy(self, source: Path) -> None:
        """Copies what is missing here from a cell with the same identity.

        Args:
            source: the folder of that cell.
        """

    @abstractmethod
    def score(self) -> CellScores:
        """Scores the completions that the folder holds.

        Raises:
            UserError: the judge failed, or there is nothing that could be scored.
        """

    @abstractmethod
    def judged_by(self) -> dict[str, Any]:
        """The judges that the scores depend on, as JSON; {} without any."""


@dataclasses.dataclass
class TaskCell(Cell):
    """One system on a `tasks.base.Task`: we ask the examples, the task scores the completions.

    Attributes:
        examples: those that are asked, in the dataset's order.
        decoding: how their completions are drawn.
        gated: whether the formula gates, so that the table shows how many tokens it touched.
        mapped: whether helpers may have other vocabularies, so that the table shows how much of
            their probability was left out.
    """

    examples: list[Example]
    decoding: Decoding
    gated: bool = False
    mapped: bool = False

    @property
    def total(self) -> int:
        """The number of examples."""
        return len(self.examples)

    @property
    def infos(self) -> Mapping[str, Any]:
        """The task's metrics, and the records of decoding that the table shows."""
        touched = {_TOUCHED: _TOUCHED_INFO} if self.gated else {}
        unshifted = {_UNSHIFTED: _UNSHIFTED_INFO} if self.mapped else {}
        return {**self.task.metrics, **touched, **unshifted}

    @property
    def dataset_sha256(self) -> str | None:
        """The hash of the whole dataset, whatever the limit."""
        return self.identity["dataset"]["sha256"]

    @property
    def completions_path(self) -> Path:
        """The file to which finished completions are appended."""
        return self.folder / "completions.jsonl"

    def missing(self) -> list[Example]:
        """The examples that still lack a sample."""
        return self._lacking(read_completions(self.completions_path))

    def conversations(self) -> Iterable[Sequence[Mapping[str, str]]]:
        """Those of the missing examples; none for prompts that every member reads plain."""
        from proxytune.loading.prompting import messages_of

        prompts = (example.prompt for example in self.missing())
        return (messages_of(prompt) for prompt in prompts if not prompt.plain)

    def generate(
        self, generator: "Generator", settings: GenerationSettings, progress: CellProgress
    ) -> dict[str, float]:
        """Asks the missing examples; each completion is on disk as soon as it is finished."""
        stored = read_completions(self.completions_path)
        missing = self._lacking(stored)
        members = {role: generator.members[role] for role in generator.roles}
        prompts = render_prompts(missing, members)
        base = generator.base
        self._log(base.estimate(_lengths(prompts), self.decoding, self._drafted(settings)))
        start = time.perf_counter()
        with JsonlWriter(self.completions_path) as writer:
            store = CompletionStore(
                writer,
                missing,
                prompts,
                stored=stored,
                samples=self.decoding.n,
                progress=progress,
            )
            generator.generate(
                [prompt.token_ids for prompt in prompts],
                **dataclasses.asdict(self.decoding),
                seed=settings.seed,
                sample_keys=[example.id for example in missing],
                speculative=settings.speculative,
                batch_size=settings.batch_size,
                record=settings.trace and self.system == "proxy",
                compare=settings.compare and self.system == "proxy",
                prefixes=[prompt.prefix for prompt in prompts],
                on_finish=store.add,
            )
        self._log(base.spending())
        return {"tokens": store.tokens, "seconds": round(time.perf_counter() - start, 2)}

    def _copy(self, source: Path) -> None:
        name = self.completions_path.name
        copy_completions(source / name, self.completions_path, self.examples, self.decoding.n)

    def score(self) -> CellScores:
        """Scores the examples that have all their completions; warns if some lack theirs."""
        done = read_completions(self.completions_path)
        lacking = {example.id for example in self._lacking(done)}
        complete = [example for example in self.examples if example.id not in lacking]
        if lacking:
            log.warning(
                "%s/%s: %d of %d examples have their completions; only they are scored",
                self.task_name,
                self.system,
                len(complete),
                self.total,
            )
        texts = [[done[e.id][i].text for i in range(self.decoding.n)] for e in complete]
        scores: list[Score] = self.task.score_all(complete, texts)
        check_scores(self.task_name, self.task.metrics, scores)
        if self.gated and self.system == "proxy":
            scores = [self._with_touched(score, done[score.example_id]) for score in scores]
        if self.mapped and self.system == "proxy":
            scores = [self._with_unshifted(score, done[score.example_id]) for score in scores]
        return CellScores(
            stats.metrics(self.task_name, self.system, scores),
            scores,
            f"{len(complete)} of {self.total}" if lacking else "",
        )

    def judged_by(self) -> dict[str, Any]:
        """The task's judges."""
        return self.task.judged_by()

    def _with_touched(self, score: Score, samples: Mapping[int, Completion]) -> Score:
        """The score, with the share of the samples' tokens that the formula touched."""
        each = [samples[i] for i in range(self.decoding.n)]
        tokens = sum(len(c.token_ids) + (c.finish_reason == "eos") for c in each)
        touched = sum(c.extra["touched"] for c in each)
        share = touched / tokens if tokens else None
        return dataclasses.replace(score, values={**score.values, _TOUCHED: share})

    def _with_unshifted(self, score: Score, samples: Mapping[int, Completion]) -> Score:
        """The score, with the helpers' mean probability of tokens that the base lacks."""
        shares = [
            max((share for role, share in each.items() if role != "base"), default=0.0)
            for i in range(self.decoding.n)
            if (each := samples[i].extra.get("unshifted")) is not None
        ]
        value = sum(shares) / len(shares) if shares else 0.0
        return dataclasses.replace(score, values={**score.values, _UNSHIFTED: value})

    def _lacking(self, stored: Stored) -> list[Example]:
        return [e for e in self.examples if lacks(stored, e, self.decoding.n)]

    def _drafted(self, settings: GenerationSettings) -> bool:
        """Whether the expert drafts tokens that the base verifies."""
        lockstep = settings.speculative is False or settings.trace
        return self.system == "proxy" and not lockstep

    def _log(self, cost: str | None) -> None:
        if cost:
            log.info("%s, %s: %s", self.task_name, self.system, cost)


@dataclasses.dataclass
class HarnessCell(Cell):
    """One system on a `tasks.base.SelfRunTask`, which asks and scores by itself.

    Attributes:
        limit: first documents of the task only; None is all of them.
    """

    limit: int | None

    @cached_property
    def _outcome(self) -> Any:
        return self.task.result(self.folder)

    @property
    def total(self) -> int:
        """One: the task is run as a whole."""
        return 1

    @property
    def infos(self) -> Mapping[str, Any]:
        """The metrics that the stored result names."""
        return self._outcome.infos

    @property
    def dataset_sha256(self) -> str | None:
        """None: the other harness loads the documents."""
        return None

    def missing(self) -> list[str]:
        """The task's name, unless its result is there."""
        return [] if self.task.finished(self.folder, self.limit) else [self.task_name]

    def conversations(self) -> Iterable[Sequence[Mapping[str, str]]]:
        """Those that the task names."""
        return self.task.conversations()

    def generate(
        self, generator: "Generator", settings: GenerationSettings, progress: CellProgress
    ) -> None:
        """Lets the task ask its documents and store its result."""
        self.task.run(
            generator,
            self.folder,
            self.system,
            limit=self.limit,
            seed=settings.seed,
            batch_size=settings.batch_size,
        )
        progress.tokens(0)  # shows the bar
        progress.advance()

    def _copy(self, source: Path) -> None:
        if self.task.finished(source, self.limit):
            copy_finished(source, self.folder)

    def score(self) -> CellScores:
        """The metrics and scores that the task itself computed."""
        return CellScores(self._outcome.metrics, self._outcome.scores)

    def judged_by(self) -> dict[str, Any]:
        """{}: no judge of ours scores it."""
        return {}


def _lengths(prompts: Sequence[RenderedPrompt]) -> list[int]:
    """Tokens of each prompt as the base reads it."""
    return [len(prompt.token_ids["base"]) for prompt in prompts]
