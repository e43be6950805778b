"""Turns rows of text into token ids and labels; only answers carry loss.

A prompt is tokenised as it is for generation (`prompt_ids`: the tokenizer's own BOS, then the text,
and nothing that it adds at the end), so a tuned model is asked in the form in which it was trained.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from proxytune.errors import UserError
from proxytune.loading.prompting import apply_template, prompt_ids

IGNORE = -100  # transformers' loss ignores positions with this label

Turn = tuple[str, bool]  # a piece of text, and whether it carries loss

_HUB = {
    # name -> dataset, configuration. TriviaQA's unfiltered train split has the paper's 87,622 rows.
    "gsm8k": ("openai/gsm8k", "main"),
    "triviaqa": ("mandarjoshi/trivia_qa", "unfiltered.nocontext"),
}


@dataclass(frozen=True)
class Tokenized:
    """A tokenised training set.

    Attributes:
        examples: {"input_ids": [...], "labels": [...]} with IGNORE on everything but answers.
        dropped: examples left out because they were longer than the limit.
        resplit: examples in which one token would have spanned the end of the prompt and the
            beginning of the answer; the two were tokenised separately.
    """

    examples: list[dict[str, list[int]]]
    dropped: int
    resplit: int

    @property
    def tokens(self) -> int:
        """Tokens of one epoch, without padding."""
        return sum(len(e["input_ids"]) for e in self.examples)

    @property
    def answer_tokens(self) -> int:
        """Tokens of one epoch that carry loss."""
        return sum(label != IGNORE for e in self.examples for label in e["labels"])


def check_source(data: str, file: str | None = None) -> None:
    """Refuses local training data that does not exist, before a model is loaded.

    Args:
        data, file: as in `read_rows`.

    Raises:
        UserError: there is no such file, or `file` is given without a name that takes one.
    """
    if file and data not in _HUB:
        raise UserError(f"data_file goes with data=gsm8k or data=triviaqa, not with data={data}")
    path = file or (None if data in _HUB else data)
    if path is not None and not Path(path).is_file():
        raise UserError(
            f"no training data at {path}; data is one of {', '.join(_HUB)}, or a JSONL file"
        )


def read_rows(data: str, file: str | None = None) -> list[dict[str, Any]]:
    """Reads the rows of a training set.

    Args:
        data: "gsm8k", "triviaqa", or a JSONL file of {"prompt", "completion"} or {"messages"}.
        file: a local JSONL copy of gsm8k or triviaqa in the dataset's own columns.

    Raises:
        UserError: the data cannot be loaded or holds no rows; the message says what to do.
    """
    check_source(data, file)
    if data in _HUB:
        rows = _read_jsonl(Path(file)) if file else _read_hub(data)
        convert = _gsm8k if data == "gsm8k" else _triviaqa
        try:
            rows = [convert(row) for row in rows]
        except (KeyError, TypeError) as error:
            raise UserError(f"{file or data}: a row lacks {data}'s column {error}") from error
    else:
        rows = _read_jsonl(Path(data))
    if not rows:
        raise UserError(f"{file or data} holds no rows; there is nothing to train on")
    return rows


def turns(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Turn]:
    """Splits one row into pieces of text, in order, each with whether it carries loss.

    The tokenizer's template renders chat rows. Every assistant turn carries loss, together with
    the text with which the template ends it.

    Raises:
        UserError: the row has neither of the two forms, or the template refuses its turns or
            renders earlier ones differently once a conversation goes on.
    """
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return [(row["prompt"], False), (row["completion"], True)]
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or messages[-1].get("role") != "assistant":
        raise UserError(
            'a training row must have the strings "prompt" and "completion", or "messages" that '
            f"end with the assistant; this one has {sorted(row)}"
        )
    pieces: list[Turn] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = apply_template(messages[:i], tokenizer)
        told = apply_template(messages[: i + 1], tokenizer, add_generation_prompt=False)
        if not asked.startswith(done) or not told.startswith(asked):
            raise UserError(
                "the chat template renders a conversation's beginning differently once it goes "
                "on, so the answer's tokens cannot be told apart; give prompt/completion rows"
            )
        pieces += [(asked[len(done) :], False), (told[len(asked) :], True)]
        done = told
    return pieces


def tokenize(
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    too_long: str = "error",
) -> Tokenized:
    """Tokenises rows: the prompt as in generation, the answer, one end-of-sequence token.

    Prompt and answer never share a token. Where the ids of the joined text begin with those of the
    prompt, the rest are the answer's; otherwise a token would straddle the boundary, the two are
    tokenised separately, and the example counts in `resplit`.

    Args:
        rows: as `read_rows` returns them.
        tokenizer: the model's.
        max_length: the longest allowed example in tokens, everything included. Nothing is
            truncated: half an answer would teach a model to stop in mid-sentence.
        too_long: "error" refuses the data, "drop" leaves the long examples out.

    Raises:
        UserError: a row has neither of the two forms, or examples are too long.
    """
    examples: list[dict[str, list[int]]] = []
    longest, n_long, resplit = 0, 0, 0
    for row in rows:
        ids, labels, straddled = _encode(row, tokenizer)
        if len(ids) > max_length:
            longest, n_long = max(longest, len(ids)), n_long + 1
            continue
        resplit += straddled
        examples.append({"input_ids": ids, "labels": labels})
    if n_long and too_long != "drop":
        raise UserError(
            f"{n_long} of {len(rows)} examples are longer than max_length={max_length} tokens (the "
            f"longest has {longest}): raise max_length, or leave them out with too_long=drop"
        )
    if not examples:
        raise UserError(f"all {len(rows)} examples are longer than max_length={max_length} tokens")
    return Tokenized(examples, n_long, resplit)


def collate(examples: Iterable[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pads the examples of a batch on the right, to the longest.

    Each example has a row of its own, so no example sees another. The padding comes after the
    real tokens, which a causal model therefore computes without it. Padding carries no loss.

    Returns:
        input_ids, attention_mask, labels: [example, longest]
    """
    rows = list(examples)
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    input_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        input_ids[i, :n] = torch.tensor(row["input_ids"])
        attention_mask[i, :n] = 1
        labels[i, :n] = torch.tensor(row["labels"])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _encode(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int], bool]:
    """One row's ids and labels, and whether a token straddled a boundary."""
    chat = "prompt" not in row

    text = ""
    ids: list[int] = []
    labels: list[int] = []
    straddled = False
    last: list[int] = []
    for piece, learn in turns(row, tokenizer):
        joined = prompt_ids(text + piece, tokenizer, special=not chat)
        if joined[: len(ids)] == ids:
            last = joined[len(ids) :]
        else:
            last, straddled = prompt_ids(piece, tokenizer, special=False), True
        text += piece
        ids = ids + last
        labels += last if learn else [IGNORE] * len(last)
    # A chat template ends the assistant's turn itself. Plain text has no end, so add one.
    if not (chat and set(last) & set(tokenizer.all_special_ids)):
        end = tokenizer.eos_token_id
        if not isinstance(end, int):
            raise UserError("the tokenizer has no end-of-sequence token, so no answer could end")
        ids = [*ids, end]
        labels.append(end)
    return ids, labels, straddled


def _gsm8k(row: dict[str, Any]) -> dict[str, str]:
    """Keeps the dataset's answer as it is, with its <<calculator marks>> and "#### n".

    The paper's GSM experts write both in the released generations, so they were trained on both.
    """
    return {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}


def _triviaqa(row: dict[str, Any]) -> dict[str, str]:
    return {
        "prompt": f"Question: {row['question']}\nAnswer:",
        "completion": f" {row['answer']['value']}",
    }


def _read_hub(name: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    path, configuration = _HUB[name]
    try:
        return list(load_dataset(path, configuration, split="train"))  # pyright: ignore
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load {path} ({configuration}) from the hub: {error}; give a local JSONL copy "
            "of its train split with data_file=..."
        ) from error


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number} is not a JSON object")
            rows.append(row)
    return rows
