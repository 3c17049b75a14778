"""ATS: adaptive token sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attention import View
from ..pruner import kept_count
from .topk import REPLAY, TopK


@dataclass(eq=False, repr=False)
class ATS(TopK):
    """Adaptive token sampling (Fayyaz et al., "Adaptive Token Sampling for Efficient Vision Transformers", ECCV 2022);
    needs no training.

    The significance of token j is S_j = A_1j |V_j| / sum_k A_1k |V_k| (their eq. 4), the attention of the first token
    times the norm of the value, over all tokens but the first. K points spread evenly over (0, 1) are looked up in the
    inverse of its cumulative distribution (eqs. 5, 6); the tokens that they hit stay, several points on one token
    count once. How many stay therefore depends on the input: few where few tokens carry all significance.

    Departures. Tokens leave after attention, before the FFN, as with all methods here (theirs drops the query rows, so
    that a token still serves as key and value in that layer: so it does here). Sums are over live tokens in their
    order, heads are averaged, points are at (2k - 1) / 2K.

    Args:
        keep: K, a fraction of the row's survivors or a count: the most tokens that stay. With 1.0 nothing is sampled
            and all stay.
    """

    keep: float | int | tuple = 0.5

    name: ClassVar[str] = "ats"
    needs_values: ClassVar[bool] = True
    scores_all: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep == REPLAY:
            raise ValueError("ATS decides by itself how many tokens stay: keep='replay' is for topk, random and firstk")

    def score(self, view: View) -> Tensor:
        first = view.alive.long().argmax(1)
        size = view.value.float().norm(dim=-1)  # (B, H of the keys, N)
        rows = view.rows(first)
        size = size.repeat_interleave(rows.shape[1] // size.shape[1], 1)
        found = (rows * size).mean(1).masked_fill(~view.alive, 0.0)
        return found.scatter(1, first[:, None], 0.0)

    def choose(self, score: Tensor, view: View) -> Tensor:
        if self.shares[view.site] == 1.0:
            return view.alive
        points = kept_count(self.shares[view.site], view.alive.sum(1), view.protected.sum(1))[:, None]
        share = score.double().masked_fill(view.protected, 0.0).cumsum(1)  # in order: padding adds nothing
        below = (points * share / share[:, -1:].clamp(min=torch.finfo(score.dtype).tiny) + 0.5).floor()
        return below.diff(dim=1, prepend=torch.zeros_like(below[:, :1])) > 0
