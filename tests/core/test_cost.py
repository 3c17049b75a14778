"""MACs are those of the tokens that were there, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from support.families import FAMILIES
from thresher import LTP, FirstK, TopK, dense, prune
from thresher.core.cost import LayerCost, LayerCount, dense_macs, macs
from thresher.core.layouts import LAYOUTS

C, INNER = 32, 64  # of the tiny models


def by_hand(n: int, n_ffn: int, scored: bool) -> int:
    """4nC^2 + 2nCI + 2n^2C of one layer, its FFN at the tokens that passed, and n^2C for a score."""
    return 4 * n * C * C + 2 * n * n * C + 2 * n_ffn * C * INNER + scored * n * n * C


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bert_is_counted_as_by_hand(layout):
    """Tokens leave between attention and FFN; sites 1 and 2."""
    model = prune(FAMILIES["bert"].build(), TopK(keep=0.5, at=(1, 2)), layout=layout)
    FAMILIES["bert"].run(model, FAMILIES["bert"].batch((12, 7), width=20))
    expected = [
        by_hand(12, 12, False) + by_hand(7, 7, False),
        by_hand(12, 6, True) + by_hand(7, 4, True),
        by_hand(6, 3, True) + by_hand(4, 2, True),
        by_hand(3, 3, False) + by_hand(2, 2, False),
    ]
    report = model.token_pruner.report
    assert [row["macs"] for row in report] == expected
    assert [(row["tokens_in"], row["tokens_kept"]) for row in report] == [(19, 19), (19, 10), (10, 5), (5, 5)]
    assert [row["dense_macs"] for row in report] == [by_hand(12, 12, False) + by_hand(7, 7, False)] * 4
    record = model.token_pruner.record
    assert record.used == sum(expected) and record.dense == sum(row["dense_macs"] for row in report)
    assert record.flops_fraction() == pytest.approx(sum(expected) / record.dense.item())


def test_where_tokens_leave_after_the_layer_its_ffn_is_whole():
    model = prune(FAMILIES["distilbert"].build(), FirstK(keep=0.5, at=(1,)))
    FAMILIES["distilbert"].run(model, FAMILIES["distilbert"].batch((12,)))
    report = model.token_pruner.report
    assert [row["macs"] for row in report] == [by_hand(12, 12, False)] * 2 + [by_hand(6, 6, False)] * 2
    assert [row["tokens_kept"] for row in report] == [12, 6, 6, 6]


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_the_sizes_of_the_linear_maps(family):
    """Every multiplication that a hook on the linear maps sees, in the dense model without padding."""
    source = FAMILIES[family]
    model = prune(source.build(), TopK(keep=0.5))
    stack, seen = model.token_pruner.hooks.stack, []

    def note(module, args):
        seen.append((module.weight.numel(), args[0].shape[:-1].numel()))

    for module in {m for layer in stack.layers for m in layer.modules() if isinstance(m, nn.Linear)}:
        module.register_forward_pre_hook(note)
    with torch.no_grad(), dense(model, unpadded=True):
        source.run(model, source.batch((11,)))
    (tokens,) = model.token_pruner.record.counts[0].n_attention.tolist()
    linear = sum(size * rows for size, rows in seen if rows == tokens)  # DeBERTa projects relative positions besides
    assert linear + stack.depth * 2 * tokens**2 * C == model.token_pruner.record.dense


def test_a_soft_stage_counts_expected_tokens():
    method = LTP(target_flops=0.5, init=1.6, straight_through=False, min_keep=1)
    model = prune(FAMILIES["bert"].build(), method).train()
    method.progress = 0.0
    FAMILIES["bert"].run(model, FAMILIES["bert"].batch((12, 7)))
    first, second = method.record.counts[:2]
    gates = method.record.views[0].tokens.live, method.record.views[1].tokens.live
    assert torch.equal(first.n_attention, gates[0]) and torch.equal(first.n_ffn, gates[1])
    assert torch.equal(second.n_attention, gates[1]) and (gates[1] < gates[0]).all()
    assert method.record.flops_fraction().requires_grad


def test_numbers_and_tensors_alike():
    cost = LayerCost(attention=4 * C * C, ffn=2 * C * INNER, width=C)
    assert cost.macs(12, 6, True) == by_hand(12, 6, True)
    n = torch.tensor([12.0, 7.0])
    assert dense_macs([cost] * 2, n).tolist() == [2 * by_hand(12, 12, False), 2 * by_hand(7, 7, False)]
    assert macs([cost], [LayerCount(n, n, False)]).tolist() == [by_hand(12, 12, False), by_hand(7, 7, False)]
    with pytest.raises(ValueError):
        macs([cost, cost], [LayerCount(n, n)])
