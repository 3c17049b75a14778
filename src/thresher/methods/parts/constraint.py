"""One target, in MACs or in measured time, and the cost of a schedule as a fraction of the dense model's.

Shapes: B texts. Tokens and protected tokens are counts (B,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ...core.architecture import Architecture
from ...core.cost import LatencyTable, Price, tokens_by_layer
from ...core.pruner import Batch, Record, RunBatch, TokenPruner
from .budget import OutOfReach

TARGETS = ("target_flops", "target_latency", "target_latency_ms")
OVER = 1.02  # times the target: above, a schedule is over budget


class Constrained(TokenPruner):
    """Constrain the cost that is expected of texts of the lengths that were seen. The targets are those of ``ToP``."""

    target_flops: float | None = None
    target_latency: float | None = None
    target_latency_ms: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        targets = self.targets
        if len(targets) > 1:
            raise ValueError(f"{' and '.join(f'{k}={v}' for k, v in targets.items())}: expected one target")
        for name, value in targets.items():
            if not 0 < value < math.inf or (value > 1 and name != "target_latency_ms"):
                what = "a positive number" if name == "target_latency_ms" else "a fraction of the dense cost in (0, 1]"
                raise ValueError(f"{name}={value}: expected {what}")
        if not targets:
            self.target_flops = 0.4
        self.table: LatencyTable | None = None

    def build(self, model: Architecture) -> None:
        self.lengths: tuple[Tensor, Tensor] | None = None  # of inputs that the target is meant for

    @property
    def targets(self) -> dict[str, float]:
        """The targets that are given."""
        return {name: getattr(self, name) for name in TARGETS if getattr(self, name) is not None}

    @property
    def needs_table(self) -> bool:
        """Whether the target is one of time."""
        return self.target_flops is None

    @property
    def price(self) -> Price:
        """What forwards cost, in MACs, or in ms where the target is one of time."""
        if self.needs_table and self.table is None:
            raise RuntimeError("a target of time needs measured times: set pruner.table = latency_table(model)")
        return Price(self.architecture.costs, self.table if self.needs_table else None)

    def target(self, tokens: Tensor) -> float:
        """Return the target as a fraction of the dense cost on rows of ``tokens``."""
        if self.target_latency_ms is None:
            share = self.target_latency if self.target_flops is None else self.target_flops
            assert share is not None, "one of the targets is set"
            return share
        return self.target_latency_ms / self.price.dense(tokens).mean().item()

    def cost(
        self, tokens: Tensor, protected: Tensor, stay: Callable[[int, Tensor], Tensor], idle: Iterable[int] = ()
    ) -> Tensor:
        """Compute a scalar: the cost as a fraction of the dense model's on rows of ``tokens``, of which ``protected``
        cannot leave; ``stay(site, n)`` says how many of n others stay. A row keeps one. ``idle`` sites are not
        scored."""
        after = {
            layer: lambda n, site=site: (protected + stay(site, n - protected)).clamp(min=1)
            for site, layer in enumerate(self.sites)
        }
        unscored = [self.sites[site] for site in idle]
        layers, inside = range(self.architecture.depth), self.architecture.drops_inside
        counts = tokens_by_layer(tokens, after, layers, inside=inside, unscored=unscored)
        return self.price.used(counts).sum() / self.price.dense(tokens).sum()

    def reached(self, fraction: float, target: float) -> dict[str, float]:
        """Report the ``fraction`` of the dense cost that a calibration to a ``target`` came to.

        Raises:
            OutOfReach: it is over budget.
        """
        (name, value), what = next(iter(self.targets.items())), "time" if self.needs_table else "MACs"
        if fraction > OVER * target:
            raise OutOfReach(
                f"{name}={value} cannot be reached at={list(self.sites)}: with every bin off {fraction:.3f} of the "
                f"{what} are left; prune at earlier layers or choose a larger target"
            )
        return {"latency_fraction" if self.needs_table else "flops_fraction": fraction}

    def prepare(self, forward: RunBatch, batches: Iterable[Batch]) -> None:
        """Remember the lengths of inputs. The expected cost is counted on them and not on those of a batch: texts are
        batched by length, and a batch of short ones cannot be pruned as the others are."""
        self.lengths = lengths_of(forward, batches)


def rows_of(record: Record) -> tuple[Tensor, Tensor]:
    """Return (B,) tokens of each row of a forward, and how many of them are protected."""
    return record.counts[0].n_attention.detach().long(), record.sites[0].protected.sum(1)


def lengths_of(forward: RunBatch, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Return what ``rows_of`` says of all rows of ``batches``."""
    tokens, protected = zip(*(rows_of(forward(batch)) for batch in batches), strict=True)
    return torch.cat(tokens), torch.cat(protected)
