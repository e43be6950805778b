"""A base behind an API as a member of a triple, and the pace that suits it."""

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from proxytune.engine.speculation import Pace
from proxytune.engine.system import Member, Pass
from proxytune.engine.truncation import Truncation
from proxytune.errors import UserError
from proxytune.members.api.answer import Answer, alone
from proxytune.members.api.client import Client
from proxytune.members.api.distribution import AGREE, NotLogProbs
from proxytune.members.api.faults import NoRoom
from proxytune.members.api.names import TokenNames
from proxytune.members.api.probe import find_offer
from proxytune.members.api.protocol import Protocol
from proxytune.members.api.settings import LOCAL, ApiSettings
from proxytune.members.api.store import Store
from proxytune.records import Decoding

log = logging.getLogger(__name__)

WORTH_DRAFTING = 0.1  # a token is drafted if it is accepted with at least this probability
MAX_WIDTH = 16
_GUESSED_WIDTH = 4  # positions per request of the estimate
_GUESSED_YIELD = 2.0  # tokens per request of the estimate, before any acceptance is known

_Place = tuple[tuple[int, ...], int]  # tokens, and the first of them whose answer is wanted
_probed: dict[str, tuple[Protocol, Store]] = {}  # settings -> result of probing, per process


class RequestPace(Pace):
    """Widths of blocks for a member whose requests cost the same whatever the width.

    The draft goes on as long as the next drafted token is accepted with a probability of at least
    `WORTH_DRAFTING`, that is, as long as it and all drafted tokens before it are right with that
    probability. The recent rate of acceptance gives the estimate.
    """

    def width(self, rows: int) -> int:
        """Tokens per row in the next block, the certain first one included."""
        if self.fixed is not None:
            return self.fixed + 1
        drafted = math.log(WORTH_DRAFTING) / math.log(min(self.acceptance, 0.999))
        return min(MAX_WIDTH, 1 + max(1, int(drafted)))

    def ahead(self, rows: int) -> int:
        """Tokens guessed after a new prompt: as many as the block after its first token has."""
        return self.width(rows)


