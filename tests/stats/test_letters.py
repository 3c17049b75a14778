"""Letters of a leaderboard: by hand, against intervals, and how seldom they are wrong."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from thresher.stats.bootstrap import pooled_interval
from thresher.stats.letters import groups, letters, p_values
from thresher.stats.paired import holm


def right(share: float, n: int = 400, seed: int = 0) -> np.ndarray:
    """Answers to ``n`` questions whose label is 1, of which a share is right."""
    return (np.random.default_rng(seed).random(n) < share).astype(int)


def test_groups_tell_apart_what_differs_and_nothing_else():
    labels = np.ones(400, int)
    answers = {"bad": [right(0.5, seed=3)], "good": [right(0.9)], "as good": [right(0.9, seed=1)]}
    found = groups("accuracy", labels, answers)
    order = [np.mean(answers[name]) for name in found]
    assert order == sorted(order, reverse=True) and list(found)[-1] == "bad"
    assert found["good"] == found["as good"] == "a" and found["bad"] == "b"
    assert set(groups("accuracy", labels, {name: answers["good"] for name in "xyz"}).values()) == {"a"}
    assert groups("accuracy", labels, {"alone": answers["bad"]}) == {"alone": "a"}


def test_two_methods_are_apart_where_their_interval_is():
    """Of two methods Holm corrects nothing: the letters say what the interval of the difference says."""
    labels, said = np.ones(300, int), set()
    for seed, share in itertools.product(range(4), (0.8, 0.7, 0.6)):
        a, b = right(0.8, 300, seed), right(share, 300, seed + 50)
        low, high = pooled_interval("accuracy", [(labels, a, b)])
        apart = len(set(groups("accuracy", labels, {"a": [a], "b": [b]}).values())) == 2
        if min(abs(low), abs(high)) > 0.4:  # not on the edge, which the draws decide
            assert apart == (low > 0 or high < 0)
            said.add(apart)
    assert said == {True, False}


def test_seeds_are_paired_and_disagreement_between_them_counts():
    labels = np.ones(400, int)
    high, low = right(0.9), right(0.7, seed=1)
    steady = groups("accuracy", labels, {"a": [high] * 3, "b": [low] * 3})
    assert steady == {"a": "a", "b": "b"}
    assert set(groups("accuracy", labels, {"a": [high, low, high], "b": [low, high, low]}).values()) == {"a"}
    assert groups("accuracy", labels, {"a": {0: high, 1: low}, "b": {0: low, 2: high}}) == {"a": "a", "b": "b"}
    assert groups("accuracy", labels, {"a": {0: high}, "b": {1: low}}) == {"a": "a", "b": "a"}, "no seed in common"
    with pytest.raises(ValueError, match="no answers of b"):
        groups("accuracy", labels, {"a": [high], "b": []})
    with pytest.raises(ValueError, match="400 labels"):
        groups("accuracy", labels, {"a": [high[:9]]})


def test_wrong_differences_are_as_rare_as_promised():
    """Methods that are equal, 12 of them: without a correction some of the 66 pairs would nearly always be apart."""
    labels, wrong, uncorrected = np.ones(150, int), 0, 0
    for trial in range(8):
        answers = {f"m{i}": [right(0.7, 150, 100 * trial + i)] for i in range(12)}
        wrong += set(groups("accuracy", labels, answers).values()) != {"a"}
        runs, pairs = {m: {0: a[0]} for m, a in answers.items()}, list(itertools.combinations(answers, 2))
        uncorrected += min(p_values("accuracy", labels, runs, pairs, 400)) <= 0.05
    assert wrong <= 2 and uncorrected >= 5


def test_holm_and_letters_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm's own kind of example
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
    assert letters("ABC", {("A", "C")}) == {"A": "a", "B": "ab", "C": "b"}
    assert letters("ABC", set()) == {"A": "a", "B": "a", "C": "a"}
    assert letters("ABC", set(itertools.combinations("ABC", 2))) == {"A": "a", "B": "b", "C": "c"}
    names = "ABCDEFG"
    for seed in range(30):
        draw = np.random.default_rng(seed)
        apart = {pair for pair in itertools.combinations(names, 2) if draw.random() < 0.4}
        found = letters(names, apart)
        for pair in itertools.combinations(names, 2):
            assert bool(set(found[pair[0]]) & set(found[pair[1]])) == (pair not in apart)
