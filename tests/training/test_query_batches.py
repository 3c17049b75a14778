"""Batches hold whole queries, every row once, within their bounds."""

from __future__ import annotations

import random

import pytest
import torch

from thresher.training.batches import QueryBatches

DRAW = random.Random(0)
QUERIES = [q for q in range(40) for _ in range(DRAW.randint(1, 7))]
LENGTHS = [DRAW.randint(4, 60) for _ in QUERIES]


@pytest.mark.parametrize("tokens", [None, 500])
def test_every_row_comes_once_and_queries_stay_whole(tokens):
    batches = QueryBatches(QUERIES, LENGTHS, 8, tokens)
    found = [*batches]
    assert sorted(row for batch in found for row in batch) == [*range(len(QUERIES))]
    assert len(found) == len(batches) and max(map(len, found)) <= 8
    longest = [len(batch) * max(LENGTHS[row] for row in batch) for batch in found]
    assert tokens is None or max(longest) <= tokens
    of: dict[int, set[int]] = {}
    for i, batch in enumerate(found):
        for row in batch:
            of.setdefault(QUERIES[row], set()).add(i)
    assert all(len(places) == 1 for places in of.values())


def test_near_lengths_share_a_batch():
    padded = sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in QueryBatches(QUERIES, LENGTHS, 8))
    random.Random(1).shuffle(order := [*range(len(QUERIES))])
    chunks = [order[i : i + 8] for i in range(0, len(order), 8)]
    assert padded < 0.95 * sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in chunks)


def test_a_query_that_does_not_fit_is_cut_evenly():
    assert sorted(map(len, QueryBatches([0] * 10, [5] * 10, 4))) == [3, 3, 4]
    assert sorted(map(len, QueryBatches([0] * 4, [5, 5, 5, 90], 8, 40))) == [2, 2], "one row is over the budget"


@pytest.mark.parametrize("tokens", [2400, 600, 256, 100, 30])
def test_long_rows_do_not_leave_others_without_a_rival(tokens):
    """Six queries of eight candidates, one of which is over most budgets."""
    queries, lengths = [i // 8 for i in range(48)], [300 if i % 8 == 3 else 20 + i % 5 for i in range(48)]
    batches = [*QueryBatches(queries, lengths, 8, tokens)]
    assert sorted(row for batch in batches for row in batch) == [*range(48)]
    for batch in batches:
        for row in batch:
            assert sum(queries[other] == queries[row] for other in batch) > 1, "a loss of differences needs a rival"
        over = len(batch) * max(lengths[row] for row in batch) > tokens
        assert not over or len(batch) <= 3
    assert [*map(len, QueryBatches([0], [300], 8, tokens))] == [1]


def test_the_order_is_drawn_anew_and_can_be_drawn_again():
    batches = QueryBatches(QUERIES, LENGTHS, 8)
    torch.manual_seed(0)
    first, second = [*batches], [*batches]
    torch.manual_seed(0)
    assert [*batches] == first != second and sorted(first) == sorted(second)
    assert sorted(QueryBatches(QUERIES, LENGTHS, 8, seed=1)) != sorted(first)


@pytest.mark.parametrize("given", [([], [], 8), ([0], [5], 0), ([0], [5], 8, 0)])
def test_what_makes_no_batch_is_refused(given):
    with pytest.raises(ValueError, match="expected rows, and 1 or more in a batch"):
        QueryBatches(*given)
