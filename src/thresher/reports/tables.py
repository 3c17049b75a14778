"""Tables of measurements: for a terminal of any width, and for a Markdown page.

A terminal shows every cell whole. Columns have a rank; where they do not fit, the last in rank is shortened or left out
and named below the table. What is the same in every row stands in a line above it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .style import GREYS

NOTHING = "\N{EN DASH}"
CHOSEN = "\N{BLACK RIGHT-POINTING TRIANGLE}"
GAP = 2  # blanks between two columns
NARROW = 14  # least width of a cell of several words
KEYS = 3  # up to this rank columns stay as long as joining the keys makes room
IDENTITY = ("task", "model", "target_flops", "seed", "runtime", "precision", "threads")  # shown where they vary
NUMBERS = ("target_flops", "seed", "threads")  # of them
FIELD = {"layout": "layout", "batch": "batch_size"}  # columns that a terminal shows only where they vary
BASELINES = ("random", "firstk")  # methods that choose as many tokens as another one, without looking at them
REFERENCE = "\N{MULTIPLICATION SIGN} torch fp32 padded"


@dataclass(frozen=True)
class Column:
    """A column: its heading, a text for each row, and when it leaves."""

    heading: str
    cells: Sequence[str]
    rank: float = 0  # 0 stays; of the others the highest leaves first
    short: Column | None = None  # what takes its place when its turn comes, instead of nothing
    key: bool = False  # tells rows apart: it never leaves, but joins the other keys in one column of several lines
    wrap: bool = False  # its cells may go on in a second line
    left: bool = False

    @property
    def width(self) -> int:
        """Least width at which nothing is cut."""
        texts = (self.heading, *(self.cells if self.wrap else ()))
        longest_word = max((cell_len(word) for text in texts for word in text.split()), default=1)
        return max(longest_word, min(NARROW, self.longest) if self.wrap else self.longest)

    @property
    def longest(self) -> int:
        """Width of the longest cell in one line."""
        return max(map(cell_len, self.cells), default=0)


def fit(columns: Iterable[Column], width: int) -> tuple[list[Column], list[str]]:
    """The columns that a terminal of ``width`` has room for, and the headings of those that were left out."""
    shown, gone = filled(columns), []
    while _needed(shown) > width:
        keys = [column for column in shown if column.key]
        last = max(shown, key=lambda column: column.rank)
        if len(keys) > 1 and last.rank <= KEYS:
            shown = [_joined(keys), *(column for column in shown if not column.key)]
        elif last.rank == 0:
            break
        else:
            place = shown.index(last)
            shown[place : place + 1] = [last.short] if last.short else []
            gone += [] if last.short else [last.heading]
    return shown, gone


def filled(columns: Iterable[Column]) -> list[Column]:
    """The columns that hold anything."""
    return [column for column in columns if set(column.cells) - {NOTHING, ""}]


def _needed(columns: Sequence[Column]) -> int:
    """Least width of a table."""
    return sum(column.width + GAP for column in columns) - GAP


def _joined(keys: list[Column]) -> Column:
    """One column of all keys; a number goes with its heading."""
    named = [[NOTHING if c == NOTHING else c if k.left else f"{k.heading}={c}" for c in k.cells] for k in keys]
    cells = [", ".join(cell for cell in line if cell != NOTHING) for line in zip(*named, strict=True)]
    return Column([k.heading for k in keys if k.left][-1], cells, key=True, wrap=True, left=True)


def drawn(
    columns: Iterable[Column],
    width: int,
    title: str | None = None,
    above: str = "",
    below: Sequence[str] = (),
    styles: Sequence[str] = (),
    ends: Sequence[int] = (),
) -> Group:
    """Draw a table for a terminal of ``width``: a title, a line above, the columns, what was left out, lines below.

    Args:
        styles: one of rich's for each row.
        ends: the rows below which a rule is drawn.
    """
    shown, gone = fit(columns, width)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    spare = width - _needed(shown)
    for column in shown:
        least = column.width
        spare -= (more := max(0, min(spare, column.longest - least)) if column.wrap else 0)
        table.add_column(
            Text(textwrap.fill(column.heading, least + more)),
            justify="left" if column.left else "right",
            no_wrap=not column.wrap,
            width=least + more,
            overflow="fold",
        )
    rows = list(zip(*(column.cells for column in shown), strict=True))
    for i, (cells, style) in enumerate(zip(rows, styles or [""] * len(rows), strict=True)):
        table.add_row(*map(Text, cells), style=style, end_section=i in ends)
    note = f"not shown in {width} columns: {', '.join(gone)}" if gone else ""
    head = [Text(textwrap.fill(line, width), style) for line, style in ((title, "bold"), (above, "dim")) if line]
    return Group(*head, table, *(Text(textwrap.fill(line, width), "dim") for line in (note, *below) if line))


def table(rows: list[dict], width: int, title: str | None = None) -> Group:
    """Rows of measurements for a terminal of ``width``."""
    constants = {name for name in ("layout", "batch_size") if len({r[name] for r in rows} - {None}) < 2}
    columns = [column for column in _columns(rows) if FIELD.get(column.heading) not in constants]
    return drawn(columns, width, title, _shared(rows))


def markdown(rows: list[dict]) -> str:
    """Rows of measurements as a table of a Markdown page; ends in a line break."""
    columns = filled(_columns(rows))
    body = list(zip(*(column.cells for column in columns), strict=True))
    lines = [[c.heading for c in columns], ["---" if c.left else "---:" for c in columns], *body]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def comparison(rows: list[dict], width: int, title: str | None = None) -> Group:
    """Draw the rows of ``compare``: a line for each method and target with the times of all batch sizes, and notes."""
    sizes = sorted({r["batch_size"] for r in rows if r["batch_size"]})
    lines: dict[tuple, dict] = {}  # of each, its rows by batch size
    for r in rows:
        lines.setdefault((r["target_flops"], r["method"], r["mode"]), {})[r["batch_size"]] = r
    firsts = [next(iter(of.values())) for of in lines.values()]

    def column(heading: str, cell: Callable[[dict], Any], **how: Any) -> Column:
        return Column(heading, [text(cell(r)) for r in firsts], **how)

    def timed(heading: str, field: str, size: int, rank: float) -> Column:
        return Column(heading, [text(fixed(of.get(size, {}).get(field), 2)) for of in lines.values()], rank)

    columns = [
        column("target", lambda r: r["target_flops"], key=True),
        column("method", name_of, key=True, left=True),
        column("group", lambda r: r.get("group"), left=True, rank=4),
        column("seeds", lambda r: ", ".join(map(str, r.get("seeds") or ())) or None, rank=7),
        column(firsts[0]["metric"] or "quality", lambda r: fixed(r["quality"], 2)),
        column("drop [95 %]", drop, rank=2, short=column("drop", lambda r: drop(r, interval=False))),
        column("FLOPs ÷", lambda r: fixed(r["flops_ratio"], 2), rank=0.5),
    ]
    for size in sizes:
        columns += [
            timed(f"ms, batch {size}", "latency_ms_p50", size, 8),
            timed(f"× unpadded, batch {size}", "speedup_unpadded", size, 1),
            timed(f"× padded, batch {size}", "speedup_padded", size, 9),
        ]
    notes = sorted({f"{r['method']}, {r['target_flops']:g}: {r['note']}" for r in rows if r.get("note")})
    return drawn(columns, width, title, below=notes)


def schedules(rows: list[dict], width: int) -> Group:
    """Draw the schedules that a search ran; the chosen one is marked."""
    forms: dict[str, tuple[str, Callable[[Any], str], dict[str, Any]]] = {
        "at": ("after layers", lambda at: ", ".join(map(str, at)), {"key": True, "left": True, "wrap": True}),
        "keep": ("keep", lambda keep: ", ".join(map(kept, keep)), {"key": True, "left": True, "wrap": True}),
        "flops_fraction": ("MACs", "{:.1%}".format, {}),
        "latency_ms": ("ms", "{:.2f}".format, {}),
        "divergence": ("divergence", "{:.4f}".format, {"rank": 5}),
        "disagreement": ("disagree", "{:.1%}".format, {"rank": 2}),
        "drop": ("drop", "{:.1%}".format, {"rank": 1}),
        "overlap": ("top 10 kept", "{:.1%}".format, {"rank": 3}),
        "tested": ("tested", "{:.1%}".format, {"rank": 4}),
        "bound": ("bound", "{:.1%}".format, {}),
    }
    columns = [Column("", [CHOSEN if row["chosen"] else "" for row in rows], left=True)]
    for name, (heading, form, how) in forms.items():
        columns.append(Column(heading, [NOTHING if row.get(name) is None else form(row[name]) for row in rows], **how))
    return drawn(columns, width, styles=["bold" if row["chosen"] else "" for row in rows])


def kept(share: float | int) -> str:
    """A ``keep`` in words: a whole number counts tokens."""
    return f"{share} token{'s' * (share > 1)}" if isinstance(share, int) else f"{share:g}"


def _columns(rows: list[dict]) -> list[Column]:
    """The columns of measurements, in the order in which they stand."""

    def column(heading: str, cell: Callable[[dict], Any], **how: Any) -> Column:
        return Column(heading, [text(cell(r)) for r in rows], **how)

    metrics = {r["metric"] for r in rows} - {None}
    keys = [
        column(name.replace("_", " "), itemgetter(name), key=True, left=name not in NUMBERS) for name in varying(rows)
    ]
    keys += [column("metric", lambda r: r["metric"], key=True, left=True)] if len(metrics) > 1 else []
    brief = Column("drop", [text(drop(r, interval=False)) for r in rows])
    median = column("p50, rate", lambda r: _pace(r, tail=False), rank=5)
    return [
        *keys,
        column("method", name_of, key=True, left=True),
        column("layout", lambda r: r["layout"], left=True, rank=8),
        column("batch", lambda r: r["batch_size"], key=True),
        column("quality", lambda r: fixed(r["quality"])),
        column("drop [95 %]", drop, rank=2, short=brief),
        column("FLOPs ÷", lambda r: fixed(r["flops_ratio"], 2), rank=0.5),
        column("p50 / p95, rate", _pace, rank=7, short=median),
        column("× unpadded", lambda r: fixed(r["speedup_unpadded"], 2), rank=1),
        column("× padded", lambda r: fixed(r["speedup_padded"], 2), rank=9),
        column(REFERENCE, _against_reference, rank=10),
        column("efficiency", lambda r: fixed(r["efficiency"], 2), rank=6),
        column("× floor", lambda r: fixed(r["latency_ms_p50"] / r["floor_ms"]) if r.get("floor_ms") else None, rank=11),
    ]


def _shared(rows: list[dict]) -> str:
    """What is the same in all rows, in words."""

    def one(name: str, form: str = "{}") -> list[str]:
        values = {r.get(name) for r in rows} - {None}
        return [form.format(*values)] if len(values) == 1 else []

    count = one("threads")
    return ", ".join(
        [
            *one("task"),
            *one("model"),
            *one("metric"),
            *one("n_examples", "{} texts"),
            *one("max_length", "at most {} tokens"),
            *one("runtime"),
            *one("precision"),
            *one("layout"),
            *([f"{count[0]} thread{'s' * (count != ['1'])}"] if count else []),
            *one("batch_size", "batch size {}"),
            *one("target_flops", "target {:g}"),
            *one("seed", "seed {}"),
        ]
    )


def varying(rows: list[dict]) -> list[str]:
    """The fields of ``IDENTITY`` in which the rows differ; None (a dense row has no target) does not count."""
    return [name for name in IDENTITY if len({text(r[name]) for r in rows if r[name] is not None}) > 1]


def is_dense(row: dict) -> bool:
    """Whether a row is the dense model itself; a smaller dense one has a name as its method."""
    return row["mode"] in GREYS and row["method"] in (None, "dense")


def name_of(row: dict) -> str:
    """The name of a row: its method, or its mode where it is the dense model."""
    return text(row["mode"] if is_dense(row) else row["method"] or row["mode"])


def drop(row: dict, interval: bool = True) -> str | None:
    """Points that a row lost against the dense model, with the 95 % interval."""
    if is_dense(row) or row["quality"] is None or row["quality_dense"] is None:
        return None
    low, high = row.get("interval_low"), row.get("interval_high")
    known = interval and low is not None and high is not None
    interval_text = f" [{fixed(low)}, {fixed(high)}]" if known else ""
    return f"{fixed(row['quality_dense'] - row['quality'])}{interval_text}"


def _pace(row: dict, tail: bool = True) -> str | None:
    """Milliseconds of a call at batch size 1, examples in a second at others."""
    if row["batch_size"] == 1 and row["latency_ms_p50"] is not None:
        return number(row["latency_ms_p50"]) + (f" / {number(row['latency_ms_p95'])}" if tail else "") + " ms"
    return None if row["samples_per_second"] is None else f"{number(row['samples_per_second'])} /s"


def _against_reference(row: dict) -> str | None:
    """The speed-up over torch, fp32 and padded; nothing where it is that over padding itself."""
    plain = (row["runtime"], row["precision"]) in (("torch", "fp32"), (None, None))
    return None if plain else fixed(row["speedup_reference"], 2)


def fixed(value: float | None, digits: int = 1) -> str | None:
    """A number of so many digits after the point."""
    return None if value is None else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def number(value: float | None) -> str:
    """A number of three significant digits, never in powers of ten."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else text(value)


