"""The three layouts of a batch's tokens; see ``tokens`` for shapes and for what they have in common."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from .tokens import Tokens, take

EVEN = (torch.bfloat16,)  # what has numbers of packed rows that are multiples, on a CPU
FINE, COARSE, FEW = 16, 64, 512  # of these, up to and above ``FEW`` rows


class Masked(Tokens):
    """Every token stays in the tensor; the dropped ones are no longer attended to."""

    def drop(self, keep: Tensor, width: int | None = None) -> Tokens:
        if self.unchanged(keep):
            return self
        new = self._copy()
        new.alive, new.touched = keep, True
        return new

    def take(self, x: Tensor) -> Tensor:
        return self.mix(x)

    def restore(self, hidden: Tensor) -> Tensor:
        return hidden if self.full is None else torch.where(self.alive[..., None], hidden, self.full)


class Padded(Tokens):
    """Rectangular: as wide as the row that keeps the most.

    Attributes:
        pool: (B, N, C) states before each drop; what is put back is read from them at the end, once.
        place: (B, N0) long, where in the pool, laid end to end, the last state of each original token lies.
    """

    source: Tensor | None = None  # (B, N) slots of the layout before
    pool: tuple[Tensor, ...] = ()
    place: Tensor | None = None

    def drop(self, keep: Tensor, width: int | None = None) -> Tokens:
        if self.unchanged(keep):
            return self
        slots = keep.shape[1]
        if not torch.compiler.is_compiling():
            width = int(keep.sum(1).max())
        elif width is None or torch.compiler.is_exporting():
            # data-dependent, 2 at least, since 0 and 1 would be specialised; and so in a graph for good, where widths
            # that follow from the shape make formulas of formulas
            width = keep.sum(1).max().clamp(min=min(2, slots)).item()
            torch._check(width >= 2)
            torch._check(width <= slots)
        order = torch.arange(slots, 0, -1, device=keep.device)
        new = self._copy()
        new.source = (keep * order).topk(width, dim=1).indices  # survivors in their order, then any of the rest
        new.alive, new.index = keep.gather(1, new.source), self.index.gather(1, new.source)
        new.touched = True
        new._biases(self)
        return new

    def take(self, x: Tensor) -> Tensor:
        return x if self.source is None else take(self.mix(x), self.source, 1)

    def _follow(self, before: Tokens, x: Tensor) -> Tensor:
        return x.gather(1, self.source)

    def narrow(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        for dim in dims:
            x = take(x, self.index, dim)
        return x

    def leave(self, before: Tokens, states: Tensor) -> None:
        self.place, self.pool = before.placed(states), (*before.pool, states)
        if len(self.pool) > 1 and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            pool = torch.cat([x.to(states.dtype) for x in self.pool], 1)  # nobody looks back: one state is enough
            self.pool, self.place = (take(pool, self.place, 1),), torch.arange(self.place.shape[1], device=pool.device)
            self.place = self.place.expand(len(pool), -1)

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


class Packed(Tokens):
    """All live tokens of the batch in one row, sequence after sequence.

    Attributes:
        rows: (T,) long, each token's row of the flattened (B * N0, C) original.
        lengths: live tokens per sequence.
        spare: rows behind the last token that hold nothing of worth: of states in bf16 on a CPU each new number of rows
            costs a new kernel of every layer, so that there are few.
    """

    rows: Tensor
    spare: int = 0
    even: bool = False  # whether there are
    lengths: list[int]
    source: Tensor | None = None  # (T,) rows of the layout before
    owned: bool = False  # ``full`` is a copy of our own, so that without gradients it may be written in place

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
        self.rows, self.lengths, self.masks = rows, live.tolist(), {}
        width = max(self.lengths)
        self.alive = torch.arange(width, device=rows.device) < live[:, None]
        self.slots = None if min(self.lengths) == width else self.alive.flatten().nonzero()[:, 0]
        self.index = self.pad((rows % self.origin[1])[None])

    def pad(self, x: Tensor) -> Tensor:
        if self.slots is None:
            return x[:, : len(self.rows)].reshape(*self.alive.shape, *x.shape[2:])
        flat = x.new_zeros(self.alive.numel(), *x.shape[2:]).index_copy(0, self.slots, x[0, : len(self.rows)])
        return flat.view(*self.alive.shape, *x.shape[2:])

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
        return self.pad(before._flat(x)[:, self.source])

    def narrow(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        (dim,), rows = dims, self._spared(self.rows)
        if x.shape[0] == 1:
            return x.index_select(dim, rows % self.origin[1])
        return x.movedim(dim, 1).flatten(0, 1).index_select(0, rows)[None].movedim(1, dim)

    def mask(self, mask: Tensor | None, dtype: torch.dtype, causal: bool, additive: bool) -> Tensor | None:
        return mask  # each sequence cuts its own part, see sequence_mask

    def leave(self, before: Tokens, states: Tensor) -> None:
        super().leave(before, states)
        self.owned = True

    def runs(self) -> list[tuple[int, int, int, int]]:
        """(first sequence, first row, number of sequences, their length) of each run of equally long neighbours."""
        runs, row, sequence = [], 0, 0
        for length, group in groupby(self.lengths):
            count = len(list(group))
            runs.append((sequence, row, count, length))
            sequence, row = sequence + count, row + count * length
        return runs

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
