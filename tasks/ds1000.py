"""DS-1000 (Lai et al. 2023), Completion format: data science code, judged by its own tests.

One row, in the dataset's simplified form (hub: xlangai/DS-1000):
    {"prompt": "Problem:\\nI have the following DataFrame: [...] BEGIN SOLUTION\\n<code>\\n",
     "reference_code": "def g(df, List): [...]", "code_context": "import pandas as pd [...]",
     "metadata": {"library": "Pandas", "library_problem_id": 0, [...]}}

`code_context` defines `test_execution(solution)` and, for some rows, `test_string(solution)`; a
solution is right when both run without an exception. The test runs in a process of its own; where
it calls `exec`, the solution runs in another, and its variables come back as plain data. Metrics:
`pass@10` (the paper's), `pass@1`, pass@10 by library, `refused` as in HumanEval, and `together`,
the share that was judged in the solution's own process, where a solution that sets out to cheat can
(docs/sandbox.md): Matplotlib's problems, because their tests look at the figures.
`subset: 200` is the paper's random sample of problems; `subset: 1000` is all of them, under the
name ds1000_full.

The tests need the libraries of the dataset's environment.yml, which are older than this project's;
`python` names an interpreter that has them.

Deviations from the paper: it ran the dataset's first format, whose tests read pickled answers; the
simplified form has the same problems and tests without them. Its authors released no verdicts, so
this scorer cannot be compared with theirs sample by sample.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from proxytune.errors import UserError
from proxytune.records import Decoding, Example, Prompt, Score
from tasks.base import Edition, MetricInfo, Task
from tasks.humaneval import SANDBOX_METRICS, pass_score, refuse_unless_allowed, split
from tasks.loading import HubDataset, load_rows
from tasks.sandbox import Program, Sandbox, Verdict

HUB = HubDataset("xlangai/DS-1000")
COLUMNS = ("prompt", "reference_code", "metadata", "code_context")
# Library -> (number of problems, modules to import first), in the order of the paper's sampling.
LIBRARIES: dict[str, tuple[int, tuple[str, ...]]] = {
    "Pandas": (291, ("numpy.testing", "pandas.testing")),
    "Numpy": (220, ("numpy.testing", "pandas.testing", "scipy")),
    "Matplotlib": (
        155,
        ("numpy.testing", "pandas.testing", "matplotlib.pyplot", "seaborn", "PIL.Image"),
    ),
    "Tensorflow": (45, ("numpy.testing", "tensorflow")),
    "Scipy": (106, ("numpy.testing", "pandas.testing", "scipy.stats", "scipy.optimize")),
    "Sklearn": (
        115,
        ("numpy.testing", "pandas.testing", "sklearn.linear_model", "sklearn.preprocessing"),
    ),
    "Pytorch": (68, ("numpy.testing", "pandas.testing", "torch.testing")),
}
PAPER_SUBSET = 200


@dataclass(frozen=True)
class DS1000(Task):
    """DS-1000's Completion problems.

    Attributes:
        path: a local ds1000.jsonl of the simplified form, gzipped or not; None takes the hub.
        revision: the hub commit.
        subset: 200 (the paper's problems) or 1000 (all).
        allow_code_execution: must be set, because scoring runs programs that a model wrote.
        python: the interpreter with the dataset's libraries; None for this one.
        timeout_s: seconds that a program may run.
        memory_bytes: a program's address space, of which torch and TensorFlow reserve much.
        workers: programs that run at once; None for one per core.
        paper_dataset: False for data of one's own; see `tasks.base.Task`.
        decoding: the paper's; a mapping replaces single settings.
    """

    metrics = {  # noqa: RUF012 - ClassVar by the base class
        "pass@10": MetricInfo("pass@10"),
        "pass@1": MetricInfo("pass@1"),
        **SANDBOX_METRICS,
        **{f"{name.lower()}_pass@10": MetricInfo(f"pass@10, {name}") for name in LIBRARIES},
    }
    path: str | None = None
    revision: str | None = None
    subset: int = PAPER_SUBSET
    allow_code_execution: bool = False
    python: str | None = None
    timeout_s: float = 120.0
    memory_bytes: int = 24 << 30
    workers: int | None = None
    paper_dataset: bool = True
    decoding: Decoding = Decoding(
        max_new_tokens=512,
        temperature=0.8,
        top_p=0.95,
        n=20,
        stop=("\n</code>", "\n# SOLUTION END", "\nEND SOLUTION"),
        banned=("pass", "..."),
        banned_first=("</",),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subset not in (PAPER_SUBSET, 1000):
            raise UserError(f"subset must be 200 (the paper's) or 1000 (all), not {self.subset}")

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The task's name, which names the subset, because that changes the results."""
        return "ds1000" if self.subset == PAPER_SUBSET else "ds1000_full"

    def check(self) -> None:
        """Refuses a run in which programs may not be executed, or lack a library.

        Raises:
            UserError: `allow_code_execution` is not set, or `python` lacks a library.
        """
        refuse_unless_allowed(self.name, self.allow_code_execution)
        needed = sorted({m.split(".")[0] for _, modules in LIBRARIES.values() for m in modules})
        missing = _missing(self.python or sys.executable, needed)
        if missing:
            raise UserError(
                f"{self.name}'s tests need {', '.join(missing)}, which"
                f" {self.python or sys.executable} does not have; make an environment from the"
                f" dataset's environment.yml and give its interpreter: task.{self.name}.python=PATH"
            )

    def examples(self) -> list[Example]:
        """The problems: the paper's 200 in the order of its sampling, or all of them by library.

        Raises:
            UserError: the dataset cannot be loaded, or lacks problems.
        """
        setting = f"task.{self.name}.path"
        rows = load_rows(self.path, HUB, self.revision, setting=setting, columns=COLUMNS)
        ordered = _in_paper_order(rows, self.path or HUB.id)
        chosen = paper_subset() if self.subset == PAPER_SUBSET else range(len(ordered))
        return [_example(ordered[number]) for number in chosen]

    def edition(self) -> Edition:
        """The problems of the subset; we had no copy to take a hash of."""
        return Edition(self.subset)

    def score(self, example: Example, texts: Sequence[str]) -> Score:
        """Scores one problem's samples; `score_all` makes better use of the cores."""
        return self.score_all([example], [texts])[0]

    def score_all(self, examples: Sequence[Example], texts: Sequence[Sequence[str]]) -> list[Score]:
        """Runs all samples of all problems, one library after the other.

        Raises:
            UserError: `allow_code_execution` is not set.
            RuntimeError: `python` lacks a library.
        """
        owners = [e for e, ts in zip(examples, texts, strict=True) for _ in ts]
        verdicts = self.verdicts(owners, [text for ts in texts for text in ts])
        parts = split(verdicts, texts)
        return [
            _by_library(pass_score(e, ts, part), e.row["library"])
            for e, ts, part in zip(examples, texts, parts, strict=True)
        ]

    def verdicts(self, examples: Sequence[Example], solutions: Sequence[str]) -> list[Verdict]:
        """Whether each solution passes the tests of its example.

        Raises:
            UserError: `allow_code_execution` is not set.
            RuntimeError: `python` lacks a library.
        """
        refuse_unless_allowed(self.name, self.allow_code_execution)
        found: dict[int, Verdict] = {}
        for library, (_, modules) in LIBRARIES.items():
            mine = [i for i, e in enumerate(examples) if e.row["library"] == library]
            sandbox = Sandbox(
                timeout_s=self.timeout_s,
                memory_bytes=self.memory_bytes,
                threads=512,
                workers=self.workers,
                python=self.python,
                preimport=modules,
                native=True,
            )
            found |= zip(
                mine, sandbox.run([program(examples[i], solutions[i]) for i in mine]), strict=True
            )
        return [found[i] for i in range(len(examples))]


def program(example: Example, solution: str) -> Program:
    """The program to run for one solution: the dataset's definitions, then its tests."""
    context = example.row["code_context"]
    tests = ["test_execution"] + ["test_string"] * ("test_string(" in context)
    calls = "".join(f"{test}({solution!r})\n" for test in tests)
    return Program(code="", test=f"{context}\n{calls}", executes=True)


def paper_subset() -> list[int]:
    """The positions of the paper's 200 problems among all problems, ordered as in LIBRARIES."""
    total = sum(count for count, _ in LIBRARIES.values())
    return np.random.RandomState(42).choice(total, PAPER_SUBSET, replace=False).tolist()


def _in_paper_order(rows: Sequence[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """Sorts the rows by library as in LIBRARIES, then by number.

    Raises:
        UserError: some problems are missing.
    """
    places = {
        (str(row["metadata"]["library"]), int(row["metadata"]["library_problem_id"])): row
        for row in rows
    }
    wanted = [(name, i) for name, (count, _) in LIBRARIES.items() for i in range(count)]
    missing = [f"{name}/{i}" for name, i in wanted if (name, i) not in places]
    if missing:
        raise UserError(
            f"{source} lacks {len(missing)} of DS-1000's problems, {missing[0]} for one; the subset"
            " is a draw from the whole dataset in its simplified form"
        )
    return [places[place] for place in wanted]


def _example(row: dict[str, Any]) -> Example:
    library = str(row["metadata"]["library"])
    return Example(
        id=f"{library}/{int(row['metadata']['library_problem_id'])}",
        prompt=Prompt(raw=row["prompt"], user=row["prompt"], plain=True),
        target=row["reference_code"],
        row={"library": library, "code_context": row["code_context"]},
    )


def _by_library(score: Score, library: str) -> Score:
    """Adds pass@10 for the example's library; it is None for the other libraries."""
    for name in LIBRARIES:
        value = score.values["pass@10"] if name == library else None
        score.values[f"{name.lower()}_pass@10"] = value
    return score


def _missing(python: str, modules: Sequence[str]) -> list[str]:
    """The modules that an interpreter lacks."""
    code = (
        "import sys, importlib.util as u\n"
        "print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    )
    try:
        done = subprocess.run(
            [python, "-s", "-c", code, *modules], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"the interpreter {python} cannot be run: {error}") from error
    return done.stdout.split()
