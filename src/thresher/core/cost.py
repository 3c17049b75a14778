"""Price a schedule: the tokens of every layer, in multiply-accumulates (MACs) or in measured time. Pure arithmetic.

    counts = tokens_by_layer(tokens, after, range(depth), inside=True)    what is left, layer by layer
    macs(costs, counts)        table.time(counts)        roofline.floor(costs, counts)

MACs are those of the layers alone, of live tokens alone, each block at the tokens that pass it. A standard layer of n
tokens, C channels and I intermediate channels takes 4nC^2 + 2nCI + 2n^2C, and n^2C more for a column-mean score.

Shapes: B texts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerCost:
    """MACs of one layer: per token those of the weights, and per pair of tokens those of the heads."""

    attention: int  # size of the weights of its attention
    ffn: int  # size of the weights of its FFN
    width: int  # heads x head size

    def macs(self, n_attention: Any, n_ffn: Any, scored: bool = False, predictor: int = 0, spent: Any = 0) -> Any:
        """MACs of a row with ``n_attention`` tokens in the attention block and ``n_ffn`` in the FFN.

        Numbers or tensors alike (differentiable). ``scored`` adds the column mean's second product of queries and keys,
        ``predictor`` so many MACs for each token that enters, ``spent`` so many for the row.
        """
        quadratic = (2 + scored) * self.width * n_attention * n_attention
        return (self.attention + predictor) * n_attention + quadratic + self.ffn * n_ffn + spent


@dataclass(frozen=True)
class LayerCount:
    """Tokens of one layer in one forward."""

    n_attention: Tensor  # (B,) entering its attention
    n_ffn: Tensor  # (B,) entering its FFN
    scored: bool = False  # whether it was scored
    predictor: int = 0  # MACs per token of a predictor
    spent: Tensor | int = 0  # MACs of a score that are none of the two, by row


def macs(costs: Sequence[LayerCost], counts: Sequence[LayerCount]) -> Tensor:
    """(B,) MACs of each row of a forward, one entry of ``counts`` per layer."""
    total: Any = 0
    for cost, count in zip(costs, counts, strict=True):
        total = total + cost.macs(count.n_attention, count.n_ffn, count.scored, count.predictor, count.spent)
    return total


def dense_macs(costs: Sequence[LayerCost], tokens: Any) -> Any:
    """MACs of the unpruned model on rows of ``tokens`` tokens (number or tensor), without padding."""
    return sum(cost.macs(tokens, tokens) for cost in costs)


def tokens_by_layer(
    tokens: Tensor,
    after: Mapping[int, Callable[[Tensor], Tensor]],
    layers: Iterable[int],
    *,
    inside: bool,
    unscored: Collection[int] = (),
) -> list[LayerCount]:
    """Count the tokens of a schedule, layer by layer (differentiable).

    Args:
        tokens: (B,) tokens that enter the first layer.
        after: for each site the function from the tokens (B,) that enter it to those that go on, (B,).
        layers: those that are counted, in their order.
        inside: whether tokens leave before the FFN of their layer, or after it.
        unscored: sites that take no score.
    """
    counts = []
    for layer in layers:
        left = after[layer](tokens) if layer in after else tokens
        counts.append(LayerCount(tokens, left if inside else tokens, layer in after and layer not in unscored))
        tokens = left
    return counts


Curve = tuple[tuple[float, ...], tuple[float, ...]]  # tokens, rising, and the milliseconds that they take


@dataclass(frozen=True)
class LatencyTable:
    """Measured time(tokens) of a pruned model's parts, and of the dense model, in ms per text.

    Attributes:
        attention, scored: the attention block of a layer that is not a site, and of one that is, with its hooks,
            scoring and removal.
        ffn: the rest of the layer.
        rest: embeddings, head and Python, once per forward.
        dense: the whole dense model without hooks, which shares of the time refer to.
        batch_size, threads: what was measured.
    """

    attention: Curve
    scored: Curve
    ffn: Curve
    rest: Curve
    dense: Curve
    batch_size: int
    threads: int

    def time(self, counts: Iterable[LayerCount]) -> Tensor:
        """(B,) ms of the layers that ``counts`` are of (differentiable)."""
        parts = ((c.n_attention, self.scored if c.scored else self.attention, c.n_ffn) for c in counts)
        total: Any = sum(between(n, curve) + between(n_ffn, self.ffn) for n, curve, n_ffn in parts)
        return total

    def fixed(self, tokens: Tensor) -> Tensor:
        """(B,) ms of everything but the layers."""
        return between(tokens, self.rest)


def between(x: Tensor, curve: Curve) -> Tensor:
    """Interpolate ``curve`` at ``x`` on straight lines, continued at its ends; differentiable in ``x``."""
    at, value = (torch.tensor(part, dtype=torch.float32, device=x.device) for part in curve)
    x = x.float()
    right = torch.searchsorted(at, x.detach().contiguous()).clamp(1, len(at) - 1)
    left = right - 1
    slope = (value[right] - value[left]) / (at[right] - at[left])
    return (value[left] + (x - at[left]) * slope).clamp(min=0)
