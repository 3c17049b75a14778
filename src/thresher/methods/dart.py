"""DART: keep the tokens of a picture that repeat a few pivots least."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.architecture import Architecture
from ..core.view import View
from .parts.pictures import Pictures
from .parts.visual import Visual


class DART(Visual):
    """Keep the tokens of a picture that are least alike a few pivots (Wen, Gao, Li, He and Zhang, "Stop Looking for
    Important Tokens in Multimodal Language Models: Duplication Matters More", EMNLP 2025); needs no training.

    Pivots are the tokens whose keys are longest, some of the picture and some of the text. The pivots of the picture
    stay. Each pivot in turn takes its equal part of the others: those whose states, by their cosine, are
    least alike it.

    Args:
        keep: of each picture, a share of its tokens or a count.
        pivots, text_pivots: of each picture, and of the text of its row.
        at: default: (1,).

    | paper | here | why |
    |---|---|---|
    | L1 norms of keys | L2 norms, of all heads | rotary positions turn keys: their L1 norm depends on how much padding is before them |
    | one picture | pivots of each picture | a picture answers in a batch as alone |
    | a few more than asked for | as many as asked for | budgets are compared |
    | alike by the states after the layer | the same, of the states that entered the layer | they are what a site shows |
    """

    keep: float | int | str | tuple = 0.25
    pivots: int = 4
    text_pivots: int = 4

    name: ClassVar[str] = "dart"
    needs_attention: ClassVar[bool] = True  # the layer's keys
    needs_values: ClassVar[bool] = True
    scores_all: ClassVar[bool] = False

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        return (min(1, model.last_site),)

    def build(self, model: Architecture) -> None:
        super().build(model)
        if self.pivots < 0 or self.text_pivots < 0 or self.pivots + self.text_pivots < 1:
            raise ValueError(f"pivots={self.pivots}, text_pivots={self.text_pivots}: expected one at least")

    def order(self, pictures: Pictures, view: View, counts: Tensor, protected: Tensor) -> Tensor:
        norm = view.key.float().square().sum((1, 3))
        text = (norm.masked_fill(~view.alive | pictures.visual, -1.0)).topk(min(self.text_pivots, norm.shape[1]), 1)
        x = F.normalize(view.hidden.float(), dim=-1)
        own, size = pictures.take(x), pictures.take(norm).masked_fill(~pictures.real, -1.0)
        order = torch.zeros_like(size)
        for row, (length, count) in enumerate(zip(pictures.lengths.tolist(), counts.tolist(), strict=True)):
            place, batch = size[row], int(pictures.rows[row])
            own_pivots = place.masked_fill(protected[row], float("inf")).topk(min(self.pivots, count, length)).indices
            words = text.indices[batch][text.values[batch] >= 0]
            order[row, own_pivots] = float(2 + count)
            free = pictures.real[row].clone()
            free[own_pivots] = False
            asked = torch.cat([own[row, own_pivots], x[batch, words]])
            spread(order[row], own[row] @ asked.T, free, count - len(own_pivots))
        return order


def spread(order: Tensor, close: Tensor, free: Tensor, count: int) -> None:
    """Let each pivot in turn take its part of ``count`` tokens among those ``free`` (M,), the least alike it by
    ``close`` (M, pivots); write into ``order`` (M,) which were taken, the first ones highest."""
    many = close.shape[1]
    for pivot in range(many if count > 0 else 0):
        part = count // many + (pivot < count % many)
        least = close[:, pivot].masked_fill(~free, float("inf")).sort(stable=True).indices[:part]
        least = least[free[least]]
        order[least], free[least] = 1.0 + (many - pivot) / many, False
