"""docs/results.md and README's headline out of benchmarks/results, where every number in a table has a row, and
docs/papers.md out of the docstrings."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from pathlib import Path

from entries import ENTRIES, TASKS, Entry
from headline import headline
from leaderboard import leaderboard_section, on_board
from paired_drops import against_dense, against_same_steps, drop_text, mean, row_drop
from papers import beside
from papers_page import papers_page
from pictures import pictures

ORDER = ("dense", "dense-continued", "top", "ltp", "topk", "firstk", "random")
PREAMBLE = """\
# Results

Written by `python benchmarks/run.py --tables` from `benchmarks/results`; do not edit.

MiniLM-L6 where no other model is named, fp32 evaluation on test parts. FLOPs: how many times fewer MACs the encoder
layers spend than dense unpadded on the same texts (own length). TopK, FirstK and Random keep, text by text and site by
site, as many tokens as LTP did (of-top: as ToP did), and are trained with the same steps and the same distillation.
Intervals: paired bootstrap over examples and seeds. Drops are against the dense model that a row started from, which
another machine makes otherwise from the same command (MRPC, seed 0: 86.4 and 85.4). Rank overlap: the share of the
teacher's best tokens (of short texts, of their better half) that the first layers rank among their own best, by layer,
mean over the second half of the training, of the tokens that are left; by chance it would be one half where few are.
Drops against the same extra steps stand where both models started from one dense model.

Budgets are met on the validation part, and texts of another length cost another share: SST-2's training rows, and
so its validation part, are phrases, its test part is whole sentences. Compare rows of equal FLOPs.

How LTP prunes (gates, floor, rates, epochs, length of the soft stage) was chosen among thirteen configurations on
the validation part of SST-2. Three earlier ones had been read on the test parts of MRPC and SST-2; that top-k was
above LTP on MRPC's test part is why a shorter soft stage was among what was tried; nothing else was chosen on a
test part. How ToP's masks start, are drawn and are counted, how long they learn, and how the ranking is taught, was
chosen among nineteen configurations on the validation parts of MRPC and SST-2; that there are no gates, on those of
20 Newsgroups and SST-2, after the rows called gated had been read on the test parts. Those rows were run when sites
whose gates are off were still scored, which their FLOPs contain; their commands now prune a little less for the same.

Under bf16 autocast scores were rounded to bf16 in the training of the rows dated before 17:08 UTC on 22 November 2026;
they are fp32 since. The commands of those rows therefore give other models, apart by what another seed would give.

