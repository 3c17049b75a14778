"""LTMP: learned thresholds for merging and for pruning."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.architecture import Architecture
from ..core.pruner import Choice
from ..core.view import View
from .ltp import LTP
from .parts.gates import log_gate
from .tome import KEYS, STAYS, bipartite_matching, features, matching_macs


class LTMP(LTP):
    """Merge and prune tokens by learned thresholds (Bonnaerens and Dambre, "Learned Thresholds Token Merging and
    Pruning for Vision Transformers", TMLR 2023).

    In each layer the pairs of ``ToMe`` whose similarity is not below a learned threshold are merged. Then the tokens
    leave whose attention received is below another threshold, as in ``LTP``. Keys weigh by size. In the soft stage both
    thresholds learn by their gates. The budget is that of ``LTP``: in the end one number, added to the thresholds for
    pruning and taken off those for merging, meets it on held-out inputs.

    Args:
        temperature: of the gates of both; the paper: 0.1.
        merge_init: the threshold on the similarity at the start; the paper: 0.9.

    The rest is as in ``LTP``.

    | paper | here | why |
    |---|---|---|
    | merging, then pruning of the rest | a pair is judged by the attention that its second token receives | one attention gives both choices |
    | merges in training as well | in the soft stage a token to be merged is hidden, as one that leaves | the threshold learns from what it costs to lose it; the hard stage loses less |
    | attention | relative to uniform | a threshold carries over lengths |
    | squared distance from the target | the same, with a target that falls | the weights follow slowly |
    | meets it by training alone | one number on held-out inputs | counts drift as the weights learn |
    """

    init: float = 0.0
    merge_init: float = 0.9

    name: ClassVar[str] = "ltmp"
    merges = True
    sized: ClassVar[bool] = True
    needs_values: ClassVar[bool] = True

    def build(self, model: Architecture) -> None:
        super().build(model)
        self.merge_threshold = nn.Parameter(torch.full((len(self.sites),), float(self.merge_init)))

    def score_and_choose(self, view: View) -> tuple[Tensor, Choice]:
        similarity, partner = matched(view)
        score, macs = view.attention_received(), matching_macs(view.alive, view.key.shape[-1])
        merged = (similarity > -STAYS) & (similarity >= self.merge_threshold[view.site])
        into = torch.where(merged, partner, torch.arange(merged.shape[1], device=merged.device))
        return score, Choice((score >= self.threshold[view.site]) & ~merged, into=into, macs=macs)

    def gates(self, score: Tensor, view: View) -> Tensor:
        apart = self.merge_threshold[view.site] - matched(view)[0]
        return super().gates(score, view) + log_gate(apart / self.temperature)

    def knob(self) -> Callable[[float], None]:
        """Return the knob: one shift of all thresholds, towards removing more."""
        turn, start = super().knob(), self.merge_threshold.detach().clone()

        def both(by: float) -> None:
            turn(by)
            with torch.no_grad():
                self.merge_threshold.copy_(start - by)

        return both


def matched(view: View) -> tuple[Tensor, Tensor]:
    """Match the tokens that may leave by their keys, as ``bipartite_matching`` says."""
    return bipartite_matching(features(view, KEYS), view.alive & ~view.protected)
