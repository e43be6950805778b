"""The rows of the decode loop: one sample each, from its request to its record.

`Row.take` appends a token that was chosen (choice.py). `Row.write` is the part of it that needs no
pass: the rows of another engine are written by it. Nothing else writes one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch

from proxytune.engine.combining import Combination
from proxytune.engine.logprobs import TokenLogprob, token_logprobs
from proxytune.engine.sampling import BROKEN, NOTHING, Sampler, sample_stream
from proxytune.engine.system import Pass, Prompt
from proxytune.engine.text import GrowingText
from proxytune.engine.thought import AFTER, ANSWER, BEFORE, INSIDE, Thought
from proxytune.engine.truncation import TruncationRecord
from proxytune.records import Decoding, FinishReason

FULL = BROKEN - 1  # chosen where a member's context has no room for another token


@dataclass(frozen=True, slots=True)
class Rating:
    """The log-probabilities of a token that was chosen, while the pass it came from is in memory.

    Attributes:
        of: how many of the likeliest tokens to list -> the token's log-probability.
        of_members: the same, by the members' roles; empty unless `Request.shows_members`.
        drafted: whether the small model had guessed the token.
    """

    of: Callable[[int], TokenLogprob]
    of_members: Callable[[int], dict[str, TokenLogprob]] = lambda top: {}
    drafted: bool = False


@dataclass(frozen=True)
class Request:
    """One prompt, to be continued `decoding.n` times.

    Attributes:
        index: the caller's number for the prompt.
        prompt: role -> token ids.
        context: the base's prompt ids; the generated tokens are decoded after them, and a
            repetition penalty counts them.
        key: names the prompt in the random streams of its samples.
        seed: of the random streams.
        decoding: the settings.
        sampler: chooses tokens by these settings.
        eos_ids: tokens that end a completion.
        max_new_tokens: decoding.max_new_tokens, or less where a member's context is too short.
        tokenizer: decodes the text; None leaves the text empty.
        record: how many top tokens per member `Finished.trace` lists; 0 for no trace.
        combination: this prompt's own formula and alphas (triples only); None takes the system's.
        count_touched: whether to count the tokens whose logits are not the base's own.
        compare: whether to count the tokens that each member alone would have chosen.
        thought: how its completions think; None where they do not.
        samplers: phase of a thought -> what chooses tokens there; `sampler` where it is missing.
        on_token: called with every chosen token, also the one that ends the completion:
            (sample, token, the text that is now certain, its rating). The texts of a sample make
            up `Finished.text`: no later token takes any of it away. Only a real token can be
            rated.
        top: the most tokens that `on_token` will have listed; None for no ratings.
        shows_members: whether `on_token` will ask for the members' log-probabilities.
    """

    index: int
    prompt: Prompt
    context: Sequence[int]
    key: str
    seed: int
    decoding: Decoding
    sampler: Sampler
    eos_ids: frozenset[int]
    max_new_tokens: int
    tokenizer: Any | None = None
    record: int = 0
    combination: Combination | None = None
    count_touched: bool = False
    compare: bool = False
    thought: Thought | None = None
    samplers: Mapping[str, Sampler] = field(default_factory=dict)
    on_token: Callable[[int, int, str, Rating], None] | None = None
    top: int | None = None
    shows_members: bool = False

    @cached_property
    def room(self) -> int:
        """The most tokens that a row of this request can hold: longest prompt and completion."""
        return longest(self.prompt) + self.max_new_tokens

    @cached_property
    def seen(self) -> torch.Tensor:
        """The token ids of `context`, each once, [n]: those that a repetition penalty counts."""
        return torch.tensor(sorted(set(self.context)), dtype=torch.long)


@dataclass(frozen=True)
class Finished:
    """One sample that has ended; fields as in `records.Completion` and `Generation.extra`."""

    index: int
    sample: int
    text: str
    raw_text: str
    token_ids: list[int]
    finish_reason: FinishReason
    trace: list[dict[str, Any]] | None = None
    truncation: TruncationRecord | None = None
    touched: int | None = None
    unshifted: Mapping[str, float] | None = None
    agreed: dict[str, int] | None = None
    thought: dict[str, Any] | None = None


class Shared:
    """What the samples of one prompt have in common.

    Attributes:
        request: the prompt and its settings.
        started: how many samples have a row, or had one.
        after_prompt: the pass over the prompt, from which every sample chooses its first token;
            None before the prompt is read, or where a single sample needs it.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.started = 0
        self.after_prompt: Pass | None = None

    @property
    def unstarted(self) -> int:
        """How many samples have no row yet."""
        return self.request.decoding.n - self.started


