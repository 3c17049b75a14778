"""The command line: train, tune, eval, bench, compare and export; torch is imported only by what needs it."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import Argument, Option

from .console import Group, follow, given, measure, progress, say, start, write
from .inspecting import audit, info, show
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


def _keep(value: str) -> float | int | tuple:
    shares = listed(lambda share: float(share) if "." in share else int(share))(value)
    return shares[0] if len(shares) == 1 else shares


app = typer.Typer(cls=Group, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.callback(no_args_is_help=True, invoke_without_command=True)
def _main(version: Annotated[bool, Option("--version", help="Print the version.")] = False) -> None:
    """Faster transformers by really removing the tokens that a model no longer needs."""
    if version:
        from .. import __version__

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
    at: Annotated[Any, Option(parser=listed(int), metavar="1,2,4", help="Layers after which tokens leave.")] = None,
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
    from ..experiments import train as jobs

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


@app.command()
def tune(
    model: Model,
    data: Data,
    out: Annotated[Path, Option(metavar="DIR", help="The folder for the pruned model.")],
    target_flops: Annotated[float | None, Option(help="Budget: share of the dense MACs to be left.")] = None,
    target_latency_ms: Annotated[float | None, Option(help="Budget: mean ms per text, one at a time.")] = None,
    max_disagreement: Annotated[
        float | None, Option(help="Budget: share of texts with another answer than the dense model's.")
    ] = None,
    max_drop: Annotated[float | None, Option(help="Budget: drop of accuracy, as a share; needs labels.")] = None,
    method: Annotated[str, Option(metavar="NAME", help="topk, spatten, vatp, entropy, ats; auto: the best.")] = "auto",
    seed: Annotated[int, Option(metavar="N", help="Of the order of the texts.")] = 0,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Draw cost and divergence as a PNG.")] = None,
    config: Config = None,
    text: Columns = None,
    label: Label = None,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 256,
    min_length: Annotated[
        int | None,
        Option(min=1, metavar="N", help="Leave out texts of fewer tokens, to search on such as will be served."),
    ] = None,
    limit: Limit = None,
    threads: Threads = None,
    json_file: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find a pruning schedule for a fine-tuned model under one budget, without any training.

    \b
    Examples:
      thresher tune runs/dense --data texts.csv --target-flops 0.5 --out runs/fast
      thresher tune runs/dense --data texts.csv --max-disagreement 0.02 --out runs/safe --plot safe.png
      thresher tune runs/dense --data glue --config sst2 --max-drop 0.01 --method vatp --out runs/sst2
    """
    options = given(locals(), "model", "data", "out")
    start(verbose, quiet, json_file, plot, folder=out)
    from ..stats import bounds

    for name, limit_of in (("max_disagreement", max_disagreement), ("max_drop", max_drop)):
        if limit_of is not None and 0 < limit_of < 1 and not quiet:
            least = bounds.least(limit_of, paired=name == "max_drop")
            say(f"{name}={limit_of:g} with 95 % confidence takes {least} texts to test on, if none of them goes wrong")
    from ..experiments.train import SUMMARY
    from ..experiments.tune import tune as search
    from ..reports.tables import schedules

    with progress(quiet) as tell, redirect_stdout(sys.stderr):
        rows = search(str(model), data, str(out), **options, progress=tell)
    write(rows, json_file)
    if str(json_file) != "-":
        screen = Console()
        screen.print(schedules(rows, screen.width))
    if not quiet:
        texts = json.loads((out / SUMMARY).read_text())["texts"]
        say(f"searched on {texts['searched']} texts of {texts['tokens_mean']:g} tokens: for others it may not hold")
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
    layout: Layout = "auto",
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
    from ..experiments import train as jobs

    measure(jobs.evaluate, json_file, model, data, **options)


@app.command()
def bench(
    model: Annotated[str | None, Argument(metavar="DIR", help="The folder of a pruned model.")] = None,
    data: Annotated[str | None, Option(metavar="PATH|ID", help="Labelled texts, as for train.")] = None,
    against: Annotated[str | None, Option(metavar="MODEL", help="Another model to compare with.")] = None,
    runtime: Annotated[Any, Option(parser=listed(str.strip), metavar="A[,B]", help="torch, onnx, openvino.")] = "torch",
    precision: Annotated[Any, Option(parser=listed(str.strip), metavar="A[,B]", help="fp32, bf16, int8.")] = "fp32",
    batch_size: Annotated[Any, Option(parser=listed(int), metavar="M[,N]", help="Texts in a batch.")] = "1,32",
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
        from ..evaluation.roofline import roofline, table

        line = roofline(threads)
        write([line.to_dict()], json_file)
        if str(json_file) != "-":
            Console().print(table(line))
        return
    if model is None or data is None:
        raise ValueError("name the folder of a pruned model and --data, or ask for --roofline alone")
    if plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'thresher[plot]'")
    from ..experiments import train as jobs

    with progress(quiet) as tell:
        measure(jobs.bench, json_file, model, data, **options, progress=tell)


@app.command()
def compare(
    model: Model,
    data: Data,
    out: Annotated[Path, Option(metavar="DIR", help="The folder for all runs, the table and the figure.")],
    methods: Annotated[
        Any, Option(parser=listed(str.strip), metavar="A[,B]", help="Methods; random and firstk always take part.")
    ] = "topk,random,firstk,ltp,evit",
    targets: Annotated[
        Any, Option(parser=listed(float), metavar="A[,B]", help="Shares of the dense MACs to be left.")
    ] = "0.5,0.3",
    seeds: Annotated[Any, Option(parser=listed(int), metavar="A[,B]", help="Seeds of the training.")] = "0",
    untrained: Annotated[bool, Option("--untrained", help="Meet the budget only, without training a method.")] = False,
    time: Annotated[bool, Option(help="Time the first seed of all in one run.")] = True,
    at: Annotated[Any, Option(parser=listed(int), metavar="1,2,4", help="Layers after which tokens leave.")] = None,
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
    from ..experiments import compare as job
    from ..reports.tables import comparison

    with follow(quiet) as tell:
        measure(job.compare, json_file, model, data, str(out), **options, progress=tell, show=comparison)
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
    from ..experiments import train as jobs

    with progress(quiet) as tell:
        row = jobs.export(model, str(out), **options, progress=tell)
    write([row], json_file)
    if not quiet:
        say(f"the graph is in {out}; its logits differ from the model's by {row['difference']:.2g} at most")


for command in (show, audit, info):
    app.command()(command)


def main() -> None:
    """Entry point of the ``thresher`` command."""
    app(prog_name="thresher")
