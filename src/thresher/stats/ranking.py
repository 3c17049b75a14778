"""What each query gains by the order of its candidates: average precision, reciprocal rank, recall and nDCG."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

DIVERGED = "hold NaN or infinity: expected numbers, has the model diverged?"
NAMES = re.compile(r"(map|mrr|ndcg|recall)(?:@([1-9]\d*))?")


def is_ranking(metric: str | None) -> bool:
    """Tell whether a metric judges an order: "map", "mrr", "ndcg" or "recall", with or without a cut such as "@10"."""
    return NAMES.fullmatch(metric or "") is not None


def scores_of(logits: Any) -> np.ndarray:
    """Return (N,) scores: of logits (N, 2) class 1 over class 0, of (N, 1) and (N,) the number itself."""
    logits = np.asarray(logits, dtype=float)
    if logits.ndim == 1:
        return logits
    return logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)


def query_gains(logits: Any, queries: Any, labels: Any, metric: str) -> np.ndarray:
    """Return (Q,) what each query gains by a metric of ``is_ranking``, 0..1.

    Of equal scores the less relevant candidates come first, so that a model that tells nothing apart gains nothing by
    the order of the data.

    Args:
        logits: (N, 2) of the classes, 1 being relevant, or (N, 1) or (N,) of one score.
        queries: (N,) numbers; the queries come in their order.
        labels: (N,) grades; above 0 the candidate is relevant.

    Raises:
        ValueError: logits are not finite, or a query has no relevant candidate.
    """
    scores, queries, labels = scores_of(logits), np.asarray(queries), np.asarray(labels, dtype=float)
    if not np.isfinite(scores).all():
        raise ValueError(f"logits {DIVERGED}")
    order = np.lexsort((labels, -scores, queries))
    grades = np.split(labels[order], np.flatnonzero(np.diff(queries[order])) + 1)
    return np.array([gain(own, own, metric) for own in grades])


def gain(ranked: np.ndarray, judged: np.ndarray, metric: str) -> float:
    """Return what one query gains by a metric of ``is_ranking``, 0..1.

    nDCG is that of trec_eval and BEIR, with linear gains: the grade itself over log2(1 + rank) (Järvelin and
    Kekäläinen, 2002), relative to the best order of all that is judged. Of two grades the exponential gains of Burges
    et al. (2005), 2^grade - 1, are the same.

    Args:
        ranked: (n,) grades in the order of the ranking, the best first, which may end early.
        judged: (m,) grades of all that is known of the query, in any order; one of them above 0.

    Raises:
        ValueError: another metric, or nothing is relevant.
    """
    found = NAMES.fullmatch(metric)
    if found is None:
        raise ValueError(f"{metric!r} is no metric of an order: expected map, mrr, ndcg or recall, as in ndcg@10")
    name, cut = found[1], int(found[2] or 0) or None
    ranked, judged = np.maximum(ranked, 0.0)[:cut], np.maximum(judged, 0.0)
    relevant = int((judged > 0).sum())
    if not relevant:
        raise ValueError(f"a query has no relevant candidate: {metric} needs one, leave the query out")
    if name == "ndcg":
        best = np.sort(judged)[::-1][:cut]
        return float(_discounted(ranked) / _discounted(best))
    ranks = 1 + np.flatnonzero(ranked > 0)
    if name == "recall":
        return len(ranks) / relevant
    if name == "mrr":
        return float(1 / ranks[0]) if len(ranks) else 0.0
    return float((np.arange(1, len(ranks) + 1) / ranks).sum() / relevant)


def _discounted(grades: np.ndarray) -> float:
    return float((grades / np.log2(np.arange(2, len(grades) + 2))).sum())