class Row:
    """One sample while it is written: the next unstarted one of its prompt.

    Attributes:
        sample: its number, 0 .. n - 1.
        stream: its random stream (`sample_stream`).
        tokens: the tokens written so far.
        fed: how many of them the system has read.
        reason: why the sample has ended; None while it runs.
    """

    def __init__(self, shared: Shared) -> None:
        request = shared.request
        self.shared = shared
        self.request = request
        self.sample = shared.started
        shared.started += 1
        self.stream = sample_stream(request.seed, request.key, self.sample)
        self.tokens: list[int] = []
        self.fed = 0
        self.text = GrowingText(
            request.tokenizer, request.context, request.decoding.stop, request.thought
        )
        self.imposed: list[int] = []  # the next tokens, whatever the logits are
        self._after = request.thought.after if request.thought else ()
        self.thought: dict[str, Any] | None = None
        if request.thought is not None:
            self.thought = {"tokens": 0, "end": None}
        self.trace: list[dict[str, Any]] | None = [] if request.record else None
        self.truncation: TruncationRecord | None = None
        self.touched = 0 if request.count_touched else None
        self.unshifted: dict[str, list[float]] = {}  # of each chosen token; see `Pass`
        self.agreed: dict[str, int] | None = {"system": 0} if request.compare else None
        self.reason: FinishReason | None = None

    @property
    def reads_members(self) -> bool:
        """Whether `take` reads the members' logits beside the system's."""
        recorded = any(each is not None for each in (self.trace, self.touched, self.agreed))
        return recorded or self.request.shows_members

    @property
    def sampler(self) -> Sampler:
        """What chooses the next token."""
        request = self.request
        if not request.samplers:
            return request.sampler
        return request.samplers.get(self.text.phase, request.sampler)

    def settle(self, token: int, offset: int) -> int:
        """The token that is written where another one was chosen.

        Args:
            token: the choice.
            offset: which of the next tokens it is, from 0; those before it do not change the phase.
        """
        if self.imposed and offset == 0 and token != FULL:
            return self.imposed[0]
        thought, least = self.request.thought, self.request.decoding.think_least
        early = len(self.tokens) + offset < (least or 0)
        if early and thought is not None and self.text.phase == INSIDE:
            assert thought.instead is not None
            return thought.instead if (token,) == thought.closing else token
        return token

    def prompt(self) -> Prompt:
        """The prompt and the tokens written after it: role -> token ids."""
        return {role: [*ids, *self.tokens] for role, ids in self.request.prompt.items()}

    def _append(self, token: int) -> str:
        """Appends a token and sets `reason` if it ends the sample.

        Returns:
            The text that became certain; an incomplete character waits for its further tokens.
        """
        request = self.request
        text = ""
        if token == FULL:
            self.reason = "length"
        elif token == NOTHING:
            self.reason = "nothing"
        elif token in request.eos_ids:
            self.reason = "eos"
        else:
            self.tokens.append(token)
            text = self.text.push(token) if request.thought is None else self._think(token)
            if len(self.tokens) >= request.max_new_tokens:
                self.reason = "length"
        if self.reason is not None:
            text += self.text.finish()
        if self.text.cut is not None:
            self.reason = "stop"
        return text

    def _think(self, token: int) -> str:
        """Writes a token of a completion that may think, and decides what has to follow.

        Returns:
            The text that became certain.
        """
        thought, decoding = self.request.thought, self.request.decoding
        assert thought is not None and self.thought is not None
        before, imposed = self.text.phase, bool(self.imposed)
        ours = imposed and before == AFTER
        text = self.text.push(token, ours)
        if imposed:
            self.imposed.pop(0)
            if ours and not self.imposed:
                self.text.begin()
        if before in (BEFORE, INSIDE):
            self.thought["tokens"] = len(self.tokens)
            if self.text.phase == INSIDE and not self.imposed:
                budget = decoding.think_budget
                if budget is not None and len(self.tokens) >= budget:
                    self.imposed = list(thought.closing)
                    self.thought["end"] = "budget"
            elif self.text.phase in (AFTER, ANSWER):
                own = "own" if before == INSIDE or self.text.phase == AFTER else "none"
                self.thought["end"] = self.thought["end"] or own
                self.imposed = list(thought.after) if self.text.phase == AFTER else []
        return text

    def take(
        self,
        token: int,
        seen: Pass,
        place: int,
        *,
        certain: bool = True,
        unseen: float = 0.0,
        unshifted: Mapping[str, float] = MappingProxyType({}),
        drafted: bool = False,
        entry: dict[str, Any] | None = None,
    ) -> None:
        """Writes the token that was chosen at one place of a pass, and notes what is recorded.

        Args:
            token: the choice; `FULL` where the context of a member ends.
            seen: the flat pass that it was chosen from.
            place: its row in `seen`.
            certain: False where tokens that an API did not list could have changed the choice.
            unseen: the probability of the tokens that the API did not list.
            unshifted: see `Pass`, at this place.
            drafted: whether the small model had guessed the token.
            entry: of the token, for `trace`; it is written where the row has one.
        """
        if self.trace is not None and token >= 0:  # neither `FULL` nor `NOTHING`
            assert entry is not None
            self.trace.append(entry)
        if seen.truncation is not None:
            if self.truncation is None:
                self.truncation = TruncationRecord(seen.truncation.mode, seen.truncation.k)
            if token != FULL:
                self.truncation.add(certain, unseen)
        if token != FULL:
            for role, share in unshifted.items():
                self.unshifted.setdefault(role, []).append(share)
        if self.touched is not None and token != FULL:
            self.touched += not torch.equal(seen.logits[place], seen.members["base"][place].float())
        rating = Rating(
            partial(_rate, seen.logits[place], token),
            partial(_rate_members, seen, place, token),
            drafted,
        )
        self.write(token, rating)

    def compare(self, token: int, alone: Mapping[str, int]) -> None:
        """Counts which members alone would have chosen the token, and the tokens.

        Args:
            token: the choice.
            alone: role -> the choice by that member's own logits, with the same noise.
        """
        assert self.agreed is not None
        for role, own in ({"system": token} | dict(alone)).items():
            self.agreed[role] = self.agreed.get(role, 0) + (own == token)

    def write(self, token: int, rating: Rating) -> None:
        """Appends a token that was chosen, and tells whoever watches.

        Args:
            token: the choice.
            rating: see `Request.on_token`.
        """
        text = self._append(token)
        if self.request.on_token is not None:
            self.request.on_token(self.sample, token, text, rating)

    def finished(self) -> Finished:
        """The record of the ended sample."""
        assert self.reason is not None
        return Finished(
            self.request.index,
            self.sample,
            self.text.text,
            self.text.raw,
            self.tokens,
            self.reason,
            self.trace,
            self.truncation,
            self.touched,
            {role: sum(each) / len(each) for role, each in self.unshifted.items()} or None,
            self.agreed,
            self.thought,
        )


