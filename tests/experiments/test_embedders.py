"""Embedders are judged, timed and audited: by what their queries find, by pairs, and by their dense model's vectors."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import BertModel
from typer.testing import CliRunner

from support.families import FAMILIES
from support.files import write as write_file
from support.tiny import tiny_tokenizer
from support.toy import write
from thresher import TopK, dense, prune
from thresher.cli import app as cli
from thresher.data.embedder import Embedder, load_embedder
from thresher.data.load import load_task
from thresher.data.retrieval import load_retrieval
from thresher.data.task import DataError
from thresher.evaluation.retrieval import retrieval_gains
from thresher.experiments.audit import audit
from thresher.experiments.bench import bench
from thresher.experiments.embedders import neighbours
from thresher.experiments.evaluate import evaluate

WORDS = ["the", "farmer", "and", "wheat", "script", "grain", "thresh", "chaff"]


def texts(count: int, seed: int, length: int = 9) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, int(draw.integers(3, length)))) for _ in range(count)]


@pytest.fixture(scope="module")
def farm(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("judged")
    torch.manual_seed(0)
    model = BertModel(FAMILIES["bert"].build(0, num_hidden_layers=3, initializer_range=0.3).config)
    prompts = {"query": "the farmer ", "passage": "wheat "}
    Embedder(model, prompts=prompts).save_pretrained(folder / "dense", tiny_tokenizer())
    net, tokenizer = load_embedder(str(folder / "dense"))
    prune(net, TopK(keep=0.5, at=(0, 1))).save_pretrained(folder / "pruned", tokenizer)
    found = folder / "found"
    found.mkdir()
    own = texts(40, 0)
    write_file(found / "corpus.jsonl", [{"_id": str(i), "text": text} for i, text in enumerate(own)])
    write_file(found / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in enumerate(texts(8, 1))])
    judged = [{"query-id": f"q{i}", "corpus-id": str(j), "score": 1} for i in range(8) for j in (i, i + 8)]
    write_file(found / "qrels.csv", judged)
    draw = np.random.default_rng(2)
    pairs = [
        {"sentence1": a, "sentence2": b, "label": round(float(draw.uniform(0, 5)), 3)}
        for a, b in zip(texts(60, 3, 12), texts(60, 4, 12), strict=True)
    ]
    write_file(folder / "pairs.csv", pairs)
    write(folder / "farm" / "train.csv", 160, 0)
    write(folder / "farm" / "test.csv", 100, 1)
    names = {"dense": "dense", "pruned": "pruned", "found": "found", "pairs": "pairs.csv", "plain": "farm"}
    return SimpleNamespace(**{name: str(folder / path) for name, path in names.items()})


def vectors(net, tokenizer, texts: list[str]) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([net(**tokenizer(t, return_tensors="pt")).sentence_embedding.numpy() for t in texts])


def test_documents_that_queries_find(farm):
    rows = evaluate(farm.pruned, farm.found, max_length=64)
    by = {(row["mode"], row["metric"]): row for row in rows}
    assert {metric for _, metric in by} == {"ndcg@10", "recall@10", "recall@100", "cosine", "overlap@10"}
    task, (net, tokenizer) = load_retrieval(farm.found), load_embedder(farm.pruned)
    queries, documents = ["the farmer " + text for text in task.queries], ["wheat " + text for text in task.documents]
    said = {"pruned": [vectors(net, tokenizer, own) for own in (queries, documents)]}
    with dense(net):
        said["dense-unpadded"] = [vectors(net, tokenizer, own) for own in (queries, documents)]
    for mode, own in said.items():
        gains = retrieval_gains(task, *own)
        for metric in ("ndcg@10", "recall@10"):
            assert by[mode, metric]["quality"] == pytest.approx(100 * gains[metric].mean(), abs=1e-3)
    near = np.concatenate([(a * b).sum(1) for a, b in zip(*said.values(), strict=True)])
    assert by["pruned", "cosine"]["quality"] == pytest.approx(100 * near.mean(), abs=1e-2)
    assert by["dense-unpadded", "cosine"]["quality"] == 100 and by["pruned", "overlap@10"]["quality"] < 100
    row = by["pruned", "ndcg@10"]
    assert (
        row["flops_ratio"] > 1.3
        and row["n_examples"] == 8
        and row["quality_dense"] == by["dense-unpadded", "ndcg@10"]["quality"]
    )


def test_pairs_with_a_similarity(farm):
    rows = evaluate(farm.pruned, farm.pairs, max_length=64, limit=5)
    by = {(row["mode"], row["metric"]): row for row in rows}
    assert {*by} == {(mode, metric) for mode in ("pruned", "dense-unpadded") for metric in ("spearman", "cosine")}
    whole = evaluate(farm.dense, farm.pairs, max_length=64)
    assert [(row["mode"], row["metric"]) for row in whole] == [("dense-unpadded", "spearman")]
    net, tokenizer = load_embedder(farm.dense)
    test = load_task(farm.pairs, labels=[], metric="spearman").test
    first, second = (vectors(net, tokenizer, [*test[column]]) for column in ("sentence1", "sentence2"))
    wanted = spearmanr((first * second).sum(1), test["label"]).statistic
    assert whole[0]["quality"] == pytest.approx(100 * wanted, abs=1e-3)


def test_texts_alone(farm):
    rows = evaluate(farm.pruned, farm.plain, max_length=32)
    assert [(row["mode"], row["metric"]) for row in rows] == [("pruned", "cosine"), ("dense-unpadded", "cosine")]
    assert rows[0]["quality"] < 99 and rows[0]["n_examples"] == 100
    with pytest.raises(DataError, match="has neither judged documents nor pairs with a similarity, and "):
        evaluate(farm.dense, farm.plain)
    with pytest.raises(DataError, match="'accuracy' is no metric of an embedder on"):
        evaluate(farm.dense, farm.found, metric="accuracy")


def test_the_dense_model_in_the_folder_is_the_reference(farm, tmp_path):
    """A trained embedder is compared with its teacher, not with its own weights."""
    net, tokenizer = load_embedder(farm.pruned)
    net.save_pretrained(tmp_path / "out", tokenizer)
    other, _ = load_embedder(farm.dense)
    with torch.no_grad():
        other.model.embeddings.word_embeddings.weight.add_(torch.randn(32) * 0.5)
    other.save_pretrained(tmp_path / "out" / "dense", tokenizer)
    mine = evaluate(farm.pruned, farm.plain, max_length=32)[0]["quality"]
    assert evaluate(str(tmp_path / "out"), farm.plain, max_length=32)[0]["quality"] < mine - 0.1


def test_an_embedder_is_timed(farm):
    rows = bench(farm.pruned, farm.plain, max_length=32, batch_size=(4,), repeats=1, examples=8, baselines=("firstk",))
    by = {(row["method"], row["mode"]): row for row in rows}
    pruned = next(row for (method, _), row in by.items() if method == "topk")
    assert pruned["metric"] == "cosine" and pruned["latency_ms_p50"] > 0 and pruned["flops_ratio"] > 1.3
    assert pruned["quality"] < pruned["quality_dense"] == pytest.approx(100, abs=1e-3)
    assert any("dense" in mode for _, mode in by)


@pytest.mark.filterwarnings("ignore:input length")
def test_an_embedder_is_audited(farm, tmp_path):
    rows = audit(farm.pruned, farm.plain, max_length=32)
    whole = rows[0]
    near = evaluate(farm.pruned, farm.plain, max_length=32)[0]["quality"]
    assert whole["pruned"] == pytest.approx(near, abs=1e-3) and whole["dense"] == pytest.approx(100, abs=1e-3)
    assert whole["drop"] == pytest.approx(100 - near, abs=1e-2) and len(rows) > 2
    assert 0 < whole["overlap"] < 1 and len(whole["moved"]) == 5
    assert [text["overlap"] for text in whole["moved"]] == sorted(text["overlap"] for text in whole["moved"])
    with pytest.raises(ValueError, match="is audited by length: leave label out of by"):
        audit(farm.pruned, farm.plain, by=("label",))
    with pytest.raises(ValueError, match="is not pruned"):
        audit(farm.dense, farm.plain)
    given = ["audit", farm.pruned, "--data", farm.plain, "--max-length", "32", "--json", str(tmp_path / "a.json")]
    run = CliRunner().invoke(cli.app, [*given, "--html", str(tmp_path / "a.html")])
    assert run.exit_code == 0, run.output
    assert "nearest texts" in run.output and json.loads((tmp_path / "a.json").read_text())


def test_neighbours_by_hand():
    """The last of four texts changes sides."""
    before = np.array([[1, 0], [0.99, 0.1], [0, 1], [0.1, 0.99]])
    after = np.array([[1, 0], [0.99, 0.1], [0, 1], [0.9, 0.3]])
    found = neighbours(after, before, ["a", "b", "c", "d"])
    assert found["neighbours"] == 3 and found["overlap"] == 1.0, "of four texts all others are near"
    last = next(text for text in found["moved"] if text["text"] == "d")
    assert (last["nearest_dense"], last["nearest_pruned"]) == ("c", "b")


def test_the_command_evaluates(farm):
    run = CliRunner().invoke(cli.app, ["eval", farm.pruned, "--data", farm.found, "--max-length", "64"])
    assert run.exit_code == 0, run.output
    assert "overlap@10" in run.output


def test_one_text_has_no_neighbours():
    with pytest.raises(DataError, match="give two or more"):
        neighbours(np.ones((1, 3)), np.ones((1, 3)), ["the wheat"])
