"""A member of a triple that decodes without a cache, and what every member asks of its model."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from proxytune.graphs import tolerance


class RecomputedModel:
    """A causal LM without a usable cache: every call reads all rows again from their start.

    Exact for any architecture, and slow: the cost of a token grows with the length of its row.

    Args:
        model: any causal LM.
        vocab_size: the logits are cut to this many entries.
    """

    joins = False

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.device = input_device(model)
        self.max_positions = max_positions(model)
        self._rows: list[list[int]] = []

    @property
    def lengths(self) -> list[int]:
        """Tokens per row."""
        return [len(row) for row in self._rows]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Appends one row per prompt; returns the next token's logits [prompts, vocab]."""
        rows = [list(prompt) for prompt in prompts]
        logits = self._last(rows, 1)
        self._rows += rows
        return logits[:, 0]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends one token per row ([rows]); returns the next token's logits [rows, vocab]."""
        return self.extend(tokens.unsqueeze(1)).squeeze(1)

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends a block of tokens [rows, width]; returns the logits [rows, width, vocab]."""
        rows = [row + new for row, new in zip(self._rows, tokens.tolist(), strict=True)]
        logits = self._last(rows, tokens.shape[1])
        self._rows = rows
        return logits

    def rollback(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[r] tokens of each row r."""
        kept = zip(self._rows, counts, strict=True)
        self._rows = [row[: len(row) - count] for row, count in kept]

    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; rows may be left out or repeated."""
        self._rows = [list(self._rows[row]) for row in rows]

    def clear(self) -> None:
        """Drops every row."""
        self._rows = []

    @torch.inference_mode()
    def check_causal(self) -> None:
        """Compares a token's logits with and without tokens behind it.

        Raises:
            ValueError: they differ, so the model cannot write from left to right.
        """
        row = [token % self.vocab_size for token in range(3, 12)]
        alone, followed = self._last([row[:5]], 1)[0, 0], self._last([row], 5)[0, 0]
        scale = float(alone.abs().max())
        if float((alone - followed).abs().max()) > 3 * tolerance(self.model.dtype) * scale:
            raise ValueError(
                f"{type(self.model).__name__} looks ahead: its logits depend on later tokens, so "
                "it is no causal language model (is_decoder=True in its config.json?)"
            )

    def bytes_per_token(self) -> int:
        """Nothing is cached."""
        return 0

    def _last(self, rows: list[list[int]], count: int) -> torch.Tensor:
        """The logits of each row's last `count` positions, [rows, count, vocab]."""
        width = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        logits = self.model(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False
        ).logits
        ends = torch.tensor([len(row) for row in rows]).unsqueeze(1)
        wanted = (ends - count + torch.arange(count)).to(logits.device)
        batch = torch.arange(len(rows), device=logits.device).unsqueeze(1)
        return logits[batch, wanted, : self.vocab_size]


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest row that a model reads; None for no limit that it names.

    Where the rotary embedding of all rows changes once one row passes a length (dynamic NTK,
    longrope), that length is the limit: beyond it a row would depend on its neighbours.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        first = rope.get("original_max_position_embeddings")
        return first or getattr(config, "original_max_position_embeddings", None) or limit
    return limit


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model wants its token ids."""
    return next(model.get_input_embeddings().parameters()).device
