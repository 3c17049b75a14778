"""Rotary positions: turn queries and keys back, and further.

Shapes: d channels of a head, of which the first r turn (all, or a part of them); f = r / 2 frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import compat
from .layer import PrunedLayer


def rotate_half(x: Tensor) -> Tensor:
    """The first half of the channels becomes the second, the second with its sign changed the first."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` (..., d) with its first r channels turned by ``cos`` and ``sin`` (..., r)."""
    r = cos.shape[-1]
    turning, rest = x[..., :r], x[..., r:]
    return torch.cat([turning * cos + rotate_half(turning) * sin, rest], -1)


@dataclass(frozen=True, eq=False)
class Rotation:
    """How a layer turns its queries and keys.

    Attributes:
        module: the module that makes cos and sin.
        layer_type: which of its kinds of layers, where it has several (Gemma 3).
        scaling: what cos and sin are multiplied by (YaRN).
    """

    module: Any
    layer_type: str | None
    scaling: float

    def angles(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 (..., r) cos and sin of ``positions`` (...), scaling included."""
        angle = positions[..., None].float() * self.frequencies.to(like.device)
        angle = torch.cat([angle, angle], -1)
        return angle.cos() * self.scaling, angle.sin() * self.scaling

    @property
    def frequencies(self) -> Tensor:
        """(f,) fp32, radians per position."""
        return compat.rotary_frequencies(self.module, self.layer_type).float()

    def back(self, x: Tensor, positions: Tensor) -> Tensor:
        """fp32 ``x`` (B, h, n, d), which was turned to ``positions`` (B, n) or (B, h, n), as it was before."""
        at = positions[:, None] if positions.dim() == 2 else positions
        cos, sin = self.angles(at, x)
        return turned(x.float(), cos / self.scaling**2, -sin / self.scaling**2)

    def further(self, x: Tensor, distance: Tensor) -> Tensor:
        """fp32 ``x`` (..., d) turned further by ``distance`` (...) positions. cos and sin of the module would scale a
        second time."""
        angle = distance[..., None].float() * self.frequencies.to(x.device)
        angle = torch.cat([angle, angle], -1)
        return turned(x.float(), angle.cos(), angle.sin())


def rotation_of(base: nn.Module, block: nn.Module) -> Rotation | None:
    """How the layer of an attention ``block`` turns its queries and keys; None: not at all, or in pairs of "
    "neighbours."""
    module = compat.rotary_module(base)
    if module is None or not compat.rotates_halves(block):
        return None
    kind = getattr(block, "layer_type", None) if compat.rotary_by_layer(module) else None
    return Rotation(module, kind, compat.rotary_scaling(module, kind))


def close_gap(layer: PrunedLayer, rotation: Rotation, sinks: int) -> None:
    """Move the first ``sinks`` tokens up to the oldest of the others, whose keys stay as they are.

    Only distances count, so that a query sees the tokens that are held as if they stood next to each other. The keys
    are
    turned each time from what they were at first: what was turned again and again would drift.
    """
    assert layer.position is not None
    position = layer.position.masked_fill(~layer.live, -1)
    first = torch.arange(sinks, device=position.device)
    hits = position[:, :, None] == first[:, None]
    slots, there = hits.long().argmax(-1)[..., None].expand(-1, -1, -1, layer.keys.shape[-1]), hits.any(-1)[..., None]
    now = layer.keys.gather(2, slots)
    if layer.sink_keys is None or layer.shift is None:
        layer.sink_keys, layer.shift = now.float(), torch.zeros_like(position[..., :1])
    layer.sink_keys = torch.where((layer.shift == 0)[..., None], now.float(), layer.sink_keys)
    oldest = position.masked_fill(position < sinks, torch.iinfo(torch.int32).max).amin(-1, keepdim=True)
    layer.shift = torch.where(there.all(2), oldest - sinks, 0)
    moved = rotation.further(layer.sink_keys, layer.shift.expand(-1, -1, sinks)).to(layer.keys.dtype)
    unmoved = (layer.shift == 0)[..., None] | ~there
    for s in range(sinks):  # one at a time: slots of tokens that are not there name slot 0, which another may hold
        at = slots[:, :, s : s + 1]
        value = torch.where(unmoved[:, :, s : s + 1], layer.keys.gather(2, at), moved[:, :, s : s + 1])
        layer.keys.scatter_(2, at, value)
