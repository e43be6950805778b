"""Proxy-tuning: the formula, and a triple of models that decodes by it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from proxytune.adapter import AdapterMember
from proxytune.member import Member
from proxytune.speculative import guess_ahead
from proxytune.truncation import Truncation


def combine_logits(
    base: torch.Tensor,
    expert: torch.Tensor,
    antiexpert: torch.Tensor,
    alpha: float | torch.Tensor,
) -> torch.Tensor:
    """Proxy-tuning (Liu et al. 2024, equation 1): base + alpha * (expert - antiexpert).

    Args:
        base: logits of the large untuned model, [..., vocab].
        expert: logits of the small tuned model, same shape.
        antiexpert: logits of the small untuned model, same shape.
        alpha: how much of the tuning is transferred; the paper's default is 1. A tensor that
            broadcasts, [rows, 1], for rows that differ.

    Returns:
        The proxy-tuned logits in float32; the arguments stay as they are.
    """
    shift = expert.float()  # a copy, unless it is float32 already
    shift = torch.sub(expert, antiexpert) if shift is expert else shift.sub_(antiexpert)
    if isinstance(alpha, torch.Tensor):
        return torch.add(base, shift.mul_(alpha), out=shift)
    return torch.add(base, shift, alpha=alpha, out=shift)


class ProxyTunedModel:
    """A triple that looks like one model (`member.Member`) to the decode loop.

    A prompt is a mapping from role to token ids: each member may read a prompt of its own. From
    there on all members read the same tokens.

    Args:
        base: the large untuned model.
        expert: the small tuned model.
        antiexpert: the small untuned model.
        alpha: see `combine_logits`.
    """

    def __init__(
        self, base: Member, expert: Member, antiexpert: Member, alpha: float = 1.0
    ) -> None:
        self.members: dict[str, Member] = {
            "base": base,
            "expert": expert,
            "antiexpert": antiexpert,
        }
        self.alpha = alpha
        self.vocab_size = min(member.vocab_size for member in self.members.values())
        self.last_logits: dict[str, torch.Tensor] = {}
        self._alphas: list[float | None] = []  # per row; None is `alpha`
        self._drafted: list[torch.Tensor] = []
        self._streams: dict[str, torch.cuda.Stream] = {}
        self._one_pass = expert if isinstance(expert, AdapterMember) else None

    @property
    def lengths(self) -> list[int]:
        """Tokens per row, of the base."""
        return self.members["base"].lengths

    def prefill(
        self,
        prompts: Sequence[Mapping[str, Sequence[int]]],
        alphas: Sequence[float | None] | None = None,
        ahead: int = 0,
    ) -> torch.Tensor:
        """Appends one row per prompt; returns the next token's logits [prompts, vocab].

        Args:
            prompts: role -> token ids.
            alphas: each row's own, for as long as it lives; None is the triple's `alpha`.
            ahead: tokens that the expert guesses behind each prompt, for a base that is asked
                over a network: one request then answers for the prompt and for the first block.
        """
        self._alphas += alphas or [None] * len(prompts)
        calls: dict[str, Callable[[], torch.Tensor]] = {
            role: partial(member.prefill, [prompt[role] for prompt in prompts])
            for role, member in self.members.items()
        }
        if not ahead:
            return self._combine(self._run(calls))
        logits = self._run({"expert": calls["expert"]})
        base: Any = self.members["base"]
        guesses = guess_ahead(self.members["expert"], logits["expert"], ahead)
        calls["base"] = partial(base.prefill, [p["base"] for p in prompts], guesses)
        others = self._run({role: calls[role] for role in ("base", "antiexpert")})
        return self._combine(others | logits)

    @property
    def joins(self) -> bool:
        """Whether `join` is one pass of each member."""
        return all(getattr(member, "joins", False) for member in self.members.values())

    def join(
        self,
        tokens: torch.Tensor,
        prompts: Sequence[Mapping[str, Sequence[int]]],
        alphas: Sequence[float | None] | None = None,
    ) -> torch.Tensor:
        """`step` for the present rows and `prefill` of new ones; logits [rows, vocab] of all."""
        self._alphas += alphas or [None] * len(prompts)
        members: dict[str, Any] = self.members
        calls = {
            role: partial(member.join, tokens, [prompt[role] for prompt in prompts])
            for role, member in members.items()
        }
        return self._combine(self._run(calls))

    @property
    def truncation(self) -> Truncation | None:
        """What is known of the last logits where the base shows a part only; else None."""
        known: Truncation | None = getattr(self.members["base"], "truncation", None)
        if known is None:
            return None
        ceiling = known.ceiling[..., : self.vocab_size]
        logits = self.last_logits | {"base": ceiling}
        return replace(known, ceiling=combine_logits(**logits, alpha=self._alpha_of(ceiling)))

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends one token per row ([rows]); returns the next token's logits [rows, vocab]."""
        if self._one_pass:
            return self.extend(tokens.unsqueeze(1)).squeeze(1)
        calls = {role: partial(member.step, tokens) for role, member in self.members.items()}
        return self._combine(self._run(calls))

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends a block of tokens [rows, width]; returns the logits [rows, width, vocab]."""
        calls = {role: partial(member.extend, tokens) for role, member in self.members.items()}
        if not self._one_pass:
            return self._combine(self._run(calls))
        del calls["antiexpert"]
        calls["expert"] = partial(self._one_pass.extend_both, tokens)
        logits = self._run(calls)
        logits["antiexpert"] = logits["expert"][1::2]
        logits["expert"] = logits["expert"][0::2]
        return self._combine(logits)

    def draft(
        self,
        tokens: torch.Tensor,
        width: int,
        pick: Callable[[torch.Tensor, int], torch.Tensor],
    ) -> torch.Tensor:
        """Lets the expert continue `tokens` alone: a guess that `verify` then checks.

        Args:
            tokens: each row's next token, [rows].
            width: length of the block, `tokens` included.
            pick: chooses [rows] tokens from logits and their offset in the block.

        Returns:
            [rows, width]: `tokens`, then the guesses.
        """
        self._drafted = []
        block = [tokens]
        for offset in range(width):
            logits = self.members["expert"].step(block[-1])
            self._drafted.append(logits)
            if offset < width - 1:
                block.append(pick(logits, offset))
        return torch.stack([each.to(block[-1].device) for each in block], dim=1)

    def verify(self, block: torch.Tensor) -> torch.Tensor:
        """The triple's logits [rows, width, vocab] over the block that `draft` returned.

        The expert has read it while it drafted; base and antiexpert read it in one pass each.
        """
        others = {role: self.members[role] for role in ("base", "antiexpert")}
        logits = self._run({role: partial(each.extend, block) for role, each in others.items()})
        logits["expert"] = torch.stack(self._drafted, dim=1)
        self._drafted = []
        return self._combine(logits)

    def rollback(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[r] tokens of each row r."""
        for member in self.members.values():
            member.rollback(counts)

    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; rows may be left out or repeated."""
        self._alphas = [self._alphas[row] for row in rows]
        for member in self.members.values():
            member.keep(rows)

    def clear(self) -> None:
        """Drops every row and the memory that they took."""
        self.last_logits, self._alphas = {}, []
        for member in self.members.values():
            member.clear()

    def _run(self, calls: Mapping[str, Callable[[], torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Runs the members' passes; on CUDA each in a stream of its own, so at the same time."""
        logits: dict[str, torch.Tensor] = {}
        for role, call in calls.items():
            stream = self._stream(role)
            if stream is None:
                logits[role] = call()
                continue
            stream.wait_stream(torch.cuda.current_stream(stream.device))
            with torch.cuda.stream(stream):
                logits[role] = call()
        for role in calls:
            stream = self._stream(role)
            if stream is not None:
                here = torch.cuda.current_stream(stream.device)
                here.wait_stream(stream)
                logits[role].record_stream(here)  # its memory is in use until `here` is done
        return logits

    def _stream(self, role: str) -> torch.cuda.Stream | None:
        """The stream of one member; None where it runs on the CPU or elsewhere."""
        device = getattr(self.members[role], "device", None)
        if device is None or device.type != "cuda":
            return None
        if role not in self._streams:
            self._streams[role] = torch.cuda.Stream(device)
        return self._streams[role]

    def _combine(self, logits: dict[str, torch.Tensor]) -> torch.Tensor:
        device = logits["base"].device
        self.last_logits = {
            role: each[..., : self.vocab_size].to(device, non_blocking=True)
            for role, each in logits.items()
        }
        return combine_logits(**self.last_logits, alpha=self._alpha_of(self.last_logits["base"]))

    def _alpha_of(self, logits: torch.Tensor) -> float | torch.Tensor:
        """The alpha of the rows that `logits` belong to: the last ones, or all."""
        own = self._alphas[-logits.shape[0] :]
        if all(alpha is None for alpha in own):
            return self.alpha
        alphas = [self.alpha if alpha is None else alpha for alpha in own]
        shape = [-1] + [1] * (logits.dim() - 1)
        return torch.tensor(alphas, device=logits.device).view(shape)
