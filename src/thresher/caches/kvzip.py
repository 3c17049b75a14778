"""KVzip: what a model looks at when it repeats the text (Kim et al., NeurIPS 2025, arXiv 2505.23416)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..core.pruner import Options
from ..core.scoring import full_precision, repeat_heads
from ..core.view import AttentionInputs
from .adaptive import over_layers
from .layer import PrunedLayer
from .pruner import CachePruner
from .view import CacheView


@dataclass(frozen=True, eq=False)
class Repetition:
    """A part of a text that is fed once more, over the cache of all of it.

    Attributes:
        first, last: (B,), its tokens, from one position to before the other.
        count: tokens that are fed: the request, the overlap, the part itself, and padding of shorter rows.
    """

    first: Tensor
    last: Tensor
    count: int


@dataclass(frozen=True, eq=False)
class CacheOptions(Options):
    """``Options`` with a part of a text that is repeated, and with what is shown what attention is given."""

    repetition: Repetition | None = None
    attend: Callable[..., Tensor | None] | None = None


class KVzip(CachePruner):
    """Keep what a repetition of the text attends to: the maximum over its queries and the query heads of a key head.

    The prompt is run twice more or less, and held whole meanwhile. It serves questions that are not known yet. A later
    turn repeats its own tokens alone: what was generated before it was repeated by nobody and leaves first.

    | paper | here | why |
    |---|---|---|
    | nothing is said of the last tokens | the last ``recent`` ones stay | as in every method |
    | a sentence asks for the repetition | ``request``, ids of such a sentence | a method has no tokenizer |

    Args:
        keep: as in ``CachePruner``; there is no budget while decoding.
        heads, layers: as in ``CachePruner``; "adaptive" as in the paper: entries are ranked over all heads and layers.
            A head that finds things needs most of its entries, others need few: at three tenths an equal share of each
            head loses what the text says.
        request: ids of the tokens that ask for the repetition, as ``tokenizer("Repeat the text.").input_ids``.
        part: tokens that are repeated at a time.
        overlap: tokens before a part that are repeated with it.
    """

    request: tuple[int, ...] = field(default=(), kw_only=True)
    part: int = field(default=2048, kw_only=True)
    overlap: int = field(default=8, kw_only=True)

    heads: str = field(default="adaptive", kw_only=True)
    layers: str = field(default="adaptive", kw_only=True)

    name: ClassVar[str] = "kvzip"
    repeats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is None:
            raise ValueError("KVzip scores a prompt when it is there, and nothing while decoding: give keep")
        if self.part < 1 or self.overlap < 0:
            raise ValueError(f"part={self.part}, overlap={self.overlap}: expected 1 or more, and 0 or more, tokens")
        self.request = tuple(self.request)

    def repetitions(self, ids: Tensor, mask: Tensor, start: Tensor) -> list[tuple[Repetition, Tensor, Tensor]]:
        """What is fed for ``ids`` (B, N) and their ``mask``, of which the first one stands at ``start`` (B,).

        Returns parts, ids (B, n) and their masks; parts are counted in real tokens, so that a row has its own.
        """
        asked = torch.tensor(self.request, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
        ids, length = ids.gather(1, (mask == 0).int().argsort(dim=1, stable=True)), mask.sum(1, keepdim=True)
        made = []
        for first in range(0, int(length.max()), self.part):
            place = torch.arange(max(0, first - self.overlap), min(first + self.part, ids.shape[1]), device=ids.device)
            fed = torch.cat([asked, ids[:, place]], 1)
            real = torch.cat([torch.ones_like(asked).bool(), place < length], 1) & (length > first)
            made.append((Repetition(start + first, start + first + self.part, fed.shape[1]), fed, real))
        return made

    def listen(self, layer: PrunedLayer, inputs: AttentionInputs, asks: Tensor, part: Repetition) -> None:
        """Take from one layer what the queries of a repetition, at ``asks`` (B, n), attend to."""
        position = layer.position
        assert position is not None
        again = torch.arange(layer.held, device=asks.device) >= layer.held - part.count
        first, last = part.first[:, None, None], part.last[:, None, None]
        chunk = layer.live & ~again & (position >= first) & (position < last)
        counts = layer.live & ((position < self.sinks) | chunk | again)
        sees = counts[:, :, None] & (position[:, :, None] <= asks[:, None, :, None])
        query, key = inputs.query.float(), repeat_heads(inputs.key, inputs.query).float()
        with full_precision(query.device):
            products = inputs.logits.cap(query @ key.transpose(-1, -2) * inputs.logits.scaling)
        sees = sees.repeat_interleave(query.shape[1] // sees.shape[1], 1)
        weights = inputs.logits.softmax(products.masked_fill(~sees, torch.finfo(torch.float32).min))
        most = (weights * (sees & (asks >= 0)[:, None, :, None])).amax(2)
        most = most.unflatten(1, (position.shape[1], -1)).amax(2)
        earlier = torch.zeros_like(most) if layer.received is None else layer.received
        layer.received = torch.where(chunk, most, earlier)

    def score(self, view: CacheView) -> Tensor:
        assert view.received is not None
        return view.received

    def quotas(self, layers: Mapping[int, PrunedLayer]) -> dict[int, Tensor]:
        """Of each layer (B, KV, 1), how many entries each head keeps, once all have listened; nothing where layers do
        not share, or where nothing has to leave."""
        if self.layers != "adaptive":
            return {}
        ranked, totals, sizes = [], [], []
        for layer in layers.values():
            budget = self.budget(layer.arrived, [True] * len(layer.arrived), (0, 1), 0)
            assert budget is not None
            with layer.unrolled():
                assert layer.position is not None and layer.received is not None
                live, heads = layer.live, layer.position.shape[1]
                protected = self.protection(layer.position.masked_fill(~live, -1), live)
                ranked.append(layer.received.masked_fill(protected, math.inf).masked_fill(~live, -math.inf))
            totals.append(heads * torch.tensor(budget.hold))
            sizes.append(live.sum((1, 2)).cpu())
        total, there = torch.stack(totals).sum(0), torch.stack(sizes).sum(0)
        if bool((there <= total).all()):
            return {}
        return dict(zip(layers, over_layers(ranked, total.tolist()), strict=True))