On the validation part of 20 Newsgroups (dense 73.4, one seed, no rows here) LTP at 2.57x answered 72.5 % right,
LTP from a start that gave a flatter schedule 72.4 %, with twice the steps 72.6 %, TopK with a flatter schedule
still, at 2.51x, 72.0 %; ToP at 3.5x 69.4 % with gates, 71.4 % without, 71.6 % with batches of 16.
"""


def load(results: Path) -> dict[str, dict]:
    """Results by entry name."""
    files = {entry.name: results / f"{entry.name}.json" for entry in ENTRIES}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def quality_table(task: str, entries: list[Entry], results: dict[str, dict]) -> list[str]:
    """Quality of each method on the test part: mean over seeds, paired differences with 95 % intervals."""
    runs = defaultdict(dict)
    for entry in entries:
        if entry.name in results:
            runs[named(entry)][entry.seed] = results[entry.name]
    some = next(iter(next(iter(runs.values())).values()))
    labels, metric = list(some["labels"]), some["rows"][0]["metric"]
    ranked = any(result.get("overlap") for of_seed in runs.values() for result in of_seed.values())
    head = ["method", "seeds", metric, "drop against dense [95 % interval]", "against dense, same extra steps"]
    head += ["FLOPs", "reached on validation", *["rank overlap"] * ranked]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    names = {named(entry): entry for entry in reversed(entries)}
    for method in sorted(runs, key=lambda name: (-(names[name].target or 2), place(names[name].method), name)):
        seeds = sorted(runs[method])
        rows = [runs[method][s]["rows"][0] for s in seeds]
        cells = [method, ", ".join(map(str, seeds)), f"{mean(r['quality'] for r in rows):.2f}"]
        cells.append("" if method == "dense" else drop_text(metric, against_dense(runs[method].values(), labels)))
        unpruned = method in ("dense", "dense-continued")
        same = [] if unpruned else against_same_steps(runs[method], runs["dense-continued"], labels)
        cells.append(drop_text(metric, same))
        cells.append(f"{mean(r['flops_ratio'] for r in rows):.2f}")
        own = names[method].target is not None and len(names[method].needs) < 2  # and not that of replayed counts
        cells.append(", ".join(f"{runs[method][s]['reached']['flops_fraction']:.3f}" for s in seeds) if own else "")
        if ranked:
            overlaps = [runs[method][s]["overlap"] for s in seeds if runs[method][s].get("overlap")]
            cells.append(", ".join(f"{mean(layer):.2f}" for layer in zip(*overlaps, strict=True)))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def place(method: str) -> tuple[int, str]:
    """Where a method stands among others: the known ones first, in their order, then by name."""
    return ORDER.index(method) if method in ORDER else len(ORDER), method


def named(entry: Entry) -> str:
    """What a method is called in a table: with its variant and its budget."""
    name = f"{entry.method} ({entry.variant})" if entry.variant else entry.method
    return name if entry.target is None else f"{name}, {entry.target:g}"


def speed_table(result: dict) -> list[str]:
    """Wall-clock rows of one interleaved run."""
    from thresher.reports.tables import markdown

    return markdown(result["rows"]).splitlines()


def soak_told(entry: Entry, rows: list[dict]) -> list[str]:
    """Memory over many calls."""
    head = f"Memory of a process over {entry.options['calls']:,} calls of 1 to 4 rows of 3 to 128 tokens:"
    return [head, "", *(f"* {row['runtime']} {row['precision']}: {row['note']}" for row in rows)]


def choice_told(entry: Entry, rows: list[dict]) -> list[str]:
    """A threshold beside the k best."""
    lines = ["What choosing alone takes, in microseconds, of scores that are there, 1 thread:", ""]
    times = {(row["batch_size"], row["max_length"], row["method"]): row["latency_ms_p50"] for row in rows}
    for size, length in entry.options["shapes"]:
        one, best = (1000 * times[size, length, name] for name in ("threshold", "topk"))
        lines.append(f"* {size} x {length} tokens: a threshold {one:.0f}, the k best {best:.0f}")
    return lines


def anytime_told(entry: Entry, rows: list[dict]) -> list[str]:
    """One model at several budgets."""
    lines = ["One model of LAT, its budget set at run time:", ""]
    for row in rows:
        told = f"{row['metric']} {row['quality']:.2f}, drop {row_drop(row)}, {row['flops_ratio']:.2f}x fewer FLOPs"
        lines.append(f"* {row['target_flops']:g}: {told}")
    return lines


def tune_told(entry: Entry, rows: list[dict]) -> list[str]:
    """A schedule that was found without training."""
    lines, more = [], "".join(f" --{name.replace('_', '-')} {value}" for name, value in entry.options.items())
    for row in rows:
        lines.append(
            f"`thresher tune --target-flops {entry.target:g}{more}`, no training ({row['note']}): {row['metric']} "
            f"{row['quality']:.2f}, drop {row_drop(row)}, {row['flops_ratio']:.2f}x fewer FLOPs on the test part."
        )
    return lines


def audit_told(entry: Entry, rows: list[dict]) -> list[str]:
    """What it lost where."""
    pruned = entry.needs[1].partition("/")[2].removeprefix(f"{entry.model}-").removesuffix(f"-s{entry.seed}")
    lines = [f"`thresher audit` of {pruned}, {rows[0]['metric']}; p of the slices after Holm's correction:", ""]
    lines += ["| slice | texts | dense | drop [95 % interval] | tests |", "|---|---|---|---|---|"]
    for row in rows:
        where, _, tests = row["note"].rpartition(": ")
        lines.append(f"| {where} | {row['n_examples']} | {row['quality_dense']:.2f} | {row_drop(row)} | {tests} |")
    return lines


def coverage_told(entry: Entry, rows: list[dict]) -> list[str]:
    """Draws against a tested bound."""
    from tuning import WORST

    draws, pool = entry.options["draws"], entry.options["pool"]
    head = (
        f"The dense model of SST-2 on the first {entry.options['max_length']} tokens of {pool:,} reviews of IMDB's "
        f"test part, {draws:,} draws of those tested each time, of the worst case {WORST:,} for each schedule:"
    )
    return [head, "", *(f"* {row['n_examples']} texts, {row['note']}" for row in rows)]


TELLERS = {  # of kinds whose rows are no wall-clock of a run of bench
    "soak": soak_told,
    "choice": choice_told,
    "anytime": anytime_told,
    "tune": tune_told,
    "audit": audit_told,
    "coverage": coverage_told,
}


def timings(task: str, found: dict[str, dict]) -> list[str]:
    """What a task's entries of wall-clock and memory say."""
    lines = []
    for entry in (e for e in ENTRIES if e.task == task and e.kind != "train" and e.name in found):
        rows = found[entry.name]["rows"]
        if entry.method == "board":  # in its table
            continue
        if entry.kind in TELLERS:
            lines += [*TELLERS[entry.kind](entry, rows), ""]
            continue
        what = f"first {rows[0]['n_examples']} texts"
        if entry.kind == "efficiency":
            least = entry.options.get("least")
            what += f" of {least} tokens" if least else f", at most {rows[0]['max_length']} tokens"
            what += f", untrained TopK{'' if entry.model == 'minilm-l6' else ', ' + entry.model}"
        elif entry.kind == "runtimes":
            what = f"ToP at {entry.target:g}, {rows[0]['n_examples']} texts"
        elif entry.kind == "compression":
            what = f"MiniLM-L6, ToP at {entry.target:g}, MiniLM-L3 and both, {rows[0]['n_examples']} texts"
        elif entry.kind == "synthetic":
            (size, longest), least = entry.options["shape"], entry.options.get("least")
            tokens = f"{least} to {longest}" if least else longest
            what = f"batch {size}, {tokens} tokens, untrained TopK at 2.1x, 4x, 8x"
        run = "one interleaved run" + " per schedule" * (entry.kind in ("efficiency", "synthetic"))
        lines += [f"Wall-clock, {what}, {run}, {rows[0]['threads']} threads, {rows[0]['hardware']}:", ""]
        lines += [*speed_table(found[entry.name]), ""]
    return lines


