"""Extractive question answering: paragraphs cut into windows, answers read out of them, and SQuAD's F1.

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

from .tasks import DataError, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame

COLUMNS = ("question", "context", "answers")
BESIDE = ("start_positions", "end_positions", "row", "first", "last", "context", "gold")
STRIDE, LONGEST = 128, 30  # tokens that two windows share; tokens of an answer


def is_qa(frame: DataFrame) -> bool:
    """Whether a table has SQuAD's columns."""
    return {*COLUMNS} <= {*frame}


def load_qa(name: str, parts: dict[str, DataFrame], *, seed: int = 0, limit: int | None = None) -> Task:
    """A ``Task`` of questions, paragraphs and answers out of tables with SQuAD's columns.

    Without a train part, a quarter of what there is becomes the test part. What is held out is cut by article
    (``title``, else by paragraph), so that no paragraph is in two parts; with the fixed seed 0.
    Raises DataError where answers are not ``{"text": [...], "answer_start": [...]}``.
    """
    from datasets import Dataset

    test = parts.get("test", parts.get("validation") if "train" in parts else None)
    train = parts.get("train", parts.get("validation"))
    if train is None:
        raise DataError(f"{name} has the parts {', '.join(parts)}: expected train or validation")
    cuts = {} if test is not None else {"test": 0.25}
    for part in (*cuts, "validation"):
        share = cuts.get(part, min(0.1, 2000 / len(train)))
        groups = train["title" if "title" in train else "context"]
        train, held = _hold_out(train, groups, share)
        if part == "test":
            test = held
    selected_on = f"10% of train by {groups.name} (seed 0), {len(held)} rows"
    train = train.iloc[np.random.RandomState(seed).permutation(len(train))[:limit]]
    columns = [[*map(_plain, part["answers"])] for part in (train, held, test)]
    sets = [
        Dataset.from_dict({"question": [*part["question"]], "context": [*part["context"]], "answers": answers})
        for part, answers in zip((train, held, test), columns, strict=True)
    ]
    return Task(*sets, COLUMNS[:2], "answers", [], "qa", "qa_f1", name, selected_on, {})


def _hold_out(frame: DataFrame, groups: Any, share: float) -> tuple[DataFrame, DataFrame]:
    """What is left, and whole groups of rows that are about ``share`` of them, at least one."""
    names = sorted(set(groups))
    if len(names) < 2:
        raise DataError(f"all {len(frame)} questions are on one {groups.name}: expected two, to hold one out")
    counts, held, rows = Counter(groups), set(), 0
    for i in np.random.RandomState(0).permutation(len(names))[:-1]:
        if rows < share * len(frame):
            held.add(names[i])
            rows += counts[names[i]]
    mask = groups.isin(held)
    return frame[~mask], frame[mask]


def _plain(answers: Any) -> dict[str, list]:
    """{"text", "start"} of one question's answers, both lists empty where it has none."""
    if not isinstance(answers, dict) or not {"text", "answer_start"} <= {*answers}:
        raise DataError(f'answers hold {str(answers)[:60]}: expected {{"text": [...], "answer_start": [...]}}')
    return {"text": [*map(str, answers["text"])], "start": [*map(int, answers["answer_start"])]}


