"""The Pareto front of things that have a cost and a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")


def pareto_front(items: Iterable[Item], cost: Callable[[Item], Any], loss: Callable[[Item], Any]) -> list[Item]:
    """Select the items that no cheaper one equals in loss, the cheapest first; of equal ones the first given."""
    front: list[Item] = []
    for item in sorted(items, key=lambda item: (cost(item), loss(item))):
        if not front or loss(item) < loss(front[-1]):
            front.append(item)
    return front
