"""Counting multiply-accumulates (MACs) from the tokens that were really there. Pure arithmetic.

Encoder layers only, live tokens only, each sub-block charged at the tokens that passed it. For a standard layer of n
tokens, C channels and I intermediate channels that is 4nC^2 + 2nCI + 2n^2C, and n^2C more for a column-mean score.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerCost:
    """MACs of one layer: ``attention`` and ``ffn`` per token (the sizes of their weights), ``width`` = heads x head
    size."""

    attention: int
    ffn: int
    width: int

    def macs(self, n_attention, n_ffn, scored: bool = False, predictor: int = 0, spent=0):
        """MACs of a row with ``n_attention`` tokens in the attention block and ``n_ffn`` in the FFN.

        Numbers or tensors alike (differentiable). ``scored`` adds the column mean's second product of queries and keys,
        ``predictor`` so many MACs for each token that enters, ``spent`` so many for the row.
        """
        quadratic = (2 + scored) * self.width * n_attention * n_attention
        return (self.attention + predictor) * n_attention + quadratic + self.ffn * n_ffn + spent


@dataclass(frozen=True)
class LayerCount:
    """Tokens of one layer in one forward: (B,) entering its attention, (B,) entering its FFN, whether it was scored,
    the MACs per token of a predictor, and those of a score that are none of the two, by row."""

    n_attention: Tensor
    n_ffn: Tensor
    scored: bool = False
    predictor: int = 0
    spent: Tensor | int = 0


def macs(costs: list[LayerCost], counts: list[LayerCount]) -> Tensor:
    """(B,) MACs of each row of a forward, one entry of ``counts`` per layer."""
    total = 0
    for cost, count in zip(costs, counts, strict=True):
        total = total + cost.macs(count.n_attention, count.n_ffn, count.scored, count.predictor, count.spent)
    return total


def dense_macs(costs: list[LayerCost], tokens):
    """MACs of the unpruned model on rows of ``tokens`` tokens (number or tensor), without padding."""
    return sum(cost.macs(tokens, tokens) for cost in costs)
