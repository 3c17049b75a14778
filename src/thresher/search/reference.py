"""Texts on which pruned answers are compared with the dense model's, and where they come from.

Shapes: N texts (of question answering windows), K logits, Q examples (texts, or questions with all their windows).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import PreTrainedModel

from ..data import qa
from ..data.embedder import Embedder, Prompt
from ..data.load import load_task
from ..data.models import class_names, is_reranker
from ..data.spec import DataSpec
from ..data.task import DataError, MetricError, Task
from ..data.texts import load_texts
from ..data.tokenize import tokenize
from ..evaluation.predict import Predictions, predict

TOP = 10  # candidates of a query that are looked at


def divergence(dense: Tensor | list[Tensor], pruned: Tensor | list[Tensor]) -> Tensor:
    """(N,) how far answers are from the dense model's: KL(dense || pruned) in nats, of question answering the mean of
    start and end; the squared difference of a single number. Logits as in ``Predictions``."""
    if isinstance(dense, list) or isinstance(pruned, list):
        pairs = zip(dense, pruned, strict=True)
        return torch.stack([divergence(d, p).mean() for d, p in pairs])
    if dense.shape[-1] == 1:
        return (dense - pruned).square()[:, 0]
    d, p = dense.double().log_softmax(-1), pruned.double().log_softmax(-1)
    return (d.exp() * (d - p)).sum(-1).clamp(min=0)


def order_divergence(dense: Tensor, pruned: Tensor, queries: Sequence[int]) -> Tensor:
    """(Q,) KL(dense || pruned) in nats of the shares of each query's candidates, softmax of their scores (N, 1)."""
    found = []
    rows = torch.as_tensor(queries)
    for query in rows.unique():
        own = rows == query
        found.append(divergence(dense[own].T, pruned[own].T) if own.sum() > 1 else dense.new_zeros(1).double())
    return torch.cat(found)


def top_overlap(dense: Tensor, pruned: Tensor, queries: Sequence[int], k: int) -> float | None:
    """The mean share of each query's k best candidates, by scores (N, 1), that stay among the k best; of queries with
    more than k candidates, None where there are none."""
    rows, found = torch.as_tensor(queries), []
    for query in rows.unique():
        own = rows == query
        if own.sum() > k:
            best = [{*scores[own, 0].topk(k).indices.tolist()} for scores in (dense, pruned)]
            found.append(len(best[0] & best[1]) / k)
    return float(np.mean(found)) if found else None


@dataclass(frozen=True)
class Comparison:
    """What a pruned model does to Q examples: the mean divergence and the share of the dense MACs that is left; (Q,)
    whether the answer is another (None: of numbers, which always are), and (Q,) whether a right answer was lost or won
    (None without labels of classes); of a reranker the ``overlap`` of the ten best candidates."""

    divergence: float
    flops_fraction: float
    differs: np.ndarray | None = None
    lost: np.ndarray | None = None
    won: np.ndarray | None = None
    overlap: float | None = None

    @property
    def drop(self) -> float | None:
        """The share of right answers that were lost, less those won; None without labels of classes."""
        return None if self.lost is None or self.won is None else float(self.lost.mean() - self.won.mean())


class Sample:
    """Tokenized texts with the dense model's answers, which are asked for once."""

    def __init__(self, net: PreTrainedModel, rows: Dataset, batch_size: int):
        self.rows, self.batch_size, self.embeds = rows, batch_size, isinstance(net, Embedder)
        self.dense = predict(net, rows, batch_size=batch_size)
        self.answers = self._answers(self.dense)
        classes = self.answers is not None and not isinstance(self.dense.logits, list)
        self.labels = np.asarray(rows["labels"]) if classes and "labels" in rows.column_names else None

    def compare(self, net: PreTrainedModel) -> Comparison:
        """Run a pruned model beside the dense one's answers. Raises DataError where its logits are not finite."""
        pruned = predict(net, self.rows, batch_size=self.batch_size)
        mean = self._away(pruned.logits).mean().item()
        if not np.isfinite(mean):
            raise DataError("logits hold NaN or infinity: expected numbers, has the model diverged?")
        answers = self._answers(pruned)
        right: dict[str, np.ndarray] = {}
        if self.labels is not None:
            before, after = (np.asarray(given == self.labels) for given in (self.answers, answers))
            right = {"lost": before & ~after, "won": after & ~before}
        differs = None if answers is None else answers != self.answers
        logits: Any = pruned.logits
        overlap = top_overlap(cast("Any", self.dense.logits), logits, [*self.rows["row"]], TOP) if self.ranks else None
        return Comparison(mean, pruned.macs_used / pruned.macs_dense, differs, **right, overlap=overlap)

    @property
    def ranks(self) -> bool:
        """Whether the model gives the candidates of queries one number."""
        dense = self.dense.logits
        numbers = not self.embeds and not isinstance(dense, list) and dense.shape[1] == 1
        return numbers and "row" in self.rows.column_names

    def _away(self, logits: Any) -> Tensor:
        """How far answers are from the dense model's: of vectors 1 - cosine, of a reranker's numbers by query."""
        dense: Any = self.dense.logits
        if self.embeds:
            return 1 - F.cosine_similarity(dense, logits)
        if self.ranks:
            return order_divergence(dense, logits, [*self.rows["row"]])
        return divergence(dense, logits)

    def _answers(self, predictions: Predictions) -> np.ndarray | None:
        """(Q,) the class or the words of each answer; None for numbers."""
        if isinstance(predictions.logits, list):
            return np.array(qa.best_answers(predictions.logits, self.rows), dtype=object)
        numbers = self.embeds or predictions.logits.shape[1] == 1
        return None if numbers else predictions.logits.argmax(1).numpy()


