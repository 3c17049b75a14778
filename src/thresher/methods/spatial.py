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

    A picture gets rows that are evenly spaced, and in each about as many tokens, evenly spaced. Its rows and columns
    are those that the positions say (Qwen-VL), else those of a square. Any other (tiles, a clip, a sound) is taken as a
    line.

    Args:
        keep: of each picture, a share of its tokens or a count.
    """

    keep: float | int | str | tuple = 0.25

    name: ClassVar[str] = "grid"

    def order(self, pictures: Pictures, view: View, counts: Tensor, protected: Tensor) -> Tensor:
        order = torch.zeros_like(pictures.real, dtype=torch.float32)
        for row, (length, count) in enumerate(zip(pictures.lengths.tolist(), counts.tolist(), strict=True)):
            order[row, spaced(length, count, rows_of(pictures, view, row))] = 1.0
        return order


class Pool(Visual):
    """Merge the tokens of a picture into means of neighbours: the baseline of a lower resolution.

    A picture becomes ``side`` times ``side`` means of blocks, one without rows (see ``Grid``) as many means of
    consecutive tokens. Each stands at the place of the middle one of its block. Pictures with no more tokens than that
    stay as they are.

    Args:
        side: rows and columns of what is left.
        at: before the first layer of the language model, and nowhere else.
    """

    side: int = 12

    name: ClassVar[str] = "pool"
    merges = True
    at_entry: ClassVar[bool] = True

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
            places = blocks(length, self.side, rows_of(pictures, view, row))
            holder[row, :length] = torch.tensor(places, device=holder.device)
        own = torch.arange(holder.shape[1], device=holder.device)
        inside, slots = pictures.visual, pictures.slots.gather(1, holder) % view.alive.shape[1]
        itself = torch.arange(view.alive.shape[1], device=slots.device)
        into = torch.where(inside, pictures.spread(slots, 0), itself)
        keep = pictures.spread(holder == own) | view.alive & ~inside
        return keep.double(), Choice(keep, into=into)


def rows_of(pictures: Pictures, view: View, number: int) -> int:
    """How many rows a picture has; 0: it is a line."""
    length = int(pictures.lengths[number])
    if view.places is not None:
        frame, row, column = (len(pictures.take(x)[number, :length].unique()) for x in view.places)
        return row if frame == 1 and row * column == length else 0
    side = math.isqrt(length)
    return side if side * side == length else 0


def spaced(length: int, count: int, rows: int) -> list[int]:
    """The places of ``count`` evenly spaced tokens of a picture of ``length`` in ``rows``; 0: in a line."""
    if not rows or count >= length:
        return [(2 * place + 1) * length // (2 * count) for place in range(count)]
    columns = length // rows
    lines = min(rows, count, max(1, round(math.sqrt(count * rows / columns))))
    while lines * columns < count:
        lines += 1
    places = []
    for line in range(lines):
        many = count // lines + (line < count % lines)
        start = (2 * line + 1) * rows // (2 * lines) * columns
        places += [start + (2 * place + 1) * columns // (2 * many) for place in range(many)]
    return places


def blocks(length: int, side: int, rows: int) -> list[int]:
    """For each token of a picture of ``length`` in ``rows`` the place of the one that holds its block, of ``side``
    times ``side``; without rows, of as many parts of a line."""
    count = side * side
    if count >= length:
        return list(range(length))
    if rows:
        columns = length // rows
        down, across = min(side, rows), min(side, columns)
        block = [(y * down // rows) * across + x * across // columns for y in range(rows) for x in range(columns)]
    else:
        block = [place * count // length for place in range(length)]
    members: dict[int, list[int]] = {}
    for place, number in enumerate(block):
        members.setdefault(number, []).append(place)
    middle = {number: places[len(places) // 2] for number, places in members.items()}
    return [middle[number] for number in block]
