"""Meeting a budget by one number. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable

TOLERANCE = 0.002  # of the target; tokens are discrete, so a budget is met closely and not exactly
NEAR, FAR = 1e-6, 64.0  # how close it looks, and how far


def search(falling: Callable[[float], float], target: float) -> float:
    """Bring a falling function as close to ``target`` as was found, from 0 on; returns its value there, where it was
    called last."""
    tried: dict[float, float] = {}
    last = 0.0

    def call(at: float) -> float:
        nonlocal last
        last, tried[at] = at, falling(at)
        return tried[at]

    before, at, value = 0.0, 0.0, call(0.0)
    step = 0.05 if value > target else -0.05
    while abs(value - target) > TOLERANCE * target and (value > target) == (step > 0) and abs(at) <= FAR:
        before, at, step = at, at + step, 2 * step
        value = call(at)
    low, high, halve = min(before, at), max(before, at), False
    while abs(value - target) > TOLERANCE * target and abs(at) <= FAR and high - low > NEAR:
        above, below, width = tried[low] - target, target - tried[high], high - low
        share = 0.5 if halve else min(max(above / (above + below), 0.02), 0.98)  # halfway, or on the line between
        middle = low + share * width
        value = call(middle)
        low, high = (middle, high) if value > target else (low, middle)
        halve = high - low > width / 2
    best = min(tried, key=lambda at: (abs(tried[at] - target), abs(at)))  # of a plateau where it begins
    return value if best == last else falling(best)
