"""PoWER-BERT: how many tokens each layer keeps is learned, by rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.architecture import Architecture
from ..core.pruner import Batch, Record, RunAgain, RunBatch
from ..core.scoring import columns
from ..core.tokens import CLOSED
from ..core.view import View
from .parts.rank_bins import bin_of
from .parts.selection import all_but_last, ranks
from .topk import TopK


def others(weights: Tensor, votes: Tensor, rows: Tensor | None = None) -> Tensor:
    """Sum (B, N), the attention that each token receives from others: a statistic, see ``core.scoring``."""
    if rows is not None:
        itself = rows[:, None, :, None] == torch.arange(weights.shape[-1], device=rows.device)
        return columns(weights.masked_fill(itself, 0.0), votes)
    return columns(weights, votes) - (weights.diagonal(dim1=-2, dim2=-1) * votes[:, None]).sum(1)


class PoWERBERT(TopK):
    """Learn by rank how many tokens each layer keeps (Goyal, Choudhury, Raje, Chakaravarthy, Sabharwal and Verma,
    "PoWER-BERT: Accelerating BERT Inference via Progressive Word-vector Elimination", ICML 2020).

    The importance score is the attention that a token receives from the others, over heads (section 3.2). In the soft
    stage ("soft-extract") a token is multiplied by the retention parameter of its rank, one per layer and rank, in
    [0, 1] and 1 at the start, which learns with the weights under a penalty. Then the mass of a layer's parameters says
    how many tokens it keeps of every input, no more than the layer before. The weights are trained on with these. The
    budget is a penalty on the MACs and one factor of all shares on held-out inputs.

    Args:
        keep: the shares, of each site's survivors; found by the training, 1 before.
        weight: of the penalty. Default 10 with a target, 0.01 without.
        bins: of relative rank.
        soft_until: share of the training that is soft.
        target_flops: as in ``TopK``.
        at: default: every layer but the last.

    | paper | here | why |
    |---|---|---|
    | a parameter for each rank up to the padded length, counts of it | relative ranks in ``bins``; counts are shares of a text's length | lengths of texts differ |
    | a parameter scales the state | its logarithm on the key in the following layers | 0 is removal, see ``LTP`` |
    | the count after a site follows the least mass so far | the same; but gates of several sites add up as logarithms | what several sites took together falls to the last knob |
    | penalty: mass of each layer times its number | penalty of ``LTP`` on the MACs, one factor on held-out inputs | a budget needs no search; without a target the paper's remains, times ``weight`` |
    """

    keep: float | tuple = 1.0
    weight: float | None = None
    bins: int = 32
    soft_until: float = 0.4

    name: ClassVar[str] = "powerbert"
    lr: ClassVar[float] = 1e-2
    takes_counts: ClassVar[bool] = False  # shares are what the retention parameters say

    @property
    def statistic(self) -> Callable:
        return others

    default_at = all_but_last

    def build(self, model: Architecture) -> None:
        super().build(model)
        self.retention = nn.Parameter(torch.ones(len(self.sites), self.bins))

    def score(self, view: View) -> Tensor:
        return view.reduce_attention(others)

    def gates(self, score: Tensor, view: View) -> Tensor:
        free = view.alive & ~view.protected
        count = free.sum(1, keepdim=True)
        rank = torch.minimum(ranks(score.detach(), free), (count - 1).clamp(min=0))
        bins = bin_of(rank, count.clamp(min=1), self.bins).clamp(max=self.bins - 1)
        with torch.no_grad():
            self.retention.clamp_(0, 1)  # the parameters themselves: beyond the bounds they would have no gradient
        return (self.retention[view.site][bins] + CLOSED).log().clamp(max=0)

    def loss(self, forward: RunAgain, batch: Batch, record: Record, teacher: Any = None) -> Tensor | float:
        if not self.soft:
            return self.rest()
        if self.target_flops is not None:
            return self.penalty(record, self.softened, self.weight)
        number = torch.tensor([layer + 1.0 for layer in self.sites], device=self.retention.device)
        return (0.01 if self.weight is None else self.weight) * (number * self.retention.sum(1)).sum()

    def calibrate(self, forward: RunBatch, batches: Iterable[Batch]) -> dict[str, float]:
        """Read the shares off the retention parameters, once these have learned, and meet ``target_flops``."""
        with torch.no_grad():
            masses = self.retention.clamp(0, 1).mean(1).cummin(0).values.tolist()  # of all tokens, after each site
        if masses[-1] < 1:
            entering = [1.0, *masses[:-1]]
            self.keep = tuple(
                min(1.0, max(0.001, round(after / max(before, 1e-3), 3)))
                for after, before in zip(masses, entering, strict=True)
            )
        return super().calibrate(forward, batches)
