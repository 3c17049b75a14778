"""Rows of measurements: the one form in which they are written, and a figure to look at.

A row is a dictionary with every name in ``ROW_FIELDS``; what was not measured is None. The figure needs matplotlib.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROW_FIELDS = tuple(
    """task model method target_flops seed runtime precision mode layout batch_size threads metric quality
    quality_dense flops_ratio flops_ratio_padded latency_ms_p50 latency_ms_p95 samples_per_second speedup_unpadded
    speedup_padded speedup_reference efficiency peak_memory_mb split selected_on max_length n_examples tokens_mean
    trained_steps hardware versions command date""".split()  # noqa: SIM905
)
EXTRA_FIELDS = {  # what a row may hold besides
    "spread": "interquartile range of the total time over the repeats, relative to its median",
    "interval_low": "lower end of the 95 % interval of the drop (quality_dense - quality), points",
    "interval_high": "upper end of it",
    "flops_used": "MACs over the n_examples",
    "flops_dense": "MACs of the dense model on them without padding",
    "flops_ratio_timed": "flops_ratio on the timed examples only",
    "floor_ms": "least ms of a call on this machine, by its peak and its memory (median over the calls)",
    "memory_start_mb": "resident memory of a process after its first hundred calls; peak_memory_mb after the last",
    "n_timed": "examples whose time was taken",
    "repeats": "times each of them ran",
    "tried": "configurations tried before this one was chosen",
    "recipe": "how the model was trained",
    "seeds": "training seeds, where the quality is their mean",
    "group": "letters; methods of a task and target that share one cannot be told apart",
    "note": "anything else",
}
IDENTITY = ("task", "model", "target_flops", "seed", "runtime", "precision", "threads")  # shown where they vary
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#000000")  # Okabe and Ito's palette
GREYS = {"dense-padded": "#B8B8B8", "dense-unpadded": "#6E6E6E"}
MARKERS = "osD^vP*X"
NOTHING = "\N{EN DASH}"


def row(**values: Any) -> dict:
    """A row with all of ``ROW_FIELDS`` in their order, None where no value is given, then the extra ones given.

    Raises:
        ValueError: a name is in neither ``ROW_FIELDS`` nor ``EXTRA_FIELDS``.
    """
    unknown = [name for name in values if name not in ROW_FIELDS and name not in EXTRA_FIELDS]
    if unknown:
        raise ValueError(f"unknown row fields {', '.join(unknown)}; extra ones may be {', '.join(EXTRA_FIELDS)}")
    extra = {name: values[name] for name in EXTRA_FIELDS if name in values}
    return {name: values.get(name) for name in ROW_FIELDS} | extra


def write_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """Write ``{"rows": [...]}``, whole or not at all. Floats get 6 digits; NaN and infinity become null.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full; an older file is then what it was.
    """
    text = json.dumps({"rows": [_plain(row(**r)) for r in rows]}, indent=1, ensure_ascii=False, allow_nan=False)
    with whole(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a file, as ``row`` makes them. Raises ValueError where it holds something else."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
        return [row(**r) for r in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} does not hold {{"rows": [...]}} of measurements: {error}') from None


def write_csv(path: str | Path, rows: Iterable[dict]) -> None:
    """Write the rows as a table with a header, as ``write_rows`` does; what is no number or text is JSON."""
    rows = [_plain(row(**r)) for r in rows]
    names = [*ROW_FIELDS, *(name for name in EXTRA_FIELDS if any(name in r for r in rows))]
    with whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for r in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in r.items()})


def plot(rows: list[dict], path: str | Path, title: str | None = None) -> None:
    """One PNG: the pace of every row as bars, and quality against speed-up with the FLOPs ratio beside it.

    Left, one panel per batch size: milliseconds per call at batch size 1 (a line goes on to the 95th percentile),
    examples per second at larger ones. Right: one point per row that is not the dense model, over its speed-up against
    dense unpadded; the hollow point beside it is the FLOPs ratio, the dots between them what did not become time.

    Raises:
        ValueError: no row holds a time, or matplotlib is missing.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the figure needs matplotlib, which is missing: pip install 'thresher[plot]'") from None
    rows = [row(**r) for r in rows if r.get("samples_per_second")]
    if not rows:
        raise ValueError("there is nothing to plot: no row holds a time")
    sizes, varying = sorted({r["batch_size"] for r in rows}), _varying(rows)
    labels = dict.fromkeys(_label(r, varying, "target_flops") for r in rows if not _is_dense(r))
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    with rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        height = max(4.2, 0.9 * len(sizes) + 0.3 * len(rows) + 0.5)
        figure = Figure(figsize=(10.5, height), dpi=150, layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1), wspace=0.03)
        panels = [[r for r in rows if r["batch_size"] == size] for size in sizes]
        axes = left.subplots(len(sizes), 1, squeeze=False, height_ratios=[len(panel) + 1 for panel in panels])[:, 0]
        for axis, size, panel in zip(axes, sizes, panels, strict=True):
            _bars(axis, size, panel, colours, varying)
        _scatter(right.subplots(), rows, sizes, colours, varying)
        if title:
            figure.suptitle(title, fontweight="bold")
        with whole(path) as temporary:
            figure.savefig(temporary, format="png")


