"""What is left of a batch of sequences: drop tokens, merge them, and put every token back at its place.

Shapes: B batch, N slots now, N0 tokens at the start, T live tokens of the whole batch, C channels. Three layouts hold
the same tokens and mean the same thing:

| layout | hidden | |
|---|---|---|
| mask | (B, N0, C) | dropped tokens stay and are hidden from attention: the reference |
| padded | (B, N, C) | tensors shrink to the widest row; shorter rows end in dead slots |
| packed | (1, T, C) | one row of all live tokens; no padding, no dead slot |

One file, since each verb (enter, drop, merge, take, narrow, mask, restore) is one idea in three forms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from . import compat
from .scoring import full_precision

EVEN = (torch.bfloat16,)  # dtypes whose packed rows come in multiples on a CPU
FINE, COARSE, FEW = 16, 64, 512  # of these, up to and above ``FEW`` rows
CLOSED = 1e-8  # of a gate: next to nothing, but not nothing, so that a closed gate has a gradient and may open again
CLOSED_LOG = math.log(2 * CLOSED)  # the logarithm of a closed gate is below


def with_a_token(mask: Tensor) -> Tensor:
    """``mask`` (B, N) with the first token of each row set where the row has none: a blank row counts as one token."""
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    if mask.dtype == torch.bool:
        return mask | (first & ~mask.any(1, keepdim=True))
    return torch.where(first & ~(mask != 0).any(1, keepdim=True), torch.ones_like(mask), mask)


def take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gather ``index`` (B, K) along ``dim`` of ``x``, whose leading dimension is 1 or B.

    By whole rows where nothing lies between the two dimensions: runtimes that gather element by element need several
    times as long.
    """
    dim, (batch, count) = dim % x.dim(), index.shape
    before, after = x.shape[1:dim], x.shape[dim + 1 :]
    if all(size == 1 for size in before):
        if x.shape[0] != 1:
            index = index + x.shape[dim] * torch.arange(batch, device=x.device)[:, None]
        return x.reshape(-1, *after).index_select(0, index.flatten()).view(batch, *before, count, *after)
    shape, whole = [1] * x.dim(), [batch, *x.shape[1:]]
    shape[0], shape[dim], whole[dim] = batch, count, x.shape[dim]
    x, whole[dim] = x.expand(whole), count
    # not take_along_dim, which cannot broadcast a width that is known at run time only
    return x.gather(dim, index.view(shape).expand(whole))


def most(some: Tensor) -> Any:
    """How many are set in the row of ``some`` (B, N) bool that has the most; in a graph a symbol: 2 at least, since 0
    and 1 would be specialised."""
    if not torch.compiler.is_compiling():
        return int(some.sum(1).max())
    slots = some.shape[1]
    count = some.sum(1).max().clamp(min=min(2, slots)).item()
    compat.check(count >= 2)
    compat.check(count <= slots)
    return count


def slots_of(some: Tensor, count: int) -> Tensor:
    """(B, ``count``) slots of what is set in ``some`` (B, N) bool, in their order, then any of the rest."""
    order = torch.arange(some.shape[1], 0, -1, device=some.device)
    return (some * order).topk(count, dim=1).indices


