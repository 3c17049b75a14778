"""Random, FirstK and Cut: the baselines that every comparison needs."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..core.architecture import Architecture
from ..core.pruner import Choice, TokenPruner
from ..core.view import View
from .topk import TopK


class Random(TopK):
    """Keep random tokens: the baseline that looks at nothing. Arguments as ``TopK``.

    The score is a hash of the token's rank among the survivors, their number, the layer and ``seed``. A prediction
    therefore depends neither on the batch nor on padding nor on the layout. In training a fresh number is mixed in at
    every forward.

    Args:
        seed: another one chooses other tokens.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    needs_attention: ClassVar[bool] = False

    def score(self, view: View) -> Tensor:
        salt = torch.randint(1 << 30, ()).item() if self.training else self.seed
        x = view.alive.cumsum(1) + 7919 * view.alive.sum(1, keepdim=True) + 104_729 * view.layer + 1_299_709 * salt
        for multiplier in (0x45D9F3B, 0x119DE1F3):  # an integer hash, kept within 31 bits
            x = ((x ^ (x >> 16)) * multiplier) & 0x7FFFFFFF
        return (x ^ (x >> 15)).double()


class FirstK(TopK):
    """Keep the first tokens of each row: the baseline of truncation. Arguments as ``TopK``."""

    name: ClassVar[str] = "firstk"
    needs_attention: ClassVar[bool] = False

    def score(self, view: View) -> Tensor:
        return -view.tokens.index.double()


class Cut(TokenPruner):
    """Keep every token until one layer, then the protected ones alone: the baseline without a score and a schedule.

    Where none is protected the first token goes on.

    Args:
        at: that layer. Default: a third of the depth.
    """

    name: ClassVar[str] = "cut"
    needs_attention: ClassVar[bool] = False

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        return (min(max(model.depth // 3, model.first_site), model.last_site),)

    def score(self, view: View) -> Tensor:
        return -view.tokens.index.double()

    def choose(self, score: Tensor, view: View) -> Choice:
        return Choice(view.protected)

    def width(self, slots: int, site: int) -> int | None:
        return None if self.protected_positions is None else max(1, len(self.protected_positions))
