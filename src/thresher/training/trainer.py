"""Training a pruned model: the method's loss and the teacher's on top of transformers' Trainer.

All content lives in the method, so that a loop of one's own needs one added term (see examples/raw_loop.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import DataCollatorWithPadding, PreTrainedModel, Trainer, TrainerCallback

from ..api import inner_model, prune, unprune
from ..core.architecture import Architecture, find_architecture
from ..core.compat import TrainerNames, transformer_module
from ..core.dropout import quick_dropout
from ..core.pruner import MODULE, Batch, Choice, Record, TokenPruner, pruner_in, pruner_of, token_pruner_of
from ..core.view import View
from ..data.embedder import PROMPTED
from ..evaluation.latency import latency_table
from ..methods.parts.distillation import LOGITS, distillation, state_loss
from ..methods.parts.saliency import answer_saliency
from .batches import LengthOrder
from .checkpoints import Order

# columns of a data set that take a teacher's place
TAUGHT = {f"teacher_{name}": name for name in (*LOGITS, "ranking")}
# columns with a number for each token
TOKEN_COLUMNS = ("teacher_ranking", "teacher_start_logits", "teacher_end_logits", PROMPTED)
COUNTS = "token_counts"  # the column of the counts that a baseline replays
FREEZES = "freeze_without_gradient"  # the key that marks the method's parameter group
CALIBRATION_ROWS = 256  # on which a budget is kept while the training goes on


def param_groups(model: nn.Module, lr: float, pruner_lr: float | None = None, weight_decay: float = 0.0) -> list[dict]:
    """Divide the parameters into groups for any optimiser: the method's get ``pruner_lr`` and no weight decay.

    Give the optimiser ``freeze_without_gradient``, too: ``optimizer.register_step_pre_hook(freeze_without_gradient)``.

    Args:
        lr: learning rate of the model.
        pruner_lr: learning rate of the method. Default: the method's ``lr``.
        weight_decay: of the model.
    """
    pruner = token_pruner_of(model, "param_groups") or pruner_in(model)
    own = {id(p) for p in pruner.parameters()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    return [{"params": others, "lr": lr, "weight_decay": weight_decay}, pruner_group(pruner, pruner_lr)]


def pruner_group(pruner: TokenPruner, lr: float | None) -> dict:
    """Make the parameter group of a method."""
    lr = pruner.lr if lr is None else lr
    return {"params": list(pruner.parameters()), "lr": lr, "weight_decay": 0.0, FREEZES: True}


def freeze_without_gradient(optimizer: torch.optim.Optimizer, *_) -> None:
    """Leave out of a step the method's parameters whose gradient is zero: momentum would carry them on.

    A hook before the optimiser's step. In a hard stage gradients are zero, and not None, since DDP waits for one of
    every parameter.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get(FREEZES) else ():
            if parameter.grad is not None and not parameter.grad.any():
                parameter.grad = None


def join_backward(model: nn.Module, args: Any, outputs: Any) -> Any:
    """Add the method's parameters to every output with weight zero, so that DDP finds all of them in the graph.

    A forward hook. DDP waits for a gradient of each parameter and looks for unused ones in the outputs; one that is
    part of the loss alone is an error.
    """
    if model.training and torch.is_grad_enabled():
        zero: Any = sum(0.0 * parameter.sum() for parameter in pruner_in(model).parameters())
        for name in ("loss", *LOGITS, "sentence_embedding"):
            if outputs.get(name) is not None:
                outputs[name] = outputs[name] + zero
    return outputs


class Ranking(TokenPruner):
    """Drop no token, and show what a teacher ranks them ``by``: "attention", the scores of its last layer, or
    "saliency", for which it has a site at the first."""

    by: str = "attention"

    def bind(self, model: Architecture) -> None:
        self.architecture = model
        self.settle_votes(model)
        self.sites = (model.depth - 1 if self.by == "attention" else model.first_site,)

    @classmethod
    def like(cls, method: Any) -> Ranking:
        """A ranking by what a method wants, with the votes of the tokens that vote there."""
        return cls(method.ranking, protect=method.protect, votes=method.votes)

    def choose(self, score: Tensor, view: View) -> Choice:
        return Choice(view.alive)


def ranking_of(teacher: nn.Module, inputs: dict) -> Tensor:
    """Return (B, N), the ranking of a ``teacher`` that is pruned with ``Ranking`` and has just answered ``inputs``."""
    pruner = cast("Ranking", pruner_in(inner_model(teacher)))
    if pruner.by == "attention":
        return pruner.last_record().sites[-1].score
    return answer_saliency(pruner, partial(teacher, **inputs), mask_of(inputs))


