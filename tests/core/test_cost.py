"""MACs are those of the tokens that were there, counted by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from support.families import FAMILIES
from thresher import ATS, LTP, EViT, FirstK, TopK, dense, prune
from thresher.core.architecture import layer_cost
from thresher.core.cost import LatencyTable, LayerCost, LayerCount, between, dense_macs, macs, tokens_by_layer
from thresher.core.tokens import LAYOUTS
from thresher.methods.parts.selection import kept_count

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
    stack, seen = model.token_pruner.hooks.architecture, []

    def note(module, args):
        seen.append((module.weight.numel(), args[0].shape[:-1].numel()))

    for module in {m for layer in stack.layers for m in layer.modules() if isinstance(m, (nn.Linear, Conv1D))}:
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
    gates = method.record.sites[0].tokens.live, method.record.sites[1].tokens.live
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


@pytest.mark.parametrize("inside", [True, False])
def test_tokens_are_counted_layer_by_layer(inside):
    tokens = torch.tensor([12, 7])
    after = {1: lambda n: (n + 1) // 2, 2: lambda n: n.clamp(max=2)}
    counts = tokens_by_layer(tokens, after, range(4), inside=inside, unscored=(2,))
    assert [c.n_attention.tolist() for c in counts] == [[12, 7], [12, 7], [6, 4], [2, 2]]
    passed = [[12, 7], [6, 4], [2, 2], [2, 2]] if inside else [[12, 7], [12, 7], [6, 4], [2, 2]]
    assert [c.n_ffn.tolist() for c in counts] == passed
    assert [c.scored for c in counts] == [False, True, False, False]
    assert tokens_by_layer(tokens, {}, range(0), inside=inside) == []
    part = tokens_by_layer(tokens, after, range(2, 4), inside=inside)  # of the layers that are counted alone
    assert [c.n_attention.tolist() for c in part] == [[12, 7], [2, 2]] and part[0].scored


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_schedule_is_counted_as_it_runs(family):
    """The counts of a forward, of the same tokens without a model."""
    model = prune(FAMILIES[family].build(), TopK(keep=0.5, at=(1, 2)))
    FAMILIES[family].run(model, FAMILIES[family].batch((12, 7), width=20))
    pruner, half = model.token_pruner, lambda n: kept_count(0.5, n)
    info, record = pruner.architecture, pruner.record
    counts = tokens_by_layer(
        torch.tensor([12, 7]), dict.fromkeys(pruner.sites, half), range(info.depth), inside=info.drops_inside
    )
    assert torch.equal(macs(record.costs, counts), macs(record.costs, record.counts))


def test_between_interpolates_and_continues_at_the_ends():
    x = torch.tensor([10.0, 15.0, 30.0, 50.0, 5.0, -90.0], requires_grad=True)
    found = between(x, ((10.0, 20.0, 40.0), (1.0, 2.0, 8.0)))
    torch.testing.assert_close(found, torch.tensor([1.0, 1.5, 5.0, 11.0, 0.5, 0.0]))
    found.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.1, 0.1, 0.3, 0.3, 0.1, 0.0]))


def test_a_table_prices_counts_in_time():
    one, two, four = (((1.0, 9.0), (ms, 9 * ms)) for ms in (1.0, 2.0, 4.0))
    fixed = ((1.0, 9.0), (0.5, 0.5))
    table = LatencyTable(attention=one, scored=two, ffn=four, rest=fixed, dense=four, batch_size=1, threads=1)
    n = torch.tensor([8.0, 4.0])
    counts = [LayerCount(n, n), LayerCount(n, n / 2, scored=True)]
    assert table.time(counts).tolist() == [8 + 32 + 16 + 16, 4 + 16 + 8 + 8]
    assert table.fixed(n).tolist() == [0.5, 0.5]


def test_layers_of_several_widths_are_refused():
    """As Hiera's, whose configuration lists the heads of each stage."""
    layer = FAMILIES["llama"].build().model.layers[0]
    with pytest.raises(ValueError, match="SimpleNamespace names no single number of attention heads"):
        layer_cost(layer, "self_attn", SimpleNamespace(hidden_size=32, num_heads=[1, 2]))


@pytest.mark.parametrize("layout", ["mask", "padded", "packed"])
@pytest.mark.parametrize("kind", [EViT, ATS])
def test_one_row_of_the_attention_is_charged(kind, layout):
    bert = FAMILIES["bert"]
    model = prune(bert.build(), kind(keep=1.0, at=(1,)), layout=layout)
    with torch.no_grad():
        bert.run(model, bert.batch())
    record = model.token_pruner.last_record()
    tokens = record.counts[0].n_attention
    assert record.used - record.dense == (tokens * record.costs[1].width).sum()
