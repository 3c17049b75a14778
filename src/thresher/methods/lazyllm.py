"""LazyLLM: a prompt that gets shorter from layer to layer, by what its last token attends to."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

import torch
from torch import Tensor

from ..core.architecture import Architecture
from ..core.view import View
from .topk import TopK


class LazyLLM(TopK):
    """Keep what the last token of a prompt attends to (Fu et al., "LazyLLM: Dynamic Token Pruning for Efficient Long
    Context LLM Inference", 2024, arXiv 2407.14057); for decoders, without training.

    The importance score is the attention of the last token in the layer of the site, averaged over heads (eq. 1). The
    best-scored share stays, and with every site fewer tokens: early layers see much, late ones little. It takes one row
    of the attention, where ``TopK`` takes all.

    Args:
        at: as in ``TokenPruner``; default: a half, five eighths and three quarters of the depth.
        keep: as in ``TopK``.
        sinks: first tokens of each prompt that never leave: without them a model loses its thread.
        recent: last tokens that never leave: mostly the question and what opens the answer. A prompt of ``sinks`` and
            ``recent`` tokens or fewer is left alone. ``protect`` says otherwise.
        target_flops: as in ``TopK``.

    | paper | here | why |
    |---|---|---|
    | a token that left may come back at a later step, from an auxiliary cache | it is gone from the layers behind the site | what may come back has to be held and computed; the cache is smaller without |
    | steps of decoding prune again | the prompt is pruned, once | what is left is chosen for the question; ``cache=`` prunes while decoding |
    | a percentile of the scores | a share of the survivors, or a number | the same, and exact |
    | early sites drop little, late ones much | the same share at each, from a half of the depth on | before, the last token of SmolLM2-135M does not look at what is asked for |
    | no token is protected | the first and last ones are | the first ones carry attention; a chat template ends behind the question |
    """

    keep: float | int | str | tuple = 0.7
    sinks: int = field(default=4, kw_only=True)
    recent: int = field(default=32, kw_only=True)

    name: ClassVar[str] = "lazyllm"
    scores_all: ClassVar[bool] = False
    scores_row: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("sinks", 0), ("recent", 1)):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise ValueError(f"{name}={number!r}: expected a whole number, {least} or more")

    def build(self, model: Architecture) -> None:
        super().build(model)
        if not model.causal:
            raise ValueError(
                f"lazyllm is not possible with {model.name}, an encoder, in which the last token is as any other: use "
                "TopK, or EViT(fuse=False), which asks the class token"
            )

    @property
    def protected_positions(self) -> tuple[int, ...] | None:
        if self.protect is not None:
            return super().protected_positions
        return (*range(self.sinks), *range(-self.recent, 0))

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        places = (-(-model.depth * eighths // 8) - 1 for eighths in (4, 5, 6))
        return tuple(sorted({min(max(place, model.first_site), model.last_site) for place in places}))

    def score(self, view: View) -> Tensor:
        places = torch.arange(view.alive.shape[1], device=view.alive.device)
        last = torch.where(view.alive, places, -1).argmax(1)
        return view.attention_from(last).mean(1).masked_fill(~view.alive, 0.0)

    def width(self, slots: int, site: int) -> int | None:
        width = super().width(slots, site)
        return None if width is None else min(slots, width)
