"""Reranking: tables of a query, a candidate and its relevance, and such a table made of paragraphs with questions.

Metrics of the order of each query's candidates ("map", "mrr", "ndcg@10", ...) make a task one of reranking. Of two
classes a classifier's second logit is the score; grades, and relevance that a model of one logit learns, are numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .checks import Flaws, normalized
from .read import PARTS
from .spec import PAIR as COLUMNS
from .spec import DataSpec
from .task import Task, brief, require, task_parts, with_columns

if TYPE_CHECKING:
    from pandas import DataFrame

METRICS = re.compile(r"(map|mrr|ndcg|recall)(@[1-9]\d*)?")
USUAL = ("map", "mrr", "ndcg@10", "recall@10")  # of METRICS, for messages
ARTICLE = ("title", "context", "question", "answers")
NEAR, FAR = 2, 1  # other paragraphs beside each question of a train part: of its article, and of others
ASKED = {"validation": 10, "test": 20}  # questions of each article, all its paragraphs beside each of them


def is_ranking(metric: str | None) -> bool:
    """Tell whether a metric judges the order of each query's candidates."""
    return METRICS.fullmatch(metric or "") is not None


def are_grades(parts: dict[str, DataFrame], label: str, labels: Sequence[str] | None) -> bool:
    """Tell whether relevance is a number: of numbers that are not two, or where the model gives one (``labels``)."""
    columns = [part[label] for part in parts.values() if label in part]
    numbers = len(columns) == len(parts) and all(column.dtype.kind in "biuf" for column in columns)
    return numbers and ((labels is not None and not labels) or len({value for c in columns for value in c}) > 2)


def judged(frame: DataFrame, query: str, label: str) -> DataFrame:
    """Return the rows of queries that an order matters to: those with a candidate above 0 and with another label.

    TREC QA without the others is what the literature calls its clean version (Rao et al., 2016). Raises DataError where
    none is left.
    """
    own = frame.groupby(query)[label]
    both = (own.transform("nunique") > 1) & (own.transform("max") > 0)
    require(both.any(), f"no query in {query!r} has candidates of both classes: an order is judged by such queries")
    return frame[both]


def first_queries(frame: DataFrame, query: str, rows: int | None, seed: int) -> DataFrame:
    """Return ``frame`` in a random order; of its queries whole ones, until there are so many ``rows`` or more."""
    if rows is not None and rows < len(frame):
        groups = normalized(frame, [query])
        sizes = groups.value_counts(sort=False)
        order = sizes.iloc[np.random.RandomState(seed).permutation(len(sizes))]
        before = order.cumsum() - order
        frame = frame[groups.isin({*order.index[before < rows]})]
    return frame.iloc[np.random.RandomState(seed).permutation(len(frame))]


# --- paragraphs with questions ----------------------------------------------------------------------------------------
def load_paragraphs(
    name: str, parts: dict[str, DataFrame], spec: DataSpec, flaws: Flaws, *, seed: int = 0, beside: Sequence[str] = ()
) -> Task:
    """Return the task of finding a question's paragraph among all paragraphs of its article, of SQuAD's columns.

    Where there is one part, a fifth of its articles (``title``) is test; a tenth of the others is validation. Both have
    up to ``ASKED`` questions of each article, with all paragraphs. Train has every question with its paragraph,
    ``NEAR`` others of its article and ``FAR`` of other articles, which are told apart first. All is drawn with the
    fixed seed 0, but for the order of train. A paragraph is relevant, 1, if the question is asked of it and has an
    answer there. A question that is asked in several articles counts in the first.

    Args as ``load_task``'s; the metric is "mrr" unless ``spec`` names one.

    Raises:
        DataError: no articles, or too few, or no question with an answer.
    """
    metric = spec.metric or "mrr"
    require(not beside, f"pairs made of paragraphs have no column {brief(*beside)}: leave it out")
    names = {PARTS.get(part or "", part): where for part, where in ((spec.train_split, "train"),) if part}
    parts = {names.get(where, where): part for where, part in parts.items()}
    for where, part in parts.items():
        lacking = [column for column in ARTICLE if column not in part]
        require(not lacking, f"{where} has no column {brief(*lacking)}: articles are told apart by 'title'")
    wanted = spec.test_split and PARTS.get(spec.test_split, spec.test_split)
    require(wanted in (None, *parts), f"there is no part {spec.test_split!r}: the parts are {brief(*parts)}")
    order = [where for where in (wanted, "test", "validation") if where in parts]
    several = len(parts) > 1 and "train" in parts
    tested = _articles(parts[order[0]], flaws) if several else None
    rest = _articles(parts["train"] if several else next(iter(parts.values())), flaws)
    if tested is None:
        rest, tested = _split(rest, 5)
    rest = {title: article for title, article in rest.items() if title not in tested}
    train, validation = _split(rest, 10)
    chosen = {"validation": validation, "test": tested}
    tables = {where: _table(_rows(articles, ASKED[where])) for where, articles in chosen.items()}
    whole = _table(_sampled(train))
    whole = first_queries(whole, COLUMNS[0], spec.limit, seed)
    used = [*COLUMNS, "label"]
    cut = task_parts(whole, tables["validation"], with_columns(tables["test"], used, ()), used, ())
    selected_on = f"{len(validation)} of {len(rest)} articles (seed 0), {len(tables['validation'])} rows"
    return Task(*cut, COLUMNS, "label", [], "reranking", metric, name, selected_on, flaws.removed)


