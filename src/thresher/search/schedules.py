"""Schedules: at which layers tokens leave and how many stay, what that costs, and the best of them under a budget.

A schedule is searched as ``left``: for each layer that can be a site, which of ``LEVELS`` is left after it, as an
index, never falling. One of the family (``Space.falling``) says ``left`` in shares of a text's own tokens instead.
Shapes: N texts, L layers that can be sites, V levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core.architecture import Architecture
from ..core.cost import LatencyTable, LayerCount, between, dense_macs, macs, tokens_by_layer
from ..core.pruner import TokenPruner
from ..methods.parts.budget import bisect_to_budget
from ..methods.parts.selection import kept_count
from ..methods.tome import ToMe, merged_in_rounds

STEPS = 20
LEVELS = (
    *(round(1 - i / STEPS, 2) for i in range(STEPS)),
    0.0,
)  # shares of a text's own tokens; 0: the protected ones alone
WIDTHS = (0.0, 0.08, 0.16, 0.32)  # of the family's sigmoids, as shares of the depth: from rectangular to geometric
WORTH = 0.95  # a site at which more stays costs more than it saves
EVEN = tuple(1 - i / 40 for i in range(1, 21))  # shares of the survivors that stay in every layer
BINS = 2000  # of the cost with every token kept, in which the search counts
Left = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Space:
    """The schedules of one model, and their mean cost on some texts: MACs, or with a ``table`` measured milliseconds.

    Args:
        info: of the model.
        lengths: (N,) tokens of each text.
        charged: whether the method takes all attention probabilities of a site, whose MACs then count.
        table: measured times, one text at a time.
        protected: (N,) tokens of each text that never leave; default: those that the model protects.
        merges: the method where tokens are merged, in a round no more than half of those that may leave.
    """

    info: Architecture
    lengths: Tensor
    charged: bool = True
    table: LatencyTable | None = None
    protected: Tensor | None = None
    merges: ToMe | None = None

    @property
    def layers(self) -> range:
        """The layers that can be sites."""
        return range(self.info.first_site, self.info.last_site + 1)

    def fields(self, left: Left) -> dict[str, tuple]:
        """``at`` and ``keep``: where tokens leave, and the share of the survivors that stays."""
        before, shares = 0, {}
        for layer, level in zip(self.layers, left, strict=True):
            if level > before:
                shares[layer] = round(LEVELS[level] / LEVELS[before], 3) if LEVELS[level] else 1
                before = level
        return {"at": tuple(shares), "keep": tuple(shares.values())}

    def options(self, left: Left) -> dict[str, tuple]:
        """The options of the method: ``fields``, where tokens are merged ``r`` in the place of ``keep``."""
        fields = self.fields(left)
        keep = fields.pop("keep")
        return fields | (
            {"r": tuple(round(1 - share, 3) for share in keep)} if self.merges is not None else {"keep": keep}
        )

    def reachable(self, left: Left) -> Left:
        """The schedule nearest to ``left`` that is possible: where tokens are merged, half of them go in a layer."""
        level, found = 0, []
        for wanted in left:
            level = max(level, min(wanted, self._furthest[level]))
            found.append(level)
        return tuple(found)

    def even(self, budget: float) -> Left | None:
        """The mildest schedule within a budget of cost in which the same share leaves in each layer."""
        for share in EVEN:
            left = self.reachable(tuple(_nearest(share ** (i + 1)) for i in range(len(self.layers))))
            if self.cost(left) <= budget:
                return left
        return None

    def cost(self, left: Left) -> float:
        """Mean cost of a text, with tokens counted as the methods count them; infinite where it is not possible."""
        if left not in self._known:
            self._known[left] = self._cost(self.fields(left)) if self.reachable(left) == left else math.inf
        return self._known[left]

    def falling(self, width: float, budget: float) -> dict[str, tuple] | None:
        """``at`` and ``keep`` of the schedule of one family member that costs a share ``budget`` of the dense model.

        After layer i a share sigmoid((centre - i) / width), relative to that before the first layer, of a text's tokens
        is left. The width, a share of the depth, says how gradually they leave; the centre follows from the budget.
        0 is rectangular: everything stays until a layer in which, with the next one, all leave but the protected
        tokens. Wide ones come to geometric schedules, of equal shares. Of short texts costs have gaps: where none is
        within 2 % of the budget it is the dearest below. None: the budget is out of reach.
        """
        tried: dict[float, dict[str, tuple]] = {}

        def cost(by: float) -> float:
            schedule = _shares(self.layers, _falling(len(self.layers), width * self.info.depth, by))
            share = self._cost(schedule) / self.dense
            tried[share] = schedule
            return share

        reached = bisect_to_budget(cost, budget)
        if abs(reached - budget) <= 0.02 * budget:
            return tried[reached]
        below = [share for share in tried if share <= budget]
        return tried[max(below)] if below else None

    def _cost(self, schedule: Mapping[str, tuple]) -> float:
        shares = dict(zip(schedule["at"], schedule["keep"], strict=True))
        after = {layer: self._after(share) for layer, share in shares.items()}
        return self._fixed + self._price(self._counts(self.lengths, after, range(self.info.depth)))

    @cached_property
    def dense(self) -> float:
        """Mean cost of a text in the dense model: in time, of the model without any hook."""
        if self.table is None:
            return dense_macs(self.info.costs, self.lengths).double().mean().item()
        return between(self.lengths, self.table.dense).mean().item()

    @cached_property
    def strongest(self) -> Left:
        """The cheapest schedule."""
        return self.frontier(np.zeros((len(self.layers), len(LEVELS))))[0]

    def frontier(self, damage: np.ndarray) -> list[Left]:
        """The schedules that no cheaper one equals in damage, by rising cost: dynamic programming over layers, the
        level after them, and the cost in parts of that with every token kept.

        damage: (L, V), what it does to let the other tokens leave at one layer alone, falling in no row. In a schedule
        it adds up: a layer that goes from level a to b is charged ``damage[layer, b] - damage[layer, a]``.
        """
        unit, width = self.cost((0,) * len(self.layers)) / BINS, BINS + len(self.layers) + 1
        before, steps = self._steps
        best = np.full((len(LEVELS), width), np.inf)
        best[0, round(before / unit) :] = 0.0
        trail = []  # of each layer (2, V, width): the level and the cost that it came from
        for row, table in zip(damage, steps, strict=True):
            least, origin = np.full_like(best, np.inf), np.zeros((2, *best.shape), dtype=int)
            for a, b in zip(*np.triu_indices(len(LEVELS)), strict=True):
                if table[a, b] >= width * unit or (step := round(table[a, b] / unit)) >= width:
                    continue
                reached = best[a, : width - step] + max(0.0, row[b] - row[a])
                better = reached < least[b, step:]
                least[b, step:][better] = reached[better]
                origin[0, b, step:][better] = a
                origin[1, b, step:][better] = np.flatnonzero(better)
            best = least
            trail.append(origin)
        front, last = [], np.inf
        for cost in range(width):
            level = int(best[:, cost].argmin())
            if best[level, cost] < last:
                last = best[level, cost]
                front.append(_walk(trail, level, cost))
        return front

    def within(self, frontier: list[Left], budget: float) -> Left | None:
        """The last of a ``frontier`` that costs ``budget`` at most."""
        return next((left for left in reversed(frontier) if self.cost(left) <= budget), None)

    @cached_property
    def _known(self) -> dict[Left, float]:
        return {}

    @property
    def _protected(self) -> Tensor:
        return self.lengths.clamp(max=len(self.info.protected)) if self.protected is None else self.protected

    @property
    def _fixed(self) -> float:
        return 0.0 if self.table is None else self.table.fixed(self.lengths).mean().item()

    def _counts(self, tokens: Tensor, after: Mapping[int, Callable[..., Tensor]], layers: range) -> list[LayerCount]:
        free = self.table is None and not self.charged  # in MACs; the table has the time of every site
        unscored = layers if free else ()
        counts = tokens_by_layer(tokens, after, layers, inside=self.info.drops_inside, unscored=unscored)
        if self.merges is None:
            return counts
        # that are compared, of the two sets; in later rounds a little less
        size = self.merges.channels(self.info) * self.merges.rounds
        pairs = [count.n_attention**2 * size / 4 for count in counts]
        each = zip(layers, counts, pairs, strict=True)
        return [replace(count, spent=own) if layer in after else count for layer, count, own in each]

    def _after(self, share: float | int) -> Callable[[Tensor], Tensor]:
        """The function from the tokens (N,) that enter a site to those that go on."""
        if (method := self.merges) is None:
            return partial(kept_count, share, protected=self._protected)
        part = round(1 - share, 3)

        def merged(tokens: Tensor) -> Tensor:
            free = (tokens - self._protected).clamp(min=0)
            return tokens - merged_in_rounds(part, tokens, free, method.rounds)

        return merged

    @cached_property
    def _furthest(self) -> list[int]:
        """Of each level the last one that a layer can go to."""
        if self.merges is None:
            return [len(LEVELS) - 1] * len(LEVELS)
        return [
            max(b for b, share in enumerate(LEVELS) if share and share >= a / 2**self.merges.rounds) if a else 0
            for a in LEVELS
        ]

    def _price(self, counts: list[LayerCount], first: int = 0) -> float:
        """Mean cost of some layers, from ``first`` on."""
        if not counts:
            return 0.0
        costs = list(self.info.costs[first : first + len(counts)])
        return (macs(costs, counts) if self.table is None else self.table.time(counts)).double().mean().item()

    @cached_property
    def _steps(self) -> tuple[float, np.ndarray]:
        """The cost of what comes before the first layer that can be a site, and (L, V, V) that of each such layer
        between two levels. The last one bears what comes after it."""
        n, levels, depth = self.lengths, range(len(LEVELS)), self.info.depth
        kept = [torch.maximum((share * n - 1e-6).ceil().long(), self._protected.clamp(min=1)) for share in LEVELS]
        steps = np.full((len(self.layers), len(LEVELS), len(LEVELS)), np.inf)
        for i, layer in enumerate(self.layers):
            bears = range(layer, depth if layer == self.info.last_site else layer + 1)
            for a in levels:
                for b in levels[a : self._furthest[a] + 1]:
                    after = {layer: lambda _, left=kept[b]: left} if a != b else {}
                    steps[i, a, b] = self._price(self._counts(kept[a], after, bears), layer)
        return self._fixed + self._price(self._counts(n, {}, range(self.info.first_site))), steps


def protected_by(pruner: TokenPruner, texts: Sequence[Sequence[int]]) -> Tensor:
    """(N,) how many tokens of each text, given as ids, a method protects."""
    ids = [torch.tensor(text) for text in texts]
    alive = pad_sequence([torch.ones(len(text), dtype=torch.bool) for text in ids], batch_first=True)
    return pruner.protection(alive, pad_sequence(ids, batch_first=True)).sum(1)


def _nearest(share: float) -> int:
    """The level that is nearest to a share."""
    return min(range(len(LEVELS) - 1), key=lambda level: abs(LEVELS[level] - share))


def _falling(count: int, width: float, by: float) -> list[float]:
    """The share of a text's tokens that is left after each of ``count`` layers; with a larger ``by`` fewer are."""
    if width == 0:
        return [min(1.0, max(0.0, count - by - i)) for i in range(count)]

    def opened(layer: float) -> float:  # the logarithm of a sigmoid, which does not run out of numbers
        x = (count + 6 * width - (1 + width) * by - layer) / width
        return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))

    return [math.exp(opened(i) - opened(-1)) for i in range(count)]


