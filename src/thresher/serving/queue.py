"""Rows of many requests through one model: the oldest first, with its neighbours in length, in one thread.

The length of the queue is bounded in tokens: what does not fit is refused at once, and told when to come again.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .batching import ROWS, Batcher
from .engine import Row, Tally

Run = Callable[[Sequence[Row]], tuple[np.ndarray, Tally, np.ndarray | None]]  # see Engine.run
SMOOTHING = 0.1  # weight of the last batch in the tokens a second


class Full(Exception):
    """Say that the queue takes no more; ``wait`` is in how many seconds it should."""

    def __init__(self, wait: int):
        super().__init__(f"the queue is full for about {wait} s")
        self.wait = wait


class Stopped(Exception):
    """Say that the queue was stopped before these rows had their turn."""


@dataclass(eq=False)
class Call:
    """Hold the rows of one request.

    Attributes:
        future: gets the values (n, K) fp32, or the error of the model.
        dropped: nobody waits for the rest; rows that have not had their turn are passed by.
        kept: tokens behind the last layer, of all rows; None where the model does not tell.
        since: when its rows began to wait.
        waited, ran: seconds in the queue and in the model, the sum over the rows.
    """

    rows: list[Row] = field(default_factory=list)
    future: Future = field(default_factory=Future)
    dropped: bool = False
    kept: int | None = 0
    waited: float = 0.0
    ran: float = 0.0
    values: list[Any] = field(default_factory=list)
    left: int = 0
    since: float = 0.0

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # nobody cancels it: its result is set once

    @property
    def tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(len(row["input_ids"]) for row in self.rows)

    def fail(self, error: BaseException) -> None:
        """Give the request an error in place of an answer."""
        self.dropped = True
        with suppress(InvalidStateError):  # it has its answer
            self.future.set_exception(error)


class Queue:
    """Run rows through a model in a thread of its own.

    Args:
        run: the model, of one batch.
        tokens: padded tokens of a batch.
        limit: tokens that may wait; a request that finds nobody waiting may have more.
        wait: seconds that the first batch after a pause waits for company.
        told: hears of every batch: its texts, its tokens alone and padded, how many are kept (None: nobody knows).

    ``start`` begins the thread, with something to do before the first batch: to open the model.
    """

    def __init__(
        self,
        run: Run,
        *,
        tokens: int,
        limit: int,
        wait: float = 0.0,
        told: Callable[[int, int, int, int | None], Any] = lambda *_: None,
    ):
        self._run, self._limit, self._wait, self._told = run, limit, wait, told
        self._waiting, self._tokens = Batcher(tokens, ROWS), tokens
        self._claimed, self._queued, self._rate = 0, 0, 0.0
        self._change = threading.Condition()
        self._open = True
        self._thread: threading.Thread | None = None

    def start(self, first: Callable[[], bool] = lambda: True) -> None:
        """Begin; ``first`` is called in the thread, which ends if it returns False."""
        self._thread = threading.Thread(target=self._work, args=(first,), name="thresher-model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def size(self) -> int:
        """Rows that wait."""
        return len(self._waiting)

    @property
    def queued(self) -> int:
        """Tokens that wait, and those that are being made."""
        return self._queued + self._claimed

    @contextmanager
    def place(self, tokens: int) -> Iterator[None]:
        """Hold a place for about so many tokens while they are made; within it ``add`` is not refused.

        Raises:
            Full: there are too many tokens in the queue.
            Stopped: it takes no more.
        """
        with self._change:
            if not self._open:
                raise Stopped
            if self.queued and self.queued + tokens > self._limit:
                raise Full(self.patience())
            self._claimed += tokens
        try:
            yield
        finally:
            with self._change:
                self._claimed -= tokens

    def patience(self) -> int:
        """Seconds until what waits now will have been answered, 1 at least."""
        return max(1, math.ceil(self.queued / self._rate)) if self._rate else 1

    def add(self, call: Call) -> None:
        """Let the rows of a request wait; those of one that was dropped do not."""
        with self._change:
            if call.dropped:
                return
            if not self._open:
                call.fail(Stopped())
                return
            call.values, call.left, call.since = [None] * len(call.rows), len(call.rows), time.perf_counter()
            for number, row in enumerate(call.rows):
                length = len(row["input_ids"])
                self._waiting.add((call, number), length)
                self._queued += length
            self._change.notify()

    def stop(self, *, now: bool = False) -> None:
        """Take no more, and end when the rest is answered; ``now``: the rest gets ``Stopped``."""
        with self._change:
            self._open = False
            while now and len(self._waiting):
                for call, _ in self._waiting.take():
                    call.fail(Stopped())
            self._queued = 0 if now else self._queued
            self._change.notify()

    def join(self, seconds: float | None = None) -> None:
        """Wait for the thread to end."""
        if self._thread is not None:
            self._thread.join(seconds)

    # --- in the thread of the model ---------------------------------------------------------------------------------
    def _work(self, first: Callable[[], bool]) -> None:
        if not first():
            return
        while batch := self._next():
            began = time.perf_counter()
            self._answer(batch)
            spent, tokens = time.perf_counter() - began, sum(_length(one) for one in batch)
            rate = tokens / max(spent, 1e-9)
            self._rate = rate if not self._rate else (1 - SMOOTHING) * self._rate + SMOOTHING * rate

    def _next(self) -> list[tuple[Call, int]]:
        """The rows of the next batch; none at the end."""
        while True:
            with self._change:
                if not len(self._waiting) and self._open:
                    while not len(self._waiting) and self._open:
                        self._change.wait()
                    if self._wait and self._open:
                        self._change.wait_for(lambda: not self._open or self._queued >= self._tokens, self._wait)
                if not len(self._waiting):
                    if self._open:
                        continue
                    return []
                taken = self._waiting.take()
                self._queued -= sum(_length(one) for one in taken)
            batch = [(call, number) for call, number in taken if not call.dropped]
            if batch:
                return batch

    def _answer(self, batch: list[tuple[Call, int]]) -> None:
        """Run a batch and hand its answers out. Of a batch that fails each row is tried alone."""
        began = time.perf_counter()
        try:
            values, spent, kept = self._run([call.rows[number] for call, number in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][0].fail(error)
            else:
                for one in batch:
                    if not one[0].dropped:
                        self._answer([one])
            return
        seconds = time.perf_counter() - began
        self._told(len(batch), spent.tokens, spent.padded, None if kept is None else int(kept.sum()))
        for i, (call, number) in enumerate(batch):
            call.values[number] = values[i]
            call.kept = None if kept is None or call.kept is None else call.kept + int(kept[i])
            call.waited, call.ran = call.waited + began - call.since, call.ran + seconds
            call.left -= 1
            if not call.left and not call.dropped:
                with suppress(InvalidStateError):  # stopped at this moment
                    call.future.set_result(np.stack(call.values))


def _length(one: tuple[Call, int]) -> int:
    return len(one[0].rows[one[1]]["input_ids"])
