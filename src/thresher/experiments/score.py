"""Score any number of files: a plan, shards that are made once, a report."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..evaluation.rows import whole, writing
from ..serving import ray as on_ray
from ..serving import workers as here
from ..serving.engine import Tally, outline
from ..serving.inputs import columns_of, find_files
from ..serving.plan import PLAN, REPORT, Plan, differences, files_digest, make_plan, same_files
from ..serving.score import Scorer, names_of
from ..serving.shards import made, settle
from ..serving.workers import Work
from .spec import ScoreSpec, job, log, remembered

MOST = 8  # processes, where nobody says


@job(ScoreSpec)
def score(spec: ScoreSpec, *, progress: Callable[[str, int, int | None], Any] | None = None) -> dict[str, Any]:
    """Score the rows of all files into ``out``, one file a shard; returns what was done.

    A shard is written aside and renamed, and is never made again: the same call goes on where an earlier one ended,
    however it ended. The bytes do not depend on workers, interruptions or their order.

    Raises:
        ValueError: a file cannot be read, has changed or lacks a column; ``out`` holds something else, or the result of
            another model, other files or options; no such model, or one that does not classify.
        OSError: the result cannot be written.
    """
    tell = progress or (lambda what, done, total: None)
    began = time.perf_counter()
    plan, fresh = planned(spec, tell)
    told = [None if fresh else made(plan, shard, spec.out) for shard in range(plan.shards)]
    todo = [shard for shard, tally in enumerate(told) if tally is None]
    before = sum((tally for tally in told if tally is not None), Tally())
    if before.rows:
        log.info("%d of %d shards are there already", plan.shards - len(todo), plan.shards)
    scorer, workers, done, started = scorer_of(spec, plan), spec.workers or usual_workers(), before.rows, began

    def more(rows: int) -> None:
        nonlocal done
        done += rows
        tell("scoring", done, plan.rows)

    with claimed(spec.out) as claim:

        def opened() -> None:
            nonlocal started
            started = time.perf_counter()
            claim()
            clear(spec.out, everything=fresh)
            if fresh:
                write(spec.out / PLAN, plan.to_json())
            tell("scoring", done, plan.rows)

        if not todo and not (spec.out / REPORT).exists():
            opened()
        work = Work(plan, scorer, spec.out)
        if spec.ray and todo:
            now = on_ray.make(work, todo, workers, opened, more, spec.ray)
        else:
            now = here.make(work, todo, workers, opened, more)
        seconds = time.perf_counter() - started
        total = before + now
        if todo or not (spec.out / REPORT).exists():
            write(spec.out / REPORT, json.dumps(summary(plan, total), indent=1) + "\n")
    return {
        "model": spec.model,
        "out": str(spec.out),
        **summary(plan, total),
        "shards_made": len(todo),
        "workers": min(workers, max(1, len(todo))),
        "threads": spec.threads,
        "seconds": time.perf_counter() - began,
        "rows_per_second": now.rows / seconds if todo else None,
        "tokens_per_second": now.tokens / seconds if todo else None,
    }


def planned(spec: ScoreSpec, tell: Callable[[str, int, int | None], Any]) -> tuple[Plan, bool]:
    """The plan of a call, and whether it is a new one."""
    tell("reading the model", 0, None)
    check_names(spec)
    digest = files_digest(spec.model)
    plan = found_plan(spec, digest)
    if plan is not None:
        return plan, False
    tell("counting rows", 0, None)
    return make_plan(spec.data, spec.out, digest, spec.saved() | {"text": usual(spec)}), True


def found_plan(spec: ScoreSpec, digest: str) -> Plan | None:
    """The plan of an earlier run of this call; None where there is something to plan.

    A plan of which no shard is finished binds nobody.

    Raises:
        ValueError: the folder is not ours, or belongs to another model, other files or options.
    """
    place = spec.out / PLAN
    if not place.exists():
        if spec.out.exists() and any(path.name[0] != "." for path in spec.out.iterdir()):
            raise ValueError(f"{spec.out} is not empty and holds no {PLAN}: choose another folder for the result")
        return None
    if spec.fresh:
        return None
    try:
        plan = Plan.from_json(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{place} is {error}") from None
    other = differences(plan, digest, spec.saved())
    try:
        if other:
            raise ValueError(
                f"{spec.out} was scored otherwise ({'; '.join(other)}): choose another folder or start --fresh"
            )
        same_files(plan, spec.data, spec.out)
    except ValueError:
        if any(spec.out.glob("part-*.parquet")):
            raise
        return None
    return plan


def usual(spec: ScoreSpec) -> list[str] | None:
    """The columns of text that were named, else those that the model was trained on, if the data have them."""
    if spec.text:
        return list(spec.text)
    trained = [*(remembered(spec.model).get("text") or ())]
    if not trained or not {*trained} <= {*columns_of(find_files(spec.data, spec.out)[0])}:
        return None
    log.info("as trained: text %s", ", ".join(trained))
    return trained


def scorer_of(spec: ScoreSpec, plan: Plan) -> Scorer:
    """The unopened model."""
    names = ("tokens", "max_length", "layout", "threads", "device", "prefix", "best", "prompt")
    return Scorer(spec.model, text=tuple(plan.options["text"]), **{name: getattr(spec, name) for name in names})


def check_names(spec: ScoreSpec) -> None:
    """Raise ValueError for a model that cannot score texts, and where a kept column is called as one of the result."""
    ours = [spec.prefix + name for name in ("row", *names_of(outline(spec.model), spec.best))]
    taken = [name for name in spec.keep if name in ours]
    if taken:
        raise ValueError(f"the column {taken[0]!r} is kept and is one of the result too: say --prefix model_")
    twice = [name for i, name in enumerate(spec.keep) if name in spec.keep[:i]]
    if twice:
        raise ValueError(f"the column {twice[0]!r} is kept twice: name it once")


def summary(plan: Plan, total: Tally) -> dict[str, Any]:
    """What the report says; the same however often the run was interrupted."""
    counted = asdict(total)
    used, dense = counted.pop("macs_used"), counted.pop("macs_dense")
    return {
        **counted,
        "shards": plan.shards,
        "padding_ratio": total.padded / total.tokens if total.tokens else None,
        "flops_ratio": dense / used if used else None,
    }


def usual_workers() -> int:
    """One process for each core that this one may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST)


