"""A prediction depends on its own tokens alone: not on padding, its side, the batch, or the order of the rows."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from support.families import FAMILIES, difference
from support.methods import METHODS, REFUSES
from thresher import Threshold, TopK, dense, prune
from thresher.core.tokens import LAYOUTS

TOLERANCE = 1e-5
TEXT = ("bert", "distilbert", "deberta-v2", "modernbert", "llama")
# Families in which a row means the same wherever it stands in the tensor.
MOVABLE = ("bert", "distilbert", "roberta", "deberta-v2", "modernbert", "llama", "qwen2")
everywhere = pytest.mark.parametrize("layout", LAYOUTS)
of_text = pytest.mark.parametrize("family", TEXT)


@cache
def pruned(family: str, method: str, layout: str):
    if family in REFUSES.get(method, {}):
        pytest.skip(f"{method} refuses {family}, see test_equivalence")
    layout = layout if FAMILIES[family].packed or layout != "packed" else "padded"
    return prune(FAMILIES[family].build(), METHODS[method][1](), layout=layout)


def rows(family: str, model, batch: dict) -> list[dict]:
    """The answers row by row, each for its real tokens."""
    with torch.no_grad():
        answers = FAMILIES[family].answers(model, batch)
    lengths = batch["attention_mask"].sum(1).tolist()
    return [
        {k: v[i] if len(v) == len(lengths) else v.split(lengths)[i] for k, v in answers.items()}
        for i in range(len(lengths))
    ]


def same(a: list[dict], b: list[dict]) -> bool:
    return all(difference(x, y) <= TOLERANCE for x, y in zip(a, b, strict=True))


def pick(batch: dict, index) -> dict:
    return {k: v[index] for k, v in batch.items()}


@everywhere
@of_text
@pytest.mark.parametrize("method", METHODS)
def test_more_padding_changes_nothing(method, family, layout):
    model, source = pruned(family, method, layout), FAMILIES[family]
    assert same(rows(family, model, source.batch(width=24)), rows(family, model, source.batch(width=33)))


@everywhere
@of_text
@pytest.mark.parametrize("method", METHODS)
def test_the_batch_changes_nothing(method, family, layout):
    model, batch = pruned(family, method, layout), FAMILIES[family].batch()
    together = rows(family, model, batch)
    assert same(together, [rows(family, model, pick(batch, [i]))[0] for i in range(3)])
    assert same(together[:2], rows(family, model, pick(batch, [0, 1])))
    order = [2, 0, 1]
    assert same([together[i] for i in order], rows(family, model, pick(batch, order)))


@everywhere
@pytest.mark.parametrize("method", ["topk", "random", "ltp"])
@pytest.mark.parametrize("family", MOVABLE)
def test_left_padding_changes_nothing(family, method, layout):
    model, source = pruned(family, method, layout), FAMILIES[family]
    right, left = source.batch(width=27), source.batch(width=27, side="left")
    if family in ("bert", "roberta", "distilbert", "llama"):  # elsewhere positions are relative, or cannot be given
        for batch in (right, left):
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)

    def states(batch):
        return [{"states": row["states"]} for row in rows(family, model, batch)]

    with dense(model):
        assert same(states(right), states(left)), "the dense model itself depends on the side"
    assert same(states(right), states(left))


@everywhere
@of_text
def test_a_row_of_one_token_passes(family, layout):
    model, batch = pruned(family, "topk", layout), FAMILIES[family].batch((7, 1, 4))
    with dense(model):
        expected = rows(family, model, batch)[1]
    assert difference(rows(family, model, batch)[1], expected) <= TOLERANCE
    assert same(rows(family, model, pick(batch, [1])), [expected])


@everywhere
@of_text
@pytest.mark.parametrize("method", ["topk", "threshold"])
def test_a_row_of_padding_alone_is_a_row_of_one_token(method, family, layout):
    """Servers and data loaders fill batches with such rows: they cost one token and change no other row."""
    model, batch = pruned(family, method, layout), FAMILIES[family].batch((7, 5, 9))
    full = FAMILIES[family].run(model, batch)
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][1] = 0
    one = {name: values.clone() for name, values in batch.items()}
    one["attention_mask"][1, 0] = 1
    with torch.no_grad():
        found = FAMILIES[family].run(model, batch)
        assert [count.n_attention[1].item() for count in model.token_pruner.record.counts] == [1] * 4
        torch.testing.assert_close(found, FAMILIES[family].run(model, one), atol=0, rtol=0)
    torch.testing.assert_close(found[0, :1], full[0, :1], atol=TOLERANCE, rtol=0)  # its neighbours notice nothing
    assert batch["attention_mask"][1].sum() == 0, "the caller's mask is as it was"


@everywhere
@pytest.mark.parametrize("family", ["bert", "deberta-v2", "llama"])
def test_inputs_without_special_tokens(family, layout):
    layout = layout if FAMILIES[family].packed else "padded"
    source = FAMILIES[family]
    for method in (lambda: TopK(keep=1, protect=()), lambda: Threshold(50.0, protect=())):
        model = prune(source.build(), method(), layout=layout)
        found = source.answers(model, source.batch())
        assert model.token_pruner.report[-1]["tokens_kept"] == 3, "one token of each row is left"
        reference = source.answers(prune(source.build(), method(), layout="mask"), source.batch())
        assert difference(found, reference) <= TOLERANCE


@everywhere
@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
def test_embeddings_in_place_of_ids(family, layout):
    model, batch = pruned(family, "topk", layout), FAMILIES[family].batch()
    expected = rows(family, model, batch)
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]),
        "attention_mask": batch["attention_mask"],
    }
    assert same(rows(family, model, embedded), expected)


@everywhere
@of_text
def test_padding_never_reaches_a_score(family, layout):
    model, source = pruned(family, "threshold", layout), FAMILIES[family]
    scores = []
    for width in (24, 40):
        rows(family, model, source.batch(width=width))
        scores.append([view.score[view.alive] for view in model.token_pruner.record.sites])
    for narrow, wide in zip(*scores, strict=True):
        torch.testing.assert_close(narrow, wide, atol=TOLERANCE, rtol=0)
