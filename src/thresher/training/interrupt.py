"""Ctrl-C during a training: finish the step, save, stop."""

from __future__ import annotations

import signal
from contextlib import suppress

from transformers import TrainerCallback


class Interrupt(TrainerCallback):
    """Finish the step at Ctrl-C, save a checkpoint and stop, within the context; a second Ctrl-C stops at once."""

    def __init__(self):
        self.asked = False
        self.handler = None  # of the signal, before this one

    def __enter__(self):
        with suppress(ValueError):  # not the main thread, which alone gets signals
            self.handler = signal.signal(signal.SIGINT, self._ask)

    def __exit__(self, *_):
        if self.handler is not None:
            signal.signal(signal.SIGINT, self.handler)

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            control.should_save = control.should_training_stop = True
