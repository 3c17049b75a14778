"""VisPruner: keep what the tower looks at, and of the rest what is not alike."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..core.architecture import Architecture
from ..core.view import View
from .parts.pictures import Pictures
from .parts.visual import Visual, directions


class VisPruner(Visual):
    """Keep the tokens of a picture that its tower attends to, and of the others those that are least alike (Zhang et
    al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", ICCV 2025); needs
    no training.

    A share of what stays goes to the tokens that the class token attends to most in the last but one layer of the
    tower; of a tower without one, to those that receive most attention. From the others duplicates are taken away
    until the rest of the budget is left: they are dealt in turn into two sets, and those of the first with the most
    similar partner in the second leave, a few at a time.

    Args:
        keep: of each picture, a share of its tokens or a count.
        important: the share of them that the tower chooses. With 1.0 it is the paper's first version, FasterVLM.
        step: how many duplicates leave at a time.

    | paper | here | why |
    |---|---|---|
    | alike by tower states | by what the language model gets | they are what stays or leaves; the projector is small |
    | needs a class token | without one, the attention that each token receives | SigLIP and Qwen have none |
    | positions 0..k | positions stay | renumbered ones move what is in the picture |
    """

    keep: float | int | str | tuple = 64
    important: float = 0.5
    step: int = 8

    name: ClassVar[str] = "vispruner"
    needs_tower: ClassVar[bool] = True

    def build(self, model: Architecture) -> None:
        super().build(model)
        if not 0 <= self.important <= 1:
            raise ValueError(f"important={self.important!r}: expected a share of what stays in [0, 1]")
        if not isinstance(self.step, int) or self.step < 1:
            raise ValueError(f"step={self.step!r}: expected a number of tokens, from 1 up")

    def order(self, pictures: Pictures, view: View, counts: Tensor, protected: Tensor) -> Tensor:
        score = pictures.take(view.tower)
        seen = score.masked_fill(protected, float("inf")).masked_fill(~pictures.real, float("-inf"))
        ranked = seen.sort(dim=1, descending=True, stable=True).indices
        order, x = torch.zeros_like(score), directions(pictures, view)
        lengths = pictures.lengths.tolist()
        for row, (length, count) in enumerate(zip(lengths, counts.tolist(), strict=True)):
            first = max(round(self.important * count), int(protected[row].sum()))
            best, others = ranked[row, :first], ranked[row, first:length].sort().values
            order[row, best] = 2.0 + score[row, best]
            order[row, distinct(x[row], others, count - first, self.step)] = 1.0
        return order

    def macs(self, pictures: Pictures, counts: Tensor, width: int) -> Tensor:
        return pictures.lengths.square() * width // 2


def distinct(x: Tensor, places: Tensor, count: int, step: int) -> Tensor:
    """Of the tokens at ``places`` (n,), which rise, the ``count`` that are left when duplicates by the ``directions``
    ``x`` (M, C) have left, ``step`` at a time."""
    if count <= 0:
        return places[:0]
    close = x[places] @ x[places].T
    left = torch.arange(len(places), device=x.device)
    while len(left) > count:
        first, second = left[::2], left[1::2]
        if not len(second):
            break
        like = close[first][:, second].amax(1)
        leave = like.sort(descending=True, stable=True).indices[: min(step, len(left) - count)]
        left = left[~torch.isin(left, first[leave])]
    return places[left]
