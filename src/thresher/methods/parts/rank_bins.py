"""Bins of relative rank, in whole numbers: of m ranked tokens the one of rank r falls into bin (r + u) bins / m, with a
shift 0 <= u < 1 that depends on m."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def first(mask: Tensor) -> Tensor:
    """(S, bins): as many bins on as in ``mask``, the first ones."""
    return mask.long().sort(1, descending=True).values.bool()


def bin_of(rank: Tensor, count: Tensor, bins: int) -> Tensor:
    """The bin of rank 0 <= r < count: the one that holds (r + u) / count, with a shift 0 <= u < 1, a hash of ``count``.
    With one shift for all, short texts of many lengths would meet in few bins, which then decide for all."""
    shift = count * count * 40503 % 65536
    return (65536 * rank + shift) * bins // (65536 * count)


def within(on: Tensor | int, count: Tensor, bins: int) -> Tensor:
    """``bins`` times the number of ranks r below ``count`` in the first ``on`` bins, r < count on / bins - u: a graph
    has no cheap division of whole numbers."""
    whole = count * on
    part = whole % bins
    shift = (count * (count * 40503 & 65535)) & 65535  # OpenVINO's remainders of large numbers are not exact
    return whole - part + bins * (65536 * part > shift * bins)


@cache
def places(bins: int, longest: int, floor: int) -> Tensor:
    """(longest + 1, bins): how many of m ranked tokens fall into each bin, for every m, the ``floor`` best left out."""
    count, rank = torch.arange(longest + 1)[:, None], torch.arange(longest)
    into = bin_of(rank, count.clamp(min=1), bins).clamp(max=bins - 1)
    return torch.zeros(longest + 1, bins).scatter_add_(1, into, ((rank < count) & (rank >= floor)).float())
