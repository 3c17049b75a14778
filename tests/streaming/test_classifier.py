"""A classifier of texts in pieces: nothing lost is the whole text, and memory and work are bounded."""

from __future__ import annotations

import pytest
import torch

from support.tiny import tiny_model, tiny_tokenizer
from thresher import LTP, Entropy, Threshold, ToMe, TopK, dense, prune, unprune
from thresher.core.view import departures
from thresher.streaming import Stream

TEXT = "the farmer and the grain of wheat , chaff & script threshing grains the"
WORDS = TEXT.split()
PIECES = [" ".join(WORDS[i : i + 3]) for i in range(0, len(WORDS), 3)]


def stream_of(method=None, memory: int = 8, **options) -> Stream:
    return Stream(tiny_model(method or TopK(keep=0.5, at=(0, 1)), num_labels=3), tiny_tokenizer(), memory, **options)


def asked(stream: Stream, text: str) -> torch.Tensor:
    with torch.no_grad():
        return stream.model(**stream.tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)


@pytest.mark.parametrize("layout", ("mask", "padded", "packed"))
@pytest.mark.parametrize("method", (TopK(keep=0.5, at=(0, 1)), Threshold(0.9), Entropy(keep=0.6)), ids=lambda m: m.name)
def test_where_all_is_remembered_each_answer_is_that_of_the_whole_text(method, layout):
    import copy

    stream = Stream(tiny_model(copy.deepcopy(method), layout=layout, num_labels=3), tiny_tokenizer(), memory=100)
    for i, piece in enumerate(PIECES):
        answer = stream(piece)
        whole = asked(stream, " ".join(PIECES[: i + 1]))
        assert torch.tensor(answer.probabilities) == pytest.approx(whole, abs=1e-5)
        assert answer.label == stream.model.config.id2label[int(whole.argmax())]
        assert answer.read == answer.held == len(stream.tokenizer(" ".join(PIECES[: i + 1]))["input_ids"]) - 2


def test_the_memory_holds_those_that_stayed_longest_in_their_order():
    stream = stream_of(memory=4)
    text = " ".join(WORDS)
    stream(text)
    ids = stream.tokenizer(text)["input_ids"]
    asked(stream, text)
    left = list(zip(*departures(stream.pruner.record.sites, len(ids)), range(len(ids)), strict=True))[1:-1]
    stayed = [i for layer, _, i in left if layer is None]
    later = sorted(((layer, score, i) for layer, score, i in left if layer is not None), reverse=True)
    expected = sorted([*stayed, *(i for _, _, i in later)][:4]) if len(stayed) < 4 else None
    assert expected is None or stream.held == [ids[i] for i in expected]
    best = sorted((score, i) for layer, score, i in left if layer is None)[-4:]
    assert expected is not None or stream.held == [ids[i] for i in sorted(i for _, i in best)]


