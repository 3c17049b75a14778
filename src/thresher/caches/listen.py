"""Show what each layer gives its attention, while nothing leaves: for methods that learn from texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import DynamicCache

if TYPE_CHECKING:
    from .hooks import CacheHooks


def hear(hooks: CacheHooks, batch: Mapping[str, Tensor], attend: Any) -> Any:
    """Run a model on ``input_ids`` with nothing leaving; returns its output.

    ``attend(number, asks, inputs)`` is called in each layer that is pruned, with the positions ``asks`` (B, N) of its
    tokens and its ``AttentionInputs``, and may return states (B, N, H, d) in place of what attention makes; or None.
    """
    base: Any = hooks.architecture.base
    device, mask = base.device, batch.get("attention_mask")
    given: dict[str, Any] = {"input_ids": batch["input_ids"].to(device)}
    if mask is not None:
        mask = mask.to(device)
        given |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    cache = hooks.adopted(DynamicCache(config=base.config), {})
    with hooks.asking(mode="dense", attend=attend):
        return hooks.model(**given, past_key_values=cache, use_cache=True)