def vision_table(rows: list[dict]) -> list[str]:
    """Accuracy and wall-clock of one interleaved run on pictures, a line for both batch sizes."""
    head = ["method", "FLOPs", "accuracy", "drop against dense [95 % interval]", "tokens entering the layers"]
    sizes = sorted({row["batch_size"] for row in rows}, reverse=True)
    head += [f"× dense at batch {size} (spread)" for size in sizes]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in (row for row in rows if row["batch_size"] == sizes[0]):
        same = [r for r in rows if (r["method"], r["target_flops"]) == (row["method"], row["target_flops"])]
        drop = ""
        if row["method"] != "dense":
            drop = row_drop(row)
        target = "" if row["target_flops"] is None else f", {row['target_flops']:g}"
        cells = [f"{row['method']}{target}", f"{row['flops_ratio']:.2f}", f"{row['quality']:.2f}"]
        cells += [drop, row["note"].partition(": ")[2]]
        same.sort(key=lambda r: -r["batch_size"])
        cells += [f"{r['speedup_unpadded']:.2f} ({r['spread']:.2f})" for r in same]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def vision_section(rows: list[dict], pictures: Path) -> list[str]:
    """What the rows on pictures say; draws the accuracy against tokens."""
    from vision import ABOUT, plot

    threads, hardware, spread = rows[0]["threads"], rows[0]["hardware"], max(row["spread"] for row in rows)
    plot(rows, pictures / "vision.png")
    return [
        "## Vision: digits",
        "",
        *ABOUT.splitlines(),
        "",
        *vision_table(rows),
        "",
        f"Wall-clock: one interleaved run, {rows[0]['repeats']} repeats, {threads} thread{'s' * (threads > 1)}, "
        f"{hardware}, beside other work of the machine; the spread is that of the total over the repeats, up to "
        f"{spread:.2f}.",
        "",
        "![accuracy against tokens](img/vision.png)",
        "",
    ]


