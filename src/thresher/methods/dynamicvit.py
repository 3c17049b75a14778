"""DynamicViT: a predictor at a few layers that sees a token and all others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.architecture import Architecture
from ..core.pruner import Batch, Record, RunAgain, RunBatch
from ..core.view import View
from .parts.gates import gumbel, log_gate
from .topk import TopK


class DynamicViT(TopK):
    """Keep the tokens that a predictor prefers, at a few layers (Rao, Zhao, Liu, Lu, Zhou and Hsieh, "DynamicViT:
    Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021).

    At each site a perceptron embeds the tokens. Half of an embedding stays the token's own; the place of the other half
    takes its mean over all tokens. A second perceptron gives the logits of staying and leaving. In the soft stage the
    choice is drawn with Gumbel noise, straight through. The loss is the squared distance of the mean share that stays
    from the wanted one (eq. 9). Afterwards the tokens with the largest chance stay, a fixed share.

    Args:
        keep: a share, for all sites or one per site; the paper: 0.7 at three sites.
        weight: of the loss on the shares.
        soft_until: share of the training that is soft.
        target_flops: as in ``TopK``; the shares are found before the training.

    | paper | here | why |
    |---|---|---|
    | tokens leave before the layer that the predictor reads | the predictor reads what enters the layer, tokens leave after its attention | as with all methods here |
    | masked softmax | gates enter the attention as in ``LTP`` | for the tokens that stay it is the same |
    | soft to the end | a hard stage follows | weights settle with what is used |
    | distils the tokens | left out | the trainer distils the answers |
    """

    keep: float | tuple = 0.7
    weight: float = 2.0
    soft_until: float = 0.5

    name: ClassVar[str] = "dynamicvit"
    lr: ClassVar[float] = 1e-3
    needs_attention: ClassVar[bool] = False
    takes_counts: ClassVar[bool] = False  # the loss is on shares

    def build(self, model: Architecture) -> None:
        super().build(model)
        size, draw = model.hidden, torch.Generator().manual_seed(0)
        half, quarter = size // 2, size // 4
        self.embed = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size), nn.GELU()) for _ in self.sites
        )
        self.decide = nn.ModuleList(
            nn.Sequential(nn.Linear(size, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2))
            for _ in self.sites
        )
        linears = [m for m in (*self.embed.modules(), *self.decide.modules()) if isinstance(m, nn.Linear)]
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=0.02, generator=draw)
            nn.init.zeros_(linear.bias)
        self.predictor_macs = sum(linear.weight.numel() for linear in linears) // max(1, len(self.sites))

    def score(self, view: View) -> Tensor:
        embed: Any = self.embed[view.site]
        votes = view.tokens.votes[..., None]
        x = embed(view.hidden.to(embed[1].weight.dtype))
        local, shared = x.tensor_split(2, dim=-1)
        mean = (shared * votes).sum(1, keepdim=True) / votes.sum(1, keepdim=True).clamp(min=1e-6)
        stays, leaves = self.decide[view.site](torch.cat([local, mean.expand_as(shared)], -1)).float().unbind(-1)
        return stays - leaves

    def gates(self, score: Tensor, view: View) -> Tensor:
        return log_gate(gumbel(score))

    def loss(self, forward: RunAgain, batch: Batch, record: Record, teacher: Any = None) -> Tensor | float:
        if not self.soft:
            return self.rest()
        kept, start, wanted, terms = record.kept(), record.counts[0].n_attention, 1.0, []
        for site, share in zip(record.sites, self.shares, strict=True):
            wanted *= share
            terms.append(((kept[site.layer] / start).mean() - wanted) ** 2)
        return self.weight * torch.stack(terms).sum()

    def prepare(self, forward: RunBatch, batches: Iterable[Batch]) -> None:
        """Find the shares that meet ``target_flops``, which do not depend on what the predictors will learn."""
        progress, self.progress = self.progress, 1.0
        try:
            self.calibrate(forward, batches)
        finally:
            self.progress = progress
