"""Embeddings are judged by the order that they give, and by how near they are to another model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score

from thresher.data.retrieval import Retrieval
from thresher.evaluation.retrieval import compare_embeddings, cosines, nearest, overlaps, retrieval_gains
from thresher.stats.bootstrap import bootstrap_interval

RNG = np.random.default_rng(0)
QUERIES, DOCUMENTS = RNG.normal(size=(70, 8)), RNG.normal(size=(120, 8))


def task_of(judged) -> Retrieval:
    names = [str(i) for i in range(120)]
    return Retrieval("made", names, names[: len(judged)], judged, names, names[: len(judged)])


def test_gains_are_those_of_the_ranking_of_all_documents():
    judged = [{int(i): float(1 + i % 3) for i in RNG.choice(120, 6, replace=False)} for _ in range(70)]
    task = task_of(judged)
    found = retrieval_gains(task, torch.tensor(QUERIES), DOCUMENTS, ("ndcg@10", "recall@10", "mrr"))
    scores = QUERIES @ DOCUMENTS.T / np.linalg.norm(DOCUMENTS, axis=1)
    grades = np.stack([task.grades(i) for i in range(70)])
    wanted = [ndcg_score(grades[i : i + 1], scores[i : i + 1], k=10) for i in range(70)]
    assert np.allclose(found["ndcg@10"], wanted, atol=1e-6)
    top = nearest(QUERIES, DOCUMENTS)
    assert np.allclose(found["recall@10"], [(grades[i, top[i]] > 0).sum() / 6 for i in range(70)])
    low, high = bootstrap_interval("mrr", np.ones(70), found["mrr"], n=200)
    assert low < 100 * found["mrr"].mean() < high


def test_equally_near_documents_gain_nothing():
    one = np.ones((1, 8))
    assert retrieval_gains(task_of([{0: 1.0}]), one, np.ones((120, 8)), ("mrr",))["mrr"] == [1 / 120]
    assert retrieval_gains(task_of([{0: 1.0}]), one, np.zeros((120, 8)), ("mrr",))["mrr"] == [1 / 120]


def test_the_nearest_come_first():
    found = nearest(DOCUMENTS[:70] * 3, DOCUMENTS, 4)
    assert found.shape == (70, 4) and found[:, 0].tolist() == [*range(70)], "length does not count"


def test_nearness_to_a_reference():
    assert np.allclose(cosines(QUERIES, 2 * QUERIES), 1)
    assert np.allclose(cosines(QUERIES, -torch.tensor(QUERIES)), -1)
    same = compare_embeddings(QUERIES, DOCUMENTS, QUERIES, DOCUMENTS)
    assert same == pytest.approx({"cosine": 1, "overlap": 1, "overlap_index": 1})
    turned = np.linalg.qr(RNG.normal(size=(8, 8)))[0]
    other = compare_embeddings(QUERIES @ turned, DOCUMENTS @ turned, QUERIES, DOCUMENTS)
    assert other["overlap"] == 1 and other["overlap_index"] < 0.5 and other["cosine"] < 0.5, "the order is its own"
    assert overlaps(np.array([[1, 2], [3, 4]]), np.array([[2, 1], [4, 5]])).tolist() == [1, 0.5]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="have the shape"):
        nearest(QUERIES[0], DOCUMENTS)
    with pytest.raises(ValueError, match="the same components"):
        nearest(QUERIES[:, :4], DOCUMENTS)
    with pytest.raises(ValueError, match="the same texts and components"):
        cosines(QUERIES, DOCUMENTS)
    with pytest.raises(ValueError, match="NaN or infinity"):
        nearest(QUERIES * np.nan, DOCUMENTS)
    with pytest.raises(ValueError, match="embeddings of 70 queries and 120 documents: expected 1 and 120"):
        retrieval_gains(task_of([{0: 1.0}]), QUERIES, DOCUMENTS)
    with pytest.raises(ValueError, match="rankings have the shapes"):
        overlaps(np.zeros((2, 3)), np.zeros((2, 4)))
