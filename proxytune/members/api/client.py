"""Requests to the server: retries after failures, waits that it asks for, and the budget."""

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import openai

from proxytune.errors import Unanswered, UpstreamError, UserError
from proxytune.loopback import openai_client
from proxytune.members.api.faults import (
    Closed,
    Failed,
    Failure,
    Malformed,
    NoRoom,
    Refused,
    failure_in,
    failure_of,
    reason_of,
)
from proxytune.members.api.settings import ApiSettings
from proxytune.members.api.store import Store

log = logging.getLogger(__name__)

FIRST_WAIT = 0.5  # seconds before the second try; doubled for every further one
LONGEST_WAIT = 30.0
_CHECK_TIMEOUT = 15.0
# Where servers write the context length of a model: vLLM and SGLang, LM Studio, gateways.
_CONTEXT_KEYS = ("max_model_len", "loaded_context_length", "context_length", "context_window")
_WRONG_ANSWERS = 5  # tries of one request whose answers are whole, paid for, and of no use
BudgetLimit = Literal["max_requests", "max_tokens", "max_cost"]  # settings of `ApiSettings`
_ROUNDING = 1 + 1e-9  # sums of prices may come out this much too large


@dataclass(frozen=True)
class Spent:
    """Requests, tokens and money: of one request, or of all runs that share a store.

    Attributes:
        requests: tries that were sent, answered or not.
        tokens: read and written by the server.
        cost: in the currency of the prices.
    """

    requests: float = 0
    tokens: float = 0
    cost: float = 0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            self.requests + other.requests, self.tokens + other.tokens, self.cost + other.cost
        )

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(
            self.requests - other.requests, self.tokens - other.tokens, self.cost - other.cost
        )

    def exceeds(self, limits: ApiSettings) -> BudgetLimit | None:
        """The first setting whose limit these amounts are above; None if they keep to all."""
        if _above(self.requests, limits.max_requests):
            return "max_requests"
        if _above(self.tokens, limits.max_tokens):
            return "max_tokens"
        return "max_cost" if _above(self.cost, limits.max_cost) else None


def _above(amount: float, limit: float | None) -> bool:
    return limit is not None and amount > limit * _ROUNDING


