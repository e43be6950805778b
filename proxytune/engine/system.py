"""The contract: what the decode loop drives (a system), what systems are made of (members), and
what a pass of either says of the next token.

A *member* is one model. A *system* is what decodes: a member alone, a member for which another one
drafts, or a triple. Both hold rows: each row is a prompt and what has been written after it; rows
are numbered 0 .. n - 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from proxytune.engine.speculation import Pace
from proxytune.engine.truncation import Truncation
from proxytune.records import Decoding

Prompt = Mapping[str, Sequence[int]]  # role -> token ids
Alphas = Sequence[float | None] | None  # per row; None is the system's own
Pick = Callable[[torch.Tensor, int], torch.Tensor]  # logits, offset in the block -> tokens [rows]


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward pass says of the next token.

    Attributes:
        logits: of the model or system that ran, [rows, vocab]; for a block of tokens,
            [rows, width, vocab]. They may be a view: whoever changes them makes a copy.
        members: role -> that member's logits, in the same shape, for traces; empty for a member.
        truncation: what is known beyond the logits, where a server lists the likeliest tokens
            only; else None.
    """

    logits: torch.Tensor
    members: Mapping[str, torch.Tensor] = field(default_factory=dict)
    truncation: Truncation | None = None

    def __getitem__(self, rows: slice | int) -> "Pass":
        """The same for some rows."""
        members = {role: logits[rows] for role, logits in self.members.items()}
        return Pass(self.logits[rows], members, self.truncation and self.truncation[rows])

    def flat(self) -> "Pass":
        """The same with one row per token: [rows, width, vocab] becomes [rows * width, vocab]."""
        if self.logits.dim() == 2:
            return self
        members = {role: logits.flatten(0, 1) for role, logits in self.members.items()}
        return Pass(self.logits.flatten(0, 1), members, self.truncation and self.truncation.flat())

    def copy_of(self, row: int, with_members: bool) -> "Pass":
        """One row in memory of its own; a view of it would keep all rows in memory."""
        part = self[row]
        members = part.members if with_members else {}
        copies = {role: logits.clone() for role, logits in members.items()}
        return Pass(part.logits.clone(), copies, part.truncation)

    @staticmethod
    def stack(rows: "Sequence[Pass]") -> "Pass":
        """Single rows as one pass; of the members, those that every row has."""
        roles = set.intersection(*(set(row.members) for row in rows))
        known = [row.truncation for row in rows if row.truncation is not None]
        return Pass(
            torch.stack([row.logits for row in rows]),
            {role: torch.stack([row.members[role] for row in rows]) for role in roles},
            Truncation.stack(known) if known else None,
        )


