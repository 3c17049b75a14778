"""The command ``serve``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from ..experiments.spec import ServeSpec

if TYPE_CHECKING:
    from .console import Screen


def serve(spec: ServeSpec, screen: Screen) -> None:
    """Serve a model over HTTP, for clients of Text Embeddings Inference, OpenAI and Cohere; Ctrl-C or SIGTERM ends it.

    \b
    Examples:
      thresher serve runs/reviews
      thresher serve runs/reranker-onnx --port 8080 --threads 4 --name reranker
      thresher serve runs/reranker --host 0.0.0.0 --api-key secret --queue-tokens 65536
    """
    from ..experiments.serve import serve as job

    with screen.aside():
        row = job(spec)
    screen.show([row], lambda rows, width: listing(rows[0]))
    if not row["finished"]:
        raise typer.Exit(1)


def listing(row: dict[str, Any]) -> Table:
    """Names and numbers, one below the other."""
    grid = Table.grid("name", "value", padding=(0, 2))
    shown = {"requests answered": f"{row['requests']:,}", "refused": f"{row['refused']:,}", "texts": f"{row['rows']:,}"}
    shown["tokens"] = f"{row['tokens']:,}"
    if row["padding_ratio"]:
        shown["padded / needed"] = f"{row['padding_ratio']:.3f}"
    for name, value in shown.items():
        grid.add_row(name, value)
    return grid
