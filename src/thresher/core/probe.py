"""Prove on a model itself that pruning it is right, before it is pruned: a short forward of its first layers.

    keep everything == the dense model          under each layout
    keep half, removed == keep half, hidden     under each layout, states and scores, and in a batch as alone
    hidden tokens change nothing                whatever their states are

A model is a program that others wrote. Whether its attention is causal without saying so, or whether it adds to the
logits what narrowed inputs no longer fit, cannot be read off it with certainty. So a copy of its first layers, which
shares its weights, runs on a few tokens. The half that is kept goes by position, so that rounding cannot change the
choice; it is every other token, so that the kept ones change their places. A fault is far larger than the tolerances.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import compat
from .architecture import find_layers
from .hooks import Hooks
from .pruner import CONFIG_KEY, MODULE, Choice, TokenPruner
from .view import View

LENGTHS = (9, 5, 1)  # of the rows of a text batch: sizes that are rare, and a token that stands alone
INSTANCE = ("forward", "_hf_hook", "_old_forward")  # what a pruner and accelerate set on modules
BINS = ("num_mel_bins", "feature_projection_input_dim")  # of a spectrum, in configurations
FILLED = 300_000_000  # random weights, at most
REMEMBERED = 256  # proofs
_PROOFS: dict[tuple, Proof] = {}
SIDE = 3  # patches, of a picture whose size is free
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 1e-2}
COARSE = 5e-2  # bfloat16, whose rounding alone makes a hundredth


@dataclass(frozen=True)
class Proof:
    """What a probe found."""

    # why a layout does not serve the model, in one line; a layout that serves it is not in it
    faults: dict[str, str] = field(default_factory=dict)
    skipped: str = ""  # why nothing was tried; empty: it was


class EveryOther(TokenPruner):
    """Keep every other token of each row, or every one, and remember what a method would have seen."""

    stride: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.looks: list[Tensor] = []
        self.gone: Tensor | None = None

    def score(self, view: View) -> Tensor:
        if self.needs_attention:
            self.looks.append(view.attention_received()[view.alive])
        if self.needs_values:
            self.looks.append(view.value.transpose(1, 2)[view.alive])
        return -view.tokens.index.double()

    def choose(self, score: Tensor, view: View) -> Choice:
        keep = view.alive & ((view.alive.cumsum(1) - 1) % self.stride == 0)
        self.gone = view.alive & ~keep & ~view.protected
        return Choice(keep)


def settle(hooks: Hooks, prune: Callable, unprune: Callable) -> str:
    """The layout to prune with, in place of ``hooks.layout``, once it has been tried; ``hooks`` are not attached yet.

    Args:
        prune, unprune: the verbs, the first without a trial of its own.

    Raises:
        ValueError: the model cannot be pruned, or not in this layout.
    """
    arch, layout = hooks.architecture, hooks.layout
    packs = ("packed",) if arch.packable and arch.text else ()
    chosen = {"auto": ("padded", *packs), "mask": ()}.get(layout, (layout,))
    proof = proved(hooks, chosen, prune, unprune)
    name = type(arch.base).__name__
    if proof.skipped:
        warnings.warn(f"{name} was pruned without a trial: {proof.skipped}", stacklevel=4)
    if not proof.faults:
        return layout
    if "mask" in proof.faults:
        raise ValueError(f"{name} cannot be pruned: {proof.faults['mask']}")
    if layout == "auto" and "padded" not in proof.faults:
        warnings.warn(
            f"layout='auto' is 'padded' for {name}, since under 'packed' {proof.faults['packed']}", stacklevel=4
        )
        return "padded"
    others = [other for other in ("padded", "packed") if other not in chosen and (other == "padded" or packs)]
    found = proved(hooks, tuple(others), prune, unprune).faults if others else {}
    works = [other for other in (*chosen, *others) if other not in {**proof.faults, **found}]
    hint = f"use layout={works[0]!r}" if works else "layout='mask' works, and saves no time"
    wrong = next(iter(proof.faults))
    raise ValueError(f"layout={layout!r} is not possible with {name}: under {wrong!r} {proof.faults[wrong]}; {hint}")


def proved(hooks: Hooks, layouts: tuple[str, ...], prune: Callable, unprune: Callable) -> Proof:
    """``probe``, once for each class, configuration and structure of a model."""
    base, method = hooks.architecture.base, hooks.method
    config = {k: v for k, v in base.config.to_dict().items() if k != CONFIG_KEY}
    modules = tuple(settings(m, (bool, str, int, float, type(None))) for m in base.modules())
    weight = next(base.parameters())
    where = (weight.dtype, weight.device.type, unfit(base), hooks.original)
    key = (repr(config), modules, where, layouts, method.needs_attention, method.needs_values)
    if key not in _PROOFS:
        if len(_PROOFS) >= REMEMBERED:
            _PROOFS.clear()
        _PROOFS[key] = probe(hooks, layouts, prune, unprune)
    return _PROOFS[key]


def settings(module: nn.Module, kinds: tuple[type, ...]) -> tuple:
    """The class of a module and what is set on it of some ``kinds`` of values, besides its mode."""
    values = ((k, v) for k, v in vars(module).items() if isinstance(v, kinds) and k != "training")
    return (type(module), *sorted(values, key=lambda item: item[0]))


def probe(hooks: Hooks, layouts: tuple[str, ...], prune: Callable, unprune: Callable) -> Proof:
    """Try ``layouts``, of "padded" and "packed", on the model of ``hooks``, of which nothing changes.

    "mask", which they are held against, is tried in any case.
    """
    base, method = hooks.architecture.base, hooks.method
    why = unfit(base)
    if why:
        return Proof(skipped=why)
    devices = sorted({p.device.index for p in base.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cut in (True, False):  # a model may reach for layers by number, and need them all
            try:
                model = structural_copy(hooks, cut)
                batches, dense = dense_states(model)
                break
            except Exception as error:  # whatever a model raises on inputs that were guessed
                why = f"{type(error).__name__}: {error}".split("\n")[0][:160]
        else:
            return Proof(skipped=f"the dense model does not run on the inputs that were made up for it ({why})")
        faults = Trial(model, batches, dense, method, prune, unprune).faults(("mask", *layouts))
        name = next(iter(batches))
        if faults and difference(states_of(model, batches[name]), dense[name]) > 0:
            return Proof(skipped="the dense model does not repeat its own answers")
        return Proof(faults)


@dataclass
class Trial:
    """The runs of one probe, on a copy of the model."""

    model: PreTrainedModel
    batches: dict[str, dict]
    dense: dict[str, Tensor]
    method: TokenPruner
    prune: Callable
    unprune: Callable
    hidden: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None  # states and scores of hidden tokens

    def faults(self, layouts: tuple[str, ...]) -> dict[str, str]:
        """Why layouts do not serve, by their names; without "mask" nothing can be said of the others."""
        faults: dict[str, str] = {}
        for layout in dict.fromkeys(layouts):
            try:
                why = self.fault(layout)
            except Exception as error:  # whatever a model raises once its inputs were narrowed
                why = f"its forward raises {type(error).__name__}: {error}".split("\n")[0][:200]
            if why:
                faults[layout] = why
                if layout == "mask":
                    break
        return faults

    def fault(self, layout: str) -> str:
        """Why one layout does not serve; empty: it does."""
        pruner = EveryOther()
        vars(pruner).update(needs_attention=self.method.needs_attention, needs_values=self.method.needs_values)
        self.prune(self.model, pruner, layout=layout)
        try:
            # where nothing leaves, "padded" is the same as "mask"
            whole, half = {} if layout == "padded" else self.run(pruner, 1)[0], self.run(pruner, 2)
            leak = self.leak(pruner, half[0]) if layout == "mask" else 0.0
        finally:
            self.unprune(self.model)
        self.hidden = self.hidden or half
        for answers, expected, text in (
            (whole, self.dense, "with every token kept its states differ from the dense model's"),
            (half[0], self.hidden[0], "its states with removed and with hidden tokens differ"),
            (half[1], self.hidden[1], "what a method sees of removed and of hidden tokens differs"),
        ):
            for name, answer in answers.items():
                gap = difference(answer, expected[name])
                if gap > self.tolerance:
                    return f"{text} by {gap:.2g} ({name})"
        if leak > self.tolerance:
            return f"tokens that are hidden from its attention change the others by {leak:.2g}"
        return self.dependence(half[0])

    def leak(self, pruner: EveryOther, states: dict[str, Tensor]) -> float:
        """How much a noise on the hidden tokens changes ``states``."""
        name, calls, layers = next(iter(states)), [], find_layers(self.model)[1]

        def disturb(layer: nn.Module, args: tuple, kwargs: dict) -> tuple:
            calls.append(layer)
            if len(calls) != pruner.sites[0] + 2 or pruner.gone is None:
                return args, kwargs
            return (args[0] + pruner.gone[..., None] * args[0].std(), *args[1:]), kwargs

        handles = [layer.register_forward_pre_hook(disturb, with_kwargs=True) for layer in layers]
        try:
            return difference(states_of(self.model, self.batches[name]), states[name])
        finally:
            for handle in handles:
                handle.remove()

    def run(self, pruner: EveryOther, stride: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The states of each batch with every ``stride``-th token kept, and what the method saw."""
        pruner.stride, states, looks = stride, {}, {}
        for name, batch in self.batches.items():
            pruner.looks.clear()
            states[name] = states_of(self.model, batch)
            looks.update({f"{name}, look {place}": look for place, look in enumerate(pruner.looks)})
        return states, looks

    @property
    def tolerance(self) -> float:
        """Of a relative difference, by the type of the states."""
        return TOLERANCE.get(next(iter(self.dense.values())).dtype, COARSE)

    def dependence(self, states: dict[str, Tensor]) -> str:
        """Why a row answers in a batch not as it does alone, where in the dense model it does; empty: it does."""
        together, alone = self.batches
        gaps = []
        for answers in (self.dense, states):
            a, b = answers[together].flatten(0, -2), answers[alone].flatten(0, -2)
            gaps.append(difference(a[: len(b)], b))
        if gaps[0] <= self.tolerance < gaps[1]:
            return f"a row answers in a batch not as it does alone, by {gaps[1]:.2g}"
        return ""


