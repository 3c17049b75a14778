"""The commands that look at a saved model: show, audit and info; torch is imported only by what needs it."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Option

from .console import given, progress, start, write
from .options import (
    BatchSize,
    Columns,
    Config,
    Data,
    Json,
    Label,
    Layout,
    Limit,
    MaxLength,
    Metric,
    Model,
    Quiet,
    Threads,
    Verbose,
    listed,
)


def show(
    model: Model,
    text: Annotated[list[str] | None, Option(metavar="TEXT", help="A text; may be given several times.")] = None,
    pair: Annotated[str | None, Option(metavar="TEXT", help="The text beside it, for models that read pairs.")] = None,
    file: Annotated[Path | None, Option(metavar="FILE", help="One text per line.")] = None,
    data: Annotated[str | None, Option(metavar="PATH|ID", help="The first texts of its test part.")] = None,
    image: Annotated[Path | None, Option(metavar="FILE", help="A picture, for models that read pictures.")] = None,
    config: Config = None,
    columns: Columns = None,
    limit: Annotated[int, Option(min=1, metavar="N", help="Texts to show.")] = 10,
    max_length: Annotated[int | None, Option(min=3, metavar="N", help="Tokens of a text; the rest is cut.")] = None,
    html: Annotated[Path | None, Option(metavar="FILE", help="Write a page for the browser.")] = None,
    png: Annotated[Path | None, Option(metavar="FILE", help="Draw what is left of the picture as a PNG.")] = None,
    layout: Layout = "auto",
    json_file: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Which token, or patch of a picture, leaves after which layer.

    \b
    Examples:
      thresher show runs/reviews --text "Wonderful acting, but far too long."
      thresher show runs/reviews --data reviews.csv --limit 3 --html reviews.html
      thresher show runs/qnli --text "Who threshes?" --pair "Farmers do." --json -
      thresher show runs/vit --image field.jpg --png field-patches.png
    """
    if sum(map(bool, (text, file, data, image))) != 1 or (pair and len(text or ()) != 1):
        raise ValueError("give one of --text, --file, --data and --image; --pair goes with one --text")
    if image:
        return _show_picture(model, image, html, png, layout, json_file, quiet, verbose)
    if png:
        raise ValueError("--png draws a picture: give one with --image, or ask for --html")
    texts = [(one, pair) for one in text or ()]
    if file:
        texts = [(line, None) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    start(verbose, quiet, json_file, html)
    from ..data.load import load_task
    from ..experiments import train as jobs
    from ..reports.trace import html as page
    from ..reports.trace import terminal, trace

    if data:
        task = load_task(data, config=config, text=columns, need_labels=False)
        rows = task.test.select(range(min(limit, len(task.test))))
        texts = [tuple(row[column] for column in task.text_columns) for row in rows]
    pruned, tokenizer = jobs.load(model, layout)
    traces = [trace(pruned, tokenizer, *row, max_length=max_length) for row in texts[:limit]]
    if html:
        page(traces, html)
    write([asdict(one) for one in traces], json_file)
    screen = Console()
    for one in traces if str(json_file) != "-" else ():
        screen.print(terminal(one, screen.size))


def _show_picture(model, image: Path, html, png, layout: str, json_file, quiet: bool, verbose: bool) -> None:
    start(verbose, quiet, json_file, html, png)
    from ..data.models import load_vision
    from ..reports import patches

    traced = patches.trace(*load_vision(model, layout), image)
    if html:
        patches.html([traced], html)
    if png:
        patches.png(traced, png)
    write([traced.to_dict()], json_file)
    if str(json_file) != "-":
        Console().print(patches.terminal(traced), crop=False)


def audit(
    model: Model,
    data: Data,
    against: Annotated[str | None, Option(metavar="DENSE", help="The dense model to compare with.")] = None,
    by: Annotated[
        Any, Option(parser=listed(str.strip), metavar="COLUMN[,..]", help="Columns of groups: dialect, source, ...")
    ] = None,
    examples: Annotated[int, Option(min=0, metavar="N", help="Lost examples to show of each of the worst slices.")] = 2,
    html: Annotated[Path | None, Option(metavar="FILE", help="Write a page for the browser.")] = None,
    config: Config = None,
    text: Columns = None,
    label: Label = None,
    metric: Metric = None,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 256,
    limit: Limit = None,
    layout: Layout = "auto",
    threads: Threads = None,
    json_file: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Where pruning hurts: what is lost by input length, class and group.

    Compares a pruned model with the dense one on the test part, with intervals and corrected tests.

    \b
    Examples:
      thresher audit runs/reviews --data reviews.csv
      thresher audit runs/reviews --data reviews.csv --by dialect,source --html audit.html
      thresher audit runs/sst2 --against runs/sst2-dense --data glue --config sst2 --json audit.json
    """
    options = given(locals(), "model", "data", "html")
    start(verbose, quiet, json_file, html)
    from ..experiments.audit import audit as job
    from ..reports import audit_page as findings
    from ..reports.trace import terminal

    with progress(quiet) as tell, redirect_stdout(sys.stderr):  # what transformers prints is not the result
        rows = job(model, data, **options, progress=tell)
    if html:
        findings.html(rows, html)
    write(rows, json_file)
    if str(json_file) == "-":
        return
    screen = Console()
    screen.print(findings.table(rows, screen.width))
    for sentence in findings.verdict(rows):
        screen.print(sentence, markup=False, highlight=False, soft_wrap=True)
    for heading, cases in findings.cases(rows):
        screen.print(f"\n{heading}", style="bold", markup=False, highlight=False)
        for line, traced in cases:
            screen.print(f"\n{line}", markup=False, highlight=False)
            screen.print(terminal(traced, screen.size))


def info(model: Model, json_file: Json = None, verbose: Verbose = False) -> None:
    """What is in a saved model, and how it prunes.

    \b
    Examples:
      thresher info runs/reviews
      thresher info runs/reviews --json -
    """
    start(verbose, False, json_file)
    from .info import describe

    row = describe(model)
    write([row], json_file)
    grid = Table.grid("name", "value", padding=(0, 2))
    for name, value in row.items():
        if isinstance(value, dict):
            value = "\n".join(f"{key}: {entry}" for key, entry in value.items() if entry is not None)
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        elif value is None:
            value = "none: the model is dense" if name == "pruning" else "–"
        grid.add_row(name.replace("_", " "), Text(str(value)))
    if str(json_file) != "-":
        Console(highlight=False).print(grid)
