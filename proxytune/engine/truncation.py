"""Logits of a base behind an API that lists only the likeliest tokens.

A token that the server does not list cannot be chosen. Its true logit is unknown but has an upper
bound. So a choice is *certain* if it would be the same for any unlisted logits below their bounds;
every other choice is flagged.

Some servers answer for single tokens, too (`Truncation.ask`). A system adds the same number to a
base's logit and to its bound. So the difference between the two is that of the system's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

MAX_ASKED = 128  # tokens per call of `Truncation.ask`: vLLM's MAX_LOGPROB_TOKEN_IDS
# (the base's tokens before a place, token ids that are not listed there) for each of several places
# -> how far each token's logit lies below its ceiling; NaN where the server does not say.
Ask = Callable[[Sequence[tuple[Sequence[int], Sequence[int]]]], list[list[float]]]


@dataclass(frozen=True)
class Truncation:
    """Bounds of the logits that a server does not list.

    Attributes:
        mode: how the base was asked, for the record.
        k: tokens listed at each position; -1 is the whole vocabulary.
        ceiling: the logits, with upper bounds where they are unknown, [..., vocab].
        unseen: the base's probability of all unlisted tokens together, [...].
        full: whether the server's context ends before this place, so that the row does, too, [...].
        ask: asks for tokens that are not listed; None where the server does not answer that.
    """

    mode: str
    k: int
    ceiling: torch.Tensor
    unseen: torch.Tensor
    full: torch.Tensor
    ask: Ask | None = None

    def __getitem__(self, rows: slice | int) -> "Truncation":
        """The same bounds, for these rows alone."""
        return self._of(self.ceiling[rows], self.unseen[rows], self.full[rows])

    def flat(self) -> "Truncation":
        """One row per token of a block: [rows, width, ...] becomes [rows * width, ...]."""
        return self._of(*(each.flatten(0, 1) for each in (self.ceiling, self.unseen, self.full)))

    def _of(self, ceiling: torch.Tensor, unseen: torch.Tensor, full: torch.Tensor) -> "Truncation":
        return Truncation(self.mode, self.k, ceiling, unseen, full, self.ask)

    @staticmethod
    def concatenate(*parts: "Truncation") -> "Truncation":
        """The rows of several passes of one member."""
        return parts[0]._of(
            torch.cat([part.ceiling for part in parts]),
            torch.cat([part.unseen for part in parts]),
            torch.cat([part.full for part in parts]),
        )

    @staticmethod
    def stack(rows: "Sequence[Truncation]") -> "Truncation":
        """Joins single rows."""
        return rows[0]._of(
            torch.stack([row.ceiling for row in rows]),
            torch.stack([row.unseen for row in rows]),
            torch.stack([row.full for row in rows]),
        )


@dataclass
class TruncationRecord:
    """The entry `Completion.extra["api"]` of one completion.

    Attributes:
        mode, k: see `Truncation`.
        steps: tokens that were chosen, the one that ended the completion included.
        flagged: positions at which the unlisted tokens could have changed the choice.
        max_unseen_mass: the greatest `Truncation.unseen` of all steps.
    """

    mode: str
    k: int
    steps: int = 0
    flagged: list[int] = field(default_factory=list)
    max_unseen_mass: float = 0.0

    def add(self, certain: bool, unseen: float) -> None:
        """Notes one choice, and the probability of the tokens that were not listed."""
        if not certain:
            self.flagged.append(self.steps)
        self.steps += 1
        self.max_unseen_mass = max(self.max_unseen_mass, unseen)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "mode": self.mode,
            "k": self.k,
            "steps": self.steps,
            "flagged_steps": len(self.flagged),
            "flagged": self.flagged,
            "max_unseen_mass": round(self.max_unseen_mass, 6),
        }
