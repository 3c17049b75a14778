"""The verbs: prune, unprune, dense."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from . import methods  # noqa: F401  makes the methods known by name
from .checkpoint import CONFIG_KEY, EXTRA, MODULE, Entry
from .core.hooks import Hooks
from .core.layouts import LAYOUTS
from .core.pruner import TokenPruner


def prune(model: PreTrainedModel, method: TokenPruner | None = None, *, layout: str = "auto") -> PreTrainedModel:
    """Prune the tokens of ``model`` while it runs; in place, reversible by ``unprune``.

    Args:
        model: any transformers model with a stack of attention layers.
        method: e.g. ``LTP(target_flops=0.4)`` or ``TopK(keep=0.5)``. None: what the model's config.json says, with the
            parameters that lie in its weights.
        layout: "mask" hides dropped tokens (reference), "padded" shortens to the widest row, "packed" has no padding
            at all; "auto" takes mask while a method trains softly, else packed where the model allows, else padded.
            Not saved.

    Returns:
        The same model; the method is its submodule ``token_pruner``, which carries the ``report`` of the last forward.

    Raises:
        ValueError: unknown layout or layer, a model without layers, a configuration that cannot be read.
        TypeError: ``model`` or ``method`` is something else.

    Example:
        >>> model = AutoModelForSequenceClassification.from_pretrained("my-classifier")
        >>> prune(model, TopK(keep=0.5))
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"prune() takes a transformers model, got {type(model).__name__}")
    if isinstance(method, type) or not (method is None or isinstance(method, TokenPruner)):
        raise TypeError(f"prune() takes a method such as TopK(keep=0.5), got {method!r}")
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: expected auto, {', '.join(LAYOUTS)}")
    weights = None
    if method is None:
        config = getattr(model.config, CONFIG_KEY, None)
        if config is None:
            raise ValueError(
                f"{type(model).__name__} has no {CONFIG_KEY} entry in its config.json: name a method to prune() with"
            )
        method = TokenPruner.from_dict(config)
        weights = saved_weights(model)
    before = getattr(model, MODULE, None)
    hooks = Hooks(model, method, layout, None if before is None else before.hooks.original)
    method.bind(hooks.info)
    if weights is not None:
        found, expected = (
            {k: tuple(v.shape) for k, v in d.items() if k != EXTRA} for d in (weights, method.state_dict())
        )
        if found != expected:
            raise ValueError(
                f"corrupted checkpoint: it holds {found} of the pruner's weights, {method.name} needs {expected}"
            )
        method.load_state_dict(weights, strict=False)
    if before is not None:  # only now, when nothing can be refused any more
        warnings.warn(f"the model was pruned with {before.name}; {method.name} replaces it", stacklevel=2)
        unprune(model)
    parameter = next(model.parameters())
    model.token_pruner = method.to(parameter.device)
    method.train(model.training)
    method.hooks = hooks
    hooks.attach()
    setattr(model.config, CONFIG_KEY, Entry(model))
    return model


def saved_weights(model: PreTrainedModel) -> dict:
    """The pruner's tensors in the checkpoint that ``model`` was loaded from; safetensors only."""
    source = model.config._name_or_path
    found = {}
    for name in _weight_files(source):
        try:
            with safe_open(name, framework="pt") as file:
                own = [key for key in file.keys() if key.startswith(f"{MODULE}.")]  # noqa: SIM118  it is no dictionary
                found.update({key.removeprefix(f"{MODULE}."): file.get_tensor(key) for key in own})
        except (SafetensorError, OSError) as error:
            raise ValueError(f"corrupted checkpoint: {name} cannot be read ({error})") from error
    return found


def _weight_files(source: str) -> list[str]:
    if not source:  # built from a configuration
        return []
    if os.path.isdir(source):
        names = sorted(n for n in os.listdir(source) if n.endswith(".safetensors"))
        return [os.path.join(source, n) for n in names]
    if cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False):
        raise ValueError(f"{source} is sharded on the hub: download it first and load it from the folder")
    file = cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    return [file] if file else []


def unprune(model: PreTrainedModel) -> PreTrainedModel:
    """Take the pruning off again: the model is what it was. Raises ValueError if it is not pruned."""
    pruner = getattr(model, MODULE, None)
    if pruner is None:
        raise ValueError(f"{type(model).__name__} is not pruned")
    pruner.hooks.detach()
    del model.token_pruner
    if hasattr(model.config, CONFIG_KEY):
        delattr(model.config, CONFIG_KEY)
    return model


@contextmanager
def dense(model: PreTrainedModel, *, unpadded: bool = False) -> Iterator[PreTrainedModel]:
    """Within the context nothing is pruned.

    Args:
        unpadded: keep the layout at work, with every token kept: under packed the dense model without its padding,
            which is what pruning has to be compared with.

    Example:
        >>> with dense(model):
        ...     reference = model(**batch).logits
    """
    pruner = getattr(model, MODULE, None)
    if pruner is None:
        raise ValueError(f"{type(model).__name__} is not pruned: it is dense already")
    before, pruner.hooks.mode = pruner.hooks.mode, "unpadded" if unpadded else "dense"
    try:
        yield model
    finally:
        pruner.hooks.mode = before
