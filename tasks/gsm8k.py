r"""GSM8K: grade-school arithmetic in words (Cobbe et al. 2021), zero-shot, 1,319 test questions.

One row:
    {"question": "Janet’s ducks lay 16 eggs per day. [...] at the farmers' market?",
     "answer": "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes [...]\n#### 18"}

`acc` is the paper's number, with the quirks of its rule: the last number of the completion is
compared with the gold answer as a string without punctuation, so "57.00" is wrong against 57, "7.5"
is right against 75, and an integer has no sign. `acc_numeric` compares values: "$-60" is -60, and
"$70{,}000." is 70000, and "1/10" is not 10 (tasks/numbers.py). It takes the number after "####" or
in \boxed{...} where a completion has one, and is not cut at a stop word within a chain of thought
(`careful_answer`).

Deviations from the paper: none in `acc`. Generation ends only at a stop word that begins a line, so
that such a chain of thought is whole; `acc` still reads the text before the first stop word.
"""

import re
import string
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from proxytune.errors import UserError
from proxytune.records import Decoding, Example, Prompt, Score
from tasks.base import Edition, MetricInfo, Task
from tasks.loading import HubDataset, load_rows
from tasks.numbers import Number, Value, numbers, parse_number, plain

HUB = HubDataset("openai/gsm8k", "main", "test")
INSTRUCTION = "Answer the following question."
# A model that goes on to another question writes one of these; the paper cuts there.
STOP_WORDS = ("Answer the following question", "Question:", "Comment:")

# Where generation ends. A stop word within a line may belong to a chain of thought ("Let me restate
# the Question: ..."), of which `acc_numeric` wants the end; `acc` is cut at it all the same.
STOPS = tuple(f"\n{word}" for word in STOP_WORDS)

_THOUSANDS = re.compile(r"(\d),(\d)")
_PROTOCOL_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
_STOP_WORD = re.compile("|".join(STOP_WORDS))
# the mark before an answer of the dataset
_MARKED = re.compile(
    r"####[\s*$]*(?:(?:the )?(?:final )?answer(?: is)?[\s*$:]*)?(?:\\boxed\{)?", re.IGNORECASE
)
_INSIDE = r"[^{}]*"  # braces, of which three stand in each other
for _ in range(2):
    _INSIDE = rf"[^{{}}]*(?:\{{{_INSIDE}\}}[^{{}}]*)*"
_BOXED = re.compile(rf"\\(?:boxed|fbox) *\{{{_INSIDE}\}}")
_AFTER_ANSWER = re.compile(rf"[\s.*$%)}}\]\\]*(?:\n|\Z|{_STOP_WORD.pattern})")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class GSM8K(Task):
    """GSM8K's test set; see the module for the two metrics.

    Attributes:
        path: a local file with the columns question and answer; None takes the hub.
        revision: the hub commit.
        instruction: whether the prompt begins with the instruction sentence. The paper prompts
            with it, even experts that were trained on "Question: ... Answer:" alone.
        paper_dataset: False for data of one's own; see `tasks.base.Task`.
        decoding: the paper's; a mapping replaces single settings.
    """

    name = "gsm8k"
    metrics: ClassVar[dict[str, MetricInfo]] = {
        "acc": MetricInfo("accuracy"),
        "acc_numeric": MetricInfo("accuracy, parsed as numbers"),
    }
    former_stops: ClassVar[Sequence[tuple[str, ...]]] = (STOP_WORDS,)
    path: str | None = None
    revision: str | None = None
    instruction: bool = True
    paper_dataset: bool = True
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
                target=gold(str(row["answer"])),
            )
            for number, row in enumerate(rows)
        ]

    def edition(self) -> Edition:
        """The test set."""
        return Edition(1319, "a268ba426c12adf61334fc4c0b940ed34ec8dd132f746d8a639eb80be8eb6281")

    def contents(self, example: Example) -> list[Any]:
        """The question and the gold number, with or without the instruction."""
        return [example.prompt.user.partition("Question: ")[2], example.target]

    def score(self, example: Example, texts: Sequence[str]) -> Score:
        """Compares the completion's answer, found in both ways, with the gold answer."""
        text = cut(texts[0])
        target = str(example.target)
        answer = last_number(text)
        value = parse_number(target)
        number = careful_answer(texts[0])
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
    if not mark or parse_number(number) is None:
        raise UserError(f"no '#### number' ends the gold passage {passage[-80:]!r}")
    return number.strip().replace(",", "")


def cut(text: str) -> str:
    """The text up to the point at which the model goes on to another question."""
    stop = _STOP_WORD.search(text)
    return text if stop is None else text[: stop.start()]


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


def careful_answer(text: str) -> Value | None:
    r"""The value of the answer by the rule of `acc_numeric`; None if there is no number.

    The text ends where the model turns to another question: at a stop word that begins a line
    after a number. What remains is read in the forms that mark an answer if it has one: the last
    number alone in its line after "####", or in \boxed{...}, or before a sentence that begins with
    a stop word. Else the answer is the last number; then a stop word that begins a sentence after a
    number ends the text, too. A stop word within a sentence never does.

    Args:
        text: the whole completion.
    """
    text = plain(text)
    found = list(numbers(text))
    end = _end(text, found, _begins_line)
    found = _marked(text[:end], found) or found
    end = _end(text[:end], found, _begins_sentence)
    return next((n.value for n in reversed(found) if n.end <= end), None)


def _marked(text: str, found: Sequence[Number]) -> list[Number]:
    """Those of the numbers that stand after "####", alone in their lines, or last in a box."""
    marked = []
    ends = [number.end for number in found]
    for mark in _MARKED.finditer(text):
        number = next(iter(found[(at := bisect_right(ends, mark.end())) : at + 1]), None)
        if number and number.start <= mark.end() and _AFTER_ANSWER.match(text, number.end):
            marked.append(number)
    for box in _BOXED.finditer(text):
        at = bisect_right(ends, box.end())
        if at and found[at - 1].start > box.start():
            marked.append(found[at - 1])
    return sorted(marked, key=lambda number: number.end)


def _end(text: str, found: Sequence[Number], begins: Callable[[str], bool]) -> int:
    """The offset of the first stop word that follows one of the numbers, where `begins` holds."""
    for stop in _STOP_WORD.finditer(text):
        if found and found[0].end <= stop.start() and begins(text[: stop.start()]):
            return stop.start()
    return len(text)


def _begins_line(before: str) -> bool:
    return before.rstrip(" \t*_#>").endswith("\n")


def _begins_sentence(before: str) -> bool:
    last = before.rstrip(' \t\n*_#>("')[-1:]
    return not (last.isalpha() or last in ",;:-")