def texts_of(
    net: PreTrainedModel,
    tokenizer: Any,
    data: DataSpec,
    *,
    labelled: bool,
    seed: int,
    min_length: int | None = None,
) -> tuple[Task, Dataset, int]:
    """(task, texts, how many are of the validation part): these in a random order, then those of the train part;
    ``data.limit`` of them. The test part is not among them, nor what has less than ``min_length`` tokens, special ones
    included.

    Labels are in the model's order; data without any, or with others than the model's, is taken unless ``labelled``.

    Raises DataError: no such data, only a test part, data of another kind than the model's, a length of questions.
    """
    task = _task(net, replace(data, limit=None), labelled)
    rng = np.random.default_rng(seed)
    assert task.validation is not None and task.train is not None, "_task() refuses a test part alone"
    parts = [part.select(_order(part, task, rng)) for part in (task.validation, task.train)]
    if min_length is not None:
        if task.kind == "qa":
            raise DataError(
                "min_length is for texts: a question is as long as its paragraph, which is cut into windows"
            )
        ids = [tokenized(part, task, tokenizer, None)["input_ids"] if len(part) else [] for part in parts]
        long = [[row for row, text in enumerate(texts) if len(text) >= min_length] for texts in ids]
        parts = [part.select(rows) for part, rows in zip(parts, long, strict=True)]
    texts = concatenate_datasets(parts)
    texts = texts.select(range(min(data.limit or len(texts), len(texts))))
    return task, texts, min(len(parts[0]), len(texts))


def _order(part: Dataset, task: Task, rng: np.random.Generator) -> np.ndarray:
    """The rows of a part in a random order; where candidates are ranked those of a query stay together."""
    if task.kind != "reranking" or not len(part):
        return rng.permutation(len(part))
    queries = np.unique([*part[task.text_columns[0]]], return_inverse=True)[1]
    return np.argsort(rng.permutation(queries.max() + 1)[queries], kind="stable")


def _ranking(net: PreTrainedModel, data: DataSpec) -> Task | None:
    """The task of a model that gives pairs one number, by which candidates are ranked; None where data are no pairs."""
    if not is_reranker(net.config):
        return None
    try:
        task = load_task(replace(data, metric=data.metric or "ndcg@10"), labels=[], need_labels=False)
    except MetricError:
        return None
    return replace(task, label_column=None)


def _task(net: PreTrainedModel, data: DataSpec, labelled: bool) -> Task:
    """The task of a model on ``data``, with labels where the model has learned them."""
    ranking = None if isinstance(net, Embedder) else _ranking(net, data)
    if ranking is not None or isinstance(net, Embedder):
        task = ranking or load_texts(data)
        if labelled:
            raise DataError(f"a drop of accuracy is measured on classes: the model is of {task.kind}")
        return task
    try:
        task = load_task(data, labels=class_names(net))
    except DataError as error:
        if labelled:
            raise DataError(f"a drop of accuracy is measured on labelled texts: {error}") from None
        task = replace(load_task(data, need_labels=False), label_column=None)
    if task.train is None:
        raise DataError(
            f"{data.data} has a test part only, on which nothing may be chosen: give train or validation texts"
        )
    answers, numbers = type(net).__name__.endswith("ForQuestionAnswering"), net.config.num_labels == 1
    if (task.kind == "qa") != answers:
        raise DataError(
            f"the model is a {type(net).__name__}, {data.data} is of {task.kind}: give texts of the model's kind"
        )
    other = not answers and numbers != (task.kind == "regression")  # not the labels that the model has learned
    return replace(task, label_column=None) if other else task


def tokenized(
    texts: Dataset, task: Task, tokenizer: Any, max_length: int | None, prompt: Prompt | None = None
) -> Dataset:
    """``tokenize`` without its notice of texts that were cut, which would come once for every sample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenize(texts, task, tokenizer, max_length, prompt)[0]