def write(path: Path, text: str) -> None:
    """Write a file, whole or not at all, and wait until it is on the disk."""
    with writing(path.parent), whole(path) as aside:
        aside.write_text(text, encoding="utf-8")
        settle(aside)
    settle(path.parent)


def clear(out: Path, *, everything: bool) -> None:
    """Remove what a killed process was writing, and with ``everything`` what was made by an earlier plan.

    The plan itself stays until the new one takes its place, so that the folder is ours at any moment.
    """
    for path in (*out.glob(".part-*.tmp"), *out.glob("._*.tmp")):
        path.unlink(missing_ok=True)
    for path in (out / REPORT, *out.glob("part-*.parquet")) if everything else ():
        path.unlink(missing_ok=True)


@contextmanager
def claimed(out: Path) -> Iterator[Callable[[], None]]:
    """A function that makes the folder and claims it until the context ends; a folder that stays empty goes again, and
    so does what workers were writing when they were stopped.

    The system releases the claim of a process that is killed.
    """
    handles: list[int] = []
    new, ours = not out.exists(), False

    def claim() -> None:
        nonlocal ours
        out.mkdir(parents=True, exist_ok=True)
        with suppress(ImportError):  # Windows has none
            import fcntl

            handles.append(os.open(out, os.O_RDONLY))
            try:
                fcntl.flock(handles[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another process is at work in {out}: wait for it, or choose another folder"
                ) from None
            except OSError as error:
                warnings.warn(f"{out} cannot be claimed ({error.strerror}): let one process work in it", stacklevel=3)
        ours = True

    try:
        yield claim
    finally:
        if ours:
            clear(out, everything=False)
        for handle in handles:
            os.close(handle)
        if new:
            with suppress(OSError):
                out.rmdir()
