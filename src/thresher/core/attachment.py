"""What runs a method inside a model stands in for the forward of the model that holds the layers.

A forward has therefore one beginning and one end, also when it raises. Between them a state belongs to the thread that
runs it. ``Hooks`` (core/hooks.py) lets tokens leave the layers, ``CacheHooks`` (caches) lets entries leave a cache.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from . import compat
from .architecture import find_architecture
from .attention import PREFIX, register
from .pictures import Prompt
from .pruner import Options, Pruner, pruner_of

# .calls, .options, .prompts: {Attachment: state}, {Attachment: Options} and {Attachment: Prompt} of the running thread
_THREAD = threading.local()


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Within the context: evaluation mode; each module is in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Attachment:
    """The forward of the model that holds the layers, while a method is attached to it.

    Subclasses say what a forward's state is (``begin``, with a field ``dense``), what happens at its ``end``, and which
    hooks lie on the layers.

    Raises:
        ValueError: the model cannot be pruned by this method in this layout; nothing was touched.
    """

    unasked: ClassVar[Options] = Options()  # what a thread asks for that asks for nothing
    tried: ClassVar[bool] = True  # whether ``prune`` tries the method on a copy of the first layers

    def __init__(self, model: PreTrainedModel, method: Pruner, layout: str, original: str | None = None):
        self.model, self.layout = model, layout
        self.method: Any = method
        self.architecture = find_architecture(model)
        base = self.architecture.base
        self.original = original or compat.attention_implementation(base)
        self.check()
        self.inputs = list(inspect.signature(base.forward).parameters)
        self.__signature__ = inspect.signature(base.forward)
        self.inner: Callable | None = None  # a forward of the model's own instance, as accelerate sets one
        self.eager = self.original == "eager" or not self.architecture.shows_inputs
        # a function that is not shown the site leaves only the probabilities of the eager one
        self.implementation = register(self.original) if self.architecture.shows_inputs else "eager"
        self.handles: list = []
        self.companion: Attachment | None = None  # one that runs around this one, with hooks behind its own

    @property
    def pruner(self) -> Any:
        """The method at work: the one that was attached, or its copy for the active adapter of peft."""
        return pruner_of(self.model) or self.method

    # --- what a subclass says ----------------------------------------------------------------------------------------
    def check(self) -> None:
        """Raise ValueError where the method or the layout does not fit the model."""

    def hook_layers(self) -> None:
        """Put hooks on the layers; their handles go into ``handles``."""

    def begin(self, kwargs: dict) -> Any:
        """The state of a forward with these arguments, which it may change."""
        raise NotImplementedError

    def end(self, call: Any, kwargs: dict, output: Any) -> Any:
        """What a forward returns, of the model's ``output``."""
        return output

    # --- on and off ------------------------------------------------------------------------------------------------
    def attach(self) -> None:
        """Put the hooks on."""
        arch = self.architecture
        if compat.can_set_attention(arch.base):
            arch.base.set_attn_implementation(self.implementation)
        else:
            self.implementation = compat.attention_implementation(arch.base)
        self.inner = arch.base.__dict__.get("forward")
        arch.base.forward = self
        for module in {arch.reader, self.model} if arch.reader is not None else ():
            self.handles.append(module.register_forward_pre_hook(self.before_reader, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self.after_reader, always_call=True))
        self.hook_layers()
        if self.companion is not None:
            self.companion.attach()

    def detach(self) -> None:
        """Take the hooks off: the model is what it was."""
        if self.companion is not None:
            self.companion.detach()
        base = self.architecture.base
        for handle in self.handles:
            handle.remove()
        if compat.can_set_attention(base):
            base.set_attn_implementation(self.original)
        if base.__dict__.get("forward") is self:
            if self.inner is None:
                del base.forward
            else:
                base.forward = self.inner
        elif base.__dict__.get("_old_forward") is self:  # accelerate laid its own forward over this one
            base.__dict__["_old_forward"] = self.inner or MethodType(type(base).forward, base)

    def __setstate__(self, state: dict) -> None:
        """Register the attention function anew: a fresh process knows none of ours."""
        self.__dict__.update(state)
        if self.implementation.startswith(PREFIX):
            register(self.original)

    # --- what belongs to a thread ------------------------------------------------------------------------------------
    @property
    def options(self) -> Options:
        """What this thread asks of its forwards."""
        return getattr(_THREAD, "options", {}).get(self, self.unasked)

    @contextmanager
    def asking(self, **options: Any) -> Iterator[None]:
        """Within the context the forwards of this thread run with other ``Options``."""
        known = _THREAD.__dict__.setdefault("options", {})
        before, known[self] = known.get(self), replace(self.options, **options)
        try:
            yield
        finally:
            if before is None:
                del known[self]
            else:
                known[self] = before

    @property
    def call(self) -> Any:
        """The state of the forward under way in this thread; None: there is none."""
        return getattr(_THREAD, "calls", {}).get(self)

    # --- what the model around it is given ---------------------------------------------------------------------------
    def before_reader(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Look at the arguments of the model that reads pictures, and at the labels of the one around it."""
        prompts, reader = _THREAD.__dict__.setdefault("prompts", {}), self.architecture.reader
        before = prompts.get(self)
        if module is reader:
            names = list(inspect.signature(module.forward).parameters)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            prompts[self] = Prompt(reader, given, None if before is None else before.labels)
        else:
            prompts[self] = Prompt(None, {}, kwargs.get("labels"))

    def after_reader(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forget them, also where a forward raised."""
        getattr(_THREAD, "prompts", {}).pop(self, None)

    @property
    def prompt(self) -> Prompt | None:
        """What the model that reads pictures was given; None: there is none, or it was not called."""
        prompt = getattr(_THREAD, "prompts", {}).get(self)
        return prompt if prompt is not None and prompt.reader is not None else None

    def given_mask(self, kwargs: dict) -> Any:
        """The attention mask that a user gave, of the arguments of a forward."""
        return kwargs.get("attention_mask") if self.prompt is None else self.prompt.given.get("attention_mask")

    # --- one forward -------------------------------------------------------------------------------------------------
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the model that holds the layers."""
        if len(args) <= len(self.inputs):
            args, kwargs = (), {**dict(zip(self.inputs, args, strict=False)), **kwargs}
        if not hasattr(_THREAD, "calls"):
            _THREAD.calls = {}
        call = self.begin(kwargs)
        calls, before = _THREAD.calls, _THREAD.calls.get(self)
        calls[self] = call
        try:
            base = self.architecture.base
            output = type(base).forward(base, *args, **kwargs) if self.inner is None else self.inner(*args, **kwargs)
        finally:
            if before is None:
                del calls[self]
            else:
                calls[self] = before
        return output if call.dense else self.end(call, kwargs, output)

    def check_implementation(self) -> None:
        """Raise RuntimeError where the attention function of the model is no longer ours."""
        base = self.architecture.base
        if compat.attention_implementation(base) != self.implementation:
            raise RuntimeError(
                f"the attention implementation of {self.architecture.name} was changed after prune(), to "
                f"{compat.attention_implementation(base)!r}, so nothing would be pruned; change it before prune()"
            )
