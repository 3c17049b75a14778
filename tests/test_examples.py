"""The examples in docstrings run as they stand, on tiny models."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

import thresher
from support.embedders import save_embedder
from support.tiny import save_tiny, tiny_model, tiny_tokenizer
from thresher import TopK, dense, prune
from thresher.core.pruner import METHODS
from thresher.data.embedder import load_embedder
from thresher.evaluation.predict import predict

TEXTS = ["the farmer thresh the wheat", "grain and chaff", "wheat"]
MODULES = sorted({"thresher.api", "thresher.evaluation.predict"} | {kind.__module__ for kind in METHODS.values()})


def examples_of(module: str) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(module)) if test.examples]


def names(pruned: bool) -> dict:
    """What an example may name: a tiny model, its tokenizer, a batch and tokenized rows, and the package's names."""
    tokenizer = tiny_tokenizer()
    encoded = tokenizer(TEXTS)
    return {
        **{name: getattr(thresher, name) for name in thresher.__all__},
        "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
        "model": tiny_model(TopK(keep=0.5) if pruned else None),
        "tokenizer": tokenizer,
        "batch": tokenizer(TEXTS, padding=True, return_tensors="pt"),
        "rows": Dataset.from_dict({name: encoded[name] for name in ("input_ids", "attention_mask")}),
        "predict": predict,
    }


def run(example: doctest.DocTest, namespace: dict) -> None:
    example.globs |= namespace
    doctest.DebugRunner(verbose=False).run(example, clear_globs=False)  # raises what the example raises


@pytest.mark.parametrize("example", [e for m in MODULES for e in examples_of(m)], ids=lambda example: example.name)
def test_an_example_runs(example: doctest.DocTest, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "my-classifier")
    with torch.no_grad():
        run(example, names(pruned=not example.name.endswith(".prune")))


def test_the_examples_are_those_of_the_main_verbs():
    """No example is lost without notice, and what they leave is what their text says."""
    found = {example.name.rpartition(".")[2] for module in MODULES for example in examples_of(module)}
    assert {"prune", "dense", "calling", "replayed"} <= found
    (example,) = (e for e in examples_of("thresher.api") if e.name.endswith(".dense"))
    namespace = names(pruned=True)
    run(example, namespace)
    with dense(namespace["model"]):
        torch.testing.assert_close(namespace["model"](**namespace["batch"]).logits, example.globs["reference"])


@pytest.mark.slow  # exports a graph
def test_the_example_of_a_runtime_runs(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = examples_of("thresher.exporting.runtime")
    thresher.export(prune(tiny_model(), TopK(keep=0.5)), tmp_path / "runs/reviews-onnx", tokenizer=tiny_tokenizer())
    ranker = prune(tiny_model(num_labels=1), TopK(keep=0.5, protect={"until": [3]}))
    thresher.export(ranker, tmp_path / "runs/ranker-onnx", tokenizer=tiny_tokenizer())
    embedder, tokenizer = load_embedder(str(save_embedder(tmp_path / "embedder", TopK(keep=0.5))))
    thresher.export(embedder, tmp_path / "runs/embedder-onnx", tokenizer=tokenizer)
    run(example, names(pruned=True) | {"passages": ["the farmer", "the wheat and the chaff"]})
    assert {"label", "score"} <= {*example.globs["second"]} and len(example.globs["vectors"]) == 2
    assert {"index", "score"} <= {*example.globs["best"][0]}
