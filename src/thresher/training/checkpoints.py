"""Training that is interrupted and goes on where it was, as if nothing had been."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME


class Interrupt(TrainerCallback):
    """Within the context Ctrl-C finishes the step, saves a checkpoint and stops; a second Ctrl-C stops at once."""

    def __init__(self):
        self.asked, self.before = False, None

    def __enter__(self):
        with suppress(ValueError):  # not the main thread, which alone gets signals
            self.before = signal.signal(signal.SIGINT, self._ask)

    def __exit__(self, *_):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            control.should_save = control.should_training_stop = True


class Order(TrainerCallback):
    """The order of an epoch's batches follows from its number.

    The Trainer skips the batches that an interrupted epoch has seen, but draws the order of batches grouped by length
    from wherever the random numbers stand: some rows would come twice and some not at all.
    """

    def on_epoch_begin(self, args, state, control, **kwargs):
        torch.manual_seed(args.seed + int(state.epoch or 0))

    def on_epoch_end(self, args, state, control, **kwargs):
        if not control.should_training_stop:  # the state that is saved now; the next epoch begins with it
            self.on_epoch_begin(args, state, control)


def step_of(checkpoint: Path) -> int:
    """Steps that had been made when a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; one that was cut off while it was written is removed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        with suppress(OSError, ValueError):
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text())  # the Trainer writes it last
            return checkpoint
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


@contextmanager
def writing(folder: Path):
    """Say where writing failed: libraries name neither the file nor, in torch.save, the reason."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        told = isinstance(error, OSError) and error.filename is not None
        if told or (isinstance(error, RuntimeError) and "inline_container" not in str(error)):
            raise
        raise OSError(f"cannot write in {folder}, is the disk full? ({str(error).splitlines()[0]})") from error
