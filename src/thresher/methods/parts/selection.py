"""Choose by score: ranks, the k best, how many k is, at which layers. Shapes: B rows, N tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.architecture import Architecture
from ...core.pruner import Choice, TokenPruner
from ...core.view import Site, View


def ranks(score: Tensor, alive: Tensor) -> Tensor:
    """Rank by score: (B, N) long, 0 for the best live token, dead ones behind. Ties go to the lower position."""
    order = score.masked_fill(~alive, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, places)


def top_k(score: Tensor, k: Tensor, alive: Tensor) -> Tensor:
    """Select the ``k`` (B,) best-scored live tokens of each row: (B, N) bool."""
    return (ranks(score, alive) < k[:, None]) & alive


def fused(keep: Tensor, score: Tensor, view: View, mean: bool = True) -> Choice:
    """Choose to ``keep`` (B, N) bool and to fuse what leaves of each row into one token more: the mean of its states by
    ``score`` (B, N), or their sum times it. It takes the place of the best of them; where nothing leaves there is
    none, and what would leave alone stays as it is."""
    keep = keep & view.alive | view.protected
    gone = view.alive & ~keep
    best = score.masked_fill(~gone, -1.0).argmax(1, keepdim=True)
    holder = torch.zeros_like(keep).scatter(1, best, True) & gone
    weight = score.masked_fill(~gone, 0.0)
    if mean:
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-12)
    many = gone & (gone.sum(1, keepdim=True) > 1)
    return Choice(keep | holder, into=best.expand_as(keep), weight=weight.masked_fill(~many, 1.0))


def check_fusing(model: Architecture) -> None:
    """Raise ValueError where a head asks single tokens, which a fused one is not, or a decoder would see what comes."""
    why = "a decoder: a merged token would show later tokens to earlier ones" if model.causal else ""
    if model.name.endswith(("ForQuestionAnswering", "ForTokenClassification")):
        why = "whose head asks each token, and those that were fused are put back as one"
    if why:
        raise ValueError(f"fuse=True is not possible with {model.name}, {why}; leave it out")


def kept_count(keep: float | int, live: Tensor, protected: Tensor | int = 0) -> Tensor:
    """Count what stays: (B,) = max(protected, 1, ceil(keep * live)) for a share, in thousandths. A count is clipped to
    ``live`` (B,)."""
    if isinstance(keep, int):
        k = live.clamp(max=keep)
    else:
        k = live * round(keep * 1000) + 999
        # OpenVINO fuses a division by whole numbers into one that rounds, and ONNX has one operation for this alone
        k = torch.div(k - k % 1000, 1000, rounding_mode="trunc")
    return torch.maximum(k.clamp(min=1), torch.as_tensor(protected, device=live.device))


def check_keep(keep: Any, what: str = "keep", counts: bool = True) -> None:
    """Raise ValueError unless ``keep`` is a share in (0, 1], or where ``counts`` are possible a count >= 1."""
    share = isinstance(keep, float) and 0 < keep <= 1
    count = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    if not share and not (counts and count):
        also = " or a whole number of tokens from 1 up" if counts else ", as in 0.5; a number of tokens is not possible"
        raise ValueError(f"{what}={keep!r}: expected a share in (0, 1]{also}")


def all_but_last(method: TokenPruner, model: Architecture) -> tuple[int, ...]:
    """Name every layer but the last: a ``default_at``."""
    return tuple(range(model.first_site, max(model.first_site, model.depth - 2) + 1))


def per_site(value: float | int | tuple, sites: tuple[int, ...]) -> tuple:
    """Return one value for each site: those of a tuple, or the same for all."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(sites)


def check_schedule(schedule: tuple | None, sites: tuple[int, ...]) -> None:
    """Raise ValueError unless ``schedule`` is None or has a share (0, 1] or a count for each site."""
    if schedule is None:
        return
    for share in schedule:
        check_keep(share, "schedule")
    if len(schedule) != len(sites):
        raise ValueError(f"schedule has {len(schedule)} entries for the {len(sites)} sites at={list(sites)}")


def threshold_of(sites: list[Site], keep: float | int) -> Tensor:
    """Find the threshold above which as many scores lie as a share, or a count, of the survivors keeps of all rows;
    ``sites`` are the records of one site, one for each batch."""
    scores, leave = [], 0
    for site in sites:
        free = site.alive & ~site.protected
        protected = site.protected.sum(1)
        live = site.alive.sum(1)
        leave += int((live - kept_count(keep, live, protected)).sum())
        scores.append(site.score[free])
    ordered = torch.cat(scores).sort().values
    if not len(ordered):
        return torch.tensor(-torch.inf)  # only protected tokens are left
    leave = min(leave, len(ordered))
    if leave == 0:
        return ordered[0] - 1
    above = ordered[leave] if leave < len(ordered) else ordered[-1] + 1
    return (ordered[leave - 1] + above) / 2
