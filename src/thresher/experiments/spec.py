"""The specifications: one dataclass is an experiment's argument in Python, its saved recipe and its command's options.

A field with a help text is an option of the command; a field without one is for Python alone.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from ..data.spec import PAIR, DataSpec, option
from .cache_spec import CacheSpec, decodes, reads, shares
from .recipes import of_averages, recipe

SUMMARY = "thresher.json"  # what a trained, tuned or exported folder says of itself
COLUMNS = ("config", "text", "label", "train_split", "test_split")  # how a data set is read
AMOUNTS = ("target_flops", "target_latency", "target_latency_ms", "keep", "r")  # options that say how much is left
TASKS = ("classify", "rerank", "embed")
ENCODERS, CACHES = ("topk", "random", "firstk", "ltp", "evit"), ("snapkv", "tova", "keydiff", "expectedattention")
DECODER_LENGTH = 1024  # tokens of the texts about which decoders are asked
MAX_DROP = 1.0  # points, where none of them is given
NOTICED = 2.0  # points of a drop above which the user is told
STEPS = 2000  # of a preparation, where neither steps nor minutes are given
FIXED = {"epochs": 3, "prune_epochs": 3, "lr": 5e-5}  # where a training cannot tell from held-out rows when it is over
log = logging.getLogger("thresher")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Name a saved model."""

    model: str = option("A folder, or the name of a model on the hub.", MISSING, metavar="MODEL", argument=True)

    def completed(self) -> ModelSpec:
        """Settle every field that was left open."""
        return self


@dataclass(frozen=True, kw_only=True)
class TaskSpec(DataSpec, ModelSpec):
    """Name a model and the data that it works on; what is left open is as the model was trained.

    Raises:
        ValueError: ``completed`` finds no data named, neither here nor in the model's folder.
    """

    lacking: ClassVar[str] = "name the data (--data): the folder of the model does not say what it was trained on"

    data: str | None = option(
        "A csv, tsv, json, jsonl or parquet file, a folder, a hub id; default: as trained.", metavar="PATH|ID"
    )
    max_length: int | None = option(
        "Tokens of a text; the rest is cut; default: as trained, else 256.", metavar="N", min=3
    )
    threads: int | None = option("Threads of the processor; default: all.", metavar="N", min=1)

    def __post_init__(self) -> None:
        data = self.data
        super().__post_init__()
        object.__setattr__(self, "data", None if data is None else str(data))
        object.__setattr__(self, "model", self.model and str(self.model))
        for field in fields(self):
            if "Path" in str(field.type) and isinstance(value := getattr(self, field.name), str):
                object.__setattr__(self, field.name, Path(value))

    @property
    def wants_data(self) -> bool:
        """Whether data are read at all."""
        return True

    def completed(self) -> Self:
        """Take data, columns, metric and length from the model's folder where they are open, and log what was taken.

        Columns belong to one data set: for another one they are not taken.
        """
        known = remembered(self.model)
        open_ = [f.name for f in fields(self) if f.metadata.get("help") and getattr(self, f.name) is None]
        names = {"metric", "max_length"}
        if self.wants_data:
            names |= {"data"} if self.data is None else set()
            names |= {*COLUMNS} if self.data is None or located(self.data) == known.get("data") else set()
        taken = {name: known[name] for name in known if name in names and name in open_ and known[name] is not None}
        if taken:
            log.info("as trained: %s", ", ".join(f"{name} {_words(value)}" for name, value in taken.items()))
        spec = replace(self, **taken)
        if spec.wants_data and spec.data is None:
            raise ValueError(self.lacking)
        if self.max_length and self.max_length != known.get("max_length", self.max_length):
            what = f"max_length={self.max_length}: the model was trained at {known['max_length']}"
            warnings.warn(f"{what}, at which alone its quality and its savings are known", stacklevel=2)
        return spec if spec.max_length else replace(spec, max_length=256)


