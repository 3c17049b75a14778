"""``compress``: a shorter prompt, as a text or as ids, for any engine."""

from __future__ import annotations

import itertools
import re
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

LONG = 16  # tokens of a word from which on it is cut: some writing knows no spaces
WORD = re.compile(r"\s*\S+|\s+")


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


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt, and the units that stay or leave as a whole.

    Attributes:
        ids: (N,) of its tokens.
        units: of each token, the number of its unit, never falling.
        special: of each token, whether it is one that never leaves.
        parts: of each unit, its part of the text; empty where there is no text.
    """

    ids: list[int]
    units: list[int]
    special: list[bool]
    parts: list[str]


def compress(
    model: PreTrainedModel,
    prompt: str | Sequence[int] | Tensor,
    method: GemFilter | None = None,
    *,
    keep: float | int | None = None,
    tokenizer: Any = None,
) -> Compressed:
    """Shorten a prompt to what its end asks for; a few layers of a decoder choose, and any engine can answer.

    Args:
        model: a decoder of transformers; it is left as it was, and one that is pruned chooses unpruned.
        prompt: a text, or the ids of one prompt. The question stands at its end.
        method: how to choose; default: ``GemFilter()``.
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
    read = read_text(prompt, tokenizer, method.words) if isinstance(prompt, str) else read_ids(prompt, tokenizer)
    if not read.ids:
        raise ValueError("the prompt is empty: expected a text, or ids of tokens")
    info = find_architecture(inner_model(model))
    info.check_words(torch.tensor(read.ids))
    number, total, count = method.layer(info), len(read.ids), method.count(len(read.ids))
    kept, run = list(range(total)), 0
    if count < total:
        stays = torch.tensor(read.special)
        stays[: method.sinks] = stays[-method.recent :] = True
        kept, run = choose(method.scores(model, torch.tensor([read.ids])), stays, read.units, count), number + 1
    text = "".join(read.parts[unit] for unit in dict.fromkeys(read.units[i] for i in kept)) if read.parts else None
    ids, seconds = [read.ids[i] for i in kept], time.perf_counter() - begun
    return Compressed(text, ids, kept, total, len(ids), run, info.depth, seconds)


def choose(scores: Tensor, stays: Tensor, units: Sequence[int], count: int) -> list[int]:
    """The places of the tokens that are kept, rising: those of the units that score best, as many as fit into ``count``
    tokens; and those of units with a token that ``stays`` (N,) bool, in any case. A unit scores as its best token."""
    of = torch.tensor(units) - units[0]
    sizes = of.bincount()
    best = torch.full((len(sizes),), -torch.inf).scatter_reduce(0, of, scores, "amax")
    fixed = torch.zeros(len(sizes)).scatter_reduce(0, of, stays.float(), "amax") > 0
    taken, room = fixed.clone(), count - int(sizes[fixed].sum())
    for unit in best.masked_fill(fixed, -torch.inf).argsort(descending=True, stable=True).tolist():
        if room <= 0:
            break
        if not taken[unit] and sizes[unit] <= room:
            taken[unit], room = True, room - int(sizes[unit])
    return taken[of].nonzero()[:, 0].tolist()


def read_ids(prompt: Sequence[int] | Tensor, tokenizer: Any) -> Prompt:
    """The tokens of one prompt, each a unit of its own.

    Raises:
        ValueError: there are several prompts.
    """
    ids = torch.as_tensor(prompt)
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1 or (len(ids) and ids.is_floating_point()):
        raise ValueError(f"the prompt has shape {tuple(ids.shape)}: expected the ids of one prompt, (N,), or a text")
    found = ids.tolist()
    special = set(getattr(tokenizer, "all_special_ids", ()))
    return Prompt(found, list(range(len(found))), [i in special for i in found], [])


def read_text(prompt: str, tokenizer: Any, words: bool) -> Prompt:
    """The tokens of a text; its units are words with the space before them, or tokens.

    Raises:
        ValueError: no tokenizer, or one that does not say where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("a text needs tokenizer=, the model's fast one, which says where its tokens stand")
    read = tokenizer(prompt, return_offsets_mapping=True)
    ids, special = read["input_ids"], set(tokenizer.all_special_ids)
    ends = [end for _, end in read["offset_mapping"]]
    starts = [match.start() for match in WORD.finditer(prompt)] if words else []
    cuts = cuts_of(ends, starts, len(prompt))
    parts = [prompt[a:b] for a, b in itertools.pairwise(cuts)]
    units, unit = [], 0
    for end in ends:  # a token that has no text, as one that opens all prompts, goes with the next
        while unit + 1 < len(parts) and end > cuts[unit + 1]:
            unit += 1
        units.append(unit)
    return Prompt(ids, units, [i in special for i in ids], parts)


def cuts_of(ends: Sequence[int], starts: Sequence[int], length: int) -> list[int]:
    """Where a text of ``length`` characters is cut: where words start, and where tokens end in words of more than
    ``LONG`` tokens; where none start, behind every token."""
    tokens = sorted({0, *ends, length})
    if not starts:
        return tokens
    cuts, place = [0], 0
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        inside = []
        while place < len(tokens) and tokens[place] <= end:
            if tokens[place] > start:
                inside.append(tokens[place])
            place += 1
        cuts += inside if len(inside) > LONG else [end]
        if cuts[-1] != end:
            cuts.append(end)
    return cuts
