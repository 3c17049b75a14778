"""The stages of a training: data, dense model, what a teacher says, pruned model. Each has a folder of its own.

A stage whose result is there is not run again; inside a training the last checkpoint is taken up.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments, set_seed

from ..api import CONFIG_KEY, prune, unprune
from ..core.pruner import METHODS, SURVIVORS, TokenPruner, pruner_in, query_of
from ..data import qa
from ..data.embedder import Embedder, best_pooling, default_prompt_of, embedder_for, load_embedder
from ..data.files import reading
from ..data.load import load_task
from ..data.models import class_names, clip, for_task, is_reranker, load, make_method
from ..data.task import DataError, Task
from ..data.texts import load_texts
from ..data.tokenize import tokenize
from ..evaluation.hardware import has_bf16
from ..evaluation.predict import Predictions, Text, predict, quality
from ..evaluation.rows import folder_written_whole, whole, writing
from ..methods.parts.budget import OutOfReach
from ..methods.topk import REPLAY, TopK
from ..search.explore import left_alone
from ..search.halving import successive_halving
from ..search.schedules import WIDTHS, Space, protected_by
from ..training.checkpoints import last_checkpoint, step_of
from ..training.interrupt import Interrupt
from ..training.monitor import WATCHED, Watch
from ..training.trainer import CALIBRATION_ROWS, Collator, FineTuner, PruningTrainer, Ranking, ranking_of
from ..training.until import UntilTrained
from .service import Service
from .spec import FIXED, SUMMARY, TrainSpec, task_entry
from .workspace import Workspace

RATES = (5e-5, 1e-4, 2e-4, 4e-4)  # that are tried
RATE_STEPS, SCHEDULE_STEPS = (40, 100), (40, 80)  # rounds of the trials
EPOCHS, LEAST, MOST = 20, 600, 3000  # a ceiling of the training: in epochs, but at least and at most in steps
LOOK, WARMUP = 25, 50  # steps between two looks at held-out rows, at least; of the warm-up, at most
SAVED = 200  # steps between two checkpoints of a dense training, at most
SOFT_STEPS = 300  # of a soft stage, at least
USUAL = 1e-4  # the rate with which schedules are compared, where none is given
Ask = Callable[..., Predictions]  # (model, the folder it lies in, texts, options of ``predict``) -> its answers


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
    def collator(self) -> Collator:
        """What makes batches of rows."""
        labels = self.data.train["labels"] if "labels" in self.data.train.column_names else []
        return Collator(self.data.tokenizer, highest=max(labels, default=1.0) if self.ranks else None)

    @property
    def ranks(self) -> bool:
        """Whether the model gives one number, which orders a query's candidates."""
        return self.data.task.kind == "reranking"

    @property
    def bf16(self) -> bool:
        """Whether to train under bf16 autocast."""
        return has_bf16() if self.spec.bf16 is None else self.spec.bf16

    @property
    def embeds(self) -> bool:
        """Whether the model gives a text a vector."""
        return self.data.task.kind == "embedding"

    def model(self, folder: str | Path, **options: Any) -> PreTrainedModel:
        """A model for the task on the weights in a folder, an ``Embedder`` for texts; ``options`` as ``for_task`` takes
        them."""
        own: dict[str, Any] = {"dropout": self.spec.dropout, "freeze_embeddings": self.spec.freeze_embeddings}
        if self.embeds:
            return cast("Any", embedder_for(str(folder), **own, **options))
        return for_task(str(folder), self.data.task, **own, **options)

    def dense(self, folder: Path) -> PreTrainedModel:
        """A dense model that only answers."""
        return self.model(folder, learns=False).eval()

    def finished(self, folder: Path) -> PreTrainedModel:
        """A model that was trained here, as it lies in a folder."""
        return cast("Any", load_embedder(str(folder))[0]) if self.embeds else load(str(folder))[0]

    def options(self, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """Options of a method; unless they say otherwise ranked pairs keep the query, merging leaves short texts."""
        options = (self.spec.method_options if options is None else options) or {}
        own = query_of(self.data.tokenizer.sep_token_id, options.get("protect")) if self.ranks else {}
        return own | (left_alone(self.spec.method, self.data.validation["input_ids"]) if self.embeds else {}) | options

    def pools(self, net: Any) -> bool:
        """Whether it is open which states of a text an embedder pools: all, or those of the tokens that are left."""
        open_ = "pooling" not in (self.spec.method_options or {}) and self.spec.method != "dense"
        return open_ and isinstance(net, Embedder) and net.pools_all

    @property
    def protects(self) -> dict[str, Any]:
        """Of ``options`` the one that says what never leaves."""
        return {name: value for name, value in self.options().items() if name == "protect"}


# --- the stages -------------------------------------------------------------------------------------------------------
def load_data(spec: TrainSpec) -> Data:
    """The data of a training, cut and tokenized."""
    ranks = spec.task == "rerank"
    if spec.task == "embed":
        task = load_texts(spec, seed=0, pairs=True)
    else:
        labels = [] if ranks else classes_given(spec)
        task = load_task(spec, labels=labels, need_labels=not ranks, seed=0)
    if task.train is None:
        raise DataError(f"{spec.data} has no training part: name a file or folder that holds train")
    tokenizer = reading(AutoTokenizer.from_pretrained, spec.model)
    max_length, parts, cut = clip(spec.max_length, reading(AutoConfig.from_pretrained, spec.model)), {}, {}
    prompt = default_prompt_of(spec.model, tokenizer, max_length) if spec.task == "embed" else None
    for name in ("train", "validation", "test"):
        parts[name], cut[name] = tokenize(getattr(task, name), task, tokenizer, max_length, prompt)
    if task.kind == "regression" and len(parts["validation"]) < 2:
        raise DataError(
            f"{len(parts['train'])} training rows leave {len(parts['validation'])} to choose on: give 20 or more"
        )
    return Data(task, **parts, tokenizer=tokenizer, max_length=max_length, cut=cut)


def classes_given(spec: TrainSpec) -> list[str] | None:
    """The classes of a fine-tuned model that is taken as it is, in its order; None where the data say which."""
    model = spec.dense_model or (spec.model if spec.epochs == 0 else None)
    config = None if model is None else reading(AutoConfig.from_pretrained, model)
    classifies = config is not None and any("ForSequenceClassification" in one for one in config.architectures or ())
    return (class_names(config) or None) if classifies else None


def fine_tune(run: Run) -> Path:
    """The folder of the dense model: fine-tuned here, unless it is given or there."""
    spec, work = run.spec, run.work
    if spec.dense_model:
        return Path(spec.dense_model)
    folder = work.folder / "dense"
    if (folder / "config.json").exists():
        return folder
    known = reading(AutoConfig.from_pretrained, spec.model)
    able = run.embeds or (run.ranks and spec.epochs is None and is_reranker(known))
    epochs = 0 if able else spec.epochs
    if run.data.task.label_column is None and epochs != 0:
        raise DataError(
            f"{spec.data} has no labels to teach {spec.model}: name the label column, or a trained reranker"
        )
    run.model(spec.model)  # a mistake is told before anything is written
    work.claim()
    train, held_out = run.data.train, watched(run.data.validation)
    headless = not any("ForSequenceClassification" in name for name in known.architectures or ())
    classes = len(run.data.task.labels or [])
    if epochs == 0 and not headless and classes and known.num_labels != classes:
        raise DataError(
            f"{spec.model} answers with {known.num_labels} classes, {spec.data} has {classes}: what is not trained "
            "(--epochs 0) has to fit; leave --epochs out, or name the column of its labels"
        )

    def make(**arguments: Any) -> Trainer:
        set_seed(spec.seed)
        net = run.model(spec.model)
        if run.data.task.kind == "regression" and headless:
            start_at_mean(net, train["labels"])
        return FineTuner(net, arguments_of(run, "dense", **arguments), run.collator, train, held_out)

    trainer = settled(run, "dense", make, epochs, spec.lr)
    with folder_written_whole(folder) as aside:
        save(run, trainer.model, aside)
        stage = {"steps": trainer.state.global_step, "rate": trainer.args.learning_rate}
        summary = {"task": task_entry(spec, run.data.task, run.data.max_length), "trained": stage}
        (aside / SUMMARY).write_text(json.dumps(summary))
    shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    return folder


def graded(run: Run, dense: Path) -> Run:
    """The run, in which what the dense model says stands for the labels of validation and test where data have none: a
    reranker's probabilities for grades, an embedder's vectors. Quality is then how well its order, or they, are
    kept."""
    if run.data.task.label_column is not None:
        return run
    if not run.embeds and not run.data.task.metric.startswith("ndcg"):
        raise DataError(f"{run.spec.data} has no labels: {run.data.task.metric!r} needs them, use ndcg@10")
    net, parts = run.dense(dense), {}
    for part in ("validation", "test"):
        rows = getattr(run.data, part)
        said: Any = run.ask(net, dense, rows, batch_size=run.spec.batch_size).logits
        labels = said if run.embeds else said[:, 0].double().sigmoid()
        parts[part] = concatenate_datasets([rows, Dataset.from_dict({"labels": labels.tolist()})], axis=1)
    return replace(run, data=replace(run.data, **parts))


def teach(run: Run, dense: Path, part: str = "train") -> Dataset:
    """The rows of a part, "train" or "watched" (of the validation part), with the dense model's answers, asked once, in
    bf16 where the training is.

    With ``replay`` they hold as well how many tokens of each text that model keeps.
    """
    folder, spec = run.work.folder / f"taught-{part}", run.spec
    if folder.exists():
        return load_from_disk(str(folder))
    rows = run.data.train if part == "train" else watched(run.data.validation)
    rows = rows.remove_columns("labels") if run.data.task.label_column is None and part != "train" else rows
    net, method = run.dense(dense), method_of(spec, run.options())
    columns: dict[str, Any] = {}
    ranking = Ranking.like(method) if method is not None and method.ranks_teacher else None
    by = None if ranking is None else ranking.by
    if ranking is not None:
        prune(net, ranking)
    ask, attends = run.ask if part == "train" else asked, by == "attention"
    answers = ask(net, dense, rows, batch_size=64, bf16=run.bf16, scores=attends)
    if isinstance(answers.logits, list):
        for i, name in enumerate(("teacher_start_logits", "teacher_end_logits")):
            columns[name] = [both[i].numpy() for both in answers.logits]
    else:
        columns["teacher_sentence_embedding" if run.embeds else "teacher_logits"] = answers.logits.numpy()
    if by is not None:
        columns["teacher_ranking"] = [score.numpy() for score in (answers.scores if attends else salient(net, rows))]
    if spec.replay:
        source = load(spec.replay)[0]
        columns["token_counts"] = ask(source, Path(spec.replay), rows, bf16=run.bf16).kept.numpy()
    taught = concatenate_datasets([rows, Dataset.from_dict(columns)], axis=1)
    with folder_written_whole(folder) as aside:
        taught.save_to_disk(str(aside))
    return taught


def service_of(run: Run) -> Service:
    """What will serve the model, which a budget of time is for."""
    return Service(run.spec.runtime, run.spec.precision, run.spec.serve_batch)


def priced(run: Run, net: PreTrainedModel) -> None:
    """Give a method with a budget of time the prices of another service than the usual one, which the trainer knows."""
    method, service = pruner_in(net), service_of(run)
    if method.needs_table and service != Service():
        method.table = service.table(net, run.data.tokenizer, run.data.validation)


def salient(net: PreTrainedModel, rows: Dataset) -> list[torch.Tensor]:
    """The saliency (n,) of the n tokens of each row, of a model that is pruned with ``Ranking``."""
    text = Text(net, rows, None)
    found: dict[int, torch.Tensor] = {}
    for some in text.batches(range(len(rows)), 32):
        inputs = text.batch(some, None, net.device)
        ranking = ranking_of(net, inputs)
        found |= {row: scores[: text.lengths[row]].cpu() for row, scores in zip(some, ranking, strict=True)}
    return [found[row] for row in range(len(rows))]


# --- what a training leaves open --------------------------------------------------------------------------------------
def settled(run: Run, stage: str, make: Callable[..., Any], epochs: float | None, lr: float | None) -> Any:
    """A Trainer that ``make`` made, once its training is over: of so many epochs, or until it is trained.

    Args:
        stage: its name, of the folder of its checkpoints.
        make: takes ``epochs`` or ``steps`` and ``lr``, as ``arguments_of`` does.
        lr: None: the best of ``RATES``.
    """
    if epochs is None and lr is None:
        lr = best_rate(run, stage, make)
    trainer = make(epochs=epochs, lr=lr or FIXED["lr"])
    pruning = isinstance(trainer, PruningTrainer)
    if epochs == 0:
        return trainer
    if epochs is None:
        soft = trainer.soft_steps if pruning and trainer.pruner.soft_until else 0
        trainer.add_callback(UntilTrained(after=soft))
    if pruning and not run.spec.replay:  # whose counts are known on the training rows alone
        trainer.add_callback(Watch(trainer, run.data.validation, run.data.task.metric))
    if run.progress and epochs is None:
        print(
            f"{stage}: at most {trainer.args.max_steps} steps at {trainer.args.learning_rate:g}; "
            "it ends when the loss on held-out rows falls no more"
        )
    set_seed(run.spec.seed)
    run_trainer(trainer, run.work.folder, run.progress)
    return trainer


def best_rate(run: Run, stage: str, make: Callable[..., Any]) -> float:
    """Of ``RATES`` the one whose short training brings the loss on held-out rows lowest; what is known is not tried
    again."""

    def train(name: str, rate: float, steps: int) -> float:
        return short(run, make(steps=steps, lr=rate), f"rate {name}")

    known = remembering(
        run.work.folder / f"{stage.split('-')[0]}-rate.json",  # budgets share the rate of the first one
        lambda: successive_halving({f"{rate:g}": rate for rate in RATES}, train, RATE_STEPS),
    )
    return float(known[0])


def choose_schedule(
    run: Run, model: Callable[[], PreTrainedModel], options: dict[str, Any], make: Callable[..., Any]
) -> dict[str, Any]:
    """The method's options for the schedule of the family ``Space.falling`` that loses least after short trainings: of
    the method itself where it keeps shares, else of ``TopK``, and the method starts from there.

    Args:
        model: gives the weights that the training starts from.
        options: of the method, with ``target_flops``.
        make: gives a trainer of a pruned model for a number of steps.
    """
    target, learns = options["target_flops"], "schedule" in fields_of(run.spec.method)
    proxy = TopK if learns else METHODS[run.spec.method or ""]
    own = {name: value for name, value in run.options(options).items() if not learns and name != "target_flops"}
    own |= run.protects if learns else {}
    space = space_of(run, net := model(), cast("Any", proxy)(keep=1.0, at=(), **own))
    falling = {f"{width:g}": space.falling(width, target) for width in WIDTHS}
    family: dict[str, dict[str, Any]] = {name: schedule for name, schedule in falling.items() if schedule is not None}
    if run.pools(net):
        family |= {f"{name}, {SURVIVORS}": one | {"pooling": SURVIVORS} for name, one in family.items()}
    if not family:
        raise OutOfReach(f"target_flops={target} is out of reach on these texts")
    trained: dict[str, Any] = {}

    def train(name: str, schedule: dict[str, Any], steps: int) -> float:
        if name not in trained:
            trained[name] = prune(model(), cast("Any", proxy)(**own, **schedule))
        lr = run.spec.prune_lr or run.spec.lr or USUAL
        return short(run, make(trained[name], steps=steps, lr=lr), f"schedule of width {name}")

    path = run.work.folder / f"schedule-{target}.json"
    best = family[remembering(path, lambda: successive_halving(family, train, SCHEDULE_STEPS))[0]]
    if not learns:
        return best | {"target_flops": None}
    return {"at": best["at"], "schedule": best["keep"]} | {name: best[name] for name in ("pooling",) if name in best}


def choose_pooling(run: Run, stage: str, make: Callable[..., Any]) -> dict[str, str]:
    """The method's option for the pooling that is nearest to the dense vectors before a training; none where it is not
    open. What was found is kept."""

    def find() -> dict[str, str]:
        trainer = make(epochs=0)
        if not run.pools(trainer.model):
            return {}
        trainer.calibrate(CALIBRATION_ROWS)
        return {"pooling": best_pooling(trainer.model, lambda: judged(trainer.model, run.data)[0])["chosen"]}

    return remembering(run.work.folder / f"{stage}-pooling.json", find) if run.embeds else {}


def space_of(run: Run, net: PreTrainedModel, method: TokenPruner | None = None) -> Space:
    """The schedules of a model, by default for ``TopK``, on the lengths of the validation part."""
    default: Any = run.protects
    pruner = pruner_in(prune(net, method or TopK(keep=1.0, at=(), **default)))
    ids = run.data.validation["input_ids"]
    lengths, protected = torch.tensor([len(text) for text in ids]), protected_by(pruner, ids)
    space = Space(pruner.architecture, lengths, pruner.needs_attention and pruner.scores_all, protected=protected)
    unprune(net)
    return space


def short(run: Run, trainer: Any, what: str) -> float:
    """The loss on held-out rows after a short training."""
    started = time.time()
    trainer.train()
    few = trainer.eval_dataset.select(range(0, len(trainer.eval_dataset), 2))
    loss = trainer.evaluate(few)["eval_loss"]
    if run.progress:
        print(
            f"tried {what}: loss {loss:.4f} on held-out rows after {trainer.state.global_step} steps, "
            f"{time.time() - started:.0f} s"
        )
    return loss


def remembering(path: Path, find: Callable[[], Any]) -> Any:
    """What was found, kept in a file of the workspace, so that a resumed run need not search again."""
    if not path.exists():
        found = find()
        with whole(path) as aside:
            aside.write_text(json.dumps(found))
    return json.loads(path.read_text())


def start_at_mean(net: PreTrainedModel, labels: list[float]) -> None:
    """Let a new head of one number answer with the mean of the labels: else most of a short training goes into that."""
    heads = [m for m in net.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1 and m.bias is not None]
    if heads:
        torch.nn.init.constant_(heads[-1].bias, sum(labels) / len(labels))


def open_schedule(spec: TrainSpec, options: dict[str, Any]) -> bool:
    """Whether the method takes shares for each site and nobody has said which."""
    kind = METHODS.get(spec.method or "")
    shares = kind is not None and issubclass(kind, TopK) and kind.takes_counts
    shares = shares and kind.choose is TopK.choose  # ``Space`` counts what that keeps
    able = shares or "schedule" in fields_of(spec.method)
    return able and options.get("target_flops") is not None and not {"keep", "at", "schedule", "init"} & {*options}


def fields_of(method: str | None) -> set[str]:
    """The options that a method has."""
    return {field.name for field in fields(METHODS[method])} if method in METHODS else set()


def soft_steps(run: Run) -> int:
    """Steps of a soft stage where the length of the training is open."""
    return min(max(SOFT_STEPS, 2 * steps_of_epoch(run)), MOST // 3)


def steps_of_epoch(run: Run) -> int:
    return math.ceil(len(run.data.train) / run.spec.batch_size)


def watched(rows: Dataset) -> Dataset:
    """At most ``WATCHED`` examples, spread over ``rows``."""
    total = len(set(qa.examples(rows)))
    count = min(total, WATCHED)
    return rows.select(qa.rows_of(rows, [i * total // count for i in range(count)]))


# --- pieces -----------------------------------------------------------------------------------------------------------
def method_of(spec: TrainSpec, options: dict[str, Any] | None = None) -> TokenPruner | None:
    """A new method object with ``options``, by default those of the specification; None for "dense". With ``replay`` it
    prunes where that model does, as many tokens."""
    if spec.method == "dense":
        return None
    options = spec.method_options if options is None else options
    if not spec.replay:
        return make_method(spec.method, options)
    pruning = getattr(reading(AutoConfig.from_pretrained, spec.replay), CONFIG_KEY, None)
    if pruning is None:
        raise ValueError(f"{spec.replay} is not pruned: it has no counts to replay")
    return make_method(spec.method, {**spec.method_options, "keep": REPLAY, "at": tuple(pruning["at"])})


def asked(net: PreTrainedModel, folder: Path, texts: Dataset, **options: Any) -> Predictions:
    """Answers of a finished model, which lies in ``folder``."""
    return predict(net, texts, **options)


def arguments_of(
    run: Run, stage: str, *, epochs: float | None = None, steps: int | None = None, lr: float = 5e-5
) -> TrainingArguments:
    """The Trainer's arguments of a stage; its checkpoints lie in a folder of their own.

    Args:
        epochs, steps: of a training of that length, the second a short one; neither: until it is trained.
    """
    spec, on_cpu, every = run.spec, not torch.cuda.is_available(), steps_of_epoch(run)
    more: dict[str, Any] = {"num_train_epochs": epochs, "lr_scheduler_type": "linear", "warmup_steps": 0.06}
    if epochs is None:
        looks = min(max(every, LOOK), 200)
        most = steps or min(max(EPOCHS * every, LEAST), MOST)
        falls = "linear" if steps else "constant_with_warmup"
        more = {"max_steps": most, "lr_scheduler_type": falls, "warmup_steps": min(WARMUP, most // 5)}
        if steps is None:
            more |= {"eval_strategy": "steps", "eval_steps": looks, "save_strategy": "steps", "save_steps": looks}
            more |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    saves: dict[str, Any] = {"save_strategy": "epoch" if steps is None else "no"}
    if epochs and stage == "dense" and every > SAVED:  # no budget has to be met where it is saved
        saves = {"save_strategy": "steps", "save_steps": SAVED}
    return TrainingArguments(
        output_dir=str(run.work.folder / f"{stage}-checkpoints"),
        learning_rate=lr,
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=spec.batch_size,
        train_sampling_strategy="group_by_length",
        optim="adamw_torch_fused",
        bf16=run.bf16,
        use_cpu=on_cpu,
        seed=spec.seed,
        save_total_limit=1 if epochs is not None else 2,  # with 1 the Trainer keeps the best alone, and not the last
        logging_steps=20,
        report_to=[],
        disable_tqdm=not run.progress or steps is not None,
        dataloader_pin_memory=not on_cpu,
        **saves | more,
    )


def run_trainer(trainer: Trainer, folder: Path, progress: bool) -> None:
    """Train from the last checkpoint, if there is one; Ctrl-C leaves a new one and raises KeyboardInterrupt.

    Args:
        folder: in which the checkpoints are.
        progress: whether to say that a training goes on.
    """
    interrupt, checkpoint = Interrupt(), last_checkpoint(Path(trainer.args.output_dir))
    trainer.add_callback(interrupt)
    if checkpoint and progress:
        print(f"resumed: {checkpoint.parent.name.split('-')[0]} training goes on after step {step_of(checkpoint)}")
    with interrupt, writing(folder):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if interrupt.asked:
        raise KeyboardInterrupt
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # ends autocast, which would stay


def judged(net: PreTrainedModel, data: Data) -> tuple[float, float]:
    """Quality on the validation part, and the share of the dense MACs that it takes."""
    said = predict(net, data.validation)
    return quality(said, data.validation, data.task.metric), said.macs_used / said.macs_dense


def save(run: Run, net: PreTrainedModel, folder: Path) -> None:
    """Write a model and its tokenizer."""
    if isinstance(net, Embedder):
        net.save_pretrained(folder, run.data.tokenizer)
        return
    net.save_pretrained(folder)
    run.data.tokenizer.save_pretrained(folder)
