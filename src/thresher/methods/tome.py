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
KEYS, STATES = METRICS = ("keys", "states")  # what the similarity of two tokens is taken of


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
            than those of the first set, half of what is not protected, are merged in a round; 0 merges nothing.
        target_flops: as in ``TopK``, by one factor of ``r``.
        at: default: every layer.
        metric: "keys", by the cosine of the layer's keys as in the paper; or "states", by the distance of the states
            that are merged, whose mean moves least then: for embedders, which average the states of a text.
        rounds: times that the tokens are dealt and matched in a layer, each for its part of ``r``; the sets of the next
            one mix what the sets of one kept apart, and more than half of the tokens can go.

    | paper | here | why |
    |---|---|---|
    | the class token is in the first set and never merged | protected tokens are in neither set | the same: neither is ever merged |
    | keys; states are worse | ``metric`` says which | of texts whose states are averaged the vector stays much nearer to the dense one by states |
    | matches once in a layer | ``rounds`` | the nearest token may be of the same set |
    | images have no padding | padding is in neither set | texts of a batch do not meet |
    | kept and merged tokens are concatenated | tokens stay in their order | the layouts agree on it |
    | r is a count | r may be a share | lengths of texts differ |
    """

    r: float | int | tuple = 0.1
    target_flops: float | None = field(default=None, kw_only=True)
    metric: str = field(default=KEYS, kw_only=True)
    rounds: int = field(default=1, kw_only=True)

    name: ClassVar[str] = "tome"
    merges = True
    sized: ClassVar[bool] = True
    needs_values: ClassVar[bool] = True
    scores_all: ClassVar[bool] = False
    learned: ClassVar[tuple[str, ...]] = ("r",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in METRICS:
            raise ValueError(f"metric={self.metric!r}: expected {' or '.join(METRICS)}")
        if not isinstance(self.rounds, int) or isinstance(self.rounds, bool) or self.rounds < 1:
            raise ValueError(f"rounds={self.rounds!r}: expected a number of rounds, from 1 up")

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
        x, sizes, keep, free = features(view, self.metric), view.tokens.sizes, view.alive, self.free(view)
        itself = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        wanted, macs = merged_count(self.shares[view.site], keep.sum(1)), torch.zeros_like(sizes[:, 0])
        into, score = itself, torch.zeros_like(sizes)
        for turn in range(self.rounds):
            similarity, partner = self.match(x, keep, keep & free)
            own = torch.where(similarity > -STAYS, -similarity, STAYS).masked_fill(~keep, 0.0)
            most = keep.sum(1) - in_round(wanted, turn, self.rounds)
            stays = top_k(own, torch.maximum(most, (own == STAYS).sum(1)), keep)
            goes, macs = torch.where(keep & ~stays, partner, itself), macs + self.matching_macs(keep, x.shape[-1])
            into, score, keep = goes.gather(1, into), torch.where(keep, own, score), stays
            if turn + 1 < self.rounds:
                x, sizes = means(x, sizes, goes)
        return score, Choice(keep, into=into, macs=macs)

    def free(self, view: View) -> Tensor:
        """Return (B, N) bool, the tokens that may be merged."""
        return view.alive & ~view.protected

    def match(self, x: Tensor, alive: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """Match tokens by the ``features`` x (B, N, C) of those ``alive`` (B, N), of which some are ``free``; returns
        as ``bipartite_matching`` does."""
        return bipartite_matching(x, free, self.metric)

    def matching_macs(self, alive: Tensor, channels: int) -> Tensor:
        """Count the MACs (B,) of a match."""
        return matching_macs(alive, channels)

    def width(self, slots: int, site: int) -> int | None:
        protect = self.protected_positions
        if protect is None:
            return None
        return slots - merged_in_rounds(self.shares[site], slots, max(0, slots - len(protect)), self.rounds)

    def channels(self, model: Architecture) -> int:
        """Count the numbers of a token that are compared."""
        return model.hidden if self.metric == STATES else model.costs[0].width // model.base.config.num_attention_heads

    def keeps_all(self, site: int) -> bool:
        return self.shares[site] == 0


def merged_count(share: float | int, live):
    """Count how many of ``live`` tokens, a number or (B,), are to be merged if there are so many."""
    if isinstance(share, int):
        return share
    thousandths = live * round(share * 1000)
    return (thousandths - thousandths % 1000) // 1000  # even: OpenVINO rounds


def in_round(count, turn: int, rounds: int):
    """Share a count of tokens to be merged, a number or (B,), among rounds: how many are of this one."""
    return count * (turn + 1) // rounds - count * turn // rounds


def merged_in_rounds(share: float | int, live, free, rounds: int):
    """Count what is merged of ``live`` tokens, of which ``free`` may be: numbers, or both (B,)."""
    wanted, left = merged_count(share, live), free
    for turn in range(rounds):
        count, most = in_round(wanted, turn, rounds), (left + 1) // 2
        left = left - (torch.minimum(count, most) if isinstance(most, Tensor) else min(count, most))
    return free - left


def features(view: View, metric: str) -> Tensor:
    """Return (B, N, C), what tokens are compared by."""
    return view.key.float().mean(1) if metric == KEYS else view.states.float()


def means(x: Tensor, sizes: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means by size of the tokens ``x`` (B, N, C) that go into each slot, and their sizes (B, N)."""
    sums = torch.zeros_like(x).scatter_add(1, into[..., None].expand_as(x), x * sizes[..., None])
    sizes = torch.zeros_like(sizes).scatter_add(1, into, sizes)
    return sums / sizes.clamp(min=1)[..., None], sizes


