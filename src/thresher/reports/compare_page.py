"""A comparison to look at: quality against what is saved, with the intervals, and a table that sorts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from ..core.pareto import pareto_front
from .page import interval, page
from .style import COLOURS
from .tables import fixed, is_dense, text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 400, 56, 16, 14, 44  # pixels of a plot and of its margins
SHAPES = {  # around 0, 0; a method has a colour and a shape
    "circle": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0",
    "square": "M-4.5 -4.5h9v9h-9z",
    "diamond": "M0 -6.5L6.5 0L0 6.5L-6.5 0z",
    "triangle": "M0 -6L6 5H-6z",
    "wedge": "M0 6L6 -5H-6z",
}
STYLE = """
main { max-width: 72rem }
fieldset { border: 0; padding: 0; margin: .5rem 0; display: flex; flex-wrap: wrap; gap: 1rem }
legend { float: left; margin-right: 1rem; color: var(--soft) }
svg.plot { width: 100%; max-width: 60rem; display: block }
svg.plot[hidden] { display: none } .plot text { font-size: 12px; fill: var(--soft) } .grid { stroke: var(--line) }
.dense { stroke: var(--soft); stroke-dasharray: 5 4 } .front { fill: none; stroke: var(--line); stroke-width: 5 }
.reach, .join { fill: none; stroke-width: 1.3 } .join { opacity: .6 } .point path.shape { stroke: var(--page) }
.point.here path.shape, .point:focus-visible path.shape { stroke: var(--ink); stroke-width: 2.5 }
.key svg { width: 14px; height: 14px; vertical-align: -2px } li.key { padding-left: 0; margin-right: .7rem }
.inky { fill: var(--ink); stroke: var(--ink) }
"""
PALETTE = (*COLOURS[:5], "#B08A00")  # the yellow of the palette is too pale for lines; black is the ink of the page


@dataclass
class Line:
    """A method at a budget, or a dense model.

    Attributes:
        budget: what was asked for, in words.
        low, high: the 95 % interval of the drop.
        saved: what a plot can be against -> times less of it, or times faster.
    """

    method: str
    budget: str
    group: str
    quality: float | None
    dense: float | None
    low: float | None
    high: float | None
    note: str
    saved: dict[str, float] = field(default_factory=dict)

    @property
    def drop(self) -> float | None:
        """Points below the dense model."""
        return None if self.quality is None or self.dense is None else self.dense - self.quality

    def told(self, axis: str) -> str:
        """The figures, in words."""
        reach = "" if self.low is None else f" [{fixed(self.low)} to {fixed(self.high)}]"
        words = f"{self.method} {self.budget}".strip()
        group = f"; group {self.group}" if self.group else ""
        return f"{words}: {fixed(self.quality)}, drop {fixed(self.drop)}{reach}\n{axis} {self.saved[axis]:.2f}{group}"


def _budget(row: dict) -> str:
    keep, hold, target = row.get("keep"), row.get("hold"), row["target_flops"]
    if target is not None:
        return f"{target:g} of the MACs"
    return f"keep {keep:g}" if keep is not None else "" if hold is None else f"hold {hold}"


def _saved(row: dict) -> Iterator[tuple[str, float]]:
    """What a row saves."""
    if row["flops_ratio"]:
        yield "× fewer FLOPs", row["flops_ratio"]
    if row.get("cache_mb") and row.get("cache_mb_full"):
        yield "× smaller cache", row["cache_mb_full"] / row["cache_mb"]
    if row["speedup_unpadded"]:
        yield f"× faster, batch size {row['batch_size']}", row["speedup_unpadded"]


def lines_of(rows: Sequence[dict]) -> list[Line]:
    """One line for each method and budget; rows of several batch sizes are put together. Dense ones are left out."""
    found: dict[tuple[str, str], Line] = {}
    for row in (row for row in rows if not is_dense(row)):
        key = (text(row["method"]), _budget(row))
        ends = row.get("interval_low"), row.get("interval_high")
        about: Any = (row.get("group") or "", row["quality"], row["quality_dense"], *ends, row.get("note") or "")
        found.setdefault(key, Line(*key, *about)).saved.update(_saved(row))
    return list(found.values())


def html(rows: Sequence[dict], path: str | os.PathLike | None = None) -> str:
    """One self-contained page of the rows of ``compare``, written aside and moved to ``path``, if there is one.

    Raises:
        ValueError: no row holds a quality.
    """
    if not any(row["quality"] is not None for row in rows):
        raise ValueError("there is nothing to show: no row holds a quality")
    body: list[str] = []
    metrics = dict.fromkeys(row["metric"] for row in rows)
    panels = dict.fromkeys((row["task"], row.get("when")) for row in rows)
    for number, (task, when) in enumerate(panels):
        own = [row for row in rows if (row["task"], row.get("when")) == (task, when)]
        name = f"{task}, question {when}" if when else task
        name += f": {own[0]['metric']}" if len(metrics) > 1 else ""
        body.append(f"<section><h2>{escape(text(name))}</h2>{_panel(own, number)}</section>")
    what = escape(" or ".join(map(text, metrics)))
    intro = (
        f"{escape(text(rows[0]['model']))}. Quality is {what} in points, with the 95 % interval "
        "of the difference to the dense model (dashed). The broad line joins what nothing beats in both. Methods of a "
        "budget that share a letter cannot be told apart. Point at a mark, or walk through the plot with the arrow "
        "keys, for its figures; a head of the table sorts."
    )
    return page("Methods compared", intro, "\n".join(body), (), path, STYLE)


def _panel(rows: list[dict], number: int) -> str:
    """The plots and the table of one task."""
    lines = lines_of(rows)
    found = dict.fromkeys(axis for line in lines for axis in line.saved if line.quality is not None)
    axes = sorted(found, key=lambda axis: "faster" in axis, reverse=True)  # what was timed stands first
    names = list(dict.fromkeys(line.method for line in lines))
    plots, choices = [], []
    for i, axis in enumerate(axes):
        key = f"plot-{number}-{i}"
        plots.append(_plot([line for line in lines if axis in line.saved], axis, names, key, hidden=i > 0))
        checked = "" if i else " checked"
        radio = f'<input type="radio" name="axis-{number}" data-shows="{key}"{checked}>'
        choices.append(f"<label>{radio} {escape(axis)}</label>")
    chosen = f"<fieldset><legend>against</legend>{''.join(choices)}</fieldset>" if len(axes) > 1 else ""
    keys = "".join(
        f'<li class="key"><svg viewBox="-8 -8 16 16">{_mark(i)}</svg> {escape(name)}</li>'
        for i, name in enumerate(names)
    )
    return f"{chosen}{''.join(plots)}<ul>{keys}</ul>{_table(rows, lines, axes)}"


def _colour(index: int) -> str:
    """Of the method at a place, as attributes."""
    colour = index % (len(PALETTE) + 1)
    return 'class="inky"' if colour == len(PALETTE) else f'fill="{PALETTE[colour]}" stroke="{PALETTE[colour]}"'


def _mark(index: int) -> str:
    """The mark of the method at a place."""
    shape = list(SHAPES.values())[index % len(SHAPES)]
    return f'<g {_colour(index)}><path class="shape" d="{shape}"/></g>'


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two ends."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(step * i, 9) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


@dataclass(frozen=True)
class Point:
    """A line in a plot: what it saves, and its quality."""

    line: Line
    x: float
    y: float

    @property
    def reach(self) -> tuple[float, ...]:
        """The quality, and that at both ends of the interval of the drop."""
        low, high, dense = self.line.low, self.line.high, self.line.dense
        return (self.y,) if low is None or high is None or dense is None else (self.y, dense - high, dense - low)


@dataclass(frozen=True)
class Scale:
    """Where a number lies between two ends, in pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / ((self.high - self.low) or 1) * (self.end - self.start), 1)


