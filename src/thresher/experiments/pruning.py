"""The stage in which a model is pruned: trained with the method, taught by the dense model, measured and saved.

A method that learns a schedule from a fixed one (``ToP``, ``LTP``) has to beat it: both train for as many steps, and
the one with the lower loss on held-out rows goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, set_seed

from ..api import prune, unprune
from ..core.pruner import TokenPruner, pruner_in
from ..data.embedder import best_pooling
from ..evaluation.rows import folder_written_whole
from ..methods.topk import TopK
from ..search.halving import successive_halving
from ..training.embedding import EmbedTrainer
from ..training.monitor import Watch
from ..training.reranking import RerankTrainer
from ..training.trainer import Distill, PruningTrainer
from .stages import (
    Run,
    arguments_of,
    best_rate,
    choose_pooling,
    choose_schedule,
    judged,
    method_of,
    open_schedule,
    priced,
    run_trainer,
    save,
    service_of,
    settled,
    short,
    soft_steps,
    space_of,
    teach,
)

PROXY = 0.16  # width of the schedule that stands in for a learned one while rates are tried
LEARNED, START = "learned", "start"
CONTEST_STEPS = 80  # of either schedule with tokens that leave, after a soft stage or as many steps without one
CONTEST = "contest.json"


@dataclass(frozen=True)
class Earlier:
    """What came before the last part of a training.

    Attributes:
        start: folder of the weights that it started from; None: the dense model's.
        schedule: the options that were chosen.
        contest: what became of the schedule that was learned, see ``contest``; ``folder`` has its weights.
    """

    start: Path | None = None
    schedule: dict[str, Any] = field(default_factory=dict)
    contest: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def steps(self) -> int:
        """All steps so far."""
        before = 0 if self.start is None else json.loads((self.start / "stage.json").read_text())["steps"]
        return before + self.contest.get("steps", 0)

    def joined(self, history: list[dict]) -> list[dict]:
        """The log of all that was trained here: ``history`` behind what came before it."""
        known = self.contest.get("history", [])
        last = {name: max((line[name] for line in known), default=0) for name in ("epoch", "step")} if known else {}
        return [*known, *({**line, **{name: line[name] + last[name] for name in last}} for line in history)]


def prune_and_train(run: Run, dense: Path, folder: Path, options: dict[str, Any], start: Path | None = None) -> Path:
    """``folder``, of the pruned model, trained with the method and taught by the dense one.

    ``stage.json`` beside its weights says what the training reached and how it went.

    Args:
        options: of the method.
        start: folder of the weights to start from; default: the dense model's.
    """
    spec, work, data = run.spec, run.work, run.data
    if folder.exists():
        return folder
    prune(run.model(dense), method_of(spec, run.options(options)) or TopK(keep=1.0, at=()))  # as there
    work.claim()
    lasts = spec.prune_epochs
    schedule: dict[str, Any] = {}
    pooling: dict[str, str] = {}
    taught = teach(run, dense) if lasts != 0 else data.train
    held_out = teach(run, dense, "watched") if lasts is None else None

    def fresh() -> TokenPruner | None:
        return method_of(spec, run.options(options | schedule | pooling))

    def make(net: PreTrainedModel | None = None, soft: int | None = None, **arguments: Any) -> PruningTrainer:
        set_seed(spec.seed)
        if net is None:
            net, method = run.model(start or dense, layers=spec.layers, again=start is not None), fresh()
            if "steps" in arguments and method is not None and method.soft_until:
                space, target = space_of(run, net), options.get("target_flops") or options.get("target_latency") or 0.4
                even: Any = space.falling(PROXY, target) or space.falling(0.0, target) or {}
                method = TopK(
                    **even, **cast("Any", run.protects)
                )  # in a short training its own would be soft, and let nothing leave
            prune(net, method or TopK(keep=1.0, at=()))
        priced(run, net)
        kind = RerankTrainer if run.ranks else EmbedTrainer if run.embeds else PruningTrainer
        return kind(
            *(net, arguments_of(run, folder.name, **arguments), run.collator, taught, held_out),
            calibration_dataset=data.validation,
            teacher=run.model(dense) if spec.distill_states else None,
            distill=Distill(spec.distill, states=spec.distill_states or 0.0),
            pruner_lr=spec.pruner_lr,
            soft_steps=None if lasts is not None else soft_steps(run) if soft is None else soft,
        )

    if lasts is None and open_schedule(spec, options):
        schedule = choose_schedule(run, lambda: run.model(start or dense, again=start is not None), options, make)
    elif lasts != 0:
        pooling = choose_pooling(run, folder.name, make)
    earlier, lr, trains = Earlier(start, schedule), spec.prune_lr or spec.lr, make
    method: Any = fresh()
    if lasts is None and method is not None and method.soft_until and getattr(method, "schedule", None) is not None:
        lr = lr or best_rate(run, folder.name, make)
        known, won = contest(run, folder.name, fresh, make, lr)
        earlier = Earlier(start, schedule, known, won)
        trains = partial(going_on, run, won, fresh, make)
    trainer = settled(run, folder.name, trains, lasts, lr)
    finish_training(run, trainer, folder, earlier)
    return folder


def contest(
    run: Run, stage: str, fresh: Callable[[], Any], make: Callable[..., PruningTrainer], lr: float
) -> tuple[dict[str, Any], Path]:
    """Learn a schedule, and find out whether it is better than the one that it started from.

    One model goes through the soft stage, in which the method learns. Another one trains for as many steps with the
    schedule of the start, and tokens that leave. Then both train for ``CONTEST_STEPS``; the lower loss on held-out rows
    wins. Weights, rate and order of the rows are the same.

    Args:
        stage: its name, of the folders.
        fresh: gives a new method, with its ``schedule``.
        make: gives a trainer of a model, of its own where none is given.
        lr: the rate.

    Returns:
        What is told: which one was ``kept``, their ``losses``, the ``steps`` and the log of the winner; its folder.
    """
    work = run.work.folder
    winner = work / f"{stage}-contest"
    if not winner.exists():
        folders = {name: work / f"{stage}-{name}" for name in (LEARNED, START)}
        for name, folder in folders.items():
            if not folder.exists():
                begin(run, folder, make(lr=lr) if name == LEARNED else at_start(make(lr=lr, soft=0)))
        trained: dict[str, Any] = {}

        def train(name: str, folder: Path, steps: int) -> float:
            trained[name] = prune(run.model(folder, again=True), fresh(), checkpoint=folder)
            return short(run, make(trained[name], soft=0, steps=steps, lr=lr), f"the {name} schedule")

        kept, losses = successive_halving(folders, train, (CONTEST_STEPS,))
        known = json.loads((folders[kept] / CONTEST).read_text())
        known |= {"kept": kept, "losses": {name: loss for name, (loss,) in losses.items()}}
        known["steps"] += CONTEST_STEPS
        with folder_written_whole(winner) as aside:
            save(run, trained[kept], aside)
            (aside / CONTEST).write_text(json.dumps(known))
    return json.loads((winner / CONTEST).read_text()), winner


def at_start(trainer: PruningTrainer) -> PruningTrainer:
    """A trainer whose method is where its ``schedule`` says."""
    trainer.pruner.progress = 0.0
    trainer.prepare()
    return trainer


def begin(run: Run, folder: Path, trainer: PruningTrainer) -> None:
    """Train for as long as a soft stage lasts and no further; ``folder`` gets the model."""
    trainer.args.max_steps, trainer.args.load_best_model_at_end = soft_steps(run), False
    trainer.args.output_dir = f"{folder}-checkpoints"
    trainer.add_callback(Watch(trainer, run.data.validation, run.data.task.metric))
    run_trainer(trainer, run.work.folder, run.progress)
    with folder_written_whole(folder) as aside:
        save(run, trainer.model, aside)
        stage = {"steps": trainer.state.global_step, "history": history_of(trainer)}
        (aside / CONTEST).write_text(json.dumps(stage))
    shutil.rmtree(trainer.args.output_dir, ignore_errors=True)


def going_on(run: Run, folder: Path, fresh: Callable[[], Any], make: Callable[..., Any], **arguments: Any) -> Any:
    """A trainer that goes on with the model in ``folder``, in its hard stage."""
    return make(prune(run.model(folder, again=True), fresh(), checkpoint=folder), soft=0, **arguments)


def finish_training(run: Run, trainer: PruningTrainer, folder: Path, earlier: Earlier) -> None:
    """Calibrate, measure and save a trained model."""
    net, data, pooling = trainer.model, run.data, None
    method = None if run.spec.method == "dense" else pruner_in(net)
    if run.bf16 or not trainer.state.global_step:
        trainer.reached.update(trainer.calibrate())  # in fp32, in which the model is measured
    net.eval()
    if method is None:
        unprune(net)
    else:
        if method.needs_table:
            trainer.reached.update(service_of(run).times(net, data.tokenizer, data.validation))
        pooling = best_pooling(cast("Any", net), lambda: judged(net, data)[0]) if run.pools(net) else None
        trainer.reached.update(method.ablations(lambda: judged(net, data)))
    reached = {name: float(value) for name, value in trainer.reached.items()}
    if earlier.schedule:
        reached["flops_fraction"] = judged(net, data)[1]
    told = {name: value for name, value in earlier.contest.items() if name != "history"}
    stage = {"steps": earlier.steps + trainer.state.global_step, "reached": reached}
    stage |= {"schedule": earlier.schedule or None, "contest": told or None}
    stage["history"] = earlier.joined(history_of(trainer))
    stage["rate"] = trainer.args.learning_rate
    stage["pooling"] = pooling
    with folder_written_whole(folder) as aside:
        save(run, net, aside)
        (aside / "stage.json").write_text(json.dumps(stage))
    shutil.rmtree(trainer.args.output_dir, ignore_errors=True)


def history_of(trainer: PruningTrainer) -> list[dict]:
    """The lines of the log that are kept."""
    return [line for line in trainer.state.log_history if {*line} & {"loss", "eval_quality"}]
