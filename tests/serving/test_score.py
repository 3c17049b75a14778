"""A scorer answers as a plain loop does, whatever it is given, and travels to other processes."""

from __future__ import annotations

import pickle
import platform
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from support.families import FAMILIES
from support.tiny import save_tiny, tiny_model, tiny_tokenizer
from thresher import TopK, export, load_runtime, prune
from thresher.serving import engine
from thresher.serving.engine import Outline
from thresher.serving.score import Scorer, columns_of

WORDS = ["the", "farmer", "wheat", "chaff", "and", "grain", "script", "thresh"]


def texts(count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(1, 60))) for _ in range(count)]


def plainly(folder, given: list[str], pairs: list[str] | None = None) -> np.ndarray:
    """Probabilities by one call a text."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model = prune(model) if getattr(model.config, "token_pruning", None) else model
    both = zip(given, *([pairs] if pairs else []), strict=True)
    with torch.no_grad():
        rows = [
            model(**tiny_tokenizer()(*one, return_tensors="pt", truncation=True)).logits.softmax(-1) for one in both
        ]
    return torch.cat(rows).numpy()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: save_tiny(folder / name, method) for name, method in (("dense", None), ("topk", TopK(keep=0.6)))}


@pytest.mark.parametrize("name", ["dense", "topk"])
@pytest.mark.parametrize("tokens", [64, 8192])
def test_it_answers_as_a_plain_loop(folders, name, tokens):
    given = texts(70)
    got, expected = Scorer(folders[name], tokens=tokens)(given), plainly(folders[name], given)
    assert list(got) == ["label", "probability", "probability_LABEL_0", "probability_LABEL_1", "probability_LABEL_2"]
    found = np.stack([got[f"probability_LABEL_{i}"] for i in range(3)], 1)
    assert np.abs(found - expected).max() < 1e-5
    assert got["label"].tolist() == [f"LABEL_{i}" for i in expected.argmax(1)]
    assert np.abs(got["probability"] - expected.max(1)).max() < 1e-5


def test_pairs_of_texts(folders):
    first, second = texts(9), texts(9, 1)
    got, expected = Scorer(folders["topk"])([*zip(first, second, strict=True)]), plainly(folders["topk"], first, second)
    assert np.abs(got["probability"] - expected.max(1)).max() < 1e-5
    by_columns = Scorer(folders["topk"], text=("a", "b"))({"a": first, "b": second})
    assert np.array_equal(by_columns["probability"], got["probability"])
    with pytest.raises(ValueError, match="pairs of texts alone"):
        Scorer(folders["topk"])([("a", "b"), "c"])


def test_what_engines_hand_over(folders):
    given, scorer = texts(8), Scorer(folders["topk"], text="body", prefix="model_", best=True)
    expected = scorer(given)
    assert list(expected) == ["model_label", "model_probability"]
    columns = scorer({"id": np.arange(8), "body": np.array(given)})  # Ray Data
    assert list(columns) == ["id", "body", "model_label", "model_probability"]
    assert np.array_equal(columns["model_probability"], expected["model_probability"])
    frame = pd.DataFrame({"body": given}, index=range(5, 13))
    scored = scorer(frame)  # Dask
    assert list(scored) == ["body", "model_label", "model_probability"] and list(frame) == ["body"]
    assert scored.index.equals(frame.index) and scored["model_label"].tolist() == expected["model_label"].tolist()
    frames = scorer(iter([frame[:3], frame[3:]]))  # Spark
    again = pd.concat(list(frames))
    assert again["model_label"].equals(scored["model_label"])
    assert np.abs(again["model_probability"] - scored["model_probability"]).max() < 1e-5
    assert scorer([])["model_label"].tolist() == [] and len(scorer(frame[:0])) == 0


def test_it_travels_unopened(folders):
    scorer = Scorer(folders["topk"])
    before = scorer(["the wheat"])
    other = pickle.loads(pickle.dumps(scorer))
    assert other._engine is None and len(pickle.dumps(scorer)) < 1000
    assert np.array_equal(other(["the wheat"])["probability"], before["probability"])


def test_what_is_no_text_has_no_answer(folders):
    scorer = Scorer(folders["topk"])
    given = ["the wheat", None, 7, float("nan"), "half \ud800", b"bytes", "", "chaff"]
    got = scorer.score([given])
    assert got.answered.tolist() == [True, False, False, False, False, False, True, True]
    assert got.columns["label"][1] is None and np.isnan(got.columns["probability"][1:6]).all()
    assert (got.tally.rows, got.tally.unread) == (8, 5)
    alone = scorer(["the wheat", "", "chaff"])["probability"]
    assert np.abs(got.columns["probability"][[0, 6, 7]] - alone).max() < 1e-6
    frame = scorer(pd.DataFrame({"text": ["the wheat", None]}))
    assert frame["label"].isna().tolist() == [False, True]
    assert scorer([None, None])["label"].tolist() == [None, None]


def test_texts_that_are_cut_are_counted(folders):
    tally = Scorer(folders["topk"], max_length=16).score([["the " * 100, "the wheat"]]).tally
    assert (tally.cut, tally.tokens) == (1, 20) and 0 < tally.macs_used < tally.macs_dense
    assert Scorer(folders["dense"]).score([["the"]]).tally.macs_used == 0


def test_models_of_numbers_and_of_several_labels(tmp_path):
    one = save_tiny(tmp_path / "one", num_labels=1)
    assert list(Scorer(one)(["the"])) == ["score"] and 0 < Scorer(one)(["the"])["score"][0] < 1
    number = save_tiny(tmp_path / "number", num_labels=1, problem_type="regression")
    logit = (
        AutoModelForSequenceClassification.from_pretrained(number)
        .eval()(**tiny_tokenizer()("the", return_tensors="pt"))
        .logits
    )
    assert Scorer(number)(["the"])["score"][0] == pytest.approx(logit.item(), abs=1e-6)
    several = save_tiny(tmp_path / "several", num_labels=2, problem_type="regression")
    assert list(Scorer(several)(["the"])) == ["score_LABEL_0", "score_LABEL_1"]
    multi = Scorer(save_tiny(tmp_path / "multi", num_labels=3, problem_type="multi_label_classification"))(["the"])
    assert sum(multi[f"probability_LABEL_{i}"][0] for i in range(3)) != pytest.approx(1, abs=1e-3)


def test_a_graph_answers_as_its_model(tmp_path):
    model = prune(
        FAMILIES["bert"].build(pad_token_id=0, num_labels=3, vocab_size=len(tiny_tokenizer())), TopK(keep=0.6)
    )
    export(model, tmp_path / "graph", tokenizer=tiny_tokenizer(), max_length=32)
    given = texts(20)
    got, expected = Scorer(tmp_path / "graph", threads=1)(given), load_runtime(tmp_path / "graph")(given)
    assert got["label"].tolist() == [one["label"] for one in expected]
    assert np.abs(got["probability"] - np.array([one["score"] for one in expected])).max() < 1e-5
    with pytest.raises(ValueError, match="exported for 32 tokens"):
        Scorer(tmp_path / "graph", max_length=64)(given)
    with pytest.raises(ValueError, match="run on the cpu"):
        Scorer(tmp_path / "graph", device="cuda")(given)


def test_what_it_refuses(folders, tmp_path):
    scorer = Scorer(folders["dense"])
    with pytest.raises(ValueError, match="no column 'text': its columns are body"):
        scorer({"body": ["a"]})
    with pytest.raises(ValueError, match="'label' of its own: say Scorer"):
        scorer({"text": ["a"], "label": [1]})
    with pytest.raises(ValueError, match="a batch of str"):
        scorer("a text")
    with pytest.raises(ValueError, match="one column of text, or of two"):
        Scorer("m", text=("a", "b", "c"))
    with pytest.raises(ValueError, match="tokens=0"):
        Scorer("m", tokens=0)
    tiny_model().base_model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="is BertModel: expected a classifier"):
        Scorer(tmp_path / "base")(["a"])
    with pytest.raises(ValueError, match="nowhere"):
        Scorer(tmp_path / "nowhere")(["a"])


def test_an_answer_that_is_no_number_is_an_error(tmp_path):
    model = tiny_model()
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'the wheat' is no number"):
        Scorer(tmp_path)(["the wheat"])


def test_labels_of_one_name_are_numbered():
    config = tiny_model(num_labels=2).config
    config.id2label = {0: "same", 1: "same"}
    got = columns_of(np.array([[0.0, 1.0]], np.float32), Outline("m", "classifier", config, False, {}))
    assert list(got) == ["label", "probability", "probability_0", "probability_1"] and got["label"][0] == "same"


# --- memory ----------------------------------------------------------------------------------------------------------
def test_free_memory_is_handed_back_every_few_batches(folders, monkeypatch):
    calls, scorer = [], Scorer(folders["dense"], tokens=1)  # one text a batch
    monkeypatch.setattr(engine, "tidy", lambda: calls.append(len(calls)))
    scorer(texts(engine.TIDY + 1))
    assert len(calls) == 1
    scorer(texts(engine.TIDY - 1))
    assert len(calls) == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_holes_in_the_memory_are_handed_back():
    code = """if True:
        import ctypes, psutil
        from thresher.serving.engine import tidy
        libc, mb = ctypes.CDLL(None), 2**20
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
        libc.free(libc.malloc(20 * mb))  # after which 20 MB are no longer large
        blocks = [libc.malloc(mb) for _ in range(64)]
        for block in blocks:
            ctypes.memset(block, 1, mb)
        for block in blocks[:-1]:  # the last one keeps the end of the memory in use
            libc.free(block)
        before = psutil.Process().memory_info().rss
        tidy()
        print((before - psutil.Process().memory_info().rss) // mb)
    """
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert int(made.stdout) > 50, made.stderr
