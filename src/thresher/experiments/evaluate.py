"""A saved model on the test part of a data set: its quality and MACs, and its time beside the dense model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel

from ..api import dense
from ..data import qa
from ..data.load import load_task
from ..data.models import clip, load, reading
from ..data.task import Task
from ..data.tokenize import tokenize
from ..evaluation.benchmark import measure
from ..evaluation.hardware import environment
from ..evaluation.predict import Text, plain, predict, quality, replayed
from ..evaluation.roofline import roofline
from ..evaluation.rows import row
from ..exporting import export as exporting
from ..exporting.runtime import load_runtime
from ..reports import plots

PAIRS = {"torch": ("fp32", "bf16"), **exporting.FORMATS}  # the precisions of each runtime
CALIBRATED_WITH_TEXTS = ("openvino", "int8")
CALIBRATED = 300  # examples that int8 is calibrated on, NNCF's own number


def evaluate(
    model: str,
    data: str,
    *,
    batch_size: int = 32,
    max_length: int = 256,
    limit: int | None = None,
    layout: str = "auto",
    metric: str | None = None,
    **columns,
) -> list[dict]:
    """Quality and MACs on the test part: a row for the model as it is and, if it is pruned, one for it unpruned."""
    net, max_length, task, test = tested(model, data, max_length, layout, metric, limit, columns)
    modes = ["pruned", "dense-unpadded"] if hasattr(net, "token_pruner") else ["dense-unpadded"]
    results = {}
    for mode in modes:
        with dense(net) if mode != "pruned" and "pruned" in modes else nullcontext():
            results[mode] = predict(net, test, batch_size=batch_size)
    return [
        row(
            task=task.name,
            model=Path(model).name,
            method=net.token_pruner.name if mode == "pruned" else "dense",
            runtime="torch",
            precision="fp32",
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


def bench(
    model: str,
    data: str,
    *,
    against: str | None = None,
    runtime: Sequence[str] = ("torch",),
    precision: Sequence[str] = ("fp32",),
    batch_size: Sequence[int] = (1, 32),
    max_length: int = 256,
    threads: int | None = None,
    repeats: int = 5,
    examples: int = 64,
    batches: int = 8,
    limit: int | None = None,
    baselines: Sequence[str] = ("random", "firstk"),
    graphs: str | Path | None = None,
    plot: str | Path | None = None,
    metric: str | None = None,
    progress=None,
    **columns,
) -> list[dict]:
    """Time and quality of a pruned model beside the dense one, padded and unpadded, and beside baselines.

    The baselines choose as many tokens of each text as the model does, on its own weights: what they lose is what the
    choice is worth. ``against`` names the dense model, by default ``dense`` in the model's folder, else the model
    itself without pruning. All that fit of ``runtime`` x ``precision`` are timed in one run. The other arguments are
    those of ``bench.measure``.

    Args:
        runtime: "torch", "onnx", "openvino"; the last two run graphs that are exported first.
        precision: "fp32", "bf16" (torch, openvino), "int8" (onnx, openvino).
        graphs: the folder where the graphs stay, to be used again; default: a temporary one.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    pairs = [(one, kind) for one in runtime for kind in precision if kind in PAIRS.get(one, ())]
    for given, there in ((runtime, [one for one, _ in pairs]), (precision, [kind for _, kind in pairs])):
        if lost := [value for value in given if value not in there]:
            known = "; ".join(f"{one}: {', '.join(kinds)}" for one, kinds in PAIRS.items())
            raise ValueError(f"{lost[0]!r} does not go with what else was asked for; there is {known}")
    net, max_length, task, test = tested(model, data, max_length, "auto", metric, limit, columns)
    if not hasattr(net, "token_pruner"):
        raise ValueError(f"{model} is not pruned: there is nothing to compare; thresher train makes a pruned model")
    other = dense_of(model, against)
    kept = predict(net, test).kept
    copies = {name: replayed(net, name, kept) for name in baselines}
    with tempfile.TemporaryDirectory() as temporary:
        folder, opened = Path(graphs or temporary), {}
        both = {"dense": other or plain(net), "pruned": net} if {*runtime} != {"torch"} else {}
        sources = {name: exporting.fingerprint(m) for name, m in both.items()}
        for one, kind in pairs:
            if one == "torch":
                continue
            for name, m in both.items():
                place = folder / f"{name}-{one}-{kind}"
                if exporting.source_of(place) != (sources[name], max_length):
                    if progress:
                        progress(f"writing {place.name}", 0, None)
                    _export(m, model, place, one, kind, task, max_length)
                opened.setdefault((one, kind), {})[name] = load_runtime(place, threads=threads)
        rows = measure(
            net,
            test,
            task,
            max_length=max_length,
            batch_sizes=batch_size,
            repeats=repeats,
            examples=examples,
            batches=batches,
            threads=threads,
            baselines=copies,
            against=other,
            precisions=[kind for one, kind in pairs if one == "torch"],
            graphs=opened,
            line=roofline(threads) if net.device.type == "cpu" else None,
            fields={"model": Path(model).name, "split": "test"},
            progress=progress,
        )
    if plot:
        plots.bench(rows, plot)
    return rows


