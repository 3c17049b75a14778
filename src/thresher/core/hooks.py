"""Attach a method to a model: narrow what each layer is given, let the method act, put every token back at the end.

The call owns its state. ``Hooks`` stands in for the forward of the model that holds the layers, so that a forward has
one beginning and one end, also when it raises; between them a ``CallState`` belongs to the thread that runs it. What a
site of a layer needs travels in the layer's keyword arguments (the ``Site``): a block that runs again in the backward
pass finds what was decided the first time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import compat
from .attachment import Attachment
from .cost import LayerCount
from .pictures import ALL, Deep, Prompt, newlines, numbered
from .possible import check_kind, check_possible
from .pruner import EARLY, PROTECTED, SURVIVORS, Options, Record, TokenPruner
from .tokens import LAYOUTS, Masked, Packed, Padded, Tokens, with_a_token
from .tower import Watch
from .view import Panel, Site

CACHES = ("past_key_values", "layer_past")  # names of the cache among the arguments of layers
# The per-token arguments of layers, besides the mask, and their token dimensions; all else is passed on as it is.
TOKEN_ARGUMENTS = {
    "position_embeddings": (-2,),
    "position_ids": (-1,),
    "relative_pos": (-2, -1),
    "position_bias": (-2, -1),
    "sinusoidal_pos": (-2,),
}


@dataclass(frozen=True)
class Verdict:
    """What was decided about a cache when it was filled, written on it as ``cache.token_pruning``."""

    dropped: bool  # whether tokens left while it was filled
    refusal: str = ""  # why it cannot be decoded from; empty: it can


@dataclass
class CallState:
    """One forward of a pruned model between its layers. It ends with the forward, also by an exception."""

    options: Options  # what this thread asked for when the forward began; with ``mode="dense"`` the hooks do nothing
    pruner: TokenPruner  # the method at work
    soft: bool = False  # whether tokens fade instead of leaving
    mask: Tensor | None = None  # (B, N0), non-zero at real tokens; None: all are real
    whole: bool = False  # whether the mask is known to hold no zero
    ids: Tensor | None = None  # (B, N0), None where the model was called without
    wants: frozenset[str] = frozenset()  # which of "hidden_states" and "attentions" the caller asked for
    layer: int = 0  # number of the layer call that comes next
    tokens: Tokens | None = None  # what is left; None before the first layer
    protected: Tensor | None = None  # (B, N0)
    states: Tensor | None = None  # what entered the current layer
    site: Site | None = None  # of the current layer, where tokens may leave or a packed row runs
    previous: Site | None = None  # the last site where something was decided
    panel: Panel | None = None  # of the last site where some tokens alone vote
    sites: list[Site] = field(default_factory=list)  # of the layers so far
    counts: list[LayerCount] = field(default_factory=list)  # of the layers so far
    # of each layer, where they are wanted: the hidden states that entered it, put back, and its tokens
    seen: list[tuple[Tensor | None, Tokens]] = field(default_factory=list)
    last: Tensor | None = None  # the states after the last layer, put back
    prompt: Prompt | None = None  # what the reader of pictures was given; None: the model reads none
    pictures: Tensor | None = None  # (B, N0) long, the picture of each token, see ``View.pictures``
    places: Tensor | None = None  # (3, B, N0), see ``View.places``
    deep: Deep | None = None  # what is added after the first layers
    entered: Tensor | None = None  # (B,) tokens that entered, where some left before the first layer
    tower: Tensor | None = None  # (B, N0), see ``View.tower``
    spent: Any = 0  # MACs of the choice that was made there
    spectrum: Tensor | None = None  # (B, F, T), see ``View.spectrum``

    @property
    def dense(self) -> bool:
        """Whether the layers run as they are."""
        return self.options.mode == "dense"


class Hooks(Attachment):
    """The forward of the model that holds the layers, and the hooks of its layers, while it is pruned.

    Raises:
        ValueError: the model cannot be pruned by this method in this layout; nothing was touched.
    """

    def __init__(self, model: PreTrainedModel, pruner: TokenPruner, layout: str, original: str | None = None):
        super().__init__(model, pruner, layout, original)
        self.passed: frozenset[int] = frozenset()  # sites that a graph under construction passes by
        self.unserved = ""  # why no companion keeps the caches of a decoder
        arch = self.architecture
        seen = arch.reader is not None and pruner.needs_tower
        self.watch = Watch(arch.reader, arch.base) if seen else None  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise ValueError where the method or the layout does not fit the model."""
        model, base = self.model, self.architecture.base
        check_possible(self.architecture, self.method, self.layout)
        if self.method.pooling == SURVIVORS and model is not base:
            raise ValueError(
                f"pooling='survivors' is for embedders: {type(model).__name__} has a head that reads all states as "
                f"they are put back; prune a SentenceTransformer, or the {type(base).__name__} alone and pool "
                "output.token_mask yourself"
            )

    def attach(self) -> None:
        """Put the hooks on."""
        super().attach()
        if self.watch is not None:
            self.watch.attach()

    def detach(self) -> None:
        """Take the hooks off: the model is what it was."""
        if self.watch is not None:
            self.watch.detach()
        super().detach()

    def hook_layers(self) -> None:
        """Put the hooks on the layers."""
        arch, add = self.architecture, self.handles.append
        for layer in arch.layers:
            add(layer.register_forward_pre_hook(self.before_layer, with_kwargs=True))
            add(layer.register_forward_hook(self.after_layer, with_kwargs=True))
            if arch.drops_inside or not arch.shows_inputs:
                block = layer.get_submodule(arch.block)
                add(block.register_forward_hook(self.after_block, with_kwargs=True))

    # --- one forward -------------------------------------------------------------------------------------------------
    def begin(self, kwargs: dict) -> CallState:
        """Read what this forward is given; blank rows get a first token in ``kwargs``."""
        options, cache, base = self.options, kwargs.get("past_key_values"), self.architecture.base
        filled = cache is not None and cache.get_seq_length() > 0
        if filled:
            self.check_cache(cache, kwargs)
        if options.mode == "dense":
            return CallState(options, self.method)
        prompt = self.prompt
        if prompt is None and self.architecture.reader is not None:
            raise RuntimeError(
                f"{type(base).__name__} was called without {type(self.architecture.reader).__name__} around it, so "
                "that nobody can tell which tokens are pictures: call that model, or run within dense(model)"
            )
        if cache is not None and prompt is not None:
            check_kind(cache, self.pruner.name, self.unserved if self.companion is None else "")
        if filled:  # a decoding step
            self.check_step(prompt)
            return CallState(replace(options, mode="dense"), self.method)
        if compat.is_static(cache):
            raise ValueError(
                f"{self.method.name} cannot fill a {type(cache).__name__}, whose size is fixed and in which each layer "
                "holds as much: generate with a DynamicCache, or within dense(model)"
            )
        pruner = self.pruner
        compat.load_offloaded(pruner)
        if torch.jit.is_tracing():
            raise RuntimeError(
                "torch.jit.trace would freeze how many tokens stay: use thresher.export, torch.export or torch.compile"
            )
        self.check_implementation()
        mask, whole = self.given_mask(kwargs), False
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            kind = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"a pruned model takes the 2-D attention mask (B, N) of real tokens, got a {kind} one")
        if mask is not None:
            whole = not torch.compiler.is_compiling() and bool(mask.all())
            given, mask = mask, mask if whole else with_a_token(mask)
            if kwargs.get("attention_mask") is given:  # a reader may have made those of the layers of it
                kwargs["attention_mask"] = mask
        wants = frozenset(
            name
            for name in ("hidden_states", "attentions")
            if kwargs.get(f"output_{name}", getattr(base.config, f"output_{name}", False))
        )
        soft = options.gates is not None or (options.mode == "pruned" and pruner.soft)
        ids = kwargs.get("input_ids") if prompt is None else prompt.ids
        call = CallState(options, pruner, soft=soft, mask=mask, whole=whole, ids=ids, wants=wants, prompt=prompt)
        call.deep, call.spectrum = Deep.taken(kwargs), kwargs.get("input_features")
        if prompt is not None and (places := kwargs.get("position_ids")) is not None and places.dim() == 3:
            call.places = places[-3:].expand(-1, len(prompt.ids), -1)
        if not torch.compiler.is_compiling():
            pruner.record = None  # it would live on beside this forward's own
        return call

    def serves(self, cache: Any) -> bool:
        """Whether a cache knows what each of its layers holds, so that it can be decoded from in any case."""
        companion: Any = self.companion
        return companion is not None and companion.serves(cache)

    def check_cache(self, cache: Any, kwargs: dict) -> None:
        """Refuse to decode from a cache where tokens left unevenly, and more than one token onto a pruned one."""
        if self.serves(cache):
            return
        verdict = getattr(cache, "token_pruning", Verdict(False))
        if verdict.refusal:
            raise ValueError(
                f"this cache cannot be decoded from: {verdict.refusal}; generate within dense(model), or one prompt at "
                f"a time{self.unserved and f' ({self.unserved})'}"
            )
        given = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        if verdict.dropped and given is not None and given.shape[1] > 1:
            raise ValueError(
                f"a cache of pruned tokens takes one token at a time, got {given.shape[1]}: fill it with the whole "
                "prompt at once, or within dense(model)"
            )
        mask = kwargs.get("attention_mask")
        if verdict.dropped and mask is not None and not bool(mask.all()):
            raise ValueError("this cache cannot be decoded from: its rows have padding; generate one prompt at a time")

    def check_step(self, prompt: Prompt | None) -> None:
        """Refuse pictures that come onto a filled cache, of which nothing would leave."""
        kinds = self.architecture.placeholders
        if prompt is None or prompt.ids.shape[1] == 1:
            return
        if bool(prompt.tokens(kinds, self.pruner.modality or ALL).any()):
            raise ValueError(
                "pictures or sounds that are added to a filled cache (a later turn, or prefill_chunk_size) are not "
                "pruned: fill the cache with the whole prompt at once, or run within dense(model)"
            )

    def layout_for(self, *, soft: bool, cached: bool, batch: int = 2, whole: bool = False) -> type[Tokens]:
        """The layout of a forward of ``batch`` rows; ``whole``: without padding."""
        if cached and self.layout == "packed":
            raise ValueError("packed rows do not fit a KV cache: call the model with use_cache=False, or use 'padded'")
        if soft and self.layout == "packed":
            raise ValueError("packed rows have no place for soft gates: train with layout='auto', 'mask' or 'padded'")
        if self.layout != "auto":
            return LAYOUTS[self.layout]
        if soft:
            return Masked
        # the backward of one attention call per sequence costs more than the padding of batches grouped by length
        training = self.pruner.training and torch.is_grad_enabled()
        alone = batch == 1 and whole  # which has no padding to remove
        arch = self.architecture
        packed = arch.packable and arch.text and not (cached or training or alone or torch.compiler.is_compiling())
        return Packed if packed else Padded

    def start(self, call: CallState, hidden: Tensor, cached: bool) -> Tensor:
        """Lay out the tokens that enter the first layer."""
        mask: Tensor | None = call.mask
        if mask is not None and mask.shape != hidden.shape[:2]:
            shape = tuple(mask.shape)
            mask = compat.frames_mask(self.architecture.base, hidden.shape[1], mask)
            call.whole = False
            if mask is None or mask.shape != hidden.shape[:2]:
                raise ValueError(
                    f"the attention mask has shape {shape}, but the layers of {self.architecture.name} see "
                    f"{tuple(hidden.shape[:2])} tokens: padding would be taken for tokens. Call the model without a "
                    "mask, on inputs without padding"
                )
        whole = mask is None or call.whole
        layout = self.layout_for(soft=call.soft, cached=cached, batch=hidden.shape[0], whole=whole)
        if "attentions" in call.wants and layout is Packed:
            layout = Padded  # which has the probabilities of a batch in one tensor
        call.tokens = layout.start(hidden, mask, call.whole)
        call.protected = self.pruner.protection(call.tokens.alive, call.ids, call.options.protect)
        if call.prompt is not None:
            self.find_pictures(call, call.prompt, hidden)
        return self.leave_early(call, call.tokens.enter(hidden))

    def find_pictures(self, call: CallState, prompt: Prompt, hidden: Tensor) -> None:
        """Say which tokens are of pictures, and protect all others."""
        arch = self.architecture
        if prompt.ids.shape != hidden.shape[:2]:
            raise ValueError(
                f"the prompt has {tuple(prompt.ids.shape)} ids and the layers of {arch.name} see "
                f"{tuple(hidden.shape[:2])} tokens: give it one placeholder for each token, as its processor does"
            )
        tokens = prompt.tokens(arch.placeholders, self.pruner.modality or ALL)
        ends = newlines(arch.reader, hidden)  # type: ignore[arg-type]
        visual = tokens if ends is None else tokens & ~ends
        asked = prompt.asked()
        free = visual if asked is None else visual & ~asked
        assert call.protected is not None and call.tokens is not None, "start() sets them"
        call.pictures = numbered(prompt.ids, tokens, visual)
        call.protected = call.protected | ~free.to(hidden.device) & call.tokens.alive

    def scored_by(self, watch: Watch, call: CallState) -> Tensor:
        """(B, N0): what the tower says of the tokens of a prompt; looked up once in a forward."""
        if call.tower is None:
            assert call.prompt is not None
            call.tower = watch.scores(call.prompt, self.architecture.placeholders)
        return call.tower

    def leave_early(self, call: CallState, hidden: Tensor) -> Tensor:
        """Let tokens leave before the first layer, where the method says so; returns the states that enter it."""
        tokens = call.tokens
        site = self.open(call, tokens, hidden, EARLY) if EARLY in call.pruner.sites else None  # type: ignore[arg-type]
        if site is None:
            return hidden
        assert tokens is not None
        call.sites.append(site)
        site.after = None if site.acts else tokens
        if not site.acts:
            return hidden
        if call.soft:
            raise ValueError(f"tokens fade within the layers and not before them: at={EARLY} has no soft stage")
        call.previous, call.entered = site, tokens.live
        after = self.drop(site, hidden)
        call.spent = 0 if site.choice is None else site.choice.macs
        if after is tokens:
            return hidden
        call.tokens, left = after, after.take(hidden)
        after.leave(tokens, hidden)
        return left

    # --- hooks, in the order in which they run -----------------------------------------------------------------------
    def before_layer(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """Narrow the arguments to the tokens that are left; where tokens may leave, put the site into them."""
        call = self.call
        if call is None:
            if self.options.mode == "dense":
                return None
            raise RuntimeError(
                f"a layer of {self.architecture.name} was called outside the forward of "
                f"{type(self.architecture.base).__name__}, so nothing would be pruned: call that model, or run within "
                "dense(model)"
            )
        if call.dense:
            return None
        arch, arguments = self.architecture, self.architecture.arguments
        kwargs = {**dict(zip(arguments, args, strict=False)), **kwargs}
        hidden = kwargs.pop(arguments[0])
        if call.tokens is None:
            hidden = self.start(call, hidden, any(kwargs.get(name) is not None for name in CACHES))
        tokens = call.tokens
        assert tokens is not None, "start() lays them out"
        call.states = hidden
        site = call.site = self.open(call, tokens, hidden, call.layer)
        if call.wants:
            call.seen.append((tokens.put_back(hidden) if "hidden_states" in call.wants else None, tokens))
        shown = site if site is not None and (site.acts or isinstance(tokens, Packed)) else None
        masks = arch.causal and not arch.shows_inputs  # eager attention takes no mask for no mask, and not for causal
        if not (shown or masks or tokens.touched):
            return None
        if masks or tokens.touched:
            self.narrow(tokens, hidden, kwargs)
        if shown is None:
            return (hidden,), kwargs
        shown.rotary = kwargs.get("position_embeddings") if shown.acts and self.pruner.needs_rotary else None
        if shown.acts and not arch.shows_inputs and "output_attentions" in arguments:
            kwargs["output_attentions"] = True
        if arch.passes_arguments:
            kwargs["token_site"] = shown
        else:  # the block is given no arguments of ours: the site rides on a mask that is this layer's own
            mask: Any = kwargs.get("attention_mask")
            mask = tokens.mask(None, hidden.dtype, arch.causal, True, True) if mask is None else mask.clone()
            mask.token_site = shown
            kwargs["attention_mask"] = mask
        return (hidden,), kwargs

    def open(self, call: CallState, tokens: Tokens, hidden: Tensor, layer: int) -> Site | None:
        """The site of a layer, which is next; None: it has none, and nothing of it is needed."""
        pruner, number = call.pruner, -1
        if call.options.mode == "pruned":
            number = pruner.sites.index(layer) if layer in pruner.sites else -1
        if number < 0 and not isinstance(tokens, Packed):
            return None
        protected = call.protected
        assert protected is not None, "start() says which"
        if number >= 0:
            protected = protected.gather(1, tokens.index) & tokens.alive
        site = Site(layer, number, tokens, protected, hidden)
        if number >= 0:
            site.previous, site.counts, site.passed = call.previous, call.options.counts, self.passes_by(pruner, number)
            site.spectrum = call.spectrum
            if (widths := call.options.widths) is not None:
                site.width, site.capped = widths.slots[number], widths.capped
            if call.pictures is not None:
                pictures = call.pictures.to(tokens.index.device).gather(1, tokens.index)
                site.pictures = pictures.masked_fill(~tokens.alive, -1)
                site.passed = site.passed or not bool((tokens.alive & ~protected).any())
                if call.places is not None:
                    site.places = call.places.to(tokens.index.device).gather(2, tokens.index.expand(3, -1, -1))
                if self.watch is not None and not site.passed:
                    site.tower = self.scored_by(self.watch, call).gather(1, tokens.index)
            if pruner.needs_attention and pruner.scores_all and not site.passed and not call.options.gates:
                site.statistic = pruner.statistic
            site.anchored = pruner.protects_some and call.options.protect is None
            if pruner.votes == PROTECTED and not site.passed:
                self.seat(call, site)
        return site

    def seat(self, call: CallState, site: Site) -> None:
        """Let the protected tokens alone vote at a site; a row without votes as a whole."""
        pruner, voters, one = call.pruner, site.protected, site.anchored and call.pruner.protects_one
        if call.options.protect is None and pruner.protected_positions == ():
            return
        if not site.anchored:
            voters = voters | site.alive & ~voters.any(1, keepdim=True)
        # of one shape all rows are made, of which the voters' count; who is protected stays: as many at all sites
        if (call.options.widths is None or one) and (call.panel is None or not site.anchored):
            call.panel = Panel.of(voters, 1 if one else None)
        site.voters, site.panel = voters, call.panel

    def passes_by(self, pruner: TokenPruner, number: int) -> bool:
        """Whether a site is passed by; what is known beforehand while a graph is traced, which cannot look."""
        if pruner.training:
            return False
        return number in self.passed if torch.compiler.is_compiling() else pruner.keeps_all(number)

    def narrow(self, tokens: Tokens, hidden: Tensor, kwargs: dict) -> None:
        """Narrow the per-token arguments of a layer in ``kwargs``."""
        arch = self.architecture
        for name, dims in TOKEN_ARGUMENTS.items():
            if kwargs.get(name) is not None:
                kwargs[name] = self.narrowed(tokens, name, kwargs[name], dims)
        if "attention_mask" in arch.arguments and not isinstance(tokens, Packed):  # whose sequences cut their own parts
            mask = kwargs.get("attention_mask")
            if mask is not None and arch.binary_mask:  # 1.0 from a model that was given no mask is no bias
                mask = mask.long()
            causal = kwargs.get("is_causal")
            causal = arch.causal_by_default and self.original != "eager" if causal is None else causal
            needed = arch.causal and not arch.shows_inputs
            kwargs["attention_mask"] = tokens.mask(mask, hidden.dtype, causal or needed, self.eager, needed)

    def narrowed(self, tokens: Tokens, name: str, value: Any, dims: tuple[int, ...]) -> Any:
        if isinstance(value, (tuple, list)):  # (cos, sin)
            return type(value)(self.narrowed(tokens, name, v, dims) for v in value)
        value = tokens.narrow(value, dims)
        if name == "relative_pos" and isinstance(tokens, Padded):  # DeBERTa wants it (1, B * H, K, K) once rows differ
            heads = self.architecture.base.config.num_attention_heads
            value = value.flatten(0, -3).repeat_interleave(heads, 0)[None]
        return value

    def after_block(self, block: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Take the probabilities of an attention block; where it returns the residual state, tokens leave here."""
        arch, site = self.architecture, kwargs.get("token_site")
        if site is None and not arch.passes_arguments:
            sites = (getattr(argument, "token_site", None) for argument in (*args, *kwargs.values()))
            site = next((site for site in sites if site is not None), None)
        if site is None or not site.acts:
            return None
        if not arch.shows_inputs and isinstance(output, tuple) and output[1] is not None and site.weights is None:
            site.weights = output[1]
        call = self.call
        if not arch.drops_inside or (call is not None and call.soft) or (site.choice is None and call is None):
            return None
        states = output[0] if isinstance(output, tuple) else output
        after = self.drop(site, states)
        if after is site.tokens:
            return None
        hidden = after.take(states)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def drop(self, site: Site, states: Tensor) -> Tokens:
        """The tokens that go on, of those with ``states``. The method chooses once: a block that runs again repeats
        what was decided."""
        if site.after is None:
            self.check_shown(site)
            site.states = states
            with torch.no_grad():
                self.pruner.select(site)
            site.after = self.pruner.reduce(site)
        return site.after

    def check_shown(self, site: Site) -> None:
        shows = site.inputs is not None or site.weights is not None
        if self.pruner.needs_attention and not shows and site.layer != EARLY:
            raise RuntimeError(
                f"layer {site.layer} of {self.architecture.name} delivered no attention, so nothing would be pruned; "
                "load the model with attn_implementation='sdpa' or 'eager', and do not change it after prune()"
            )

    def after_layer(self, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Go on with the tokens that are left; after the last layer put all of them back."""
        call = self.call
        if call is None or call.dense:
            return None
        given = returned = output[0] if isinstance(output, tuple) else output
        site, tokens, inside = call.site, call.tokens, self.architecture.drops_inside
        entered = call.states
        assert tokens is not None and entered is not None, "before_layer() sets them"
        if call.deep is not None:
            given = call.deep.add(call.layer, given, tokens.index)
        if site is None or not site.acts:
            hidden, after = self.faded(tokens, entered, given), tokens
            call.counts.append(LayerCount(tokens.live, tokens.live, spent=call.spent))
        else:
            if call.soft:
                hidden, after = self.fade(call, site, kwargs, entered, given)
            else:
                hidden, after = self.leave(site, entered, given)
            spent: Any = call.spent + (0 if site.choice is None else site.choice.macs)
            if call.pruner.scores_row:
                spent = spent + tokens.live * self.architecture.costs[call.layer].width
            count = after.live if inside else tokens.live, site.statistic is not None, call.pruner.predictor_macs, spent
            call.counts.append(LayerCount(tokens.live, *count))
            call.previous = site
        if site is not None and site.number >= 0:
            call.sites.append(site)
            if not site.acts:
                site.after = tokens
        call.layer, call.tokens, call.spent = call.layer + 1, after, 0
        call.states = call.site = None
        if call.layer == self.architecture.depth:
            hidden = call.last = after.unmerge(after.restore(hidden))
        if hidden is returned:
            return None
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def leave(self, site: Site, entered: Tensor, hidden: Tensor) -> tuple[Tensor, Tokens]:
        """Let tokens leave, after the layer or, as is known by now, within it; their last complete states are kept.
        Returns the states and the tokens that go on."""
        after, complete = self.drop(site, hidden), entered
        if after is not site.tokens:
            if not self.architecture.drops_inside:
                complete, hidden = hidden, after.take(hidden)
            after.leave(site.tokens, complete)
        return hidden, after

    def fade(self, call: CallState, site: Site, kwargs: dict, entered: Tensor, hidden: Tensor) -> tuple[Tensor, Tokens]:
        """Let tokens fade in a soft stage: gates on their keys from here on. Returns as ``leave`` does."""
        if call.options.gates is None:
            self.check_shown(site)
        gate = self.pruner.soften(site, call.options.gates)
        tokens, after = site.tokens, site.tokens.gate(gate)
        mask = kwargs.get("attention_mask")
        if mask is not None and not (mask.dtype == torch.bool or mask.is_floating_point()):
            # a 0/1 mask (DeBERTa) has no place for log(gate): there the gate scales the state, as in LTP
            assert after.log_gate is not None
            hidden = hidden * after.log_gate.exp().to(hidden.dtype)[..., None]
        return self.faded(after if self.architecture.drops_inside else tokens, entered, hidden), after

    def faded(self, tokens: Tokens, before: Tensor, after: Tensor) -> Tensor:
        """The states after a layer while gates are soft: a token keeps the one it had as far as its gate is closed.

        Heads that read the first token alone see no difference, and their gradients are left as they are.
        """
        if tokens.log_gate is None or self.architecture.reads_first_only:
            return after
        return torch.lerp(before.to(after.dtype), after, tokens.log_gate.exp().to(after.dtype)[..., None])

    # --- the end of a forward ----------------------------------------------------------------------------------------
    def end(self, call: CallState, kwargs: dict, output: Any) -> Any:
        """Hand out the record, judge the cache that was filled, and give states and probabilities their shapes."""
        if call.tokens is None:
            return output
        if call.layer != self.architecture.depth:
            raise RuntimeError(
                f"{call.layer} of {self.architecture.depth} layers ran, so the dropped tokens could not be put back; "
                "set layerdrop to 0 while a model is pruned"
            )
        survivors = call.tokens.spread_votes() if call.pruner.pooling == SURVIVORS else None
        if survivors is not None:
            if isinstance(output, tuple):
                raise ValueError("return_dict=False is not possible with pooling='survivors'")
            output.token_mask = survivors
        if torch.compiler.is_compiling():
            return output
        for site in call.sites if not torch.is_grad_enabled() else ():
            site.release()
        self.pruner.record = Record(
            call.sites, call.counts, self.architecture.costs, survivors, left=call.tokens, entered=call.entered
        )
        self.pruner.record.pictures = call.pictures
        if call.options.calls is not None:
            call.options.calls.append((self.pruner.record, kwargs))
        self.judge(call, kwargs, output)
        return reshaped(call, output) if call.wants else output

    def judge(self, call: CallState, kwargs: dict, output: Any) -> None:
        """Write on a cache that this forward filled whether it can be decoded from."""
        caches = [kwargs.get("past_key_values"), *(output if isinstance(output, tuple) else output.values())]
        cache = next((cache for cache in caches if hasattr(cache, "get_seq_length")), None)
        if cache is None or cache.get_seq_length() == 0 or self.serves(cache):
            return
        dropped = any(site.after not in (None, site.tokens) for site in call.sites)
        even = all(bool((count.n_attention == count.n_attention[0]).all()) for count in call.counts)
        refusal = ""
        if dropped and isinstance(call.tokens, Masked):
            refusal = "layout='mask' hid tokens that it still holds"
        elif dropped and any(getattr(layer, "is_sliding", False) for layer in getattr(cache, "layers", ())):
            refusal = "layers that see a window or a chunk count what they hold, of which some has left"
        elif dropped and not (even and (call.mask is None or call.whole)):
            refusal = "its rows have padding or kept different counts"
        cache.token_pruning = Verdict(dropped, refusal)


def reshaped(call: CallState, output: Any) -> Any:
    """``output`` with hidden states (B, N0, C) and attention probabilities (B, H, N0, N0), as the dense model has them.

    Tokens that are gone have their last complete state, and probability 0.
    """
    if isinstance(output, tuple):
        raise ValueError("return_dict=False is not possible with hidden states or attentions of a pruned model")
    states = output.get("hidden_states")
    if states is not None and call.last is not None:
        ends = [s if s is None or s.shape[:2] == call.last.shape[:2] else call.last for s in states[len(call.seen) :]]
        entered = [None if s is None else x for s, (x, _) in zip(states, call.seen, strict=False)]
        output["hidden_states"] = (*entered, *ends)
    weights = output.get("attentions")
    if weights:
        spread = [None if w is None else tokens.spread(w) for w, (_, tokens) in zip(weights, call.seen, strict=True)]
        output["attentions"] = tuple(spread)
    return output
