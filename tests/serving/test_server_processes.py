"""The command ``serve`` in a process of its own: signals, load, memory."""

from __future__ import annotations

import http.client
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from support.tiny import save_tiny
from thresher import TopK
from thresher.serving.score import Scorer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
COMMAND = [sys.executable, "-c", "from thresher.cli.app import main; main()", "serve"]
HEAD = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "topk", TopK(keep=0.6))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as made:
        return made.getsockname()[1]


def begin(*arguments: object, **environment: str) -> subprocess.Popen:
    command = [*map(str, (*COMMAND, *arguments))]
    environment = os.environ | environment
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def status(port: int, path: str = "/health") -> int:
    try:
        return ask(port, path)[0]
    except OSError:
        return 0


def ask(port: int, path: str, body: object = None, timeout: float = 120) -> tuple[int, bytes, dict]:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        client.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), HEAD)
        answer = client.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        client.close()


def predict(port: int, text: str) -> tuple[int, bytes, dict]:
    return ask(port, "/predict", {"inputs": text})


@contextmanager
def server(model: Path, *options: object):
    """A server that is ready: the process and its port."""
    port = free_port()
    process = begin(model, "--port", port, "--threads", 1, *options)
    try:
        until(lambda: process.poll() is not None or status(port) == 200)
        assert process.poll() is None, process.stderr.read()
        yield process, port
    finally:
        process.kill()
        process.communicate()


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def in_threads(calls) -> tuple[list[threading.Thread], list]:
    results: list = [None] * len(calls)

    def work(i: int) -> None:
        try:
            results[i] = calls[i]()
        except OSError as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    return threads, results


def texts(count: int) -> list[str]:
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(["wheat", "chaff", "grain"], n)) for n in draw.integers(1, 500, count)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_all_have_their_answers(model, number):
    with server(model, "--tokens", 512) as (process, port):
        given = texts(50)
        threads, answers = in_threads([lambda text=text: predict(port, text) for text in given])
        until(lambda: b'te_request_count{method="single"} 50' in ask(port, "/metrics")[1])
        process.send_signal(number)
        for thread in threads:
            thread.join(60)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in err, err
        assert [one[0] for one in answers] == [200] * 50
        best = [max(json.loads(one[1]), key=lambda row: row["score"])["label"] for one in answers]
        assert best == Scorer(model, threads=1)(given)["label"].tolist()
        assert "ready on http://127.0.0.1" in err and "50" in out
        assert status(port) == 0


def test_a_second_signal_ends_it_at_once(model):
    with server(model, "--tokens", 512) as (process, port):
        threads, _ = in_threads([lambda: ask(port, "/predict", {"inputs": [["wheat " * 500]] * 128})] * 12)
        until(lambda: b"thresher_queue_tokens 0" not in ask(port, "/metrics")[1])
        process.send_signal(signal.SIGTERM)
        until(lambda: status(port) in (503, 0))
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM and time.monotonic() - began < 5
        for thread in threads:
            thread.join(60)


def test_a_full_queue_refuses_and_recovers(model):
    with server(model, "--tokens", 512, "--queue-tokens", 4000) as (_, port):
        threads, answers = in_threads([lambda: predict(port, "wheat " * 500)] * 60)
        for thread in threads:
            thread.join(120)
        refused = [one for one in answers if one[0] == 429]
        assert refused and {one[0] for one in answers} == {200, 429}
        assert all(int(one[2]["retry-after"]) >= 1 for one in refused)
        assert all(json.loads(one[1])["error_type"] == "Overloaded" for one in refused)
        assert predict(port, "wheat")[0] == 200


def test_clients_that_leave_do_no_harm(model):
    with server(model, "--tokens", 512) as (process, port):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as client:
                body = json.dumps({"inputs": [["wheat " * 500]] * 64}).encode()
                head = "POST /predict HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
                client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                time.sleep(0.02)
        until(lambda: b"thresher_queue_tokens 0" in ask(port, "/metrics")[1])
        assert b'te_request_failure{err="disconnected"}' in ask(port, "/metrics")[1]
        assert predict(port, "wheat")[0] == 200
        process.terminate()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in err, err


def test_memory_is_flat_over_ten_thousand_requests(model):
    with server(model) as (process, port):
        given = texts(200)

        def client(count: int) -> int:
            connection, good = http.client.HTTPConnection("127.0.0.1", port, timeout=60), 0
            for i in range(count):
                connection.request("POST", "/predict", json.dumps({"inputs": given[i % 200][:300]}), HEAD)
                answer = connection.getresponse()
                good += answer.status == 200 and bool(answer.read())
            connection.close()
            return good

        def load(count: int) -> int:
            threads, answers = in_threads([lambda: client(count // 8)] * 8)
            for thread in threads:
                thread.join(300)
            assert sum(answers) == count
            return psutil.Process(process.pid).memory_info().rss

        before = load(2000)
        after = load(10_000)
        assert after - before < 10 * 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_blocks_of_memory_are_handed_back():
    code = """if True:
        import ctypes, sys
        from thresher.serving.server import steady
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
        class Info(ctypes.Structure):
            _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]
        libc.mallinfo2.restype = Info
        if sys.argv[1] == "steady":
            steady()
        libc.free(libc.malloc(20 * 2**20))  # after which 20 MB are no longer large, for a library left to itself
        before = libc.mallinfo2().hblks
        blocks = [libc.malloc(2 * 2**20) for _ in range(8)]
        print(libc.mallinfo2().hblks - before)
    """
    made = {
        how: subprocess.run(
            [sys.executable, "-c", code, how], capture_output=True, text=True, timeout=120
        ).stdout.strip()
        for how in ("steady", "alone")
    }
    assert made == {"steady": "8", "alone": "0"}


def test_what_is_wrong_is_one_line_and_code_2(model, tmp_path):
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        process = begin(model, "--port", port)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and err.startswith("error: cannot listen on 127.0.0.1 port"), err
    broken = save_tiny(tmp_path / "broken", TopK(keep=0.6))
    (broken / "model.safetensors").write_bytes(b"spoiled")
    process = begin(broken, "--port", port)
    _, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if not line.startswith("loading ")]
    assert process.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: corrupted checkpoint"), err
    process = begin(tmp_path / "nowhere")
    assert process.communicate(timeout=120)[1].startswith("error: ") and process.returncode == 2


def test_the_key_of_the_environment(model):
    port = free_port()
    process = begin(model, "--port", port, "--json", "-", THRESHER_API_KEY="secret")
    try:
        until(lambda: process.poll() is not None or status(port) == 200)
        assert predict(port, "wheat")[:2] == (401, b"")
    finally:
        process.terminate()
        out, err = process.communicate(timeout=60)
    (row,) = json.loads(out)["rows"]
    assert process.returncode == 0 and row["requests"] == 0 and row["finished"] is True and "secret" not in err
