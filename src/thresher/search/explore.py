"""The schedules of one model that a search runs: what each layer bears, what each score does, and what is best.

No label is needed: what is measured is how far the pruned model's answers are from the dense model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from transformers import PreTrainedModel

from ..api import prune, unprune
from ..core.pareto import pareto_front
from ..core.pruner import METHODS
from ..data.models import make_method
from ..evaluation.latency import latency_table
from ..evaluation.predict import Text
from ..methods.topk import TopK
from ..stats import bounds
from .reference import Sample
from .schedules import LEVELS, Left, Space, curves, neighbours

PROFILED = (0.75, 0.5, 0.3, 0.15, 0.0)  # shares at which each layer is tried alone
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # of the dense cost, for which a schedule is looked for
POWERS = (1.0, 0.5)  # of the divergence, in which the layers' damage is taken to add up
LOOKS = 36  # schedules that a refinement runs
IDLE = 1e-9  # divergence of a layer at which everything may leave
SCORES = {  # that "auto" compares: name -> method and its options
    **{name: (name, {}) for name in ("topk", "vatp", "spatten", "entropy")},
    "entropy, column": ("entropy", {"criterion": "column"}),
}
Trial = tuple[str, Left]  # a score and a schedule
LIMITS = {"max_disagreement": "disagreement", "max_drop": "drop of accuracy"}


def served(net: PreTrainedModel, scores: dict) -> dict:
    """Those of ``scores`` that a model can serve. Raises ValueError, as the first does, where it can serve none."""
    found, refusals = {}, []
    for name, (method, options) in scores.items():
        try:
            prune(net, make_method(method, {"keep": 1.0, "at": ()} | options))
        except ValueError as refusal:
            refusals.append(refusal)
        else:
            unprune(net)
            found[name] = method, options
    if not found:
        raise refusals[0]
    return found


class Search:
    """The schedules of one model that were run, and what they did to one sample of texts; single layers are tried on
    another one. ``scores`` as ``SCORES``; the search begins with the first."""

    def __init__(
        self, net: PreTrainedModel, scores: dict, sample: Sample, profiling: Sample, timed: bool, tell: Callable
    ):
        self.net, self.scores, self.sample = net, served(net, scores), sample
        self.profiling, self.tell, self.score = profiling, tell, next(iter(self.scores))
        info = prune(net, TopK(keep=1.0, at=())).token_pruner.architecture
        unprune(net)
        kind = METHODS[self.scores[self.score][0]]
        self.space = Space(
            *(info, Text(net, sample.rows, None).lengths, kind.needs_attention and kind.scores_all),
            table=latency_table(net) if timed else None,
        )
        if not self.space.layers:
            raise ValueError(f"{info.name} has no layer after which tokens could leave")
        self.cost = "latency_ms" if timed else "flops_fraction"
        self.rows: dict[Trial, dict] = {}

    def budget(self, name: str, value: float) -> float:
        """The budget as a cost of the space; infinite for one of answers. Raises ValueError if it is out of reach."""
        if name in LIMITS:
            return float("inf")
        unit = self.space.dense if name == "target_flops" else 1.0
        least, most = self.space.cost(self.space.strongest) / unit, self.space.dense / unit
        if not least <= value < most:
            raise ValueError(
                f"{name}={value:g} is out of reach on these texts: expected from {least:.3g} up to {most:.3g}, "
                "which the dense model takes"
            )
        return value * unit

    def apply(self, score: str, left: Left) -> None:
        """Prune the model by a schedule."""
        if hasattr(self.net, "token_pruner"):
            unprune(self.net)
        method, options = self.scores[score]
        prune(self.net, make_method(method, options | self.space.fields(left)))

    def run(self, left: Left) -> dict:
        """The row of a schedule with the present score, run once."""
        if (trial := (self.score, left)) not in self.rows:
            self.apply(*trial)
            found = self.sample.compare(self.net)
            drop = None if found.lost is None else float(found.lost.mean() - found.won.mean())
            self.rows[trial] = {
                "method": self.score,
                **self.space.fields(left),
                "flops_fraction": found.flops_fraction,
                "latency_ms": None if self.space.table is None else self.space.cost(left),
                "divergence": found.divergence,
                "disagreement": None if found.differs is None else float(found.differs.mean()),
                "drop": drop,
                "tested": None,
                "bound": None,
                "chosen": False,
            }
        return self.rows[trial]

    def profile(self) -> None:
        """``profiled``: layer -> share that stays after it alone -> divergence, and what follows from it. A layer to
        which nothing matters is run once."""
        layers, found = self.space.layers, {}
        for i, layer in enumerate(layers):
            found[layer] = {}
            for j, share in enumerate(reversed(PROFILED)):
                self.tell("trying layers alone", i * len(PROFILED) + j, len(layers) * len(PROFILED))
                idle = j and found[layer][PROFILED[-1]] < IDLE
                if not idle:
                    self.apply(self.score, (0,) * i + (LEVELS.index(share),) * (len(layers) - i))
                found[layer][share] = 0.0 if idle else self.profiling.compare(self.net).divergence
        self.profiled, damage = found, curves(found.values())
        self.damage, self.fronts = damage, [self.space.frontier(damage**power) for power in POWERS]

    def choose(self, left: Left) -> bool:
        """Go on with the score that does the least under one schedule; whether it is another one."""
        before, far = self.score, {}
        for i, score in enumerate(self.scores):
            self.tell("comparing scores", i, len(self.scores))
            self.score = score
            far[score] = self.run(left)["divergence"]
        self.score = min(far, key=lambda score: (far[score], score != before))
        if self.score != before:
            self.profile()
        return self.score != before

    def offers(self, budget: float) -> list[Left]:
        """The schedules that the profile holds to be best under a budget of cost."""
        offered = [self.space.within(front, budget) for front in self.fronts] or [self.space.strongest]
        return list(dict.fromkeys(left or self.space.strongest for left in offered))

    def survey(self, budgets: Iterable[float]) -> list[Left]:
        """The better offer for each budget that can be reached."""
        least, budgets = self.space.cost(self.space.strongest), list(budgets)
        found = []
        for i, budget in enumerate(budgets):
            self.tell("running schedules", i, len(budgets))
            if least <= budget < self.space.dense:
                found.append(min(self.offers(budget), key=lambda left: self.run(left)["divergence"]))
        return list(dict.fromkeys(found))

    def refine(self, left: Left, budget: float, looks: int) -> Left:
        """The best that is found by going from neighbour to neighbour under a budget of cost; layers to which nothing
        matters stay as they are."""
        idle = [i for i, row in enumerate(self.damage) if row.max() < IDLE]
        for done in range(looks):
            near = (one for one in neighbours(left) if all(one[i] == left[i] for i in idle))
            near = sorted((one for one in near if (self.score, one) not in self.rows), key=self._sum)
            one = next((one for one in near if self.space.cost(one) <= budget), left)
            if one == left:
                break
            self.tell("refining", done, looks)
            left = min(left, one, key=lambda one: self.run(one)["divergence"])
        return left

    def meet(self, budget: float) -> Trial:
        """The schedule of the least divergence within a budget of cost."""
        (start,) = self.survey([budget])
        if self.choose(start):
            (start,) = self.survey([budget])
        self.survey(share * self.space.dense for share in SHARES)
        best = self.score, self.refine(start, budget, LOOKS)
        within = [trial for trial in self.rows if self.space.cost(trial[1]) <= budget]
        return min(within, key=lambda trial: (self.rows[trial]["divergence"], trial != best))

    def sequence(self, kind: str, limit: float) -> list[Trial]:
        """The schedules to test, the mildest first: those on the front, more of them where "disagreement" or "drop", as
        the search's own texts have it, comes to ``limit``."""

        def surveyed() -> tuple[list[Left], list[Left]]:
            found = self.survey(share * self.space.dense for share in SHARES) or [self.space.strongest]
            return found, [left for left in found if self.run(left)[kind] <= limit]

        found, good = surveyed()
        if self.choose(good[-1] if good else found[0]):
            found, good = surveyed()
        edge = self.space.cost(good[-1]) if good else self.space.dense
        after = [self.space.cost(left) for left in found if self.space.cost(left) < edge]
        for share in (0.25, 0.5, 0.75):  # a closer look where the budget seems to be
            for left in self.survey([edge + share * (max(after, default=edge / 2) - edge)]):
                self.refine(left, self.space.cost(left), LOOKS // 3)
        trials = {id(row): trial for trial, row in self.rows.items()}
        front = pareto_front(self.rows.values(), lambda row: row["flops_fraction"], lambda row: row["divergence"])
        return [trials[id(row)] for row in reversed(front)]

    def test(self, name: str, limit: float, sample: Sample) -> Trial:
        """The strongest schedule in a row of passes; the sequence is fixed by the sample of the search."""
        sequence = self.sequence("drop" if name == "max_drop" else "disagreement", limit)
        tested = []

        def bound(trial: Trial) -> float:
            self.tell("testing schedules", len(tested), len(sequence))
            self.apply(*trial)
            result, row = sample.compare(self.net), self.rows[trial]
            tested.append(trial)
            if name == "max_drop":
                lost, won = int(result.lost.sum()), int(result.won.sum())
                row["tested"] = (lost - won) / len(result.lost)
                row["bound"] = bounds.paired_upper(lost, won, len(result.lost))
            else:
                wrong = int(result.differs.sum())
                row["tested"] = wrong / len(result.differs)
                row["bound"] = bounds.upper(wrong, len(result.differs))
            return row["bound"]

        passed = bounds.passing(map(bound, sequence), limit)
        if not passed:
            first = self.rows[sequence[0]]
            raise ValueError(
                f"no schedule passes {name}={limit:g}: the mildest, with {first['flops_fraction']:.2f} of the MACs, "
                f"has a {LIMITS[name]} of {first['tested']:.4f} on {len(sample.dense.tokens)} texts, at most "
                f"{first['bound']:.4f} with 95 % confidence; give more texts or a larger {name}"
            )
        return sequence[passed - 1]

    def _sum(self, left: Left) -> float:
        """What the profile says a schedule does."""
        levels, rows = np.array([0, *left]), self.damage
        return sum(max(0.0, row[b] - row[a]) for row, a, b in zip(rows, levels, levels[1:], strict=False))
