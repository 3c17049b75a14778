"""AdapLeR: predicted contributions, taught by saliency, against a learned share of uniform."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.architecture import Architecture
from ..core.pruner import Batch, Record, RunAgain
from ..core.view import Site, View
from .parts.predictor import perceptron, perceptron_macs
from .parts.saliency import saliency
from .parts.thresholds import Thresholded


class AdapLeR(Thresholded):
    """Keep the tokens whose predicted contribution reaches a learned share of uniform (Modarressi, Mohebbi and
    Pilehvar, "AdapLeR: Speeding up Inference by Adaptive Length Reduction", ACL 2022).

    A perceptron at every site reads the state of each token that enters the layer. The softmax over the n live tokens
    is their contribution c. A token stays iff c >= eta / n, one eta per site: a threshold on n c, which is relative to
    uniform. In the soft stage a token fades by its gate, log sigmoid((n c - eta) / T), and 1 / T grows geometrically.
    The loss adds ``guidance`` * KL(s || c), the mean over the sites, where s are the shares of the saliencies of the
    live tokens. The budget is that of ``LTP``, the MACs of the predictors included.

    Args:
        init: eta at the start.
        guidance: weight of the KL.
        temperature: T at the start of the soft stage.
        sharpen: how many times as large 1 / T is at its end.
        straight_through: whether gates are rounded, as those of ``LTP``.

    The rest is as in ``LTP``.

    | paper | here | why |
    |---|---|---|
    | saliency: gradient times state of the true class's logit | derivative of the task loss by the token's gate (``parts.saliency``) | a token leaves after the attention of its layer, which therefore has no say |
    | saliency of the fine-tuned model | of the model in training, at every soft step | one training, no stage before it |
    | gradients of the predictors reach the states | they stop at the states | predictors are judges, not tasks |
    | tokens leave before the layer | before the FFN | as with all methods here |
    | additive mask, piecewise linear | a smooth gate | a gradient everywhere |
    | no floor | ``min_keep`` best tokens stay | as in ``LTP`` |
    | length loss with a weight | penalty on the expected MACs, one shift on held-out inputs | a budget needs no search; without a target the mean share that stays remains |
    """

    init: float = 0.25
    temperature: float = 0.1
    straight_through: bool = False
    guidance: float = 1.0
    sharpen: float = 10.0

    name: ClassVar[str] = "adapler"
    lr: ClassVar[float] = 5e-3
    needs_attention: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharpen < 1:
            raise ValueError(f"sharpen={self.sharpen}: expected a number from 1 up, gates become harder")
        self.divergence = 0.0

    def build(self, model: Architecture) -> None:
        super().build(model)
        draw = torch.Generator().manual_seed(0)
        self.predictors = nn.ModuleList(perceptron(model.hidden, draw) for _ in self.sites)
        self.predictor_macs = perceptron_macs(model.hidden)

    def score(self, view: View) -> Tensor:
        predictor: Any = self.predictors[view.site]
        gate = view.tokens.log_gate
        logit = predictor(view.hidden.detach().to(predictor[0].weight.dtype)).float()[..., 0]
        logit = logit if gate is None else logit + gate  # what has faded takes no share
        share = logit.masked_fill(~view.alive, float("-inf")).softmax(-1)
        return share * view.tokens.live[:, None]

    def opening(self, score: Tensor, view: View) -> Tensor:
        return super().opening(score, view) * self.sharpen**self.softened

    def loss(self, forward: RunAgain, batch: Batch, record: Record, teacher: Any = None) -> Tensor | float:
        budget = super().loss(forward, batch, record, teacher)
        if not self.soft:
            return budget
        apart = torch.stack(list(map(self.apart, record.sites, saliency(self, forward)))).mean()
        self.divergence = apart.item()
        return budget + self.guidance * apart

    @staticmethod
    def apart(site: Site, salient: Tensor) -> Tensor:
        """Compute a scalar, the mean over rows: KL of a site's contributions from the shares of saliency (B, N)."""
        weight = (salient + 1e-12 * site.protected) * site.tokens.votes.detach()  # where none is salient, [CLS] is
        target = weight / weight.sum(1, keepdim=True).clamp(min=1e-20)
        share = site.score / site.tokens.live[:, None]
        return (target * (target.clamp(min=1e-9).log() - share.clamp(min=1e-9).log())).sum(1).mean()

    def metrics(self) -> dict[str, float]:
        return {"saliency_kl": self.divergence} if self.soft else {}