@dataclass(frozen=True)
class Distill:
    """Weigh what a teacher says against the task loss.

    Attributes:
        answers: weight of its answers, 1 - ``answers`` of the task loss.
        temperature: of the answers.
        states: weight of its states, ``state_loss``, which comes on top: of the first token where the head reads that
            one alone; else of the tokens that are left, and after the last layer of all.
    """

    answers: float = 0.5
    temperature: float = 2.0
    states: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.answers <= 1:
            raise ValueError(f"distill={self.answers}: expected a weight in [0, 1]")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: expected a positive number")
        if not 0 <= self.states < float("inf"):
            raise ValueError(f"distill_states={self.states}: expected a weight from 0 up")


@contextmanager
def states_of(base: nn.Module | None) -> Iterator[list[Tensor]]:
    """Within the context the list holds the hidden states (B, N0, C) of the last forward of ``base``, the embeddings
    first; the forward is asked for them. None: it stays empty."""
    found: list[Tensor] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        found[:] = output["hidden_states"]

    handle = None if base is None else base.register_forward_hook(look)
    try:
        yield found
    finally:
        if handle is not None:
            handle.remove()


@dataclass
class Collator(DataCollatorWithPadding):
    """Pad the inputs, and with them the columns that hold a number for each token (``TOKEN_COLUMNS``).

    highest: labels (B,) are grades of candidates, of which this is the best one; a model of one logit learns them as
        probabilities (B, 1), 1 of the best and 0 of what is not relevant.
    """

    highest: float | None = None

    def __call__(self, features: list[dict]) -> dict[str, Any]:
        features = [dict(row) for row in features]
        numbers = {
            name: [torch.as_tensor(f.pop(name)) for f in features] for name in TOKEN_COLUMNS if name in features[0]
        }
        batch = super().__call__(features)
        side = getattr(self.tokenizer, "padding_side", "right")
        for name, rows in numbers.items():
            padded = pad_sequence(rows, batch_first=True, padding_side=side)
            missing = batch["input_ids"].shape[1] - padded.shape[1]
            batch[name] = F.pad(padded, (missing, 0) if side == "left" else (0, missing))
        if self.highest is not None and "labels" in batch:
            batch["labels"] = (batch["labels"].float() / self.highest).clamp(0, 1)[:, None]
        return batch


class Grouped(TrainerNames):
    """Group the training rows by length, where the arguments ask for it, without an order of lengths. A base class
    before a Trainer."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(Order())

    def row_order(self, data: Any) -> Any:
        args: Any = self.args
        if args.train_sampling_strategy != "group_by_length" or "input_ids" not in getattr(data, "column_names", ()):
            return None
        lengths = [len(ids) for ids in data["input_ids"]]
        return LengthOrder(lengths, args.train_batch_size * args.gradient_accumulation_steps)


class FineTuner(Grouped, Trainer):
    """Fine-tune a dense model: transformers' Trainer with rows grouped by length as ``Grouped`` does."""


