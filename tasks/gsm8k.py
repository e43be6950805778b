r"""GSM8K: grade-school arithmetic in words (Cobbe et al. 2021), zero-shot, 1,319 test questions.

One row:
    {"question": "Janet’s ducks lay 16 eggs per day. [...] at the farmers' market?",
     "answer": "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes [...]\n#### 18"}

`acc` is the paper's number, with the quirks of its rule: the last number of the completion is
compared with the gold answer as a string without punctuation, so "57.00" is wrong against 57, "7.5"
is right against 75, and an integer has no sign. `acc_numeric` parses the last number properly
("$-60" is -60, "1,000" is 1000) and compares values. Deviations from the paper: none.
"""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar

from proxytune.errors import UserError
from proxytune.records import Decoding, Example, Prompt, Score
from tasks.base import MetricInfo, Task
from tasks.loading import HubDataset, load_rows

HUB = HubDataset("openai/gsm8k", "main", "test")
INSTRUCTION = "Answer the following question."
# A model that goes on to another question writes one of these; the paper cuts there.
STOPS = ("Answer the following question", "Question:", "Comment:")

_THOUSANDS = re.compile(r"(\d),(\d)")
_PROTOCOL_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
# After a letter, digit, ")", "]" or "%", a sign is a subtraction or a hyphen, not a sign.
_SIGN = r"(?:(?<![\w.)\]%])[-−+])?"
_NUMBER = re.compile(
    rf"({_SIGN})[$€£]?([0-9]{{1,3}}(?:,[0-9]{{3}})+(?![0-9])(?:\.[0-9]+)?|[0-9]*\.[0-9]+|[0-9]+)"
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class GSM8K(Task):
    """GSM8K's test set; see the module for the two metrics.

    Attributes:
        path: a local file with the columns question and answer; None takes the hub.
        revision: the hub commit.
        instruction: whether the prompt begins with the instruction sentence. The paper prompts
            with it, even experts that were trained on "Question: ... Answer:" alone.
        decoding: the paper's; a mapping replaces single settings.
    """

    name = "gsm8k"
    metrics: ClassVar[dict[str, MetricInfo]] = {
        "acc": MetricInfo("accuracy"),
        "acc_numeric": MetricInfo("accuracy, parsed as numbers"),
    }
    path: str | None = None
    revision: str | None = None
    instruction: bool = True
    decoding: Decoding = Decoding(max_new_tokens=512, stop=STOPS)

    def examples(self) -> list[Example]:
        """The questions in the dataset's order.

        Raises:
            UserError: the dataset cannot be loaded, or a row has no "#### number".
        """
        rows = load_rows(
            self.path,
            HUB,
            self.revision,
            setting="task.gsm8k.path",
            columns=("question", "answer"),
        )
        head = f"{INSTRUCTION}\n\n" if self.instruction else ""
        return [
            Example(
                id=str(number),
                prompt=Prompt(
                    raw=f"{head}Question: {row['question']}\nAnswer:",
                    user=f"{head}Question: {row['question']}",
                    response_prefix="Answer:",
                ),
                target=gold(row["answer"]),
            )
            for number, row in enumerate(rows)
        ]

    def score(self, example: Example, texts: Sequence[str]) -> Score:
        """Compares the last number of the completion with the gold answer, in both ways."""
        text = cut(texts[0])
        target = str(example.target)
        answer = last_number(text)
        number = parse_number(text)
        value = parse_number(target)
        return Score(
            example.id,
            values={
                "acc": float(as_compared(answer) == as_compared(target)),
                "acc_numeric": float(number is not None and number == value),
            },
            answer=answer[-200:],
            target=target,
            parsed=_PROTOCOL_NUMBER.search(text) is not None,
        )


def gold(passage: str) -> str:
    """The number after "####", without thousands separators.

    Raises:
        UserError: there is none.
    """
    _, mark, number = passage.rpartition("####")
    if not mark or not number.strip():
        raise UserError(f"no '#### number' ends the gold passage {passage[-80:]!r}")
    return number.strip().replace(",", "")


def cut(text: str) -> str:
    """The text up to the point at which the model goes on to another question."""
    ends = [i for stop in STOPS if (i := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]


def last_number(text: str) -> str:
    """The answer by the paper's rule: the last number; without any number, the whole text.

    A comma between two digits is removed, pair by pair from the left, as in the published
    predictions: "5,3" becomes "53", and "0,0,0" becomes "00,0".
    """
    found = _PROTOCOL_NUMBER.findall(_THOUSANDS.sub(r"\1\2", text))
    return found[-1] if found else text


def as_compared(answer: str) -> str:
    """The form in which the paper compares answers: lower case, no ASCII punctuation."""
    return answer.lower().translate(_NO_PUNCTUATION)


def parse_number(text: str) -> Decimal | None:
    """The value of the last number in a text, with its sign; None if there is no number.

    Currency signs and thousands separators are ignored.
    """
    found = _NUMBER.findall(text)
    if not found:
        return None
    sign, digits = found[-1]
    value = Decimal(digits.replace(",", ""))
    return -value if sign[:1] in ("-", "−") else value
