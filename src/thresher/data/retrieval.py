"""Retrieval in BEIR's form: a folder of documents, queries, and what was judged relevant.

| file | columns |
|---|---|
| corpus | `_id` (or `doc_id`), `text`, `title` where there is one |
| queries | `_id` (or `query_id`), `text` (or `query`) |
| qrels, or qrels/test | `query-id` (or `query_id`), `corpus-id` (or `doc_id`), `score` (or `relevance`) |

Each is a parquet, jsonl, json, tsv or csv file.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .read import SUFFIXES, read_file
from .reranking import COLUMNS
from .task import DataError, brief, require

if TYPE_CHECKING:
    from pandas import DataFrame, Series

FILES = ("corpus", "queries", "qrels")
DOCUMENT, QUERY = ("_id", "corpus-id", "doc_id", "id"), ("_id", "query-id", "query_id", "id")  # names of ids
TEXT, GRADE = ("text", "query", "document"), ("score", "relevance", "label")
CANDIDATES = 100  # documents beside each query, where pairs are made
GRADES = {"cranfield": {1: 4, 2: 3, 3: 2, 4: 1, -1: 0}}  # of sets whose codes are no gains: Cleverdon's 1 is the best


@dataclass(frozen=True)
class Retrieval:
    """Hold documents, queries and what is relevant: ``judged`` has the grades above 0 of each query, by the number of
    the document; every query has one."""

    name: str
    documents: list[str]
    queries: list[str]
    judged: list[dict[int, float]]
    document_ids: list[str] = field(repr=False)
    query_ids: list[str] = field(repr=False)

    def grades(self, query: int) -> np.ndarray:
        """Return (documents,) the grades of all documents for a query, by its number; 0 where nothing was judged."""
        found = np.zeros(len(self.documents))
        found[[*self.judged[query]]] = [*self.judged[query].values()]
        return found

    def pairs(self, candidates: int = CANDIDATES) -> DataFrame:
        """Return a table for reranking, of query, passage and label: of each query all that is relevant, and the
        documents nearest by words (TF-IDF, cosine), until there are so many ``candidates``."""
        import pandas

        nearest, rows = self.nearest_by_words(candidates), []
        for query, found in enumerate(nearest):
            own = dict.fromkeys([*self.judged[query], *found.tolist()])
            chosen = [*own][: max(candidates, len(self.judged[query]))]
            rows += [
                (self.queries[query], self.documents[i], self.judged[query].get(i, 0.0))
                for i in sorted(chosen)
                if self.documents[i].strip()
            ]
        return pandas.DataFrame(rows, columns=[*COLUMNS, "label"])

    def nearest_by_words(self, k: int) -> np.ndarray:
        """Return (queries, k) the numbers of the documents with the nearest words, the best first."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        words = TfidfVectorizer(sublinear_tf=True, strip_accents="unicode", stop_words="english")
        documents, found = words.fit_transform(self.documents), []
        queries = words.transform(self.queries)
        for start in range(0, queries.shape[0], 64):
            scores = (queries[start : start + 64] @ documents.T).toarray()
            found.append(np.argsort(-scores, axis=1, kind="stable")[:, :k])
        return np.concatenate(found)


def is_retrieval(path: str | Path) -> bool:
    """Tell whether a path is a folder with corpus and queries."""
    folder = Path(path).expanduser()
    return folder.is_dir() and all(_files(folder, name) for name in FILES[:2])


