"""Dropout on processors. torch draws each number by itself on one core: 12 to 16 % of a training step of a small
encoder.

Here four numbers come out of one draw. The chance of each is right to 1 / 65536, its scale to the dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST, RANGE = -(2**63), 2**16  # of what is drawn; of a quarter of it


def dropped(x: Tensor, p: float) -> Tensor:
    """``x`` in training: 0 with chance ``p``, else divided by the chance of staying; in ``x``'s own shape and dtype."""
    away = round(p * RANGE)
    if away in (0, RANGE) or not x.is_cpu or torch.compiler.is_compiling():
        return F.dropout(x, p)
    drawn = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(LEAST, None).view(torch.int16)
    stays = (drawn[: x.numel()] >= away - RANGE // 2).view(x.shape)
    scale = torch.tensor(RANGE / (RANGE - away), dtype=x.dtype)
    return x * torch.where(stays, scale, torch.zeros((), dtype=x.dtype))


class Dropout(nn.Dropout):
    """``nn.Dropout`` by ``dropped``."""

    def forward(self, input: Tensor) -> Tensor:
        return dropped(input, self.p) if self.training and not self.inplace else super().forward(input)


@contextmanager
def quick_dropout(model: nn.Module) -> Iterator[None]:
    """Let the dropout modules of ``model`` draw by ``dropped`` within."""
    found = [module for module in model.modules() if type(module) is nn.Dropout]
    for module in found:
        module.__class__ = Dropout
    try:
        yield
    finally:
        for module in found:
            module.__class__ = nn.Dropout
