"""Bin by relative rank, in whole numbers: of m ranked tokens the one of rank r falls into bin (r + u) bins / m, with a
shift 0 <= u < 1 that depends on m. Shapes: S sites."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ...core.scoring import full_precision


def first_bins(mask: Tensor) -> Tensor:
    """Turn on as many bins as in ``mask`` (S, bins), the first ones."""
    return mask.long().sort(1, descending=True).values.bool()


def bin_of(rank: Tensor, count: Tensor, bins: int) -> Tensor:
    """Find the bin of rank 0 <= r < count: the one that holds (r + u) / count, with a shift 0 <= u < 1, a hash of
    ``count``. With one shift for all, short texts of many lengths would meet in few bins, which then decide for all."""
    shift = count * count * 40503 % 65536
    return (65536 * rank + shift) * bins // (65536 * count)


def within(on: Tensor | int, count: Tensor, bins: int) -> Tensor:
    """Count ``bins`` times the ranks r below ``count`` in the first ``on`` bins, r < count on / bins - u: a graph has
    no cheap division of whole numbers."""
    whole = count * on
    part = whole % bins
    shift = (count * (count * 40503 & 65535)) & 65535  # OpenVINO's remainders of large numbers are not exact
    return whole - part + bins * (65536 * part > shift * bins)


@cache
def places(bins: int, longest: int, floor: int) -> Tensor:
    """Count (longest + 1, bins): for every m how many of m ranked tokens fall into each bin, but the ``floor`` best."""
    count, rank = torch.arange(longest + 1)[:, None], torch.arange(longest)
    into = bin_of(rank, count.clamp(min=1), bins).clamp(max=bins - 1)
    return torch.zeros(longest + 1, bins).scatter_add_(1, into, ((rank < count) & (rank >= floor)).float())


def kept_of_bins(share: Tensor, longest: int, floor: int) -> Callable[[int, Tensor], Tensor]:
    """Return ``stay(site, n)``: how many of n (B,) ranked tokens, ``longest`` at most, stay at a site of whose bins a
    ``share`` (S, bins) stays, the ``floor`` best ones always. Between whole numbers, as expected counts are, on the
    line from one to the next."""
    longest = 64 * (longest // 64 + 1)  # few tables for many lengths
    with full_precision(share.device):
        table = share.float() @ places(share.shape[1], longest, floor).to(share.device).T
    table = table + torch.arange(longest + 1, device=share.device).clamp(max=floor)

    def stay(site: int, n: Tensor) -> Tensor:
        n = n.clamp(min=0)
        low = n.detach().long().clamp(max=longest - 1)
        return torch.lerp(table[site][low], table[site][low + 1], n - low)

    return stay


def nearest_mask(
    odds: Tensor, idle: Tensor, cost: Callable[[Tensor], float], target: float, most: float
) -> tuple[float, Tensor]:
    """Turn bins off, the least ``odds`` (S, bins) of all sites first, until the cost is nearest to a target.

    Args:
        idle: (S, 1) bool, sites that do not prune, or only where nothing else is left.
        cost: of a mask (S, bins).
        target, most: the cost that is wanted, and the highest that is preferred to any other.

    Returns the cost and its mask.
    """
    sites, bins = odds.shape
    odds = (odds + 1000 * idle).cpu()
    order = odds.T.flip(0, 1).flatten().argsort(stable=True)  # ties: worse ranks first, deeper sites first

    def without(off: Tensor) -> tuple[float, Tensor]:
        mask = torch.ones(len(order), dtype=torch.bool)
        mask[off] = False
        mask = mask.view(bins, sites).flip(0, 1).T
        return cost(mask), mask

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if without(order[:middle])[0] > target else (low, middle)
    off, rest = order[: max(0, low - 1)], order[max(0, low - 1) :]
    pruning = (~idle[:, 0]).nonzero()[:, 0].tolist()
    more = [rest[:1], *(rest[rest % sites == site][:1] for site in pruning)]
    # bins are coarse, and the first one off costs the scoring of its site: of these the one that comes closest
    near = [without(bins) for bins in (order[:0], off, *(torch.cat([off, one]) for one in more))]
    return min(near, key=lambda one: (one[0] > most, abs(one[0] - target)))
