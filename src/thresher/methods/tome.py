"""ToMe and ToFu: merge the most similar tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.architecture import Architecture
from ..core.pruner import Choice
from ..core.view import View
from .parts.budget import Budgeted
from .parts.selection import check_keep, per_site, top_k

STAYS = 2.0  # a score above that of any token that may be merged


class ToMe(Budgeted):
    """Merge the most similar tokens by bipartite soft matching (Bolya, Fu, Dai, Zhang, Feichtenhofer and Hoffman,
    "Token Merging: Your ViT But Faster", ICLR 2023); needs no training.

    In each layer the tokens are dealt in turn into two sets. Each token of the first finds the most similar one of the
    second, by the cosine of their keys, averaged over heads. The r most similar pairs become one token, the mean of
    their states, each weighed by its size, the number of tokens that it stands for. The logarithm of the size is added
    to the logits of the merged key ("proportional attention", eq. 1). After the last layer every token is put back as
    the one that holds it: heads that read all tokens see a merged one as often as it counts.

    Args:
        r: tokens merged in each layer: a share of the row's tokens or a count, for all sites or one per site. No more
            than those of the first set, half of what is not protected, are ever merged; 0 merges nothing.
        target_flops: as in ``TopK``, by one factor of ``r``.
        at: default: every layer.

    ============================  ==========================  ====================================================
    paper                         here                        why
    ============================  ==========================  ====================================================
    the class token is in the     protected tokens are in     the same: neither is ever merged
    first set and never merged    neither set
    images have no padding        padding is in neither set   texts of a batch do not meet
    kept and merged tokens are    tokens stay in their order  the layouts agree on it
    concatenated
    r is a count                  r may be a share            lengths of texts differ
    ============================  ==========================  ====================================================
    """

    r: float | int | tuple = 0.1
    target_flops: float | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "tome"
    merges = True
    sized: ClassVar[bool] = True
    needs_values: ClassVar[bool] = True
    scores_all: ClassVar[bool] = False
    learned: ClassVar[tuple[str, ...]] = ("r",)

    @property
    def shares(self) -> tuple[float | int, ...]:
        """``r`` at each site."""
        return per_site(self.r, self.sites)

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        return tuple(range(model.first_site, model.last_site + 1))

    def build(self, model: Architecture) -> None:
        for share in self.shares:
            if isinstance(share, bool) or share != 0:
                check_keep(share, "r")
        if len(self.shares) != len(self.sites):
            raise ValueError(f"r has {len(self.shares)} entries for the {len(self.sites)} sites at={list(self.sites)}")
        if self.target_flops is not None and not all(isinstance(share, float) and share for share in self.shares):
            raise ValueError(f"r={self.r!r}: target_flops takes shares above 0, which it can change")

    def knob(self) -> Callable[[float], None]:
        """Return the knob: one factor of all shares."""
        return self.turn_shares("r", 1)

    def score_and_choose(self, view: View) -> tuple[Tensor, Choice]:
        similarity, partner, macs = bipartite_matching(view)
        score = torch.where(similarity > -STAYS, -similarity, STAYS).masked_fill(~view.alive, 0.0)
        live = view.alive.sum(1)
        merged = merged_count(self.shares[view.site], live)
        keep = top_k(score, torch.maximum(live - merged, (score == STAYS).sum(1)), view.alive)
        return score, Choice(keep, into=partner, macs=macs)

    def width(self, slots: int, site: int) -> int | None:
        protect = self.protected_positions
        if protect is None:
            return None
        return slots - min(merged_count(self.shares[site], slots), max(0, slots - len(protect) + 1) // 2)

    def keeps_all(self, site: int) -> bool:
        return self.shares[site] == 0


def merged_count(share: float | int, live):
    """Count how many of ``live`` tokens, a number or (B,), are to be merged if there are so many."""
    if isinstance(share, int):
        return share
    thousandths = live * round(share * 1000)
    return (thousandths - thousandths % 1000) // 1000  # even: OpenVINO rounds


def bipartite_matching(view: View) -> tuple[Tensor, Tensor, Tensor]:
    """Match each token of the first set to the nearest of the second, by the cosine of their keys.

    Returns (B, N) the similarity, -2 for tokens that are not in the first set; (B, N) long the slot of the partner;
    (B,) the MACs that it took.
    """
    free = view.alive & ~view.protected
    turn, key, live = free.cumsum(1) % 2, view.key, view.alive.sum(1)
    first, second = free & (turn == 1), free & (turn == 0)
    direction = F.normalize(key.float().mean(1), dim=-1)
    similarity, partner = (direction @ direction.transpose(1, 2)).masked_fill(~second[:, None], -STAYS).max(2)
    return similarity.masked_fill(~first, -STAYS), partner, live * live * key.shape[-1] / 4


class ToFu(ToMe):
    """Fuse the most similar tokens: drop in early layers, merge in late ones (Kim, Gao, Hsu, Shen and Jin, "Token
    Fusion: Bridging the Gap between Token Pruning and Token Merging", WACV 2024); needs no training.

    The pairs are those of ``ToMe``. An early layer answers the mean of two tokens with something else than the mean of
    its answers: there the first token of each pair is dropped. In a late layer the pair becomes its mean with the
    length of the longer of the two (MLERP), since a mean is shorter than what it is made of.

    Args:
        prunes: the share of the depth that prunes; the layers behind it merge.

    The rest is as in ``ToMe``.

    ================================  =====================================  ===================================
    paper                             here                                   why
    ================================  =====================================  ===================================
    measures where layers turn from   ``prunes`` says it                     needs no look at data
    one to the other
    the longer of two                 the longest of all that are merged     several may be merged into one
                                      into one token at once                 token of the second set
    a dropped token is gone           put back as it was when it left        heads that read all tokens
    ================================  =====================================  ===================================
    """

    prunes: float = 0.5

    name: ClassVar[str] = "tofu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.prunes <= 1:
            raise ValueError(f"prunes={self.prunes}: expected a share of the depth in [0, 1]")

    def score_and_choose(self, view: View) -> tuple[Tensor, Choice]:
        score, choice = super().score_and_choose(view)
        if view.layer < self.prunes * self.architecture.depth:
            return score, Choice(choice.keep, macs=choice.macs)
        return score, replace(choice, longest=True)
