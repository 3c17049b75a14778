"""Entropy: how sharp the attention is that a token pays, or receives."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..core.architecture import Architecture
from ..core.scoring import Statistic, columns
from ..core.view import View
from .topk import TopK

CRITERIA = ("row", "column")


def row_entropy(weights: Tensor, votes: Tensor, rows: Tensor | None = None) -> Tensor:
    """Compute (B, N), the Shannon entropy of each query row, summed over heads: a statistic, see ``core.scoring``."""
    return torch.special.entr(weights).sum((1, 3))


def column_power(weights: Tensor, votes: Tensor, rows: Tensor | None = None) -> Tensor:
    """Sum (B, N), the squared probabilities of each key, over query rows and heads."""
    return columns(weights.square(), votes)


class Entropy(TopK):
    """Keep tokens by an entropy of the attention (after Su, Zhang and Zhang, "Rényi Entropy: A New Token Pruning Metric
    for Vision Transformers", 2026); needs no training.

    "row": the score is the Shannon entropy H_i = -sum_j A_ij log A_ij of the attention that token i pays, mean over
    heads, with a minus: a token stays whose attention is selective, one that looks everywhere leaves. The criterion is
    an old one, in this form our own. "column": the score is the squared L2 norm sum_i A_ij^2 of the attention that
    token j receives. Of columns with equal sums it falls with the Rényi entropy of order 2: a token that few attend to
    strongly outranks one with as much attention from all. Choice and budget are those of ``TopK``.

    Args:
        criterion: "row" or "column". "row" is not for decoders, whose early tokens see few others; in layers with
            windows those at the edges see fewer, too.

    The rest is as in ``TopK``.

    | paper | here | why |
    |---|---|---|
    | Col-Ln, a norm of order n of columns | n = 2 | one number less to choose |
    | mean over heads, then the norm | the mean over heads is taken of the squares | a statistic is summed head by head |
    """

    criterion: str = "row"

    name: ClassVar[str] = "entropy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion={self.criterion!r}: expected one of {', '.join(CRITERIA)}")

    def build(self, model: Architecture) -> None:
        super().build(model)
        if self.criterion == "row" and model.causal:
            raise ValueError(
                f"criterion='row' is not possible in {model.name}: a decoder's early tokens see few others, and would "
                "stay for that alone; use criterion='column'"
            )

    @property
    def votable(self) -> bool:
        return self.criterion == "column"

    @property
    def statistic(self) -> Statistic:
        return row_entropy if self.criterion == "row" else column_power

    def score(self, view: View) -> Tensor:
        score = view.reduce_attention(self.statistic)
        return -score if self.criterion == "row" else score
