"""Metrics in points, and what each query gains: against scikit-learn and by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from thresher.stats.metrics import compute_metric, query_gains


def test_metrics_are_in_points():
    labels = [1, 0, 1, 1]
    logits = np.array([[0, 1], [1, 0], [1, 0], [0, 1]], dtype=float)
    assert compute_metric("accuracy", logits, labels) == 75
    assert compute_metric("f1", [1, 0, 0, 1], labels) == pytest.approx(80)
    assert compute_metric("matthews", logits, labels) == pytest.approx(100 / math.sqrt(3))
    assert compute_metric("pearson", np.array([[2.0], [4.0], [6.0]]), [1, 2, 3]) == pytest.approx(100)


def test_undefined_metrics_are_zero_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compute_metric("pearson", [1.0, 1.0], [1, 2]) == 0
        assert compute_metric("matthews", [1, 1], [1, 1]) == 0
        assert compute_metric("f1", [0, 0], [0, 0]) == 0


def test_metrics_of_nothing_or_of_nan_are_errors():
    with pytest.raises(ValueError, match="1 predictions for 2 labels"):
        compute_metric("accuracy", [1], [1, 0])
    with pytest.raises(ValueError, match="0 predictions"):
        compute_metric("accuracy", [], [])
    with pytest.raises(ValueError, match="diverged"):
        compute_metric("accuracy", [[math.nan, 0.0]], [1])


def test_average_precision_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    queries, scores = np.repeat(rng.permutation(30), 7), rng.normal(size=210)
    labels = rng.integers(2, size=210)
    labels[::7], labels[1::7] = 0, 1
    order = rng.permutation(210)  # the candidates of a query need not be neighbours
    data = queries[order], labels[order]
    found = query_gains(np.stack([-scores, scores], 1)[order], *data, "map")
    wanted = [average_precision_score(labels[queries == q], scores[queries == q]) for q in range(30)]
    assert np.allclose(found, wanted, atol=1e-12)
    assert np.allclose(query_gains(scores[order, None], *data, "map"), wanted, atol=1e-12), "one logit is a score"


def test_reciprocal_rank_is_of_the_first_relevant_candidate():
    data = [0, 0, 0, 1, 1], [0, 1, 1, 1, 0]
    assert query_gains([[3.0], [2.0], [1.0], [5.0], [4.0]], *data, "mrr").tolist() == [0.5, 1.0]
    assert query_gains([[3.0], [2.0], [1.0], [5.0], [4.0]], *data, "map").tolist() == [(1 / 2 + 2 / 3) / 2, 1.0]


def test_equal_scores_gain_nothing_by_the_order_of_the_data():
    for labels in ([1, 0, 0], [0, 0, 1]):
        data = [0, 0, 0], labels
        assert query_gains(np.zeros((3, 2)), *data, "mrr").tolist() == [1 / 3]
    with pytest.raises(ValueError, match="NaN or infinity"):
        query_gains([[0.0], [np.nan], [0.0]], *data, "mrr")
