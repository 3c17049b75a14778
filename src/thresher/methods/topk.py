"""Keep the k best-scored tokens of each row; with the two baselines that every comparison needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import ClassVar

import torch
from torch import Tensor

from ..core.architecture import Architecture
from ..core.pruner import Choice
from ..core.view import View
from .parts.budget import Budgeted
from .parts.selection import check_keep, kept_count, top_k

REPLAY = "replay"


class TopK(Budgeted):
    """Top-k token pruning by the attention received; needs no training.

    The selection of SpAtten (Wang, Zhang and Han, HPCA 2021) and of LTP's top-k baseline, without their layer
    schedule: at each site the survivors of a row with the highest column mean of that layer stay. Departures: mean
    over live rows instead of a sum over all, no accumulation over layers.

    Args:
        keep: a fraction of the row's survivors (sites compound) or a count of tokens, for all sites or one per site.
            "replay" keeps as many as ``self.counts`` (B, S) says, which whoever calls the model sets before each
            forward: baselines replay the counts of the method they are compared with.
        target_flops: MACs to be left, as a fraction of the dense model's on the same unpadded inputs: ``keep``, a
            share then, is multiplied by one number for all sites, searched for on held-out inputs.
    """

    keep: float | int | str | tuple = 0.5
    target_flops: float | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "topk"
    learned: ClassVar[tuple[str, ...]] = ("keep",)

    @property
    def shares(self) -> tuple[float | int, ...]:
        """``keep`` at each site."""
        return per_site(self.keep, self.sites)

    def build(self, model: Architecture) -> None:
        if self.keep == REPLAY:
            return
        for share in self.shares:
            check_keep(share)
            if isinstance(share, int) and model.max_tokens is not None and share > model.max_tokens:
                raise ValueError(f"keep={share}: the model takes {model.max_tokens} tokens at most")
        if len(self.shares) != len(self.sites):
            raise ValueError(
                f"keep has {len(self.shares)} entries for the {len(self.sites)} sites at={list(self.sites)}"
            )
        if self.target_flops is not None and not all(isinstance(share, float) for share in self.shares):
            raise ValueError(f"keep={self.keep!r} is a count: target_flops takes shares, which it can change")

    def knob(self) -> Callable[[float], None] | None:
        """One factor of all shares."""
        return None if self.keep == REPLAY else self.turn_shares("keep", -1)

    def choose(self, score: Tensor, view: View) -> Choice:
        live, protected = view.alive.sum(1), view.protected.sum(1)
        if self.keep == REPLAY:
            if view.counts is None or len(view.counts) != len(live):
                raise RuntimeError(
                    "keep='replay' needs the counts (B, S) of the batch: with calling(model, counts=...)"
                )
            k = torch.maximum(view.counts[:, view.site].to(live.device), protected)
        else:
            k = kept_count(self.shares[view.site], live, protected)
        return Choice(top_k(score.masked_fill(view.protected, float("inf")), k, view.alive))

    def width(self, slots: int, site: int) -> int | None:
        protect = self.protected_positions
        if self.keep == REPLAY or protect is None:
            return None
        share = self.shares[site]
        count = min(share, slots) if isinstance(share, int) else (slots * round(share * 1000) + 999) // 1000
        return max(count, len(protect), 1)


def per_site(value: float | int | tuple, sites: tuple[int, ...]) -> tuple:
    """One value for each site: those of a tuple, or the same for all."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(sites)


class Random(TopK):
    """Baseline: which tokens stay is a coin's choice. Arguments as ``TopK``.

    The coin is a hash of a token's rank among the survivors, their number, the layer and ``seed``, so that a prediction
    depends neither on the batch nor on padding nor on the layout; in training a fresh number is mixed in at every
    forward.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    needs_attention: ClassVar[bool] = False

    def score(self, view: View) -> Tensor:
        salt = torch.randint(1 << 30, ()).item() if self.training else self.seed
        x = view.alive.cumsum(1) + 7919 * view.alive.sum(1, keepdim=True) + 104_729 * view.layer + 1_299_709 * salt
        for multiplier in (0x45D9F3B, 0x119DE1F3):  # an integer hash, kept within 31 bits
            x = ((x ^ (x >> 16)) * multiplier) & 0x7FFFFFFF
        return (x ^ (x >> 15)).double()


class FirstK(TopK):
    """Baseline: the first tokens of each row stay. Arguments as ``TopK``."""

    name: ClassVar[str] = "firstk"
    needs_attention: ClassVar[bool] = False

    def score(self, view: View) -> Tensor:
        return -view.tokens.index.double()
