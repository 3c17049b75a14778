"""A pruning schedule without training: how sensitive each layer is, the best schedules by that, and a look at each.

No label is needed: what is measured is how far the pruned model's answers are from the dense model's, on texts that are
never those of a test part.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from . import bounds, frontier
from .api import prune, unprune
from .jobs import SUMMARY, TIMED
from .latency import compare, latency_table
from .loading import clip, load, make_method
from .machine import environment
from .methods.topk import TopK
from .predicting import Text
from .pruner import METHODS
from .resuming import writing
from .samples import Sample, texts_of, tokenized
from .schedules import LEVELS, Left, Space, curves, neighbours

PICTURE = "tuning.png"
PROFILED = (0.75, 0.5, 0.3, 0.15, 0.0)  # shares at which each layer is tried alone
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # of the dense cost, for which a schedule is looked for
POWERS = (1.0, 0.5)  # of the divergence, in which the layers' damage is taken to add up
SEARCHED, PROFILING, FEWEST = 256, 96, 32  # texts to search on, to try single layers on, and the fewest
TESTED = 8  # texts to test on, in multiples of the fewest that the bound needs
LOOKS = 36  # schedules that a refinement runs
LIMITS = {"max_disagreement": "disagreement", "max_drop": "drop of accuracy"}


def tune(
    model: str,
    data: str,
    out: str,
    *,
    target_flops: float | None = None,
    target_latency_ms: float | None = None,
    max_disagreement: float | None = None,
    max_drop: float | None = None,
    method: str = "topk",
    method_options: dict | None = None,
    batch_size: int = 32,
    max_length: int = 256,
    limit: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    plot: str | Path | None = None,
    progress: Callable[[str, int, int | None], Any] | None = None,
    **columns: Any,
) -> list[dict]:
    """Find at which layers how many tokens can leave a finished model, under one budget; save the model so pruned.

    1. Each layer alone, at a few shares: how far the answers are from the dense model's (``samples.divergence``).
    2. Dynamic programming over layers and levels, as if what the layers do added up (``schedules.Space.frontier``), for
       the budget and for a range of others.
    3. Those schedules are run, and the best is refined: its neighbours are run, in the order of what the sum says, and
       whichever is better takes its place.

    A budget of disagreement or drop is met by a test on texts that chose nothing: the schedules found are tried from
    the mildest to the strongest, each with an exact upper bound at 5 %, up to the first whose bound is above the
    budget; the last before it is taken. The true rate on texts like these is then above the budget in at most 5 % of
    all draws of them. Disagreement has Clopper and Pearson's one-sided bound; the drop of accuracy, P(right when dense,
    wrong when pruned) - P(the reverse), the conservative difference of two such bounds at 2.5 % each
    (``bounds.paired_upper``). Texts are taken to be independent; questions on one article are not quite.

    Args:
        model: folder or hub id of a fine-tuned dense model.
        data: as ``load_task`` takes it; labels are needed for ``max_drop`` alone. Texts come from the validation part
            and then from the train part. What the model was trained on says too little of its mistakes: where there
            are too few others to test on, a warning counts them.
        out: the folder for the model, empty or not there: config.json holds the schedule, thresher.json what was found.
        target_flops: share of the dense model's MACs on the same texts without padding.
        target_latency_ms: mean milliseconds per text, one at a time, by ``latency.latency_table``, measured on this
            machine; what comes of it is measured at the end.
        max_disagreement: share of texts (questions) whose answer is another than the dense model's.
        max_drop: of accuracy, as a share; classification only.
        method: one whose ``keep`` is a share for each site: topk, spatten, vatp, entropy, ats, random, firstk.
        method_options: its other fields, e.g. ``{"criterion": "column"}`` of entropy.
        batch_size: of the search; limit: texts to use; seed: of their order.
        plot: a PNG of cost and divergence; the same is in ``out`` where matplotlib is there.
        columns: config, text and label, as ``load_task`` has them.

    Returns:
        A row for each schedule on the front, from the mildest to the strongest, the one that was saved ``chosen``.
        Shares are of 1; "tested" and "bound" are of the test, the rest of the texts of the search. ATS keeps fewer
        tokens than its cost is searched with.

    Raises:
        ValueError: not one budget, one out of reach, too few texts, no schedule that passes the test, a pruned model, a
            method without such a schedule, data that do not fit, a folder that is not empty.
    """
    given = {"target_flops": target_flops, "target_latency_ms": target_latency_ms}
    given |= {"max_disagreement": max_disagreement, "max_drop": max_drop}
    name, value = _budget(given)
    known = sorted(n for n, kind in METHODS.items() if issubclass(kind, TopK))
    make_method(method, options := dict(method_options or {}))
    if method not in known:
        raise ValueError(f"{method} has no share to keep at each site: expected one of {', '.join(known)}")
    if found := {"at", "keep"} & {*options}:
        raise ValueError(f"{', '.join(sorted(found))} is what is searched for: leave it out of method_options")
    if (folder := Path(out)).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{out} is there and not empty: choose another folder for the result")
    if plot is not None and find_spec("matplotlib") is None:
        raise ValueError("the picture needs matplotlib, which is missing: pip install 'thresher[plot]'")
    if threads is not None:
        torch.set_num_threads(threads)
    started = time.time()
    net, tokenizer = load(model)
    if hasattr(net, "token_pruner"):
        raise ValueError(f"{model} is pruned already: tune its dense model")
    tell = progress or (lambda what, done, total: None)
    task, texts, fresh = texts_of(net, data, labelled=name == "max_drop", seed=seed, limit=limit, **columns)
    numbers = net.config.num_labels == 1
    if name in LIMITS and (numbers or (name == "max_drop" and task.kind == "qa")):
        what = "classes" if name == "max_drop" else "classes and answers"
        raise ValueError(f"{name} is for models that give {what}: this one is for {task.kind}")
    tested, searched = _cut(len(texts), name, value)
    if tested > fresh:
        warnings.warn(
            f"{tested - fresh} of the {tested} tested texts are of the train part: if the model was trained on them, "
            "what is found holds for such texts alone",
            stacklevel=2,
        )
    max_length = clip(max_length, net.config)

    def sample(start: int, count: int) -> Sample:
        return Sample(
            net, tokenized(texts.select(range(start, start + count)), task, tokenizer, max_length), batch_size
        )

    tell("asking the dense model", 0, None)
    samples = [sample(tested, searched), sample(tested, min(PROFILING, searched))]  # while the model is dense
    search = Search(net, method, options, samples[0], name == "target_latency_ms", tell)
    budget = search.budget(name, value)
    held_out = sample(0, tested) if tested else None
    profile = search.profile(samples[1])
    chosen = search.meet(budget) if name not in LIMITS else search.test(name, value, held_out)
    search.rows[chosen]["chosen"] = True
    search.apply(chosen)
    reached = {name: search.rows[chosen][name] for name in ("flops_fraction", "divergence", "disagreement", "bound")}
    if search.space.table is not None:
        reached |= _timed(net, search.sample, value)
    rows = list(search.rows.values())
    summary = {
        "tuning": {
            "model": str(model),
            "data": str(data),
            "method": method,
            "method_options": options,
            name: value,
            "seed": seed,
            **columns,
        },
        "reached": reached,
        "texts": {"searched": searched, "tested": tested, "max_length": max_length},
        "profile": profile,
        "schedules": rows,
        "seconds": round(time.time() - started, 1),
        **environment(),
    }
    _finish(net, tokenizer, folder, summary, value if name in LIMITS else None)
    if plot is not None:
        frontier.picture(rows, profile, plot, value if name in LIMITS else None)
    return frontier.best(rows, search.cost)


class Search:
    """The schedules of one model that were run, and what they did to one sample of texts."""

    def __init__(self, net: PreTrainedModel, method: str, options: dict, sample: Sample, timed: bool, tell: Callable):
        self.net, self.method, self.options, self.sample, self.tell = net, method, options, sample, tell
        info = prune(net, TopK(keep=1.0, at=())).token_pruner.info
        unprune(net)
        kind = METHODS[method]
        self.space = Space(
            *(info, Text(net, sample.rows, None).lengths, kind.needs_attention and kind.scores_all),
            table=latency_table(net) if timed else None,
        )
        if not self.space.layers:
            raise ValueError(f"{info.name} has no layer after which tokens could leave")
        self.cost = "latency_ms" if timed else "flops_fraction"
        self.rows: dict[Left, dict] = {}

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

    def apply(self, left: Left) -> None:
        """Prune the model by a schedule."""
        if hasattr(self.net, "token_pruner"):
            unprune(self.net)
        prune(self.net, make_method(self.method, self.options | self.space.fields(left)))

    def run(self, left: Left) -> dict:
        """The row of a schedule, run once."""
        if left not in self.rows:
            self.apply(left)
            found = self.sample.compare(self.net)
            drop = None if found.lost is None else float(found.lost.mean() - found.won.mean())
            self.rows[left] = {
                "method": self.method,
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
        return self.rows[left]

    def profile(self, sample: Sample) -> dict[int, dict[float, float]]:
        """layer -> share that stays after it alone -> divergence. A layer to which nothing matters is run once."""
        layers, found = self.space.layers, {}
        for i, layer in enumerate(layers):
            found[layer] = {}
            for j, share in enumerate(reversed(PROFILED)):
                self.tell("trying layers alone", i * len(PROFILED) + j, len(layers) * len(PROFILED))
                idle = j and found[layer][PROFILED[-1]] < 1e-9
                if not idle:
                    self.apply((0,) * i + (LEVELS.index(share),) * (len(layers) - i))
                found[layer][share] = 0.0 if idle else sample.compare(self.net).divergence
        damage = curves(found.values())
        self.damage, self.fronts = damage, [self.space.frontier(damage**power) for power in POWERS]
        return found

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
        """The best that is found by going from neighbour to neighbour under a budget of cost."""
        for done in range(looks):
            near = sorted((one for one in neighbours(left) if one not in self.rows), key=self._sum)
            one = next((one for one in near if self.space.cost(one) <= budget), left)
            if one == left:
                break
            self.tell("refining", done, looks)
            left = min(left, one, key=lambda one: self.run(one)["divergence"])
        return left

    def meet(self, budget: float) -> Left:
        """The schedule of the least divergence within a budget of cost."""
        self.survey(share * self.space.dense for share in SHARES)
        (start,) = self.survey([budget])
        best = self.refine(start, budget, LOOKS)
        within = [left for left in self.rows if self.space.cost(left) <= budget]
        return min(within, key=lambda left: (self.rows[left]["divergence"], left != best))

    def sequence(self, kind: str, limit: float) -> list[Left]:
        """The schedules to test, the mildest first: those on the front, more of them where "disagreement" or "drop", as
        the search's own texts have it, comes to ``limit``."""
        found = self.survey(share * self.space.dense for share in SHARES) or [self.space.strongest]
        self.run(found[-1])
        good = [left for left in found if self.rows[left][kind] <= limit]
        edge = self.space.cost(good[-1]) if good else self.space.dense
        after = [self.space.cost(left) for left in found if self.space.cost(left) < edge]
        for share in (0.25, 0.5, 0.75):  # a closer look where the budget seems to be
            for left in self.survey([edge + share * (max(after, default=edge / 2) - edge)]):
                self.refine(left, self.space.cost(left), LOOKS // 3)
        lefts = {id(row): left for left, row in self.rows.items()}
        return [lefts[id(row)] for row in frontier.best([*self.rows.values()])]

    def test(self, name: str, limit: float, sample: Sample) -> Left:
        """The strongest schedule in a row of passes; the sequence is fixed by the sample of the search."""
        sequence = self.sequence("drop" if name == "max_drop" else "disagreement", limit)
        tested = []

        def bound(left: Left) -> float:
            self.tell("testing schedules", len(tested), len(sequence))
            self.apply(left)
            result, row = sample.compare(self.net), self.rows[left]
            tested.append(left)
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


def _budget(given: dict[str, float | None]) -> tuple[str, float]:
    """The one budget that was given."""
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        raise ValueError(f"expected one budget of {', '.join(given)}, got {', '.join(named) or 'none'}")
    ((name, value),) = named.items()
    share = name != "target_latency_ms"
    if isinstance(value, bool) or not (0 < value < (1 if share else float("inf"))):
        raise ValueError(f"{name}={value!r}: expected {'a share between 0 and 1' if share else 'milliseconds'}")
    return name, float(value)


def _cut(count: int, name: str, value: float) -> tuple[int, int]:
    """Of so many texts how many to test on and how many to search on."""
    least = bounds.least(value, paired=name == "max_drop") if name in LIMITS else 0
    if count < least + FEWEST:
        what = f", and {name}={value:g} {least} more to test on" if least else ""
        raise ValueError(f"{count} texts are too few: the search needs {FEWEST} at least{what}")
    tested = min(TESTED * least, max(least, count - SEARCHED))
    return tested, min(SEARCHED, count - tested)


def _timed(net: PreTrainedModel, sample: Sample, asked: float) -> dict[str, float]:
    """What the schedule takes, one text at a time, beside the dense model."""
    text = Text(net, sample.rows, None)
    rows = range(0, len(text.lengths), -(-len(text.lengths) // TIMED))
    dense, pruned = compare(net, (text.batch([row], None, net.device) for row in rows))
    if pruned > asked:
        warnings.warn(f"measured: {pruned:.2f} ms per text, where {asked:g} were asked for", stacklevel=3)
    return {"latency_ms_dense": dense, "latency_ms": pruned, "latency_ms_asked": asked}


def _finish(net: PreTrainedModel, tokenizer: Any, out: Path, summary: dict, limit: float | None) -> None:
    """Write the result aside, then move it into place as a whole."""
    aside = out.with_name(f".{out.name}.tuning")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with writing(aside):
        net.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        (aside / SUMMARY).write_text(json.dumps(summary, indent=1))
        if find_spec("matplotlib"):
            frontier.picture(summary["schedules"], summary["profile"], aside / PICTURE, limit)
    if out.exists():
        out.rmdir()
    aside.rename(out)
