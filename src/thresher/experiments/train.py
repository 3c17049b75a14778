"""Train a pruned model: a model and labelled text in, a pruned model and its honest figures out.

Four stages (``stages``), each with a folder of its own in the workspace: ``dense`` fine-tunes, ``teach`` asks the dense
model about the training texts, ``prune`` trains with the method, ``measure`` reads the test part, once.
"""

from __future__ import annotations

import json
import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..api import inner_model
from ..core.architecture import find_architecture
from ..data import qa
from ..data.models import load
from ..evaluation.hardware import environment
from ..evaluation.predict import Predictions, outcome, predict, quality
from ..evaluation.rows import folder_written_whole, row, writing
from ..reports import plots
from .answers import kept_answers
from .pruning import prune_and_train
from .service import Service
from .spec import SUMMARY, TrainSpec, job, task_entry
from .stages import Ask, Run, fine_tune, graded, load_data, method_of
from .strongest import milder, strongest
from .workspace import Workspace

PICTURE = "training.png"


@job(TrainSpec)
def train(spec: TrainSpec, *, progress: bool = True, ask: Ask | None = None) -> list[dict]:
    """Fine-tune, prune and save, to a budget, in one go.

    Args:
        spec: see ``TrainSpec``. ``spec.out`` is the folder for the pruned model, with the dense one in ``dense`` and
            the figures in thresher.json. It is written aside and moved into place; interrupted, the same call goes on
            where it was.
        progress: whether to show it.
        ask: answers of finished models; default: ``kept_answers``, which asks no model about the same texts twice.

    Returns:
        Two rows, dense and pruned, measured on the test part.

    Raises:
        ValueError: bad input, or ``out`` holds the result of another recipe.
    """
    method_of(spec)  # a mistake is told before anything runs
    Service.of(spec, timed=any(name.startswith("target_latency") for name in spec.method_options or {}))
    work = Workspace(spec)
    if (known := work.finished(spec.fresh)) is not None:
        return known["rows"]
    started = time.time()
    run = Run(spec, work, load_data(spec), progress, ask or kept_answers)
    work.begin(spec.fresh)
    dense = fine_tune(run)
    run = graded(run, dense)
    if spec.max_drop is None:
        pruned = prune_and_train(run, dense, work.folder / "pruned", spec.method_options or {})
    else:
        pruned = strongest(run, dense, spec.max_drop)
    summary = measure(run, dense, pruned)
    finish(run, dense, pruned, summary | {"seconds": round(time.time() - started, 1)})
    return summary["rows"]


def measure(run: Run, dense: Path, pruned: Path) -> dict[str, Any]:
    """What came of it, on the test part, which chose nothing: thresher.json, but for the time that it took."""
    spec, data = run.spec, run.data
    stage = json.loads((pruned / "stage.json").read_text())
    before = run.ask(run.dense(dense), dense, data.test, batch_size=spec.batch_size)
    counts = None
    if spec.replay:
        counts = run.ask(load(spec.replay)[0], Path(spec.replay), data.test, batch_size=spec.batch_size).kept
    budget = stage.get("budget")
    target = budget["target_flops"] if budget else (spec.method_options or {}).get("target_flops")
    method = "dense" if budget and target is None else spec.method  # nothing can leave
    untouched = method == "dense" and not stage["steps"]
    after = before if untouched else predict(run.finished(pruned), data.test, batch_size=spec.batch_size, counts=counts)
    if not budget and target is not None and spec.prune_epochs != 0 and not spec.replay:
        stage["milder"] = milder(run, dense, pruned, target)
    own = dense.parent == run.work.folder  # made here
    trained = json.loads((dense / SUMMARY).read_text()).get("trained", {}) if own else {}
    steps = {"dense": trained.get("steps", 0), "prune": stage["steps"]}
    rows = [
        measured_row(run, before, before, "dense", steps["dense"]),
        measured_row(run, after, before, method, steps["prune"], target),
    ]
    said = {"dense": before, "pruned": after}
    return {
        "recipe": spec.saved(),
        "inputs": run.work.inputs,
        "task": task_entry(spec, data.task, data.max_length),
        "rows": rows,
        "steps": steps,
        "reached": stage["reached"],
        "texts_cut": data.cut,
        "removed": data.task.removed,
        "predictions": {name: answers_of(p, data.test, data.task.metric) for name, p in said.items()},
        "kept": (after.kept.float().mean(0) / after.tokens_mean).tolist(),
        "history": stage["history"],
        "rates": {"dense": trained.get("rate"), "prune": stage.get("rate")},
        "schedule": stage.get("schedule"),
        "contest": stage.get("contest"),
        "budget": budget,
        "milder": stage.get("milder"),
        "pooling": stage.get("pooling"),
    }


def finish(run: Run, dense: Path, pruned: Path, summary: dict[str, Any]) -> None:
    """Complete the folder of the pruned model, then move it into place as a whole."""
    with writing(run.work.folder):
        if dense.parent == run.work.folder and not (pruned / "dense").exists():
            with folder_written_whole(pruned / "dense") as aside:
                shutil.copytree(dense, aside, dirs_exist_ok=True)
        (pruned / SUMMARY).write_text(json.dumps(summary, indent=1))
        if find_spec("matplotlib") and any("eval_quality" in line for line in summary["history"]):
            plots.training(
                summary["history"], find_architecture(inner_model(run.finished(pruned))).depth, pruned / PICTURE
            )
    run.work.deliver(pruned)
    for name in ("stage.json", "rung.json"):  # without which a run that was stopped before could not go on
        (run.work.out / name).unlink(missing_ok=True)


def measured_row(
    run: Run, result: Predictions, before: Predictions, method: str, steps: int, target: float | None = None
) -> dict:
    """The row of a model on the test part; ``before`` are the dense model's answers."""
    spec, data = run.spec, run.data
    return row(
        task=data.task.name,
        model=Path(spec.model).name,
        method=method,
        target_flops=None if method == "dense" else target,
        seed=spec.seed,
        runtime="torch",
        precision="fp32",
        mode="dense-unpadded" if method == "dense" else "pruned",
        threads=torch.get_num_threads(),
        metric=data.task.metric,
        quality=quality(result, data.test, data.task.metric),
        quality_dense=quality(before, data.test, data.task.metric),
        flops_ratio=before.macs_dense / result.macs_used,
        split="test",
        selected_on=data.task.selected_on,
        max_length=data.max_length,
        n_examples=len(set(qa.examples(data.test))),
        tokens_mean=result.tokens_mean,
        trained_steps=steps,
        **environment(),
    )


def answers_of(predictions: Predictions, test: Dataset, metric: str) -> list:
    """Classes, values of a regression or what each question or query gained; what paired intervals need."""
    answers = torch.as_tensor(outcome(predictions, test, metric)[0])
    if answers.dim() == 2 and answers.shape[1] > 1:
        return answers.argmax(1).tolist()
    return [round(x, 5) for x in answers.flatten().tolist()]