class Tokens:
    """Tokens of a batch in one of the three layouts; immutable, each ``drop`` gives a new one."""

    _live: Tensor | None = None

    def __init__(self, alive: Tensor, index: Tensor, even: bool = False):
        self.alive = alive  # (B, N) bool, the slots that hold a live token and neither padding nor a dropped one
        self.index = index  # (B, N) long, the original position of the token in each slot
        self.even = even  # whether every slot is known to hold a live token
        self.width = index.shape[1]  # N0
        self.touched = False  # whether anything differs from what the model laid out itself
        # (B, N0, C), the last complete state of every original token; None until something was dropped
        self.full: Tensor | None = None
        self.log_gate: Tensor | None = None  # (B, N), logarithm of each token's gate while a method trains softly
        self.log_size: Tensor | None = None  # (B, N), of how many tokens each one stands for, where keys weigh by it
        # (B, N0) long, the original position of what holds each token; None until some were merged
        self.home: Tensor | None = None
        self.mixed: tuple | None = None  # how states are summed on the way into this layout, see ``merge``

    @classmethod
    def start(cls, hidden: Tensor, mask: Tensor | None, even: bool = False) -> Tokens:
        """Lay out all tokens of ``hidden`` (B, N0, C); ``mask`` (B, N0) is non-zero at real ones, None: all are real.

        A row without a real token counts as a row of one, its first. ``even``: the mask is known to hold no zero.
        """
        batch, width = hidden.shape[:2]
        index = torch.arange(width, device=hidden.device).expand(batch, width)
        if mask is None or even:
            return cls(torch.ones(batch, width, dtype=torch.bool, device=hidden.device), index, True)
        return cls(with_a_token(mask != 0), index)

    @property
    def live(self) -> Tensor:
        """(B,) live tokens per row; the sum of the gates while a method trains softly. Counted once."""
        if self._live is None:
            self._live = (self.alive if self.log_gate is None else self.log_gate.exp() * self.alive).sum(1)
        return self._live

    @property
    def votes(self) -> Tensor:
        """(B, N) fp32 weight of each query row in a score: 1 live, 0 dead, the gate while a method trains softly."""
        return self.alive.float() if self.log_gate is None else self.log_gate.float().exp() * self.alive

    @property
    def key_bias(self) -> Tensor | None:
        """(B, N) or None: what is added to every logit of a key."""
        if self.log_gate is None or self.log_size is None:
            return self.log_size if self.log_gate is None else self.log_gate
        return self.log_gate + self.log_size

    @property
    def sizes(self) -> Tensor:
        """(B, N) fp32: how many tokens each one stands for."""
        return torch.ones_like(self.alive, dtype=torch.float32) if self.log_size is None else self.log_size.exp()

    def gate(self, log_gate: Tensor) -> Tokens:
        """The same tokens with ``log_gate`` (B, N) multiplied onto their gates."""
        new = self._copy()
        new.log_gate, new.touched = log_gate if self.log_gate is None else self.log_gate + log_gate, True
        return new

    def merge(
        self, keep: Tensor, into: Tensor, weight: Tensor | None, width: int | None = None, sized=True, longest=False
    ) -> Tokens:
        """The tokens in ``keep`` (B, N) bool, each the sum of those that go ``into`` (B, N) long its slot.

        The states are summed times their ``weight`` (B, N) fp32, or their mean by size is taken; what stays goes into
        its own slot, and what goes there and does not stay is dropped.

        Args:
            sized: whether keys weigh by the number of tokens that they stand for.
            longest: whether a sum gets the length of its longest term.
        """
        new = self.drop(keep, width)
        if new is self:
            return self
        own = torch.arange(keep.shape[1], device=keep.device).expand_as(into)
        into = torch.where(self.alive & ~keep & keep.gather(1, into), into, own)
        moved = (self.index.gather(1, into) - self.index).masked_fill(~self.alive, 0)
        itself = torch.arange(self.width, device=keep.device).expand(keep.shape[0], -1)
        holder = itself.scatter_add(1, self.index, moved)
        new.home = holder if self.home is None else holder.gather(1, self.home)
        if weight is None:
            sizes = self.sizes
            weight = sizes / torch.zeros_like(sizes).scatter_add(1, into, sizes).gather(1, into)
        new.mixed = (self._rows(into), self._flat(weight), longest)
        if sized:
            sizes = self.sizes * self.alive
            sums = torch.zeros_like(sizes).scatter_add(1, into, sizes)
            new.log_size = new._follow(self, sums).clamp(min=1).log()
        return new

    def mix(self, x: Tensor) -> Tensor:
        """The states ``x`` before the merging that made these tokens, summed, in the layout before it."""
        if self.mixed is None:
            return x
        into, weight, longest = self.mixed
        rows = x * weight[..., None]
        length = x.to(rows.dtype).norm(dim=-1)
        if torch.compiler.is_compiling():  # a product: scattered element by element a graph takes much longer
            goes = into[:, None] == torch.arange(x.shape[1], device=x.device)[None, :, None]
            with full_precision(rows.device):
                sums, most = goes.to(rows.dtype) @ rows, (goes * length[:, None]).amax(-1)
        else:
            flat = (into + into.shape[1] * torch.arange(into.shape[0], device=into.device)[:, None]).flatten()
            sums = torch.zeros_like(rows).flatten(0, 1).index_add(0, flat, rows.flatten(0, 1)).view_as(rows)
            most = torch.zeros_like(length).scatter_reduce(1, into, length, "amax")
        if longest:
            sums = sums * (most / sums.norm(dim=-1).clamp(min=1e-12))[..., None]
        return sums.to(x.dtype)

    def unmerge(self, hidden: Tensor) -> Tensor:
        """(B, N0, C): each token as what holds it; a mean over them weighs by size."""
        return hidden if self.home is None else take(hidden, self.home, 1)

    def leave(self, before: Tokens, states: Tensor) -> None:
        """Take over the last complete states of the tokens that left, in the layout ``before`` the drop."""
        self.full = before.restore(states)

    def unchanged(self, keep: Tensor) -> bool:
        """Whether ``keep`` drops nothing (never known while a graph is traced: there the general path is taken)."""
        return not torch.compiler.is_compiling() and bool((keep == self.alive).all())

    def _copy(self) -> Self:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.mixed = new._live = None
        return new

    def _biases(self, before: Tokens) -> None:
        """Bring what biases keys into this layout."""
        for name in ("log_gate", "log_size"):
            if getattr(before, name) is not None:
                setattr(self, name, self._follow(before, getattr(before, name)))

    # --- what a layout defines -----------------------------------------------------------------------------------
    def enter(self, hidden: Tensor) -> Tensor:
        """The model's (B, N0, C) in this layout."""
        return hidden

    def pad(self, x: Tensor) -> Tensor:
        """(B, N, ...) of a tensor in this layout."""
        return x

    def drop(self, keep: Tensor, width: int | None = None) -> Tokens:
        """The tokens in ``keep`` (B, N) bool; ``width`` bounds the kept count of a row where it is known beforehand."""
        raise NotImplementedError

    def take(self, x: Tensor) -> Tensor:
        """Bring ``x``, in the layout before the drop that made these tokens, into this layout."""
        return x

    def at(self, x: Tensor, slots: Tensor) -> Tensor:
        """(B, K, ...): what a tensor in this layout has at some ``slots`` (B, K); anything at dead ones."""
        return take(x, slots, 1)

    def _follow(self, before: Tokens, x: Tensor) -> Tensor:
        """Numbers (B, N) of the slots of ``before``, where they are now."""
        return x

    def _flat(self, x: Tensor) -> Tensor:
        """Numbers (B, N) of the slots, laid out as the states are."""
        return x

    def _rows(self, into: Tensor) -> Tensor:
        """Slots (B, N), laid out as the states are, as places among these."""
        return into

    def narrow(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        """A per-token argument of original size, with token dimensions ``dims``, for the tokens that are left."""
        return x

    def mask(
        self, mask: Tensor | None, dtype: torch.dtype, causal: bool, additive: bool, needed: bool = False
    ) -> Tensor | None:
        """Narrow a layer's attention mask of original size to the tokens that are left; of the same kind.

        Kinds: bool (True = attend), additive float, 0/1 integers. None means causal in a ``causal`` model and all
        elsewhere; where it can stay None and is not ``needed`` it does, else it becomes an ``additive`` or a bool one.
        Soft gates and sizes enter as their logarithm on the key, in an additive mask of ``dtype``.
        """
        bias = self.key_bias
        if mask is None and bias is None and self.even and not needed:
            return None
        alive, additive = self.alive[:, None, None], (additive and mask is None) or bias is not None
        if mask is None:
            mask = self.index[:, None, :, None] >= self.index[:, None, None] if causal else torch.ones_like(alive)
        elif mask.shape[-2] == 1 or mask.stride(-2) == 0:  # the same for every query
            mask = self.narrow(mask[..., :1, :], (-1,))
        else:
            mask = self.narrow(mask, (-2, -1))
        if mask.shape[-2] > 1:  # a dead row may see nobody any more, which is NaN: let it see itself
            alive = alive | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
        if additive:
            bias = torch.zeros((), dtype=dtype, device=mask.device) if bias is None else bias[:, None, None]
            if mask.dtype == torch.bool:
                return torch.where(mask & alive, bias.to(dtype), torch.finfo(dtype).min)
            if mask.is_floating_point():
                return (mask + bias.to(mask.dtype)).masked_fill(~alive, torch.finfo(mask.dtype).min)
            return mask * (bias > math.log(0.5))
        if mask.is_floating_point():
            return mask.masked_fill(~alive, torch.finfo(mask.dtype).min)
        return mask & alive if mask.dtype == torch.bool else mask * alive

    def restore(self, hidden: Tensor) -> Tensor:
        """(B, N0, C): ``hidden`` at the places of the live tokens, the last complete state at all others."""
        raise NotImplementedError

    def put_back(self, hidden: Tensor) -> Tensor:
        """(B, N0, C): ``hidden`` with every token at its place, merged ones as what holds them; a copy of its own."""
        restored = self.restore(hidden)
        return self.unmerge(restored.clone() if restored is self.full else restored)

    def spread_votes(self) -> Tensor:
        """(B, N0): 1 for the tokens that are left, 0 elsewhere; the gates while a method trains softly."""
        votes = self.alive.long() if self.log_gate is None else self.votes
        return votes.new_zeros(votes.shape[0], self.width).scatter_add(1, self.index, votes)

    def spread(self, weights: Tensor) -> Tensor:
        """(B, H, N0, N0): attention probabilities (B, H, N, N) at the original places, 0 where a token is gone."""
        real = (self.alive[:, :, None] & self.alive[:, None])[:, None]
        weights = weights * real
        if weights.shape[-1] == self.width:
            return weights
        batch, heads, count, _ = weights.shape
        index = self.index[:, None, None].expand(batch, heads, count, count)
        wide = weights.new_zeros(batch, heads, count, self.width).scatter(3, index, weights)
        index = self.index[:, None, :, None].expand_as(wide)
        return weights.new_zeros(batch, heads, self.width, self.width).scatter(2, index, wide)


class Masked(Tokens):
    """Every token stays in the tensor; the dropped ones are no longer attended to."""

    def drop(self, keep: Tensor, width: int | None = None) -> Tokens:
        if self.unchanged(keep):
            return self
        new = self._copy()
        new.alive, new.touched, new.even = keep, True, False
        return new

    def take(self, x: Tensor) -> Tensor:
        return self.mix(x)

    def restore(self, hidden: Tensor) -> Tensor:
        return hidden if self.full is None else torch.where(self.alive[..., None], hidden, self.full)


class Padded(Tokens):
    """Rectangular: as wide as the row that keeps the most."""

    source: Tensor | None = None  # (B, N) slots of the layout before
    pool: tuple[Tensor, ...] = ()  # (B, N, C) states before each drop, from which tokens are put back at the end, once
    place: Tensor | None = None  # (B, N0) long, where in the pool, laid end to end, the last state of each token lies

    def drop(self, keep: Tensor, width: int | None = None) -> Tokens:
        if self.unchanged(keep):
            return self
        even = False
        widest: Any = width  # in a graph a symbol
        if not torch.compiler.is_compiling():
            fewest, widest = (int(count) for count in keep.sum(1).aminmax())
            even = fewest == widest
        elif width is None:
            widest = most(keep)
        new = self._copy()
        new.source = slots_of(keep, widest)
        new.alive, new.index = keep.gather(1, new.source), self.index.gather(1, new.source)
        new.touched, new.even = True, even
        new._biases(self)
        return new

    def take(self, x: Tensor) -> Tensor:
        return x if self.source is None else take(self.mix(x), self.source, 1)

    def _follow(self, before: Tokens, x: Tensor) -> Tensor:
        assert self.source is not None, "nothing was dropped"
        return x.gather(1, self.source)

    def narrow(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        for dim in dims:
            x = take(x, self.index, dim)
        return x

    def leave(self, before: Tokens, states: Tensor) -> None:
        assert isinstance(before, Padded)
        self.place, self.pool = before.placed(states), (*before.pool, states)
        if len(self.pool) > 1 and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            pool = torch.cat([x.to(states.dtype) for x in self.pool], 1)  # nobody looks back: one state is enough
            self.pool, width = (take(pool, self.place, 1),), self.place.shape[1]
            self.place = torch.arange(width, device=pool.device).expand(len(pool), -1)

    def placed(self, states: Tensor) -> Tensor:
        """(B, N0) long: ``place`` once ``states`` (B, N, C), those of the live tokens, are the last of the pool."""
        slot = sum(x.shape[1] for x in self.pool) + torch.arange(states.shape[1], device=states.device)
        if self.place is None:  # all are still there
            return slot.expand_as(self.index)
        # dead slots write back what is there
        slot = torch.where(self.alive, slot, self.place.gather(1, self.index))
        return self.place.scatter(1, self.index, slot)

    def restore(self, hidden: Tensor) -> Tensor:
        if not self.pool:
            return hidden
        pool = [x.to(hidden.dtype) for x in (*self.pool, hidden)]  # autocast may have changed it
        return take(torch.cat(pool, 1), self.placed(hidden), 1)


@dataclass(frozen=True)
class ByLength:
    """Sequences of a packed row in another order; ``rows`` and ``back`` (T,) are None where it is the same one."""

    lengths: list[int]
    rows: Tensor | None = None  # the row that comes to each place
    back: Tensor | None = None  # the place to which each row has come

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> ByLength:
        """The order of sequences with these ``lengths``."""
        if 2 * len(set(lengths)) > sum(1 for _ in groupby(lengths)):
            return cls(lengths)
        order, first = sorted(range(len(lengths)), key=lambda i: lengths[i]), [0, *accumulate(lengths)]
        places = [row for i in order for row in range(first[i], first[i + 1])]
        rows = torch.tensor(places, device=device)
        return cls([lengths[i] for i in order], rows, rows.argsort())

    def sort(self, x: Tensor) -> Tensor:
        """A state (1, H, T, d) in this order."""
        return x if self.rows is None else x.transpose(1, 2).index_select(1, self.rows).transpose(1, 2)

    def restore(self, x: Tensor) -> Tensor:
        """(T + spare, ...) in the order of the row again."""
        return x if self.back is None else torch.cat([x.index_select(0, self.back), x[len(self.back) :]])


class Packed(Tokens):
    """All live tokens of the batch in one row, sequence after sequence."""

    rows: Tensor  # (T,) long, each token's row of the flattened (B * N0, C) original
    lengths: list[int]  # live tokens per sequence
    full: Tensor
    slots: Tensor | None  # (T,) long, the tokens among the slots (B, N) of a padded batch; None: every slot has one
    masks: dict[int, tuple[Tensor, dict[int, Tensor | None]]]  # the parts of each mask that were cut, by sequence
    # rows behind the last token that hold nothing of worth: of states in bf16 on a CPU each new number of rows costs a
    # new kernel of every layer, so that there are few
    spare: int = 0
    even: bool = False  # whether there are
    source: Tensor | None = None  # (T,) rows of the layout before
    owned: bool = False  # ``full`` is a copy of our own, so that without gradients it may be written in place
    _order: ByLength | None = None  # see ``by_length``, once it was asked for

    def enter(self, hidden: Tensor) -> Tensor:
        self.touched = True
        self.origin = tuple(hidden.shape[:2])
        rows = self.alive.flatten().nonzero()[:, 0]
        self._lay_out(rows, self.alive.sum(1))
        self.full, self.even = hidden, hidden.is_cpu and hidden.dtype in EVEN
        return hidden.flatten(0, 1).index_select(0, self._spared(rows))[None]

    def _spared(self, rows: Tensor) -> Tensor:
        """``rows`` (T,), and the last of them again to an even number."""
        if self.even:
            self.spare = -len(rows) % (COARSE if len(rows) > FEW else FINE)
        return torch.cat([rows, rows[-1:].expand(self.spare)]) if self.spare else rows

    def _lay_out(self, rows: Tensor, live: Tensor) -> None:
        self.rows, self.lengths, self.masks, self._live, self._order = rows, live.tolist(), {}, live, None
        width = max(self.lengths)
        self.alive = torch.arange(width, device=rows.device) < live[:, None]
        self.slots = None if min(self.lengths) == width else self.alive.flatten().nonzero()[:, 0]
        self.index = self.pad((rows % self.origin[1])[None])

    def pad(self, x: Tensor) -> Tensor:
        if self.slots is None:
            return x[:, : len(self.rows)].reshape(*self.alive.shape, *x.shape[2:])
        flat = x.new_zeros(self.alive.numel(), *x.shape[2:]).index_copy(0, self.slots, x[0, : len(self.rows)])
        return flat.view(*self.alive.shape, *x.shape[2:])

    def at(self, x: Tensor, slots: Tensor) -> Tensor:
        live = self.alive.sum(1, keepdim=True)
        return x[0][slots.minimum(live - 1) + live.cumsum(0) - live]

    def drop(self, keep: Tensor, width: int | None = None) -> Tokens:
        if self.unchanged(keep):
            return self
        new = self._copy()
        source = self._flat(keep)[0].nonzero()[:, 0]
        new._lay_out(self.rows[source], keep.sum(1))
        new.source = new._spared(source)
        for name, (mask, parts) in self.masks.items():  # what lets everything through does so for fewer tokens
            new.masks[name] = (mask, {sequence: None for sequence, part in parts.items() if part is None})
        new._biases(self)
        return new

    def take(self, x: Tensor) -> Tensor:
        return x if self.source is None else self.mix(x).index_select(1, self.source)

    def mix(self, x: Tensor) -> Tensor:
        return x if self.mixed is None else super().mix(x[:, : self.mixed[0].shape[1]])

    def _flat(self, x: Tensor) -> Tensor:
        return (x.flatten() if self.slots is None else x.flatten()[self.slots])[None]

    def _rows(self, into: Tensor) -> Tensor:
        slots = self._flat(into + into.shape[1] * torch.arange(into.shape[0], device=into.device)[:, None])
        return slots if self.slots is None else torch.searchsorted(self.slots, slots)

    def _follow(self, before: Tokens, x: Tensor) -> Tensor:
        assert self.source is not None, "nothing was dropped"
        return self.pad(before._flat(x)[:, self.source])

    def narrow(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        (dim,), rows = dims, self._spared(self.rows)
        if x.shape[0] == 1:
            return x.index_select(dim, rows % self.origin[1])
        return x.movedim(dim, 1).flatten(0, 1).index_select(0, rows)[None].movedim(1, dim)

    def leave(self, before: Tokens, states: Tensor) -> None:
        assert isinstance(before, Packed)
        super().leave(before, states)
        self.owned = len(before.rows) < before.full.shape[0] * before.full.shape[1]  # else it is ``states`` itself

    @property
    def by_length(self) -> ByLength:
        """The sequences in an order of which equally long ones are neighbours; as they are, where that would not halve
        the runs."""
        if self._order is None:
            self._order = ByLength.of(self.lengths, self.rows.device)
        return self._order

    def runs(self, *states: Tensor, lengths: list[int] | None = None) -> list[tuple[int, int, list[Tensor]]]:
        """(first sequence, length, parts (count, H, length, d) of the ``states``) of each run of equal neighbours;
        ``lengths`` of the sequences, where they are in another order."""
        sequence, row, found = 0, 0, []
        for length, group in groupby(self.lengths if lengths is None else lengths):
            count = len(list(group))
            rows, shape = slice(row, row + count * length), (count, length)
            found.append((sequence, length, [x[0, :, rows].unflatten(1, shape).transpose(0, 1) for x in states]))
            sequence, row = sequence + count, rows.stop
        return found

    def as_state(self, x: Tensor) -> Tensor:
        """(1, 1, T, 1): numbers (B, N) of the slots, as a state of one head and one channel."""
        return self._flat(x).reshape(1, 1, -1, 1)

    def sequence_mask(self, mask: Tensor, sequence: int) -> Tensor | None:
        """The part of an attention mask of original size (B or 1, 1 or H, N0 or 1, N0) that one sequence needs.

        None where it lets everything through; remembered, since a model hands the same mask to many layers.
        """
        memory = self.masks.setdefault(id(mask), (mask, {}))[1]
        if sequence not in memory:
            mask = mask[..., :1, :] if mask.stride(-2) == 0 else mask  # the same for every query
            first = sum(self.lengths[:sequence])
            at = self.rows[first : first + self.lengths[sequence]] % self.origin[1]
            part = mask[sequence if len(mask) > 1 else 0].index_select(-1, at)
            part = (part if part.shape[-2] == 1 else part.index_select(-2, at))[None]
            free = part.all() if part.dtype == torch.bool else (part == 0).all()
            memory[sequence] = None if free else part
        return memory[sequence]

    def biased(self, mask: Tensor | None, sequence: int, count: int, length: int) -> Tensor | None:
        """An additive attention mask of ``count`` equally long sequences with the sizes of their keys."""
        if self.log_size is None:
            return mask
        bias = self.log_size[sequence : sequence + count, None, None, :length]
        return bias if mask is None else mask + bias

    def restore(self, hidden: Tensor) -> Tensor:
        hidden = hidden[:, : len(self.rows)]
        if len(self.rows) == self.full.shape[0] * self.full.shape[1]:  # all are there, in their order
            return hidden.reshape(self.full.shape)
        full = self.full.to(hidden.dtype)  # autocast may have changed it
        if self.owned and not torch.is_grad_enabled():
            full.view(-1, full.shape[-1]).index_copy_(0, self.rows, hidden[0])
            return full
        return full.flatten(0, 1).index_copy(0, self.rows, hidden[0]).view_as(full)


LAYOUTS: dict[str, type[Tokens]] = {"mask": Masked, "padded": Padded, "packed": Packed}
