"""Texts on which pruned answers are compared with the dense model's, and where they come from.

Shapes: N texts (of question answering windows), K logits, Q examples (texts, or questions with all their windows).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import PreTrainedModel

from ..data import qa
from ..data.load import load_task
from ..data.task import DataError, Task
from ..data.tokenize import tokenize
from ..evaluation.predict import Predictions, predict


def divergence(dense: Tensor | list[Tensor], pruned: Tensor | list[Tensor]) -> Tensor:
    """(N,) how far answers are from the dense model's: KL(dense || pruned) in nats, of question answering the mean of
    start and end; the squared difference of a single number. Logits as in ``Predictions``."""
    if isinstance(dense, list):
        pairs = zip(dense, pruned, strict=True)
        return torch.stack([divergence(d, p).mean() for d, p in pairs])
    if dense.shape[-1] == 1:
        return (dense - pruned).square()[:, 0]
    d, p = dense.double().log_softmax(-1), pruned.double().log_softmax(-1)
    return (d.exp() * (d - p)).sum(-1).clamp(min=0)


@dataclass(frozen=True)
class Comparison:
    """What a pruned model does to Q examples: the mean divergence and the share of the dense MACs that is left; (Q,)
    whether the answer is another (None: of numbers, which always are), and (Q,) whether a right answer was lost or won
    (None without labels of classes)."""

    divergence: float
    flops_fraction: float
    differs: np.ndarray | None = None
    lost: np.ndarray | None = None
    won: np.ndarray | None = None


class Sample:
    """Tokenized texts with the dense model's answers, which are asked for once."""

    def __init__(self, net: PreTrainedModel, rows: Dataset, batch_size: int):
        self.rows, self.batch_size = rows, batch_size
        self.dense = predict(net, rows, batch_size=batch_size)
        self.said = self._answers(self.dense)
        classes = self.said is not None and not isinstance(self.dense.logits, list)
        self.labels = np.asarray(rows["labels"]) if classes and "labels" in rows.column_names else None

    def compare(self, net: PreTrainedModel) -> Comparison:
        """Run a pruned model beside the dense one's answers. Raises DataError where its logits are not finite."""
        found = predict(net, self.rows, batch_size=self.batch_size)
        far = divergence(self.dense.logits, found.logits).mean().item()
        if not np.isfinite(far):
            raise DataError("logits hold NaN or infinity: expected numbers, has the model diverged?")
        said, right = self._answers(found), {}
        if self.labels is not None:
            before, after = self.said == self.labels, said == self.labels
            right = {"lost": before & ~after, "won": after & ~before}
        differs = None if said is None else said != self.said
        return Comparison(far, found.macs_used / found.macs_dense, differs, **right)

    def _answers(self, predictions: Predictions) -> np.ndarray | None:
        """(Q,) the class or the words of each answer; None for numbers."""
        if isinstance(predictions.logits, list):
            return np.array(qa.best_answers(predictions.logits, self.rows), dtype=object)
        return None if predictions.logits.shape[1] == 1 else predictions.logits.argmax(1).numpy()


def texts_of(
    net: PreTrainedModel,
    tokenizer: Any,
    data: str,
    *,
    labelled: bool,
    seed: int,
    limit: int | None,
    min_length: int | None = None,
    **columns: Any,
) -> tuple[Task, Dataset, int]:
    """(task, texts, how many are of the validation part): these in a random order, then those of the train part. The
    test part is not among them, nor what has less than ``min_length`` tokens, special ones included.

    Labels are in the model's order; data without any, or with others than the model's, is taken unless ``labelled``.

    Raises DataError: no such data, only a test part, data of another kind than the model's, a length of questions.
    """
    names = [net.config.id2label[i] for i in range(net.config.num_labels)]
    named = [] if len(names) == 1 else names if not all(name.startswith("LABEL_") for name in names) else None
    try:
        task = load_task(data, labels=named, **columns)
    except DataError as error:
        if labelled:
            raise DataError(f"a drop of accuracy is measured on labelled texts: {error}") from None
        task = replace(load_task(data, need_labels=False, **columns), label_column=None)
    if task.train is None:
        raise DataError(f"{data} has a test part only, on which nothing may be chosen: give train or validation texts")
    asked, numbers = type(net).__name__.endswith("ForQuestionAnswering"), len(names) == 1
    if (task.kind == "qa") != asked:
        raise DataError(
            f"the model is a {type(net).__name__}, {data} is of {task.kind}: give texts of the model's kind"
        )
    if not asked and numbers != (task.kind == "regression"):
        task = replace(task, label_column=None)  # they are not the labels that the model has learned
    rng = np.random.default_rng(seed)
    parts = [part.select(rng.permutation(len(part))) for part in (task.validation, task.train)]
    if min_length is not None:
        if asked:
            raise DataError(
                "min_length is for texts: a question is as long as its paragraph, which is cut into windows"
            )
        given = (tokenized(part, task, tokenizer, None)["input_ids"] if len(part) else [] for part in parts)
        parts = [
            part.select([row for row, ids in enumerate(each) if len(ids) >= min_length])
            for part, each in zip(parts, given, strict=True)
        ]
    texts = concatenate_datasets(parts)
    texts = texts.select(range(min(limit or len(texts), len(texts))))
    return task, texts, min(len(parts[0]), len(texts))


def tokenized(texts: Dataset, task: Task, tokenizer: Any, max_length: int | None) -> Dataset:
    """``tokenize`` without its notice of texts that were cut, which would come once for every sample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenize(texts, task, tokenizer, max_length)[0]
