"""VisionZip: keep what the tower looks at, and merge the rest into a few tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..core.pruner import Choice
from ..core.view import View
from .parts.pictures import Pictures
from .parts.visual import Visual, directions

SHARE = 27, 32  # dominant tokens of those that stay: 54 of 64, 108 of 128, 162 of 192


class VisionZip(Visual):
    """Keep the tokens of a picture that its tower attends to, and merge the others into a few (Yang et al., "VisionZip:
    Longer is Better but Not Necessary in Vision Language Models", CVPR 2025); needs no training.

    Dominant tokens are those that the class token attends to most in the last but one layer of the tower; of a tower
    without one, those that receive most attention. Of the rest, evenly spaced ones are targets; each other goes to the
    target that it is most alike, which becomes the sum of its own state and the mean of those that came to it.

    Args:
        keep: of each picture, a share of its tokens or a count: dominant and merged ones together, 27 to 5.
        at: before the first layer of the language model, and nowhere else.

    | paper | here | why |
    |---|---|---|
    | tower states are merged, before the projector | what the language model gets is merged | the projector is small; model code, ids and placeholders stay as they are |
    | alike by the tower's keys | by the states themselves | they are what is merged |
    | the class token's state goes on | it does not | checkpoints do not have it in the prompt |
    | positions 0..k | positions stay; a merged token is where its target was | renumbered ones move what is in the picture |
    """

    keep: float | int | str | tuple = 64

    name: ClassVar[str] = "visionzip"
    merges = True
    at_entry: ClassVar[bool] = True
    needs_tower: ClassVar[bool] = True

    def score_and_choose(self, view: View) -> tuple[Tensor, Choice]:
        pictures = Pictures.of(view)
        real, counts = pictures.real, pictures.counts(self.shares[view.site])
        score = pictures.take(view.tower).masked_fill(~real, float("-inf"))
        score = score.masked_fill(pictures.take(view.protected), float("inf"))
        dominant = chosen(score, counts * SHARE[0] // SHARE[1], real)
        rest = real & ~dominant
        targets = evenly(rest, counts - dominant.sum(1))
        into, weight = joined(directions(pictures, view), rest, targets)
        slots = pictures.slots.gather(1, into) % view.alive.shape[1]
        own = torch.arange(view.alive.shape[1], device=slots.device).expand_as(view.alive)
        inside = pictures.visual
        return view.tower, Choice(
            pictures.spread(dominant | targets) | view.alive & ~inside,
            into=torch.where(inside, pictures.spread(slots, 0), own),
            weight=pictures.spread(weight, 0.0).masked_fill(~inside, 1.0),
            macs=pictures.summed(rest.sum(1) * targets.sum(1) * view.hidden.shape[-1]),
        )


def chosen(score: Tensor, count: Tensor, real: Tensor) -> Tensor:
    """(P, M) bool: the ``count`` (P,) best of each picture by ``score`` (P, M); ties go to the lower position."""
    places = score.sort(dim=1, descending=True, stable=True).indices
    best = torch.arange(score.shape[1], device=score.device) < count[:, None]
    return torch.zeros_like(real).scatter(1, places, best) & real


def evenly(rest: Tensor, count: Tensor) -> Tensor:
    """(P, M) bool: ``count`` (P,) of those in ``rest`` (P, M), every so many-th from the first one on."""
    place, many = rest.cumsum(1) - 1, rest.sum(1, keepdim=True)
    count = count[:, None]
    step = (many // count.clamp(min=1)).clamp(min=1)
    return rest & (place % step == 0) & (place // step < count)


def joined(x: Tensor, rest: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token of ``rest`` goes, (P, M) long, the most alike of the ``targets`` by the ``directions`` ``x`` (P,
    M, C), and the weight (P, M) of its state there; a token that stays goes to itself, with weight 1."""
    own = torch.arange(x.shape[1], device=x.device).expand_as(rest)
    places = targets.long().sort(dim=1, descending=True, stable=True).indices[:, : max(1, int(targets.sum(1).max()))]
    close = x @ x.gather(1, places[..., None].expand(-1, -1, x.shape[-1])).transpose(1, 2)
    nearest = places.gather(1, close.masked_fill(~targets.gather(1, places)[:, None], -2.0).argmax(2))
    goes = rest & ~targets & targets.any(1, keepdim=True)
    into = torch.where(goes, nearest, own)
    came = torch.zeros_like(x[..., 0]).scatter_add(1, into, goes.to(x.dtype))
    return into, torch.where(goes, 1 / came.gather(1, into).clamp(min=1), 1.0)
