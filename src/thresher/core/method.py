"""What every method is, whatever it prunes: a named dataclass, an entry in config.json, a submodule of its model.

``TokenPruner`` (core/pruner.py) shortens what passes the layers, ``CachePruner`` (caches) what a decoder keeps of them.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import dataclass_transform

from .architecture import Architecture

VERSION = 1
CONFIG_KEY = "token_pruning"  # of a model's configuration
MODULE = "token_pruner"  # the name of the method among the modules of the model that it prunes
METHODS: dict[str, Any] = {}  # the class of each name
PLACES = ("methods", "caches")  # packages of thresher that make their methods known when they are imported


@dataclass_transform(eq_default=False, field_specifiers=(dataclasses.field,))
@dataclass(eq=False, repr=False)
class Pruner(nn.Module):
    """A method. Its fields are its configuration, its parameters ride in the model's weights, and each subclass is a
    dataclass that its ``name`` registers."""

    name: ClassVar[str] = ""
    layouts: ClassVar[tuple[str, ...]] = ()  # that ``prune`` takes, besides "auto"
    learned: ClassVar[tuple[str, ...]] = ()  # fields that training or calibration changes; the state dict has them
    pooling = "put-back"  # what pools an embedder's states; a field where a method has a say in it

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        dataclass(eq=False, repr=False)(cls)
        name = cls.__dict__.get("name")
        if not name:
            return
        taken = METHODS.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the name {name!r} belongs to {taken.__module__}.{taken.__qualname__}: choose another")
        METHODS[name] = cls

    def __post_init__(self) -> None:
        super().__init__()
        self.architecture: Architecture = None  # type: ignore[assignment]  # until bind()
        self.hooks: Any = None  # the Attachment, while it prunes a model

    def bind(self, model: Architecture) -> None:
        """Fit the method to a model. Raises ValueError where it does not."""
        self.architecture = model

    def attachment(self, model: PreTrainedModel, layout: str, original: str | None = None) -> Any:
        """The ``Attachment`` that runs this method in ``model``; ``original``: the model's own attention function.

        Raises:
            ValueError: the method cannot serve the model.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it prunes")

    def attached(self) -> Any:
        """The hooks (``Attachment``) of the model that it prunes.

        Raises:
            RuntimeError: it prunes none.
        """
        if self.hooks is None:
            raise RuntimeError(f"this {type(self).__name__} prunes no model: prune() one first")
        return self.hooks

    # --- the configuration ---------------------------------------------------------------------------------------
    def to_dict(self) -> dict:
        """What config.json gets; ``from_dict`` takes it back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"method": self.name, "version": VERSION, **fields}

    @staticmethod
    def from_dict(config: Mapping) -> Any:
        """The method a configuration describes; keys it does not know are ignored.

        Raises:
            ValueError: unknown method, a newer version or values that the method cannot take.
        """
        entry = "the token_pruning entry of config.json"
        if not isinstance(config, Mapping):
            raise ValueError(f"{entry} is {config!r}: expected an object with the method's name and values")
        version = config.get("version", VERSION)
        if not isinstance(version, int) or version > VERSION:
            raise ValueError(f"{entry} has version {version!r}, this thresher reads up to {VERSION}: update thresher")
        if config.get("method") not in METHODS:
            find_methods()
        if config.get("method") not in METHODS:
            raise ValueError(f"unknown pruning method {config.get('method')!r}; known: {', '.join(sorted(METHODS))}")
        method = METHODS[config["method"]]
        known = {f.name for f in dataclasses.fields(method)}
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
        try:
            made = method(**method.completed(fields))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{entry} is nothing that {method.__name__} can take: {error}") from error
        if config.get("cache") is not None:  # what prunes the cache of the tokens that are left
            made.cache = Pruner.from_dict(config["cache"])
        return made

    @classmethod
    def completed(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of an entry, with what an older version of the method did where the entry lacks a field."""
        return fields

    def get_extra_state(self) -> Tensor:
        """``to_dict`` as JSON, (bytes,) uint8: weight files hold tensors alone."""
        return torch.frombuffer(bytearray(json.dumps(self.to_dict()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the fields in ``learned``. Raises ValueError where it cannot be read; see ``adopt``."""
        self.adopt(read_state(state))

    def adopt(self, entry: Mapping) -> None:
        """Take over the fields in ``learned`` from what ``to_dict`` said; what else a user chose stays as it is.

        Raises:
            ValueError: it is of another method.
        """
        method = Pruner.from_dict(entry)
        if method.name != self.name:
            raise ValueError(f"what was saved is of {method.name}, the model is pruned with {self.name}")
        for name in self.learned:
            setattr(self, name, getattr(method, name))

    def _apply(self, fn: Callable, recurse: bool = True) -> Pruner:
        """Move to another device, never to another precision: a threshold rounded to bfloat16 is another threshold."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)

    def train(self, mode: bool = True) -> Pruner:
        """As in torch; raises RuntimeError where peft has frozen the method and trains the rest of the model."""
        model = self.hooks.model if mode and self.hooks is not None else None
        if model is not None and pruner_of(model) is self and not all(p.requires_grad for p in self.parameters()):
            adapted = any(hasattr(module, "adapter_layer_names") for module in model.modules())
            if adapted and any(parameter.requires_grad for parameter in model.parameters()):
                raise RuntimeError(
                    f"peft has frozen the parameters of {self.name} and would not save them: prune() after "
                    "get_peft_model, or give its configuration modules_to_save=['token_pruner']"
                )
        return super().train(mode)

    def __deepcopy__(self, memo: dict) -> Pruner:
        """Copy the method with the model that it prunes, or alone: its copy is then free for another model."""
        state = dict(self.__dict__)
        alone = self.hooks is not None and id(self.hooks.model) not in memo
        shared = {"hooks": state.pop("hooks")} if alone else {}
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(state, memo), **shared)
        return copied

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.to_dict().items() if k not in ("method", "version"))


def find_methods() -> None:
    """Make the methods of all rooms known by name."""
    for place in PLACES:
        import_module(f"..{place}", __package__)


def pruner_of(model: nn.Module) -> Any:
    """The method that prunes ``model``, a ``TokenPruner`` or another ``Pruner``; None where nothing does.

    peft's ``modules_to_save`` puts a wrapper in its place, with a copy for each adapter: the active one's acts. It is
    handed what was set on the wrapper.
    """
    module = getattr(model, MODULE, None)
    if module is None or isinstance(module, Pruner):
        return module
    active = [] if module.disable_adapters else [n for n in module.active_adapters if n in module.modules_to_save]
    method = module.modules_to_save[active[0]] if active else module.original_module
    for name in [name for name in vars(module) if not name.startswith("_") and name != "training"]:
        setattr(method, name, vars(module).pop(name))
    return method


def pruner_in(model: nn.Module) -> Any:
    """The method that prunes ``model``. Raises ValueError where nothing does."""
    pruner = pruner_of(model)
    if pruner is None:
        raise ValueError(f"{type(model).__name__} is not pruned: prune() it first")
    return pruner


def read_state(state: Tensor) -> dict:
    """What ``Pruner.get_extra_state`` wrote."""
    try:
        return json.loads(bytes(state.tolist()))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the state of the token pruner is no JSON ({error})") from error
