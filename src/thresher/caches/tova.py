"""TOVA: what the last query looks at (Oren et al., EMNLP 2024, arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

from torch import Tensor

from .pruner import CachePruner
from .view import CacheView


class TOVA(CachePruner):
    """Keep what the last query attends to, one choice for a layer: the mean over all heads of its attention.

    | paper | here | why |
    |---|---|---|
    | no token is protected | the first ``sinks`` and the last ``recent`` are | without them a model loses its thread |

    Arguments as ``CachePruner``; ``every`` is 1 as in the paper: one entry leaves at each step.
    """

    every: int = field(default=1, kw_only=True)
    heads: str = field(default="shared", kw_only=True)

    name: ClassVar[str] = "tova"
    weighs_values: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads != "shared":
            raise ValueError(
                f"heads={self.heads!r}: TOVA makes one choice for a layer; SnapKV(observe=1) one for each head"
            )

    @property
    def window(self) -> int:
        return 1

    def score(self, view: CacheView) -> Tensor:
        return view.attention(1)[:, :, 0]
