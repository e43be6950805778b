"""What servers list in place of log-probabilities, as edits of a real server's answers.

Public reports: SGLang #5761 (one-hot after greedy sampling), vLLM's processed_logprobs and
raw_logits, mistral.rs #2329 (positive values), llama.cpp #7197 (another logarithm).
"""

import math
from collections.abc import Callable
from typing import Any

Values = dict[str, float]
Change = Callable[[Values], dict[str, Any]]  # one position's list -> what is listed instead


def in_order(values: Values) -> list[str]:
    """The names, the likeliest first."""
    return sorted(values, key=lambda name: -values[name])


def one_hot(floor: float) -> Change:
    """Greedy sampling's distribution."""
    return lambda values: dict.fromkeys(values, floor) | {in_order(values)[0]: 0.0}


def scaled(factor: float) -> Change:
    """Another logarithm, or a temperature without normalisation."""
    return lambda values: {name: factor * value for name, value in values.items()}


def moved(constant: float) -> Change:
    """Logits are log-probabilities plus a constant."""
    return lambda values: {name: value + constant for name, value in values.items()}


def probabilities(values: Values) -> Values:
    """softmax in place of log_softmax."""
    return {name: math.exp(value) for name, value in values.items()}


def normalised(values: Values) -> Values:
    """softmax over the listed tokens."""
    total = math.log(sum(map(math.exp, values.values())))
    return {name: value - total for name, value in values.items()}


def nucleus(share: float, floor: float | None) -> Change:
    """Top-p, normalised; the tokens outside get a floor, or are left out."""

    def change(values: Values) -> Values:
        kept, mass = {}, 0.0
        for name in in_order(values):
            if mass < share:
                kept[name] = values[name]
                mass += math.exp(values[name])
        rest = {} if floor is None else dict.fromkeys(values, floor)
        return rest | normalised(kept)

    return change


def rounded(decimals: int) -> Change:
    """Values with so many decimals."""
    return lambda values: {name: round(value, decimals) for name, value in values.items()}


def strings(text: str) -> Change:
    """A text in place of the second number."""
    return lambda values: values | {in_order(values)[1]: text}


def filled(constant: float) -> Change:
    """A constant after the third token."""
    return lambda values: values | dict.fromkeys(in_order(values)[3:], constant)


def edit(
    change: Change, prompts: bool = True, writes: bool = True, when: Callable[[Any], bool] = bool
) -> Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]:
    """The edit of an answer that changes its lists.

    Args:
        change: of one list.
        prompts: whether the lists of a rated prompt's tokens change.
        writes: whether those of generated tokens do.
        when: tells by a request's body whether its answer is changed.
    """

    def edited(body: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        for choice in answer["choices"] if when(body) else []:
            logprobs = choice.get("logprobs") or {}
            lists = logprobs.get("top_logprobs") or []
            for place, listed in enumerate(lists):
                if listed and (writes if place == len(lists) - 1 else prompts):
                    lists[place] = change(listed)
            for listed in choice.get("prompt_logprobs") or []:
                if listed and prompts:
                    new = change({name: each["logprob"] for name, each in listed.items()})
                    for name in [*listed]:
                        if name in new:
                            listed[name]["logprob"] = new[name]
        return answer

    return edited
