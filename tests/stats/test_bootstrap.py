"""Bootstrap intervals: they hold the estimate, agree with the binomial one, and pool seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from thresher.stats.bootstrap import bootstrap_interval, pooled_interval
from thresher.stats.metrics import CORRELATIONS, checked_answers, compute_metric, points_of


def answers(metric, seed=0, n=300):
    rng = np.random.default_rng(seed)
    if metric in CORRELATIONS:
        labels = rng.normal(size=n).round(1)  # some are equal
        return labels, labels + rng.normal(size=n), labels + 2 * rng.normal(size=n)
    classes = 2 if metric == "f1" else 3
    labels = rng.integers(classes, size=n)
    logits = np.eye(classes)[labels] + rng.normal(size=(n, classes))
    return labels, logits, logits + rng.normal(size=(n, classes))


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews", "pearson", "spearman"])
def test_the_fast_metrics_are_the_metrics(metric):
    labels, a, _ = answers(metric)
    said, some = checked_answers(metric, labels, a), np.random.default_rng(2).integers(len(labels), size=len(labels))
    times = np.stack([np.ones(len(labels)), np.bincount(some, minlength=len(labels))])
    whole, drawn = points_of(metric, labels, said, times)
    assert whole == pytest.approx(compute_metric(metric, a, labels), abs=1e-9)
    assert drawn == pytest.approx(compute_metric(metric, said[some], labels[some]), abs=1e-9)
    nothing = np.zeros(4, int) if metric not in CORRELATIONS else np.zeros(4)
    assert points_of(metric, nothing, nothing, np.ones((1, 4))) == compute_metric(metric, nothing, nothing)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews", "pearson", "spearman"])
def test_intervals_hold_the_estimate(metric):
    labels, a, b = answers(metric)
    point, other = (compute_metric(metric, x, labels) for x in (a, b))
    low, high = bootstrap_interval(metric, labels, a, n=400)
    assert low < point < high
    paired = bootstrap_interval(metric, labels, a, b, n=400)
    assert paired[0] < point - other < paired[1]
    assert bootstrap_interval(metric, labels, a, a, n=50) == (0, 0)
    assert bootstrap_interval(metric, labels, a, b, n=400) == paired


def test_interval_of_accuracy_is_the_binomial_one():
    labels = np.zeros(400, int)
    said = (np.arange(400) < 100).astype(int)  # 75 % right
    low, high = bootstrap_interval("accuracy", labels, said)
    half = 100 * 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(75 - half, abs=0.5) and high == pytest.approx(75 + half, abs=0.5)


def test_seeds_are_pooled():
    labels = answers("accuracy")[0]
    run = answers("accuracy")
    alone = bootstrap_interval("accuracy", *run, n=1000)
    assert pooled_interval("accuracy", [run] * 3, n=1000) == pytest.approx(alone, abs=1.5)  # nothing new
    rng = np.random.default_rng(5)
    good, bad = labels, np.where(rng.random(300) < 0.5, labels, labels + 1)
    low, high = pooled_interval("accuracy", [(labels, good, bad), (labels, good, good)], n=400)
    assert low == 0 and high > 45  # the seeds differ, and are drawn as well
    with pytest.raises(ValueError, match="do not pair"):
        pooled_interval("accuracy", [(labels, good, bad), (labels, good, None)])
    with pytest.raises(ValueError, match="do not pair"):
        pooled_interval("accuracy", [(labels, good, bad), (labels[:9], good[:9], bad[:9])])
