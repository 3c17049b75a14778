"""The price of a layer as a graph: what four graphs say of it, and where they are made."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertForQuestionAnswering, BertModel

from support.families import FAMILIES
from support.tiny import tiny_model
from thresher import TopK, prune
from thresher.core.architecture import find_architecture
from thresher.data.embedder import Embedder, Projection
from thresher.evaluation import latency as eager
from thresher.evaluation.latency import GRID
from thresher.exporting import latency
from thresher.exporting.latency import graph_latency_table, graph_times

NAMES = ("attention", "scored", "ffn", "rest", "dense")
ATTENTION, FFN, SCORED, REST = 3e-3, 5e-3, 4e-3, 0.7  # ms: of a token, of a token, of a token, of a text
STACK = find_architecture(tiny_model(num_hidden_layers=6))


class Served:
    """A graph that takes as long as its layers say: tokens leave before the FFN of a layer."""

    def __init__(self, depth: int, sites: dict[int, float | int]):
        self.depth, self.sites, self.spec = depth, sites, {"max_length": 512}

    def ms(self, n: int) -> float:
        total = REST
        for layer in range(self.depth):
            keep = self.sites.get(layer, 1.0)
            left = n if layer not in self.sites else 2 if isinstance(keep, int) else keep * n
            total += (SCORED if layer in self.sites else ATTENTION) * n + FFN * left
            n = left
        return total


@pytest.fixture
def clock(monkeypatch):
    """Times follow from the layers, so that what is told of these is known."""

    def fastest(graphs, batch, repeats):
        count, n = batch["input_ids"].shape
        return {name: count * graph.ms(n) for name, graph in graphs.items()}

    monkeypatch.setattr(latency, "_fastest", fastest)


@pytest.mark.parametrize("batch", [1, 8])
def test_four_graphs_tell_the_price_of_each_part(clock, batch):
    everywhere = dict.fromkeys(range(6), latency.NEARLY)
    graphs = {
        "dense": Served(6, {}),
        "short": Served(1, {}),
        "sites": Served(6, everywhere),
        "first": Served(6, {0: 1}),
    }
    table = latency._priced(graphs, batch, 3, STACK)
    for name, per_token in {"attention": ATTENTION, "scored": SCORED, "ffn": FFN}.items():
        tokens, times = getattr(table, name)
        assert tokens == GRID
        for n, ms in list(zip(tokens, times, strict=True))[2:]:
            assert ms == pytest.approx(per_token * n, rel=0.06), name
    assert table.rest[1] == pytest.approx([REST] * len(GRID), rel=1e-6)
    assert table.dense[1] == pytest.approx([REST + 6 * (ATTENTION + FFN) * n for n in GRID])
    assert (table.batch_size, table.threads) == (batch, torch.get_num_threads())


def test_a_graph_is_priced_once_and_the_model_is_left_alone(tmp_path, monkeypatch):
    model = tiny_model(num_hidden_layers=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = graph_latency_table(model, "onnx", repeats=1, cache=tmp_path)
    for name in NAMES:
        tokens, times = getattr(table, name)
        assert min(times) > 0 and list(times) == sorted(times) and tokens[0] == GRID[0]
    assert len(model.bert.encoder.layer) == 3 and not hasattr(model, "token_pruner")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(latency, "_four", lambda *a: pytest.fail("measured again"))
    assert graph_latency_table(model, "onnx", repeats=1, cache=tmp_path) == table
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        graph_latency_table(model, "onnx", batch_size=2, repeats=1, cache=tmp_path)


def models_that_take_other_times() -> dict[str, torch.nn.Module]:
    """Of the same layers in MACs."""
    base = BertModel(tiny_model().config, add_pooling_layer=False)
    return {
        "classifier": tiny_model(),
        "questions": BertForQuestionAnswering(tiny_model().config),
        "short": tiny_model(max_position_embeddings=64),
        "heads": tiny_model(num_attention_heads=2),
        "relu": tiny_model(hidden_act="relu"),
        "words": tiny_model(vocab_size=200),
        "labels": tiny_model(num_labels=9),
        "mean": Embedder(base),
        "cut": Embedder(base, longest=16),
        "dense": Embedder(base, projections=[Projection(32, 8)]),
        "residual": Embedder(base, projections=[Projection(32, 8, residual=True)]),
    }


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_each_model_has_a_table_of_its_own(kind, monkeypatch):
    keys: list[str] = []
    for module in (latency, eager):
        monkeypatch.setattr(module, "remembered", lambda kind, about, *_: keys.append(json.dumps(about)))
    models = models_that_take_other_times()
    for model in models.values():
        eager.latency_table(model) if kind == "torch" else graph_latency_table(model, kind)
    assert len({*keys}) == len(models)
    again = prune(tiny_model(), TopK(keep=0.5))
    eager.latency_table(again) if kind == "torch" else graph_latency_table(again, kind)
    assert keys[-1] == keys[0], "pruning is no part of it"
    assert torch.__version__ in keys[0]


def test_two_models_are_timed_as_graphs(tmp_path):
    model = prune(tiny_model(num_hidden_layers=3), TopK(keep=0.5, at=(1,)))
    batch = {"input_ids": torch.randint(5, 90, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    took = graph_times({"dense": tiny_model(num_hidden_layers=3), "pruned": model}, [batch], format="onnx")
    assert {*took} == {"dense", "pruned"} and min(took.values()) > 0


def test_layers_that_are_shared_have_no_price(tmp_path):
    with pytest.raises(ValueError, match="has one layer, or shares it"):
        graph_latency_table(FAMILIES["albert"].build(), "onnx", cache=tmp_path)
