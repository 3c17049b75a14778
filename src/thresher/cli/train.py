"""The command ``train``."""

from __future__ import annotations

import json

from ..experiments.spec import NOTICED, SUMMARY, TrainSpec
from .console import Screen, pooled


def train(spec: TrainSpec, screen: Screen) -> None:
    """Fine-tune a model and teach it which tokens it can do without.

    \b
    Examples:
      thresher train bert-base-uncased --data reviews.csv --out runs/reviews
      thresher train bert-base-uncased --data reviews.csv --max-drop 0.5 --out runs/careful
      thresher train runs/dense --epochs 0 --data reviews.csv --target-flops 0.3 --out runs/fast
      thresher train bert-base-uncased --data glue --config mrpc --recipe top-mrpc --out runs/mrpc
    """
    from ..experiments.train import train as job
    from ..reports.tables import table

    with screen.aside():
        rows = job(spec, progress=not screen.quiet)
    screen.show(rows, table)
    if spec.target_latency or spec.target_latency_ms:
        reached = json.loads((spec.out / SUMMARY).read_text())["reached"]
        asked = f"{spec.target_latency_ms} ms" if spec.target_latency_ms else f"{spec.target_latency} of the dense time"
        screen.say(
            f"asked: {asked}; measured: {reached['latency_ms']:.2f} ms, "
            f"{reached['latency_fraction_measured']:.2f} of the dense {reached['latency_ms_dense']:.2f} ms"
        )
    pooling = json.loads((spec.out / SUMMARY).read_text()).get("pooling")
    if pooling:
        screen.say(pooled(pooling, 1))
    for line in budget_lines(summary := json.loads((spec.out / SUMMARY).read_text()), rows):
        screen.say(line)
    if summary.get("contest"):
        screen.say(contest_line(summary["contest"]))
    screen.say(f"the model is in {spec.out}; how much faster it is: thresher bench {spec.out}")


def contest_line(contest: dict) -> str:
    """Say whether what a method learned was better than the schedule that it started from."""
    learned, start = (contest["losses"][name] for name in ("learned", "start"))
    told = f"loss {learned:.4f} on the validation part against {start:.4f} after as many steps"
    if contest["kept"] == "learned":
        return f"the schedule that was learned is better than the one that it started from: {told}"
    return f"the schedule at the start was kept, the one that was learned is no better: {told}"


def budget_lines(summary: dict, rows: list[dict]) -> list[str]:
    """Say which budgets kept the bound on the drop, or by how much a budget that was asked for hurts."""
    from ..stats.ranking import is_ranking

    dense, pruned = rows
    budget, mild = summary.get("budget"), summary.get("milder")
    if budget:
        tried = [
            f"{rung['flops_fraction']:.2f} of the MACs: drop {rung['drop']:+.2f} [{rung['low']:+.2f}, "
            f"{rung['high']:+.2f}] on {rung['examples']} validation rows{'' if rung['keeps'] else ', too much'}"
            for rung in budget["tried"]
        ]
        bound = f"a drop of {budget['max_drop']:g} point{'s' * (budget['max_drop'] != 1)}"
        if "trivial" in budget:
            gain = budget["dense"] - budget["trivial"]
            chance = "a random order" if is_ranking(dense["metric"]) else "one answer for every text"
            last = (
                f"the dense model is {gain:.1f} points above {chance} on the validation part: it has "
                "learned too little to tell what a token is worth. The result is the dense model; train it longer "
                "(--epochs), or give it more rows, most of all of rare classes"
            )
        elif not tried:
            last = "none of the budgets is in reach of these texts: the result is the dense model"
        elif budget["target_flops"] is None:
            last = f"no token can leave within {bound}: the result is the dense model, to be run packed or exported"
        else:
            last = f"{1 / pruned['flops_ratio']:.2f} of the MACs are left, the least of those tried within {bound}"
        return [*tried, last]
    drop = None if None in (dense["quality"], pruned["quality"]) else dense["quality"] - pruned["quality"]
    if mild:
        where = f"{mild['examples']} rows of" if "examples" in mild else "all of"  # as older versions did
        return [
            f"drop {drop:+.2f} points: on {where} the validation part this model loses {mild['drop']:+.2f} at "
            f"--target-flops {mild['target_flops']:g}"
        ]
    if drop is not None and drop > NOTICED and pruned.get("target_flops"):
        return [f"drop {drop:+.2f} points: --max-drop 1 looks for a budget that loses at most one"]
    return []