class Client:
    """One endpoint.

    All answers must come from one model: an answer that names another one than the first ends the
    run.

    A request that fails with 408, 409, 425, 429, 5xx, a broken connection, a time-out or a
    malformed body is tried again after a growing, random wait (the server's Retry-After, where it
    gives one), for `retry_for_s` seconds; an answer of an unknown form, five times at most. An
    error in the body of an answer with status 200 counts as its own code says. Threads may share a
    client.

    Args:
        settings: the endpoint's.
        store: keeps the spending.
    """

    def __init__(self, settings: ApiSettings, store: Store) -> None:
        self.settings = settings
        self.store = store
        self.spent = Spent(**(store.fact("spent") or {}))
        self.max_positions: int | None = None  # the model's, if the server's list has it
        self._open = openai_client(
            settings.base_url, api_key=_key(settings), max_retries=0, timeout=settings.timeout_s
        )
        self._lock = threading.Lock()
        self._models: dict[str, str] = {}  # endpoint -> the model, as the first answer names it
        self._reserved = Spent()  # by requests that are under way
        self._not_before = 0.0  # time.monotonic() until which a Retry-After stops every request
        self._stopped = threading.Event()

    def check(self) -> None:
        """Checks by one cheap request that the server is there and accepts the key and the model.

        Raises:
            UserError: one of these fails.
        """
        try:
            # plain JSON, not the client's own type: a server without this route may send anything
            answer: Any = self._open.with_options(timeout=_CHECK_TIMEOUT).get(
                "/models", cast_to=object
            )
            known = {model["id"]: model for model in answer["data"]}
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            failure = failure_of(error)
            assert failure is not None
            raise UserError(self._wrong_key(failure)) from error
        except openai.APIConnectionError as error:
            raise UserError(
                f"nobody answers at {self.settings.base_url} ({reason_of(error)}); start the "
                "server, or set triple.base.api.base_url"
            ) from error
        except (openai.APIStatusError, ValueError, KeyError, TypeError):
            return  # the server has no list of models; the first real request checks the rest
        if known and self.settings.model not in known:
            raise UserError(
                f"{self.settings.base_url} has no model {self.settings.model!r}; it has "
                f"{', '.join(map(str, [*known][:10]))}: set triple.base.api.model"
            )
        self.max_positions = _context_of(known.get(self.settings.model, {}))

    def ask(
        self,
        endpoint: str,
        body: dict[str, Any],
        read: Callable[[dict[str, Any]], Any],
        prompt_tokens: int,
        tries: int | None = None,
    ) -> Any:
        """Sends a request until `read` accepts its answer.

        Args:
            endpoint: "completions" or "chat/completions".
            body: the JSON body.
            read: makes the result from the answer's JSON; a KeyError, TypeError, ValueError or
                `Malformed` in it means that the answer is malformed.
            prompt_tokens: the prompt's length, which counts until the server reports its own.
            tries: how often a request is sent that ends in a server's error (5xx), a malformed
                answer or a broken connection; None goes on for `retry_for_s` seconds.

        Raises:
            NoRoom: the prompt is too long for the server.
            Refused: the server says that it cannot serve the request, or fails at all `tries`.
            Unanswered: the server did not answer for `retry_for_s` seconds.
            Closed: the key is wrong, or the budget is spent.
        """
        give_up: float | None = None
        wait = FIRST_WAIT
        broken = wrong = 0  # failures of the server's own; answers of no use among them
        while True:
            self._wait_until_allowed()
            try:
                return self._send(endpoint, body, read, prompt_tokens)
            except UpstreamError:
                raise
            except (openai.APIError, Malformed, ValueError, Failed) as caught:
                error = caught
            failure, said = failure_of(error), reason_of(error)
            asked = self._judge(failure, endpoint) if failure else None
            wrong += not isinstance(error, openai.APIError | Failed)
            fails = isinstance(error, Malformed | openai.APIConnectionError)
            broken += (failure.status or 0) >= 500 if failure else fails
            if tries is not None and broken >= tries:
                url = self.settings.base_url
                raise Refused(f"{url} fails {broken} times: {said}") from error
            now = time.monotonic()
            give_up = give_up or now + self.settings.retry_for_s
            pause = wait * random.uniform(0.5, 1) if asked is None else asked
            if now + pause > give_up or wrong >= _WRONG_ANSWERS:
                raise Unanswered(self._given_up(said, wrong, asked)) from error
            log.info("trying again in %.1f s: %s", pause, said)
            if asked is not None:
                with self._lock:
                    self._not_before = max(self._not_before, now + asked)
            self._pause(pause)
            wait = min(2 * wait, LONGEST_WAIT)

    def _send(
        self,
        endpoint: str,
        body: dict[str, Any],
        read: Callable[[dict[str, Any]], Any],
        prompt_tokens: int,
    ) -> Any:
        """One try of `ask`; what it spends is counted."""
        reserved = self._reserve(prompt_tokens)
        usage = 0, 0
        try:
            answer = self._open.post(f"/{endpoint}", body=body, cast_to=object)
            failure = failure_in(answer)
            if failure is not None:
                raise Failed(failure)
            usage = _usage(answer, prompt_tokens)
            self._check_model(endpoint, answer)
            return _read(answer, read)
        finally:
            self._release(reserved, *usage)

    def _check_model(self, endpoint: str, answer: Any) -> None:
        """Refuses an answer that names another model than the first one did."""
        name = answer.get("model") if isinstance(answer, dict) else None
        if not isinstance(name, str) or name == self._models.get(endpoint):
            return
        fact = f"model of {self.settings.model} {endpoint}"
        first = self.store.fact(fact)
        if first is None:
            self.store.note(fact, name)
        first = self._models[endpoint] = first or name
        if name != first:
            kept = f"; {self.settings.cache} holds its answers" if self.settings.cache else ""
            raise Refused(
                f"{self.settings.base_url} answered by the model {first!r} before, and by "
                f"{name!r} now{kept}: ask for one model by its full name "
                "(triple.base.api.model=...), and begin again in another output_dir"
            )

    def stop(self) -> None:
        """Ends all waiting: a request that waits, or would have to, fails with Unanswered."""
        self._stopped.set()

    def go(self) -> None:
        """Lets requests wait again after `stop`."""
        self._stopped.clear()

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """The price of a request."""
        prices = self.settings.prompt_price, self.settings.completion_price
        return (prompt_tokens * prices[0] + completion_tokens * prices[1]) / 1000

    # -- the budget --------------------

    def _reserve(self, prompt_tokens: int) -> Spent:
        """Reserves one request's share of the budget, so that it is never overrun.

        Raises:
            Closed: the rest of the budget is too small for it.
        """
        wanted = Spent(1, prompt_tokens + 1, self.cost(prompt_tokens, 1))
        with self._lock:
            limit = (self.spent + self._reserved + wanted).exceeds(self.settings)
            if limit is not None:
                raise Closed(self._over_budget(limit))
            self._reserved += wanted
        return wanted

    def _release(self, reserved: Spent, prompt: float = 0, completion: float = 0) -> None:
        """Replaces a reservation by the real amounts: an unanswered request costs no money."""
        paid = Spent(1, prompt + completion, self.cost(prompt, completion))
        with self._lock:
            self._reserved -= reserved
            self.spent = Spent(**self.store.add("spent", asdict(paid)))

    def _over_budget(self, limit: BudgetLimit) -> str:
        spent, settings = self.spent, self.settings
        value, used = {
            "max_requests": (settings.max_requests, f"{spent.requests:,.0f} requests"),
            "max_tokens": (settings.max_tokens, f"{spent.tokens:,.0f} tokens"),
            "max_cost": (settings.max_cost, f"{spent.cost:.2f} of money"),
        }[limit]
        return (
            f"the budget triple.base.api.{limit}={value:g} is spent ({used} used, and the next "
            "request would go beyond it); what is finished is kept: with a larger one the same "
            "command goes on"
        )

    # -- waiting --------------------

    def _judge(self, failure: Failure, endpoint: str) -> float | None:
        """The seconds that the server asks us to wait, if it does.

        Raises:
            Refused, Closed: waiting would not help; see `ask`.
        """
        url = self.settings.base_url
        if failure.key:
            raise Closed(self._wrong_key(failure))
        if failure.money:
            raise Closed(
                f"{url}: the account has no money left ({failure}); what is finished is kept, and "
                "the same command goes on"
            )
        if failure.status == 404:
            raise Refused(
                f"{url}/{endpoint} is not there ({failure}): triple.base.api.base_url ends in /v1 "
                "with most servers"
            )
        if failure.room:
            raise NoRoom(f"{url} has no room for the prompt: {failure}")
        if not failure.passing:
            raise Refused(f"{url} refuses: {failure}")
        return failure.retry_after

    def _given_up(self, said: str, wrong: int, asked: float | None) -> str:
        kept = "what is finished is kept, and the same command goes on"
        if wrong >= _WRONG_ANSWERS:
            return f"{self.settings.base_url} gave {wrong} answers of no use (last: {said}); {kept}"
        if asked is not None and asked > self.settings.retry_for_s:
            return (
                f"{self.settings.base_url} asks to wait {asked:,.0f} seconds ({said}), longer than "
                f"triple.base.api.retry_for_s={self.settings.retry_for_s:g}; {kept}"
            )
        return (
            f"{self.settings.base_url} did not answer for {self.settings.retry_for_s:g} seconds "
            f"(last: {said}); {kept}"
        )

    def _wait_until_allowed(self) -> None:
        while (left := self._not_before - time.monotonic()) > 0:
            self._pause(left)

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise Unanswered("stopped while waiting for the server")

    def _wrong_key(self, failure: Failure) -> str:
        name = self.settings.api_key_env
        way_out = f"check the environment variable {name}" if name else "name the environment "
        if not name:
            way_out += "variable that holds the key: triple.base.api.api_key_env=..."
        return f"{self.settings.base_url} does not accept the key ({failure}): {way_out}"


