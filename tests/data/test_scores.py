"""Scores by the function that a CrossEncoder's folder names, and by no code of its own."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support.served import asked, serving
from support.tiny import save_tiny
from thresher import TopK
from thresher.data.models import for_task, load
from thresher.data.scores import FUNCTIONS, activation_of, judged, settle_activation
from thresher.data.task import Task
from thresher.serving.engine import outline
from thresher.serving.score import Scorer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries that it opens
    from sentence_transformers import CrossEncoder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:sentence_transformers", "ignore::FutureWarning")
QUERY, TEXTS = "the farmer", ["the wheat", "thresh the grain and the wheat", "script"]


def crossed(folder, function, labels: int = 1):
    """A folder as CrossEncoder writes it, of a tiny model."""
    with torch.no_grad():
        save_tiny(folder / "plain", num_labels=labels)
    ranker = CrossEncoder(str(folder / "plain"), activation_fn=function, device="cpu")
    ranker.save_pretrained(str(folder / "ranker"))
    return ranker, folder / "ranker"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_functions_are_those_of_torch_and_rise(name):
    x = torch.linspace(-9, 9, 50)[:, None]
    config = SimpleNamespace(sentence_transformers={"activation_fn": f"torch.nn.modules.activation.{name}"})
    found = judged(x, config)
    torch.testing.assert_close(found, getattr(torch.nn, name)()(x))
    assert (found.diff(dim=0) >= 0).all()


def test_scores_are_those_of_a_cross_encoder(tmp_path):
    """By whatever opens the folder: scored, served, exported and read from config.json, where 4.x wrote it."""
    from thresher import export, load_runtime

    ranker, folder = crossed(tmp_path, torch.nn.Identity())
    expected = ranker.predict([(QUERY, text) for text in TEXTS])
    assert np.abs(1 / (1 + np.exp(-expected)) - expected).max() > 0.1
    scorer = Scorer(folder, text=("a", "b"), threads=1)
    assert np.abs(scorer([(QUERY, text) for text in TEXTS])["score"] - expected).max() <= 1e-5
    with serving(folder) as client:
        for row in asked(client, "/rerank", {"query": QUERY, "texts": TEXTS}):
            assert abs(row["score"] - expected[row["index"]]) <= 1e-5
    net, tokenizer = load(str(folder))
    export(net, tmp_path / "graph", tokenizer=tokenizer)
    for row in load_runtime(tmp_path / "graph").rank(QUERY, TEXTS):
        assert abs(row["score"] - expected[row["index"]]) <= 1e-4
    net.save_pretrained(tmp_path / "plain")  # which writes no file of sentence-transformers
    assert activation_of(outline(str(tmp_path / "plain")).config) == "Identity"
    assert (
        np.abs(CrossEncoder(str(tmp_path / "plain"), device="cpu").predict([(QUERY, TEXTS[0])]) - expected[0]) <= 1e-5
    )


def test_without_a_name_one_label_gets_a_sigmoid(tmp_path):
    folder = save_tiny(tmp_path / "plain", num_labels=1)
    expected = CrossEncoder(str(folder), device="cpu").predict([(QUERY, text) for text in TEXTS])
    assert np.abs(Scorer(folder, threads=1)([(QUERY, text) for text in TEXTS])["score"] - expected).max() <= 1e-5


def test_of_several_classes_probabilities_stay_probabilities(tmp_path):
    _, folder = crossed(tmp_path, torch.nn.Identity(), 3)
    columns = Scorer(folder, threads=1)(TEXTS)
    assert np.abs(sum(columns[name] for name in columns if name.startswith("probability_")) - 1).max() <= 1e-6


@pytest.mark.parametrize("named", ["os.system", "torch.nn.modules.activation.GELU", "mine.Sigmoid", 3])
def test_an_unknown_name_is_refused_and_not_run(tmp_path, named):
    _, folder = crossed(tmp_path, torch.nn.Sigmoid())
    place = folder / "config_sentence_transformers.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"activation_fn": named}))
    for opening in (load, outline):
        with pytest.raises(ValueError, match="which is not understood: Sigmoid, Identity, Tanh") as caught:
            opening(str(folder))
        assert len(str(caught.value).splitlines()) == 1


def test_a_prompt_before_every_pair_is_refused(tmp_path):
    _, folder = crossed(tmp_path, torch.nn.Sigmoid())
    place = folder / "config_sentence_transformers.json"
    said = {"prompts": {"judge": "is it so? "}, "default_prompt_name": "judge"}
    place.write_text(json.dumps(json.loads(place.read_text()) | said))
    with pytest.raises(ValueError, match="sets its prompt 'judge' before every pair"):
        outline(str(folder))


def test_the_function_belongs_to_its_head(tmp_path):
    """A reranker that is trained on keeps it, a classifier on its weights does not have it."""
    _, folder = crossed(tmp_path, torch.nn.Tanh())
    columns = {"train": None, "validation": None, "test": None, "text_columns": ("a", "b"), "label_column": None}
    rest = {"name": "", "selected_on": "", "removed": {}}
    ranking = Task(**columns, labels=[], kind="reranking", metric="ndcg@10", **rest)
    classes = Task(**columns, labels=["no", "yes"], kind="classification", metric="accuracy", **rest)
    assert activation_of(for_task(str(folder), ranking).config) == "Tanh"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = for_task(str(folder), classes)
    assert activation_of(net.config) is None
    net.save_pretrained(tmp_path / "classes")
    settle_activation(str(tmp_path / "classes"), net.config)
    assert activation_of(net.config) is None


def test_a_pruned_reranker_keeps_it(tmp_path):
    ranker, folder = crossed(tmp_path, torch.nn.Tanh())
    from thresher import prune

    net, tokenizer = load(str(folder))
    prune(net, TopK(keep=1.0, at=(1,)))
    net.save_pretrained(tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "pruned")
    pairs = [(QUERY, text) for text in TEXTS]
    found = Scorer(tmp_path / "pruned", threads=1)(pairs)["score"]
    assert np.abs(found - ranker.predict(pairs)).max() <= 1e-5
