"""One pass over rows of different lengths, and over new prompts, without any padding.

The model reads all tokens of the pass as one long row: the next tokens of the running rows, then
whole prompts. Matrix products treat every token alike. Attention does not, so it is computed here,
for each row over that row's own tokens. A prompt that joins a running batch costs its own tokens
alone, and a short row costs nothing extra beside a long one.

This is for CPUs, where a call costs microseconds and a padded position as much as a real one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from proxytune.errors import UserError

NAME = "proxytune_packed"  # of `attend`, for transformers
CALL = 250  # the cost of a call, in padded positions times heads
_SETTING = "_attn_implementation_internal"  # the attribute of a configuration for that name
_Call = tuple[slice, int, torch.Tensor | None]  # rows, positions, mask


class Pack:
    """Where the tokens of a packed pass belong in the cache; the `write` of a `RowCache`.

    The running rows are the cache's first ones; their tokens come first in the pass.

    Args:
        starts: the position of the next token in each running row.
        width: tokens for each running row.
        rows: the cache rows of the prompts.
        prompts: the lengths of the prompts.
    """

    def __init__(
        self, starts: Sequence[int], width: int, rows: Sequence[int], prompts: Sequence[int]
    ) -> None:
        self.starts = tuple(starts)
        self.width = width
        self.ends = tuple(start + width for start in starts)
        self.prompts: list[tuple[int, slice]] = []  # cache row, place in the pass
        first = self.block = len(starts) * width  # tokens of running rows, together
        positions = [position for end in self.ends for position in range(end - width, end)]
        for row, length in zip(rows, prompts, strict=True):
            self.prompts.append((row, slice(first, first + length)))
            positions += range(length)
            first += length
        self.positions = torch.tensor([positions])
        self._places: dict[tuple[int, int], torch.Tensor] = {}
        self._calls: dict[tuple[int, torch.dtype], list[_Call]] = {}

    @property
    def length(self) -> int:
        """The length of the longest row after the pass."""
        return max([*self.ends, *(place.stop - place.start for _, place in self.prompts)])

    @property
    def logits(self) -> int | torch.Tensor:
        """The places whose logits are wanted, for `logits_to_keep`; 0 keeps all.

        They are all tokens of running rows, and the last token of each prompt.
        """
        if not self.prompts:
            return 0
        return torch.tensor([*range(self.block), *(place.stop - 1 for _, place in self.prompts)])

    def store(self, cache: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Writes one layer's new keys or values, [1, heads, tokens, size]; returns the cache."""
        if self.block:
            _, heads, capacity, size = cache.shape
            if (heads, capacity) not in self._places:
                rows = torch.arange(len(self.starts)).repeat_interleave(self.width).unsqueeze(1)
                first = (rows * heads + torch.arange(heads)) * capacity
                places = first + self.positions[0, : self.block].unsqueeze(1)
                self._places[heads, capacity] = places.flatten()
            tokens = new[0, :, : self.block].transpose(0, 1).reshape(-1, size)
            cache.view(-1, size).index_copy_(0, self._places[heads, capacity], tokens)
        for row, place in self.prompts:
            cache[row, :, : place.stop - place.start] = new[0, :, place]
        return cache

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Attention of every token over its own row.

        Args:
            query: [1, heads, tokens, head size].
            keys: the cache of one layer, [slots, key heads, capacity, head size].
            values: the same.
            scale: factor on the products; None is one over the root of the head size.

        Returns:
            [1, tokens, heads, head size].
        """
        parts = []
        if self.block:
            block = query[0, :, : self.block].unflatten(1, (-1, self.width)).transpose(0, 1)
            for rows, end, mask in self._plan(keys.shape[1], query.dtype):
                part = _attention(
                    block[rows], keys[rows, :, :end], values[rows, :, :end], mask, scale
                )
                parts.append(part.transpose(1, 2).flatten(0, 1))
        grouped = query.shape[1] != keys.shape[1]
        for row, place in self.prompts:
            length = place.stop - place.start
            part = scaled_dot_product_attention(
                query[:, :, place],
                keys[row : row + 1, :, :length],
                values[row : row + 1, :, :length],
                is_causal=length > 1,
                scale=scale,
                enable_gqa=grouped,
            )
            parts.append(part[0].transpose(0, 1))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)

    def _plan(self, heads: int, dtype: torch.dtype) -> list[_Call]:
        """The attention calls for the running rows.

        Args:
            heads: key heads.
            dtype: of the mask.

        Returns:
            For each call: its rows, the positions that it reads, and its mask, [rows, 1, width,
            positions]; None where every position counts.
        """
        if (heads, dtype) in self._calls:
            return self._calls[heads, dtype]
        # Numbers to add, made once: given booleans, every layer would convert them again.
        seen = torch.arange(max(self.ends)) <= self.positions[0, : self.block].unsqueeze(1)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
        mask = mask.view(len(self.ends), 1, self.width, -1)
        calls: list[_Call] = []
        for rows in _neighbours(self.ends, CALL // heads):
            end = max(self.ends[rows])
            plain = self.width == 1 and min(self.ends[rows]) == end
            calls.append((rows, end, None if plain else mask[rows, ..., :end]))
        self._calls[heads, dtype] = calls
        return calls


@lru_cache(maxsize=4)
def make_pack(
    starts: tuple[int, ...], width: int, rows: tuple[int, ...], prompts: tuple[int, ...]
) -> Pack:
    """A `Pack`, shared by the members of a triple, whose rows mostly have the same lengths."""
    return Pack(starts, width, rows, prompts)


def _neighbours(ends: Sequence[int], most: int) -> Iterator[slice]:
    """Cuts rows, in their order, into runs of similar length.

    Args:
        ends: the length of each row.
        most: how many padded positions one more row may add to a run.
    """
    first = longest = 0
    for row, end in enumerate(ends):
        padding = max(longest - end, (end - longest) * (row - first))
        if row > first and padding > most:
            yield slice(first, row)
            first, longest = row, 0
        longest = max(longest, end)
    yield slice(first, len(ends))


def _attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """`scaled_dot_product_attention` that reads shared keys once for all heads that share them.

    Args:
        query: [rows, heads, width, head size].
        keys: [rows, key heads, positions, head size].
        values: the same.
        mask: [rows, 1, width, positions], or None.
        scale: see `Pack.attend`.
    """
    rows, heads, width, size = query.shape
    shared = heads // keys.shape[1]
    if shared > 1:
        query = query.reshape(rows, keys.shape[1], shared * width, size)
        mask = None if mask is None else mask.repeat(1, 1, shared, 1)
    out = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(rows, heads, width, -1)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    pack: Pack,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of a model's layers during a packed pass.

    Raises:
        UserError: the model's attention has a part that is not computed here.
    """
    if position_bias is not None or softcap is not None:
        raise UserError(f"{type(module).__name__} needs more than plain attention")
    return pack.attend(query, key, value, scaling), None


AttentionInterface.register(NAME, attend)


@contextmanager
def packed_attention(config: Any) -> Iterator[None]:
    """Makes the model of a configuration call `attend` during one pass."""
    own = vars(config)  # the property's setter visits every part of the configuration
    before = own[_SETTING]
    own[_SETTING] = NAME
    try:
        yield
    finally:
        own[_SETTING] = before
