"""KeyDiff: keys that are unlike the others (Park et al., 2025, arXiv 2504.15364)."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from .pruner import CachePruner
from .view import CacheView


class KeyDiff(CachePruner):
    """Keep the keys that are least like the mean direction of all keys: -cos(k_j, mean_i k_i / |k_i|).

    It looks at no query, so that what stays serves any question. Arguments as ``CachePruner``.

    | paper | here | why |
    |---|---|---|
    | the prompt comes in blocks of 128 | whenever entries may leave | ``prefill_chunk_size`` makes blocks |
    """

    name: ClassVar[str] = "keydiff"

    def score(self, view: CacheView) -> Tensor:
        live = view.to_heads(view.live, view.key.shape[1])[..., None]
        direction = F.normalize(view.key.float(), dim=-1)
        anchor = (direction * live).sum(-2, keepdim=True)  # the mean but for its length, which a cosine does not see
        return -F.cosine_similarity(direction, anchor, dim=-1)
