"""SpAtten: cascade token pruning by the attention accumulated over layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.attention import View
from ..core.pruner import ModelInfo
from .topk import TopK


@dataclass(eq=False, repr=False)
class SpAtten(TopK):
    """Cascade token pruning (Wang, Zhang and Han, "SpAtten", HPCA 2021, section III-A); needs no training.

    The importance of a token is the attention that it received in all sites so far, of heads and live query rows; what
    has left never comes back. Arguments as ``TopK``, whose score is that of one layer.

    Departures. Scores are relative to uniform attention, so that each layer counts alike as tokens leave (theirs are
    plain sums). Layers that are not sites do not contribute: their probabilities are not made. Cascade head pruning,
    local value pruning and progressive quantization are left out.

    Args:
        keep: as in ``TopK``.
        at: default: every second layer after the first sixth of the depth.
    """

    name: ClassVar[str] = "spatten"

    def default_at(self, info: ModelInfo) -> tuple[int, ...]:
        return tuple(range(max(info.first_site, info.depth // 6), info.last_site + 1, 2))

    def score(self, view: View) -> Tensor:
        index, memory = view.tokens.index, view.tokens.memory
        received = view.attention_received()
        total = memory.get(self.name)
        if total is None:
            total = received.new_zeros(index.shape[0], view.tokens.width)
        total = total.scatter_add(1, index, received)  # dead slots receive nothing
        memory[self.name] = total
        return total.gather(1, index).masked_fill(~view.alive, 0.0)
