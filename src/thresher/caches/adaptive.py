"""Shared budgets: of the heads of a layer (AdaKV, Feng et al., NeurIPS 2025, arXiv 2407.11550), or of all layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SAFEGUARD = 0.2  # of a head's even share, which it keeps in any case


def shares(scores: Tensor, protected: Tensor, live: Tensor, few: Tensor) -> Tensor:
    """(B, KV, 1): how many entries each head keeps, where ``few`` (B, 1, 1) is the mean.

    The best scores (B, KV, P) of all heads of a layer stay. ``protected`` entries stay in any case, and so do the best
    ``SAFEGUARD`` of each head; entries that are not ``live`` never do. A row keeps exactly KV times its mean.

    | paper | here | why |
    |---|---|---|
    | scores of SnapKV | of any method that scores each head | they are of one scale within a layer |
    | safeguard 0.2, 0.5 in the authors' code | 0.2 | as in the paper |
    """
    ranked = scores.masked_fill(protected, math.inf).masked_fill(~live, -math.inf)
    rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    ranked = ranked.masked_fill(live & (rank < (SAFEGUARD * few).floor()), math.inf)
    best = ranked.flatten(1).argsort(dim=-1, descending=True, stable=True)
    stays = torch.arange(best.shape[1], device=best.device) < scores.shape[1] * few[:, 0]
    return torch.zeros_like(stays).scatter(1, best, stays).view_as(live).sum(-1, keepdim=True)


def over_layers(ranked: Sequence[Tensor], total: list[int]) -> list[Tensor]:
    """Of each layer (B, KV, 1), how many entries each head keeps, where the best ``total`` of a row stay.

    ``ranked``: of each layer the scores (B, KV, P), +inf of what stays in any case and -inf of what is not there; the
    layers may hold different numbers of entries.
    """
    flat = torch.cat([scores.flatten(1) for scores in ranked], 1)
    best = flat.argsort(dim=-1, descending=True, stable=True)
    stays = torch.arange(flat.shape[1], device=flat.device) < torch.tensor(total, device=flat.device)[:, None]
    stays = torch.zeros_like(stays).scatter(1, best, stays) & (flat > -math.inf)
    parts = stays.split([scores[0].numel() for scores in ranked], 1)
    return [part.view_as(own).sum(-1, keepdim=True) for part, own in zip(parts, ranked, strict=True)]
