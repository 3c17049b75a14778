"""What an entry's value adds to its score."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import compat
from ..core.scoring import full_precision
from .view import CacheView

VALUES = ("none", "vatp", "critical")
HALF, SMALL = 0.5, 1e-4  # of "critical": the share of the budget that goes by the score alone, and what is added to it


def weighted(kind: str, scores: Tensor, view: CacheView, few: Tensor) -> Tensor:
    """``scores`` (B, KV or 1, P) with the values' say in them.

    Args:
        kind: "none"; "vatp": the score times the value's L1 norm (Guo et al., "Attention Score is not All You Need",
            2024, eq. 3); "critical": half of the budget goes by the score, the rest by the score times the L1 norm of
            what the value adds to the state (Feng et al., "Identify Critical KV Cache", 2025, algorithm 1).
        few: (B, 1, 1), how many entries stay.
    """
    if kind == "none":
        return scores
    if kind == "vatp":
        return scores * _alike(view.value.float().abs().sum(-1), scores)
    added = (scores + SMALL) * _alike(added_norm(view), scores)
    live, protected = (x[:, : scores.shape[1]] for x in (view.live, view.protected))
    order = scores.masked_fill(protected, math.inf).masked_fill(~live, -math.inf)
    rank = order.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return torch.where(rank < (few * HALF).floor(), math.inf, added)


def _alike(norms: Tensor, scores: Tensor) -> Tensor:
    """Norms (B, KV, P) for scores of each head, or their mean for one score of a layer."""
    return norms if norms.shape[1] == scores.shape[1] else norms.mean(1, keepdim=True)


def added_norm(view: CacheView) -> Tensor:
    """(B, KV, P) fp32: the L1 norm of what a head adds to the state where all its attention is on one entry, the mean
    over the query heads of a key head."""
    heads, weight = view.query.shape[1], output_weight(view.block, view.query.shape[1] * view.value.shape[-1])
    by_head = weight.float().unflatten(1, (heads, -1))  # (C, H, d)
    value, group, norms = view.value.float(), heads // view.value.shape[1], []
    with full_precision(value.device):
        for h in range(heads):
            norms.append((value[:, h // group] @ by_head[:, h].T).abs().sum(-1))
    return view.of_cache(torch.stack(norms, 1))


def output_weight(block: nn.Module, width: int) -> Tensor:
    """(C, H·d): the weight of the map from the heads of an attention ``block`` to the state.

    Raises:
        ValueError: it cannot be told.
    """
    maps = [m for m in block.modules() if isinstance(m, (nn.Linear, compat.Conv1D))]
    weights = [m.weight if isinstance(m, nn.Linear) else m.weight.T for m in maps]
    fits = [weight for weight in weights if weight.shape[1] == width]
    named = getattr(block, next((name for name in compat.OUTPUT_MAPS if hasattr(block, name)), ""), None)
    if named in maps:
        return weights[maps.index(named)]
    if len(fits) == 1:
        return fits[0]
    raise ValueError(
        f"value='critical' needs the output map of {type(block).__name__}, which cannot be told: use 'vatp'"
    )
