"""Answers of a model, pruned or not, on a tokenized data set, and what they cost.

Shapes: N examples, B of them in a batch, K logits, S sites (the layers at which tokens leave). Data sets are tokenized
rows without padding, as ``data.tokenize`` makes them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..api import MODULE, calling, inner_model, prune, unprune
from ..core.architecture import find_architecture
from ..core.cost import dense_macs, macs
from ..core.pruner import METHODS, token_pruner_of
from ..core.tokens import LAYOUTS
from ..data import qa
from ..data.embedder import PROMPTED
from ..methods.topk import REPLAY, TopK
from ..stats.metrics import compute_metric, is_mean
from ..stats.ranking import is_ranking, query_gains
from .retrieval import cosines

REPLAYING = ("topk", "random", "firstk")  # methods that keep as many tokens as they are told


@dataclass
class Predictions:
    """What a model said of N examples, in their order, and what it cost.

    Attributes:
        logits: (N, K) fp32, of an embedder its vectors; of question answering a list of N start and end logits (2, n),
            of a tagger one of N logits (n, K).
        kept: (N, S) long, tokens left after each site; S = 0 where nothing was pruned.
        tokens: (N,) long, tokens of each input.
        rows_used, rows_dense: (N,) MACs of each example, and those of the dense model on it without padding.
        scores: where they were asked for, the scores (n,) of each example's n tokens at the last site.
        macs_used, macs_dense, tokens_mean: their sums and the mean length.
    """

    logits: Tensor | list[Tensor]
    kept: Tensor
    tokens: Tensor
    rows_used: Tensor
    rows_dense: Tensor
    scores: list[Tensor] | None = None

    def __post_init__(self):
        self.macs_used, self.macs_dense = int(self.rows_used.sum()), int(self.rows_dense.sum())
        self.tokens_mean = float(self.tokens.double().mean())


class Text:
    """The inputs of a model out of a tokenized data set, none over ``longest`` tokens, cut into batches at will."""

    def __init__(self, model: PreTrainedModel, dataset: Dataset, longest: int | None):
        takes = inspect.signature(model.forward).parameters
        names = [n for n in ("input_ids", "token_type_ids", PROMPTED) if n in takes and n in dataset.column_names]
        self.columns = {name: list(dataset[name]) for name in names}
        if not self.columns.get("input_ids"):
            raise ValueError(f"nothing to measure: {len(dataset)} rows of {dataset.column_names}, expected input_ids")
        if "attention_mask" in dataset.column_names and any(0 in mask for mask in dataset["attention_mask"]):
            raise ValueError("the rows hold padding: tokenize them without, it is added where it is measured")
        self.lengths = torch.tensor([len(ids) for ids in self.columns["input_ids"]])
        if longest is not None and self.lengths.max() > longest:
            raise ValueError(f"the longest row has {self.lengths.max()} tokens, expected {longest} at most")
        self.fill = {"input_ids": getattr(model.config, "pad_token_id", None) or 0}

    def batch(self, rows: list[int], width: int | None, device: torch.device) -> dict[str, Tensor]:
        """The inputs (B, width) of some rows, padded on the right; ``width`` None: to the longest of them."""
        mask = torch.arange(width or int(self.lengths[rows].max())) < self.lengths[rows, None]
        batch = {"attention_mask": mask.long()}
        for name, column in self.columns.items():
            batch[name] = torch.full(mask.shape, self.fill.get(name, 0))
            batch[name][mask] = torch.cat([torch.as_tensor(column[line]) for line in rows])
        return {name: values.to(device) for name, values in batch.items()}

    def batches(self, rows: Iterable[int], size: int) -> list[list[int]]:
        """``rows`` in batches of neighbours in length, longest first."""
        rows = sorted(rows, key=lambda line: -int(self.lengths[line]))
        return [rows[i : i + size] for i in range(0, len(rows), size)]


def predict(
    model: PreTrainedModel,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    pad_to: int | None = None,
    counts: Tensor | None = None,
    progress: Callable[[int, int], Any] | None = None,
    bf16: bool = False,
    scores: bool = False,
) -> Predictions:
    """Run a model, pruned or not, over a tokenized data set in batches of similar length.

    Args:
        pad_to: pad every batch to so many tokens; default: to its longest row.
        counts: (N, S) tokens to keep, for a method with keep="replay"; default: those ``replayed`` was given.
        progress: called with the examples done and all of them.
        bf16: run a bfloat16 copy of the model.
        scores: keep the method's scores; only for one that lets nothing leave.

    Raises:
        ValueError: no rows, padded rows, rows over ``pad_to``, counts that do not fit, a model without logits (B, K),
            scores of a model that lets tokens leave.
    """
    model = in_precision(model, torch.bfloat16) if bf16 else model
    text, pruner = Text(model, dataset, pad_to), token_pruner_of(model, "predict")
    counts = counts_of(model, len(dataset), counts)
    stack = find_architecture(inner_model(model)) if pruner is None else pruner.architecture
    rows_dense = dense_macs(stack.costs, text.lengths)
    order: list[int] = []
    logits, kept, used, scored = [], [], [], []
    with torch.inference_mode(), ready(model):
        for rows in text.batches(range(len(dataset)), batch_size):
            inputs = text.batch(rows, pad_to, model.device)
            with nullcontext() if counts is None else calling(model, counts=counts[rows]):
                output = model(**inputs)
            logits += _logits(model, output, text.lengths[rows])
            ran = pruner is not None and pruner.attached().options.mode != "dense"  # else there is no record of it
            record = pruner.last_record() if ran and pruner is not None else None
            sites = [] if record is None else record.sites
            left = [site.keep.sum(1) for site in sites]
            kept.append(torch.stack(left, 1) if left else torch.zeros(len(rows), 0, dtype=torch.long))
            used.append(rows_dense[rows] if record is None else macs(record.costs, record.counts))
            if scores:
                if not sites or any(s.score is None or not torch.equal(s.keep, s.alive) for s in sites):
                    raise ValueError("scores=True needs a pruned model whose method scores tokens and lets none leave")
                scored += [score[alive] for score, alive in zip(sites[-1].score, sites[-1].alive, strict=True)]
            order += rows
            if progress:
                progress(len(order), len(dataset))
    back = torch.tensor(order).argsort()
    counted, spent = (torch.cat(parts).cpu()[back] for parts in (kept, used))
    own = [logits[i].cpu() for i in back.tolist()]
    answers = torch.stack(own) if own[0].dim() == 1 else own
    ranked = [scored[i] for i in back.tolist()] if scores else None
    return Predictions(answers, counted, text.lengths, spent, rows_dense, ranked)


def logits_of(
    forward: Callable[..., Any], text: Text, batch_size: int = 32, progress: Callable[[int, int], Any] | None = None
) -> Tensor | list[Tensor]:
    """The ``logits`` of ``Predictions`` by another ``forward`` than a model's, that of a ``Runtime``."""
    logits: list = [None] * len(text.lengths)
    done = 0
    for rows in text.batches(range(len(logits)), batch_size):
        output = forward(**text.batch(rows, None, torch.device("cpu")))
        for i, own in zip(rows, _logits(forward, SimpleNamespace(**output), text.lengths[rows]), strict=True):
            logits[i] = own
        done += len(rows)
        if progress:
            progress(done, len(logits))
    return torch.stack(logits) if logits[0].dim() == 1 else logits


