"""Learned thresholds for a cache: LTP (Kim et al., KDD 2022, arXiv 2107.00910) brought to its entries."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.architecture import Architecture
from ..core.attachment import at_rest
from ..core.scoring import repeat_heads
from ..core.view import AttentionInputs
from .listen import hear
from .pruner import NEVER, Budget, CachePruner
from .view import CacheView

if TYPE_CHECKING:
    from .hooks import CacheHooks

Texts = list[Mapping[str, Tensor]]

TEMPERATURE = 0.5  # of the soft gate, in units of the score, a logarithm
TINY = 1e-9


class LTPCache(CachePruner):
    """Keep the entries whose attention lies above a threshold of their layer, learned from texts without labels.

    The score is the logarithm of the mean attention of the last ``observe`` queries, relative to uniform. How much a
    layer holds follows from the text. ``learn`` sets the thresholds of one model, which are saved with it.

    | paper | here | why |
    |---|---|---|
    | the attention of all tokens | of the last queries of the prompt | as in SnapKV: the question stands there |
    | labels; weights are trained, too | the model's own next words; it stays as it is | texts are enough |
    | a penalty on what is kept | steps along which ``keep`` is met | a share can be asked for |
    | a token stays or leaves | the number above is shared out among heads as ``heads`` says | rows keep whole means |
    | at every layer of every forward | when a prompt ends; what is generated stays | a threshold sees one question |

    DMS and KVzap let a model say for each token how long it stays; that takes weights of their own, and is not here.

    Args:
        keep: the share of entries that stays on the average of the texts learned from. Of another text it may be
            another share: learn from texts twice as long as the prompts.
        observe: how many of the last queries are looked at.
    """

    observe: int = field(default=16, kw_only=True)
    heads: str = field(default="adaptive", kw_only=True)

    name: ClassVar[str] = "ltp-cache"
    serves_latents: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.keep, float):
            raise ValueError("LTPCache learns what is kept on the average: give keep as a share, as 0.25")
        if self.layers != "equal":
            raise ValueError(f"layers={self.layers!r}: thresholds say what each layer holds")
        if self.observe < 1:
            raise ValueError(f"observe={self.observe}: expected 1 or more of the last queries")

    @property
    def window(self) -> int:
        return self.observe

    def bind(self, model: Architecture) -> None:
        super().bind(model)
        self.threshold: Tensor  # (L,); NaN where none was learned
        if not hasattr(self, "threshold"):
            self.register_buffer("threshold", torch.full((len(model.layers),), math.nan))

    def ready(self) -> None:
        if self.keep != 1.0 and not bool(self.threshold.isfinite().any()):
            raise ValueError(
                f"ltp-cache has no thresholds yet: {self.attached().place}.learn([tokenizer(text, "
                "return_tensors='pt'), ...])"
            )

    # --- what stays ------------------------------------------------------------------------------------------------
    def budget(self, real: list[int], prompt: Sequence[bool], place: tuple[int, int], room: int) -> Budget | None:
        if self.keep == 1.0 or not any(prompt):
            return None
        return Budget([self.floor] * len(real), [self.floor + (1 if part else NEVER) for part in prompt])

    def score(self, view: CacheView) -> Tensor:
        asks = (view.query_position[:, -self.window :] >= 0).sum(1).clamp(min=1)[:, None, None]
        seen = view.of_cache(view.attention(self.window).sum(2)) / asks
        return relative(seen, view.live.sum(-1, keepdim=True))

    def select(self, view: CacheView, kept: list[int]) -> tuple[Tensor, Tensor | None]:
        scores = self.score(view)
        stays = view.live & (view.protected | (scores >= self.threshold[view.layer].to(scores.device)))
        above = [-(-count // view.heads) for count in stays.sum((1, 2)).tolist()]
        return self.best(view, scores, [max(pair) for pair in zip(above, kept, strict=True)])

    # --- learning --------------------------------------------------------------------------------------------------
    def learn(self, batches: Iterable[Mapping[str, Tensor]], *, epochs: int = 2, lr: float = 0.1) -> dict[str, float]:
        """Learn the thresholds: the second half of each text is to read on as if all of its first half were there.

        Args:
            batches: batches of ``input_ids`` of texts, with an ``attention_mask`` where they are padded; a few dozen
                texts of some hundred tokens.
            epochs, lr: of Adam.

        Returns:
            "keep", the share that is kept of these texts; "kl" and "kl_equal", nats per token between the model with
            everything and with what is kept: by what was learned, and by thresholds that keep as much of each layer.

        Raises:
            ValueError: no text is long enough for something to leave, or the model has no head that says a next word.
        """
        hooks, texts = self.attached(), list(batches)
        if hooks.model.get_output_embeddings() is None:
            raise ValueError(
                f"learn() compares next words, and {type(hooks.model).__name__} has no head that says one: load it as "
                "a model for causal language modelling"
            )
        with at_rest(hooks.model):
            with torch.enable_grad():
                start, learned, share = self._learned(hooks, texts, epochs, lr)
            self.threshold.fill_(math.nan)
            self.threshold[hooks.full] = learned.to(self.threshold.device)
            with torch.no_grad():
                equal, kl = (
                    sum(_distance(hooks, text, Halves(self, theta, hard=True)).item() for text in texts) / len(texts)
                    for theta in (start, learned)
                )
        return {"keep": share, "kl": kl, "kl_equal": equal}

    def _learned(self, hooks: CacheHooks, texts: Texts, epochs: int, lr: float) -> tuple[Tensor, Tensor, float]:
        """Thresholds (L,) that keep as much of each layer, those that were learned, and the share that they keep."""
        found, keep, device = Halves(self), float(self.keep or 0), hooks.architecture.base.device
        with torch.no_grad():
            for text in texts:
                hear(hooks, text, found)
        if not found.scores:
            raise ValueError(f"learn() got no text of more than {2 * self.floor + 1} tokens: nothing can leave")
        scores = [torch.cat(found.scores[number]) for number in hooks.full]
        start = torch.stack([cut(one, keep) for one in scores]).to(device)
        theta = torch.nn.Parameter(start.clone())
        adam, share = torch.optim.Adam([theta], lr=lr), 0.0
        for step in range(epochs * len(texts) + 1):
            if step:
                halves = Halves(self, theta)
                loss = _distance(hooks, texts[step % len(texts)], halves)
                if not halves.shares:
                    continue
                (up,) = torch.autograd.grad(loss, [theta], retain_graph=True)
                (more,) = torch.autograd.grad(torch.stack(halves.shares).mean(), [theta])
                theta.grad = up - more * (up @ more) / (more @ more).clamp(min=TINY)  # along which the share stays
                adam.step()
            above = torch.cat([one - level for one, level in zip(scores, theta.detach().cpu(), strict=True)])
            shift = cut(above, keep)
            theta.data += shift.to(device)
            share = (above >= shift).float().mean().item()
        return start, theta.detach(), share


@dataclass(eq=False)
class Halves:
    """What the layers are shown of texts, of which the second half is to read on over what is left of the first.

    Attributes:
        method: whose thresholds are learned.
        theta: (L,) thresholds of the pruned layers; None: all of the first half is there, and scores are taken.
        hard: whether an entry is there or not; else a gate fades it.
        scores: of each layer, parts (n,) with the scores of entries that may leave, and +inf of those that do not.
        shares: of each layer, the mean gate.
    """

    method: LTPCache
    theta: Tensor | None = None
    hard: bool = False
    scores: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    shares: list[Tensor] = field(default_factory=list)

    def __call__(self, number: int, asks: Tensor, given: AttentionInputs) -> Tensor | None:
        """The states (B, N, H, d) of one layer, for queries at ``asks`` (B, N); None: as attention makes them."""
        method, kv = self.method, given.key.shape[1]
        asks = asks.to(given.query.device)
        half = (asks.amax(1, keepdim=True) + 1) // 2
        first = (asks >= 0) & (asks < half) & (half > method.floor)
        if not bool(first.any()):
            return None
        stays = (asks < method.sinks) | (asks >= half - method.recent)
        sees = (asks[:, None] <= asks[..., None]) & (asks >= 0)[:, None]
        sees = sees | torch.eye(asks.shape[1], dtype=torch.bool, device=asks.device)
        query, logits = given.query.float(), given.logits
        products = logits.cap(query @ repeat_heads(given.key, query).float().transpose(-1, -2) * logits.scaling)
        products = products.masked_fill(~sees[:, None], torch.finfo(torch.float32).min)
        votes = (first & (asks >= half - method.observe))[:, None, None].float()  # (B, 1, 1, N)
        seen = (votes @ logits.softmax(products))[:, :, 0] / votes.sum(-1).clamp(min=1)
        scores = relative(seen.unflatten(1, (kv, -1)).mean(2), half[:, None])  # (B, KV, N)
        if self.theta is None:
            fixed = scores.masked_fill(stays[:, None], math.inf)
            self.scores[number].append(fixed[first[:, None].expand_as(fixed)].cpu())
            return None
        over = scores - self.theta[method.attached().full.index(number)].to(scores.device)
        gate = torch.where(over >= 0, 0.0, -math.inf) if self.hard else F.logsigmoid(over / TEMPERATURE)
        gate = gate.masked_fill((stays | ~first)[:, None], 0.0)
        self.shares.append(gate.exp()[first[:, None].expand_as(gate)].mean())
        later = (asks >= half)[:, None, :, None]
        gate = gate.repeat_interleave(query.shape[1] // kv, 1)[:, :, None]
        weights = logits.softmax(torch.where(later, products + gate, products))
        return (weights.to(given.value.dtype) @ repeat_heads(given.value, query)).transpose(1, 2).contiguous()


def _distance(hooks: CacheHooks, text: Mapping[str, Tensor], halves: Halves) -> Tensor:
    """Nats per token of the second half, between the model with everything and with what ``halves`` leaves."""
    with torch.no_grad():
        whole: Any = hear(hooks, text, lambda *given: None).logits.float().log_softmax(-1)
    left: Any = hear(hooks, text, halves).logits.float().log_softmax(-1)
    mask = text.get("attention_mask")
    place = torch.ones_like(text["input_ids"]) if mask is None else mask
    place = (place.cumsum(1) - 1).masked_fill(place == 0, -1).to(whole.device)
    second = place >= (place.amax(1, keepdim=True) + 1) // 2
    return F.kl_div(left, whole, log_target=True, reduction="none").sum(-1)[second].mean()


def relative(seen: Tensor, count: Tensor) -> Tensor:
    """The logarithm of attention (B, KV, P), relative to what is uniform over ``count`` entries."""
    return (seen * count).clamp(min=TINY).log()


def cut(scores: Tensor, keep: float) -> Tensor:
    """The threshold that leaves a share of ``scores`` (n,), or as few as it can."""
    level = scores.sort(descending=True).values[max(0, math.ceil(keep * len(scores) - 1e-6) - 1)]
    return level if bool(level.isfinite()) else scores[scores.isfinite()].max() + 1
