"""LTMP: learned thresholds for merging and for pruning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.attention import View
from ..core.pruner import ModelInfo, Record
from ..core.tokens import Tokens
from .ltp import LTP
from .parts.gates import log_gate
from .tome import STAYS, matching, mean_weight


@dataclass(eq=False, repr=False)
class LTMP(LTP):
    """Learned thresholds token merging and pruning (Bonnaerens and Dambre, "Learned Thresholds Token Merging and
    Pruning for Vision Transformers", TMLR 2023).

    In each layer the pairs of ``ToMe`` whose similarity is not below a learned threshold are merged, and then the
    tokens whose attention received is below another one leave. Keys weigh by size.

    Departures. A pair is judged by the attention that its second token receives.
    In the soft stage a token that would be merged is hidden, as one that would leave: the threshold learns
    from what it costs to lose it, and the hard stage loses less. Scores are relative to uniform attention. The budget
    is ``LTP``'s: its penalty is the paper's, with a target that falls, and in the end one number, added to the
    thresholds for pruning and taken off those for merging, meets it on held-out inputs.

    Args:
        temperature: of the gates of both; the paper: 0.1.
        merge_init: the threshold on the similarity at the start; the paper: 0.9.

    The rest is as in ``LTP``.
    """

    init: float = 0.0
    merge_init: float = 0.9

    name: ClassVar[str] = "ltmp"
    merges: ClassVar[bool] = True
    sized: ClassVar[bool] = True
    needs_values: ClassVar[bool] = True

    def build(self, info: ModelInfo) -> None:
        super().build(info)
        self.merge_threshold = nn.Parameter(torch.full((len(self.sites),), float(self.merge_init)))

    def score(self, view: View) -> Tensor:
        view.alike, view.into = matching(view)
        return view.attention_received()

    def choose(self, score: Tensor, view: View) -> Tensor:
        merged = (view.alike > -STAYS) & (view.alike >= self.merge_threshold[view.site])
        view.into = torch.where(merged, view.into, torch.arange(merged.shape[1], device=merged.device))
        return (super().choose(score, view) & ~merged) | self._best(score, view, view.alive)

    def reduce(self, view: View) -> Tokens:
        return view.tokens.merge(view.keep, view.into, mean_weight(view))

    def gates(self, view: View) -> Tensor:
        gates = super().gates(view)
        apart = log_gate((self.merge_threshold[view.site] - view.alike) / self.temperature)
        spared = view.protected | self._best(view.score.detach(), view, view.open) | ~view.alive
        return gates + apart.masked_fill(spared, 0.0)

    def loss(self, forward: Callable, batch: dict, record: Record, teacher: Any = None) -> Tensor | float:
        return super().loss(forward, batch, record, teacher) + 0.0 * self.merge_threshold.sum()

    def knob(self) -> Callable[[float], None]:
        """One shift of all thresholds, towards removing more."""
        turn, start = super().knob(), self.merge_threshold.detach().clone()

        def both(by: float) -> None:
            turn(by)
            with torch.no_grad():
                self.merge_threshold.copy_(start - by)

        return both
