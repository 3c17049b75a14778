"""ExpectedAttention: what queries to come will look at (Devoto et al., 2025, arXiv 2510.00636)."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..core.scoring import full_precision, repeat_heads
from .pruner import CachePruner
from .view import CacheView

if TYPE_CHECKING:
    from .hooks import CacheHooks

ALL = 1 << 30  # queries


class ExpectedAttention(CachePruner):
    """Keep what the queries of the next positions are expected to attend to, times the value's norm.

    Queries before rotation are taken for normal, with mean μ and covariance Σ; turned by the mean rotation R of the
    next ``horizon`` positions, the expected weight of a key is exp(Rμ·k / √d + k'RΣR'k / 2d), softmaxed over the
    entries.

    | paper | here | why |
    |---|---|---|
    | all queries of the prompt | with ``hold`` the last ``observe`` ones | the others are not remembered |
    | the rate of a head adapts to it | with ``heads="adaptive"`` | else bytes are freed in a rectangle |

    Args:
        keep, hold, ...: as in ``CachePruner``.
        horizon: T, the positions that come.
        epsilon: added to the weights before they are multiplied by the value's norm.
        observe: how many of the last queries count while decoding.
    """

    horizon: int = field(default=512, kw_only=True)
    epsilon: float = field(default=0.0, kw_only=True)
    observe: int = field(default=128, kw_only=True)

    name: ClassVar[str] = "expectedattention"
    serves_latents: ClassVar[bool] = False
    turns_back: ClassVar[bool] = True

    @property
    def window(self) -> int:
        return self.observe if self.keep is None else ALL

    def check(self, hooks: CacheHooks) -> None:
        super().check(hooks)
        if hooks.rotary and any(hooks.turns(n) and hooks.rotation(n) is None for n in hooks.full):
            raise ValueError(
                f"{self.name} is not possible with {hooks.architecture.name}, which turns its queries in a way that is "
                "not known; SnapKV and KeyDiff take them as they are"
            )

    def score(self, view: CacheView) -> Tensor:
        places = view.query_position
        counts = places >= self.sinks
        counts = torch.where(counts.any(1, keepdim=True), counts, places >= 0)
        weight = (counts / counts.sum(1, keepdim=True))[:, None, :, None]  # (B, 1, w, 1)
        query, key = view.query.float(), repeat_heads(view.key, view.query).float()
        if view.rotation is not None:
            query = view.rotation.back(query, places[:, None])
        mean = (query * weight).sum(2, keepdim=True)
        spread = (query - mean) * weight.sqrt()
        with full_precision(query.device):
            covariance = spread.transpose(-1, -2) @ spread  # (B, H, d, d)
        if view.rotation is not None:
            ahead = view.length[:, 0] + torch.arange(self.horizon, device=places.device)  # (B, T)
            angle = view.rotation.angles(ahead)
            cos, sin = (x.mean(1)[:, None, None] * view.rotation.scaling for x in (angle.cos(), angle.sin()))
            mean = view.rotation.turned(mean, cos, sin)
            for _ in range(2):  # from both sides
                covariance = view.rotation.turned(covariance, cos, sin).transpose(-1, -2)
        scale = view.logits.scaling
        with full_precision(query.device):
            varied = ((key @ covariance) * key).sum(-1)
        expected = (mean * key).sum(-1) * scale + varied * scale**2 / 2
        live = view.to_heads(view.live, key.shape[1])
        weights = view.of_cache(expected.masked_fill(~live, -torch.inf).softmax(-1))
        return (weights + self.epsilon) * view.value.float().norm(dim=-1)
