"""One model as a system: alone (`Single`), or with a smaller one that drafts (`DraftedModel`)."""

from collections.abc import Sequence

import torch

from proxytune.engine.combining import Combinations
from proxytune.engine.system import DraftingSystem, Member, Pass, Pick, Prompt, System


class Single(System):
    """One model as a system.

    Args:
        member: the model; it reads the prompts of the role "base".
    """

    def __init__(self, member: Member) -> None:
        self.member = member
        self.members = {"base": member}
        self.vocab_size = member.vocab_size

    @property
    def joins(self) -> bool:
        """Whether `join` takes a single pass."""
        return self.member.joins

    def prefill(self, prompts: Sequence[Prompt], own: Combinations = None, ahead: int = 0) -> Pass:
        """Reads prompts, each into a new row; see `System.prefill`."""
        return self.member.prefill([prompt["base"] for prompt in prompts])

    def join(
        self, tokens: torch.Tensor, prompts: Sequence[Prompt], own: Combinations = None
    ) -> Pass:
        """`step` for the present rows, `prefill` for new ones, in one pass; see `System.join`."""
        return self.member.join(tokens, [prompt["base"] for prompt in prompts])

    def extend(self, tokens: torch.Tensor) -> Pass:
        """Reads a block of tokens [rows, width]; logits after each, [rows, width, vocab]."""
        return self.member.extend(tokens)

    def rollback(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[r] tokens of each row r."""
        self.member.rollback(counts)

    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; rows may be left out or repeated."""
        self.member.keep(rows)

    def clear(self) -> None:
        """Drops every row and frees their memory."""
        self.member.clear()


class DraftedModel(DraftingSystem):
    """One model with a smaller one that drafts for it; the text is the large model's alone.

    The draft model reads only what it needs for drafting. Tokens that the model has read without
    it wait in `_missing` until the next draft.

    Args:
        model: decides every token; it reads the prompts of the role "base".
        draft_model: guesses tokens; it reads the prompts of the role "draft".
    """

    drafter = "draft"

    def __init__(self, model: Member, draft_model: Member) -> None:
        self.model = model
        self.draft_model = draft_model
        self.members = {"base": model, "draft": draft_model}
        self.vocab_size = model.vocab_size
        self._missing: list[list[int]] = []  # per row: tokens that only `model` has read

    @property
    def joins(self) -> bool:
        """Whether `join` takes a single pass of the model."""
        return self.model.joins

    def prefill(self, prompts: Sequence[Prompt], own: Combinations = None, ahead: int = 0) -> Pass:
        """Reads prompts, each into a new row; see `System.prefill`."""
        logits = self.draft_model.prefill([prompt["draft"] for prompt in prompts]).logits
        self._missing += [[] for _ in prompts]
        guesses = self.draft_model.guess(logits, ahead) if ahead else None
        return self.model.prefill([prompt["base"] for prompt in prompts], guesses)

    def join(
        self, tokens: torch.Tensor, prompts: Sequence[Prompt], own: Combinations = None
    ) -> Pass:
        """`step` for the present rows and `prefill` for new ones; see `System.join`."""
        for missing, token in zip(self._missing, tokens.tolist(), strict=True):
            missing.append(token)
        self.draft_model.prefill([prompt["draft"] for prompt in prompts])
        self._missing += [[] for _ in prompts]
        return self.model.join(tokens, [prompt["base"] for prompt in prompts])

    def extend(self, tokens: torch.Tensor) -> Pass:
        """Reads a block of tokens [rows, width]; logits after each, [rows, width, vocab]."""
        for missing, new in zip(self._missing, tokens.tolist(), strict=True):
            missing += new
        return self.model.extend(tokens)

    def draft(self, tokens: torch.Tensor, width: int, pick: Pick) -> torch.Tensor:
        """Lets the draft model continue every row; see `DraftingSystem.draft`."""
        block = [tokens]
        logits = self._catch_up(tokens)
        for offset in range(width - 1):
            if offset:
                logits = self.draft_model.step(block[-1]).logits
            block.append(pick(logits, offset))
        # The draft model has not read its last guess; `verify` lets only the model read it.
        self._missing = [[token] for token in block[-1].tolist()]
        return torch.stack([each.to(block[-1].device) for each in block], dim=1)

    def verify(self, block: torch.Tensor) -> Pass:
        """Reads the block that `draft` returned; the model's logits, [rows, width, vocab]."""
        return self.model.extend(block)

    def rollback(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[r] tokens of each row r."""
        self.model.rollback(counts)
        drafted = []  # of these tokens, those that the draft model has read, too
        for missing, count in zip(self._missing, counts, strict=True):
            kept = max(0, len(missing) - count)
            drafted.append(count - (len(missing) - kept))
            del missing[kept:]
        self.draft_model.rollback(drafted)

    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; rows may be left out or repeated."""
        self.model.keep(rows)
        self.draft_model.keep(rows)
        self._missing = [list(self._missing[row]) for row in rows]

    def clear(self) -> None:
        """Drops every row and frees their memory."""
        self.model.clear()
        self.draft_model.clear()
        self._missing = []

    def _catch_up(self, tokens: torch.Tensor) -> torch.Tensor:
        """Lets the draft model read its missing tokens and then `tokens`, [rows].

        Returns:
            Its logits after the last of them, [rows, vocab].
        """
        rows = [
            [*missing, token] for missing, token in zip(self._missing, tokens.tolist(), strict=True)
        ]
        self._missing = [[] for _ in rows]
        width = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        logits = self.draft_model.extend(ids).logits
        self.draft_model.rollback([width - len(row) for row in rows])
        ends = torch.tensor([len(row) - 1 for row in rows], device=logits.device)
        return logits[torch.arange(len(rows), device=logits.device), ends]
