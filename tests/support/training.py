"""A tiny model, rows to train it on, and a trainer for it."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from support.families import FAMILIES
from thresher import LTP, prune
from thresher.training.trainer import PruningTrainer

BERT = FAMILIES["bert"]


LENGTHS = (20, 12, 16, 8)


BATCH, EPOCH = 8, 4  # rows of a batch, steps of an epoch


SOFT = {"soft_until": 1.0}


def build(seed: int = 0, **options):
    return BERT.build(seed, num_hidden_layers=3, **options)


def rows(count: int = BATCH * EPOCH, seed: int = 0, **columns) -> Dataset:
    """Texts of different lengths in the order of their labels; a column is a function of the row's number."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(5, 97, (LENGTHS[i % len(LENGTHS)],), generator=generator).tolist()
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": 3 * i // count})
        made[-1].update({name: column(i) for name, column in columns.items()})
    return Dataset.from_list(made)


def collate(batch: list[dict]) -> dict:
    width, padded = max(len(row["input_ids"]) for row in batch), ("input_ids", "attention_mask")
    return {
        name: torch.tensor(
            [row[name] + [0] * (width - len(row[name])) if name in padded else row[name] for row in batch]
        )
        for name in batch[0]
    }


class Watch(TrainerCallback):
    """What the pruner was before every optimiser step, and the gradient it was given."""

    def __init__(self):
        self.thresholds, self.gradients, self.phases = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        pruner = model.token_pruner
        self.thresholds.append(pruner.threshold.detach().clone())
        self.gradients.append(pruner.threshold.grad.clone())
        self.phases.append((round(pruner.progress, 4), pruner.phase(pruner.progress)))


def trainer(folder: Path, method=None, model=None, data=None, callbacks=(), teacher=None, **options) -> PruningTrainer:
    own = ("distill", "pruner_lr", "eval_dataset")
    own = {name: options.pop(name) for name in own if name in options}
    arguments = {
        "max_steps": 4,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 32,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    model = prune(model or build(), method or LTP(**SOFT))
    arguments, data = TrainingArguments(str(folder), **arguments | options), rows() if data is None else data
    made = PruningTrainer(model, arguments, collate, data, teacher=teacher, **own)
    for callback in callbacks:
        made.add_callback(callback)
    return made


def inputs(data: Dataset | None = None) -> dict:
    return collate(list(rows(6) if data is None else data))


def losses(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]
