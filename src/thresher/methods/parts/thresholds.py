"""Learned thresholds that one shift brings onto a budget: what LTP, LTMP, Transkimmer, AdapLeR and TR-BERT share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.architecture import Architecture
from ...core.pruner import Batch, Choice, Record, RunAgain
from ...core.view import View
from .budget import Budgeted, falling
from .gates import log_gate


class Thresholded(Budgeted):
    """Keep the tokens whose score reaches a threshold, one per site, whose gradient is that of a gate.

    Arguments as ``LTP``; ``init`` is the threshold of all sites at the start, ``temperature`` in units of the score.
    """

    target_flops: float | None = None
    weight: float | None = None
    temperature: float = 0.1
    init: float = 1.0
    soft_until: float = 0.3
    straight_through: bool = True
    min_keep: int = cast("int", None)  # settled below

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_keep is None:
            self.min_keep = 3 if getattr(self, "schedule", None) is None else 1
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: expected a positive number")
        if self.min_keep < 1:
            raise ValueError(f"min_keep={self.min_keep}: expected a number of tokens from 1 up")

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        """Name every layer; the last one only for heads that read the first token alone, which no other token can
        reach any more."""
        last = model.last_site if model.reads_first_only else min(model.last_site, model.depth - 2)
        return tuple(range(model.first_site, last + 1))

    def build(self, model: Architecture) -> None:
        self.threshold = nn.Parameter(torch.full((len(self.sites),), float(self.init)))

    def choose(self, score: Tensor, view: View) -> Choice:
        return Choice(score >= self.threshold[view.site])

    def gates(self, score: Tensor, view: View) -> Tensor:
        opening = self.opening(score, view)
        return log_gate(opening) if self.straight_through else F.logsigmoid(opening)

    def opening(self, score: Tensor, view: View) -> Tensor:
        """Compute (B, N), the log odds of each gate (LTP, eq. 6)."""
        return (score - self.threshold[view.site]) / self.temperature

    # --- the budget ----------------------------------------------------------------------------------------------
    def loss(self, forward: RunAgain, batch: Batch, record: Record, teacher: Any = None) -> Tensor | float:
        if not self.soft:
            return self.rest()
        if self.target_flops is not None:
            return self.penalty(record, self.softened, self.weight) + self.rest()
        kept = record.kept()
        gates = [kept[site.layer] / record.counts[0].n_attention for site in record.sites]
        return (0.1 if self.weight is None else self.weight) * torch.stack(gates).mean() + self.rest()

    @property
    def target_now(self) -> float:
        """The share of the MACs that is asked for now: ``target_flops``, once half of the soft stage is over."""
        assert self.target_flops is not None
        return falling(self.target_flops, self.softened)

    def knob(self) -> Callable[[float], None]:
        """Return the knob: one shift of all thresholds."""
        start = self.threshold.detach().clone()

        def turn(by: float) -> None:
            with torch.no_grad():
                self.threshold.copy_(start + by)

        return turn
