"""ATS: adaptive token sampling."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..core.architecture import Architecture
from ..core.pruner import Choice
from ..core.view import View
from .parts.selection import kept_count
from .topk import REPLAY, TopK


class ATS(TopK):
    """Adaptive token sampling (Fayyaz et al., "Adaptive Token Sampling for Efficient Vision Transformers", ECCV 2022);
    needs no training.

    The significance of token j is S_j = A_1j |V_j| / sum_k A_1k |V_k| (their eq. 4), the attention of the class token
    times the norm of the value, over all tokens but that one. K points spread evenly over (0, 1) are looked up in the
    inverse of its cumulative distribution (eqs. 5, 6); the tokens that they hit stay, several points on one token
    count once. How many stay therefore depends on the input: few where few tokens carry all significance. In place of
    their class token stands the first protected one: in a decoder the last token.

    Departures. Tokens leave after attention, before the FFN, as with all methods here (theirs drops the query rows, so
    that a token still serves as key and value in that layer: so it does here). Sums are over live tokens in their
    order, heads are averaged, points are at (2k - 1) / 2K.

    Args:
        keep: a fraction of the row's survivors or a count, the protected ones included: the most tokens that stay. K is
            what is left of it for the others. With 1.0 nothing is sampled and all stay.
    """

    keep: float | int | tuple = 0.5

    name: ClassVar[str] = "ats"
    needs_values: ClassVar[bool] = True
    scores_all: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep == REPLAY:
            raise ValueError("ATS decides by itself how many tokens stay: keep='replay' is for topk, random and firstk")

    def build(self, model: Architecture) -> None:
        super().build(model)
        self.check_readout(model)

    def score(self, view: View) -> Tensor:
        asking = view.readout
        size, rows = view.value.float().norm(dim=-1), view.attention_from(asking)  # (B, H, N), of keys and of queries
        size = size.repeat_interleave(rows.shape[1] // size.shape[1], 1)
        return (rows * size).mean(1).masked_fill(~view.alive, 0.0).scatter(1, asking[:, None], 0.0)

    def choose(self, score: Tensor, view: View) -> Choice:
        share, live = self.shares[view.site], view.alive.sum(1)
        if isinstance(share, float) and share == 1.0:
            return Choice(view.alive)
        points = (kept_count(share, live) - view.protected.sum(1)).clamp(min=0)[:, None]
        sums = score.double().masked_fill(view.protected, 0.0).cumsum(1)  # in order: padding adds nothing
        below = (points * sums / sums[:, -1:].clamp(min=torch.finfo(score.dtype).tiny) + 0.5).floor()
        return Choice(below.diff(dim=1, prepend=torch.zeros_like(below[:, :1])) > 0)
