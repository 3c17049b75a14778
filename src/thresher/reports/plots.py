"""Figures of measurements: times, quality against cost, a leaderboard, a search, a training. They need matplotlib.

Every function raises ValueError where there is nothing to draw or matplotlib is missing, and OSError where the file
cannot be written.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.pareto import pareto_front
from .style import COLOURS, DARK, DENSE, GREYS, LIGHT, MARKERS, MIDDLE, drawing, legend_below, shades
from .tables import is_dense, name_of, number, text, varying


def bench(rows: list[dict], path: str | Path, title: str | None = None) -> None:
    """Draw the pace of every row as bars, and quality against speed-up with the FLOPs ratio beside it.

    Left, one panel per batch size: milliseconds per call at batch size 1 (a line goes on to the 95th percentile),
    examples per second at larger ones. Right: one point per row that is not the dense model, over its speed-up against
    dense unpadded; the hollow point beside it is the FLOPs ratio, the dots between them what did not become time.
    """
    rows = [r for r in rows if r["samples_per_second"]]
    if not rows:
        raise ValueError("there is nothing to draw: no row holds a time")
    sizes, names = sorted({r["batch_size"] for r in rows}), varying(rows)
    labels = dict.fromkeys(_label(r, names, "target_flops") for r in rows if not is_dense(r))
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    height = max(4.2, 0.9 * len(sizes) + 0.3 * len(rows) + 0.5)
    with drawing(path, 10.5, height, title) as figure:
        halves: Any = figure.subfigures(1, 2, width_ratios=(1.1, 1), wspace=0.03)
        left, right = halves
        panels = [[r for r in rows if r["batch_size"] == size] for size in sizes]
        axes = left.subplots(len(sizes), 1, squeeze=False, height_ratios=[len(panel) + 1 for panel in panels])[:, 0]
        for axis, size, panel in zip(axes, sizes, panels, strict=True):
            _bars(axis, size, panel, colours, names)
        _speeds(right.subplots(), rows, sizes, colours, names)


def _bars(axis, size: int, rows: list[dict], colours: dict, names: list[str]) -> None:
    """One panel of paces; the first row is on top."""
    single = size == 1 and all(r["latency_ms_p50"] and r["latency_ms_p95"] for r in rows)
    values = [r["latency_ms_p50" if single else "samples_per_second"] for r in rows]
    ends = [r["latency_ms_p95"] for r in rows] if single else values
    fills = [GREYS[r["mode"]] if is_dense(r) else colours[_label(r, names, "target_flops")] for r in rows]
    places = range(len(rows))
    axis.barh(places, values, color=fills, height=0.68)
    axis.hlines(places, values, ends, color=DARK, linewidth=1)
    for place, value, end in zip(places, values, ends, strict=True):
        label = f"{number(value)} / {number(end)}" if single else number(value)
        axis.annotate(label, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(places, [_label(r, names) for r in rows])
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False)
    axis.invert_yaxis()
    axis.set_xlim(0, (1.3 if single else 1.15) * max(ends))
    axis.set_title(f"batch size {size}")
    axis.set_xlabel("latency, ms: median / 95th percentile" if single else "throughput, examples per second")


def _speeds(axis, rows: list[dict], sizes: list[int], colours: dict, names: list[str]) -> None:
    """Quality over speed-up: a colour for each label, whose points are joined, and a marker for each batch size."""
    metrics = {r["metric"] for r in rows}
    axis.set_title("quality against speed")
    axis.set_xlabel("× faster than dense unpadded (filled), × fewer FLOPs (hollow)")
    axis.set_ylabel(f"{metrics.pop() if len(metrics) == 1 and None not in metrics else 'quality'}, points")
    axis.axvline(1, **DENSE | {"linestyle": ":"})
    points = [r for r in rows if not is_dense(r) and r["speedup_unpadded"] and r["quality"] is not None]
    dense = {r["quality_dense"] for r in points} - {None}
    for level in dense:
        axis.axhline(level, **DENSE)
    for (label, colour), (i, size) in itertools.product(colours.items(), enumerate(sizes)):
        own = [r for r in points if _label(r, names, "target_flops") == label and r["batch_size"] == size]
        own.sort(key=lambda r: r["speedup_unpadded"])
        style = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "markersize": 7}
        axis.plot([r["speedup_unpadded"] for r in own], [r["quality"] for r in own], linewidth=1.4, zorder=3, **style)
        for r in own if all(r["flops_ratio"] for r in own) else ():
            ends, level = (r["speedup_unpadded"], r["flops_ratio"]), (r["quality"], r["quality"])
            axis.plot(ends, level, linestyle=":", linewidth=1.2, markerfacecolor="white", zorder=2, **style)
    levels = [r["quality"] for r in points] + list(dense)
    if not points:
        axis.text(0.02, 0.95, "no quality measured", transform=axis.transAxes, color=MIDDLE)
    elif max(levels) - min(levels) < 2:  # tenths of a point shall look like tenths
        middle = (max(levels) + min(levels)) / 2
        axis.set_ylim(middle - 1.2, middle + 1.2)
    keys = [{"color": colour, "marker": "s", "linestyle": "", "label": label} for label, colour in colours.items()]
    for i, size in enumerate(sizes):
        marker = MARKERS[i % len(MARKERS)]
        keys.append({"color": MIDDLE, "marker": marker, "linestyle": "", "label": f"batch size {size}"})
    keys += [DENSE | {"label": "dense quality"}] if dense else []
    handles = [axis.plot([], [], **key)[0] for key in keys]
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)


def _label(row: dict, names: list[str], *without: str) -> str:
    """The name of a row with the fields in which it differs from others."""
    return " ".join([name_of(row), *(text(row[n]) for n in names if n not in without and row[n] is not None)])


def pareto(rows: list[dict], path: str | Path, title: str | None = None) -> None:
    """Draw quality over the FLOPs that are saved and, where times were taken, over the speed-up at each batch size.

    One line per method through its budgets, with the 95 % interval of its drop (of the difference to the dense model,
    not of the quality); grey: the points that no other one beats in both, and dashed the dense model.
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
    with drawing(path, 1 + 4.2 * len(panels), 4.4, title) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (label, field, points) in zip(axes, panels, strict=True):
            _cloud(axis, names, field, points)
            axis.set_xlabel(label)
        axes[0].set_ylabel(f"{rows[0]['metric']}, points")
        legend_below(figure)


