"""Requests to an OpenAI-compatible judge, in the form that its model accepts.

Models that reason (OpenAI's o-series, gpt-5) refuse `max_tokens` and any temperature but their own,
and Claude refuses temperature beside top_p. What a model refuses by name, in whatever words, is
mended here: `max_completion_tokens` is sent instead, and sampling settings are left out. `Accepted`
keeps what was found, per endpoint and model, and belongs to the judge's identity, because a
temperature that is left out changes verdicts.
"""

import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import openai

from proxytune.errors import UserError
from proxytune.members.api.faults import failure_in, failure_of, reason_of
from tasks.judgements import JudgeError

log = logging.getLogger(__name__)

# Settings that may be left out: the model then samples by its own default.
_SAMPLING = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "seed")
# Of two settings that exclude each other, one with this value goes first.
_NEUTRAL = {"top_p": 1, "frequency_penalty": 0, "presence_penalty": 0}
_REFUSAL_CODES = ("unsupported_parameter", "unsupported_value", "unknown_parameter")
_REFUSAL = re.compile(
    r"unsupported|not support|n't support|unrecognized|unknown|not (permitted|allowed|available)"
    r"|max_completion_tokens",
    re.IGNORECASE,
)
# Hidden reasoning counts as completion tokens: what is added where an answer ended within it.
_HEADROOM = (0, 4096, 32768)


@dataclass
class Accepted:
    """What one model of one endpoint accepts.

    Attributes:
        limit: the name of the limit on tokens.
        left_out: the sampling settings that are not sent.
        proven: whether it has answered; from then on an error is about the prompt.
        lock: guards changes by several threads.
    """

    limit: str = "max_tokens"
    left_out: tuple[str, ...] = ()
    proven: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """What differs from the annotator's own request, as JSON; {} for nothing."""
        limit = {} if self.limit == "max_tokens" else {"limit": self.limit}
        return limit | ({"left_out": list(self.left_out)} if self.left_out else {})

    def restore(self, record: dict[str, Any]) -> None:
        """Takes over what an earlier session recorded."""
        self.limit = record.get("limit", "max_tokens")
        self.left_out = tuple(record.get("left_out", ()))

    def request(self, settings: dict[str, Any], headroom: int = 0) -> dict[str, Any]:
        """The settings in the form that the model accepts.

        Args:
            settings: of the annotator, with `max_tokens`.
            headroom: tokens added to the limit, for reasoning.
        """
        sent = {k: v for k, v in settings.items() if k not in self.left_out and k != "max_tokens"}
        return sent | {self.limit: settings["max_tokens"] + headroom}

    def learn(self, error: openai.APIStatusError, sent: dict[str, Any]) -> bool:
        """Notes what the model refuses; False if the error is another one.

        Args:
            error: the answer to a request.
            sent: its settings.

        Raises:
            UserError: the judge cannot do without what is refused.
        """
        name = _named(error, sent)
        if name is None:
            return False
        with self.lock:
            renamed = name == "max_tokens" and self.limit != name
            if renamed or name in self.left_out:
                return True  # another thread learnt it meanwhile
            if self.proven:
                return False
            if name in _SAMPLING:
                self.left_out = tuple(sorted({*self.left_out, name}))
                return True
            words = reason_of(error)
            if error.code not in _REFUSAL_CODES and not _REFUSAL.search(words):
                return False  # its value may be wrong, and not the setting
            if name != "max_tokens":
                raise UserError(
                    f"the judge {sent['model']} refuses {name}, which its annotator needs"
                    f" ({words}); choose another model (model=...) or annotator (annotator=...)"
                )
            self.limit = "max_completion_tokens"
        return True


_found: dict[tuple[str | None, str], Accepted] = {}


def accepted_by(url: str | None, model: str) -> Accepted:
    """What is known of an endpoint's model; the same object for every request."""
    return _found.setdefault((url, model), Accepted())


