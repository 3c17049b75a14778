"""What a step of decoding takes, against the entries that a cache holds: measured, for ``target_ms_per_token``."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ..core.attachment import at_rest
from .ragged import RaggedLayer

if TYPE_CHECKING:
    from .hooks import CacheHooks

GRID = (64, 512, 2048)  # entries of a row
STEPS = 7  # of which the median counts


@dataclass(frozen=True)
class StepCosts:
    """Milliseconds of a step of decoding, a straight line over the entries that each row holds.

    Attributes:
        entries: numbers of entries, two or more.
        ms: what a step takes with so many.
    """

    entries: tuple[int, ...]
    ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(set(self.entries)) < 2 or len(self.entries) != len(self.ms):
            raise ValueError(f"entries={self.entries}, ms={self.ms}: expected two or more points")

    @property
    def line(self) -> tuple[float, float]:
        """ms without an entry, and of one more; more entries never take less time, and what looks so is noise."""
        slope, start = statistics.linear_regression(self.entries, self.ms)
        return (start, slope) if slope > 0 else (statistics.mean(self.ms), 0.0)

    def at(self, entries: int) -> float:
        """ms of a step with so many entries."""
        start, slope = self.line
        return start + slope * entries

    def room(self, ms: float, least: int, rows: int) -> int:
        """The most entries with which a step takes no longer than ``ms``; ``least`` of them are held in any case.

        Raises:
            ValueError: it takes longer with ``least``.
        """
        if self.at(least) > ms:
            raise ValueError(
                f"target_ms_per_token={ms:g} cannot be reached: with the {least} entries that are held in any case, a "
                f"step of {rows} at once takes {self.at(least):.3g} ms here: give that or more"
            )
        start, slope = self.line
        most = 2**30 if slope == 0 else int((ms - start) / slope + 1e-9)
        return max(least, min(most, 2**30))


@torch.no_grad()
def measured(hooks: CacheHooks, rows: int) -> StepCosts:
    """Measure steps of the model of ``hooks`` on this machine, over caches of random entries. Scoring is not in it."""
    most = None if hooks.rotary else hooks.architecture.max_tokens
    room = GRID[-1] if most is None else most - STEPS - 2
    grid = GRID if room >= GRID[-1] else (room // 4, room // 2, room)
    return StepCosts(grid, tuple(_step(hooks, rows, entries) for entries in grid))


def _step(hooks: CacheHooks, rows: int, entries: int) -> float:
    """The median ms of a step with so many entries of each row, in ``rows`` rows."""
    device, times = hooks.architecture.base.device, []
    step: dict[str, Any] = {"input_ids": torch.zeros(rows, 1, dtype=torch.long, device=device)}
    step["past_key_values"] = cache = hooks.adopted(DynamicCache(config=hooks.architecture.base.config), {})
    with hooks.asking(mode="dense"), at_rest(hooks.model):
        for number in range(STEPS + 1):
            begun = time.perf_counter()
            answer: Any = hooks.model(**step)
            answer[0].sum().item()  # waits for the device
            times.append(1e3 * (time.perf_counter() - begun))
            if number == 0:  # which has shown the shapes
                for layer in cache.layers:
                    _fill(layer, entries - 1)
    return statistics.median(times[1:])


def _fill(layer: Any, count: int) -> None:
    """Put so many random entries into a layer of a cache."""
    if getattr(layer, "keys", None) is None or layer.keys.dim() != 4:
        return  # a state that does not grow
    keys, values = (x[:, :, :1].expand(-1, -1, count, -1) for x in (layer.keys, layer.values))
    layer.update(torch.randn_like(keys), torch.randn_like(values))
    if isinstance(layer, RaggedLayer):
        layer.pack()