def _shares(layers: Iterable[int], left: Iterable[float]) -> dict[str, tuple]:
    """``at`` and ``keep``, shares of the survivors in thousandths, of what is ``left`` of all tokens."""
    before, shares = 1.0, {}
    for layer, after in zip(layers, left, strict=True):
        share = round(after / before, 3) if before else 1.0
        if share < WORTH:
            shares[layer] = share if after >= 0.001 else 1  # the protected ones alone
            before = after if after >= 0.001 else 0.0
    return {"at": tuple(shares), "keep": tuple(shares.values())}


def _walk(trail: list[np.ndarray], level: int, cost: int) -> Left:
    """The schedule that ends at a level and a cost."""
    left = []
    for origin in reversed(trail):
        left.append(level)
        level, cost = origin[:, level, cost].tolist()
    return tuple(reversed(left))


def neighbours(left: Left, reach: int = 2) -> list[Left]:
    """Schedules near one: up to ``reach`` levels more or less at two layers, or at one the level of that before."""
    moves = [0, *(move for step in range(1, reach + 1) for move in (step, -step))]
    near = dict.fromkeys(_moved(left, {i: left[i - 1] - left[i]}) for i in range(1, len(left)))
    for i in range(len(left)):
        for j in range(i + 1, len(left)):
            near.update(dict.fromkeys(_moved(left, {i: x, j: y}) for x in moves for y in moves))
    near.pop(left, None)
    return [*near]


def _moved(left: Left, moves: dict[int, int]) -> Left:
    """``left`` with some levels moved, and those that would then fall along the layers moved with them."""
    new = list(left)
    for i, move in moves.items():
        new[i] = min(max(left[i] + move, 0), len(LEVELS) - 1)
        new[:i] = [min(level, new[i]) for level in new[:i]]
        new[i + 1 :] = [max(level, new[i]) for level in new[i + 1 :]]
    return tuple(new)


def curves(measured: Iterable[dict[float, float]]) -> np.ndarray:
    """(L, V): the damage at every level, from that measured at a few shares of each layer; made to fall in no row, none
    where everything stays, and monotone cubic pieces in between (Fritsch and Carlson, 1980)."""
    from scipy.interpolate import PchipInterpolator

    rows = []
    for points in measured:
        shares = sorted(points, reverse=True)
        values = np.maximum.accumulate([0.0, *(max(0.0, points[share]) for share in shares)])
        rows.append(PchipInterpolator([0.0, *(1 - share for share in shares)], values)([1 - x for x in LEVELS]))
    return np.maximum.accumulate(np.stack(rows), axis=1)
