"""AdapLeR: predicted contributions, taught by saliency, against a learned share of uniform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.architecture import Architecture
from ..core.pruner import Record
from ..core.view import Site, View
from .ltp import LTP
from .parts.saliency import perceptron, perceptron_macs, saliency


class AdapLeR(LTP):
    """Contribution predictors taught by gradients (Modarressi, Mohebbi and Pilehvar, "AdapLeR: Speeding up Inference by
    Adaptive Length Reduction", ACL 2022).

    A perceptron at every site reads the state of each token that enters the layer; the softmax over the live tokens is
    their contribution c. A token stays iff c >= eta / n, n live tokens, one eta per site: the threshold of ``LTP`` on a
    score of n c, which is relative to uniform. In the soft stage a token below fades by its gate in the attention mask,
    log sigmoid((n c - eta) / T), a smooth form of their additive mask; 1 / T grows geometrically. The loss adds
    ``guidance`` * KL(s || c), the mean over the sites, to the task's and the budget's; s are the shares of the
    saliencies of the live tokens.

    Departures. The saliency is the derivative of the task loss by the token's gate (see ``parts.saliency``) in the
    model that is being trained, at every soft step; the paper's is gradient times state of the true class's logit in
    the fine-tuned model. A token leaves here after the attention of its layer, which therefore has no say. Gradients of
    the predictors do not go on into the states that they read. Tokens leave before the FFN, not before the layer. Gates
    may be rounded as ``LTP``'s (``straight_through=True``). The budget is ``LTP``'s: a penalty on the expected MACs,
    those of the predictors included, and one shift of all thresholds on held-out inputs; without a target the mean
    share of tokens that stay, as the paper's length loss.

    Args:
        init: eta at the start.
        guidance: weight of the KL.
        temperature: T at the start of the soft stage.
        sharpen: how many times as large 1 / T is at its end.

    The rest is as in ``LTP``.
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
        draw = torch.Generator().manual_seed(0)
        self.threshold = nn.Parameter(torch.full((len(self.sites),), self.init))
        self.predictors = nn.ModuleList(perceptron(model.hidden, draw) for _ in self.sites)
        self.predictor_macs = perceptron_macs(model.hidden)

    def score(self, view: View) -> Tensor:
        predictor, gate = self.predictors[view.site], view.tokens.log_gate
        logit = predictor(view.hidden.detach().to(predictor[0].weight.dtype)).float()[..., 0]
        logit = logit if gate is None else logit + gate  # what has faded takes no share
        share = logit.masked_fill(~view.alive, float("-inf")).softmax(-1)
        return share * view.tokens.live[:, None]

    def opening(self, score: Tensor, view: View) -> Tensor:
        return super().opening(score, view) * self.sharpen**self.softened

    def loss(self, forward: Callable, batch: dict, record: Record, teacher: Any = None) -> Tensor | float:
        budget = super().loss(forward, batch, record, teacher)
        if not self.soft:
            return budget
        apart = torch.stack(list(map(self.apart, record.sites, saliency(self, forward)))).mean()
        self.divergence = apart.item()
        return budget + self.guidance * apart

    @staticmethod
    def apart(site: Site, salient: Tensor) -> Tensor:
        """Scalar: KL between the shares of saliency (B, N) and the contributions at a site, the mean over rows."""
        weight = (salient + 1e-12 * site.protected) * site.tokens.votes.detach()  # where none is salient, [CLS] is
        target = weight / weight.sum(1, keepdim=True).clamp(min=1e-20)
        share = site.score / site.tokens.live[:, None]
        return (target * (target.clamp(min=1e-9).log() - share.clamp(min=1e-9).log())).sum(1).mean()

    def metrics(self) -> dict[str, float]:
        return {"saliency_kl": self.divergence} if self.soft else {}
