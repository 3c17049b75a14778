"""Attention probabilities and what scores take of them: pure functions of queries, keys and masks.

Shapes: B batch, H heads, N tokens, d channels of a head. A *statistic* is a function ``reduce(weights, votes, rows)``
of the probabilities (B, h, m, N) of some heads before dropout, of the votes (B, m) of their query rows and of the slots
(B, m) of these, None where they are all N in their order; it returns (B, N), summed over these heads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dropout import dropped

CHUNK = 4_000_000  # attention probabilities held at once while scoring
CACHED = 300_000  # and while attending as well, so that they do not leave a core's cache
Statistic = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def full_precision(device: torch.device) -> AbstractContextManager:
    """Leave products in the precision of their factors; autocast would round scores and distances to bf16, which does
    not tell near ones apart."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def first_best(score: Tensor, alive: Tensor, count: int | None) -> Tensor:
    """(B, N) bool: the ``count`` best tokens of each row among those ``alive``, of equals the first."""
    order = score.masked_fill(~alive, float("-inf"))
    least = order.topk(min(count or order.shape[1], order.shape[1])).values[:, -1:]
    better, equal = order > least, (order == least) & alive
    return better | equal & (equal.cumsum(1) <= (count or order.shape[1]) - better.sum(1, keepdim=True))


@dataclass(frozen=True, eq=False)
class Logits:
    """How an attention function makes logits of products: scale, cap softly, and let each head's sink take a share."""

    scaling: float  # of the products
    softcap: float | None = None  # c of c tanh(logits / c), before the mask (Gemma 2); None: no cap
    sinks: Tensor | None = None  # (H,) logits of a key that is not there (gpt-oss); None: no sinks

    @property
    def plain(self) -> bool:
        """Whether they are scaled products and nothing else."""
        return self.softcap is None and self.sinks is None

    def cap(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def softmax(self, logits: Tensor, heads: slice = slice(None)) -> Tensor:
        """Probabilities of fp32 ``logits`` (B, h, ..., N) of some ``heads``."""
        if self.sinks is None:
            return logits.softmax(-1, dtype=torch.float32)
        sinks = self.sinks[heads].float().view(1, -1, *[1] * (logits.dim() - 2)).expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sinks], -1).softmax(-1, dtype=torch.float32)[..., :-1]


def columns(weights: Tensor, votes: Tensor, rows: Tensor | None = None) -> Tensor:
    """(B, N): the attention each token receives. A product is quicker than a sum over rows."""
    return (votes[:, None, None].float() @ weights).sum(1)[:, 0]


def repeat_heads(key: Tensor, query: Tensor) -> Tensor:
    """Keys of grouped-query attention, one per query head."""
    return key if key.shape[1] == query.shape[1] else key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def additive(mask: Tensor | None, length: int, causal: bool, device: torch.device) -> Tensor | None:
    """An attention mask as fp32 bias; None means causal among ``length`` tokens where ``causal``, else nothing."""
    if mask is None:
        if not causal:
            return None
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if mask.dtype == torch.bool:
        return torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    return mask.float().clamp(min=torch.finfo(torch.float32).min)  # a row of -inf would be NaN


def of_heads(bias: Tensor, heads: slice) -> Tensor:
    """The part of a bias that some heads need."""
    return bias if bias.dim() < 4 or bias.shape[1] == 1 else bias[:, heads]


def reduce_over_heads(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    votes: Tensor,
    logits: Logits,
    reduce: Statistic,
    rows: Tensor | None = None,
) -> Tensor:
    """(B, N) fp32: a statistic of the attention probabilities, the mean over heads; of the query ``rows`` (B, m) alone
    where these are given, with their queries (B, H, m, d) and votes (B, m).

    One chunk of heads at a time: the probabilities of all heads at once cost several times as much from N = 256 up.
    """
    heads, key = query.shape[1], repeat_heads(key, query)
    step = heads  # a graph knows no sizes
    if not torch.compiler.is_compiling():
        step = max(1, CHUNK // max(1, query.shape[0] * query.shape[2] * key.shape[2]))
    total: Any = 0
    with torch.autocast(query.device.type, enabled=False):
        for h in range(0, heads, step):
            some = slice(h, h + step)
            product = (query[:, some].float() * logits.scaling) @ key[:, some].float().transpose(-1, -2)
            product = logits.cap(product)
            product = product if bias is None else product + of_heads(bias, some)
            total = total + reduce(logits.softmax(product, some), votes, rows)
    return total / heads


def attend_and_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scaling: float,
    votes: Tensor | None = None,
    reduce: Statistic = columns,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attend, and take a statistic of the probabilities on the way: one product of queries and keys instead of two.

    Shapes: query (B, H, N, d), key and value with H or fewer heads, ``votes`` (B, N) of the query rows, None where all
    have one; returns (B, N, H, d) and (B, N) fp32. The statistic is of the probabilities before ``dropout``.
    """
    batch, heads, length, _ = query.shape
    key, value = repeat_heads(key, query).transpose(-1, -2), repeat_heads(value, query)
    total: Any = 0
    rounds, half = torch.is_autocast_enabled(query.device.type), query.dtype.itemsize < 4  # the scores
    # small products are no quicker in bf16 on a CPU, and each new shape costs a new kernel
    exact, whole = rounds or (half and query.is_cpu), half and query.is_cpu and not rounds
    step, outputs = heads, []  # a graph knows no sizes
    if not torch.compiler.is_compiling():
        step = max(1, CACHED // (batch * length * length))
    votes = torch.ones(batch, length, device=query.device) if votes is None else votes
    with torch.autocast(query.device.type, enabled=False):
        for h in range(0, heads, step):
            some = slice(h, h + step)
            q, k, v = query[:, some], key[:, some], value[:, some]  # cast in parts that stay in a core's cache
            q, k, v = q.float() if exact else q, k.float() if exact else k, v.float() if whole else v
            product = (q * scaling) @ k
            product = product if bias is None else product + of_heads(bias, some)
            weights = product.softmax(-1, dtype=torch.float32)
            kept = weights.to(v.dtype)
            outputs.append(((dropped(kept, dropout) if dropout else kept) @ v).to(value.dtype))
            total = total + reduce(weights, votes, None)
    return joined(outputs, 1).transpose(1, 2), total / heads


def attend_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """(B, N, H, d): attention in training, of the shapes of ``attend_and_score``; torch draws its dropout number
    by number."""
    product = (query * scaling) @ repeat_heads(key, query).transpose(-1, -2)
    if bias is not None:  # of which the least number of fp32 would be infinite in bf16, and a row of these NaN
        product = product + bias.to(product.dtype).clamp(min=torch.finfo(product.dtype).min)
    weights = dropped(product.softmax(-1).to(value.dtype), dropout)
    return (weights @ repeat_heads(value, query)).transpose(1, 2)


def joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    """``parts`` behind each other; no copy where there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
