"""Proxy-tuning: the formula (`combine_logits`), and models that decode together by a formula.

A small tuned model (expert) and the same model untuned (antiexpert) steer a large untuned one
(base): the difference of their logits is added to the base's. Other formulas: `proxytune.formula`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from proxytune.engine.combining import Combination, Combinations, by_formula, combined
from proxytune.engine.system import Call, DraftingSystem, Group, Pass, Pick, Prompt
from proxytune.engine.unshifted import Unshifted

# The members' logits by role and their alphas, all by keyword -> the combined logits, float32.
Formula = Callable[..., torch.Tensor]
_F = TypeVar("_F", bound=Formula)


@dataclass(frozen=True)
class Traits:
    """What the engine may rely on with a formula.

    Attributes:
        adds: what a formula adds to the base's logits does not depend on them.
        rises: no combined logit falls where a logit of the base rises that is not its highest. So
            upper bounds of the base's logits give upper bounds of the combined ones, which a base
            behind an API that lists only the likeliest tokens needs.
        gates: at some positions the combined logits are the base's own, and runs count the others.
    """

    adds: bool = False
    rises: bool = False
    gates: bool = False


_traits: WeakKeyDictionary[Formula, Traits] = WeakKeyDictionary()


def traits(*, adds: bool = False, rises: bool = False, gates: bool = False) -> Callable[[_F], _F]:
    """A decorator that states the `Traits` of a formula."""

    def note(formula: _F) -> _F:
        _traits[formula] = Traits(adds, rises, gates)
        return formula

    return note


def traits_of(formula: Formula) -> Traits:
    """The traits of a formula; those of a function that states none are False."""
    return _traits.get(formula.func if isinstance(formula, partial) else formula, Traits())


@traits(adds=True, rises=True)
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
        alpha: the scale on the difference; the paper's default is 1. Where rows have scales of
            their own, a tensor that broadcasts, [rows, 1].

    Returns:
        The proxy-tuned logits in float32, in new memory. Where expert and antiexpert are both minus
        infinity there is no shift. A token stays at minus infinity where the base gives that.
    """
    shift = expert.float()  # a copy, except where the expert is float32 already
    shift = torch.sub(expert, antiexpert) if shift is expert else shift.sub_(antiexpert)
    # On a GPU the answer of `isfinite` would have to be waited for; there `_settle` is cheaper.
    if shift.is_cuda or not math.isfinite(shift.sum()):
        _settle(shift, base, expert, antiexpert, alpha)
    # From here on `shift` is ours; writing into it saves memory of the size of the logits.
    if isinstance(alpha, torch.Tensor):
        return torch.add(base, shift.mul_(alpha), out=shift)
    return torch.add(base, shift, alpha=alpha, out=shift)


def _settle(
    shift: torch.Tensor,
    base: torch.Tensor,
    expert: torch.Tensor,
    antiexpert: torch.Tensor,
    alpha: float | torch.Tensor,
) -> None:
    """Removes from a shift, in place, what infinite logits leave without a value.

    An expert's minus infinity alone forbids the token. An antiexpert's alone leaves an infinite
    logit, and NaN stays NaN: from neither can a token be chosen (`engine.sampling.BROKEN`).

    Args:
        shift: expert - antiexpert; NaN where both are minus infinity.
        base, expert, antiexpert, alpha: as in `combine_logits`.
    """
    shift.masked_fill_((expert == -torch.inf) & (antiexpert == -torch.inf), 0)
    # Nothing moves a token that the base forbids, and alpha 0 moves no token.
    shift.masked_fill_(shift.isinf() & ((base == -torch.inf) | (alpha == 0)), 0)


