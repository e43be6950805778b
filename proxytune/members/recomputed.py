"""A member that decodes without a cache."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from proxytune.engine.system import Member, Pass
from proxytune.errors import UserError
from proxytune.members.facts import (
    distance,
    input_device,
    magnitude,
    max_positions,
    tolerance,
    version_hint,
)


class RecomputedModel(Member):
    """A causal LM without a usable cache: every pass reads all rows again from their start.

    It is exact for any architecture, and slow: a token costs as much as its whole row.

    Args:
        model: any causal LM.
        vocab_size: the logits are cut to this many entries.
    """

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

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        guesses: Sequence[Sequence[int]] | None = None,
    ) -> Pass:
        """Reads prompts, each into a new row; logits after each, [prompts, vocab]."""
        rows = [list(prompt) for prompt in prompts]
        logits = self._last(rows, 1)
        self._rows += rows
        return Pass(logits[:, 0])

    def extend(self, tokens: torch.Tensor) -> Pass:
        """Reads a block of tokens [rows, width]; logits after each, [rows, width, vocab]."""
        rows = [row + new for row, new in zip(self._rows, tokens.tolist(), strict=True)]
        logits = self._last(rows, tokens.shape[1])
        self._rows = rows
        return Pass(logits)

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
        """Compares a token's logits with and without tokens after it.

        Raises:
            UserError: they differ, so the model cannot write from left to right.
        """
        row = [token % self.vocab_size for token in range(3, 12)]
        alone, followed = self._last([row[:5]], 1)[0, 0], self._last([row], 5)[0, 0]
        if distance(alone, followed) > 3 * tolerance(self.model.dtype) * magnitude(alone):
            raise UserError(
                f"{type(self.model).__name__} looks ahead: its logits depend on later tokens, so "
                "it is no causal language model (is_decoder=True in its config.json?)"
                f"{version_hint()}"
            )

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
