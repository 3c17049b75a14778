"""DivPrune: keep the tokens that are farthest from one another."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..core.view import View
from .parts.pictures import Pictures
from .parts.visual import Visual, cosines, directions

CHUNK = 1 << 24  # cosines at a time


class DivPrune(Visual):
    """Keep the tokens of a picture whose smallest distance from one another is largest (Alvar, Singh, Akbari and Zhang,
    "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025); needs no training.

    The distance of two tokens is 1 minus the cosine of their states. The first one taken is the farthest from its
    nearest neighbour; each next one is the farthest from those that are taken (the greedy solution of the max-min
    diversity problem). It neither asks the text nor an attention.

    Args:
        keep: of each picture, a share of its tokens or a count. The paper's main row keeps 0.098 of 576.
        at: default: before the first layer of the language model.

    | paper | here | why |
    |---|---|---|
    | all distances at once | one row of them a step; of all at once those of the first pick, in parts | n x n of them do not fit at high resolution |
    | positions 0..k | positions stay | renumbered ones move what is in the picture |
    | one picture | each picture by itself | a picture answers in a batch as alone |
    """

    keep: float | int | str | tuple = 0.1

    name: ClassVar[str] = "divprune"

    def order(self, pictures: Pictures, view: View, counts: Tensor, protected: Tensor) -> Tensor:
        x, real = directions(pictures, view), pictures.real
        value, free = farthest(x, real), real.clone()
        nearest = torch.full_like(value, float("inf"))
        taken = torch.zeros_like(value)
        for step in range(int(counts.max())):
            best = value.masked_fill(protected, float("inf")).masked_fill(~free, float("-inf")).argmax(1)
            taken.scatter_(1, best[:, None], float(real.shape[1] - step))
            free.scatter_(1, best[:, None], False)
            value = nearest = torch.minimum(nearest, 1 - cosines(x, best))
        return taken

    def macs(self, pictures: Pictures, counts: Tensor, width: int) -> Tensor:
        return pictures.lengths * (pictures.lengths + counts) * width


def farthest(x: Tensor, real: Tensor) -> Tensor:
    """(P, M): the distance of each of the ``directions`` (P, M, C) from its nearest neighbour."""
    count, parts = x.shape[1], []
    step = max(1, CHUNK // max(1, x.shape[0] * count))
    for first in range(0, count, step):
        close = x[:, first : first + step] @ x.transpose(1, 2)
        own = torch.arange(first, first + close.shape[1], device=x.device)[:, None] == torch.arange(
            count, device=x.device
        )
        parts.append(close.masked_fill(own | ~real[:, None], -1.0).amax(2))
    return 1 - torch.cat(parts, 1)