def text(value: Any) -> str:
    """A value as a cell."""
    return NOTHING if value is None else str(value)


def summary(rows: list[dict]) -> list[str]:
    """Say what a run of ``bench`` found in three lines: quality, cost, and what the choice of the tokens is worth.

    Of several runtimes and precisions the first is told; a line whose figures were not measured is left out.
    """
    where = next(((r["runtime"], r["precision"]) for r in rows), None)
    same = [r for r in rows if (r["runtime"], r["precision"]) == where]
    pruned = [r for r in same if r["mode"] == "pruned" and r["method"] not in BASELINES]
    if not pruned:
        return []
    first = pruned[0]
    lines = []
    if first["quality"] is not None:
        kept_quality = f"{fixed(first['quality_dense'])} -> {fixed(first['quality'])}"
        lines.append(
            f"{first['method']}: {first['metric']} {kept_quality}, drop {drop(first)} ({first['n_examples']:,} texts)"
        )
    if first["speedup_unpadded"]:
        speeds = ", ".join(f"{fixed(r['speedup_unpadded'], 2)}x at {r['batch_size']}" for r in pruned)
        threads = f"{first['threads']} thread{'s' * (first['threads'] != 1)}"
        lines.append(
            f"{fixed(first['flops_ratio'], 2)}x fewer FLOPs; {speeds.replace('at', 'at batch', 1)} "
            f"vs the fastest dense, {threads}"
        )
    chance = next((r for r in same if r["method"] == "random" and r["quality"] is not None), None)
    if chance:
        lines.append(f"random tokens, same counts and weights: {fixed(chance['quality'])}, drop {drop(chance)}")
    return lines
