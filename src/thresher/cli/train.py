"""The command ``train``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ..experiments.spec import SUMMARY, TrainSpec

if TYPE_CHECKING:
    from .console import Screen


def train(spec: TrainSpec, screen: Screen) -> None:
    """Fine-tune a model and teach it which tokens it can do without.

    \b
    Examples:
      thresher train bert-base-uncased --data reviews.csv --out runs/reviews
      thresher train runs/dense --epochs 0 --data reviews.csv --target-flops 0.3 --out runs/fast
      thresher train bert-base-uncased --data glue --config sst2 --method topk --keep 0.7 --out runs/sst2
      thresher train bert-base-uncased --data glue --config mrpc --recipe top-mrpc --out runs/mrpc
    """
    from ..experiments.train import train as job
    from ..reports.tables import table

    with screen.aside():
        rows = job(spec, progress=not screen.quiet)
    screen.show(rows, table)
    if spec.target_latency or spec.target_latency_ms:
        reached = json.loads((spec.out / SUMMARY).read_text())["reached"]
        asked = f"{spec.target_latency_ms} ms" if spec.target_latency_ms else f"{spec.target_latency} of the dense time"
        screen.say(
            f"asked: {asked}; measured: {reached['latency_ms']:.2f} ms, "
            f"{reached['latency_fraction_measured']:.2f} of the dense {reached['latency_ms_dense']:.2f} ms"
        )
    screen.say(f"the model is in {spec.out}")
