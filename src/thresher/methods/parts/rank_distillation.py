"""Learn a teacher's ranking of tokens: pairwise losses, and how far two rankings agree.

Shapes: B rows, N slots, K best tokens. ``free`` (B, N) bool: the tokens that are ranked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .selection import ranks

RANK_LOSSES = ("arp2", "arp2-topk", "ndcg", "none")
RANKINGS = ("attention", "saliency")


def ranking_loss(score: Tensor, teacher: Tensor, free: Tensor, k: int, kind: str) -> Tensor:
    """Compute a scalar: how far ``score`` (B, N) is from ordering the ``free`` tokens as ``teacher`` (B, N) does.

    The mean of log2(1 + exp(-(s_i - s_j))) over the pairs that the teacher ranks i before j, i among its best ``k``,
    weighted by the difference of their relevance, k less the rank and 0 behind the best ("arp2", after LambdaARPLoss2
    of Wang et al., 2018), or by what swapping them changes of the NDCG ("ndcg", LambdaRank of Burges, 2010).
    "arp2-topk": ToP's own, the first over pairs among the best k alone, a sum divided by k^2.
    """
    place = ranks(teacher, free)
    relevance = (k - place).clamp(min=0) * free
    best = place.argsort(dim=1)[:, :k]  # the teacher's best k
    s, gain = score.gather(1, best), relevance.gather(1, best)
    weight = (gain[:, :, None] - relevance[:, None, :]).clamp(min=0).float() * free[:, None, :]  # [b, i, j]
    if kind == "arp2-topk":
        weight = weight * (relevance > 0)[:, None, :]
    if kind == "ndcg":
        discount = 1 / (2 + ranks(score.detach(), free).float()).log2()
        weight = weight * (discount.gather(1, best)[:, :, None] - discount[:, None, :]).abs()
    pairs = F.softplus(score[:, None, :] - s[:, :, None]) / math.log(2)
    total = (weight * pairs).sum((1, 2))
    return (total / (k**2 if kind == "arp2-topk" else weight.sum((1, 2)).clamp(min=1e-6))).mean()


def taught_by(teacher: Mapping[str, Tensor], ranking: str = "attention") -> Tensor:
    """Return (B, N), what the teacher ranks tokens by: its ``ranking``, the attention received in its last layer or
    their saliency. In place of attention, where it finds an answer, the larger of its logits, of a start and of an
    end."""
    if "start_logits" in teacher and ranking == "attention":
        return torch.maximum(teacher["start_logits"], teacher["end_logits"])
    return teacher["ranking"]


def overlap(score: Tensor, teacher: Tensor, free: Tensor, k: int) -> Tensor:
    """Compute a scalar: the mean share of the teacher's best ``k`` of the ``free`` tokens that are among the best ``k``
    here. Of rows with fewer than 2k tokens it is the better half, rounded up, instead of k. 0 where no row has any."""
    count = free.sum(1, keepdim=True)
    best = ((count + 1) // 2).clamp(max=k)
    both = (ranks(score, free) < best) & (ranks(teacher, free) < best) & free
    return (both.sum(1) / best[:, 0].clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)
