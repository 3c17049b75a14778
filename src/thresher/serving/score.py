"""A model as a function of texts: it opens when it is first called, and travels to other processes unopened.

Shapes: N texts, K logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data import scores as data_scores
from .batching import BUDGET
from .engine import Engine, Opening, Outline, Tally


@dataclass
class Scores:
    """Hold the columns of N texts, which of them have an answer (N,) bool, and what it took."""

    columns: dict[str, np.ndarray]
    answered: np.ndarray
    tally: Tally


@dataclass
class Scorer:
    """Score texts by a classifier, a model of one number or an embedder: a torch folder, pruned or dense, or an
    exported one.

    ``scorer(batch)`` takes and gives what engines of data frames hand over:

    | batch | result |
    |---|---|
    | a list of texts, or of pairs of them | a dict of columns |
    | a dict of columns, of lists or arrays (Ray Data) | the same with further columns |
    | a pandas frame (Dask) | the same with further columns |
    | an iterator over such batches (Spark's mapInPandas) | an iterator over the results |

    The columns are ``label``, ``probability`` (of the label) and ``probability_CLASS`` for each class; of a model of
    one number ``score``, of one of several numbers ``score_NAME``; of an embedder ``embedding``, (N, D). What is no
    string has no answer: None, and NaN.

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
        prompt: the name of the prompt that an embedder sets before every text; default: what its folder names, mostly
            nothing.

    Raises:
        ValueError: (when it opens) no such model, or one that neither classifies nor embeds; (when it is called) a
            batch that is none of these, lacks the column or has one called as one of the result; an answer that is no
            number.

    Example:
        >>> scorer = Scorer("runs/reviews")
        >>> scorer(["Wonderful acting.", "Far too long."])["label"]
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
    prompt: str | None = None

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
            how = Opening(self.model, self.max_length, self.layout, self.threads, self.device)
            engine = how.open()
            engine.before(self.prompt)
            self._engine = engine
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
        if not frame:
            return {**batch, **columns}
        return batch.assign(**{name: list(x) if x.ndim > 1 else x for name, x in columns.items()})

    def score(self, texts: Sequence[Sequence[Any]], told: Callable[[int], Any] | None = None) -> Scores:
        """Score N texts, or pairs: one list for each column of text. ``told`` hears how many more are done."""
        values, answered, tally = self.open().answers(texts, self.tokens, told, self.prompt)
        columns = columns_of(values, self.open().about, self.best)
        for column in columns.values():
            column[~answered] = None if column.dtype == object else np.nan
        return Scores({self.prefix + name: column for name, column in columns.items()}, answered, tally)


def names_of(about: Outline, best: bool = False) -> dict[str, str]:
    """The columns that such a model gives, and what is in them: "text", "number" or "vector"."""
    if about.kind == "embedding":
        return {"embedding": "vector"}
    config, count = about.config, about.config.num_labels
    classes = [str(config.id2label[i]) for i in range(count)]
    classes = classes if len({*classes}) == count else [str(i) for i in range(count)]
    if count == 1:
        return {"score": "number"}
    if config.problem_type == "regression":
        return {f"score_{name}": "number" for name in classes}
    each = [] if best else [f"probability_{name}" for name in classes]
    return {"label": "text", **dict.fromkeys(["probability", *each], "number")}


def judged(logits: np.ndarray, config: Any) -> np.ndarray:
    """(N, K) scores out of logits (N, K), as ``Runtime`` judges them."""
    return data_scores.judged(torch.from_numpy(logits), config).numpy()


def columns_of(values: np.ndarray, about: Outline, best: bool = False) -> dict[str, np.ndarray]:
    """Columns (N,) out of logits (N, K), one column (N, D) out of embeddings."""
    names, config = [*names_of(about, best)], about.config
    if about.kind == "embedding":
        return {"embedding": values}
    scores = judged(values, config)
    if names[0] != "label":
        return {name: scores[:, i].copy() for i, name in enumerate(names)}
    chosen = np.nan_to_num(scores, nan=-1.0).argmax(1) if len(scores) else np.zeros(0, int)
    labels = np.array([str(config.id2label[i]) for i in range(config.num_labels)], object)
    top = {"label": labels[chosen], "probability": scores[np.arange(len(scores)), chosen]}
    return top | {name: scores[:, i].copy() for i, name in enumerate(names[2:])}
