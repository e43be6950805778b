"""The choice of tokens from the logits of a pass: `choose_from`. Nothing else chooses one to keep.

Where a server lists only the likeliest tokens, and those that it does not list could change a
choice, it is asked for them, if it answers that (`Truncation.ask`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from proxytune.engine.broken import blame
from proxytune.engine.penalties import History
from proxytune.engine.rows import FULL, Row, traces_of
from proxytune.engine.sampling import BROKEN, Sampler
from proxytune.engine.system import Pass
from proxytune.engine.truncation import MAX_ASKED


@dataclass(slots=True)
class Chosen:
    """The tokens chosen at the places of a flat pass.

    Attributes:
        seen: the pass, [rows * width, vocab]: `width` places for each row.
        width: places per row.
        tokens: the choice at each place.
        certain: whether unlisted tokens could not change it; empty where every logit is known.
        unseen: the probability of the unlisted tokens; empty where every logit is known.
        unshifted: see `Pass`, as lists.
        alone: role -> what that member's own logits choose at each place, for rows that compare.
    """

    seen: Pass
    width: int
    tokens: list[int]
    certain: list[bool]
    unseen: list[float]
    unshifted: Mapping[str, list[float]]
    alone: Mapping[str, list[int]] = field(default_factory=dict)
    _traced: dict[int, list[dict[str, Any]]] = field(default_factory=dict, init=False)

    def _traces(self, top: int) -> list[dict[str, Any]]:
        """The trace's entries of all places, which are computed together; see `traces_of`."""
        if top not in self._traced:
            self._traced[top] = traces_of(self.seen, self.tokens, top)
        return self._traced[top]

    def of(self, index: int) -> list[int]:
        """The tokens chosen for the row with this index, [width]."""
        return self.tokens[index * self.width : (index + 1) * self.width]

    def give(self, index: int, row: Row, count: int = 1) -> int:
        """Writes the first `count` tokens chosen for a row, or fewer.

        It writes fewer where the row ends, or its thought does: what follows is chosen otherwise.

        Args:
            index: the row's index among those of `choose_from`.
            row: the row.
            count: at most `width`; all but the last one had been drafted.

        Returns:
            How many were written.
        """
        first, given, phase = index * self.width, 0, row.text.phase
        for place in range(first, first + count):
            if row.agreed is not None and self.tokens[place] >= 0:
                row.compare(self.tokens[place], {r: own[place] for r, own in self.alone.items()})
            row.take(
                self.tokens[place],
                self.seen,
                place,
                certain=self.certain[place] if self.certain else True,
                unseen=self.unseen[place] if self.unseen else 0.0,
                unshifted={role: shares[place] for role, shares in self.unshifted.items()},
                drafted=place < first + count - 1,
                entry=self._traces(row.request.record)[place] if row.request.record else None,
            )
            given += 1
            # What was chosen after it was chosen by the rules of another phase of a thought.
            if row.reason is not None or row.imposed or row.text.phase != phase:
                break
        return given


class _Group(NamedTuple):
    """The places of a pass whose rows share a sampler, with the arguments of `Sampler.choose`."""

    sampler: Sampler
    places: list[int]
    streams: list[int]
    positions: list[int]
    histories: list[History]


