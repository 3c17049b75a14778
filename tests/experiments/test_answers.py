"""A finished model is asked once about the same texts."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from transformers import BertModel

from support.training import BERT, rows
from thresher import TopK, prune
from thresher.data.embedder import Embedder, Pooling, Projection
from thresher.experiments import answers

ACTIVATION = "torch.nn.modules.linear.Identity"


def embedder(pooling: Pooling | None = None, projections: Iterable[Projection] = (), **config) -> Embedder:
    torch.manual_seed(0)
    made = BERT.build(0).config
    made.update(config)
    return Embedder(BertModel(made, add_pooling_layer=False), pooling, projections=projections).eval()


def projection(**options) -> Projection:
    torch.manual_seed(1)
    return Projection(32, 32, **options)


@pytest.fixture
def asks(monkeypatch, tmp_path):
    """How often a model was asked, by a function that asks it of texts."""
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path))
    seen, real = [], answers.predict
    monkeypatch.setattr(answers, "predict", lambda *given, **how: seen.append(1) or real(*given, **how))

    def ask(net, texts, **how) -> tuple[int, torch.Tensor]:
        seen.clear()
        said = answers.kept_answers(net, tmp_path, texts, **{"least": 8} | how)
        return len(seen), said.logits

    return ask


def test_the_same_question_is_asked_once(asks, tmp_path):
    texts = rows(16)
    first, said = asks(embedder(), texts)
    again, same = asks(embedder(), texts)
    assert (first, again) == (1, 0) and torch.equal(said, same)
    (file,) = (tmp_path / "answers").iterdir()
    file.write_bytes(b"broken")
    asked, mended = asks(embedder(), texts)
    assert asked == 1 and torch.equal(said, mended)


def test_whatever_could_change_an_answer_is_another_question(asks):
    texts = rows(16)
    asks(embedder(), texts)
    other = embedder()
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-3
    assert asks(other, texts)[0] == 1
    assert asks(prune(embedder(), TopK(keep=0.5)), texts)[0] == 1
    assert asks(embedder(Pooling("cls")), texts)[0] == 1
    assert asks(embedder(hidden_act="relu"), texts)[0] == 1 and asks(embedder(num_attention_heads=2), texts)[0] == 1
    assert asks(embedder(), texts.select(range(15)))[0] == 1
    assert asks(embedder(), texts, batch_size=4)[0] == 1
    ids = [ids[::-1] for ids in texts["input_ids"]]
    assert asks(embedder(), texts.remove_columns("input_ids").add_column("input_ids", ids))[0] == 1


def test_what_a_vector_goes_through_is_part_of_the_question(asks):
    """The weights of all three are the same."""
    texts, said = rows(16), []
    for options in ({}, {"residual": True}, {"activation": ACTIVATION}):
        asked, vectors = asks(embedder(projections=[projection(**options)]), texts)
        assert asked == 1 and asks(embedder(projections=[projection(**options)]), texts)[0] == 0
        said.append(vectors)
    assert not torch.equal(said[0], said[1]) and not torch.equal(said[0], said[2])


def test_few_texts_are_not_kept_and_few_files_stay(asks, tmp_path):
    texts = rows(16)
    assert [asks(embedder(), texts, least=17)[0] for _ in range(2)] == [1, 1] and not (tmp_path / "answers").exists()
    for count in (16, 15, 14):
        asks(embedder(), texts.select(range(count)), most=2)
    assert len([*(tmp_path / "answers").iterdir()]) == 2
    assert asks(embedder(), texts.select(range(14)), most=2)[0] == 0 and asks(embedder(), texts, most=2)[0] == 1
