"""The verbs: prune, unprune, dense."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from . import methods  # noqa: F401  makes the methods known by name
from .caches.behind import companion
from .caches.pruner import CachePruner
from .checkpoint import Entry, Stored, load_into, stored_at, stored_with, tensors_of
from .core.architecture import Architecture
from .core.attachment import Attachment
from .core.compat import execution_device, flattens_inputs, mask_survivors, pooled_alone, transformer_module
from .core.hooks import Hooks
from .core.method import CONFIG_KEY, MODULE, Pruner, pruner_in, pruner_of
from .core.probe import settle
from .core.pruner import SURVIVORS, TokenPruner, query_of

Model = TypeVar("Model", bound=nn.Module)


def prune(
    model: Model,
    method: Pruner | None = None,
    *,
    cache: CachePruner | None = None,
    layout: str = "auto",
    checkpoint: str | Path | None = None,
    check: bool = True,
) -> Model:
    """Prune the tokens of ``model``, or its KV cache, while it runs; in place, reversible by ``unprune``.

    Args:
        model: any transformers model with a stack of attention layers; or a PEFT model around one, whose active adapter
            the method is then trained, saved and loaded with; a SentenceTransformer, CrossEncoder or
            MultiVectorEncoder. In a CrossEncoder of one number the query stays, and all else for a third of the layers.
        method: e.g. ``TopK(keep=0.5)``, or ``SnapKV(keep=0.25)`` for the KV cache of a decoder; it prunes one model.
            None: what the model's config.json says, with the weights' parameters.
        cache: e.g. ``SnapKV(keep=0.5)``, beside a method for tokens: entries leave the cache of those that are left.
        layout: "mask" hides what is dropped (reference), "padded" shortens to the widest row, "packed" has no padding;
            "auto": mask in soft training, else packed if possible, else padded. Caches: "mask", "evict". Not saved.
        checkpoint: the folder with the pruner's weights, where these did not come with ``model``.
        check: try the first layers on a few tokens before, and refuse what answers wrongly.

    Returns: the same model; the method is its submodule ``token_pruner``, with the ``report`` of the last forward.

    Raises:
        ValueError: a layout, layer, model, method or checkpoint that does not serve; the model is as it was before.

    Example:
        >>> model = prune(AutoModelForSequenceClassification.from_pretrained("my-classifier"), TopK(keep=0.5))
    """
    target = inner_model(model)
    _check_method(method, cache)
    before, entry = pruner_of(target), None
    stored = None if checkpoint is None else stored_at(checkpoint, _weights_of(target))
    if method is None:
        entry = _saved_entry(model, target, stored)
        method = Pruner.from_dict(entry)
    _check_layout(method, layout)
    _check_free(method, model, target)
    hooks = method.attachment(target, layout, None if before is None else before.attached().original)
    with_cache = _accompany(hooks, cache, model)
    with _free_if_refused(method):
        if method is not before:
            _suit_pairs(method, model, hooks.architecture, saved=entry is not None or checkpoint is not None)
            _bind(method, hooks.architecture)
        if entry is not None and stored is None and tensors_of(method):
            stored = stored_with(target, _weights_of(target))
        if stored is not None:
            if checkpoint is not None and stored.entry is not None:
                method.adopt(stored.entry)
            load_into(method, stored)
        if check and hooks.tried:
            hooks.layout = settle(hooks, partial(prune, check=False), unprune)
    if before is not None and before is not method:
        warnings.warn(f"the model was pruned with {before.name}; {method.name} replaces it", stacklevel=2)
    own_configuration(model)
    _exchange(hooks, None if before is None else before.hooks)
    _place(model, target, hooks, with_cache)
    return model


def _check_method(method: Any, cache: Any) -> None:
    """Raise TypeError where ``prune`` is given no method, ValueError where two do not go together."""
    if isinstance(method, type) or not (method is None or isinstance(method, Pruner)):
        raise TypeError(f"prune() takes a method such as TopK(keep=0.5), got {method!r}")
    if cache is not None and not isinstance(cache, CachePruner):
        raise TypeError(f"cache= takes a method that prunes a KV cache, as SnapKV(keep=0.5), got {cache!r}")
    if cache is not None and not isinstance(method, TokenPruner):
        raise ValueError(
            "cache= goes with a method that prunes tokens, as TopK(keep=0.5); a cache alone is pruned by "
            f"prune(model, {type(cache).__name__}(...))"
        )


def _accompany(hooks: Attachment, cache: CachePruner | None, model: nn.Module) -> CachePruner | None:
    """Have the caches of a decoder kept in order where tokens leave; returns what prunes them besides, bound: ``cache``
    or the method's own. Raises ValueError where that cannot be."""
    if not isinstance(hooks, Hooks):
        return None
    cache = cache or hooks.method.cache
    if cache is not None:
        _check_free(cache, model, hooks.model)
    hooks.companion = companion(hooks, cache)
    if cache is not None:
        cache.bind(hooks.architecture)
    return cache


