"""A service in this process, and a client of it."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from pathlib import Path

from starlette.testclient import TestClient

from thresher.serving.engine import Opening
from thresher.serving.server import application
from thresher.serving.service import Limits, Service


@contextmanager
def serving(model: Path, api_key: str | None = None, name: str | None = None, **limits):
    """A client of a model that is ready; ``client.service`` is behind it."""
    service, ready = Service(Opening(str(model), threads=1), Limits(**{"wait_ms": 0} | limits), name), threading.Event()
    service.start(ready.set)
    try:
        assert ready.wait(60)
        if service.error is not None:
            raise service.error
        with TestClient(application(service, api_key)) as client:
            client.service = service
            yield client
    finally:
        service.close()


def asked(client, path: str, body, status: int = 200):
    """The JSON of an answer."""
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def in_threads(calls):
    """Start calls, each in a thread; their results, when they are joined."""
    results = [None] * len(calls)

    def work(i):
        results[i] = calls[i]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    return threads, results
