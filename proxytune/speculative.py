"""Speculative decoding: how long the drafted blocks are, and a model that another drafts for.

A block of width w costs w cheap drafting steps and one pass of each other model over w tokens; it
gains between 1 and w tokens. Which tokens come out does not depend on it: every token is the one
that lockstep would choose (`sampling` says why that also holds for sampled ones).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from proxytune.member import Member
from proxytune.truncation import Truncation

MAX_WIDTH = 9
WARM_UP = 1  # first rounds of a batch size whose time says nothing
LOCKSTEP_ROUNDS = 3  # measured before the first guess at a better width
PROBE_WIDTH = 4  # on a CPU a pass over 2 or 3 tokens may take as long
FIRST_GAP, LAST_GAP = 32, 512  # rounds between two looks at what is not being used
MARGIN = 1.03  # a block must promise this much over lockstep
MEMORY = 0.98  # weight of the acceptance so far, per drafted token


class Pace:
    """Chooses the width of the next block: that with the most tokens per second.

    A block of width w gives 1 + a + ... + a^(w-1) tokens per row where a drafted token is right
    with probability a, and takes a time that is measured or, for a width that has not been tried,
    read off the line through its neighbours. Both are followed while decoding. Lockstep stays
    where no block promises more, except for a look now and then, at growing distances.

    Args:
        fixed: the number of drafted tokens per block, always; None adapts.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed = fixed
        self.drafted = 0
        self.accepted = 0
        self._tried = 2.0  # as if one of two had been right
        self._right = 1.0
        self._clocks: dict[int, _Clock] = {}

    @property
    def acceptance(self) -> float:
        """The estimated probability that a drafted token is the right one, of late."""
        return self._right / self._tried

    def width(self, rows: int) -> int:
        """Tokens per row in the next block, the certain first one included; 1 is lockstep."""
        if self.fixed is not None:
            return self.fixed + 1
        return self._clock(rows).next_width(self.acceptance)

    def ahead(self, rows: int) -> int:
        """Tokens that the expert guesses behind a new prompt, to be scored along with it."""
        return 0

    def observe(self, rows: int, width: int, seconds: float, accepted: Sequence[int]) -> None:
        """Learns from a block: its time, and how many drafted tokens of each row were right."""
        self.drafted += (width - 1) * rows
        self.accepted += sum(accepted)
        for right in accepted if width > 1 else ():
            for tried in range(right + (right < width - 1)):
                self._tried = self._tried * MEMORY + 1
                self._right = self._right * MEMORY + (tried < right)
        self._clock(rows).observe(width, seconds)

    def _clock(self, rows: int) -> "_Clock":
        # Batch sizes within a factor of two share their measurements.
        return self._clocks.setdefault(rows.bit_length(), _Clock())


class _Clock:
    """The measured time of a round, by the width of its block, at one batch size."""

    def __init__(self) -> None:
        self._rounds = 0
        self._seconds: dict[int, float] = {}
        self._next_look = 0
        self._gap = FIRST_GAP

    def observe(self, width: int, seconds: float) -> None:
        """Notes the time of one round."""
        self._rounds += 1
        if self._rounds > WARM_UP:
            known = self._seconds.get(width, seconds)
            # A sudden stall (another process, the first use of a shape) counts for little.
            self._seconds[width] = 0.8 * known + 0.2 * min(seconds, 2 * known)

    def next_width(self, acceptance: float) -> int:
        """The width that promises most, or one whose time is due to be measured again."""
        if self._rounds < WARM_UP + LOCKSTEP_ROUNDS or 1 not in self._seconds:
            return 1
        if len(self._seconds) == 1:
            return PROBE_WIDTH
        rates = [self._rate(width, acceptance) for width in range(1, MAX_WIDTH + 1)]
        best = 1 + rates.index(max(rates))
        if max(rates) < MARGIN * rates[0]:
            best = 1
        if self._rounds < self._next_look:
            return best
        self._next_look = self._rounds + self._gap
        self._gap = FIRST_GAP if best > 1 else min(2 * self._gap, LAST_GAP)
        return 1 if best > 1 else PROBE_WIDTH

    def _rate(self, width: int, acceptance: float) -> float:
        """Tokens per row and second."""
        return sum(acceptance**i for i in range(width)) / self._time(width)

    def _time(self, width: int) -> float:
        """The time of a round: measured, or on the line through the nearest measured widths."""
        if width in self._seconds:
            return self._seconds[width]
        known = sorted(self._seconds)
        above = next((i for i, w in enumerate(known) if w > width), len(known) - 1)
        left, right = known[above - 1], known[above]
        slope = max(0.0, (self._seconds[right] - self._seconds[left]) / (right - left))
        return self._seconds[left] + slope * (width - left)


