"""An embedder is pruned without labels, from texts to the folder of the pruned one."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, BertModel
from typer.testing import CliRunner

from support.families import FAMILIES
from support.tiny import tiny_tokenizer
from support.toy import OPTIONS, write
from thresher.api import inner_model
from thresher.cli import app as cli
from thresher.data.embedder import Embedder, Pooling, is_embedder, load_embedder
from thresher.data.models import open_model
from thresher.data.spec import DataSpec
from thresher.data.task import DataError
from thresher.data.texts import load_texts
from thresher.data.tokenize import tokenize
from thresher.evaluation.predict import predict
from thresher.evaluation.retrieval import cosines
from thresher.experiments import stages
from thresher.experiments import train as jobs
from thresher.experiments.spec import TrainSpec

EMBED = OPTIONS | {"task": "embed", "method": "topk", "target_flops": 0.5, "epochs": None, "prune_epochs": 4}


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("embedded")
    write(folder / "farm" / "train.csv", 160, 0)
    write(folder / "farm" / "test.csv", 48, 1)
    torch.manual_seed(0)
    config = FAMILIES["bert"].build(0, num_hidden_layers=3, initializer_range=0.3).config
    Embedder(BertModel(config), Pooling()).save_pretrained(folder / "model", tiny_tokenizer())
    rows = jobs.train(str(folder / "model"), str(folder / "farm"), str(folder / "out"), **EMBED)
    return SimpleNamespace(model=str(folder / "model"), data=str(folder / "farm"), out=folder / "out", rows=rows)


def test_a_pruned_embedder_is_near_its_dense_one(embedded):
    dense, row = embedded.rows
    assert dense["quality"] == pytest.approx(100, abs=1e-3) and row["metric"] == "cosine" and row["n_examples"] == 48
    assert row["flops_ratio"] == pytest.approx(2, rel=0.15)
    net, tokenizer = load_embedder(str(embedded.out))
    assert is_embedder(str(embedded.out)) and net.token_pruner.name == "topk"
    reference, _ = load_embedder(str(embedded.out / "dense"))
    task = load_texts(DataSpec(data=embedded.data))
    rows, _ = tokenize(task.test, task, tokenizer, 32)
    said, wanted = (predict(model, rows).logits for model in (net, reference))
    assert 100 * cosines(said, wanted).mean() == pytest.approx(row["quality"], abs=1e-2)
    torch.testing.assert_close(wanted, predict(load_embedder(embedded.model)[0], rows).logits)
    summary = json.loads((embedded.out / jobs.SUMMARY).read_text())
    pooling = summary["pooling"]
    assert net.token_pruner.pooling == pooling["chosen"] == max(pooling["judged"], key=pooling["judged"].get)
    assert len({*pooling["judged"].values()}) == 2
    assert len(summary["predictions"]["pruned"]) == 48 and summary["steps"]["dense"] == 0


def test_training_brings_it_nearer(embedded, tmp_path):
    given = EMBED | {"method_options": {"pooling": "put-back"}}
    rows = {}
    for epochs in (0, 4):
        out = tmp_path / str(epochs)
        rows[epochs] = jobs.train(embedded.model, embedded.data, str(out), **given | {"prune_epochs": epochs})
        assert json.loads((out / jobs.SUMMARY).read_text())["pooling"] is None, "it was not open"
    assert rows[4][1]["quality"] > rows[0][1]["quality"] + 1


def test_the_pooling_is_chosen_before_a_training_or_by_short_ones(embedded, tmp_path):
    """By the untrained vectors where the training has a length, else with the schedule."""
    assert embedded.rows[1]["quality"] > 90, "the tokens that are left are nearer here"
    summary = json.loads((embedded.out / jobs.SUMMARY).read_text())
    assert summary["pooling"]["chosen"] == "survivors"
    kept = {"STEPS": (3, 2), "RATES": (1e-3,)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "SCHEDULE_STEPS", kept["STEPS"])
        patch.setattr(stages, "RATES", kept["RATES"])
        patch.setattr(stages, "RATE_STEPS", (2,))
        for name in ("LEAST", "MOST"):
            patch.setattr(stages, name, 4)
        open_ = EMBED | {"prune_epochs": None, "lr": None, "prune_lr": None}
        jobs.train(embedded.model, embedded.data, str(tmp_path / "out"), **open_)
    said = json.loads((tmp_path / "out" / jobs.SUMMARY).read_text())
    assert said["schedule"].get("pooling") == "survivors" == said["pooling"]["chosen"]


def test_averages_are_merged_by_states_unless_the_model_cannot(embedded, tmp_path):
    def usual(model: str, **given):
        spec = TrainSpec(model=model, data=embedded.data, out=tmp_path, task="embed", target_flops=0.5, **given)
        spec = spec.completed()
        return spec.method, {**spec.method_options}, spec.dropout

    options = {"metric": "states", "rounds": 2, "target_flops": 0.5}
    assert usual(embedded.model) == usual(embedded.model, method="tome") == ("tome", options, 0.0)
    assert usual(embedded.model, method="tofu") == ("tofu", options, 0.0)
    own = {"metric": "keys", "rounds": 3}
    assert usual(embedded.model, method="tofu", method_options=own) == ("tofu", options | own, 0.0)
    assert usual(embedded.model, recipe="top-embed") == ("top", {"target_flops": 0.5}, 0.0)
    assert usual(embedded.model, recipe="top-embed", method="tome") == ("tome", options, 0.0)
    assert usual(embedded.model, recipe="top-embed", dropout=0.1)[2] == 0.1
    assert usual(embedded.model, method="topk", dropout=0.1) == ("topk", {"target_flops": 0.5}, 0.1)
    tokenizer, topk = tiny_tokenizer(), ("topk", {"target_flops": 0.5}, 0.0)
    for name, family, mode in (("cls", "bert", "cls"), ("mpnet", "mpnet", "mean")):
        net = inner_model(FAMILIES[family].build(0)).base_model
        Embedder(net, Pooling(mode)).save_pretrained(tmp_path / name, tokenizer)
        assert usual(str(tmp_path / name)) == topk
        assert usual(str(tmp_path / name), method="tome") == ("tome", {"target_flops": 0.5}, 0.0)
    given = {**EMBED, "method": None, "prune_epochs": 1}
    rows = jobs.train(embedded.model, embedded.data, str(tmp_path / "out"), **given)
    net, _ = load_embedder(str(tmp_path / "out"))
    assert (net.token_pruner.name, net.token_pruner.metric, net.token_pruner.rounds) == ("tome", "states", 2)
    assert 0 < net.token_pruner.min_tokens < 16, "half of the mean"
    assert rows[1]["flops_ratio"] == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize(
    ("given", "method", "options"),
    [
        ({"keep": 0.5}, "topk", {"keep": 0.5}),
        ({"keep": 0.5, "at": (1,)}, "topk", {"keep": 0.5, "at": (1,)}),
        ({"replay": "pruned"}, "topk", {}),
        ({"at": (1,)}, "tome", {"metric": "states", "rounds": 2, "at": (1,)}),
        ({"method_options": {"r": 0.2}}, "tome", {"metric": "states", "rounds": 2, "r": 0.2}),
    ],
)
def test_what_is_given_says_whether_averages_are_merged(embedded, tmp_path, given, method, options):
    """Options that merging does not have, and counts to replay, are of tokens that are kept."""
    spec = TrainSpec(model=embedded.model, data=embedded.data, out=tmp_path, task="embed", **given).completed()
    assert (spec.method, spec.method_options, spec.dropout) == (method, options, 0.0)
    if not spec.replay:
        assert stages.method_of(spec).name == method


def test_the_command_embeds(embedded, tmp_path):
    given = f"train {embedded.model} --data {embedded.data} --out {tmp_path / 'out'} --task embed --no-bf16"
    given += " --method topk --max-drop 20 --prune-epochs 1 --batch-size 16 --max-length 32 --lr 0.001"
    run = CliRunner().invoke(cli.app, given.split())
    assert run.exit_code == 0, run.output
    assert is_embedder(str(tmp_path / "out"))


def test_what_cannot_be_embedded_is_told(embedded, tmp_path):
    options = {"out": str(tmp_path / "out"), "task": "embed", "progress": False}
    with pytest.raises(DataError, match="'accuracy' is no metric of texts without labels"):
        jobs.train(embedded.model, embedded.data, metric="accuracy", **options)
    open_model(embedded.model, num_labels=2).save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(embedded.model).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="does not say how its states are pooled"):
        jobs.train(str(tmp_path / "plain"), embedded.data, **options)
    with pytest.raises(ValueError, match="is pruned already"):
        jobs.train(str(embedded.out), embedded.data, **options)


def table(path, rows) -> str:
    import pandas

    pandas.DataFrame(rows).to_csv(path, index=False)
    return str(path)


def test_pairs_of_a_table(tmp_path):
    """Every pair of train is one of the table, and none has a text of the other parts; no text is lost."""
    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i % 50}", "score": i / 60} for i in range(60)]
    scored = DataSpec(data=table(tmp_path / "scored.csv", rows))
    with pytest.warns(UserWarning, match="of 60 pairs with the similarity 'score' are learned from"):
        task = load_texts(scored, pairs=True)
    plain = load_texts(scored)
    assert {*task.train["text"]} == {*plain.train["text"]} and task.test["text"] == plain.test["text"]
    known = {(row["sentence1"], row["sentence2"]): row["score"] for row in rows}
    found: dict[int, dict] = {}
    for row in task.train:
        found.setdefault(row["group"], {})[row["place"]] = row
    whole = [own for own in found.values() if len(own) == 2]
    assert len(whole) > 25
    for own in whole:
        assert own[0]["similarity"] == known[own[0]["text"], own[1]["text"]]
    assert all(
        own[0]["similarity"] is None or own[0]["similarity"] != own[0]["similarity"]
        for own in found.values()
        if len(own) == 1
    )


def test_near_and_further_texts_of_a_table(tmp_path):
    rows = [{"anchor": f"a {i}", "positive": f"b {i}", "negative": f"c {i}"} for i in range(60)]
    with pytest.warns(UserWarning, match="of 60 pairs without a similarity"):
        task = load_texts(DataSpec(data=table(tmp_path / "near.csv", rows)), pairs=True)
    places = [row["place"] for row in task.train]
    assert places.count(1) > 25 and places.count(2) > 20
    groups = {(row["group"], row["place"]): row["text"] for row in task.train}
    assert all(groups[group, 0][2:] == text[2:] for (group, place), text in groups.items() if place)
    with pytest.warns(UserWarning, match="pairs without"):
        few = load_texts(DataSpec(data=str(tmp_path / "near.csv"), limit=10), pairs=True)
    assert len(few.train) <= 11 and [row["place"] for row in few.train].count(1) == 3


def test_an_embedder_learns_from_pairs(embedded, tmp_path):
    rows = [{"sentence1": f"the farmer {i}", "sentence2": f"the wheat and {i}", "score": i / 40} for i in range(40)]
    data = table(tmp_path / "pairs.csv", rows)
    with pytest.warns(UserWarning, match="pairs with the similarity 'score' are learned from"):
        jobs.train(embedded.model, data, str(tmp_path / "out"), **EMBED | {"prune_epochs": 1, "prune_lr": 1e-4})
    assert is_embedder(str(tmp_path / "out"))


def test_training_texts_begin_with_the_prompt_by_default(embedded, tmp_path):
    """What is learned, and judged, is what ``encode`` will be asked."""
    shutil.copytree(embedded.model, tmp_path / "prompted")
    said = {"prompts": {"query": "the farmer "}, "default_prompt_name": "query"}
    (tmp_path / "prompted" / "config_sentence_transformers.json").write_text(json.dumps(said))
    (tmp_path / "prompted" / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode": "mean", "include_prompt": False})
    )
    spec = TrainSpec(
        model=str(tmp_path / "prompted"), data=embedded.data, task="embed", out=tmp_path / "out", max_length=32
    )
    data, ids = stages.load_data(spec), tiny_tokenizer()("the farmer ")["input_ids"][:-1]
    for part in (data.train, data.validation, data.test):
        assert all(row[: len(ids)] == ids for row in part["input_ids"])
        assert all(mask == [0] * len(ids) + [1] * (len(mask) - len(ids)) for mask in part["pooling_mask"])
