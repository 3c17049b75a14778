"""Transkimmer: a predictor in every layer says which tokens it can do without."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.architecture import Architecture
from ..core.view import View
from .parts.gates import gumbel
from .parts.thresholds import Thresholded


class Transkimmer(Thresholded):
    """Skim the tokens that a predictor in every layer can do without (Guan, Li, Leng, Lin and Guo, "Transkimmer:
    Transformer Learns to Layer-wise Skim", ACL 2022).

    A two-layer perceptron reads the state of each token that enters a layer and gives two logits, of staying and of
    leaving. In the soft stage Gumbel noise is added to both, and the token stays if the logit of staying is the larger
    one, rounded straight through. Afterwards there is no noise. A skimmed token keeps the state that it had. The budget
    is that of ``LTP``, the MACs of the predictors included; its shift is one of all logits.

    Args:
        start: how much larger the logit of staying is at the start.
        temperature: of the Gumbel softmax; the paper: 1.
        init: the difference of the logits from which on a token stays, at the start.

    The rest is as in ``LTP``.

    | paper | here | why |
    |---|---|---|
    | a token leaves before the attention that follows its predictor | after it, before the FFN | as with all methods here |
    | attention probabilities times the mask | a skimmed token is no key, probabilities add up to one | 0 is removal |
    | evaluation samples | a hard stage without noise follows | answers are the same every time |
    | mean share of tokens that stay | penalty on the expected MACs, one shift on held-out inputs | a budget needs no search; without a target the paper's penalty remains |
    | no floor | ``min_keep`` best tokens stay | as in ``LTP`` |
    | logits start 10 apart | ``start`` = 4 apart | a training has hundreds of steps, not tens of thousands |
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
        self.predictors = nn.ModuleList()
        for _ in self.sites:
            first, last = nn.Linear(size, size), nn.Linear(size, 2)
            for linear in (first, last):
                nn.init.normal_(linear.weight, std=0.02, generator=draw)
                nn.init.zeros_(linear.bias)
            last.bias.data = torch.tensor([self.start / 2, -self.start / 2])
            self.predictors.append(nn.Sequential(nn.LayerNorm(size), first, nn.LayerNorm(size), nn.GELU(), last))

    def score(self, view: View) -> Tensor:
        predictor: Any = self.predictors[view.site]
        stays, leaves = predictor(view.hidden.to(predictor[1].weight.dtype)).float().unbind(-1)
        return stays - leaves

    def opening(self, score: Tensor, view: View) -> Tensor:
        return gumbel(score - self.threshold[view.site]) / self.temperature
