"""One pass over rows of different lengths, and over new prompts, without any padding.

All tokens of the pass stand behind each other as one long row: the next tokens of the running
rows, then whole prompts. Matrix products do not care whose token is whose; attention does, and is
computed here for every row over what that row has written. So a prompt joins a running batch for
the price of its own tokens, and a short row does not wait for its long neighbour's.

This is for CPUs, where a call costs microseconds and a padded position as much as a real one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "proxytune_packed"  # under which transformers finds `attend`
CALL = 600  # what a call costs, in padded positions times heads


class Pack:
    """Where the tokens of one pass belong; the `write` of a `RowCache`.

    Args:
        starts: the position of the next token in each running row; the running rows are the
            cache's first ones.
        width: tokens for each running row.
        rows: the cache rows of the prompts.
        prompts: the lengths of the prompts.
    """

    def __init__(
        self, starts: Sequence[int], width: int, rows: Sequence[int], prompts: Sequence[int]
    ) -> None:
        self.starts = list(starts)
        self.width = width
        self.ends = [start + width for start in starts]
        self.prompts: list[tuple[int, slice]] = []  # cache row, place in the pass
        first = self.block = len(starts) * width  # tokens of running rows
        positions = [torch.arange(start, start + width) for start in starts]
        for row, length in zip(rows, prompts, strict=True):
            self.prompts.append((row, slice(first, first + length)))
            positions.append(torch.arange(length))
            first += length
        self.positions = torch.cat(positions).unsqueeze(0)
        self.logits = list(range(self.block)) + [place.stop - 1 for _, place in self.prompts]
        self._uniform = len(set(self.starts)) == 1
        self._rows = torch.arange(len(starts)).repeat_interleave(width)
        self._calls: list[tuple[slice, int, torch.Tensor | None]] = []

    @property
    def length(self) -> int:
        """Positions that the longest row has after the pass."""
        return max([*self.ends, *(place.stop - place.start for _, place in self.prompts)])

    @property
    def padding(self) -> int:
        """Positions that one call for all running rows would look at in vain."""
        return max(self.ends) * len(self.ends) - sum(self.ends)

    def store(self, cache: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Writes one layer's new keys or values, [1, heads, tokens, size]; returns the cache."""
        tokens = new[0].transpose(0, 1)
        if self.block and self._uniform:
            block = tokens[: self.block].unflatten(0, (-1, self.width)).transpose(1, 2)
            cache[: len(self.starts), :, self.starts[0] : self.ends[0]] = block
        elif self.block:
            cache[self._rows, :, self.positions[0, : self.block]] = tokens[: self.block]
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
            scale: of the products; None is one over the root of the head size.

        Returns:
            [1, tokens, heads, head size].
        """
        out = query.new_empty(1, query.shape[2], query.shape[1], values.shape[-1])
        grouped = query.shape[1] != keys.shape[1]
        if self.block:
            block = query[0, :, : self.block].unflatten(1, (-1, self.width)).transpose(0, 1)
            into = out[0, : self.block].unflatten(0, (-1, self.width))
            for rows, end, mask in self._calls or self._plan(keys.shape[1], query.dtype):
                into[rows] = _attention(
                    block[rows], keys[rows, :, :end], values[rows, :, :end], mask, scale
                ).transpose(1, 2)
        for row, place in self.prompts:
            length = place.stop - place.start
            out[0, place] = scaled_dot_product_attention(
                query[:, :, place],
                keys[row : row + 1, :, :length],
                values[row : row + 1, :, :length],
                is_causal=length > 1,
                scale=scale,
                enable_gqa=grouped,
            )[0].transpose(0, 1)
        return out

    def _plan(self, heads: int, dtype: torch.dtype) -> list[tuple[slice, int, torch.Tensor | None]]:
        """Which running rows share a call, how far they look, and the mask where it takes one."""
        count = len(self.starts)
        together = self.padding * heads <= CALL * count
        positions = self.positions[0, : self.block].view(count, 1, self.width, 1)
        for rows in [slice(count)] if together else [slice(i, i + 1) for i in range(count)]:
            end = max(self.ends[rows])
            plain = self.width == 1 and min(self.ends[rows]) == end
            mask = None
            if not plain:  # added to the products; from booleans each layer would make its own
                seen = torch.arange(end) <= positions[rows]
                mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
            self._calls.append((rows, end, mask))
        return self._calls


def _attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """`scaled_dot_product_attention`; heads that share keys read them once.

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
    """What a model's attention layers call during a packed pass.

    Raises:
        ValueError: the model wants what is not computed here.
    """
    if position_bias is not None or softcap is not None:
        raise ValueError(f"{type(module).__name__} needs more than plain attention")
    return pack.attend(query, key, value, scaling), None


AttentionInterface.register(NAME, attend)


@contextmanager
def packed_attention(config: Any) -> Iterator[None]:
    """Has the model of a configuration call `attend`, for the time of one pass."""
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
