"""SpAtten: cascade token pruning by the attention accumulated over layers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..core.architecture import Architecture
from ..core.view import View
from .topk import TopK


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

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        return tuple(range(max(model.first_site, model.depth // 6), model.last_site + 1, 2))

    def score(self, view: View) -> Tensor:
        received, before = view.attention_received(), view.previous
        if before is None:
            return received
        total = received.new_zeros(len(received), view.tokens.width)
        total = total.scatter_add(1, before.tokens.index, before.score)  # dead slots have received nothing
        return received + total.gather(1, view.tokens.index).masked_fill(~view.alive, 0.0)
