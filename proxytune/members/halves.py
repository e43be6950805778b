"""Two members in one model: one copy of the weights, one cache, one pass for both.

The first half has the cache's even rows, the second one the odd rows: a pass over both reads the
cache's first rows, a pass over one of them reads every second row, which is a view.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from proxytune.engine.system import Call, Group, Member, Pass
from proxytune.members.cached import CachedModel


class HalvedModel(CachedModel):
    """A model whose rows are those of two members.

    Args:
        model: see `CachedModel`.
        vocab_size: the logits are cut to this many entries.

    Attributes:
        counts: how many even rows there are, and how many odd ones.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        super().__init__(model, vocab_size)
        self.counts = [0, 0]

    def keep_half(self, offset: int, rows: Sequence[int]) -> None:
        """Rearranges the even rows (offset 0) or the odd ones (1); the others stay."""
        self.counts[offset] = len(rows)
        slots = list(range(2 * max(self.counts)))
        mine = slice(offset, 2 * len(rows), 2)
        slots[mine] = [2 * row + offset for row in rows]
        lengths = self.cache.lengths
        lengths.extend([0] * (len(slots) - len(lengths)))  # the other half may fill them later
        self.keep(slots)
        for slot in range(2 * len(rows) + offset, len(slots), 2):
            self.cache.lengths[slot] = 0  # a row that this half has left


class Halves(Group):
    """Two members in one `HalvedModel`, each with half of its rows.

    Args:
        model: shared by both halves.
        roles: of the even rows and of the odd ones.
    """

    def __init__(self, model: HalvedModel, roles: tuple[str, str]) -> None:
        self.model = model
        self.roles = roles
        super().__init__({role: Half(model, half) for half, role in enumerate(roles)})

    def calls(self, tokens: torch.Tensor, without: str | None = None) -> dict[str, Call]:
        """One pass over twice the rows, in the first role's name: each row, then its twin."""
        if without in self.roles:
            return super().calls(tokens, without)
        return {self.roles[0]: partial(self.model.extend, tokens.repeat_interleave(2, dim=0))}

    def split(self, passes: Mapping[str, Pass]) -> Mapping[str, Pass]:
        """The even rows are the first role's, the odd ones the second's."""
        first, second = self.roles
        if second in passes or first not in passes:
            return passes
        return {first: passes[first][0::2], second: passes[first][1::2]}


class Half(Member):
    """One half of `Halves`: prompts and drafts are read by one half alone.

    Args:
        model: shared with the other half.
        offset: 0 for the even rows, 1 for the odd ones.
    """

    def __init__(self, model: HalvedModel, offset: int) -> None:
        self.model = model
        self.offset = offset
        self.vocab_size = model.vocab_size
        self.device = model.device
        self.max_positions = model.max_positions

    @property
    def lengths(self) -> list[int]:
        """Tokens per row."""
        return self.model.lengths[self._rows]

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        guesses: Sequence[Sequence[int]] | None = None,
    ) -> Pass:
        """Reads prompts, each into a new row; logits after each, [prompts, vocab]."""
        present = self.model.counts[self.offset]
        rows = [2 * (present + i) + self.offset for i in range(len(prompts))]
        logits = self.model.fill(prompts, rows)
        self.model.counts[self.offset] += len(prompts)
        return Pass(logits)

    def extend(self, tokens: torch.Tensor) -> Pass:
        """Reads a block of tokens [rows, width]; logits after each, [rows, width, vocab]."""
        return Pass(self.model.extend_rows(tokens, self._rows))

    def rollback(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[r] tokens of each row r."""
        every = [0] * len(self.model.lengths)
        every[self._rows] = counts
        self.model.rollback(every)

    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; the other half's rows stay."""
        self.model.keep_half(self.offset, rows)

    def clear(self) -> None:
        """Drops the rows of this half; the memory is freed when both halves are empty."""
        self.model.keep_half(self.offset, [])
        if not any(self.model.counts):
            self.model.clear()

    def bytes_per_token(self) -> Mapping[torch.device, int]:
        """Cache memory per token of a row, by device."""
        return self.model.bytes_per_token()

    @property
    def _rows(self) -> slice:
        """The rows of the shared model that are this half's."""
        return slice(self.offset, 2 * self.model.counts[self.offset], 2)
