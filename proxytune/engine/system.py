"""The contract between the decode loop and the models.

A *member* is one model. A *system* is one or several members that decode together: a single
member, a member with another one that drafts for it, or a triple. The loop drives systems; a
system drives its members. Both hold *rows*, numbered 0 .. n - 1: a row is a prompt and the tokens
written after it. A *pass* reads tokens and gives the logits of the tokens that may follow.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

import torch

from proxytune.engine.combining import Combinations
from proxytune.engine.speculation import Pace
from proxytune.engine.truncation import Truncation
from proxytune.records import Decoding

Prompt = Mapping[str, Sequence[int]]  # role -> token ids
Pick = Callable[[torch.Tensor, int], torch.Tensor]  # logits, offset in the block -> tokens [rows]


@dataclass(frozen=True, slots=True)
class Pass:
    """The result of one forward pass of a member or a system.

    Attributes:
        logits: of the next token, [rows, vocab]; for a block of tokens, those after each of them,
            [rows, width, vocab]. They may be a view: copy them before you change them.
        members: role -> that member's logits, same shape, for traces; empty where a member ran.
        truncation: bounds of the missing logits, where a server lists only the likeliest tokens;
            None where every logit is known.
        unshifted: role -> the probability that the member gives to tokens of which the base has
            none; "base" -> the base's of tokens that get no shift; logits' shape without vocab.
            Empty where all members have one vocabulary.
        full: whether a member's context ends before this place, same shape; None for nowhere.
    """

    logits: torch.Tensor
    members: Mapping[str, torch.Tensor] = field(default_factory=dict)
    truncation: Truncation | None = None
    unshifted: Mapping[str, torch.Tensor] = field(default_factory=dict)
    full: torch.Tensor | None = None

    def __getitem__(self, rows: slice | int) -> "Pass":
        """The same pass, for these rows alone."""
        return self._each(lambda tensor: tensor[rows], self.truncation and self.truncation[rows])

    def flat(self) -> "Pass":
        """One row per token of a block: [rows, width, vocab] becomes [rows * width, vocab]."""
        if self.logits.dim() == 2:
            return self
        truncation = self.truncation and self.truncation.flat()
        return self._each(lambda tensor: tensor.flatten(0, 1), truncation)

    def unflat(self) -> "Pass":
        """A block of width 1 for each row: [rows, vocab] becomes [rows, 1, vocab]."""
        return self._each(lambda tensor: tensor.unsqueeze(1), None)

    def _each(
        self, change: Callable[[torch.Tensor], torch.Tensor], truncation: Truncation | None
    ) -> "Pass":
        """The pass with each of its tensors changed in the first dimensions."""
        return Pass(
            change(self.logits),
            {role: change(logits) for role, logits in self.members.items()},
            truncation,
            {role: change(share) for role, share in self.unshifted.items()},
            None if self.full is None else change(self.full),
        )

    def copy_of(self, row: int, with_members: bool) -> "Pass":
        """A copy of one row's logits, [vocab]; a view would keep those of all rows in memory.

        Args:
            row: its number.
            with_members: whether to copy the members' logits, too.
        """
        part = self[row]
        members = part.members if with_members else {}
        return replace(part, members=members)._each(torch.clone, part.truncation)

    @staticmethod
    def concatenate(first: "Pass", second: "Pass") -> "Pass":
        """The rows of one pass of a member, then those of another, [rows, vocab]."""
        known = [part.truncation for part in (first, second) if part.truncation is not None]
        full = [part.full for part in (first, second) if part.full is not None]
        return Pass(
            torch.cat([first.logits, second.logits]),
            truncation=Truncation.concatenate(*known) if known else None,
            full=torch.cat(full) if full else None,
        )

    @staticmethod
    def stack(rows: "Sequence[Pass]") -> "Pass":
        """Joins copies of single rows into one pass, [rows, vocab].

        The pass has the logits of those members that every row has.
        """
        # In the first row's order: a set's would differ from run to run, in traces, too.
        roles = [role for role in rows[0].members if all(role in row.members for row in rows)]
        known = [row.truncation for row in rows if row.truncation is not None]
        full = [row.full for row in rows if row.full is not None]
        return Pass(
            torch.stack([row.logits for row in rows]),
            {role: torch.stack([row.members[role] for row in rows]) for role in roles},
            Truncation.stack(known) if known else None,
            {r: torch.stack([row.unshifted[r] for row in rows]) for r in rows[0].unshifted},
            torch.stack(full) if full else None,
        )


Call = Callable[[], Pass]  # a pass that has not run yet


class Rows(ABC):
    """Rows of tokens that grow, and can be shortened, moved and dropped."""

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Tokens per row."""

    @abstractmethod
    def extend(self, tokens: torch.Tensor) -> Pass:
        """Reads a block of tokens [rows, width]; logits after each, [rows, width, vocab]."""

    def step(self, tokens: torch.Tensor) -> Pass:
        """Reads one token per row, [rows]; logits after each, [rows, vocab]."""
        return self.extend(tokens.unsqueeze(1)).flat()

    @abstractmethod
    def rollback(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[r] tokens of each row r."""

    @abstractmethod
    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; rows may be left out or repeated."""

    @abstractmethod
    def clear(self) -> None:
        """Drops every row and frees their memory."""


class Facts:
    """What is known of one model, whichever engine runs it.

    Attributes:
        vocab_size: the logits are cut to this many entries.
        max_positions: the longest row in tokens; None for no limit.
        raw_logits: whether a pass gives the model's own logits; if not, they are known up to a
            constant at each position.
        complete: whether a pass gives the logit of every token; if not, see `Pass.truncation`.
        eos_ids: tokens that end a completion, besides those that the tokenizer names.
    """

    vocab_size: int
    max_positions: int | None = None
    raw_logits: bool = True
    complete: bool = True
    eos_ids: frozenset[int] = frozenset()

    def estimate(self, prompts: Sequence[int], decoding: Decoding, drafted: bool) -> str | None:
        """The price of a task, in one line; None for a model that costs nothing.

        Args:
            prompts: the number of tokens of each prompt.
            decoding: the task's settings.
            drafted: whether another model drafts.
        """
        return None

    def spending(self) -> str | None:
        """The money spent so far, in one line; None for a model that costs nothing."""
        return None


class Member(Rows, Facts):
    """One model that this engine runs. What is not abstract has a default here.

    Attributes:
        device: where the logits are.
        max_rows: the number of rows beyond which nothing is gained; None for no such number.
        joins: whether `join` takes a single pass.
    """

    device: torch.device
    max_rows: int | None = None
    joins: bool = False

    @abstractmethod
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        guesses: Sequence[Sequence[int]] | None = None,
    ) -> Pass:
        """Reads prompts, each into a new row after the present ones.

        Args:
            prompts: token ids, at least one each.
            guesses: tokens that may follow each prompt. A member that is asked over a network
                wants their logits in the same request; the others ignore them.

        Returns:
            The logits after each prompt, [prompts, vocab].
        """

    def join(self, tokens: torch.Tensor, prompts: Sequence[Sequence[int]]) -> Pass:
        """`step` for the present rows and `prefill` for new ones; one pass where `joins` is True.

        Returns:
            The logits of the present rows, then of the new ones, [rows, vocab].
        """
        return Pass.concatenate(self.step(tokens), self.prefill(prompts))

    def guess(
        self,
        logits: torch.Tensor,
        count: int,
        shared: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
    ) -> list[list[int]]:
        """Continues the last rows greedily, and forgets these tokens again.

        Args:
            logits: the member's own logits after those rows, [rows, vocab].
            count: tokens per row.
            shared: cuts the member's logits to the vocabulary of the system.

        Returns:
            The guessed tokens of each row; none where a row would exceed `max_positions`.
        """
        new = len(logits)
        if self.max_positions and max(self.lengths) + count > self.max_positions:
            return [[] for _ in range(new)]
        tokens = torch.zeros(len(self.lengths), dtype=torch.long, device=logits.device)
        guessed = []
        for _ in range(count):
            guessed.append(shared(logits).argmax(-1))
            tokens[-new:] = guessed[-1]
            logits = self.step(tokens).logits[-new:]
        self.rollback([count] * len(tokens))
        return torch.stack(guessed, dim=1).tolist()

    def bytes_per_token(self) -> Mapping[torch.device, int]:
        """Memory that one more token of a row takes, in bytes, on each device of the model."""
        return {}

    def pace(self, fixed: int | None) -> Pace | None:
        """The `Pace` of drafted blocks that this member verifies; None for lockstep alone.

        Args:
            fixed: the number of drafted tokens per block; None lets the pace adapt.
        """
        return Pace(fixed)


