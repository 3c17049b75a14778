"""A model as a function of texts: it opens when it is first called, and travels to other processes unopened.

Shapes: N texts, B of them in a batch, K logits.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from ..core.cost import dense_macs, macs
from ..core.pruner import TokenPruner, pruner_of
from ..data.models import clip, load, positions, reading
from ..exporting.runtime import load_runtime
from .batching import BUDGET, WINDOW, Batcher
from .inputs import is_text

HEAD = "ForSequenceClassification"
CHUNK = 512  # texts that are tokenized at once
LONGEST = 512  # tokens of a text, where nobody says
SPEC = "thresher.json"


@dataclass
class Tally:
    """Count what was done: texts, those without an answer, those that were cut; tokens, alone and padded; MACs, used
    and those of the dense model, of pruned models in torch."""

    rows: int = 0
    unread: int = 0
    cut: int = 0
    tokens: int = 0
    padded: int = 0
    macs_used: int = 0
    macs_dense: int = 0

    def __add__(self, other: Tally) -> Tally:
        mine, its = asdict(self), asdict(other)
        return Tally(**{name: mine[name] + its[name] for name in mine})


@dataclass
class Scores:
    """Hold the columns of N texts, which of them have an answer (N,) bool, and what it took."""

    columns: dict[str, np.ndarray]
    answered: np.ndarray
    tally: Tally


@dataclass
class Scorer:
    """Score texts by a classifier or a model of one number: a torch folder, pruned or dense, or an exported one.

    ``scorer(batch)`` takes and gives what engines of data frames hand over:

    | batch | result |
    |---|---|
    | a list of texts, or of pairs of them | a dict of columns |
    | a dict of columns, of lists or arrays (Ray Data) | the same with further columns |
    | a pandas frame (Dask) | the same with further columns |
    | an iterator over such batches (Spark's mapInPandas) | an iterator over the results |

    The columns are ``label``, ``probability`` (of the label) and ``probability_CLASS`` for each class; of a model of
    one number ``score``, of one of several numbers ``score_NAME``. What is no string has no answer: None, and NaN.

    Args:
        model: the folder, or a name on the hub. It is opened by the first call, once in each process.
        text: the column of text in a batch of columns, or two of them.
        tokens: padded tokens of a batch.
        max_length: where texts are cut; default as trained or exported, else what the model takes, 512 at most.
        layout: auto, mask, padded or packed, of a pruned model in torch.
        threads: of the processor; default: all.
        device: cpu or cuda, of a model in torch.
        prefix: stands before the names of the columns.
        best: leave ``probability_CLASS`` out.

    Raises:
        ValueError: (when it opens) no such model, or one that does not classify; (when it is called) a batch that is
            none of these, lacks the column or has one called as one of the result; an answer that is no number.

    Example:
        >>> scorer = Scorer("runs/reviews")
        >>> scorer(["Wonderful acting.", "Far too long."])["label"]
        >>> dataset.map_batches(Scorer, fn_constructor_args=["runs/reviews"], concurrency=2)  # Ray Data
    """

    model: str
    text: str | Sequence[str] = "text"
    tokens: int = BUDGET
    max_length: int | None = None
    layout: str = "auto"
    threads: int | None = None
    device: str = "cpu"
    prefix: str = ""
    best: bool = False

    def __post_init__(self) -> None:
        self.model = str(self.model)
        self.text = (self.text,) if isinstance(self.text, str) else tuple(self.text)
        if not 1 <= len({*self.text}) == len(self.text) <= 2:
            raise ValueError(f"text={self.text}: expected the name of one column of text, or of two")
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: expected 1 or more padded tokens in a batch")
        self._engine: Engine | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_engine": None}

    def open(self) -> Engine:
        """Return the opened model."""
        if self._engine is None:
            if self.threads:
                torch.set_num_threads(self.threads)
            self._engine = open_graph(self) if is_graph(self.model) else open_torch(self)
        return self._engine

    def __call__(self, batch: Any) -> Any:
        """Score a batch; see the class."""
        if isinstance(batch, Iterator):
            return map(self, batch)
        if isinstance(batch, (list, tuple)):
            pairs = [item for item in batch if isinstance(item, (list, tuple))]
            if pairs and (len(pairs) < len(batch) or any(len(pair) != 2 for pair in pairs)):
                raise ValueError("a batch of texts and other lists: expected texts alone, or pairs of texts alone")
            return self.score([*map(list, zip(*batch, strict=True))] if pairs else [list(batch)]).columns
        frame = hasattr(batch, "assign") and hasattr(batch, "columns")
        if not frame and not isinstance(batch, Mapping):
            raise ValueError(f"a batch of {type(batch).__name__}: expected a list of texts, columns or a frame")
        names = list(batch.columns) if frame else list(batch)
        for name in self.text:
            if name not in names:
                raise ValueError(f"the batch has no column {name!r}: its columns are {', '.join(map(str, names))}")
        columns = self.score([list(batch[name]) for name in self.text]).columns
        for name in columns:
            if name in names:
                raise ValueError(f"the batch has a column {name!r} of its own: say Scorer(..., prefix='model_')")
        return batch.assign(**columns) if frame else {**batch, **columns}

    def score(self, texts: Sequence[Sequence[Any]], told: Callable[[int], Any] | None = None) -> Scores:
        """Score N texts, or pairs: one list for each column of text. ``told`` hears how many more are done."""
        logits, answered, tally = self.open().logits(texts, self.tokens, told)
        values = columns_of(logits, self.open().config, self.best)
        for column in values.values():
            column[~answered] = None if column.dtype == object else np.nan
        return Scores({self.prefix + name: column for name, column in values.items()}, answered, tally)


class Engine:
    """An opened model: ``forward`` from tensors (B, N) to logits (B, K), its tokenizer, its configuration.

    Attributes:
        longest: where texts are cut.
        takes: names of the inputs.
        width: of a batch whose longest text has so many tokens.
        device: where the inputs go.
        pruner: the method of a pruned model in torch.
    """

    def __init__(self, forward: Callable[..., torch.Tensor], tokenizer: Any, config: Any, longest: int):
        self.forward, self.tokenizer, self.config, self.longest = forward, tokenizer, config, longest
        self.takes = {"input_ids", "attention_mask", "token_type_ids"}
        self.width: Callable[[int], int] = int
        self.device = torch.device("cpu")
        self.pruner: TokenPruner | None = None

    def logits(
        self, texts: Sequence[Sequence[Any]], tokens: int = BUDGET, told: Callable[[int], Any] | None = None
    ) -> tuple[np.ndarray, np.ndarray, Tally]:
        """(N, K) fp32 logits, NaN where a text is no string; (N,) whether there is an answer; and what it took.

        No more than ``WINDOW`` texts are held as tokens at a time. Batches depend on the texts alone.
        """
        count, waiting = len(texts[0]), Batcher(tokens)
        answered = np.array([all(map(is_text, row)) for row in zip(*texts, strict=True)], bool)
        logits = np.full((count, self.config.num_labels), np.nan, np.float32)
        tally, good = Tally(rows=count, unread=count - int(answered.sum())), np.flatnonzero(answered)

        def run() -> None:
            nonlocal tally
            rows, encoded = zip(*waiting.take(), strict=True)
            answers, spent = self._run(encoded)
            tally, logits[list(rows)] = tally + spent, answers
            if told:
                told(len(rows))

        for start in range(0, len(good), CHUNK):
            rows = good[start : start + CHUNK]
            encoded, cut = self._encode([[column[row] for row in rows] for column in texts])
            tally.cut += cut
            for row, one in zip(rows, encoded, strict=True):
                waiting.add((row, one), len(one["input_ids"]))
            while len(waiting) >= WINDOW:
                run()
        while len(waiting):
            run()
        if told and tally.unread:
            told(tally.unread)
        wrong = np.flatnonzero(answered & ~np.isfinite(logits).all(1))
        if len(wrong):
            text = texts[0][wrong[0]]
            raise ValueError(f"the model's answer to {text[:60]!r} is no number: score in float32, or repair the model")
        return logits, answered, tally

    def _encode(self, texts: list[list[str]]) -> tuple[list[dict[str, np.ndarray]], int]:
        """The inputs of each text, without padding, and how many texts were cut."""
        encoded = self.tokenizer(*texts, truncation="longest_first", max_length=self.longest)
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded and name in self.takes]
        if encoded.encodings is not None:
            cut = sum(bool(row.overflowing) for row in encoded.encodings)
        else:  # a tokenizer written in Python
            cut = sum(len(ids) > self.longest for ids in self.tokenizer(*texts, verbose=False)["input_ids"])
        end = self.tokenizer.eos_token_id or self.tokenizer.pad_token_id or 0
        empty = {"input_ids": [end], "token_type_ids": [0]}
        rows = zip(*(encoded[name] for name in names), strict=True)
        return [
            {name: np.array(ids or empty[name], np.int32) for name, ids in zip(names, row, strict=True)} for row in rows
        ], cut

    def _run(self, encoded: Sequence[dict[str, np.ndarray]]) -> tuple[np.ndarray, Tally]:
        """(B, K) logits of one batch, padded on the right."""
        lengths = np.array([len(one["input_ids"]) for one in encoded])
        width = self.width(int(lengths.max()))
        fill = {"input_ids": getattr(self.config, "pad_token_id", None) or 0}
        inputs = {name: np.full((len(encoded), width), fill.get(name, 0), np.int64) for name in encoded[0]}
        inputs["attention_mask"] = (np.arange(width) < lengths[:, None]).astype(np.int64)
        for i, one in enumerate(encoded):
            for name, values in one.items():
                inputs[name][i, : len(values)] = values
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(values).to(self.device) for name, values in inputs.items()}
            logits = (
                self.forward(**{name: x for name, x in tensors.items() if name in self.takes}).float().cpu().numpy()
            )
        spent = Tally(tokens=int(lengths.sum()), padded=len(encoded) * width)
        if self.pruner is not None:
            record = self.pruner.last_record()
            spent.macs_used = int(macs(record.costs, record.counts).sum())
            spent.macs_dense = int(dense_macs(record.costs, torch.from_numpy(lengths)).sum())
        return logits, spent


def open_torch(scorer: Scorer) -> Engine:
    """Open a transformers model, pruned if its configuration says so."""
    net: Any
    config_of(scorer.model)
    net, tokenizer = load(scorer.model, scorer.layout)
    try:
        net = net.to(scorer.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={scorer.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    trained = (_spec(scorer.model).get("task") or {}).get("max_length")
    usual = trained or min(LONGEST, positions(net) or LONGEST)
    engine = Engine(
        lambda **inputs: net(**inputs).logits, tokenizer, net.config, clip(scorer.max_length or usual, net.config)
    )
    engine.takes &= {*inspect.signature(net.forward).parameters}
    engine.device, engine.pruner = net.device, pruner_of(net)
    return engine


def open_graph(scorer: Scorer) -> Engine:
    """Open what ``export`` wrote."""
    config_of(scorer.model)
    longest = _spec(scorer.model)["max_length"]
    if scorer.max_length and scorer.max_length > longest:
        raise ValueError(f"max_length={scorer.max_length}: {scorer.model} was exported for {longest} tokens at most")
    if scorer.device != "cpu":
        raise ValueError(f"device={scorer.device!r}: exported models run on the cpu")
    runtime = load_runtime(scorer.model, threads=scorer.threads)
    if runtime.tokenizer is None:
        raise ValueError(f"{scorer.model} was exported without its tokenizer: export it with one")
    engine = Engine(
        lambda **inputs: runtime.forward(**inputs)["logits"],
        runtime.tokenizer,
        runtime.config,
        scorer.max_length or longest,
    )
    engine.width = runtime.width
    return engine


def is_graph(model: str) -> bool:
    """Whether a folder is an exported model."""
    return "format" in _spec(model)


def config_of(model: str) -> Any:
    """Return the configuration of a model, exported or not.

    Raises:
        ValueError: it cannot be read, or does not classify; transformers would give such a model a random head.
    """
    config = reading(AutoConfig.from_pretrained, model)
    names = [_spec(model)["architecture"]] if is_graph(model) else config.architectures or ()
    if not any(name.endswith(HEAD) for name in names):
        what = ", ".join(names) or "a model of no known architecture"
        raise ValueError(f"{model} is {what}: expected a classifier or a model of one number (...{HEAD})")
    return config


def _spec(model: str) -> dict[str, Any]:
    """What the folder says of itself."""
    try:
        return dict(json.loads((Path(model) / SPEC).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def names_of(config: Any, best: bool = False) -> dict[str, str]:
    """The columns that a model of such a configuration gives, and what is in them: "text" or "number"."""
    count = config.num_labels
    classes = [str(config.id2label[i]) for i in range(count)]
    classes = classes if len({*classes}) == count else [str(i) for i in range(count)]
    if count == 1:
        return {"score": "number"}
    if config.problem_type == "regression":
        return {f"score_{name}": "number" for name in classes}
    each = [] if best else [f"probability_{name}" for name in classes]
    return {"label": "text", **dict.fromkeys(["probability", *each], "number")}


def columns_of(logits: np.ndarray, config: Any, best: bool = False) -> dict[str, np.ndarray]:
    """Columns (N,) out of logits (N, K): as ``Runtime`` judges them, softmax, sigmoid or the number itself."""
    kind, names = config.problem_type, [*names_of(config, best)]
    numbers = torch.from_numpy(logits)
    if kind == "regression":
        values = numbers
    elif kind == "multi_label_classification" or logits.shape[1] == 1:
        values = numbers.sigmoid()
    else:
        values = numbers.softmax(-1)
    scores = values.numpy()
    if names[0] != "label":
        return {name: scores[:, i].copy() for i, name in enumerate(names)}
    chosen = np.nan_to_num(scores, nan=-1.0).argmax(1) if len(scores) else np.zeros(0, int)
    labels = np.array([str(config.id2label[i]) for i in range(config.num_labels)], object)
    top = {"label": labels[chosen], "probability": scores[np.arange(len(scores)), chosen]}
    return top | {name: scores[:, i].copy() for i, name in enumerate(names[2:])}
