"""Real processes: killed at random times, a run ends in the bytes of one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest

from support.files import write
from support.tiny import save_tiny
from thresher import TopK
from thresher.experiments.score import score
from thresher.serving import ray
from thresher.serving.plan import PLAN, REPORT, make_plan
from thresher.serving.score import Scorer
from thresher.serving.workers import Work

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WORDS = ["the", "farmer", "wheat", "chaff", "and", "grain", "script", "thresh"]
COMMAND = [sys.executable, "-c", "from thresher.cli.app import main; main()", "score"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "topk", TopK(keep=0.6))


def texts(folder: Path, count: int) -> Path:
    draw = np.random.default_rng(0)
    rows = [{"id": i, "text": " ".join(draw.choice(WORDS, draw.integers(1, 60)))} for i in range(count)]
    return write(folder / "some.jsonl", rows)


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def started(model: Path, data: Path, out: Path, *options: object) -> subprocess.Popen:
    call = [*COMMAND, model, "--data", data, "--out", out, "--shard-rows", 100, "--quiet", *options]
    return subprocess.Popen([*map(str, call)], stderr=subprocess.PIPE, text=True)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    return [one for one in psutil.Process(process.pid).children() if "spawn_main" in " ".join(one.cmdline())]


def at_work(workers: list[psutil.Process]) -> bool:
    return any(one.is_running() and one.status() != "zombie" for one in workers)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_at_random_times_it_ends_in_the_same_bytes(model, tmp_path):
    data, out, draw = texts(tmp_path, 6000), tmp_path / "out", random.Random(0)
    score(model, data, tmp_path / "undisturbed", shard_rows=100, workers=1)
    kills, seen = 0, {}
    while not (out / REPORT).exists():
        process = started(model, data, out, "--workers", 1 + kills % 2)
        before = len([*out.glob("part-*")])
        if kills < 8:
            wait_for(lambda: process.poll() is not None or len([*out.glob("part-*")]) > before)  # noqa: B023
            time.sleep(draw.random() * 0.5)
            workers = workers_of(process) if process.poll() is None else []
            process.send_signal(signal.SIGKILL)
            kills += 1
            wait_for(lambda: not at_work(workers), 10)  # noqa: B023
        else:
            assert process.wait(300) == 0, process.stderr.read()
        process.wait()
        process.stderr.close()
        for path in out.glob("part-*"):  # a finished shard is never made again
            assert seen.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert kills >= 3
    assert content(out) == content(tmp_path / "undisturbed")


def test_a_worker_that_is_killed_is_one_line(model, tmp_path):
    data, out = texts(tmp_path, 20000), tmp_path / "out"
    process = started(model, data, out, "--workers", 2)
    wait_for((out / PLAN).exists)
    workers = workers_of(process)
    os.kill(workers[0].pid, signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and said.startswith("error: a worker was killed (exit code -9)")
    assert len(said.splitlines()) == 1 and len(workers) == 2 and not at_work(workers)


def test_an_interruption_ends_all_processes_and_says_how_to_go_on(model, tmp_path):
    data, out = texts(tmp_path, 20000), tmp_path / "out"
    process = started(model, data, out, "--workers", 2)
    wait_for((out / PLAN).exists)
    workers = workers_of(process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and said == "interrupted; run the same command again to resume\n"
    assert len(workers) == 2 and not at_work(workers) and not (out / REPORT).exists()
    assert not [*out.glob(".*.tmp")]


def test_what_is_wrong_in_a_worker_is_one_line(model, tmp_path):
    process = started(model, texts(tmp_path, 300), tmp_path / "out", "--workers", 2, "--layout", "fast")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "layout" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_workers_do_not_change_the_bytes(model, tmp_path):
    data = texts(tmp_path, 1000)
    made = [score(model, data, tmp_path / str(n), shard_rows=100, workers=n) for n in (1, 2, 3)]
    assert [one["workers"] for one in made] == [1, 2, 3]
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")
    assert json.loads((tmp_path / "3" / REPORT).read_text())["rows"] == 1000


# --- Ray -------------------------------------------------------------------------------------------------------------
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")


def actors_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes of its actors; before they begin and after they end they are called otherwise."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [one for one in below if one.is_running() and " ".join(one.cmdline()).startswith("ray::Worker")]


@pytest.fixture
def quiet_ray(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else 15, which is to wait for all others


@needs_ray
@pytest.mark.usefixtures("quiet_ray")
def test_an_actor_that_is_killed_costs_a_shard(model, tmp_path):
    data, out = texts(tmp_path, 6000), tmp_path / "out"
    score(model, data, tmp_path / "undisturbed", shard_rows=100, workers=1)
    process = started(model, data, out, "--workers", 2, "--ray", "local")
    wait_for(lambda: process.poll() is not None or [*out.glob("part-*")])
    (killed, *_) = actors = actors_of(process)
    killed.kill()
    before = len([*out.glob("part-*")])
    assert len(actors) == 2 and before < 50
    everything = psutil.Process(process.pid).children(recursive=True)
    assert process.wait(600) == 0, process.stderr.read()
    process.stderr.close()
    assert not at_work(everything)
    assert content(out) == content(tmp_path / "undisturbed")


@needs_ray
@pytest.mark.usefixtures("quiet_ray")
def test_what_is_wrong_with_a_cluster_or_in_an_actor_is_one_line(model, tmp_path):
    data, out = texts(tmp_path, 300), tmp_path / "out"
    for place, said in (("127.0.0.1:9", "there is no Ray cluster"), ("auto", "there is no Ray cluster")):
        process = started(model, data, out, "--workers", 2, "--ray", place)
        told = process.communicate(timeout=300)[1]
        assert process.returncode == 2 and said in told and len(told.splitlines()) == 1
    process = started(model, data, out, "--workers", 2, "--ray", "local", "--layout", "fast")
    told = process.communicate(timeout=300)[1]
    assert process.returncode == 2 and "layout" in told and len(told.splitlines()) == 1
    assert not out.exists()


@needs_ray
@pytest.mark.usefixtures("quiet_ray")
def test_a_shard_that_kills_every_actor_ends_the_run(model, tmp_path):
    class Deadly(Scorer):
        def score(self, texts, told=None):
            os._exit(1)

    data, out = texts(tmp_path, 100), tmp_path / "out"
    plan = make_plan([str(data)], out, "", {"text": ["text"], "keep": [], "shard_rows": 100})
    out.mkdir()
    with pytest.raises(ChildProcessError, match="could not be replaced"):
        ray.make(Work(plan, Deadly(str(model), threads=1), out), [0], 1, lambda: None, lambda rows: None, "local")
    assert not [*out.iterdir()]
