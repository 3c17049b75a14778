"""Run what has no result yet: ``python benchmarks/run.py --tier smoke``. Resumable; a file of rows lands as each entry
ends.

    python benchmarks/run.py --list                 what there is, and what is done
    python benchmarks/run.py --next                 one entry
    python benchmarks/run.py --tier smoke           all of a tier
    python benchmarks/run.py --all --only mrpc      all whose name contains mrpc
    python benchmarks/run.py --all --models         and make the models that they need and that another machine has
    python benchmarks/run.py --tables               docs/results.md and the README's table from the results

Several may run side by side: an entry that another process has begun is left to it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from entries import ENTRIES, Entry  # noqa: E402
from weights import available  # noqa: E402

RESULTS, RUNS = HERE / "results", HERE.parent / "runs" / "benchmarks"


def result_file(entry: Entry) -> Path:
    """Where the rows of an entry land."""
    return RESULTS / f"{entry.name}.json"


@contextmanager
def claimed(entry: Entry):
    """Whether this process alone works on the entry; the claim ends with the process."""
    lock = RUNS / "locks" / entry.name.replace("/", "-")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def has_model(name: str) -> bool:
    """Whether an entry's model is on this machine."""
    return (RUNS / name / "config.json").exists()


def ready(entry: Entry, again: frozenset[str] = frozenset()) -> bool:
    """Whether an entry has no result yet, or has to be run again for its model, and all it needs is there."""
    needs = (*entry.needs, entry.after) if entry.after else entry.needs
    there = (entry.task in ("synthetic", "vision") or available(entry.model)) and all(map(has_model, needs))
    due = entry.name in again and not has_model(entry.name)
    return there and (due or not result_file(entry).exists())


def models_for(chosen: list[Entry]) -> list[Entry]:
    """The entries, the first ones first, whose models open ones of ``chosen`` need and this machine lacks."""
    named = {entry.name: entry for entry in ENTRIES}
    missing: dict[str, Entry] = {}
    open_ones = [entry for entry in chosen if not result_file(entry).exists()]
    while open_ones:
        needs = [
            named[name]
            for entry in open_ones
            for name in filter(None, (*entry.needs, entry.after))
            if not has_model(name)
        ]
        missing = {entry.name: entry for entry in needs} | missing
        open_ones = needs
    return list(missing.values())


def labels_of(entry: Entry) -> list:
    """Gold labels of the task's test part, so that intervals can be computed where the data are not."""
    from entries import TASKS
    from thresher.data.load import load_task

    setting = TASKS[entry.task]
    task = load_task(setting.path, config=setting.config)
    return list(task.test[task.label_column])


def run(entry: Entry) -> None:
    """Run one entry and land its rows, unless they are there and its model alone was missing."""
    if entry.kind != "train":
        import speed

        rows, extra = speed.KINDS[entry.kind](entry, RUNS), {}
    else:
        from thresher.experiments.answers import kept_answers
        from thresher.experiments.spec import SUMMARY, TrainSpec
        from thresher.experiments.train import train
        from thresher.stats.metrics import is_mean

        spec = TrainSpec(**entry.recipe(RUNS), out=RUNS / entry.name)
        rows = train(spec, progress=sys.stderr.isatty(), ask=partial(kept_answers, place=RUNS / "answers", most=None))
        summary = json.loads((RUNS / entry.name / SUMMARY).read_text())
        method = f"{entry.method}-{entry.variant}".strip("-")
        rows = [{**rows[-1], "model": entry.model, "method": method, "target_flops": entry.target}]
        if entry.method == "dense":
            rows[0].update(mode="dense-unpadded")
        if summary["budget"]:
            rows[0]["target_flops"] = summary["budget"]["target_flops"]
        means = is_mean(rows[0]["metric"])
        extra = {"labels": [1] * len(summary["predictions"]["dense"]) if means else labels_of(entry)}
        extra |= {k: summary[k] for k in ("reached", "kept", "seconds", "texts_cut", "removed", "predictions")}
        extra |= {k: summary[k] for k in ("rates", "schedule", "budget", "milder") if summary.get(k)}
        overlaps = [list(line.values()) for line in map(overlap_of, summary["history"]) if line]
        settled = overlaps[len(overlaps) // 2 :]  # each is of one batch, of one length
        extra["overlap"] = [sum(layer) / len(settled) for layer in zip(*settled, strict=True)]
        rewards = [{name: line[name] for name in REWARD} for line in summary["history"] if "reward" in line]
        extra |= {"rewards": rewards} if rewards else {}
    file = result_file(entry)
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".partial")
    command = f"python benchmarks/run.py --all --only {entry.name}"
    aside.write_text(as_json({"rows": [{**row, "command": command} for row in rows], **extra}))
    os.replace(aside, file)


REWARD = ("epoch", "reward", "task_loss", "left", "alpha")  # what a method that learns by reinforcement logs


def overlap_of(line: dict) -> dict:
    """What a line of the log says of the ranking, by layer."""
    return {name: value for name, value in line.items() if name.startswith("rank_overlap")}


def as_json(result: dict) -> str:
    """A result as text: a row or a list of numbers on one line."""
    rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
    rest = [f',\n "{name}": {json.dumps(value)}' for name, value in result.items() if name != "rows"]
    return f'{{\n "rows": [\n  {rows}\n ]{"".join(rest)}\n}}\n'


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show all entries")
    parser.add_argument("--next", action="store_true", help="run one entry")
    parser.add_argument("--all", action="store_true", help="run all entries")
    parser.add_argument("--tier", choices=("smoke", "full", "depth"), help="run all entries of a tier")
    parser.add_argument("--only", default="", metavar="TEXT", help="entries whose name contains TEXT")
    parser.add_argument("--models", action="store_true", help="make models again whose results were made elsewhere")
    parser.add_argument("--threads", type=int, help="threads of the training (default: torch's)")
    parser.add_argument("--tables", action="store_true", help="write docs/results.md, docs/papers.md, README")
    options = parser.parse_args()
    chosen = [e for e in ENTRIES if options.only in e.name and options.tier in (None, e.tier)]
    if options.list:
        for entry in chosen:
            print(
                f"{'done' if result_file(entry).exists() else 'ready' if ready(entry) else 'waits':6} "
                f"{entry.tier:6} {entry.name}"
            )
        return 0
    if options.tables:
        from tables import write

        write(RESULTS, HERE.parent / "docs" / "results.md")
        return 0
    if not (options.next or options.all or options.tier):
        parser.print_help()
        return 2
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    missing = models_for(chosen) if options.models else []
    again = frozenset(entry.name for entry in missing)
    progressed = True
    while progressed:
        progressed = False
        for entry in (*missing, *chosen):
            if not ready(entry, again):
                continue
            with claimed(entry) as mine:
                if not mine or not ready(entry, again):
                    continue
                print(f"== {entry.name}", flush=True)
                run(entry)
                progressed = True
            if options.next:
                return 0
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
