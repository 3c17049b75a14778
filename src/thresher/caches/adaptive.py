"""AdaKV: the heads of a layer share its budget (Feng et al., NeurIPS 2025, arXiv 2407.11550)."""

from __future__ import annotations

import math

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
