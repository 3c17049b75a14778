"""The table of measured times: its arithmetic, its cache, and the budget it gives to ToP."""

from __future__ import annotations

import json

import pytest
import torch

from support.bench import hooks_of
from support.families import FAMILIES
from support.toy import OPTIONS, make_toy
from thresher import ToP, prune
from thresher.core.cost import LatencyTable
from thresher.evaluation import latency
from thresher.evaluation.latency import compare, latency_table
from thresher.experiments import train as jobs

BERT = FAMILIES["bert"]
LINE = ((10.0, 20.0, 40.0), (1.0, 2.0, 8.0))
PARTS = {"attention": LINE, "scored": LINE, "ffn": LINE, "rest": ((10.0, 40.0), (0.5, 0.5))}
TABLE = LatencyTable(**PARTS, dense=((10.0, 20.0, 40.0), (8.5, 16.5, 64.5)), batch_size=1, threads=1)  # of 4 layers


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("cache"), BERT.build()
    return folder, model, latency_table(model, repeats=3, cache=folder)


def test_a_table_is_of_positive_times_that_never_fall(measured):
    _, model, table = measured
    assert not hasattr(model, "token_pruner"), "the model itself is left alone"
    for curve in (table.attention, table.scored, table.ffn, table.rest, table.dense):
        tokens, times = curve
        assert list(tokens) == sorted(set(tokens)) and min(times) > 0 and list(times) == sorted(times)
    assert (table.batch_size, table.threads) == (1, torch.get_num_threads())


def test_a_table_is_measured_once_per_machine_and_model(measured, monkeypatch):
    folder, model, table = measured
    monkeypatch.setattr(latency, "_measure", lambda *a: pytest.fail("measured again"))
    assert latency_table(prune(BERT.build(), ToP()), repeats=3, cache=folder) == table
    (file,) = folder.iterdir()
    assert json.loads(file.read_text())["threads"] == table.threads
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        latency_table(model, batch_size=2, cache=folder)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b'{"ffn": {}}', b"\xff\xfe", "old", "empty"])
def test_a_broken_file_is_measured_again(measured, content, monkeypatch, tmp_path):
    folder, model, table = measured
    (file,) = folder.iterdir()
    known = json.loads(file.read_text())
    if content == "old":  # of a version that did not measure the dense model
        del known["dense"]
    elif content == "empty":
        known["ffn"] = [[], []]
    (tmp_path / file.name).write_bytes(content if isinstance(content, bytes) else json.dumps(known).encode())
    monkeypatch.setattr(latency, "_measure", lambda *_: table)
    assert latency_table(model, repeats=3, cache=tmp_path) == table
    assert [json.loads(one.read_text()) for one in tmp_path.iterdir()] == [json.loads(file.read_text())]


def test_the_dense_curve_is_of_a_model_without_hooks(monkeypatch, tmp_path):
    counts, model = [], prune(BERT.build(), ToP())
    monkeypatch.setattr(latency, "_whole", lambda net, ids: counts.append(hooks_of(net)) or float(ids.shape[1]))
    found = latency_table(model, repeats=1, cache=tmp_path)
    assert set(counts) == {0} and hooks_of(model) > 0
    assert found.dense[0] == found.dense[1] == found.attention[0]


def test_a_model_that_reads_no_ids_is_refused():
    with pytest.raises(ValueError, match="does not read token ids"):
        latency_table(FAMILIES["vit"].build())


def test_comparing_runs_both_and_leaves_the_method_in_place():
    model = prune(BERT.build(), ToP())
    batches = [{k: v for k, v in BERT.batch().items() if k in ("input_ids", "attention_mask")}]
    dense, pruned = compare(model, batches, repeats=1)
    assert dense > 0 and pruned > 0 and model.token_pruner.hooks.options.mode == "pruned"


def test_what_is_compared_is_the_plain_model_and_the_pruned_one(monkeypatch):
    ran, model, times = [], prune(BERT.build(), ToP()), iter([9.0, 9.0, 0.3, 0.1, 0.2, 0.1] * 2)
    monkeypatch.setattr(latency, "timed", lambda net, batch: ran.append(hooks_of(net) > 0) or next(times))
    dense, pruned = compare(model, [{"input_ids": torch.ones(1, n)} for n in (3, 5)], repeats=2)
    assert ran == [False, True] * 6 and (dense, pruned) == pytest.approx((200, 100)), "ms, the fastest of each"


def test_a_budget_of_time_is_priced_by_the_table():
    tokens = torch.tensor([30.0])
    for method, target in ((ToP(target_latency=0.7), 0.7), (ToP(target_latency_ms=30.0), 30 / (0.5 + 4 * 2 * 5.0))):
        prune(BERT.build(), method)
        method.table = TABLE
        assert method.target(tokens) == pytest.approx(target)
        assert method.cost(tokens, torch.ones(1), lambda site, n: n).item() == pytest.approx(1)
        # half of the 29 leave in layer 0, then nothing: layer 0 attends to 30 tokens, all else sees 15.5
        half = 0.5 + 5 + 1.55 + 3 * 2 * 1.55
        found = method.cost(tokens, torch.ones(1), lambda site, n: n * (0.5 if site == 0 else 1.0)).item()
        assert found == pytest.approx(half / (0.5 + 4 * 2 * 5.0), rel=1e-5)


def test_a_budget_of_time_without_a_table_is_an_error():
    method = ToP(target_latency=0.5)
    model = prune(BERT.build(), method).train()
    method.progress = 0.1
    BERT.run(model, BERT.batch())
    with pytest.raises(RuntimeError, match=r"set pruner.table = latency_table\(model\)"):
        method.loss(None, {}, method.record)


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"target_flops": 0.4, "target_latency": 0.5}, "expected one target"),
        ({"target_latency": 1.5}, "target_latency=1.5"),
        ({"target_latency_ms": -1.0}, "target_latency_ms=-1.0"),
    ],
)
def test_budgets_that_cannot_be(wrong, told):
    with pytest.raises(ValueError, match=told):
        ToP(**wrong)


def test_a_training_to_a_share_of_the_time(tmp_path, monkeypatch):
    """A tiny model has nothing to win, so its table is that of a larger one; what is measured at the end is real."""
    line = ((1.0, 100.0), (0.1, 10.0))
    dense = ((1.0, 100.0), (0.41, 40.01))  # of two layers
    table = LatencyTable(line, line, line, ((1.0, 100.0), (0.01, 0.01)), dense, batch_size=1, threads=1)
    monkeypatch.setattr("thresher.training.trainer.latency_table", lambda model: table)
    toy = make_toy(tmp_path)
    options = OPTIONS | {"method": "top", "target_flops": None, "target_latency": 0.7, "epochs": 0, "prune_epochs": 1}
    jobs.train(toy.model, toy.data, str(tmp_path / "out"), **options)
    reached = json.loads((tmp_path / "out" / jobs.SUMMARY).read_text())["reached"]
    assert reached["latency_fraction"] == pytest.approx(0.7, rel=0.02) and reached["latency_ms"] > 0
    assert reached["latency_fraction_measured"] == pytest.approx(reached["latency_ms"] / reached["latency_ms_dense"])
