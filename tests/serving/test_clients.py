"""Real clients against real servers: each gets the numbers of the model.

They ask for other versions than Thresher, so they have an environment of their own: the folder THRESHER_CLIENTS, else
``thresher/clients`` in the user's cache, which is made where it is missing (300 MB from the package index).
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from support.embedders import save_embedder
from support.environments import python_of
from support.tiny import save_tiny
from thresher import TopK
from thresher.serving.score import Scorer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "clients.py"
sys.path.insert(0, str(SCRIPT.parent))

from clients import CLIENTS, QUERY, TEXTS  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
PACKAGES = [
    *("huggingface_hub", "openai", "cohere", "litellm", "langchain-openai", "huggingface-api-haystack"),
    *("llama-index-embeddings-text-embeddings-inference", "llama-index-postprocessor-tei-rerank"),
]
SERVE = [sys.executable, "-c", "from thresher.cli.app import main; main()", "serve"]


@pytest.fixture(scope="module")
def python() -> Path:
    """The python of the clients."""
    return python_of("THRESHER_CLIENTS", "clients", PACKAGES)


@contextmanager
def server(model: Path):
    """The address of a server that is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([*map(str, (*SERVE, model, "--port", port, "--threads", 1, "--quiet"))])
    try:
        end = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Addresses of a classifier, a reranker and an embedder, and what clients are to get of them."""
    folder = tmp_path_factory.mktemp("models")
    labels = {"num_labels": 3, "id2label": {0: "bad", 1: "fair", 2: "good"}}
    models = (
        save_tiny(folder / "classifier", TopK(keep=0.6), **labels),
        save_tiny(folder / "reranker", TopK(keep=0.6), num_labels=1),
        save_embedder(folder / "embedder", TopK(keep=0.6, at=(1,))),
    )
    first, second, third = (Scorer(model, threads=1) for model in models)
    columns, vectors = first(TEXTS[:1]), third(TEXTS)["embedding"]
    scores = second([(QUERY, text) for text in TEXTS])["score"]
    expected = {
        "labels": {name: columns[f"probability_{name}"][0] for name in ("bad", "fair", "good")},
        "scores": dict(zip(TEXTS, scores, strict=True)),
        "vectors": vectors,
        "cosines": vectors @ vectors[0],
    }
    with ExitStack() as stack:
        yield [stack.enter_context(server(model)) for model in models], expected


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_gets_the_numbers_of_the_model(python, served, client):
    addresses, expected = served
    done = subprocess.run([python, SCRIPT, *addresses, client], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got.pop("client") == client and got and {*got} <= {*expected}
    for name in {*got} & {"labels", "scores"}:
        assert len(got[name]) >= (1 if name == "labels" else 2)
        assert all(abs(value - expected[name][key]) < 1e-4 for key, value in got[name].items()), got[name]
    for name in {*got} & {"vectors", "cosines"}:
        found = np.array(got[name])
        assert np.abs(found - expected[name][: len(found)]).max() < 1e-4