@dataclass(frozen=True, kw_only=True)
class EvalSpec(TaskSpec):
    """Say what ``evaluate`` measures."""

    batch_size: int = option("Texts in a batch.", 32, metavar="N", min=1)
    layout: str = option("auto, mask, padded or packed.", "auto", metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class BenchSpec(CacheSpec, TaskSpec):
    """Say what ``bench`` times; ``examples``, ``batches`` and ``baselines`` are those of ``benchmark.measure``."""

    model: str | None = option("The folder of a pruned model, or a decoder.", metavar="DIR", argument=True)
    contexts: tuple[int, ...] = option("Of a decoder: tokens of a prompt.", (1024, 4096), metavar="M[,N]")
    against: str | None = option("Another model to compare with.", metavar="MODEL")
    runtime: tuple[str, ...] = option("torch, onnx, openvino, executorch.", ("torch",), metavar="A[,B]")
    precision: tuple[str, ...] = option("fp32, bf16, int8.", ("fp32",), metavar="A[,B]")
    batch_size: tuple[int, ...] = option("Texts in a batch.", (1, 32), metavar="M[,N]")
    layout: str = option("auto, mask, padded or packed, of the pruned model in torch.", "auto", metavar="NAME")
    image: Path | None = option("Of a model that reads pictures: one; default: noise.", metavar="FILE")
    ask: str | None = option("A question about it.", metavar="TEXT")
    repeats: int = option("Times that each measurement is made.", 5, metavar="N", min=1)
    graphs: Path | None = option("Keep the exported graphs there.", metavar="DIR")
    roofline: bool = option("Measure what this machine can do, and no model.", False, flag="--roofline")
    plot: Path | None = option("Draw time and quality as a PNG.", writes="file", metavar="FILE")
    examples: int = 64
    batches: int = 8
    baselines: tuple[str, ...] = ("random", "firstk")

    @property
    def wants_data(self) -> bool:
        return not (decodes(self.model) or reads(self.model))


@dataclass(frozen=True, kw_only=True)
class AuditSpec(TaskSpec):
    """Say what ``audit`` compares, and in which slices."""

    against: str | None = option("The dense model to compare with.", metavar="DENSE")
    by: tuple[str, ...] = option("Columns of groups: dialect, source, ...", (), metavar="COLUMN[,..]")
    examples: int = option("Lost examples to show of each of the worst slices.", 2, metavar="N", min=0)
    html: Path | None = option("Write a page for the browser.", writes="file", metavar="FILE")
    batch_size: int = option("Texts in a batch.", 32, metavar="N", min=1)
    layout: str = option("auto, mask, padded or packed.", "auto", metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class ExportSpec(TaskSpec):
    """Say what graph ``export`` writes; texts of the train part calibrate int8 in OpenVINO, thresholds for phones."""

    lacking: ClassVar[str] = "int8 in OpenVINO needs texts to calibrate on: name the data (--data)"

    out: Path = option("The folder for the graph.", MISSING, writes="folder", metavar="DIR")
    format: str = option("onnx, openvino or executorch.", "onnx", metavar="NAME")
    precision: str = option("fp32, bf16 (openvino) or int8.", "fp32", metavar="NAME")
    lengths: tuple[int, ...] = option("Of executorch: tokens that its methods take.", (), metavar="M[,N]")
    metric: str | None = None  # nothing is measured

    @property
    def wants_data(self) -> bool:
        return (self.format, self.precision) == ("openvino", "int8")


@dataclass(frozen=True, kw_only=True)
class ShowSpec(CacheSpec, TaskSpec):
    """Say which texts, or which picture, ``show`` follows through the layers."""

    lacking: ClassVar[str] = "give one of --text, --file, --data and --image; --pair goes with one --text"

    texts: list[str] | None = option("A text; may be given several times.", flag="--text", metavar="TEXT")
    pair: str | None = option("The text beside it, for models that read pairs.", metavar="TEXT")
    file: Path | None = option("One text per line.", metavar="FILE")
    image: Path | None = option("A picture, for models that read pictures.", metavar="FILE")
    ask: list[str] | None = option("A question about it; may be given several times.", flag="--ask", metavar="TEXT")
    new: int = option("Tokens of an answer, at most.", 32, metavar="N", min=1)
    text: tuple[str, ...] | None = option("Text columns of the data, if unusual.", flag="--columns", metavar="A[,B]")
    limit: int | None = option("Texts to show.", 10, metavar="N", min=1)
    html: Path | None = option("Write a page for the browser.", writes="file", metavar="FILE")
    png: Path | None = option("Draw what is left of the picture as a PNG.", writes="file", metavar="FILE")
    layout: str = option("auto, mask, padded or packed.", "auto", metavar="NAME")
    label: str | None = None  # neither is read
    metric: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        named = sum(map(bool, (self.texts, self.file, self.data, self.image)))
        if named > 1 or (self.pair and len(self.texts or ()) != 1):
            raise ValueError(self.lacking)
        if (self.png or self.ask) and not self.image:
            raise ValueError(f"--{'png draws' if self.png else 'ask asks about'} a picture: give one with --image")

    @property
    def wants_data(self) -> bool:
        return not (self.texts or self.file or self.image)

    def completed(self) -> Self:
        """A picture has neither columns nor a length."""
        return self if self.image else super().completed()


@dataclass(frozen=True, kw_only=True)
class ScoreSpec(ModelSpec):
    """Say which files ``score`` reads, by which model and how; the saved fields decide the result.

    Raises:
        ValueError: a number is below 1, ``text`` names more than two columns, or ``ray`` comes without ``workers``.
    """

    data: list[str] = option(
        "Files of texts: parquet, jsonl, csv, tsv, also .gz; folders; patterns.",
        MISSING,
        saved=False,
        metavar="FILES...",
    )
    more: list[str] | None = option("More files, after those of --data.", argument=True, saved=False, metavar="[FILES]")
    out: Path = option("The folder for the result.", MISSING, writes="folder", saved=False, metavar="DIR")
    text: tuple[str, ...] | None = option("Text columns, one or two, if unusual.", metavar="A[,B]")
    keep: tuple[str, ...] = option("Columns to hand on.", (), metavar="A[,B]")
    prefix: str = option("What the names of the new columns begin with.", "", metavar="TEXT")
    best: bool = option("The label and its probability alone, not those of all classes.", False, flag="--best")
    prompt: str | None = option("Which prompt of an embedder stands before every text.", metavar="NAME")
    max_length: int | None = option("Tokens of a text; the rest is cut; default: as trained.", metavar="N", min=3)
    tokens: int = option("Padded tokens of a batch.", 8192, metavar="N", min=1)
    shard_rows: int = option("Rows of a shard, which is a file of the result.", 16384, metavar="N", min=1)
    workers: int | None = option("Processes; default: one for each core, 8 at most.", saved=False, metavar="N", min=1)
    ray: str | None = option("Workers are Ray actors: auto, local or HOST:PORT.", saved=False, metavar="AT")
    threads: int = option("Threads of each process.", 1, metavar="N", min=1)
    layout: str = option("auto, mask, padded or packed, of a pruned model in torch.", "auto", metavar="NAME")
    device: str = option("cpu or cuda, of a model in torch.", "cpu", metavar="NAME")
    fresh: bool = option("Remove what an earlier run left.", False, saved=False, flag="--fresh")

    def __post_init__(self) -> None:
        data = [self.data] if isinstance(self.data, (str, Path)) else [*self.data]
        object.__setattr__(self, "data", [str(name) for name in (*data, *(self.more or ()))])
        object.__setattr__(self, "more", None)
        object.__setattr__(self, "model", str(self.model))
        object.__setattr__(self, "out", Path(self.out))
        if Path(self.model).suffix.lower() in (".parquet", ".jsonl", ".csv", ".tsv", ".gz"):
            raise ValueError(f"{self.model} is no model: name the model first, then --data and its files")
        for name in ("text", "keep"):
            columns = getattr(self, name)
            object.__setattr__(self, name, (columns,) if isinstance(columns, str) else columns and tuple(columns))
        small = [name for name in ("tokens", "shard_rows", "threads") if getattr(self, name) < 1]
        if small or (self.workers is not None and self.workers < 1):
            raise ValueError(f"{(small or ['workers'])[0]} is below 1: expected 1 or more")
        if self.ray is not None and self.workers is None:
            raise ValueError(f"ray={self.ray}: say how many actors there are to be (--workers N)")
        if self.text is not None and not 1 <= len({*self.text}) == len(self.text) <= 2:
            raise ValueError(f"text={','.join(self.text)}: expected one column of text, or two")

    def saved(self) -> dict[str, Any]:
        """The options that decide the result, beside the model and the files."""
        names = [f.name for f in fields(self) if f.name != "model" and f.metadata.get("saved", True)]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class ServeSpec(ModelSpec):
    """Say what ``serve`` serves, where, and how much it takes on; the key may be in THRESHER_API_KEY.

    Raises:
        ValueError: a number is below what makes sense, or the key is empty.
    """

    host: str = option("Where to listen; 0.0.0.0: on all networks.", "127.0.0.1", metavar="NAME")
    port: int = option("The port; 0: any that is free.", 8080, metavar="N", min=0)
    api_key: str | None = option("Asked for as a bearer token; default: THRESHER_API_KEY.", metavar="KEY")
    name: str | None = option("How the model is called in answers; default: MODEL.", metavar="NAME")
    tokens: int | None = option("Padded tokens of a batch; default: 1024, of a GPU 8192.", metavar="N", min=1)
    wait_ms: float = option("Milliseconds that a text waits for others after a pause.", 2.0, metavar="MS", min=0)
    queue_tokens: int = option("Tokens that may wait; above, requests get 429.", 262144, metavar="N", min=1)
    max_client_batch: int = option("Texts of one request.", 128, metavar="N", min=1)
    max_length: int | None = option("Tokens of a text; the rest is cut; default: as trained.", metavar="N", min=3)
    threads: int | None = option("Threads of the model; default: all.", metavar="N", min=1)
    layout: str = option("auto, mask, padded or packed, of a pruned model in torch.", "auto", metavar="NAME")
    device: str = option("cpu or cuda, of a model in torch.", "cpu", metavar="NAME")

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", str(self.model))
        least = {"port": 0, "tokens": 1, "wait_ms": 0, "queue_tokens": 1, "max_client_batch": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ValueError(f"{name}={value}: expected {bound} or more")
        if self.port > 65535:
            raise ValueError(f"port={self.port}: expected 0 to 65535")
        if self.api_key == "":
            raise ValueError("the API key is empty: expected one or more characters")

    def completed(self) -> ServeSpec:
        """The key of the environment, where none was given."""
        return self if self.api_key else replace(self, api_key=os.environ.get("THRESHER_API_KEY"))


@dataclass(frozen=True, kw_only=True)
class ServedSpec:
    """Say what a budget of time is for, see ``service.Service``."""

    runtime: str = option("What a budget of ms is for: torch, onnx or openvino.", "torch", metavar="NAME")
    precision: str = option("Of that runtime: fp32, bf16 (openvino) or int8.", "fp32", metavar="NAME")
    serve_batch: int = option("Texts at once there; the budget is of one text.", 1, metavar="N", min=1)


@dataclass(frozen=True, kw_only=True)
class TuneSpec(ServedSpec, TaskSpec):
    """Say what ``tune`` searches for: one budget, a method, the texts."""

    out: Path = option("The folder for the pruned model.", MISSING, writes="folder", metavar="DIR")
    target_flops: float | None = option("Budget: share of the dense MACs to be left.")
    target_latency_ms: float | None = option("Budget: mean ms per text, in the runtime that will serve.")
    max_disagreement: float | None = option("Budget: share of texts with another answer than the dense model's.")
    max_drop: float | None = option("Budget: points of accuracy that may be lost; needs labels.")
    method: str = option("topk, spatten, vatp, entropy, ats, tome, tofu; auto: the best.", "auto", metavar="NAME")
    seed: int = option("Of the order of the texts.", 0, metavar="N")
    plot: Path | None = option("Draw cost and divergence as a PNG.", writes="file", metavar="FILE")
    batch_size: int = option("Texts in a batch.", 32, metavar="N", min=1)
    min_length: int | None = option(
        "Leave out texts of fewer tokens, to search on such as will be served.", metavar="N", min=1
    )
    metric: str | None = None  # the budget says what is measured
    method_options: dict | None = None


def one_share(value: str | float) -> float | int:
    """Read one share (0.5), or one number (64) of tokens."""
    return float(value) if "." in str(value) else int(value)


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """Name a pruning method and its options.

    method: a pruning method, or "dense": the same extra steps and distillation with nothing pruned.
    method_options: its fields, e.g. ``{"target_flops": 0.4}``; those below are short for the most usual ones.
    """

    method: str | None = option("topk, ltp, top, ...; default: topk.", metavar="NAME")
    target_flops: float | None = option("Share of the dense MACs to be left.", saved=False)
    target_latency: float | None = option("Share of the dense time to be left (top).", saved=False)
    target_latency_ms: float | None = option("Mean milliseconds per text (top).", saved=False)
    keep: float | tuple | None = option(
        "Share (0.5) or number (64) kept, for topk and its kin.", saved=False, metavar="K", parser=shares
    )
    at: tuple[int, ...] | None = option("Layers after which tokens leave.", saved=False, metavar="1,2,4")
    method_options: dict | None = None

    @property
    def options(self) -> dict[str, Any]:
        """All options of the method that were given."""
        given = {
            f.name: getattr(self, f.name) for f in fields(MethodSpec) if f.name not in ("method", "method_options")
        }
        return {name: value for name, value in given.items() if value is not None} | (self.method_options or {})


@dataclass(frozen=True, kw_only=True)
class TrainingSpec(TaskSpec):
    """Say how a model is trained, with or without pruning.

    epochs, prune_epochs: where they are open a training goes on until the loss on validation rows no longer falls, see
        ``training.until``; where they are given the rate falls from the first step on.
    lr, prune_lr: peak rates of the fine-tuning and of the training with pruning; where they are open, the best of
        ``stages.RATES`` after short trainings. Of a training of given length: 5e-5, and ``lr``.
    pruner_lr: peak rate of the method's own parameters (default: the method's).
    distill: weight of the dense model's answers against the labels.
    """

    epochs: float | None = option(
        "Dense fine-tuning; 0 if MODEL is fine-tuned; default: until it is trained.", metavar="N", min=0
    )
    prune_epochs: float | None = option("Training with pruning; default: until it is trained.", metavar="N", min=0)
    lr: float | None = option("Peak learning rate; default: the best of a few.")
    dropout: float | None = option("Dropout rate; default: the model's own.")
    bf16: bool | None = option("In bfloat16; default: where it is fast.", flag="--bf16/--no-bf16")
    freeze_embeddings: bool = option("Keep the embeddings as they are.", True)
    batch_size: int | None = option("Texts in a batch; default: 32.", metavar="N", min=1)
    prune_lr: float | None = None
    pruner_lr: float | None = None
    distill: float = 0.5

    def completed(self) -> Self:
        spec = super().completed()
        spec = spec if spec.batch_size else replace(spec, batch_size=32)
        return spec.fixed("lr") if spec.epochs is not None and spec.prune_epochs is not None else spec

    def fixed(self, *names: str) -> Self:
        """Settle what is open of some fields as in a training of a given length."""
        usual: dict[str, Any] = {name: FIXED[name] for name in names or FIXED if getattr(self, name) is None}
        return replace(self, **usual)


@dataclass(frozen=True, kw_only=True)
class TrainSpec(MethodSpec, ServedSpec, TrainingSpec):
    """Say how ``train`` makes a pruned model; the saved fields decide the result.

    task: what the model is to do. "rerank": give a query and a candidate one number, which orders a query's candidates.
        "embed": give a text the vector that the model gives it now; no label is read. Default: what the data say.
    max_drop: the strongest budget is searched for whose drop on the validation part keeps it, see ``strongest``.
    method: default: "topk"; of an embedder that averages states, which can merge, "tome", as "tofu" by states.
    dropout: default: the model's own; 0 where vectors are learned.
    recipe: a method and a task, "top-mrpc" (see ``recipes``), whose settings stand where none is given.
    distill_states: weight of the dense model's states, layer by layer (``training.trainer.Distill``), in every step.
    dense_model: a folder to take the dense fine-tuned model from.
    layers: the pruned model has so many of the first layers alone, the baseline of depth; with ``method="dense"``.
    replay: folder of a pruned model; the method keeps as many tokens of each text as that one does.
    """

    out: Path = option("The folder for the pruned model.", MISSING, writes="folder", saved=False, metavar="DIR")
    task: str | None = option("classify, rerank or embed; default: what the data say.", metavar="NAME")
    max_drop: float | None = option(
        "Points of quality that may be lost on the validation part; default, without another budget: 1."
    )
    recipe: str | None = option("Settings of a method and a task: top-mrpc.", saved=False, metavar="M-TASK")
    distill_states: float | None = option("Weight of the dense model's states; default: 0.", metavar="BETA", min=0)
    fresh: bool = option("Start again, and replace a result at the end.", False, saved=False, flag="--fresh")
    seed: int = option("Of initialisation, order and dropout.", 0, metavar="N")
    threads: int | None = option("Threads of the processor; default: all.", saved=False, metavar="N", min=1)
    dense_model: str | None = None
    layers: int | None = None
    replay: str | None = None

    def completed(self) -> Self:
        """Settle the open fields: by the recipe, by the model's folder, by what is usual; all options in one place.

        Raises:
            ValueError: two budgets, or a bound on the drop for a method that meets no budget of MACs.
        """
        preset = recipe(self.recipe)
        if "embed" in (self.task, preset.get("task")):
            named = self.method or (preset["method"] if self.recipe or self.replay else None)
            preset |= {"dropout": 0.0} | of_averages(str(self.model), named, self.options)
        usual, method = preset.pop("method_options"), self.method or preset["method"]
        given, drop = self.options, self.max_drop
        named, able = sorted({*given} & {*AMOUNTS}), has_budget(method)
        if drop is not None and is_known(method) and (named or self.replay or not able or not drop > 0):
            why = f"{named[0]} is another budget" if named else f"max_drop={drop} is no budget for method={method!r}"
            why = "max_drop is a number of points above 0" if not drop > 0 else why
            raise ValueError(f"{why}: give one, --max-drop or another, to a method that has target_flops")
        if not self.replay and not named and able:
            drop = MAX_DROP if drop is None else drop
        options = (usual if method == preset["method"] else {}) | given
        open_ = {name: value for name, value in preset.items() if getattr(self, name) is None}
        loose = dict.fromkeys(f.name for f in fields(MethodSpec))
        settled = loose | open_ | {"method": method, "method_options": options, "max_drop": drop}
        spec = super(TrainSpec, replace(self, recipe=None, **settled)).completed()
        if spec.task not in (None, *TASKS):
            raise ValueError(f"there is no task {spec.task!r}: expected {', '.join(TASKS)}")
        if spec.task == "rerank" and spec.metric is None:
            spec = replace(spec, metric="ndcg@10")
        return spec.fixed() if self.replay else spec  # whose counts are known of the training rows alone

    def saved(self) -> dict[str, Any]:
        """The fields that decide the result, as they stand in thresher.json."""
        return saved(self)


@dataclass(frozen=True, kw_only=True)
class PrepareSpec(TaskSpec):
    """Say how ``prepare`` makes an encoder ready to be pruned: which texts, and for how long.

    Raises:
        ValueError: neither steps nor minutes are above 0.
    """

    model: str = option(
        "The folder of an encoder or embedder, or its name on the hub.", MISSING, metavar="ENCODER", argument=True
    )
    out: Path = option("The folder for the encoder.", MISSING, writes="folder", saved=False, metavar="DIR")
    steps: int | None = option("Steps; default: 2000, or as many as the minutes allow.", metavar="N", min=1)
    minutes: float | None = option("Minutes after which it ends, at the latest.", metavar="N", min=0)
    lr: float = option("Peak learning rate.", 1e-4)
    bf16: bool | None = option("In bfloat16; default: where it is fast.", flag="--bf16/--no-bf16")
    batch_size: int = option("Texts in a batch.", 32, metavar="N", min=1)
    seed: int = option("Of the order of the texts and of the schedules.", 0, metavar="N")
    fresh: bool = option("Start again, and replace a result at the end.", False, saved=False, flag="--fresh")
    threads: int | None = option("Threads of the processor; default: all.", saved=False, metavar="N", min=1)
    label: str | None = None  # none is read
    metric: str | None = None

    def completed(self) -> Self:
        spec = super().completed()
        if (spec.steps is not None and spec.steps < 1) or (spec.minutes is not None and not spec.minutes > 0):
            raise ValueError(f"steps={spec.steps}, minutes={spec.minutes}: expected numbers above 0")
        return spec if spec.steps or spec.minutes else replace(spec, steps=STEPS)

    def saved(self) -> dict[str, Any]:
        """The fields that decide the result, as they stand in thresher.json."""
        return saved(self)


@dataclass(frozen=True, kw_only=True)
class CompareSpec(TrainingSpec):
    """Say which methods ``compare`` trains to which budgets; ``repeats`` is of each measurement of time."""

    out: Path = option("The folder for all runs, the table and the figure.", MISSING, writes="folder", metavar="DIR")
    methods: tuple[str, ...] = option(
        "Methods; random and firstk, or their like, always take part; default: a few.", (), metavar="A[,B]"
    )
    targets: tuple[float, ...] = option(
        "Shares of the dense MACs, or of a decoder's cache, to be left.", (0.5, 0.3), metavar="A[,B]"
    )
    seeds: tuple[int, ...] = option("Seeds of the training.", (0,), metavar="A[,B]")
    epochs: float | None = option("Dense fine-tuning; 0 if MODEL is fine-tuned; default: 3.", metavar="N", min=0)
    prune_epochs: float | None = option("Training with pruning; default: 3.", metavar="N", min=0)
    lr: float | None = option("Peak learning rate; default: 5e-5.")
    untrained: bool = option("Meet the budget only, without training a method.", False, flag="--untrained")
    time: bool = option("Time the first seed of all in one run.", True)
    at: tuple[int, ...] | None = option("Layers after which tokens leave.", metavar="1,2,4")
    tasks: tuple[str, ...] = option(
        "Asked of a decoder about a text: needle, multikey, tracking, squad; or words.", ("needle",), metavar="A[,B]"
    )
    when: tuple[str, ...] = option(
        "When a decoder reads the question, after entries have left or before.", ("after", "before"), metavar="A[,B]"
    )
    repeats: int = 5

    def completed(self) -> Self:
        """All methods train for as long; a decoder reads longer texts, and is not trained."""
        causal = decodes(self.model)
        spec = replace(self, methods=self.methods or (CACHES if causal else ENCODERS))
        if causal:
            return super(TrainingSpec, replace(spec, max_length=spec.max_length or DECODER_LENGTH)).completed()
        return super(CompareSpec, spec).completed().fixed()


def job(kind: type[Any]) -> Callable[[Callable], Callable]:
    """Decorate an experiment: it takes a specification, or the fields of one, model, data and out by their place.

    The specification is completed, and the number of threads is the one asked for while the experiment runs.
    """
    names = {f.name for f in fields(kind)}
    places = [name for name in ("model", "data", "out") if name in names]

    def wrap(experiment: Callable) -> Callable:
        @functools.wraps(experiment)
        def run(*given: Any, **more: Any) -> Any:
            if given and isinstance(given[0], kind):
                return run_completed(given[0].completed(), **more)
            own = {name: more.pop(name) for name in [*more] if name in names}
            return run_completed(kind(**dict(zip(places, given, strict=False)), **own).completed(), **more)

        def run_completed(spec: Any, **more: Any) -> Any:
            from ..evaluation.hardware import torch_threads

            with torch_threads(spec.threads):
                return experiment(spec, **more)

        return run

    return wrap


def saved(spec: Any) -> dict[str, Any]:
    """The fields of a specification that decide the result, as JSON has them."""
    names = [f.name for f in fields(spec) if f.metadata.get("saved", True)]
    return json.loads(json.dumps({name: getattr(spec, name) for name in names}))


def task_entry(spec: TaskSpec, task: Any, max_length: int) -> dict[str, Any]:
    """What a folder remembers of its task, for ``TaskSpec.completed``."""
    usual = (task.text_columns, task.label_column) == (PAIR, "label")  # maybe made of paragraphs: found again
    made = usual or task.kind in ("qa", "embedding")
    found = {} if made else {"text": list(task.text_columns), "label": task.label_column}
    read = {name: getattr(spec, name) for name in COLUMNS} | found
    return {"data": located(spec.data), **read, "metric": task.metric, "max_length": max_length}


def remembered(model: str | None) -> dict[str, Any]:
    """The task that a folder was trained or tuned on; nothing for other folders and for models of the hub."""
    try:
        return dict(json.loads((Path(model or "") / SUMMARY).read_text(encoding="utf-8"))["task"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def located(data: str) -> str:
    """The data as another working directory would name them."""
    return str(Path(data).expanduser().absolute()) if Path(data).expanduser().exists() else data


def is_known(method: str) -> bool:
    """Whether there is a method of this name; what else is told of one that is not misleads."""
    from .. import api  # noqa: F401  makes the methods known by name
    from ..core.pruner import METHODS

    return method == "dense" or method in METHODS


def has_budget(method: str) -> bool:
    """Whether a method meets a share of the MACs."""
    from .. import api  # noqa: F401  makes the methods known by name
    from ..core.pruner import METHODS

    return method in METHODS and "target_flops" in {f.name for f in fields(METHODS[method])}


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