def _ends(values: list[float], least: float) -> tuple[float, float]:
    """A little more than the values span, and at least so much."""
    low, high = min(values), max(values)
    more = max(0.06 * (high - low), (least - (high - low)) / 2, 1e-6)
    return low - more, high + more


def _plot(lines: list[Line], axis: str, names: list[str], key: str, hidden: bool) -> str:
    """Quality over what is saved along ``axis``."""
    points = [Point(line, line.saved[axis], line.quality) for line in lines if line.quality is not None]
    dense = {line.dense for line in lines if line.dense is not None}
    across = Scale(*_ends([point.x for point in points], 0.2), LEFT, WIDTH - RIGHT)
    up = Scale(*_ends([*dense, *(end for point in points for end in point.reach)], 2.0), HEIGHT - BOTTOM, TOP)
    best = pareto_front(points, lambda point: -point.x, lambda point: -point.y)
    front = _way(sorted(best, key=lambda point: (point.x, -point.y)), across, up)
    parts = [_grid(axis, across, up), f'<path class="front" d="{front}"/>']
    parts += [f'<path class="dense" d="M{LEFT} {up(level)}H{WIDTH - RIGHT}"/>' for level in sorted(dense)]
    for i, name in enumerate(names):
        own = sorted((point for point in points if point.line.method == name), key=lambda point: point.x)
        if len(own) > 1:
            parts.append(f'<g {_colour(i)}><path class="join" d="{_way(own, across, up)}"/></g>')
        parts += [_marked(point, axis, i, across, up) for point in own]
    label = f"quality against {axis}: {len(points)} points, listed in the table below"
    return (
        f'<svg class="plot" id="{key}" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" tabindex="0" data-walk="1" '
        f'aria-label="{escape(label)}"{" hidden" if hidden else ""}>{"".join(parts)}</svg>'
    )