def choose_from(
    seen: Pass, rows: Sequence[Row], width: int = 1, guesses: Sequence[Sequence[int]] = ()
) -> Chosen:
    """Chooses a token at every place of a pass. Rows are written from these choices alone.

    Args:
        seen: a flat pass, [rows * width, vocab]: the first row's places, then the next row's.
        rows: the rows that were read.
        width: places per row. Place i of a row chooses its token number len(row.tokens) + i.
        guesses: the drafted tokens of each row, width - 1 each; none for a width of 1.

    Raises:
        UserError: a member gave logits from which no token can be chosen.
    """
    owners = [row for row in rows for _ in range(width)]
    offsets = list(range(width)) * len(rows)
    drafted = [each for each in guesses or [()] * len(rows) for _ in range(width)]
    groups = _by_sampler(owners, offsets, drafted)
    chosen = _settled(_choose(seen, width, groups), owners, offsets)
    if any(row.agreed is not None for row in rows):
        alone = {role: _pick(logits, groups).tolist() for role, logits in seen.members.items()}
        chosen = replace(chosen, alone=alone)
    if seen.truncation is None or seen.truncation.ask is None:
        return chosen
    asked: set[int] = set()
    while places := _undecided(chosen, rows, guesses, asked):
        asked.update(places)
        theirs = [owners[place] for place in places]
        offset = [offsets[place] for place in places]
        guess = [drafted[place] for place in places]
        before = [
            [*row.request.context, *row.tokens, *guess[i][: offset[i]]]
            for i, row in enumerate(theirs)
        ]
        known = _ask(chosen, places, _by_sampler(theirs, offset, guess), before)
        if known is not None:
            again = _settled(_choose(known, width, groups), owners, offsets)
            chosen = replace(again, alone=chosen.alone)
    return chosen


def _choose(seen: Pass, width: int, groups: Sequence[_Group]) -> Chosen:
    """`choose_from`, without asking for more."""
    tokens = _pick(seen.logits, groups)
    if seen.truncation is not None:
        tokens = tokens.masked_fill(seen.truncation.full.to(tokens.device), FULL)
    if seen.full is not None:
        tokens = tokens.masked_fill(seen.full.to(tokens.device), FULL)
    chosen = tokens.tolist()
    if BROKEN in chosen:
        raise blame(seen[chosen.index(BROKEN)])
    certain, unseen = [], []
    if seen.truncation is not None:
        certain = _certain(tokens, seen.logits, seen.truncation.ceiling, groups)
        unseen = seen.truncation.unseen.tolist()
    unshifted = {role: share.tolist() for role, share in seen.unshifted.items()}
    return Chosen(seen, width, chosen, certain, unseen, unshifted)


def _settled(chosen: Chosen, owners: Sequence[Row], offsets: Sequence[int]) -> Chosen:
    """The choices, with what thoughts impose in their place; see `Row.settle`.

    Args:
        chosen: the choices, changed in place.
        owners: the row of each place.
        offsets: which of its row's next tokens each place chooses.
    """
    for place, (row, offset) in enumerate(zip(owners, offsets, strict=True)):
        if row.request.thought is None:
            continue
        token = row.settle(chosen.tokens[place], offset)
        if token != chosen.tokens[place] and chosen.certain:
            chosen.certain[place] = True
        chosen.tokens[place] = token
    return chosen


def _undecided(
    chosen: Chosen,
    rows: Sequence[Row],
    guesses: Sequence[Sequence[int]],
    asked: Collection[int],
) -> list[int]:
    """The first place of each row whose choice is kept, is not certain, and was not asked for."""
    found = []
    for index, row in enumerate(rows):
        guess = guesses[index] if guesses else ()
        for offset, token in enumerate(chosen.of(index)):
            place = index * chosen.width + offset
            if token == FULL:
                break
            if not chosen.certain[place] and place not in asked:
                found.append(place)
                break
            if token in row.request.eos_ids or offset >= len(guess) or token != guess[offset]:
                break  # the row ends, or what was drafted after it is dropped
    return found


