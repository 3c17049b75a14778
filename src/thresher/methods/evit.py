"""EViT: keep what the class token attends to, and fuse the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.attention import View
from ..core.pruner import ModelInfo
from ..core.tokens import Tokens
from .topk import TopK


@dataclass(eq=False, repr=False)
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

    def build(self, info: ModelInfo) -> None:
        super().build(info)
        self.check_readout(info)

    def score(self, view: View) -> Tensor:
        return view.rows(view.readout).mean(1).masked_fill(~view.alive, 0.0)

    def choose(self, score: Tensor, view: View) -> Tensor:
        keep = super().choose(score, view)
        if not self.fuse:
            return keep
        gone = view.alive & ~keep
        best = score.masked_fill(~gone, -1.0).argmax(1, keepdim=True)
        view.into = best.expand_as(keep)
        return keep | torch.zeros_like(keep).scatter(1, best, True) & gone

    def reduce(self, view: View) -> Tokens:
        width = self.width(view.keep.shape[1], view.site)
        if not self.fuse:
            return view.tokens.drop(view.keep, width)
        slots = torch.arange(view.keep.shape[1], device=view.keep.device)
        fused = view.alive & (~view.keep | (slots == view.into) & (view.alive & ~view.keep).any(1, keepdim=True))
        return view.tokens.merge(view.keep, view.into, torch.where(fused, view.score, 1.0), width, sized=False)

    def width(self, slots: int, site: int) -> int | None:
        width = super().width(slots, site)
        return None if width is None else min(slots, width + self.fuse)
