"""The words of a prompt: what stays or leaves as a whole, and what fits into a budget."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..core.architecture import Architecture

LONG = 16  # tokens of a word from which on it is cut: some writing knows no spaces
WORD = re.compile(r"\s*\S+|\s+")


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


@dataclass(frozen=True)
class Shortener:
    """Base class of what chooses the tokens of a prompt that stay.

    Args:
        keep: a share of the prompt in (0, 1], or a number of tokens.
        words: keep words of a text as a whole; False: tokens.
    """

    keep: float | int = 0.5
    words: bool = True

    special: ClassVar[bool] = True  # whether special tokens belong to the prompt

    def __post_init__(self) -> None:
        keep = self.keep
        share, count = isinstance(keep, float) and 0 < keep <= 1, isinstance(keep, int) and not isinstance(keep, bool)
        if not (share or (count and keep >= 1)):
            raise ValueError(f"keep={keep!r}: expected a share in (0, 1] as 0.25, or a number of tokens as 1024")

    def count(self, tokens: int) -> int:
        """How many of ``tokens`` stay."""
        return min(tokens, self.keep if isinstance(self.keep, int) else math.ceil(self.keep * tokens - 1e-9))

    def check(self, info: Architecture, model: PreTrainedModel) -> None:
        """Raise ValueError where it cannot choose with a model."""
        raise NotImplementedError

    def choose(self, model: PreTrainedModel, prompt: Prompt, count: int, tokenizer: Any) -> tuple[list[int], int]:
        """The places of the ``count`` tokens that stay, rising, and how many layers were run for them."""
        raise NotImplementedError


def fitting(scores: Tensor, sizes: Tensor, fixed: Tensor, count: int) -> Tensor:
    """(U,) bool: which units stay: ``fixed`` (U,) ones in any case, then those of the best ``scores`` (U,), as many as
    fit into ``count`` tokens with their ``sizes`` (U,)."""
    taken, room = fixed.clone(), count - int(sizes[fixed].sum())
    order = scores.masked_fill(fixed, -torch.inf).argsort(descending=True, stable=True)
    order = order[: len(order) - int(fixed.sum())]
    fits = int((sizes[order].cumsum(0) <= room).sum())
    taken[order[:fits]] = True
    room -= int(sizes[order[:fits]].sum())
    for unit, size in zip(order[fits:].tolist(), sizes[order[fits:]].tolist(), strict=True):
        if room <= 0:
            break
        if size <= room:
            taken[unit], room = True, room - size
    return taken


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


def read_text(prompt: str, tokenizer: Any, words: bool, special_tokens: bool = True) -> Prompt:
    """The tokens of a text; its units are words with the space before them, or tokens.

    ``special_tokens``: whether those are added that open or close a text.

    Raises:
        ValueError: no tokenizer, or one that does not say where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("a text needs tokenizer=, the model's fast one, which says where its tokens stand")
    read = tokenizer(prompt, return_offsets_mapping=True, add_special_tokens=special_tokens, verbose=False)
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