class Pruning(Grouped):
    """Do what any Trainer of a pruned model does: keep the budget, tell the method how far it is, step its parameters.

    A base class before a Trainer. ``begin`` follows the Trainer's own ``__init__``.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    teacher: Any = None  # a frozen dense model

    def begin(self, pruner_lr: float | None = None, soft_steps: int | None = None) -> None:
        """Check the model and follow the training; arguments as of ``PruningTrainer``.

        Raises:
            ValueError: the model is not pruned, its cache is and no token, or its weights are float16.
        """
        if token_pruner_of(inner_model(self.model), type(self).__name__) is None:
            raise ValueError(f"{type(self).__name__} needs a pruned model: call prune(model, method) first")
        halves = {p.dtype for p in self.model.parameters() if p.requires_grad and p.dtype == torch.float16}
        if halves:
            raise ValueError(
                "the weights to be trained are float16, in which AdamW's epsilon is 0: load the model with "
                "dtype=torch.float32, and train it with bf16=True where that is fast"
            )
        if self.pruner.needs_table and self.pruner.table is None:
            self.pruner.table = latency_table(inner_model(self.model))
        self.pruner_lr, self.soft_steps = pruner_lr, soft_steps
        self.reached: dict[str, float | Tensor] = {}
        self.add_callback(_Stages(self))

    @property
    def pruner(self) -> Any:
        """The method that is trained."""
        return pruner_in(inner_model(self.model))

    def may_be_best(self) -> bool:
        """Whether the model as it is may be the best one: not before the hard stage, when no budget is met yet."""
        return self.pruner.phase(self.pruner.progress) == "hard"

    def train(self, *args, **kwargs):
        """Train as the Trainer does; a teacher whose ranking is wanted scores its last layer meanwhile."""
        ranked = self.teacher if self.pruner.ranks_teacher else None
        if ranked is not None:
            prune(ranked, Ranking.like(self.pruner), layout="mask")
        try:
            with quick_dropout(self.model):
                return super().train(*args, **kwargs)
        finally:
            if ranked is not None:
                unprune(ranked)

    def create_optimizer(self, model=None):
        """Make the Trainer's optimiser, with a group of its own for the method's parameters."""
        if self.optimizer is None:
            super().create_optimizer(model)
            own = list(self.pruner.parameters())
            if own:
                ids = {id(p) for p in own}
                for group in self.optimizer.param_groups:
                    group["params"] = [p for p in group["params"] if id(p) not in ids]
                self.optimizer.add_param_group(pruner_group(self.pruner, self.pruner_lr))
                self.optimizer.register_step_pre_hook(freeze_without_gradient)
        return self.optimizer

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the share of the dense MACs in the last batch, and the method's own metrics, to what is logged."""
        if "loss" in logs and "flops_fraction" in self.reached:
            logs["flops_fraction"] = round(float(self.reached["flops_fraction"]), 4)
            logs.update({name: round(value, 4) for name, value in self.pruner.metrics().items()})
        super().log(logs, *args, **kwargs)

    def prepare(self) -> None:
        """Let the method look at the calibration data, as it does before a training begins or goes on."""
        if type(self.pruner).prepare is not TokenPruner.prepare:
            self._on_calibration_data(self.pruner.prepare, CALIBRATION_ROWS)

    def calibrate(self, rows: int | None = None) -> dict[str, float]:
        """Bring the method onto its budget on (``rows`` of) the calibration data; returns what it reached.

        All processes go on with what the first one found.
        """
        reached = self._on_calibration_data(self.pruner.calibrate, rows)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            state = [{name: tensor.cpu() for name, tensor in self.pruner.state_dict().items()}]
            torch.distributed.broadcast_object_list(state, src=0, device=self.args.device)
            self.pruner.load_state_dict(state[0])
        return reached

    def calibration_batches(self, rows: int | None) -> Iterable[Batch]:
        """Arguments of the transformers model for (``rows`` of) the calibration data."""
        raise NotImplementedError(f"{type(self).__name__} has no calibration data")

    @torch.no_grad()
    def _on_calibration_data(self, act: Callable, rows: int | None) -> Any:
        """Call ``act(forward, batches)`` with (``rows`` of) the calibration data, in evaluation mode."""
        batches, was_training = [*self.calibration_batches(rows)], self.model.training
        net: Any = self.model if transformer_module(self.model) is None else inner_model(self.model)
        self.model.eval()

        def forward(batch: Batch) -> Record:
            answers = net(**{k: v.to(self.args.device) if torch.is_tensor(v) else v for k, v in batch.items()})
            record = self.pruner.last_record()
            record.answers = answers
            return record

        try:
            return act(forward, batches)
        finally:
            self.model.train(was_training)


