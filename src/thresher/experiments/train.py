"""Train a pruned model: a model and labelled text in, a pruned model and its honest figures out.

Four stages, each with a folder of its own in the workspace: ``dense`` fine-tunes, ``teach`` asks the dense model about
the training texts, ``prune`` trains with the method, ``measure`` reads the test part, once. A stage whose result is
there is not run again; inside a training the last checkpoint is taken up.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments, set_seed

from ..api import CONFIG_KEY, prune, unprune
from ..core.architecture import find_architecture
from ..core.pruner import TokenPruner
from ..data import qa
from ..data.load import load_task
from ..data.models import clip, for_task, load, make_method, reading
from ..data.task import DataError, Task
from ..data.tokenize import tokenize
from ..evaluation.hardware import environment, has_bf16
from ..evaluation.latency import compare
from ..evaluation.predict import Predictions, outcome, predict, quality
from ..evaluation.rows import folder_written_whole, row, writing
from ..methods.topk import REPLAY, TopK
from ..reports import plots
from ..training.checkpoints import Order, last_checkpoint, step_of
from ..training.interrupt import Interrupt
from ..training.monitor import Watch
from ..training.trainer import Collator, PruningTrainer, Ranking
from .spec import SUMMARY, TrainSpec, job, task_entry
from .workspace import Workspace

PICTURE = "training.png"
TIMED = 64  # texts that a target of time is measured on
Ask = Callable[..., Predictions]  # (model, the folder it lies in, texts, options of ``predict``) -> its answers


@job(TrainSpec)
def train(spec: TrainSpec, *, progress: bool = True, ask: Ask | None = None) -> list[dict]:
    """Fine-tune, prune and save, to a budget, in one go.

    Args:
        spec: see ``TrainSpec``. ``spec.out`` is the folder for the pruned model, with the dense one in ``dense`` and
            the figures in thresher.json. It is written aside and moved into place; interrupted, the same call goes on
            where it was.
        progress: whether to show it.
        ask: answers of finished models, where they are known from elsewhere; default: ``predict``.

    Returns:
        Two rows, dense and pruned, measured on the test part.

    Raises:
        ValueError: bad input, or ``out`` holds the result of another recipe.
    """
    method_of(spec)  # a mistake is told before anything runs
    work = Workspace(spec.out, spec.saved())
    if (known := work.finished(spec.fresh)) is not None:
        return known["rows"]
    started = time.time()
    run = Run(spec, work, load_data(spec), progress, ask or asked)
    work.begin(spec.fresh)
    dense = fine_tune(run)
    pruned = prune_and_train(run, dense, lambda: teach(run, dense))
    summary = measure(run, dense, pruned)
    finish(run, dense, pruned, summary | {"seconds": round(time.time() - started, 1)})
    return summary["rows"]


@dataclass(frozen=True)
class Data:
    """A task, its parts tokenized, and what reads them; ``cut``: how many texts of each part were too long."""

    task: Task
    train: Dataset
    validation: Dataset
    test: Dataset
    tokenizer: Any
    max_length: int
    cut: dict[str, int]


@dataclass(frozen=True)
class Run:
    """What all stages share."""

    spec: TrainSpec
    work: Workspace
    data: Data
    progress: bool
    ask: Ask

    @property
    def bf16(self) -> bool:
        """Whether to train under bf16 autocast."""
        return has_bf16() if self.spec.bf16 is None else self.spec.bf16

    def model(self, folder: str | Path) -> PreTrainedModel:
        """A model for the task on the weights in a folder."""
        spec = self.spec
        return for_task(str(folder), self.data.task, dropout=spec.dropout, freeze_embeddings=spec.freeze_embeddings)


# --- the stages ------------------------------------------------------------------------------------------------------
def load_data(spec: TrainSpec) -> Data:
    """The data of a training, cut and tokenized."""
    task = load_task(spec, seed=0)
    if task.train is None:
        raise DataError(f"{spec.data} has no training part: name a file or folder that holds train")
    tokenizer = reading(AutoTokenizer.from_pretrained, spec.model)
    max_length, parts, cut = clip(spec.max_length, reading(AutoConfig.from_pretrained, spec.model)), {}, {}
    for name in ("train", "validation", "test"):
        parts[name], cut[name] = tokenize(getattr(task, name), task, tokenizer, max_length)
    return Data(task, **parts, tokenizer=tokenizer, max_length=max_length, cut=cut)


def fine_tune(run: Run) -> Path:
    """The folder of the dense model: fine-tuned here, unless it is given or there."""
    spec, work = run.spec, run.work
    if spec.dense_model:
        return Path(spec.dense_model)
    folder = work.folder / "dense"
    if (folder / "config.json").exists():
        return folder
    set_seed(spec.seed)
    net = run.model(spec.model)
    work.claim()
    arguments = arguments_of(run, "dense", spec.epochs, spec.lr)
    if spec.epochs:
        run_trainer(run, Trainer(net, arguments, Collator(run.data.tokenizer), run.data.train))
    with folder_written_whole(folder) as aside:
        save(run, net, aside)
        (aside / SUMMARY).write_text(json.dumps({"task": task_entry(spec, run.data.task, run.data.max_length)}))
    shutil.rmtree(arguments.output_dir, ignore_errors=True)
    return folder


def teach(run: Run, dense: Path) -> Dataset:
    """The training rows with the dense model's answers, asked once, in bf16 where the training is.

    With ``replay`` they hold as well how many tokens of each text that model keeps.
    """
    folder, spec, train = run.work.folder / "taught", run.spec, run.data.train
    if folder.exists():
        return load_from_disk(str(folder))
    net, method = run.model(dense).eval(), method_of(spec)
    columns: dict[str, Any] = {}
    ranks = method is not None and method.ranks_teacher
    if ranks:
        prune(net, Ranking())
    answers = run.ask(net, dense, train, batch_size=64, bf16=run.bf16, scores=ranks)
    if isinstance(answers.logits, list):
        for i, name in enumerate(("teacher_start_logits", "teacher_end_logits")):
            columns[name] = [both[i].numpy() for both in answers.logits]
    else:
        columns["teacher_logits"] = answers.logits.numpy()
    if ranks:
        columns["teacher_ranking"] = [score.numpy() for score in answers.scores]
    if spec.replay:
        source = load(spec.replay)[0]
        columns["token_counts"] = run.ask(source, Path(spec.replay), train, bf16=run.bf16).kept.numpy()
    taught = concatenate_datasets([train, Dataset.from_dict(columns)], axis=1)
    with folder_written_whole(folder) as aside:
        taught.save_to_disk(str(aside))
    return taught


def prune_and_train(run: Run, dense: Path, taught: Callable[[], Dataset]) -> Path:
    """The folder of the pruned model, trained with the method and taught by the dense one.

    ``stage.json`` beside its weights says what the training reached and how it went.
    """
    spec, work, data = run.spec, run.work, run.data
    folder = work.folder / "pruned"
    if folder.exists():
        return folder
    net = run.model(dense)
    method = method_of(spec)
    prune(net, method or TopK(keep=1.0, at=()))
    work.claim()
    trainer = PruningTrainer(
        *(net, arguments_of(run, "prune", spec.prune_epochs, spec.prune_lr or spec.lr), Collator(data.tokenizer)),
        taught() if spec.prune_epochs else data.train,
        calibration_dataset=data.validation,
        distill=spec.distill,
        pruner_lr=spec.pruner_lr,
    )
    if spec.prune_epochs:
        if not spec.replay:  # whose counts are known on the training rows alone
            trainer.add_callback(Watch(trainer, data.validation, data.task.metric))
        set_seed(spec.seed)
        run_trainer(run, trainer)
    if run.bf16 or not spec.prune_epochs:
        trainer.reached.update(trainer.calibrate())  # in fp32, in which the model is measured
    net.eval()
    if method is None:
        unprune(net)
    else:
        trainer.reached.update(timed(net, data.validation) if method.needs_table else {})
        trainer.reached.update(method.ablations(lambda: judged(net, data)))
    with folder_written_whole(folder) as aside:
        save(run, net, aside)
        stage = {"steps": trainer.state.global_step, "reached": {k: float(v) for k, v in trainer.reached.items()}}
        stage["history"] = [line for line in trainer.state.log_history if {*line} & {"loss", "eval_quality"}]
        (aside / "stage.json").write_text(json.dumps(stage))
    shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    return folder


def measure(run: Run, dense: Path, pruned: Path) -> dict[str, Any]:
    """What came of it, on the test part, which chose nothing: thresher.json, but for the time that it took."""
    spec, data = run.spec, run.data
    stage = json.loads((pruned / "stage.json").read_text())
    before = run.ask(run.model(dense).eval(), dense, data.test, batch_size=spec.batch_size)
    counts = None
    if spec.replay:
        counts = run.ask(load(spec.replay)[0], Path(spec.replay), data.test, batch_size=spec.batch_size).kept
    untouched = spec.method == "dense" and not spec.prune_epochs
    after = before if untouched else predict(load(str(pruned))[0], data.test, batch_size=spec.batch_size, counts=counts)
    batches = math.ceil(len(data.train) / spec.batch_size)
    steps = {"dense": 0 if spec.dense_model else math.ceil(spec.epochs * batches), "prune": stage["steps"]}
    rows = [
        measured_row(run, before, before, "dense", steps["dense"]),
        measured_row(run, after, before, spec.method, steps["prune"]),
    ]
    said = {"dense": before, "pruned": after}
    return {
        "recipe": spec.saved(),
        "task": task_entry(spec, data.task, data.max_length),
        "rows": rows,
        "steps": steps,
        "reached": stage["reached"],
        "texts_cut": data.cut,
        "removed": data.task.removed,
        "predictions": {name: answers_of(p, data.test, data.task.metric) for name, p in said.items()},
        "kept": (after.kept.float().mean(0) / after.tokens_mean).tolist(),
        "history": stage["history"],
    }


def finish(run: Run, dense: Path, pruned: Path, summary: dict[str, Any]) -> None:
    """Complete the folder of the pruned model, then move it into place as a whole."""
    with writing(run.work.folder):
        if dense.parent == run.work.folder and not (pruned / "dense").exists():
            with folder_written_whole(pruned / "dense") as aside:
                shutil.copytree(dense, aside, dirs_exist_ok=True)
        (pruned / SUMMARY).write_text(json.dumps(summary, indent=1))
        if find_spec("matplotlib") and any("eval_quality" in line for line in summary["history"]):
            plots.training(summary["history"], find_architecture(load(str(pruned))[0]).depth, pruned / PICTURE)
        (pruned / "stage.json").unlink(missing_ok=True)
    run.work.deliver(pruned)


# --- pieces ----------------------------------------------------------------------------------------------------------
def method_of(spec: TrainSpec) -> TokenPruner | None:
    """A new method object; None for "dense". With ``replay`` it prunes where that model does, as many tokens."""
    if spec.method == "dense":
        return None
    if not spec.replay:
        return make_method(spec.method, spec.method_options)
    pruning = getattr(reading(AutoConfig.from_pretrained, spec.replay), CONFIG_KEY, None)
    if pruning is None:
        raise ValueError(f"{spec.replay} is not pruned: it has no counts to replay")
    return make_method(spec.method, {**spec.method_options, "keep": REPLAY, "at": tuple(pruning["at"])})


def asked(net: PreTrainedModel, folder: Path, texts: Dataset, **options: Any) -> Predictions:
    """Answers of a finished model, which lies in ``folder``."""
    return predict(net, texts, **options)


def arguments_of(run: Run, stage: str, epochs: float, lr: float) -> TrainingArguments:
    """The Trainer's arguments of a stage; its checkpoints lie in a folder of their own."""
    spec, on_cpu = run.spec, not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(run.work.folder / f"{stage}-checkpoints"),
        num_train_epochs=epochs,
        learning_rate=lr,
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=spec.batch_size,
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        train_sampling_strategy="group_by_length",
        optim="adamw_torch_fused",
        bf16=run.bf16,
        use_cpu=on_cpu,
        seed=spec.seed,
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=20,
        report_to=[],
        disable_tqdm=not run.progress,
        dataloader_pin_memory=not on_cpu,
    )