# --- the copy ---------------------------------------------------------------------------------------------------------
def unfit(base: PreTrainedModel) -> str:
    """Why a model cannot be tried here; empty: it can."""
    if any(buffer.is_meta for buffer in base.buffers()):
        return "its buffers are on the meta device"
    quantized = getattr(base, "is_quantized", False) or getattr(base, "hf_quantizer", None) is not None
    if quantized or any("quantized" in type(m).__module__ for m in base.modules()):
        return "its weights are quantised, and rounding of activations depends on the batch"
    return ""


def structural_copy(hooks: Hooks, cut: bool) -> PreTrainedModel:
    """A copy of the model that holds the layers, with the same parameters, modules of its own and no hooks.

    Where ``cut``, of the layers as many are left from the first on as show every kind of them, two at least.
    """
    base, layers = hooks.architecture.base, hooks.architecture.layers
    count = max(kinds_end(layers), hooks.architecture.first_site + 2) if cut else len(layers)
    placeholder, memo = nn.Identity(), cast("dict[int, object]", {id(p): p for p in base.parameters()})
    foreign = [value for m in base.modules() for key, value in vars(m).items() if key in INSTANCE]
    pruner = [module for name, module in base.named_children() if name == MODULE]
    memo.update({id(left_out): placeholder for left_out in (*layers[count:], *foreign, *pruner)})
    model = copy.deepcopy(base, memo).eval()
    model._modules.pop(MODULE, None)
    for module in model.modules():
        for name in INSTANCE:
            module.__dict__.pop(name, None)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, name).clear()
        if isinstance(module, nn.ModuleList) and any(child is placeholder for child in module):
            del module[[child is placeholder for child in module].index(True) :]
    if hasattr(model.config, CONFIG_KEY):
        delattr(model.config, CONFIG_KEY)
    if compat.can_set_attention(model):
        model.set_attn_implementation(hooks.original)
    if cut:
        model.config.num_hidden_layers = min(max(count, 2), base.config.num_hidden_layers)
    fill(model)
    return model


