"""Teach an encoder to do without tokens before it has a task: random schedules, and its dense states as the answer."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..core.pruner import Record
from ..methods.parts.distillation import state_loss
from ..methods.topk import TopK
from .embedding import EmbedTrainer
from .trainer import Distill


class Drawn(TopK):
    """Keep the tokens that receive most attention, by one of several schedules, which is drawn for each batch of a
    training.

    Args:
        schedules: shares, or 1 for the protected tokens alone, for each site.
    """

    schedules: tuple = ()

    def draw(self) -> None:
        """Take another schedule, by torch's random numbers, so that a resumed training draws it again."""
        self.keep = tuple(self.schedules[int(torch.randint(len(self.schedules), ()))])


class Preparing(EmbedTrainer):
    """Train an ``Embedder`` that is pruned with ``Drawn`` to have the states of its dense teacher.

    In each layer the tokens that are left are compared with the teacher's states of the same tokens, after the last
    one all tokens, with those that left: 1 - cosine, and the squared distance relative to the teacher's length, the
    mean over the layers. The vectors are compared as ``EmbedTrainer`` does. No label is read.

    Args:
        teacher: the dense encoder.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, distill=Distill(states=1.0), **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            self.pruner.draw()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def states_loss(self, states: list[Tensor], known: list[Tensor], record: Record, mask: Tensor | None) -> Tensor:
        weights = self.state_weights(states, record, mask)
        return state_loss(states[1:], known[1:], weights, squared=True) / len(weights)


class Minutes(TrainerCallback, ExportableState):
    """End a training after some minutes, over which its rate falls to zero; those before an interruption count.

    Args:
        minutes: of training.
    """

    def __init__(self, minutes: float):
        self.minutes, self.spent, self.since = minutes, 0.0, time.monotonic()

    @property
    def share(self) -> float:
        """How much of the time is over (0..1)."""
        return min(1.0, (self.spent + time.monotonic() - self.since) / (60 * self.minutes))

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"args": {"minutes": self.minutes}, "attributes": {"spent": 60 * self.minutes * self.share}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        known = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self.spent = known["attributes"]["spent"] if isinstance(known, dict) else 0.0
        self.since = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for group in () if optimizer is None else optimizer.param_groups:
            group["lr"] *= 1 - self.share  # the scheduler sets it anew after every step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.share >= 1:
            control.should_training_stop = True
