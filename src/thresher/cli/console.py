"""What every command shares: mistakes in one line, quiet libraries, results shown and written."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

RESUMED = ("train", "prepare", "compare", "score")  # go on where they were interrupted


class Group(TyperGroup):
    """End the user's mistakes in one line and code 2, interruptions in code 130; THRESHER_DEBUG=1 shows tracebacks.

    A mistake is what Thresher and the libraries below it raise for bad input: ValueError (DataError is one), OSError,
    SafetensorError, and an ImportError that says what to install. Everything else is a fault of ours: it keeps its
    traceback and ends in code 1.
    """

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            resumes = "; run the same command again to resume" if ctx.invoked_subcommand in RESUMED else ""
            say(f"interrupted{resumes}", "yellow")
            raise typer.Exit(130) from None
        except Exception as error:
            if os.environ.get("THRESHER_DEBUG") or not is_mistake(error):
                raise
            say(f"error: {first_line(error)}", "red")
            raise typer.Exit(2) from None


def is_mistake(error: Exception) -> bool:
    """Whether an error is about what the user gave, and not a fault of the library."""
    from safetensors import SafetensorError

    if isinstance(error, ImportError):  # Python names the module that it did not find, an error of ours does not
        return error.name is None
    return isinstance(error, (ValueError, OSError, SafetensorError))


class Screen:
    """Where a command tells its progress and its result.

    json: a file for the result, "-" for standard output alone; quiet: no progress and no notices; verbose: let the
        libraries below talk; files: what the command will write, and whether it is a file or a folder.

    Raises:
        ValueError: something cannot be written there; it is told before the work.
    """

    def __init__(self, json: Path | None, quiet: bool, verbose: bool, files: Iterable[tuple[Path | None, str]] = ()):
        self.json, self.quiet = json, quiet
        for path, kind in (*files, (json, "file")):
            if path is not None and str(path) != "-":
                check_writable(Path(path), kind)
        warnings.showwarning = (lambda *_: None) if quiet else notice  # type: ignore[assignment]
        log = logging.getLogger("thresher")
        log.handlers = [Notices()]
        log.setLevel(logging.ERROR if quiet else logging.INFO)
        if not verbose:
            quieten()

    @property
    def alone(self) -> bool:
        """Whether standard output is for the JSON alone."""
        return str(self.json) == "-"

    @property
    def size(self) -> Any:
        """Columns and lines of the terminal."""
        return Console().size

    def say(self, text: str) -> None:
        """A notice on standard error."""
        if not self.quiet:
            say(text)

    def show(self, rows: list[dict], table: Callable[[list[dict], int], Any] | None = None) -> None:
        """Write the rows where that was asked for, and print ``table(rows, width)`` unless they are printed."""
        if self.json is not None:
            write(rows, self.json)
        if table is not None and not self.alone:
            screen = Console(highlight=False)
            screen.print(table(rows, screen.width))

    def print(self, *things: Any) -> None:
        """Print what belongs to the result, unless the JSON is printed."""
        for thing in things if not self.alone else ():
            Console().print(thing, markup=False, highlight=False, soft_wrap=isinstance(thing, str), crop=False)

    def aside(self) -> redirect_stdout:
        """Send to standard error what libraries print on the way: it is not the result."""
        return redirect_stdout(sys.stderr)

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int | None], None]]:
        """A bar on a terminal; it is told what is going on, the steps done and all of them."""
        from rich.progress import Progress

        hidden = self.quiet or not sys.stderr.isatty()
        with self.aside(), Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
            task = bar.add_task("")
            yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


class Notices(logging.Handler):
    """Shows what the library logs, one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        say(first_line(record.getMessage()))


def check_writable(path: Path, kind: str) -> None:
    """Raise ValueError if no such file or folder can be written."""
    if path.exists() and path.is_dir() != (kind == "folder"):
        raise ValueError(f"cannot write {path}: it is a {'file' if kind == 'folder' else 'folder'}")
    parents = (path.absolute() / "any" if kind == "folder" else path.absolute()).parents
    try:
        with tempfile.TemporaryFile(dir=next(parent for parent in parents if parent.exists())):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def quieten() -> None:
    """Silence the progress bars and the notices of the libraries below."""
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
    """The first line of a message."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"corrupted checkpoint: {line}" if type(error).__name__ == "SafetensorError" else line


def say(text: str, style: str = "") -> None:
    """Print a line on standard error."""
    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def write(rows: list[dict], file: Path) -> None:
    """``{"rows": [...]}`` into a file, or to the screen for "-"; what is no number becomes null."""
    from ..evaluation.rows import whole

    text = json.dumps({"rows": rows}, default=lambda value: value.item() if hasattr(value, "item") else str(value))
    text = json.dumps(json.loads(text, parse_constant=lambda _: None), indent=1, ensure_ascii=False)
    if str(file) == "-":
        print(text)
    else:
        with whole(file) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def pooled(pooling: dict, scale: float) -> str:
    """Say which pooling of an embedder was chosen, and the cosine to the dense vectors with either; ``scale`` to
    points."""
    judged = ", ".join(f"{name} {scale * value:.2f}" for name, value in pooling["judged"].items())
    return f"pooling {pooling['chosen']}; cosine to the dense vectors on held-out texts, in points: {judged}"
