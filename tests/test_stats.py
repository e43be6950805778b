import numpy as np
import pytest

from proxytune.records import Score
from proxytune.results import stats


def scores(values, metric="acc", parsed=None):
    return [
        Score(example_id=str(i), values={metric: v}, parsed=parsed is None or parsed[i])
        for i, v in enumerate(values)
    ]


def test_a_share_has_wilsons_interval():
    (metric,) = stats.metrics("t", "base", scores([1] * 8 + [0] * 2))
    # Wilson, 8 of 10: centre (0.8 + z^2/20) / (1 + z^2/10), worked out by hand
    z = 1.959964
    centre = (0.8 + z * z / 20) / (1 + z * z / 10)
    half = z * np.sqrt(0.8 * 0.2 / 10 + z * z / 400) / (1 + z * z / 10)
    assert metric.value == 0.8
    assert (metric.ci_low, metric.ci_high) == pytest.approx((centre - half, centre + half), 1e-6)
    assert metric.stderr == pytest.approx(np.std([1] * 8 + [0] * 2, ddof=1) / np.sqrt(10))


def test_none_leaves_the_denominator_and_unparsed_are_counted():
    rows = scores([1, None, 0, None], parsed=[True, False, True, False])
    (metric,) = stats.metrics("t", "base", rows)
    assert (metric.value, metric.n, metric.n_examples, metric.unparsed) == (0.5, 2, 4, 2)


def test_an_empty_denominator_gives_no_metric():
    assert stats.metrics("t", "base", scores([None, None])) == []


def test_one_example_has_no_standard_error():
    (metric,) = stats.metrics("t", "base", scores([1]))
    assert metric.stderr is None
    assert metric.ci_low is not None


def test_other_values_have_the_bootstraps_interval_of_the_mean():
    values = np.random.default_rng(1).beta(2, 3, size=400)
    (metric,) = stats.metrics("t", "base", scores(values.tolist()))
    half = 1.96 * values.std(ddof=1) / np.sqrt(400)
    assert metric.ci_low == pytest.approx(values.mean() - half, abs=0.003)
    assert metric.ci_high == pytest.approx(values.mean() + half, abs=0.003)


def test_the_same_scores_give_the_same_interval():
    values = [0.1, 0.5, 0.9, 0.4] * 20
    assert stats.metrics("t", "a", scores(values)) == stats.metrics("t", "a", scores(values))


def test_wilson_intervals_cover():
    """Of 400 samples of 60 draws with p = 0.3, about 95 % of the intervals hold 0.3."""
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(400):
        low, high = stats.interval((generator.random(60) < 0.3).astype(float))
        hits += low <= 0.3 <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_paired_difference_uses_the_pairing():
    """b differs from a on 12 examples, always downwards: McNemar's p is 2 * 0.5 ** 12."""
    a = [1] * 50 + [0] * 50
    b = [0] * 12 + a[12:]
    found = stats.paired_difference(scores(a), scores(b), "acc")
    assert found.value == pytest.approx(0.12)
    assert found.p_value == pytest.approx(2 * 0.5**12)
    assert 0.05 < found.low < 0.12 < found.high < 0.20


def test_no_difference_has_p_one_and_an_interval_around_zero():
    found = stats.paired_difference(scores([1, 0, 1]), scores([1, 0, 1]), "acc")
    assert found == (0, 0, 0, 1)


def test_permutation_of_graded_values_finds_a_shift_and_only_a_shift():
    generator = np.random.default_rng(3)
    a = generator.normal(0.5, 0.1, 80)
    noise = generator.normal(0, 0.1, 80)
    same = stats.paired_difference(scores(a), scores(a + noise), "acc")
    shifted = stats.paired_difference(scores(a), scores(a + noise + 0.1), "acc")
    assert same.p_value > 0.05
    assert shifted.p_value < 0.001


def test_pairs_go_by_id_not_by_position():
    a, b = scores([1, 0, 0, 1]), scores([1, 0, 0, 1])[::-1]
    assert stats.paired_difference(a, b, "acc").p_value == 1


def test_gap_closed_is_the_papers_formula():
    assert stats.gap_closed(2.1, 83.4, 87.3) == pytest.approx(0.9542, abs=1e-4)
    assert stats.gap_closed(70.4, 0.1, 0.0) == pytest.approx(70.3 / 70.4)
    assert stats.gap_closed(5, 7, 5) is None


def test_the_interval_of_the_gap_closed_holds_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(4)
    held = 0
    for _ in range(40):
        draw = generator.random(300)
        base, proxy, tuned = (draw < p for p in (0.1, 0.4, 0.5))
        gap = stats.gap_closed_interval(
            scores(base.astype(float)),
            scores(proxy.astype(float)),
            scores(tuned.astype(float)),
            "acc",
        )
        assert gap is not None and gap.low is not None and gap.high is not None
        held += gap.low <= 0.75 <= gap.high
    assert held >= 35


def test_a_gap_that_may_be_zero_has_no_interval():
    generator = np.random.default_rng(5)
    base, proxy, tuned = (scores((generator.random(40) < 0.5).astype(float)) for _ in range(3))
    gap = stats.gap_closed_interval(base, proxy, tuned, "acc")
    assert gap is None or gap.low is None
    assert stats.gap_closed_interval(base, proxy, base, "acc") is None


def test_the_average_gap_closed_is_narrower_than_its_parts():
    base, tuned = scores([0.0] * 90 + [1.0] * 10), scores([1.0] * 60 + [0.0] * 40)
    proxy = scores([1.0] * 40 + [0.0] * 60)
    gap = stats.gap_closed_interval(base, proxy, tuned, "acc")
    assert gap is not None and gap.low is not None and gap.high is not None
    average = stats.average_gap_closed([gap, gap, gap, gap])
    assert average is not None and average.low is not None and average.high is not None
    assert average.value == pytest.approx(gap.value)
    assert (average.high - average.low) == pytest.approx((gap.high - gap.low) / 2, rel=0.15)


def test_bootstrap_by_distinct_rows_equals_plain_resampling():
    values = np.random.default_rng(6).integers(0, 2, size=(50, 2)).astype(float)
    fast = stats.bootstrap_means(values)
    generator = np.random.default_rng(7)
    plain = values[generator.integers(0, 50, size=(10_000, 50))].mean(axis=1)
    assert fast.mean(axis=0) == pytest.approx(plain.mean(axis=0), abs=0.003)
    assert np.cov(fast.T) == pytest.approx(np.cov(plain.T), rel=0.06, abs=2e-4)


def test_systems_without_a_common_example_have_no_difference():
    other = [Score("other", {"acc": 1})]
    assert stats.paired_difference(scores([1]), other, "acc") is None
    assert stats.gap_closed_interval(scores([1]), scores([0]), other, "acc") is None


def test_a_single_example_has_no_interval_of_a_difference():
    found = stats.paired_difference(scores([1]), scores([0]), "acc")
    assert found.value == 1 and np.isnan(found.low) and np.isnan(found.high)
    shares = stats.paired_difference(scores([0.3]), scores([0.1]), "acc")
    assert found.p_value == shares.p_value == 1
    gap = stats.gap_closed_interval(scores([0]), scores([1]), scores([1]), "acc")
    assert gap.value == 1 and gap.low is None
