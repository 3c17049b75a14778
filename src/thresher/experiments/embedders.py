"""Judge a saved embedder: what its queries find, pairs of a known similarity, how near it is to its dense model.

Shapes: N texts, C components of a vector, Q queries.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset

from ..api import dense
from ..core.pruner import pruner_in
from ..data.embedder import Embedder, Prompt, load_embedder
from ..data.load import CORRELATIONS, load_task
from ..data.models import clip
from ..data.read import read
from ..data.retrieval import is_retrieval, load_retrieval
from ..data.task import DataError, Task, brief
from ..data.texts import METRIC, TEXT, load_texts, pair_columns
from ..data.tokenize import tokenize
from ..evaluation.hardware import environment
from ..evaluation.predict import Predictions, predict
from ..evaluation.retrieval import METRICS, compare_embeddings, cosines, nearest, overlaps, retrieval_gains
from ..evaluation.rows import row
from ..stats.metrics import compute_metric
from .spec import EvalSpec, TaskSpec

FOUND = ("ndcg@10", "recall@10", "recall@100")
QUERY, DOCUMENT = ("query",), ("document", "passage", "corpus")  # names of prompts, as sentence-transformers looks for
NEIGHBOURS, MOVED, SHOWN = 10, 5, 80  # of a text; texts that are named; characters of one
Vectors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Judge:
    """What an embedder is judged on.

    Attributes:
        texts: to embed, by part.
        prompts: of each part the names of prompts, the first that the embedder has is set before its texts; where none
            is named, that by default.
        metrics: of the vectors (N, C) of each part, in points.
        count: queries, pairs or texts.
    """

    name: str
    texts: dict[str, list[str]]
    prompts: dict[str, tuple[str, ...]]
    metrics: Callable[[Vectors], dict[str, float]]
    count: int


def evaluate_embedder(spec: EvalSpec) -> list[dict]:
    """Rows of every metric: the embedder as it is and, if it is pruned, its dense model.

    A folder of corpus, queries and qrels gives nDCG@10 and recall; a table of two texts and a similarity Spearman's
    correlation; any texts how near a pruned embedder is to its dense model, which the others say as well: the mean
    cosine, and of a retrieval the overlap of the ten nearest documents. The dense model is ``dense`` in the model's
    folder, else the embedder itself without pruning.
    """
    net, tokenizer = load_embedder(spec.model, spec.layout)
    judge, max_length = judge_of(spec), clip(spec.max_length, net.config)
    pruned = net.token_pruner is not None
    other = dense_embedder(spec.model, None) if pruned else None

    how: Any = {"batch_size": spec.batch_size}

    def embed(model: Embedder) -> dict[str, Predictions]:
        said = {}
        for part, texts in judge.texts.items():
            prompt = model.prompt(tokenizer, max_length, *judge.prompts[part])
            said[part] = predict(cast("Any", model), rows_of(texts, tokenizer, max_length, prompt), **how)
        return said

    with nullcontext() if other or not pruned else dense(net):
        results = {"dense-unpadded": embed(other or net)}
    results = ({"pruned": embed(net)} if pruned else {}) | results
    vectors = {mode: {part: np.asarray(own.logits) for part, own in said.items()} for mode, said in results.items()}
    whole = {mode: judge.metrics(own) for mode, own in vectors.items()}
    if pruned:
        near = nearness(vectors["pruned"], vectors["dense-unpadded"])
        whole["pruned"] |= near
        whole["dense-unpadded"] |= dict.fromkeys(near, 100.0)
    if not whole["dense-unpadded"]:
        raise DataError(
            f"{spec.data} has neither judged documents nor pairs with a similarity, and {spec.model} is dense"
        )
    return [
        row(
            task=judge.name,
            model=Path(spec.model).name,
            method=pruner_in(net).name if mode == "pruned" else "dense",
            runtime="torch",
            precision="fp32",
            mode=mode,
            threads=torch.get_num_threads(),
            metric=metric,
            quality=value,
            quality_dense=whole["dense-unpadded"][metric],
            flops_ratio=sum(own.macs_dense for own in results[mode].values())
            / sum(own.macs_used for own in results[mode].values()),
            split="test",
            max_length=max_length,
            n_examples=judge.count,
            tokens_mean=float(torch.cat([own.tokens for own in results[mode].values()]).double().mean()),
            **environment(),
        )
        for mode, values in whole.items()
        for metric, value in values.items()
    ]


def judge_of(spec: TaskSpec) -> Judge:
    """What the data can judge. Raises DataError for a metric that is none of it."""
    if is_retrieval(spec.data or ""):
        _check_metric(spec, (*METRICS, METRIC))
        task = load_retrieval(str(spec.data))
        count = min(spec.limit or len(task.queries), len(task.queries))
        some = sorted(np.random.default_rng(0).permutation(len(task.queries))[:count].tolist())
        queries, judged, ids = ([own[i] for i in some] for own in (task.queries, task.judged, task.query_ids))
        task = replace(task, queries=queries, judged=judged, query_ids=ids)
        asked = tuple(dict.fromkeys((*([spec.metric] if spec.metric in METRICS else []), *FOUND)))

        def found(vectors: Vectors) -> dict[str, float]:
            gains = retrieval_gains(task, vectors["queries"], vectors["documents"], asked)
            return {name: 100 * float(values.mean()) for name, values in gains.items()}

        texts = {"queries": queries, "documents": task.documents}
        return Judge(task.name, texts, {"queries": QUERY, "documents": DOCUMENT}, found, count)
    if spec.metric in CORRELATIONS or has_similarity(spec):
        _check_metric(spec, (*CORRELATIONS, METRIC))
        metric = spec.metric if spec.metric in CORRELATIONS else "spearman"
        pairs = load_task(replace(spec, metric=metric, limit=None), labels=[])
        test = some_of(pairs, spec.limit)
        labels = np.asarray(test[pairs.label_column], dtype=float)

        def alike(vectors: Vectors) -> dict[str, float]:
            return {metric: compute_metric(metric, cosines(vectors["first"], vectors["second"])[:, None], labels)}

        texts = {part: [*test[column]] for part, column in zip(("first", "second"), pairs.text_columns, strict=True)}
        return Judge(pairs.name, texts, {"first": (), "second": ()}, alike, len(labels))
    task_of_texts = load_texts(replace(spec, limit=None))
    test = some_of(task_of_texts, spec.limit)
    return Judge(task_of_texts.name, {"texts": [*test[TEXT]]}, {"texts": ()}, lambda vectors: {}, len(test))


def has_similarity(spec: TaskSpec) -> bool:
    """Whether data are a table of two texts and a number, as STS-B's."""
    parts = read(str(spec.data), spec.config, (spec.train_split, spec.test_split))[1]
    first = parts.get("train", next(iter(parts.values())))
    if spec.text is None and {"question", "context"} <= {*first}:
        return False
    known = pair_columns(first, spec)
    return known is not None and known[1] is not None