def _grid(axis: str, across: Scale, up: Scale) -> str:
    """The lines and numbers of both axes."""
    parts, base = [], HEIGHT - BOTTOM
    for value in ticks(across.low, across.high):
        parts.append(f'<path class="grid" d="M{across(value)} {TOP}V{base}"/>')
        parts.append(f'<text x="{across(value)}" y="{base + 18}" text-anchor="middle">{value:g}</text>')
    for value in ticks(up.low, up.high):
        parts.append(f'<path class="grid" d="M{LEFT} {up(value)}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{up(value) + 4}" text-anchor="end">{value:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(axis)}</text>')
    return "".join(parts)


def _way(points: Sequence[Point], across: Scale, up: Scale) -> str:
    """A path through points."""
    return "M" + "L".join(f"{across(point.x)} {up(point.y)}" for point in points)


def _marked(point: Point, axis: str, index: int, across: Scale, up: Scale) -> str:
    """A mark with its interval, and what it says."""
    x, said = across(point.x), escape(point.line.told(axis))
    bar = f'<path class="reach" d="M{x} {up(min(point.reach))}V{up(max(point.reach))}"/>'
    mark = f'<g transform="translate({x} {up(point.y)})">{_mark(index)}</g>'
    return f'<g class="point" role="img" aria-label="{said}" data-tip="{said}"><g {_colour(index)}>{bar}</g>{mark}</g>'


def _table(rows: list[dict], lines: list[Line], axes: list[str]) -> str:
    """All figures, the dense models first; every head sorts."""
    ends = [end for line in lines for end in (line.low, line.high, line.drop) if end is not None] or [0.0]
    scale, noted = (min(0.0, *ends), max(0.0, *ends)), any(line.note for line in lines)
    heads = ["method", "budget", "group", "quality", "drop", "95 %", *axes, *(["note"] if noted else [])]
    head = "".join(
        f'<th scope="col"{" class=first" if i < 2 else ""}><button>{escape(name)}</button></th>'
        for i, name in enumerate(heads)
    )
    body = [
        _dense(row, len(heads)) for row in rows if is_dense(row) and row["batch_size"] in (None, rows[0]["batch_size"])
    ]
    body += [_row(line, axes, scale, noted) for line in lines]
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="wide" tabindex="0" role="region" aria-label="all figures">{table}</div>'


def _cell(value: Any, shown: str | None = None, kind: str = "") -> str:
    """A cell that sorts by ``value``."""
    known = "" if value is None else value
    return f'<td data-value="{escape(str(known))}"{kind}>{"" if value is None else shown or escape(str(value))}</td>'


def _dense(row: dict, columns: int) -> str:
    """A row of the dense model."""
    name = f'<th scope="row" class="first">{escape(text(row["mode"]))}</th>'
    rest = "".join(_cell(None) for _ in range(columns - 4))
    return f"<tr>{name}{_cell('')}{_cell('')}{_cell(row['quality'], fixed(row['quality']))}{rest}</tr>"


def _row(line: Line, axes: list[str], scale: tuple[float, float], noted: bool) -> str:
    """A row of a method at a budget."""
    cells = [_cell(line.budget, kind=" class=first"), _cell(line.group), _cell(line.quality, fixed(line.quality))]
    cells.append(_cell(line.drop, fixed(line.drop)))
    if line.low is None or line.high is None or line.drop is None:
        cells.append(_cell(None))
    else:
        told = f"{fixed(line.low)} to {fixed(line.high)}"
        cells.append(_cell(line.high, f"{told} {interval(line.drop, (line.low, line.high), scale)}"))
    cells += [_cell(line.saved.get(axis), fixed(line.saved.get(axis), 2)) for axis in axes]
    cells += [_cell(line.note, kind=" class=words")] if noted else []
    return f'<tr><th scope="row" class="first">{escape(line.method)}</th>{"".join(cells)}</tr>'
