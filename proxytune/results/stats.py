"""Standard errors, 95 % intervals, paired tests and the gap closed.

Every metric is a mean over examples, so these functions need nothing but `Score.values`. Resampling
is seeded: the same scores give the same interval.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from proxytune.records import Metric, Score

SEED = 0
RESAMPLES = 10_000
LEVEL = 0.95
# drawing this many resamples at a time bounds the memory of their counts
_CHUNK = 1_000
_UNSTABLE = (1 - LEVEL) / 2

Values = NDArray[np.float64]


class Difference(NamedTuple):
    """A paired difference of two systems' means (a - b) on the same examples.

    Attributes:
        value: the difference.
        low, high: its 95 % interval (paired bootstrap over examples); not-a-number for a single
            example, which has no spread.
        p_value: for "no difference": McNemar's exact test for 0/1 values, else a permutation test
            that flips signs.
    """

    value: float
    low: float
    high: float
    p_value: float


class GapClosed(NamedTuple):
    """The share of the gap between base and tuned that the proxy closes.

    Attributes:
        value: (proxy - base) / (tuned - base).
        low, high: its 95 % interval; None for a single example, or where the gap itself may be
            zero.
        draws: the bootstrap's values, [resamples]; not-a-number where a resample has no gap.
    """

    value: float
    low: float | None
    high: float | None
    draws: Values


def scaled(value: float, scale: float) -> float:
    """A value times its scale, without the noise of the last bits.

    100 * 0.2875 is 28.749999999999996: a table made at once would print 28.7, and one read from
    table.csv, which has ten digits, 28.8.
    """
    return round(value * scale, 9)


def metrics(task_name: str, system: str, scores: Sequence[Score]) -> list[Metric]:
    """The task's metrics of one system, in the order in which the scores name them.

    The interval is Wilson's for 0/1 values and a bootstrap over examples otherwise (for pass@k,
    over problems). A metric without any value gets no row.

    Args:
        task_name: the rows' task.
        system: the rows' system.
        scores: one per example.
    """
    unparsed = sum(not score.parsed for score in scores)
    names = dict.fromkeys(name for score in scores for name in score.values)
    rows = []
    for name in names:
        column = _column(scores, name)
        values = column[~np.isnan(column)]
        if not len(values):
            continue
        low, high = interval(values)
        deviation = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
        rows.append(
            Metric(
                task=task_name,
                system=system,
                metric=name,
                value=float(values.mean()),
                n=len(values),
                n_examples=len(scores),
                unparsed=unparsed,
                stderr=None if deviation is None else float(deviation),
                ci_low=low,
                ci_high=high,
            )
        )
    return rows


def interval(values: Values) -> tuple[float, float]:
    """The 95 % interval of a mean: Wilson's for 0/1 values, else the bootstrap's percentiles."""
    if _binary(values):
        hits = scipy_stats.binomtest(int(values.sum()), len(values))
        wilson = hits.proportion_ci(LEVEL, method="wilson")
        return float(wilson.low), float(wilson.high)
    return _percentiles(bootstrap_means(values[:, None])[:, 0])


def paired_difference(
    scores_a: Sequence[Score], scores_b: Sequence[Score], metric: str
) -> Difference | None:
    """The mean of system a minus the mean of system b, on the examples that both have.

    One system may lack a value on such an example (None in its scores). The other system's mean
    still counts the example, as in the table; the test takes only examples with both values.

    Returns:
        The difference; None where the systems share no example with this metric (two runs that
        were stopped at different places).
    """
    values = _paired([scores_a, scores_b], metric)
    if values is None:
        return None
    draws = bootstrap_means(values)
    means = np.nanmean(values, axis=0)
    low, high = _percentiles(draws[:, 0] - draws[:, 1]) if len(values) > 1 else (np.nan, np.nan)
    both = values[~np.isnan(values).any(axis=1)]
    return Difference(float(means[0] - means[1]), low, high, _p_value(both[:, 0], both[:, 1]))


def paired_values(
    scores_a: Sequence[Score], scores_b: Sequence[Score], metric: str
) -> Values | None:
    """The values of two systems on the examples that both have, [examples, 2].

    A value that is missing is not-a-number. None where some system has no value on them.
    """
    return _paired([scores_a, scores_b], metric)


def gap_closed(base: float, proxy: float, tuned: float) -> float | None:
    """(proxy - base) / (tuned - base), the paper's measure; None when there is no gap."""
    return None if tuned == base else (proxy - base) / (tuned - base)


