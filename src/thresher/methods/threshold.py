"""Keep the tokens whose score reaches a threshold set by hand."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..core.architecture import Architecture
from ..core.pruner import Choice, TokenPruner
from ..core.view import View


class Threshold(TokenPruner):
    """Keep the tokens whose score reaches a threshold set by hand: LTP's own baseline (Kim et al., "Learned Token
    Pruning for Transformers", KDD 2022); needs no training.

    The importance score is the attention received, relative to uniform: 1 is what every token would get if attention
    were even. How many tokens stay depends on the input. There is no soft stage and no budget.

    Args:
        threshold: for all sites, or one per site. Up to 1 a row always keeps a token by itself.

    | paper | here | why |
    |---|---|---|
    | score divided by the padded length: a threshold at length 128 | times the live tokens: 128 times as much | a threshold carries over lengths |
    """

    threshold: float | tuple = 0.5

    name: ClassVar[str] = "threshold"

    def build(self, model: Architecture) -> None:
        values = self.threshold if isinstance(self.threshold, (tuple, list)) else [self.threshold] * len(self.sites)
        if len(values) != len(self.sites):
            raise ValueError(
                f"threshold has {len(values)} entries for the {len(self.sites)} sites at={list(self.sites)}"
            )
        if any(value < 0 for value in values):
            raise ValueError(f"threshold={self.threshold!r}: expected numbers from 0 up (1 = uniform attention)")
        self.thresholds = tuple(float(value) for value in values)

    def choose(self, score: Tensor, view: View) -> Choice:
        return Choice(score >= self.thresholds[view.site])
