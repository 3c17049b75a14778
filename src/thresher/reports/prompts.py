"""Decoders: tables of what a shorter cache costs and loses, and what is left of a prompt in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rich.console import Group
from rich.text import Text

from .page import page, ramp
from .tables import Column, drawn, drop, fixed, number, text
from .trace import BELOW, _first_lines

STEPS = 6  # colours, from a token that no layer holds to one that all do


def _column(rows: list[dict], heading: str, cell: Callable[[dict], Any], **how: Any) -> Column:
    return Column(heading, [text(cell(row)) for row in rows], **how)


def _budget(row: dict) -> str | None:
    """A method's budget in words."""
    keep, hold = row.get("keep"), row.get("hold")
    return f"hold {hold}" if hold is not None else None if keep is None else f"keep {keep:g}"


def _shown(row: dict, field: str) -> str | None:
    return None if row.get(field) is None else number(row[field])


def bench_table(rows: list[dict], width: int) -> Group:
    """Draw the rows of a decoder that was timed."""
    columns = [
        _column(rows, "prompt", lambda r: f"{r['context']:,}", key=True),
        _column(rows, "method", lambda r: r["method"], key=True, left=True),
        _column(rows, "budget", _budget, left=True, rank=3),
        _column(rows, "prefill ms", lambda r: _shown(r, "prefill_ms"), rank=1),
        _column(rows, "ms/token", lambda r: _shown(r, "latency_ms_p50")),
        _column(rows, "× full", lambda r: fixed(r["speedup_unpadded"], 2), rank=0.5),
        _column(rows, "of it scores", lambda r: _shown(r, "scoring_ms"), rank=4),
        _column(rows, "held", lambda r: f"{r['held']:,.0f}", rank=2),
        _column(rows, "cache MB", lambda r: _shown(r, "cache_mb")),
        _column(rows, "of MB", lambda r: _shown(r, "cache_mb_full"), rank=5),
        _column(rows, "peak MB", lambda r: _shown(r, "peak_memory_mb"), rank=6),
    ]
    first = rows[0]
    above = f"{first['model']}, {first['precision']}, {first['threads']} threads, medians of {first['repeats']}"
    return drawn(columns, width, above=above)


def comparison_table(rows: list[dict], width: int) -> Group:
    """Draw the rows of a decoder that was asked about long texts."""
    columns = [
        _column(rows, "task", lambda r: r["task"], key=True, left=True),
        _column(rows, "question", lambda r: r["when"], key=True, left=True),
        _column(rows, "keep", lambda r: f"{r['keep']:g}", key=True),
        _column(rows, "method", lambda r: r["method"], key=True, left=True),
        _column(rows, "quality", lambda r: fixed(r["quality"])),
        _column(rows, "drop [95 %]", drop, rank=1, short=_column(rows, "drop", lambda r: drop(r, interval=False))),
        _column(rows, "held", lambda r: f"{r['held']:,.0f}", rank=3),
        _column(rows, "cache MB", lambda r: _shown(r, "cache_mb"), rank=2),
        _column(rows, "of MB", lambda r: _shown(r, "cache_mb_full"), rank=4),
    ]
    first = rows[0]
    above = f"{first['model']}, {first['precision']}, {first['n_examples']} texts of {first['tokens_mean']:.0f} tokens"
    return drawn(columns, width, above=above)


@dataclass(frozen=True)
class PromptTrace:
    """One prompt that was read, and what the cache then holds of it.

    Attributes:
        spans: the characters of each token.
        held: of each layer that is pruned the share of its key heads that hold each token.
    """

    text: str
    tokens: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    held: dict[int, list[float]]
    model: str
    method: str

    @property
    def shares(self) -> list[float]:
        """Of each token the share of all layers and heads that hold it."""
        return [sum(layer) / len(self.held) for layer in zip(*self.held.values(), strict=True)]

    def pieces(self) -> list[tuple[str, float | None]]:
        """The text cut at its tokens, with the share of each; None for what was cut and not read."""
        at = 0
        made: list[tuple[str, float | None]] = []
        for (start, end), share in zip(self.spans, self.shares, strict=True):
            if end > at:
                made.append((self.text[min(at, start) if start < at else at : end], share))
                at = end
        return [*made, (self.text[at:], None)] if self.text[at:].strip() else made


def _step(share: float) -> int:
    return min(STEPS - 1, int(share * STEPS))


def _summary(trace: PromptTrace) -> str:
    kept = sum(trace.shares)
    return f"{kept:.0f} of {len(trace.tokens)} entries of a layer and head are left, by {trace.method}"


def terminal(trace: PromptTrace, screen: tuple[int, int] | None = None) -> Text:
    """The text, each token coloured by the share of layers and heads that hold it; below, for each layer, where in the
    prompt its entries stand.

    Args:
        screen: columns and lines of a terminal; a longer text is cut so that all of it is on one screen.
    """
    colours, result = ramp(STEPS), Text()
    for string, share in trace.pieces():
        result.append(string, "dim" if share is None else "{1} on {0}".format(*colours[_step(share)]))
    if screen:
        result = _first_lines(result, screen[0], screen[1] - len(trace.held) - BELOW)
    result.append("\n\n")
    for step, (background, _) in enumerate(colours):
        result.append("    ", f"on {background}").append(f" {step / STEPS:.0%}-{(step + 1) / STEPS:.0%}  ")
    result.append("of the layers and heads hold the token\n\n")
    columns = min(60, len(trace.tokens))
    for layer, held in trace.held.items():
        result.append(f"layer {layer:>2}: {sum(held):>6.0f} ")
        for column in range(columns):
            some = held[column * len(held) // columns : (column + 1) * len(held) // columns]
            result.append(" ", f"on {colours[_step(sum(some) / len(some))][0]}")
        result.append("\n")
    return result.append(f"{_summary(trace)}\n")


def html(traces: Sequence[PromptTrace], path: str | os.PathLike | None = None) -> str:
    """One self-contained page that shows ``traces`` of one model, written to ``path`` if there is one."""
    if not traces:
        raise ValueError("there is no text to show")
    intro = (
        f"{escape(traces[0].model)}, its cache pruned by {escape(traces[0].method)}. The brighter a token, the more "
        "layers and heads hold it; what is grey and slanted was cut and never read. Point at a token, or walk through "
        "a text with the arrow keys, for its share."
    )
    return page("What is left of a prompt", intro, "".join(map(_article, traces)), range(STEPS), path)


def _article(trace: PromptTrace) -> str:
    spans = [
        f'<span class="cut" data-tip="cut: the model did not read this">{escape(string)}</span>'
        if share is None
        else f'<span class="s{_step(share) + 1}" data-tip="held by {share:.0%}">{escape(string)}</span>'
        for string, share in trace.pieces()
    ]
    text = f'<p data-walk tabindex="0">{"".join(spans)}</p>'
    return f"<article>{text}<small>{escape(_summary(trace))}</small></article>\n"
