"""The quality of answers in points of 100, and its bootstrap intervals."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..data import reranking
from ..data.task import DataError

DRAWN = 200  # at a time, which bounds the memory
MEANS = ("qa_f1", *reranking.METRICS)


def compute_metric(task_metric: str, predictions: Any, labels: Any) -> float:
    """Accuracy, f1 (of class 1), matthews, pearson, qa_f1, map or mrr, in points (100 is perfect; 0 where it is
    undefined).

    predictions: (B,) classes or values, or (B, K) logits; labels: (B,). For ``MEANS`` predictions are what each
    question (``qa.judge``) or query (``reranking.judge``) gained, and labels ones. Raises DataError if they do not fit.
    """
    from scipy.stats import pearsonr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    metrics = {"accuracy": accuracy_score, "f1": f1_score, "matthews": matthews_corrcoef, "pearson": pearsonr}
    metrics |= dict.fromkeys(MEANS, lambda labels, gained: np.mean(gained))
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if not len(predictions) == len(labels) > (task_metric == "pearson"):
        what = f"{len(predictions)} predictions for {len(labels)} labels"
        raise DataError(f"{what}: expected as many (1 or more, for pearson 2)")
    if not (np.isfinite(predictions).all() and np.isfinite(labels).all()):
        raise DataError("predictions or labels hold NaN or infinity: expected numbers, has the model diverged?")
    if predictions.ndim == 2:
        predictions = predictions[:, 0] if predictions.shape[1] == 1 else predictions.argmax(1)
    with warnings.catch_warnings():  # both libraries warn where a metric is undefined (one class, a constant)
        warnings.simplefilter("ignore")
        score = metrics[task_metric](labels, predictions)
    return 100 * float(np.nan_to_num(getattr(score, "statistic", score)))


def bootstrap_interval(
    metric: str, labels: Any, predictions_a: Any, predictions_b: Any = None, n: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a quality, or of the paired difference a - b, in points.

    labels (N,); predictions: ``predicting.Predictions``, logits (N, K), or classes or values (N,). The examples are
    drawn anew ``n`` times, the same for a and b.
    """
    return pooled_interval(metric, [(labels, predictions_a, predictions_b)], n, seed)


def pooled_interval(metric: str, runs: Iterable[tuple], n: int = 2000, seed: int = 0) -> tuple[float, float]:
    """``bootstrap_interval`` of the mean over training seeds; ``runs`` holds (labels, a, b or None) of each.

    All seeds answer the same N examples. A draw takes the same examples of all, and draws the seeds as well.
    """
    runs = [[(np.asarray(labels), answers_of(metric, labels, p)) for p in ab if p is not None] for labels, *ab in runs]
    if len({(len(run), len(run[0][0])) for run in runs}) != 1:
        raise ValueError("the runs do not pair: expected the same examples, and a second prediction in all or none")
    draws = []
    for times, which in resamples(len(runs[0][0][0]), len(runs), n, seed):
        points = [[points_of(metric, labels, answers, times) for labels, answers in run] for run in runs]
        found = np.array([a - sum(b) for a, *b in points])  # (runs, draws)
        draws += np.take_along_axis(found, which.T, 0).mean(0).tolist()
    low, high = np.percentile(draws, (2.5, 97.5)).tolist()
    return low, high


def resamples(examples: int, seeds: int, n: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``n`` bootstrap draws, D at a time: how often each example is in it (D, examples), and which seeds (D, seeds)."""
    rng = np.random.default_rng(seed)
    for start in range(0, n, DRAWN):
        times, which = [], []
        for _ in range(min(DRAWN, n - start)):
            times.append(np.bincount(rng.integers(examples, size=examples), minlength=examples).astype(float))
            which.append(rng.integers(seeds, size=seeds))
        yield np.array(times), np.array(which)


def answers_of(metric: str, labels: Any, predictions: Any) -> np.ndarray:
    """(N,) classes or values, after the checks of ``compute_metric``."""
    answers = np.asarray(getattr(predictions, "logits", predictions))
    compute_metric(metric, answers, labels)
    return answers if answers.ndim == 1 else answers[:, 0] if answers.shape[1] == 1 else answers.argmax(1)


def points_of(metric: str, labels: np.ndarray, answers: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(D,): ``compute_metric`` of D draws at once; labels and answers (N,), ``times`` (D, N) each example counts."""
    if metric == "accuracy":
        above, below = times @ (labels == answers), times.sum(1)
    elif metric == "f1":
        true, said = labels == 1, answers == 1
        above, below = 2 * (times @ (true & said)), times @ (1.0 * true + said)
    elif metric in MEANS:
        above, below = times @ answers, times.sum(1)
    elif metric == "pearson":
        n, x, y = times.sum(1), labels - labels.mean(), answers - answers.mean()
        sx, sy, sxx, syy, sxy = (times @ values for values in (x, y, x * x, y * y, x * y))
        sxx, syy = (
            np.where(s > 1e-12 * total, s, 0) for s, total in ((sxx - sx * sx / n, sxx), (syy - sy * sy / n, syy))
        )
        above, below = sxy - sx * sy / n, np.sqrt(sxx * syy)
    else:  # matthews, of any number of classes
        n, classes = times.sum(1), np.arange(1 + max(labels.max(), answers.max()))
        true, said = (times @ (given[:, None] == classes) for given in (labels, answers))  # (D, classes)
        above = n * (times @ (labels == answers)) - (true * said).sum(1)
        below = np.sqrt((n * n - (true * true).sum(1)) * (n * n - (said * said).sum(1)))
    return 100 * np.divide(above, below, out=np.zeros(len(times)), where=below > 0)
