"""The quality of answers in points of 100."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from .ranking import DIVERGED, is_ranking

CORRELATIONS = ("pearson", "spearman")  # of numbers, and of their ranks


def is_mean(metric: str) -> bool:
    """Tell whether a metric is the mean of what each question, text or query gained: qa_f1, cosine, ``is_ranking``."""
    return metric in ("qa_f1", "cosine") or is_ranking(metric)


def compute_metric(task_metric: str, predictions: Any, labels: Any) -> float:
    """Return accuracy, f1 (of class 1), matthews, pearson, spearman or a mean, in points: 100 is perfect, 0 undefined.

    Args:
        predictions: (N,) classes or values, or (N, K) logits. For ``is_mean`` (N,) what each question or query gained.
        labels: (N,); for ``is_mean`` ones.

    Raises:
        ValueError: predictions and labels do not fit, or are not finite.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    metrics = {"accuracy": accuracy_score, "f1": f1_score, "matthews": matthews_corrcoef}
    metrics |= {"pearson": pearsonr, "spearman": spearmanr}
    metric = (lambda labels, gained: np.mean(gained)) if is_mean(task_metric) else metrics[task_metric]
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if not len(predictions) == len(labels) > (task_metric in CORRELATIONS):
        what = f"{len(predictions)} predictions for {len(labels)} labels"
        raise ValueError(f"{what}: expected as many (1 or more, for pearson and spearman 2)")
    if not (np.isfinite(predictions).all() and np.isfinite(labels).all()):
        raise ValueError(f"predictions or labels {DIVERGED}")
    if predictions.ndim == 2:
        predictions = predictions[:, 0] if predictions.shape[1] == 1 else predictions.argmax(1)
    with warnings.catch_warnings():  # both libraries warn where a metric is undefined (one class, a constant)
        warnings.simplefilter("ignore")
        score: Any = metric(labels, predictions)
    return 100 * float(np.nan_to_num(getattr(score, "statistic", score)))


def trivial(metric: str, labels: Any) -> float:
    """Return what one answer for every text is worth, the best there is, in points; 0 of a metric without classes."""
    if metric not in ("accuracy", "f1", "matthews"):
        return 0.0
    labels = np.asarray(labels)
    return max(compute_metric(metric, np.full_like(labels, answer), labels) for answer in np.unique(labels))


def checked_answers(metric: str, labels: Any, predictions: Any) -> np.ndarray:
    """Return (N,) classes or values, after the checks of ``compute_metric``."""
    answers = np.asarray(getattr(predictions, "logits", predictions))
    compute_metric(metric, answers, labels)
    return answers if answers.ndim == 1 else answers[:, 0] if answers.shape[1] == 1 else answers.argmax(1)


def points_of(metric: str, labels: np.ndarray, answers: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return (D,) the metric of D draws at once; labels and answers (N,), ``times`` (D, N) each example counts."""
    if metric == "accuracy":
        above, below = times @ (labels == answers), times.sum(1)
    elif metric == "f1":
        true, said = labels == 1, answers == 1
        above, below = 2 * (times @ (true & said)), times @ (1.0 * true + said)
    elif is_mean(metric):
        above, below = times @ answers, times.sum(1)
    elif metric in CORRELATIONS:
        x, y = (values - values.mean() for values in (labels, answers))
        if metric == "spearman":
            x, y = (_ranks(values, times) for values in (labels, answers))
        n = times.sum(1)
        sx, sy, sxx, syy, sxy = ((times * values).sum(1) for values in (x, y, x * x, y * y, x * y))
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


def _ranks(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return (D, N) the rank of each of the values (N,) in each draw ``times`` (D, N), from its middle; the mean rank
    of equal ones."""
    place = np.unique(values, return_inverse=True)[1]
    order = np.argsort(place, kind="stable")
    counts = np.add.reduceat(times[:, order], np.flatnonzero(np.diff(place[order], prepend=-1)), axis=1)
    middles = counts.cumsum(1) - counts / 2 - times.sum(1, keepdims=True) / 2
    return middles[:, place]
