"""The command ``compare``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..experiments.spec import CompareSpec
from .console import Screen, first_line

if TYPE_CHECKING:
    from ..experiments.compare import Run


def compare(spec: CompareSpec, screen: Screen) -> None:
    """Train several methods to several budgets from one dense model, and tell which are better. A decoder is asked
    about long texts instead, over caches of several methods and sizes.

    \b
    Examples:
      thresher compare bert-base-uncased --data reviews.csv --out runs/compared
      thresher compare runs/dense --epochs 0 --data reviews.csv --untrained --methods topk,evit,tome --out runs/quick
      thresher compare bert-base-uncased --data reviews.csv --methods ltp,top --targets 0.4 --seeds 0,1,2 --out runs/abc
      thresher compare a-decoder --data squad --tasks needle,squad --methods snapkv,kvzip --out runs/caches
    """
    from ..experiments.cache_spec import decodes
    from ..experiments.compare import PAGE, TABLE
    from ..experiments.compare import compare as job
    from ..reports.prompts import comparison_table
    from ..reports.tables import comparison

    causal = decodes(spec.model)
    watched: Any = screen.progress() if causal else follow(screen)
    with screen.aside(), watched as tell:
        rows = job(spec, progress=tell)
    screen.show(rows, comparison_table if causal else comparison)
    screen.say(f"all runs are in {spec.out}, the figures in {spec.out / TABLE}, to look at in {spec.out / PAGE}")


@contextmanager
def follow(screen: Screen) -> Iterator[Callable[[list[Run]], None]]:
    """A table that follows the runs on a terminal; elsewhere a line for each that ends. It is told all runs."""
    from rich.live import Live

    ended: set[str] = set()
    drawn = not screen.quiet and sys.stderr.isatty()
    live_table = Live(console=Console(stderr=True), transient=True, auto_refresh=False) if drawn else nullcontext()
    with live_table as live:

        def tell(runs: list[Run]) -> None:
            if live is not None:
                live.update(followed(runs), refresh=True)
                return
            for run in runs:
                if run.state in ("done", "failed") and run.name not in ended:
                    ended.add(run.name)
                    screen.say(f"{run.name}: {outcome(run)}")

        yield tell


def followed(runs: list[Run]) -> Table:
    """Methods and targets by seeds, and how far each is."""
    seeds = list(dict.fromkeys(run.seed for run in runs))
    lines: dict[tuple, dict[int, str]] = {}
    for run in runs:
        lines.setdefault((run.method, run.target), {})[run.seed] = outcome(run)
    table = Table("method", "target", *(f"seed {seed}" for seed in seeds), box=box.SIMPLE_HEAD)
    for (method, target), of in lines.items():
        table.add_row(method, "" if target is None else f"{target:g}", *(of.get(seed, "") for seed in seeds))
    return table


def outcome(run: Any) -> str:
    """The state of a run, and its figures once it is done."""
    if run.state == "done":
        return f"{run.row['quality']:.2f} {run.row['metric']}, {run.row['flops_ratio']:.2f} times fewer FLOPs"
    return f"failed, {first_line(run.reason)}" if run.state == "failed" else run.state
