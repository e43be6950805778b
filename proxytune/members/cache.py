"""A key-value cache whose rows have lengths of their own and no holes.

The caches of `transformers` have one length for the whole batch, so rows of different lengths need
padding inside the cache. Here row r's tokens are at positions 0 .. lengths[r] - 1, whatever the
other rows hold. A row is rolled back by shortening its length, removed by moving another row into
its place, and copied by copying its slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache

from proxytune.members.packed import Pack, make_pack

BLOCK = 64  # positions; the capacity is a multiple of it


@dataclass
class Write:
    """Where the next forward pass writes its keys and values.

    Attributes:
        rows: the cache rows, in the batch's order.
        view: the same rows as a slice of the cache; None for a prefill.
        starts: the position of each row's first new token.
        width: new tokens per row, padding included.
    """

    rows: list[int]
    view: slice | None
    starts: list[int]
    width: int
    _indices: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def kv_length(self) -> int:
        """How many positions the last new token of the longest row attends to."""
        return max(self.starts) + self.width

    @property
    def uniform(self) -> bool:
        """Whether all rows start at the same position."""
        return min(self.starts) == max(self.starts)

    def indices(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows [batch, 1] and positions [batch, width] as tensors, made once per device."""
        if device not in self._indices:
            rows = torch.tensor(self.rows).unsqueeze(1)
            starts = torch.tensor(self.starts).unsqueeze(1)
            positions = starts + torch.arange(self.width)
            self._indices[device] = (
                rows.to(device, non_blocking=True),
                positions.to(device, non_blocking=True),
            )
        return self._indices[device]


class RowCache(Cache):
    """The keys and values of all layers, [slots, heads, capacity, head size] each.

    A model takes it as `past_key_values`. Before each forward pass, `prepare` sets where the pass
    writes; after it, `advance` adds the new tokens to the lengths. (`pack` and `unpack` do the
    same for a packed pass.)

    Attributes:
        lengths: tokens per row.
        slots: how many rows there is room for.
        capacity: how many positions each slot has.
        epoch: a number that grows whenever the tensors move in memory.
        write: where the next pass writes.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []
        self.slots = 0
        self.capacity = 0
        self.epoch = 0
        self.write: Write | Pack = Write([], None, [0], 0)
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

    def prepare(self, rows: list[int], view: slice | None, width: int) -> Write:
        """Makes room for `width` more tokens on `rows` and sets `write`.

        Args:
            rows: cache rows in batch order; rows that do not exist yet are created, empty.
            view: the rows as a slice; None where all rows are empty (a prefill).
            width: new tokens per row, padding included.
        """
        self.lengths.extend([0] * (max(rows) + 1 - len(self.lengths)))
        self.write = write = Write(rows, view, [self.lengths[row] for row in rows], width)
        self.reserve(len(self.lengths), write.kv_length)
        return write

    def advance(self, counts: Sequence[int]) -> None:
        """Adds the written tokens to the lengths: counts[i] to row i of the last `prepare`."""
        assert isinstance(self.write, Write)
        for row, count in zip(self.write.rows, counts, strict=True):
            self.lengths[row] += count

    def pack(self, width: int, prompts: Sequence[int]) -> Pack:
        """Makes room for `width` more tokens on every row and for new rows, and sets `write`.

        Args:
            width: 0 where the pass reads new rows alone.
            prompts: the lengths of the new rows, which come after the present ones.
        """
        count = len(self.lengths)
        starts, rows = self.lengths if width else (), range(count, count + len(prompts))
        self.write = pack = make_pack(tuple(starts), width, tuple(rows), tuple(prompts))
        self.reserve(count + len(prompts), pack.length)
        return pack

    def unpack(self) -> None:
        """Adds the tokens of the last `pack` to the lengths."""
        assert isinstance(self.write, Pack)
        self.lengths = [*(self.write.ends or self.lengths)]
        self.lengths += [place.stop - place.start for _, place in self.write.prompts]

    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; rows may be left out or repeated."""
        moves = [(new, old) for new, old in enumerate(rows) if new != old]
        lengths = [self.lengths[row] for row in rows]
        self.reserve(len(rows), max(lengths, default=0))
        tensors = [*self._keys.values(), *self._values.values()]
        if {new for new, _ in moves}.isdisjoint(old for _, old in moves):
            for new, old in moves:  # no row is overwritten before it is read
                for tensor in tensors:
                    tensor[new, :, : lengths[new]] = tensor[old, :, : lengths[new]]
        else:
            used = max(self.lengths[old] for _, old in moves)
            new_rows, old_rows = (torch.tensor(list(side)) for side in zip(*moves, strict=True))
            for tensor in tensors:
                target, source = new_rows.to(tensor.device), old_rows.to(tensor.device)
                tensor[target, :, :used] = tensor[source, :, :used]
        self.lengths = lengths

    def clear(self) -> None:
        """Drops every row and frees the memory."""
        self.lengths, self.slots, self.capacity = [], 0, 0
        self.epoch += 1
        self._keys.clear()
        self._values.clear()

    def reserve(self, slots: int, length: int) -> None:
        """Enlarges every layer to at least `slots` rows of `length` positions, one at a time."""
        if slots <= self.slots and length <= self.capacity:
            return
        if length > self.capacity:
            wanted = max(length, self.capacity + self.capacity // 4) if self.capacity else length
            self.capacity = -(-wanted // BLOCK) * BLOCK
        self.slots = max(slots, self.slots)
        self.epoch += 1
        for store in (self._keys, self._values):
            for index, old in store.items():
                store[index] = new = self._empty(old)
                new[: old.shape[0], :, : old.shape[2]] = old

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        # Zeros, not empty: a masked position's value is multiplied by 0, and 0 * NaN is NaN.
        shape = (self.slots, like.shape[1], self.capacity, like.shape[3])
        return torch.zeros(shape, dtype=like.dtype, device=like.device)

    # -- called by a model's forward pass --------------------

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores one layer's new keys and values.

        Args:
            key_states: [batch, heads, width, head size].
            value_states: [batch, heads, width, head size].
            layer_idx: the layer.
            args: ignored; `transformers` passes them for other caches.
            kwargs: ignored; `transformers` passes them for other caches.

        Returns:
            The keys and values that the queries may attend to. After a packed pass, the whole
            cache of the layer.
        """
        if layer_idx not in self._keys:
            self._keys[layer_idx] = self._empty(key_states)
            self._values[layer_idx] = self._empty(value_states)
        keys = self._store(self._keys[layer_idx], key_states)
        values = self._store(self._values[layer_idx], value_states)
        return keys, values

    def _store(self, cache: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        write = self.write
        if isinstance(write, Pack):
            return write.store(cache, new)
        if write.view is None:
            rows, _ = write.indices(cache.device)
            cache[rows.squeeze(1), :, : write.width] = new
            return new
        view = cache[write.view]
        if write.uniform:
            view[:, :, write.starts[0] : write.kv_length] = new
        else:
            rows, positions = write.indices(cache.device)
            cache[rows, :, positions] = new.transpose(1, 2)
        return view[:, :, : write.kv_length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row, the new ones not counted."""
        return max(self.write.starts, default=0)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The position of the first new token, for masks that a model makes itself."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The length and first position of the keys that `update` will return."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No upper limit (-1, as `transformers` writes it)."""
        return -1

    @property
    def is_compileable(self) -> bool:  # noqa: D102
        return False

    @property
    def is_initialized(self) -> bool:  # noqa: D102
        return bool(self._keys)
