"""Rotary positions: turn queries and keys back, and further.

Shapes: d channels of a head, of which the first r turn (all, or a part of them); f = r / 2 frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..core import compat
from ..core.attachment import at_rest
from .layer import PrunedLayer

SHIFT = 8  # positions between the two places at which a layer is tried
ROUNDING = 0.05  # of the largest number; the wrong rotation is off by about as much as there is


@dataclass(frozen=True, eq=False)
class Rotation:
    """How a layer turns its queries and keys.

    Attributes:
        module: the module that makes cos and sin.
        layer_type: which of its kinds of layers, where it has several (Gemma 3).
        scaling: what cos and sin are multiplied by (YaRN).
        neighbours: whether neighbouring channels turn against each other, and not the halves.
    """

    module: Any
    layer_type: str | None
    scaling: float
    neighbours: bool

    @property
    def frequencies(self) -> Tensor:
        """(f,) fp32, radians per position."""
        return compat.rotary_frequencies(self.module, self.layer_type).float()

    def angles(self, positions: Tensor) -> Tensor:
        """fp32 (..., r) radians of each channel at ``positions`` (...)."""
        angle = positions[..., None].float() * self.frequencies.to(positions.device)
        return angle.repeat_interleave(2, -1) if self.neighbours else torch.cat([angle, angle], -1)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """fp32 ``x`` (..., d) with its first r channels turned by ``cos`` and ``sin`` (..., r)."""
        r = cos.shape[-1]
        turning, rest = x[..., :r].float(), x[..., r:].float()
        if self.neighbours:
            across = torch.stack([-turning[..., 1::2], turning[..., ::2]], -1).flatten(-2)
        else:
            first, second = turning.chunk(2, -1)
            across = torch.cat([-second, first], -1)
        return torch.cat([turning * cos + across * sin, rest], -1)

    def further(self, x: Tensor, distance: Tensor) -> Tensor:
        """fp32 ``x`` (..., d) turned by ``distance`` (...) positions more. The module's own cos and sin would scale a
        second time."""
        angle = self.angles(distance)
        return self.turned(x, angle.cos(), angle.sin())

    def back(self, x: Tensor, positions: Tensor) -> Tensor:
        """fp32 ``x`` (..., d), which was turned to ``positions`` (...), as it was before."""
        angle = self.angles(positions)
        return self.turned(x, angle.cos() / self.scaling, -angle.sin() / self.scaling)


def rotation_of(base: nn.Module, block: nn.Module) -> Rotation | None:
    """How the layer of an attention ``block`` turns its queries and keys, by its source; None: it cannot be told."""
    module, pairs = compat.rotary_module(base), compat.rotary_pairs(block)
    if module is None or not pairs:
        return None
    kind = getattr(block, "layer_type", None) if compat.rotary_by_layer(module) else None
    return Rotation(module, kind, compat.rotary_scaling(module, kind), pairs == "neighbours")


@torch.no_grad()
def two_places(base: Any) -> DynamicCache:
    """What a model caches of the same two tokens at two places, a row for each."""
    ids, places = torch.tensor([[1, 2]] * 2), torch.tensor([[0, 1], [SHIFT, SHIFT + 1]])
    cache = DynamicCache(config=base.config)
    given = {"input_ids": ids.to(base.device), "position_ids": places.to(base.device)}
    with at_rest(base):
        base(**given, past_key_values=cache, use_cache=True)
    return cache


def rotations(
    cache: Any, base: nn.Module, blocks: dict[int, nn.Module], turning: str = "keys"
) -> dict[int, Rotation | None]:
    """How the layers of ``blocks`` turn what they cache, of those that do; None: in a way that is not known.

    They are tried, since a layer may leave out what its source has (Cohere 2, Exaone 4): what is cached at one of
    ``two_places`` is to be what is cached at the other, turned by the distance.
    """
    found: dict[int, Rotation | None] = {}
    for number, block in blocks.items():
        here, there = getattr(cache.layers[number], turning).float()
        if _alike(here, there):
            continue
        rotation = rotation_of(base, block)
        if rotation is not None and not _alike(rotation.further(here, torch.tensor(SHIFT, device=here.device)), there):
            rotation = None
        found[number] = rotation
    return found


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same but for rounding, also in half precision."""
    return bool((one - other).abs().max() <= ROUNDING * other.abs().max())


def close_gap(layer: PrunedLayer, rotation: Rotation, sinks: int, turning: str = "keys") -> None:
    """Move the first ``sinks`` tokens up to the oldest of the others, whose keys stay as they are.

    Only distances count, so that a query sees the tokens that are held as if they stood next to each other. The keys
    are turned each time from what they were at first: what was turned again and again would drift.
    """
    assert layer.position is not None
    position = layer.position.masked_fill(~layer.live, -1)
    first = torch.arange(sinks, device=position.device)
    keys = getattr(layer, turning).clone()  # others may look at what attention was given
    hits = position[:, :, None] == first[:, None]
    slots, there = hits.long().argmax(-1)[..., None].expand(-1, -1, -1, keys.shape[-1]), hits.any(-1)[..., None]
    now = keys.gather(2, slots)
    if layer.sink_keys is None or layer.shift is None:
        layer.sink_keys, layer.shift = now.float(), torch.zeros_like(position[..., :1])
    layer.sink_keys = torch.where((layer.shift == 0)[..., None], now.float(), layer.sink_keys)
    some = (position >= sinks).any(-1, keepdim=True)  # a row that has no others stays where it is
    oldest = position.masked_fill(position < sinks, torch.iinfo(torch.int32).max).amin(-1, keepdim=True)
    layer.shift = torch.where(there.all(2) & some, oldest - sinks, 0)
    moved = rotation.further(layer.sink_keys, layer.shift.expand(-1, -1, sinks)).to(keys.dtype)
    unmoved = (layer.shift == 0)[..., None] | ~there
    for s in range(sinks):  # one at a time: slots of tokens that are not there name slot 0, which another may hold
        at = slots[:, :, s : s + 1]
        value = torch.where(unmoved[:, :, s : s + 1], keys.gather(2, at), moved[:, :, s : s + 1])
        keys.scatter_(2, at, value)
    setattr(layer, turning, keys)
