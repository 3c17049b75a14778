"""EViT: keep what the class token attends to, and fuse the rest."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..core.architecture import Architecture
from ..core.pruner import Choice
from ..core.view import View
from .parts.selection import fused
from .topk import TopK


class EViT(TopK):
    """Keep what the class token attends to and fuse the rest (Liang et al., "Not All Patches are What You Need:
    Expediting Vision Transformers via Token Reorganizations", ICLR 2022); works without training.

    The importance score is the attention of the class token, averaged over heads. The best-scored tokens stay. The
    others become one token more, the sum of their states times that attention (eq. 3). It is a token like others from
    then on, and may be fused again. There is no soft stage; the budget is one factor of ``keep``.

    Args:
        keep: as in ``TopK``; the fused token comes on top.
        fuse: whether the others are fused, or dropped.
        target_flops: as in ``TopK``.

    | paper | here | why |
    |---|---|---|
    | kept tokens in the order of their score, the fused one behind | tokens stay in their order; the fused one takes the place of the best of those that it is made of | positions and layouts agree |
    | what is fused is gone | put back as the fused token after the last layer | heads that read all tokens |
    | the class token asks | the first protected token asks | models without a class token |
    | the share falls slowly in training | it is fixed | the authors found no difference |
    """

    keep: float | int | str | tuple = 0.7
    fuse: bool = True

    name: ClassVar[str] = "evit"
    scores_all: ClassVar[bool] = False
    scores_row: ClassVar[bool] = True

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
        return fused(choice.keep, score, view, mean=False)

    def width(self, slots: int, site: int) -> int | None:
        width = super().width(slots, site)
        return None if width is None else min(slots, width + self.fuse)
