"""One causal language model with a key-value cache."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from proxytune.engine.system import Member, Pass
from proxytune.members.cache import RowCache, Write
from proxytune.members.facts import input_device, layer_devices, max_positions
from proxytune.members.graphs import RecordedSteps, Run
from proxytune.members.narrow import narrow_products
from proxytune.members.packed import packed_attention

PREFILL_TOKENS = 8192  # tokens (padding included) of one prefill pass
PREFILL_WASTE = 0.75  # prompts shorter than this share of a group's longest start a new group
_NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)


class CachedModel(Member):
    """A Hugging Face causal LM with a `RowCache`.

    Args:
        model: any causal LM whose attention takes 4-D masks and explicit positions.
        vocab_size: the logits are cut to this many entries.
        joins: rows of different lengths and new prompts share passes without padding (`packed`);
            `make_member` checks whether a model can.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, joins: bool = False) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.joins = joins
        self.cache = RowCache()
        self.device = input_device(model)
        self._config = config = model.config.get_text_config()
        self.max_positions = max_positions(model)
        layer_types = set(getattr(config, "layer_types", None) or ())
        self._window: int | None = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:
            self._window = None
        self._mask_per_layer_type = "sliding_attention" in layer_types
        if layer_types == {"full_attention"}:
            self._window = None
        self._eager = config._attn_implementation == "eager"
        self.recorded: RecordedSteps | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens per row."""
        return self.cache.lengths

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        guesses: Sequence[Sequence[int]] | None = None,
    ) -> Pass:
        """Reads prompts, each into a new row; logits after each, [prompts, vocab]."""
        if self.joins:
            parts = _parts([len(prompt) for prompt in prompts])
            return Pass(torch.cat([self._packed(None, prompts[part]) for part in parts]))
        first = len(self.lengths)
        return Pass(self.fill(prompts, list(range(first, first + len(prompts)))))

    def fill(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> torch.Tensor:
        """Reads prompts into these rows of the cache.

        Prompts of similar length share a pass, padded on the right. A prompt that is much shorter
        than others is read in another pass, so that it is not padded to their length.

        Returns:
            The logits after each prompt, [prompts, vocab].
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        logits: list[torch.Tensor | None] = [None] * len(prompts)
        for group in _groups(order, [len(prompt) for prompt in prompts]):
            width = len(prompts[group[0]])
            ids = torch.zeros(len(group), width, dtype=torch.long)
            for i, index in enumerate(group):
                ids[i, : len(prompts[index])] = torch.tensor(list(prompts[index]))
            last = [len(prompts[index]) - 1 for index in group]
            self.cache.prepare([rows[index] for index in group], None, width)
            out = self._forward(ids.to(self.device), torch.tensor(last))
            self.cache.advance([position + 1 for position in last])
            for i, index in enumerate(group):
                logits[index] = out[i, 0]
        return torch.stack([row for row in logits if row is not None])

    def extend(self, tokens: torch.Tensor) -> Pass:
        """Reads a block of tokens [rows, width]; logits after each, [rows, width, vocab]."""
        if self.joins and min(self.lengths) < max(self.lengths):
            return Pass(self._packed(tokens, []).unflatten(0, tuple(tokens.shape)))
        if self.recorded and self.recorded.usable:
            return Pass(self.recorded.extend(tokens))
        return Pass(self.extend_rows(tokens, slice(None)))

    def extend_rows(self, tokens: torch.Tensor, rows: slice) -> torch.Tensor:
        """Lets some rows read a block [rows, width]; logits after each, [rows, width, vocab]."""
        first, stop, step = rows.indices(len(self.lengths))
        width = tokens.shape[1]
        self.cache.prepare(list(range(first, stop, step)), slice(first, stop, step), width)
        logits = self._forward(tokens.to(self.device, non_blocking=True))
        self.cache.advance([width] * tokens.shape[0])
        return logits

    def join(self, tokens: torch.Tensor, prompts: Sequence[Sequence[int]]) -> Pass:
        """`step` for the present rows and `prefill` for new ones; see `Member.join`."""
        if not self.joins or sum(map(len, prompts)) > PREFILL_TOKENS:
            return super().join(tokens, prompts)
        return Pass(self._packed(tokens.unsqueeze(1), prompts))

    def record(self, record: Callable[[Run], Run] | None = None) -> None:
        """Records and replays the passes of `extend` from now on (`graphs.RecordedSteps`).

        Args:
            record: see `graphs.RecordedSteps`.
        """
        self.recorded = RecordedSteps(self._forward, self.cache, self.device, record)

    def rollback(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[r] tokens of each row r."""
        lengths = self.cache.lengths
        lengths[:] = [length - count for length, count in zip(lengths, counts, strict=True)]

    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; rows may be left out or repeated."""
        self.cache.keep(rows)

    def clear(self) -> None:
        """Drops every row and frees their memory."""
        self.cache.clear()

    def bytes_per_token(self) -> Mapping[torch.device, int]:
        """Cache memory per token of a row, in bytes, by device; from the configuration."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        ranks = getattr(self.model, "_tp_size", None) or 1  # each holds its own heads' part
        layer = 2 * heads * size * self.model.dtype.itemsize // ranks
        return {device: layers * layer for device, layers in layer_devices(self.model).items()}

    def _forward(self, ids: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
        """One pass, which writes to `cache.write`.

        Args:
            ids: token ids, [batch, width].
            last: the position of each row whose logits are wanted, [batch]; None for all.

        Returns:
            Logits, [batch, width, vocab] or [batch, 1, vocab].
        """
        write = self.cache.write
        assert isinstance(write, Write)
        _, positions = write.indices(self.device)
        head = nullcontext() if last is None else _logits_at(self.model, last)
        with narrow_products(ids.numel(), self.device), head:
            logits = self._call(
                write.rows,
                input_ids=ids,
                attention_mask=self._mask(write),
                position_ids=self._within(positions, write.kv_length),
                past_key_values=self.cache,
                use_cache=True,
            )
        return logits[..., : self.vocab_size]

    def _packed(
        self, tokens: torch.Tensor | None, prompts: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """One pass without padding over a block of tokens for every row and over new prompts.

        Args:
            tokens: the block, [rows, width]; None for prompts alone.
            prompts: token ids of each new row.

        Returns:
            The logits after every token of the block, row by row, then those after each prompt;
            [rows * width + prompts, vocab].
        """
        pack = self.cache.pack(
            0 if tokens is None else tokens.shape[1], [len(prompt) for prompt in prompts]
        )
        parts = [] if tokens is None else [tokens.reshape(-1)]
        ids = torch.cat([*parts, *(torch.tensor(prompt) for prompt in prompts)])
        with packed_attention(self._config), narrow_products(len(ids), self.device):
            logits = self.model(
                input_ids=ids.unsqueeze(0),
                # `attend` needs no mask, but without one the model makes its own.
                attention_mask=_NO_MASK,
                position_ids=self._within(pack.positions, pack.length),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=pack.logits,
                pack=pack,
            ).logits
        self.cache.unpack()
        return logits[0, :, : self.vocab_size]

    def _within(self, positions: torch.Tensor, length: int) -> torch.Tensor:
        """The positions, cut to the model's last one, which padding or a block may exceed."""
        if self.max_positions and length > self.max_positions:
            return positions.clamp(max=self.max_positions - 1)
        return positions

    def _call(self, rows: Sequence[int], **inputs: Any) -> torch.Tensor:
        """The model's own forward pass; `rows` are the cache rows of the batch."""
        return self.model(**inputs).logits

    def _mask(self, write: Write) -> torch.Tensor | dict[str, torch.Tensor] | None:
        """Which positions each new token may attend to, [batch, 1, width, kv length].

        A model with two kinds of layers gets a mask for each kind. None leaves the mask to the
        model. That is right, and cheapest, where all rows start at one position: in a prefill
        (right padding comes after every real token), and in a step of equally long rows.
        """
        if write.view is None or (write.uniform and write.width == 1):
            return None
        _, positions = write.indices(self.device)
        distance = positions.unsqueeze(-1) - torch.arange(write.kv_length, device=self.device)
        full = (distance >= 0).unsqueeze(1)
        if self._window is None:
            return self._as_bias(full)
        sliding = self._as_bias(full & (distance < self._window).unsqueeze(1))
        if not self._mask_per_layer_type:
            return sliding
        return {"full_attention": self._as_bias(full), "sliding_attention": sliding}

    def _as_bias(self, allowed: torch.Tensor) -> torch.Tensor:
        """The mask as the attention takes it: SDPA booleans, eager attention numbers to add."""
        if not self._eager:
            return allowed
        bias = torch.zeros(allowed.shape, dtype=self.model.dtype, device=allowed.device)
        return bias.masked_fill_(~allowed, torch.finfo(self.model.dtype).min)


@contextmanager
def _logits_at(model: PreTrainedModel, positions: torch.Tensor) -> Iterator[None]:
    """For one pass, has a model compute the logits of one position per row, [batch], alone.

    The positions are picked at the door of its last layer, because `logits_to_keep` takes a
    position per row only from transformers 5.21 on. One list for all rows would compute rows times
    rows of logits, which takes as long as the layers if the vocabulary is large.
    """

    def pick(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        (hidden,) = inputs  # [batch, width, hidden size], maybe on another device than the ids
        rows = torch.arange(len(positions), device=hidden.device)
        return hidden[rows, positions.to(hidden.device)].unsqueeze(1)

    head = model.get_output_embeddings()
    assert head is not None, "the model names no output embeddings"
    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def _parts(lengths: Sequence[int]) -> list[slice]:
    """Cuts prompts, in their order, into parts of at most `PREFILL_TOKENS` tokens.

    A longer prompt is a part of its own.
    """
    starts, tokens = [0], 0
    for index, length in enumerate(lengths):
        tokens += length
        if tokens > PREFILL_TOKENS and index > starts[-1]:
            starts.append(index)
            tokens = length
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(lengths)], strict=True)]


def _groups(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Cuts prompts into groups of similar length, of at most `PREFILL_TOKENS` with padding.

    Args:
        order: the prompts' indices, longest first.
        lengths: tokens of each prompt.
    """
    groups: list[list[int]] = []
    for index in order:
        longest = lengths[groups[-1][0]] if groups else 0
        full = groups and longest * (len(groups[-1]) + 1) > PREFILL_TOKENS
        if not groups or full or lengths[index] < PREFILL_WASTE * longest:
            groups.append([])
        groups[-1].append(index)
    return groups