def matching_macs(alive: Tensor, channels: int) -> Tensor:
    """Count the MACs (B,) of the products of two sets of the tokens ``alive`` (B, N)."""
    return alive.sum(1) ** 2 * channels / 4


def bipartite_matching(x: Tensor, free: Tensor, metric: str = KEYS) -> tuple[Tensor, Tensor]:
    """Match each token of the first set to the nearest of the second: of the ``features`` x (B, N, C), by the cosine of
    keys, or by 1 / (1 + d), d the mean squared difference of states, which far states do not bring to 0.

    ``free`` (B, N): the tokens that are dealt into the sets. Returns (B, N) fp32 the similarity, -2 for tokens that are
    not in the first set; (B, N) long the slot of the partner. In fp32 also under autocast: near ones differ by less
    than bf16 tells apart.
    """
    turn = free.cumsum(1) % 2
    first, second = free & (turn == 1), free & (turn == 0)
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), dim=-1) if metric == KEYS else x.float()
        alike = x @ x.transpose(1, 2)
        if metric == STATES:
            square = x.square().sum(-1)
            distance = (square[:, None] + square[:, :, None] - 2 * alike) / x.shape[-1]
            alike = 1 / (1 + distance.clamp(min=0))
    similarity, partner = alike.masked_fill(~second[:, None], -STAYS).max(2)
    return similarity.masked_fill(~first, -STAYS), partner


class ToFu(ToMe):
    """Fuse the most similar tokens: drop in early layers, merge in late ones (Kim, Gao, Hsu, Shen and Jin, "Token
    Fusion: Bridging the Gap between Token Pruning and Token Merging", WACV 2024); needs no training.

    The pairs are those of ``ToMe``. An early layer answers the mean of two tokens with something else than the mean of
    its answers: there the first token of each pair is dropped. In a late layer the pair becomes its mean with the
    length of the longer of the two (MLERP), since a mean is shorter than what it is made of.

    Args:
        prunes: the share of the depth that prunes; the layers behind it merge.

    The rest is as in ``ToMe``.

    | paper | here | why |
    |---|---|---|
    | measures where layers turn from one to the other | ``prunes`` says it | needs no look at data |
    | the longer of two | the longest of all that are merged into one token at once | several may be merged into one token of the second set |
    | a dropped token is gone | put back as it was when it left | heads that read all tokens |
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
