"""SnapKV: what the last queries of the prompt look at (Li et al., NeurIPS 2024, arXiv 2404.14469)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from .pruner import CachePruner
from .view import CacheView

POOLS: dict[str, Callable[..., Tensor]] = {"avg": F.avg_pool1d, "max": F.max_pool1d}


class SnapKV(CachePruner):
    """Keep what the last ``window`` queries attend to, the neighbours of such entries with it: the mean over these
    queries and over the query heads of a key head, pooled along the text.

    | paper | here | why |
    |---|---|---|
    | window 32, or 64 in later code | 16 | a window longer than the question dilutes it |
    | one choice at the end of the prompt | while decoding too, with ``hold`` | the last queries are remembered |
    | the window itself stays | so do the last ``recent`` tokens | as in every method |

    Args:
        keep, hold, ...: as in ``CachePruner``.
        observe: how many of the last queries are looked at.
        kernel: entries that are pooled, an odd number; 1: none are.
        pool: "avg" or "max".
    """

    observe: int = field(default=16, kw_only=True)
    kernel: int = field(default=7, kw_only=True)
    pool: str = field(default="max", kw_only=True)

    name: ClassVar[str] = "snapkv"
    weighs_values: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in POOLS:
            raise ValueError(f"pool={self.pool!r}: expected {' or '.join(POOLS)}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: expected an odd number of entries")
        if self.observe < 1:
            raise ValueError(f"observe={self.observe}: expected 1 or more of the last queries")

    @property
    def window(self) -> int:
        return self.observe

    def score(self, view: CacheView) -> Tensor:
        seen = view.of_cache(view.attention(self.window).sum(2))
        seen = seen.masked_fill(~view.live, 0.0)  # so that the text begins for pooling where its row does
        return POOLS[self.pool](seen, self.kernel, stride=1, padding=self.kernel // 2)
