"""Knorm: keys of small norm (Devoto et al., EMNLP 2024, arXiv 2406.11430)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..core import compat
from .pruner import CachePruner
from .view import CacheView

if TYPE_CHECKING:
    from .hooks import CacheHooks


class Knorm(CachePruner):
    """Keep the keys of the smallest norm: -|k_j|. Arguments as ``CachePruner``.

    | paper | here | why |
    |---|---|---|
    | layers 0 and 1 are not pruned | all layers are | bytes as of every other method |

    A norm over each key makes all keys nearly equally long. ``prune`` warns of that.
    """

    name: ClassVar[str] = "knorm"
    serves_latents: ClassVar[bool] = False

    def check(self, hooks: CacheHooks) -> None:
        super().check(hooks)
        if any(compat.normalizes_keys(hooks.blocks[number]) for number in hooks.full):
            warnings.warn(
                f"{hooks.architecture.name} normalizes its keys (QK-norm), so that their norms say next to nothing: "
                "KeyDiff looks at keys alone, too",
                stacklevel=4,
            )

    def score(self, view: CacheView) -> Tensor:
        return -view.key.float().norm(dim=-1)
