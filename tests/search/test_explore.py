"""A budget is one bound, with the texts that its test needs; scores are those that have a share for each site."""

from __future__ import annotations

import numpy as np
import pytest

from thresher.search.explore import SCORES, Budget, rate_of, scores_of
from thresher.search.reference import Comparison
from thresher.stats import bounds

NAMES = ("target_flops", "target_latency_ms", "max_disagreement", "max_drop")
OVER = {"target_flops": [1, 1.5], "target_latency_ms": [], "max_disagreement": [1, 1.5], "max_drop": [100, 150.0]}


def test_there_is_one_budget():
    assert Budget.only(dict.fromkeys(NAMES) | {"max_drop": 0.1}) == Budget("max_drop", 0.1)
    for given in ({}, {"target_flops": 0.5, "max_drop": 0.1}):
        with pytest.raises(ValueError, match=f"expected one budget of {', '.join(NAMES)}, got "):
            Budget.only(dict.fromkeys(NAMES) | given)


@pytest.mark.parametrize("name", NAMES)
def test_values_that_are_no_budget(name):
    wrong = [0, -1.0, float("nan"), float("inf"), True, *OVER[name]]
    for value in wrong:
        with pytest.raises(ValueError, match=f"{name}={value!r}: expected"):
            Budget(name, value)
    assert Budget("target_latency_ms", 20).limit is None and Budget("max_drop", 20).limit == 0.2


def test_texts_are_split_for_the_test_and_the_search():
    assert Budget("target_flops", 0.5).split(1000) == (0, 256) and Budget("target_flops", 0.5).split(40) == (0, 40)
    for name, asked, paired in (("max_disagreement", 0.05, False), ("max_drop", 5, True)):
        budget, least = Budget(name, asked), bounds.least(0.05, paired=paired)
        assert budget.split(least + 32) == (least, 32)
        assert budget.split(10_000) == (8 * least, 256)
        with pytest.raises(
            ValueError, match=f"{least + 31} texts of a kind are too few: .* and {name}={asked} {least} mo"
        ):
            budget.split(least + 31, " of a kind")


@pytest.mark.parametrize(
    "name, task, numbers, fits",
    [
        ("target_flops", "regression", True, True),
        ("max_disagreement", "regression", True, False),
        ("max_disagreement", "qa", False, True),
        ("max_drop", "qa", False, False),
        ("max_drop", "classification", False, True),
    ],
)
def test_answers_that_can_be_compared(name, task, numbers, fits):
    budget = Budget(name, 0.5)
    if fits:
        budget.check(task, numbers)
    else:
        with pytest.raises(ValueError, match=f"{name} is for models that give classes.*: this one is for {task}"):
            budget.check(task, numbers)


def test_the_rate_of_a_test_and_its_bound():
    differs = np.array([True] * 3 + [False] * 97)
    outcome = Comparison(0.1, 0.5, differs, lost=differs, won=np.roll(differs, 50) & (np.arange(100) < 52))
    assert rate_of(outcome, Budget("max_disagreement", 0.1)) == (0.03, bounds.upper(3, 100))
    assert rate_of(outcome, Budget("max_drop", 10)) == (0.01, bounds.paired_upper(3, 2, 100))


def test_the_scores_of_a_method():
    assert scores_of("auto", None) is SCORES
    assert scores_of("entropy", {"criterion": "column"}) == {"entropy": ("entropy", {"criterion": "column"})}
    for method, options, told in (
        (
            "ltp",
            {},
            "ltp has no share to keep, or to merge, at each site: expected auto or one of atome, ats.* tome, topk",
        ),
        ("tome", {"r": 0.5}, "r is what is searched for"),
        ("nothing", {}, "unknown pruning method 'nothing'"),
        ("topk", {"keep": 0.5}, "keep is what is searched for"),
        ("auto", {"criterion": "column"}, "method_options criterion are of one method: name it"),
    ):
        with pytest.raises(ValueError, match=told):
            scores_of(method, options)
