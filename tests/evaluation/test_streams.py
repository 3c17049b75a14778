"""Answers to texts in pieces: what they are worth, and when they may be believed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from support.tiny import tiny_model, tiny_tokenizer
from thresher import TopK
from thresher.evaluation.streams import pieces_of, read_all, streamed, sure_margin
from thresher.stats.bounds import upper
from thresher.streaming import Stream


@dataclass
class Said:
    label: str
    margin: float = 0.0
    read: int = 10
    macs: float = 5.0


def test_a_text_is_cut_between_words():
    assert pieces_of("a b  c\nd e", 2) == ["a b", "c d", "e"]


def test_a_stream_reads_each_text_from_its_beginning():
    stream = Stream(tiny_model(TopK(keep=0.5), num_labels=2), tiny_tokenizer(), memory=8)
    texts = ["the farmer and the grain", "chaff and wheat and grain and script"]
    both, alone = read_all(stream, texts, 2), read_all(stream, texts[1:], 2)
    assert both[1] == alone[0] and [len(run) for run in both] == [3, 4]
    with pytest.raises(ValueError, match="text 1 has no words"):
        read_all(stream, ["the", " "], 2)


def test_measures_by_hand():
    runs = [[Said("x", read=4), Said("y", read=8), Said("x", read=12), Said("y", read=16)], [Said("y", read=4)]]
    measures = streamed(runs, ["y", "y"])
    assert measures["accuracy_quarter"] == 50 and measures["accuracy_half"] == measures["accuracy_end"] == 100
    assert measures["flips"] == 1.5 and measures["macs_per_token"] == 25 / 20


def test_a_margin_is_the_lowest_whose_errors_are_few_enough():
    right = [[Said("x", margin), Said("x", 0.999)] for margin in np.linspace(0.0, 0.98, 300)]
    wrong = [[Said("y", margin), Said("x", 0.999)] for margin in (0.30, 0.31, 0.32)]
    runs = right + wrong
    margin = sure_margin(runs, 0.02)
    assert margin == 0.32 and upper(1, len(runs)) <= 0.02 < upper(2, len(runs))
    assert sure_margin(right, 0.02) == 0.01 and sure_margin(runs[:20], 0.02) is None


def test_texts_of_the_kind_keep_the_promise():
    """Over many draws: the error of a margin that 400 texts chose is above the limit in no more than 5 % of them."""
    random, above = np.random.default_rng(0), 0
    for _ in range(60):
        margins = random.uniform(0, 1, 400)
        flips = random.uniform(0, 1, 400) > margins  # an answer of margin m is the last one with probability m
        runs = [[Said("y" if flip else "x", m), Said("x", 1.0)] for m, flip in zip(margins, flips, strict=True)]
        margin = sure_margin(runs, 0.05)
        error = 0 if margin is None else (1 - margin) ** 2 / 2  # the integral of 1 - m above it
        above += error > 0.05
    assert above <= 6


@pytest.mark.parametrize(("runs", "limit"), [([], 0.1), ([[Said("x")]], 0.0), ([[Said("x")]], 1.0)])
def test_nothing_to_calibrate_on_is_refused(runs, limit):
    with pytest.raises(ValueError, match="expected texts"):
        sure_margin(runs, limit)
