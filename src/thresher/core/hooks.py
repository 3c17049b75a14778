"""Attach a method to a model: narrow what each layer is given, let the method act, put every token back at the end.

All hooks are bound methods, so that ``copy.deepcopy`` takes them along. What a layer needs travels in its keyword
arguments (the ``View``): a checkpointed layer that runs again in the backward pass finds what it found the first time.
Between layers it lies in a ``Forward``, one per thread.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .architecture import describe, find_stack
from .attention import View, register
from .compat import load_offloaded
from .cost import LayerCount
from .layouts import LAYOUTS, Padded
from .pruner import TokenPruner, pruner_of
from .tokens import Tokens

# The per-token arguments of layers, besides the mask, and their token dimensions; all else is passed on as it is.
PER_TOKEN = {"position_embeddings": (-2,), "position_ids": (-1,), "relative_pos": (-2, -1), "position_bias": (-2, -1)}


@dataclass
class Forward:
    """One forward of the model, between its layers."""

    mask: Tensor | None
    ids: Tensor | None
    layer: int = 0
    tokens: Tokens | None = None
    protected: Tensor | None = None  # (B, N0)
    states: Tensor | None = None  # what entered the current layer
    views: list[View] = field(default_factory=list)
    counts: list[LayerCount] = field(default_factory=list)


class Hooks:
    """The hooks of one pruned model; ``mode``: "pruned", "unpadded" (nothing leaves) or "dense" (they do nothing)."""

    def __init__(self, model: PreTrainedModel, pruner: TokenPruner, layout: str, original: str | None = None):
        self.model, self.method = model, pruner
        self.stack, self.layout, self.mode = find_stack(model), layout, "pruned"
        self.info = describe(model, self.stack)
        self.packable = self.stack.shown and self.stack.carried and not self.stack.relative
        if layout == "packed" and not self.packable:
            raise ValueError(
                f"layout='packed' is not possible with {type(self.stack.base).__name__}: its attention takes "
                f"position biases "
                "or does not hand its arguments to transformers' attention interface; use layout='padded' or 'auto'"
            )
        if pruner.needs_values and not self.stack.shown:
            raise ValueError(
                f"{pruner.name} is not possible with {type(self.stack.base).__name__}: it needs the keys or values of "
                "a layer, and this model's layers show their attention probabilities alone; topk, spatten, entropy, "
                "ltp and top need no more than these"
            )
        if pruner.merges and self.stack.causal:
            raise ValueError(
                f"{pruner.name} is not possible with {type(self.stack.base).__name__}, a decoder: a merged token would "
                "show later tokens to earlier ones; topk, spatten and ltp let tokens leave instead"
            )
        if pruner.merges and pruner.sized and (self.stack.relative or self.stack.binary):
            raise ValueError(
                f"{pruner.name} is not possible with {type(self.stack.base).__name__}: keys weigh by the number of "
                "tokens that they stand for, and its attention takes position biases or a mask of 0 and 1; topk, ltp "
                "and top let tokens leave"
            )
        self.inputs = list(inspect.signature(self.stack.base.forward).parameters)
        self.original = original or self.stack.base.config._attn_implementation
        self.eager = self.original == "eager" or not self.stack.shown
        self.handles: list = []
        self.forwards: dict[int, Forward] = {}
        self.idle: frozenset[int] = frozenset()

    @property
    def pruner(self) -> TokenPruner:
        """The method at work: the one that was attached, or its copy for the active adapter of peft."""
        return pruner_of(self.model) or self.method

    def attach(self) -> None:
        """Register the hooks and the attention function."""
        stack = self.stack
        if stack.base._can_set_attn_implementation():
            # a function that is not shown the view leaves only the probabilities of the eager one
            stack.base.set_attn_implementation(register(self.original) if stack.shown else "eager")
        self.implementation = stack.base.config._attn_implementation
        add = self.handles.append
        add(stack.base.register_forward_pre_hook(self.begin, with_kwargs=True))
        add(stack.base.register_forward_hook(self.end))
        for layer in stack.layers:
            add(layer.register_forward_pre_hook(self.enter, with_kwargs=True))
            add(layer.register_forward_hook(self.leave, with_kwargs=True))
            if stack.inside or not stack.shown:
                block = layer.get_submodule(stack.block)
                add(block.register_forward_hook(self.after_attention, with_kwargs=True))

    def detach(self) -> None:
        """Undo ``attach``."""
        for handle in self.handles:
            handle.remove()
        if self.stack.base._can_set_attn_implementation():
            self.stack.base.set_attn_implementation(self.original)

    def layout_for(self, cached: bool) -> type[Tokens]:
        """The layout of the forward that begins."""
        if cached and self.layout == "packed":
            raise ValueError("packed rows do not fit a KV cache: call the model with use_cache=False, or use 'padded'")
        if self.pruner.soft and self.layout == "packed":
            raise ValueError("packed rows have no place for soft gates: train with layout='auto', 'mask' or 'padded'")
        if self.layout != "auto":
            return LAYOUTS[self.layout]
        if self.pruner.soft:
            return LAYOUTS["mask"]
        # the backward of one attention call per sequence costs more than the padding of batches grouped by length
        training = self.pruner.training and torch.is_grad_enabled()
        packed = self.packable and self.stack.text and not (cached or training or torch.compiler.is_compiling())
        return LAYOUTS["packed" if packed else "padded"]

    @property
    def forward(self) -> Forward | None:
        """The forward under way in this thread."""
        return self.forwards.get(0 if torch.compiler.is_compiling() else threading.get_ident())

    @forward.setter
    def forward(self, value: Forward | None) -> None:
        self.forwards[0 if torch.compiler.is_compiling() else threading.get_ident()] = value

    # --- hooks, in the order in which they run ---------------------------------------------------------------------
    def begin(self, base, args, kwargs) -> None:
        """Model pre-hook: remember the 2-D mask and the ids; a decoding step is left alone."""
        self.forward = None
        if self.mode == "dense":
            return
        load_offloaded(self.pruner)
        if self.stack.base.config._attn_implementation != self.implementation:
            raise RuntimeError(
                f"the attention implementation of {self.info.name} was changed after prune(), to "
                f"{self.stack.base.config._attn_implementation!r}, so nothing would be pruned; change it before prune()"
            )
        given = {**dict(zip(self.inputs, args, strict=False)), **kwargs}
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            kind = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"a pruned model takes the 2-D attention mask (B, N) of real tokens, got a {kind} one")
        if cache is None or cache.get_seq_length() == 0:
            self.forward = Forward(mask, given.get("input_ids"))
        elif not self._decodable(mask):
            raise ValueError(
                "this cache cannot be decoded from: its rows have padding or kept different counts, or layout='mask' "
                "hid tokens that it still holds; generate within dense(model), or one prompt at a time"
            )

    def _decodable(self, mask: Tensor | None) -> bool:
        """Whether a cache that the last forward filled holds kept tokens alone: masks are read by column, it is not."""
        counts = [] if self.pruner.record is None else self.pruner.record.counts
        even = all(bool((count.n_attention == count.n_attention[0]).all()) for count in counts)
        return even and self.layout != "mask" and (mask is None or bool(mask.all()))

    def _start(self, forward: Forward, hidden: Tensor, cached: bool) -> Tensor:
        mask = forward.mask if forward.mask is not None and forward.mask.shape == hidden.shape[:2] else None
        tokens = self.layout_for(cached).start(hidden, mask)
        forward.protected = self.pruner.protection(tokens.alive, forward.ids)
        if tokens.blank is not None:  # a row without one real token passes as in the dense model
            forward.protected = forward.protected | tokens.blank[:, None]
        forward.tokens = tokens
        return tokens.enter(hidden)

    def enter(self, layer, args, kwargs):
        """Layer pre-hook: narrow the arguments to the tokens that are left."""
        forward = self.forward
        if forward is None:
            return None
        kwargs = {**dict(zip(self.stack.arguments, args, strict=False)), **kwargs}
        hidden = kwargs.pop(self.stack.arguments[0])
        if forward.tokens is None:
            hidden = self._start(forward, hidden, kwargs.get("past_key_values") is not None)
        tokens, forward.states = forward.tokens, hidden
        if tokens.touched:
            for name, dims in PER_TOKEN.items():
                if kwargs.get(name) is not None:
                    kwargs[name] = self._narrow(tokens, name, kwargs[name], dims)
            if "attention_mask" in self.stack.arguments:
                mask = kwargs.get("attention_mask")
                if mask is not None and self.stack.binary:  # 1.0 from a model that was given no mask is no bias
                    mask = mask.long()
                kwargs["attention_mask"] = tokens.mask(mask, hidden.dtype, self.stack.causal, self.eager)
        site = self.pruner.site(forward.layer) if self.mode == "pruned" else -1
        protected = forward.protected.gather(1, tokens.index) & tokens.alive
        view = View(forward.layer, site, tokens, protected, hidden)
        view.idle = site < 0 or self._keeps_all(site)
        view.statistic = self.pruner.statistic
        view.scored = not view.idle and self.pruner.needs_attention and self.pruner.scores_all
        forward.views.append(view)
        if not self.stack.shown and not view.idle and "output_attentions" in self.stack.arguments:
            kwargs["output_attentions"] = True
        if self.stack.carried:
            kwargs["token_view"] = view
        else:  # the attention block is given no arguments of ours: the view rides on a mask that is this layer's own
            mask = kwargs.get("attention_mask")
            mask = tokens.mask(None, hidden.dtype, self.stack.causal, True) if mask is None else mask.clone()
            mask.token_view = view
            kwargs["attention_mask"] = mask
        return (hidden,), kwargs

    def _keeps_all(self, site: int) -> bool:
        """Whether a site is passed by; what is known beforehand while a graph is traced, which cannot look."""
        if self.pruner.training:
            return False
        return site in self.idle if torch.compiler.is_compiling() else self.pruner.keeps_all(site)

    def _narrow(self, tokens: Tokens, name: str, value, dims: tuple[int, ...]):
        if isinstance(value, (tuple, list)):  # (cos, sin)
            return type(value)(self._narrow(tokens, name, v, dims) for v in value)
        value = tokens.narrow(value, dims)
        if name == "relative_pos" and isinstance(tokens, Padded):  # DeBERTa wants it (1, B * H, K, K) once rows differ
            heads = self.stack.base.config.num_attention_heads
            value = value.flatten(0, -3).repeat_interleave(heads, 0)[None]
        return value

    def after_attention(self, block, args, kwargs, output):
        """Attention block post-hook: take its probabilities; where it returns the residual state, tokens leave here."""
        view = kwargs.get("token_view")
        if view is None and not self.stack.carried:
            view = next(
                (v for a in (*args, *kwargs.values()) if (v := getattr(a, "token_view", None)) is not None), None
            )
        if view is None or view.idle:
            return None
        if not self.stack.shown and isinstance(output, tuple) and output[1] is not None:
            view.see_weights(output[1])
        if not self.stack.inside or self.pruner.soft:
            return None
        self._decide(view)
        if view.after is view.tokens:
            return None
        return (view.after.take(output[0]), *output[1:]) if isinstance(output, tuple) else view.after.take(output)

    def _decide(self, view: View) -> None:
        """Let the method choose, once: a layer that runs again must repeat what was decided."""
        if view.after is None:
            self._check(view)
            with torch.no_grad():
                view.keep = self.pruner.select(view)
            view.after = self.pruner.reduce(view)

    def _check(self, view: View) -> None:
        if self.pruner.needs_attention and not view.ready:
            raise RuntimeError(
                f"layer {view.layer} of {self.info.name} delivered no attention, so nothing would be pruned; load the "
                "model with attn_implementation='sdpa' or 'eager', and do not change it after prune()"
            )

    def leave(self, layer, args, kwargs, output):
        """Layer post-hook: go on with the tokens that are left; after the last layer put all of them back."""
        forward = self.forward
        if forward is None:
            return None
        given = hidden = output[0] if isinstance(output, tuple) else output
        view, tokens, last_complete = forward.views[-1], forward.tokens, forward.states
        scored = not view.idle
        if scored and self.pruner.soft:
            self._check(view)
            forward.tokens = tokens.gate(self.pruner.gates(view))
            mask = kwargs.get("attention_mask")
            if mask is not None and not (mask.dtype == torch.bool or mask.is_floating_point()):
                # a 0/1 mask (DeBERTa) has no place for log(gate): there the gate scales the state, as in LTP
                hidden = hidden * forward.tokens.log_gate.exp().to(hidden.dtype)[..., None]
            hidden = self._fade(forward.tokens if self.stack.inside else tokens, last_complete, hidden)
        elif scored:
            self._decide(view)
            if not self.stack.inside:
                last_complete, hidden = hidden, view.after.take(hidden) if view.after is not tokens else hidden
            if view.after is not tokens:
                view.after.leave(tokens, last_complete)
            forward.tokens = view.after
        else:
            view.keep, view.after = tokens.alive, tokens
            hidden = self._fade(tokens, last_complete, hidden)
        passed = forward.tokens.live if self.stack.inside and scored else tokens.live
        own = self.pruner.predictor_macs if scored else 0
        forward.counts.append(LayerCount(tokens.live, passed, view.scored, own, view.spent))
        forward.layer += 1
        if forward.layer == self.stack.depth:
            hidden = forward.tokens.unmerge(forward.tokens.restore(hidden))
        if hidden is given:
            return None
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _fade(self, tokens: Tokens, before: Tensor, after: Tensor) -> Tensor:
        """The states after a layer while gates are soft: a token keeps the one it had as far as its gate is closed.

        Heads that read the first token alone see no difference, and their gradients are left as they are.
        """
        if tokens.log_gate is None or self.info.reads_first_only:
            return after
        return torch.lerp(before.to(after.dtype), after, tokens.log_gate.exp().to(after.dtype)[..., None])

    def end(self, base, args, output) -> None:
        """Model post-hook: hand out the record."""
        forward, self.forward = self.forward, None
        if forward is None or forward.tokens is None:
            return
        if forward.layer != self.stack.depth:
            raise RuntimeError(
                f"{forward.layer} of {self.stack.depth} layers ran, so the dropped tokens could not be put back; "
                "set layerdrop to 0 while a model is pruned"
            )
        self.pruner.remember(forward.views, forward.counts)
