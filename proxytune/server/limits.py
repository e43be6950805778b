"""How much a request may have, and the types that say so.

Very many stop strings slow everybody down, for each is looked for after each token. The other
limits keep one body from minutes of checking.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from proxytune.server.neutral import too_many

MOST_STOPS = 128
STOP_LENGTH = 1024  # characters
MOST_BIASES = 4096
MOST_TURNS = 4096  # and parts of one turn
MOST_PROMPTS = 65_536

TEXT_LENGTH = 10_000_000
Text = Annotated[str, Field(max_length=TEXT_LENGTH)]


Limit = Annotated[int, Field(ge=-1, le=2**31 - 1)]  # -1 is the rest of the context
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=STOP_LENGTH)]
Alpha = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


def at_most(most: int, things: str) -> BeforeValidator:
    """Refuses a longer list or object before its items are looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > most:
            raise too_many(len(value), things, most)
        return value

    return BeforeValidator(check)


def _check_prompt(prompt: Any) -> Any:
    """The types of `CompletionRequest.prompt`, in a fraction of the time that a union takes.

    A union of four types tries all of them on each of a million token ids.
    """
    if isinstance(prompt, list) and set(map(type, prompt)) in ({str}, {list}):
        if len(prompt) > MOST_PROMPTS:
            raise too_many(len(prompt), "prompts", MOST_PROMPTS)
        right = all(map(_is_text if isinstance(prompt[0], str) else _are_ids, prompt))
    else:
        right = _is_text(prompt) if isinstance(prompt, str) else _are_ids(prompt)
    if not right:
        raise PydanticCustomError("prompt", "no prompt")
    return prompt


def _is_text(prompt: str) -> bool:
    # encode() fails on a lone surrogate, which no tokenizer reads
    try:
        return len(prompt.encode()) <= TEXT_LENGTH
    except UnicodeEncodeError:
        return False


def _are_ids(prompt: Any) -> bool:
    if not isinstance(prompt, list) or not set(map(type, prompt)) <= {int}:
        return False
    return not prompt or (min(prompt) >= 0 and max(prompt) < 2**31)


def _check_ids(ids: Any) -> Any:
    if not _are_ids(ids):
        raise PydanticCustomError("token_ids", "no list of token ids")
    return ids


_TEXT = {"type": "string", "maxLength": TEXT_LENGTH}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}
BeginIds = Annotated[list[int], PlainValidator(_check_ids), WithJsonSchema(_IDS)]
Prompts = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_check_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                {"type": "array", "items": _TEXT},
                _IDS,
                {"type": "array", "items": _IDS},
            ]
        }
    ),
]
