"""PyramidDrop: fewer tokens of a picture from stage to stage."""

from __future__ import annotations

from typing import ClassVar

from ..core.architecture import Architecture
from .fastv import FastV
from .topk import TopK


class PyramidDrop(FastV):
    """Keep at each of a few sites a share of the tokens of a picture that the last token of the prompt attends to (Xing
    et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", CVPR
    2025); works without training, and may be on in one.

    The depth is cut into four stages. At the end of each but the last, half of the tokens that are left stay: 50, 25
    and 12.5 % of a picture.

    Args:
        keep: at each site, a share of the tokens of a picture that are left, or a count.
        at: default: after a quarter, a half and three quarters of the layers (7, 15 and 23 of 32, as in the paper).

    | paper | here | why |
    |---|---|---|
    | the row of the last token of the instruction | the row of the prompt's last token | what is an instruction cannot be told from ids; it is the chat template's end in either case |
    | queries and keys of the next layer on its input | attention of the layer that ran | no second projection |
    """

    keep: float | int | str | tuple = 0.5

    name: ClassVar[str] = "pyramiddrop"

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        return TopK.default_at(self, model)
