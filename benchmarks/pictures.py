"""What the rows look like: loss against FLOPs of each task, and quality against speed where both were measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from entries import ENTRIES, Entry
from paired_drops import against_dense, mean, pooled_drop

LINES = ("top", "ltp", "topk", "random", "firstk")  # the methods that were trained on several tasks
VARIANTS = ("", "of-top")  # and those of more epochs; the others are other comparisons
SMALL = "minilm-l3"


def losses(results: dict[str, dict]) -> dict[str, dict[str, list[tuple[float, float, float, float]]]]:
    """Task -> method -> (times fewer FLOPs, mean drop, its 95 % interval) of each trained budget, mildest first."""
    found: dict = defaultdict(lambda: defaultdict(list))
    groups: dict[tuple, list[Entry]] = defaultdict(list)
    for entry in ENTRIES:
        if entry.kind == "train" and entry.method in LINES and entry.name in results:
            groups[entry.task, entry.method, entry.variant, entry.target].append(entry)
    for (task, method, variant, _), entries in groups.items():
        if variant not in VARIANTS and not variant.endswith("epochs"):
            continue
        runs = [results[entry.name] for entry in entries]
        lost = pooled_drop(runs[0]["rows"][0]["metric"], against_dense(runs, list(runs[0]["labels"])))
        fewer = mean(run["rows"][0]["flops_ratio"] for run in runs)
        called = f"{method} ({variant})" if variant else method
        found[task][called].append((fewer, *lost))
    return {task: {name: sorted(points) for name, points in of.items()} for task, of in found.items()}


def drawn_of(results: dict[str, dict]) -> dict[str, dict]:
    """The tasks of ``losses`` that have two points and more: what a panel can compare."""
    return {task: of for task, of in losses(results).items() if sum(map(len, of.values())) > 1}


def draw_losses(results: dict[str, dict], target: Path) -> None:
    """A panel for each task of ``drawn_of``, of which there has to be one."""
    from thresher.reports.style import COLOURS, DENSE, MARKERS, drawing, legend_below

    found = drawn_of(results)
    names = sorted({name for of in found.values() for name in of}, key=lambda n: (LINES.index(n.split()[0]), n))
    styles = {n: {"color": COLOURS[i % 7], "marker": MARKERS[i % 8], "label": n} for i, n in enumerate(names)}
    columns = 3
    lines = -(-len(found) // columns)
    with drawing(target, 3.6 * columns, 2.9 * lines + 0.4) as figure:
        panels = [*figure.subplots(lines, columns, squeeze=False).flat]
        for panel in panels[len(found) :]:
            panel.set_visible(False)
        for panel, (task, of) in zip(panels, found.items(), strict=False):
            for name, points in of.items():
                fewer, drops, low, high = (np.array(column) for column in zip(*points, strict=True))
                bars = np.maximum(0, [drops - low, high - drops])
                panel.errorbar(fewer, drops, yerr=bars, linewidth=1, capsize=2, markersize=5, **styles[name])
            panel.axhline(0, **DENSE)
            panel.invert_yaxis()
            panel.set_xlim(1)
            panel.set(title=task, xlabel="× fewer FLOPs than dense, own length", ylabel="drop, points")
        legend_below(figure, 8)


def draw_speeds(title: str, rows: list[dict], target: Path) -> None:
    """Quality against speed at batch 32, over torch fp32 dense padded, of one interleaved run."""
    from thresher.reports.style import COLOURS, drawing

    marks = dict(zip(("dense-padded", "dense-unpadded", "pruned"), "so^", strict=True))
    kinds = list(dict.fromkeys((row["runtime"], row["precision"]) for row in rows))
    with drawing(target, 7, 4.2) as figure:
        panel = figure.subplots()
        for row in (row for row in rows if row["batch_size"] == 32):
            colour = COLOURS[kinds.index((row["runtime"], row["precision"]))]
            filling = "none" if row["method"].startswith(SMALL) else "full"
            where = (row["speedup_reference"], row["quality"])
            panel.plot(*where, marks[row["mode"]], color=colour, fillstyle=filling, markersize=7, zorder=3)
        for mode, mark in marks.items():
            panel.plot([], [], mark, color="black", label=mode)
        if any(row["method"].startswith(SMALL) for row in rows):
            panel.plot([], [], "s", color="black", fillstyle="none", label=f"hollow: {SMALL}")
        for kind, colour in zip(kinds, COLOURS, strict=False):
            panel.plot([], [], "-", color=colour, label=" ".join(kind))
        panel.set(title=title, xlabel="× as fast as torch fp32 dense padded", ylabel=f"{rows[0]['metric']}, points")
        figure.legend(loc="outside right upper")


def pictures(results: dict[str, dict], docs: Path) -> list[str]:
    """The section of ``docs/results.md`` that shows them; drawn where matplotlib is there."""
    folder = docs / "img"
    wanted: list[tuple[str, Path, Callable]] = []
    if drawn_of(results):
        said = "What trained methods lose, with 95 % intervals, at what they save"
        wanted.append((said, folder / "losses.svg", draw_losses))
    for entry in (e for e in ENTRIES if e.kind in ("runtimes", "compression") and e.name in results):
        rows, file = results[entry.name]["rows"], folder / f"{entry.kind}-{entry.task}.svg"
        title = f"{entry.task}, ToP at {entry.target:g} of the MACs, batch 32"
        wanted.append((title, file, lambda _, to, rows=rows, title=title: draw_speeds(title, rows, to)))
    lines = ["## In pictures", ""]
    for title, file, draw in wanted:
        if find_spec("matplotlib"):
            folder.mkdir(parents=True, exist_ok=True)
            draw(results, file)
        if file.exists():
            lines += [f"![{title}]({file.relative_to(docs).as_posix()})", ""]
    return lines if len(lines) > 2 else []
