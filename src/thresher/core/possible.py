"""Say which methods and layouts fit a model, before anything is touched."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache

from . import compat
from .architecture import Architecture
from .pruner import TokenPruner

FUNCTIONS = ("sdpa", "eager")  # attention functions of a language model that reads pictures


def check_possible(model: Architecture, pruner: TokenPruner, layout: str) -> None:
    """Raise ValueError where a method or a layout does not fit a model."""
    name = type(model.base).__name__
    if not model.passes_arguments and "attention_mask" not in model.arguments:
        raise ValueError(
            f"{name} cannot be pruned: its layers take no attention mask and hand their attention block no arguments, "
            "so that no tokens can be hidden from it"
        )
    original = compat.attention_implementation(model.base).rpartition("|")[2]
    if model.reader is not None and original not in FUNCTIONS:
        raise ValueError(
            f"{name} runs {original!r}, which reads positions with gaps as several texts and shows no scores: load "
            f"{model.name} with attn_implementation={' or '.join(map(repr, FUNCTIONS))}"
        )
    if layout == "packed" and model.reader is not None:
        raise ValueError(
            f"layout='packed' is not possible with {name} in {model.name}: what reads pictures runs padded; use "
            "layout='padded' or 'auto'"
        )
    if layout == "packed" and not model.packable:
        raise ValueError(
            f"layout='packed' is not possible with {name}: its attention takes position biases "
            "or does not hand its arguments to transformers' attention interface; use layout='padded' or 'auto'"
        )
    if pruner.needs_values and not model.shows_inputs:
        raise ValueError(
            f"{pruner.name} is not possible with {name}: it needs the keys or values of "
            "a layer, and this model's layers show their attention probabilities alone; topk, spatten, entropy, "
            "ltp and top need no more than these"
        )
    if pruner.merges and model.causal and not pruner.at_entry:
        raise ValueError(
            f"{pruner.name} is not possible with {name}, a decoder: a merged token would "
            "show later tokens to earlier ones; topk, spatten and ltp let tokens leave instead"
        )
    if pruner.merges and pruner.sized and (model.relative or model.binary_mask):
        raise ValueError(
            f"{pruner.name} is not possible with {name}: keys weigh by the number of "
            "tokens that they stand for, and its attention takes position biases or a mask of 0 and 1; topk, ltp "
            "and top let tokens leave"
        )


def check_kind(cache: Any, name: str, unserved: str) -> None:
    """Raise ValueError where the layers of a cache cannot tell which tokens of a picture they hold; ``unserved``: why
    those of no cache can."""
    if unserved:
        raise ValueError(f"{name} needs use_cache=False here: {unserved}")
    if type(cache) is not DynamicCache or cache.offloading:
        kind = "offloaded cache" if getattr(cache, "offloading", False) else type(cache).__name__
        raise ValueError(
            f"a {kind} cannot tell which tokens of a picture it holds: generate with a DynamicCache, or within "
            "dense(model)"
        )
