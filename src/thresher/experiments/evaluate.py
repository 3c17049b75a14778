"""Evaluate a saved model: quality and MACs on the test part of a data set."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ..api import dense
from ..core.pruner import pruner_in
from ..data import qa
from ..data.embedder import is_embedder
from ..data.load import load_task
from ..data.models import class_names, clip, load
from ..data.task import Task
from ..data.tokenize import tokenize
from ..evaluation.decoding import PRECISIONS
from ..evaluation.hardware import environment
from ..evaluation.predict import predict, quality
from ..evaluation.rows import row
from .embedders import dense_embedder, evaluate_embedder, tested_embedder
from .spec import EvalSpec, TaskSpec, job


class Tested(NamedTuple):
    """A model, its longest text, the task with the examples of the test part that are asked for, these tokenized."""

    model: PreTrainedModel
    max_length: int
    task: Task
    test: Dataset


@job(EvalSpec)
def evaluate(spec: EvalSpec) -> list[dict]:
    """Rows of quality and MACs on the test part: the model as it is and, if it is pruned, the same unpruned; of an
    embedder as ``evaluate_embedder`` says."""
    if is_embedder(spec.model):
        return evaluate_embedder(spec)
    net, max_length, task, test = tested(spec, spec.layout)
    modes = ["pruned", "dense-unpadded"] if hasattr(net, "token_pruner") else ["dense-unpadded"]
    results = {}
    for mode in modes:
        with dense(net) if mode != "pruned" and "pruned" in modes else nullcontext():
            results[mode] = predict(net, test, batch_size=spec.batch_size)
    return [
        row(
            task=task.name,
            model=Path(spec.model).name,
            method=pruner_in(net).name if mode == "pruned" else "dense",
            runtime="torch",
            precision=PRECISIONS[net.dtype],
            mode=mode,
            threads=torch.get_num_threads(),
            metric=task.metric,
            quality=quality(result, test, task.metric),
            quality_dense=quality(results["dense-unpadded"], test, task.metric),
            flops_ratio=result.macs_dense / result.macs_used,
            split="test",
            max_length=max_length,
            n_examples=len(set(qa.examples(test))),
            tokens_mean=result.tokens_mean,
            **environment(),
        )
        for mode, result in results.items()
    ]


def tested(spec: TaskSpec, layout: str, beside: tuple[str, ...] = ()) -> Tested:
    """Load a model and the ``limit`` examples of the test part; the labels are in the model's order. Of an embedder
    they are texts, and the vectors of its dense model."""
    if is_embedder(spec.model):
        if beside:
            raise ValueError(f"an embedder is audited by length: leave {', '.join(beside)} out of by")
        return Tested(*cast("Any", tested_embedder(spec, layout, getattr(spec, "against", None))))
    net, tokenizer = load(spec.model, layout)
    whole = replace(spec, limit=None)  # which is of the test part here
    task = load_task(whole, labels=class_names(net), beside=beside)
    max_length = clip(spec.max_length, net.config)
    if (task.kind == "qa") != type(net).__name__.endswith("ForQuestionAnswering"):
        wanted = "a model that answers questions" if task.kind == "qa" else "a classifier"
        raise ValueError(f"{spec.model} is a {type(net).__name__}: {spec.data} wants {wanted}")
    order = np.random.default_rng(0).permutation(len(task.test))  # a file may lie in the order of its labels
    task = replace(task, test=task.test.select(sorted(order[: spec.limit])))
    return Tested(net, max_length, task, tokenize(task.test, task, tokenizer, max_length)[0])


def dense_of(model: str, against: str | None) -> PreTrainedModel | None:
    """The model to compare with: ``against``, else ``dense`` in the model's folder; None where there is neither."""
    if is_embedder(model):
        return cast("Any", dense_embedder(model, against))
    own = os.path.join(model, "dense")
    return load(against or own)[0] if against or os.path.isdir(own) else None