def _check_layout(method: Pruner, layout: str) -> None:
    """Raise ValueError where a method has no such layout."""
    if layout != "auto" and layout not in method.layouts:
        raise ValueError(f"layout={layout!r}: expected auto, {', '.join(method.layouts)}")


@contextmanager
def _free_if_refused(method: Pruner) -> Iterator[None]:
    """Within the context a refusal leaves a method that prunes nothing yet as it was."""
    before = {name: getattr(method, name) for name in ("architecture", *(f.name for f in fields(method)))}
    try:
        yield
    except ValueError:
        if before["architecture"] is None:
            for name, value in before.items():
                setattr(method, name, value)
        raise


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside what was given: the model itself, the one that a PEFT model adapts, the one that a
    model of sentence-transformers begins with.

    Raises:
        TypeError: there is none.
        ValueError: it is given texts in a form that cannot be pruned.
    """
    first = transformer_module(model)
    if first is not None and flattens_inputs(first):
        raise ValueError(
            f"this {type(model).__name__} hands its model all texts of a batch as one row, which cannot be pruned: "
            "open it with model_kwargs={'attn_implementation': 'sdpa'}, or set model[0].can_flatten_inputs = False"
        )
    inner: Any = model if first is None else first.auto_model
    unwrap = getattr(inner, "get_base_model", None)
    inner = unwrap() if callable(unwrap) else inner
    if not isinstance(inner, PreTrainedModel):
        what = f"got {type(model).__name__}" if first is None else f"this {type(model).__name__} holds none"
        raise TypeError(f"prune() takes a transformers model, or PEFT or sentence-transformers around one; {what}")
    return inner


def _method_of(model: nn.Module) -> Any:
    """The method that prunes a model, or what is inside of it; None where nothing does."""
    pruner = pruner_of(model)
    return pruner if pruner is not None or isinstance(model, PreTrainedModel) else pruner_of(inner_model(model))


def _suit_pairs(method: Pruner, model: nn.Module, info: Architecture, saved: bool) -> None:
    """Give a method the defaults for a CrossEncoder of one number, which tells how well a text answers a query.

    One that was ``saved`` prunes as it did."""
    first, separator = transformer_module(model), getattr(getattr(model, "tokenizer", None), "sep_token_id", None)
    if (
        saved
        or not isinstance(method, TokenPruner)
        or first is None
        or separator is None
        or first.auto_model is info.base
        or inner_model(model).config.num_labels != 1
    ):
        return
    method.protect = query_of(separator, method.protect).get("protect", method.protect)
    several = any(isinstance(getattr(method, name, None), (tuple, list)) for name in ("keep", "schedule"))
    if method.at is None and not several:  # a value for each of the usual sites
        usual = method.default_at(info)
        method.at = tuple(layer for layer in usual if layer >= info.depth // 3) or usual


def survivors_alone(module: Any, args: Any, answer: dict) -> None:
    """Have what follows the first module of an embedder pool the survivors alone. A forward hook."""
    pruner = pruner_in(inner_model(module.auto_model))
    if pruner.attached().options.mode != "dense":
        mask_survivors(answer, cast("Tensor", pruner.last_record().token_mask))


def _weights_of(target: PreTrainedModel) -> str | None:
    """The digest of the pruner's tensors, by the model's configuration."""
    entry = getattr(target.config, CONFIG_KEY, None)
    return entry.get("weights") if isinstance(entry, Mapping) else None


def _saved_entry(model: nn.Module, target: PreTrainedModel, stored: Stored | None) -> Mapping:
    """What a checkpoint says of the method: the one that was named, or the model's own."""
    if stored is not None and stored.entry is not None:
        return stored.entry
    brought = [name for adapter in _adapters(model).values() for name in adapter.modules_to_save or ()]
    if MODULE in brought and stored is None and pruner_of(target) is None:
        raise ValueError(
            f"the adapter brings a {MODULE} of its own, which was not loaded: prune() the model before "
            "PeftModel.from_pretrained, or pass checkpoint=, the adapter's folder"
        )
    if not hasattr(target.config, CONFIG_KEY):
        raise ValueError(
            f"{type(target).__name__} has no {CONFIG_KEY} entry in its config.json: name a method to prune() with, or "
            "pass checkpoint=, the folder of a pruned model"
        )
    return getattr(target.config, CONFIG_KEY)


def _check_free(method: Pruner, model: nn.Module, target: PreTrainedModel) -> None:
    """Raise ValueError where a method prunes another model, says nothing of this one's pooling, or an adapter of
    ``model`` could not save it."""
    alone = pooled_alone(model) if method.pooling == SURVIVORS and transformer_module(model) is not None else []
    if alone:
        raise ValueError(f"pooling='survivors' is for means: this {type(model).__name__} pools {', '.join(alone)}")
    other = None if method.hooks is None else method.hooks.model
    if other not in (None, target) and method in (pruner_of(other), getattr(pruner_of(other), "cache", None)):
        raise ValueError(
            f"this {type(method).__name__} prunes another model, a {type(other).__name__}: "
            "prune with copy.deepcopy of it"
        )
    for adapter in _adapters(model).values():
        if not hasattr(adapter, "modules_to_save"):
            kind = type(adapter).__name__
            raise ValueError(f"an adapter of {kind} saves no module beside its own: prune the model without it")


