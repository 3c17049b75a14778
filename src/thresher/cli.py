"""The command line: train, eval, bench, compare, export, show and info; torch is imported only by what needs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from .console import Group, follow, given, measure, progress, say, start, write


def _list(kind: Callable) -> Callable[[str], tuple]:
    """A reader of values with commas between them."""
    return lambda value: tuple(kind(part) for part in value.split(","))


def _keep(value: str) -> float | int | tuple:
    shares = _list(lambda share: float(share) if "." in share else int(share))(value)
    return shares[0] if len(shares) == 1 else shares


# Options of several commands. A list of values has a parser, and no type that typer would know.
Model = Annotated[str, Argument(metavar="MODEL", help="A folder, or the name of a model on the hub.")]
Data = Annotated[str, Option(metavar="PATH|ID", help="A csv, tsv, json, jsonl or parquet file, a folder, a hub id.")]
Config = Annotated[str | None, Option(metavar="NAME", help="Configuration of a hub data set: sst2 of glue.")]
Columns = Annotated[Any, Option(parser=_list(str.strip), metavar="A[,B]", help="Text columns, if unusual.")]
Label = Annotated[str | None, Option(metavar="NAME", help="Label column, if unusual.")]
Metric = Annotated[str | None, Option(metavar="NAME", help="accuracy, f1, matthews, pearson; default: what fits.")]
BatchSize = Annotated[int, Option(min=1, metavar="N", help="Texts in a batch.")]
MaxLength = Annotated[int, Option(min=3, metavar="N", help="Tokens of a text; the rest is cut.")]
Limit = Annotated[int | None, Option(min=1, metavar="N", help="Use that many rows only.")]
Threads = Annotated[int | None, Option(min=1, metavar="N", help="Threads of the processor.")]
Executor = Annotated[str, Option(metavar="NAME", help="auto, mask, padded or packed.")]
Json = Annotated[Path | None, Option("--json", metavar="FILE", help="Write the result there; - prints only it.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="No progress and no notices.")]
Verbose = Annotated[bool, Option("--verbose", "-v", help="Let transformers and datasets say all they have to say.")]

app = typer.Typer(cls=Group, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.callback(no_args_is_help=True, invoke_without_command=True)
def _main(version: Annotated[bool, Option("--version", help="Print the version.")] = False) -> None:
    """Faster transformers by really removing the tokens that a model no longer needs."""
    if version:
        from . import __version__

        print(f"thresher {__version__}")
        raise typer.Exit


@app.command()
def train(
    model: Model,
    data: Data,
    out: Annotated[Path, Option(metavar="DIR", help="The folder for the pruned model.")],
    method: Annotated[str | None, Option(metavar="NAME", help="ltp, top, topk, ...; default: ltp.")] = None,
    target_flops: Annotated[float | None, Option(help="Share of the dense MACs to be left; default: 0.4.")] = None,
    target_latency: Annotated[float | None, Option(help="Share of the dense time to be left (top).")] = None,
    target_latency_ms: Annotated[float | None, Option(help="Mean milliseconds per text, one at a time (top).")] = None,
    keep: Annotated[
        Any, Option(parser=_keep, metavar="K", help="Share (0.5) or number (64) kept, for topk and its kin.")
    ] = None,
    at: Annotated[Any, Option(parser=_list(int), metavar="1,2,4", help="Layers after which tokens leave.")] = None,
    recipe: Annotated[str | None, Option(metavar="M-TASK", help="Settings of a method and a task: top-mrpc.")] = None,
    epochs: Annotated[
        int | None, Option(min=0, metavar="N", help="Dense fine-tuning; 0 if MODEL is fine-tuned; default: 3.")
    ] = None,
    prune_epochs: Annotated[int | None, Option(min=0, metavar="N", help="Training with pruning; default: 3.")] = None,
    lr: Annotated[float | None, Option(help="Peak learning rate.")] = None,
    dropout: Annotated[float | None, Option(help="Dropout rate; default: the model's own.")] = None,
    bf16: Annotated[bool | None, Option("--bf16/--no-bf16", help="In bfloat16; default: where it is fast.")] = None,
    freeze_embeddings: Annotated[bool, Option(help="Keep the embeddings as they are.")] = True,
    fresh: Annotated[bool, Option("--fresh", help="Ignore what an interrupted run left.")] = False,
    seed: Annotated[int, Option(metavar="N", help="Of initialisation, order and dropout.")] = 0,
    config: Config = None,
    text: Columns = None,
    label: Label = None,
    metric: Metric = None,
    batch_size: Annotated[int | None, Option(min=1, metavar="N", help="Texts in a batch; default: 32.")] = None,
    max_length: Annotated[
        int | None, Option(min=3, metavar="N", help="Tokens of a text; the rest is cut; default: 256.")
    ] = None,
    limit: Limit = None,
    threads: Threads = None,
    json_file: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune a model and teach it which tokens it can do without.

    \b
    Examples:
      thresher train bert-base-uncased --data reviews.csv --out runs/reviews
      thresher train runs/dense --epochs 0 --data reviews.csv --target-flops 0.3 --out runs/fast
      thresher train bert-base-uncased --data glue --config sst2 --method topk --keep 0.7 --out runs/sst2
      thresher train bert-base-uncased --data glue --config mrpc --recipe top-mrpc --out runs/mrpc
    """
    options = given(locals(), "model", "data", "out")
    start(verbose, quiet, json_file, folder=out)
    from . import jobs

    measure(jobs.train, json_file, model, data, str(out), **options, progress=not quiet)
    if not quiet and (target_latency or target_latency_ms):
        reached = json.loads((out / jobs.SUMMARY).read_text())["reached"]
        asked = f"{target_latency_ms} ms" if target_latency_ms else f"{target_latency} of the dense time"
        say(
            f"asked: {asked}; measured: {reached['latency_ms']:.2f} ms, "
            f"{reached['latency_fraction_measured']:.2f} of the dense {reached['latency_ms_dense']:.2f} ms"
        )
    if not quiet:
        say(f"the model is in {out}")


