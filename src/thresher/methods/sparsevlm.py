"""SparseVLM: keep what the words that speak of the picture look at."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ..core.architecture import Architecture
from ..core.pruner import Choice
from ..core.scoring import CHUNK
from ..core.tokens import slots_of
from ..core.view import View
from .parts.pictures import Pictures
from .parts.visual import check_reads
from .topk import TopK

LAYERS, DEPTH = (2, 6, 15), 32  # after which tokens leave, of how many
LEAST = 0.1  # of the decay, by which logits are divided


class SparseVLM(TopK):
    """Keep at each of a few sites the tokens of a picture that its raters attend to (Zhang et al., "SparseVLM: Visual
    Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025, in its later form, SparseVLM+);
    needs no training.

    Raters are words behind the picture. With R the softmax over these words of the products of states, picture by
    words, a word's relevance is the mean of its column, and those at or above the mean relevance rate. A token's score
    is the attention that raters pay it, summed over the half of the heads that look most at the picture. Rotary
    positions weaken logits with distance, which favours what stands next to the text; each logit is therefore divided
    by that decay, the product of a query and a key of all ones, turned to their places, relative to that at distance 0.

    Args:
        keep: at each site, a share of the tokens of a picture that are left, or a count. The paper's "192 of 576" is
            (0.52, 0.67, 0.55): 300, 200 and 110.
        at: default: the paper's after layers 2, 6 and 15 of 32, at the same shares of the depth.

    | paper | here | why |
    |---|---|---|
    | raters by the states that enter the language model | by those that enter the layer of the site | a site shows no others |
    | counts by the rank of attention, or from a table | ``keep`` | budgets are compared |
    | the decay as it is | 0.1 at least | it falls to 0 and below far away and in small heads |
    | one picture | raters, heads and counts of each | else the second picture of a prompt may leave as a whole |
    | who leaves is clustered and put back | left out, as in the later form | it is random, and renumbers positions |
    | no words behind the picture | the last token of the prompt | somebody has to rate |
    """

    keep: float | int | str | tuple = 0.58

    name: ClassVar[str] = "sparsevlm"
    needs_values: ClassVar[bool] = True  # the layer's keys
    scores_all: ClassVar[bool] = False
    needs_rotary: ClassVar[bool] = True

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        return tuple(sorted({min(layer * model.depth // DEPTH, model.last_site) for layer in LAYERS}))

    def check_modality(self, model: Architecture, at: tuple[int, ...]) -> None:
        check_reads(self.name, model)
        super().check_modality(model, at)

    def score_and_choose(self, view: View) -> tuple[Tensor, Choice]:
        pictures = Pictures.of(view)
        words = view.alive & (view.pictures < 0)  # type: ignore[operator]
        words = words | torch.zeros_like(words).scatter(1, view.readout[:, None], True)
        slots = slots_of(words, int(words.sum(1).max()))
        votes = raters(pictures, view, slots, words)
        rate = torch.zeros_like(slots).index_add(0, pictures.rows, (votes > 0).long()) > 0
        few = slots_of(rate, int(rate.sum(1).max()))
        votes = votes.gather(1, few[pictures.rows])
        score = pictures.spread(looked_at(pictures, view, slots.gather(1, few), votes), 0.0)
        width = view.hidden.shape[-1]
        spent = pictures.summed(pictures.lengths) * words.sum(1) * width  # products of states, and rows of attention
        spent = spent + rate.sum(1) * view.alive.sum(1) * width
        return score, replace(self.choose(score, view), macs=spent)


def raters(pictures: Pictures, view: View, slots: Tensor, words: Tensor) -> Tensor:
    """(P, T) fp32: the vote of each word of a picture's row, 0 where it does not rate; ``slots`` (B, T) hold the
    ``words`` (B, N), then anything."""
    x, rows = view.hidden.float(), pictures.rows
    text = x.gather(1, slots[..., None].expand(-1, -1, x.shape[-1]))
    last = (pictures.slots % view.alive.shape[1]).masked_fill(~pictures.real, -1).amax(1, keepdim=True)
    real = words.gather(1, slots)[rows]
    behind = real & (slots[rows] > last)
    readout = slots[rows] == view.readout[rows][:, None]
    behind = torch.where(behind.any(1, keepdim=True), behind, real & readout)
    seen = (pictures.take(x) @ text[rows].transpose(1, 2)).masked_fill(~behind[:, None], float("-inf")).softmax(-1)
    relevance = (seen * pictures.real[..., None]).sum(1) / pictures.lengths[:, None]
    mean = 1 / behind.sum(1, keepdim=True)  # the relevances of a picture sum to 1
    rate = behind & (relevance >= mean * (1 - 1e-6))
    return rate / rate.sum(1, keepdim=True)


def looked_at(pictures: Pictures, view: View, slots: Tensor, votes: Tensor) -> Tensor:
    """(P, M) fp32: the attention on each token of the rows at ``slots`` (B, m) with their ``votes`` (P, m), the mean
    over the half of the heads that look most at the picture."""
    fade, heads = decay(view, slots), view.heads
    step = max(1, CHUNK // max(1, slots.numel() * view.alive.shape[1]))
    seen = votes.new_zeros(len(votes), heads, pictures.real.shape[1])
    for first in range(0, heads, step):
        some = slice(first, first + step)
        weights = view.attention_rows(slots, some, fade)  # (B, h, m, N)
        for number, row in enumerate(pictures.rows.tolist()):
            places = pictures.slots[number] % view.alive.shape[1]
            seen[number, some] = (votes[number] @ weights[row])[:, places]
    seen = seen * pictures.real[:, None]
    most = seen.sum(2).topk(-(-heads // 2), dim=1).indices
    return seen.gather(1, most[..., None].expand(-1, -1, seen.shape[2])).mean(1)


def decay(view: View, slots: Tensor) -> Tensor | None:
    """(B, m, N): by how much rotary positions weaken the logits between the rows at ``slots`` (B, m) and all tokens;
    None: there are none."""
    if view.rotary is None:
        return None
    cos, sin = (x.float().expand(len(slots), -1, -1) for x in view.rotary)
    own = slots[..., None].expand(-1, -1, cos.shape[-1])
    turned = cos.gather(1, own) @ cos.transpose(1, 2) + sin.gather(1, own) @ sin.transpose(1, 2)
    still = cos[:, :1].square().sum(-1, keepdim=True) + sin[:, :1].square().sum(-1, keepdim=True)  # at distance 0
    share = cos.shape[-1] / view.key.shape[-1]  # of the channels that turn
    return (1 - share + share * turned / still).clamp(min=LEAST)
