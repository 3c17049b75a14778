"""Pictures of a comparison: quality against FLOPs and time, and a leaderboard. They need matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..evaluation.rows import COLOURS, GREYS, MARKERS, whole

STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"svg.hashsalt": "thresher", "svg.fonttype": "none"}  # the same picture is the same, small file


@contextmanager
def drawing(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """A figure of so many inches, saved at the end as the suffix of ``path`` says (png or svg)."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the figure needs matplotlib, which is missing: pip install 'thresher[plot]'") from None
    with rc_context(STYLE):
        figure, kind = Figure(figsize=(width, height), dpi=150, layout="constrained"), Path(path).suffix[1:]
        yield figure
        with whole(path) as temporary:
            figure.savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else None)


def pareto(rows: list[dict], path: str | Path, title: str | None = None) -> None:
    """Quality over the FLOPs that are saved and, where times were taken, over the speed-up at each batch size.

    One line per method through its budgets, with the 95 % interval of its drop (of the difference to the dense model,
    not of the quality); grey: the points that no other one beats in both, and dashed the dense model.

    Raises:
        ValueError: nothing to draw, or matplotlib is missing.
        OSError: the file cannot be written.
    """
    rows = [r for r in rows if r["mode"] == "pruned" and r["quality"] is not None and r["flops_ratio"]]
    if not rows:
        raise ValueError("there is nothing to draw: no row of a pruned model holds quality and FLOPs")
    once = {(r["method"], r["target_flops"]): r for r in rows}.values()
    panels = [("× fewer FLOPs than dense, own length", "flops_ratio", list(once))]
    for size in sorted({r["batch_size"] for r in rows if r["speedup_unpadded"]}):
        timed = [r for r in rows if r["batch_size"] == size and r["speedup_unpadded"]]
        panels.append((f"× faster than dense unpadded, batch size {size}", "speedup_unpadded", timed))
    names = sorted({r["method"] for r in rows})
    with drawing(path, 1 + 4.2 * len(panels), 4.4) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (label, field, points) in zip(axes, panels, strict=True):
            _cloud(axis, names, field, points)
            axis.set_xlabel(label)
        axes[0].set_ylabel(f"{rows[0]['metric']}, points")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False, fontsize=8)
        if title:
            figure.suptitle(title, fontweight="bold")


def _cloud(axis, names: list[str], field: str, points: list[dict]) -> None:
    """One panel of ``pareto``."""
    axis.grid(color="#E4E4E4", linewidth=0.7)
    best = front([(r[field], r["quality"]) for r in points])
    axis.step(*zip(*best, strict=True), where="pre", color=GREYS["dense-padded"], linewidth=4, alpha=0.6, zorder=1)
    axis.axhline(points[0]["quality_dense"], color=GREYS["dense-unpadded"], linestyle="--", linewidth=1, label="dense")
    for i, name in enumerate(names):
        own = sorted((r for r in points if r["method"] == name), key=lambda r: r[field])
        if not own:
            continue
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "label": name}
        xs, ys = ([r[of] for r in own] for of in (field, "quality"))
        axis.errorbar(xs, ys, yerr=reach(own)[::-1], linewidth=1.2, elinewidth=0.7, capsize=2, zorder=3, **style)
    axis.margins(x=0.08)


def reach(rows: list[dict]) -> tuple[list[float], list[float]]:
    """How far the interval of each drop reaches below it and above it."""
    drops = [(r["quality_dense"] - r["quality"], r) for r in rows]
    below, above = (
        [max(0.0, x) for x in side]
        for side in zip(*((d - r["interval_low"], r["interval_high"] - d) for d, r in drops), strict=True)
    )
    return below, above


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (x, y) that no other one beats in both, by rising x."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept[::-1]


def leaderboard(rows: list[dict], path: str | Path, title: str | None = None) -> None:
    """The drop of each row of a pruned model with its 95 % interval, the first row on top, and its group.

    Raises:
        ValueError: nothing to draw, or matplotlib is missing.
        OSError: the file cannot be written.
    """
    rows = [r for r in rows if r["mode"] == "pruned" and r["quality"] is not None]
    if not rows:
        raise ValueError("there is nothing to draw: no row of a pruned model holds a quality")
    with drawing(path, 6.4, 0.9 + 0.24 * len(rows)) as figure:
        axis, places = figure.subplots(), range(len(rows))
        drops = [r["quality_dense"] - r["quality"] for r in rows]
        axis.axvline(0, color=GREYS["dense-unpadded"], linestyle="--", linewidth=1)
        axis.errorbar(drops, places, xerr=reach(rows), fmt="o", color=COLOURS[0], markersize=4, linewidth=1, capsize=2)
        axis.set_yticks(places, [r["method"] for r in rows])
        groups = axis.secondary_yaxis("right")
        groups.set_yticks(places, [r.get("group") or "" for r in rows])
        groups.spines["right"].set_visible(False)
        for side in (axis, groups):
            side.tick_params(axis="y", length=0)
        axis.invert_yaxis()
        axis.grid(axis="x", color="#E4E4E4", linewidth=0.7)
        axis.set_xlabel(
            f"{rows[0]['metric']}, points below dense; right: methods that share a letter are not told apart"
        )
        if title:
            axis.set_title(title, loc="left", fontweight="bold")
