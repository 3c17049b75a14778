"""The tables of docs/runtimes.md on one text at a time, int8, phones and training: ``python benchmarks/floor_page.py``.

Every number is of a row in results/floor or results/training; "before" and "after" are labels of ``training_speed.py``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE, BEGIN, END = (
    HERE.parent / "docs" / "runtimes.md",
    "<!-- floor_page.py writes from here -->\n",
    "<!-- to here -->\n",
)
HEAD = ("runtime", "precision", "model")


def rows_of(folder: str, stem: str) -> list[dict]:
    """The rows of the files whose names begin so, of all numbers of threads."""
    files = sorted((HERE / "results" / folder).glob(f"{stem}-*-threads.json"))
    return [row for file in files for row in json.loads(file.read_text())["rows"]]


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def made(rows: list[dict]) -> str:
    """The machine of some rows, their threads, and the widest spread."""
    machines = sorted({f"{row['hardware']}, {row['threads']} threads" for row in rows})
    spreads = [row["spread"] for row in rows if row.get("spread") is not None]
    told = f"; interquartile range of the times at most {100 * max(spreads):.0f} % of a median" if spreads else ""
    return f"{'; '.join(machines)}{told}."


def gains(rows: list[dict]) -> list[str]:
    """Milliseconds and gains of each runtime: a line for each model, a column for each size."""
    sizes = sorted({(row["max_length"], row["batch_size"]) for row in rows})
    cells: dict[tuple, dict[tuple, str]] = {}
    for row in rows:
        name = row["recipe"].removeprefix("untrained, ")
        told = f"{row['latency_ms_p50']:.3g} ms"
        if row["mode"] != "dense":
            told += f", **{row['speedup_unpadded']:.2f}x** of {row['flops_ratio']:.2f}x ({row['efficiency']:.2f})"
        cells.setdefault((row["runtime"], row["precision"], name), {})[row["max_length"], row["batch_size"]] = told
    head = [*HEAD, *(f"{batch} x {tokens}" for tokens, batch in sizes)]
    return table(head, [[*key, *(of.get(size, "") for size in sizes)] for key, of in sorted(cells.items())])


def overall(rows: list[dict]) -> list[str]:
    """How many times less the quickest pruned model takes than torch, where torch was timed beside graphs."""
    torch, graphs = ([row for row in rows if (row["runtime"] == "torch") == of] for of in (True, False))
    if not (torch and graphs):
        return []
    slow, lines = torch[0]["latency_ms_p50"], [""]
    for ratio in dict.fromkeys(row["recipe"] for row in graphs if row["mode"] == "pruned"):
        best = min((row for row in graphs if row["recipe"] == ratio), key=lambda row: row["latency_ms_p50"])
        gain = slow / best["latency_ms_p50"]
        lines.append(f"* {ratio.split(', ')[1]}: {best['runtime']} takes {gain:.1f}x less than torch in fp32, padded")
    return lines


def training(rows: list[dict]) -> list[str]:
    """Tokens per second of each stage, before and after."""
    rate = {(row["model"], row["mode"], row["recipe"]): row["samples_per_second"] * row["tokens_mean"] for row in rows}
    lines = []
    for model, mode in dict.fromkeys((model, mode) for model, mode, _ in rate):
        before, after = rate.get((model, mode, "before")), rate.get((model, mode, "after"))
        if before and after:
            stage = mode.removeprefix("training, ")
            lines.append([model, stage, f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.2f}x"])
    return table(["encoder", "stage", "tokens/s before", "after", "gain"], lines)


def section(title: str, rows: list[dict], lines: list[str]) -> list[str]:
    """A part of the page, where there are rows."""
    return [f"**{title}** {made(rows)}", "", *lines, ""] if rows else []


def page() -> str:
    """All tables."""
    found: list[str] = []
    for shape in ("minilm-l6", "bert-base"):
        rows = rows_of("floor", f"batch1-{shape}") + rows_of("floor", f"torch1-{shape}")
        found += section(f"One text at a time, the shape of {shape}.", rows, gains(rows))
    titles = {
        "packed-bf16": "Packed rows in bf16, BERT-base's shape, 32 texts of 16 to 256 tokens, two batches a call.",
        "int8-8x128": "Eight texts of 128 tokens in int8, BERT-base's shape.",
        "int8-20newsgroups": "64 texts of 20 Newsgroups up to 512 tokens in int8, MiniLM-L6's shape, in batches of 8.",
        "phone": "ExecuTorch, MiniLM-L6.",
    }
    for stem, title in titles.items():
        rows = rows_of("floor", stem)
        found += section(title, rows, gains(rows) + overall(rows))
        notes = [
            f"* {row['precision']} {row['recipe'].split(', ')[1]}, up to {row['max_length']} tokens: {row['note']}"
            for row in rows
            if row.get("note")
        ]
        found += [*notes, ""] if notes else []
    rows = rows_of("floor", "target-*")
    told = [f"* {row['runtime']} {row['precision']}: {row['note']}" for row in rows]
    found += section("Milliseconds that were asked for, MRPC, MiniLM-L6, one text at a time.", rows, told)
    rows = rows_of("training", "speed-*")
    found += section("Training under bf16 autocast, LTP, 32 texts of 40 to 66 tokens in a batch.", rows, training(rows))
    rows = rows_of("training", "curve-*")
    told = [f"* {row['recipe']}, seed {row['seed']}: {row['note']}" for row in rows]
    found += section("Loss of an epoch on MRPC, MiniLM-L6.", rows, told)
    return "\n".join(found)


def write() -> None:
    """Exchange the tables on the page."""
    from thresher.evaluation.rows import whole

    text = PAGE.read_text()
    assert BEGIN in text and END in text, f"{PAGE} has no place for tables"
    told = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: BEGIN + "\n" + page() + END, text, flags=re.S)
    with whole(PAGE) as aside:
        aside.write_text(told)


if __name__ == "__main__":
    write()
