"""RealTimeQA: multiple-choice questions about the news of a week (Kasai et al. 2023).

One row of a weekly file (past/<year>/<date>_qa.jsonl of github.com/realtimeqa/realtimeqa_public):
    {"question_id": "20220617_0", "question_date": "2022/06/16", "question_source": "CNN", ...,
     "question_sentence": "Which wildly popular show was recently green lit for a new season?",
     "choices": ["“Game of Thrones”", "“Squid Game”", "“Breaking Bad”", "“Friends”"],
     "answer": ["1"], "evidence": "Netflix announced the hit [...]"}

`acc` is the paper's metric. A base behind an API shows only its five likeliest tokens; if no
option's letter is among them, the completion is empty and the question leaves the denominator.
`acc_all` counts it as wrong.

Deviations from the paper: it counts 3,531 questions from 13 June 2022 to 1 December 2023, but the
public weekly files of that time hold 2,140 (2,150 rows; the week of 22 September 2023 has ten of
them twice). Its prompt is not known in full, so the questions are asked in the form of TruthfulQA's
multiple choice. A question belongs to the week in its id: some dates in the files are wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import ClassVar

from proxytune.errors import UserError
from proxytune.records import Decoding, Example, Prompt, Score
from tasks.base import Edition, MetricInfo, Task
from tasks.loading import Row, check_columns, read_rows
from tasks.truthfulqa import LETTERS, check_answers, parse_option

ANSWERS = ("letter", "open")
_COLUMNS = ("question_id", "question_date", "question_sentence", "choices", "answer")


@dataclass(frozen=True)
class RealTimeQA(Task):
    """RealTimeQA's weekly quizzes within two dates.

    Attributes:
        path: a folder of weekly files (searched with its subfolders) or one file; required,
            because the dataset is on GitHub only.
        first: the date (YYYY-MM-DD) from which weeks are asked about; None has no limit.
        last: the date up to which weeks are asked about; None has no limit.
        answers: "letter" shows the options and takes one of their letters; "open" shows none and
            takes the right one's wording (the dataset's generation setting). It is asked in
            TriviaQA's form and needs `decoding.choices: []` and more new tokens.
        paper_dataset: False for data of one's own; see `tasks.base.Task`.
        decoding: the paper's; a mapping replaces single settings.
    """

    name = "realtimeqa"
    metrics: ClassVar[dict[str, MetricInfo]] = {
        "acc": MetricInfo("accuracy of answered questions"),
        "acc_all": MetricInfo("accuracy"),
    }
    path: str | None = None
    first: str | None = "2022-06-13"
    last: str | None = "2023-12-01"
    answers: str = "letter"
    paper_dataset: bool = True
    decoding: Decoding = Decoding(max_new_tokens=1, choices=tuple(LETTERS))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_answers(self.name, self.answers, ANSWERS)
        if self.answers == "open" and self.decoding.choices:
            raise UserError(
                f"task.{self.name}.answers=open takes decoding.choices=[], not the letters"
            )

    def check(self) -> None:
        """Refuses a run without data.

        Raises:
            UserError: no path is given.
        """
        if self.path is None:
            raise UserError(
                "task.realtimeqa.path is empty: RealTimeQA is on no hub; clone "
                "github.com/realtimeqa/realtimeqa_public and say task.realtimeqa.path=FOLDER/past"
            )

    def examples(self) -> list[Example]:
        """The questions week by week, each once.

        Raises:
            UserError: the files cannot be read.
        """
        self.check()
        found: dict[str, Example] = {}
        for row in _rows(Path(str(self.path)).expanduser()):
            if not self._asked(row):
                continue
            example = _example(row, self.answers)
            other = found.setdefault(example.id, example)
            if other != example:  # 20230414_20 is the id of two questions
                again = replace(example, id=f"{example.id}_{row['question_date']}")
                found.setdefault(again.id, again)
        if not found:
            raise UserError(f"no week in {self.path} dates from {self.first} to {self.last}")
        return list(found.values())

    def edition(self) -> Edition:
        """The paper's questions; the public files hold 2,140 of them, so only the size is known."""
        return Edition(3531)

    def score(self, example: Example, texts: Sequence[str]) -> Score:
        """Compares the option; an empty completion leaves the denominator of `acc`."""
        first = texts[0].strip()[:1]
        answer = first if first and first in LETTERS else None
        if self.answers == "open":
            answer = parse_option(texts[0], example.row["options"])
        right = float(answer == example.target)
        excluded = not texts[0].strip()
        return Score(
            example.id,
            values={"acc": None if excluded else right, "acc_all": right},
            answer=answer,
            target=example.target,
            parsed=answer is not None,
            explanation="no option was within reach" if excluded else "",
        )

    def _asked(self, row: Row) -> bool:
        week = _week(row)
        after = self.first is None or date.fromisoformat(self.first) <= week
        return after and (self.last is None or week <= date.fromisoformat(self.last))


def _rows(path: Path) -> list[Row]:
    if path.is_dir():
        files = sorted(f for f in path.rglob("*_qa.jsonl*") if "_nota" not in f.name)
    else:
        files = [path]
    if not files:
        raise UserError(f"{path} holds no *_qa.jsonl file of RealTimeQA")
    rows = []
    for file in files:
        week = read_rows(file)
        check_columns(week, _COLUMNS, str(file))
        rows += week
    return rows


def _week(row: Row) -> date:
    name = str(row["question_id"])
    try:
        return datetime.strptime(name[:8], "%Y%m%d").date()
    except ValueError:
        raise UserError(f"question id {name!r} does not begin with a date (20220617_0)") from None


def _example(row: Row, answers: str) -> Example:
    options = [choice for choice in row["choices"] if choice.strip()]
    target = LETTERS[int(row["answer"][0])]
    if answers == "open":
        asked = f"Question: {row['question_sentence']}"
        prompt = Prompt(raw=f"{asked}\nAnswer:", user=asked, response_prefix="Answer:")
        return Example(row["question_id"], prompt, target, {"options": options})
    asked = "\n".join(
        [
            row["question_sentence"],
            *(f"{letter}. {o}" for letter, o in zip(LETTERS, options, strict=False)),
        ]
    )
    return Example(
        id=row["question_id"],
        prompt=Prompt(
            raw=f"{asked}\n\nThe answer is:", user=asked, response_prefix="The answer is:"
        ),
        target=target,
    )