def guess_ahead(expert: Member, logits: torch.Tensor, count: int) -> list[list[int]]:
    """What an expert would write behind its last rows; it forgets it again.

    Args:
        expert: has just read those rows.
        logits: what it said behind them, [rows, vocab].
        count: tokens per row; none where its context ends before.
    """
    new = len(logits)
    limit = getattr(expert, "max_positions", None)
    if limit and max(expert.lengths) + count > limit:
        return [[] for _ in range(new)]
    tokens = torch.zeros(len(expert.lengths), dtype=torch.long, device=logits.device)
    guessed = []
    for _ in range(count):
        guessed.append(logits.argmax(-1))
        tokens[-new:] = guessed[-1]
        logits = expert.step(tokens)[-new:]
    expert.rollback([count] * len(tokens))
    return torch.stack(guessed, dim=1).tolist()


class DraftedModel:
    """A single model for which a smaller one drafts; a `member.Member` with `draft` and `verify`.

    The draft model reads what the model has read when it is next asked to draft: until then the
    tokens that it misses wait in `_missing`.

    Args:
        model: whose logits count.
        draft_model: guesses them.
    """

    def __init__(self, model: Member, draft_model: Member) -> None:
        self.model = model
        self.draft_model = draft_model
        self.vocab_size = model.vocab_size
        self._missing: list[list[int]] = []

    @property
    def lengths(self) -> list[int]:
        """Tokens per row, of the model."""
        return self.model.lengths

    @property
    def truncation(self) -> Truncation | None:
        """What is known of the last logits where the model shows a part only; else None."""
        return getattr(self.model, "truncation", None)

    def prefill(
        self, prompts: Sequence[Mapping[str, Sequence[int]]], ahead: int = 0
    ) -> torch.Tensor:
        """Appends one row per prompt; returns the next token's logits [prompts, vocab].

        Args:
            prompts: role -> token ids.
            ahead: see `ProxyTunedModel.prefill`; the draft model guesses.
        """
        logits = self.draft_model.prefill([prompt["draft"] for prompt in prompts])
        self._missing += [[] for _ in prompts]
        model: Any = self.model
        guesses = [guess_ahead(self.draft_model, logits, ahead)] if ahead else []
        return model.prefill([prompt["base"] for prompt in prompts], *guesses)

    @property
    def joins(self) -> bool:
        """Whether `join` is one pass of the model."""
        return getattr(self.model, "joins", False)

    def join(
        self, tokens: torch.Tensor, prompts: Sequence[Mapping[str, Sequence[int]]]
    ) -> torch.Tensor:
        """`step` for the present rows and `prefill` of new ones; logits [rows, vocab] of all."""
        for missing, token in zip(self._missing, tokens.tolist(), strict=True):
            missing.append(token)
        self.draft_model.prefill([prompt["draft"] for prompt in prompts])
        self._missing += [[] for _ in prompts]
        model: Any = self.model
        return model.join(tokens, [prompt["base"] for prompt in prompts])

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends one token per row ([rows]); returns the next token's logits [rows, vocab]."""
        return self.extend(tokens.unsqueeze(1)).squeeze(1)

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends a block of tokens [rows, width]; returns the logits [rows, width, vocab]."""
        for missing, new in zip(self._missing, tokens.tolist(), strict=True):
            missing += new
        return self.model.extend(tokens)

    def draft(
        self,
        tokens: torch.Tensor,
        width: int,
        pick: Callable[[torch.Tensor, int], torch.Tensor],
    ) -> torch.Tensor:
        """Lets the draft model continue `tokens`; returns [rows, width], `tokens` first."""
        block = [tokens]
        logits = self._catch_up(tokens)
        for offset in range(width - 1):
            if offset:
                logits = self.draft_model.step(block[-1])
            block.append(pick(logits, offset))
        # What was guessed last has not been read by the draft model.
        self._missing = [[token] for token in block[-1].tolist()]
        return torch.stack([each.to(block[-1].device) for each in block], dim=1)

    def verify(self, block: torch.Tensor) -> torch.Tensor:
        """The model's logits [rows, width, vocab] over the block that `draft` returned."""
        return self.model.extend(block)

    def rollback(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[r] tokens of each row r."""
        self.model.rollback(counts)
        late = []
        for missing, count in zip(self._missing, counts, strict=True):
            kept = max(0, len(missing) - count)
            late.append(count - (len(missing) - kept))
            del missing[kept:]
        self.draft_model.rollback(late)

    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; rows may be left out or repeated."""
        self.model.keep(rows)
        self.draft_model.keep(rows)
        self._missing = [list(self._missing[row]) for row in rows]

    def clear(self) -> None:
        """Drops every row and the memory that they took."""
        self.model.clear()
        self.draft_model.clear()
        self._missing = []

    def _catch_up(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feeds the draft model what it misses and `tokens`; logits behind them [rows, vocab]."""
        rows = [
            [*missing, token] for missing, token in zip(self._missing, tokens.tolist(), strict=True)
        ]
        self._missing = [[] for _ in rows]
        width = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        logits = self.draft_model.extend(ids)
        self.draft_model.rollback([width - len(row) for row in rows])
        ends = torch.tensor([len(row) - 1 for row in rows], device=logits.device)
        return logits[torch.arange(len(rows), device=logits.device), ends]
