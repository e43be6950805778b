"""Penalties on tokens that a row has read or written already, as vLLM and transformers define them.

A penalty depends on the tokens before a position. So each position has its own `History`, also
within a drafted block, and the choice is the same with and without speculation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from proxytune.records import Decoding

NO_RAW_LOGITS = (
    "repetition_penalty scales logits, and a server shows log-probabilities only, which leaves "
    "them undetermined; leave it out, or use presence_penalty and frequency_penalty"
)


class History(NamedTuple):
    """The tokens before one position.

    Attributes:
        prompt: ids in the base's prompt, each once, [n], int64.
        written: the tokens generated before the position.
    """

    prompt: torch.Tensor
    written: Sequence[int]


class Penalties:
    """The penalties of a `Decoding`, which defines them.

    The repetition penalty comes first, then the frequency and the presence penalty.
    """

    def __init__(self, decoding: Decoding) -> None:
        self._repetition = decoding.repetition_penalty
        self._presence = decoding.presence_penalty
        self._frequency = decoding.frequency_penalty

    @property
    def neutral(self) -> bool:
        """Whether they change nothing."""
        return self._repetition == 1 and self._presence == self._frequency == 0

    def apply(self, logits: torch.Tensor, histories: Sequence[History]) -> torch.Tensor:
        """The penalised logits, [rows, vocab], float32; the given ones are not changed.

        Args:
            logits: [rows, vocab], any float type; minus infinity stays so.
            histories: the tokens before each row's position.
        """
        scores = logits.float()
        counts = torch.zeros_like(scores)
        where = _indices([torch.tensor(each.written, dtype=torch.long) for each in histories])
        counts.index_put_(where, counts.new_ones(()), accumulate=True)
        if self._repetition != 1:
            seen = counts > 0
            seen[_indices([each.prompt for each in histories])] = True
            changed = torch.where(scores > 0, scores / self._repetition, scores * self._repetition)
            scores = torch.where(seen, changed, scores)
        if self._frequency:
            scores = scores - self._frequency * counts
        if self._presence:
            scores = scores - self._presence * (counts > 0)
        return scores


def _indices(ids: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers and token ids of all entries, from the token ids of each row."""
    lengths = torch.tensor([len(each) for each in ids])
    return torch.arange(len(ids)).repeat_interleave(lengths), torch.cat(list(ids))
