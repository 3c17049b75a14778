"""Schedules found without training: on a tiny model, with and without labels, and every budget; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering
from typer.testing import CliRunner

from support.families import FAMILIES, TEXT
from support.files import write as write_file
from support.questions import questions
from support.tiny import save_tiny, tiny_model, tiny_tokenizer
from support.toy import write
from thresher import TopK, prune, unprune
from thresher.cli import app as cli
from thresher.core.cost import LatencyTable
from thresher.data.models import load, open_model
from thresher.data.spec import DataSpec
from thresher.evaluation.predict import predict
from thresher.experiments import service
from thresher.experiments import tune as module
from thresher.experiments.spec import SUMMARY
from thresher.experiments.tune import best, tune
from thresher.search import explore as trials
from thresher.search.explore import SCORES
from thresher.search.reference import Sample, divergence, texts_of, tokenized
from thresher.search.schedules import Space, protected_by
from thresher.stats import bounds

QUICK = {"max_length": 32, "limit": 64}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Fewer schedules are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "LOOKS", 6)
        patch.setattr(trials, "SHARES", (0.9, 0.7, 0.5, 0.3))
        yield


def undecided(folder: Path) -> Path:
    """A model that gives half of the texts either class; a random one gives one of them to all."""
    model, tokenizer = tiny_model(num_hidden_layers=3, seed=2), tiny_tokenizer()
    texts = [line.split(",")[0] for line in (folder / "texts.csv").read_text().splitlines()[1:]]
    with torch.no_grad():
        model.classifier.weight.mul_(4)
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts[:64]]
        model.classifier.bias.sub_(torch.stack(logits).median(0).values)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def farm(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("tune")
    write(folder / "farm" / "train.csv", 420, 0)
    write(folder / "farm" / "test.csv", 40, 1)
    plain = [line.rsplit(",", 1)[0] for line in (folder / "farm" / "train.csv").read_text().splitlines()[1:]]
    write_file(folder / "texts.csv", [{"text": text} for text in plain])
    model = undecided(folder)
    pruned = save_tiny(folder / "pruned", TopK(keep=0.5))
    names = {"data": folder / "farm", "plain": folder / "texts.csv", "model": model, "pruned": pruned}
    return SimpleNamespace(folder=folder, **{name: str(path) for name, path in names.items()})


@pytest.fixture(scope="module")
def found(farm) -> SimpleNamespace:
    out = farm.folder / "half"
    rows = tune(farm.model, farm.plain, str(out), target_flops=0.5, **QUICK)
    return SimpleNamespace(out=out, rows=rows, summary=json.loads((out / SUMMARY).read_text()))


def chosen(rows: list[dict]) -> dict:
    (row,) = [row for row in rows if row["chosen"]]
    return row


def fails(*arguments: object) -> str:
    """The one line that the command line answers with."""
    result = CliRunner().invoke(cli.app, ["tune", *map(str, arguments)])
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line


# --- what comes of it ------------------------------------------------------------------------------------------------
def test_the_folder_is_a_pruned_model(found):
    row, (model, tokenizer) = chosen(found.rows), load(str(found.out))
    method, options = SCORES[row["method"]]
    assert (model.token_pruner.name, model.token_pruner.sites) == (method, tuple(row["at"]))
    assert all(getattr(model.token_pruner, name) == value for name, value in options.items())
    assert (found.summary["tuning"]["method"], found.summary["tuning"]["method_options"]) == (method, options)
    shares = model.token_pruner.shares
    shares = tuple(round(1 - share, 3) for share in shares) if method in ("tome", "tofu") else shares
    assert shares == tuple(row["keep"]) and tokenizer("grain")["input_ids"]
    assert {file.name for file in found.out.iterdir()} >= {"config.json", "model.safetensors", SUMMARY, "tuning.png"}
    assert not [*found.out.parent.glob(".half*")]
    texts = dict(found.summary["texts"])
    assert 3 < texts.pop("tokens_mean") < 32 and texts == {"searched": 64, "tested": 0, "max_length": 32}
    assert [row["chosen"] for row in found.summary["schedules"]].count(True) == 1


def test_the_figures_are_those_of_the_saved_model(farm, found):
    """On the texts of the search, taken and run again here."""
    model, row = open_model(farm.model).eval(), chosen(found.rows)
    task, texts, _ = texts_of(model, tiny_tokenizer(), DataSpec(data=farm.plain, limit=64), labelled=False, seed=0)
    rows = tokenized(texts, task, tiny_tokenizer(), 32)
    plain, pruned = predict(model, rows), predict(load(str(found.out))[0], rows)
    assert row["flops_fraction"] == pytest.approx(pruned.macs_used / plain.macs_used) and row["flops_fraction"] <= 0.5
    assert row["divergence"] == pytest.approx(divergence(plain.logits, pruned.logits).mean().item(), rel=1e-3)
    other = plain.logits.argmax(1) != pruned.logits.argmax(1)
    assert row["disagreement"] == pytest.approx(other.float().mean().item())


def test_the_search_beats_schedules_by_hand(farm, found):
    model = open_model(farm.model).eval()
    task, texts, _ = texts_of(model, tiny_tokenizer(), DataSpec(data=farm.plain, limit=64), labelled=False, seed=0)
    sample = Sample(model, tokenized(texts, task, tiny_tokenizer(), 32), 32)
    rng, by_hand = np.random.default_rng(0), []
    while len(by_hand) < 8:
        keep = tuple(rng.uniform(0.1, 1, 3).round(2).tolist())
        prune(model, TopK(keep=keep, at=(0, 1, 2)))
        result = sample.compare(model)
        unprune(model)
        if result.flops_fraction <= 0.5:
            by_hand.append(result.divergence)
    assert chosen(found.rows)["divergence"] < min(by_hand)


def test_the_rows_are_a_front(found):
    costs, far = zip(*((row["flops_fraction"], row["divergence"]) for row in found.rows), strict=True)
    assert list(costs) == sorted(costs, reverse=True) and list(far) == sorted(far) and len(found.rows) > 3
    run = found.summary["schedules"]
    assert [row["divergence"] for row in best(run)] == list(far) and len(run) > len(found.rows)


def test_the_last_layer_costs_a_classifier_nothing(found):
    layers = {layer: list(shares.values()) for layer, shares in found.summary["profile"].items()}
    assert layers["2"] == pytest.approx([0.0] * 5, abs=1e-9) and min(layers["0"][0], layers["1"][0]) > 1e-6


def test_the_test_part_chooses_nothing(farm, tmp_path):
    other = tmp_path / "farm"
    shutil.copytree(farm.data, other)
    write(other / "test.csv", 40, 8)
    results = [
        tune(farm.model, str(data), str(tmp_path / name), target_flops=0.6, limit=40, max_length=32)
        for name, data in (("a", farm.data), ("b", other))
    ]
    assert results[0] == results[1]


def test_short_texts_are_left_out_where_asked(farm, tmp_path, monkeypatch):
    model, tokenizer = open_model(farm.model).eval(), tiny_tokenizer()
    given, plain = {"labelled": False, "seed": 0}, DataSpec(data=farm.plain)
    _, whole, fresh = texts_of(model, tokenizer, plain, **given)
    lengths = [len(tokenizer(text)["input_ids"]) for text in whole["text"]]
    least = int(np.median(lengths))
    long = [text for text, length in zip(whole["text"], lengths, strict=True) if length >= least]
    _, texts, still = texts_of(model, tokenizer, plain, **given, min_length=least)
    assert texts["text"][:] == long and 0 < len(long) < len(whole)
    assert still == sum(length >= least for length in lengths[:fresh])
    taken = []
    noted = lambda texts, *rest: taken.append(texts["text"][:]) or tokenized(texts, *rest)  # noqa: E731
    monkeypatch.setattr(module, "tokenized", noted)
    tune(farm.model, farm.plain, str(tmp_path / "o"), target_flops=0.6, max_length=32, min_length=least, limit=40)
    said = json.loads((tmp_path / "o" / SUMMARY).read_text())
    assert said["tuning"]["min_length"] == least and taken[0] == long[:40] and {*taken[1]} <= {*long[:40]}


def test_disagreement_is_tested_on_texts_that_chose_nothing(farm, tmp_path, monkeypatch):
    taken = []
    noted = lambda texts, *rest: taken.append({*texts["text"]}) or tokenized(texts, *rest)  # noqa: E731
    monkeypatch.setattr(module, "tokenized", noted)
    with pytest.warns(UserWarning, match=r"\d+ of the \d+ tested texts are of the train part"):
        rows = tune(farm.model, farm.data, str(tmp_path / "out"), max_disagreement=0.15, max_length=32)
    assert max(row["disagreement"] for row in rows) > 0.2, "there is something to disagree about"
    row, texts = chosen(rows), json.loads((tmp_path / "out" / SUMMARY).read_text())["texts"]
    searched, _, tested = taken
    n = texts["tested"]
    assert n == 8 * bounds.least(0.15) and texts["searched"] == 256 and len(tested - searched) > 0.9 * len(tested)
    assert row["bound"] <= 0.15 and row["bound"] == pytest.approx(bounds.upper(round(row["tested"] * n), n))
    tried = [one for one in rows if one["bound"] is not None]
    assert [one["bound"] <= 0.15 for one in tried] == [True] * (tried.index(row) + 1) + [False] * (
        len(tried) - tried.index(row) - 1
    )
    assert len(tried) - tried.index(row) <= 2, "nothing is tested after the first failure"


@pytest.mark.filterwarnings("ignore:.*tested texts are of the train part")
def test_a_drop_of_accuracy(farm, tmp_path):
    rows = tune(farm.model, farm.data, str(tmp_path / "out"), max_drop=30, max_length=32)
    row = chosen(rows)
    assert row["tested"] <= row["bound"] <= 0.3 and row["drop"] is not None


@pytest.mark.filterwarnings("ignore:measured")
def test_a_budget_of_time_is_priced_by_the_table(farm, tmp_path, monkeypatch):
    line = ((1.0, 100.0), (0.1, 10.0))
    whole = ((1.0, 100.0), (0.61, 60.01))  # of three layers
    table = LatencyTable(line, line, line, ((1.0, 100.0), (0.01, 0.01)), whole, batch_size=1, threads=1)
    monkeypatch.setattr(service, "latency_table", lambda model: table)
    monkeypatch.setattr(module, "CORRECTED", 0)
    dense = 0.01 + 6 * 0.1 * 10.5  # about so many tokens
    rows = tune(farm.model, farm.plain, str(tmp_path / "out"), target_latency_ms=0.6 * dense, **QUICK)
    ran = json.loads((tmp_path / "out" / SUMMARY).read_text())["schedules"]
    assert {row["method"] for row in ran} == {*SCORES} - {"tome", "tofu"}, "merging has no price in time"
    with pytest.raises(ValueError, match="tome merges tokens, which the table of times has no price for: use MACs"):
        tune(farm.model, farm.plain, str(tmp_path / "o"), target_latency_ms=0.6 * dense, method="tome", **QUICK)
    reached = json.loads((tmp_path / "out" / SUMMARY).read_text())["reached"]
    assert 0 < chosen(rows)["latency_ms"] <= 0.6 * dense and min(reached["latency_ms"], reached["latency_ms_dense"]) > 0


@pytest.mark.filterwarnings("ignore:measured")
@pytest.mark.parametrize("slower", [1.0, 1.5, 100.0])
def test_a_price_is_corrected_by_what_the_model_really_takes(farm, tmp_path, monkeypatch, slower):
    """As if all times were ``slower`` than the table says: what is saved takes the time that was asked for, or the
    cheapest schedule does not and it is told."""
    line, asked = ((1.0, 100.0), (0.1, 10.0)), 3.5
    whole = ((1.0, 100.0), (0.61, 60.01))
    table = LatencyTable(line, line, line, ((1.0, 100.0), (0.01, 0.01)), whole, batch_size=1, threads=1)
    monkeypatch.setattr(service, "latency_table", lambda model: table)
    taken = []

    def times(self, net, tokenizer, rows):
        lengths = torch.tensor([len(ids) for ids in rows["input_ids"]])
        method = net.token_pruner
        space = Space(method.architecture, lengths, False, table, protected_by(method, rows["input_ids"]))
        taken.append(slower * space._cost({"at": method.sites, "keep": method.keep}))
        return {"latency_ms_dense": slower * 6.3, "latency_ms": taken[-1]}

    monkeypatch.setattr(service.Service, "times", times)
    rows = tune(farm.model, farm.plain, str(tmp_path / "out"), target_latency_ms=asked, method="topk", **QUICK)
    reached = json.loads((tmp_path / "out" / SUMMARY).read_text())["reached"]
    assert reached["latency_ms"] == taken[-1] and reached["latency_ms_asked"] == asked
    assert sum(row["chosen"] for row in rows) == 1 and slower * chosen(rows)["latency_ms"] == pytest.approx(taken[-1])
    assert len(taken) == 1 if slower != 1.5 else abs(taken[-1] / asked - 1) < abs(taken[0] / asked - 1)


@pytest.mark.parametrize(
    "given, told",
    [
        ({"runtime": "tensorrt", "target_latency_ms": 1}, "runtime='tensorrt': expected torch, onnx, openvino"),
        ({"precision": "int8", "target_latency_ms": 1}, "a budget of time in torch takes fp32"),
        ({"runtime": "onnx", "precision": "bf16", "target_latency_ms": 1}, "in onnx takes fp32, int8"),
        ({"serve_batch": 0, "target_latency_ms": 1}, "serve_batch=0: expected 1 or more"),
        ({"runtime": "onnx", "target_flops": 0.5}, "say where a budget of time holds: give target_latency_ms"),
    ],
)
def test_a_service_that_there_is_not(farm, tmp_path, given, told):
    with pytest.raises(ValueError, match=told):
        tune(farm.model, farm.plain, str(tmp_path / "out"), **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "method, options",
    [("vatp", {}), ("entropy", {"criterion": "column"}), ("ats", {}), ("tofu", {"prunes": 0.0})],
)
def test_other_methods(farm, tmp_path, method, options):
    out = tmp_path / "out"
    rows = tune(farm.model, farm.plain, str(out), target_flops=0.6, method=method, method_options=options, **QUICK)
    pruner = load(str(out))[0].token_pruner
    assert pruner.name == method and chosen(rows)["flops_fraction"] <= 0.6
    assert all(getattr(pruner, name) == value for name, value in options.items())


def test_the_best_score_is_taken(farm, found):
    """Every score is tried under one schedule; what is refined is the one that did the least there."""
    drops = {name for name in SCORES if not trials.merges(SCORES[name][0])}
    for kind in (drops, {*SCORES} - drops):
        by_schedule: dict[tuple, dict[str, float]] = {}
        ran = [row for row in found.summary["schedules"] if row["method"] in kind]
        for row in ran:
            by_schedule.setdefault((*row["at"], *row["keep"]), {})[row["method"]] = row["divergence"]
        tried = next(far for far in by_schedule.values() if set(far) == kind)
        best = min(tried, key=tried.get)
        assert len({*tried.values()}) > 1 and {row["method"] for row in ran[-3:]} == {best}, "the refinement comes last"
    assert chosen(found.rows)["divergence"] == min(
        row["divergence"] for row in found.summary["schedules"] if row["flops_fraction"] <= 0.5
    )
    alone = tune(farm.model, farm.plain, str(farm.folder / "alone"), target_flops=0.5, method="topk", **QUICK)
    assert {row["method"] for row in alone} == {"topk"}
    assert chosen(found.rows)["divergence"] <= chosen(alone)["divergence"]


@pytest.mark.parametrize(
    "family, lacks",
    [("mpnet", {"vatp", "tome", "tofu"}), ("llama", {"entropy", "tome", "tofu"}), ("bert", set())],
)
def test_scores_that_a_model_refuses_are_left_out(family, lacks):
    net = FAMILIES[family].build()
    assert {*SCORES} - {*trials.served(net, SCORES)} == lacks and not hasattr(net, "token_pruner")
    for name in lacks:
        with pytest.raises(ValueError, match="is not possible"):
            trials.served(net, {name: SCORES[name]})


def test_answers_to_questions(tmp_path):
    write_file(tmp_path / "farm" / "train.jsonl", questions(160))
    torch.manual_seed(0)
    BertForQuestionAnswering(BertConfig(**TEXT | {"initializer_range": 0.5})).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = tune(str(tmp_path / "model"), str(tmp_path / "farm"), str(tmp_path / "out"), target_flops=0.7, limit=48)
    assert chosen(rows)["flops_fraction"] <= 0.7 and chosen(rows)["disagreement"] > 0 and chosen(rows)["drop"] is None
    with pytest.raises(ValueError, match="max_drop is for models that give classes"):
        tune(str(tmp_path / "model"), str(tmp_path / "farm"), str(tmp_path / "o"), max_drop=10)
    with pytest.raises(ValueError, match="min_length is for texts: a question is as long as its paragraph"):
        tune(str(tmp_path / "model"), str(tmp_path / "farm"), str(tmp_path / "o"), target_flops=0.7, min_length=9)


def test_numbers(farm, tmp_path):
    model = save_tiny(tmp_path / "model", num_labels=1)
    rows = tune(str(model), farm.plain, str(tmp_path / "out"), target_flops=0.7, limit=48, max_length=32)
    assert chosen(rows)["disagreement"] is None and chosen(rows)["divergence"] > 0
    with pytest.raises(ValueError, match="max_disagreement is for models that give classes and answers"):
        tune(str(model), farm.plain, str(tmp_path / "o"), max_disagreement=0.1)


def test_divergence_by_hand():
    dense, pruned = torch.tensor([[0.0, 0.0], [5.0, 1.0]]), torch.tensor([[0.0, 1.0], [5.0, 1.0]])
    p = 1 / (1 + np.exp(1.0))
    expected = 0.5 * np.log(0.5 / p) + 0.5 * np.log(0.5 / (1 - p))
    torch.testing.assert_close(divergence(dense, pruned), torch.tensor([expected, 0.0], dtype=torch.double))
    assert divergence(torch.tensor([[2.0]]), torch.tensor([[0.5]])).tolist() == [2.25]
    assert divergence([dense], [pruned]).tolist() == pytest.approx([expected / 2])


def test_the_command(farm, tmp_path):
    arguments = ["tune", farm.model, "--data", farm.plain, "--max-disagreement", "0.3", "--max-length", "32"]
    more = ["--limit", "120", "--out", str(tmp_path / "o"), "--plot", str(tmp_path / "p.png"), "--json", "-"]
    result = CliRunner().invoke(cli.app, [*arguments, *more])
    assert result.exit_code == 0, result.output
    assert chosen(json.loads(result.stdout)["rows"])["bound"] <= 0.3
    assert "max_disagreement=0.3 with 95 % confidence takes 9 texts to test on" in result.stderr
    mean = json.loads((tmp_path / "o" / SUMMARY).read_text())["texts"]["tokens_mean"]
    assert f"texts of {mean:g} tokens: for others it may not hold" in result.stderr
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    shown = CliRunner().invoke(cli.app, [*arguments, "--limit", "120", "--out", str(tmp_path / "o2"), "-q"])
    assert shown.exit_code == 0 and "▶" in shown.stdout and not shown.stderr.strip()


# --- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "budgets, told",
    [
        ([], "expected one budget of target_flops, target_latency_ms, max_disagreement, max_drop, got none"),
        (["--target-flops", 0.5, "--max-drop", 0.1], "got target_flops, max_drop"),
        (["--target-flops", 1.5], "target_flops=1.5: expected a share between 0 and 1"),
        (["--target-latency-ms", -3], "target_latency_ms=-3.0: expected milliseconds"),
        (["--target-flops", 0.01], r"target_flops=0.01 is out of reach on these texts: expected from 0."),
        (
            ["--target-flops", 0.5, "--method", "ltp"],
            "ltp has no share to keep, or to merge, at each site: expected auto or one of atome, ats",
        ),
        (["--target-flops", 0.5, "--method", "nothing"], "unknown pruning method 'nothing'"),
        (["--max-drop", 0.1], "a drop of accuracy is measured on labelled texts: no label column"),
        (
            ["--max-disagreement", 0.01, "--limit", 320],
            "320 texts are too few: the search needs 32 at least, and max_dis",
        ),
        (["--target-flops", 0.5, "--limit", 9], "9 texts are too few: the search needs 32 at least"),
        (["--target-flops", 0.5, "--min-length", 32], "0 texts of 32 tokens or more are too few: the search needs 32"),
        (["--target-flops", 0.5, "--min-length", 99], "min_length=99: expected tokens of a text, 1 to max_length=32"),
    ],
)
def test_mistakes_are_told_in_one_line(farm, tmp_path, budgets, told):
    line = fails(farm.model, "--data", farm.plain, "--out", tmp_path / "out", "--max-length", 32, *budgets)
    assert told in line and not (tmp_path / "out").exists()


def test_models_folders_and_parts_that_do_not_fit(farm, tmp_path):
    budget = ("--target-flops", 0.5)
    assert "is pruned already: tune its dense model" in fails(
        farm.pruned, "--data", farm.plain, "--out", tmp_path / "o", *budget
    )
    Path(tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "not empty" in fails(farm.model, "--data", farm.plain, "--out", tmp_path / "full", *budget)
    test = f"{farm.data}/test.csv"
    assert "has a test part only" in fails(farm.model, "--data", test, "--out", tmp_path / "o", *budget)
    with pytest.raises(ValueError, match="keep is what is searched for"):
        tune(farm.model, farm.plain, str(tmp_path / "o"), target_flops=0.5, method="topk", method_options={"keep": 0.5})
    with pytest.raises(ValueError, match="r is what is searched for"):
        tune(farm.model, farm.plain, str(tmp_path / "o"), target_flops=0.5, method="tome", method_options={"r": 0.5})
    with pytest.raises(ValueError, match="method_options criterion are of one method: name it"):
        tune(farm.model, farm.plain, str(tmp_path / "o"), target_flops=0.5, method_options={"criterion": "column"})


@pytest.mark.filterwarnings("ignore:.*tested texts are of the train part")
def test_a_bound_that_nothing_passes(farm, tmp_path, monkeypatch):
    """The last layer alone changes nothing; without it every schedule does."""
    monkeypatch.setattr(trials, "SCORES", {"topk": SCORES["topk"]})
    monkeypatch.setattr(
        module.ScheduleSearch, "survey", lambda self, budgets: [self.run((20, 20, 20)) and (20, 20, 20)]
    )
    monkeypatch.setattr(module.ScheduleSearch, "refine", lambda self, left, *rest: left)
    with pytest.raises(
        ValueError, match=r"no schedule passes max_disagreement=0.05: the mildest, with 0\.\d+ of the MA"
    ):
        tune(farm.model, farm.plain, str(tmp_path / "o"), max_disagreement=0.05, limit=120, max_length=32)
    assert not (tmp_path / "o").exists()
