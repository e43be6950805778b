"""AlpacaFarm's 805 instructions (= AlpacaEval 1), judged against text-davinci-003's answers.

One row of the reference outputs:
    {"dataset": "helpful_base", "generator": "text_davinci_003",
     "instruction": "What are the names of some famous actors that [...] on Broadway?",
     "output": "Some famous actors that started their careers on Broadway are [...]"}

`win_rate` is the mean of 1 for a win, 0.5 for a draw and 0 for a loss against the reference;
`avg_length` the mean number of characters. An example without a verdict leaves the denominator, as
in the alpaca-eval package, and counts as unparsed.

Deviations from the paper: its judge, gpt-4-0314, is retired; conf/task/alpaca_eval.yaml names
another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from proxytune.errors import UserError
from proxytune.records import Decoding, Example, Prompt, Score
from tasks.base import Edition, MetricInfo, Task
from tasks.judgements import check_judge, identity_of
from tasks.length_control import check_instructions, controlled, read_difficulty
from tasks.loading import HubDataset, load_rows

HUB = HubDataset("tatsu-lab/alpaca_eval", file="alpaca_eval.json")
HUB2 = HubDataset("tatsu-lab/alpaca_eval", file="alpaca_eval_gpt4_baseline.json")
# The released runs end a completion where the model begins to comment on its own answer.
STOPS = ("\n\nComment:",)


@dataclass(frozen=True)
class AlpacaEval(Task):
    """The 805 instructions and a judge of pairs.

    Attributes:
        judge: has `annotate(examples, texts)`, which returns for each example 1 for a win, 0.5
            for a draw, 0 for a loss, a number in between from a weighted judge, or None for no
            verdict.
        path: a local file with the columns instruction and output; None takes the hub.
        revision: the hub commit.
        paper_dataset: False for data of one's own; see `tasks.base.Task`.
        decoding: the paper's; a mapping replaces single settings.
    """

    name = "alpaca_eval"
    hub: ClassVar[HubDataset] = HUB
    metrics: ClassVar[dict[str, MetricInfo]] = {
        "win_rate": MetricInfo("win rate"),
        "avg_length": MetricInfo("length (characters)", percent=False),
    }
    judge: Any = None
    path: str | None = None
    revision: str | None = None
    paper_dataset: bool = True
    decoding: Decoding = Decoding(max_new_tokens=2048, stop=STOPS)

    def check(self) -> None:
        """Refuses a run without a judge.

        Raises:
            UserError: the judge is missing or cannot work.
        """
        if self.judge is None:
            raise UserError(
                f"task.{self.name}.judge is empty: name one (conf/task/{self.name}.yaml shows how)"
            )
        check_judge(self.judge)

    def judged_by(self) -> dict[str, Any]:
        """The judge of pairs."""
        return {"judge": identity_of(self.judge)}

    def examples(self) -> list[Example]:
        """The instructions in the dataset's order.

        Raises:
            UserError: the dataset cannot be loaded.
        """
        rows = load_rows(
            self.path,
            self.hub,
            self.revision,
            setting=f"task.{self.name}.path",
            columns=("instruction", "output"),
        )
        return [
            Example(
                id=str(number),
                prompt=Prompt(raw=row["instruction"], user=row["instruction"]),
                target=row["output"],
                row={key: row[key] for key in ("dataset", "generator") if key in row},
            )
            for number, row in enumerate(rows)
        ]

    def edition(self) -> Edition | None:
        """The instructions with text-davinci-003's answers."""
        return Edition(805, "c2713205f8a4d02ade549775318485f0b747e317256c677b93429152b4474f4f")

    def score(self, example: Example, texts: Sequence[str]) -> Score:
        """Judges one answer."""
        return self.score_all([example], [texts])[0]

    def score_all(self, examples: Sequence[Example], texts: Sequence[Sequence[str]]) -> list[Score]:
        """Judges every answer."""
        answers = [samples[0].strip() for samples in texts]
        wins = self.judge.annotate(examples, answers)
        return [
            Score(
                example.id,
                values={"win_rate": win, "avg_length": float(len(answer))},
                answer=answer,
                target=str(example.target),
                parsed=win is not None,
            )
            for example, answer, win in zip(examples, answers, wins, strict=True)
        ]


@dataclass(frozen=True)
class AlpacaEval2(AlpacaEval):
    """AlpacaEval 2: the same instructions against GPT-4's answers, with lengths controlled.

    The headline `lc_win_rate` is the mean of predicted wins (tasks/length_control.py).

    Attributes:
        judge: as in `AlpacaEval`; AlpacaEval 2's is weighted_alpaca_eval_gpt4_turbo.
        path: a local file of the baseline's outputs, with instruction and output; None takes the
            hub's GPT-4 outputs.
        difficulty: df_gamed.csv of the dataset tatsu-lab/alpaca_eval; required.
    """

    name = "alpaca_eval2"
    hub: ClassVar[HubDataset] = HUB2
    metrics: ClassVar[dict[str, MetricInfo]] = {
        "lc_win_rate": MetricInfo("length-controlled win rate"),
        **AlpacaEval.metrics,
    }
    difficulty: str | None = None

    def check(self) -> None:
        """Refuses a run without a judge or without the file of difficulties.

        Raises:
            UserError: one of them is missing or cannot work.
        """
        self._difficulty()
        super().check()

    def edition(self) -> None:
        """None: the paper has no AlpacaEval 2."""

    def examples(self) -> list[Example]:
        """The instructions in the dataset's order.

        Raises:
            UserError: the dataset cannot be loaded, or an instruction's difficulty is unknown.
        """
        found = super().examples()
        if self.difficulty is not None:  # check() wants it, but generating alone does not
            check_instructions(self._difficulty(), len(found), f"task.{self.name}.difficulty")
        return found

    def score_all(self, examples: Sequence[Example], texts: Sequence[Sequence[str]]) -> list[Score]:
        """Judges every answer, then fits the model of lengths to all verdicts."""
        scores = super().score_all(examples, texts)
        predicted = controlled(
            [score.values["win_rate"] for score in scores],
            [
                (len(s.answer or ""), len(str(e.target)))
                for e, s in zip(examples, scores, strict=True)
            ],
            [int(example.id) for example in examples],
            self._difficulty(),
        )
        for score, value in zip(scores, predicted, strict=True):
            score.values["lc_win_rate"] = value
        return scores

    def _difficulty(self) -> Any:
        setting = f"task.{self.name}.difficulty"
        if self.difficulty is None:
            raise UserError(
                f"{setting} is empty: the length-controlled win rate needs df_gamed.csv of the"
                " dataset tatsu-lab/alpaca_eval on the hub; download it and give its path"
            )
        return read_difficulty(self.difficulty, setting)


def win_of(preference: float) -> float:
    """Converts a preference of alpaca-eval's files: 1 for a win, 0 for a loss, 0.5 for a draw.

    Raises:
        UserError: the preference is neither 0 nor within 1..2.
    """
    if preference == 0:  # how alpaca-eval once wrote a draw
        return 0.5
    if not 1 <= preference <= 2:
        raise UserError(f"a preference is 0 or lies within 1..2, not {preference}")
    return preference - 1