class ApiMember(Member):
    """An endpoint as a member: its log-probabilities are the logits.

    A row is only a list of tokens: rolling back is free, and the store answers for every position
    that the server has answered once. Logits are on the CPU, in float32, and minus infinity for
    tokens that the server does not list.

    Args:
        protocol: asks the server.
        store: keeps the answers.
        vocab_size: number of the tokenizer's ids.
        eos_ids: tokens that end a completion.
    """

    device = torch.device("cpu")
    raw_logits = False

    def __init__(
        self, protocol: Protocol, store: Store, vocab_size: int, eos_ids: frozenset[int]
    ) -> None:
        self.protocol = protocol
        self.offer = protocol.offer
        self.client = protocol.client
        self.store = store
        self.vocab_size = vocab_size
        self.eos_ids = eos_ids
        self.complete = self.offer.k == -1  # the server shows the whole vocabulary
        self.max_positions = protocol.client.max_positions
        # two rounds of requests per block; the logits of more rows would only fill memory
        self.max_rows = 2 * protocol.client.settings.max_concurrency
        self._more = store.beside("single tokens")
        self._full: int | None = None  # the shortest prompt that the server has no room for
        self._rows: list[list[int]] = []
        self._prompts: list[int] = []  # tokens of each row's prompt

    @property
    def lengths(self) -> list[int]:
        """Tokens per row."""
        return [len(row) for row in self._rows]

    @property
    def blocks(self) -> bool:
        """Whether one request scores several tokens."""
        return self.offer.blocks is not None

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        guesses: Sequence[Sequence[int]] | None = None,
    ) -> Pass:
        """Appends one row per prompt; returns the logits after it, [prompts, vocab].

        The request for a prompt asks for the positions of its guess, too.
        """
        rows = [list(map(int, prompt)) for prompt in prompts]
        if guesses is not None and self.blocks:
            longer = [[*row, *more] for row, more in zip(rows, guesses, strict=True)]
            self._answer(longer, [len(row) - 1 for row in rows])
        answers = self._answer(rows, [len(row) - 1 for row in rows])
        self._rows += rows
        self._prompts += [len(row) for row in rows]
        return self._pass(answers).flat()

    def extend(self, tokens: torch.Tensor) -> Pass:
        """Appends a block of tokens [rows, width]; returns the logits after each token."""
        self._refuse_second_token()
        rows = [row + new for row, new in zip(self._rows, tokens.tolist(), strict=True)]
        answers = self._answer(rows, self.lengths)
        self._rows = rows
        return self._pass(answers)

    def rollback(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[r] tokens of each row r."""
        kept = zip(self._rows, counts, strict=True)
        self._rows = [row[: len(row) - count] for row, count in kept]

    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; rows may be left out or repeated."""
        self._rows = [list(self._rows[row]) for row in rows]
        self._prompts = [self._prompts[row] for row in rows]

    def clear(self) -> None:
        """Drops every row."""
        self._rows, self._prompts = [], []

    def pace(self, fixed: int | None) -> RequestPace | None:
        """A pace for blocks if one request scores several tokens; else None, for lockstep."""
        return RequestPace(fixed) if self.blocks else None

    def estimate(self, prompts: Sequence[int], decoding: Decoding, drafted: bool) -> str:
        """The requests, tokens and money that a task will take, in one line.

        Args:
            prompts: the length of each prompt in tokens.
            decoding: the task's.
            drafted: whether an expert drafts.

        Raises:
            UserError: the endpoint cannot serve the task.
        """
        if decoding.max_new_tokens > 1:
            self._refuse_later_tokens()
        new, n = decoding.max_new_tokens, decoding.n
        blocks = self.blocks and drafted and new > 1
        per_row = 1 + math.ceil((new - 1) / _GUESSED_YIELD) if blocks else new
        first = len(prompts)  # the samples of a prompt share its request
        requests = first + len(prompts) * n * (per_row - 1)
        read = sum(length + (length + new / 2) * n * (per_row - 1) for length in prompts)
        if blocks and self.offer.blocks == "prompts":
            read *= _GUESSED_WIDTH  # every position of a block reads the prompt, or finds it cached
        price = self.client.cost(read, requests)
        text = f"{'about' if blocks else 'at most'} {requests:,} requests, {read:,.0f} tokens read"
        text += f", {price:,.2f} of money" if price else ""
        how = "several tokens per request" if blocks else "token by token"
        if not self.blocks:
            how += ": the server does not rate prompts, or that takes longer"
        return f"{text} ({how})"

    def spending(self) -> str:
        """The spending so far, by all runs of the results folder, in one line."""
        spent = self.client.spent
        price = f", {spent.cost:,.2f} of money" if spent.cost else ""
        return f"{spent.requests:,.0f} requests, {spent.tokens:,.0f} tokens{price} so far"

    # -- asking --------------------

    def _answer(self, rows: list[list[int]], starts: list[int]) -> list[list[Answer | None]]:
        """For every row i, the answers after rows[i][: starts[i] + 1] up to the whole row.

        None stands for a place that is beyond the server's context.
        """
        found: dict[_Place, list[Answer | None]] = {}
        missing: list[_Place] = []
        places = [(tuple(row), start) for row, start in zip(rows, starts, strict=True)]
        for place in dict.fromkeys(places):
            stored = self.store.get(*place)
            for answer in stored:
                self._refuse_stored(answer)
            if None in stored[: self._room_after(place[1])]:
                missing.append(place)
            found[place] = stored
        calls = [partial(self._ask_one, *request) for request in self._requests(missing)]
        self._in_parallel(calls)
        for place in missing:
            found[place] = self.store.get(*place)
            assert None not in found[place][: self._room_after(place[1])]
        return [found[place] for place in places]

    def _room_after(self, start: int) -> int | None:
        """How many places from `start` on are in the server's context; None for no known end."""
        return None if self._full is None else max(0, self._full - 1 - start)

    def _refuse_stored(self, answer: Answer | None) -> None:
        """Refuses what an earlier version has stored without testing it."""
        if answer is None or self.complete:
            return  # the sum over a whole vocabulary takes too long at every step
        fault = answer.values(self.offer.k, self.vocab_size).fault()
        if fault is not None:
            raise NotLogProbs(
                f"{self.client.settings.cache} holds answers with {fault}: these are no "
                "log-probabilities; delete the file, and the completions that it led to"
            )

    def _requests(self, places: Sequence[_Place]) -> list[_Place]:
        """The requests that are needed: one per place, or one per missing token of it."""
        requests: dict[_Place, None] = {}
        for ids, start in places:
            stored = self.store.get(ids, start)[: self._room_after(start)]
            lacking = [start + i for i, answer in enumerate(stored) if answer is None]
            if self.blocks and lacking:
                # the store may have some of these answers, but one request costs the same
                requests[ids[: lacking[-1] + 1], lacking[0]] = None
            else:
                requests.update(dict.fromkeys((ids[: i + 1], i) for i in lacking))
        return list(requests)

    def _in_parallel(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """The results of calls that send requests, and store every answer as it comes."""
        self.client.go()
        futures = [self._threads.submit(call) for call in calls]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:  # Ctrl-C: stop waiting for the server
            self.client.stop()
            raise
        finally:
            for future in futures:
                future.cancel()
        failure = next((future.exception() for future in done if future.exception()), None)
        if failure is not None:
            self.client.stop()
            wait(future for future in futures if not future.cancelled())  # their answers are kept
            raise failure
        return [future.result() for future in futures]

    def _below(self, wanted: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """How far tokens lie below their bounds (`engine.truncation.Ask`)."""
        places = [(tuple(map(int, ids)), tuple(tokens)) for ids, tokens in wanted]
        once = list(dict.fromkeys(places))  # samples of one prompt often ask for the same
        found = dict(
            zip(once, self._in_parallel([partial(self._gaps, *each) for each in once]), strict=True)
        )
        return [found[place] for place in places]

    def _gaps(self, ids: tuple[int, ...], tokens: tuple[int, ...]) -> list[float]:
        """How far tokens that the answer after `ids` does not list lie below its bounds."""
        (listed,) = self.store.get(ids, len(ids) - 1)
        (more,) = self._more.get(ids, len(ids) - 1)
        known = more.known if more else {}
        missing = [token for token in tokens if token not in known]
        if missing:
            known |= self.protocol.ask_for(ids, missing)
            self._more.put(ids, len(ids) - 1, [alone(known)])
        if listed is None:
            return [math.nan] * len(tokens)  # it was in memory alone, and had to make room
        bounds = listed.ceiling(self.vocab_size)
        gaps = [float(bounds[token]) - known.get(token, math.nan) for token in tokens]
        excess = max((-gap for gap in gaps if not math.isnan(gap)), default=0.0)
        if excess > AGREE:
            raise NotLogProbs(
                f"{self.client.settings.base_url} gives a token that it does not list {excess:.4g} "
                "more than the last one that it lists; it did otherwise before: what is finished "
                "is kept, and the same command goes on"
            )
        return gaps

    def _ask_one(self, ids: tuple[int, ...], start: int) -> None:
        """Sends one request, or several where the block does not fit into the context."""
        try:
            self.store.put(ids, start, self.protocol.ask(ids, start))
            return
        except NoRoom as error:
            if start == len(ids) - 1:
                if self._full is None:
                    log.warning("rows end with %d tokens: %s", len(ids), error)
                self._full = min(len(ids), self._full or len(ids))
                return
        for place in range(start, len(ids)):
            if self._full is None or place + 1 < self._full:
                self._ask_one(ids[: place + 1], place)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.client.settings.max_concurrency, "api")

    def _pass(self, answers: Sequence[Sequence[Answer | None]]) -> Pass:
        """The answers of every row as logits [rows, width, vocab], with bounds for the rest."""
        nothing = torch.full((self.vocab_size,), -torch.inf)
        logits, ceiling = (
            torch.stack(
                [torch.stack([nothing if a is None else rows(a) for a in row]) for row in answers]
            )
            for rows in (
                lambda answer: answer.logits(self.vocab_size),
                lambda answer: answer.ceiling(self.vocab_size),
            )
        )
        unseen = torch.tensor([[0.0 if a is None else a.unseen for a in row] for row in answers])
        full = torch.tensor([[answer is None for answer in row] for row in answers])
        mode = f"{self.offer.endpoint}, {self.offer.blocks or 'token by token'}"
        mode += ", logprob_token_ids" if self.offer.asks else ""
        ask = self._below if self.offer.asks else None
        return Pass(logits, truncation=Truncation(mode, self.offer.k, ceiling, unseen, full, ask))

    def _refuse_second_token(self) -> None:
        if any(len(row) >= prompt for row, prompt in zip(self._rows, self._prompts, strict=True)):
            self._refuse_later_tokens()

    def _refuse_later_tokens(self) -> None:
        if self.offer.endpoint == "completions" and not self.client.settings.foreign_tokenizer:
            return
        lacking = f"; its /completions: {self.offer.lacking}" if self.offer.lacking else ""
        why = (
            f"a chat endpoint does not go on in the middle of an answer{lacking}"
            if self.offer.endpoint != "completions"
            else "its tokens are another tokenizer's"
        )
        raise UserError(
            f"{self.client.settings.base_url} can only be asked for a first token ({why}); use a "
            "task of one token (RealTimeQA), or a server with /v1/completions and this tokenizer"
        )


def open_api(spec: Any, tokenizer: Any) -> ApiMember:
    """The endpoint of a `ModelSpec`, checked and probed once per process.

    Raises:
        UserError: the server is not there, does not accept the key or the model, or shows too few
            log-probabilities.
    """
    settings: ApiSettings = spec.api
    if settings.base_url == LOCAL:
        raise UserError(
            f"base_url={LOCAL!r} is for the commands; from Python, serve the base with "
            "proxytune.server.local.serve_locally(folder, name) and give the URL that it returns"
        )
    name = repr((spec.id, spec.revision, settings))
    if name not in _probed:
        _probed[name] = _probe(settings, tokenizer)
    protocol, store = _probed[name]
    vocab_size = protocol.names.vocab_size
    return ApiMember(protocol, store, vocab_size, _eos_ids(spec, tokenizer))


def _probe(settings: ApiSettings, tokenizer: Any) -> tuple[Protocol, Store]:
    foreign = settings.foreign_tokenizer
    model = f"{settings.model} {settings.top_logprobs} {settings.endpoint} {foreign}"
    store = Store(Path(settings.cache) if settings.cache else None, model)
    client = Client(settings, store)
    client.check()
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    names = TokenNames(tokenizer, vocab_size, foreign)
    offer = find_offer(client, names, tokenizer)
    if offer.sampling != "greedy":
        store.rename(f"{model} {offer.sampling}")
    return Protocol(client, names, offer, tokenizer), store


def _eos_ids(spec: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a completion, by the files of the tokenizer's repository."""
    found = [tokenizer.eos_token_id]
    try:
        config = GenerationConfig.from_pretrained(spec.id, revision=spec.revision)
        named = getattr(config, "eos_token_id", None)
        found += named if isinstance(named, list) else [named]
    except OSError:
        log.debug("%s has no generation config", spec.id)
    return frozenset(token for token in found if token is not None)
