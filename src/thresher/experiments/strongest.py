"""Find the strongest budget whose drop of quality keeps a bound on the validation part, and train to it.

The budgets of ``LADDER`` are searched by halves, as if a stronger one never lost less: three trainings at most. Each
starts from the weights of the one before, which know already how to do with fewer tokens.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..api import prune, unprune
from ..checkpoint import tensors_of
from ..core.pruner import pruner_in
from ..data import qa
from ..data.models import make_method
from ..evaluation.predict import Predictions, Text, outcome, predict, quality
from ..evaluation.rows import folder_written_whole, whole
from ..methods.parts.budget import OutOfReach
from ..methods.topk import TopK
from ..search.schedules import WIDTHS
from ..stats.bootstrap import bootstrap_interval
from ..stats.metrics import compute_metric, trivial
from ..stats.ranking import is_ranking
from ..training.trainer import CALIBRATION_ROWS
from .pruning import prune_and_train
from .spec import NOTICED
from .stages import Run, asked, method_of, open_schedule, save, space_of, watched

LADDER = (0.85, 0.7, 0.55, 0.42, 0.32, 0.24)  # shares of the dense MACs, from mild to strong
MILD = 1.0  # points: of a drop above ``NOTICED`` the budget is told at which it would have been these
CHANCE, ROOM = 5.0, 0.2  # points that the dense model has to be above chance, or a drop says nothing; share of what
# there is above chance that is enough, where that is less
MARGIN = 0.5  # standard errors, of one row at least, that a drop must be below the bound: a best look flatters
Z95 = 1.96
ORDERS = 20  # random ones


@dataclass(frozen=True)
class Rung:
    """What a budget lost on the validation part.

    Attributes:
        target_flops: the budget; ``flops_fraction`` is what was left.
        drop, low, high: points of quality, with the paired 95 % interval.
        examples: that they were measured on.
        keeps: whether the drop, and ``MARGIN`` standard errors, keep the bound.
    """

    target_flops: float
    flops_fraction: float
    drop: float
    low: float
    high: float
    examples: int
    keeps: bool


def strongest(run: Run, dense: Path, max_drop: float) -> Path:
    """The folder of the model of the strongest budget that loses at most ``max_drop`` points; where none does, of the
    dense model, unpruned; and so where that has learned next to nothing. ``stage.json`` has what was tried.
    """
    final = run.work.folder / "pruned"
    if final.exists():
        return final
    before = asked(run.dense(dense), dense, run.data.validation, batch_size=run.spec.batch_size)
    low, high, best, start, rungs = 0, len(LADDER), None, None, []
    rows, metric = run.data.validation, run.data.task.metric
    known, least = quality(before, rows, metric), by_chance(before, rows, metric)
    learned = known - least >= min(CHANCE, ROOM * (100 - least))
    options = run.options({**(run.spec.method_options or {}), "target_flops": LADDER[0]})
    unprune(prune(run.model(dense), method_of(run.spec, options) or TopK(keep=1.0, at=())))  # a mistake is told here
    while learned and low < high:
        middle, began = (low + high) // 2, time.time()
        target = LADDER[middle]
        if run.progress:
            print(f"budget {target} of the MACs; at most {still(low, high) - 1} more are tried after it")
        folder = run.work.folder / f"pruned-{target}"
        options = {**(run.spec.method_options or {}), "target_flops": target}
        try:
            start = prune_and_train(run, dense, folder, options, start)
        except OutOfReach:  # and so are stronger ones
            high = middle
            continue
        rungs.append(judge(run, before, folder, target, max_drop))
        best, low, high = (folder, middle + 1, high) if rungs[-1].keeps else (best, low, middle)
        if run.progress:
            print(told(rungs[-1]) + ahead(still(low, high), time.time() - began))
    with folder_written_whole(final) as aside:
        if best is None:
            save(run, run.model(dense), aside)
            (aside / "stage.json").write_text(json.dumps({"steps": 0, "reached": {}, "history": []}))
        else:
            shutil.copytree(best, aside, dirs_exist_ok=True)
        stage: dict[str, Any] = json.loads((aside / "stage.json").read_text())
        stage["budget"] = {"max_drop": max_drop, "tried": [asdict(rung) for rung in rungs]}
        stage["budget"] |= {} if learned else {"dense": known, "trivial": least}
        stage["budget"]["target_flops"] = None if best is None else float(best.name.split("-")[1])
        (aside / "stage.json").write_text(json.dumps(stage))
    return final


def still(low: int, high: int) -> int:
    """How many of the budgets from ``low`` to before ``high`` a search by halves tries at most."""
    return (high - low).bit_length()


def ahead(count: int, seconds: float) -> str:
    """The end of a line: how many budgets may still come, and for how long at the pace of the last one."""
    if not count:
        return ""
    return f"; at most {count} more, about {max(1, round(count * seconds / 60))} min if they take as long as this one"


def by_chance(before: Predictions, rows: Dataset, metric: str) -> float:
    """What one answer for every text is worth, the best there is, in points; of an order, a random one."""
    if not is_ranking(metric):
        return trivial(metric, outcome(before, rows, metric)[1])
    draw = torch.Generator().manual_seed(0)
    orders = (torch.rand(len(rows), 1, generator=draw) for _ in range(ORDERS))
    return sum(quality(replace(before, logits=order), rows, metric) for order in orders) / ORDERS


def judge(run: Run, before: Predictions, folder: Path, target: float, max_drop: float) -> Rung:
    """Measure a model on the validation part; what is known is not measured again."""
    path = folder / "rung.json"
    if not path.exists():
        rows, metric = run.data.validation, run.data.task.metric
        after = predict(run.finished(folder), rows, batch_size=run.spec.batch_size)
        (a, labels), (b, _) = outcome(before, rows, metric), outcome(after, rows, metric)
        drop = compute_metric(metric, a, labels) - compute_metric(metric, b, labels)
        low, high = bootstrap_interval(metric, labels, a, b)
        error = max((high - low) / (2 * Z95), 100 / len(labels))  # answers that all agree are no certainty
        keeps = drop + MARGIN * error <= max_drop
        share = after.macs_used / after.macs_dense
        with whole(path) as aside:
            aside.write_text(json.dumps(asdict(Rung(target, share, drop, low, high, len(labels), keeps))))
    return Rung(**json.loads(path.read_text()))


def told(rung: Rung) -> str:
    """One line on a budget."""
    verdict = "keeps the bound" if rung.keeps else "loses too much"
    return (
        f"{rung.flops_fraction:.2f} of the MACs: drop {rung.drop:+.2f} [{rung.low:+.2f}, {rung.high:+.2f}] points on "
        f"{rung.examples} validation rows: {verdict}"
    )


def milder(run: Run, dense: Path, folder: Path, target: float) -> dict[str, float] | None:
    """The budget at which a model that was trained to ``target``, and lost more than ``NOTICED`` points, loses ``MILD``
    at most as it is; None where it lost less, or where no budget is mild enough.

    Quality is that of at most ``WATCHED`` examples of the validation part; how many is told as well. A method with
    thresholds or masks is calibrated anew, shares are taken of the widest schedule of the family.
    """
    rows, metric = watched(run.data.validation), run.data.task.metric
    best = quality(predict(run.dense(dense), rows, batch_size=run.spec.batch_size), rows, metric)
    net = run.finished(folder)
    if best - quality(predict(net, rows, batch_size=run.spec.batch_size), rows, metric) <= NOTICED:
        return None
    for share in (share for share in reversed(LADDER) if share > target):
        pruned = at_budget(run, net, share)
        if pruned is None:
            continue
        lost = best - quality(predict(pruned, rows, batch_size=run.spec.batch_size), rows, metric)
        if lost <= MILD:
            return {"target_flops": share, "drop": lost, "examples": len(set(qa.examples(rows)))}
    return None


def at_budget(run: Run, net: Any, share: float) -> Any:
    """A trained model at another budget, without further training; None where it cannot be brought there."""
    pruner: Any = pruner_in(net)
    if open_schedule(run.spec, {"target_flops": share}) and not tensors_of(pruner):
        space = space_of(run, unprune(net))
        schedules = (space.falling(width, share) for width in reversed(WIDTHS))
        schedule = next((one for one in schedules if one is not None), None)
        return None if schedule is None else prune(net, make_method(pruner.name, {**run.protects, **schedule}))
    if getattr(pruner, "target_flops", None) is None:
        return None
    pruner.target_flops = share
    text = Text(net, run.data.validation, None)

    def forward(batch: dict) -> Any:
        net(**batch)
        return pruner.last_record()

    some = text.batches(range(min(len(text.lengths), CALIBRATION_ROWS)), run.spec.batch_size)
    try:
        with torch.no_grad():
            pruner.calibrate(forward, [text.batch(rows, None, net.device) for rows in some])
    except OutOfReach:
        return None
    return net
