"""Choose within each picture of a prompt.

Shapes: B rows, N tokens; P pictures of the whole batch, M tokens of the widest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.view import View
from .selection import kept_count


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures of a batch, one after the other, each a row of its own.

    Attributes:
        slots: (P, M) long, the places of their tokens in the flattened batch (B * N), in order.
        real: (P, M) bool, which of them hold a token.
        rows: (P,) long, the row of the batch that each is in.
        shape: (B, N) of the batch.
    """

    slots: Tensor
    real: Tensor
    rows: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, view: View) -> Pictures:
        """The pictures that a site shows."""
        pictures = view.pictures
        assert pictures is not None, "the method is for models that read pictures"
        batch, count = pictures.shape
        many = int(pictures.max()) + 1
        flat = (pictures + many * torch.arange(batch, device=pictures.device)[:, None]).flatten()
        places = (pictures.flatten() >= 0).nonzero()[:, 0]
        found, lengths = torch.unique_consecutive(flat[places], return_counts=True)
        real = torch.arange(int(lengths.max()), device=flat.device) < lengths[:, None]
        slots = torch.zeros_like(real, dtype=torch.long).masked_scatter(real, places)
        return cls(slots, real, found // many, (batch, count))

    @property
    def visual(self) -> Tensor:
        """(B, N) bool: their tokens."""
        return self.spread(self.real)

    @property
    def lengths(self) -> Tensor:
        """(P,) tokens of each picture."""
        return self.real.sum(1)

    def take(self, x: Tensor) -> Tensor:
        """(P, M, ...): of each token of the pictures its part of ``x`` (B, N, ...)."""
        return x.flatten(0, 1)[self.slots]

    def spread(self, x: Tensor, rest: bool | float = False) -> Tensor:
        """(B, N): numbers (P, M) of the tokens of the pictures at their places, ``rest`` elsewhere."""
        out = torch.full((self.shape[0] * self.shape[1],), rest, dtype=x.dtype, device=x.device)
        out[self.slots[self.real]] = x[self.real]
        return out.view(self.shape)

    def summed(self, x: Tensor) -> Tensor:
        """(B,): the sum of a number ``x`` (P,) of each picture over those of a row."""
        return x.new_zeros(self.shape[0]).index_add(0, self.rows, x)

    def counts(self, keep: float | int, protected: Tensor | None = None) -> Tensor:
        """(P,) how many tokens of each picture stay: a share of them or a count, all ``protected`` (P, M) at least."""
        return kept_count(keep, self.lengths, 0 if protected is None else (protected & self.real).sum(1))


def best_of_pictures(score: Tensor, view: View, keep: float | int) -> Tensor:
    """(B, N) bool: of each picture the tokens with the best ``score`` (B, N), as many as ``keep``, a share or a count,
    says; of text all. Ties go to the lower position."""
    pictures = Pictures.of(view)
    protected = pictures.take(view.protected)
    found = (
        pictures.take(score.double()).masked_fill(protected, float("inf")).masked_fill(~pictures.real, float("-inf"))
    )
    order = found.sort(dim=1, descending=True, stable=True).indices
    stays = torch.arange(order.shape[1], device=order.device) < pictures.counts(keep, protected)[:, None]
    chosen = torch.zeros_like(pictures.real).scatter(1, order, stays) & pictures.real
    return pictures.spread(chosen) | view.alive & (view.pictures < 0)  # type: ignore[operator]
