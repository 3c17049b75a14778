"""LTP: learned token pruning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.architecture import Architecture
from ..core.pruner import Choice, Record
from ..core.view import View
from .parts.budget import Budgeted, falling
from .parts.gates import log_gate


class LTP(Budgeted):
    """Learned thresholds on the attention received (Kim et al., "Learned Token Pruning for Transformers", KDD 2022).

    A token leaves after layer l if its score s is below that layer's threshold. In the soft stage the thresholds learn
    with the weights, by the gradient of the gate sigmoid((s - threshold) / temperature) (their eq. 6); in the hard
    stage the thresholds are fixed and the weights go on.

    Departures. The score is relative to uniform attention over live rows (theirs is divided by the padded length: the
    same at one length, but theirs does not carry over to another). The gate enters the attention of the following
    layers as log(gate) on the key: a gate of 0 is exactly removal and a gate of 1 exactly presence, in pre-LN models
    too, where a gate on the layer's output is undone by the next LayerNorm. Gates multiply over layers, and are
    rounded to 0 or 1 in the forward pass, straight through: half-open gates carry what hard removal then takes away
    (``straight_through=False`` leaves them half open, as the paper does). [CLS] never leaves, and a row keeps its
    ``min_keep`` best tokens: in a text of four words no attention is far below uniform. The budget is a FLOPs target
    instead of a weight to search for: a quadratic penalty on the expected MACs (as LTMP's, Bonnaerens and Dambre, TMLR
    2023) whose target falls from 1 over the first half of the soft stage, and one common shift of all thresholds,
    searched for on held-out inputs, whenever the hard stage begins, is evaluated or ends.

    Args:
        target_flops: MACs to be left, as a fraction of the dense model's on the same unpadded inputs. None: no target,
            the L1 penalty ``weight`` * mean gate of the paper's eq. 7.
        weight: of the penalty. Default 10 with a target, 0.1 without.
        temperature: of the gates, in units of uniform attention. The paper's 1e-4..2e-3 at length 128 are 0.013..0.26.
        init: layer i of L starts at ``init`` * i / L (1.28 is their 0.01 at length 128).
        soft_until: share of the training that is soft.
        straight_through: whether gates are 0 or 1 in the soft stage.
        min_keep: tokens that a row keeps at least, protected ones included.
    """

    target_flops: float | None = None
    weight: float | None = None
    temperature: float = 0.1
    init: float = 1.0
    soft_until: float = 0.3
    straight_through: bool = True
    min_keep: int = 3

    name: ClassVar[str] = "ltp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: expected a positive number")
        if not 0 <= self.soft_until <= 1:
            raise ValueError(f"soft_until={self.soft_until}: expected a share of the training in [0, 1]")
        if self.min_keep < 1:
            raise ValueError(f"min_keep={self.min_keep}: expected a number of tokens from 1 up")

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        """Every layer; the last only for heads that read the first token alone, which no other token can reach any
        more."""
        last = model.last_site if model.reads_first_only else min(model.last_site, model.depth - 2)
        return tuple(range(model.first_site, last + 1))

    def build(self, model: Architecture) -> None:
        rising = [self.init * layer / max(1, model.depth) for layer in self.sites]
        self.threshold = nn.Parameter(torch.tensor(rising, dtype=torch.float32))

    def choose(self, score: Tensor, view: View) -> Choice:
        return Choice(score >= self.threshold[view.site])

    def gates(self, score: Tensor, view: View) -> Tensor:
        opening = self.opening(score, view)
        return log_gate(opening) if self.straight_through else F.logsigmoid(opening)

    def opening(self, score: Tensor, view: View) -> Tensor:
        """(B, N): the log odds of each gate (eq. 6)."""
        return (score - self.threshold[view.site]) / self.temperature

    def phase(self, progress: float) -> str:
        return "soft" if progress < self.soft_until else "hard"

    def loss(self, forward: Callable, batch: dict, record: Record, teacher: Any = None) -> Tensor | float:
        if not self.soft:
            return self.rest()
        if self.target_flops is not None:
            return self.penalty(record, self.softened, self.weight) + self.rest()
        kept = record.kept()
        gates = [kept[site.layer] / record.counts[0].n_attention for site in record.sites]
        return (0.1 if self.weight is None else self.weight) * torch.stack(gates).mean() + self.rest()

    @property
    def softened(self) -> float:
        """The share of the soft stage that is over."""
        return self.progress / max(1e-9, self.soft_until)

    @property
    def target_now(self) -> float:
        """The share of the MACs that is asked for now: ``target_flops``, once half of the soft stage is over."""
        return falling(self.target_flops, self.softened)

    def knob(self) -> Callable[[float], None]:
        """One shift of all thresholds."""
        start = self.threshold.detach().clone()

        def turn(by: float) -> None:
            with torch.no_grad():
                self.threshold.copy_(start + by)

        return turn
