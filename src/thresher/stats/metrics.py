"""The quality of answers in points of 100, and what each query gains where candidates are ranked."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

RANKING = ("map", "mrr")
MEANS = ("qa_f1", *RANKING)
DIVERGED = "hold NaN or infinity: expected numbers, has the model diverged?"


def compute_metric(task_metric: str, predictions: Any, labels: Any) -> float:
    """Return accuracy, f1 (of class 1), matthews, pearson, qa_f1, map or mrr, in points: 100 is perfect, 0 undefined.

    Args:
        predictions: (N,) classes or values, or (N, K) logits. For ``MEANS`` (N,) what each question or query gained.
        labels: (N,); for ``MEANS`` ones.

    Raises:
        ValueError: predictions and labels do not fit, or are not finite.
    """
    from scipy.stats import pearsonr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    metrics = {"accuracy": accuracy_score, "f1": f1_score, "matthews": matthews_corrcoef, "pearson": pearsonr}
    metrics |= dict.fromkeys(MEANS, lambda labels, gained: np.mean(gained))
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if not len(predictions) == len(labels) > (task_metric == "pearson"):
        what = f"{len(predictions)} predictions for {len(labels)} labels"
        raise ValueError(f"{what}: expected as many (1 or more, for pearson 2)")
    if not (np.isfinite(predictions).all() and np.isfinite(labels).all()):
        raise ValueError(f"predictions or labels {DIVERGED}")
    if predictions.ndim == 2:
        predictions = predictions[:, 0] if predictions.shape[1] == 1 else predictions.argmax(1)
    with warnings.catch_warnings():  # both libraries warn where a metric is undefined (one class, a constant)
        warnings.simplefilter("ignore")
        score = metrics[task_metric](labels, predictions)
    return 100 * float(np.nan_to_num(getattr(score, "statistic", score)))


def query_gains(logits: Any, queries: Any, labels: Any, metric: str) -> np.ndarray:
    """Return (Q,) the average precision ("map") or the reciprocal rank ("mrr") of each query, 0..1.

    Of equal scores the irrelevant candidates come first, so that a model that tells nothing apart gains nothing by the
    order of the data.

    Args:
        logits: (N, 2) of the classes, 1 being relevant, or (N, 1) of one score.
        queries: (N,) numbers; the queries come in their order.
        labels: (N,) 1 where the candidate is relevant.

    Raises:
        ValueError: logits are not finite.
    """
    logits, queries, labels = np.asarray(logits, dtype=float), np.asarray(queries), np.asarray(labels)
    if not np.isfinite(logits).all():
        raise ValueError(f"logits {DIVERGED}")
    scores, gains = logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0), []
    for query in np.unique(queries):
        own = queries == query
        relevant = labels[own][np.lexsort((labels[own], -scores[own]))] == 1
        ranks = 1 + np.flatnonzero(relevant)
        precisions = np.arange(1, len(ranks) + 1) / ranks
        gains.append(precisions.mean() if metric == "map" else precisions[0])
    return np.array(gains)


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
