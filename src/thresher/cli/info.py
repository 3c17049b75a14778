"""The command ``info``."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from ..experiments.spec import ModelSpec
from .console import Screen


def info(spec: ModelSpec, screen: Screen) -> None:
    """What is in a saved model, and how it prunes.

    \b
    Examples:
      thresher info runs/reviews
      thresher info runs/reviews --json -
    """
    from ..experiments.describe import describe

    screen.show([describe(spec.model)], lambda rows, width: listing(rows[0]))


def listing(row: dict[str, Any]) -> Table:
    """Names and values, one below the other."""
    grid = Table.grid("name", "value", padding=(0, 2))
    for name, value in row.items():
        if isinstance(value, dict):
            value = "\n".join(f"{key}: {entry}" for key, entry in value.items() if entry is not None)
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        elif value is None:
            value = "none: the model is dense" if name == "pruning" else "–"
        grid.add_row(name.replace("_", " "), Text(str(value)))
    return grid
