"""Measure a pruned model on labelled text: quality, MACs and time, beside the fastest way to run the dense model.

Shapes: N examples, B of them in a batch, K logits, S sites (the layers at which tokens leave). Data sets are tokenized
rows without padding, as ``data.tokenize`` makes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from ..api import MODULE
from ..core.architecture import find_architecture
from ..core.cost import LayerCost, dense_macs, tokens_by_layer
from ..core.pruner import TokenPruner, token_pruner_of
from ..core.tokens import LAYOUTS
from ..data import qa
from ..data.task import Task
from ..stats.bootstrap import bootstrap_interval
from ..stats.metrics import compute_metric
from .hardware import environment, torch_threads
from .latency import timed
from .predict import Predictions, Text, counts_of, in_precision, logits_of, outcome, packed, plain, predict, ready
from .roofline import Roofline
from .rows import row

MODES = ("dense-padded", "dense-unpadded", "pruned")
ASLEEP = 0.005  # seconds after which the threads of a runtime no longer spin
TORCH_FP32 = ("torch", "fp32")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Runner:
    """One of the things that are timed in turn: what its row says already, and how it runs."""

    row: dict  # the fields of its row that are known before the timing
    forward: Callable  # a transformers model, or the ``forward`` of a ``Runtime``
    predictions: Predictions  # its answers on all examples, and their MACs
    costs: Sequence[LayerCost] = ()  # MACs of its layers
    pruner: TokenPruner | None = None  # the method; None for a dense model
    pad_to: int | None = None  # the width of every batch; None: that of its longest row
    counts: Tensor | None = None  # (N, S) tokens to keep, of a method that replays them
    batched: bool = False  # timed at batch sizes above 1 alone
    times: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))  # (repeats, batches) seconds

    def run(self, rows: list[int], inputs: dict[str, Tensor]) -> float:
        """Seconds of one forward."""
        if self.pruner is None or self.counts is None:
            return timed(self.forward, inputs)
        with self.pruner.attached().asking(counts=self.counts[rows]):
            return timed(self.forward, inputs)

    @property
    def where(self) -> tuple[str, str]:
        """Runtime and precision."""
        return self.row["runtime"], self.row["precision"]

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Runtime, precision, method and mode: of those with one key the fastest counts."""
        return (*self.where, self.row["method"], self.row["mode"])

    def floor(self, line: Roofline, rows: list[int]) -> float:
        """The least ms of a forward of some rows on this machine."""
        kept, tokens = self.predictions.kept[rows], self.predictions.tokens[rows]
        tokens = tokens if self.pad_to is None else torch.full_like(tokens, self.pad_to)
        sites = () if self.pruner is None else self.pruner.sites
        inside = self.pruner is None or self.pruner.architecture.drops_inside
        after = {layer: lambda _, left=left: left for layer, left in zip(sites, kept.T, strict=True)}
        counts = tokens_by_layer(tokens, after, range(len(self.costs)), inside=inside)
        return line.floor(self.costs, counts, self.where[1])

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


def fastest(runners: list[Runner]) -> list[Runner]:
    """Of the ways to run one model, the one that took the least time; its row says what the others took."""
    ways: dict[tuple, list[Runner]] = {}
    for runner in runners:
        ways.setdefault(runner.key, []).append(runner)
    for padded in (runner for runner in runners if runner.row["mode"] == "dense-padded"):
        # where texts are of one length, padding to the longest costs nothing, and sorting or packing them does
        for first in ways.get((*padded.key[:-1], "dense-unpadded"), [])[:1]:
            same = replace(first, row=first.row | {"layout": "padded"}, times=padded.times)  # its floor stays its own
            ways[first.key].append(same)
    chosen = []
    for first, *others in (sorted(same, key=lambda runner: runner.seconds) for same in ways.values()):
        slower = [f"{one.row['layout']}: {one.seconds / first.seconds:.2f} times as long" for one in others]
        chosen.append(replace(first, row=first.row | {"slower": "; ".join(slower)}) if slower else first)
    return chosen


