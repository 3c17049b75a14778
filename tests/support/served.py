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
