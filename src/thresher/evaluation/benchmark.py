"""Measure a pruned model on labelled text: quality, MACs and time, beside the same model without pruning.

Shapes: N examples, B of them in a batch, K logits, S sites (the layers at which tokens leave). Data sets are tokenized
rows without padding, as ``data.tokenize`` makes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from ..api import MODULE, dense
from ..core.cost import dense_macs, tokens_by_layer
from ..core.layouts import LAYOUTS
from ..core.pruner import TokenPruner
from ..data import qa
from ..data.load import Task
from ..stats.metrics import bootstrap_interval, compute_metric
from .hardware import environment
from .predict import Predictions, Text, copied, counts_of, logits_of, outcome, predict, ready
from .roofline import Roofline
from .rows import row

MODES = ("dense-padded", "dense-unpadded", "pruned")
ASLEEP = 0.005  # seconds after which the threads of a runtime no longer spin
TORCH = {"runtime": "torch", "precision": "fp32"}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Runner:
    """One of the things that are timed in turn: what its rows say already, and a model in a context.

    ``model`` is a transformers model, or the ``forward`` of a ``Runtime``.
    """

    row: dict
    model: Callable
    predictions: Predictions
    pruner: TokenPruner
    context: Callable = nullcontext
    pad_to: int | None = None
    counts: Tensor | None = None
    times: np.ndarray | None = None  # (repeats, batches) seconds

    def run(self, rows: list[int], inputs: dict[str, Tensor]) -> float:
        """Seconds of one forward."""
        if self.counts is not None:
            self.model.token_pruner.counts = self.counts[rows]
        wait = torch.cuda.synchronize if inputs["input_ids"].is_cuda else nullcontext
        with torch.inference_mode(), self.context(self.model):
            wait()
            start = time.perf_counter()
            self.model(**inputs)
            wait()
            return time.perf_counter() - start

    @property
    def key(self) -> tuple[str, str, str]:
        """Runtime, precision and mode."""
        return self.row["runtime"], self.row["precision"], self.row["mode"]

    def floor(self, line: Roofline, rows: list[int]) -> float:
        """The least ms of a forward of some rows on this machine."""
        info, kept, tokens = self.pruner.info, self.predictions.kept[rows], self.predictions.tokens[rows]
        tokens = tokens if self.pad_to is None else torch.full_like(tokens, self.pad_to)
        after = {layer: lambda _, i=i: kept[:, i] for i, layer in enumerate(self.pruner.sites) if kept.shape[1]}
        counts = tokens_by_layer(tokens, after, range(info.depth), inside=info.inside)
        return line.floor(info.costs, counts, self.row["precision"])

    @property
    def seconds(self) -> float:
        """Total time: the sum over batches of the median over repeats."""
        return float(np.median(self.times, axis=0).sum())


def time_all(
    runners: list[Runner],
    batches: list[list[int]],
    text: Text,
    device: torch.device,
    repeats: int,
    progress: Callable,
) -> None:
    """Take the ``times`` of every runner, after one pass over all batches to warm up.

    For every repeat and every batch the runners take turns, another one first each time, so that what else the machine
    does falls on all. One that follows another runtime waits until the other's threads are asleep and runs once
    untimed: threads that spin take cores from those that work. Shapes are warm by then; in service a stream of new ones
    costs more.
    """
    widths = {runner.pad_to for runner in runners}
    inputs = {width: [text.batch(rows, width, device) for rows in batches] for width in widths}
    times, runtime = np.empty((len(runners), 1 + repeats, len(batches))), runners[0].row.get("runtime")
    for repeat in range(1 + repeats):
        for b, rows in enumerate(batches):
            for turn in range(len(runners)):
                i = (repeat + b + turn) % len(runners)
                given = inputs[runners[i].pad_to][b]
                runtime, last = runners[i].row.get("runtime"), runtime
                if runtime != last:
                    time.sleep(ASLEEP)
                    runners[i].run(rows, given)
                times[i, repeat, b] = runners[i].run(rows, given)
        progress(repeat + 1, 1 + repeats)
    for runner, taken in zip(runners, times, strict=True):
        runner.times = taken[1:]


def measure(
    model: PreTrainedModel,
    dataset: Dataset,
    task: Task,
    *,
    max_length: int,
    modes: Iterable[str] = MODES,
    batch_sizes: Iterable[int] = (1, 32),
    repeats: int = 5,
    threads: int | None = None,
    limit: int | None = None,
    baselines: Mapping[str, PreTrainedModel] | None = None,
    against: PreTrainedModel | None = None,
    precisions: Iterable[str] = ("fp32",),
    graphs: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
    line: Roofline | None = None,
    examples: int = 64,
    batches: int = 8,
    predictions: dict[str, Predictions] | None = None,
    fields: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> list[dict]:
    """Rows (see ``report.ROW_FIELDS``): quality on all examples, and time on the same sample of them for every mode.

    dense-padded pads every row to ``max_length``; dense-unpadded is the same layout at work with every token kept
    ("packed"), or plain batches padded to their longest row where packed does not run ("length-sorted"). Batches hold
    neighbours in length, of a sample spread over the lengths, in random order. ``samples_per_second`` and the speed-ups
    are made of total times over the sample; latencies are percentiles over the calls, of one batch each (medians over
    the repeats). Speed-ups are over the dense model of the same runtime and precision, ``speedup_reference`` is over
    torch, fp32, dense-padded. Quality is compared with the dense model in torch and fp32. MACs of graphs are those of
    the model in torch and fp32: with thresholds an int8 graph may keep a few tokens more or less. Memory is None: all
    modes share one process.

    Args:
        limit: use so many examples only, the same for all models.
        baselines: more models by the name that becomes their ``method``: pruned ones, or dense ones (a smaller model).
        against: the dense model to compare with; default: ``model`` without its pruning.
        precisions: of torch: "fp32", "bf16" copies of all models, none.
        graphs: besides, for pairs of runtime and precision, what ``load_runtime`` opened, as "dense" and "pruned".
        line: gives each row its ``floor_ms``.
        examples, batches: the examples timed at batch size 1, and the batches timed at larger ones.
        predictions: what is known of these examples already, in torch and fp32, as "pruned", "dense" and by the names
            of the baselines; what is missing is added.
        fields: what cannot be seen from here (model, seed, split, trained_steps, ...), for all rows.
        progress: called with what is going on, steps done and all steps.

    Raises:
        ValueError: an unknown mode or precision; a row over ``max_length``; a model that is not pruned.
    """
    known, say = {} if predictions is None else predictions, progress or (lambda *_: None)
    modes, precisions, graphs = tuple(modes), tuple(precisions), dict(graphs or {})
    for given, there in ((modes, MODES), (precisions, PRECISIONS)):
        if unknown := [value for value in given if value not in there]:
            raise ValueError(f"{unknown[0]!r} is not measured here; there is {', '.join(there)}")
    if getattr(model, MODULE, None) is None or {"dense", "pruned"} & set(baselines or ()):
        raise ValueError('measure() needs a pruned model, and baselines that are not called "dense" or "pruned"')
    models = {"dense": against or model, "pruned": model, **(baselines or {})}
    total = len(set(qa.examples(dataset)))
    chosen = qa.rows_of(dataset, np.random.default_rng(0).permutation(total)[:limit])
    counts = {name: given[chosen] for name, m in models.items() if (given := counts_of(m, len(dataset))) is not None}
    dataset, runners, rows = dataset.select(chosen), [], []
    text = Text(model, dataset, max_length)
    order = text.lengths.argsort(stable=True)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads or torch.get_num_threads())
        for m in models.values():
            stack.enter_context(ready(m, model.token_pruner.hooks.layout if m is against else "auto"))
        for name, m in models.items():
            if name not in known:
                with dense(m) if name == "dense" else nullcontext():
                    said = partial(say, f"evaluating {name}")
                    known[name] = predict(m, dataset, counts=counts.get(name), progress=said)
            if len(known[name].logits) != len(dataset):
                raise ValueError(f"the predictions of {name!r} are not those of these {len(dataset)} examples")
        runners = list(_torch(models, known, dataset, max_length, precisions, counts, say))
        runners += _graphs(models, known, graphs, text, max_length, say)
        runners = [r for r in runners if r.row["mode"] in modes or r.row["method"] in (baselines or ())]
        for runner in runners:
            runner.row |= _judge(known["dense"], runner.predictions, dataset, task.metric)
        shown, reference = len(runners), next(_runners("dense", models["dense"], known["dense"], max_length, TORCH))
        if all(runner.key != reference.key for runner in runners):
            runners.append(reference)
        common = {"task": task.name, "model": Path(model.config._name_or_path).name or None}
        common |= {"metric": task.metric, "selected_on": task.selected_on, "repeats": repeats}
        common |= {"max_length": max_length, "n_examples": min(total, limit or total)}
        common |= {"tokens_mean": known["dense"].tokens_mean}
        common |= {"threads": torch.get_num_threads(), **environment()}
        widest = dense_macs(models["dense"].token_pruner.info.costs, max_length)
        for size in dict.fromkeys(min(size, len(dataset)) for size in batch_sizes):
            count = min(examples, len(order)) if size == 1 else min(batches, len(order) // size) * size
            sample = order[(2 * torch.arange(count) + 1) * len(order) // (2 * count)].tolist()
            cut = text.batches(sample, size)
            np.random.default_rng(0).shuffle(cut)
            time_all(runners, cut, text, model.device, repeats, partial(say, f"timing batch size {size}"))
            timed = _times(runners, reference.key, known["dense"].rows_dense, widest, sample)
            for runner, values in list(zip(runners, timed, strict=True))[:shown]:
                if line is not None and values["precision"] in line.peak:
                    values["floor_ms"] = float(np.median([runner.floor(line, batch) for batch in cut]))
                rows.append(row(**common | {"batch_size": size} | values | dict(fields or {})))
    return rows


def _torch(models, known, dataset, max_length, precisions, counts, say) -> Iterator[Runner]:
    """The runners of all models in torch."""
    for precision in precisions:
        here, own = models, known
        if precision != "fp32":
            made = {id(m): copied(m).to(PRECISIONS[precision]) for m in models.values()}
            here, own = {name: made[id(m)] for name, m in models.items()}, {}
        for name, m in here.items():
            if name not in own:
                with dense(m) if name == "dense" else nullcontext():
                    said = partial(say, f"evaluating {name}, {precision}")
                    own[name] = predict(m, dataset, counts=counts.get(name), progress=said)
            for runner in _runners(name, m, own[name], max_length, {"runtime": "torch", "precision": precision}):
                runner.counts = counts.get(name)
                yield runner


def _graphs(models, known, graphs, text, max_length, say) -> Iterator[Runner]:
    """The runners of exported models: their own answers, and the MACs of the models that they were made from."""
    for (runtime, precision), pair in graphs.items():
        where = {"runtime": runtime, "precision": precision}
        for name, graph in pair.items():
            said = partial(say, f"evaluating {name}, {runtime} {precision}")
            own = replace(known[name], logits=logits_of(graph.forward, text, progress=said))
            for runner in _runners(name, models[name], own, max_length, where):
                runner.model, runner.context = graph.forward, nullcontext
                runner.row["layout"] = "length-sorted" if runner.row["mode"] == "dense-unpadded" else "padded"
                yield runner


def _judge(base: Predictions, own: Predictions, dataset: Dataset, metric: str) -> dict:
    """Quality, and for a model that is not the dense one the interval of the drop."""
    if not {"labels", "gold"} & {*dataset.column_names}:
        return {}
    (a, labels), (b, _) = outcome(base, dataset, metric), outcome(own, dataset, metric)
    scores = {"quality": compute_metric(metric, b, labels), "quality_dense": compute_metric(metric, a, labels)}
    if own is not base:
        scores["interval_low"], scores["interval_high"] = bootstrap_interval(metric, labels, a, b)
    return scores


def _runners(
    name: str, model: PreTrainedModel, own: Predictions, max_length: int, where: dict[str, str]
) -> Iterator[Runner]:
    """What is timed of a model: the dense one in two ways, padded first, others as they are."""
    pruner = model.token_pruner
    layout = next(n for n, kind in LAYOUTS.items() if kind is pruner.hooks.layout_for(cached=False))
    fields = {"method": pruner.name if name == "pruned" else name, "mode": "pruned", "layout": layout} | where
    if name == "pruned" or (name != "dense" and pruner.sites):
        yield Runner(fields | {"target_flops": getattr(pruner, "target_flops", None)}, model, own, pruner)
        return
    fields["mode"] = "dense-unpadded"
    if name != "dense":
        yield Runner(fields, model, own, pruner)
        return
    context = partial(dense, unpadded=True) if layout == "packed" else dense
    fields["layout"] = "packed" if layout == "packed" else "length-sorted"
    wide = replace(own, rows_used=torch.full_like(own.rows_used, dense_macs(pruner.info.costs, max_length)))
    yield Runner({**fields, "mode": "dense-padded", "layout": "padded"}, model, wide, pruner, dense, max_length)
    yield Runner(fields, model, own, pruner, context)


def _times(runners: list[Runner], reference: tuple, base: Tensor, padded: int, sample: list[int]) -> Iterator[dict]:
    """What is known after ``time_all``; ``base`` (N,) and ``padded`` are the dense model's MACs of each example."""
    seconds = {r.key: r.seconds for r in runners if r.row["method"] == "dense"}
    for runner in runners:
        used, calls = runner.predictions.rows_used, 1000 * np.median(runner.times, axis=0)
        low, middle, high = np.percentile(runner.times.sum(1), (25, 50, 75))
        there = {mode: seconds.get((*runner.key[:2], mode)) for mode in MODES}
        speed = {mode: None if total is None else total / runner.seconds for mode, total in there.items()}
        ratio, unpadded = int(base.sum()) / int(used.sum()), speed["dense-unpadded"]
        yield runner.row | {
            "flops_ratio": ratio,
            "flops_ratio_padded": padded * len(base) / int(used.sum()),
            "latency_ms_p50": float(np.percentile(calls, 50)),
            "latency_ms_p95": float(np.percentile(calls, 95)),
            "samples_per_second": len(sample) / runner.seconds,
            "speedup_unpadded": unpadded,
            "speedup_padded": speed["dense-padded"],
            "speedup_reference": seconds[reference] / runner.seconds,
            "efficiency": None if unpadded is None else unpadded / ratio,
            "spread": float((high - low) / middle) if len(runner.times) > 1 else None,
            "flops_used": int(used.sum()),
            "flops_dense": int(base.sum()),
            "flops_ratio_timed": int(base[sample].sum()) / int(used[sample].sum()),
            "n_timed": len(sample),
        }
