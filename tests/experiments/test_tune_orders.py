"""A schedule for a reranker is searched by the order of candidates, one for an embedder by the cosine."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import BertModel

from support.families import FAMILIES
from support.tiny import save_tiny, tiny_tokenizer
from support.toy import write
from thresher.core.pruner import pruner_of
from thresher.data.embedder import Embedder, Pooling, load_embedder
from thresher.data.models import load
from thresher.data.spec import DataSpec
from thresher.data.task import DataError
from thresher.experiments.spec import SUMMARY
from thresher.experiments.tune import of_embedder, tune
from thresher.search import explore as trials
from thresher.search import reference
from thresher.search.explore import scores_of
from thresher.search.reference import Sample, order_divergence, texts_of, tokenized, top_overlap


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(trials, "LOOKS", 2)
    monkeypatch.setattr(trials, "SHARES", (0.7, 0.5))


def pairs(path):
    lines = ["query,document"] + [f"farmer {q},grain {q} wheat and {i} the script" for q in range(40) for i in range(4)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path.parent


def test_orders_are_compared_query_by_query():
    dense, pruned = torch.randn(2, 7, 1, generator=torch.Generator().manual_seed(0)).unbind()
    found = order_divergence(dense, pruned, [0, 4, 0, 4, 4, 0, 9])
    for i, rows in enumerate(([0, 2, 5], [1, 3, 4])):
        d, p = (x[rows, 0].double() for x in (dense, pruned))
        assert found[i].item() == pytest.approx(F.kl_div(p.log_softmax(0), d.softmax(0), reduction="sum").item())
    assert found[2] == 0 and torch.allclose(order_divergence(dense, dense + 3, [0] * 7), torch.zeros(1).double())


def test_the_overlap_of_the_best_by_hand():
    dense = torch.arange(6.0)[:, None]
    pruned = torch.tensor([5.0, 1, 2, 3, 4, 0])[:, None]
    assert top_overlap(dense, pruned, [0] * 6, k=2) == 0.5
    assert top_overlap(dense, pruned, [0, 0, 0, 0, 0, 1], k=2) == 0.5, "of the other query all are the best"
    assert top_overlap(dense, pruned, [0, 0, 1, 1, 2, 2], k=2) is None


def test_a_reranker_is_tuned_by_the_order_of_its_candidates(tmp_path, monkeypatch):
    model = save_tiny(
        tmp_path / "model", num_hidden_layers=3, num_labels=1, problem_type="multi_label_classification", seed=2
    )
    data = pairs(tmp_path / "pairs" / "train.csv")
    net, tokenizer = load(str(model))
    task, texts, _ = texts_of(net, tokenizer, DataSpec(data=str(data)), labelled=False, seed=0)
    queries = [*texts["query"]]
    assert task.kind == "reranking" and all(len({*queries[i : i + 4]}) == 1 for i in range(0, len(queries), 4))
    monkeypatch.setattr(reference, "TOP", 2)
    rows = tune(str(model), str(data), str(tmp_path / "out"), target_flops=0.7, max_length=32, method="topk")
    (row,) = [row for row in rows if row["chosen"]]
    assert row["flops_fraction"] <= 0.7 and 0 < row["overlap"] <= 1
    assert json.loads((tmp_path / "out" / SUMMARY).read_text())["reached"]["overlap"] == row["overlap"]
    assert pruner_of(load(str(tmp_path / "out"))[0]).name == "topk"
    with pytest.raises(ValueError, match="max_disagreement is for models that give classes"):
        tune(str(model), str(data), str(tmp_path / "no"), max_disagreement=0.1, max_length=32)


def test_an_embedder_is_tuned_by_the_cosine(tmp_path):
    write(tmp_path / "farm" / "train.csv", 160, 0)
    torch.manual_seed(0)
    config = FAMILIES["bert"].build(0, num_hidden_layers=3, initializer_range=0.3).config
    net = Embedder(BertModel(config)).eval()
    net.save_pretrained(tmp_path / "model", tiny_tokenizer())
    out = tmp_path / "out"
    rows = tune(
        str(tmp_path / "model"), str(tmp_path / "farm"), str(out), target_flops=0.7, max_length=32, method="topk"
    )
    assert any(row["chosen"] and row["flops_fraction"] <= 0.7 for row in rows)
    assert all(0 <= row["divergence"] <= 2 for row in rows)
    opened, tokenizer = load_embedder(str(out))
    assert pruner_of(opened).name == "topk"

    texts = Dataset.from_dict(dict(tokenizer(["wheat and grain the farmer", "script"])))
    sample = Sample(load_embedder(str(tmp_path / "model"))[0], texts, 2)
    assert sample.answers is None and 0 < sample.compare(opened).divergence < 2
    assert json.loads((out / SUMMARY).read_text())["task"]["metric"] == "cosine"


def test_a_metric_that_does_not_fit_is_told_from_other_mistakes(tmp_path):
    """Single texts are no pairs to be ranked: a model of one number gives numbers; other mistakes stay mistakes."""
    model = save_tiny(tmp_path / "model", num_labels=1, problem_type="multi_label_classification", seed=2)
    net, tokenizer = load(str(model))
    write(tmp_path / "farm" / "train.csv", 60, 0)
    data = DataSpec(data=str(tmp_path / "farm"))
    task, texts, _ = texts_of(net, tokenizer, data, labelled=False, seed=0)
    assert task.kind != "reranking" and len(texts)
    broken = tmp_path / "is no metric.csv"
    broken.write_text("text,label\nwheat,\n,1\n")
    with pytest.raises(DataError, match=r"text|label"):
        texts_of(net, tokenizer, DataSpec(data=str(broken), text=("nothing",)), labelled=False, seed=0)


def farm_embedder(folder):
    write(folder / "farm" / "train.csv", 160, 0)
    torch.manual_seed(0)
    config = FAMILIES["bert"].build(0, num_hidden_layers=3, initializer_range=0.3).config
    Embedder(BertModel(config)).save_pretrained(folder / "model", tiny_tokenizer())
    return str(folder / "model"), str(folder / "farm")


def test_the_pooling_is_chosen_on_the_texts_of_the_search(tmp_path):
    model, data = farm_embedder(tmp_path)
    given = {"target_flops": 0.7, "max_length": 32, "method": "topk"}
    rows = tune(model, data, str(tmp_path / "open"), **given)
    (row,) = [row for row in rows if row["chosen"]]
    said = json.loads((tmp_path / "open" / SUMMARY).read_text())
    pooling = said["reached"]["pooling"]
    assert pooling["chosen"] == max(pooling["judged"], key=pooling["judged"].get)
    assert said["reached"]["cosine"] == pooling["judged"][pooling["chosen"]] == 1 - row["divergence"]
    net, tokenizer = load_embedder(str(tmp_path / "open"))
    assert net.token_pruner.pooling == pooling["chosen"]
    task, texts, _ = texts_of(net, tokenizer, DataSpec(data=data), labelled=False, seed=0)
    sample = Sample(load_embedder(model)[0], tokenized(texts.select(range(128)), task, tokenizer, 32), 32)
    assert said["texts"]["searched"] == len(texts) or len(texts) >= 128
    for way in ("put-back", "survivors"):  # run again on texts of the search
        net.token_pruner.pooling = way
        assert 1 - sample.compare(net).divergence == pytest.approx(pooling["judged"][way], abs=0.05)
    assert abs(pooling["judged"]["put-back"] - pooling["judged"]["survivors"]) > 0.01
    tune(model, data, str(tmp_path / "said"), method_options={"pooling": "put-back"}, **given)
    assert {row["method"] for row in json.loads((tmp_path / "said" / SUMMARY).read_text())["schedules"]} == {"topk"}


def test_one_pooled_token_leaves_no_pooling_open(tmp_path):
    model, data = farm_embedder(tmp_path)
    net, tokenizer = load_embedder(model)
    Embedder(net.model, Pooling("cls")).save_pretrained(tmp_path / "cls", tokenizer)
    tune(str(tmp_path / "cls"), data, str(tmp_path / "out"), target_flops=0.7, max_length=32, method="topk")
    reached = json.loads((tmp_path / "out" / SUMMARY).read_text())["reached"]
    assert [*reached["pooling"]["judged"]] == ["put-back"]


def test_an_embedder_that_merging_suits_is_merged(tmp_path):
    """Merging puts every token back as the one that holds it, which the mean of the states is served by."""
    model, data = farm_embedder(tmp_path)
    given = {"target_flops": 0.6, "max_length": 32}
    by_method = {
        method: next(row for row in tune(model, data, str(tmp_path / method), method=method, **given) if row["chosen"])
        for method in ("auto", "topk", "tome")
    }
    assert by_method["tome"]["divergence"] < by_method["topk"]["divergence"]
    assert by_method["auto"]["divergence"] <= by_method["tome"]["divergence"]
    assert by_method["auto"]["method"].split(",")[0] in ("tome", "tofu") and by_method["auto"]["flops_fraction"] <= 0.6
    for name in ("tome", "auto"):
        net, tokenizer = load_embedder(str(tmp_path / name))
        assert (net.token_pruner.metric, net.token_pruner.rounds) == ("states", 2)
        assert 0 < net.token_pruner.min_tokens < 16, "half of the mean"
    texts = Dataset.from_dict(dict(tokenizer(["wheat and grain the farmer and the script", "thresh the grain"])))
    outcome = Sample(load_embedder(model)[0], texts, 2).compare(net)
    assert 0 < outcome.divergence < 1 and outcome.flops_fraction < 0.8


@pytest.mark.parametrize("method", ["tome", "tofu"])
def test_a_named_method_merges_averages_as_auto_does(method):
    base, rows = BertModel(FAMILIES["bert"].build(0).config), Dataset.from_dict({"input_ids": [[1] * 20] * 3})
    sample, own = SimpleNamespace(rows=rows), {"metric": "keys", "min_tokens": 0}
    wanted = {"metric": "states", "rounds": 2, "min_tokens": 10}
    net = Embedder(base, Pooling("mean"))
    assert of_embedder(net, scores_of("auto", None), sample, True)[method] == (method, wanted)
    assert of_embedder(net, scores_of(method, None), sample, False)[method] == (method, wanted)
    assert of_embedder(net, scores_of(method, own), sample, False)[method] == (method, wanted | own)
    assert of_embedder(net, scores_of("topk", None), sample, False)["topk"] == ("topk", {})
    assert of_embedder(Embedder(base, Pooling("cls")), scores_of(method, None), sample, False) == {method: (method, {})}
