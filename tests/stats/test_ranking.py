"""What each query gains: against scikit-learn, by hand, and on ties and ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, ndcg_score

from thresher.stats.bootstrap import bootstrap_interval
from thresher.stats.ranking import gain, is_ranking, query_gains


def drawn(grades: int):
    """(queries, scores, labels) of 30 queries with 15 candidates, which need not be neighbours."""
    rng = np.random.default_rng(0)
    queries, scores = np.repeat(rng.permutation(30), 15), rng.normal(size=450)
    labels = rng.integers(grades, size=450)
    labels[::15], labels[1::15] = 0, 1
    order = rng.permutation(450)
    return queries[order], scores[order], labels[order]


def test_average_precision_is_that_of_scikit_learn():
    queries, scores, labels = drawn(2)
    found = query_gains(np.stack([-scores, scores], 1), queries, labels, "map")
    wanted = [average_precision_score(labels[queries == q], scores[queries == q]) for q in range(30)]
    assert np.allclose(found, wanted, atol=1e-12)
    for one in (scores[:, None], scores):
        assert np.allclose(query_gains(one, queries, labels, "map"), wanted, atol=1e-12), "one logit is a score"


@pytest.mark.parametrize("cut", [None, 1, 3, 10])
def test_ndcg_is_that_of_scikit_learn(cut):
    queries, scores, labels = drawn(5)
    found = query_gains(scores, queries, labels, "ndcg" if cut is None else f"ndcg@{cut}")
    own = [queries == q for q in range(30)]
    assert np.allclose(found, [ndcg_score(labels[None, o], scores[None, o], k=cut) for o in own], atol=1e-12)


def test_reciprocal_rank_is_of_the_first_relevant_candidate():
    data = [[3.0], [2.0], [1.0], [5.0], [4.0]], [0, 0, 0, 1, 1], [0, 1, 1, 1, 0]
    assert query_gains(*data, "mrr").tolist() == [0.5, 1.0]
    assert query_gains(*data, "map").tolist() == [(1 / 2 + 2 / 3) / 2, 1.0]
    assert query_gains(*data, "mrr@1").tolist() == [0.0, 1.0]


def test_recall_counts_what_is_relevant_beyond_the_cut():
    data = [5.0, 4.0, 3.0, 2.0], [7, 7, 7, 7], [2, 0, 1, 4]
    assert [query_gains(*data, f"recall@{k}")[0] for k in (1, 2, 3, 4)] == [1 / 3, 1 / 3, 2 / 3, 1]
    assert query_gains(*data, "recall").tolist() == [1]


def test_a_ranking_may_end_before_all_that_is_judged():
    ranked, judged = np.array([0.0, 2.0]), np.array([2.0, 1.0, 3.0, 0.0, -1.0])
    best = 3 + 2 / math.log2(3) + 1 / 2
    assert gain(ranked, judged, "ndcg@10") == pytest.approx(2 / math.log2(3) / best)
    assert gain(ranked, judged, "recall@10") == pytest.approx(1 / 3)
    assert gain(ranked, judged, "map") == pytest.approx(1 / 2 / 3)
    assert gain(ranked[:1], judged, "mrr") == 0


def test_equal_scores_gain_nothing_by_the_order_of_the_data():
    for labels in ([2, 1, 0], [0, 1, 2], [1, 0, 2]):
        data = np.zeros((3, 2)), [0, 0, 0], labels
        assert query_gains(*data, "mrr").tolist() == [1 / 2]
        assert query_gains(*data, "recall@1").tolist() == [0]
        least = (1 / math.log2(3) + 2 / 2) / (2 + 1 / math.log2(3))
        assert query_gains(*data, "ndcg").tolist() == pytest.approx([least])


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        query_gains([[0.0], [np.nan], [0.0]], [0, 0, 0], [0, 1, 0], "mrr")
    with pytest.raises(ValueError, match="no relevant candidate"):
        query_gains([1.0, 2.0], [0, 1], [0, 1], "map")
    with pytest.raises(ValueError, match="'ndcg@0' is no metric of an order"):
        query_gains([1.0], [0], [1], "ndcg@0")
    named = {name: is_ranking(name) for name in ("map", "ndcg@10", "recall@100", "accuracy", "ndcg@", "xmap", None)}
    assert [name for name in named if named[name]] == ["map", "ndcg@10", "recall@100"]


def test_intervals_work_over_queries():
    queries, scores, labels = drawn(3)
    good, bad = (query_gains(s, queries, labels, "ndcg@10") for s in (scores + labels, scores))
    low, high = bootstrap_interval("ndcg@10", np.ones(30), good, bad, n=400)
    assert 0 < low < 100 * (good - bad).mean() < high