class Group:
    """Members whose rows are moved and dropped together.

    A subclass may read for several of them in one pass, where they share weights.

    Args:
        members: role -> member.
    """

    def __init__(self, members: Mapping[str, Member]) -> None:
        self.members = dict(members)

    def calls(self, tokens: torch.Tensor, without: str | None = None) -> dict[str, Call]:
        """The passes in which the members read a block [rows, width]: role -> pass.

        Args:
            tokens: the block.
            without: the role of a member that has read it already.
        """
        return {
            role: partial(member.extend, tokens)
            for role, member in self.members.items()
            if role != without
        }

    def split(self, passes: Mapping[str, Pass]) -> Mapping[str, Pass]:
        """The results of `calls`, one for each member that read."""
        return passes

    def rollback(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[r] tokens of each row r."""
        for member in self.members.values():
            member.rollback(counts)

    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; rows may be left out or repeated."""
        for member in self.members.values():
            member.keep(rows)

    def clear(self) -> None:
        """Drops every row and frees their memory."""
        for member in self.members.values():
            member.clear()


class System(Rows):
    """One or several members that decode together; the decode loop drives it.

    Attributes:
        vocab_size: entries of its logits.
        members: role -> member.
        alphas: the alphas of a formula by their names; none in a single model.
    """

    vocab_size: int
    members: Mapping[str, Member]
    alphas: Mapping[str, float] = MappingProxyType({})

    @property
    @abstractmethod
    def joins(self) -> bool:
        """Whether `join` takes a single pass; if not, the loop reads prompts by `prefill` alone."""

    @property
    def lengths(self) -> list[int]:
        """Tokens per row of the base."""
        return self.members["base"].lengths

    @abstractmethod
    def prefill(self, prompts: Sequence[Prompt], own: Combinations = None, ahead: int = 0) -> Pass:
        """Reads prompts, each into a new row after the present ones.

        Args:
            prompts: role -> token ids, for each new row.
            own: each row's combination, for as long as the row lives; None takes the system's.
            ahead: how many tokens the small model guesses after each prompt. A base that is
                asked over a network then answers for the prompt and the first block at once.

        Returns:
            The logits after each prompt, [prompts, vocab].
        """

    @abstractmethod
    def join(
        self, tokens: torch.Tensor, prompts: Sequence[Prompt], own: Combinations = None
    ) -> Pass:
        """`step` for the present rows and `prefill` for new ones, in one pass.

        Returns:
            The logits of the present rows, then of the new ones, [rows, vocab].
        """


class DraftingSystem(System):
    """A system with a small model that guesses the next tokens (speculative decoding).

    The small model drafts a block of tokens one by one, then the others read the block in a single
    pass and the loop keeps the tokens that the system itself would have chosen.

    Attributes:
        drafter: the role of the small model; None where drafting can gain nothing.
    """

    drafter: str | None

    @abstractmethod
    def draft(self, tokens: torch.Tensor, width: int, pick: Pick) -> torch.Tensor:
        """Lets the small model continue every row.

        Args:
            tokens: each row's last token, which is certain but not read yet, [rows].
            width: the length of the block, `tokens` included.
            pick: chooses the guesses from the small model's logits.

        Returns:
            The block, [rows, width]: `tokens`, then the guesses.
        """

    @abstractmethod
    def verify(self, block: torch.Tensor) -> Pass:
        """Reads the block that `draft` returned; logits after each token, [rows, width, vocab]."""
