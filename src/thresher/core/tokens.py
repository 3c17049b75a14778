"""What is left of a batch of sequences: drop tokens, and put every token back at its place.

Shapes: B batch, N slots now, N0 tokens at the start, T live tokens of the whole batch, C channels. Three layouts hold
the same tokens and mean the same thing; which one runs is the layout:

========  =======================  =============================================================
masked    hidden (B, N0, C)        dropped tokens stay and are hidden from attention: the reference
padded    hidden (B, N, C)         tensors shrink to the widest row; shorter rows end in dead slots
packed    hidden (1, T, C)         one row of all live tokens; no padding, no dead slot
========  =======================  =============================================================

This module needs torch only and knows nothing of models.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


CLOSED = 1e-8  # of a gate: next to nothing, but not nothing, so that a closed gate has a gradient and may open again
CLOSED_LOG = math.log(2 * CLOSED)  # the logarithm of a gate that is closed is below


class Tokens:
    """Tokens of a batch in one of the three layouts; immutable, each ``drop`` gives a new one.

    Attributes:
        alive: (B, N) bool, the slots that hold a live token (padding and dropped tokens are False).
        index: (B, N) long, the original position of the token in each slot.
        full: (B, N0, C), the last complete state of every original token; None until something was dropped.
        blank: (B,) bool, rows that came without a single live token; they pass as in the dense model. None: no such
            row.
        width: N0.
        memory: what a method carries from site to site, by name, at original places (B, N0); one for all that follow.
        log_gate: (B, N) or None, the logarithm of each token's soft gate while a method trains softly.
        log_size: (B, N) or None, the logarithm of how many tokens each one stands for, where keys weigh by it.
        home: (B, N0) long, the original position of what holds each token; None until some were merged.
        mixed: how states are summed on the way into this layout, see ``merge``; None: they are not.
    """

    def __init__(self, alive: Tensor, index: Tensor, blank: Tensor | None = None):
        self.alive, self.index, self.blank = alive, index, blank
        self.width, self.memory = index.shape[1], {}
        self.full: Tensor | None = None
        self.log_gate: Tensor | None = None
        self.log_size: Tensor | None = None
        self.home: Tensor | None = None
        self.mixed: tuple | None = None
        self.touched = False

    @classmethod
    def start(cls, hidden: Tensor, mask: Tensor | None) -> Tokens:
        """All tokens of ``hidden`` (B, N0, C); ``mask`` (B, N0) is non-zero at real tokens, None if all are real."""
        batch, width = hidden.shape[:2]
        index = torch.arange(width, device=hidden.device).expand(batch, width)
        if mask is None:
            return cls(torch.ones(batch, width, dtype=torch.bool, device=hidden.device), index)
        alive = mask != 0
        blank = ~alive.any(1)
        return cls(alive | blank[:, None], index, blank)

    @property
    def live(self) -> Tensor:
        """(B,) live tokens per row; the sum of the gates while a method trains softly."""
        if self.log_gate is None:
            return self.alive.sum(1)
        return (self.log_gate.exp() * self.alive).sum(1)

    @property
    def votes(self) -> Tensor:
        """(B, N) fp32 weight of each query row in a score: 1 live, 0 dead, the gate while a method trains softly."""
        return self.alive.float() if self.log_gate is None else self.log_gate.float().exp() * self.alive

    @property
    def key_bias(self) -> Tensor | None:
        """(B, N) or None: what is added to every logit of a key."""
        given = [x for x in (self.log_gate, self.log_size) if x is not None]
        return sum(given) if given else None

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
        self, keep: Tensor, into: Tensor, weight: Tensor, width: int | None = None, sized=True, longest=False
    ) -> Tokens:
        """The tokens in ``keep`` (B, N) bool, each the sum of those that go ``into`` (B, N) long its slot.

        The states are summed times their ``weight`` (B, N) fp32; what stays goes into its own slot, and what goes there
        and does not stay is dropped. In the end a merged token is put back as what holds it.

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
        holder = (
            torch.arange(self.width, device=keep.device).expand(keep.shape[0], -1).scatter_add(1, self.index, moved)
        )
        new.home = holder if self.home is None else holder.gather(1, self.home)
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

    def _copy(self) -> Tokens:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.mixed = None
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

    def mask(self, mask: Tensor | None, dtype: torch.dtype, causal: bool, additive: bool) -> Tensor | None:
        """A layer's attention mask of original size for the tokens that are left; of the same kind as the one given.

        Kinds: bool (True = attend), additive float, 0/1 integers. None means causal in a ``causal`` model and all
            elsewhere;
        it becomes an ``additive`` or a bool one. Soft gates and sizes enter as their logarithm on the key, in an
        additive mask of ``dtype``.
        """
        alive = self.alive[:, None, None]
        bias = self.key_bias
        additive = (additive and mask is None) or bias is not None
        if mask is None:
            mask = self.index[:, None, :, None] >= self.index[:, None, None] if causal else torch.ones_like(alive)
        elif mask.shape[-2] == 1 or mask.stride(-2) == 0:  # the same for every query
            mask = self.narrow(mask[..., :1, :], (-1,))
        else:
            mask = self.narrow(mask, (-2, -1))
        if mask.shape[-2] > 1:  # a dead row may see nobody any more, which is NaN: let it see itself
            own = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
            alive = alive | (own if self.blank is None else own & ~self.blank[:, None, None, None])
        if additive:
            bias = torch.zeros((), dtype=dtype, device=mask.device) if bias is None else bias[:, None, None]
            if mask.dtype == torch.bool:
                shut = ~(mask & alive)
                found = torch.where(shut, torch.finfo(dtype).min, bias.to(dtype))
                if self.log_size is None or self.blank is None:
                    return found
                # -inf, as of a bool mask: what a query that sees nobody gets is the implementation's own
                return found.masked_fill(shut & self.blank[:, None, None, None], float("-inf"))
            if mask.is_floating_point():
                return (mask + bias.to(mask.dtype)).masked_fill(~alive, torch.finfo(mask.dtype).min)
            return mask * (bias > math.log(0.5))
        if mask.is_floating_point():
            return mask.masked_fill(~alive, torch.finfo(mask.dtype).min)
        return mask & alive if mask.dtype == torch.bool else mask * alive

    def restore(self, hidden: Tensor) -> Tensor:
        """(B, N0, C): ``hidden`` at the places of the live tokens, the last complete state at all others."""
        raise NotImplementedError
