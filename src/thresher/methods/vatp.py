"""VATP: attention received times the size of what is handed over."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..core.view import View
from .topk import TopK


class VATP(TopK):
    """Keep the tokens that hand over most: attention received times the size of the value (Guo, Kamigaito and Watanabe,
    "Attention Score is not All You Need for Token Importance Indicator in KV Cache Reduction: Value Also Matters",
    EMNLP 2024); needs no training.

    The importance score is the attention received times the L1 norm of the value, the mean over heads: a token that is
    attended to matters as far as its value vector is large. Choice, budget and arguments are those of ``TopK``.

    | paper | here | why |
    |---|---|---|
    | chooses which entries of a KV cache stay | tokens leave the layers behind | no cache is needed |
    | multiplies head by head | mean over heads of each, then the product | the score is made of one mean |
    """

    name: ClassVar[str] = "vatp"
    needs_values: ClassVar[bool] = True

    def score(self, view: View) -> Tensor:
        return view.attention_received() * view.value.float().abs().sum(-1).mean(1)