@dataclass
class Benchmark:
    """The arguments of ``measure``, and what follows from them."""

    model: PreTrainedModel
    dataset: Dataset
    task: Task
    _: KW_ONLY
    max_length: int
    modes: Iterable[str] = MODES
    batch_sizes: Iterable[int] = (1, 32)
    repeats: int = 5
    threads: int | None = None
    limit: int | None = None
    baselines: Mapping[str, PreTrainedModel] = field(default_factory=dict)
    against: PreTrainedModel | None = None
    precisions: Iterable[str] = ("fp32",)
    graphs: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    line: Roofline | None = None
    examples: int = 64
    batches: int = 8
    predictions: dict[str, Predictions] | None = None
    fields: Mapping[str, Any] | None = None
    progress: Callable[[str, int, int], Any] | None = None

    def __post_init__(self) -> None:
        self.modes, self.precisions = tuple(self.modes), tuple(self.precisions)
        for given, there in ((self.modes, MODES), (self.precisions, PRECISIONS)):
            if unknown := [value for value in given if value not in there]:
                raise ValueError(f"{unknown[0]!r} is not measured here; there is {', '.join(there)}")
        if token_pruner_of(self.model, "measure") is None or {"dense", "pruned"} & {*self.baselines}:
            raise ValueError('measure() needs a pruned model, and baselines that are not called "dense" or "pruned"')
        self.known = {} if self.predictions is None else self.predictions
        self.say = self.progress or (lambda *_: None)
        self.total = len(set(qa.examples(self.dataset)))
        chosen = qa.rows_of(self.dataset, np.random.default_rng(0).permutation(self.total)[: self.limit])
        self.given = {"dense": self.against or self.model, "pruned": self.model, **self.baselines}
        replayed = {name: counts_of(net, len(self.dataset)) for name, net in self.given.items() if name != "dense"}
        self.counts = {name: counts[chosen] for name, counts in replayed.items() if counts is not None}
        self.dataset = self.dataset.select(chosen)
        self.text = Text(self.model, self.dataset, self.max_length)

    def models(self, precision: str) -> dict[str, PreTrainedModel]:
        """The models by name; other precisions than fp32 are copies, and dense models are without a hook of ours."""
        made = {id(net): net for net in self.given.values()}
        if precision != "fp32":
            made = {key: in_precision(net, PRECISIONS[precision]) for key, net in made.items()}
        nets = {name: made[id(net)] for name, net in self.given.items()}
        sites = {name: getattr(getattr(net, MODULE, None), "sites", ()) for name, net in nets.items()}
        dense = [name for name in nets if name == "dense" or (name != "pruned" and not sites[name])]
        return nets | {name: plain(nets[name]) for name in dense}

    def rows(self) -> list[dict]:
        """Take the answers and the times."""
        with ExitStack() as stack:
            stack.enter_context(torch_threads(self.threads))
            for net in (self.model, *self.baselines.values()):
                stack.enter_context(ready(net))
            nets = self.models("fp32")
            for name, net in nets.items():
                self.answer(name, net, self.known)
                if len(self.known[name].logits) != len(self.dataset):
                    what = f"these {len(self.dataset)} examples"
                    raise ValueError(f"the predictions of {name!r} are not those of {what}")
            runners = [runner for runner in self.runners(nets) if self.wanted(runner)]
            for runner in runners:
                runner.row |= self.judge(runner.predictions)
            reference = next(self.ways("dense", nets["dense"], self.known["dense"], TORCH_FP32))
            others = [] if any(runner.key == reference.key for runner in runners) else [reference]
            sizes = dict.fromkeys(min(size, len(self.dataset)) for size in self.batch_sizes)
            return [row for size in sizes for row in self.time(size, runners, others, reference.key)]

    def wanted(self, runner: Runner) -> bool:
        return runner.row["mode"] in self.modes or runner.row["method"] in self.baselines

    def answer(self, name: str, net: PreTrainedModel, known: dict[str, Predictions], what: str = "") -> None:
        """Ask a model for what is not ``known`` of it."""
        if name not in known:
            step = partial(self.say, f"evaluating {name}{what}")
            known[name] = predict(net, self.dataset, counts=self.counts.get(name), progress=step)

    def runners(self, nets: Mapping[str, PreTrainedModel]) -> Iterator[Runner]:
        """What is timed: all models in torch, then their graphs, with own answers and the MACs of the models."""
        for precision in self.precisions:
            here, known = nets, self.known
            if precision != "fp32":
                here, known = self.models(precision), {}
            for name, net in here.items():
                self.answer(name, net, known, f", {precision}")
                yield from self.ways(name, net, known[name], ("torch", precision))
        for where, pair in self.graphs.items():
            for name, graph in pair.items():
                step = partial(self.say, f"evaluating {name}, {' '.join(where)}")
                own = replace(self.known[name], logits=logits_of(graph.forward, self.text, progress=step))
                yield from self.ways(name, nets[name], own, where, graph.forward)

    def ways(
        self,
        name: str,
        net: PreTrainedModel,
        own: Predictions,
        where: tuple[str, str],
        graph: Callable | None = None,
    ) -> Iterator[Runner]:
        """How a model is run, or its ``graph``: a pruned one as it is, the dense one padded, and all dense ones in
        batches of neighbours in length and, in torch, packed."""
        pruner, costs = getattr(net, MODULE, None), find_architecture(net).costs
        fields: dict[str, Any] = {"runtime": where[0], "precision": where[1], "method": name}
        way = partial(Runner, forward=graph or net, predictions=own, costs=costs, pruner=pruner)
        if pruner is not None:
            kind = pruner.hooks.layout_for(soft=False, cached=False)
            fields["layout"] = "padded" if graph else next(n for n, layout in LAYOUTS.items() if layout is kind)
            fields["method"] = pruner.name if name == "pruned" else name
            fields |= {"mode": "pruned", "target_flops": getattr(pruner, "target_flops", None)}
            yield way(fields, counts=None if graph else self.counts.get(name))
            return
        if name == "dense":
            wide = replace(own, rows_used=torch.full_like(own.rows_used, dense_macs(costs, self.max_length)))
            padded = fields | {"mode": "dense-padded", "layout": "padded"}
            yield way(padded, predictions=wide, pad_to=self.max_length)
        fields["mode"] = "dense-unpadded"
        yield way(fields | {"layout": "length-sorted"})
        if graph is None and (rows := packed(net)) is not None:
            yield way(fields | {"layout": "packed"}, forward=rows, batched=True)

    def judge(self, own: Predictions) -> dict:
        """Quality, and for a model that is not the dense one the interval of the drop."""
        base, metric = self.known["dense"], self.task.metric
        if not {"labels", "gold"} & {*self.dataset.column_names}:
            return {}
        (a, labels), (b, _) = outcome(base, self.dataset, metric), outcome(own, self.dataset, metric)
        scores = {"quality": compute_metric(metric, b, labels), "quality_dense": compute_metric(metric, a, labels)}
        if own.logits is not base.logits:
            scores["interval_low"], scores["interval_high"] = bootstrap_interval(metric, labels, a, b)
        return scores

    def time(self, size: int, runners: list[Runner], others: list[Runner], reference: tuple) -> Iterator[dict]:
        """The rows of one batch size; ``others`` are timed beside them and not shown."""
        order = self.text.lengths.argsort(stable=True)
        count = min(self.examples, len(order)) if size == 1 else min(self.batches, len(order) // size) * size
        sample = order[(2 * torch.arange(count) + 1) * len(order) // (2 * count)].tolist()
        cut = self.text.batches(sample, size)
        np.random.default_rng(0).shuffle(cut)
        taking = [runner for runner in (*runners, *others) if size > 1 or not runner.batched]
        step = partial(self.say, f"timing batch size {size}")
        time_all(taking, cut, self.text, self.model.device, self.repeats, step)
        chosen, hidden = fastest(taking), {runner.key for runner in others}
        seconds = {runner.key: runner.seconds for runner in chosen}
        for runner in chosen:
            if runner.key in hidden:
                continue
            values = {"batch_size": size} | runner.row | self.figures(runner, seconds, reference, sample)
            if self.line is not None and values["precision"] in self.line.peak:
                values["floor_ms"] = float(np.median([runner.floor(self.line, batch) for batch in cut]))
            yield row(**self.common | values | dict(self.fields or {}))

    @cached_property
    def common(self) -> dict[str, Any]:
        """What all rows say."""
        return {
            "task": self.task.name,
            "model": Path(self.model.config.name_or_path or "").name or None,
            "metric": self.task.metric,
            "selected_on": self.task.selected_on,
            "repeats": self.repeats,
            "max_length": self.max_length,
            "n_examples": min(self.total, self.limit or self.total),
            "tokens_mean": self.known["dense"].tokens_mean,
            "threads": torch.get_num_threads(),
            **environment(),
        }

    def figures(self, runner: Runner, seconds: dict[tuple, float], reference: tuple, sample: list[int]) -> dict:
        """Ratios of MACs and of times, after ``time_all``."""
        used, base = runner.predictions.rows_used, self.known["dense"].rows_dense
        widest = dense_macs(find_architecture(self.against or self.model).costs, self.max_length)
        calls = 1000 * np.median(runner.times, axis=0)
        low, middle, high = np.percentile(runner.times.sum(1), (25, 50, 75))
        there = {mode: seconds.get((*runner.where, "dense", mode)) for mode in MODES}
        speed = {mode: None if total is None else total / runner.seconds for mode, total in there.items()}
        ratio, unpadded = int(base.sum()) / int(used.sum()), speed["dense-unpadded"]
        return {
            "flops_ratio": ratio,
            "flops_ratio_padded": widest * len(base) / int(used.sum()),
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


def measure(model: PreTrainedModel, dataset: Dataset, task: Task, **options: Any) -> list[dict]:
    """Rows (see ``rows.ROW_FIELDS``): quality on all examples, and time on the same sample of them for every mode.

    Dense models run without any hook of ours. dense-padded pads every row to ``max_length``. dense-unpadded is the
    fastest way to run the dense model on these texts: on batches of neighbours in length padded to their longest row
    ("length-sorted", at batch size 1 the text alone), packed (our layout with every token kept), or padded to
    ``max_length``; all are timed, ``layout`` names the fastest one and ``slower`` says what the others took. Graphs
    have no packed rows.

    Batches hold neighbours in length, of a sample spread over the lengths, in random order. ``samples_per_second`` and
    the speed-ups are made of total times over the sample; latencies are percentiles over the calls, of one batch each
    (medians over the repeats). Speed-ups are over the dense model of the same runtime and precision,
    ``speedup_reference`` is over torch, fp32, dense-padded. Quality is compared with the dense model in torch and fp32.
    MACs of graphs are those of the model in torch and fp32: with thresholds an int8 graph may keep a few tokens more or
    less. Memory is None: all modes share one process.

    Args:
        max_length: tokens of the longest row.
        modes: those of ``MODES`` to show.
        batch_sizes, repeats, threads: of the timing.
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
    return Benchmark(model, dataset, task, **options).rows()
