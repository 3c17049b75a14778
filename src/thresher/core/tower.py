"""What a tower thought of its patches: the attention that they receive in one of its layers, as a score of each token
of the prompt that is made of them.

A function is registered on the tower alone ("watched|sdpa"); the language model keeps its own. Patches become tokens in
a way that each family has: as they are; the mean of neighbours in a row or a square; in windows; tiles put together
with newlines. Scores go the same way, the last one through the model's own function.

Shapes: P pictures of one run of the tower, n patches of each, T tokens that they become.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import compat
from .architecture import attention_block, find_layers, prefix_length
from .pictures import AUDIO, KINDS, Prompt
from .scoring import Logits, columns, reduce_over_heads

PREFIX = "watched|"
WATCHER = "tower_watch"  # on the attention module that is watched
GETTERS = ("get_image_features", "get_video_features")  # of a reader: from pictures to tokens
PACKER = "pack_image_features"  # of a reader: from tiles to tokens
REMEMBERED = 64  # runs
FUNCTIONS = ("sdpa", "eager")
_THREAD = threading.local()  # .runs: {Watch: deque of Run} of the running thread


@dataclass(eq=False)
class Run:
    """One run of a tower.

    Attributes:
        scores: of each call of the layer's attention (P, n).
        grid: (P, 3) long, frames, rows and columns of patches of each picture, where the tower is given that.
        order: (T,) long, the places in which the layer has its tokens, where these are windows.
        packed: (T,) the scores of tokens, once the model has put its tiles together.
        tokens: how many they become; None: nobody said.
    """

    grid: Tensor | None = None
    order: Tensor | None = None
    scores: list[Tensor] = field(default_factory=list)
    packed: Tensor | None = None
    tokens: int | None = None

    def of_tokens(self, count: int) -> Tensor:
        """(T,) fp32: the score of each token, of ``count`` where nobody said how many there are.

        Raises:
            ValueError: it is not known how patches become tokens.
        """
        if self.packed is not None:
            return self.packed
        wanted, flat = self.tokens or count, torch.cat([score.flatten() for score in self.scores])
        share, rest = divmod(len(flat), wanted)
        if rest or share < 1:
            raise ValueError(f"{len(flat)} patches of the tower became {wanted} tokens, in a way that is not known")
        if share == 1:
            return flat
        side, patches = math.isqrt(share), self.scores[0].shape[-1]
        square = math.isqrt(patches)
        if self.grid is None and side * side == share and square * square == patches and square % side == 0:
            grid = flat.view(-1, square // side, side, square // side, side)
            return grid.mean((2, 4)).flatten()
        means = flat.view(wanted, share).mean(1)
        return means if self.order is None else means[self.order.argsort()]


class Watch:
    """Watch a layer of the towers of a reader, in every thread.

    Raises:
        ValueError: there is no tower, or its attention cannot be watched.
    """

    def __init__(self, reader: PreTrainedModel, language: PreTrainedModel, layer: int = -2):
        self.reader = reader
        inner = {id(module) for module in language.modules()}
        children = [m for m in reader.children() if isinstance(m, PreTrainedModel)]
        self.towers = [m for m in children if not any(id(part) in inner for part in m.modules())]
        if not self.towers:
            raise ValueError(f"no tower was found in {type(reader).__name__}, whose scores are asked for")
        self.watched = [self.find(tower, layer) for tower in self.towers]
        self.originals = [compat.attention_implementation(tower) for tower in self.towers]
        for name in self.originals:
            if name.removeprefix(PREFIX) not in FUNCTIONS:
                raise ValueError(
                    f"the tower of {type(reader).__name__} runs {name!r}, which shows no scores: load the model with "
                    f"attn_implementation={' or '.join(map(repr, FUNCTIONS))} for it"
                )
        self.handles: list = []

    def find(self, tower: PreTrainedModel, layer: int) -> tuple[nn.Module, int]:
        """The attention module of a layer, and how many class and register tokens come before the patches."""
        layers = find_layers(tower)[1]
        block = layers[max(layer, -len(layers))]
        cores = [
            m for m in block.get_submodule(attention_block(block)).modules() if compat.calls_attention_interface(m)
        ]
        if not cores:
            raise ValueError(f"the attention of {type(tower).__name__} shows no scores")
        return cores[0], prefix_length(tower)

    # --- on and off ------------------------------------------------------------------------------------------------
    def attach(self) -> None:
        """Begin to watch."""
        for tower, (module, prefix), original in zip(self.towers, self.watched, self.originals, strict=True):
            module.__dict__[WATCHER] = (self, prefix)
            tower.set_attn_implementation(register(original.removeprefix(PREFIX)))
            self.handles.append(tower.register_forward_pre_hook(self.begin, with_kwargs=True))
        for name in (*GETTERS, PACKER):
            if hasattr(type(self.reader), name):
                self.reader.__dict__[name] = Overheard(self, name)

    def detach(self) -> None:
        """Leave everything as it was."""
        for handle in self.handles:
            handle.remove()
        for tower, (module, _), original in zip(self.towers, self.watched, self.originals, strict=True):
            module.__dict__.pop(WATCHER, None)
            tower.set_attn_implementation(original)
        for name in (*GETTERS, PACKER):
            self.reader.__dict__.pop(name, None)

    # --- one run ---------------------------------------------------------------------------------------------------
    @property
    def runs(self) -> deque[Run]:
        """The last runs of this thread."""
        known = _THREAD.__dict__.setdefault("runs", WeakKeyDictionary())
        return known.setdefault(self, deque(maxlen=REMEMBERED))

    def begin(self, tower: nn.Module, args: tuple, kwargs: dict) -> None:
        """A tower runs."""
        given = {**dict(zip(inspect.signature(tower.forward).parameters, args, strict=False)), **kwargs}
        grid = given.get("grid_thw")
        self.runs.append(Run(grid, None if grid is None else compat.window_order(tower, grid)))

    @torch.no_grad()
    def look(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, prefix: int) -> None:
        """The layer attends: (P, H, N, d) ``query`` and ``key``. The score of a patch is the attention of the class
        token, or where there is none that of all patches."""
        if not self.runs:
            return
        asking = query[:, :, :1] if prefix else query
        votes = torch.ones(asking.shape[0], asking.shape[2], device=query.device)
        bias = mask
        if mask is not None:
            mask = mask[..., :1, :] if prefix and mask.shape[-2] > 1 else mask
            bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min) if mask.dtype == torch.bool else mask.float()
        score = reduce_over_heads(asking, key, bias, votes, Logits(scaling), columns)
        self.runs[-1].scores.append(score[:, prefix:] if prefix else score)

    def pack(self, features: Any, args: tuple, kwargs: dict) -> None:
        """The reader puts tiles together: so are their scores."""
        run = self.runs[-1]
        flat, pieces = torch.cat(run.scores), []
        for tiles in torch.split(flat, [len(feature) for feature in features]):
            pieces.append(tiles[..., None])
        if any(a.shape[1] != b.shape[1] for a, b in zip(pieces, features, strict=True)):
            raise ValueError("tiles whose patches were merged before they are put together are not known")
        newline = kwargs.get("image_newline")
        given = {**kwargs, "image_newline": None if newline is None else -flat.new_ones(1)}
        packed = getattr(type(self.reader), PACKER)(self.reader, pieces, *args, **given)[0]
        run.packed = torch.cat([piece.flatten() for piece in packed])

    # --- what a prompt is told -----------------------------------------------------------------------------------
    def scores(self, prompt: Prompt, placeholders: dict[str, int]) -> Tensor:
        """(B, N0) fp32: the score of each token of a picture; 0 elsewhere.

        Raises:
            ValueError: the tower did not run for this prompt.
        """
        found = torch.zeros(prompt.ids.shape, device=prompt.ids.device)
        masks = {kind: prompt.ids == placeholders[kind] for kind in KINDS if kind in placeholders}
        masks = {kind: mask for kind, mask in masks.items() if bool(mask.any())}
        if len(self.runs) < len(masks):
            raise ValueError("the tower did not run: give the model the pictures, and not what was made of them")
        runs = list(self.runs)[-len(masks) :] if masks else []
        self.runs.clear()
        for (kind, mask), run in zip(masks.items(), runs, strict=True):
            counts = mask.sum(1).tolist()
            scores = run.of_tokens(sum(counts)).to(found)
            times, rest = divmod(sum(counts), len(scores))
            if rest or (kind == AUDIO and times != 1):
                raise ValueError(f"the prompt has {sum(counts)} tokens of kind {kind}, the tower made {len(scores)}")
            rows = scores.split(counts[::times])  # beams repeat rows
            found[mask] = torch.cat([row for row in rows for _ in range(times)])
        return found


class Overheard:
    """Stand in for a function of a reader, and tell a ``Watch`` what it did. An object, so that a copy of a model has
    its own."""

    def __init__(self, watch: Watch, name: str):
        self.watch, self.name = watch, name
        function = getattr(type(watch.reader), name)
        parameters = list(inspect.signature(function).parameters.values())[1:]
        self.__signature__ = inspect.Signature(parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = self.watch
        output = getattr(type(watch.reader), self.name)(watch.reader, *args, **kwargs)
        if not watch.runs or not watch.runs[-1].scores:
            return output
        if self.name == PACKER:
            features = args[0] if args else kwargs.pop("image_features")
            watch.pack(features, args[1:], kwargs)
        else:
            states = getattr(output, "pooler_output", None)
            parts = states if isinstance(states, (list, tuple)) else [states]
            watch.runs[-1].tokens = sum(part.shape[:-1].numel() for part in parts if part is not None)
        return output


class WatchedAttention:
    """The attention function registered for a tower of one base implementation."""

    def __init__(self, base: str):
        self.base = base

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        function = compat.ALL_ATTENTION_FUNCTIONS.get(self.base) or compat.attention_function(module, self.base)
        kwargs.setdefault("scaling", None)
        kwargs.setdefault("dropout", 0.0)
        watcher = module.__dict__.get(WATCHER)
        if watcher is not None:
            watch, prefix = watcher
            scaling = query.shape[-1] ** -0.5 if kwargs["scaling"] is None else kwargs["scaling"]
            watch.look(query, key, attention_mask, scaling, prefix)
        return function(module, query, key, value, attention_mask, **kwargs)


def register(base: str) -> str:
    """Register the watched form of an attention implementation with its mask function; returns the new name."""
    name, known, masks = PREFIX + base, compat.ALL_ATTENTION_FUNCTIONS, compat.ALL_MASK_ATTENTION_FUNCTIONS
    if name not in known:
        known.register(name, WatchedAttention(base))
        masks.register(name, masks[base])
    return name