def tested_embedder(spec: TaskSpec, layout: str, against: str | None) -> tuple[Embedder, int, Task, Dataset]:
    """An embedder, its longest text, a task of the texts of the test part, and these tokenized, whose ``labels`` are
    the vectors of its dense model."""
    net, tokenizer = load_embedder(spec.model, layout)
    task = load_texts(replace(spec, limit=None, metric=None))
    task = replace(task, test=some_of(task, spec.limit))
    max_length = clip(spec.max_length, net.config)
    rows = tokenize(task.test, task, tokenizer, max_length, net.prompt(tokenizer, max_length))[0]
    other = dense_embedder(spec.model, against)
    with nullcontext() if other or net.token_pruner is None else dense(net):
        wanted: Any = predict(cast("Any", other or net), rows).logits
    return net, max_length, task, rows.add_column("labels", wanted.tolist())


def dense_embedder(model: str, against: str | None) -> Embedder | None:
    """The embedder to compare with: ``against``, else ``dense`` in the model's folder; None where there is neither."""
    own = Path(model) / "dense"
    return load_embedder(str(against or own))[0] if against or own.is_dir() else None


def nearness(vectors: Vectors, reference: Vectors) -> dict[str, float]:
    """Points: the mean cosine to the reference's vectors, and where queries look for documents the overlap of the ten
    nearest."""
    if "documents" in vectors:
        k = min(NEIGHBOURS, len(vectors["documents"]))
        both = [(own["queries"], own["documents"]) for own in (vectors, reference)]
        found = compare_embeddings(*both[0], *both[1], k=k)
        return {"cosine": 100 * found["cosine"], f"overlap@{k}": 100 * found["overlap"]}
    return {
        "cosine": 100 * float(np.concatenate([cosines(own, reference[part]) for part, own in vectors.items()]).mean())
    }


def neighbours(after: np.ndarray, before: np.ndarray, texts: list[str]) -> dict[str, Any]:
    """What pruning does to the neighbours of each text among the others: "overlap", the mean share of the ten nearest
    that stay, and "moved", the texts that lose most of them, with the nearest one before and after."""
    if len(texts) < 2:
        raise DataError("one text has no neighbours: give two or more")
    k = min(NEIGHBOURS, len(texts) - 1)
    near = {}
    for name, vectors in (("pruned", after), ("dense", before)):
        found = nearest(vectors, vectors, k + 1)
        near[name] = np.array([[other for other in own if other != i][:k] for i, own in enumerate(found)])
    kept, own = overlaps(near["pruned"], near["dense"]), cosines(after, before)
    worst = np.lexsort((own, kept))[:MOVED]
    moved = [
        {
            "row": int(i),
            "text": _short(texts[i]),
            "overlap": float(kept[i]),
            "cosine": float(own[i]),
            **{f"nearest_{name}": _short(texts[near[name][i, 0]]) for name in near},
        }
        for i in worst
    ]
    return {"neighbours": k, "overlap": float(kept.mean()), "moved": moved}


def some_of(task: Task, limit: int | None) -> Dataset:
    """So many texts of the test part, in their order."""
    order = np.random.default_rng(0).permutation(len(task.test))
    return task.test.select(sorted(order[:limit].tolist()))


def rows_of(texts: list[str], tokenizer: Any, max_length: int, prompt: Prompt) -> Dataset:
    """Tokenized texts with a prompt before each, cut."""
    whole = Dataset.from_dict({TEXT: texts})
    task = Task(None, None, whole, (TEXT,), None, [], "embedding", METRIC, "", "", {})
    return tokenize(whole, task, tokenizer, max_length, prompt)[0]


def _short(text: str) -> str:
    return textwrap.shorten(text, SHOWN, placeholder=" ...")


def _check_metric(spec: TaskSpec, known: tuple[str, ...]) -> None:
    if spec.metric is not None and spec.metric not in known:
        raise DataError(f"{spec.metric!r} is no metric of an embedder on {spec.data}: use {brief(*known)}")
