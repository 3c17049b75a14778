"""What the layers of a model cost in time as a graph, in the runtime that will serve it.

A graph cannot be timed layer by layer. Four small differences of whole graphs say the same: the dense model, its first
layer alone, a site in every layer at nearly full length, and one early site that leaves next to nothing.

Shapes: n tokens per example. Times are milliseconds per example.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ..api import prune
from ..core.architecture import Architecture, find_architecture
from ..core.cost import LatencyTable, between
from ..data.embedder import facts_of
from ..evaluation.hardware import hardware, remembered
from ..evaluation.latency import GRID, curve_of, read_table
from ..evaluation.predict import plain
from ..methods.topk import TopK
from .export import export
from .runtime import Runtime, load_runtime

NEARLY = 0.96  # of the tokens of a layer stay, so that every layer has its site and hardly any token leaves
LEAST = 1e-6  # ms; what noise brings below it


def graph_latency_table(
    model: Any,
    format: str,
    precision: str = "fp32",
    *,
    tokenizer: Any = None,
    batch_size: int = 1,
    calibration: Iterable[dict[str, Tensor]] | None = None,
    repeats: int = 5,
    cache: str | Path | None = None,
) -> LatencyTable:
    """Measure ``model`` as a graph at lengths up to its limit; remembered per machine and model.

    Args:
        format, precision, calibration, tokenizer: as of ``export``.
        batch_size: examples at once, of one length; times are per example.
        repeats: of each forward; the fastest counts.
        cache: folder of what was measured before, default ``$THRESHER_CACHE`` or ~/.cache/thresher.

    Raises:
        ValueError: the model has one layer alone, or one that is shared; what ``export`` refuses.
    """
    stack = find_architecture(model)
    if len(stack.layers) < 2:
        raise ValueError(f"{type(model).__name__} has one layer, or shares it: a graph of it is not priced by layers")
    about: list = [facts_of(model), stack.depth, [asdict(cost) for cost in stack.costs], batch_size]
    about += [format, precision, hardware(), torch.get_num_threads(), torch.__version__, _version(format)]

    def measure() -> LatencyTable:
        how = {"tokenizer": tokenizer, "format": format, "precision": precision, "calibration": calibration}
        with TemporaryDirectory() as folder, opened(_four(model), Path(folder), **how) as graphs:
            return _priced(graphs, batch_size, repeats, stack)

    return remembered("graph-latency", about, read_table, measure, cache)


def graph_times(
    models: dict[str, Any], batches: Iterable[dict[str, Tensor]], repeats: int = 3, **how: Any
) -> dict[str, float]:
    """Mean ms per text of models as graphs, by name, interleaved; the fastest of ``repeats`` of each batch counts.

    Args:
        how: as of ``export``.
    """
    with TemporaryDirectory() as folder, opened(models, Path(folder), **how) as graphs:
        totals, texts = dict.fromkeys(graphs, 0.0), 0
        for batch in batches:
            texts += len(batch["input_ids"])
            for name, ms in _fastest(graphs, batch, repeats).items():
                totals[name] += ms
    return {name: total / texts for name, total in totals.items()}


@contextmanager
def opened(models: dict[str, Any], folder: Path, **how: Any):
    """The runtimes of some models, exported below ``folder``."""
    graphs: dict[str, Runtime] = {}
    for name, net in models.items():
        export(net, folder / name, **how)
        graphs[name] = load_runtime(folder / name)
    yield graphs


def _version(format: str) -> str:
    """Of the package that runs the graphs."""
    from importlib.metadata import version

    return version({"onnx": "onnxruntime"}.get(format, format))


def _four(model: Any) -> dict[str, Any]:
    """The models whose differences price a layer and a site; they share the weights of ``model``."""
    short, sites, first = plain(model), plain(model), plain(model)
    stack = find_architecture(short)
    holder = next(m for m in short.modules() if isinstance(m, nn.ModuleList) and len(m) and m[0] is stack.layers[0])
    del holder[1:]
    everywhere = tuple(range(stack.first_site, stack.last_site + 1))
    prune(sites, TopK(keep=NEARLY, at=everywhere), check=False)
    prune(first, TopK(keep=1, at=everywhere[:1]), check=False)
    return {"dense": plain(model), "short": short, "sites": sites, "first": first}


def _fastest(graphs: dict[str, Runtime], batch: dict[str, Tensor], repeats: int) -> dict[str, float]:
    """ms of a forward of each graph, interleaved, after one that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats + 1):
        for name, graph in graphs.items():
            start = perf_counter()
            graph.forward(**batch)
            taken[name].append(1000 * (perf_counter() - start))
    return {name: min(times[1:]) for name, times in taken.items()}


def _priced(graphs: dict[str, Runtime], batch_size: int, repeats: int, stack: Architecture) -> LatencyTable:
    """The table that the differences of the four graphs say."""
    took: dict[str, dict[int, float]] = {name: {} for name in graphs}
    for n in (n for n in GRID if n <= graphs["dense"].spec["max_length"]):
        ids = torch.randint(5, stack.base.config.vocab_size, (batch_size, n))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name, ms in _fastest(graphs, batch, repeats).items():
            took[name][n] = ms / batch_size
    depth, before = stack.depth, stack.first_site
    layer = {n: max(LEAST, (ms - took["short"][n]) / (depth - 1)) for n, ms in took["dense"].items()}
    rest = {n: max(LEAST, ms - layer[n]) for n, ms in took["short"].items()}
    little = float(between(torch.tensor(2.0), curve_of(layer)))  # of a layer in which two tokens are left
    # one site that leaves two: its attention block, and the rest of its layer as far as tokens leave after it
    scored = {n: ms - rest[n] - before * layer[n] - (depth - before - 1) * little for n, ms in took["first"].items()}
    share = _rest_of_layer(took["sites"], layer, rest, scored, stack) if stack.drops_inside else 0.5
    for n, ms in scored.items():
        scored[n] = max(LEAST, ms - share * (little if stack.drops_inside else layer[n]))
    return LatencyTable(
        attention=curve_of({n: ms * (1 - share) for n, ms in layer.items()}),
        scored=curve_of(scored),
        ffn=curve_of({n: ms * share for n, ms in layer.items()}),
        rest=curve_of(rest),
        dense=curve_of(took["dense"]),
        batch_size=batch_size,
        threads=torch.get_num_threads(),
    )


def _rest_of_layer(
    sites: dict[int, float],
    layer: dict[int, float],
    rest: dict[int, float],
    scored: dict[int, float],
    stack: Architecture,
) -> float:
    """The share of a layer's time that is not its attention block: what a site takes at nearly full length, less what
    it takes when next to nothing is left of it, over the layer."""
    count = stack.last_site - stack.first_site + 1
    seen = (
        sum(NEARLY**i for i in range(count)) / count
    )  # tokens of a site, on average, of those of the text; less go on
    shares = []
    for n, ms in sites.items():
        site = (ms - rest[n] - (stack.depth - count) * layer[n]) / count
        shares.append((site - float(between(torch.tensor(seen * n), curve_of(scored)))) / (NEARLY * seen * layer[n]))
    return min(0.9, max(0.1, median(shares)))
