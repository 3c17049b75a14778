"""Exact bounds and the testing of one schedule after another: against scipy, by definition, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from thresher.stats.bounds import least, lower, paired_upper, passing, upper

CASES = [(0, 1), (0, 149), (3, 149), (20, 300), (299, 300), (300, 300)]


@pytest.mark.parametrize("errors, n", CASES)
@pytest.mark.parametrize("level", [0.05, 0.025])
def test_the_bounds_are_clopper_and_pearsons(errors, n, level):
    found = (lower(errors, n, level), upper(errors, n, level))
    less, more = (
        binomtest(errors, n, alternative=side).proportion_ci(1 - level, "exact") for side in ("less", "greater")
    )
    assert found == pytest.approx((more.low, less.high), abs=1e-9)
    if errors < n:
        assert binom.cdf(errors, n, found[1]) == pytest.approx(level)
    assert 0 <= found[0] <= errors / n <= found[1] <= 1


@pytest.mark.parametrize("limit, paired, expected", [(0.02, False, 149), (0.01, False, 299), (0.01, True, 368)])
def test_the_fewest_texts(limit, paired, expected):
    bound = (lambda n: paired_upper(0, 0, n)) if paired else (lambda n: upper(0, n))
    assert least(limit, paired) == expected
    assert bound(expected) <= limit < bound(expected - 1)


@pytest.mark.parametrize("rate", [0.001, 0.02, 0.3])
def test_the_true_rate_is_seldom_above(rate):
    """Exactly, not by chance: the probability of all counts whose bound is too low."""
    n = 200
    wrong = sum(binom.pmf(errors, n, rate) for errors in range(n + 1) if upper(errors, n) < rate)
    assert wrong <= 0.05


@pytest.mark.parametrize("lost, won", [(0.03, 0.0), (0.05, 0.04), (0.2, 0.25), (0.01, 0.01)])
def test_the_drop_is_seldom_above_the_paired_bound(lost, won):
    draws = np.random.default_rng(0).multinomial(300, (lost, won, 1 - lost - won), size=1000)
    assert np.mean([paired_upper(a, b, 300) < lost - won for a, b, _ in draws.tolist()]) <= 0.05


@pytest.mark.parametrize(
    "lost, won, n, expected", [(0, 0, 368, 0.009974), (8, 3, 300, 0.049799), (30, 60, 300, -0.016558)]
)
def test_the_paired_bound_takes_half_the_level_on_each_side(lost, won, n, expected):
    """By value: the bound is conservative, and no simulation sees a whole level on one side."""
    assert paired_upper(lost, won, n) == pytest.approx(expected, abs=1e-6)
    more = binomtest(lost, n).proportion_ci(0.95, "exact").high  # two-sided: 2.5 % beyond each end
    less = binomtest(won, n).proportion_ci(0.95, "exact").low
    assert paired_upper(lost, won, n) == pytest.approx(more - less, abs=1e-9)


def test_a_sequence_stops_at_the_first_failure():
    seen = []
    bounds = (seen.append(bound) or bound for bound in (0.01, 0.02, 0.03, 0.001))
    assert passing(bounds, 0.02) == 2 and seen == [0.01, 0.02, 0.03]
    assert passing([0.5], 0.1) == passing([], 0.1) == 0


def violations(procedure, draws: int = 500) -> float:
    """How often something is chosen whose true rate is above the limit, of schedules whose errors grow."""
    rates, limit, n, rng = (
        np.array([0.004, 0.008, 0.0201, 0.021, 0.022, 0.023, 0.03]),
        0.02,
        600,
        np.random.default_rng(1),
    )
    wrong = 0
    for _ in range(draws):
        counts = (rng.random((n, 1)) < rates).sum(0).tolist()  # a text that goes wrong goes wrong in all stronger ones
        count = procedure(counts, n, limit)
        wrong += count > 0 and rates[count - 1] > limit
    return wrong / draws


def fixed_sequence(counts, n, limit):
    return passing((upper(errors, n) for errors in counts), limit)


def by_rate(counts, n, limit):
    return passing((errors / n for errors in counts), limit)


def test_the_fixed_sequence_keeps_its_word():
    assert violations(fixed_sequence) <= 0.07
    assert violations(by_rate) > 0.3, "the simulation can tell"


def test_the_fixed_sequence_of_drops_keeps_its_word():
    rng, n, limit, wrong = np.random.default_rng(2), 800, 0.02, 0
    truth = [(0.01, 0.005), (0.03, 0.0095), (0.04, 0.019), (0.08, 0.03)]
    for _ in range(500):
        draws = [rng.multinomial(n, (a, b, 1 - a - b)).tolist() for a, b in truth]
        count = passing((paired_upper(a, b, n) for a, b, _ in draws), limit)
        wrong += count > 0 and truth[count - 1][0] - truth[count - 1][1] > limit
    assert wrong / 500 <= 0.07


@pytest.mark.parametrize("arguments", [(3, 2), (-1, 5), (0, 0), (1, 5, 0.0), (1, 5, 1.0)])
def test_what_cannot_be_counted(arguments):
    with pytest.raises(ValueError, match="expected"):
        upper(*arguments)


def test_limits_and_pairs_that_cannot_be():
    for limit in (0, 1, -0.1):
        with pytest.raises(ValueError, match="expected a share between 0 and 1"):
            least(limit)
    with pytest.raises(ValueError, match="expected no more than there are"):
        paired_upper(3, 3, 5)
