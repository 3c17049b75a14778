"""The base of the methods that choose among the tokens of a picture by its states.

Shapes: P pictures, M tokens, C channels.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.architecture import Architecture
from ...core.pruner import EARLY, Choice
from ...core.view import View
from ..topk import TopK
from .pictures import Pictures


class Visual(TopK):
    """Choose within each picture; a subclass says in which order its tokens are taken (``order``).

    Acts before the first layer of the language model where no other ``at`` is given.
    """

    needs_attention: ClassVar[bool] = False

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        return (EARLY,)

    def check_modality(self, model: Architecture, at: tuple[int, ...]) -> None:
        check_reads(self.name, model)
        super().check_modality(model, at)

    def keeps_all(self, site: int) -> bool:
        share = self.shares[site]
        return isinstance(share, float) and share == 1.0

    def order(self, pictures: Pictures, view: View, counts: Tensor, protected: Tensor) -> Tensor:
        """(P, M) fp32: how early each token is taken, larger ones first; ``counts`` (P,) are taken of each picture (a
        method may raise them), and the ``protected`` (P, M) come first."""
        raise NotImplementedError(f"{type(self).__name__} does not say in which order tokens are taken")

    def macs(self, pictures: Pictures, counts: Tensor, width: int) -> Tensor:
        """(P,) MACs that the order of each picture takes, of ``counts`` (P,) tokens and states of ``width``
        channels."""
        return torch.zeros_like(counts)

    def score_and_choose(self, view: View) -> tuple[Tensor, Choice]:
        pictures = Pictures.of(view)
        protected = pictures.take(view.protected) & pictures.real
        counts = pictures.counts(self.shares[view.site], protected)
        order = self.order(pictures, view, counts, protected).masked_fill(~pictures.real, float("-inf"))
        places = order.masked_fill(protected, float("inf")).sort(dim=1, descending=True, stable=True).indices
        stays = torch.arange(order.shape[1], device=order.device) < counts[:, None]
        kept = pictures.spread(torch.zeros_like(pictures.real).scatter(1, places, stays) & pictures.real)
        spent = self.macs(pictures, counts, view.hidden.shape[-1])
        rows = pictures.summed(spent)
        score = pictures.spread(order.masked_fill(~pictures.real, 0.0), 0.0)
        return score, Choice(kept | view.alive & ~pictures.visual, macs=rows)


def check_reads(name: str, model: Architecture) -> None:
    """Raise ValueError where a method for pictures meets a model that reads none."""
    if model.reader is None:
        raise ValueError(
            f"{name} chooses among the tokens of pictures or sounds, and {model.name} reads none; topk, random and ltp "
            "prune text"
        )


def directions(pictures: Pictures, view: View) -> Tensor:
    """(P, M, C) fp32: the states of the tokens, of length 1."""
    return F.normalize(pictures.take(view.hidden).float(), dim=-1)


def cosines(x: Tensor, place: Tensor) -> Tensor:
    """(P, M): of ``directions`` (P, M, C) those with the one at ``place`` (P,) of each picture."""
    one = x.gather(1, place.view(-1, 1, 1).expand(-1, 1, x.shape[-1]))
    return (x @ one.transpose(1, 2))[..., 0]