@dataclass(frozen=True)
class SharedEnd:
    """The end token that takes the place of end tokens beyond the shared vocabulary.

    A tuned model may end its text by a token that the base lacks (`<|im_end|>`). Its probability
    of ending is then that of all its end tokens together, and the shift of that goes to the base's
    end token.

    Attributes:
        token: the end token that all members have, the base's.
        of: role -> that model's end tokens beyond the shared vocabulary, and `token` where it
            ends that model's text, too. A role without such tokens is missing.
        vocab_size: of the shared vocabulary.
    """

    token: int
    of: Mapping[str, tuple[int, ...]]
    vocab_size: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"token": self.token, "of": {role: list(ids) for role, ids in self.of.items()}}

    def width(self, role: str) -> int:
        """How many logits of a member are needed: `vocab_size`, or more."""
        return max(self.vocab_size, *(token + 1 for token in self.of.get(role, (0,))))

    def merge(self, role: str, logits: torch.Tensor) -> torch.Tensor:
        """A member's logits over the shared vocabulary, [..., vocab_size].

        Args:
            role: the member's.
            logits: [..., width].
        """
        shared = logits[..., : self.vocab_size]
        if role not in self.of:
            return shared
        ends = torch.stack([logits[..., token] for token in self.of[role]], dim=-1)
        shared = shared.clone()
        shared[..., self.token] = ends.float().logsumexp(-1)
        return shared


