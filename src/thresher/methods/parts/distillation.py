"""Measure how far the answers of a model are from those of its teacher. Needs torch only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = ("logits", "start_logits", "end_logits")
NEVER = -1e4  # the logit of a token that is not there


def distillation(student: Any, teacher: Any, temperature: float = 2.0, mask: Tensor | None = None) -> Tensor:
    """Compute a scalar: how far the student's answers are from the teacher's; both are model outputs or dictionaries of
    logits.

    T^2 KL(teacher || student) at temperature T (Hinton et al., 2015), the mean over the batch and over the heads; the
    squared difference for a regression head of one number. ``mask`` (B, N): the tokens that are there, among which a
    head that points at a token chooses, and of which one that labels tokens is asked.
    """
    losses = []
    for name in LOGITS:
        if name not in student or name not in teacher:
            continue
        s, t = student[name].float(), teacher[name].float()
        if mask is not None and name != "logits":
            s, t = (x.masked_fill(mask == 0, NEVER) for x in (s, t))
        elif mask is not None and s.dim() == 3:
            s, t = s[mask != 0], t[mask != 0]
        if s.shape[-1] == 1:
            losses.append(F.mse_loss(s, t))
        else:
            s, t = (x.flatten(0, -2) / temperature for x in (s, t))
            losses.append(temperature**2 * F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean"))
    if not losses:
        raise ValueError(f"nothing to distil: the outputs hold none of {', '.join(LOGITS)}")
    return torch.stack(losses).mean()


def state_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Sequence[Tensor], squared: bool = False
) -> Tensor:
    """Compute how far states are from the teacher's, a scalar: the sum over layers of the mean of 1 - cosine.

    The mean is over rows, of each over its tokens.

    Args:
        student, teacher: (B, N, C) of each layer.
        weights: (B, N) of each layer, what a token counts; a row of zeros counts nothing.
        squared: whether the squared distance, as a share of the teacher's squared length, comes on top.
    """
    losses = []
    for s, t, weight in zip(student, teacher, weights, strict=True):
        s, t = s.float(), t.float()
        away = 1 - F.cosine_similarity(s, t, dim=-1)
        if squared:
            away = away + (s - t).square().sum(-1) / t.square().sum(-1).clamp(min=1e-6)
        losses.append(((away * weight).sum(1) / weight.sum(1).clamp(min=1e-6)).mean())
    return torch.stack(losses).sum()


# --- orders and embeddings --------------------------------------------------------------------------------------------
def margin_loss(student: Tensor, teacher: Tensor, queries: Tensor) -> Tensor:
    """Compute the mean squared difference of the margins between any two candidates of a query (MarginMSE, Hofstätter
    et al., 2020), a scalar; 0 where no query has two.

    The mean is over the queries, of each over its pairs. A number added to all scores of a query changes nothing.

    Args:
        student, teacher: (B,) scores of candidates.
        queries: (B,) the number of each candidate's query.
    """
    same, away = _candidates(queries), (student - teacher).float()
    pairs = same & ~torch.eye(len(queries), dtype=torch.bool, device=same.device)
    margins = (away[:, None] - away[None, :]).square() * pairs
    others = pairs.sum(1)
    weight = torch.where(others > 0, 1 / (others * (others + 1)).clamp(min=1), 0.0)  # of a query's pairs, to sum to one
    return (margins * weight[:, None]).sum() / _count(queries[others > 0])


def order_loss(student: Tensor, teacher: Tensor, queries: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute T^2 KL(teacher || student) of the shares of a query's candidates, softmax(score / T), a scalar: the mean
    over the queries with two candidates or more (after Cao et al., 2007); 0 where there is none.

    Args as ``margin_loss``'s.
    """
    same = _candidates(queries)
    s, t = (torch.where(same, x.float()[None, :] / temperature, -torch.inf) for x in (student, teacher))
    s, t = (x.log_softmax(-1).masked_fill(~same, 0.0) for x in (s, t))
    sizes = same.sum(1)
    rows = (t.exp() * same * (t - s)).sum(1) * (sizes > 1) / sizes
    return temperature**2 * rows.sum() / _count(queries[sizes > 1])


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute how far embeddings (B, C) are from the teacher's, a scalar: the mean of 1 - cosine."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def scores_of(logits: Tensor) -> Tensor:
    """Return (B,) the scores of candidates: of logits (B, 2) class 1 over class 0, of (B, 1) the number itself."""
    return logits[:, -1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0]


def _candidates(queries: Tensor) -> Tensor:
    return queries[:, None] == queries[None, :]


def _count(queries: Tensor) -> int:
    return max(1, len(queries.unique()))
