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
    """Sample the tokens that carry the significance, as many as the input needs (Fayyaz et al., "Adaptive Token
    Sampling for Efficient Vision Transformers", ECCV 2022); needs no training.

    The significance of token j is S_j = A_1j |V_j| / sum_k A_1k |V_k| (eq. 4): the attention of the class token times
    the norm of the value, over all tokens but that one. K points spread evenly over (0, 1) are looked up in the inverse
    of its cumulative distribution (eqs. 5, 6). The tokens that they hit stay; several points on one token count once.
    Few tokens stay where few carry all significance. There is no soft stage; the budget is one factor of ``keep``.

    Args:
        keep: a fraction of the row's survivors or a count, the protected ones included: the most tokens that stay. K is
            what is left of it for the others. With 1.0 nothing is sampled and all stay.
        target_flops: as in ``TopK``.

    | paper | here | why |
    |---|---|---|
    | drops the query rows of a layer | tokens leave after attention, before the FFN | the same: a token still serves as key and value in that layer |
    | the class token asks | the first protected token asks | a decoder has its last token |
    | sums over heads | heads are averaged | the same share of all |
    | a fixed even grid | points at (2k - 1) / 2K | no point lies on an end |
    | images without padding | sums over live tokens, in order | padding adds nothing |
    """

    keep: float | int | tuple = 0.5

    name: ClassVar[str] = "ats"
    needs_values: ClassVar[bool] = True
    scores_all: ClassVar[bool] = False
    scores_row: ClassVar[bool] = True

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
        if view.pictures is not None:  # a share of what may leave
            points = kept_count(share, view.free.sum(1))[:, None]
        sums = score.double().masked_fill(view.protected, 0.0).cumsum(1)  # in order: padding adds nothing
        below = (points * sums / sums[:, -1:].clamp(min=torch.finfo(score.dtype).tiny) + 0.5).floor()
        return Choice(below.diff(dim=1, prepend=torch.zeros_like(below[:, :1])) > 0)
