"""Requests to an OpenAI-compatible judge, in the form that its model accepts.

Models that reason (OpenAI's o-series, gpt-5) refuse `max_tokens` and any temperature but their own.
What a model refuses by name is mended here: `max_completion_tokens` is sent instead, and sampling
settings are left out. `Accepted` keeps what was found, per endpoint and model, and belongs to the
judge's identity, because a temperature that is left out changes verdicts.
"""

import logging
import re
import threading
from dataclasses import dataclass, field
from typing import Any

import openai

from proxytune.errors import UserError

log = logging.getLogger(__name__)

# Settings that may be left out: the model then samples by its own default.
_SAMPLING = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "seed")
_REFUSAL_CODES = ("unsupported_parameter", "unsupported_value", "unknown_parameter")
_REFUSAL = re.compile(r"unsupported|not support|unrecognized|unknown parameter|not permitted", re.I)
_QUOTED = re.compile(r"['\"`]([a-z_]+(?:\[\d+\]\.role)?)['\"`]")
# Hidden reasoning counts as completion tokens: what is added where an answer ended within it.
_HEADROOM = (0, 4096, 32768)


@dataclass
class Accepted:
    """What one model of one endpoint accepts.

    Attributes:
        limit: the name of the limit on tokens.
        left_out: the sampling settings that are not sent.
        lock: guards changes by several threads.
    """

    limit: str = "max_tokens"
    left_out: tuple[str, ...] = ()
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
        name = _refused(error)
        if name is None or (name not in sent and name != "messages"):
            return False
        with self.lock:
            if name == "max_tokens":
                self.limit = "max_completion_tokens"
            elif name in _SAMPLING:
                self.left_out = tuple(sorted({*self.left_out, name}))
            else:
                raise UserError(
                    f"the judge {sent['model']} refuses {name}, which its annotator needs"
                    f" ({_words(error)}); choose another model (model=...) or annotator"
                    " (annotator=...)"
                )
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
        UserError: the model refuses what the judge cannot do without.
    """
    create = client.chat.completions.create if "messages" in prompt else client.completions.create
    reply: Any = None
    for headroom in _HEADROOM:
        while True:
            sent = accepted.request(settings, headroom)
            try:
                reply = create(**prompt, **sent)
                break
            except openai.APIStatusError as error:
                if not accepted.learn(error, sent):
                    raise
        if accepted.limit == "max_tokens" or not _cut_while_reasoning(reply):
            break
    return reply


def _cut_while_reasoning(reply: Any) -> bool:
    choices = getattr(reply, "choices", None) or [None]
    message = getattr(choices[0], "message", None)
    written = message is not None and (message.content or message.tool_calls)
    return getattr(choices[0], "finish_reason", None) == "length" and not written


def _refused(error: openai.APIStatusError) -> str | None:
    """The setting that an error refuses by name; None for another error."""
    if error.status_code not in (400, 422):
        return None
    if error.code not in _REFUSAL_CODES and not _REFUSAL.search(str(error)):
        return None
    names = [error.param, *_QUOTED.findall(_words(error))]
    name = next((n for n in names if n), None)
    return "messages" if name and name.startswith("messages") else name


def _words(error: openai.APIStatusError) -> str:
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return (str(message or error).strip() or type(error).__name__).splitlines()[0][:300]


def probe(
    client: openai.OpenAI, settings: dict[str, Any], accepted: Accepted, **prompt: Any
) -> bool:
    """One cheap request, so that a judge that cannot work is known before hours of generation.

    An endpoint that nobody answers at, or that is busy, may be ready when its answers are needed:
    that is a warning.

    Returns:
        Whether the model answered.

    Raises:
        UserError: the key, the model or a setting is refused.
    """
    try:
        complete(client, settings, accepted, **prompt)
    except (openai.APIConnectionError, openai.InternalServerError) as error:
        log.warning("the judge %s does not answer yet (%s)", settings["model"], _line(error))
        return False
    except openai.RateLimitError as error:
        if error.code == "insufficient_quota":
            raise UserError(f"the judge {settings['model']}: {_words(error)}") from error
        log.warning("the judge %s is busy (%s)", settings["model"], _words(error))
        return False
    except openai.APIStatusError as error:
        raise UserError(
            f"the judge {settings['model']} refuses a request with {error.status_code}"
            f" ({_words(error)}); set its key, model=... or base_url=..., or only generate for now"
            " (stage=generate)"
        ) from error
    if changed := accepted.record():
        log.info("the judge %s is asked with %s", settings["model"], changed)
    return True


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