def windows(dataset: Dataset, tokenizer: Any, max_length: int) -> tuple[Dataset, int]:
    """Token ids of a part of a question answering task, and how many paragraphs needed more than one window.

    One row per window: input_ids, attention_mask, token_type_ids (where there are any), start_positions and
    end_positions of the first answer (0 where it is not in the window), ``row`` (the question it belongs to), ``first``
    and ``last`` (the characters of each token in the paragraph, -1 outside of it), and context and answers to judge by.
    """
    from datasets import Dataset, concatenate_datasets
    from datasets.utils import tqdm

    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{type(tokenizer).__name__} knows no offsets: question answering needs a fast tokenizer")
    chunks, several = [], 0
    for start in tqdm(range(0, len(dataset), 500), desc="Tokenizing", disable=len(dataset) <= 5000):
        rows = dataset[start : start + 500]
        try:
            found = tokenizer(
                [question.strip() for question in rows["question"]],
                rows["context"],
                truncation="only_second",
                max_length=max_length,
                stride=min(STRIDE, max_length // 4),
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_attention_mask=True,
            )
        except Exception as error:  # of the tokenizers library: of no class of its own
            raise DataError(f"max_length={max_length} leaves no room beside a question ({error})") from None
        columns = {name: found[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in found}
        columns |= {name: [] for name in BESIDE}
        for i, row in enumerate(found["overflow_to_sample_mapping"]):
            answers, inside = rows["answers"][row], [part == 1 for part in found.sequence_ids(i)]
            first, last = np.where(np.array(inside)[:, None], np.array(found["offset_mapping"][i]), -1).T
            begin, end = _span(first, last, answers)
            values = (begin, end, start + row, first.tolist(), last.tolist(), rows["context"][row], answers["text"])
            for name, value in zip(BESIDE, values, strict=True):
                columns[name].append(value)
        several += sum(count > 1 for count in Counter(found["overflow_to_sample_mapping"]).values())
        chunks.append(Dataset.from_dict(columns))
    if several:
        what = f"{several} of {len(dataset)} paragraphs are read in several windows of {max_length} tokens"
        warnings.warn(what, stacklevel=2)
    return concatenate_datasets(chunks), several


def _span(first: np.ndarray, last: np.ndarray, answers: dict) -> tuple[int, int]:
    """The first and last token of the first answer; (0, 0) where there is none or not all of it is here."""
    if not answers["text"]:
        return 0, 0
    begin = answers["start"][0]
    end = begin + len(answers["text"][0])
    inside = np.flatnonzero((last > begin) & (first < end) & (first >= 0))
    whole = len(inside) and first[inside[0]] <= begin and last[inside[-1]] >= end
    return (int(inside[0]), int(inside[-1])) if whole else (0, 0)


def answers_of(logits: Sequence[Any], dataset: Dataset) -> list[str]:
    """The answer to each question; ``logits`` holds start and end logits (2, n) of each window of ``windows``.

    The span of the largest sum of logits in all windows, of at most 30 tokens. Where some questions of the data set
    have no answer: "" if its first token (CLS) beats every span in every window.
    """
    empty = any(not texts for texts in dataset["gold"])
    best: dict[int, tuple[float, str]] = {}
    least: dict[int, float] = {}
    for both, row in zip(logits, dataset, strict=True):
        question, (start, end) = row["row"], np.asarray(both)
        least[question] = min(least.get(question, np.inf), float(start[0] + end[0]))
        outside = np.where(np.array(row["first"]) >= 0, 0.0, -np.inf)
        sums = (start + outside)[:, None] + (end + outside)[None, :]
        sums = np.where(np.tril(np.triu(np.ones_like(sums)), LONGEST - 1) > 0, sums, -np.inf)
        i, j = np.unravel_index(sums.argmax(), sums.shape)
        if question not in best or sums[i, j] > best[question][0]:
            best[question] = float(sums[i, j]), row["context"][row["first"][i] : row["last"][j]]
    return ["" if empty and least[q] > best[q][0] else best[q][1] for q in sorted(best)]


def judge(logits: Sequence[Any], dataset: Dataset) -> np.ndarray:
    """(Q,): the F1 of each question's answer, 0..1."""
    gold = dict(zip(dataset["row"], dataset["gold"], strict=True))
    found = answers_of(logits, dataset)
    return np.array([max(f1(a, g) for g in gold[q] or [""]) for q, a in zip(sorted(gold), found, strict=True)])


def f1(said: str, gold: str) -> float:
    """Overlap of the words of two answers (Rajpurkar et al., 2016): the harmonic mean of precision and recall."""
    a, b = words(said), words(gold)
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def words(text: str) -> list[str]:
    """The words of an answer in lower case, without punctuation and articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()