def _ask(
    chosen: Chosen,
    places: Sequence[int],
    groups: Sequence[_Group],
    before: Sequence[Sequence[int]],
) -> Pass | None:
    """The pass with the logits of unlisted tokens that could change a choice.

    Args:
        chosen: the choices.
        places: those to ask for.
        groups: `places` by their samplers; they are numbered from 0 there.
        before: the base's tokens before each of `places`.

    Returns:
        None where there is nothing to ask for.
    """
    seen, truncation = chosen.seen, chosen.seen.truncation
    assert truncation is not None and truncation.ask is not None
    logits, ceiling = seen.logits.clone(), truncation.ceiling.clone()
    tokens = torch.tensor(chosen.tokens, device=logits.device)
    rivals: list[tuple[int, torch.Tensor]] = []  # number in `places`, token ids
    for group in groups:
        where = torch.tensor([places[number] for number in group.places], device=logits.device)
        scores = group.sampler.rivals(tokens[where], logits[where], ceiling[where], *group[2:])
        best = scores.topk(min(MAX_ASKED, scores.shape[-1]))
        for number, values, ids in zip(group.places, best.values, best.indices, strict=True):
            if values[0] > -torch.inf:
                rivals.append((number, ids[values > -torch.inf]))
    if not rivals:
        return None
    gaps = truncation.ask([(before[number], ids.tolist()) for number, ids in rivals])
    for (number, ids), gap in zip(rivals, gaps, strict=True):
        place = places[number]
        exact = ceiling[place, ids] - torch.tensor(gap).to(ceiling)
        said = ~exact.isnan()
        logits[place, ids[said]] = exact[said].to(logits)
        ceiling[place, ids[said]] = exact[said]
    return replace(seen, logits=logits, truncation=replace(truncation, ceiling=ceiling))


def pick_tokens(
    logits: torch.Tensor,
    rows: Sequence[Row],
    offsets: Sequence[int],
    guesses: Sequence[Sequence[int]],
) -> torch.Tensor:
    """Picks a token at every place by its row's sampler, [places]; writes nothing.

    Args:
        logits: [places, vocab].
        rows: the row of each place.
        offsets: which token of its row each place picks: 0 for the next one, 1 for the one after.
        guesses: tokens drafted after those of each place's row; as many as its offset come before
            the place. Only a sampler that looks back reads them.
    """
    return _pick(logits, _by_sampler(rows, offsets, guesses))


def _pick(logits: torch.Tensor, groups: Sequence[_Group]) -> torch.Tensor:
    """`pick_tokens` for places that are grouped."""
    if len(groups) == 1:
        (group,) = groups
        return group.sampler.choose(logits, group.streams, group.positions, group.histories)
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for group in groups:
        where = torch.tensor(group.places, device=logits.device)
        tokens[where] = group.sampler.choose(
            logits[where], group.streams, group.positions, group.histories
        )
    return tokens


def _certain(
    tokens: torch.Tensor, logits: torch.Tensor, ceiling: torch.Tensor, groups: Sequence[_Group]
) -> list[bool]:
    """Whether `_pick` would choose each token whatever the unlisted logits are.

    Args:
        tokens: the choices, [places].
        logits: what they were chosen from, [places, vocab].
        ceiling: `Truncation.ceiling`, [places, vocab].
        groups: the places.
    """
    certain = [True] * len(tokens)
    for group in groups:
        where = torch.tensor(group.places, device=logits.device)
        sure = group.sampler.certain(
            tokens[where],
            logits[where],
            ceiling[where],
            group.streams,
            group.positions,
            group.histories,
        )
        for place, each in zip(group.places, sure.tolist(), strict=True):
            certain[place] = each
    return certain


def _by_sampler(
    rows: Sequence[Row], offsets: Sequence[int], guesses: Sequence[Sequence[int]]
) -> list[_Group]:
    """Groups places by the sampler of their rows; arguments as for `pick_tokens`."""
    groups: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(id(row.sampler), []).append(place)

    def history(place: int) -> History:
        row = rows[place]
        return History(row.request.seen, [*row.tokens, *guesses[place][: offsets[place]]])

    grouped = []
    for places in groups.values():
        sampler = rows[places[0]].sampler
        streams = [rows[i].stream for i in places]
        positions = [len(rows[i].tokens) + offsets[i] for i in places]
        histories = [history(i) for i in places] if sampler.looks_back else []
        grouped.append(_Group(sampler, places, streams, positions, histories))
    return grouped
