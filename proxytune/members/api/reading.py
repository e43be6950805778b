"""The forms in which servers write their lists: what is at one position, and how many tokens."""

from collections.abc import Mapping
from typing import Any

from proxytune.members.api.faults import Ended, Malformed
from proxytune.members.api.names import Named

ENDED = "the server ends its text, lists nothing for the token that ends it"


def counted_by(answer: Mapping[str, Any]) -> int | None:
    """The server's count of the prompt's tokens; None if it gives none."""
    usage = answer.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    return count if isinstance(count, int) and count > 0 else None


def generated(choice: Mapping[str, Any]) -> list[Named]:
    """The listed tokens at the position of the one generated token.

    Raises:
        Ended: nothing is listed, for the text has ended.
        Malformed: nothing is listed, or more than one position.
    """
    logprobs = choice["logprobs"]
    if logprobs is None:
        raise Malformed("no log-probabilities")
    content = logprobs.get("content")  # chat, and llama.cpp's completions
    lists = logprobs["top_logprobs"] if content is None else content
    if not lists and choice.get("finish_reason") not in (None, "length"):
        raise Ended(ENDED)
    if len(lists) != 1:
        raise Malformed(f"{len(lists)} positions where one was asked for (max_tokens=1)")
    return named(lists[0] if content is None else lists[0]["top_logprobs"])


def named(listed: Any) -> list[Named]:
    """The tokens at one position.

    Args:
        listed: name -> log-probability, name -> {"logprob": ...}, or a list of objects, each with
            its token's name, id or bytes.

    Raises:
        Malformed: there are none.
    """
    if not listed:
        raise Malformed("a place without log-probabilities")
    if isinstance(listed, Mapping):
        return [Named(number(value), name) for name, value in listed.items()]
    found: dict[Any, Named] = {}
    for place, each in enumerate(listed):
        token = Named(number(each), each.get("token") or "", _id(each), each.get("bytes"))
        # a token may stand twice in a list, and two tokens may have one text
        found[place if token.by_text else (token.key, token.logprob)] = token
    return [*found.values()]


def _id(token: Mapping[str, Any]) -> int | None:
    """The id of a listed token; servers call it id or token_id."""
    found = next((token[key] for key in ("id", "token_id") if token.get(key) is not None), None)
    return None if found is None else int(found)


def number(value: Any) -> float | None:
    """A log-probability; None for a token that is listed without one."""
    if isinstance(value, Mapping):
        value = value["logprob"]
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return float("nan")  # "NaN", "-inf", true: refused by the arithmetic on the list
