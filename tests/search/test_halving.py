"""Successive halving: who goes on, for how long, and who wins."""

from __future__ import annotations

import pytest

from thresher.search.halving import successive_halving


def run(losses: dict[str, list[float]], rungs=(10, 20, 40)):
    """What halving makes of candidates whose losses after each round are known; the calls as well."""
    calls: list[tuple[str, float, int]] = []

    def train(name, candidate, steps):
        calls.append((name, candidate, steps))
        return losses[name][sum(name == known for known, *_ in calls) - 1]

    best, found = successive_halving({name: ord(name) for name in losses}, train, rungs)
    return best, found, calls


def test_the_better_half_goes_on():
    losses = {"a": [4, 4], "b": [1, 3, 3], "c": [2, 2, 1], "d": [3, 3], "e": [2.5, 9]}
    best, found, calls = run(losses)
    assert best == "c"
    assert found == {"a": [4], "b": [1, 3], "c": [2, 2], "d": [3], "e": [2.5, 9]} | {"b": [1, 3, 3], "c": [2, 2, 1]}
    assert [(name, steps) for name, _, steps in calls[5:]] == [("b", 20), ("c", 20), ("e", 20), ("c", 40), ("b", 40)]
    assert all(candidate == ord(name) for name, candidate, _ in calls)


def test_one_candidate_is_tried_once():
    assert run({"a": [1.0, 2.0]}) == ("a", {"a": [1.0]}, [("a", 97, 10)])


def test_the_last_round_decides_though_the_first_said_otherwise():
    assert run({"a": [1, 5], "b": [2, 4]}, (1, 1))[0] == "a", "of two the better one is left and is not tried again"
    assert run({"a": [1, 5], "b": [2, 4], "c": [3]}, (1, 1))[0] == "b"


def test_a_loss_that_is_no_number_never_wins():
    nan = float("nan")
    assert run({"a": [nan], "b": [3, nan], "c": [2, 5]}, (1, 1))[0] == "c"
    assert run({"a": [nan], "b": [0.5], "c": [0.4], "d": [0.3]}, (1,))[0] == "d"
    with pytest.raises(ValueError, match="every short training ended in a loss that is no number"):
        run({"a": [nan], "b": [nan]}, (1,))
