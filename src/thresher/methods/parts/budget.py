"""Meet a budget of FLOPs by one number: the mixin of all methods that have one, and the search for the number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor

from ...core.pruner import Batch, Record, RunBatch, TokenPruner

TOLERANCE = 0.002  # of the target; tokens are discrete, so a budget is met closely and not exactly
NEAR, FAR = 1e-6, 64.0  # how close the search looks, and how far
MISSED = 0.1  # of a target: so far from it no budget is met
PENALTY = 10.0  # weight of the squared distance from the target


class OutOfReach(ValueError):
    """Say that a budget cannot be met, whatever leaves."""


class Budgeted(TokenPruner):
    """Bring a method onto a budget: ``target_flops``, the MACs to be left as a share of the dense model's on the same
    unpadded inputs. The ``knob`` of the method is turned on a calibration set until the budget is met.
    """

    target_flops = cast("float | None", None)  # not annotated: a field of each method, in its own place

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_flops is not None and not 0 < self.target_flops <= 1:
            raise ValueError(f"target_flops={self.target_flops}: expected a fraction of the dense MACs in (0, 1]")

    @property
    def softened(self) -> float:
        """The share of the soft stage that is over."""
        return self.progress / max(1e-9, self.soft_until)

    def knob(self) -> Callable[[float], None] | None:
        """Return a function of one number that changes how much is removed: 0 as it is now, more removes more. None:
        there is no such number."""
        return None

    def turn_shares(self, field: str, sign: int) -> Callable[[float], None]:
        """Return a knob that multiplies ``shares``, the values of a ``field``, by exp(``sign`` * by), in
        thousandths."""
        start: tuple[float, ...] = getattr(self, "shares", ())

        def turn(by: float) -> None:
            shares = tuple(min(1.0, max(0.001, round(share * math.exp(sign * by), 3))) for share in start)
            setattr(self, field, shares)

        return turn

    @torch.no_grad()
    def calibrate(self, forward: RunBatch, batches: Iterable[Batch]) -> dict[str, float]:
        """Turn the knob until ``target_flops`` is met on ``batches``; returns what was reached (empty: no budget).

        Raises:
            OutOfReach: the target cannot be reached.
        """
        target = self.target_flops
        turn = None if target is None else self.knob()
        if target is None or turn is None:
            return {}
        batches = list(batches)
        tried: list[tuple[float, float]] = []

        def fraction(by: float) -> float:
            turn(by)
            records = [forward(batch) for batch in batches]
            tried.append((float(sum(r.used for r in records) / sum(r.dense for r in records)), by))
            return tried[-1][0]

        reached = bisect_to_budget(fraction, target)
        least = min(tried)[0] > target * 1.02
        if least or abs(reached - target) > MISSED * target:
            turn(0.0)
            what = "with all gone that may leave" if least else f"the nearest that {self.name} came,"
            raise OutOfReach(
                f"target_flops={target} cannot be reached at={list(self.sites)}: {what} {reached:.3f} of "
                f"the MACs are left; prune at {'earlier' if least else 'other'} layers or choose another target"
            )
        return {"flops_fraction": reached, "shift": tried[-1][1]}

    def penalty(self, record: Record, share: float, weight: float | None = None) -> Tensor:
        """Compute a scalar: ``weight`` (10) times the squared distance of the share of the MACs from what is asked for
        when a ``share`` of the soft stage is over, see ``falling`` (Bonnaerens and Dambre, TMLR 2023)."""
        assert self.target_flops is not None
        distance = record.flops_fraction() - falling(self.target_flops, share)
        return (PENALTY if weight is None else weight) * distance**2


def falling(target: float, share: float) -> float:
    """Compute the share of the MACs that is asked for when a ``share`` of a soft stage is over: it falls from 1 to
    ``target`` over the first half."""
    return 1 + (target - 1) * min(1.0, 2 * share)


def bisect_to_budget(falling: Callable[[float], float], target: float) -> float:
    """Bring a falling function close to ``target``, searching from 0 on. Returns its value there, in the last call."""
    tried: dict[float, float] = {}
    last = 0.0

    def call(at: float) -> float:
        nonlocal last
        last, tried[at] = at, falling(at)
        return tried[at]

    past, at, value = 0.0, 0.0, call(0.0)
    step = 0.05 if value > target else -0.05
    while abs(value - target) > TOLERANCE * target and (value > target) == (step > 0) and abs(at) <= FAR:
        past, at, step = at, at + step, 2 * step
        value = call(at)
    low, high, halve = min(past, at), max(past, at), False
    while abs(value - target) > TOLERANCE * target and abs(at) <= FAR and high - low > NEAR:
        above, below, width = tried[low] - target, target - tried[high], high - low
        share = 0.5 if halve else min(max(above / (above + below), 0.02), 0.98)  # halfway, or on the line between
        middle = low + share * width
        value = call(middle)
        low, high = (middle, high) if value > target else (low, middle)
        halve = high - low > width / 2
    best = min(tried, key=lambda at: (abs(tried[at] - target), abs(at)))  # of a plateau where it begins
    return value if best == last else falling(best)