def fill(model: PreTrainedModel) -> None:
    """Put random weights in place of those that lie on the meta device or on another one than the first.

    Raises:
        MemoryError: there are too many of them.
    """
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    away = [p for p in model.parameters() if p.device != device]
    if sum(p.numel() for p in away) > FILLED:
        raise MemoryError("its weights are offloaded, and those of its first layers are many")
    generator = torch.Generator().manual_seed(0)
    fresh = {id(p): torch.randn(p.shape, generator=generator).to(device, p.dtype) for p in away}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in fresh:
                x = fresh[id(parameter)]
                x = x * x.shape[-1] ** -0.5 if x.dim() > 1 else 0.1 * x + ("weight" in name)
                module._parameters[name] = nn.Parameter(x, requires_grad=False)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def kinds_end(layers: list[nn.Module]) -> int:
    """How many layers from the first on show every kind of them: their modules, and what is set on these."""
    seen: dict[tuple, int] = {}
    for place, layer in enumerate(layers):
        kinds = [settings(m, (bool, str)) for m in layer.modules()]
        windows = [getattr(m, "sliding_window", None) is None for m in layer.modules()]
        seen.setdefault((*kinds, *windows), place)
    return min(len(layers), max(2, 1 + max(seen.values())))


# --- inputs and answers -----------------------------------------------------------------------------------------------
def dense_states(model: PreTrainedModel) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """The smallest batches that the model takes, and its states; raises what it raises where it takes none."""
    failure: Exception = ValueError(f"no inputs are known for {model.main_input_name}")
    for batches in inputs_for(model):
        try:
            return batches, {name: states_of(model, batch) for name, batch in batches.items()}
        except Exception as error:
            failure = error
    raise failure


