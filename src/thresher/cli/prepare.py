"""The command ``prepare``."""

from __future__ import annotations

from ..experiments.spec import PrepareSpec
from .console import Screen


def prepare(spec: PrepareSpec, screen: Screen) -> None:
    """Make an encoder ready to be pruned, on texts without labels, before it has a task.

    \b
    Examples:
      thresher prepare bert-base-uncased --data texts.txt --minutes 60 --out runs/ready
      thresher prepare all-MiniLM-L6-v2 --data documents.parquet --steps 2000 --out runs/ready-embedder
      thresher prepare runs/encoder --data reviews.csv --text review --max-length 128 --out runs/ready
    """
    from ..experiments.prepare import prepare as job

    with screen.progress() as tell:
        rows = job(spec, progress=None if screen.quiet else tell)
    screen.show(rows)
    before, after = rows
    screen.say(
        f"cosine to the encoder, at {1 / before['flops_ratio']:.2f} of its MACs, without further training: "
        f"{before['quality'] / 100:.4f} before, {after['quality'] / 100:.4f} after {after['trained_steps']} steps; "
        f"with all tokens {after['quality_dense'] / 100:.4f}"
    )
    screen.say(f"the encoder is in {spec.out}")
