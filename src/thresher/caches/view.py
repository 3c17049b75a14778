"""What a method sees of one layer's cache when entries may leave.

Shapes: B rows, KV key heads of the cache, H query heads, P entries, w queries, d channels of a head. Entries lie in the
order of their tokens; a row with fewer entries than the widest one has dead ones in front.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.scoring import CHUNK, Logits, repeat_heads
from .rope import Rotation


@dataclass(frozen=True, eq=False)
class CacheView:
    """What a method sees of the cache of one layer; read only.

    Attributes:
        layer: 0-based number of the layer.
        key, value: (B, h, P, d), as attention is given them; h is KV, or H where the cache holds latents (MLA).
        position: (B, KV, P), the place of an entry among the real tokens of its row; -1 where it is dead.
        live: (B, KV, P) bool.
        protected: (B, KV, P) bool, entries that never leave.
        query, query_position: (B, H, w, d) and (B, w), the last queries; -1 where padding asks.
        logits: how the layer makes logits of products.
        received: (B, KV, P) fp32, the attention received so far, where the method sums it.
        block: the attention block of the layer.
        rotation: how the layer's positions turn queries and keys; None: it has no rotary positions.
        quota: (B, KV, 1), how many entries stay, where the layers share a budget.
    """

    layer: int
    key: Tensor
    value: Tensor
    position: Tensor
    live: Tensor
    protected: Tensor
    query: Tensor
    query_position: Tensor
    logits: Logits
    received: Tensor | None
    block: nn.Module
    rotation: Rotation | None
    quota: Tensor | None = None

    @property
    def heads(self) -> int:
        """KV, the key heads of the cache."""
        return self.position.shape[1]

    @property
    def length(self) -> Tensor:
        """(B, 1, 1) live entries' last position and one: the real tokens seen."""
        return self.position[:, :1].amax(-1, keepdim=True) + 1

    def of_cache(self, x: Tensor) -> Tensor:
        """(B, KV, ...): the mean over the heads of ``x`` (B, h, ...) that share a key head of the cache."""
        return x.unflatten(1, (self.heads, -1)).mean(2)

    def to_heads(self, x: Tensor, heads: int) -> Tensor:
        """(B, ``heads``, ...) of ``x`` (B, KV, ...)."""
        return x.repeat_interleave(heads // self.heads, 1)

    def attention(self, count: int) -> Tensor:
        """(B, H, n, P) fp32: the attention probabilities of the last ``count`` queries over the entries that are there.

        Rows of padding are 0.
        """
        count = min(count, self.query.shape[2])
        query, asks = self.query[:, :, -count:], self.query_position[:, -count:]
        return attention_of(query, asks, self, slice(None))


def attention_of(query: Tensor, asks: Tensor, view: CacheView, heads: slice) -> Tensor:
    """(B, h, n, P) fp32: attention of ``query`` (B, h, n, d) at positions ``asks`` (B, n), of some query ``heads``."""
    total = view.query.shape[1]
    key = repeat_heads(view.key, view.query)[:, heads]
    sees = view.live[:, :, None] & (view.position[:, :, None] <= asks[:, None, :, None])
    sees = view.to_heads(sees, total)[:, heads] if view.heads > 1 else sees
    with torch.autocast(query.device.type, enabled=False):
        products = query.float() @ key.float().transpose(-1, -2) * view.logits.scaling
    weights = view.logits.softmax(view.logits.cap(products).masked_fill(~sees, torch.finfo(torch.float32).min), heads)
    return weights * (sees & (asks >= 0)[:, None, :, None])


def attention_received(view: CacheView, query: Tensor, asks: Tensor) -> Tensor:
    """(B, KV, P) fp32: the sum over ``query`` (B, H, q, d) at positions ``asks`` of the attention on each entry, the
    mean over the query heads of a key head. A few heads and queries at a time."""
    batch, heads, count, _ = query.shape
    entries = view.position.shape[-1]
    rows = max(1, min(count, CHUNK // max(1, batch * entries)))
    step = max(1, CHUNK // max(1, batch * rows * entries))
    parts = []
    for h in range(0, heads, step):
        some = slice(h, h + step)
        sums = [
            attention_of(query[:, some, i : i + rows], asks[:, i : i + rows], view, some).sum(2)
            for i in range(0, count, rows)
        ]
        parts.append(sum(sums, query.new_zeros(batch, len(range(heads)[some]), entries, dtype=torch.float32)))
    return view.of_cache(torch.cat(parts, 1))


def taken(x: Tensor, order: Tensor) -> Tensor:
    """``x`` (B, h, P, d) at the slots ``order`` (B, KV, K)."""
    index = order.repeat_interleave(x.shape[1] // order.shape[1], 1)[..., None]
    return x.gather(2, index.expand(-1, -1, -1, x.shape[-1]))
