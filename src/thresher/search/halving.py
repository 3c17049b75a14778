"""Successive halving: train many candidates a little, the better half of them more (Jamieson and Talwalkar, 2016)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def successive_halving(
    candidates: Mapping[str, Any], train: Callable[[str, Any, int], float], rungs: Sequence[int]
) -> tuple[str, dict[str, list[float]]]:
    """Find the candidate with the least loss after short trainings.

    Args:
        candidates: what is tried, by name.
        train: takes a name, its candidate and a number of steps, trains it, on or anew, and returns the loss on
            held-out rows.
        rungs: steps of each round. All take part in the first, and the better half, rounded up, in each that follows;
            the last one decides.

    Raises:
        ValueError: no loss is a number.

    Returns:
        The name of the best, and of each candidate its loss after every round that it was in.
    """
    losses: dict[str, list[float]] = {name: [] for name in candidates}
    left = [*candidates]
    for place, steps in enumerate(rungs):
        if place:
            left = left[: -(-len(left) // 2)]
        if len(left) > 1 or not place:
            for name in left:
                losses[name].append(train(name, candidates[name], steps))
            left.sort(key=lambda name: (math.isnan(losses[name][-1]), losses[name][-1]))
    if math.isnan(losses[left[0]][-1]):
        raise ValueError(
            "every short training ended in a loss that is no number: are the weights or the labels broken?"
        )
    return left[0], losses