def _bars(axis, size: int, rows: list[dict], colours: dict, varying: list[str]) -> None:
    """Horizontal bars, the first row on top."""
    single = size == 1 and all(r["latency_ms_p50"] and r["latency_ms_p95"] for r in rows)
    values = [r["latency_ms_p50" if single else "samples_per_second"] for r in rows]
    ends = [r["latency_ms_p95"] for r in rows] if single else values
    shades = [GREYS[r["mode"]] if _is_dense(r) else colours[_label(r, varying, "target_flops")] for r in rows]
    places = range(len(rows))
    axis.barh(places, values, color=shades, height=0.68)
    axis.hlines(places, values, ends, color="#303030", linewidth=1)
    for place, value, end in zip(places, values, ends, strict=True):
        said = f"{_number(value)} / {_number(end)}" if single else _number(value)
        axis.annotate(said, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(places, [_label(r, varying) for r in rows])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_xlim(0, (1.3 if single else 1.15) * max(ends))
    axis.set_title(f"batch size {size}", loc="left")
    axis.set_xlabel("latency, ms: median / 95th percentile" if single else "throughput, examples per second")


def _scatter(axis, rows: list[dict], sizes: list[int], colours: dict, varying: list[str]) -> None:
    """Quality over speed-up: a colour for each label, whose points are joined, and a marker for each batch size."""
    grey, metrics = GREYS["dense-unpadded"], {r["metric"] for r in rows}
    axis.set_title("quality against speed", loc="left")
    axis.set_xlabel("× faster than dense unpadded (filled), × fewer FLOPs (hollow)")
    axis.set_ylabel(f"{metrics.pop() if len(metrics) == 1 and None not in metrics else 'quality'}, points")
    axis.grid(color="#E4E4E4", linewidth=0.7)
    axis.axvline(1, color=grey, linestyle=":", linewidth=1, zorder=1)
    points = [r for r in rows if not _is_dense(r) and r["speedup_unpadded"] and r["quality"] is not None]
    dense = {r["quality_dense"] for r in points} - {None}
    for level in dense:
        axis.axhline(level, color=grey, linestyle="--", linewidth=1, zorder=1)
    for (label, colour), (i, size) in itertools.product(colours.items(), enumerate(sizes)):
        own = [r for r in points if _label(r, varying, "target_flops") == label and r["batch_size"] == size]
        own.sort(key=lambda r: r["speedup_unpadded"])
        style = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "markersize": 7}
        axis.plot([r["speedup_unpadded"] for r in own], [r["quality"] for r in own], linewidth=1.4, zorder=3, **style)
        for r in own if all(r["flops_ratio"] for r in own) else ():
            ends, level = (r["speedup_unpadded"], r["flops_ratio"]), (r["quality"], r["quality"])
            axis.plot(ends, level, linestyle=":", linewidth=1.2, markerfacecolor="white", zorder=2, **style)
    levels = [r["quality"] for r in points] + list(dense)
    if not points:
        axis.text(0.02, 0.95, "no quality measured", transform=axis.transAxes, color="#606060")
    elif max(levels) - min(levels) < 2:  # tenths of a point shall look like tenths
        middle = (max(levels) + min(levels)) / 2
        axis.set_ylim(middle - 1.2, middle + 1.2)
    axis.margins(x=0.08)
    keys = [{"color": colour, "marker": "s", "linestyle": "", "label": label} for label, colour in colours.items()]
    for i, size in enumerate(sizes):
        marker = MARKERS[i % len(MARKERS)]
        keys.append({"color": "#808080", "marker": marker, "linestyle": "", "label": f"batch size {size}"})
    keys += [{"color": grey, "linestyle": "--", "label": "dense quality"}] if dense else []
    handles = [axis.plot([], [], **key)[0] for key in keys]
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, fontsize=8)


def _varying(rows: list[dict]) -> list[str]:
    """The fields of ``IDENTITY`` in which the rows differ; None (a dense row has no target) does not count."""
    return [name for name in IDENTITY if len({_text(r[name]) for r in rows if r[name] is not None}) > 1]


def _is_dense(r: dict) -> bool:
    """Whether the row is the dense model itself; a smaller dense one has a name as its method."""
    return r["mode"] in GREYS and r["method"] in (None, "dense")


def _name(r: dict) -> str:
    return r["mode"] if _is_dense(r) else _text(r["method"] or r["mode"])


def _label(r: dict, varying: list[str], *without: str) -> str:
    return " ".join([_name(r), *(_text(r[n]) for n in varying if n not in without and r[n] is not None)])


def _number(value: float | None) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else _text(value)


def _text(value: Any) -> str:
    return NOTHING if value is None else str(value)


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    value = value.item() if hasattr(value, "item") else value  # numbers of numpy and torch
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary file in the folder of ``path``, moved there at the end or removed if anything went wrong."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
