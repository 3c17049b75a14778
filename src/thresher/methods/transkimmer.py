"""Transkimmer: a predictor in every layer says which tokens it can do without."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.architecture import Architecture
from ..core.view import View
from .ltp import LTP
from .parts.gates import gumbel


class Transkimmer(LTP):
    """Skim predictors trained with Gumbel noise (Guan et al., "Transkimmer: Transformer Learns to Layer-wise Skim", ACL
    2022); tokens that are skimmed keep the state that they had.

    A two-layer perceptron reads the state of each token that enters a layer and gives two logits. In the soft stage the
    token stays if that of staying, with Gumbel noise on both, is the larger one (a choice that is rounded in the
    forward pass, straight through); afterwards the same without noise.

    Departures. The predictor reads what enters the layer, as theirs, but tokens leave after its attention, before the
    FFN, as with all methods here. A skimmed token is gone from attention, whose probabilities then add up to one again
    (theirs are multiplied by the mask). A hard stage without noise follows (theirs samples in evaluation). The budget
    is ``LTP``'s: a penalty on the expected MACs, those of the predictors included, and one shift of all logits on
    held-out inputs; without a target the penalty is the paper's mean share of tokens that stay. The logits start at
    ``start`` apart, not 10: a training has hundreds of steps, not tens of thousands.

    Args:
        start: how much larger the logit of staying is at the start.
        temperature: of the Gumbel softmax; the paper: 1.

    The rest is as in ``LTP``.
    """

    temperature: float = 1.0
    init: float = 0.0
    start: float = 4.0

    name: ClassVar[str] = "transkimmer"
    lr: ClassVar[float] = 1e-3
    needs_attention: ClassVar[bool] = False

    def build(self, model: Architecture) -> None:
        super().build(model)
        size, draw = model.hidden, torch.Generator().manual_seed(0)
        self.predictor_macs = size * size + 2 * size
        self.predictors = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size), nn.LayerNorm(size), nn.GELU(), nn.Linear(size, 2))
            for _ in self.sites
        )
        for predictor in self.predictors:
            for linear in (predictor[1], predictor[4]):
                nn.init.normal_(linear.weight, std=0.02, generator=draw)
                nn.init.zeros_(linear.bias)
            predictor[4].bias.data = torch.tensor([self.start / 2, -self.start / 2])

    def score(self, view: View) -> Tensor:
        predictor = self.predictors[view.site]
        stays, leaves = predictor(view.hidden.to(predictor[1].weight.dtype)).float().unbind(-1)
        return stays - leaves

    def opening(self, score: Tensor, view: View) -> Tensor:
        return gumbel(score - self.threshold[view.site]) / self.temperature
