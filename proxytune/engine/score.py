"""Log-likelihoods and logits of given tokens, from any system."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from proxytune.engine.broken import blame
from proxytune.engine.combining import Combination
from proxytune.engine.logprobs import TokenLogprob, token_logprobs
from proxytune.engine.memory import out_of_memory
from proxytune.engine.rows import longest
from proxytune.engine.system import Pass, Prompt, System
from proxytune.errors import UserError

BLOCK_ENTRIES = 1 << 26  # logits of one block at most: rows * positions * vocabulary


@torch.inference_mode()
def sequence_logits(system: System, prompt: Prompt) -> torch.Tensor:
    """The next-token logits after every token, [tokens, vocab], float32.

    Args:
        system: an idle system.
        prompt: role -> token ids; members may differ in the first token alone.

    Raises:
        UserError: the members' prompts differ in length, or after the first token.
    """
    if len({len(ids) for ids in prompt.values()}) > 1:
        raise UserError("logits need prompts of one length for every member")
    if not same_tokens(prompt):
        raise UserError("logits need the same tokens after the first for every member")
    rest = list(prompt["base"][1:])
    try:
        logits = [system.prefill([first_tokens(prompt)]).logits]
        if rest:
            logits.append(system.extend(torch.tensor([rest])).logits[0])
        return torch.cat(logits).float()
    finally:
        system.clear()


@torch.inference_mode()
def loglikelihoods(
    system: System,
    prompts: Sequence[Prompt],
    continuations: Sequence[Sequence[int]],
    max_rows: Callable[[int], int],
) -> list[tuple[float, bool]]:
    """The log-probability of each prompt's continuation.

    Args:
        system: an idle system.
        prompts: role -> token ids.
        continuations: token ids, at least one each.
        max_rows: how many rows may run at once, given the length in tokens of the longest.

    Returns:
        For each prompt: the sum of the continuation's log-probabilities, and whether greedy
        decoding would write it.

    Raises:
        UserError: a member gave logits that are no probabilities.
    """
    lengths = [longest(p) + len(c) for p, c in zip(prompts, continuations, strict=True)]
    # Longest first; similar lengths share a batch, and equal prompts are neighbours.
    order = sorted(range(len(prompts)), key=lambda i: (lengths[i] // 16, repr(prompts[i])))[::-1]
    results: list[tuple[float, bool]] = [(0.0, True)] * len(prompts)
    cap = len(prompts)
    try:
        while order:
            rows = min(cap, max_rows(max(lengths[i] for i in order)))
            batch = order[:rows]
            try:
                scored = _score(
                    system, [prompts[i] for i in batch], [continuations[i] for i in batch]
                )
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or len(batch) == 1:
                    raise
                cap = len(batch) // 2
                system.clear()
                continue
            for index, result in zip(batch, scored, strict=True):
                results[index] = result
            system.keep([])
            order = order[rows:]
    finally:
        system.clear()
    return results


def _score(
    system: System, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]
) -> list[tuple[float, bool]]:
    """Scores one batch: reads every different prompt once, then the continuations in blocks."""
    width = max(len(continuation) for continuation in continuations)
    targets = torch.zeros(len(prompts), width, dtype=torch.long)
    real = torch.zeros(len(prompts), width, dtype=torch.bool)
    for i, continuation in enumerate(continuations):
        targets[i, : len(continuation)] = torch.tensor(list(continuation))
        real[i, : len(continuation)] = True
    different: dict[str, int] = {}
    rows = [different.setdefault(repr(prompt), len(different)) for prompt in prompts]
    firsts = [prompts[rows.index(row)] for row in range(len(different))]
    seen = system.prefill(firsts)
    system.keep(rows)
    rating = _rate(seen.logits[torch.tensor(rows)].unsqueeze(1), targets[:, :1], real[:, :1])
    sums, greedy = _usable(rating, lambda row, _: seen[rows[row]])
    block = max(16, BLOCK_ENTRIES // (len(rows) * system.vocab_size))
    for start in range(0, width - 1, block):
        stop = min(start + block, width - 1)
        block_seen = system.extend(targets[:, start:stop])
        here = slice(start + 1, stop + 1)
        rating = _rate(block_seen.logits, targets[:, here], real[:, here])
        more, still = _usable(rating, lambda row, place, seen=block_seen: seen[row][place])
        sums, greedy = sums + more, greedy & still
    return list(zip(sums.tolist(), greedy.tolist(), strict=True))


class _Rating(NamedTuple):
    """The rating of a block of tokens.

    Attributes:
        sums: of each row's log-probabilities, [rows].
        greedy: whether all tokens of a row are the likeliest ones, [rows].
        usable: whether the highest logit is finite, [rows, width].
    """

    sums: torch.Tensor
    greedy: torch.Tensor
    usable: torch.Tensor


def _usable(
    rating: _Rating, place_of: Callable[[int, int], Pass]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums and greedy flags of a rating.

    Args:
        rating: see `_rate`.
        place_of: row, place in the block -> the pass there, for the error.

    Raises:
        UserError: the logits at a place are no probabilities.
    """
    if not bool(rating.usable.all()):
        row, place = (~rating.usable).nonzero()[0].tolist()
        raise blame(place_of(row, place))
    return rating.sums, rating.greedy


