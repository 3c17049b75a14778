"""The quality of answers in points of 100, and its bootstrap intervals."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

from .tasks import DataError


def compute_metric(task_metric: str, predictions: Any, labels: Any) -> float:
    """Accuracy, f1 (of class 1), matthews, pearson or qa_f1, in points (100 is perfect; 0 where it is undefined).

    predictions: (B,) classes or values, or (B, K) logits; labels: (B,). For qa_f1 predictions are the F1 of each
    question's answer (see ``qa.judge``) and labels ones. Raises DataError if they do not fit.
    """
    from scipy.stats import pearsonr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    metrics = {"accuracy": accuracy_score, "f1": f1_score, "matthews": matthews_corrcoef, "pearson": pearsonr}
    metrics["qa_f1"] = lambda labels, f1: np.mean(f1)
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
    runs = [[(np.asarray(labels), _answers(metric, labels, p)) for p in ab if p is not None] for labels, *ab in runs]
    if len({(len(run), len(run[0][0])) for run in runs}) != 1:
        raise ValueError("the runs do not pair: expected the same examples, and a second prediction in all or none")
    size, rng, draws = len(runs[0][0][0]), np.random.default_rng(seed), []
    for _ in range(n):
        some, which = rng.integers(size, size=size), rng.integers(len(runs), size=len(runs))
        points = [[_points(metric, labels[some], answers[some]) for labels, answers in runs[i]] for i in which]
        draws.append(np.mean([a - sum(b) for a, *b in points]))
    low, high = np.percentile(draws, (2.5, 97.5)).tolist()
    return low, high


def _answers(metric: str, labels: Any, predictions: Any) -> np.ndarray:
    """(N,) classes or values, after the checks of ``compute_metric``."""
    answers = np.asarray(getattr(predictions, "logits", predictions))
    compute_metric(metric, answers, labels)
    return answers if answers.ndim == 1 else answers[:, 0] if answers.shape[1] == 1 else answers.argmax(1)


def _points(metric: str, labels: np.ndarray, answers: np.ndarray) -> float:
    """``compute_metric`` in a hundredth of its time, as thousands of draws need it; (N,) each."""
    if metric == "accuracy":
        above, below = (labels == answers).sum(), len(labels)
    elif metric == "f1":
        true, said = labels == 1, answers == 1
        above, below = 2 * (true & said).sum(), true.sum() + said.sum()
    elif metric == "qa_f1":
        above, below = answers.sum(), len(answers)
    elif metric == "pearson":
        x, y = labels - labels.mean(), answers - answers.mean()
        above, below = x @ y, np.sqrt((x @ x) * (y @ y))
    else:  # matthews, of any number of classes
        n, size = float(len(labels)), 1 + max(labels.max(), answers.max())
        table = np.bincount(labels * size + answers, minlength=size * size).reshape(size, size).astype(float)
        true, said = table.sum(1), table.sum(0)
        above, below = n * np.trace(table) - true @ said, np.sqrt((n * n - true @ true) * (n * n - said @ said))
    return 100 * float(above / below) if below > 0 else 0.0