def _cloud(axis, names: list[str], field: str, points: list[dict]) -> None:
    """One panel of ``pareto``."""
    best = pareto_front(((r[field], r["quality"]) for r in points), lambda p: -p[0], lambda p: -p[1])[::-1]
    axis.step(*zip(*best, strict=True), where="pre", color=LIGHT, linewidth=4, alpha=0.6, zorder=1)
    axis.axhline(points[0]["quality_dense"], label="dense", **DENSE)
    for i, name in enumerate(names):
        own = sorted((r for r in points if r["method"] == name), key=lambda r: r[field])
        if not own:
            continue
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "label": name}
        xs, ys = ([r[of] for r in own] for of in (field, "quality"))
        axis.errorbar(xs, ys, yerr=reach(own)[::-1], linewidth=1.2, elinewidth=0.7, capsize=2, zorder=3, **style)


def reach(rows: list[dict]) -> tuple[list[float], list[float]]:
    """How far the interval of each drop reaches below it and above it."""
    drops = [(r["quality_dense"] - r["quality"], r) for r in rows]
    below, above = (
        [max(0.0, x) for x in side]
        for side in zip(*((d - r["interval_low"], r["interval_high"] - d) for d, r in drops), strict=True)
    )
    return below, above


def leaderboard(rows: list[dict], path: str | Path, title: str | None = None) -> None:
    """Draw the drop of each row of a pruned model with its 95 % interval, the first row on top, and its group."""
    rows = [r for r in rows if r["mode"] == "pruned" and r["quality"] is not None]
    if not rows:
        raise ValueError("there is nothing to draw: no row of a pruned model holds a quality")
    with drawing(path, 6.4, 0.9 + 0.24 * len(rows)) as figure:
        axis, places = figure.subplots(), range(len(rows))
        drops = [r["quality_dense"] - r["quality"] for r in rows]
        axis.axvline(0, **DENSE)
        axis.errorbar(drops, places, xerr=reach(rows), fmt="o", color=COLOURS[0], markersize=4, linewidth=1, capsize=2)
        axis.set_yticks(places, [r["method"] for r in rows])
        groups = axis.secondary_yaxis("right")
        groups.set_yticks(places, [r.get("group") or "" for r in rows])
        groups.spines["right"].set_visible(False)
        for side in (axis, groups):
            side.tick_params(axis="y", length=0)
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.set_xlabel(
            f"{rows[0]['metric']}, points below dense; right: methods that share a letter are not told apart"
        )
        if title:
            axis.set_title(title, fontweight="bold")


