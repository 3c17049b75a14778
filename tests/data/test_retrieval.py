"""Documents, queries and what was judged, in BEIR's form: read, checked, and made pairs of."""

from __future__ import annotations

import json

import numpy as np
import pandas
import pytest

from thresher.data.load import load_task
from thresher.data.retrieval import is_retrieval, load_retrieval
from thresher.data.task import DataError

CORPUS = [
    {"_id": "d1", "title": "Wheat", "text": "a grain that farmers grow"},
    {"_id": "d2", "title": "", "text": "chaff is what threshing leaves"},
    {"_id": "d3", "title": "Script", "text": "Script and text"},
    {"_id": "d4", "title": "Ship", "text": "a vessel"},
]
QUERIES = [
    {"_id": "q1", "text": "what do farmers grow"},
    {"_id": "q2", "text": "what does threshing leave"},
    {"_id": "q3", "text": "what is never found"},
]
QRELS = [("q1", "d1", 2), ("q1", "d2", 1), ("q2", "d2", 1), ("q3", "d4", 0)]


def beir(folder, corpus=CORPUS, queries=QUERIES, qrels=QRELS, header=("query-id", "corpus-id", "score")):
    """The files as BEIR's are."""
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["\t".join(map(str, row)) for row in (header, *qrels)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_folder_in_beirs_form_is_read(tmp_path):
    with pytest.warns(UserWarning, match="1 of 3 queries of made have no relevant document"):
        task = load_retrieval(beir(tmp_path / "made"))
    assert task.documents[:3] == [
        "Wheat a grain that farmers grow",
        "chaff is what threshing leaves",
        "Script and text",
    ]
    assert (task.query_ids, task.document_ids) == (["q1", "q2"], ["d1", "d2", "d3", "d4"])
    assert task.judged == [{0: 2.0, 1: 1.0}, {1: 1.0}]
    assert task.grades(0).tolist() == [2, 1, 0, 0]
    assert task.nearest_by_words(1).tolist() == [[0], [1]]
    assert is_retrieval(tmp_path / "made") and not is_retrieval(tmp_path)


def test_other_names_and_codes_are_read(tmp_path):
    folder = tmp_path / "cranfield"
    folder.mkdir()
    pandas.DataFrame({"doc_id": [1, 2, 3], "text": ["wheat", "chaff", " "]}).to_parquet(folder / "corpus.parquet")
    pandas.DataFrame({"query_id": [7], "query": ["what wheat"]}).to_parquet(folder / "queries.parquet")
    qrels = {"query_id": [7, 7, 7], "doc_id": [1, 2, 3], "relevance": [1, 4, -1]}
    pandas.DataFrame(qrels).to_parquet(folder / "qrels.parquet")
    with pytest.warns(UserWarning, match="1 of 3 documents of cranfield have no text"):
        task = load_retrieval(folder)
    assert task.judged == [{0: 4, 1: 1}], "1 is the best of Cleverdon's codes"
    with pytest.warns(UserWarning):
        assert load_retrieval(folder, grades={1: 1, 4: 0, -1: 0}).judged == [{0: 1}]
    with pytest.raises(DataError, match="qrels has the grades -1, 4: expected 1"):
        load_retrieval(folder, grades={1: 1})


@pytest.mark.filterwarnings("ignore:.*have no relevant document")
def test_pairs_are_of_what_is_relevant_and_what_is_near(tmp_path):
    task = load_retrieval(beir(tmp_path / "made"))
    pairs = task.pairs(3)
    assert pairs.groupby("query").size().tolist() == [3, 3]
    assert pairs.loc[pairs["query"] == QUERIES[0]["text"], "label"].tolist() == [2, 1, 0]
    assert len(task.pairs(1)) == 3, "all that is relevant stays"


@pytest.mark.filterwarnings("ignore:.*repeat the text")
def test_a_folder_in_beirs_form_is_a_task_of_reranking(tmp_path):
    queries = [{"_id": f"q{i}", "text": f"wheat {i}"} for i in range(40)]
    corpus = [{"_id": f"d{i}", "text": f"wheat {i}"} for i in range(40)]
    qrels = [(f"q{i}", f"d{i}", 1 + i % 2) for i in range(40)]
    task = load_task(beir(tmp_path / "made", corpus, queries, qrels))
    assert (task.kind, task.metric, task.name, task.labels) == ("reranking", "ndcg@10", "made", [])
    of = [{*part["query"]} for part in (task.train, task.validation, task.test)]
    assert sum(map(len, of)) == 40 == len(set.union(*of)) and {*task.test["label"]} <= {0.0, 1.0, 2.0}
    with pytest.raises(DataError, match="'accuracy' is no metric for retrieval: use map"):
        load_task(tmp_path / "made", metric="accuracy")


def test_ids_are_as_they_are_written(tmp_path):
    """001 and 1 are two ids, in a table too."""
    folder = beir(
        tmp_path / "made",
        corpus=[{"_id": "001", "text": "one"}, {"_id": "1", "text": "another"}],
        queries=[{"_id": "007", "text": "which one"}],
        qrels=[("007", "001", 2), ("007", "1", 0)],
    )
    task = load_retrieval(folder)
    assert task.query_ids == ["007"] and task.document_ids == ["001", "1"] and task.judged == [{0: 2.0}]


def changed(rows, i, **values):
    return [row | values if j == i else row for j, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"corpus": changed(CORPUS, 1, _id="d1")}, "corpus has 1 ids more than once, first d1"),
        ({"queries": changed(QUERIES, 1, _id="q1")}, "queries has 1 ids more than once, first q1"),
        ({"qrels": [*QRELS, ("q9", "d1", 1)]}, "1 rows of an unknown query, first q9"),
        ({"qrels": [*QRELS, ("q1", "d9", 1)]}, "1 rows of an unknown document, first d9"),
        ({"qrels": [*QRELS, ("q1", "d1", 1)]}, "two grades of document d1 for query q1: 2 and 1"),
        ({"qrels": [("q1", "d1", 0)]}, "no query of .* has a document with a grade above 0"),
        ({"qrels": [("q1", "d1", "high")]}, "grades of the type .*: expected numbers"),
        ({"queries": changed(QUERIES, 2, text=" ")}, "1 queries have no text, first .'q3'."),
        ({"corpus": changed(CORPUS, 0, text=None)}, "corpus has 1 rows whose text is no string"),
        ({"corpus": [{"name": "d1", "text": "a"}]}, "corpus has the columns name, text: expected one called _id"),
        ({"header": ("query-id", "document", "score")}, "expected one called corpus-id or doc_id"),
    ],
)
def test_what_is_wrong_is_told(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        load_retrieval(beir(tmp_path / "made", **files))


def test_a_missing_file_is_told(tmp_path):
    (beir(tmp_path / "made") / "qrels" / "test.tsv").unlink()
    with pytest.raises(DataError, match="holds nothing: expected one test file"):
        load_retrieval(tmp_path / "made")
    with pytest.raises(DataError, match="is no folder: expected one with corpus, queries, qrels"):
        load_retrieval(tmp_path / "elsewhere")


def test_nearest_words_do_not_depend_on_the_chunk(tmp_path):
    queries = [{"_id": str(i), "text": f"word{i} word{(7 * i) % 70}"} for i in range(70)]
    corpus = [{"_id": str(i), "text": f"word{(7 * i) % 70} and word{i}"} for i in range(70)]
    task = load_retrieval(beir(tmp_path / "made", corpus, queries, [(str(i), str(i), 1) for i in range(70)]))
    assert np.array_equal(task.nearest_by_words(5)[:, 0], np.arange(70))
