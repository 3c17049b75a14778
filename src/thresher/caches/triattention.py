"""TriAttention: what queries look at by distance (2026, arXiv 2604.04921)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.architecture import Architecture
from ..core.attachment import at_rest
from ..core.scoring import repeat_heads
from ..core.view import AttentionInputs
from .listen import hear
from .pruner import CachePruner
from .rope import Rotation
from .view import CacheView

if TYPE_CHECKING:
    from .hooks import CacheHooks

AHEAD = 17  # distances: 1, 2, 4, ..., 2^16


class TriAttention(CachePruner):
    """Keep what queries to come look at, as far as it follows from their centres and the distance.

    Queries before rotation lie close to one centre in each head, whatever the text. The rotation of the pair f of
    channels by ω_f a position then says what a query looks at, so many positions further on: the mean over distances δ
    = 1, 2, 4, ..., 2^16 of Σ_f |E q_f| |k_f| cos(ω_f (N - p_j + δ) + φ_f), with φ_f the angle between E q_f and k_f.
    What the centre leaves open is added: Σ_f (E |q_f| - |E q_f|) |k_f|. It takes no attention while decoding.

    The centres come from ``calibrate``, are those of one model, and are saved with it.

    | paper | here | why |
    |---|---|---|
    | scores of query heads are brought to one scale, the highest counts | the mean counts | as in every method |
    | every 128 steps | ``every``, 64 | as in every method |
    | all channels turn | channels that do not turn count by their centre | partial rotation (Phi, GPT-NeoX) |

    Arguments as ``CachePruner``. A padded batch needs ``position_ids``, as ``generate`` gives them.
    """

    name: ClassVar[str] = "triattention"
    serves_latents: ClassVar[bool] = False
    needs_places: ClassVar[bool] = True
    turns_back: ClassVar[bool] = True

    def check(self, hooks: CacheHooks) -> None:
        super().check(hooks)
        if not hooks.rotary or any(hooks.turns(n) and hooks.rotation(n) is None for n in hooks.full):
            raise ValueError(
                f"{self.name} is not possible with {hooks.architecture.name}, which has no rotary positions, or turns "
                "its queries in a way that is not known; SnapKV and KeyDiff take them as they are"
            )

    def bind(self, model: Architecture) -> None:
        super().bind(model)
        config: Any = model.base.config
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.centre: Tensor  # (L, H, d), means of queries before they turn
        self.length: Tensor  # (L, H, d), mean norms of the pairs of channels
        self.queries: Tensor  # (), how many the means are of
        if not hasattr(self, "centre"):
            self.register_buffer("centre", torch.zeros(len(model.layers), heads, width))
            self.register_buffer("length", torch.zeros(len(model.layers), heads, width))  # of each pair, twice
            self.register_buffer("queries", torch.zeros((), dtype=torch.long))

    def ready(self) -> None:
        if not int(self.queries):
            raise ValueError(
                f"triattention knows no centres of queries yet: {self.attached().place}.calibrate([tokenizer(text, "
                "return_tensors='pt'), ...]), with some thousand tokens"
            )

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Mapping[str, Tensor]]) -> int:
        """Take the centres of the queries of some texts, each a batch of ``input_ids``; returns how many there were.

        Raises:
            ValueError: there are no texts.
        """
        hooks = self.attached()
        sums = [torch.zeros_like(self.centre), torch.zeros_like(self.length)]
        count = 0

        def add(number: int, asks: Tensor, given: AttentionInputs) -> None:
            real, query = (asks >= 0).to(given.query.device)[:, None, :, None], given.query.float()
            rotation = hooks.rotation(number)
            if rotation is not None:
                query = rotation.back(query, asks.to(query.device)[:, None])
            for total, x in zip(sums, (query, pairs(query, rotation)), strict=True):
                total[number] += (x * real).sum((0, 2)).to(total.device)

        with at_rest(hooks.model):
            for batch in batches:
                hear(hooks, batch, add)
                mask = batch.get("attention_mask")
                count += batch["input_ids"].numel() if mask is None else int(mask.sum())
        if not count:
            raise ValueError("calibrate() got no texts: give batches of input_ids")
        self.centre.copy_(sums[0] / count)
        self.length.copy_(sums[1] / count)
        self.queries.fill_(count)
        return count

    def score(self, view: CacheView) -> Tensor:
        rotation, key = view.rotation, repeat_heads(view.key, view.query).float()
        of_layer = (x[view.layer].to(key.device)[:, None] for x in (self.centre, self.length))
        centre, length = (x.expand(len(key), -1, -1, -1) for x in of_layer)  # (B, H, 1, d)
        spread = (length - pairs(centre, rotation)) / 2  # each pair is there twice
        if rotation is not None:
            ahead = view.length[:, 0] - 1 + 2 ** torch.arange(AHEAD, device=key.device)
            angle = rotation.angles(ahead)
            cos, sin = (x.mean(1)[:, None, None] * rotation.scaling for x in (angle.cos(), angle.sin()))
            centre, spread = rotation.turned(centre, cos, sin), spread * rotation.scaling
        return (centre * key).sum(-1) + (spread * pairs(key, rotation)).sum(-1)


def pairs(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Of each channel of ``x`` (..., d) the norm of the pair that it turns in; 0 where it does not turn."""
    norms = torch.zeros_like(x)
    if rotation is None:
        return norms
    half = len(rotation.frequencies)
    if rotation.neighbours:
        norm = x[..., : 2 * half].unflatten(-1, (half, 2)).norm(dim=-1)
        norms[..., : 2 * half] = norm.repeat_interleave(2, -1)
    else:
        norm = x[..., : 2 * half].unflatten(-1, (2, half)).norm(dim=-2)
        norms[..., : 2 * half] = torch.cat([norm, norm], -1)
    return norms
