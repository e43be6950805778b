"""One causal language model that decodes a changing set of rows: the member of a triple.

Every member, and every system made of members, has the same small interface (`Member`). The
decode loop drives it and cannot tell what it drives.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from proxytune.cache import RowCache, Write
from proxytune.graphs import RecordedSteps, Run, may_record, tolerance
from proxytune.narrow import narrow_products
from proxytune.packed import packed_attention
from proxytune.recomputed import RecomputedModel, input_device, max_positions

log = logging.getLogger(__name__)

PREFILL_TOKENS = 8192  # tokens (padding included) of one prefill pass
PREFILL_WASTE = 0.75  # prompts shorter than this share of a group's longest start a new group
_NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)


class Member(Protocol):
    """A model as the decode loop sees it: a batch of rows, each a growing list of tokens.

    Rows are numbered 0 .. n - 1. Logits are the model's own, cut to `vocab_size`, in its dtype,
    and may be views: whoever wants to change them makes a copy.
    """

    vocab_size: int

    @property
    def lengths(self) -> list[int]:
        """Tokens per row."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Appends one row per prompt; returns the next token's logits [prompts, vocab]."""
        ...

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends one token per row ([rows]); returns the next token's logits [rows, vocab]."""
        ...

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends a block of tokens [rows, width]; returns the logits [rows, width, vocab]."""
        ...

    def rollback(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[r] tokens of each row r."""
        ...

    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; rows may be left out or repeated."""
        ...

    def clear(self) -> None:
        """Drops every row and the memory that they took."""
        ...


class CachedModel:
    """A Hugging Face causal LM with a `RowCache`.

    Args:
        model: any causal LM whose attention takes 4-D masks and explicit positions.
        vocab_size: the logits are cut to this many entries.
        joins: rows of different lengths and new prompts share passes without padding (`packed`);
            `make_member` finds out whether a model can.
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
        self, prompts: Sequence[Sequence[int]], rows: list[int] | None = None
    ) -> torch.Tensor:
        """Appends one row per prompt; returns the next token's logits [prompts, vocab].

        Prompts of similar length share a pass, padded on the right; very different ones do not
        pay for each other.

        Args:
            prompts: token ids, at least one each.
            rows: the cache rows to fill; None for new rows behind the last.
        """
        if self.joins and rows is None:
            parts = _parts([len(prompt) for prompt in prompts])
            return torch.cat([self._packed(None, prompts[part]) for part in parts])
        first = len(self.lengths)
        rows = rows or list(range(first, first + len(prompts)))
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        logits: list[torch.Tensor | None] = [None] * len(prompts)
        for group in _groups(order, [len(prompt) for prompt in prompts]):
            width = len(prompts[group[0]])
            ids = torch.zeros(len(group), width, dtype=torch.long)
            for i, index in enumerate(group):
                ids[i, : len(prompts[index])] = torch.tensor(list(prompts[index]))
            last = [len(prompts[index]) - 1 for index in group]
            self.cache.prepare([rows[index] for index in group], None, width)
            out = self._forward(ids.to(self.device), torch.tensor(last).unsqueeze(1))
            self.cache.advance([position + 1 for position in last])
            for i, index in enumerate(group):
                logits[index] = out[i, 0]
        return torch.stack([row for row in logits if row is not None])

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends one token per row ([rows]); returns the next token's logits [rows, vocab]."""
        return self.extend(tokens.unsqueeze(1)).squeeze(1)

    def extend(self, tokens: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """Appends a block of tokens [rows, width]; returns the logits [rows, width, vocab].

        Args:
            tokens: token ids.
            rows: the rows that are extended; all of them by default.
        """
        if self.joins and min(self.lengths) < max(self.lengths):
            return self._packed(tokens, []).unflatten(0, tuple(tokens.shape))
        if self.recorded and self.recorded.usable and rows == slice(None):
            return self.recorded.extend(tokens)
        first, stop, step = rows.indices(len(self.lengths))
        width = tokens.shape[1]
        self.cache.prepare(list(range(first, stop, step)), slice(first, stop, step), width)
        logits = self._forward(tokens.to(self.device, non_blocking=True))
        self.cache.advance([width] * tokens.shape[0])
        return logits

    def join(self, tokens: torch.Tensor, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """`step` for the present rows and `prefill` of new ones, in one pass.

        Returns:
            The next token's logits of the present rows, then of the new ones, [rows, vocab].
        """
        if not self.joins or sum(map(len, prompts)) > PREFILL_TOKENS:
            return torch.cat([self.step(tokens), self.prefill(prompts)])
        return self._packed(tokens.unsqueeze(1), prompts)

    def record(self, record: Callable[[Run], Run] | None = None) -> None:
        """From now on, records and replays the passes of `extend` (`graphs.RecordedSteps`)."""
        self.recorded = RecordedSteps(self._forward, self.cache, self.device, record)

    def rollback(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[r] tokens of each row r."""
        lengths = self.cache.lengths
        lengths[:] = [length - count for length, count in zip(lengths, counts, strict=True)]

    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; rows may be left out or repeated."""
        self.cache.keep(rows)

    def clear(self) -> None:
        """Drops every row and the memory that they took."""
        self.cache.clear()

    def bytes_per_token(self) -> int:
        """Cache memory per token of a row, from the configuration."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize

    def _forward(self, ids: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [batch, width, vocab], or of the positions `keep` [batch, positions] alone."""
        write = self.cache.write
        assert isinstance(write, Write)
        _, positions = write.indices(self.device)
        with narrow_products(ids.numel(), self.device):
            logits = self._call(
                write.rows,
                input_ids=ids,
                attention_mask=self._mask(write),
                position_ids=self._within(positions, write.kv_length),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=0 if keep is None else keep.to(self.device),
            )
        return logits[..., : self.vocab_size]

    def _packed(
        self, tokens: torch.Tensor | None, prompts: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """One pass over a block of tokens for every row, [rows, width], and new prompts.

        Returns:
            The logits of all the block's tokens, row by row, then of each prompt's last one.
        """
        pack = self.cache.pack(
            0 if tokens is None else tokens.shape[1], [len(prompt) for prompt in prompts]
        )
        parts = [] if tokens is None else [tokens.reshape(-1)]
        ids = torch.cat([*parts, *(torch.tensor(prompt) for prompt in prompts)])
        with packed_attention(self._config), narrow_products(len(ids), self.device):
            logits = self.model(
                input_ids=ids.unsqueeze(0),
                # `attend` needs no mask, but without one the model would make its own
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
        """Positions that exist: padding, or a block, may reach beyond the last one."""
        if self.max_positions and length > self.max_positions:
            return positions.clamp(max=self.max_positions - 1)
        return positions

    def _call(self, rows: Sequence[int], **inputs: Any) -> torch.Tensor:
        """The model's own forward pass; `rows` are the cache rows of the batch."""
        return self.model(**inputs).logits

    def _mask(self, write: Write) -> torch.Tensor | dict[str, torch.Tensor] | None:
        """Who may attend to what, [batch, 1, width, kv length], per kind of layer where needed.

        None leaves it to the model, which is right, and cheapest, where all rows start at one
        position: a prefill (right padding comes behind all that counts), a step of equal rows.
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
        """SDPA takes booleans; eager attention adds the mask to its scores."""
        if not self._eager:
            return allowed
        bias = torch.zeros(allowed.shape, dtype=self.model.dtype, device=allowed.device)
        return bias.masked_fill_(~allowed, torch.finfo(self.model.dtype).min)


def make_member(
    model: PreTrainedModel, vocab_size: int, cuda_graphs: bool = False
) -> CachedModel | RecomputedModel:
    """Wraps a loaded model: with a cache where that is provably the same, else without.

    A short check compares the cache with one plain pass over the same tokens. What a cache of
    rows cannot carry (a recurrent state, ALiBi, chunked attention) shows as a difference or an
    error there; the model is then recomputed from the start for every token, with a warning.

    Raises:
        ValueError: a model that looks ahead: its logits change with the tokens behind them.
    """
    reason = _why_not(CachedModel(model, vocab_size))
    if reason is None:
        joining = CachedModel(model, vocab_size, joins=_may_join(model))
        member = joining if not _why_not(joining) else CachedModel(model, vocab_size)
        if cuda_graphs and may_record(model):
            member.record()
        elif cuda_graphs:
            log.warning("%s decodes without CUDA graphs: not on one GPU", type(model).__name__)
        return member
    plain = RecomputedModel(model, vocab_size)
    plain.check_causal()
    log.warning("%s decodes without a cache, exact but slow: %s", type(model).__name__, reason)
    return plain


def can_cache(model: PreTrainedModel, vocab_size: int) -> bool:
    """Whether a model's logits are the same through a `RowCache`."""
    return _why_not(CachedModel(model, vocab_size)) is None


def _may_join(model: PreTrainedModel) -> bool:
    """Whether packed passes make sense: on a CPU, for plain attention over the whole row."""
    config = model.config.get_text_config()
    plain = config._attn_implementation == "sdpa" and not getattr(config, "sliding_window", None)
    return plain and input_device(model).type == "cpu"


@torch.inference_mode()
def _why_not(cached: CachedModel) -> str | None:
    """Why a `CachedModel` would not give its model's logits; None where it does."""
    model, vocab_size = cached.model, cached.vocab_size
    config = model.config.get_text_config()
    odd = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd:
        return f"layers of type {', '.join(sorted(odd))}"
    generator = torch.Generator().manual_seed(0)
    short, long = (torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (9, 14))
    try:
        got = [cached.prefill([short[:4], long[:9]])]
        got.append(cached.step(torch.tensor([short[4], long[9]])))
        cached.extend(torch.tensor([[short[5], 0, 0], [long[10], long[11], 0]]))
        cached.rollback([2, 1])
        block = cached.extend(torch.tensor([short[6:8], long[12:14]]))
        got += [block[:, 0], block[:, 1]]
        joined = cached.join(torch.tensor([short[8], long[0]]), [long[:5], short[:1]])
        cached.clear()
    except (torch.OutOfMemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a foreign forward pass raises means: not this way
        return f"its forward pass does not take the cache ({type(error).__name__}: {error})"
    plain = RecomputedModel(model, vocab_size)
    want = [plain.prefill([short[:4], long[:9]]), plain.step(torch.tensor([short[4], long[9]]))]
    plain.keep([0, 1])
    plain.clear()
    plain.prefill([short[:6], long[:12]])
    block = plain.extend(torch.tensor([short[6:8], long[12:14]]))
    want += [block[:, 0], block[:, 1]]
    got.append(joined)
    tokens = torch.tensor([short[8], long[0]])
    want.append(torch.cat([plain.step(tokens), plain.prefill([long[:5], short[:1]])]))
    worst = max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True))
    scale = max(float(w.abs().max()) for w in want)
    if worst <= tolerance(model.dtype) * scale:
        return None
    return f"its cached logits differ from the plain ones by {worst:.2g} of {scale:.2g}"


def _parts(lengths: Sequence[int]) -> list[slice]:
    """Cuts prompts, in their order, into parts of at most `PREFILL_TOKENS`, or a single prompt."""
    starts, tokens = [0], 0
    for index, length in enumerate(lengths):
        tokens += length
        if tokens > PREFILL_TOKENS and index > starts[-1]:
            starts.append(index)
            tokens = length
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(lengths)], strict=True)]


def _groups(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Cuts prompts, longest first, into groups of similar length and limited size."""
    groups: list[list[int]] = []
    for index in order:
        longest = lengths[groups[-1][0]] if groups else 0
        full = groups and longest * (len(groups[-1]) + 1) > PREFILL_TOKENS
        if not groups or full or lengths[index] < PREFILL_WASTE * longest:
            groups.append([])
        groups[-1].append(index)
    return groups
