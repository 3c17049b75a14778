"""``compress``: a shorter prompt, as a text or as ids, for any engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..api import inner_model
from ..core.architecture import find_architecture
from .gemfilter import GemFilter
from .words import Shortener, read_ids, read_text


@dataclass(frozen=True)
class Compressed:
    """A shorter prompt.

    Attributes:
        text: what is left of a text, as it stood there; None where ids were given.
        ids: of the tokens that are left.
        kept: 0-based places of these in the prompt, rising.
        tokens_in, tokens_out: tokens of the prompt, and those that are left. A tokenizer that reads the text again may
            find a few more or less.
        layers_run, layers: how many layers of the model were run, of how many; none where all tokens stay.
        seconds: how long it took.
    """

    text: str | None
    ids: list[int]
    kept: list[int]
    tokens_in: int
    tokens_out: int
    layers_run: int
    layers: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compress(
    model: PreTrainedModel,
    prompt: str | Sequence[int] | Tensor,
    method: Shortener | None = None,
    *,
    keep: float | int | None = None,
    tokenizer: Any = None,
) -> Compressed:
    """Shorten a prompt to what its end asks for (``GemFilter``), or to what it says (``LLMLingua2``); any engine can
    answer.

    Args:
        model: what chooses: a decoder of transformers, or a token classifier; it is left as it was.
        prompt: a text, or the ids of one prompt. With a decoder the question stands at its end.
        method: how to choose; default: ``GemFilter()``, with a decoder.
        keep: what stays, in place of the method's: a share of the tokens, or a number.
        tokenizer: the model's; a text needs a fast one.

    Raises:
        ValueError: an empty prompt, one with pictures or longer than the model takes, or a model that cannot choose.

    Example:
        >>> short = compress(model, document + question, keep=0.25, tokenizer=tokenizer)
        >>> answer = any_engine(short.text)
    """
    begun, method = time.perf_counter(), method or GemFilter()
    method = method if keep is None else replace(method, keep=keep)
    if isinstance(prompt, str):
        read = read_text(prompt, tokenizer, method.words, method.special)
    else:
        read = read_ids(prompt, tokenizer)
    if not read.ids:
        raise ValueError("the prompt is empty: expected a text, or ids of tokens")
    info = find_architecture(inner_model(model))
    info.check_words(torch.tensor(read.ids))
    method.check(info, model)
    total, count = len(read.ids), method.count(len(read.ids))
    kept, run = list(range(total)), 0
    if count < total:
        kept, run = method.choose(model, read, count, tokenizer)
    text = "".join(read.parts[unit] for unit in dict.fromkeys(read.units[i] for i in kept)) if read.parts else None
    ids, seconds = [read.ids[i] for i in kept], time.perf_counter() - begun
    return Compressed(text, ids, kept, total, len(ids), run, info.depth, seconds)
