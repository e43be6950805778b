"""TriviaQA: closed-book trivia (Joshi et al. 2017), zero-shot, 11,313 development questions.

One row:
    {"question": "Who was the man behind The Chipmunks?", "question_id": "tc_2", ...,
     "answer": {"value": "David Seville", "aliases": ["David Seville"], ...}}

The hub's `unfiltered.nocontext` has exactly the paper's 87,622 train and 11,313 development
questions; `rc.nocontext` (17,944 rows) asks a question once per document source, so its repeated
ids are dropped. `em` is the paper's exact match: lower-cased and stripped, with the answer or an
alias. `em_normalized` also ignores punctuation, quotation marks (' ’ ‘ ´ ` alike), articles and
spacing, as the dataset's own evaluation does; an answer of which that leaves nothing is compared
like `em` does. An empty answer is wrong. Deviations from the paper: none known.
"""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from proxytune.errors import UserError
from proxytune.records import Decoding, Example, Prompt, Score
from tasks.base import Edition, MetricInfo, Task
from tasks.loading import HubDataset, Row, load_rows

_HIDDEN = "<unk>"  # the answer to each question of the test split
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = string.punctuation + "‘’´`"  # as in the dataset's own evaluation
_NO_PUNCTUATION = str.maketrans(_PUNCTUATION, " " * len(_PUNCTUATION))


@dataclass(frozen=True)
class TriviaQA(Task):
    """TriviaQA's development set.

    Attributes:
        path: a local file with the columns question and answer, where answer is {"value",
            "aliases"} or a string; None takes the hub.
        revision: the hub commit.
        subset: the hub's configuration.
        paper_dataset: False for data of one's own; see `tasks.base.Task`.
        decoding: the paper's; a mapping replaces single settings.
    """

    name = "triviaqa"
    metrics: ClassVar[dict[str, MetricInfo]] = {
        "em": MetricInfo("exact match"),
        "em_normalized": MetricInfo("exact match, normalised"),
    }
    path: str | None = None
    revision: str | None = None
    subset: str = "unfiltered.nocontext"
    paper_dataset: bool = True
    decoding: Decoding = Decoding(max_new_tokens=20, stop=("\n\n",))

    def examples(self) -> list[Example]:
        """The questions in the dataset's order, each once.

        Raises:
            UserError: the dataset cannot be loaded.
        """
        rows = load_rows(
            self.path,
            HubDataset("mandarjoshi/trivia_qa", self.subset, "validation"),
            self.revision,
            setting="task.triviaqa.path",
            columns=("question", "answer"),
        )
        found: dict[str, Example] = {}
        for number, row in enumerate(rows):
            name = str(row.get("question_id", number))
            question = f"Question: {row['question']}"
            prompt = Prompt(raw=f"{question}\nAnswer:", user=question, response_prefix="Answer:")
            found.setdefault(name, Example(id=name, prompt=prompt, target=answers(row)))
        return list(found.values())

    def edition(self) -> Edition:
        """The development questions; we had no copy to take a hash of."""
        return Edition(11313)

    def score(self, example: Example, texts: Sequence[str]) -> Score:
        """Compares the completion up to the first blank line with the answer and its aliases."""
        answer = texts[0].split("\n\n", 1)[0].strip()
        return Score(
            example.id,
            values={
                "em": float(plain(answer) in {plain(t) for t in example.target}),
                "em_normalized": float(any(matches(answer, t) for t in example.target)),
            },
            answer=answer,
            target=example.target[0],
            parsed=bool(answer),
        )


def answers(row: Row) -> list[str]:
    """The answer and its aliases, the answer first.

    Raises:
        UserError: the row holds no answer.
    """
    answer = row["answer"]
    if isinstance(answer, str):
        answer = {"value": answer, "aliases": row.get("aliases")}
    known = isinstance(answer, Mapping) and isinstance(answer.get("aliases"), list | None)
    texts = [answer.get("value"), *(answer.get("aliases") or ())] if known else []
    if not known or not all(isinstance(text, str | None) for text in texts):
        raise UserError(
            f"the answer to {row['question']!r} is {str(answer)[:80]}; it must be a text, or"
            ' {"value": text, "aliases": [texts]}'
        )
    found = [text for text in texts if text and text.strip() and text != _HIDDEN]
    if not found:
        raise UserError(f"the question {row['question']!r} has no answer (a test split?)")
    if found[0].startswith(("{'", '{"')):
        raise UserError(
            f"the answer to {row['question']!r} is a printed dictionary ({found[0][:60]}), as CSV"
            " files hold it; save the dataset as JSON Lines"
        )
    return list(dict.fromkeys(found))


def plain(text: str) -> str:
    """The form in which the paper compares answers: lower case, stripped."""
    return text.lower().strip()


def normalize(text: str) -> str:
    """Removes case, punctuation, articles and extra spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def matches(answer: str, target: str) -> bool:
    """Whether an answer equals a target by the rule of `em_normalized`.

    Where normalisation leaves nothing ("A", "The The", "?"), it would make such answers equal to
    each other and to the empty answer: there the texts themselves are compared.
    """
    normalized = normalize(answer)
    if normalized:
        return normalized == normalize(target)
    return bool(plain(answer)) and plain(answer) == plain(target)