def _rate(logits: torch.Tensor, token: int, top: int) -> TokenLogprob:
    """The rating of one token among logits, [vocab]."""
    (rated,) = token_logprobs(logits.unsqueeze(0), [token], top)
    return rated


def _rate_members(seen: Pass, place: int, token: int, top: int) -> dict[str, TokenLogprob]:
    """The members' ratings of one token at one place of a flat pass, by role."""
    return {role: _rate(logits[place], token, top) for role, logits in seen.members.items()}


def longest(prompt: Prompt) -> int:
    """The length in tokens of the longest member's prompt."""
    return max(map(len, prompt.values()))


def traces_of(seen: Pass, tokens: Sequence[int], top: int) -> list[dict[str, Any]]:
    """The entries in `Finished.trace` of tokens that were chosen from a pass.

    {"id": token, "p": {role: probability of the token}, "top": {role: [[id, probability], ...]}}.
    Probabilities are those before temperature and filters. The role "system" is the whole system
    (the triple).

    Args:
        seen: the flat pass, [places, vocab].
        tokens: the choice at each place; an entry of `FULL` or `NOTHING` has no meaning.
        top: how many tokens "top" lists.
    """
    entries: list[dict[str, Any]] = [{"id": token, "p": {}, "top": {}} for token in tokens]
    chosen = torch.tensor(tokens).clamp(min=0).unsqueeze(1)
    for role, logits in {"system": seen.logits, **seen.members}.items():
        probs = logits.float().softmax(-1)
        best = probs.topk(min(top, probs.shape[-1]))
        own = probs.gather(1, chosen.to(probs.device)).squeeze(1).tolist()
        listed = zip(own, best.indices.tolist(), best.values.tolist(), strict=True)
        for entry, (p, ids, values) in zip(entries, listed, strict=True):
            entry["p"][role] = round(p, 6)
            entry["top"][role] = [[i, round(v, 6)] for i, v in zip(ids, values, strict=True)]
    return entries
