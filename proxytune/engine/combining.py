"""The rows of a batch, each combined by its own formula and alphas."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Combination:
    """How the rows of a request combine their members' logits.

    Attributes:
        formula: takes the logits and the alphas by keyword, and returns the combined logits,
            float32. It is a pure function of one position.
        roles: the members whose logits it takes.
        alphas: its alphas by their names.
    """

    formula: Callable[..., torch.Tensor]
    roles: tuple[str, ...]
    alphas: Mapping[str, float]


Combinations = Sequence[Combination | None] | None  # per row; None is the system's own


class Part(NamedTuple):
    """Rows of one pass that have one formula.

    Attributes:
        formula: combines their logits.
        roles: see `Combination`.
        alphas: of the formula by their names: a number, or one for each row, [rows, 1, ...].
        rows: their numbers; None for all rows of the pass.
    """

    formula: Callable[..., torch.Tensor]
    roles: tuple[str, ...]
    alphas: Mapping[str, float | torch.Tensor]
    rows: torch.Tensor | None = None


def by_formula(
    own: Sequence[Combination | None], system: Combination, like: torch.Tensor
) -> list[Part]:
    """The rows of a pass by their formulas.

    Args:
        own: one combination per row; None takes the system's.
        system: the system's.
        like: logits, for their device and number of dimensions.
    """
    if all(each is None for each in own):
        return [Part(system.formula, system.roles, system.alphas)]
    rows_of: dict[Callable[..., torch.Tensor], list[int]] = {}
    given = [each or system for each in own]
    for row, each in enumerate(given):
        rows_of.setdefault(each.formula, []).append(row)
    shape = [-1] + [1] * (like.dim() - 1)
    parts = []
    for formula, rows in rows_of.items():
        first = given[rows[0]]
        alphas = {
            name: torch.tensor([given[row].alphas[name] for row in rows], device=like.device)
            for name in first.alphas
        }
        views = {name: each.view(shape) for name, each in alphas.items()}
        index = torch.tensor(rows, device=like.device) if len(rows_of) > 1 else None
        parts.append(Part(formula, first.roles, views, index))
    return parts


def combined(logits: Mapping[str, torch.Tensor], parts: Sequence[Part]) -> torch.Tensor:
    """The combined logits of all rows of a pass, [rows, ..., vocab], float32.

    Args:
        logits: role -> that member's, [rows, ..., vocab].
        parts: every row is in one of them (`by_formula`).
    """
    if parts[0].rows is None:
        (part,) = parts
        return part.formula(**{role: logits[role] for role in part.roles}, **part.alphas)
    out = torch.empty_like(logits["base"], dtype=torch.float32)
    for part in parts:
        own = {role: logits[role][part.rows] for role in part.roles}
        out[part.rows] = part.formula(**own, **part.alphas)
    return out
