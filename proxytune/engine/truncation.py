"""Logits of which only the largest are known: what a base behind an API shows.

A token that the server does not list is no candidate. Its true logit has an upper bound, though,
so whether it could have been chosen is known, too: a choice is *certain* where it would be the
same whatever the unlisted logits are below their bounds; every other choice is flagged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Truncation:
    """What is known of logits beyond the logits themselves.

    Attributes:
        mode: how the base was asked, for the record.
        k: tokens listed at each position; -1 is the whole vocabulary.
        ceiling: the logits with upper bounds in the place of unknown ones, in their shape.
        unseen: the probability, by the base, of all that is not listed; the shape without vocab.
    """

    mode: str
    k: int
    ceiling: torch.Tensor
    unseen: torch.Tensor

    def __getitem__(self, rows: slice | int) -> "Truncation":
        """The same for some rows."""
        return Truncation(self.mode, self.k, self.ceiling[rows], self.unseen[rows])

    def flat(self) -> "Truncation":
        """The same for the flattened places of a block."""
        return Truncation(self.mode, self.k, self.ceiling.flatten(0, 1), self.unseen.flatten(0, 1))

    @staticmethod
    def stack(rows: "Sequence[Truncation]") -> "Truncation":
        """Single rows as one."""
        ceiling = torch.stack([row.ceiling for row in rows])
        unseen = torch.stack([row.unseen for row in rows])
        return Truncation(rows[0].mode, rows[0].k, ceiling, unseen)


@dataclass
class TruncationRecord:
    """What `Completion.extra["api"]` says of one completion.

    Attributes:
        mode, k: see `Truncation`.
        steps: tokens that were chosen, the one that ended the completion included.
        flagged: positions at which the whole answer could have led to another choice.
        max_unseen_mass: the greatest probability that was unseen at a step.
    """

    mode: str
    k: int
    steps: int = 0
    flagged: list[int] = field(default_factory=list)
    max_unseen_mass: float = 0.0

    def add(self, certain: bool, unseen: float) -> None:
        """Notes one choice."""
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
