"""EViT: keep what the class token attends to, and fuse the rest."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..core.architecture import Architecture
from ..core.pruner import Choice
from ..core.view import View
from .topk import TopK


class EViT(TopK):
    """Token reorganization (Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
    Reorganizations", ICLR 2022); works without training.

    The tokens that the class token attends to most, averaged over heads, stay; the others become one token more, the
    sum of their states times that attention (their eq. 3). It is a token like others from then on, and may be fused
    again.

    Departures. The fused token takes the place of the best of those that it is made of, and all of these are put back
    as it in the end. Tokens stay in their order. In place of their class token stands the first protected one. The
    share of tokens that stay does not fall slowly as the training goes on (the authors found no difference).

    Args:
        keep: as in ``TopK``; the fused token comes on top.
        fuse: whether the others are fused, or dropped.
    """

    keep: float | int | str | tuple = 0.7
    fuse: bool = True

    name: ClassVar[str] = "evit"
    scores_all: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.merges = self.fuse

    def build(self, model: Architecture) -> None:
        super().build(model)
        self.check_readout(model)

    def score(self, view: View) -> Tensor:
        return view.attention_from(view.readout).mean(1).masked_fill(~view.alive, 0.0)

    def choose(self, score: Tensor, view: View) -> Choice:
        choice = super().choose(score, view)
        if not self.fuse:
            return choice
        keep = choice.keep | view.protected
        gone = view.alive & ~keep
        best = score.masked_fill(~gone, -1.0).argmax(1, keepdim=True)  # whose place the fused token takes
        holder = torch.zeros_like(keep).scatter(1, best, True) & gone
        weight = torch.where(gone, score, 1.0)
        return Choice(keep | holder, into=best.expand_as(keep), weight=weight)

    def width(self, slots: int, site: int) -> int | None:
        width = super().width(slots, site)
        return None if width is None else min(slots, width + self.fuse)