def gap_closed_interval(
    base: Sequence[Score], proxy: Sequence[Score], tuned: Sequence[Score], metric: str
) -> GapClosed | None:
    """The gap closed with its paired bootstrap interval.

    A ratio whose denominator may be zero has no useful interval. So there is none where more than
    2.5 % of the resamples have no gap, or a gap of the other sign.

    Returns:
        The gap closed; None where there is no gap, or no common example with this metric.
    """
    values = _paired([base, proxy, tuned], metric)
    if values is None:
        return None
    means = np.nanmean(values, axis=0)
    value = gap_closed(*map(float, means))
    if value is None:
        return None
    draws = bootstrap_means(values)
    gaps = draws[:, 2] - draws[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(gaps == 0, np.nan, (draws[:, 1] - draws[:, 0]) / gaps)
    unstable = (gaps * np.sign(means[2] - means[0]) <= 0).mean() > _UNSTABLE
    if unstable or len(values) == 1:
        return GapClosed(value, None, None, ratios)
    return GapClosed(value, *_percentiles(ratios), ratios)


def no_draws() -> Values:
    """The draws of a gap closed that was computed without scores: all not-a-number."""
    return np.full(RESAMPLES, np.nan)


def average_gap_closed(gaps: Sequence[GapClosed]) -> GapClosed | None:
    """The mean of several tasks' gaps closed; its interval takes tasks as independent."""
    if not gaps:
        return None
    # all tasks' draws come from the same seed; shuffling makes them independent of each other
    generator = np.random.default_rng(SEED)
    draws = np.mean([generator.permutation(gap.draws) for gap in gaps], axis=0)
    value = float(np.mean([gap.value for gap in gaps]))
    if any(gap.low is None for gap in gaps):
        return GapClosed(value, None, None, draws)
    return GapClosed(value, *_percentiles(draws), draws)


def bootstrap_means(values: Values) -> Values:
    """Column means of resampled rows, [resamples, columns].

    Instead of n rows with replacement, this draws how often each distinct row occurs among them,
    which is the same. 0/1 scores have a handful of distinct rows, so ten thousand resamples of ten
    thousand examples cost little.

    Args:
        values: [examples, columns]; a column's mean leaves out examples that are not-a-number.
    """
    distinct, multiplicity = np.unique(values, axis=0, return_counts=True)
    present = ~np.isnan(distinct)
    filled = np.where(present, distinct, 0.0)
    generator = np.random.default_rng(SEED)
    shares = multiplicity / multiplicity.sum()
    means = []
    for _ in range(RESAMPLES // _CHUNK):
        counts = generator.multinomial(len(values), shares, size=_CHUNK).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means.append((counts @ filled) / (counts @ present))
    return np.concatenate(means)


def _column(scores: Sequence[Score], metric: str) -> Values:
    found = (score.values.get(metric) for score in scores)
    return np.array([np.nan if value is None else float(value) for value in found])


def _paired(systems: Sequence[Sequence[Score]], metric: str) -> Values | None:
    """[examples, systems]: the examples that all systems have, in the first system's order.

    None where some system has no value of the metric on them.
    """
    by_id: list[Mapping[str, Score]] = [{s.example_id: s for s in scores} for scores in systems]
    common = [i for i in by_id[0] if all(i in scores for scores in by_id[1:])]
    columns = [_column([scores[i] for i in common], metric) for scores in by_id]
    values = np.stack(columns, axis=1)
    if not len(values) or np.isnan(values).all(axis=0).any():
        return None
    return values


def _p_value(a: Values, b: Values) -> float:
    if len(a) < 2:  # of a single difference, both signs are equally extreme
        return 1.0
    if _binary(a) and _binary(b):
        only_a, only_b = int((a > b).sum()), int((b > a).sum())
        if not only_a + only_b:
            return 1.0
        return float(scipy_stats.binomtest(only_a, only_a + only_b).pvalue)
    if np.array_equal(a, b):
        return 1.0
    test = scipy_stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES - 1,
        batch=_CHUNK,
        rng=np.random.default_rng(SEED),
    )
    return float(test.pvalue)


def _binary(values: Values) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _percentiles(draws: Values) -> tuple[float, float]:
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
