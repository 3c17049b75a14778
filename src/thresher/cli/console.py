"""What every command of the command line shares: mistakes in one line, quiet libraries, results shown and written."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup


class Group(TyperGroup):
    """Mistakes end in one line and code 2, interruptions in code 130; THRESHER_DEBUG=1 shows tracebacks."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            resumes = ctx.invoked_subcommand in ("train", "compare")
            resume = "; run the same command again to resume" if resumes else ""
            say(f"interrupted{resume}", "yellow")
            raise typer.Exit(130) from None
        except Exception as error:
            from safetensors import SafetensorError

            known = (ValueError, TypeError, OSError, RuntimeError, ImportError, SafetensorError)
            if os.environ.get("THRESHER_DEBUG") or not isinstance(error, known):
                raise
            broken = "corrupted checkpoint: " if isinstance(error, SafetensorError) else ""
            say(f"error: {broken}{first_line(error)}", "red")
            raise typer.Exit(2) from None


def given(values: dict[str, Any], *without: str) -> dict[str, Any]:
    """What the library is given: its own defaults stand where nothing was asked for."""
    return {k: v for k, v in values.items() if v is not None and k not in (*without, "json_file", "quiet", "verbose")}


def start(verbose: bool, quiet: bool, *files: Path | None, folder: Path | None = None) -> None:
    """Before the work: see that the results can be written, and quieten the libraries."""
    for path in (folder, *files):
        if path is None or str(path) == "-":
            continue
        if path.exists() and path.is_dir() != (path is folder):
            raise ValueError(f"cannot write {path}: it is a {'file' if path is folder else 'folder'}")
        parents = (path.absolute() / "any" if path is folder else path.absolute()).parents
        try:
            with tempfile.TemporaryFile(dir=next(parent for parent in parents if parent.exists())):
                pass
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from None
    warnings.showwarning = (lambda *_: None) if quiet else notice
    if not verbose:
        os.environ.update(HF_DATASETS_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def notice(message, category, filename, *_) -> None:
    """The library's own warnings in one line; those of others are meant for developers."""
    if Path(__file__).parents[1] in Path(filename).parents:
        say(f"note: {first_line(message)}", "yellow")


def first_line(error: Any) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def say(text: str, style: str = "") -> None:
    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def measure(
    job: Callable[..., list[dict]],
    json_file: Path | None,
    *arguments: str,
    show: Callable | None = None,
    **options: Any,
) -> None:
    """Run a job and show its rows, as a table (``tables.table`` unless ``show`` makes it), and as JSON where that was
    asked for."""
    from ..evaluation import rows as report
    from ..reports.tables import table

    with redirect_stdout(sys.stderr):  # whatever transformers prints on the way is not the result
        rows = job(*arguments, **options)
    if str(json_file) == "-":
        return write(rows, json_file)
    if json_file is not None:
        report.write_rows(json_file, rows)
    screen = Console()
    screen.print((show or table)(rows, screen.width))


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal; it is told what is going on, the steps done and all of them."""
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task("")
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


@contextmanager
def follow(quiet: bool) -> Iterator[Callable[[list], None]]:
    """A table that follows ``compare.Run``s on a terminal; elsewhere a line for each that ends. It is told all runs."""
    from rich.live import Live

    ended: set[str] = set()
    with (
        Live(console=Console(stderr=True), transient=True, auto_refresh=False)
        if shown(quiet)
        else nullcontext() as live
    ):

        def tell(runs: list) -> None:
            for run in runs if live is None and not quiet else ():
                if run.state in ("done", "failed") and run.name not in ended:
                    ended.add(run.name)
                    say(f"{run.name}: {outcome(run)}")
            if live is not None:
                live.update(followed(runs), refresh=True)

        yield tell


def shown(quiet: bool) -> bool:
    """Whether there is a terminal to draw on."""
    return not quiet and sys.stderr.isatty()


def followed(runs: list) -> Table:
    """Methods and targets by seeds, and how far each is."""
    seeds, lines = list(dict.fromkeys(run.seed for run in runs)), {}
    for run in runs:
        lines.setdefault((run.method, run.target), {})[run.seed] = outcome(run)
    table = Table("method", "target", *(f"seed {seed}" for seed in seeds), box=box.SIMPLE_HEAD)
    for (method, target), of in lines.items():
        table.add_row(method, "" if target is None else f"{target:g}", *(of.get(seed, "") for seed in seeds))
    return table


def outcome(run: Any) -> str:
    """The state of a ``compare.Run``, and its figures once it is done."""
    if run.state == "done":
        return f"{run.row['quality']:.2f} {run.row['metric']}, {run.row['flops_ratio']:.2f} times fewer FLOPs"
    return f"failed, {first_line(run.reason)}" if run.state == "failed" else run.state


def write(rows: list[dict], json_file: Path | None) -> None:
    """``{"rows": [...]}`` into a file, or to the screen for "-"; what is no number becomes null."""
    from ..evaluation.rows import whole

    if json_file is None:
        return
    text = json.dumps({"rows": rows}, default=lambda value: value.item() if hasattr(value, "item") else str(value))
    text = json.dumps(json.loads(text, parse_constant=lambda _: None), indent=1, ensure_ascii=False)
    if str(json_file) == "-":
        print(text)
    else:
        with whole(json_file) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
