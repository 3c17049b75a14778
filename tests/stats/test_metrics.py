"""Metrics in points."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from thresher.stats.metrics import compute_metric, trivial


def test_metrics_are_in_points():
    labels = [1, 0, 1, 1]
    logits = np.array([[0, 1], [1, 0], [1, 0], [0, 1]], dtype=float)
    assert compute_metric("accuracy", logits, labels) == 75
    assert compute_metric("f1", [1, 0, 0, 1], labels) == pytest.approx(80)
    assert compute_metric("matthews", logits, labels) == pytest.approx(100 / math.sqrt(3))
    assert compute_metric("pearson", np.array([[2.0], [4.0], [6.0]]), [1, 2, 3]) == pytest.approx(100)
    assert compute_metric("spearman", np.array([[2.0], [4.0], [90.0]]), [1, 2, 3]) == pytest.approx(100)
    assert compute_metric("spearman", [1.0, 2.0, 3.0, 4.0], [1, 2, 4, 3]) == pytest.approx(100 * (1 - 6 * 2 / (4 * 15)))


def test_undefined_metrics_are_zero_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compute_metric("pearson", [1.0, 1.0], [1, 2]) == 0
        assert compute_metric("spearman", [1.0, 1.0], [1, 2]) == 0
        assert compute_metric("matthews", [1, 1], [1, 1]) == 0
        assert compute_metric("f1", [0, 0], [0, 0]) == 0


def test_metrics_of_nothing_or_of_nan_are_errors():
    with pytest.raises(ValueError, match="1 predictions for 2 labels"):
        compute_metric("accuracy", [1], [1, 0])
    with pytest.raises(ValueError, match="0 predictions"):
        compute_metric("accuracy", [], [])
    with pytest.raises(ValueError, match="diverged"):
        compute_metric("accuracy", [[math.nan, 0.0]], [1])


def test_one_answer_for_every_text():
    labels = np.array([1] * 9 + [0])
    assert trivial("accuracy", labels) == pytest.approx(90)
    assert trivial("f1", labels) == pytest.approx(100 * 18 / 19)
    assert trivial("matthews", labels) == trivial("pearson", labels) == trivial("map", np.ones(3)) == 0
