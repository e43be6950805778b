"""Any task, group or tag of lm-evaluation-harness, for the systems of an experiment.

`python run.py task=[lm_eval/arc_easy,lm_eval/wikitext]`. lm-eval asks, scores and aggregates; we
report its numbers under its names. Its gsm8k, triviaqa, humaneval, truthfulqa and toxigen differ
from the paper's tasks of those names (few-shot, other stops, classification instead of generation),
so they are called `lm_eval_gsm8k` and so on, never `gsm8k`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from proxytune.errors import UserError
from proxytune.files import read_json, write_json, write_jsonl
from proxytune.records import Completion, Example, Metric, Prompt, Score
from proxytune.results import stats
from tasks.base import MetricInfo, Outcome, SelfRunTask

_RESULT = "result.json"
_Z95 = 1.959963984540054  # lm-eval gives standard errors, from which we make normal intervals


@dataclass(frozen=True)
class LmEvalTask(SelfRunTask):
    """One task, group or tag, named as in `lm_eval --tasks`.

    lm-eval stores its answers in the folder of the system and task (`answers*`) as they come.
    At the end `run` writes result.json, which scoring again reads. It also writes prompts and
    answers in the form of any other task, for the report.

    A task's metrics keep lm-eval's names ("acc", "exact_match,strict-match"). For a group or tag of
    several tasks, each task's metrics follow the group's own as "acc/<task>".

    Attributes:
        task: lm-eval's name of a task, group or tag.
        num_fewshot: None is the task's own.
        apply_chat_template: asks members that have a chat format in conversations.
        gen_kwargs: replace settings of the task's own generation_kwargs.
        include_path: a folder with more task files.
        run_code: allows tasks that run model-written code; lm-eval runs it without a sandbox.
    """

    task: str
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    gen_kwargs: dict[str, Any] | None = field(default=None, hash=False)
    include_path: str | None = None
    run_code: bool = False

    @property
    def name(self) -> str:
        """The task's name in tables and folders."""
        return f"lm_eval_{self.task}"

    def check(self) -> None:
        """Loads the task and its documents, so that mistakes show before a model is loaded.

        Raises:
            UserError: lm-eval does not know the task (close names are suggested), its documents
                cannot be loaded, or it runs code without `run_code`.
        """
        from proxytune.harness.evaluation import check_task

        check_task(self.task, self.include_path, run_code=self.run_code)

    def conversations(self) -> list[Any]:
        """The first document of each task, with its few-shot examples."""
        if not self.apply_chat_template:
            return []
        from proxytune.harness.evaluation import conversations

        return conversations(self.task, self.include_path, self.num_fewshot)

    def identity(self) -> dict[str, Any]:
        """The task's settings and lm-eval's version: the answers depend on them and the system."""
        return {"lm_eval": asdict(self) | {"version": version("lm-eval")}}

    def finished(self, folder: Path, limit: int | None) -> bool:
        """Whether the folder holds the result for this limit."""
        path = folder / _RESULT
        return path.exists() and read_json(path, limit=int | None)["limit"] == limit

    def result(self, folder: Path) -> Outcome:
        """The stored result of one system.

        Raises:
            UserError: there is none; the task has not been run.
        """
        path = folder / _RESULT
        if not path.exists():
            raise UserError(f"{folder} holds no {_RESULT} of lm-eval; run with stage=all first")
        stored = read_json(
            path, metrics=list[Metric], scores=list[Score], infos=dict[str, MetricInfo]
        )
        return Outcome(
            metrics=[Metric(**row) for row in stored["metrics"]],
            scores=[Score(**row) for row in stored["scores"]],
            infos={name: MetricInfo(**row) for name, row in stored["infos"].items()},
        )

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
        """Evaluates one system with lm-eval and stores the result; see `SelfRunTask.run`.

        Answers are stored as they come, so a killed run continues where it stopped. The seed is
        that of few-shot examples and of sampled generations.

        Raises:
            UserError: the task is unknown.
        """
        from proxytune.harness.evaluation import evaluate

        results = evaluate(
            generator,
            self.task,
            cache=folder / "answers",
            num_fewshot=self.num_fewshot,
            limit=limit,
            seed=seed,
            gen_kwargs=self.gen_kwargs,
            apply_chat_template=self.apply_chat_template,
            include_path=self.include_path,
            batch_size=batch_size,
            run_code=self.run_code,
        )
        documents = _documents_of(results)
        result = _result(results, documents, self.name, system)
        write_jsonl(folder.parent / "examples.jsonl", [d.example for d in documents.values()])
        write_jsonl(folder / "completions.jsonl", [d.completion for d in documents.values()])
        stored: dict[str, Any] = {"limit": limit, "metrics": [asdict(m) for m in result.metrics]}
        stored["scores"] = [asdict(score) for score in result.scores]
        stored["infos"] = {name: asdict(info) for name, info in result.infos.items()}
        write_json(folder / _RESULT, stored)  # last, because it marks the run as finished
        return result


