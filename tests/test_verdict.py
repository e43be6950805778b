"""Verdicts of `proxytune check` from scores alone. There was none at 538a493: these fail there."""

import re

import numpy as np
import pytest

from proxytune.records import MetricInfo, Score
from proxytune.results.verdict import HELPS, HURTS, OPEN, best, compare, sentence

ACC = MetricInfo("accuracy")
TOXIC = MetricInfo("toxic", higher_is_better=False)


def scores(values) -> list[Score]:
    return [Score(str(i), {"m": None if v is None else float(v)}) for i, v in enumerate(values)]


def said(ours, theirs, info=ACC, **more) -> str:
    found = compare(scores(ours), scores(theirs), "m", info)
    assert found is not None
    return sentence(found, task="t", info=info, alpha=1.0, **more)


@pytest.mark.parametrize(
    ("ours", "theirs", "info", "word"),
    [
        ([1] * 10, [0] * 10, ACC, HELPS),
        ([0] * 10, [1] * 10, ACC, HURTS),
        ([0] * 10, [1] * 10, TOXIC, HELPS),
        ([1] * 10, [0] * 10, TOXIC, HURTS),
        ([1, 1, 1, 1, 1], [0] * 5, ACC, OPEN),  # McNemar: p = 1/16
        ([1, 1, 1, 1, 1, 1], [0] * 6, ACC, HELPS),  # p = 1/32
        ([1, 0] * 10, [1, 0] * 10, ACC, OPEN),
        ([1], [0], ACC, OPEN),
        (np.linspace(0.5, 0.6, 40), np.linspace(0.4, 0.5, 40), ACC, HELPS),  # no 0/1 values
    ],
)
def test_a_word_needs_a_paired_difference(ours, theirs, info, word):
    found = compare(scores(ours), scores(theirs), "m", info)
    assert found is not None and found.word == word
    assert (found.needed is None) == (word != OPEN)


@pytest.mark.slow
def test_the_number_that_would_tell_tells():
    """With as many examples as named, drawn from the same rates, four tests in five do tell."""
    generator = np.random.default_rng(0)
    wins, losses = 0.2, 0.1

    def draw(n: int) -> tuple[list[int], list[int]]:
        kinds = generator.choice(3, size=n, p=[wins, losses, 1 - wins - losses])
        return [int(k == 0) for k in kinds], [int(k == 1) for k in kinds]

    exactly = [1] * 8 + [0] * 4 + [0] * 28, [0] * 8 + [1] * 4 + [0] * 28  # those rates, n = 40
    found = compare(scores(exactly[0]), scores(exactly[1]), "m", ACC)
    assert found is not None and found.word == OPEN and found.needed is not None
    assert found.needed == pytest.approx(228, abs=2)  # (1.96 + 0.84)^2 (0.3 - 0.01) / 0.01
    told = 0
    for _ in range(100):
        again = compare(*map(scores, draw(found.needed)), "m", ACC)
        told += again is not None and again.word == HELPS
    assert 70 <= told <= 90


@pytest.mark.parametrize("n", [1, 2, 5, 20, 300])
def test_no_difference_at_all_still_names_a_number(n):
    found = compare(scores([0] * n), scores([0] * n), "m", ACC)
    assert found is not None and found.needed is not None and found.needed > n
    assert found.expected == 0.05


def test_examples_that_one_system_lacks_do_not_count():
    found = compare(scores([1] * 8 + [None] * 4), scores([0] * 12), "m", ACC)
    assert found is not None and (found.n, found.word) == (8, HELPS)
    assert compare(scores([None]), scores([1]), "m", ACC) is None


def test_one_of_many_tests_needs_more():
    ours, theirs = scores([1] * 6 + [0] * 6), scores([0] * 12)
    one, many = (compare(ours, theirs, "m", ACC, tests) for tests in (1, 5))
    assert one is not None and many is not None
    assert (one.word, many.word) == (HELPS, OPEN)
    assert best({0.5: one, 1.0: many}) == 0.5 and best({1.0: many}) is None


def test_sentences():
    assert said([1] * 10, [0] * 10) == (
        "helps: at alpha=1 accuracy of t rises from 0.0 to 100.0 (+100.0, 95 % interval +100.0 to "
        "+100.0) on 10 examples."
    )
    assert said([0] * 10, [1] * 10, also=["x"]).endswith("on 10 examples; x.")
    assert said([1] * 10, [0] * 10, TOXIC).startswith("hurts: at alpha=1 toxic of t rises")
    text = said([1, 0, 0, 0], [0, 0, 0, 0], available=120)
    assert text.startswith("cannot tell with 4 examples: at alpha=1 accuracy of t rises from 0.0")
    assert re.search(r"; about 2\d examples would tell a difference of 25.0 points", text)
    assert text.endswith("(the task has 120).")
    assert "stays at 0.0 (no difference)" in said([0], [0])


def test_a_metric_of_its_own_unit_is_not_percent():
    text = said([3.0] * 9, [1.0] * 9, MetricInfo("length", percent=False))
    assert "from 1.0 to 3.0 (+2.0" in text
