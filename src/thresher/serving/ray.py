"""Shards in the actors of a Ray cluster; ``ray`` is imported here alone, and only when it is asked for.

What is a file here has to be one on every node, under the same path: the model, the texts, the result.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from .engine import Tally
from .workers import Work, Worker, understood

LOCAL = "local"  # the address of a cluster of this machine alone, that lives as long as the call
TRIES = 3  # more times that a shard is begun whose actor was killed
PATIENCE = 60.0  # seconds until it is said that no actor has started
SECONDS = 10.0  # in which a cluster has to answer
STORE = 200 << 20  # bytes of memory for objects in a cluster of our own: there are only numbers of shards


def make(
    work: Work,
    shards: Iterable[int],
    workers: int,
    opened: Callable[[], Any],
    told: Callable[[int], Any],
    address: str,
) -> Tally:
    """Make shards in so many actors; see ``workers.make``. A killed actor costs its shard, which is begun anew in
    another process, on another node where its own is gone.

    Args:
        address: "local"; "auto", the cluster that runs here; or where one is, as ``ray.init`` takes it.

    Raises:
        ValueError: there is no cluster.
        ImportError: ray is not installed.
        ChildProcessError: an actor cannot start, or a shard was begun ``TRIES`` times more and its actor was killed
            every time.
    """
    ray = _imported()
    todo, total, first = deque(shards), Tally(), True
    left, work = len(todo), _everywhere(work)
    workers = min(workers, left)
    with _actors(ray, address, workers, work) as actors:
        waiting: dict[Any, Any] = {actor.open.remote(): actor for actor in actors}
        while left:
            heard, _ = ray.wait([*waiting], timeout=PATIENCE if first else None)
            if not heard:
                warnings.warn("no actor has started yet: has the cluster as many free CPUs as --threads?", stacklevel=2)
                heard, _ = ray.wait([*waiting])
            actor = waiting.pop(heard[0])
            said, value = _heard(ray, heard[0])
            if said == "done":
                total, left = total + value, left - 1
                told(value.rows)
            elif first:  # the first one that has opened the model
                for message in value:
                    warnings.warn(message, stacklevel=2)
                first = False
                opened()
            if todo:
                waiting[actor.make.remote(todo.popleft())] = actor
    return total


def _imported() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"scoring on a Ray cluster needs pip install 'thresher-pruning[ray]': {error}") from None
    return ray


def _everywhere(work: Work) -> Work:
    """The same work with absolute paths: an actor has another working directory."""
    sources = tuple(replace(source, path=os.path.abspath(source.path)) for source in work.plan.sources)
    model = os.path.abspath(work.scorer.model) if Path(work.scorer.model).is_dir() else work.scorer.model
    return Work(replace(work.plan, sources=sources), replace(work.scorer, model=model), Path(os.path.abspath(work.out)))


@contextmanager
def _actors(ray: Any, address: str, count: int, work: Work) -> Iterator[list[Any]]:
    """Actors of a cluster, to which this process connects unless it already is; they end with the context."""
    ours, threads = not ray.is_initialized(), work.scorer.threads or 1
    if ours:
        own = {"num_cpus": count * threads, "include_dashboard": False, "object_store_memory": STORE}
        _connect(ray, address, own if address == LOCAL else {})
    needs = {"num_cpus": threads, "num_gpus": int(work.scorer.device.startswith("cuda"))}
    kind = ray.remote(**needs, max_restarts=-1, max_task_retries=TRIES)(Worker)
    actors = [kind.remote(work) for _ in range(count)]
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str, own: dict[str, Any]) -> None:
    """Connect to a cluster, or start one. Raises ValueError where there is none."""
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal() and "/" not in host:  # ray itself would try for minutes, and end the process
            socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, RuntimeError, ValueError, OverflowError, SystemExit) as error:
        why = "" if isinstance(error, SystemExit) else next(iter(str(error).strip().splitlines()), "")
        said = f"there is no Ray cluster ({why or 'no answer'}): start one, or say --ray {LOCAL}"
        raise ValueError(f"ray={address}: {said}") from None


def _heard(ray: Any, reference: Any) -> tuple[str, Any]:
    """What an actor says; raises what it caught."""
    try:
        said = ray.get(reference)
    except ray.exceptions.RayError as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ChildProcessError(
            f"an actor was lost and could not be replaced ({line}): perhaps its node lacks memory (fewer --workers or "
            "--tokens) or Thresher; run the same command again, finished shards stay"
        ) from None
    return understood(said)
