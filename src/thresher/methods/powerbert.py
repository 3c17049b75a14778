"""PoWER-BERT: how many tokens each layer keeps is learned, by rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.architecture import Architecture
from ..core.pruner import Record
from ..core.scoring import columns
from ..core.tokens import CLOSED
from ..core.view import View
from .parts.rank_bins import bin_of
from .parts.selection import ranks
from .topk import TopK


def others(weights: Tensor, votes: Tensor) -> Tensor:
    """(B, N): what each token receives from others; see ``View.over``."""
    return columns(weights, votes) - (weights.diagonal(dim1=-2, dim2=-1) * votes[:, None]).sum(1)


class PoWERBERT(TopK):
    """Progressive word-vector elimination (Goyal et al., "PoWER-BERT: Accelerating BERT Inference via Progressive
    Word-vector Elimination", ICML 2020).

    The score of a token is the attention that it receives from the others, over heads (their section 3.2). In the soft
    stage ("soft-extract") each token is multiplied by the retention parameter of its rank, one per layer and rank, in
    [0, 1] and 1 at the start, which learns with the weights under a penalty; then the mass of a layer's parameters says
    how many tokens it keeps of every input, no more than the layer before, and the weights are trained on with these.

    Departures. Ranks are relative, in ``bins``, and counts are shares of a text's length (theirs are counts of a
    padded length). A retention parameter enters the attention of the following layers as its logarithm on the key,
    see ``LTP``; those of several sites add up, while the count after a site follows the least mass so far, as the
    paper's does, so that what several sites took together falls to the last knob. The budget is a FLOPs target: its
    penalty is ``LTP``'s and, when the shares are known, one factor of all of them meets it on held-out inputs;
    without a target the penalty is the paper's, the mass of each layer times its number, times ``weight``.

    Args:
        keep: the shares, of each site's survivors; found by the training, 1 before.
        weight: of the penalty. Default 10 with a target, 0.01 without.
        bins: of relative rank.
        soft_until: share of the training that is soft.
        at: default: every layer but the last.
    """

    keep: float | tuple = 1.0
    weight: float | None = None
    bins: int = 32
    soft_until: float = 0.4

    name: ClassVar[str] = "powerbert"
    lr: ClassVar[float] = 1e-2

    @property
    def statistic(self) -> Callable:
        return others

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        return tuple(range(model.first_site, max(model.first_site, model.depth - 2) + 1))

    def build(self, model: Architecture) -> None:
        super().build(model)
        self.retention = nn.Parameter(torch.ones(len(self.sites), self.bins))

    def score(self, view: View) -> Tensor:
        return view.reduce_attention(others)

    def phase(self, progress: float) -> str:
        return "soft" if progress < self.soft_until else "hard"

    def gates(self, score: Tensor, view: View) -> Tensor:
        free = view.alive & ~view.protected
        count = free.sum(1, keepdim=True)
        rank = torch.minimum(ranks(score.detach(), free), (count - 1).clamp(min=0))
        bins = bin_of(rank, count.clamp(min=1), self.bins).clamp(max=self.bins - 1)
        with torch.no_grad():
            self.retention.clamp_(0, 1)  # the parameters themselves: beyond the bounds they would have no gradient
        return (self.retention[view.site][bins] + CLOSED).log().clamp(max=0)

    def loss(self, forward: Callable, batch: dict, record: Record, teacher: Any = None) -> Tensor | float:
        if not self.soft:
            return self.rest()
        if self.target_flops is not None:
            return self.penalty(record, self.progress / max(1e-9, self.soft_until), self.weight)
        number = torch.tensor([layer + 1.0 for layer in self.sites], device=self.retention.device)
        return (0.01 if self.weight is None else self.weight) * (number * self.retention.sum(1)).sum()

    def calibrate(self, forward: Callable, batches: Iterable[dict]) -> dict[str, float]:
        """Read the shares off the retention parameters, once these have learned, and meet ``target_flops``."""
        with torch.no_grad():
            left = self.retention.clamp(0, 1).mean(1).cummin(0).values.tolist()  # of all tokens, after each site
        if left[-1] < 1:
            before = [1.0, *left[:-1]]
            self.keep = tuple(
                min(1.0, max(0.001, round(x / max(y, 1e-3), 3))) for x, y in zip(left, before, strict=True)
            )
        return super().calibrate(forward, batches)
