"""A-ToMe: merge neighbours in time."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .tome import KEYS, STAYS, ToMe


class AToMe(ToMe):
    """Merge the most similar neighbours (Li, Wu, Li and Liu, "Accelerating Transducers through Adjacent Token Merging",
    Interspeech 2023); works without training.

    In each layer the tokens are taken in pairs, in their order in time. The cosine of the keys of a pair, averaged over
    heads, is its similarity; the r most similar pairs become one token each, as in ``ToMe``. A token stands for a
    stretch of sound, unlike in ``ToMe``, which merges what is far apart.

    Args:
        r: as in ``ToMe``: a share of the row's tokens or a count. No more than half are merged in a layer.
        threshold: pairs that are less similar are never merged. With ``r=0.5`` it alone decides.

    The rest is as in ``ToMe``.

    | paper | here | why |
    |---|---|---|
    | a ratio, or a threshold | both may be given | a threshold alone bounds no time |
    | trains with it | no training needed, possible | pretrained encoders |
    | the shorter sequence goes on to the joint network | put back after the last layer | decoders and heads of transformers count frames |
    | merges between the attention and the FFN | where other methods drop | as with all methods here |
    | no word on sizes in the attention | the logarithm of the size on the keys | ToMe's proportional attention |
    """

    threshold: float | None = None

    name: ClassVar[str] = "atome"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: expected a cosine in [-1, 1]")
        if self.metric != KEYS:
            raise ValueError(f"metric={self.metric!r}: {self.name} compares {KEYS}")

    def match(self, x: Tensor, alive: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        rank, slots = alive.cumsum(1) - 1, torch.arange(alive.shape[1], device=alive.device)
        # the live slot that comes next: the least one of those behind, read from the end
        behind = torch.where(alive, slots, alive.shape[1]).flip(1).cummin(1).values.flip(1)
        after = F.pad(behind[:, 1:], (0, 1), value=alive.shape[1])
        partner = after.clamp(max=alive.shape[1] - 1)
        pairs = free & (rank % 2 == 0) & (after < alive.shape[1]) & free.gather(1, partner)
        with torch.autocast(x.device.type, enabled=False):
            x = F.normalize(x.float(), dim=-1)
            similarity = (x * x.gather(1, partner[..., None].expand_as(x))).sum(-1)
        if self.threshold is not None:
            pairs = pairs & (similarity >= self.threshold)
        return similarity.masked_fill(~pairs, -STAYS), partner

    def matching_macs(self, alive: Tensor, channels: int) -> Tensor:
        return alive.sum(1) * channels / 2

    def width(self, slots: int, site: int) -> int | None:
        return None  # pairs of which one is protected, or that are unlike, are not merged