def complete(
    client: openai.OpenAI, settings: dict[str, Any], accepted: Accepted, **prompt: Any
) -> Any:
    """Asks once, in the form that the model accepts; asks again where that was learnt by it.

    An answer that ended within its reasoning is asked for again with a larger limit.

    Args:
        client: of the endpoint.
        settings: of the annotator, with model and max_tokens.
        accepted: of the model; what is learnt is added.
        prompt: `messages`, or `prompt` for the completions endpoint.

    Raises:
        openai.OpenAIError: the request failed.
        JudgeError: the answer is no completion.
        UserError: the model refuses what the judge cannot do without.
    """
    create = client.chat.completions.create if "messages" in prompt else client.completions.create
    reply: Any = None
    for headroom in _HEADROOM:
        while True:
            sent = accepted.request(settings, headroom)
            try:
                reply = _checked(create(**prompt, **sent))
                accepted.proven = True
                break
            except openai.APIStatusError as error:
                if not accepted.learn(error, sent):
                    raise
        if not _cut_while_reasoning(reply):
            break
    return reply


def _checked(reply: Any) -> Any:
    """The reply, if it is a completion; gateways answer with status 200 and an error."""
    body = reply.model_dump() if isinstance(reply, openai.BaseModel) else reply
    failure = failure_in(body)
    if failure is not None or not getattr(reply, "choices", None):
        said = failure or " ".join(str(body).split())[:200]
        raise JudgeError(f"what it sends is no completion: {said}")
    return reply


def _cut_while_reasoning(reply: Any) -> bool:
    (choice, *_) = reply.choices
    message = getattr(choice, "message", None)  # none of a completion of a text
    written = message is None or message.content or message.tool_calls
    return choice.finish_reason == "length" and not written


def _named(error: openai.APIStatusError, sent: Mapping[str, Any]) -> str | None:
    """The setting that a refusal is about; None if it names none that was sent."""
    failure = failure_of(error)
    if failure is None or error.status_code not in (400, 422) or failure.room:
        return None
    param = re.match(r"\w+", str(error.param or ""))
    if param and param[0] in (*sent, "messages"):
        return param[0]
    if re.search(r"messages\[\d+\]\.role", failure.message):
        return "messages"
    places = {}
    for name in sent.keys() - {"model"}:
        # top_p, topP and "top p"
        words = rf"(?<![a-z_]){name.replace('_', '[_ ]?')}(?![a-z_])"
        if found := re.search(words, failure.message, re.IGNORECASE):
            places[name] = found.start()
    neutral = {name for name in places if sent[name] == _NEUTRAL.get(name)}
    return min(neutral or places, key=places.__getitem__, default=None)


def probe(
    client: openai.OpenAI, settings: dict[str, Any], accepted: Accepted, **prompt: Any
) -> bool:
    """One cheap request, so that a judge that cannot work is known before hours of generation.

    An endpoint that nobody answers at, or that is busy, may be ready when its answers are needed:
    that is a warning.

    Returns:
        Whether the model answered.

    Raises:
        UserError: the key, the model or a setting is refused, or there is no such endpoint.
    """
    judge = f"the judge {settings['model']}"
    try:
        reply = complete(client, settings, accepted, **prompt)
    except JudgeError as error:
        raise UserError(f"{judge}: {error}; set model=... or base_url=...") from error
    except (openai.APIConnectionError, openai.InternalServerError) as error:
        log.warning("%s does not answer yet (%s)", judge, reason_of(error))
        return False
    except openai.APIStatusError as error:
        failure = failure_of(error)
        assert failure is not None
        if error.status_code == 429 and not failure.money:
            log.warning("%s is busy (%s)", judge, failure.message)
            return False
        raise UserError(
            f"{judge} refuses a request with {error.status_code} ({failure.message}); set its key,"
            " model=... or base_url=..., or only generate for now (stage=generate)"
        ) from error
    if settings.get("logprobs") and _lacks_logprobs(reply):
        raise UserError(
            f"{judge} gives no log-probabilities, which its annotator reads; choose another model"
            " (model=...) or annotator (annotator=...)"
        )
    if changed := accepted.record():
        log.info("%s is asked with %s", judge, changed)
    return True


def _lacks_logprobs(reply: Any) -> bool:
    """Whether a chat's answer lists no likely tokens: some servers ignore the wish."""
    (choice, *_) = reply.choices
    message = getattr(choice, "message", None)
    listed = getattr(choice.logprobs, "content", None)
    tops = listed and listed[0].top_logprobs
    return message is not None and bool(message.content) and not tops
