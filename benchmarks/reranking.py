"""A cross-encoder on SQuAD's articles, one step after the other; each resumes, and is not run again once it is done.

    python benchmarks/reranking.py train      MiniLM-L6 learns which paragraph of an article answers a question
    python benchmarks/reranking.py prune      and is pruned by ToP and TopK, without labels
    python benchmarks/reranking.py measure    reciprocal rank and nDCG of all, with paired intervals over questions
    python benchmarks/reranking.py time       milliseconds for 100 candidates in every runtime, interleaved

``--tiny`` does it all at a size that says nothing, to see that it works. Models lie in ``runs/benchmarks/passages``,
rows in ``results/passages``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from weights import pretrained  # noqa: E402

RUNS = HERE.parent / "runs" / "benchmarks"
DATA = Path(os.environ.get("THRESHER_DATA", "data")) / "squad"
LONGEST = 256
# Of the 28,734 pairs of the train part; one pass, since the encoder has read SQuAD before.
FULL = {"limit": 12_000, "epochs": 1, "lr": 2e-4, "batch_size": 16}
TINY = {"limit": 64, "epochs": 1, "lr": 1e-4, "batch_size": 16}


def common(tiny: bool) -> dict:
    """What all trainings share."""
    settings = {"data": str(DATA), "max_length": LONGEST, "metric": "mrr", "task": "rerank", "threads": 1}
    return settings | {key: value for key, value in (TINY if tiny else FULL).items() if key in ("limit", "batch_size")}


def folder(name: str, tiny: bool) -> Path:
    """Where a model lies."""
    return RUNS / ("passages-tiny" if tiny else "passages") / f"minilm-l6-{name}"


def train(tiny: bool) -> None:
    """Train the dense cross-encoder."""
    from thresher.experiments.train import train as job

    size = TINY if tiny else FULL
    own = {"method": "dense", "prune_epochs": 0, "epochs": size["epochs"], "lr": size["lr"]}
    job(model=pretrained("minilm-l6"), out=folder("dense", tiny), progress=False, **own, **common(tiny))


STEPS = {"train": train}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--tiny", action="store_true", help="at a size that says nothing")
    options = parser.parse_args()
    STEPS[options.step](options.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
