"""Extractive question answering: paragraphs cut into windows, answers read from their logits, and SQuAD's F1.

Shapes: Q questions in W windows (a long paragraph needs several), n tokens in a window.
"""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .checks import Flaws, note_copies, without_empty, without_tested
from .read import PARTS
from .spec import DataSpec
from .split import hold_out_groups
from .task import DataError, Task, brief, require, task_parts, with_columns

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame

COLUMNS = ("question", "context", "answers")
BESIDE = ("start_positions", "end_positions", "row", "first", "last", "context", "gold")
STRIDE, LONGEST = 128, 30  # tokens that two windows share, a quarter of a window at most; tokens of an answer


def is_qa(frame: DataFrame) -> bool:
    """Tell whether a table has SQuAD's columns."""
    return {*COLUMNS} <= {*frame}


def load_qa(
    name: str, parts: dict[str, DataFrame], spec: DataSpec, flaws: Flaws, *, seed: int = 0, beside: Sequence[str] = ()
) -> Task:
    """Return a task of questions, paragraphs and answers out of tables with SQuAD's columns: train, validation, test.

    Test is the part called test, where its answers are there, else validation beside a train part; where there is
    neither, a quarter of the questions. Validation is a tenth of what is left to train on, at most 2,000. Both are cut
    by article (``title``, else by paragraph), with the fixed seed 0. Train loses the paragraphs that test or validation
    has as well. It keeps their questions: one question is asked of many paragraphs, and says nothing of the answer.
    The test part has the columns ``beside`` as well.

    Raises:
        DataError: whatever cannot be used.
    """
    require(spec.metric in (None, "qa_f1"), f"{spec.metric!r} is no metric for question answering: use qa_f1")
    parts = _named(parts, spec)
    answers = {where: _answers(where, part) for where, part in parts.items()}
    shown = {where: part.assign(answers=answers[where]) for where, part in parts.items()}
    if {"test", "validation"} <= {*shown} and not any(found["text"] for found in answers["test"]):
        del shown["test"]  # hidden
    train = shown.get("train", None if "test" in shown else shown.get("validation"))
    test = shown.get("test", shown.get("validation") if "train" in shown else None)
    shown = {where: part for where, part in (("train", train), ("test", test)) if part is not None}
    shown = without_empty(shown, COLUMNS[:2], flaws)
    train, test = shown.get("train"), shown.get("test")
    note_copies("train" if test is None else "test", train if test is None else test, COLUMNS[:2], flaws)
    validation, selected_on = None, "nothing: there is no train part"
    if train is not None:
        groups = "title" if "title" in train else "context"
        if test is None:
            train, test = hold_out_groups(train, groups, 0.25)
        train = without_tested(train, test, COLUMNS[1:2], flaws)
        share = min(0.1, 2000 / len(train))
        train, validation = hold_out_groups(train, groups, share)
        train = without_tested(train, validation, COLUMNS[1:2], flaws, "validation")
        selected_on = f"{100 * share:.2g}% of train by {groups} (seed 0), {len(validation)} rows"
        train = train.iloc[np.random.RandomState(seed).permutation(len(train))[: spec.limit]]
    cut = task_parts(train, validation, with_columns(test, COLUMNS, beside), COLUMNS, beside)
    return Task(*cut, COLUMNS[:2], "answers", [], "qa", "qa_f1", name, selected_on, flaws.removed)


def _named(parts: dict[str, DataFrame], spec: DataSpec) -> dict[str, DataFrame]:
    """Call the parts that the spec names train and test."""
    asked = ((spec.train_split, "train"), (spec.test_split, "test"))
    names = {PARTS.get(part, part): where for part, where in asked if part}
    require({*names} <= {*parts}, f"there is no part {brief(*names)}: the parts are {brief(*parts)}")
    return {names.get(where, where): part for where, part in parts.items()}


