"""Reranking: the candidates of a query in the order of a pair classifier's scores, judged query by query.

Shapes: N pairs of a query and a candidate, of Q queries.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from .task import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame

METRICS = ("map", "mrr")


def judged(frame: DataFrame, query: str, label: str) -> DataFrame:
    """The rows of queries that an order matters to: those with a candidate of class 1 and with one of class 0.

    TREC QA without the others is what the literature calls its clean version (Rao et al., 2016). Raises DataError where
    none is left.
    """
    both = frame.groupby(query)[label].transform("nunique") == 2
    if not both.any():
        raise DataError(f"no query in {query!r} has candidates of both classes: map and mrr need such queries")
    return frame[both]


def numbered(queries: Iterable[str]) -> list[int]:
    """(N,) the query of each pair as 0..Q-1, in the order of appearance."""
    known: dict[str, int] = {}
    return [known.setdefault(query, len(known)) for query in queries]


def judge(logits: Any, dataset: Dataset, metric: str) -> np.ndarray:
    """(Q,): the average precision ("map") or the reciprocal rank of the best relevant candidate ("mrr") of each query,
    0..1, relevant being class 1.

    logits: (N, 2), or (N, 1) of one score; ``dataset`` holds ``row``, the query of each pair, and ``labels``. Of equal
    scores the irrelevant come first, so that a model that tells nothing apart gains nothing by the order of the data.
    Raises DataError where logits are not finite.
    """
    logits = np.asarray(logits, dtype=float)
    if not np.isfinite(logits).all():
        raise DataError("logits hold NaN or infinity: expected numbers, has the model diverged?")
    scores = logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)
    queries, labels, found = np.asarray(dataset["row"]), np.asarray(dataset["labels"]), []
    for query in np.unique(queries):
        own = queries == query
        relevant = labels[own][np.lexsort((labels[own], -scores[own]))] == 1
        ranks = 1 + np.flatnonzero(relevant)
        precisions = np.arange(1, len(ranks) + 1) / ranks
        found.append(precisions.mean() if metric == "map" else precisions[0])
    return np.array(found)
