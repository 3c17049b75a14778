"""H2O: what has been looked at most (Zhang et al., NeurIPS 2023, arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

import torch
from torch import Tensor

from .pruner import CachePruner
from .view import CacheView


class H2O(CachePruner):
    """Keep the entries that have received most attention over all steps, and as many of the last ones.

    The sums cost a product of all queries and keys once more at the prompt, and a row of them at each step.

    | paper | here | why |
    |---|---|---|
    | heavy hitters and recent tokens, half and half | ``recent`` tokens stay, the rest is heavy | as in every method |
    | sums | with ``relative=True`` divided by how many queries could see an entry | old entries have had more time |

    Args:
        keep, hold, ...: as in ``CachePruner``.
        relative: whether sums are divided by the number of queries that could see an entry.
    """

    relative: bool = field(default=False, kw_only=True)

    name: ClassVar[str] = "h2o"
    sums_attention: ClassVar[bool] = True
    weighs_values: ClassVar[bool] = True

    def score(self, view: CacheView) -> Tensor:
        assert view.received is not None
        if not self.relative:
            return view.received
        real = view.position.amax(-1, keepdim=True) + 1
        return view.received / torch.where(view.live, real - view.position, 1)
