"""What cannot be: layers that use the entries of others, tokens that are fed twice; and what hardly helps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from torch import Tensor

from ..core import compat
from .layer import KINDS, PrunedLayer

if TYPE_CHECKING:
    from .hooks import CacheHooks


def check_places(hooks: CacheHooks, places: Tensor | None, asks: Tensor, padded: bool, layer: PrunedLayer) -> None:
    """Raise ValueError where ``position_ids`` are lacking, or say that tokens are in the cache already; ``layer``:
    one of the cache, as it was."""
    if hooks.options.mode != "pruned":
        return
    if places is None and padded and hooks.method.needs_places:
        raise ValueError(
            f"{hooks.method.name} needs the position_ids of a padded batch, as generate gives them: "
            "(attention_mask.cumsum(1) - 1).clamp(min=0)"
        )
    again = places is not None and layer.record_past and layer.fresh and layer.seen > 0
    if again and bool((cast("Tensor", places)[:, -1] < asks[:, -1]).any()):
        raise ValueError(
            "transformers feeds all of a conversation once more where drafts come to a cache that is filled, and "
            "it would be held twice: generate later turns without drafts"
        )


def check_own_entries(hooks: CacheHooks, layers: int) -> None:
    """Raise ValueError where layers use the keys and values of others; ``layers``: how many a cache has."""
    arch = hooks.architecture
    numbers = [hooks.number_of(layer) for layer in arch.layers]
    shared = {n for n in numbers if n >= layers or numbers.count(n) > 1 or compat.borrows_entries(hooks.blocks[n])}
    if shared:
        first, last = min(shared), max(shared)
        which = f"layer {first} uses" if first == last else f"layers {first} to {last} use"
        raise ValueError(
            f"{hooks.name} is not possible with {arch.name}: {which} the keys and values of other layers, so "
            "that what leaves would leave there, too"
        )


def warn_of_bounded(name: str, report: Sequence[dict]) -> bool:
    """Warn where layers that slide, and are left alone, hold most of a cache; returns whether they do."""
    dense, bounded = (sum(row["dense_bytes"] for row in report if row["kind"] in kinds) for kinds in (KINDS, KINDS[1:]))
    if 2 * bounded <= dense:
        return False
    share = sum(row["bytes"] for row in report) / dense
    warnings.warn(
        f"layers that slide, and are left alone, hold {bounded / dense:.0%} of this cache: {name} leaves {share:.0%} "
        "of all bytes",
        stacklevel=3,
    )
    return True
