"""The rows of an audit to look at: a verdict in words, a table, and a page."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from html import escape
from itertools import islice

from rich.console import Group

from .page import interval, page, slider
from .tables import Column, drawn
from .trace import Token, Trace, article

ALL = "all"  # the row of the whole
LEVEL = 0.05  # of all tests of a kind together
WORST = 3  # slices of which examples are shown
NAMED = 5  # slices of a kind that a verdict names
DROP = "drop [95 %]"
HEADER = (
    *("slice", "examples", "tokens", "dense", "pruned", DROP, "lost / gained", "p", "p more", "detectable"),
    *("tokens left", "MACs left"),
)
RANKS = {"examples": 2, "tokens": 8, "dense": 4, "pruned": 5, DROP: 3, "lost / gained": 6, "p": 7}
RANKS |= {"detectable": 9, "tokens left": 11, "MACs left": 10}
NOTES = (
    "drop: dense less pruned, above 0 a loss; lost / gained: examples that pruning made worse / better. p: whether the "
    "slice changes at all (exact sign test, McNemar's for right and wrong); p more: whether it loses more than the "
    "other examples (permutation test); both with Holm's correction over all slices. detectable: the drop from which "
    "on the second would have told it from chance. tokens left: after the last site."
)
STYLE = """
main { max-width: 72rem } tr.worse td, tr.worse th { font-weight: 700 }
.by th { color: var(--soft); padding-top: .8rem }
svg.interval { width: 7.5rem } .verdict { font-size: 1.05rem; line-height: 1.5; white-space: normal }
"""


def verdict(rows: Sequence[dict]) -> list[str]:
    """What the rows of ``audit`` say, in a few sentences: of the whole, and of slices that stand out."""
    whole, slices = rows[0], [row for row in rows if row["by"] != ALL]
    change = "falls" if whole["drop"] > 0 else "rises" if whole["drop"] < 0 else "stays the same"
    if whole["score"] == "absolute error" and whole["drop"]:
        change = "rises" if whole["drop"] > 0 else "falls"
    by = f" by {_fixed(abs(whole['drop']), whole)}{_unit(whole)}" if whole["drop"] else ""
    own = f"{whole['metric']} {whole['metric_dense']:.1f} dense, {whole['metric_pruned']:.1f} pruned"
    against = "its own weights without pruning" if whole["against"] is None else whole["against"]
    said = [
        f"On {whole['n']} examples the {whole['score']} {change}{by} against {against} (95 % interval of the drop "
        f"{_interval(whole)}, p {_p(whole['p'])}; {own}), with {whole['macs']:.0%} of the MACs."
    ]
    if whole["against"] is None:
        said.append("Weights that were trained with pruning are not the dense model's: name that, where there is one.")
    if not slices:
        return [*said, "There are no slices to compare."]
    worse = [row for row in worst(rows) if row["worse"]]
    if worse:
        lose = f"{len(worse)} of {len(slices)} slices lose" if len(worse) > 1 else f"1 of {len(slices)} slices loses"
        said.append(f"{lose} significantly more than the other examples (Holm, {LEVEL:.0%}): {_named(worse)}.")
    else:
        said.append(
            f"No slice of {len(slices)} loses significantly more than the other examples (Holm, {LEVEL:.0%}). "
            f"{_least(slices)}"
        )
    known = [row for row in slices if row["p_holm"] <= LEVEL and row not in worse]
    for what, some in (("lose", [r for r in known if r["drop"] > 0]), ("gain", [r for r in known if r["drop"] < 0])):
        if some:
            said.append(f"On their own, not beside the others, these {what} significantly: {_named(some)}.")
    return said


def moved(rows: Sequence[dict]) -> list[str]:
    """Say of an embedder how many neighbours stay, and which texts lose most of them; nothing of other models."""
    whole = rows[0]
    if "moved" not in whole:
        return []
    lines = [f"Of the {whole['neighbours']} nearest texts {whole['overlap']:.0%} stay. Those that change most:"]
    for text in whole["moved"]:
        lines.append(f"{text['overlap']:.0%}, cosine {text['cosine']:.3f}: {text['text']!r}")
        lines.append(f"   nearest before: {text['nearest_dense']!r}; now: {text['nearest_pruned']!r}")
    return lines


def _named(rows: Sequence[dict]) -> str:
    each = (f"{r['by']} {r['slice']} (drop {_fixed(r['drop'], r)}, {_interval(r)}, {r['n']} examples)" for r in rows)
    return "; ".join([*islice(each, NAMED), *([f"and {len(rows) - NAMED} more"] if len(rows) > NAMED else [])])


def _least(slices: Sequence[dict]) -> str:
    """Which drops would have been told from chance."""
    known = sorted((row for row in slices if row["detectable"] is not None), key=lambda row: row["detectable"])
    if not known:
        return "None could have: the slices are too small for any drop to be told from chance."
    ends = [
        f"{_fixed(row['detectable'], row)}{_unit(row)} ({row['by']} {row['slice']}, {row['n']} examples)"
        for row in (known[0], known[-1])
    ]
    if len(known) == 1:
        return f"It would have had to lose {ends[0]} to be told from chance."
    return f"To be told from chance, a slice would have had to lose between {ends[0]} and {ends[1]}."


def worst(rows: Sequence[dict]) -> list[dict]:
    """The slices that lose something, the ones that chance explains least first."""
    losing = [row for row in rows if row["by"] != ALL and row["drop"] > 0]
    return sorted(losing, key=lambda row: (row["p_more"], -row["drop"]))


def table(rows: Sequence[dict], width: int) -> Group:
    """Draw the rows for a terminal of ``width``; slices that lose significantly more are bold and starred."""
    names = [row["slice"] if row["by"] == ALL else f"{row['by']}: {row['slice']}" for row in rows]
    names = ["*" * bool(row["worse"]) + name for name, row in zip(names, rows, strict=True)]
    brief = Column("drop", [_fixed(row["drop"], row) for row in rows])
    columns = [Column(HEADER[0], names, key=True, wrap=True, left=True)]
    for heading, cells in zip(HEADER[1:], zip(*map(_cells, rows), strict=True), strict=True):
        short = brief if heading == DROP else None
        columns.append(Column(heading, cells, rank=RANKS.get(heading, 0), short=short))
    return drawn(
        columns,
        width,
        below=("* loses significantly more than the other examples.", NOTES),
        styles=["bold" if row["worse"] else "" for row in rows],
        ends=[i for i, row in enumerate(rows[:-1]) if rows[i + 1]["by"] != row["by"]],
    )


def _cells(row: dict) -> tuple[str, ...]:
    interval = "" if row["interval"] is None else f" [{_interval(row)}]"
    return (
        f"{row['n']:,}",
        f"{row['length']:.1f}",
        _fixed(row["dense"], row),
        _fixed(row["pruned"], row),
        f"{_fixed(row['drop'], row)}{interval}",
        f"{row['lost']} / {row['gained']}",
        _p(row["p"] if row["by"] == ALL else row["p_holm"]),
        _p(row["p_more_holm"]),
        "–" if row["detectable"] is None else _fixed(row["detectable"], row),
        f"{row['tokens']:.0%}",
        f"{row['macs']:.0%}",
    )


def cases(rows: Sequence[dict]) -> Iterator[tuple[str, list[tuple[str, Trace]]]]:
    """(heading, (line, trace) of each example) of the slices that show some, the worst first."""
    for row in worst(rows):
        if row["examples"]:
            heading = f"{row['by']} {row['slice']}: drop {_fixed(row['drop'], row)} ({_interval(row)})"
            yield heading, [(_line(case), _trace(case["trace"])) for case in row["examples"]]


def _line(case: dict) -> str:
    return f"row {case['row']}: {case['label']}; dense says {case['dense']}, pruned {case['pruned']}"


def _trace(values: dict) -> Trace:
    """A trace out of what ``dataclasses.asdict`` or JSON made of it."""
    tokens = tuple(Token(**token) for token in values["tokens"])
    layers = {name: {int(layer): v for layer, v in values[name].items()} for name in ("left", "layer_macs")}
    return Trace(**values | layers | {"texts": tuple(values["texts"]), "tokens": tokens})


def html(rows: Sequence[dict], path: str | os.PathLike | None = None) -> str:
    """One self-contained page of the rows of ``audit``, written aside and moved to ``path``, if there is one.

    Verdict, table with the intervals drawn, and the lost examples of the worst slices with the tokens that left.
    """
    found = list(cases(rows))
    layers = sorted({layer for _, some in found for _, trace in some for layer in trace.left})
    head = "".join(f'<th scope="col">{name}</th>' for name in (*HEADER[1:6], "interval", *HEADER[6:]))
    body = [f'<p class="verdict">{escape(" ".join(verdict(rows)))}</p>']
    head = f'<thead><tr><th scope="col" class="first">{HEADER[0]}</th>{head}</tr></thead>'
    table = f"<table>{head}<tbody>{''.join(_lines(rows))}</tbody></table>"
    body.append(f'<div class="wide" tabindex="0" role="region" aria-label="slices">{table}</div><small>{NOTES}</small>')
    if found:
        body.append(slider(layers))
    for heading, some in found:
        body.append(f"<h2>{escape(heading)}</h2>")
        body += [f"<small>{escape(line)}</small>{article(trace, layers)}" for line, trace in some]
    intro = (
        f"{escape(rows[0]['model'])} on the test part of {escape(rows[0]['task'])}. A bold slice loses significantly"
        " more than the other examples. In the examples, a coloured token leaves after the layer of its colour."
    )
    return page("Where pruning hurts", intro, "\n".join(body), layers, path, STYLE)


def _lines(rows: Sequence[dict]) -> Iterator[str]:
    """Table rows, with a line above each new cut; intervals are drawn on one scale."""
    ends = [end for row in rows for end in (row["interval"] or (row["drop"], row["drop"]))]
    scale = min(0, *ends), max(0, *ends)
    for i, row in enumerate(rows):
        if row["by"] != ALL and rows[i - 1]["by"] != row["by"]:
            yield f'<tr class="by"><th class="first" colspan="{len(HEADER) + 1}">{escape(row["by"])}</th></tr>'
        span = row["interval"] or (row["drop"], row["drop"])
        cells = list(map(escape, _cells(row)))
        cells.insert(5, interval(row["drop"], span, scale, rows[0]["drop"]))
        said = (
            f'<th scope="row" class="first">{escape(row["slice"])}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}'
        )
        yield f'<tr class="{"worse" if row["worse"] else ""}">{said}</tr>'


def _fixed(value: float, row: dict) -> str:
    digits = "{:.3g}" if row["score"] == "absolute error" else "{:.1f}"
    text = digits.format(value)
    return (text if float(text) else text.lstrip("-")).replace("-", "\N{MINUS SIGN}")


def _unit(row: dict) -> str:
    return "" if row["score"] == "absolute error" else " points"


def _interval(row: dict) -> str:
    if row["interval"] is None:
        return "no interval"
    return f"{_fixed(row['interval'][0], row)} to {_fixed(row['interval'][1], row)}"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
