"""A layer of the cache whose heads hold different numbers of entries, one head behind the other, without padding.

What is left after an eviction lies in a flat store. Tokens that come later lie in a rectangle behind it, the tail, as
each head sees all of them. Attention reads both; nothing is padded for it.

Shapes: B rows, KV key heads, T entries in the store, n tokens in the tail, q new tokens, g query heads of a key head,
d channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.scoring import joined
from ..core.view import AttentionInputs
from .layer import PrunedLayer


@dataclass(frozen=True, eq=False)
class Store:
    """The entries of all heads, row by row and head by head.

    Attributes:
        lengths: (B, KV), how many entries each head has.
        keys, values: (T, d).
        position: (T,) int32.
        received: (T,) fp32; None: nothing is summed.
    """

    lengths: list[list[int]]
    keys: Tensor
    values: Tensor
    position: Tensor
    received: Tensor | None

    @property
    def counts(self) -> list[int]:
        """Of each row, the mean over its heads."""
        return [sum(row) // len(row) for row in self.lengths]

    @property
    def slots(self) -> Tensor:
        """(B, KV, W) bool: where entries lie in a rectangle as wide as the longest head, with dead slots in front."""
        lengths = torch.tensor(self.lengths, device=self.keys.device)[..., None]
        widest = max(max(row) for row in self.lengths)
        return torch.arange(widest, device=lengths.device) >= widest - lengths

    def rows(self, rows: list[int]) -> Store:
        """Other rows in place of these."""
        sizes = [sum(row) for row in self.lengths]

        def taken(x: Tensor) -> Tensor:
            parts = x.split(sizes)
            return torch.cat([parts[row] for row in rows])

        received = None if self.received is None else taken(self.received)
        keys, values, position = taken(self.keys), taken(self.values), taken(self.position)
        return Store([self.lengths[row] for row in rows], keys, values, position, received)


class RaggedLayer(PrunedLayer):
    """A ``PrunedLayer`` that holds what is left in a ``Store`` once entries have left.

    Attributes:
        store: what is left; None: nothing has left yet. The tensors of ``PrunedLayer`` are those of the tail then, and
            ``counts`` are means over the heads.
    """

    @classmethod
    def of(cls, layer: PrunedLayer) -> RaggedLayer:
        """What a layer from which nothing has left holds, in one whose heads can hold different numbers of entries."""
        made = cls()
        vars(made).update(vars(layer))
        return made

    def _clear(self) -> None:
        super()._clear()
        self.store: Store | None = None

    @property
    def held(self) -> int:
        """Entries of the head that has most."""
        return super().held + (0 if self.store is None else max(max(row) for row in self.store.lengths))

    @property
    def whole(self) -> bool:
        return self.store is None and super().whole

    @property
    def dead(self) -> bool:
        """Whether a slot of the tail is not to be attended to."""
        if self.store is None:
            return super().dead
        assert self.position is not None
        tail = self.position.shape[-1]
        return any(count - kept < tail for count, kept in zip(self.counts, self.store.counts, strict=True))

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.store is None else _bytes(self.store.keys, self.store.values))

    @property
    def extra_bytes(self) -> int:
        return super().extra_bytes + (0 if self.store is None else _bytes(self.store.position, self.store.received))

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values; returns all that is held, or the tail where a store lies before it.

        Raises:
            ValueError: no pruned model has announced them, and only its attention would read the store.
        """
        if self.store is not None and self.coming is None:
            raise ValueError(
                "this cache was pruned and its heads hold different numbers of entries: go on with the pruned model, "
                "or within dense(model)"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        if self.store is None or self.position is None or -tokens_to_remove <= self.position.shape[-1]:
            return super().crop(tokens_to_remove)
        with self.unrolled():
            super().crop(tokens_to_remove)
            self.pack()

    def evict(self, slots: Tensor, dead: Tensor | None, counts: list[int], newest: int) -> None:
        super().evict(slots, dead, counts, newest)
        self.pack()

    def _rows(self, take, rows: list[int]) -> None:
        super()._rows(take, rows)
        if self.store is not None:
            self.store = self.store.rows(rows)

    def pack(self) -> None:
        """Put all that lives into the store, of a rectangle."""
        assert self.position is not None
        live = self.position >= 0
        received = None if self.received is None else self.received[live]
        lengths = live.sum(-1).tolist()
        self.store = Store(lengths, self.keys[live], self.values[live], self.position[live], received)
        batch, heads, _ = live.shape
        self.keys, self.values = (x.new_empty(batch, heads, 0, x.shape[-1]) for x in (self.keys, self.values))
        self.position = self.position.new_empty(batch, heads, 0)
        self.received = None if received is None else received.new_empty(batch, heads, 0)

    @contextmanager
    def unrolled(self) -> Iterator[None]:
        """Within the context it is a rectangle, dead slots in front; afterwards as it was, but for the attention that
        was received, and for what has been packed."""
        if self.store is None:
            yield
            return
        store, tail, slots = self.store, (self.keys, self.values, self.position, self.received), self.store.slots
        self.store = None
        self.keys = _rectangle(store.keys, slots, tail[0], 0)
        self.values = _rectangle(store.values, slots, tail[1], 0)
        self.position = _rectangle(store.position, slots, tail[2], -1)
        if store.received is not None and tail[3] is not None:
            self.received = _rectangle(store.received, slots, tail[3], 0)
        try:
            yield
        finally:
            if self.store is None:
                received = self.received
                self.keys, self.values, self.position, self.received = tail
                if received is not None:
                    self.received = received[..., slots.shape[-1] :].contiguous()
                    received = received[..., : slots.shape[-1]][slots]
                self.store = Store(store.lengths, store.keys, store.values, store.position, received)

    def attend(self, sees: Tensor | None, given: AttentionInputs) -> Tensor:
        """(B, q, H, d): attention over the store and the tail, one head after the other.

        Args:
            sees: (B, 1, q, n) bool, what of the tail the new tokens see; None: all of it. They see all of the store.
            given: queries (B, H, q, d), and keys and values of the tail (B, KV, n, d).
        """
        store, key, value, logits = self.store, given.key, given.value, given.logits
        assert store is not None
        group, outputs, at = given.query.shape[1] // key.shape[1], [], 0
        query = (given.query * logits.scaling).unflatten(1, (-1, group))
        late = logits.cap(query @ key[:, :, None].transpose(-1, -2))  # (B, KV, g, q, n)
        if sees is not None:
            late = late.masked_fill(~sees[:, :, None], torch.finfo(late.dtype).min)
        for row, lengths in enumerate(store.lengths):
            for head, length in enumerate(lengths):
                some = slice(at, at + length)
                early = logits.cap(query[row, head] @ store.keys[some].T)
                product = torch.cat([early, late[row, head]], -1)[None]
                weights = logits.softmax(product, slice(head * group, (head + 1) * group))[0].to(value.dtype)
                outputs.append(weights[..., :length] @ store.values[some] + weights[..., length:] @ value[row, head])
                at += length
        return joined(outputs).unflatten(0, (len(store.lengths), -1)).transpose(1, 2).contiguous()


def _bytes(*tensors: Tensor | None) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors if x is not None)


def _rectangle(flat: Tensor, slots: Tensor, tail: Tensor | None, empty: int) -> Tensor:
    """(B, KV, W + n, ...): ``flat`` (T, ...) in its ``slots``, and behind it ``tail``."""
    assert tail is not None
    wide = flat.new_full((*slots.shape, *flat.shape[1:]), empty)
    wide[slots] = flat
    return torch.cat([wide, tail], 2)


def check_ragged(layers: Sequence[Any], name: str) -> None:
    """Raise ValueError where a layer of a cache holds as many entries in every head, and method ``name`` would not."""
    if not all(isinstance(layer, RaggedLayer) for layer in layers):
        raise ValueError(
            f"this cache was filled by a method that holds as many entries in every head, and {name} holds other "
            "numbers in each: fill it from empty, or take heads='own'"
        )
