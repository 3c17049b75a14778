"""The command line: one command for each experiment; torch is imported only by what needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer import Option

from ..experiments import spec
from ..experiments.compress import CompressSpec
from .audit import audit
from .bench import bench
from .compare import compare
from .compress import compress
from .console import Group, Screen
from .eval import evaluate
from .export import export
from .info import info
from .options import add_command
from .prepare import prepare
from .score import score
from .serve import serve
from .show import show
from .train import train
from .tune import tune

COMMANDS: dict[str, tuple[type, Callable[[Any, Screen], None]]] = {
    "train": (spec.TrainSpec, train),
    "prepare": (spec.PrepareSpec, prepare),
    "tune": (spec.TuneSpec, tune),
    "eval": (spec.EvalSpec, evaluate),
    "bench": (spec.BenchSpec, bench),
    "compare": (spec.CompareSpec, compare),
    "export": (spec.ExportSpec, export),
    "score": (spec.ScoreSpec, score),
    "serve": (spec.ServeSpec, serve),
    "show": (spec.ShowSpec, show),
    "compress": (CompressSpec, compress),
    "audit": (spec.AuditSpec, audit),
    "info": (spec.ModelSpec, info),
}
app = typer.Typer(cls=Group, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.callback(no_args_is_help=True, invoke_without_command=True)
def _main(version: Annotated[bool, Option("--version", help="Print the version.")] = False) -> None:
    """Faster transformers by really removing the tokens that a model no longer needs."""
    if version:
        from .. import __version__

        print(f"thresher {__version__}")
        raise typer.Exit


for name, (kind, run) in COMMANDS.items():
    add_command(app, name, kind, run)


def main() -> None:
    """Entry point of the ``thresher`` command."""
    app(prog_name="thresher")
