"""FastV: keep what the last token of the prompt looks at."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..core.architecture import Architecture
from ..core.view import View
from .topk import TopK


class FastV(TopK):
    """Keep the tokens of a picture that the last token of the prompt attends to (Chen, Zhao, Liu, Bai, Lin, Zhou and
    Chang, "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
    Vision-Language Models", ECCV 2024); needs no training.

    The score is the attention of the last token in the layer of the site, averaged over heads: one row, whose logits
    are made anew, so that the layer keeps its fused attention. What is left is decided by the first question: later
    turns see no more. In a decoder of text alone it keeps the tokens of the prompt.

    Args:
        keep: of each picture, a share of its tokens or a count.
        at: default: (1,), the paper's K=2.

    | paper | here | why |
    |---|---|---|
    | the layer's attention | one row of it | probabilities of all rows cost what was to be saved |
    | one picture | each picture has its share | else the second picture of a prompt may leave as a whole |
    | no batches | the last token of each row | padding on the left or on the right |
    """

    keep: float | int | str | tuple = 0.5

    name: ClassVar[str] = "fastv"
    scores_all: ClassVar[bool] = False
    scores_row: ClassVar[bool] = True

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        return (min(1, model.last_site),)

    def build(self, model: Architecture) -> None:
        if not model.causal:
            raise ValueError(
                f"{self.name} goes by the last token of a prompt, and {model.name} is no decoder; evit goes by the "
                "class token"
            )
        super().build(model)

    def score(self, view: View) -> Tensor:
        return view.attention_from(view.readout).mean(1).masked_fill(~view.alive, 0.0)