@dataclass(frozen=True)
class _Document:
    """One document of lm-eval: the prompt, and the system's answer."""

    example: Example
    completion: Completion


def _documents_of(results: Mapping[str, Any]) -> dict[str, _Document]:
    """Every document of every task, once each (lm-eval has one record for each filter)."""
    found: dict[str, _Document] = {}
    for owner, rows in results["samples"].items():
        for row in rows:
            name = _document(owner, row)
            arguments = row["arguments"]
            if isinstance(arguments, Mapping):
                arguments = [list(each.values()) for each in arguments.values()]
            prompt, answer = str(arguments[0][0]), _answer(row, arguments)
            found[name] = _Document(
                Example(name, Prompt(raw=prompt, user=prompt), target=str(row["target"])),
                Completion(name, 0, answer, answer, [], "stop"),
            )
    return found


def _answer(row: Mapping[str, Any], arguments: Sequence[Sequence[Any]]) -> str:
    """The generated text, or the likeliest of several choices; "" if one text was only scored."""
    first = row["filtered_resps"][0] if row["filtered_resps"] else ""
    if isinstance(first, str):
        return first
    if len(arguments) < 2:
        return ""
    likelihoods = [each[0] for each in row["filtered_resps"]]
    best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
    return str(arguments[best][1])


def _result(
    results: Mapping[str, Any], documents: Mapping[str, _Document], task_name: str, system: str
) -> Outcome:
    """Converts lm-eval's results to our records."""
    samples: dict[str, list[dict[str, Any]]] = results["samples"]
    groups, better = results.get("groups") or {}, results["higher_is_better"]
    owners = {**groups, **results["results"]}  # a group stands before its tasks
    head = next(iter(owners)) if groups or len(owners) == 1 else None  # a tag has none
    metrics: list[Metric] = []
    infos: dict[str, MetricInfo] = {}
    values: dict[str, dict[str, float | None]] = {}
    for owner, found in owners.items():
        suffix = "" if owner == head else f"/{owner}"
        for key, value in found.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = (metric if kind == "none" else key) + suffix
            each = _per_document(samples.get(owner, []), owner, metric, kind)
            if each and math.isclose(sum(each.values()) / len(each), value, abs_tol=1e-9):
                for document, number in each.items():
                    values.setdefault(document, {})[name] = number
            stderr = found.get(f"{metric}_stderr,{kind}")
            count = _documents(results, owner)
            metrics.append(_metric(task_name, system, name, float(value), stderr, count))
            infos[name] = MetricInfo(
                name,
                higher_is_better=better.get(owner, {}).get(metric) is not False,
                percent=0 <= value <= 1 and all(0 <= number <= 1 for number in each.values()),
            )
    scores = [
        Score(
            document,
            numbers,
            answer=documents[document].completion.text or None,
            target=documents[document].example.target,
        )
        for document, numbers in values.items()
    ]
    # A metric that is a mean over documents gets our bootstrap interval in place of the normal one.
    own = {m.metric: m for m in stats.metrics(task_name, system, scores)}
    metrics = [
        replace(m, ci_low=own[m.metric].ci_low, ci_high=own[m.metric].ci_high)
        if m.metric in own
        else m
        for m in metrics
    ]
    return Outcome(metrics, scores, infos)


def _metric(task: str, system: str, name: str, value: float, stderr: Any, count: int) -> Metric:
    if not isinstance(stderr, int | float) or math.isnan(stderr):
        stderr = None  # lm-eval writes "N/A"
    half = None if stderr is None else _Z95 * stderr
    return Metric(
        task=task,
        system=system,
        metric=name,
        value=value,
        n=count,
        n_examples=count,
        stderr=stderr,
        ci_low=None if half is None else value - half,
        ci_high=None if half is None else value + half,
    )


def _per_document(
    rows: list[dict[str, Any]], owner: str, metric: str, kind: str
) -> dict[str, float]:
    """Document -> its value of a metric; empty if some value is not a number."""
    found = {_document(owner, row): row.get(metric) for row in rows if row["filter"] == kind}
    if not all(isinstance(value, int | float) for value in found.values()):
        return {}
    return {document: float(value) for document, value in found.items() if value is not None}


def _document(owner: str, row: Mapping[str, Any]) -> str:
    return f"{owner}/{row['doc_id']}"


def _documents(results: Mapping[str, Any], owner: str) -> int:
    """Documents of a task, or of all tasks in a group."""
    counts = results["n-samples"]
    if owner in counts:
        return counts[owner]["effective"]
    return sum(_documents(results, child) for child in results["group_subtasks"][owner])
