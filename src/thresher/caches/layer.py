"""A layer of transformers' cache that may hold fewer entries than it has seen tokens.

It reports its *logical* length: ``get_seq_length`` is the number of tokens seen, and ``get_mask_sizes`` says that the
entries it holds are the last ones of them. So positions, second turns, chunks, beams and drafts are what they are with
a full cache.

Shapes: B rows, KV key heads of the cache, P entries held, d channels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..core.scoring import Logits

KINDS = ("pruned", "sliding")  # of layers, in the report
SPARE = (
    64  # slots beyond its window that a layer may hold for tokens that are taken back, and twice that before it slides
)
TENSORS = ("keys", "values", "position", "hidden", "received", "queries", "query_position", "sink_keys", "shift")


@dataclass(frozen=True, eq=False)
class Coming:
    """The tokens of the next update.

    Attributes:
        position: (B, q), their places; -1: padding, or a slot that holds nothing.
        real: of each row, the real tokens that the model was given.
        live: of each row, those that have come as far as this layer; the others left before it.
        seen: tokens that the model was given, with padding.
        hidden: (B, q) bool, of the first tokens of a layer those that left and are held all the same (layout "mask").
    """

    position: Tensor
    real: list[int]
    live: list[int]
    seen: int
    hidden: Tensor | None = None

    @property
    def short(self) -> bool:
        """Whether some have left before this layer."""
        return self.live != self.real

    @property
    def asks(self) -> Tensor:
        """(B, q), positions of the tokens that ask; -1: nobody."""
        return self.position if self.hidden is None else self.position.masked_fill(self.hidden, -1)


class PrunedLayer(DynamicLayer):
    """The keys and values of one layer, of which entries may leave, for each row and head others.

    Entries lie in the order of their tokens. A row that keeps fewer entries than the widest one has dead slots in
    front.

    Args:
        masked: hide what leaves and hold it all the same: the reference that eviction is tested against.
        window: tokens that a query sees, itself included; 0: all. Places are then those of slots, as in transformers.

    Attributes:
        seen: tokens, with padding.
        real: of each row, the tokens seen without padding.
        arrived: of each row, those of them that came as far as this layer.
        counts: of each row, the entries that live.
        position: (B, KV, P) int32, the place of an entry among the real tokens of its row; -1: padding, or a dead slot.
        hidden: (B, KV, P) bool, what left under ``masked``; None: nothing.
        received: (B, KV, P) fp32, the attention that each entry has received, where a method sums it.
        queries, query_position: (B, H, w, d) and (B, w), the last queries, where a method looks back at them.
        sink_keys: (B, KV, S, d) fp32, the keys of the first tokens before they were moved.
        shift: (B, KV, 1), how far they were moved.
        logits: how the layer makes logits of products.
        short: whether something has left, or never came.
        behind: whether tokens left before this layer, so that others hold more.
        waiting: how many of the last queries belong to a draft, about which nothing is decided yet.
        waits_prompt: whether a part of a prompt is among them.
        fresh: whether ``generate`` has begun and the next forward brings a prompt.
        record_past: whether tokens may be taken back (``crop``), as assisted decoding does.
        evictions, seconds: how often entries left, and how long scores and choices took.
    """

    keys: Any
    values: Any

    def __init__(self, masked: bool = False, window: int = 0):
        super().__init__()
        self.masked, self.sliding_window = masked, window
        self.is_sliding = window > 0
        self._clear()

    def _clear(self) -> None:
        self.seen = 0
        self.real: list[int] = []
        self.arrived: list[int] = []
        self.counts: list[int] = []
        self.position: Tensor | None = None
        self.hidden: Tensor | None = None
        self.received: Tensor | None = None
        self.queries: Tensor | None = None
        self.query_position: Tensor | None = None
        self.sink_keys: Tensor | None = None
        self.shift: Tensor | None = None
        self.logits: Logits | None = None
        self.coming: Coming | None = None  # what the model has announced
        self.short = self.behind = False
        self.waiting, self.waits_prompt, self.record_past, self.fresh = 0, False, False, False
        self.newest = 0  # slots at the end in which every head holds the same tokens, one after the other
        self.evictions, self.seconds = 0, 0.0

    # --- what it holds -------------------------------------------------------------------------------------------
    @property
    def held(self) -> int:
        """Slots held, dead ones included."""
        return 0 if self.position is None else self.position.shape[-1]

    @property
    def live(self) -> Tensor:
        """(B, KV, P) bool: the slots that hold an entry which may be attended to."""
        assert self.position is not None
        live = self.position >= 0
        return live if self.hidden is None else live & ~self.hidden

    @property
    def whole(self) -> bool:
        """Whether it holds all that it has seen, as a cache that is not pruned does."""
        return not self.short

    @property
    def dead(self) -> bool:
        """Whether a slot is not to be attended to."""
        return any(count < self.held for count in self.counts)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage of keys and values."""
        return sum(x.untyped_storage().nbytes() for x in (self.keys, self.values) if x is not None)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry of one row: its keys and values of all heads."""
        size = self.keys.element_size()
        return size * self.keys.shape[1] * (self.keys.shape[-1] + self.values.shape[-1])

    @property
    def extra_bytes(self) -> int:
        """Bytes of what is remembered beside keys and values."""
        others = (getattr(self, name) for name in TENSORS[2:])
        return sum(x.untyped_storage().nbytes() for x in others if x is not None)

    # --- transformers' contract ----------------------------------------------------------------------------------
    def get_seq_length(self) -> int:
        """The number of tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that ``query_length`` new tokens will see, and the column of the mask where they begin."""
        return self.held + query_length, self.seen - self.held

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, KV, q, d); returns all that is held, in which new tokens see what they may.

        Raises:
            ValueError: no pruned model has announced them, and only its mask would hide the dead slots.
        """
        coming, self.coming = self.coming, None
        if coming is None and self.short and (self.dead or self.behind):
            raise ValueError(
                "this cache was pruned and its rows or layers are uneven: go on with the pruned model, or within "
                "dense(model)"
            )
        batch, heads, new, _ = key_states.shape
        super().update(key_states, value_states)
        self.open(batch)
        if coming is None:
            position, real = self.next_positions(new)
            coming = Coming(position, real, real, new)
        position = coming.position.to(key_states.device, torch.int32)[:, None].expand(-1, heads, -1)
        self.position = self._grown(self.position, position)
        if coming.hidden is not None:
            self.hidden = coming.hidden.to(position.device)[:, None].expand_as(position).contiguous()
        elif self.hidden is not None:
            self.hidden = self._grown(self.hidden, torch.zeros_like(position, dtype=torch.bool))
        if self.received is not None:
            self.received = self._grown(self.received, torch.zeros_like(position, dtype=torch.float32))
        self.seen += coming.seen
        self.newest = 0 if coming.short else self.newest + new
        self.short, self.behind = self.short or coming.short, self.behind or coming.short
        self.real = [a + b for a, b in zip(self.real, coming.real, strict=True)]
        self.arrived = [a + b for a, b in zip(self.arrived, coming.live, strict=True)]
        self.counts = [a + b for a, b in zip(self.counts, coming.live, strict=True)]
        return self.keys, self.values

    def open(self, batch: int) -> None:
        """Begin to count the tokens of ``batch`` rows, where that has not begun."""
        if not self.real:
            self.real, self.arrived, self.counts = [0] * batch, [0] * batch, [0] * batch

    def places(self, asks: Tensor) -> Tensor:
        """(B, q): what the next tokens, at positions ``asks``, are counted by: a window counts slots."""
        if not self.sliding_window:
            return asks
        return torch.where(asks >= 0, self.seen + torch.arange(asks.shape[1], device=asks.device), -1)

    def next_positions(self, new: int, mask: Tensor | None = None) -> tuple[Tensor, list[int]]:
        """(B, q) positions of ``new`` tokens, and how many of each row are real; ``mask`` (B, q): which; None: all."""
        start = torch.tensor(self.real)[:, None]
        if mask is None or bool(mask.all()):
            return start + torch.arange(new), [new] * len(self.real)
        real = mask.bool().cpu()
        return torch.where(real, start + real.cumsum(1) - 1, -1), real.sum(1).tolist()

    @staticmethod
    def _grown(old: Tensor | None, new: Tensor) -> Tensor:
        return new.contiguous() if old is None else torch.cat([old, new], -1)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; ``tokens_to_remove`` is negative, as in transformers.

        Raises:
            ValueError: some of them have been evicted.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): expected how many tokens to take back, as a negative number")
        count = -tokens_to_remove
        if count == 0 or not self.is_initialized:
            return
        if count > self.newest:
            raise ValueError(
                f"{count} tokens cannot be taken back: eviction has left only the last {self.newest} whole; prune with "
                f"recent={count} or more"
            )
        assert self.position is not None
        gone = (self.position[:, 0, -count:] >= 0).sum(1).tolist()
        for name in ("position", "hidden", "received"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, x[..., :-count].contiguous())
        self.keys, self.values = (x[..., :-count, :].contiguous() for x in (self.keys, self.values))
        if self.queries is not None and self.query_position is not None:
            self.queries = self.queries[..., :-count, :].contiguous()
            self.query_position = self.query_position[:, :-count].contiguous()
        self.seen, self.newest, self.waiting = self.seen - count, self.newest - count, max(0, self.waiting - count)
        self.real = [a - b for a, b in zip(self.real, gone, strict=True)]
        self.arrived = [a - b for a, b in zip(self.arrived, gone, strict=True)]
        self.counts = [a - b for a, b in zip(self.counts, gone, strict=True)]

    def activate_past_recording(self) -> None:
        """Decide nothing about the tokens of a draft before it is known which of them stay."""
        self.record_past = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other rows in place of these, for beams."""
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)), beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        rows = [row for row in range(len(self.real)) for _ in range(repeats)]
        self._rows(lambda x: x.repeat_interleave(repeats, 0), rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows: their numbers, or a mask of them."""
        rows = torch.arange(len(self.real))[indices.cpu()].tolist()
        self._rows(lambda x: x[indices.to(x.device)], rows)

    def _rows(self, take: Callable[[Tensor], Tensor], rows: list[int]) -> None:
        if not self.is_initialized:
            return
        for name in TENSORS:
            if (x := getattr(self, name)) is not None:
                setattr(self, name, take(x))
        for name in ("real", "arrived", "counts"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._clear()

    def remember(self, query: Tensor, asks: Tensor, count: int) -> None:
        """Remember the last ``count`` real queries (B, H, q, d) at positions ``asks`` (B, q), with those before."""
        if self.queries is not None and self.query_position is not None:
            query, asks = torch.cat([self.queries, query], 2), torch.cat([self.query_position, asks], 1)
        query, asks = last_real(query, asks, count)
        self.queries, self.query_position = query.clone(memory_format=torch.contiguous_format), asks.clone()

    def slide(self) -> None:
        """Let go of what no coming token will see, once it is much."""
        if self.masked or self.record_past or self.held < self.sliding_window + 2 * SPARE:
            return
        assert self.position is not None
        stays = self.live & (self.position >= self.seen - self.sliding_window - SPARE)
        counts = stays[:, 0].sum(1).tolist()
        slots = stays.int().argsort(dim=-1, stable=True)[..., -max(counts) :]
        self.evict(slots, ~stays.gather(2, slots), counts, min(counts))

    # --- eviction ------------------------------------------------------------------------------------------------
    def unrolled(self) -> AbstractContextManager[None]:
        """Within the context it is a rectangle; here it always is."""
        return nullcontext()

    def evict(self, slots: Tensor, dead: Tensor | None, counts: list[int], newest: int) -> None:
        """Keep the entries in ``slots`` (B, KV, K), which rise, and free the bytes of the others.

        Args:
            dead: (B, KV, K) bool, which of these slots hold nothing; None: none.
            counts: of each row, the entries that then live.
            newest: how many of the last tokens no head has lost.
        """
        assert self.position is not None
        if self.masked:
            kept = slots if dead is None else slots.masked_fill(dead, 0)
            stays = torch.ones_like(kept, dtype=torch.bool) if dead is None else ~dead
            # several dead slots may name the slot of a survivor: "any" decides
            self.hidden = ~torch.zeros_like(self.position).scatter_add(2, kept, stays.int()).bool()
        else:
            take = slots[..., None]
            self.keys = self.keys.gather(2, take.expand(-1, -1, -1, self.keys.shape[-1]))
            self.values = self.values.gather(2, take.expand(-1, -1, -1, self.values.shape[-1]))
            self.position = self.position.gather(2, slots)
            if dead is not None:
                self.position = self.position.masked_fill(dead, -1)
            if self.received is not None:
                self.received = self.received.gather(2, slots)
        self.counts, self.newest, self.evictions = counts, min(self.newest, newest), self.evictions + 1
        self.short = True


def last_real(query: Tensor, asks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The last ``count`` queries of each row that are no padding; rows with fewer have padding in front."""
    if bool((asks >= 0).all()):
        return query[:, :, -count:], asks[:, -count:]
    order = (asks >= 0).int().argsort(dim=1, stable=True)[:, -count:]
    index = order[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
    return query.gather(2, index), asks.gather(1, order)


def row_of(number: int, layer: Any) -> dict:
    """What the report says of one layer."""
    if not isinstance(layer, PrunedLayer):
        size = sum(x.untyped_storage().nbytes() for x in (layer.keys, layer.values) if x is not None)
        seen = layer.get_seq_length()
        held = layer.keys.shape[-2] if layer.keys.dim() == 4 else seen
        row = {"kind": "sliding", "seen": seen, "held": held, "bytes": size, "extra_bytes": 0, "dense_bytes": size}
        return {"layer": number, **row, "evictions": 0, "seconds": 0.0}
    return {
        "layer": number,
        "kind": "pruned",
        "seen": sum(layer.real),
        "held": sum(layer.counts),
        "bytes": layer.nbytes,
        "extra_bytes": layer.extra_bytes,
        "dense_bytes": len(layer.real) * layer.seen * layer.entry_bytes,
        "evictions": layer.evictions,
        "seconds": layer.seconds,
    }


def ours(cache: Any) -> dict[int, PrunedLayer]:
    """The layers of a cache that are ours, by their number."""
    layers = getattr(cache, "layers", None) or ()
    return {number: layer for number, layer in enumerate(layers) if isinstance(layer, PrunedLayer)}
