"""SpAtten: cascade token pruning by the attention accumulated over layers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..core.architecture import Architecture
from ..core.view import View
from .topk import TopK


class SpAtten(TopK):
    """Keep the tokens that received most attention over all sites so far (Wang, Zhang and Han, "SpAtten: Efficient
    Sparse Attention Architecture with Cascade Token and Head Pruning", HPCA 2021, section III-A); needs no training.

    The importance score is accumulated: the attention that a token received in all sites so far, of heads and live
    query rows. What has left never comes back. Choice and budget are those of ``TopK``, whose score is that of one
    layer.

    Arguments as ``TopK``; ``at`` names by default every second layer after the first sixth of the depth.

    | paper | here | why |
    |---|---|---|
    | plain sums | relative to uniform attention | each layer counts alike as tokens leave |
    | every layer contributes | sites alone | other layers do not make their probabilities |
    | prunes heads and local values, quantizes progressively | left out | tokens are the subject |
    """

    name: ClassVar[str] = "spatten"

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        return tuple(range(max(model.first_site, model.depth // 6), model.last_site + 1, 2))

    def score(self, view: View) -> Tensor:
        received, previous = view.attention_received(), view.previous
        if previous is None:
            return received
        total = received.new_zeros(len(received), view.tokens.width)
        total = total.scatter_add(1, previous.tokens.index, previous.score)  # dead slots have received nothing
        return received + total.gather(1, view.tokens.index).masked_fill(~view.alive, 0.0)
