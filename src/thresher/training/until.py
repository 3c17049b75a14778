"""Train until it is trained: at a constant rate until the loss on held-out rows stops falling, then down to zero."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class UntilTrained(TrainerCallback, ExportableState):
    """End a training where the loss on held-out rows, ``eval_loss``, no longer falls.

    The rate stays as it is until ``patience`` evaluations in a row have not brought the loss down by a share ``least``
    of itself. Then it falls on a straight line to zero over ``cooldown`` times the steps so far, and the training ends.
    The steps that the Trainer was given are a ceiling: the rate has fallen by then. Its schedule must be constant.
    A resumed training goes on as it would have.

    Args:
        patience: evaluations without a lower loss.
        cooldown: length of the end, as a share of the steps before it.
        least: of the loss, so much lower counts as lower.
        after: the first step whose evaluation counts; before it a method may still be soft.
    """

    def __init__(self, patience: int = 2, cooldown: float = 0.3, least: float = 0.005, after: int = 0):
        self.patience, self.cooldown, self.least, self.after = patience, cooldown, least, after
        self.best, self.stale, self.begun, self.ceiling, self.latest = math.inf, 0, 0, 0, 0

    def state(self) -> dict:
        """What a checkpoint keeps."""
        names = ("patience", "cooldown", "least", "after"), ("best", "stale", "begun")
        args, attributes = ({name: getattr(self, name) for name in some} for some in names)
        return {"args": args, "attributes": attributes}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        known = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if isinstance(known, dict):  # of the checkpoint that the training goes on from
            vars(self).update(known["attributes"])
        self.ceiling = state.max_steps
        self.latest = max(1, math.floor(self.ceiling / (1 + self.cooldown)))
        if self.begun:
            state.max_steps = self.end

    @property
    def end(self) -> int:
        """The last step, once the rate falls."""
        return min(self.ceiling, self.begun + max(1, math.ceil(self.begun * self.cooldown)))

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if not self.begun and state.global_step >= self.latest:
            self.begin(state)
        if self.begun and optimizer is not None:
            share = (self.end - state.global_step) / max(1, self.end - self.begun)
            for group in optimizer.param_groups:
                group["lr"] *= min(1.0, max(0.0, share))  # the scheduler sets it anew after every step

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict | None = None, **kwargs: Any) -> None:
        loss = (metrics or {}).get("eval_loss")
        if loss is None or self.begun or state.global_step < self.after:
            return
        if loss < self.best * (1 - self.least):
            self.best, self.stale = loss, 0
        else:
            self.best, self.stale = min(self.best, loss), self.stale + 1
        if self.stale >= self.patience:
            self.begin(state)

    def begin(self, state: Any) -> None:
        """Let the rate fall from here on."""
        self.begun = max(1, state.global_step)
        state.max_steps = self.end
