"""The contract of a cache method: which entries stay.

    entries stay = the best of score(view), for each row and key head; the first and the last tokens in any case

A method is a dataclass in a file of its own, and overrides ``score``. How many entries stay is the same for all: a
share or a number of the prompt (``keep``), a number while decoding (``hold``), megabytes (``target_cache_mb``), or time
(``target_ms_per_token``).

Shapes: B rows, KV key heads of the cache, P entries.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..core.method import Pruner
from .adaptive import shares
from .values import VALUES, weighted
from .view import CacheView

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .costs import StepCosts
    from .hooks import CacheHooks

HEADS = ("own", "shared", "adaptive")
LAYERS = ("equal", "pyramid", "adaptive")
BUDGETS = ("keep", "hold", "target_cache_mb", "target_ms_per_token")
STEEPNESS = 20  # of the pyramid: its last layer keeps a twentieth of the mean
EVERY = 64  # steps between evictions while decoding
NEVER = 1 << 60  # entries more
_LAST = threading.local()  # .reports: the report of the last forward of each method, for the thread that ran it


@dataclass(frozen=True)
class Budget:
    """How many entries the rows of one layer may hold.

    Attributes:
        hold: entries of each row to which it returns.
        at: entries of a row from which on it does.
    """

    hold: list[int]
    at: list[int]

    def kept(self, counts: list[int]) -> list[int]:
        """Of each row, how many of its ``counts`` entries stay."""
        rows = zip(counts, self.hold, self.at, strict=True)
        return [min(hold, count) if count >= at else count for count, hold, at in rows]


class CachePruner(Pruner):
    """Base class of the methods that prune a KV cache; each subclass is a dataclass.

    One of ``keep``, ``hold`` and the two targets says how much stays; first and last tokens are counted.

    Args:
        keep: of the prompt, a share in (0, 1] or a number of entries. What is generated is kept. A prompt in several
            parts, or a second turn, is brought back to this share of all that was seen, or to this number, at each
            part.
        hold: entries of each row and key head, also while decoding: a row returns to so many whenever it has ``every``
            more.
        target_cache_mb: megabytes (10^6 bytes) of keys and values, of all rows and layers together, never exceeded
            after a step; ``hold`` follows from it.
        target_ms_per_token: milliseconds of a step of decoding, without the time for scores and choices; ``hold``
            follows from it. The first call with a number of rows measures steps on this machine, a second or so; what
            was measured is in ``costs`` and is not saved.
        every: steps between evictions while decoding. 1 scores and moves entries at every step.
        sinks: first tokens of each row that never leave: without them a model loses its thread at once.
        recent: last tokens that never leave.
        heads: "own": each key head chooses. "shared": one choice for a layer. "adaptive": each head chooses, and the
            heads of a layer share its budget (AdaKV); no byte is held for what a head lacks, but a step of decoding
            goes through the heads one after the other.
        layers: "equal": each layer holds as much. "pyramid": the first ones more (Cai et al., "PyramidKV", 2024).
            "adaptive", of ``KVzip`` alone: all heads of all layers share one budget.
        value: "vatp" multiplies the score by the value's norm (Guo et al., 2024). "critical" fills half of the budget
            by the score, the rest by the score times what the value adds to the state (Feng et al., 2025).
    """

    keep: float | int | None = None
    hold: int | None = field(default=None, kw_only=True)
    target_cache_mb: float | None = field(default=None, kw_only=True)
    target_ms_per_token: float | None = field(default=None, kw_only=True)
    every: int = field(default=EVERY, kw_only=True)
    sinks: int = field(default=4, kw_only=True)
    recent: int = field(default=32, kw_only=True)
    heads: str = field(default="own", kw_only=True)
    layers: str = field(default="equal", kw_only=True)
    value: str = field(default="none", kw_only=True)

    layouts: ClassVar[tuple[str, ...]] = ("mask", "evict")
    repeats: ClassVar[bool] = False  # whether the text is fed once more before anything leaves
    sums_attention: ClassVar[bool] = False  # whether the attention received is summed over all steps
    weighs_values: ClassVar[bool] = False  # whether its score is attention, which ``value`` can weigh
    serves_latents: ClassVar[bool] = True  # whether it can serve a cache of latents (MLA)
    needs_places: ClassVar[bool] = False  # whether it takes positions for what rotation made of them
    turns_back: ClassVar[bool] = False  # whether its score takes queries or keys before rotation

    def __post_init__(self) -> None:
        super().__post_init__()
        self.costs: dict[int, StepCosts] = {}  # of a step of decoding, by the number of rows
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        kind = type(self).__name__
        if len(given) != 1:
            raise ValueError(f"{kind} got {' and '.join(given) or 'no budget'}: give one of {', '.join(BUDGETS)}")
        for name, least in (("every", 1), ("sinks", 0), ("recent", 1)):
            if not _whole(getattr(self, name)) or getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a whole number, {least} or more")
        for name, known in (("heads", HEADS), ("layers", LAYERS), ("value", VALUES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {', '.join(known)}")
        if self.layers == "adaptive" and not (self.repeats and self.heads == "adaptive"):
            what = "heads='adaptive'" if self.repeats else "KVzip, which alone scores them all before any leaves"
            raise ValueError(f"layers='adaptive' shares a budget between layers: it is for {what}")
        if self.value != "none" and not self.weighs_values:
            raise ValueError(f"value={self.value!r} weighs attention, which {kind} does not look at: leave it out")
        self._check_budget(given[0])

    def _check_budget(self, name: str) -> None:
        """Raise ValueError where a budget is no number that a method can take."""
        budget: Any = getattr(self, name)
        number = isinstance(budget, (int, float)) and not isinstance(budget, bool) and budget > 0
        counted = name == "hold" or (name == "keep" and _whole(budget))
        share = name == "keep" and isinstance(budget, float)
        if not number or (name == "hold" and not _whole(budget)) or (share and budget > 1):
            expected = {
                "keep": "a share of the prompt in (0, 1], as 0.25, or a number of entries, as 512",
                "hold": "a number of entries, as 1024",
                "target_cache_mb": "megabytes, as 64",
                "target_ms_per_token": "milliseconds, as 20",
            }
            raise ValueError(f"{name}={budget!r}: expected {expected[name]}")
        if counted and budget < self.floor:
            raise ValueError(
                f"{name}={budget} is below the {self.sinks} first and {self.recent} last tokens that never leave: give "
                f"{self.floor} or more, or smaller sinks and recent"
            )

    # --- what a method overrides ---------------------------------------------------------------------------------
    @property
    def window(self) -> int:
        """How many of the last queries the score looks at; 0: none."""
        return 0

    @property
    def floor(self) -> int:
        """Entries of a row that never leave."""
        return self.sinks + self.recent

    def moves_sinks(self, hooks: CacheHooks) -> bool:
        """Whether the first tokens follow the others at a distance that stays the same."""
        return False

    def score(self, view: CacheView) -> Tensor:
        """(B, h, P): the importance of each entry, higher stays; h is KV, H, or 1 for one choice of a layer."""
        raise NotImplementedError(f"{type(self).__name__} does not say which entries to keep")

    def ready(self) -> None:
        """Raise ValueError where something has to be learned before anything can leave."""

    def check(self, hooks: CacheHooks) -> None:
        """Raise ValueError where the method cannot serve the model of ``hooks``, which are not attached yet."""
        if hooks.latent and (self.value != "none" or not self.serves_latents):
            what = f"value={self.value!r}" if self.value != "none" else type(self).__name__
            raise ValueError(
                f"{what} is not possible with {hooks.architecture.name}, whose cache holds latents (MLA) and neither "
                "keys nor values; KeyDiff, SnapKV, TOVA and H2O need no more than what attention is given"
            )
        one = hooks.latent or getattr(hooks.architecture.base.config, "num_key_value_heads", None) == 1
        if self.heads == "adaptive" and one:
            equal = ", layers='equal'" if self.layers == "adaptive" else ""
            raise ValueError(
                f"heads='adaptive' is not possible with {hooks.architecture.name}, whose layers have one key head, "
                f"with which no other can share: give heads='own'{equal}"
            )

    # --- what is the same for all ----------------------------------------------------------------------------------
    def attachment(self, model: PreTrainedModel, layout: str, original: str | None = None) -> CacheHooks:
        """The hooks that run this method in ``model``."""
        from .hooks import CacheHooks  # which runs what stands here

        return CacheHooks(model, self, "evict" if layout == "auto" else layout, original)

    def check_chunks(self, size: int | None) -> None:
        """Raise ValueError where a prompt comes in parts of ``size`` tokens that look like what is generated."""
        if self.keep is not None and size == 1:
            raise ValueError(
                f"prefill_chunk_size=1 looks like tokens that are generated, of which {self.name} lets none leave "
                "under keep: take larger chunks, or hold"
            )

    def budget(self, arrived: list[int], prompt: Sequence[bool], place: tuple[int, int], room: int) -> Budget | None:
        """How many entries the rows of one layer may hold; None: nothing is decided now.

        Args:
            arrived: of each row, the real tokens that came as far as this layer.
            prompt: of each row, whether this forward brought a part of a prompt, and not what was generated.
            place: the number of this layer among those that are pruned, and how many these are.
            room: entries of a row for which a target has room.
        """
        if self.keep is not None:
            if not any(prompt):
                return None
            keep: Any = self.keep
            most = [keep if _whole(keep) else math.ceil(keep * count - 1e-9) for count in arrived]
        else:
            most = [room - self.every + 1 if self.hold is None else self.hold] * len(arrived)
            if most[0] < self.floor:
                raise ValueError(
                    f"target_cache_mb={self.target_cache_mb} has room for {room} entries of each row, and the "
                    f"{self.sinks} first and {self.recent} last tokens with {self.every} steps between evictions need "
                    f"{self.floor + self.every - 1}: give more, or a smaller every, recent or batch"
                )
        hold = [self.held_in(count, *place) for count in most]
        later = NEVER if self.keep is not None else self.every
        return Budget(hold, [count + (1 if part else later) for count, part in zip(hold, prompt, strict=True)])

    def held_in(self, mean: int, number: int, layers: int) -> int:
        """Entries of a row in layer ``number`` of ``layers``, of which each holds ``mean`` on the average, or less.

        What a layer holds beyond its share, for the tokens that never leave, the others give up.
        """
        if self.layers != "pyramid" or layers == 1 or mean <= self.floor:
            return max(self.floor, mean)
        last = 1 / STEEPNESS
        shares = [(2 - last) + (2 * last - 2) * other / (layers - 1) for other in range(layers)]
        above = [max(0.0, mean * share - self.floor) for share in shares]
        return self.floor + int(above[number] * (mean - self.floor) * layers / sum(above) + 1e-9)

    def protection(self, position: Tensor, live: Tensor) -> Tensor:
        """(B, KV, P) bool: the first and the last tokens, by their ``position``."""
        real = position.amax(-1, keepdim=True) + 1
        return live & ((position < self.sinks) | (position >= real - self.recent))

    def intact(self, kept: list[int]) -> int:
        """How many of the last tokens no head has lost, where so many entries of each row stay."""
        return self.recent

    def select(self, view: CacheView, kept: list[int]) -> tuple[Tensor, Tensor | None]:
        """The slots (B, KV, K) of the entries that stay, rising, and which of them are dead.

        ``kept``: of each row, how many stay, on the average of its heads; K is the largest number of a head.
        """
        return self.best(view, self.score(view).float(), kept)

    def best(self, view: CacheView, scores: Tensor, kept: list[int]) -> tuple[Tensor, Tensor | None]:
        """The slots of the best ``scores`` (B, h, P), as ``select`` returns them."""
        if scores.shape[1] > 1:
            scores = view.of_cache(scores)
        if self.heads == "shared":
            scores = scores.mean(1, keepdim=True)
        few, most, least = torch.tensor(kept, device=scores.device)[:, None, None], max(kept), min(kept)
        if self.heads == "adaptive":
            plain = scores if self.value == "critical" else weighted(self.value, scores, view, few)
            few = shares(plain, view.protected, view.live, few) if view.quota is None else view.quota
            most, least = int(few.max()), int(few.min())
        ranked = weighted(self.value, scores, view, few).expand(-1, view.heads, -1)
        ranked = ranked.masked_fill(view.protected, math.inf).masked_fill(~view.live, -math.inf)
        best = ranked.argsort(dim=-1, descending=True, stable=True)[..., :most]
        if least == most:
            return best.sort(-1).values, None
        stays = torch.arange(most, device=scores.device) < few
        slots = best.masked_fill(~stays, -1).sort(-1).values
        return slots.clamp(min=0), slots < 0

    # --- the report ----------------------------------------------------------------------------------------------
    @property
    def report(self) -> list[dict]:
        """This thread's last forward, layer by layer.

        ``seen``: real tokens of all rows; ``held``: entries that live, per key head; ``bytes`` of keys and values, of
        what is remembered beside them (``extra_bytes``), and of a cache that keeps everything (``dense_bytes``);
        ``evictions`` so far, ``seconds`` spent on scores and choices. ``kind``: "pruned", or "sliding" for a layer that
        is bounded already and left alone.
        """
        report = _reports().get(self)
        if report is None:
            raise RuntimeError("no forward has been recorded yet in this thread: call the model first")
        return [dict(row) for row in report]

    @report.setter
    def report(self, report: list[dict]) -> None:
        _reports()[self] = report


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _reports() -> WeakKeyDictionary[CachePruner, list[dict]]:
    if not hasattr(_LAST, "reports"):
        _LAST.reports = WeakKeyDictionary()
    return _LAST.reports