Articles = dict[str, tuple[list[str], dict[str, set[int]]]]  # title: paragraphs, and where each question is answered


def _articles(part: DataFrame, flaws: Flaws) -> Articles:
    """Return the articles of a part, of questions with an answer."""
    found: Articles = {}
    owner: dict[str, str] = {}
    lost = 0
    for title, context, question, answers in zip(*(part[c] for c in ARTICLE), strict=True):
        texts = (title, context, question)
        wrong = next((repr(text) for text in texts if not isinstance(text, str) or not text.strip()), None)
        require(wrong is None, f"a row has the title, paragraph or question {wrong}: expected text; remove the row")
        paragraphs, asked = found.setdefault(title, ([], {}))
        if context not in paragraphs:
            paragraphs.append(context)
        if not len(answers["text"]) or owner.setdefault(" ".join(question.casefold().split()), title) != title:
            lost += 1
            continue
        asked.setdefault(question.strip(), set()).add(paragraphs.index(context))
    found = {title: one for title, one in found.items() if len(one[0]) > 1 and one[1]}
    if lost:
        flaws.notices.append(f"{lost} questions have no answer, or were asked in another article: they are left out")
    require(len(found) > 1, f"{len(found)} articles have two paragraphs and a question: expected two or more")
    return found


def _split(articles: Articles, one_in: int) -> tuple[Articles, Articles]:
    """Return what is left, and one article in so many, rounded, one at least."""
    require(len(articles) > 1, "one article is left: expected two or more, to hold one out")
    order = [[*articles][i] for i in np.random.RandomState(0).permutation(len(articles))]
    held = {*order[: max(1, round(len(order) / one_in))]}
    return {t: a for t, a in articles.items() if t not in held}, {t: a for t, a in articles.items() if t in held}


def _rows(articles: Articles, most: int) -> Iterator[tuple[str, str, float]]:
    """Yield (question, paragraph, relevance) of ``most`` questions an article, with all its paragraphs."""
    draw = np.random.RandomState(0)
    for paragraphs, asked in articles.values():
        for question in [[*asked][i] for i in draw.permutation(len(asked))[:most]]:
            for i, paragraph in enumerate(paragraphs):
                yield question, paragraph, float(i in asked[question])


def _sampled(articles: Articles) -> Iterator[tuple[str, str, float]]:
    """Yield (question, paragraph, relevance) of all questions, with what is relevant and a few other paragraphs."""
    draw, titles = np.random.RandomState(0), [*articles]
    for title, (paragraphs, asked) in articles.items():
        for question, own in asked.items():
            others = [i for i in range(len(paragraphs)) if i not in own]
            others = [others[i] for i in draw.permutation(len(others))[:NEAR]]
            for i in sorted({*others, *own}):
                yield question, paragraphs[i], float(i in own)
            elsewhere = [name for name in titles if name != title]
            for i in draw.permutation(len(elsewhere))[:FAR]:
                there = articles[elsewhere[i]][0]
                yield question, there[draw.randint(len(there))], 0.0


def _table(rows: Iterator[tuple[str, str, float]]) -> DataFrame:
    import pandas

    return pandas.DataFrame([*rows], columns=[*COLUMNS, "label"])
