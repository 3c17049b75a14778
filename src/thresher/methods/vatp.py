"""VATP: attention received times the size of what is handed over."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..core.view import View
from .topk import TopK


class VATP(TopK):
    """Value-aware token pruning (Guo, Kamigaito and Watanabe, "Attention Score is not All You Need for Token Importance
    Indicator in KV Cache Reduction: Value Also Matters", EMNLP 2024); needs no training.

    A token that is attended to matters as far as its value vector is large: the score is the attention received times
    the L1 norm of the value, the mean over heads. Arguments as ``TopK``.

    Departures. Theirs chooses which entries of a KV cache stay; here the tokens leave. The attention received is the
    mean over all heads, times the mean of the norms over heads (theirs multiplies head by head).
    """

    name: ClassVar[str] = "vatp"
    needs_values: ClassVar[bool] = True

    def score(self, view: View) -> Tensor:
        return view.attention_received() * view.value.float().abs().sum(-1).mean(1)
