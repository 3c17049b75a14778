"""Write what ``tagging.py``, ``speech.py`` and ``dinov2.py`` have found into ``docs/vision.md``, and what ``visual.py``
and ``visual_time.py`` have into ``docs/pictures.md``: ``python benchmarks/encoders.py``. Tables of what was not
measured are left out; without any row a page stays as it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEN = ROOT / "benchmarks" / "results" / "visual"
SHOWN = "tome-untrained"  # the tagger by type
BEGIN, END = "<!-- encoders.py writes from here -->\n", "<!-- to here -->\n"


def rows(folder: str) -> list[dict]:
    """All rows of a folder of results."""
    files = sorted((ROOT / "benchmarks" / "results" / folder).glob("*.json"))
    return [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]


def table(head: list[str], body: list[list[str]]) -> Iterator[str]:
    """The lines of a table; none without a body."""
    if body:
        yield from ("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))
        yield ""


def interval(row: dict) -> str:
    return f"{row['interval_low']:+.1f} to {row['interval_high']:+.1f}"


def called(row: dict) -> str:
    """A method, with the share of the MACs that it was to meet."""
    name, target = row["method"].removesuffix("-untrained"), row["target_flops"]
    return f"`{name}`" if target is None else f"`{name}`, {target:.2g} of the MACs"


def speech() -> Iterator[str]:
    """Word errors of each method in each part, and the rise with its interval."""
    for model in dict.fromkeys(row["model"] for row in rows("speech")):
        own = [row for row in rows("speech") if row["model"] == model and row["metric"]]
        parts = [part for part in ("sentences", "full", "recorded") if any(row["task"] == part for row in own)]
        lines = []
        for name in dict.fromkeys((row["method"], row["target_flops"]) for row in own):
            of = {row["task"]: row for row in own if (row["method"], row["target_flops"]) == name}
            cells = [called(next(iter(of.values())))]
            for part in parts:
                row = of.get(part)
                cells.append(
                    "" if row is None else f"{100 - row['quality']:.1f} ({interval(row)}), {row['flops_ratio']:.1f}×"
                )
            lines.append((name[0] != "dense", cells))
        if lines:
            counts = ", ".join(f"{part}: {next(r['n_examples'] for r in own if r['task'] == part)}" for part in parts)
            yield f"`{model}`, word error rate, in brackets by how much it rises (95 %), and times fewer MACs of the"
            yield f"encoder's layers. Windows: {counts}."
            yield ""
            yield from table(["method", *parts], [cells for _, cells in sorted(lines, key=lambda line: line[0])])
        timed = [row for row in rows("speech") if row["model"] == model and not row["metric"]]
        yield from times(timed, "one window at a time")


def times(timed: list[dict], how: str) -> Iterator[str]:
    """Milliseconds and speed-ups."""
    if timed:
        yield f"Time, {how}, {timed[0]['threads']} threads, {timed[0]['hardware']}:"
        yield ""
    body = [
        [
            row["task"] + (f", {row['max_length']} tokens" if row["max_length"] else ""),
            str(row["batch_size"]),
            called(row),
            f"{row['latency_ms_p50']:.0f}",
            f"{row['speedup_unpadded']:.2f}",
            "" if row["flops_ratio"] is None else f"{row['flops_ratio']:.2f}",
        ]
        for row in timed
    ]
    yield from table(["input", "batch", "method", "ms", "× as fast", "× fewer MACs"], body)


def by_type(kind: str, own: list[dict]) -> Iterator[str]:
    """What ``SHOWN`` finds of each type in a kind of text."""
    found: dict[str, dict[float, str]] = {}
    for row in own:
        if row.get("interval_low") is None:  # "CITY: 78 of 123 found, 4 that dense has not"
            type_, _, counts = row["note"].partition(": ")
            found.setdefault(type_, {})[row["target_flops"]] = counts.replace(" found, ", " + ").split(" that")[0]
    targets = sorted({row["target_flops"] for row in own}, reverse=True)
    if found:
        yield f"`{SHOWN.removesuffix('-untrained')}` in {kind}, of the dense model's entities (+ ones of its own):"
        yield ""
    head = ["type", *(f"{1 / target:.2g}×" for target in targets)]
    yield from table(head, [[type_, *(of.get(target, "") for target in targets)] for type_, of in found.items()])


def tagging() -> Iterator[str]:
    """F1 of each method on each kind of text, then that of one by type."""
    own = [row for row in rows("tagging") if row["metric"] and row["mode"] == "pruned"]
    whole = [row for row in own if row.get("interval_low") is not None]
    kinds = [kind for kind in ("sentences", "letters", "posts") if any(row["task"] == kind for row in whole)]
    targets = sorted({row["target_flops"] for row in whole}, reverse=True)
    head = ["method", *(f"{kind}, {1 / target:.2g}×" for kind in kinds for target in targets)]
    body = []
    for name in dict.fromkeys(row["method"] for row in whole):
        found = {(row["task"], row["target_flops"]): row for row in whole if row["method"] == name}
        cells = [found.get((kind, target)) for kind in kinds for target in targets]
        body.append(
            [f"`{name.removesuffix('-untrained')}`", *("" if row is None else f"{row['quality']:.1f}" for row in cells)]
        )
    if body:
        yield "F1 of the entities, those of the dense model taken for true, at times fewer MACs; untrained:"
        yield ""
    yield from table(head, body)
    for kind in kinds:
        yield from by_type(kind, [row for row in own if row["task"] == kind and row["method"] == SHOWN])
    body = [
        [row["method"].partition(", ")[2], f"{100 * row['keep']:.0f} %", f"{row['quality']:.1f} ({interval(row)})"]
        for row in rows("tagging")
        if row["mode"] == "put back"
    ]
    if body:
        yield "Sentences at 1.5 times fewer MACs, tokens drawn at random, put back before the next layer; in brackets"
        yield "what is lost (95 %):"
        yield ""
    yield from table(["the others are", "stay", "F1"], body)
    yield from times([row for row in rows("tagging") if not row["metric"]], "batches of 16")


def dinov2() -> Iterator[str]:
    """Correlation of maps, accuracy, pictures per second."""
    own = rows("dinov2")
    for start, what in (
        ("saliency", "Correlation of the map with the dense one's, mean over pictures, in hundredths"),
        ("cifar10", "Accuracy"),
    ):
        some = [row for row in own if row["task"].startswith(start) and row["metric"]]
        if some:
            yield f"{what}; in brackets the loss (95 %):"
            yield ""
        body = [
            [
                row["task"].removeprefix("saliency-"),
                called(row) + (", untrained" if row["method"].endswith("-untrained") else ""),
                f"{row['quality']:.1f} ({interval(row)})",
                f"{row['quality_dense']:.1f}",
                f"{row['flops_ratio']:.2f}",
            ]
            for row in some
        ]
        yield from table(["pictures", "method", "", "dense", "× fewer MACs"], body)
    yield from times([row for row in own if row["task"] == "speed"], "in turns")


def learned() -> Iterator[str]:
    """Accuracy of the model that learned to see."""
    import visual

    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(SEEN.glob("seed*.json"))]
    if runs:
        dense, blind = (
            ", ".join(f"{next(row for row in run['rows'] if row['method'] == name)['accuracy']:.1f}" for run in runs)
            for name in ("dense", "no picture")
        )
        seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
        yield f"Right answers in percent, mean of {seeds}, {runs[0]['pictures']} pictures with four questions each; in"
        yield "brackets the points over Random in the same table, with their 95 % interval over pictures."
        yield f"Dense: {dense}; no picture: {blind}."
        yield ""
    yield from visual.page(SEEN)


def first_pass() -> Iterator[str]:
    """Milliseconds of prompts with pictures."""
    file = SEEN / "time.json"
    timed = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    body = []
    for row in timed:
        dense = next(one for one in timed if (one["task"], one["method"]) == (row["task"], "dense"))
        cells = [row["task"], f"`{row['method']}`", f"{row['visual_mean']:.0f}", f"{row['flops_ratio']:.1f}"]
        cells += [f"{row['prefill_ms']:.0f} ({dense['prefill_ms'] / row['prefill_ms']:.1f}×)"]
        cells += [f"{row['latency_ms_p50']:.0f}", f"{row['cache_mb']:.1f}", f"{row['tower_ms']:.0f}"]
        whole = (dense["prefill_ms"] + row["tower_ms"]) / (row["prefill_ms"] + row["tower_ms"])
        body.append([*cells, f"{whole:.2f}"])
    if timed:
        yield f"{timed[0]['model']}, {timed[0]['threads']} threads, fp32, {timed[0]['hardware']}:"
        yield ""
    head = ["picture", "method", "tokens, mean of layers", "× fewer MACs", "first pass, ms (× as fast)", "ms a token"]
    yield from table([*head, "cache, MB", "tower, ms", "tower and first pass, × as fast"], body)


PAGES = {
    "vision.md": {"Speech": speech, "Entities": tagging, "A vision transformer of real size": dinov2},
    "pictures.md": {"Answers": learned, "Time": first_pass},
}


def main() -> int:
    from thresher.evaluation.rows import whole

    for name, sections in PAGES.items():
        page, lines = ROOT / "docs" / name, []
        for title, told in sections.items():
            if found := list(told()):
                lines += [f"### {title}: rows", "", *found]
        if lines:
            before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
            after = rest.partition(END)[2]
            with whole(page) as aside:
                aside.write_text(before + BEGIN + "\n" + "\n".join(lines) + END + after, encoding="utf-8")
        print(f"{len(lines)} lines in {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