class PruningTrainer(Pruning, Trainer):
    """Train a pruned model: transformers' Trainer with the method's loss, a teacher's, and budgets that are kept.

    Args:
        teacher: a frozen model whose answers are distilled, usually the dense fine-tuned model. A column
            ``teacher_logits`` in the data set takes its place where the answers were computed beforehand, and
            ``teacher_ranking`` (its last layer's scores, one per token) for methods that distil it.
        distill: weight of the distillation, 1 - ``distill`` of the task loss; a ``Distill`` says more.
        pruner_lr: learning rate of the method's own parameters (thresholds, gates), which decays with the others;
            default: the method's ``lr``.
        calibration_dataset: inputs on which a budget is kept, never a test set; default: ``eval_dataset``, else
            ``train_dataset``.
        soft_steps: length of the soft stage; default: the method's share ``soft_until`` of all steps.

    Mixed precision, gradient accumulation and checkpointing, resuming, DDP and PEFT work as in the Trainer itself.

    Raises:
        ValueError: the model is not pruned, or a value is out of range.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    data_collator: Callable

    def __init__(
        self,
        *args,
        teacher: nn.Module | None = None,
        distill: float | Distill = 0.5,
        pruner_lr: float | None = None,
        calibration_dataset: Dataset | None = None,
        soft_steps: int | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.begin(pruner_lr, soft_steps)
        if getattr(self.model, "peft_config", None) and getattr(self.model, MODULE) is self.pruner:
            raise ValueError(
                f"what {self.pruner.name} learns would not be saved with the adapter: prune() after get_peft_model, or "
                f"give its configuration modules_to_save=['{MODULE}']"
            )
        self.distill = distill if isinstance(distill, Distill) else Distill(distill)
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(self.args.device)
        if teacher is not None and self.pruner.ranks_teacher and pruner_of(inner_model(teacher)) is not None:
            raise ValueError(f"{self.pruner.name} wants the ranking of a teacher that is not pruned: unprune(teacher)")
        self.taught_by = self._base_of_teacher() if self.distill.states else None
        self.calibration_dataset = calibration_dataset
        self.label_names = [*self.label_names] if self.label_names else ["labels"]
        self.labels = self.label_names  # that the task's loss needs
        held_out = getattr(self.eval_dataset, "column_names", None) or ()
        if not {*self.labels} & {*held_out}:  # rows without these have a loss all the same, if a teacher saw them
            self.label_names = [column for column in self.taught_columns() if column in held_out][:1] or self.labels
        if self.args.world_size > 1:
            self.model.register_forward_hook(join_backward)

    def _base_of_teacher(self) -> nn.Module:
        """The part of the teacher whose states are distilled. Raises ValueError where there is none that fits."""
        if self.teacher is None:
            raise ValueError(
                f"distill_states={self.distill.states} needs the dense model itself (teacher=): columns of a data set "
                "hold its answers, and no states"
            )
        if pruner_of(inner_model(self.teacher)) is not None:
            raise ValueError("the states of a teacher that is pruned are not distilled: unprune(teacher)")
        own, other = self.pruner.architecture, find_architecture(inner_model(self.teacher))
        if (own.depth, own.hidden) != (other.depth, other.hidden):
            raise ValueError(
                f"distill_states={self.distill.states}: the teacher has {other.depth} layers of {other.hidden} "
                f"channels, the model {own.depth} of {own.hidden}; expected the same"
            )
        return other.base

    def taught_columns(self) -> dict[str, str]:
        """The columns of a data set that take a teacher's place, and what they are called among its answers."""
        return TAUGHT

    def extra_columns(self) -> set[str]:
        """The columns of a data set that the loss reads and the model's forward does not."""
        return {*self.taught_columns(), COUNTS}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Add up the losses of the task, the distillation and the method; in evaluation without the method's, and with
        the distillation of answers that the data set has."""
        inputs = dict(inputs)
        taught = self.taught_columns()
        answers = {name: inputs.pop(column) for column, name in taught.items() if column in inputs}
        shows = model.training and self.taught_by is not None
        more = {"output_hidden_states": True} if shows else {}
        counts, base = inputs.pop(COUNTS, None), self.pruner.architecture.base if shows else None
        with self.pruner.attached().asking(counts=counts), states_of(base) as states:
            if any(name in inputs for name in self.labels):
                task, outputs = super().compute_loss(model, inputs | more, return_outputs=True)
            else:
                task, outputs = None, model(**inputs, **more)
        if not model.training:
            held_out = self.taught_loss(task, outputs, answers, inputs)
            return (held_out, outputs) if return_outputs else held_out
        record = self.pruner.last_record()
        asks = shows or not answers or (self.pruner.ranks_teacher and "ranking" not in answers)
        if asks and self.teacher is not None:
            with torch.no_grad(), states_of(self.taught_by if shows else None) as known:
                given = {k: v for k, v in inputs.items() if k != "labels"}
                answers = dict(self.teacher(**given, **more)) | answers
            if self.pruner.ranks_teacher and "ranking" not in answers:
                answers["ranking"] = ranking_of(self.teacher, given)
        if not answers and task is None:
            raise ValueError("no labels and no teacher: there is nothing to learn from")
        loss: Any = self.taught_loss(task, outputs, answers, inputs)
        loss = (0.0 if loss is None else loss) + self.pruner.loss(
            lambda **override: model(**{**inputs, **override}), inputs, record, answers or None
        )
        if shows:
            loss = loss + self.distill.states * self.states_loss(states, known, record, mask_of(inputs))
        self.reached["flops_fraction"] = record.flops_fraction().detach()
        return (loss, outputs) if return_outputs else loss

    def taught_loss(self, task: Any, outputs: Any, answers: Any, inputs: dict) -> Any:
        """Add up the losses of the task, where there are labels, and of the distillation, where there are answers."""
        if not any(name in answers for name in LOGITS):
            return task
        weight = 1.0 if task is None else self.distill.answers
        learned = weight * self.distilled(outputs, answers, mask_of(inputs))
        return learned if task is None else (1 - weight) * task + learned

    def distilled(self, outputs: Any, answers: Any, mask: Any) -> Tensor:
        """Compute how far the model is from its teacher; ``mask`` (B, N): the tokens that are there, or None."""
        return distillation(outputs, answers, self.distill.temperature, mask)

    def states_loss(self, states: list[Tensor], known: list[Tensor], record: Record, mask: Tensor | None) -> Tensor:
        """Compute how far the model's ``states`` are from those that its teacher has, ``known``: embeddings first, then
        of every layer (B, N0, C); ``mask`` as in ``distilled``."""
        return state_loss(states[1:], known[1:], self.state_weights(states, record, mask))

    def state_weights(self, states: list[Tensor], record: Record, mask: Tensor | None) -> list[Tensor]:
        """Return (B, N0) for each layer, what the state of each token counts."""
        real = torch.ones_like(states[0][..., 0]) if mask is None else mask.to(states[0].dtype)
        if self.pruner.architecture.reads_first_only:
            first = torch.zeros_like(real).scatter(1, real.argmax(1, keepdim=True), 1.0)
            weights = [first] * (len(states) - 1)
        else:
            left = [record.entering(layer).spread_votes().to(real.dtype) for layer in range(1, len(states) - 1)]
            weights = [*left, real if record.token_mask is None else record.token_mask.to(real.dtype)]
        return [weight.detach() for weight in weights]

    def calibration_batches(self, rows: int | None) -> Iterable[Batch]:
        """Arguments of the model for (``rows`` of) the calibration data."""
        data: Any = self.calibration_dataset or self.eval_dataset or self.train_dataset
        data = self.used_columns(data) if hasattr(data, "column_names") else data
        if rows is not None and rows < len(data):  # spread over all, which may be in the order of their labels
            data = Subset(data, [i * len(data) // rows for i in range(rows)])
        loader = DataLoader(data, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)
        aside = {*self.extra_columns(), "labels"}
        return [{k: v for k, v in b.items() if k not in aside} for b in loader]


def mask_of(inputs: dict) -> Tensor | None:
    """Return (B, N), which tokens of a batch are there; None where it has no such mask."""
    mask = inputs.get("attention_mask")
    return mask if torch.is_tensor(mask) and mask.dim() == 2 else None


class _Stages(TrainerCallback):
    """Tell the method how far the training is, and calibrate it when the hard stage begins, pauses or ends.

    That is at the end of a step, before anything is evaluated or saved: what is saved meets the budget, and training
    that resumes there has nothing to catch up on.
    """

    def __init__(self, trainer: Pruning):
        self.trainer = trainer
        self.phase: str | None = None
        self.calibrated = False  # on all rows, since the last step

    def on_train_begin(self, args, state, control, **kwargs):
        self._move(state)
        self.calibrated = False
        self.trainer.prepare()
        if self.phase == "hard" and state.global_step == 0:
            self.trainer.calibrate(CALIBRATION_ROWS)

    def on_step_end(self, args, state, control, **kwargs):
        before, last = self.phase, state.global_step >= state.max_steps
        self._move(state)
        pauses = last or control.should_evaluate or state.epoch % 1 == 0
        if self.phase == "hard" and (self.phase != before or pauses):
            self.trainer.reached.update(self.trainer.calibrate(None if last else CALIBRATION_ROWS))
            self.calibrated = last

    def on_train_end(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps:  # interrupted
            return
        self._move(state)
        if not self.calibrated or (state.best_model_checkpoint and args.load_best_model_at_end):
            self.trainer.reached.update(self.trainer.calibrate())

    def _move(self, state) -> None:
        pruner, soft = self.trainer.pruner, self.trainer.soft_steps
        step, last, share = state.global_step, max(1, state.max_steps), self.trainer.pruner.soft_until
        if soft is None or not share:
            pruner.progress = step / last
        elif step < soft:
            pruner.progress = share * step / soft
        else:
            pruner.progress = share + (1 - share) * (step - soft) / max(1, last - soft)
        self.phase = pruner.phase(pruner.progress)
