"""RandomCache: the baseline that looks at nothing."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

import torch
from torch import Tensor

from .pruner import CachePruner
from .view import CacheView


class RandomCache(CachePruner):
    """Keep random entries, besides the first and the last ones. Arguments as ``CachePruner``.

    ``Random`` is the baseline for tokens. The score is a hash of the token's place, the layer, the head and ``seed``:
    what stays depends neither on the batch nor on padding.

    Args:
        seed: another one chooses other entries.
    """

    seed: int = field(default=0, kw_only=True)

    name: ClassVar[str] = "random-cache"

    def score(self, view: CacheView) -> Tensor:
        head = torch.arange(view.heads, device=view.position.device)[:, None]
        x = view.position.long() + 1 + 7919 * head + 104_729 * view.layer + 1_299_709 * self.seed
        for multiplier in (0x45D9F3B, 0x119DE1F3):  # an integer hash, kept within 31 bits
            x = ((x ^ (x >> 16)) * multiplier) & 0x7FFFFFFF
        return (x ^ (x >> 15)).double()