def hours(results: dict[str, dict]) -> list[str]:
    """How long the trainings took, by machine; an entry's thread had a core, most often beside another entry."""
    took: dict[str, list[float]] = defaultdict(list)
    for result in results.values():
        if "seconds" in result:
            took[result["rows"][0]["hardware"]].append(result["seconds"] / 3600)
    told = [f"* {machine}: {len(of)} entries of training, {sum(of):.1f} hours" for machine, of in sorted(took.items())]
    said = "Trainings with their judging, one to two threads each, two at a time; entries of timing took hours besides."
    return ["## What it took", "", said, "", *told, ""] if told else []


def how(training: dict) -> str:
    """How a task is trained, and what the budget is of."""
    budget = "the budget is the share of the dense MACs on the validation part"
    if "epochs" in training:
        epochs = f"{training['epochs']:g} epochs of fine-tuning, {training['prune_epochs']:g} of pruning"
        return f"{epochs}; {budget}"
    chosen = "rate, schedule and length of the trainings are chosen on the validation part"
    return f"{chosen}; {budget}, or (careful) a drop of one point there"


def write(results: Path, target: Path) -> None:
    """Write ``target``, and beside it the page of the papers and the headline of the README."""
    found = load(results)
    lines = [*PREAMBLE.splitlines(), ""]
    missing = [entry.name for entry in ENTRIES if entry.name not in found]
    for task, setting in TASKS.items():
        entries = [entry for entry in ENTRIES if entry.task == task and entry.kind == "train"]
        if not any(entry.name in found for entry in entries):
            if told := timings(task, found):
                lines += [f"## {task}", "", *told]
            continue
        rows = f", {setting.limit:,} training rows" if setting.limit else ""
        rows += f", {setting.test:,} drawn rows of the test part" if setting.test else ""
        lines += [
            f"## {task}{'' if (model := entries[0].model) == 'minilm-l6' else ', ' + model}",
            "",
            f"At most {setting.training.get('max_length', 256)} tokens{rows}; {how(setting.training)}.",
            "",
            *quality_table(task, [entry for entry in entries if not on_board(entry)], found),
            "",
            *leaderboard_section(task, [entry for entry in entries if on_board(entry)], found, target.parent),
        ]
        lines += timings(task, found)
    if told := timings("synthetic", found):
        lines += ["## BERT-base's shape, random weights", "", *told]
    for entry in (entry for entry in ENTRIES if entry.kind == "vision" and entry.name in found):
        lines += vision_section(found[entry.name]["rows"], target.parent / "img")
    lines += beside(found)
    lines += pictures(found, target.parent)
    lines += hours(found)
    if missing:
        tasks = dict.fromkeys(name.partition("/")[0] for name in missing)
        by_task = {task: [name.partition("/")[2] for name in missing if name.startswith(f"{task}/")] for task in tasks}
        lines += ["## Not run yet", "", *[f"* {task}: {', '.join(names)}" for task, names in by_task.items()], ""]
    target.parent.mkdir(parents=True, exist_ok=True)
    replace(target, "\n".join(lines))
    replace(target.with_name("papers.md"), papers_page())
    readme = target.parent.parent / "README.md"
    if readme.exists():
        text = readme.read_text()
        marked = f"<!-- results -->\n{headline(results, found)}\n<!-- /results -->"
        replace(readme, re.sub(r"<!-- results -->.*?<!-- /results -->", lambda _: marked, text, flags=re.S))


def replace(target: Path, text: str) -> None:
    """Write a file aside and move it."""
    aside = target.with_suffix(".partial")
    aside.write_text(text)
    os.replace(aside, target)