def _logits(model: Any, output: Any, lengths: Tensor) -> list[Tensor]:
    """The logits of each row: (K,) of a classifier, (2, n) of a model that answers questions, (n, K) of a tagger; an
    embedder's vector."""
    for name in ("logits", "sentence_embedding"):
        if isinstance(logits := getattr(output, name, None), Tensor) and logits.dim() == 2:
            return [*logits.float()]
        if isinstance(logits, Tensor) and type(model).__name__.endswith("ForTokenClassification"):
            return [row[:n] for row, n in zip(logits.float(), lengths.tolist(), strict=True)]
    if getattr(output, "start_logits", None) is None:
        what = f"{type(model).__name__} gives no logits (B, K), and no start and end logits"
        raise ValueError(f"{what}: measure a model that classifies or answers questions")
    both = torch.stack([output.start_logits, output.end_logits], 1).float()
    return [row[:, :n] for row, n in zip(both, lengths.tolist(), strict=True)]


def outcome(predictions: Predictions, dataset: Dataset, metric: str) -> tuple[Any, Any]:
    """(answers, labels) as ``compute_metric`` takes them: logits and the column ``labels``; of the windows of question
    answering the F1 of each question's answer, of reranking what each query gained, of vectors the cosine to those in
    ``labels``, and ones."""
    if is_ranking(metric):
        gains = query_gains(predictions.logits, dataset["row"], dataset["labels"], metric)
    elif metric == "cosine":
        gains = cosines(predictions.logits, dataset["labels"])
    elif is_mean(metric):
        gains = qa.question_f1([*predictions.logits], dataset)
    else:
        return predictions.logits, np.asarray(dataset["labels"])
    return gains, np.ones(len(gains))