class Member(ABC):
    """One model. What a subclass does not say stands here as its default.

    Attributes:
        vocab_size: the logits are cut to this many entries.
        device: where the logits are.
        max_positions: the longest row in tokens; None for no limit.
        max_rows: more rows at once gain nothing; None for no limit of its own.
        joins: whether `join` is one pass.
        complete: whether a pass gives every token's logit; else see `Pass.truncation`.
        eos_ids: tokens that end a completion, beyond those that the tokenizer names.
    """

    vocab_size: int
    device: torch.device
    max_positions: int | None = None
    max_rows: int | None = None
    joins: bool = False
    complete: bool = True
    eos_ids: frozenset[int] = frozenset()

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Tokens per row."""

    @abstractmethod
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        guesses: Sequence[Sequence[int]] | None = None,
    ) -> Pass:
        """Appends one row per prompt; says what comes after it, [prompts, vocab].

        Args:
            prompts: token ids, at least one each.
            guesses: how each row may go on. A member behind a network has these places answered
                along with the prompt; the others have no use for them.
        """

    @abstractmethod
    def extend(self, tokens: torch.Tensor) -> Pass:
        """Appends a block of tokens [rows, width]; says what comes after each."""

    @abstractmethod
    def rollback(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[r] tokens of each row r."""

    @abstractmethod
    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; rows may be left out or repeated."""

    @abstractmethod
    def clear(self) -> None:
        """Drops every row and the memory that they took."""

    def step(self, tokens: torch.Tensor) -> Pass:
        """Appends one token per row, [rows]; says what comes after it, [rows, vocab]."""
        return self.extend(tokens.unsqueeze(1)).flat()

    def join(self, tokens: torch.Tensor, prompts: Sequence[Sequence[int]]) -> Pass:
        """`step` for the present rows and `prefill` of new ones; one pass where it `joins`."""
        raise NotImplementedError(f"{type(self).__name__} reads prompts in a pass of their own")

    def guess(self, logits: torch.Tensor, count: int) -> list[list[int]]:
        """How it would continue its last rows, greedily; it forgets the guesses again.

        Args:
            logits: what it said after those rows, [rows, vocab].
            count: tokens per row; none are guessed where a row would grow too long.
        """
        new = len(logits)
        if self.max_positions and max(self.lengths) + count > self.max_positions:
            return [[] for _ in range(new)]
        tokens = torch.zeros(len(self.lengths), dtype=torch.long, device=logits.device)
        guessed = []
        for _ in range(count):
            guessed.append(logits.argmax(-1))
            tokens[-new:] = guessed[-1]
            logits = self.step(tokens).logits[-new:]
        self.rollback([count] * len(tokens))
        return torch.stack(guessed, dim=1).tolist()

    def bytes_per_token(self) -> int:
        """Memory that one more token of a row takes."""
        return 0

    def pace(self, fixed: int | None) -> Pace | None:
        """What decides the width of drafted blocks that it verifies; None for lockstep, always."""
        return Pace(fixed)

    def estimate(self, prompts: Sequence[int], decoding: Decoding, drafted: bool) -> str | None:
        """What a task will cost, in one line; None where nobody is paid.

        Args:
            prompts: tokens of each prompt.
            decoding: of the task.
            drafted: whether another model drafts.
        """
        return None

    def spending(self) -> str | None:
        """What has been paid so far, in one line; None where nobody is paid."""
        return None


class Pair:
    """Expert and antiexpert: two members, whose rows are rearranged alike.

    Attributes:
        one_pass: whether `extend_both` reads a block by both in one pass.
    """

    one_pass = False

    def __init__(self, expert: Member, antiexpert: Member) -> None:
        self.expert = expert
        self.antiexpert = antiexpert

    def extend_both(self, tokens: torch.Tensor) -> Pass:
        """Appends a block [rows, width] to the rows of both.

        Returns:
            [2 * rows, width, vocab]: expert and antiexpert in turn.
        """
        raise NotImplementedError("two models read a block in two passes")

    def rollback(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[r] tokens of each row r."""
        self.expert.rollback(counts)
        self.antiexpert.rollback(counts)

    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; rows may be left out or repeated."""
        self.expert.keep(rows)
        self.antiexpert.keep(rows)

    def clear(self) -> None:
        """Drops every row and the memory that they took."""
        self.expert.clear()
        self.antiexpert.clear()


class System(ABC):
    """What the decode loop drives.

    Attributes:
        vocab_size: entries of its logits.
        members: role -> member.
        alpha: scale on (expert - antiexpert), where there are any.
    """

    vocab_size: int
    members: Mapping[str, Member]
    alpha: float = 1.0

    @property
    @abstractmethod
    def joins(self) -> bool:
        """Whether `join` is one pass; else the loop reads prompts in a pass of their own."""

    @property
    def lengths(self) -> list[int]:
        """Tokens per row, of the base."""
        return self.members["base"].lengths

    @abstractmethod
    def prefill(self, prompts: Sequence[Prompt], alphas: Alphas = None, ahead: int = 0) -> Pass:
        """Appends one row per prompt; says what comes after it, [prompts, vocab].

        Args:
            prompts: what each member reads.
            alphas: each row's own, for as long as it lives.
            ahead: tokens that the small model guesses after each prompt, for a base behind a
                network: one request then answers for the prompt and for the first block.
        """

    @abstractmethod
    def join(self, tokens: torch.Tensor, prompts: Sequence[Prompt], alphas: Alphas = None) -> Pass:
        """`step` for the present rows and `prefill` of new ones, in one pass, [rows, vocab]."""

    def step(self, tokens: torch.Tensor) -> Pass:
        """Appends one token per row, [rows]; says what comes after it, [rows, vocab]."""
        return self.extend(tokens.unsqueeze(1)).flat()

    @abstractmethod
    def extend(self, tokens: torch.Tensor) -> Pass:
        """Appends a block of tokens [rows, width]; says what comes after each."""

    @abstractmethod
    def rollback(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[r] tokens of each row r."""

    @abstractmethod
    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; rows may be left out or repeated."""

    @abstractmethod
    def clear(self) -> None:
        """Drops every row and the memory that they took."""


class DraftingSystem(System):
    """A system with a small model that guesses what comes next."""

    @abstractmethod
    def draft(self, tokens: torch.Tensor, width: int, pick: Pick) -> torch.Tensor:
        """Lets the small model continue `tokens`, each row's next token, [rows].

        Args:
            tokens: token ids.
            width: length of the block, `tokens` included.
            pick: chooses tokens from the small model's logits.

        Returns:
            [rows, width]: `tokens`, then the guesses.
        """

    @abstractmethod
    def verify(self, block: torch.Tensor) -> Pass:
        """Appends the block that `draft` returned; says what comes after each of its tokens."""
