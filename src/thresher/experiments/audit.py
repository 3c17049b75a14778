"""Where pruning hurts: what a pruned model loses against the dense one in slices of a labelled test part.

Shapes: N examples, n of them in a slice, K logits. Slices are quarters by input length, classes, and the groups of any
column; they overlap, and each is compared with all the other examples.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel

from ..api import MODULE, dense
from ..data import qa
from ..data.embedder import Embedder
from ..data.files import reading
from ..data.models import class_names, is_tagger, positions
from ..data.task import DataError, Task
from ..data.texts import TEXT
from ..evaluation.predict import Predictions, outcome, predict, quality
from ..evaluation.retrieval import cosines
from ..reports.audit_page import ALL, LEVEL, WORST, worst
from ..reports.trace import trace
from ..stats.paired import detectable, excess_tests, holm, interval, paired_test
from .embedders import neighbours
from .evaluate import dense_of, tested
from .spec import AuditSpec, job
from .taggers import compare_tags

SMALLEST = 10  # examples of a group that is looked at
FEW, MANY = 10, 50  # numbers of more values are cut at their quartiles; other columns may have so many values
LENGTH, CLASS, TYPE = "input length", "class", "entity"
FOUND = "share of the dense model's entities"
SCORES = {
    "classification": "accuracy",
    "qa": "F1 of the answer",
    "regression": "absolute error",
    "reranking": "accuracy",
    "embedding": "cosine to the dense vector",
    "tagging": FOUND,
}


@dataclass(frozen=True)
class Answers:
    """What a model said of N examples: ``scores`` (N,), larger is better, and the answers in words."""

    scores: np.ndarray
    words: list[str]


@job(AuditSpec)
def audit(spec: AuditSpec, *, progress: Callable[[str, int, int], Any] | None = None) -> list[dict]:
    """Compare a saved pruned model with the dense one on slices of the test part.

    Of an embedder the score of a text is the cosine to the vector of its dense model, in points; slices are of length,
    and the first row says how many of the ten nearest texts stay ("overlap") and which lose most of them ("moved"). Of
    a tagger an example is an entity of its dense model, right where it is found alike to the token, slices are of
    length and type, and F1, the metric of the whole, counts what the pruned model finds alone.
    Else scores are right or wrong (accuracy, points; pair by pair where a task reranks), the F1 of an answer (points)
    or the absolute error (the labels' unit); a drop above 0 is a loss. Intervals and tests: ``thresher.stats.paired``.

    Args:
        spec: see ``AuditSpec``. ``against``: the dense model, by default ``dense`` in the model's folder, else the
            model itself without pruning. ``by``: further columns; numbers of more than 10 values are cut at their
            quartiles; empty values and groups of less than 10 examples are left out, with a warning that counts them.
            ``examples``: lost examples to show of each of the three slices that lose most; 0: none.
        progress: called with what is going on, the examples done and all of them.

    Returns:
        One row for the whole, then one per slice:
        by, slice: what was cut, and the slice; n, length: examples, and their mean number of tokens.
        score, dense, pruned, drop, interval: the mean scores, and the drop with its 95 % interval, [low, high] or None.
        lost, gained: examples that pruning made worse, and better; p, p_holm: of the paired test of these two.
        excess, p_more, p_more_holm: the drop less that of the others, and the test whether it is by chance.
        detectable: the drop from which on it would have been told from chance; None: no drop would.
        worse: whether it was, and is a drop. Holm's correction is over all slices.
        tokens, macs: the shares of tokens left after the last site, and of the dense MACs.
        examples: row of the test part, label, answers of both models, and the trace of the text (``show.Trace``).
        The first row has the task's own metric as well: metric, metric_dense, metric_pruned.

    Raises:
        ValueError: a model that is not pruned, or a dense one that is or that answers something else.
        DataError: no labels, or a column that cannot be used.
    """
    if is_tagger(spec.model):
        return _tags(spec, progress)
    by = tuple(dict.fromkeys(spec.by))
    net, max_length, task, test = tested(spec, spec.layout, beside=by)
    if not hasattr(net, MODULE):
        raise ValueError(f"{spec.model} is not pruned: there is nothing to audit; thresher train makes a pruned model")
    tokenizer = reading(AutoTokenizer.from_pretrained, spec.model)
    embeds = isinstance(net, Embedder)
    if spec.examples and not embeds and not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{spec.model} has no fast tokenizer, which the examples need: ask for 0 examples")
    other = dense_of(spec.model, spec.against)
    if other is not None:
        _check_pair(net, other, spec.against or f"{spec.model}/dense", tokenizer, max_length)
    cuts = {name: groups(task.test[name], name) for name in by}  # mistakes are told before anything runs
    after, before = _both(net, other, test, spec.batch_size, progress)
    said = {"dense": _answers(before, test, task), "pruned": _answers(after, test, task)}
    cost = _costs(after, test)
    cuts = {LENGTH: quarters(cost[:, 0]), **({CLASS: _classes(task)} if task.kind == "classification" else {}), **cuts}
    rows, members = _rows(task.kind, said, cost, cuts)
    rows[0] |= _head(spec, task, [quality(p, test, task.metric) for p in (before, after)])
    if embeds and spec.examples:
        rows[0] |= neighbours(np.asarray(after.logits), np.asarray(before.logits), [*task.test[TEXT]])
        return rows
    for row in worst(rows)[:WORST] if spec.examples else ():
        picked = _picked(members[rows.index(row)], said, cost[:, 0], spec.examples)
        row["examples"] = [_example(i, net, tokenizer, task, said, max_length) for i in picked]
    return rows


def _both(net, other, test: Dataset, batch_size: int, progress: Callable | None) -> tuple[Predictions, Predictions]:
    """The answers of the pruned model and of the dense one: ``net`` without pruning where there is no other."""

    def run(name: str, asked: PreTrainedModel) -> Predictions:
        tell = partial(progress, f"{name} model") if progress else None
        return predict(asked, test, batch_size=batch_size, progress=tell)

    after = run("pruned", net)
    with nullcontext() if other else dense(net):
        return after, run("dense", other or net)


def _tags(spec: AuditSpec, progress: Callable | None) -> list[dict]:
    """The rows of a tagger: an example is an entity of the dense model."""
    tagged = compare_tags(spec, progress)
    cost = _costs(tagged.pruned, tagged.task.test)[tagged.owners]
    words = [""] * len(tagged.found)
    said = {"dense": Answers(np.full(len(words), 100.0), words), "pruned": Answers(100.0 * tagged.found, words)}
    cuts = {LENGTH: quarters(cost[:, 0]), TYPE: [*tagged.kinds]}
    rows, _ = _rows("tagging", said, cost, cuts)
    rows[0] |= _head(spec, replace(tagged.task, metric="entity f1"), [100.0, 100 * tagged.total.f1])
    return rows


def _head(spec: AuditSpec, task: Task, metrics: Sequence[float]) -> dict[str, Any]:
    """What the first row says besides: the metric, of the dense and of the pruned model, and what was compared."""
    against = spec.against or ("dense" if (Path(spec.model) / "dense").is_dir() else None)
    names = {"model": Path(spec.model).name, "task": task.name, "against": against}
    return {"metric": task.metric, "metric_dense": metrics[0], "metric_pruned": metrics[1], **names}


def quarters(values: np.ndarray) -> list[str | None]:
    """The quarter that each of the numbers (N,) is in, by its least and its largest value; None where it is NaN.

    Equal values are in one quarter, so that there may be fewer than four.
    """
    values = np.asarray(values, float)
    known = np.isfinite(values)
    places = np.searchsorted(np.quantile(values[known], (0.25, 0.5, 0.75)), values, side="left")
    names = {}
    for place in np.unique(places[known]):
        ends = (
            f"{end:.6g}" for end in (values[known & (places == place)].min(), values[known & (places == place)].max())
        )
        names[place] = "–".join(dict.fromkeys(ends))
    return [names[place] if here else None for place, here in zip(places, known, strict=True)]


def groups(values: Sequence[Any], name: str) -> list[str | None]:
    """The group of each value of a column; None where it is empty.

    Raises:
        DataError: there is one value only, or none, or too many.
    """
    empty = [v is None or (isinstance(v, float) and not math.isfinite(v)) or not str(v).strip() for v in values]
    known = {value for value, lacking in zip(values, empty, strict=True) if not lacking}
    if len(known) < 2:
        what = f"only the value {str(*known)[:60]!r}" if known else "no value"
        raise DataError(f"column {name!r} has {what} in the {len(values)} examples: two groups or more are needed")
    if len(known) > FEW and all(isinstance(value, (int, float)) for value in known):
        return quarters(np.array([math.nan if lacking else v for v, lacking in zip(values, empty, strict=True)], float))
    if len(known) > MANY:
        problem = f"column {name!r} has {len(known)} values in {len(values)} examples, expected {MANY} at most"
        raise DataError(f"{problem} (numbers are cut at their quartiles): name a column of groups")
    return [None if lacking else str(value).strip() for value, lacking in zip(values, empty, strict=True)]


def _check_pair(net, other, name: str, tokenizer, max_length: int) -> None:
    """Whether both models answer the same question on the same tokens."""
    if hasattr(other, MODULE):
        raise ValueError(f"{name} is pruned: expected the dense model to compare with")
    kinds = [type(m).__name__.rpartition("For")[2] for m in (net, other)]
    if kinds[0] != kinds[1] or net.config.num_labels != other.config.num_labels:
        what = [f"{type(m).__name__} with {m.config.num_labels} outputs" for m in (other, net)]
        raise ValueError(f"{name} is a {what[0]}, expected one like the {what[1]}")
    mine, theirs = class_names(net), class_names(other)
    if mine and theirs and mine != theirs:
        raise ValueError(f"{name} has the labels {', '.join(theirs)}, the pruned model {', '.join(mine)}")
    if reading(AutoTokenizer.from_pretrained, other.config._name_or_path).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{name} has another vocabulary than the pruned model: both have to read the same tokens")
    if (limit := positions(other.config)) is not None and limit < max_length:
        raise ValueError(f"{name} takes {limit} tokens, not {max_length}: set max_length to {limit}")


def _answers(predictions: Predictions, test: Dataset, task: Task) -> Answers:
    """The score of each example, after the checks of ``compute_metric``."""
    quality(predictions, test, task.metric)
    if task.kind == "qa":
        found, _ = outcome(predictions, test, task.metric)
        return Answers(100 * np.asarray(found), qa.best_answers([*predictions.logits], test))
    logits, labels = np.asarray(predictions.logits), np.asarray(test["labels"])
    if task.kind == "embedding":
        return Answers(100.0 * cosines(logits, labels), [""] * len(logits))
    wanted = len(task.labels) or 1
    if logits.shape[1] < wanted or (wanted == 1) != (logits.shape[1] == 1):
        raise ValueError(f"the model gives {logits.shape[1]} logits, {task.name} has {wanted} labels (1: a number)")
    if task.kind == "regression":
        return Answers(-np.abs(logits[:, 0] - labels), [f"{value:.3g}" for value in logits[:, 0]])
    if task.kind == "reranking":
        return Answers(100.0 * ((logits[:, 0] > 0) == (labels > 0)), [f"{value:.3g}" for value in logits[:, 0]])
    chosen = logits.argmax(1)
    names = dict(enumerate(task.labels))
    return Answers(100.0 * (chosen == labels), [names.get(int(i), f"class {i}") for i in chosen])


def _classes(task: Task) -> list[str]:
    return [task.labels[i] for i in task.test[task.label_column]]


def _costs(predictions: Predictions, test: Dataset) -> np.ndarray:
    """(N, 4): tokens of each example, those left after the last site, MACs used and those of the dense model."""
    left = predictions.kept[:, -1] if predictions.kept.shape[1] else predictions.tokens
    parts = torch.stack([predictions.tokens, left, predictions.rows_used, predictions.rows_dense], 1).double().numpy()
    windows = isinstance(predictions.logits, list)  # of which a question may have several
    owners = np.unique(qa.examples(test), return_inverse=True)[1] if windows else np.arange(len(test))
    sums = np.zeros((owners.max() + 1, 4))
    np.add.at(sums, owners, parts)
    return sums


def _slices(cuts: dict[str, list[str | None]]) -> Iterator[tuple[str, str, np.ndarray]]:
    """(what was cut, slice, (N,) bool), in the order of the values; what is left out is counted."""
    for by, names in cuts.items():
        found = np.array([name or "" for name in names], dtype=object)
        order = sorted({*found} - {""})
        if all(_number(name) is not None for name in order):
            order.sort(key=_number)
        empty, small = int((found == "").sum()), [name for name in order if (found == name).sum() < SMALLEST]
        if empty:
            warnings.warn(f"{by}: {empty} of {len(found)} rows have no value and are in no slice", stacklevel=4)
        if small:
            lost, some = int(np.isin(found, small).sum()), ", ".join(small[:5]) + " ..." * (len(small) > 5)
            what = f"{by}: {lost} of {len(found)} rows are in groups of less than {SMALLEST} and are in no slice"
            warnings.warn(f"{what} ({some})", stacklevel=4)
        order = [name for name in order if name not in small]
        if by == LENGTH and len(order) < 2:  # all of one length
            continue
        yield from ((by, name, found == name) for name in order)


def _number(name: str) -> float | None:
    """The number that a slice begins with."""
    try:
        return float(name.partition("–")[0])
    except ValueError:
        return None


def _rows(kind: str, said: dict[str, Answers], cost: np.ndarray, cuts: dict) -> tuple[list[dict], np.ndarray]:
    """The rows of the result, and their members (S, N)."""
    unit = 100.0 if SCORES[kind] in ("accuracy", FOUND) else None
    change = said["dense"].scores - said["pruned"].scores
    found = list(_slices(cuts))
    members = np.array([np.ones(len(change), bool), *(member for *_, member in found)])
    rows: list[dict[str, Any]] = []
    for (by, name), member in zip([(ALL, ALL), *(names[:2] for names in found)], members, strict=True):
        sums, own = cost[member].sum(0), change[member]
        means = {name: abs(float(answers.scores[member].mean())) for name, answers in said.items()}
        rows.append(
            {"by": by, "slice": name, "n": int(member.sum()), "length": float(sums[0] / member.sum())}
            | {"score": SCORES[kind], **means, "drop": float(own.mean()), "interval": interval(own, unit)}
            | {"lost": int((own > 0).sum()), "gained": int((own < 0).sum()), "p": paired_test(own), "p_holm": None}
            | {"excess": None, "p_more": None, "p_more_holm": None, "detectable": None, "worse": None}
            | {"tokens": float(sums[1] / sums[0]), "macs": float(sums[2] / sums[3]), "examples": []}
        )
    slices, more = rows[1:], excess_tests(change, members[1:], unit).tolist()
    corrected = holm([row["p"] for row in slices]), holm(more)
    for row, member, p, p_holm, p_more_holm in zip(slices, members[1:], more, *corrected, strict=True):
        others = float(change[~member].mean()) if not member.all() else row["drop"]
        row |= {"p_holm": p_holm, "excess": row["drop"] - others, "p_more": p, "p_more_holm": p_more_holm}
        least = detectable(change, member, unit, LEVEL / len(slices))
        row |= {"detectable": None if least is None else max(0.0, least)}
        row |= {"worse": p_more_holm <= LEVEL and row["drop"] > 0}
    return rows, members


def _picked(member: np.ndarray, said: dict[str, Answers], lengths: np.ndarray, count: int) -> list[int]:
    """The examples of a slice that lost most, the shortest of these first: they are read most easily."""
    change = said["dense"].scores - said["pruned"].scores
    lost = np.flatnonzero(member & (change > 0))
    return lost[np.lexsort((lengths[lost], -change[lost]))][:count].tolist()


def _example(row: int, net, tokenizer, task: Task, said: dict[str, Answers], max_length: int) -> dict:
    line = task.test[row]
    label = line[task.label_column]
    if task.kind == "qa":
        label = " / ".join(dict.fromkeys(label["text"])) or "no answer"
    elif task.kind == "classification":
        label = task.labels[label]
    text, pair = (*(line[column] for column in task.text_columns), None)[:2]
    answers = {name: answers.words[row] for name, answers in said.items()}
    shown = asdict(trace(net, tokenizer, text, pair, max_length=max_length))
    return {"row": row, "label": str(label), **answers, "trace": shown}