def run_trainer(run: Run, trainer: Trainer) -> None:
    """Train from the last checkpoint, if there is one; Ctrl-C leaves a new one and raises KeyboardInterrupt."""
    interrupt, checkpoint = Interrupt(), last_checkpoint(Path(trainer.args.output_dir))
    trainer.add_callback(interrupt)
    trainer.add_callback(Order())
    if checkpoint and run.progress:
        print(f"resumed: {checkpoint.parent.name.split('-')[0]} training goes on after step {step_of(checkpoint)}")
    with interrupt, writing(run.work.folder):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if interrupt.asked:
        raise KeyboardInterrupt
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # ends autocast, which would stay


def judged(net: PreTrainedModel, data: Data) -> tuple[float, float]:
    """Quality on the validation part, and the share of the dense MACs that it takes."""
    said = predict(net, data.validation)
    return quality(said, data.validation, data.task.metric), said.macs_used / said.macs_dense


def timed(net: PreTrainedModel, validation: Dataset) -> dict[str, float]:
    """The asked time beside that of single texts, spread over the validation part."""
    count, names = min(len(validation), TIMED), ("input_ids", "token_type_ids", "attention_mask")
    texts = [validation[i * len(validation) // count] for i in range(count)]
    inputs = ({name: torch.tensor([text[name]]) for name in names if name in text} for text in texts)
    dense, pruned = compare(net, inputs)
    return {"latency_ms_dense": dense, "latency_ms": pruned, "latency_fraction_measured": pruned / dense}


def save(run: Run, net: PreTrainedModel, folder: Path) -> None:
    """Write a model and its tokenizer."""
    net.save_pretrained(folder)
    run.data.tokenizer.save_pretrained(folder)


def measured_row(run: Run, result: Predictions, before: Predictions, method: str, steps: int) -> dict:
    """The row of a model on the test part; ``before`` are the dense model's answers."""
    spec, data = run.spec, run.data
    return row(
        task=data.task.name,
        model=Path(spec.model).name,
        method=method,
        target_flops=None if method == "dense" else spec.method_options.get("target_flops"),
        seed=spec.seed,
        runtime="torch",
        precision="fp32",
        mode="dense-unpadded" if method == "dense" else "pruned",
        threads=torch.get_num_threads(),
        metric=data.task.metric,
        quality=quality(result, data.test, data.task.metric),
        quality_dense=quality(before, data.test, data.task.metric),
        flops_ratio=result.macs_dense / result.macs_used,
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
