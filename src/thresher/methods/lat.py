"""LAT: one model for every budget."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.architecture import Architecture
from ..core.pareto import pareto_front
from ..core.pruner import Batch, Choice, Record, RunAgain, RunBatch
from ..core.view import View
from .parts.distillation import distillation
from .parts.selection import all_but_last, kept_count, top_k
from .topk import TopK

Schedule = tuple[float, ...]
KEEPS_ALL = 1.0


class LAT(TopK):
    """Train one model for every budget and choose a schedule at any time (Kim and Cho, "Length-Adaptive Transformer:
    Train Once with Length Drop, Use Anytime with Search", ACL 2021).

    The tokens that receive most attention stay. In training their number is drawn anew at every step, layer by layer,
    no more than a share ``drop`` fewer than in the layer before (LengthDrop). Each step trains the model with all
    tokens and, by the answers of that one alone, the smallest and ``drawn`` other ones (the sandwich rule, distilled in
    place). After the training an evolutionary search on held-out inputs finds, for many budgets, the schedule whose
    answers are nearest to those with all tokens. ``budget`` chooses one.

    Args:
        keep: the schedule, a share for all sites or one per site; 1 before a budget is chosen.
        target_flops: the budget that holds until another one is chosen.
        drop: the largest share that a layer may drop while training. Default: over all layers as much as 0.2 in each
            of twelve.
        drawn: random models that are trained in each step.
        generations: of the search; 30 new schedules each.
        seed: of the search.
        frontier: what the search found, (share of the MACs, shares kept at each site), from small to large.
        at: default: every layer but the last.

    | paper | here | why |
    |---|---|---|
    | numbers of tokens | shares of a text's length | lengths of texts differ |
    | the search maximizes a score on labelled inputs | it minimizes the divergence of the answers on unlabelled inputs | needs no labels; and it is short |
    | budgets that the search met | ``budget`` interpolates between two schedules | any budget |
    | LayerDrop | left out | layers are not tokens |
    """

    keep: float | tuple = 1.0
    drop: float | None = None
    drawn: int = 2
    generations: int = 4
    seed: int = 0
    frontier: tuple = ()

    name: ClassVar[str] = "lat"
    learned: ClassVar[tuple[str, ...]] = ("keep", "frontier")
    takes_counts: ClassVar[bool] = False  # schedules are shares

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop is not None and not 0 < self.drop < 1:
            raise ValueError(f"drop={self.drop}: expected a share of the tokens in (0, 1)")
        self.frontier = tuple((float(share), tuple(map(float, keep))) for share, keep in self.frontier)
        self.running: Schedule | None = None  # in training

    default_at = all_but_last

    def build(self, model: Architecture) -> None:
        super().build(model)
        self.most = self.drop or 1 - 0.8 ** (12 / model.depth)
        if any(len(keep) != len(self.sites) for _, keep in self.frontier):
            raise ValueError(f"frontier holds schedules of another number of sites than at={list(self.sites)}")

    def choose(self, score: Tensor, view: View) -> Choice:
        share = KEEPS_ALL if self.running is None else self.running[view.site]
        share = share if self.training else self.shares[view.site]
        count = kept_count(share, view.alive.sum(1), view.protected.sum(1))
        return Choice(top_k(score.masked_fill(view.protected, float("inf")), count, view.alive))

    def keeps_all(self, site: int) -> bool:
        return isinstance(self.shares[site], float) and self.shares[site] == KEEPS_ALL

    def width(self, slots: int, site: int) -> int | None:
        return None if self.training else super().width(slots, site)

    # --- any budget ----------------------------------------------------------------------------------------------
    @property
    def budget(self) -> float | None:
        """The MACs to be left, as a share of the dense model's; None: as ``keep`` says. Settable at any time.

        Raises ValueError where no search was made or the budget lies outside of what it found.
        """
        return self.target_flops

    @budget.setter
    def budget(self, value: float) -> None:
        if not self.frontier:
            raise ValueError("no schedules are known yet: train the model, or calibrate it on some inputs")
        low, high = self.frontier[0][0], 1.0
        if not low <= value <= high:
            raise ValueError(
                f"budget={value}: the schedules that were found leave between {low:.3f} and {high} of the MACs"
            )
        self.keep = self._schedule(value)
        self.target_flops = value

    def _schedule(self, share: float) -> Schedule:
        """Interpolate between the two schedules of the frontier next to a share of the MACs."""
        ends = [*self.frontier, (KEEPS_ALL, (KEEPS_ALL,) * len(self.sites))]
        after = next(i for i, (at, _) in enumerate(ends) if at >= share)
        (low, few), (high, many) = ends[max(0, after - 1)], ends[after]
        part = 1.0 if high == low else (share - low) / (high - low)
        return tuple(round(a + part * (b - a), 3) for a, b in zip(few, many, strict=True))

    # --- training ------------------------------------------------------------------------------------------------
    def draw(self) -> Schedule:
        """Draw a random schedule: at each site a share that is left of those before."""
        return tuple(round(1 - self.most * share, 3) for share in torch.rand(len(self.sites)).tolist())

    def loss(self, forward: RunAgain, batch: Batch, record: Record, teacher: Any = None) -> Tensor | float:
        with torch.no_grad():
            whole = forward()
        smallest = (round(1 - self.most, 3),) * len(self.sites)
        total: Any = 0.0
        try:
            for schedule in (smallest, *(self.draw() for _ in range(self.drawn))):
                self.running = schedule
                total = total + distillation(forward(), whole, 1.0, batch.get("attention_mask"))
        finally:
            self.running = None
        return total

    # --- search --------------------------------------------------------------------------------------------------
    def calibrate(self, forward: RunBatch, batches: Iterable[Batch]) -> dict[str, float]:
        """Search for schedules, once the training is over and none are known; then meet ``target_flops``."""
        if self.progress < 1:
            return {}
        batches = list(batches)
        if not self.frontier:
            keep = self.keep
            try:
                self.frontier = self._evolved(forward, batches)
            finally:
                self.keep = keep
        if self.target_flops is not None:
            self.budget = max(self.target_flops, self.frontier[0][0])
        return super().calibrate(forward, batches)

    @torch.no_grad()
    def _evolved(self, forward: RunBatch, batches: list[Batch]) -> tuple:
        """Search for the schedules that no other one beats in both MACs and answers."""
        self.keep, draw = KEEPS_ALL, random.Random(self.seed)
        whole = [forward(batch).answers for batch in batches]

        def trial(schedule: Schedule) -> tuple[float, float, Schedule]:
            self.keep, divergence, used, dense = schedule, 0.0, 0.0, 0.0
            for batch, answers in zip(batches, whole, strict=True):
                record = forward(batch)
                divergence += float(distillation(record.answers, answers, 1.0, batch.get("attention_mask")))
                used, dense = used + float(record.used), dense + float(record.dense)
            return used / dense, divergence, schedule

        def front() -> list[tuple[float, float, Schedule]]:
            return pareto_front(sorted(trials.values()), lambda one: one[0], lambda one: one[1])

        even = {tuple(round(1 - i * self.most / 8, 3) for _ in self.sites) for i in range(1, 13)}
        trials = {schedule: trial(schedule) for schedule in even}
        for _ in range(self.generations):
            best = front()
            for _ in range(15):
                one, other = (draw.choice(best)[2] for _ in range(2))
                mutated = [x if draw.random() < 0.5 else draw.uniform(0.3, 1) for x in one]
                mean = [(a + b) / 2 for a, b in zip(one, other, strict=True)]
                for child in (mutated, mean):
                    schedule = tuple(round(x, 3) for x in child)
                    if schedule not in trials:
                        trials[schedule] = trial(schedule)
        return tuple((share, schedule) for share, _, schedule in front())