def search(rows: list[dict], profile: dict[int, dict[float, float]], path: str | Path, limit: Any = None) -> None:
    """Draw what every schedule costs and how far its answers are from the dense model's, and each layer's sensitivity.

    The Pareto front is joined, the chosen schedule is ringed, bars reach from the tested rate to its bound.

    Args:
        rows: of all schedules that were run.
        profile: layer -> share of the tokens that stays there alone -> divergence.
        limit: the budget, where it is one of disagreement or drop.
    """
    if not rows:
        raise ValueError("there is nothing to draw: no schedule was run")
    timed = all(row["latency_ms"] is not None for row in rows)
    cost, label = ("latency_ms", "ms per text, by the table") if timed else ("flops_fraction", "share of dense MACs")
    panels = [("divergence", 1, "divergence")]
    panels += [("disagreement", 100, "disagreement, %")] if rows[0]["disagreement"] is not None else []
    with drawing(path, 4 * len(panels) + 4, 3.8) as figure:
        *fronts, layers = figure.subplots(1, len(panels) + 1)
        for axis, (name, scale, heading) in zip(fronts, panels, strict=True):
            _schedules(axis, rows, cost, name, scale)
            if limit is not None and name == "disagreement":
                axis.axhline(100 * limit, color=DARK, linestyle="--", linewidth=1, label="limit")
            axis.set(title=f"{name} against cost", xlabel=label, ylabel=heading)
            axis.legend()
        for (layer, points), shade in zip(profile.items(), shades(len(profile)), strict=True):
            kept = sorted({1.0: 0.0, **points}.items())
            layers.plot(*zip(*kept, strict=True), color=shade, marker="o", markersize=3, label=f"layer {layer}")
        layers.set(title="one layer alone", xlabel="share of the tokens that stays", ylabel="divergence")
        layers.legend()


def _schedules(axis, rows: list[dict], cost: str, name: str, scale: float) -> None:
    """One panel of ``search``: the schedules that were run, the front, the chosen one and the tested ones."""
    axis.scatter([row[cost] for row in rows], [scale * row[name] for row in rows], s=12, color=LIGHT, label="run")
    front = pareto_front(rows, lambda row: row[cost], lambda row: row["divergence"])
    line = {"color": COLOURS[0], "marker": "o", "markersize": 4, "label": "best"}
    axis.plot([row[cost] for row in front], [scale * row[name] for row in front], **line)
    for row in rows:
        if row["bound"] is not None and name != "divergence":
            axis.vlines(row[cost], scale * row["tested"], scale * row["bound"], color=COLOURS[2], linewidth=1.5)
        if row["chosen"]:
            ring = {"s": 110, "facecolors": "none", "edgecolors": COLOURS[1], "linewidths": 1.8}
            axis.scatter(row[cost], scale * row[name], **ring, label="chosen", zorder=3)


def training(history: Sequence[dict[str, Any]], depth: int, path: str | Path, dense: float | None = None) -> None:
    """Draw a training with pruning: tokens left at each layer, quality against FLOPs, and the budget, from its log.

    Args:
        history: ``trainer.state.log_history`` of a training that ``training.monitor.Watch`` followed.
        depth: layers of the model.
        dense: quality of the dense model, for a line.
    """
    epochs = [line for line in history if "eval_quality" in line]
    if not epochs:
        raise ValueError("there is nothing to draw: no epoch was watched")
    with drawing(path, 12, 3.8) as figure:
        layers, against, budget = figure.subplots(1, 3)
        colours = shades(len(epochs))[::-1]
        for line, shade in zip(epochs, colours, strict=True):
            left, entering = 1.0, []
            for layer in range(depth):
                entering.append(100 * left)
                left = line.get(f"eval_kept_{layer}", left)
            layers.plot(range(depth), entering, color=shade, marker="o", markersize=3, label=f"epoch {line['epoch']:g}")
        layers.set(title="tokens entering each layer", xlabel="layer", ylabel="% of the tokens", ylim=(0, 105))
        layers.set_xticks(range(depth))
        layers.legend()
        flops, points = ([line[name] for line in epochs] for name in ("eval_flops_fraction", "eval_quality"))
        against.plot(flops, points, color=LIGHT, linewidth=1, zorder=1)
        against.scatter(flops, points, color=colours, zorder=2)
        for line, x, y in zip(epochs, flops, points, strict=True):
            against.annotate(f"{line['epoch']:g}", (x, y), (4, 4), textcoords="offset points", fontsize=8)
        if dense is not None:
            against.axhline(dense, **DENSE)
            against.annotate("dense", (min(flops), dense), (0, 3), textcoords="offset points", fontsize=8, color=MIDDLE)
        against.set(title="quality against FLOPs, by epoch (validation)", xlabel="share of dense MACs", ylabel="points")
        _budget(budget, [line for line in history if "loss" in line and "flops_fraction" in line])


def _budget(axis, steps: list[dict[str, Any]]) -> None:
    """One panel of ``training``: the cost that it saw, expected and aimed at."""
    names = {
        "flops_fraction": "last batch",
        "cost_expected": "expected",
        "cost_hard": "without chance",
        "cost_target": "target",
    }
    for (name, label), colour in zip(names.items(), COLOURS, strict=False):
        if known := [(line["epoch"], line[name]) for line in steps if name in line]:
            style = {"color": DARK, "linestyle": "--"} if name == "cost_target" else {"color": colour}
            axis.plot(*zip(*known, strict=True), label=label, linewidth=1.2, **style)
    axis.set(title="the budget through training", xlabel="epoch", ylabel="share of the dense cost")
    if steps:
        axis.legend()
