"""What the layers of a model cost in time on this machine: a table that prices a schedule before it is run.

Shapes: n tokens per example. Times are milliseconds per example.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..api import prune, unprune
from ..core.architecture import Architecture, find_architecture
from ..core.cost import Curve, LatencyTable
from ..core.pruner import Choice, TokenPruner
from ..core.view import View
from ..data.embedder import facts_of
from ..methods.topk import TopK
from .hardware import hardware, remembered
from .predict import plain

CURVES = ("attention", "scored", "ffn", "rest", "dense")
GRID = (8, 16, 32, 64, 128, 256, 512)


class Trim(TokenPruner):
    """Scores every layer and lets one token go at each: a site in all it does, at nearly full length."""

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        return tuple(range(model.first_site, model.last_site + 1))

    def choose(self, score: Tensor, view: View) -> Choice:
        last = view.tokens.index.masked_fill(~view.alive, -1).amax(1, keepdim=True)
        return Choice(view.alive & (view.tokens.index != last))


def latency_table(
    model: PreTrainedModel, *, batch_size: int = 1, repeats: int = 5, cache: str | Path | None = None
) -> LatencyTable:
    """Measure ``model`` at lengths up to its limit, a few seconds on MiniLM; remembered per machine and model.

    Args:
        batch_size: examples at once; times are per example.
        repeats: of each forward; the median counts.
        cache: folder of what was measured before, default ``$THRESHER_CACHE`` or ~/.cache/thresher.

    Raises:
        ValueError: the model does not read token ids.
    """
    if not find_architecture(model).text:
        raise ValueError(f"{type(model).__name__} does not read token ids: its time over lengths cannot be measured")
    stack, parameter = find_architecture(model), next(model.parameters())
    about = [facts_of(model), stack.depth, [asdict(cost) for cost in stack.costs], batch_size, hardware()]
    about += [str(parameter.dtype), str(parameter.device), torch.get_num_threads(), torch.__version__]
    return remembered("latency", about, read_table, lambda: _measure(model, batch_size, repeats), cache)


def read_table(known: dict) -> LatencyTable:
    """The table of a file. Raises ValueError where a curve has no points."""
    curves = {name: tuple(tuple(map(float, part)) for part in known[name]) for name in CURVES}
    if any(len(curve) != 2 or len(curve[0]) != len(curve[1]) or len(curve[0]) < 2 for curve in curves.values()):
        raise ValueError("curves without points")
    return LatencyTable(**known | curves)


def _measure(model: PreTrainedModel, batch_size: int, repeats: int) -> LatencyTable:
    net = plain(model)
    longest = getattr(net.config, "max_position_embeddings", None) or GRID[-1]
    grid = [n for n in GRID if n <= longest]
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for n in grid:  # before any hook is there
        ids = torch.randint(5, net.config.vocab_size, (batch_size, n), device=net.device)
        points["dense"].append((n, min([_whole(net, ids) for _ in range(repeats + 1)][1:]) / batch_size))
    for kind, method in (("attention", TopK(keep=1.0, at=())), ("scored", Trim())):
        prune(net, method)
        for n in grid:
            ids = torch.randint(5, net.config.vocab_size, (batch_size, n), device=net.device)
            runs = [_forward(net, ids) for _ in range(repeats + 1)][1:]
            # of a layer the fastest run, since what else the machine does only adds; of the layers the median
            best = {name: [min(times) for times in zip(*(run[name] for run in runs), strict=True)] for name in runs[0]}
            if kind == "attention":
                for name, times in best.items():
                    points[name].append((n, statistics.median(times) / batch_size))
            else:
                times = [best["attention"][layer] for layer in method.sites]
                left = [max(1, n - i) for i in range(len(times))]
                points[kind].append((statistics.mean(left), statistics.median(times) / batch_size))
        unprune(net)
    return LatencyTable(
        **{name: curve_of(points[name]) for name in CURVES},
        batch_size=batch_size,
        threads=torch.get_num_threads(),
    )


def curve_of(points: Mapping[int, float] | Iterable[tuple[float, float]]) -> Curve:
    """Milliseconds over tokens. Time never falls as tokens grow; what looks so is noise."""
    tokens, times = zip(*(points.items() if isinstance(points, Mapping) else points), strict=True)
    return tuple(map(float, tokens)), tuple(accumulate(times, max))


def _forward(net: PreTrainedModel, ids: Tensor) -> dict[str, list[float]]:
    """ms of each layer's attention block and of the rest of it, and of all else, in one forward."""
    stack, marks = find_architecture(net), []

    def mark(*_):
        if ids.is_cuda:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    handles = []
    for layer in stack.layers:
        handles.append(layer.register_forward_pre_hook(mark, prepend=True))
        handles.append(layer.get_submodule(stack.block).register_forward_hook(mark))
        handles.append(layer.register_forward_hook(mark))
    try:
        with torch.inference_mode():
            mark()
            net(input_ids=ids, attention_mask=torch.ones_like(ids))
            mark()
    finally:
        for handle in handles:
            handle.remove()
    begin, *inner, end = (1000 * moment for moment in marks)
    starts, middles, ends = inner[::3], inner[1::3], inner[2::3]
    attention = [m - s for s, m in zip(starts, middles, strict=True)]
    ffn = [e - m for m, e in zip(middles, ends, strict=True)]
    return {"attention": attention, "ffn": ffn, "rest": [end - begin - sum(attention) - sum(ffn)]}


def _whole(net: PreTrainedModel, ids: Tensor) -> float:
    """ms of one forward."""
    return 1000 * timed(net, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def compare(model: PreTrainedModel, batches: Iterable[dict], repeats: int = 3) -> tuple[float, float]:
    """Mean ms per text of the plain dense model, without any hook, and of ``model`` as it is, interleaved.

    ``batches`` are inputs of single texts, as they come in service: the dense model has no padding either. The fastest
    of ``repeats`` of each counts, since what else the machine does only ever adds.
    """
    totals, texts, nets = [0.0, 0.0], 0, (plain(model), model.eval())
    for batch in batches:
        texts += len(batch["input_ids"])
        times = [[timed(net, batch) for net in nets] for _ in range(repeats + 1)]
        totals = [total + 1000 * min(best) for total, best in zip(totals, zip(*times, strict=True), strict=True)]
    return totals[0] / texts, totals[1] / texts


def timed(forward: Callable, inputs: dict[str, Tensor]) -> float:
    """Seconds of one forward, in inference mode."""
    wait = torch.cuda.synchronize if inputs["input_ids"].is_cuda else nullcontext
    with torch.inference_mode():
        wait()
        start = time.perf_counter()
        forward(**inputs)
        wait()
        return time.perf_counter() - start
