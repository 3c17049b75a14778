"""StreamingLLM: the first tokens and the last ones (Xiao et al., ICLR 2024, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..core import compat
from .pruner import CachePruner
from .view import CacheView

if TYPE_CHECKING:
    from .hooks import CacheHooks

UNSTEADY = ("dynamic", "longrope")  # rotary positions whose frequencies change with the length


class StreamingLLM(CachePruner):
    """Keep the first ``sinks`` tokens, on which attention rests, and the last ones.

    | paper | here | why |
    |---|---|---|
    | positions in the cache: all keys turn | with ``hold`` the sinks follow the rest | the same distances, no drift |
    | the same for a prompt | with ``keep`` positions are the true ones | exact within the trained range |

    Turning a key that was turned before adds up rounding errors. Here the sinks are turned from what they were at
    first, and the other keys stay as they are.

    It does not lengthen what a model can look back at: what has left is gone.

    Args:
        keep, hold, target_cache_mb: as in ``CachePruner``. With ``hold`` a model generates without end.
        sinks: first tokens that stay.
        move_sinks: whether the sinks follow the others. Default: with ``hold``, where positions are rotary.
    """

    move_sinks: bool | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "streamingllm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads == "adaptive":
            raise ValueError("heads='adaptive': StreamingLLM goes by places, which are the same in each head")

    @property
    def floor(self) -> int:
        return self.sinks + 1

    def score(self, view: CacheView) -> Tensor:
        return view.position[:, :1].float()

    def protection(self, position: Tensor, live: Tensor) -> Tensor:
        return live & (position < self.sinks)

    def intact(self, kept: list[int]) -> int:
        return max(0, min(kept) - self.sinks)

    def moves_sinks(self, hooks: CacheHooks) -> bool:
        if self.keep is not None or self.move_sinks is False or self.sinks == 0:
            return False
        return hooks.rotary or bool(self.move_sinks)

    def check(self, hooks: CacheHooks) -> None:
        super().check(hooks)
        if not self.moves_sinks(hooks):
            return
        name = hooks.architecture.name
        module = compat.rotary_module(hooks.architecture.base)
        changing = [] if module is None else sorted(compat.rotary_kinds(module) & {*UNSTEADY})
        if changing:
            raise ValueError(
                f"{name} has {changing[0]} rotary positions, whose frequencies change with the length, so that the "
                "sinks cannot follow: use move_sinks=False within the trained range, or keep="
            )
        if any(hooks.rotation(number) is None and hooks.turns(number) for number in hooks.full):
            raise ValueError(
                f"the sinks of {name} cannot follow: its layers have no rotary positions, or turn them in a way that "
                "is not known; use move_sinks=False within the trained range, or keep="
            )