def inputs_for(model: PreTrainedModel) -> Iterator[dict[str, dict]]:
    """Two batches by name, the second of which is the first row of the first; the smallest first."""
    accepted = inspect.signature(model.forward).parameters
    weight = next(p for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    given = {"use_cache": False} if "use_cache" in accepted else {}
    if model.main_input_name == "input_ids":
        size = getattr(model.config, "vocab_size", 100)
        ids = torch.randint(min(5, size - 1), size, (len(LENGTHS), max(LENGTHS)), generator=generator)
        mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long().to(weight.device)
        ids = ids.to(weight.device)
        yield {
            "a padded batch": {"input_ids": ids, "attention_mask": mask, **given},
            "one row": {"input_ids": ids[:1], **given},
        }
        return
    name, resizes = model.main_input_name, "interpolate_pos_encoding"
    if name == "pixel_values" and resizes in accepted and isinstance(model.config.patch_size, int):
        side = SIDE * model.config.patch_size
        x = torch.randn(2, getattr(model.config, "num_channels", 3), side, side, generator=generator)
        x = x.to(weight.device, weight.dtype)
        yield {"a batch": {name: x, resizes: True, **given}, "one of it": {name: x[:1], resizes: True, **given}}
    for shape in shapes_of(model):
        x = torch.randn(2, *shape, generator=generator).to(weight.device, weight.dtype)
        yield {"a batch": {name: x, **given}, "one of it": {name: x[:1], **given}}


def shapes_of(model: PreTrainedModel) -> Iterator[tuple[int, ...]]:
    """Shapes of one input that is no text: a picture, a sound or its spectrum."""
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        shape = (getattr(config, "num_channels", 3), *(size if isinstance(size, (tuple, list)) else (size, size)))
        yield shape
        yield (getattr(config, "num_frames", 2), *shape)
    elif model.main_input_name == "input_values":
        yield (6400,)  # 0.4 s: 19 frames
        yield (getattr(config, "max_length", None) or 32, config.num_mel_bins)
    elif model.main_input_name == "input_features":
        bins = next((x for name in BINS if isinstance(x := getattr(config, name, None), int)), 80)
        yield (bins, 2 * getattr(config, "max_source_positions", 16))
        yield (32, bins)


def states_of(model: PreTrainedModel, batch: dict) -> Tensor:
    """The last states of the real tokens: (T, C) of a text, (B, N, C) of anything else."""
    output = model(**batch)
    states = output[0] if isinstance(output, tuple) else output.get("last_hidden_state", next(iter(output.values())))
    if "attention_mask" in batch and states.shape[:2] == batch["attention_mask"].shape:
        return states[batch["attention_mask"].bool()]
    return states.flatten(0, 1) if "input_ids" in batch and states.dim() == 3 else states


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative where values are larger than 1; infinite where it is not a number."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.float(), b.float()
    gap = ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
    return float("inf") if gap != gap else gap
