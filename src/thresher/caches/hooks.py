"""Run a cache method inside a decoder: swap the layers of its cache, watch what attention is given, let entries leave.

| place | does |
|---|---|
| ``begin`` | swaps empty layers of the cache for ours, says where the coming tokens stand |
| ``before_layer`` | gives a layer whose cache is uneven a mask of its own |
| the attention function | shows queries, keys and values, as in a pruned encoder |
| ``after_block`` | lets entries leave, once the layer has used all of them |
| ``end`` | makes the report |
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from ..core import compat
from ..core.attachment import Attachment
from ..core.method import pruner_of
from ..core.pictures import Prompt
from ..core.pruner import Options
from ..core.view import AttentionInputs
from .checks import check_own_entries, check_places, warn_of_bounded
from .costs import measured
from .kvzip import CacheOptions, KVzip
from .layer import Coming, PrunedLayer, last_real, ours, row_of
from .pruner import CachePruner
from .ragged import RaggedLayer, check_ragged
from .rope import Rotation, close_gap, rotations, two_places
from .view import CacheView, attention_received, taken

GENERATE = "generate"  # of a model
FUNCTIONS = ("sdpa", "eager")  # attention functions that take a mask for each layer


@dataclass
class CacheCall:
    """One forward between its layers."""

    options: Any  # CacheOptions
    dense: bool = False  # whether the model runs as it is
    cache: Any = None
    layers: dict[int, PrunedLayer] = field(default_factory=dict)  # ours, by their number
    asks: Tensor | None = None  # (B, q), positions of the new tokens; -1: padding
    added: list[int] = field(default_factory=list)  # of each row, how many of them are real
    padded: bool = False  # whether some of them are padding
    prompt: bool = False  # whether they are a part of a prompt
    draft: bool = False  # whether they may be taken back
    quotas: dict[int, Tensor] = field(default_factory=dict)  # (B, KV, 1) of layers that share a budget


@dataclass(eq=False)
class CacheSite:
    """One layer of one forward: what its attention function shows."""

    number: int
    layer: PrunedLayer
    call: CacheCall
    asks: Tensor  # (B, q), positions of the tokens that enter the layer; -1: padding
    inputs: AttentionInputs | None = None
    attend: Callable[[AttentionInputs], Tensor | None] | None = None  # in place of the attention function


class CacheHooks(Attachment):
    """The forward of a decoder, and the hooks of its layers, while its cache is pruned."""

    tried: ClassVar[bool] = False
    unasked: ClassVar[Options] = CacheOptions()
    place: ClassVar[str] = "model.token_pruner"  # of the method
    method: CachePruner

    # --- on ----------------------------------------------------------------------------------------------------------
    @property
    def name(self) -> str:
        """What to call the method in errors."""
        return self.method.name

    def check(self) -> None:
        """Raise ValueError where the method cannot serve the model."""
        self.check_layers()
        arch = self.architecture
        if not self.full:
            raise ValueError(
                f"{self.name} is not possible with {arch.name}: all of its layers slide and hold a window at "
                "most, so that nothing is left to prune"
            )
        self.method.check(self)
        self.moves = self.method.moves_sinks(self)
        self.warned = False

    def check_layers(self) -> None:
        """Raise ValueError where layers cannot be given masks of their own; look at what they cache."""
        arch = self.architecture
        if not arch.causal:
            raise ValueError(
                f"{self.name} prunes the KV cache of a decoder, which {arch.name} is not: TopK, LTP and ToP "
                "prune the tokens of an encoder"
            )
        if not (arch.shows_inputs and arch.passes_arguments):
            raise ValueError(
                f"{self.name} is not possible with {arch.name}: its layers do not hand their arguments to "
                "transformers' attention interface, so that no mask can follow what leaves"
            )
        if self.original not in FUNCTIONS:
            raise ValueError(
                f"{self.name} gives layers masks of their own, which {self.original!r} does not take: load the "
                f"model with attn_implementation={' or '.join(map(repr, FUNCTIONS))}"
            )
        self.blocks = {self.number_of(layer): layer.get_submodule(arch.block) for layer in arch.layers}
        kinds = DynamicCache(config=arch.base.config).layers
        check_own_entries(self, len(kinds))
        self.full = [number for number, kind in enumerate(kinds) if type(kind) is DynamicLayer]
        self.latent = compat.expands_latents(next(iter(self.blocks.values())))
        self.rotary = compat.rotary_module(arch.base) is not None
        self.ragged = self.method is not None and self.method.heads == "adaptive"
        self.tried_on: tuple[dict[int, Rotation | None], int] | None = None

    def number_of(self, layer: nn.Module) -> int:
        """The number of a layer in the cache."""
        number = getattr(layer.get_submodule(self.architecture.block), "layer_idx", None)
        if not isinstance(number, int):
            raise ValueError(f"{self.name} cannot tell where the layers of {self.architecture.name} lie in a cache")
        return number

    @property
    def trial(self) -> tuple[dict[int, Rotation | None], int]:
        """How layers turn their queries and keys, and how many numbers an entry of one layer has; tried on two tokens
        when it is first asked for."""
        if self.tried_on is None:
            before, base = pruner_of(self.model), self.architecture.base
            with nullcontext() if before is None else before.attached().asking(mode="dense"):
                cache = two_places(base)
            blocks = {number: self.blocks[number] for number in self.full if self.rotary}
            found = rotations(cache, base, blocks, "values" if self.latent else "keys")
            layer: Any = cache.layers[self.full[0]]
            self.tried_on = found, (layer.keys[0].numel() + layer.values[0].numel()) // layer.keys.shape[-2]
        return self.tried_on

    def rotation(self, number: int) -> Rotation | None:
        """How a layer turns its queries and keys."""
        return self.trial[0].get(number)

    def turns(self, number: int) -> bool:
        """Whether positions count in a layer."""
        return not self.rotary or number in self.trial[0]

    def hook_layers(self) -> None:
        """Put hooks on the layers and their attention blocks."""
        for layer in self.architecture.layers:
            self.handles.append(layer.register_forward_pre_hook(self.before_layer, with_kwargs=True))
            block = layer.get_submodule(self.architecture.block)
            self.handles.append(block.register_forward_hook(self.after_block, with_kwargs=True))

    def attach(self) -> None:
        """Put the hooks on."""
        super().attach()
        if hasattr(type(self.model), compat.PREPARE_CACHE):
            setattr(self.model, compat.PREPARE_CACHE, self.prepare_cache)
            setattr(self.model, compat.START_PAGES, self.refuse_pages)
            self.generates = vars(self.model).get(GENERATE)  # one of the model's own instance
            setattr(self.model, GENERATE, self.generate)

    def detach(self) -> None:
        """Take the hooks off: the model is what it was."""
        super().detach()
        for name in (compat.PREPARE_CACHE, compat.START_PAGES):
            self.model.__dict__.pop(name, None)
        if vars(self.model).get(GENERATE) == self.generate:
            delattr(self.model, GENERATE)
            if self.generates is not None:
                setattr(self.model, GENERATE, self.generates)

    def refuse_pages(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for what begins continuous batching."""
        raise ValueError(f"{self.name} cannot prune the pages of continuous batching: call generate()")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for ``generate``: once it has ended, no draft comes any more to the cache that it leaves behind."""
        caches = [kwargs.get("past_key_values")]
        try:
            kind: Any = type(self.model)
            own = self.generates or partial(kind.generate, self.model)
            answer = own(*args, **kwargs)
            caches.append(getattr(answer, "past_key_values", None))
            return answer
        finally:
            for layer in (layer for cache in caches for layer in ours(cache).values()):
                layer.record_past = layer.fresh = False

    def prepare_cache(self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> Any:
        """Stand in for what prepares the cache of ``generate``: our layers have to be told then of drafts that come."""
        prepare = getattr(type(self.model), compat.PREPARE_CACHE)
        answer, cache = prepare(self.model, generation_config, model_kwargs, *args, **kwargs), None
        if self.options.mode == "pruned":
            cache = model_kwargs.get("past_key_values")
        if cache is not None:
            self.method.check_chunks(getattr(generation_config, "prefill_chunk_size", None))
            assists = bool(generation_config.is_assistant)
            for layer in ours(self.adopted(cache, {})).values():
                layer.fresh = layer.seen == 0 or not assists
                layer.record_past = assists
        return answer

    # --- the beginning of a forward ----------------------------------------------------------------------------------
    def begin(self, kwargs: dict) -> CacheCall:
        """Make the cache ours, and say where the new tokens stand."""
        options, cache = self.options, kwargs.get("past_key_values")
        layers = ours(cache)
        if options.protect is not None or options.counts is not None:
            raise ValueError(f"calling() is for tokens, and {self.name} prunes a cache: give sinks and recent")
        if options.mode != "pruned" and not layers:
            return CacheCall(options, dense=True)
        self.check_implementation()
        if options.mode == "pruned":
            cache = kwargs["past_key_values"] = self.adopted(cache, kwargs)
            layers = ours(cache)
        given: Any = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        batch, new = given.shape[:2]
        first = next(iter(layers.values()))
        if options.mode == "pruned":
            self.check_ready(cache, batch, new == 1 or self.given_ids(kwargs) is not None)
        self.settle(cache, layers, options)
        for layer in layers.values():
            layer.open(batch)
        mask = self.new_columns(self.given_mask(kwargs), first.seen, new)
        asks, added = first.next_positions(new, mask)
        asks = asks.to(given.device)
        self.check_range(first, added)
        check_places(self, kwargs.get("position_ids"), asks, min(added) < new, first)
        draft, prompt = first.record_past, new > 1 and (first.fresh or not first.record_past)
        if draft and prompt and isinstance(self.pruner, KVzip):
            raise ValueError(
                f"{self.pruner.name} cannot repeat a prompt that comes with a draft: generate without drafts"
            )
        for layer in layers.values():
            layer.coming, layer.fresh = Coming(layer.places(asks), added, added, new), False
        return CacheCall(options, False, cache, layers, asks, added, min(added) < new, prompt, draft)

    def check_ready(self, cache: Any, rows: int, ids: bool) -> None:
        """Raise ValueError where a call cannot be pruned, before anything is held; ``ids``: a prompt has them."""
        method = self.pruner
        method.ready()
        if isinstance(method, KVzip) and not ids:
            if self.prompt is not None and self.prompt.given.get("input_ids") is not None:
                raise ValueError(f"{method.name} cannot repeat pictures or sounds: SnapKV and KeyDiff serve them")
            raise ValueError(f"{method.name} repeats the prompt and needs its input_ids, the model was called without")
        if method.target_ms_per_token is not None and rows not in method.costs:
            method.costs[rows] = measured(self, rows)
        if method.target_cache_mb is not None or method.target_ms_per_token is not None:
            size = self.trial[1] * self.architecture.base.dtype.itemsize
            method.budget([0] * rows, [False] * rows, (0, len(self.full)), self.room(cache, rows, size))

    @property
    def prompt(self) -> Prompt | None:
        """What the model that reads pictures was given; None: it was not called, or a prompt is repeated."""
        return super().prompt if getattr(self.options, "repetition", None) is None else None

    def given_ids(self, kwargs: dict) -> Tensor | None:
        """(B, q) of the new tokens, of the arguments of a forward; None: there are none, or not all are text."""
        if self.prompt is None or kwargs.get("input_ids") is not None:
            return kwargs.get("input_ids")
        ids, kinds = self.prompt.given.get("input_ids"), list(self.architecture.placeholders.values())
        return None if ids is None or bool(torch.isin(ids, ids.new_tensor(kinds)).any()) else ids

    def adopted(self, cache: Any, kwargs: dict) -> Any:
        """A cache whose full layers are ours: the one given, where it is empty or ours already.

        Raises:
            ValueError: it cannot be pruned.
        """
        base, name = self.architecture.base, self.name
        if compat.is_paged(kwargs):
            raise ValueError(f"{name} cannot prune the pages of continuous batching: call generate()")
        if cache is None:
            if not compat.wants_cache(base, kwargs.get("use_cache")):
                raise ValueError(
                    f"the model was called with use_cache=False, so {name} has no cache to prune: call it with "
                    "use_cache=True, or within dense(model)"
                )
            cache = DynamicCache(config=base.config)
        if known := ours(cache):
            if self.ragged and self.layout != "mask":
                check_ragged([known[number] for number in self.full if number in known], name)
            return cache
        kind = type(cache).__name__
        if not isinstance(cache, Cache):
            raise ValueError(f"{name} cannot prune a {kind} as past_key_values: give a DynamicCache")
        if isinstance(cache, EncoderDecoderCache) or compat.is_static(cache):
            raise ValueError(f"{name} cannot prune a {kind}, whose size is fixed: generate with a DynamicCache")
        if compat.is_quantized(cache):
            raise ValueError(f"{name} cannot prune a {kind}, whose entries are quantized in blocks: use a DynamicCache")
        if cache.offloading:
            raise ValueError(f"{name} cannot prune a cache that is offloaded: use a DynamicCache without offloading")
        if cache.get_seq_length() > 0:
            raise ValueError(
                f"this cache was filled without {name}, by a dense call or before prune(): fill it from empty with the "
                "pruned model, or go on within dense(model)"
            )
        fresh = DynamicCache(config=base.config).layers
        if not cache.layers:
            cache.layers, cache.layer_class_to_replicate = fresh, None
        for number in self.full:
            if type(cache.layers[number]) is DynamicLayer:
                hides = self.layout == "mask"
                cache.layers[number] = RaggedLayer() if self.ragged and not hides else PrunedLayer(hides)
        if not ours(cache):
            raise ValueError(f"{name} found no layer that it can prune in this {kind}: use a DynamicCache")
        return cache

    def new_columns(self, mask: Any, seen: int, new: int) -> Tensor | None:
        """(B, q) of the 2-D attention mask, for the new tokens; None: there is none."""
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            kind = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"a pruned model takes the 2-D attention mask (B, N) of real tokens, got a {kind} one")
        if mask.shape[1] < seen + new:
            raise ValueError(
                f"the attention mask has {mask.shape[1]} columns, the cache has seen {seen} tokens and {new} are new: "
                f"give a mask of all {seen + new}"
            )
        return mask[:, seen : seen + new]

    def check_range(self, layer: PrunedLayer, added: list[int]) -> None:
        """Raise ValueError where learned positions end."""
        most, end = self.architecture.max_tokens, max(a + b for a, b in zip(layer.real, added, strict=True))
        if not self.rotary and most is not None and end > most:
            raise ValueError(
                f"{self.architecture.name} has learned {most} positions and cannot place token {end}: a pruned cache "
                "does not lengthen it; a model with rotary positions can go on"
            )

    def settle(self, cache: Any, layers: dict[int, PrunedLayer], options: Options) -> None:
        """Decide what waited for a draft to be accepted."""
        if options.mode != "pruned":
            return
        for number, layer in layers.items():
            if layer.waiting:
                count, layer.waiting = layer.waiting, 0
                assert layer.queries is not None and layer.query_position is not None
                asks = layer.query_position[:, -count:]
                call = CacheCall(options, False, cache, layers, prompt=layer.waits_prompt)
                inputs = self.inputs_of(number, layer, layer.queries[:, :, -count:])
                self.decide(CacheSite(number, layer, call, asks, inputs), remembered=True)
            if self.method.keep is not None:  # whose scores look no further back
                layer.queries = layer.query_position = None

    def inputs_of(self, number: int, layer: PrunedLayer, query: Tensor) -> AttentionInputs:
        """What the attention of a layer would be shown, with ``query`` (B, H, w, d)."""
        keys, values, block = layer.keys, layer.values, self.blocks[number]
        if self.latent:
            keys, values = compat.expanded(block, keys, values)
        assert layer.logits is not None
        return AttentionInputs(block, query, keys, values, None, False, layer.logits)

    # --- hooks, in the order in which they run -----------------------------------------------------------------------
    def before_layer(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """Put the site into the arguments of a layer, and a mask of its own where its cache needs one."""
        call = self.call
        if call is None:
            if self.options.mode != "pruned":
                return None
            raise RuntimeError(
                f"a layer of {self.architecture.name} was called outside the forward of "
                f"{type(self.architecture.base).__name__}, so nothing would be pruned: call that model, or run within "
                "dense(model)"
            )
        pruned = None if call.dense else call.layers.get(self.number_of(layer))
        if pruned is None:
            return None
        kwargs = {**dict(zip(self.architecture.arguments, args, strict=False)), **kwargs}
        hidden = kwargs.pop(self.architecture.arguments[0])
        assert pruned.coming is not None
        site = kwargs["cache_site"] = CacheSite(self.number_of(layer), pruned, call, pruned.coming.asks)
        if call.options.attend is not None:
            site.attend = partial(call.options.attend, site.number, call.asks)
        if not pruned.whole:
            sees = self.sees(pruned, call, hidden.device)
            kwargs["attention_mask"] = sees
            if isinstance(pruned, RaggedLayer) and pruned.store is not None:
                kwargs["attention_mask"], site.attend = None, partial(pruned.attend, sees)
            elif sees is not None and self.eager:
                kwargs["attention_mask"] = torch.where(sees, 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype)
        return (hidden,), kwargs

    def sees(self, layer: PrunedLayer, call: CacheCall, device: torch.device) -> Tensor | None:
        """(B, 1 or H, q, P + q) bool: which entries the new tokens see; None: all of them. Those of a store, which all
        see, are left out.

        A mask takes sdpa off its quick paths, so that there is none where nothing is dead.
        """
        assert call.asks is not None and layer.position is not None
        asks, new, window = layer.places(call.asks.to(device)), call.asks.shape[1], layer.sliding_window
        if new == 1 and not (layer.dead or call.padded or window):
            return None
        live, place = layer.live, layer.position
        if layer.masked:
            queries = self.architecture.base.config.num_attention_heads // live.shape[1]
            live, place = (x.repeat_interleave(queries, 1) for x in (live, place))
        else:
            live, place = live[:, :1], place[:, :1]  # in each head a row keeps as many, and dead slots are the same
        real = (asks >= 0)[:, None]
        fresh = torch.ones(new, new, dtype=torch.bool, device=device).tril() & real[..., None, :]
        old = live[:, :, None].expand(-1, -1, new, -1)
        if window:
            first = asks[:, None, :, None] - window + 1
            old, fresh = old & (place[:, :, None] >= first), fresh & (asks[:, None, None] >= first)
        fresh = fresh | torch.eye(new, dtype=torch.bool, device=device)  # padding sees itself, and not nothing
        return torch.cat([old, fresh.expand(-1, old.shape[1], -1, -1)], -1)

    def after_block(self, block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Let entries leave, once the layer has used all of them."""
        site = kwargs.get("cache_site")
        if site is not None and site.layer.sliding_window:
            site.layer.slide()
        elif site is not None and site.call.options.mode == "pruned":
            self.act(site)

    def act(self, site: CacheSite) -> None:
        """Let the method act on a layer, by what it showed."""
        if site.inputs is None:
            raise RuntimeError(
                f"layer {site.number} of {self.architecture.name} delivered no attention, so nothing would be pruned; "
                "load the model with attn_implementation='sdpa' or 'eager', and do not change it after prune()"
            )
        if isinstance(self.pruner, KVzip):
            site.layer.logits = site.inputs.logits
            if site.call.options.repetition is not None:
                with site.layer.unrolled():
                    self.pruner.listen(site.layer, self.shown(site), site.asks, site.call.options.repetition)
        elif site.call.draft:
            self.wait(site, site.inputs)
        else:
            self.decide(site)
        site.inputs = None

    def wait(self, site: CacheSite, inputs: AttentionInputs) -> None:
        """Remember the queries of a draft; what leaves is decided when it is known which of its tokens stay."""
        layer, asks = site.layer, site.asks
        earlier = 0 if self.method.keep is not None else self.method.window
        layer.remember(inputs.query, asks, earlier + asks.shape[1])
        layer.waiting, layer.waits_prompt, layer.logits = asks.shape[1], site.call.prompt, inputs.logits

    # --- one layer ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def decide(self, site: CacheSite, remembered: bool = False) -> None:
        """Score the entries of a layer, and let those leave that are over its budget.

        ``remembered``: whether the queries are remembered already.
        """
        layer, inputs, call, method = site.layer, site.inputs, site.call, self.pruner
        assert inputs is not None
        begun, asks = time.perf_counter(), site.asks.to(inputs.key.device)
        query, places = inputs.query, asks
        if remembered or (method.window and method.keep is None):  # while decoding a score looks further back
            if not remembered:
                layer.remember(query, asks, method.window)
            assert layer.queries is not None and layer.query_position is not None
            if not remembered or layer.queries.shape[2] > asks.shape[1]:
                query, places = layer.queries, layer.query_position
        layer.logits = inputs.logits
        place = (self.full.index(site.number), len(self.full))
        room = self.room(call.cache, len(layer.real), layer.entry_bytes)
        parts = [call.prompt and count > 1 for count in call.added or [2] * len(layer.real)]
        budget = method.budget(layer.arrived, parts, place, room)
        kept = layer.counts if budget is None else budget.kept(layer.counts)
        leave = kept != layer.counts or site.number in call.quotas
        if budget is not None and layer.held >= max(budget.at):  # columns in which no row has a token
            leave = leave or (layer.dead and layer.held > max(layer.counts))
        if leave or method.sums_attention:
            with layer.unrolled():
                inputs = self.shown(site)
                if method.sums_attention:
                    sums = attention_received(self.view(site, inputs, inputs.query, asks, None), inputs.query, asks)
                    layer.received = sums if layer.received is None else layer.received + sums
                if leave:
                    self.choose(site, replace(inputs, query=query), places, kept)
        layer.seconds += time.perf_counter() - begun

    def choose(self, site: CacheSite, inputs: AttentionInputs, places: Tensor, kept: list[int]) -> None:
        """Let the entries of a layer leave that the method does not choose; the queries stand at ``places`` (B, w)."""
        layer, method, query = site.layer, self.pruner, inputs.query
        order = self.order(layer)
        query, places = last_real(query, places, method.window) if method.window else (query, places)
        slots, dead = method.select(self.view(site, inputs, query, places, order), kept)
        if dead is None:
            kept = [slots.shape[-1]] * len(kept)
        else:  # what stays may be more than what has to
            kept = [count // slots.shape[1] for count in (~dead).sum((1, 2)).tolist()]
        layer.evict(slots if order is None else order.gather(2, slots), dead, kept, method.intact(kept))
        if self.moves and (rotation := self.rotation(site.number)) is not None:
            close_gap(layer, rotation, method.sinks, "values" if self.latent else "keys")

    def shown(self, site: CacheSite) -> AttentionInputs:
        """What attention was given, with all keys and values of a layer that is a rectangle now."""
        assert site.inputs is not None
        if site.inputs.key.shape[2] == site.layer.held:
            return site.inputs
        return self.inputs_of(site.number, site.layer, site.inputs.query)

    def order(self, layer: PrunedLayer) -> Tensor | None:
        """(B, KV, P) slots of the live entries in the order of their tokens, dead ones in front; None: as they lie."""
        if not layer.dead:
            return None
        live = layer.live
        return live.int().argsort(dim=-1, stable=True)[..., -int(live.sum(-1).max()) :]

    def view(
        self, site: CacheSite, inputs: AttentionInputs, query: Tensor, places: Tensor, order: Tensor | None
    ) -> CacheView:
        """What the method sees of a layer, with ``query`` (B, H, w, d) at ``places`` (B, w); ``order``: of which
        slots."""
        layer, method = site.layer, self.pruner
        assert layer.position is not None
        key, value, logits = inputs.key, inputs.value, inputs.logits
        position, live, received = layer.position, layer.live, layer.received
        if order is not None:
            position, live = position.gather(2, order), live.gather(2, order)
            received = None if received is None else received.gather(2, order)
            key, value = taken(key, order), taken(value, order)
        position = position.masked_fill(~live, -1)
        protected = method.protection(position, live)
        return CacheView(
            layer=site.number,
            key=key,
            value=value,
            position=position,
            live=live,
            protected=protected,
            query=query,
            query_position=places,
            logits=logits,
            received=received,
            block=self.blocks[site.number],
            rotation=self.rotation(site.number) if method.turns_back else None,
            quota=site.call.quotas.get(site.number),
        )

    def room(self, cache: Any, rows: int, size: int) -> int:
        """Entries of a row and layer for which a target has room; layers share it equally.

        ``size``: bytes of one. Raises ValueError where ``target_ms_per_token`` has none.
        """
        method, target = self.pruner, self.method.target_ms_per_token
        if target is not None:
            return method.costs[rows].room(target, method.floor + method.every - 1, rows)
        if method.target_cache_mb is None:
            return 0
        sliding = sum(getattr(other, "sliding_window", 0) for other in getattr(cache, "layers", ()))
        return max(0, int((method.target_cache_mb * 1e6 / (rows * size) - sliding) / len(self.full)))

    # --- the end of a forward ----------------------------------------------------------------------------------------
    def end(self, call: CacheCall, kwargs: dict, output: Any) -> Any:
        """Repeat the prompt, where the method wants that, and make the report."""
        if call.options.repetition is not None:
            return output
        if isinstance(self.pruner, KVzip) and call.prompt and call.options.mode == "pruned":
            self.repeat(self.pruner, call, kwargs)
        held = ((n, layer) for n, layer in enumerate(call.cache.layers) if getattr(layer, "keys", None) is not None)
        self.pruner.report = report = [row_of(number, layer) for number, layer in held]
        if any(layer.evictions for layer in call.layers.values()) and not self.warned:
            self.warned = warn_of_bounded(self.pruner.name, report)
        return output

    @torch.no_grad()
    def repeat(self, method: KVzip, call: CacheCall, kwargs: dict) -> None:
        """Feed the prompt once more, part by part, and let entries leave."""
        ids, mask, first = self.given_ids(kwargs), self.given_mask(kwargs), next(iter(call.layers.values()))
        assert ids is not None, "check_ready saw them"
        begun, new = time.perf_counter(), ids.shape[1]
        mask = ids.new_ones(len(ids), first.seen) if mask is None else mask[:, : first.seen]
        slides = [layer for layer in call.cache.layers if getattr(layer, "is_sliding", False)]
        for layer in slides:
            layer.activate_past_recording()
        end = torch.tensor(first.real, device=ids.device)
        for part, fed, real in method.repetitions(ids, mask[:, -new:], end - mask[:, -new:].sum(1)):
            places = end[:, None] + real.cumsum(1) - 1
            given = {"input_ids": fed, "attention_mask": torch.cat([mask, real.to(mask.dtype)], 1)}
            with self.asking(repetition=part):
                self(**given, position_ids=places.clamp(min=0), past_key_values=call.cache, use_cache=True)
            call.cache.crop(-part.count)
        for layer in slides:
            layer.record_past = False
        assert call.asks is not None
        layers = {number: layer for number, layer in call.layers.items() if number in self.full}
        one = CacheCall(call.options, False, call.cache, call.layers, prompt=True, quotas=method.quotas(layers))
        for number, layer in layers.items():
            layer.seconds += (time.perf_counter() - begun) / len(layers)
            heads = self.architecture.base.config.num_attention_heads
            nobody = layer.keys.new_empty(len(ids), heads, 0, layer.keys.shape[-1])
            self.decide(CacheSite(number, layer, one, call.asks[:, :0], self.inputs_of(number, layer, nobody)))
