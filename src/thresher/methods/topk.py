"""TopK: keep the k best-scored tokens of each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.architecture import Architecture
from ..core.pruner import Choice
from ..core.view import View
from .parts.budget import Budgeted
from .parts.pictures import best_of_pictures
from .parts.selection import check_keep, kept_count, per_site, top_k

REPLAY = "replay"


class TopK(Budgeted):
    """Keep the tokens that receive most attention (the selection of Wang, Zhang and Han, "SpAtten: Efficient Sparse
    Attention Architecture with Cascade Token and Head Pruning", HPCA 2021, and of LTP's top-k baseline); needs no
    training.

    The importance score is the attention received in the layer of the site. The k best-scored survivors of a row stay,
    where k is a share of them or a count. Ties go to the lower position. There is no soft stage. With ``target_flops``
    one factor of all shares is searched for on held-out inputs.

    Args:
        keep: a fraction of the row's survivors (sites compound) or a count of tokens, for all sites or one per site; in
            a model that reads pictures or sounds, of each of these.
            "replay" keeps as many as the caller says: ``with calling(model, counts=...)``, (B, S). Baselines replay the
            counts of the method that they are compared with.
        target_flops: MACs to be left, as a fraction of the dense model's on the same unpadded inputs. ``keep`` must
            then be a share.

    | paper | here | why |
    |---|---|---|
    | sum over all rows | mean over live rows | padding and what has left do not vote |
    | scores accumulate over layers (SpAtten) | one layer's scores | that is ``SpAtten`` |
    | a layer schedule | ``keep`` per site | any schedule can be said |
    """

    keep: float | int | str | tuple = 0.5
    target_flops: float | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "topk"
    learned: ClassVar[tuple[str, ...]] = ("keep",)
    takes_counts: ClassVar[bool] = True  # whether ``keep`` may be a number of tokens

    @property
    def shares(self) -> tuple[float | int, ...]:
        """``keep`` at each site."""
        keep: Any = self.keep
        return per_site(keep, self.sites)

    def build(self, model: Architecture) -> None:
        if self.keep == REPLAY and self.takes_counts:
            return
        for share in self.shares:
            check_keep(share, counts=self.takes_counts)
            if isinstance(share, int) and model.max_tokens is not None and share > model.max_tokens:
                raise ValueError(f"keep={share}: the model takes {model.max_tokens} tokens at most")
        if len(self.shares) != len(self.sites):
            raise ValueError(
                f"keep has {len(self.shares)} entries for the {len(self.sites)} sites at={list(self.sites)}"
            )
        if self.target_flops is not None and not all(isinstance(share, float) for share in self.shares):
            raise ValueError(f"keep={self.keep!r} is a count: target_flops takes shares, which it can change")

    def knob(self) -> Callable[[float], None] | None:
        """Return the knob: one factor of all shares."""
        return None if self.keep == REPLAY else self.turn_shares("keep", -1)

    def choose(self, score: Tensor, view: View) -> Choice:
        if view.pictures is not None and self.keep != REPLAY:
            return Choice(best_of_pictures(score, view, self.shares[view.site]))
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
