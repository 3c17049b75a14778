"""Shards in processes on this machine; a worker ends as soon as the process that started it does."""

from __future__ import annotations

import os
import signal
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from .engine import Tally
from .plan import Plan
from .score import Scorer
from .shards import make_shard

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
MISTAKES = {"ValueError": ValueError, "OSError": OSError, "ImportError": ImportError}


@dataclass(frozen=True)
class Work:
    """Name what every worker needs: the plan, the unopened scorer, the folder of the result."""

    plan: Plan
    scorer: Scorer
    out: Path


class Worker:
    """Make shards in a process of their own, here or elsewhere. What it says is "ready" and the warnings of the model,
    "done" and a tally, or "error" with a kind and a line; ``understood`` takes it in."""

    def __init__(self, work: Work):
        self.work = work
        if work.scorer.threads:
            os.environ.update(dict.fromkeys(THREADS, str(work.scorer.threads)))

    def open(self) -> tuple[str, Any]:
        """Open the model."""
        try:
            with warnings.catch_warnings(record=True) as caught:
                self.work.scorer.open()
        except Exception as error:
            return _mistake(error)
        ours = str(Path(__file__).parents[1])
        return "ready", [str(one.message) for one in caught if one.filename.startswith(ours)]

    def make(self, shard: int, told: Callable[[int], Any] | None = None) -> tuple[str, Any]:
        """Make a shard, with the model that is open or is opened now."""
        try:
            return "done", make_shard(self.work.plan, shard, self.work.scorer, self.work.out, told)
        except Exception as error:
            return _mistake(error)


def _mistake(error: Exception) -> tuple[str, Any]:
    """What a worker says of an error: a line where the call is wrong, else where in the code it was."""
    name = next((name for name, kind in MISTAKES.items() if isinstance(error, kind)), "")
    name = "" if isinstance(error, ImportError) and error.name else name  # a fault, see the command line
    message = str(error) if name else "".join(traceback.format_exception(error))
    return "error", (name, message)


def understood(said: tuple[str, Any]) -> tuple[str, Any]:
    """What a worker says; raises what it caught."""
    kind, value = said
    if kind == "error":
        name, message = value
        raise MISTAKES.get(name, RuntimeError)(message)
    return kind, value


def make(
    work: Work, shards: Iterable[int], workers: int, opened: Callable[[], Any], told: Callable[[int], Any]
) -> Tally:
    """Make shards, in this process or in several; returns what they took.

    Args:
        opened: called once, when the model has been opened and before anything is written.
        told: hears how many more rows are done.

    Raises:
        ValueError, OSError, ImportError: as in one process; no shard is half-written.
        ChildProcessError: a worker was killed.
    """
    todo = deque(shards)
    workers, total = min(workers, len(todo)), Tally()
    if workers > 1:
        return _in_processes(work, todo, workers, opened, told)
    if todo:
        work.scorer.open()
        opened()
    for shard in todo:
        total += make_shard(work.plan, shard, work.scorer, work.out, told)
    return total


def _in_processes(
    work: Work, todo: deque[int], workers: int, opened: Callable[[], Any], told: Callable[[int], Any]
) -> Tally:
    """Hand out shards one by one, and take in what the workers say."""
    context, total, first = get_context("spawn"), Tally(), True
    processes: dict[Any, Any] = {}  # the end of a pipe: its process
    ended = []
    try:
        with _threads(work.scorer.threads):
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(work, theirs), daemon=True)
                process.start()
                theirs.close()
                processes[ours] = process
        while processes:
            heard: list[Any] = connection.wait([*processes])
            for pipe in heard:
                kind, value = _heard(pipe, processes)
                if kind == "rows":
                    told(value)
                    continue
                if kind == "done":
                    total += value
                elif first:  # the first one that has opened the model
                    for message in value:
                        warnings.warn(message, stacklevel=2)
                    first = False
                    opened()
                shard = todo.popleft() if todo else None
                with suppress(ConnectionError):  # which the end of the pipe tells again
                    pipe.send(shard)
                if shard is None:
                    ended.append(processes.pop(pipe))
        return total
    finally:
        for pipe, process in processes.items():
            pipe.close()
            process.kill()
        for process in (*processes.values(), *ended):
            process.join()


def _heard(pipe: Any, processes: dict[Any, Any]) -> tuple[str, Any]:
    """What a worker says; raises what it raised."""
    try:
        said = pipe.recv()
    except (EOFError, ConnectionError):
        process = processes[pipe]
        process.join()
        raise ChildProcessError(
            f"a worker was killed (exit code {process.exitcode}), perhaps for its memory: "
            "run the same command again with fewer --workers or --tokens; finished shards stay"
        ) from None
    return understood(said)


def _serve(work: Work, pipe: Any) -> None:
    """Make the shards whose numbers come through the pipe, until there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the whole group gets; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    worker = Worker(work)
    with suppress(BrokenPipeError, EOFError):
        pipe.send(said := worker.open())
        while said[0] != "error" and (shard := pipe.recv()) is not None:
            pipe.send(said := worker.make(shard, lambda rows: pipe.send(("rows", rows))))


def _end_with_parent() -> None:
    """Wait for the parent to end, however it does, and end with it: another run may be at work in the folder."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let processes that start within the context have so many threads in each library below."""
    before = {name: os.environ.get(name) for name in THREADS}
    if count:
        os.environ.update(dict.fromkeys(THREADS, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