def _rate(logits: torch.Tensor, targets: torch.Tensor, real: torch.Tensor) -> _Rating:
    """Rates a block of tokens.

    Args:
        logits: [rows, width, vocab].
        targets: token ids, [rows, width].
        real: False for padding, [rows, width].
    """
    targets, real = targets.to(logits.device), real.to(logits.device)
    picked = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1).float()
    log_probs = picked - logits.float().logsumexp(-1)
    best = logits.argmax(-1)  # of NaN, if there is one
    usable = logits.gather(-1, best.unsqueeze(-1)).squeeze(-1).isfinite() | ~real
    greedy = ((best == targets) | ~real).all(-1)
    return _Rating(log_probs.masked_fill(~real, 0).sum(-1), greedy, usable)


@torch.inference_mode()
def prompt_logprobs(
    system: System,
    prompts: Sequence[Prompt],
    own: Sequence[Combination | None],
    tops: Sequence[int],
) -> list[list[TokenLogprob | None]]:
    """Rates the tokens of several prompts, all read together.

    Args:
        system: an idle system.
        prompts: role -> token ids; members may differ in the first token alone.
        own: each prompt's own formula and alphas; None takes the system's.
        tops: for each prompt, how many of the likeliest tokens to list at every position.

    Returns:
        For each prompt one entry per token of the base; None for the first, which follows nothing.

    Raises:
        UserError: a member gave logits that are no probabilities.
    """
    rests = [list(prompt["base"][1:]) for prompt in prompts]
    rated: list[list[TokenLogprob | None]] = [[None] for _ in prompts]

    def rate(seen: Pass, at: int) -> None:
        for index, rest in enumerate(rests):
            here = rest[at : at + seen.logits.shape[1]]
            if here:
                tokens = token_logprobs(seen.logits[index, : len(here)], here, tops[index])
                for place, token in enumerate(tokens):
                    if math.isnan(token.logprob):
                        raise blame(seen[index][place])
                rated[index] += tokens

    width = max(map(len, rests))
    block = max(16, BLOCK_ENTRIES // (len(prompts) * system.vocab_size))
    try:
        rate(system.prefill(list(map(first_tokens, prompts)), own).unflat(), 0)
        for start in range(0, width - 1, block):
            stop = min(start + block, width - 1)
            read = [rest[start:stop] for rest in rests]
            padded = [[*ids, *[0] * (stop - start - len(ids))] for ids in read]
            rate(system.extend(torch.tensor(padded)), start + 1)
        return rated
    finally:
        system.clear()


def same_tokens(prompt: Prompt) -> bool:
    """Whether all members read the same tokens after the first (which may be their own BOS)."""
    return len({tuple(ids[1:]) for ids in prompt.values()}) == 1


def first_tokens(prompt: Prompt) -> Prompt:
    """The first token of each member's prompt."""
    return {role: ids[:1] for role, ids in prompt.items()}