def export(
    model: str,
    out: str,
    *,
    format: str = "onnx",
    precision: str = "fp32",
    data: str | None = None,
    config: str | None = None,
    text: Sequence[str] | None = None,
    label: str | None = None,
    max_length: int = 256,
    threads: int | None = None,
    progress=None,
) -> dict:
    """Write a saved model as a graph into ``out``: ``exporting.export``, calibrated on the train part of ``data``."""
    if threads is not None:
        torch.set_num_threads(threads)
    net, _ = load(model)
    task = None
    if data and (format, precision) == CALIBRATED_WITH_TEXTS:  # cut as bench cuts it, so that no tested text calibrates
        task = load_task(data, config=config, text=text, label=label)
    if progress:
        progress(f"writing a graph for {format}", 0, None)
    return _export(net, model, out, format, precision, task, clip(max_length, net.config))


def _export(net, model: str, out, format: str, precision: str, task: Task | None, max_length: int) -> dict:
    """Export with the tokenizer of ``model``; int8 is calibrated on texts that are not tested."""
    tokenizer, calibration = reading(AutoTokenizer.from_pretrained, model), None
    if task is not None and (format, precision) == CALIBRATED_WITH_TEXTS:
        if (part := task.validation if task.train is None else task.train) is None:
            raise ValueError(
                f"{task.name} has a test part only: int8 in OpenVINO is calibrated on texts of a train part"
            )
        rows = tokenize(part.select(range(min(CALIBRATED, len(part)))), task, tokenizer, max_length)[0]
        cut = Text(net, rows, max_length)
        calibration = [cut.batch([i], None, net.device) for i in range(len(rows))]
    return exporting.export(
        net,
        out,
        tokenizer=tokenizer,
        format=format,
        precision=precision,
        calibration=calibration,
        max_length=max_length,
    )


def dense_of(model: str, against: str | None) -> PreTrainedModel | None:
    """The model to compare with: ``against``, else ``dense`` in the model's folder; None where there is neither."""
    own = os.path.join(model, "dense")
    return load(against or own)[0] if against or os.path.isdir(own) else None


def names_of(model: PreTrainedModel) -> list[str] | None:
    """Return the classes of a model in their order: none of a model of numbers, None where it has no names for them."""
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    return [] if len(names) == 1 else names if not all(name.startswith("LABEL_") for name in names) else None


def tested(model: str, data: str, max_length: int, layout: str, metric: str | None, limit: int | None, columns: dict):
    """(model, longest text, task with the ``limit`` examples of the test part that are asked for, these tokenized); the
    labels are in the model's order."""
    net, tokenizer = load(model, layout)
    task = load_task(data, metric=metric, labels=names_of(net), **columns)
    max_length = clip(max_length, net.config)
    if (task.kind == "qa") != type(net).__name__.endswith("ForQuestionAnswering"):
        wanted = "a model that answers questions" if task.kind == "qa" else "a classifier"
        raise ValueError(f"{model} is a {type(net).__name__}: {data} wants {wanted}")
    chosen = np.random.default_rng(0).permutation(len(task.test))[:limit]  # a file may lie in the order of its labels
    task = replace(task, test=task.test.select(sorted(chosen)))
    return net, max_length, task, tokenize(task.test, task, tokenizer, max_length)[0]
