"""Batches by a budget of padded tokens: every text once, none over the budget, none starved, little padding."""

from __future__ import annotations

import doctest
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.serving import batching
from thresher.serving.batching import CALL, PADDING, Batcher, batches

LENGTHS = st.lists(st.integers(1, 600), max_size=200)


def padded(lengths, batch) -> int:
    return max(lengths[i] for i in batch) * len(batch)


@given(LENGTHS, st.integers(1, 5000), st.integers(1, 40), st.integers(1, 60))
def test_every_text_once_and_no_batch_over_the_budget(lengths, budget, rows, window):
    made = list(batches(lengths, budget, rows, window))
    assert sorted(itertools.chain(*made)) == list(range(len(lengths)))
    for batch in made:
        needed = sum(lengths[i] for i in batch)
        assert len(batch) == 1 or (padded(lengths, batch) <= budget and len(batch) <= rows)
        assert padded(lengths, batch) - needed <= max(CALL, PADDING * needed)
        assert [lengths[i] for i in batch] == sorted(lengths[i] for i in batch)


@given(LENGTHS, st.integers(1, 5000), st.randoms(use_true_random=False))
def test_the_oldest_text_is_in_the_next_batch(lengths, budget, random):
    waiting, here, number = Batcher(budget), [], 0
    while number < len(lengths) or here:
        if number < len(lengths) and (not here or random.random() < 0.7):
            waiting.add(number, lengths[number])
            here.append(number)
            number += 1
        else:
            batch = waiting.take()
            assert here[0] in batch and {*batch} <= {*here}
            here = [i for i in here if i not in batch]
        assert len(waiting) == len(here)


@given(LENGTHS.filter(len), st.integers(1, 50))
def test_a_stream_is_read_as_far_as_the_window_goes(lengths, window):
    read = []
    made = batches((read.append(n) or n for n in lengths), 2000, 64, window)
    out = 0
    for batch in made:
        assert len(read) - out <= window
        out += len(batch)


def test_a_text_over_the_budget_is_alone_and_nobody_waits_for_it():
    assert list(batches([10, 500, 10], budget=100)) == [[0, 2], [1]]
    assert list(batches([500, 10, 500], budget=100)) == [[0], [1], [2]]
    assert list(batches([])) == []


def test_a_long_text_does_not_pad_short_ones():
    made = list(batches([512] + [10] * 20, budget=16384))
    assert sorted(map(len, made)) == [1, 20]


@pytest.mark.parametrize(("budget", "most"), [(4096, 1.006), (8192, 1.01), (16384, 1.015)])
def test_padding_of_long_documents_is_small(budget, most):
    draw = np.random.default_rng(0)  # lengths as those of 20 Newsgroups: mean 339, a third of them cut at 512
    lengths = np.clip(draw.lognormal(5.75, 0.75, 7532), 12, 512).astype(int).tolist()
    made = list(batches(lengths, budget))
    assert sum(padded(lengths, batch) for batch in made) / sum(lengths) <= most
    needed = sum(lengths) / budget
    assert len(made) <= 1.05 * needed + 5


def test_padding_of_short_texts_is_small():
    lengths = np.clip(np.random.default_rng(0).lognormal(3.3, 0.9, 20000), 3, 512).astype(int).tolist()
    made = list(batches(lengths, 4096))  # sorted within windows of 4,096 and cut it would be 1.05
    assert sum(padded(lengths, batch) for batch in made) / sum(lengths) <= 1.035


def test_impossible_budgets_are_refused():
    with pytest.raises(ValueError, match="budget of 0 tokens"):
        Batcher(0)
    with pytest.raises(ValueError, match="window=0"):
        next(batches([1], window=0))
    with pytest.raises(IndexError, match="no text waits"):
        Batcher().take()


def test_the_example_holds():
    assert doctest.testmod(batching).failed == 0