class ProxyTunedModel(DraftingSystem):
    """Several models as a system: a base, and small models that steer it.

    Each member may read a prompt of its own (a prompt is a mapping from role to token ids). After
    the prompt, all members read the same tokens: those that the system has written.

    Args:
        groups: the members; one of them has the role "base".
        alphas: name of an alpha in the formula -> its value. Where it is one, rows may have their
            own.
        end: see `SharedEnd`; None where the shared vocabulary has every end token.
        formula: combines the members' logits.
        drafter: the role of the member that drafts; None for none.
        unshifted: the ids of the base that helpers have no token for; None where all members have
            one vocabulary.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        alphas: Mapping[str, float],
        end: SharedEnd | None = None,
        formula: Formula = combine_logits,
        drafter: str | None = "expert",
        unshifted: Unshifted | None = None,
    ) -> None:
        self.groups = list(groups)
        self.members = {role: each for group in groups for role, each in group.members.items()}
        self.alphas = dict(alphas)
        self.end = end
        self.formula = formula
        self.drafter = drafter
        self.unshifted = unshifted
        sizes = [member.vocab_size for member in self.members.values()]
        self.vocab_size = end.vocab_size if end else min(sizes)
        self._own: list[Combination | None] = []  # each row's; None takes the system's
        self._drafted: list[torch.Tensor] = []  # the drafter's logits, [rows, vocab] each
        self._streams: dict[str, torch.cuda.Stream] = {}

    @property
    def joins(self) -> bool:
        """Whether `join` takes a single pass of each member."""
        return all(member.joins for member in self.members.values())

    def prefill(self, prompts: Sequence[Prompt], own: Combinations = None, ahead: int = 0) -> Pass:
        """Reads prompts, each into a new row; see `System.prefill`."""
        new = list(own) if own else [None] * len(prompts)
        self._own += new
        calls: dict[str, Call] = {
            role: partial(member.prefill, [prompt[role] for prompt in prompts])
            for role, member in self.members.items()
        }
        if not ahead or self.drafter is None:
            return self._combine(self._run(calls), new)
        # The drafter reads first, so that the base's request can ask about its guesses, too.
        passes = self._run({self.drafter: calls.pop(self.drafter)})
        shared = partial(self._shared, self.drafter)
        guesses = self.members[self.drafter].guess(passes[self.drafter].logits, ahead, shared)
        base = self.members["base"]
        calls["base"] = partial(base.prefill, [prompt["base"] for prompt in prompts], guesses)
        return self._combine(passes | self._run(calls), new)

    def join(
        self, tokens: torch.Tensor, prompts: Sequence[Prompt], own: Combinations = None
    ) -> Pass:
        """`step` for the present rows, `prefill` for new ones, in one pass; see `System.join`."""
        self._own += list(own) if own else [None] * len(prompts)
        calls: dict[str, Call] = {
            role: partial(member.join, tokens, [prompt[role] for prompt in prompts])
            for role, member in self.members.items()
        }
        return self._combine(self._run(calls), self._own)

    def extend(self, tokens: torch.Tensor) -> Pass:
        """Reads a block of tokens [rows, width]; logits after each, [rows, width, vocab]."""
        return self._combine(self._read(tokens), self._own)

    def draft(self, tokens: torch.Tensor, width: int, pick: Pick) -> torch.Tensor:
        """Lets the drafter alone continue every row; see `DraftingSystem.draft`."""
        assert self.drafter is not None
        self._drafted = []
        block = [tokens]
        for offset in range(width):
            logits = self.members[self.drafter].step(block[-1]).logits
            self._drafted.append(logits)
            if offset < width - 1:
                block.append(pick(self._shared(self.drafter, logits), offset))
        return torch.stack([each.to(block[-1].device) for each in block], dim=1)

    def verify(self, block: torch.Tensor) -> Pass:
        """Reads the block that `draft` returned; the system's logits, [rows, width, vocab].

        The other members read the block in one pass each. The drafter has read it already, while
        it drafted.
        """
        assert self.drafter is not None
        passes = self._read(block, without=self.drafter)
        passes[self.drafter] = Pass(torch.stack(self._drafted, dim=1))
        self._drafted = []
        return self._combine(passes, self._own)

    def rollback(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[r] tokens of each row r."""
        for group in self.groups:
            group.rollback(counts)

    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; rows may be left out or repeated."""
        self._own = [self._own[row] for row in rows]
        for group in self.groups:
            group.keep(rows)

    def clear(self) -> None:
        """Drops every row and frees their memory."""
        self._own = []
        for group in self.groups:
            group.clear()

    def _read(self, tokens: torch.Tensor, without: str | None = None) -> dict[str, Pass]:
        """Lets the members read a block; arguments as for `Group.calls`."""
        calls = {
            role: call
            for group in self.groups
            for role, call in group.calls(tokens, without).items()
        }
        passes = self._run(calls)
        for group in self.groups:
            own = {role: passes.pop(role) for role in group.members if role in passes}
            passes |= group.split(own)
        return passes

    def _run(self, calls: Mapping[str, Call]) -> dict[str, Pass]:
        """Runs the members' passes: on CUDA at the same time, each in a stream of its own.

        Args:
            calls: role -> the member's pass.
        """
        passes: dict[str, Pass] = {}
        for role, call in calls.items():
            stream = self._stream(role)
            if stream is None:
                passes[role] = call()
                continue
            stream.wait_stream(torch.cuda.current_stream(stream.device))
            with torch.cuda.stream(stream):
                passes[role] = call()
        for role in calls:
            stream = self._stream(role)
            if stream is not None:
                here = torch.cuda.current_stream(stream.device)
                here.wait_stream(stream)
                # The allocator must not reuse these logits before `here` has read them.
                passes[role].logits.record_stream(here)
        return passes

    def _stream(self, role: str) -> torch.cuda.Stream | None:
        """The stream of one member; None where it runs on the CPU or behind a server."""
        device = self.members[role].device
        if device.type != "cuda":
            return None
        if role not in self._streams:
            self._streams[role] = torch.cuda.Stream(device)
        return self._streams[role]

    def _combine(self, passes: Mapping[str, Pass], own: Sequence[Combination | None]) -> Pass:
        """Combines the members' passes into the triple's.

        Args:
            passes: role -> pass, all of the same rows.
            own: the combinations of these rows.
        """
        device = passes["base"].logits.device
        cut = {
            role: self._shared(role, each.logits).to(device, non_blocking=True)
            for role, each in passes.items()
        }
        shares = self.unshifted.leave(cut) if self.unshifted else {}
        system = Combination(self.formula, tuple(self.members), self.alphas)
        parts = by_formula(own, system, cut["base"])
        truncation = passes["base"].truncation
        if truncation is not None:  # the bounds of the base's logits bound the system's
            highest = cut | {"base": truncation.ceiling[..., : self.vocab_size]}
            # `ask` gives the base's logits; those of the system follow only where it adds to them.
            # Behind an API all rows have one formula (`loading.formulas.combination_of`).
            ask = truncation.ask if traits_of(parts[0].formula).adds else None
            truncation = replace(truncation, ceiling=combined(highest, parts), ask=ask)
        ends = [each.full.to(device) for each in passes.values() if each.full is not None]
        full = torch.stack(ends).any(0) if ends else None
        return Pass(combined(cut, parts), cut, truncation, shares, full)

    def _shared(self, role: str, logits: torch.Tensor) -> torch.Tensor:
        """A member's logits, cut to the shared vocabulary."""
        if self.end is None:
            return logits[..., : self.vocab_size]
        return self.end.merge(role, logits)