def test_the_next_answer_is_that_of_the_memory_and_the_piece():
    stream = stream_of(memory=5)
    stream(PIECES[0] + " " + PIECES[1])
    held = list(stream.held)
    new = stream.tokenizer(PIECES[2], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = stream.model(input_ids=torch.tensor([[*stream.before, *held, *new, *stream.behind]])).logits[0]
    assert torch.tensor(stream(PIECES[2]).probabilities) == pytest.approx(logits.softmax(-1), abs=1e-6)


def test_without_a_memory_each_piece_stands_alone():
    stream = stream_of(memory=0)
    for piece in PIECES:
        assert torch.tensor(stream(piece).probabilities) == pytest.approx(asked(stream, piece), abs=1e-6)
        assert stream.held == []


def test_work_and_memory_do_not_grow():
    stream = stream_of(memory=16)
    answers = [stream(PIECES[i % 4]) for i in range(200)]
    assert {answer.held for answer in answers[20:]} == {16}
    assert max(answer.macs for answer in answers[20:]) == max(answer.macs for answer in answers[100:])
    assert answers[-1].read == sum(len(stream.tokenizer(PIECES[i % 4])["input_ids"]) - 2 for i in range(200))


def test_a_piece_that_is_too_long_is_read_in_parts():
    stream, by_hand = stream_of(memory=8, longest=20), stream_of(memory=8, longest=20)
    by_hand.model.load_state_dict(stream.model.state_dict())
    assert stream.room == 10
    words = ["the", "and", "chaff", "wheat", "grain", "farmer", "script"] * 5
    whole = stream(" ".join(words))
    parts = [by_hand(" ".join(words[i : i + 10])) for i in range(0, len(words), 10)]
    assert whole.probabilities == pytest.approx(parts[-1].probabilities, abs=1e-6)
    assert whole.macs == sum(part.macs for part in parts) and stream.held == by_hand.held


def test_an_answer_that_is_sure_is_final_until_the_next_text():
    stream = stream_of()
    margins = [stream(piece).margin for piece in PIECES]
    stream.sure = sorted(margins)[-2]
    stream.reset()
    answers = [stream(piece) for piece in PIECES]
    first = next(i for i, margin in enumerate(margins) if margin >= stream.sure)
    assert [answer.final for answer in answers] == [i >= first for i in range(len(PIECES))]
    assert all(answer.probabilities == answers[first].probabilities for answer in answers[first:])
    assert all(answer.macs == 0 and answer.read == answers[first].read for answer in answers[first + 1 :])
    stream.reset()
    assert not stream(PIECES[0]).final or first == 0


def test_a_piece_without_tokens_repeats_the_answer():
    stream = stream_of()
    with pytest.raises(ValueError, match="first piece has no tokens"):
        stream("  ")
    before = stream(PIECES[0])
    again = stream(" ")
    assert (again.probabilities, again.read, again.macs) == (before.probabilities, before.read, 0.0)


def test_streams_of_one_model_do_not_meet():
    one = stream_of()
    other = Stream(one.model, one.tokenizer, 8)
    alone = [Stream(one.model, one.tokenizer, 8) for _ in range(2)]
    expected = [
        [stream(piece) for piece in pieces] for stream, pieces in zip(alone, (PIECES, PIECES[::-1]), strict=True)
    ]
    mixed = [(one(a), other(b)) for a, b in zip(PIECES, PIECES[::-1], strict=True)]
    assert [list(column) for column in zip(*mixed, strict=True)] == expected


@pytest.mark.parametrize(
    ("method", "labels", "options", "message"),
    [
        (None, 3, {}, "is dense"),
        (ToMe(r=0.2), 3, {}, "merges tokens"),
        (LTP(fuse=True), 3, {}, "merges tokens"),
        (TopK(keep=0.5), 1, {}, "does not choose between classes"),
        (TopK(keep=0.5), 3, {"memory": 126}, "leaves 0 of 128 tokens"),
        (TopK(keep=0.5), 3, {"memory": -1}, "memory=-1"),
        (TopK(keep=0.5), 3, {"sure": 1.5, "memory": 8}, "sure=1.5"),
    ],
)
def test_what_cannot_stream_is_refused(method, labels, options, message):
    with pytest.raises(ValueError, match=message):
        Stream(tiny_model(method, num_labels=labels), tiny_tokenizer(), **options)


def test_the_model_bounds_what_a_tokenizer_does_not():
    stream = stream_of()
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 10**30
    free = Stream(stream.model, tokenizer, 8)
    assert free.longest == stream.model.config.max_position_embeddings
    assert free(" ".join(WORDS * 100)).read == len(tokenizer(" ".join(WORDS * 100))["input_ids"]) - 2


def test_a_model_that_is_no_longer_pruned_is_refused():
    """The record of another forward would rank the tokens of this one."""
    stream = stream_of(TopK(keep=0.5))
    stream("the farmer and the grain")
    with dense(stream.model), pytest.raises(ValueError, match="nothing was pruned, so nothing says what is remembered"):
        stream("the wheat")
    prune(unprune(stream.model), TopK(keep=0.3))
    with pytest.raises(ValueError, match="dense or pruned otherwise since this Stream was made: make another one"):
        stream("the wheat")


def test_a_model_that_is_trained_meanwhile_answers_the_same():
    stream, other = stream_of(TopK(keep=0.5)), stream_of(TopK(keep=0.5))
    other.model.train()
    assert stream("the farmer and the grain") == other("the farmer and the grain") and other.model.training


def test_a_piece_is_a_string():
    with pytest.raises(TypeError, match="got list"):
        stream_of()(["the"])
