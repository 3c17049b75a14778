"""A prompt that is read once, for many methods and budgets.

A layer lets entries leave when it has used all of them. The states of a prompt that is read in one piece are therefore
those of the dense model, whatever leaves. What leaves can be decided afterwards, on a copy of the full cache.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..api import prune, unprune
from ..caches.baselines import RandomCache
from ..caches.h2o import H2O
from ..caches.hooks import CacheCall, CacheHooks, CacheSite, ours
from ..caches.kvzip import KVzip
from ..caches.layer import PrunedLayer
from ..caches.pruner import CachePruner
from ..caches.ragged import RaggedLayer
from ..core.architecture import find_architecture
from ..core.method import pruner_of

ROWS = ("keys", "values", "position")  # what a cache without drafts holds of each row
LISTS = ("real", "arrived", "counts")  # numbers of each row


@dataclass(frozen=True, eq=False)
class ReadPrompt:
    """Rows of tokens, without padding, that a decoder has read in one piece or several, and their full cache.

    Attributes:
        ids: (B, N), all that was read.
        cache: with everything in it. Give a model a copy: ``full()``, ``evicted(method)``.
        queries: of each layer that can be pruned, by its number, (B, H, N, d).
        logits: (B, V), of the token that comes next.
        before: what had been read before the last piece.
        repeated: what repetitions of the text have attended to, by the options of ``KVzip``.
    """

    model: PreTrainedModel
    ids: Tensor
    cache: DynamicCache
    queries: dict[int, Tensor]
    logits: Tensor
    before: ReadPrompt | None = None
    repeated: dict[tuple, dict[int, Tensor]] = field(default_factory=dict)

    def full(self) -> DynamicCache:
        """A cache that holds everything, to go on with by the model as it is."""
        return copied(self.cache)

    @torch.no_grad()
    def evicted(self, method: CachePruner) -> DynamicCache:
        """The cache of the model pruned with ``method`` when it has read this prompt.

        Go on with the model as it is; where layers or heads are unequally full (``uneven``), within ``going_on``.

        Raises:
            ValueError: the method cannot serve the model, or has not learned what it needs.
        """
        cache, known = self.full(), {}
        if isinstance(method, KVzip):
            known = self._attended(method)
        elif method.sums_attention:
            known = self._received
        with pruned(self.model, method) as hooks:
            hooks.check_ready(cache, len(self.ids), True)
            self._decide(hooks, cache, known)
        return cache

    def _decide(self, hooks: CacheHooks, cache: DynamicCache, known: dict[int, Tensor], new: int | None = None) -> None:
        """Let entries leave ``cache``; ``known``: of each layer what its entries have received, of all but the ``new``
        last queries."""
        new = (0 if known else self.ids.shape[1]) if new is None else new
        first = self.ids.shape[1] - new
        for number, layer in ours(cache).items():
            layer.received = known.get(number)
            if hooks.ragged:
                cache.layers[number] = RaggedLayer.of(layer)
        layers, method = ours(cache), hooks.pruner
        call, asks = CacheCall(hooks.options, False, cache, layers, prompt=True), self._places[:, first:]
        if isinstance(method, KVzip):
            call.quotas = method.quotas(layers)
        for number, layer in layers.items():
            layer.queries, layer.query_position = self.queries[number], self._places
            inputs = hooks.inputs_of(number, layer, self.queries[number][:, :, first:])
            hooks.decide(CacheSite(number, layer, call, asks, inputs), remembered=True)
            layer.queries = layer.query_position = None

    @cached_property
    def _received(self) -> dict[int, Tensor]:
        """What each entry of each layer has received from all queries so far."""
        cache, new, known = self.full(), self.ids.shape[1], {}
        if self.before is not None:
            new -= self.before.ids.shape[1]
            known = {number: F.pad(sums, (0, new)) for number, sums in self.before._received.items()}
        with pruned(self.model, H2O(keep=1.0)) as hooks:
            self._decide(hooks, cache, known, new)
        return received_in(cache)

    @property
    def _places(self) -> Tensor:
        return torch.arange(self.ids.shape[1], device=self.ids.device).expand(len(self.ids), -1)

    def _attended(self, method: KVzip) -> dict[int, Tensor]:
        """What a repetition of the prompt attends to in each layer; it is repeated once for all budgets."""
        options = {name: getattr(method, name) for name in ("request", "part", "overlap", "sinks")}
        if (key := tuple(options.values())) not in self.repeated:
            cache, listener = self.full(), KVzip(keep=1.0, heads="own", layers="equal", **options)
            with pruned(self.model, listener) as hooks:
                call = CacheCall(hooks.options, False, cache, ours(cache), self._places, prompt=True)
                hooks.repeat(listener, call, {"input_ids": self.ids})
            self.repeated[key] = received_in(cache)
        return self.repeated[key]


@torch.no_grad()
def read_prompt(model: PreTrainedModel, ids: Tensor, before: ReadPrompt | None = None) -> ReadPrompt:
    """Read ``ids`` (B, N), which follow what was read ``before``.

    Raises:
        ValueError: the model is pruned, or its cache cannot be; ids stand for pictures.
    """
    if pruner_of(model) is not None:
        raise ValueError("this model is pruned, and a prompt is read for many methods by the dense one: unprune() it")
    find_architecture(model).check_words(ids)
    with pruned(model, RandomCache(keep=1.0)) as hooks:
        cache = hooks.adopted(None, {}) if before is None else before.full()
        for layer in ours(cache).values():
            layer.record_past = layer.fresh = True  # as with a draft, nothing is decided before the next forward
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    queries = {}
    for number, layer in ours(cache).items():
        assert layer.queries is not None
        earlier = [] if before is None else [before.queries[number]]
        queries[number] = torch.cat([*earlier, layer.queries], 2)
        layer.queries = layer.query_position = None
        layer.waiting, layer.waits_prompt, layer.record_past = 0, False, False
    ids = ids if before is None else torch.cat([before.ids, ids], 1)
    return ReadPrompt(model, ids, cache, queries, output.logits[:, -1], before)


@contextmanager
def pruned(model: PreTrainedModel, method: CachePruner) -> Iterator[CacheHooks]:
    """Within the context a method prunes the cache of a model that nothing has pruned; gives its hooks."""
    prune(model, method)
    try:
        yield method.attached()
    finally:
        unprune(model)


def uneven(cache: DynamicCache) -> bool:
    """Whether layers or heads of a cache are unequally full, which needs masks that only a model with hooks has."""
    layers = ours(cache).values()
    ragged = any(isinstance(layer, RaggedLayer) and layer.store is not None for layer in layers)
    return ragged or len({layer.held for layer in layers}) > 1 or any(layer.dead for layer in layers)


@contextmanager
def going_on(model: PreTrainedModel, cache: DynamicCache) -> Iterator[None]:
    """Within the context the model as it is goes on over a cache from which entries have left, and none leaves."""
    if not uneven(cache):
        yield
        return
    with pruned(model, RandomCache(keep=1.0)) as hooks, hooks.asking(mode="dense"):
        yield


def received_in(cache: DynamicCache) -> dict[int, Tensor]:
    """What the entries of each layer have received, as far as it was summed."""
    return {number: layer.received for number, layer in ours(cache).items() if layer.received is not None}


def copied(cache: DynamicCache) -> DynamicCache:
    """A cache of its own over the same tensors, which none of its layers changes in place."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def stacked(caches: Sequence[DynamicCache]) -> DynamicCache:
    """The rows of several caches of one model in one; each of their layers holds the same number of entries.

    Raises:
        ValueError: a layer of them does not, or has more than keys and values.
    """
    whole = copied(caches[0])
    for number, layer in enumerate(whole.layers):
        own: list[Any] = [cache.layers[number] for cache in caches]
        prunes = isinstance(layer, PrunedLayer)
        if not prunes and type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(f"layer {number} of these caches is a {type(layer).__name__}: it cannot be stacked")
        counts = {count for one in own for count in (one.counts if prunes else [one.keys.shape[-2]])}
        if len(counts) != 1 or len({type(one) for one in own}) != 1:
            raise ValueError(f"layer {number} of these caches holds unequal numbers of entries: they cannot be stacked")
        for name in ROWS if prunes else ROWS[:2]:
            setattr(layer, name, torch.cat([getattr(one, name) for one in own]))
        if isinstance(layer, PrunedLayer):
            for name in LISTS:
                setattr(layer, name, [*chain(*(getattr(one, name) for one in own))])
            layer.received = layer.hidden = None
            layer.newest = min(one.newest for one in own)
    return whole