def _key(settings: ApiSettings) -> str:
    if settings.api_key_env is None:
        return "none"  # `openai` insists on a key; servers without keys ignore it
    key = os.environ.get(settings.api_key_env)
    if not key:
        raise UserError(
            f"the environment variable {settings.api_key_env} is empty; it has to hold the key of "
            f"{settings.base_url} (triple.base.api.api_key_env)"
        )
    return key


def _context_of(model: Mapping[str, Any]) -> int | None:
    """The context length in an entry of the list of models, in tokens; None if it has none."""
    meta = model.get("meta")  # llama-server's
    found = [model.get(key) for key in _CONTEXT_KEYS]
    found.append(meta.get("n_ctx") if isinstance(meta, Mapping) else None)
    return next((each for each in found if isinstance(each, int) and each > 1), None)


def _read(answer: Any, read: Callable[[dict[str, Any]], Any]) -> Any:
    if not isinstance(answer, dict):
        raise Malformed(f"an answer that is no JSON object: {str(answer)[:200]!r}")
    if "choices" not in answer:
        raise Malformed(f"an answer without choices: {json.dumps(answer)[:200]}")
    try:
        return read(answer)
    except UpstreamError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise Malformed(f"an answer of an unknown form: {type(error).__name__} {error}") from error


def _usage(answer: Any, prompt_tokens: int) -> tuple[int, int]:
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return prompt_tokens, 1
    return int(usage.get("prompt_tokens") or prompt_tokens), int(
        usage.get("completion_tokens") or 0
    )
