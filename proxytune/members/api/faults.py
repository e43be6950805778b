"""Failures of a server: what it says, and whether to wait, to ask otherwise, or to end the run."""

import email.utils
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import openai

from proxytune.errors import UpstreamError, UserError

_LONGEST = 2000  # characters of a server's message that are shown
_TRY_AGAIN = (408, 409, 425, 429)  # and every 5xx
_NO_MONEY = ("insufficient_quota", "insufficient_credits", "billing_hard_limit_reached")
_TOO_LONG = (
    "context_length_exceeded",
    "exceed_context_size_error",
    "model_context_window_exceeded",
)
# The words in which servers refuse a prompt for its length, those that must come with them, and
# those that speak of something else.
_LENGTH = re.compile(
    r"context|\b(inputs?|prompts?|sequence|messages?|tokens?|length)\b|position embedding"
    r"|max_(model_len|total_tokens|seq_len|position)|request too large|chunk",
    re.IGNORECASE,
)
_EXCEEDED = re.compile(
    r"exceed|longer|too (long|large|big|many)|maximum|at most|larger|greater|beyond|more than"
    r"|> ?(\d|max)|must be (<|less|at most|between|within)|must have less|overflow"
    r"|only (\d|has|have)|reduce|no room|limit|input length should be|physical batch|not fit",
    re.IGNORECASE,
)
_SELF_EVIDENT = re.compile(
    r"(input|prompt)_length_error|(prompt_)?too_long|too_many_tokens|(find|full).{0,20}kv.?cache"
    r"|kv.?cache.{0,20}full",
    re.IGNORECASE,
)
_ELSE = re.compile(
    r"log_?probs|token id|per (second|minute|min|hour|day|month)|quota|policy|queue|string_type"
    r"|rate.?limit|number of prompts|overloaded|best_of|stop|\bn\b|deadline|timed? ?out|cancell?ed"
    r"|capacity|unavailable|busy",
    re.IGNORECASE,
)
# We ask for one token, so none or fewer is what the server's context leaves (vLLM).
_NONE_LEFT = re.compile(
    r"max_\w*tokens\b.{0,60}\b(got|value=|is|was):? ?\(?(0|-\d+)\b", re.IGNORECASE
)
_WAIT = re.compile(
    r"rate.?limit|too many requests|overloaded|try again|temporarily|capacity|timed? ?out|busy",
    re.IGNORECASE,
)
_POOR = re.compile(r"insufficient|credit|quota|billing|payment|balance", re.IGNORECASE)


class Refused(UpstreamError, UserError):
    """The server says that it cannot serve the request."""


class NoRoom(Refused):
    """The prompt does not fit into the server's context."""


class Ended(Refused):
    """The server ends its text at this position, and lists nothing for it."""


class Closed(UpstreamError, UserError):
    """No request may be sent: the key is wrong, or the money is spent."""


class Malformed(Exception):
    """The answer does not follow the protocol."""


@dataclass(frozen=True)
class Failure:
    """A server's refusal of one request.

    Attributes:
        status: of HTTP, or as the body of an answer with status 200 gives it; None if unknown.
        code: the server's name for it; "" if it gives none.
        message: the server's words, in one line.
        retry_after: seconds after which the server wants to be asked again.
    """

    status: int | None
    code: str
    message: str
    retry_after: float | None = None

    def __str__(self) -> str:
        name = self.status if self.status is not None else self.code
        return f"{name}, {self.message}" if name else self.message

    @property
    def key(self) -> bool:
        """Whether the key is not accepted."""
        return self.status in (401, 403) or self.code == "invalid_api_key"

    @property
    def money(self) -> bool:
        """Whether the account has no money left."""
        if self.status == 402 or self.code in _NO_MONEY:
            return True
        unnamed = self.status is None and not _WAIT.search(f"{self.code} {self.message}")
        return unnamed and bool(_POOR.search(self.message))

    @property
    def room(self) -> bool:
        """Whether the prompt is longer than the server's context."""
        if self.status is not None and self.status < 500 and self.status not in (400, 413, 422):
            return False
        if self.code in _TOO_LONG:
            return True
        said = f"{self.code} {self.message}"
        if _SELF_EVIDENT.search(said) or _NONE_LEFT.search(self.message):
            return True
        length = _LENGTH.search(self.message) and _EXCEEDED.search(self.message)
        return bool(length) and not _ELSE.search(self.message)

    @property
    def passing(self) -> bool:
        """Whether it may be over after a while."""
        if self.status is None:
            return bool(_WAIT.search(f"{self.code} {self.message}"))
        return self.status >= 500 or self.status in _TRY_AGAIN


class Failed(Exception):
    """The body of an answer with status 200 holds a refusal."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


def failure_of(error: Exception) -> Failure | None:
    """The server's refusal; None where it is the network that failed, or an unknown form."""
    if isinstance(error, Failed):
        return error.failure
    if not isinstance(error, openai.APIStatusError):
        return None
    after = _retry_after(error.response.headers.get("retry-after"))
    said = _said(error.body)
    message = said.message if said else str(error.message)
    code = str(error.code or (said.code if said else ""))
    return Failure(error.status_code, code, _one_line(message) or "no message", after)


def failure_in(answer: Any) -> Failure | None:
    """The refusal in the body of an answer with status 200; None where there is none.

    Gateways answer so: {"error": {"message": "Insufficient credits", "code": 402}}, an error in
    place of a choice's text, or {"object": "error", "message": ...}.
    """
    if not isinstance(answer, Mapping):
        return None
    choices = answer.get("choices")
    found = [answer.get("error")]
    if isinstance(choices, list):
        found += [each.get("error") for each in choices if isinstance(each, Mapping)]
    elif answer.get("object") == "error" or "message" in answer or "detail" in answer:
        found.append(answer)
    return next((_said(each) for each in found if each), None)


def _said(body: Any) -> Failure | None:
    """The code and the message in an error's body, whatever its form."""
    if isinstance(body, str) and body.strip():
        return Failure(None, "", _one_line(body))
    if isinstance(body, list) and len(body) == 1:  # Gemini's
        return _said(body[0])
    if not isinstance(body, Mapping):
        return None
    inner = body.get("error")
    if isinstance(inner, str | Mapping) and inner:
        return _said(inner)
    message = next((body[key] for key in ("message", "detail", "msg") if body.get(key)), None)
    if message is None:
        message = dict(body)
    text = message if isinstance(message, str) else json.dumps(message)
    codes = [body.get(key) for key in ("code", "status", "type")]
    numbers = [int(str(c)) for c in codes if re.fullmatch(r"[1-5]\d\d", str(c))]
    names = [c for c in codes if isinstance(c, str) and not c.isdigit()]
    return Failure(numbers[0] if numbers else None, names[0] if names else "", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_LONGEST]


def reason_of(error: BaseException) -> str:
    """The server's or the network's message, in one line."""
    if isinstance(error, openai.APIStatusError):
        return str(failure_of(error))  # its own text is the body's Python form
    if isinstance(error, openai.APITimeoutError):
        return "timed out"
    cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else None
    return _one_line(str(cause or error)) or type(cause or error).__name__


def _retry_after(header: str | None) -> float | None:
    """Seconds to wait, from a header that holds a number or a date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