def load_retrieval(path: str | Path, *, split: str = "test", grades: Mapping[Any, float] | None = None) -> Retrieval:
    """Read a folder in BEIR's form.

    A document is its title and its text, where the text does not begin with the title. Queries without a relevant
    document are left out, and documents without text stay, since they can be ranked; a warning counts both.

    Args:
        split: the file in ``qrels`` where that is a folder.
        grades: what the codes in the file are worth, if a code is not the gain itself; default: those of ``GRADES``.

    Raises:
        DataError: a file or a column is missing, an id is there twice or unknown, a query is empty, a grade is none.
    """
    folder = Path(path).expanduser()
    require(folder.is_dir(), f"{folder} is no folder: expected one with {brief(*FILES)}")
    corpus, queries = (_read(folder, name) for name in FILES[:2])
    qrels = _read(folder / "qrels", split) if (folder / "qrels").is_dir() else _read(folder, "qrels")
    document_ids, query_ids = _ids(corpus, DOCUMENT, "corpus"), _ids(queries, QUERY, "queries")
    texts, asked = _texts(corpus, "corpus"), _texts(queries, "queries")
    if "title" in corpus:
        titles = corpus["title"].fillna("").astype(str)
        both = zip(titles, texts, strict=True)
        texts = [text if text.startswith(title.strip()) else f"{title} {text}".strip() for title, text in both]
    blank = [name for name, text in zip(query_ids, asked, strict=True) if not text.strip()]
    require(not blank, f"{len(blank)} queries have no text, first {blank[:1]}: remove them, with what was judged")
    codes = GRADES.get(folder.name) if grades is None else grades
    judged = _judged(qrels, dict(zip(document_ids, range(len(texts)), strict=True)), query_ids, codes)
    known = [i for i, own in enumerate(judged) if own]
    require(known, f"no query of {folder} has a document with a grade above 0: nothing can be found")
    empty = sum(not text.strip() for text in texts)
    if len(known) < len(judged):
        what = f"{len(judged) - len(known)} of {len(judged)} queries of {folder.name} have no relevant document"
        warnings.warn(f"{what}: they are left out", stacklevel=2)
    if empty:
        warnings.warn(f"{empty} of {len(texts)} documents of {folder.name} have no text", stacklevel=2)
    asked, query_ids = ([values[i] for i in known] for values in (asked, query_ids))
    return Retrieval(folder.name, texts, asked, [judged[i] for i in known], document_ids, query_ids)


def _files(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}{suffix}" for suffix in SUFFIXES if (folder / f"{name}{suffix}").is_file()]


def _read(folder: Path, name: str) -> DataFrame:
    found = _files(folder, name)
    content = brief(*sorted(file.name for file in folder.iterdir())) or "nothing"
    what = f"{folder} holds {content}: expected one {name} file ({brief(*SUFFIXES)})"
    require(len(found) == 1, what)
    return read_file(found[0], text=True)


def _column(frame: DataFrame, names: tuple[str, ...], where: str) -> Series:
    name = next((name for name in names if name in frame), None)
    if name is None:
        raise DataError(f"{where} has the columns {brief(*frame)}: expected one called {' or '.join(names)}")
    return frame[name]


def _ids(frame: DataFrame, names: tuple[str, ...], where: str) -> list[str]:
    ids = _column(frame, names, where)
    require(not ids.isna().any(), f"{where} has {int(ids.isna().sum())} rows without an id: fill them in")
    ids = ids.astype(str)
    twice = ids[ids.duplicated()]
    require(not len(twice), f"{where} has {len(twice)} ids more than once, first {brief(*twice[:1])}: keep one each")
    return ids.tolist()


def _texts(frame: DataFrame, where: str) -> list[str]:
    texts = _column(frame, TEXT, where)
    wrong = sum(not isinstance(text, str) for text in texts)
    require(not wrong, f"{where} has {wrong} rows whose text is no string: fill them in or remove them")
    return texts.tolist()


def _judged(
    qrels: DataFrame, documents: dict[str, int], query_ids: list[str], grades: Mapping[Any, float] | None
) -> list[dict[int, float]]:
    """Return the grades above 0 of each query, by the number of the document."""
    import pandas

    asked, found = (_column(qrels, names[1:], "qrels").astype(str) for names in (QUERY, DOCUMENT))
    values = _column(qrels, GRADE, "qrels")
    with suppress(ValueError, TypeError):  # of a table, whose fields are text
        values = pandas.to_numeric(values)
    require(values.dtype.kind in "iuf", f"qrels has grades of the type {values.dtype}: expected numbers")
    unknown = sorted({*values} - {*grades}) if grades is not None else []
    require(not unknown, f"qrels has the grades {brief(*unknown)}: expected {brief(*(grades or ()))}")
    values = values if grades is None else values.map(dict(grades))
    endless = int((~np.isfinite(values.astype(float))).sum())
    require(not endless, f"qrels has no number in {endless} rows: expected a grade in each")
    own: dict[str, dict[int, float]] = {name: {} for name in query_ids}
    for what, ids, known in (("query", asked, own), ("document", found, documents)):
        lost = ids[~ids.isin(known.keys())]
        require(
            not len(lost), f"qrels has {len(lost)} rows of an unknown {what}, first {brief(*lost[:1])}: remove them"
        )
    for query, document, grade in zip(asked, found, values, strict=True):
        before = own[query].setdefault(documents[document], float(grade))
        what = f"qrels has two grades of document {document} for query {query}: {before:g} and {grade:g}"
        require(before == grade, f"{what}; keep one")
    return [{i: grade for i, grade in own[name].items() if grade > 0} for name in query_ids]