def quality(predictions: Predictions, dataset: Dataset, metric: str) -> float:
    """The task's metric in points."""
    return compute_metric(metric, *outcome(predictions, dataset, metric))


def replayed(model: PreTrainedModel, method: str, counts: Tensor) -> PreTrainedModel:
    """A copy of a pruned model in which a baseline chooses the tokens, as many as the method kept: ``counts`` (N, S).

    ``method`` is "random", "firstk" or "topk". ``predict`` and ``measure`` hand each batch its counts, which must come
    from ``predict`` on the same rows.

    Example:
        >>> baseline = replayed(model, "random", predict(model, rows).kept)
    """
    pruner, name = token_pruner_of(model, "replayed"), method.replace("-", "")
    if name not in REPLAYING or pruner is None:
        raise ValueError(f"expected a pruned model and one of {', '.join(REPLAYING)}, got {method!r}")
    if counts.dim() != 2 or counts.shape[1] != len(pruner.sites):
        raise ValueError(f"counts have shape {tuple(counts.shape)}, expected (N, {len(pruner.sites)}): one per site")
    kind: Any = METHODS[name]
    baseline, again = unprune(copy.deepcopy(model)), kind(keep=REPLAY, at=pruner.sites, protect=pruner.protect)
    again.row_counts = counts
    return prune(baseline, again, layout=pruner.attached().layout)


def counts_of(model: PreTrainedModel, total: int, counts: Tensor | None = None) -> Tensor | None:
    """(N, S) the given ``counts``, else what ``replayed`` was given; None for other models."""
    counts = getattr(getattr(model, MODULE, None), "row_counts", None) if counts is None else counts
    if counts is not None and len(counts) != total:
        raise ValueError(f"the token counts are of {len(counts)} rows, not of these {total}")
    return counts


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model without any hook of ours, in evaluation mode: a copy that shares the weights of ``model``."""
    net = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    return (net if getattr(net, MODULE, None) is None else unprune(net)).eval()


def packed(model: PreTrainedModel) -> PreTrainedModel | None:
    """The dense model in packed rows, which have no padding; a copy as ``plain`` makes. None where they cannot be."""
    keeps_all = TopK(keep=1.0, at=())
    net = prune(plain(model), keeps_all)
    return net if keeps_all.attached().layout_for(soft=False, cached=False) is LAYOUTS["packed"] else None


def in_precision(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of a model in another precision."""
    copied: nn.Module = copy.deepcopy(model)
    copied.to(dtype)
    return cast("PreTrainedModel", copied)


@contextmanager
def ready(model: PreTrainedModel) -> Iterator[None]:
    """Within the context: evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
