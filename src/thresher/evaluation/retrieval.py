"""How well embeddings find documents, and how near they are to another model's.

Shapes: Q queries, D documents, C components of an embedding. Embeddings are arrays or tensors; nearness is the cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..data.retrieval import Retrieval
from ..stats.ranking import gain

METRICS = ("ndcg@10", "map", "mrr", "recall@10", "recall@100")
CHUNK = 64  # queries compared with all documents at a time


def unit(embeddings: Any) -> np.ndarray:
    """Return embeddings (N, C) of length 1, in fp32; one of zeros stays.

    Raises ValueError for another shape, or NaN.
    """
    found = embeddings.detach().cpu().float().numpy() if isinstance(embeddings, Tensor) else np.asarray(embeddings)
    if found.ndim != 2 or not len(found):
        raise ValueError(f"embeddings have the shape {found.shape}: expected (texts, components), with a text or more")
    found = found.astype(np.float32)
    if not np.isfinite(found).all():
        raise ValueError("embeddings hold NaN or infinity: expected numbers, has the model diverged?")
    length = np.linalg.norm(found, axis=1, keepdims=True)
    return found / np.where(length > 0, length, 1)


def cosines(embeddings: Any, reference: Any) -> np.ndarray:
    """Return (N,) the cosine of each embedding and the reference's of the same text, both (N, C)."""
    a, b = _fitting(embeddings, reference, rows=True)
    return (a * b).sum(1)


def nearest(queries: Any, documents: Any, k: int = 10) -> np.ndarray:
    """Return (Q, k) the numbers of the nearest documents, the best first; of equally near ones the first."""
    a, b = _fitting(queries, documents)
    return np.concatenate([np.argsort(-scores, axis=1, kind="stable")[:, :k] for _, scores in _scored(a, b)])


def overlaps(found: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return (Q,) the share of the reference's documents (Q, k) that were found (Q, k), whatever their order."""
    if found.shape != reference.shape:
        raise ValueError(f"rankings have the shapes {found.shape} and {reference.shape}: expected the same")
    pairs = zip(found.tolist(), reference.tolist(), strict=True)
    return np.array([len({*a} & {*b}) / len({*b}) for a, b in pairs])


def retrieval_gains(
    task: Retrieval, queries: Any, documents: Any, metrics: Sequence[str] = METRICS
) -> dict[str, np.ndarray]:
    """Return (Q,) what each query gains by each metric when all documents are ranked, for ``bootstrap_interval``.

    Of equally near documents the less relevant come first.
    """
    a, b = _fitting(queries, documents)
    shape = (len(task.queries), len(task.documents))
    if (len(a), len(b)) != shape:
        raise ValueError(f"embeddings of {len(a)} queries and {len(b)} documents: expected {shape[0]} and {shape[1]}")
    gains: dict[str, list[float]] = {metric: [] for metric in metrics}
    for start, scores in _scored(a, b):
        for i, own in enumerate(scores, start):
            grades = task.grades(i)
            ranked = grades[np.lexsort((grades, -own))]
            for metric in metrics:
                gains[metric].append(gain(ranked, grades, metric))
    return {metric: np.array(values) for metric, values in gains.items()}


def compare_embeddings(
    queries: Any, documents: Any, reference_queries: Any, reference_documents: Any, k: int = 10
) -> dict[str, float]:
    """Return how near a model is to its reference: the mean "cosine" of all embeddings, and the "overlap" of their k
    nearest documents, each model's queries among its own documents; "overlap_index": among the reference's documents,
    an index that stays as it is. Shares of 1."""
    wanted = nearest(reference_queries, reference_documents, k)
    near = np.concatenate([cosines(queries, reference_queries), cosines(documents, reference_documents)])
    return {
        "cosine": float(near.mean()),
        "overlap": float(overlaps(nearest(queries, documents, k), wanted).mean()),
        "overlap_index": float(overlaps(nearest(queries, reference_documents, k), wanted).mean()),
    }


def _fitting(first: Any, second: Any, rows: bool = False) -> tuple[np.ndarray, np.ndarray]:
    a, b = unit(first), unit(second)
    if a.shape[1] != b.shape[1] or (rows and len(a) != len(b)):
        what = "texts and components" if rows else "components"
        raise ValueError(f"embeddings have the shapes {a.shape} and {b.shape}: expected the same {what}")
    return a, b


def _scored(queries: np.ndarray, documents: np.ndarray):
    for start in range(0, len(queries), CHUNK):
        yield start, queries[start : start + CHUNK] @ documents.T
