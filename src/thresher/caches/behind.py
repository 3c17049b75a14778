"""The cache of a decoder whose prompt tokens leave: the layers behind a site hold fewer of them.

A method that prunes tokens shortens what passes the layers of a prompt. Each layer behind a site then caches the
tokens that came as far, which differ from row to row and from layer to layer. ``PromptHooks`` runs around the hooks of
that method, announces to each layer of the cache which tokens come, and lets it report what the model was given. What
follows, steps, a second turn, beams, drafts, is then the same as with any cache that holds less than it has seen. A
cache method, where there is one, works on the tokens that are left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..core import compat
from ..core.hooks import Hooks
from ..core.tokens import Masked, Tokens
from .hooks import CacheCall, CacheHooks, ours
from .layer import Coming, PrunedLayer
from .pruner import CachePruner

PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)  # layers of a cache in whose place ours can stand


class PromptHooks(CacheHooks):
    """The hooks of a cache that is filled by a prompt whose tokens leave.

    Args:
        tokens: the hooks of the method that lets them leave, which run within these.
        method: what lets entries leave the cache besides; None: nothing does.

    Raises:
        ValueError: layers of the model cannot be given masks of their own.
    """

    place: ClassVar[str] = "model.token_pruner.cache"

    def __init__(self, model: PreTrainedModel, tokens: Hooks, method: CachePruner | None):
        self.tokens = tokens
        super().__init__(model, method, "mask" if tokens.layout == "mask" else "evict", tokens.original)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """What to call the method in errors."""
        return self.tokens.method.name if self.method is None else self.method.name

    @property
    def pruner(self) -> Any:
        """The cache method at work, or its copy for the active adapter of peft; None: there is none."""
        return getattr(self.tokens.pruner, "cache", None) or self.method

    @property
    def options(self) -> Any:
        """What this thread asks of its forwards; without a cache method nothing leaves by itself."""
        return replace(super().options, mode="dense" if self.method is None else self.tokens.options.mode)

    @contextmanager
    def asking(self, **options: Any) -> Iterator[None]:
        """Within the context the forwards of this thread run with other ``Options``; a mode is one for the tokens,
        too."""
        mode = options.get("mode", self.tokens.options.mode)
        with super().asking(**options), self.tokens.asking(mode=mode):
            yield

    def check(self) -> None:
        """Raise ValueError where a method cannot serve the model, or its layers know of another order than ours."""
        if self.method is not None:
            super().check()
        else:
            self.check_layers()
        if getattr(self.architecture.base.config, "attention_chunk_size", None) is not None:
            raise ValueError(
                f"{self.name} cannot follow the layers of {self.architecture.name} that attend in chunks, once tokens "
                "have left before them"
            )

    def serves(self, cache: Any) -> bool:
        """Whether a cache knows what it holds, so that it can be decoded from whatever has left."""
        return bool(ours(cache))

    # --- before a forward -------------------------------------------------------------------------------------------
    def prepare_cache(self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> Any:
        """Stand in for what prepares the cache of ``generate``; refuse a prompt of which not all is there at once."""
        answer = super().prepare_cache(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if self.tokens.options.mode != "pruned" or (cache is not None and cache.get_seq_length() > 0):
            return answer
        name = self.tokens.method.name
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                f"{name} looks at all of a prompt, which prefill_chunk_size cuts into parts: generate without it; "
                "cache methods such as SnapKV prune each part"
            )
        if compat.brings_drafts(*args, **kwargs):
            raise ValueError(f"{name} cannot tell a prompt from the draft that comes with it: generate without drafts")
        return answer

    def begin(self, kwargs: dict) -> CacheCall:
        """Make the cache ours where a method prunes it, and say where the new tokens stand."""
        call = super().begin(kwargs)
        if not call.dense or self.tokens.options.mode != "pruned" or torch.compiler.is_compiling():
            return call
        base, cache = self.architecture.base, kwargs.get("past_key_values")
        training = self.tokens.pruner.training and torch.is_grad_enabled()
        if cache is None and compat.wants_cache(base, kwargs.get("use_cache")) and not training:
            cache = kwargs["past_key_values"] = DynamicCache(config=base.config)
        if type(cache) is not DynamicCache or cache.get_seq_length() > 0 or cache.offloading:
            return call
        if not cache.layers:
            cache.layers, cache.layer_class_to_replicate = DynamicCache(config=base.config).layers, None
        given: Any = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        batch, new = given.shape[:2]
        blank = PrunedLayer()
        blank.open(batch)
        asks, added = blank.next_positions(new, self.new_columns(self.given_mask(kwargs), 0, new))
        asks = asks.to(given.device)
        return CacheCall(call.options, False, cache, {}, asks, added, min(added) < new, prompt=True)

    # --- one layer ---------------------------------------------------------------------------------------------------
    def before_layer(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """Announce to the cache what comes as far as this layer."""
        call, inner = self.call, self.tokens.call
        if call is not None and not call.dense and inner is not None and not inner.dense:
            self.announce(self.number_of(layer), call, inner.tokens)
        return super().before_layer(layer, args, kwargs)

    def announce(self, number: int, call: CacheCall, tokens: Tokens | None) -> None:
        """Say to a layer of the cache which tokens come; put one of ours in its place where some have left."""
        held: Any = call.cache.layers[number]
        if tokens is None or not tokens.touched or tokens.key_bias is not None:
            return
        masked = isinstance(tokens, Masked)
        if type(held) in PLAIN:
            held = call.cache.layers[number] = PrunedLayer(masked, getattr(held, "sliding_window", 0))
            held.open(len(call.added))
        if not isinstance(held, PrunedLayer):
            return
        call.layers[number] = held
        assert call.asks is not None
        position, hidden = held.places(call.asks).to(tokens.index.device), None
        if masked:
            hidden = (position >= 0) & ~tokens.alive
        else:
            position = position.gather(1, tokens.index).masked_fill(~tokens.alive, -1)
        held.coming = Coming(position, call.added, tokens.live.tolist(), call.asks.shape[1], hidden)

    # --- after a forward --------------------------------------------------------------------------------------------
    def end(self, call: CacheCall, kwargs: dict, output: Any) -> Any:
        """Make the report, where a method prunes the cache."""
        return output if self.method is None else super().end(call, kwargs, output)


def companion(tokens: Hooks, method: CachePruner | None) -> PromptHooks | None:
    """What keeps the cache of a decoder in order while tokens of its prompts leave; None: nothing can, or it has none.

    Why it cannot is written on ``tokens``.

    Raises:
        ValueError: ``method`` cannot serve the model.
    """
    if not tokens.architecture.causal and method is None:
        return None
    try:
        return PromptHooks(tokens.model, tokens, method)
    except ValueError as error:
        if method is not None:
            raise
        tokens.unserved = str(error)
        return None
