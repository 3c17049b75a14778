"""Search the schedules of one model: what each layer bears, which score does best, which schedule keeps the budget.

No label is needed: what is measured is how far the pruned model's answers are from the dense model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ..api import prune, unprune
from ..core.cost import LatencyTable
from ..core.pareto import pareto_front
from ..core.pruner import METHODS, SURVIVORS, TokenPruner, pruner_in, pruner_of
from ..data.models import make_method
from ..evaluation.predict import Text
from ..methods.tome import ToMe
from ..methods.topk import TopK
from ..stats import bounds
from .reference import Comparison, Sample
from .schedules import LEVELS, Left, Space, curves, neighbours, protected_by

PROFILED = (0.75, 0.5, 0.3, 0.15, 0.0)  # shares at which each layer is tried alone
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # of the dense cost, for which a schedule is looked for
POWERS = (1.0, 0.5)  # of the divergence, in which the layers' damage is taken to add up
LOOKS = 36  # schedules that a refinement runs
HOPELESS = 2.0  # times the divergence of merging, from which on dropping is not looked at further; and the reverse
IDLE = 1e-9  # divergence of a layer at which everything may leave
SCORES = {  # that "auto" compares: name -> method and its options
    **{name: (name, {}) for name in ("topk", "vatp", "spatten", "entropy")},
    "entropy, column": ("entropy", {"criterion": "column"}),
    **{name: (name, {}) for name in ("tome", "tofu")},
}
BY_STATES: dict[str, Any] = {"metric": "states", "rounds": 2}
SHORT = 64  # tokens below which a text is left alone where an embedder merges, or half of the mean where that is less
AVERAGES = {name: (name, BY_STATES) for name in ("tome", "tofu")}  # of an embedder that averages the states of a text
LIMITS = {"max_disagreement": "disagreement", "max_drop": "drop of accuracy"}
SEARCHED, PROFILING, FEWEST = 256, 96, 32  # texts to search on, to try single layers on, and the fewest
TESTED = 8  # texts to test on, in multiples of the fewest that the bound needs
Scores = Mapping[str, tuple[str, dict]]  # of a score its method and the options
Trial = tuple[str, Left]  # a score and a schedule


@dataclass(frozen=True)
class Budget:
    """One bound on a schedule: on its cost ("target_flops", "target_latency_ms") or on its answers (``LIMITS``).

    ``value`` is a share, of "target_latency_ms" milliseconds, of "max_drop" points of accuracy.

    Raises:
        ValueError: a value that is none of these.
    """

    name: str
    value: float

    def __post_init__(self) -> None:
        most = float("inf") if self.of_time else 100 if self.of_accuracy else 1
        if isinstance(self.value, bool) or not 0 < self.value < most:
            expected = "milliseconds" if self.of_time else "a share between 0 and 1"
            expected = "points between 0 and 100" if self.of_accuracy else expected
            raise ValueError(f"{self.name}={self.value!r}: expected {expected}")

    @classmethod
    def only(cls, given: Mapping[str, float | None]) -> Budget:
        """The one budget that was given. Raises ValueError: none or several were."""
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) != 1:
            raise ValueError(f"expected one budget of {', '.join(given)}, got {', '.join(named) or 'none'}")
        return cls(*next(iter(named.items())))

    @property
    def of_time(self) -> bool:
        return self.name == "target_latency_ms"

    @property
    def of_answers(self) -> bool:
        return self.name in LIMITS

    @property
    def of_accuracy(self) -> bool:
        return self.name == "max_drop"

    @property
    def limit(self) -> float | None:
        """The share of the answers that may differ at most; None where the budget is one of cost."""
        return None if not self.of_answers else self.value / 100 if self.of_accuracy else self.value

    def check(self, task: str, numbers: bool) -> None:
        """Raise ValueError where answers to a kind of ``task`` cannot be compared; ``numbers``: they are numbers."""
        if self.of_answers and (numbers or (self.of_accuracy and task == "qa")):
            answers = "classes" if self.of_accuracy else "classes and answers"
            raise ValueError(f"{self.name} is for models that give {answers}: this one is for {task}")

    def split(self, count: int, kind: str = "") -> tuple[int, int]:
        """How many of ``count`` texts (of some ``kind``) to test on and how many to search on. Raises ValueError: they
        are too few."""
        least = 0 if self.limit is None else bounds.least(self.limit, paired=self.of_accuracy)
        if count < least + FEWEST:
            more = f", and {self.name}={self.value:g} {least} more to test on" if least else ""
            raise ValueError(f"{count} texts{kind} are too few: the search needs {FEWEST} at least{more}")
        tested = min(TESTED * least, max(least, count - SEARCHED))
        return tested, min(SEARCHED, count - tested)


def scores_of(method: str, options: dict[str, Any] | None) -> Scores:
    """The scores to search with: those of "auto", or one method.

    Raises:
        ValueError: an unknown method, one without a share for each site, options that it does not take or that the
            search decides.
    """
    options = dict(options or {})
    if method == "auto" and options:
        raise ValueError(f"method_options {', '.join(sorted(options))} are of one method: name it")
    if method != "auto":
        make_method(method, options)
        known = sorted(name for name, kind in METHODS.items() if issubclass(kind, (TopK, ToMe)))
        if method not in known:
            what = f"{method} has no share to keep, or to merge, at each site"
            raise ValueError(f"{what}: expected auto or one of {', '.join(known)}")
    if decided := {"at", "keep", "r"} & {*options}:
        raise ValueError(f"{', '.join(sorted(decided))} is what is searched for: leave it out of method_options")
    return SCORES if method == "auto" else {method: (method, options)}


def scores_of_averages(net: PreTrainedModel, scores: Scores) -> Scores:
    """What "auto" compares for an embedder that averages states: merging, by states; ``scores`` where it cannot merge.

    Tokens that are dropped move the average several times as far.
    """
    try:
        return served(net, AVERAGES)
    except ValueError:
        return scores


def by_states(method: str) -> dict[str, Any]:
    """How a method merges the tokens of an embedder that averages states; nothing for one that does not merge."""
    return dict(BY_STATES) if merges(method) else {}


def left_alone(method: str | None, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Choose ``min_tokens`` for an embedder of texts, given as ids, where a method merges: a query is short, gains no
    time and loses its place first."""
    if method not in METHODS or not merges(method):
        return {}
    return {"min_tokens": min(SHORT, sum(map(len, texts)) // (2 * max(1, len(texts))))}


def with_survivors(scores: Scores) -> Scores:
    """Each score with either pooling of an embedder, but for those that say which."""
    other = {
        f"{name}, {SURVIVORS}": (method, options | {"pooling": SURVIVORS})
        for name, (method, options) in scores.items()
        if "pooling" not in options
    }
    return {**scores, **other}


def merges(method: str) -> bool:
    """Whether a method merges a share of the tokens, ``r``, in the place of keeping one."""
    return issubclass(METHODS[method], ToMe)


def idle(method: str, options: dict) -> TokenPruner:
    """A method that lets no token leave."""
    return make_method(method, {"at": ()} | ({} if merges(method) else {"keep": 1.0}) | options)


def served(net: PreTrainedModel, scores: Scores) -> Scores:
    """Those of ``scores`` that a model can serve. Raises ValueError, as the first does, where it can serve none."""
    able, refusals = {}, []
    for name, (method, options) in scores.items():
        try:
            prune(net, idle(method, options))
        except ValueError as refusal:
            refusals.append(refusal)
        else:
            unprune(net)
            able[name] = method, options
    if not able:
        raise refusals[0]
    return able


@dataclass(frozen=True)
class Samples:
    """The texts of a search: every schedule runs on ``search``, single layers on ``profile``; what is on ``test``
    chooses nothing."""

    search: Sample
    profile: Sample
    test: Sample | None = None

    @property
    def tested(self) -> Sample:
        """The texts of the test, which a budget of answers needs."""
        if self.test is None:
            raise ValueError("a budget of disagreement or of accuracy needs texts to test on: give Samples.test")
        return self.test


@dataclass(frozen=True)
class Profile:
    """What each layer bears: ``alone``, layer -> share that stays after it alone -> divergence; that at every level,
    (L, V); the frontiers of the sums of its ``POWERS``."""

    alone: dict[int, dict[float, float]]
    damage: np.ndarray
    fronts: list[list[Left]]


class ScheduleSearch:
    """The schedules of one model that were run, and what they did to its answers; ``find`` is the whole search.

    1. Each layer alone, at a few shares: how far the answers are from the dense model's (``reference.divergence``).
    2. Dynamic programming over layers and levels, as if what the layers do added up (``Space.frontier``), for the
       budget and for a range of others.
    3. The best for the budget is run with each of the scores, and the search goes on with the one whose answers are
       nearest to the dense model's; where that is not the one of the profile, the profile is taken again.
    4. Those schedules are run, and the best is refined: its neighbours are run, in the order of what the sum says, and
       whichever is better takes its place.
    5. Of an embedder, with either pooling: scores come in both, and what was refined is run with the other one.
    6. All of that is done for the scores that drop tokens, and for those that merge them; where the first schedules of
       one kind do twice the damage of the other's it is not looked at further. What is best of both is taken.

    A budget of answers is met by a test on texts that chose nothing: the schedules that were run are tried from the
    mildest to the strongest, each with an exact upper bound at 5 %, up to the first whose bound is above the budget;
    the last before it is taken. The true rate on texts like these is then above the budget in at most 5 % of all draws
    of them. Disagreement has Clopper and Pearson's one-sided bound; the drop of accuracy, P(right when dense, wrong
    when pruned) - P(the reverse), the conservative difference of two such bounds at 2.5 % each
    (``bounds.paired_upper``). Texts are taken to be independent; questions on one article are not quite.

    Args:
        net: the dense model; at the end of ``find`` it is pruned by the schedule that was chosen.
        scores: as ``SCORES``; the search begins with the first that the model serves.
        samples: with the dense model's answers.
        table: prices schedules in time, and no merging; None: in MACs.
        tell: called with what is going on, steps done and all steps.

    Attributes:
        rows: of each trial what it cost and did.
        profiles: of dropping, and of merging.
    """

    def __init__(
        self,
        net: PreTrainedModel,
        scores: Scores,
        samples: Samples,
        table: LatencyTable | None = None,
        tell: Callable[[str, int, int | None], Any] = lambda what, done, total: None,
    ):
        self.net, self.samples, self.tell = net, samples, tell
        timed = {name: own for name, own in scores.items() if table is None or not merges(own[0])}
        if not timed:
            raise ValueError(f"{', '.join(scores)} merges tokens, which the table of times has no price for: use MACs")
        self.scores = served(net, timed)
        self.spaces: dict[bool, Space] = {}
        lengths = Text(net, samples.search.rows, None).lengths
        for method, options in self.scores.values():
            if (kind := merges(method)) in self.spaces:
                continue
            pruner = pruner_in(prune(net, idle(method, options)))
            info, charged = pruner.architecture, pruner.needs_attention and pruner.scores_all
            protected = protected_by(pruner, samples.search.rows["input_ids"])
            unprune(net)
            self.spaces[kind] = Space(info, lengths, charged and not kind, table, protected, pruner if kind else None)
        self.score = next(iter(self.scores))
        if not self.space.layers:
            raise ValueError(f"{self.space.info.name} has no layer after which tokens could leave")
        self.cost = "flops_fraction" if table is None else "latency_ms"
        self.rows: dict[Trial, dict] = {}
        self.profiles: dict[bool, Profile] = {}

    @property
    def space(self) -> Space:
        """The schedules of the present score: of dropping, or of merging."""
        return self.spaces[self.merging]

    @property
    def merging(self) -> bool:
        """Whether the present score merges."""
        return merges(self.scores[self.score][0])

    @property
    def profiled(self) -> Profile:
        """The profile of the present score, or of one like it."""
        return self.profiles[self.merging]

    def find(self, budget: Budget) -> dict:
        """The row of the best schedule within a budget, by which the model is pruned now.

        Raises:
            ValueError: the budget is out of reach, or no schedule passes the test.
        """
        most = self.most(budget)
        trial = self.test(budget) if budget.of_answers else self.meet(most)
        self.rows[trial]["chosen"] = True
        self.score = trial[0]
        self.apply(*trial)
        return self.rows[trial]

    def kinds(self, budget: float = float("inf")) -> Iterator[None]:
        """Go through dropping and merging, as far as a budget of cost is in reach: profile the first score of each."""
        for kind in self.spaces:
            self.score = next(name for name, (method, _) in self.scores.items() if merges(method) == kind)
            if self.space.cost(self.space.strongest) <= budget:
                if kind not in self.profiles:
                    self.profile()
                yield

    def most(self, budget: Budget) -> float:
        """The budget as a cost of the space; infinite for one of answers. Raises ValueError if it is out of reach."""
        if budget.of_answers:
            return float("inf")
        unit = 1.0 if budget.of_time else self.space.dense
        least = min(space.cost(space.strongest) for space in self.spaces.values()) / unit
        dense = self.space.dense / unit
        if not least <= budget.value < dense:
            raise ValueError(
                f"{budget.name}={budget.value:g} is out of reach on these texts: expected from {least:.3g} up to "
                f"{dense:.3g}, which the dense model takes"
            )
        return budget.value * unit

    def apply(self, score: str, left: Left) -> None:
        """Prune the model by a schedule."""
        if pruner_of(self.net) is not None:
            unprune(self.net)
        method, options = self.scores[score]
        prune(self.net, make_method(method, options | self.spaces[merges(method)].options(left)))

    def run(self, left: Left) -> dict:
        """The row of a schedule with the present score, run once."""
        if (trial := (self.score, left)) not in self.rows:
            self.apply(*trial)
            outcome = self.samples.search.compare(self.net)
            self.rows[trial] = {
                "method": self.score,
                **self.space.fields(left),
                "flops_fraction": outcome.flops_fraction,
                "latency_ms": None if self.space.table is None else self.space.cost(left),
                "divergence": outcome.divergence,
                "disagreement": None if outcome.differs is None else float(outcome.differs.mean()),
                "drop": outcome.drop,
                "overlap": outcome.overlap,
                "tested": None,
                "bound": None,
                "chosen": False,
            }
        return self.rows[trial]

    def profile(self) -> None:
        """Try each layer alone, one to which nothing matters once; then the best schedules if the damage adds up."""
        layers = self.space.layers
        damage: dict[int, dict[float, float]] = {}
        for i, layer in enumerate(layers):
            damage[layer] = {}
            for j, share in enumerate(reversed(PROFILED)):
                self.tell("trying layers alone", i * len(PROFILED) + j, len(layers) * len(PROFILED))
                idle = j and damage[layer][PROFILED[-1]] < IDLE
                if not idle:
                    alone = (0,) * i + (LEVELS.index(share),) * (len(layers) - i)
                    self.apply(self.score, self.space.reachable(alone))
                damage[layer][share] = 0.0 if idle else self.samples.profile.compare(self.net).divergence
        levels = curves(damage.values())
        fronts = [self.space.frontier(levels**power) for power in POWERS]
        self.profiles[self.merging] = Profile(damage, levels, fronts)

    def choose(self, left: Left) -> bool:
        """Go on with the score that does the least damage under one schedule; say whether it is another one. Those that
        drop and those that merge are not compared, since other schedules suit them."""
        before, divergence = self.score, {}
        alike = [name for name, (method, _) in self.scores.items() if merges(method) == self.merging]
        for i, score in enumerate(alike):
            self.tell("comparing scores", i, len(alike))
            self.score = score
            divergence[score] = self.run(left)["divergence"]
        self.score = min(divergence, key=lambda score: (divergence[score], score != before))
        if self.score != before:
            self.profile()
        return self.score != before

    def offers(self, budget: float) -> list[Left]:
        """The schedules that the profile holds to be best under a budget of cost."""
        offered = [self.space.within(front, budget) for front in self.profiled.fronts] or [self.space.strongest]
        offered += [self.space.even(budget)] if self.merging else []
        return list(dict.fromkeys(left or self.space.strongest for left in offered))

    def survey(self, budgets: Iterable[float]) -> list[Left]:
        """The better offer for each budget that can be reached."""
        least, budgets = self.space.cost(self.space.strongest), list(budgets)
        tried = []
        for i, budget in enumerate(budgets):
            self.tell("running schedules", i, len(budgets))
            if least <= budget < self.space.dense:
                tried.append(min(self.offers(budget), key=lambda left: self.run(left)["divergence"]))
        return list(dict.fromkeys(tried))

    def refine(self, left: Left, budget: float, looks: int) -> Left:
        """The best that is found by going from neighbour to neighbour under a budget of cost; layers to which nothing
        matters stay as they are."""
        idle = [i for i, row in enumerate(self.profiled.damage) if row.max() < IDLE]
        for done in range(looks):
            alike = (one for one in neighbours(left) if all(one[i] == left[i] for i in idle))
            near = sorted((one for one in alike if (self.score, one) not in self.rows), key=self._sum)
            one = next((one for one in near if self.space.cost(one) <= budget), left)
            if one == left:
                break
            self.tell("refining", done, looks)
            left = min(left, one, key=lambda one: self.run(one)["divergence"])
        return left

    def meet(self, budget: float) -> Trial:
        """The schedule of the least divergence within a budget of cost."""
        starts: list[Trial] = []
        for _ in self.kinds(budget):
            (start,) = self.survey([budget])
            if self.choose(start):
                (start,) = self.survey([budget])
            starts.append((self.score, start))
        least, bests = min(self.rows[trial]["divergence"] for trial in starts), []
        for self.score, start in starts:
            if self.rows[self.score, start]["divergence"] <= HOPELESS * least:
                self.survey(share * self.space.dense for share in SHARES)
                bests.append((self.score, self.refine(start, budget, LOOKS)))
                score, left = bests[-1]
                for other in self.alike(score):  # with the other pooling
                    self.score = other
                    self.run(left)
                    bests.append((other, left))
        within = [
            trial for trial in self.rows if self.spaces[merges(self.scores[trial[0]][0])].cost(trial[1]) <= budget
        ]
        return min(within, key=lambda trial: (self.rows[trial]["divergence"], trial not in bests))

    def sequence(self, budget: Budget) -> list[Trial]:
        """The schedules to test, the mildest first: those on the front."""
        for _ in self.kinds():
            self.approach(budget)
        trials = {id(row): trial for trial, row in self.rows.items()}
        front = pareto_front(self.rows.values(), lambda row: row["flops_fraction"], lambda row: row["divergence"])
        return [trials[id(row)] for row in reversed(front)]

    def approach(self, budget: Budget) -> None:
        """Run schedules at all costs, more of them where the disagreement or the drop of the search's own texts comes
        to the limit."""
        kind = "drop" if budget.of_accuracy else "disagreement"

        def surveyed() -> tuple[list[Left], list[Left]]:
            tried = self.survey(share * self.space.dense for share in SHARES) or [self.space.strongest]
            return tried, [left for left in tried if self.run(left)[kind] <= (budget.limit or 0)]

        tried, good = surveyed()
        if self.choose(good[-1] if good else tried[0]):
            tried, good = surveyed()
        edge = self.space.cost(good[-1]) if good else self.space.dense
        after = [self.space.cost(left) for left in tried if self.space.cost(left) < edge]
        for share in (0.25, 0.5, 0.75):  # a closer look where the budget seems to be
            for left in self.survey([edge + share * (max(after, default=edge / 2) - edge)]):
                self.refine(left, self.space.cost(left), LOOKS // 3)

    def alike(self, score: str) -> list[str]:
        """The other scores that have the method and all options of one, but for the pooling."""

        def known(name: str) -> tuple[str, dict]:
            method, options = self.scores[name]
            return method, {option: value for option, value in options.items() if option != "pooling"}

        return [name for name in self.scores if name != score and known(name) == known(score)]

    def test(self, budget: Budget) -> Trial:
        """The strongest schedule in a row of passes; the sequence is fixed by the texts of the search."""
        sequence = self.sequence(budget)

        def bound(step: int, trial: Trial) -> float:
            self.tell("testing schedules", step, len(sequence))
            self.apply(*trial)
            rate, most = rate_of(self.samples.tested.compare(self.net), budget)
            self.rows[trial] |= {"tested": rate, "bound": most}
            return most

        passed = bounds.passing((bound(step, trial) for step, trial in enumerate(sequence)), budget.limit or 0)
        if not passed:
            first, texts = self.rows[sequence[0]], len(self.samples.tested.dense.tokens)
            raise ValueError(
                f"no schedule passes {budget.name}={budget.value:g}: the mildest, with {first['flops_fraction']:.2f} "
                f"of the MACs, has a {LIMITS[budget.name]} of {first['tested']:.4f} on "
                f"{texts} texts, at most {first['bound']:.4f} with 95 % confidence; give "
                f"more texts or a larger {budget.name}"
            )
        return sequence[passed - 1]

    def _sum(self, left: Left) -> float:
        """What the profile says a schedule does."""
        levels, rows = np.array([0, *left]), self.profiled.damage
        return sum(max(0.0, row[b] - row[a]) for row, a, b in zip(rows, levels, levels[1:], strict=False))


def rate_of(outcome: Comparison, budget: Budget) -> tuple[float, float]:
    """The disagreement, or the drop of accuracy, of a test, and its exact upper bound."""
    if budget.of_accuracy:
        assert outcome.lost is not None and outcome.won is not None, "these texts have labels"
        count, lost, won = len(outcome.lost), int(outcome.lost.sum()), int(outcome.won.sum())
        return (lost - won) / count, bounds.paired_upper(lost, won, count)
    assert outcome.differs is not None, "these answers are no numbers"
    count, wrong = len(outcome.differs), int(outcome.differs.sum())
    return wrong / count, bounds.upper(wrong, count)
