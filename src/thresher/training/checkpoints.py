"""Resume a training exactly: which checkpoint is whole, and in which order the batches come."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from transformers import TrainerCallback

from ..core.compat import TRAINER_STATE


class Order(TrainerCallback):
    """Seed the random numbers of each epoch by its number, so that the order of its batches can be drawn again.

    A resumed Trainer skips the batches that the interrupted epoch has seen, but draws the order of batches grouped by
    length from the random numbers as they stand: some rows would come twice and some not at all.
    """

    def on_epoch_begin(self, args, state, control, **kwargs):
        torch.manual_seed(args.seed + int(state.epoch or 0))

    def on_epoch_end(self, args, state, control, **kwargs):
        if not control.should_training_stop:  # the state that is saved now; the next epoch begins with it
            self.on_epoch_begin(args, state, control)


def step_of(checkpoint: Path) -> int:
    """Read the number of steps off the name of a checkpoint."""
    return int(checkpoint.name.split("-")[1])


def last_checkpoint(folder: Path) -> Path | None:
    """Find the newest complete checkpoint, and remove those that were cut off while they were written."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        with suppress(OSError, ValueError):
            json.loads((checkpoint / TRAINER_STATE).read_text())  # the Trainer writes it last
            return checkpoint
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None