def _bind(method: Pruner, info: Architecture) -> None:
    """Fit a method to a model; what one that is fitted has learned is kept where it fits this model, too."""
    if method.architecture is None or not tensors_of(method):
        method.bind(info)
    elif not method.architecture.fits(info):
        raise ValueError(
            f"this {type(method).__name__} has learned for another model, a {method.architecture.name} with "
            f"{method.architecture.depth} layers: make a new one for this {info.name}"
        )


def _exchange(hooks: Attachment, before: Attachment | None) -> None:
    """Attach ``hooks`` in place of those ``before``; where that is refused, these are attached again."""
    if before is not None:
        before.detach()
    try:
        hooks.attach()
    except Exception:
        hooks.detach()
        if before is not None:
            before.attach()
        raise


def own_configuration(model: nn.Module) -> None:
    """Give a model configurations of its own, since others may have been built from the same object."""
    memo: dict = {}
    for module in model.modules():
        if isinstance(vars(module).get("config"), PreTrainedConfig):
            module.config = copy.deepcopy(module.config, memo)


def _place(model: nn.Module, target: PreTrainedModel, hooks: Attachment, cache: CachePruner | None) -> None:
    """Make a method, with what prunes the cache besides, a submodule of its model, on the device that this runs on, and
    name it in the configuration."""
    method, before = hooks.method, pruner_of(target)
    if cache is not None:
        method.cache, cache.hooks = cache, hooks.companion
    if before is not None:
        before.hooks = None
    method.hooks = hooks
    if before is not method:
        method.to(execution_device(target))
        method.train(target.training)
        setattr(target, MODULE, method)
    if _adapters(model) and getattr(target, MODULE) is method:
        _save_with_adapters(model, target, method)
    setattr(target.config, CONFIG_KEY, Entry(target))
    outer = transformer_module(model)
    if outer is not None and method.pooling == SURVIVORS:
        hooks.handles.append(outer.register_forward_hook(survivors_alone))


def _save_with_adapters(model: nn.Module, target: PreTrainedModel, method: TokenPruner) -> None:
    """Have peft train and save the method with the adapters of ``model``, as ``modules_to_save`` does."""
    from peft.utils import ModulesToSaveWrapper

    adapters, adapted = _adapters(model), cast("Any", model)
    names = list(adapters)
    active = adapted.active_adapters() if callable(adapted.active_adapters) else adapted.active_adapters
    wrapper = ModulesToSaveWrapper(copy.deepcopy(method), names[0])
    for name in names:
        config = adapters[name]
        wrapper.update(name)
        config.modules_to_save = [*dict.fromkeys((*(config.modules_to_save or ()), MODULE))]
    wrapper.modules_to_save[active[0]] = method
    wrapper.set_adapter(active[0], inference_mode=adapters[active[0]].inference_mode)
    setattr(target, MODULE, wrapper)


def _adapters(model: nn.Module) -> dict:
    """peft's configurations of the adapters of ``model`` by their names; empty where it has none."""
    return getattr(model, "peft_config", None) or {}


def unprune(model: Model) -> Model:
    """Take the pruning off again: the model is what it was. Raises ValueError if it is not pruned."""
    target = inner_model(model)
    pruner = pruner_of(target)
    if pruner is None:
        raise ValueError(f"{type(model).__name__} is not pruned")
    pruner.attached().detach()
    pruner.hooks = None
    if getattr(pruner, "cache", None) is not None:
        pruner.cache.hooks = None
    delattr(target, MODULE)
    for adapter in _adapters(model).values():
        if MODULE in (getattr(adapter, "modules_to_save", None) or ()):
            adapter.modules_to_save.remove(MODULE)
    if hasattr(target.config, CONFIG_KEY):
        delattr(target.config, CONFIG_KEY)
    return model


@contextmanager
def dense(model: Model, *, unpadded: bool = False) -> Iterator[Model]:
    """Within the context nothing is pruned, in this thread.

    Args:
        unpadded: keep the layout at work, with every token kept: under packed the dense model without its padding.

    Example:
        >>> with dense(model):
        ...     reference = model(**batch).logits
    """
    pruner = _method_of(model)
    if pruner is None:
        raise ValueError(f"{type(model).__name__} is not pruned: it is dense already")
    with pruner.attached().asking(mode="unpadded" if unpadded else "dense"):
        yield model


@contextmanager
def calling(model: Model, *, protect: Tensor | None = None, counts: Tensor | None = None) -> Iterator[Model]:
    """Within the context the calls of this thread have a say in which tokens stay.

    Args:
        protect: (B, N) bool, tokens of this batch that never leave, in place of the method's own.
        counts: (B, S) long, how many tokens each row keeps at each site, for ``keep="replay"``.

    Example:
        >>> with calling(model, protect=batch["input_ids"] == tokenizer.sep_token_id):
        ...     logits = model(**batch).logits
    """
    pruner = _method_of(model) or pruner_in(model)
    with pruner.attached().asking(protect=protect, counts=counts):
        yield model
