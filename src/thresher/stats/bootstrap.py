"""Percentile bootstrap intervals of qualities and of their paired differences, in points of 100."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from .metrics import checked_answers, points_of

DRAWN = 200  # at a time, which bounds the memory


def bootstrap_interval(
    metric: str, labels: Any, predictions_a: Any, predictions_b: Any = None, n: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a quality, or of the paired difference a - b, in points.

    Args:
        labels: (N,).
        predictions_a, predictions_b: anything with ``logits``, logits (N, K), or classes or values (N,).
        n: draws of the examples, the same for a and b.
    """
    return pooled_interval(metric, [(labels, predictions_a, predictions_b)], n, seed)


def pooled_interval(metric: str, runs: Iterable[tuple], n: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the interval of the mean over training seeds; ``runs`` holds (labels, a, b or None) of each.

    All seeds answer the same N examples. A draw takes the same examples of all, and draws the seeds as well.
    """
    checked = [
        [(np.asarray(labels), checked_answers(metric, labels, p)) for p in ab if p is not None] for labels, *ab in runs
    ]
    if len({(len(run), len(run[0][0])) for run in checked}) != 1:
        raise ValueError("the runs do not pair: expected the same examples, and a second prediction in all or none")
    draws = []
    for times, which in resamples(len(checked[0][0][0]), len(checked), n, seed):
        points = [[points_of(metric, labels, answers, times) for labels, answers in run] for run in checked]
        values = np.array([a - sum(b) for a, *b in points])  # (runs, draws)
        draws += np.take_along_axis(values, which.T, 0).mean(0).tolist()
    low, high = np.percentile(draws, (2.5, 97.5)).tolist()
    return low, high


def resamples(examples: int, seeds: int, n: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ``n`` bootstrap draws, D at a time: how often each example comes (D, examples), which seeds (D, seeds)."""
    rng = np.random.default_rng(seed)
    for start in range(0, n, DRAWN):
        times, which = [], []
        for _ in range(min(DRAWN, n - start)):
            times.append(np.bincount(rng.integers(examples, size=examples), minlength=examples).astype(float))
            which.append(rng.integers(seeds, size=seeds))
        yield np.array(times), np.array(which)
