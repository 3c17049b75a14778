"""The queue: every row once, the oldest next, tokens bounded, and errors of one row stay with it."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from thresher.serving.engine import Tally
from thresher.serving.queue import Call, Full, Queue, Stopped


def row(length: int, value: int = 1) -> dict[str, np.ndarray]:
    return {"input_ids": np.full(length, value, np.int32)}


class Model:
    """Answers the sum of the tokens of a row; waits for a signal, counts its batches, fails on token 13."""

    def __init__(self):
        self.go, self.batches = threading.Event(), []
        self.go.set()

    def __call__(self, rows):
        assert self.go.wait(20)
        lengths = [len(one["input_ids"]) for one in rows]
        self.batches.append(lengths)
        if any(13 in one["input_ids"] for one in rows):
            raise RuntimeError("token 13")
        sums = np.array([[one["input_ids"].sum()] for one in rows], np.float32)
        return sums, Tally(tokens=sum(lengths), padded=max(lengths) * len(rows)), np.array(lengths) // 2


@pytest.fixture
def made():
    queues = []

    def make(model, **options) -> Queue:
        queues.append(Queue(model, **{"tokens": 64, "limit": 1000} | options))
        queues[-1].start()
        return queues[-1]

    yield make
    for queue in queues:
        queue.stop(now=True)
        queue.join(10)
        assert not queue.alive


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def held(queue: Queue, model: Model) -> Call:
    """Let the model begin with one row, so that what comes next has to wait."""
    model.go.clear()
    first = Call([row(1)])
    queue.add(first)
    until(lambda: queue.size == 0)
    return first


def test_every_row_is_answered_once_and_in_its_place(made):
    model, draw = Model(), np.random.default_rng(0)
    queue = made(model, limit=10**9)
    calls = [Call([row(int(n), int(n)) for n in draw.integers(1, 12, 5)]) for _ in range(200)]
    threads = [threading.Thread(target=lambda part=calls[i::4]: [queue.add(one) for one in part]) for i in range(4)]
    for thread in threads:
        thread.start()
    for call in calls:
        expected = [[float(one["input_ids"].sum())] for one in call.rows]
        assert call.future.result(20).tolist() == expected
        assert call.kept == sum(len(one["input_ids"]) // 2 for one in call.rows) and call.ran >= 0 <= call.waited
    for thread in threads:
        thread.join()
    assert sum(map(len, model.batches)) == 1000 and queue.queued == queue.size == 0
    assert all(max(lengths) * len(lengths) <= 64 for lengths in model.batches)


def test_a_long_row_does_not_starve_beside_short_ones(made):
    model = Model()
    queue = made(model, limit=10**9)
    held(queue, model)
    for _ in range(100):
        queue.add(Call([row(4)]))
    long = Call([row(60)])
    queue.add(long)
    for _ in range(400):
        queue.add(Call([row(4)]))
    model.go.set()
    long.future.result(20)
    assert model.batches.index([60]) <= 1 + 100 / 16 + 1


def test_what_does_not_fit_is_refused_and_told_when(made):
    model = Model()
    queue = made(model, limit=100)
    first = held(queue, model)
    with queue.place(5000):  # nobody waits: it may
        pass
    waiting = Call([row(30), row(30)])
    with queue.place(60):
        assert queue.queued == 60
        queue.add(waiting)
    assert queue.queued == 60
    with queue.place(40):
        assert queue.queued == 100
        with pytest.raises(Full) as refused, queue.place(1):
            pass
    assert refused.value.wait >= 1
    queue._rate = 20.0  # tokens a second
    with pytest.raises(Full) as refused, queue.place(41):
        pass
    assert refused.value.wait == 3
    model.go.set()
    assert first.future.result(20).tolist() == [[1.0]] and waiting.future.result(20).tolist() == [[30.0], [30.0]]
    with queue.place(100):  # it recovers
        pass


def test_rows_that_nobody_waits_for_are_passed_by(made):
    model = Model()
    queue = made(model)
    held(queue, model)
    gone, stays, never = Call([row(7)]), Call([row(9)]), Call([row(5)], dropped=True)
    for call in (gone, stays, never):
        queue.add(call)
    gone.dropped = True
    model.go.set()
    assert stays.future.result(20).tolist() == [[9.0]]
    assert model.batches == [[1], [9]] and not gone.future.done() and queue.queued == 0


def test_a_row_that_fails_does_not_take_others_with_it(made):
    model = Model()
    queue = made(model)
    held(queue, model)
    good, bad, both = Call([row(5)]), Call([row(5, 13)]), Call([row(5, 13), row(5)])
    for call in (good, bad, both):
        queue.add(call)
    model.go.set()
    assert good.future.result(20).tolist() == [[5.0]]
    for call in (bad, both):
        with pytest.raises(RuntimeError, match="token 13"):
            call.future.result(20)
    again = Call([row(3)])
    queue.add(again)
    assert again.future.result(20).tolist() == [[3.0]]


def test_it_ends_when_the_rest_is_answered_or_at_once(made):
    model = Model()
    queue = made(model)
    held(queue, model)
    rest = Call([row(8)])
    queue.add(rest)
    queue.stop()
    late = Call([row(8)])
    queue.add(late)
    with pytest.raises(Stopped):
        late.future.result(20)
    with pytest.raises(Stopped), queue.place(1):
        pass
    model.go.set()
    assert rest.future.result(20).tolist() == [[8.0]]
    queue.join(20)
    assert not queue.alive

    model = Model()
    queue = made(model)
    first = held(queue, model)
    rest = Call([row(8)])
    queue.add(rest)
    queue.stop(now=True)
    with pytest.raises(Stopped):
        rest.future.result(20)
    model.go.set()
    assert first.future.result(20).tolist() == [[1.0]]  # which was in the model already


def test_the_first_row_after_a_pause_waits_for_company(made):
    model = Model()
    queue = made(model, wait=0.3)
    first, second = Call([row(5)]), Call([row(5)])
    queue.add(first)
    time.sleep(0.05)
    queue.add(second)
    second.future.result(20)
    assert model.batches == [[5, 5]]


def test_what_comes_first_can_fail():
    queue = Queue(Model(), tokens=64, limit=100)
    queue.start(lambda: False)
    queue.join(20)
    assert not queue.alive
