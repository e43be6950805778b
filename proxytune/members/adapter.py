"""An expert that is an adapter (LoRA) of the antiexpert: one copy of the weights, one pass.

Expert and antiexpert share a model and a cache. The expert has the cache's even rows, the
antiexpert the odd ones: a pass over both reads the cache's first rows, a pass over one of them
reads every second row, which is a view.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from proxytune.engine.system import Member, Pair, Pass
from proxytune.members.cached import CachedModel

PLAIN = "__base__"  # PEFT's name for the model without its adapter


class AdapterModel(CachedModel):
    """A PEFT model that uses its adapter for some rows and not for others.

    Args:
        model: a `peft.PeftModel` with one adapter.
        vocab_size: the logits are cut to this many entries.
        paired: True uses the adapter for even rows and not for odd ones; False uses it for none.

    Attributes:
        counts: how many even rows there are (the expert's), and how many odd ones.
    """

    def __init__(self, model: Any, vocab_size: int, paired: bool = True) -> None:
        super().__init__(model, vocab_size)
        self._adapted = model
        self._adapter: str = model.active_adapter
        self._paired = paired
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

    def _call(self, rows: Sequence[int], **inputs: Any) -> torch.Tensor:
        names = [self._adapter if self._paired and row % 2 == 0 else PLAIN for row in rows]
        if len(set(names)) > 1:
            return self._adapted(adapter_names=names, **inputs).logits
        if names[0] == PLAIN:
            with self._adapted.disable_adapter():
                return self._adapted(**inputs).logits
        return self._adapted(**inputs).logits


class AdapterPair(Pair):
    """Expert and antiexpert in one `AdapterModel`, each with half of its rows.

    Args:
        model: shared by both halves.
    """

    def __init__(self, model: AdapterModel) -> None:
        self.model = model
        super().__init__(AdapterHalf(model, 0), AdapterHalf(model, 1))

    def calls(self, tokens: torch.Tensor) -> dict[str, Callable[[], Pass]]:
        """One pass over twice the rows, in the expert's name: each of its rows, then its twin."""
        return {"expert": partial(self.model.extend, tokens.repeat_interleave(2, dim=0))}

    def split(self, passes: Mapping[str, Pass]) -> Mapping[str, Pass]:
        """The even rows are the expert's, the odd ones the antiexpert's."""
        both = passes["expert"]
        return {"expert": both[0::2], "antiexpert": both[1::2]}


class AdapterHalf(Member):
    """One half of an `AdapterPair`: prompts and drafts are read by one half alone.

    Args:
        model: shared with the other half.
        offset: 0 for the expert (with the adapter), 1 for the antiexpert (without).
    """

    def __init__(self, model: AdapterModel, offset: int) -> None:
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

    def bytes_per_token(self) -> int:
        """Cache memory per token of a row."""
        return self.model.bytes_per_token()

    @property
    def _rows(self) -> slice:
        """The rows of the shared model that are this half's."""
        return slice(self.offset, 2 * self.model.counts[self.offset], 2)
