"""Grid and Pool: the baselines of pictures, which look at places alone."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from ..core.pruner import Choice
from ..core.view import View
from .parts.pictures import Pictures
from .parts.visual import Visual


class Grid(Visual):
    """Keep evenly spaced tokens of a picture: the baseline that covers it, which random ones do not.

    A square picture gets rows that are evenly spaced, and in each about as many tokens, evenly spaced. Any other (one
    of Qwen2-VL, of tiles, a clip, a sound) is taken as a line.

    Args:
        keep: of each picture, a share of its tokens or a count.
    """

    keep: float | int | str | tuple = 0.25

    name: ClassVar[str] = "grid"

    def order(self, pictures: Pictures, view: View, counts: Tensor, protected: Tensor) -> Tensor:
        order = torch.zeros_like(pictures.real, dtype=torch.float32)
        for row, (length, count) in enumerate(zip(pictures.lengths.tolist(), counts.tolist(), strict=True)):
            order[row, spaced(length, count)] = 1.0
        return order


class Pool(Visual):
    """Merge the tokens of a picture into means of neighbours: the baseline of a lower resolution.

    A square picture becomes ``side`` times ``side`` means of blocks, any other as many means of consecutive tokens.
    Each stands at the place of the middle one of its block. Pictures with no more tokens than that stay as they are.

    Args:
        side: rows and columns of what is left.
        at: before the first layer of the language model, and nowhere else.
    """

    side: int = 12

    name: ClassVar[str] = "pool"
    merges = True
    early: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.side, int) or isinstance(self.side, bool) or self.side < 1:
            raise ValueError(f"side={self.side!r}: expected a number of rows and columns, from 1 up")

    def keeps_all(self, site: int) -> bool:
        return False

    def score_and_choose(self, view: View) -> tuple[Tensor, Choice]:
        pictures = Pictures.of(view)
        holder = torch.zeros_like(pictures.slots)
        for row, length in enumerate(pictures.lengths.tolist()):
            holder[row, :length] = torch.tensor(blocks(length, self.side), device=holder.device)
        own = torch.arange(holder.shape[1], device=holder.device)
        inside, slots = pictures.visual, pictures.slots.gather(1, holder) % view.alive.shape[1]
        itself = torch.arange(view.alive.shape[1], device=slots.device)
        into = torch.where(inside, pictures.spread(slots, 0), itself)
        keep = pictures.spread(holder == own) | view.alive & ~inside
        return keep.double(), Choice(keep, into=into)


def spaced(length: int, count: int) -> list[int]:
    """The places of ``count`` evenly spaced tokens of a picture of ``length``."""
    side = math.isqrt(length)
    if side * side != length or count >= length:
        return [(2 * place + 1) * length // (2 * count) for place in range(count)]
    lines = min(side, count, max(1, round(math.sqrt(count))))
    while lines * side < count:
        lines += 1
    places = []
    for line in range(lines):
        many = count // lines + (line < count % lines)
        start = (2 * line + 1) * side // (2 * lines) * side
        places += [start + (2 * place + 1) * side // (2 * many) for place in range(many)]
    return places


def blocks(length: int, side: int) -> list[int]:
    """For each token of a picture of ``length`` the place of the one that holds its block, of ``side`` times
    ``side``."""
    size, count = math.isqrt(length), side * side
    if count >= length:
        return list(range(length))
    if size * size == length:
        block = [(y * side // size) * side + x * side // size for y in range(size) for x in range(size)]
    else:
        block = [place * count // length for place in range(length)]
    members: dict[int, list[int]] = {}
    for place, number in enumerate(block):
        members.setdefault(number, []).append(place)
    middle = {number: places[len(places) // 2] for number, places in members.items()}
    return [middle[number] for number in block]
