"""Paired tests and intervals against enumeration, known values and the properties that they are used for."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.stats.bootstrap import bootstrap_interval
from thresher.stats.paired import detectable, excess_tests, holm, interval, paired_test


def changes(lost: int, gained: int, same: int, unit: float = 1.0) -> np.ndarray:
    return unit * np.array([1] * lost + [-1] * gained + [0] * same, float)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (7, 2), (2, 7), (30, 12), (5, 5)])
def test_the_paired_test_is_mcnemars_exact_one(lost, gained):
    n = lost + gained
    tail = sum(comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n
    assert paired_test(changes(lost, gained, 9)) == pytest.approx(min(1, 2 * tail))


def test_the_score_interval_solves_its_equation_and_is_symmetric():
    """Tango (1998), equation 3: the ends are the drops whose score statistic is z."""
    for lost, gained, same in [(9, 2, 89), (50, 1, 9), (1, 0, 4), (7, 7, 86), (0, 12, 88)]:
        n = lost + gained + same
        found = interval(changes(lost, gained, same, 100.0), 100.0)
        for drop in (end / 100 for end in found):
            rare = np.roots([2 * n, (2 * n - lost + gained) * drop - lost - gained, -gained * drop * (1 - drop)])
            spread = n * (2 * rare.real.max() + drop * (1 - drop))
            assert abs(lost - gained - n * drop) / spread**0.5 == pytest.approx(1.959964, abs=1e-4)
        other = interval(changes(gained, lost, same, 100.0), 100.0)
        assert found == pytest.approx((-other[1], -other[0])) and found[0] < 100 * (lost - gained) / n < found[1]


def test_nothing_changed_is_no_certainty():
    low, high = interval(np.zeros(50), 100.0)
    z2 = 1.959964**2
    assert (low, high) == pytest.approx((-100 * z2 / (50 + z2), 100 * z2 / (50 + z2)), abs=1e-3)
    assert interval(np.full(50, 100.0), 100.0)[1] == 100 and interval(np.full(50, -100.0), 100.0)[0] == -100
    assert interval(np.zeros(50), None) is None and interval(np.ones(1), None) is None


def test_the_interval_covers_the_truth():
    """A drop of 4 points, 95 % intervals of 400 samples of 100 examples."""
    rng = np.random.default_rng(0)
    samples = rng.choice([1.0, -1.0, 0.0], (400, 100), p=(0.08, 0.04, 0.88))
    covered = np.mean([low <= 0.04 <= high for low, high in (interval(sample, 1.0) for sample in samples)])
    assert 0.92 <= covered <= 0.985


def test_other_scores_have_a_bootstrap_interval():
    change = np.random.default_rng(0).normal(3, 10, 400)
    expected = change.mean() + np.array([-1, 1]) * 1.96 * change.std() / 20
    assert interval(change, None) == pytest.approx(tuple(expected), abs=0.15)
    assert interval(change, None) == interval(change, None), "the seed is fixed"
    answers, labels = (change > 3).astype(int), np.ones(400, int)
    other = interval(100.0 * (answers == labels), None)
    assert other == pytest.approx(bootstrap_interval("accuracy", labels, answers), abs=0.5)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1, 1] and holm([0.2]) == [0.2] and holm([]) == []


@pytest.mark.parametrize(("lost", "gained", "same", "n"), [(3, 2, 6, 4), (0, 0, 6, 3), (4, 0, 5, 6), (2, 5, 3, 5)])
def test_the_excess_is_exact(lost, gained, same, n):
    """Of all ways to choose the slice, the share in which it loses as much."""
    change = changes(lost, gained, same)
    rng = np.random.default_rng(0)
    ways = [change[list(some)].sum() for some in combinations(range(len(change)), n)]
    for _ in range(4):
        member = rng.permutation(np.arange(len(change)) < n)
        expected = np.mean([way >= change[member].sum() for way in ways])
        (found,) = excess_tests(100 * change, member[None], 100.0)
        assert found == pytest.approx(expected)
        (drawn,) = excess_tests(change, member[None], None)
        assert drawn == pytest.approx(expected, abs=0.02)


def test_the_excess_of_many_examples_is_that_of_permutations():
    rng = np.random.default_rng(0)
    change = rng.choice([1.0, -1.0, 0.0], 6000, p=(0.1, 0.07, 0.83))
    members = rng.random((5, 6000)) < np.array([0.02, 0.1, 0.3, 0.5, 0.9])[:, None]
    np.testing.assert_allclose(excess_tests(change, members, 1.0), excess_tests(change, members, None), atol=0.025)


def test_false_alarms_are_as_rare_as_they_say():
    """Slices at chance: with Holm's correction over four of them at most 5 % of the audits cry wolf."""
    rng, alarms = np.random.default_rng(1), 0
    for _ in range(300):
        change = rng.choice([1.0, -1.0, 0.0], 200, p=(0.15, 0.1, 0.75))
        members = np.arange(4)[:, None] == rng.integers(4, size=200)
        alarms += min(holm(excess_tests(change, members, 1.0))) <= 0.05
    assert alarms / 300 <= 0.08


@given(
    st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=25),
    st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=25),
    st.sampled_from([0.05, 0.01]),
)
def test_what_is_detectable_is_what_the_test_finds(slice_, rest, level):
    change, member = np.array(slice_ + rest), np.arange(len(slice_ + rest)) < len(slice_)
    (p,) = excess_tests(change, member[None], 1.0)
    least = detectable(change, member, 1.0, level)
    assert (p <= level) == (least is not None and change[member].mean() >= least - 1e-9)


def test_what_is_detectable_of_other_scores():
    rng = np.random.default_rng(0)
    change, member = rng.normal(0, 5, 400), np.arange(400) < 100
    least = detectable(change, member, None, 0.01)
    near = change + member * (least - change[member].mean())
    (p,) = excess_tests(near, member[None], None)
    assert 0.001 < p < 0.03 and least > change.mean()