def _answers(where: str, part: DataFrame) -> list[dict[str, list]]:
    """Check a part, and return {"text", "start"} of each question's answers, both lists empty where it has none."""
    for column in [c for c in ("question", "context", "title") if c in part]:
        wrong = [i for i, value in enumerate(part[column]) if not isinstance(value, str)]
        if wrong:
            rows = f"{len(wrong)} rows, first in row {wrong[0]} (from 0)"
            raise DataError(f"{where} column {column!r} has no text in {rows}")
    checked = []
    for i, (answers, context) in enumerate(zip(part["answers"], part["context"], strict=True)):
        try:
            texts, starts = [*answers["text"]], [*answers["answer_start"]]
            right = len(texts) == len(starts) and all(isinstance(text, str) for text in texts)
            starts = [int(start) for start in starts]
        except (TypeError, KeyError, ValueError, IndexError):
            right = False
        if not right or isinstance(answers["text"], str):
            what = f"{where} row {i} (from 0) has the answers {str(answers)[:60]}"
            raise DataError(f'{what}: expected {{"text": [...], "answer_start": [...]}}, as many of both')
        for text, start in zip(texts, starts, strict=True):
            if context[start : start + len(text)] != text:
                what = f"{where} row {i} (from 0): the answer {text[:40]!r} is not at character {start} of its context"
                raise DataError(f"{what}: correct answer_start")
        checked.append({"text": texts, "start": starts})
    return checked


def windows(dataset: Dataset, tokenizer: Any, max_length: int) -> tuple[Dataset, int]:
    """Return the token ids of a part of a question answering task, and how many paragraphs needed several windows.

    One row per window: input_ids, attention_mask, token_type_ids (where there are any), start_positions and
    end_positions of the first answer (0 where it is not in the window), ``row`` (the question it belongs to), ``first``
    and ``last`` (the characters of each token in the paragraph, -1 outside of it), and context and answers to judge by.
    """
    from datasets import Dataset, concatenate_datasets
    from datasets.utils import tqdm

    kind = type(tokenizer).__name__
    require(getattr(tokenizer, "is_fast", False), f"{kind} knows no offsets: question answering needs a fast tokenizer")
    stride, special = min(STRIDE, max_length // 4), tokenizer.num_special_tokens_to_add(pair=True)
    chunks, several = [], 0
    for start in tqdm(range(0, len(dataset), 500), desc="Tokenizing", disable=len(dataset) <= 5000):
        rows = dataset[start : start + 500]
        questions = [question.strip() for question in rows["question"]]
        longest = max(map(len, tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]))
        left = max(0, max_length - longest - special)
        what = f"max_length={max_length} leaves {left} tokens of a paragraph beside the longest question, of {longest}"
        require(left > stride, f"{what}: expected more than the {stride} that windows share; raise it")
        encoded = tokenizer(
            questions,
            rows["context"],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=True,
        )
        columns = {name: encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded}
        columns |= {name: [] for name in BESIDE}
        for i, row in enumerate(encoded["overflow_to_sample_mapping"]):
            answers, inside = rows["answers"][row], [part == 1 for part in encoded.sequence_ids(i)]
            first, last = np.where(np.array(inside)[:, None], np.array(encoded["offset_mapping"][i]), -1).T
            begin, end = _span(first, last, answers)
            values = (begin, end, start + row, first.tolist(), last.tolist(), rows["context"][row], answers["text"])
            for name, value in zip(BESIDE, values, strict=True):
                columns[name].append(value)
        several += sum(count > 1 for count in Counter(encoded["overflow_to_sample_mapping"]).values())
        chunks.append(Dataset.from_dict(columns))
    if several:
        what = f"{several} of {len(dataset)} paragraphs are read in several windows of {max_length} tokens"
        warnings.warn(what, stacklevel=2)
    return concatenate_datasets(chunks), several


