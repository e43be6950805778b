"""Whether a triple helps on a task, from scores on the same examples: one word, and its reason.

Two systems differ where the paired test of `stats.paired_difference` says so at the 5 % level. With
too few examples for that, the number that would do is estimated from the differences so far: that
with which a difference of this size is found four times in five.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as scipy_stats

from proxytune.records import MetricInfo, Score
from proxytune.results.stats import Difference, Values, paired_difference, paired_values

LEVEL = 0.05
POWER = 0.8
FEWEST = 6  # differing examples that McNemar's exact test needs, even if all go one way
SMALLEST = 0.05  # a difference worth finding, where none was seen

HELPS, HURTS, OPEN = "helps", "hurts", "cannot tell"


@dataclass(frozen=True)
class Compared:
    """One system compared with another on the same examples.

    Attributes:
        ours, theirs: the means of a metric.
        difference: ours minus theirs, with interval and p-value.
        n: the examples that both have.
        better: whether a higher mean is better, and ours is; or lower.
        word: "helps", "hurts" or "cannot tell".
        needed: examples that would tell; None where these do.
        expected: the difference that `needed` examples would tell.
    """

    ours: float
    theirs: float
    difference: Difference
    n: int
    better: bool
    word: str
    needed: int | None = None
    expected: float = 0.0


def compare(
    ours: Sequence[Score], theirs: Sequence[Score], metric: str, info: MetricInfo, tests: int = 1
) -> Compared | None:
    """Compares two systems on one metric.

    Args:
        ours, theirs: their scores.
        metric: its name in the scores.
        info: how it is shown, and which way is better.
        tests: of how many such comparisons this is one; the level is divided by it (Bonferroni).

    Returns:
        The comparison; None where the systems share no example with this metric.
    """
    difference = paired_difference(ours, theirs, metric)
    values = paired_values(ours, theirs, metric)
    if difference is None or values is None:
        return None
    means = np.nanmean(values, axis=0)
    better = difference.value != 0 and (difference.value > 0) == info.higher_is_better
    told = difference.p_value * tests < LEVEL and difference.value != 0
    word = (HELPS if better else HURTS) if told else OPEN
    both = values[~np.isnan(values).any(axis=1)]
    needed, expected = (None, 0.0) if told else _needed(both[:, 0] - both[:, 1])
    return Compared(
        float(means[0]), float(means[1]), difference, len(both), better, word, needed, expected
    )


def _needed(differences: Values) -> tuple[int, float]:
    """How many examples would tell, and which difference of the means.

    That none of n examples differs does not say that none ever will: one of n + 1 is assumed to.

    Args:
        differences: of the examples so far, [examples].
    """
    n = len(differences)
    mean = abs(float(differences.mean())) if n else 0.0
    expected = mean or SMALLEST
    share = max(float((differences != 0).mean()) if n else 0.0, 1 / (n + 1), expected * (not mean))
    square = max(float((differences**2).mean()) if n else 0.0, share * (not mean))
    tails = scipy_stats.norm.isf(LEVEL / 2) + scipy_stats.norm.ppf(POWER)
    enough = max(tails**2 * (square - mean**2) / expected**2, FEWEST / share)
    return max(math.ceil(enough), n + 1), expected


def sentence(
    found: Compared,
    *,
    task: str,
    info: MetricInfo,
    alpha: float | None,
    available: int | None = None,
    also: Sequence[str] = (),
) -> str:
    """The verdict in one sentence.

    Args:
        found: the triple compared with its base.
        task: the task's name.
        info: how the metric is shown.
        alpha: of the triple; None where its formula has none.
        available: how many examples the task has; None where that is not known.
        also: further remarks, each after a semicolon.
    """
    scale = 100 if info.percent else 1
    ours, theirs = found.ours * scale, found.theirs * scale
    difference = found.difference
    change = f"{difference.value * scale:+.1f}"
    if not math.isnan(difference.low):
        change += f", 95 % interval {difference.low * scale:+.1f} to {difference.high * scale:+.1f}"
    where = "" if alpha is None else f"at alpha={alpha:g} "
    verb = "rises" if difference.value > 0 else "falls"
    moved = f"{verb} from {theirs:.1f} to {ours:.1f}"
    if difference.value == 0:
        moved, change = f"stays at {theirs:.1f}", "no difference"
    what = f"{where}{info.label} of {task} {moved} ({change})"
    examples = f"{found.n} example{'' if found.n == 1 else 's'}"
    if found.needed is None:
        text = f"{found.word}: {what} on {examples}"
    else:
        size = f"{found.expected * scale:.1f}{' points' if info.percent else ''}"
        text = f"{found.word} with {examples}: {what}; about {found.needed:,} examples would tell "
        text += f"a difference of {size}"
        if available is not None:
            text += f" (the task has {available:,})"
    return "; ".join([text, *also]) + "."


def best(found: Mapping[float, Compared]) -> float | None:
    """The alpha whose system is better than the base by the most; None where none is told to be.

    Args:
        found: alpha -> the system compared with the base, each as one of all these tests.
    """
    told = {alpha: each for alpha, each in found.items() if each.word == HELPS}
    return max(told, key=lambda alpha: abs(told[alpha].difference.value), default=None)
