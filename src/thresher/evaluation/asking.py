"""Language models that read pictures: what they answer, and what a question costs: milliseconds of the tower, of the
prompt and of a token, and bytes of the cache.

The ways to run a model take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..api import prune, unprune
from ..core.method import pruner_of
from ..core.pictures import find_reader, placeholders
from ..core.pruner import TokenPruner
from .decoding import MB, PRECISIONS, seconds_of
from .hardware import environment
from .rows import row

FEATURES = "mm_encoder_outputs"  # what a model is given in the place of pictures
DENSE = "dense"


@contextmanager
def pruned_by(model: PreTrainedModel, method: TokenPruner | None) -> Iterator[None]:
    """Prune a dense model within the context; None: leave it as it is."""
    if method is None:
        yield
        return
    prune(model, method)
    try:
        yield
    finally:
        unprune(model)


@torch.no_grad()
def answer(model: PreTrainedModel, inputs: Mapping[str, Any], new: int) -> Tensor:
    """(n,) the ids of the likeliest answer of a model, as it is now, of ``new`` tokens at most; the stop is one."""
    found = model.generate(**inputs, max_new_tokens=new, do_sample=False)  # type: ignore[operator]
    return found[0, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def told(model: PreTrainedModel, inputs: Mapping[str, Any], answered: Tensor) -> tuple[Tensor, float]:
    """(n, V) log probabilities of the tokens of an answer (n,), each after those before it, over the cache of the
    prompt, so that what leaves is chosen before the answer is known; and the share of the MACs of the language model's
    layers that the prompt takes."""
    cache = DynamicCache(config=model.config)
    first = model(**inputs, past_key_values=cache, logits_to_keep=1).logits[0]
    pruner = pruner_of(model)
    share = 1.0 if pruner is None else float(pruner.record.flops_fraction())
    rest = [model(input_ids=answered[None, :-1], past_key_values=cache).logits[0]] if len(answered) > 1 else []
    return torch.cat([first, *rest]).float().log_softmax(-1), share


@dataclass(frozen=True)
class Run:
    """One question and the tokens after it.

    Attributes:
        tower: seconds from pictures to what the language model gets; None: these were given.
        prefill, steps: seconds of the rest of the prompt, and of each step.
        size: bytes of the cache once the prompt was read.
        report: ``TokenPruner.picture_report``; empty of the dense model.
    """

    tower: float | None
    prefill: float
    steps: list[float]
    size: int
    report: dict

    @property
    def total(self) -> float:
        return (self.tower or 0.0) + self.prefill + sum(self.steps)


@torch.no_grad()
def run(model: PreTrainedModel, inputs: Mapping[str, Any], new: int) -> Run:
    """Read a question about a picture and go on for ``new`` tokens of no meaning, with the model as it is now."""
    found = find_reader(model)
    assert found is not None, "the model reads pictures"
    cache = DynamicCache(config=model.config)
    with timed_tower(found[0]) as tower:
        whole = seconds_of(partial(model, **inputs, past_key_values=cache, logits_to_keep=1), model)
    pruner = pruner_of(model)
    report = {} if pruner is None else pruner.picture_report
    layers: list[Any] = [*cache.layers]
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.keys is not None)
    word = next(i for i in range(9) if i not in placeholders(model.config).values())
    step = partial(model, input_ids=torch.full((1, 1), word, device=model.device), past_key_values=cache)
    steps = [seconds_of(step, model) for _ in range(new)]
    return Run(None if FEATURES in inputs else tower[0], whole - tower[0], steps, size, report)


@contextmanager
def timed_tower(reader: Any) -> Iterator[list[float]]:
    """Gives a list whose only number is, after the context, the seconds that a model's towers took within."""
    spent, own, name = [0.0], reader.get_image_features, "get_image_features"
    watched = vars(reader).get(name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        features = own(*args, **kwargs)
        if reader.device.type == "cuda":
            torch.cuda.synchronize(reader.device)
        spent[0] += time.perf_counter() - began
        return features

    setattr(reader, name, timed)
    try:
        yield spent
    finally:
        delattr(reader, name)
        if watched is not None:
            setattr(reader, name, watched)


def measure_asking(
    model: PreTrainedModel,
    methods: Mapping[str, TokenPruner],
    inputs: Mapping[str, Any],
    *,
    new: int = 32,
    repeats: int = 3,
    fields: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> list[dict]:
    """Rows of the dense model and of each method, for one question about a picture: medians over ``repeats``.

    Args:
        model: not pruned.
        inputs: one row, as a processor makes it; with ``mm_encoder_outputs`` in the place of the picture no tower runs.
        new: tokens after the prompt.
        fields: of all rows.
    """
    runs: dict[str, list[Run]] = {}
    ways: dict[str, TokenPruner | None] = {DENSE: None, **methods}
    total, done = len(ways) * (repeats + 1), 0
    for turn in range(repeats + 1):
        for name, method in ways.items():
            if progress:
                progress(name, done, total)
            done += 1
            with pruned_by(model, method):
                measured = run(model, inputs, new)
            if turn:  # the first one warms up
                runs.setdefault(name, []).append(measured)
    known = {"precision": PRECISIONS[model.dtype], "repeats": repeats, "context": inputs["input_ids"].shape[1]}
    known |= fields or {}
    visual = sum(int((inputs["input_ids"] == number).sum()) for number in placeholders(model.config).values())
    return [_row(name, own, runs[DENSE], visual, ways[name], known) for name, own in runs.items()]


def _row(
    name: str, own: list[Run], dense: list[Run], visual: int, method: TokenPruner | None, known: Mapping[str, Any]
) -> dict:
    """The row of the runs of one method."""
    middle = lambda some, what: float(np.median([what(one) for one in some]))  # noqa: E731
    total, whole = (middle(some, lambda one: one.total) for some in (own, dense))
    totals, report, steps = [one.total for one in own], own[0].report, len(dense[0].steps)
    layers = report.get("by_layer") or [visual]
    keep = getattr(method, "keep", None)
    tower = middle(dense, lambda one: one.tower or 0.0) / whole
    told = (
        f"the tower is {tower:.0%} of the dense model's time for the prompt and {steps} tokens: what leaves behind it "
    )
    told += f"makes the whole {1 / max(tower, 1e-9):.1f} times as fast at most"
    return row(
        method=name,
        mode="dense" if method is None else "pruned",
        runtime="torch",
        batch_size=1,
        threads=torch.get_num_threads(),
        flops_ratio=1 / report.get("flops_fraction", 1.0),
        tower_ms=None if own[0].tower is None else 1e3 * middle(own, lambda one: one.tower),
        prefill_ms=1e3 * middle(own, lambda one: one.prefill),
        latency_ms_p50=1e3 * middle(own, lambda one: np.median(one.steps)) if steps else None,
        cache_mb=own[0].size / MB,
        cache_mb_full=dense[0].size / MB,
        visual=layers,
        visual_mean=sum(layers) / len(layers),
        speedup_unpadded=whole / total,
        spread=float((np.percentile(totals, 75) - np.percentile(totals, 25)) / np.median(totals)),
        note="the tower did not run, and is in no time but its own" if dense[0].tower is None else told,
        **({"keep": keep} if isinstance(keep, (int, float)) else {}),
        **environment(),
        **known,
    )
