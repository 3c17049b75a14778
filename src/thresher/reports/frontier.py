"""What a search for schedules found: the best of them by cost, as a table and as a picture.

A row is what ``tune`` says of one schedule. The picture needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.rows import COLOURS, whole

if TYPE_CHECKING:
    from rich.table import Table

PERCENT = "{:.1%}".format


def kept(share: float | int) -> str:
    """A ``keep`` in words: a whole number counts tokens."""
    return f"{share} token{'s' * (share > 1)}" if isinstance(share, int) else f"{share:g}"


COLUMNS = {  # name in a row: (heading, form)
    "at": ("after layers", lambda at: ", ".join(map(str, at))),
    "keep": ("keep", lambda keep: ", ".join(map(kept, keep))),
    "flops_fraction": ("MACs", PERCENT),
    "latency_ms": ("ms", "{:.2f}".format),
    "divergence": ("divergence", "{:.4f}".format),
    "disagreement": ("disagree", PERCENT),
    "drop": ("drop", PERCENT),
    "tested": ("tested", PERCENT),
    "bound": ("bound", PERCENT),
}
MARK = "\N{BLACK RIGHT-POINTING TRIANGLE}"


def best(rows: list[dict], cost: str = "flops_fraction") -> list[dict]:
    """The rows that no cheaper one equals in divergence, the dearest first; tested and chosen ones stay."""
    found, least = [], float("inf")
    for row in sorted(rows, key=lambda row: (row[cost], row["divergence"])):
        if row["divergence"] < least or row["chosen"] or row["bound"] is not None:
            found.append(row)
        least = min(least, row["divergence"])
    return found[::-1]


def table(rows: list[dict]) -> Table:
    """The rows for the screen, the chosen one marked; columns that hold nothing are left out."""
    from rich import box
    from rich.table import Table

    columns = {name: form for name, form in COLUMNS.items() if any(row[name] is not None for row in rows)}
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    shown.add_column("")
    for name, (heading, _) in columns.items():
        shown.add_column(heading, justify="left" if name in ("at", "keep") else "right", no_wrap=True)
    for row in rows:
        cells = ["\N{EN DASH}" if row[name] is None else form(row[name]) for name, (_, form) in columns.items()]
        shown.add_row(MARK if row["chosen"] else "", *cells, style="bold" if row["chosen"] else "")
    return shown


def picture(rows: list[dict], profile: dict[int, dict[float, float]], path: str | Path, limit: Any = None) -> None:
    """One PNG: what every schedule costs and how far its answers are from the dense model's, the best joined, the
    chosen one ringed; beside it the sensitivity of each layer.

    Args:
        rows: of all schedules that were run.
        profile: layer -> share of the tokens that stays there alone -> divergence.
        limit: the budget, where it is one of disagreement or drop.

    Raises:
        ValueError: there is nothing to draw, or matplotlib is missing.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib import colormaps, rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the picture needs matplotlib, which is missing: pip install 'thresher[plot]'") from None
    if not rows:
        raise ValueError("there is nothing to draw: no schedule was run")
    timed = all(row["latency_ms"] is not None for row in rows)
    cost, label = (
        ("latency_ms", "ms per text, by the table") if timed else ("flops_fraction", "share of the dense MACs")
    )
    panels = [("divergence", "divergence")]
    panels += [("disagreement", "disagreement, %")] if rows[0]["disagreement"] is not None else []
    with rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4 * len(panels) + 4, 3.8), dpi=150, layout="constrained")
        *fronts, layers = figure.subplots(1, len(panels) + 1)
        for axis, (name, heading) in zip(fronts, panels, strict=True):
            scale = 100 if name != "divergence" else 1
            points = [(row[cost], scale * row[name]) for row in rows]
            axis.scatter(*zip(*points, strict=True), s=12, color="#B8B8B8", label="run")
            front = [(row[cost], scale * row[name]) for row in best(rows, cost)]
            axis.plot(*zip(*front, strict=True), color=COLOURS[0], marker="o", markersize=4, label="best")
            for row in rows:
                if row["bound"] is not None and name != "divergence":
                    axis.vlines(row[cost], 100 * row["tested"], 100 * row["bound"], color=COLOURS[2], linewidth=1.5)
                if row["chosen"]:
                    ring = {"s": 110, "facecolors": "none", "edgecolors": COLOURS[1], "linewidths": 1.8}
                    axis.scatter(row[cost], scale * row[name], **ring, label="chosen", zorder=3)
            if limit is not None and name != "divergence":
                axis.axhline(100 * limit, color="black", linestyle="--", linewidth=1, label="limit")
            axis.set(title=f"{name} against cost", xlabel=label, ylabel=heading)
            axis.legend(frameon=False, fontsize=8)
        shades = colormaps["viridis"]([0.9 * i / max(1, len(profile) - 1) for i in range(len(profile))])
        for (layer, points), shade in zip(profile.items(), shades, strict=True):
            kept = sorted({1.0: 0.0, **points}.items())
            layers.plot(*zip(*kept, strict=True), color=shade, marker="o", markersize=3, label=f"layer {layer}")
        layers.set(title="one layer alone", xlabel="share of the tokens that stays", ylabel="divergence")
        layers.legend(frameon=False, fontsize=8)
        with whole(path) as temporary:
            figure.savefig(temporary, format="png")
