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
from .parts.selection import check_keep, top_k
from .topk import per_site

STAYS = 2.0  # a score above that of any token that may be merged


class ToMe(Budgeted):
    """Token merging by bipartite soft matching (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023); needs
    no training.

    In each layer the tokens are dealt in turn into two sets. Each token of the first finds the most similar one of the
    second, by the cosine of their keys, averaged over heads; the r most similar pairs become one token, the mean of
    their states, each weighed by the number of tokens that it stands for. From then on this number weighs the token as
    a key: its logarithm is added to the logits ("proportional attention", their eq. 1).

    In the end every token is put back as the one that holds it, so that heads that read all tokens, and means over
    them, see each merged one as often as it counts.

    Departures. Protected tokens are in neither set (their class token is in the first and never merged, which is the
    same). Padding is in neither set. Tokens stay in their order. For texts, whose lengths differ, r is a share.

    Args:
        r: tokens merged in each layer: a share of the row's tokens or a count, for all sites or one per site. No more
            than those of the first set, half of what is not protected, are ever merged; 0 merges nothing.
        target_flops: as in ``TopK``, by one factor of ``r``.
        at: default: every layer.
    """

    r: float | int | tuple = 0.1
    target_flops: float | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "tome"
    merges: ClassVar[bool] = True
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
        """One factor of all shares."""
        return self.turn_shares("r", 1)

    def score_and_choose(self, view: View) -> tuple[Tensor, Choice]:
        similarity, partner, macs = bipartite_matching(view)
        score = torch.where(similarity > -STAYS, -similarity, STAYS).masked_fill(~view.alive, 0.0)
        live = view.alive.sum(1)
        merged = _merged(self.shares[view.site], live)
        keep = top_k(score, torch.maximum(live - merged, (score == STAYS).sum(1)), view.alive)
        return score, Choice(keep, into=partner, macs=macs)

    def width(self, slots: int, site: int) -> int | None:
        protect = self.protected_positions
        if protect is None:
            return None
        return slots - min(_merged(self.shares[site], slots), max(0, slots - len(protect) + 1) // 2)

    def keeps_all(self, site: int) -> bool:
        return self.shares[site] == 0


def _merged(share: float | int, live):
    """How many of ``live`` tokens, a number or (B,), are to be merged."""
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
    """Token fusion (Kim et al., "Token Fusion: Bridging the Gap between Token Pruning and Token Merging", WACV 2024);
    needs no training.

    The pairs are ``ToMe``'s. In early layers, which answer a mean of two tokens with something else than the mean of
    their answers, the first of each pair is dropped; in later ones the pair becomes its mean with the length of the
    longer of the two (MLERP), since means are shorter than what they are means of.

    Departures. Theirs measures where layers turn from one to the other; here it is ``prunes``. A longer one is the
    longest of all that are merged into one token at once. What was dropped is put back as what it was then.

    Args:
        prunes: the share of the depth that prunes; the layers behind it merge.

    The rest is as in ``ToMe``.
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