@app.command("eval")
def evaluate(
    model: Model,
    data: Data,
    config: Config = None,
    text: Columns = None,
    label: Label = None,
    metric: Metric = None,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 256,
    limit: Limit = None,
    executor: Executor = "auto",
    json_file: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quality and MACs of a model on the test part of a data set.

    \b
    Examples:
      thresher eval runs/reviews --data reviews.csv
      thresher eval runs/sst2 --data glue --config sst2 --json sst2.json
    """
    options = given(locals(), "model", "data")
    start(verbose, quiet, json_file)
    from . import jobs

    measure(jobs.evaluate, json_file, model, data, **options)


@app.command()
def bench(
    model: Annotated[str | None, Argument(metavar="DIR", help="The folder of a pruned model.")] = None,
    data: Annotated[str | None, Option(metavar="PATH|ID", help="Labelled texts, as for train.")] = None,
    against: Annotated[str | None, Option(metavar="MODEL", help="Another model to compare with.")] = None,
    runtime: Annotated[Any, Option(parser=_list(str.strip), metavar="A[,B]", help="torch, onnx, openvino.")] = "torch",
    precision: Annotated[Any, Option(parser=_list(str.strip), metavar="A[,B]", help="fp32, bf16, int8.")] = "fp32",
    batch_size: Annotated[Any, Option(parser=_list(int), metavar="M[,N]", help="Texts in a batch.")] = "1,32",
    repeats: Annotated[int, Option(min=1, metavar="N", help="Times that each measurement is made.")] = 5,
    graphs: Annotated[Path | None, Option(metavar="DIR", help="Keep the exported graphs there.")] = None,
    roofline: Annotated[bool, Option("--roofline", help="Measure what this machine can do, and no model.")] = False,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Draw time and quality as a PNG.")] = None,
    config: Config = None,
    text: Columns = None,
    label: Label = None,
    metric: Metric = None,
    max_length: MaxLength = 256,
    limit: Limit = None,
    threads: Threads = None,
    json_file: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Time a pruned model beside the dense one, padded and unpadded, on the same texts.

    \b
    Examples:
      thresher bench runs/reviews --data reviews.csv
      thresher bench runs/reviews --data reviews.csv --batch-size 1,8,32 --plot reviews.png
      thresher bench runs/reviews --data reviews.csv --runtime torch,onnx,openvino --precision fp32,bf16,int8
      thresher bench --roofline --threads 1
    """
    options = given(locals(), "model", "data", "roofline")
    start(verbose, quiet, json_file, plot)
    if roofline:
        from .roofline import roofline, table

        line = roofline(threads)
        write([line.to_dict()], json_file)
        if str(json_file) != "-":
            Console().print(table(line))
        return
    if model is None or data is None:
        raise ValueError("name the folder of a pruned model and --data, or ask for --roofline alone")
    if plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'thresher[plot]'")
    from . import jobs

    with progress(quiet) as tell:
        measure(jobs.bench, json_file, model, data, **options, progress=tell)


@app.command()
def compare(
    model: Model,
    data: Data,
    out: Annotated[Path, Option(metavar="DIR", help="The folder for all runs, the table and the figure.")],
    methods: Annotated[
        Any, Option(parser=_list(str.strip), metavar="A[,B]", help="Methods; random and firstk always take part.")
    ] = "topk,random,firstk,ltp,evit",
    targets: Annotated[
        Any, Option(parser=_list(float), metavar="A[,B]", help="Shares of the dense MACs to be left.")
    ] = "0.5,0.3",
    seeds: Annotated[Any, Option(parser=_list(int), metavar="A[,B]", help="Seeds of the training.")] = "0",
    untrained: Annotated[bool, Option("--untrained", help="Meet the budget only, without training a method.")] = False,
    time: Annotated[bool, Option(help="Time the first seed of all in one run.")] = True,
    at: Annotated[Any, Option(parser=_list(int), metavar="1,2,4", help="Layers after which tokens leave.")] = None,
    epochs: Annotated[
        int | None, Option(min=0, metavar="N", help="Dense fine-tuning; 0 if MODEL is fine-tuned; default: 3.")
    ] = None,
    prune_epochs: Annotated[int | None, Option(min=0, metavar="N", help="Training with pruning; default: 3.")] = None,
    lr: Annotated[float | None, Option(help="Peak learning rate.")] = None,
    dropout: Annotated[float | None, Option(help="Dropout rate; default: the model's own.")] = None,
    bf16: Annotated[bool | None, Option("--bf16/--no-bf16", help="In bfloat16; default: where it is fast.")] = None,
    freeze_embeddings: Annotated[bool, Option(help="Keep the embeddings as they are.")] = True,
    config: Config = None,
    text: Columns = None,
    label: Label = None,
    metric: Metric = None,
    batch_size: Annotated[int | None, Option(min=1, metavar="N", help="Texts in a batch; default: 32.")] = None,
    max_length: MaxLength = 256,
    limit: Limit = None,
    threads: Threads = None,
    json_file: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train several methods to several budgets from one dense model, and tell which are better.

    \b
    Examples:
      thresher compare bert-base-uncased --data reviews.csv --out runs/compared
      thresher compare runs/dense --epochs 0 --data reviews.csv --untrained --methods topk,evit,tome --out runs/quick
      thresher compare bert-base-uncased --data reviews.csv --methods ltp,top --targets 0.4 --seeds 0,1,2 --out runs/abc
    """
    options = given(locals(), "model", "data", "out")
    start(verbose, quiet, json_file, folder=out)
    from . import compare as job

    with follow(quiet) as tell:
        measure(job.compare, json_file, model, data, str(out), **options, progress=tell, show=job.table)
    if not quiet:
        say(f"all runs are in {out}, the figures in {out / job.TABLE}")


@app.command()
def export(
    model: Model,
    out: Annotated[Path, Option(metavar="DIR", help="The folder for the graph.")],
    format: Annotated[str, Option(metavar="NAME", help="onnx or openvino.")] = "onnx",
    precision: Annotated[str, Option(metavar="NAME", help="fp32, bf16 (openvino) or int8.")] = "fp32",
    data: Annotated[
        str | None, Option(metavar="PATH|ID", help="Its train part calibrates int8 in openvino; see bench.")
    ] = None,
    config: Config = None,
    text: Columns = None,
    label: Label = None,
    max_length: MaxLength = 256,
    threads: Threads = None,
    json_file: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a model, pruned or not, as a graph for ONNX Runtime or OpenVINO, in which dropped tokens are absent.

    \b
    Examples:
      thresher export runs/reviews --out runs/reviews-onnx
      thresher export runs/reviews --format openvino --precision bf16 --out runs/reviews-ov
      thresher export runs/reviews --format openvino --precision int8 --data reviews.csv --out runs/reviews-int8
    """
    options = given(locals(), "model", "out")
    start(verbose, quiet, json_file, folder=out)
    from . import jobs

    with progress(quiet) as tell:
        row = jobs.export(model, str(out), **options, progress=tell)
    write([row], json_file)
    if not quiet:
        say(f"the graph is in {out}; its logits differ from the model's by {row['difference']:.2g} at most")


@app.command()
def show(
    model: Model,
    text: Annotated[list[str] | None, Option(metavar="TEXT", help="A text; may be given several times.")] = None,
    pair: Annotated[str | None, Option(metavar="TEXT", help="The text beside it, for models that read pairs.")] = None,
    file: Annotated[Path | None, Option(metavar="FILE", help="One text per line.")] = None,
    data: Annotated[str | None, Option(metavar="PATH|ID", help="The first texts of its test part.")] = None,
    config: Config = None,
    columns: Columns = None,
    limit: Annotated[int, Option(min=1, metavar="N", help="Texts to show.")] = 10,
    max_length: Annotated[int | None, Option(min=3, metavar="N", help="Tokens of a text; the rest is cut.")] = None,
    html: Annotated[Path | None, Option(metavar="FILE", help="Write a page for the browser.")] = None,
    executor: Executor = "auto",
    json_file: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Which token leaves after which layer.

    \b
    Examples:
      thresher show runs/reviews --text "Wonderful acting, but far too long."
      thresher show runs/reviews --data reviews.csv --limit 3 --html reviews.html
      thresher show runs/qnli --text "Who threshes?" --pair "Farmers do." --json -
    """
    if sum(map(bool, (text, file, data))) != 1 or (pair and len(text or ()) != 1):
        raise ValueError("give texts with one of --text, --file and --data; --pair goes with one --text")
    texts = [(one, pair) for one in text or ()]
    if file:
        texts = [(line, None) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    start(verbose, quiet, json_file, html)
    from . import jobs
    from .data import load_task
    from .show import html as page
    from .show import terminal, trace

    if data:
        task = load_task(data, config=config, text=columns, need_labels=False)
        rows = task.test.select(range(min(limit, len(task.test))))
        texts = [tuple(row[column] for column in task.text_columns) for row in rows]
    pruned, tokenizer = jobs.load(model, executor)
    traces = [trace(pruned, tokenizer, *row, max_length=max_length) for row in texts[:limit]]
    if html:
        page(traces, html)
    write([asdict(one) for one in traces], json_file)
    for one in traces if str(json_file) != "-" else ():
        Console().print(terminal(one))


@app.command()
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


def main() -> None:
    """Entry point of the ``thresher`` command."""
    app(prog_name="thresher")