def _span(first: np.ndarray, last: np.ndarray, answers: dict) -> tuple[int, int]:
    """Return the first and last token of the first answer; (0, 0) where there is none or the window lacks a part."""
    if not answers["text"]:
        return 0, 0
    begin = answers["start"][0]
    end = begin + len(answers["text"][0])
    inside = np.flatnonzero((last > begin) & (first < end) & (first >= 0))
    whole = len(inside) and first[inside[0]] <= begin and last[inside[-1]] >= end
    return (int(inside[0]), int(inside[-1])) if whole else (0, 0)


def best_answers(logits: Sequence[Any], dataset: Dataset) -> list[str]:
    """Return the answer to each question; ``logits`` holds start and end logits (2, n) of each window of ``windows``.

    The best of ``best_spans``. Where some questions of the data set have no answer: "" if the first token (CLS) beats
    every span in every window.
    """
    empty = any(not texts for texts in dataset["gold"])
    least: dict[int, float] = {}
    for both, question in zip(logits, dataset["row"], strict=True):
        start, end = np.asarray(both)
        least[question] = min(least.get(question, np.inf), float(start[0] + end[0]))
    spans = zip(sorted(least), best_spans(logits, dataset), strict=True)
    return ["" if empty and least[question] > span["logit"] else span["answer"] for question, span in spans]


def best_spans(logits: Sequence[Any], dataset: Dataset) -> list[dict[str, Any]]:
    """Return the best span of each question in all its windows.

    A span is "answer", its characters "start" to "end" in the paragraph, "logit", the sum of its two logits, and
    "score", its probability among the tokens of its window. It has at most 30 tokens. Arguments as
    ``best_answers``.
    """
    best: dict[int, dict[str, Any]] = {}
    for both, row in zip(logits, dataset, strict=True):
        question, first, last = row["row"], row["first"], row["last"]
        start, end = np.asarray(both) + np.where(np.array(first) >= 0, 0.0, -np.inf)
        sums = start[:, None] + end[None, :]
        sums = np.where(np.tril(np.triu(np.ones_like(sums)), LONGEST - 1) > 0, sums, -np.inf)
        i, j = np.unravel_index(sums.argmax(), sums.shape)
        if question in best and sums[i, j] <= best[question]["logit"]:
            continue
        score = np.exp(start[i] - np.logaddexp.reduce(start) + end[j] - np.logaddexp.reduce(end))
        answer = {"answer": row["context"][first[i] : last[j]], "score": float(score), "start": first[i]}
        best[question] = answer | {"end": last[j], "logit": float(sums[i, j])}
    return [best[question] for question in sorted(best)]


def examples(dataset: Dataset) -> list[int]:
    """Return the example that each row of a tokenized data set belongs to: itself, or the question of the window."""
    return [*dataset["row"]] if "row" in dataset.column_names else [*range(len(dataset))]


def rows_of(dataset: Dataset, wanted: Any) -> list[int]:
    """Return the rows of the examples number ``wanted``: for question answering all windows of those questions."""
    owners = examples(dataset)
    names = sorted(set(owners))
    chosen = {names[i] for i in wanted}
    return [row for row, owner in enumerate(owners) if owner in chosen]


def question_f1(logits: Sequence[Any], dataset: Dataset) -> np.ndarray:
    """Return (Q,) the F1 of each question's answer, 0..1. Raises DataError where logits are not finite."""
    finite = all(np.isfinite(np.asarray(both)).all() for both in logits)
    require(finite, "logits hold NaN or infinity: expected numbers, has the model diverged?")
    gold = dict(zip(dataset["row"], dataset["gold"], strict=True))
    answers = best_answers(logits, dataset)
    return np.array([max(f1(a, g) for g in gold[q] or [""]) for q, a in zip(sorted(gold), answers, strict=True)])


def f1(said: str, gold: str) -> float:
    """Return the overlap of the words of two answers: the harmonic mean of precision and recall (Rajpurkar, 2016)."""
    a, b = words(said), words(gold)
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def words(text: str) -> list[str]:
    """Return the words of an answer in lower case, without punctuation and articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()
