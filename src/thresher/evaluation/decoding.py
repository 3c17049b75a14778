"""What a decoder costs: milliseconds of a prompt and of a token, bytes of its cache, memory.

The ways to run it take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from ..caches.hooks import ours, row_of
from ..caches.pruner import CachePruner
from .hardware import environment
from .prompt import pruned
from .rows import row

FULL = "full"  # the cache of which nothing leaves
MB = 1e6
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Run:
    """One prompt and the tokens after it.

    Attributes:
        prefill, steps: seconds of the prompt and of each step.
        prefill_scoring, scoring: of these, seconds spent on scores and choices, in the prompt and in all steps.
        held: entries of a layer and head, mean, at the end; ``size``, ``full``: bytes of them and of all that was read.
        peak: bytes of memory, the most there were; None: this system does not say.
    """

    prefill: float
    steps: list[float]
    prefill_scoring: float
    scoring: float
    held: float
    size: int
    full: int
    peak: float | None


@torch.no_grad()
def run(model: PreTrainedModel, length: int, new: int, seed: int = 0) -> Run:
    """Read ``length`` random tokens and go on for ``new`` ones, with the model as it is now."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(int(model.config.get_text_config().vocab_size), (1, length + new), generator=generator)
    ids, cache = ids.to(model.device), DynamicCache(config=model.config)
    with peak_memory(model.device) as peak:
        prompt = {"input_ids": ids[:, :length], "past_key_values": cache, "logits_to_keep": 1}
        prefill = seconds_of(partial(model, **prompt), model)
    read = sum(layer.seconds for layer in ours(cache).values())
    steps = []
    for place in range(length, length + new):
        steps.append(seconds_of(partial(model, input_ids=ids[:, place : place + 1], past_key_values=cache), model))
    rows = [row_of(n, layer) for n, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None]
    scoring = sum(row["seconds"] for row in rows) - read
    held, (size, full) = (
        np.mean([row["held"] for row in rows]),
        (sum(row[name] for row in rows) for name in ("bytes", "dense_bytes")),
    )
    return Run(prefill, steps, read, scoring, float(held), size, full, peak())


def seconds_of(forward: Callable[[], Any], model: PreTrainedModel) -> float:
    """Seconds of a call, and of what it left to a GPU."""
    began = time.perf_counter()
    forward()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - began


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """Gives a function that tells, after the context, the most bytes of memory that there were within: of a GPU what
    tensors took, else what the process took, which only Linux says."""
    peak: list[float | None] = [None]
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")  # the high-water mark falls to what the process has now
    yield lambda: peak[0]
    if cuda:
        peak[0] = float(torch.cuda.max_memory_allocated(device))
    elif CLEAR.exists() and (said := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())):
        peak[0] = 1024 * float(said[1])


def measure_decoding(
    model: PreTrainedModel,
    methods: Mapping[str, CachePruner],
    contexts: Sequence[int],
    *,
    new: int = 32,
    repeats: int = 3,
    fields: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> list[dict]:
    """Rows of the full cache and of each method, at each number of tokens of a prompt: medians over ``repeats``.

    Args:
        model: not pruned.
        new: tokens after the prompt; their contents, like those of the prompt, are random.
        fields: of all rows.
    """
    runs: dict[tuple, list[Run]] = {}
    ways: list[tuple[str, CachePruner | None]] = [(FULL, None), *methods.items()]
    total, done = len(contexts) * len(ways) * (repeats + 1), 0
    for turn in range(repeats + 1):
        for length in contexts:
            for name, method in ways:
                if progress:
                    progress(f"{name}, {length:,} tokens", done, total)
                done += 1
                if method is None:
                    measured = run(model, length, new)
                else:
                    with pruned(model, method):
                        measured = run(model, length, new)
                if turn:  # the first one warms up
                    runs.setdefault((length, name), []).append(measured)
    known = {"precision": PRECISIONS[model.dtype], "repeats": repeats, **(fields or {})}
    return [
        _row(own, runs[length, FULL], methods.get(name), known | {"context": length})
        for (length, name), own in runs.items()
    ]


def _row(own: list[Run], full: list[Run], method: CachePruner | None, known: Mapping[str, Any]) -> dict:
    """The row of the runs of one method at one length."""
    steps, dense = (np.array([np.median(one.steps) for one in some]) for some in (own, full))
    totals = np.array([np.sum(one.steps) for one in own])
    peaks = [one.peak for one in own if one.peak is not None]
    budget = {} if method is None else {n: v for n in ("keep", "hold") if (v := getattr(method, n)) is not None}
    return row(
        method=FULL if method is None else method.name,
        mode="dense" if method is None else "pruned",
        runtime="torch",
        batch_size=1,
        threads=torch.get_num_threads(),
        held=own[0].held,
        cache_mb=own[0].size / MB,
        cache_mb_full=own[0].full / MB,
        prefill_ms=1e3 * float(np.median([one.prefill for one in own])),
        latency_ms_p50=1e3 * float(np.median(steps)),
        latency_ms_p95=1e3 * float(np.percentile(np.concatenate([one.steps for one in own]), 95)),
        scoring_ms=1e3 * float(np.median([one.scoring / len(one.steps) for one in own])),
        speedup_unpadded=float(np.median(dense) / np.median(steps)),
        spread=float((np.percentile(totals, 75) - np.percentile(totals, 25)) / np.median(totals)),
        peak_memory_mb=max(peaks) / MB if peaks else None,
        **budget,
        **environment(),
        **known,
    )
