"""The server under load: what waits, what is refused, and how it ends."""

from __future__ import annotations

import threading
import time

import pytest

from support.served import asked, in_threads, serving
from support.tiny import save_tiny
from thresher import TopK


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "classifier", TopK(keep=0.6))


class Gate:
    """Holds a model before a batch until it may go on."""

    def __init__(self, service):
        self.run, self.open, self.waits = service.engine.run, threading.Event(), threading.Event()
        service.engine.run = self

    def __call__(self, rows):
        self.waits.set()
        assert self.open.wait(30)
        return self.run(rows)


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_full_queue_is_429_for_texts_and_batches_alike_and_recovers(model):
    with serving(model, queue_tokens=40) as client:
        gate = Gate(client.service)
        first, _ = in_threads([lambda: client.post("/predict", json={"inputs": "the wheat"})])
        assert gate.waits.wait(30)
        rest, answers = in_threads([lambda: client.post("/predict", json={"inputs": [["the wheat " * 9]] * 2})])
        until(lambda: client.service.queue.size == 2)
        for body in ({"inputs": "the wheat"}, {"inputs": [["the wheat"]] * 2}):
            refused = client.post("/predict", json=body)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json() == {"error": "Model is overloaded", "error_type": "Overloaded"}
        assert 'te_request_failure{err="overloaded"} 2' in client.get("/metrics").text
        gate.open.set()
        for thread in (*first, *rest):
            thread.join(30)
        assert answers[0].status_code == 200
        asked(client, "/predict", {"inputs": "the wheat"})


def test_too_many_requests_at_a_time_are_429(model):
    with serving(model, requests=1) as client:
        gate = Gate(client.service)
        threads, answers = in_threads([lambda: client.post("/predict", json={"inputs": "the wheat"})])
        assert gate.waits.wait(30)
        assert client.post("/predict", json={"inputs": "a"}).status_code == 429
        gate.open.set()
        threads[0].join(30)
        assert answers[0].status_code == 200


def test_nobody_is_let_in_before_and_after(model):
    with serving(model) as client:
        service = client.service
        for state in ("loading", "stopping"):
            service.state = state
            assert client.get("/health").status_code == client.get("/info").status_code == 503
            assert client.get("/health").json() == {"error": "unhealthy", "error_type": "Unhealthy"}
            assert asked(client, "/predict", {"inputs": "a"}, 503)["error_type"] == "Unhealthy"
        service.state = "ready"
        gate = Gate(service)
        calls = [lambda: client.post("/predict", json={"inputs": "the wheat"})]
        first, answer = in_threads(calls)
        assert gate.waits.wait(30)
        threads, answers = in_threads(calls * 4)
        until(lambda: service.active == 5 and service.queue.size == 4)
        stopped, finished = in_threads([lambda: client.portal.call(service.stop, 30.0)])
        until(lambda: service.state == "stopping")
        assert client.get("/health").status_code == 503
        assert asked(client, "/predict", {"inputs": "a"}, 503)["error_type"] == "Unhealthy"
        gate.open.set()
        for thread in (*first, *threads, *stopped):
            thread.join(30)
        assert [one.status_code for one in answer + answers] == [200] * 5 and finished == [True]
        assert not service.queue.alive


def test_what_has_no_answer_in_time_is_told_so(model):
    with serving(model) as client:
        gate = Gate(client.service)
        calls = [lambda: client.post("/predict", json={"inputs": "the wheat"})]
        first, answer = in_threads(calls)
        assert gate.waits.wait(30)
        threads, answers = in_threads(calls)
        until(lambda: client.service.queue.size == 1)
        stopped, finished = in_threads([lambda: client.portal.call(client.service.stop, 0.1)])
        until(lambda: client.service.active == 1)
        gate.open.set()
        for thread in (*first, *threads, *stopped):
            thread.join(30)
        assert (answer[0].status_code, answers[0].status_code) == (200, 503) and finished == [False]


def test_an_error_of_the_model_is_424_and_not_the_end(model):
    with serving(model) as client:
        run = client.service.engine.run

        def fails(rows):
            raise RuntimeError("out of memory\nand more")

        client.service.engine.run = fails
        refused = asked(client, "/predict", {"inputs": "a"}, 424)
        assert refused == {"error": "Backend error: out of memory", "error_type": "Backend"}
        client.service.engine.run = run
        asked(client, "/predict", {"inputs": "a"})
