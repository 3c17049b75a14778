"""Measuring: predictions in order, MACs counted by hand, baselines at equal counts, rows that agree with themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset

from support.bench import LENGTHS, hooks_of, one_by_one, pruned, rows, task
from support.families import FAMILIES
from thresher import LTP, TopK, dense, prune
from thresher.evaluation import benchmark as bench
from thresher.evaluation import predict as predicting
from thresher.evaluation import rows as report
from thresher.stats.bootstrap import bootstrap_interval
from thresher.stats.metrics import compute_metric
from thresher.training.trainer import Ranking


@pytest.fixture(scope="module")
def measured():
    """A model, its data, its baselines and their rows."""
    model, data = pruned(), rows()
    kept = predicting.predict(model, data).kept
    baselines = {name: predicting.replayed(model, name, kept) for name in ("random", "firstk")}
    baselines["smaller"] = FAMILIES["bert"].build(num_hidden_layers=2)
    threads = torch.get_num_threads()
    fields = {"split": "test", "seed": 3, "trained_steps": 7}
    found = bench.measure(
        model,
        data,
        task(),
        max_length=30,
        batch_sizes=(1, 4),
        repeats=3,
        baselines=baselines,
        examples=8,
        fields=fields,
    )
    assert torch.get_num_threads() == threads
    assert not hasattr(baselines["smaller"], "token_pruner")
    return model, data, found


# --- predict ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v2"])
def test_order_is_restored_and_padding_changes_nothing(family):
    model, data = pruned(family, TopK(keep=0.5, at=(1, 2))), rows()
    expected = one_by_one(model, data)
    for options in ({"batch_size": 1}, {"batch_size": 5}, {"batch_size": 32, "pad_to": 30}):
        assert torch.allclose(predicting.predict(model, data, **options).logits, expected, atol=1e-4)


def test_macs_are_those_of_the_real_tokens():
    model, data = pruned(), rows()
    found = predicting.predict(model, data, batch_size=5, pad_to=30)
    channels, inner = 32, 64
    for i, n in enumerate(LENGTHS):
        first = max(1, -(-n * 500 // 1000))
        second = max(1, -(-first * 500 // 1000))
        assert found.kept[i].tolist() == [first, second]
        used = 0
        for before, after, scored in ((n, first, 1), (first, first, 0), (first, second, 1), (second, second, 0)):
            used += 4 * before * channels**2 + (2 + scored) * before**2 * channels + 2 * after * channels * inner
        assert found.rows_used[i] == used
        assert found.rows_dense[i] == 4 * (4 * n * channels**2 + 2 * n**2 * channels + 2 * n * channels * inner)
    assert found.macs_used == found.rows_used.sum() and found.macs_dense == found.rows_dense.sum()
    assert found.tokens_mean == np.mean(LENGTHS)


def test_dense_and_unpruned_models_are_counted_as_dense():
    model, data = pruned(), rows()
    found = predicting.predict(model, data)
    with dense(model):
        plain = predicting.predict(model, data)
    with dense(model, unpadded=True):
        packed = predicting.predict(model, data)
    bare = predicting.predict(FAMILIES["bert"].build(), data)
    for other in (plain, packed, bare):
        assert other.macs_used == other.macs_dense == found.macs_dense > found.macs_used
        assert other.kept.shape == (len(LENGTHS), 0)
        assert torch.allclose(other.logits, bare.logits, atol=1e-4)


def test_predict_leaves_the_model_as_it_was():
    model = pruned().train()
    seen = []
    predicting.predict(model, rows(), batch_size=5, progress=lambda done, total: seen.append((done, total)))
    assert model.training and model.token_pruner.training
    asked = model.token_pruner.hooks.options
    assert (asked.mode, asked.counts) == ("pruned", None), "nothing is asked of later calls"
    assert seen == [(5, 16), (10, 16), (15, 16), (16, 16)]


def test_bf16_runs_a_copy():
    model = pruned()
    model(**FAMILIES["bert"].batch())  # leaves a record with a graph, which cannot be copied
    found = predicting.predict(model, rows(), bf16=True)
    assert found.logits.dtype == torch.float32 and model.dtype == torch.float32
    assert not torch.equal(found.logits, predicting.predict(model, rows()).logits)


def test_regression_and_missing_columns():
    model, data = pruned(num_labels=1), rows(labels="values", columns=("input_ids",))
    found = predicting.predict(model, data)
    assert found.logits.shape == (16, 1)
    expected = compute_metric("pearson", one_by_one(model, data), data["labels"])
    assert predicting.quality(found, data, "pearson") == pytest.approx(expected, abs=1e-3)
    low, high = bootstrap_interval("pearson", data["labels"], found, n=200)
    assert low <= expected <= high


def test_scores_are_those_of_all_tokens():
    model = prune(FAMILIES["bert"].build(), Ranking())
    found = predicting.predict(model, rows(), scores=True)
    assert [len(score) for score in found.scores] == found.tokens.tolist()
    assert all(score.mean().item() == pytest.approx(1, abs=1e-4) for score in found.scores)
    for wrong in (FAMILIES["bert"].build(), pruned()):
        with pytest.raises(ValueError, match="scores=True needs a pruned model whose method scores tokens"):
            predicting.predict(wrong, rows(), scores=True)


def test_bad_input_is_named():
    model = pruned()
    with pytest.raises(ValueError, match="24 tokens, expected 20 at most"):
        predicting.predict(model, rows(), pad_to=20)
    with pytest.raises(ValueError, match="hold padding"):
        predicting.predict(model, Dataset.from_dict({"input_ids": [[5, 0]], "attention_mask": [[1, 0]]}))
    with pytest.raises(ValueError, match="nothing to measure"):
        predicting.predict(model, Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match="gives no logits"):
        predicting.predict(FAMILIES["bert"].build().bert, rows())
    with pytest.raises(ValueError, match="there is fp32, bf16"):
        bench.measure(model, rows(), task(), max_length=30, precisions=("int8",))
    with pytest.raises(ValueError, match="there is dense-padded, dense-unpadded, pruned"):
        bench.measure(model, rows(), task(), max_length=30, modes=("fast",))
    with pytest.raises(ValueError, match="needs a pruned model"):
        bench.measure(FAMILIES["bert"].build(), rows(), task(), max_length=30)
    with pytest.raises(ValueError, match="expected 20 at most"):
        bench.measure(model, rows(), task(), max_length=20)
    with pytest.raises(ValueError, match="not those of these 16 examples"):
        known = {"pruned": predicting.predict(model, rows((4, 5)))}
        bench.measure(model, rows(), task(), max_length=30, predictions=known)


# --- baselines -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["random", "first-k"])
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_counts_are_replayed_exactly(method, layout):
    model, data = pruned(layout=layout), rows()
    with torch.no_grad():
        found = predicting.predict(model, data, batch_size=5)
    baseline = predicting.replayed(model, method, found.kept)
    again = predicting.predict(baseline, data, batch_size=3)
    assert torch.equal(again.kept, found.kept)
    assert not torch.allclose(again.logits, found.logits)
    assert model.token_pruner.name == "topk" and torch.equal(predicting.predict(model, data).kept, found.kept)
    # the same MACs but for the scores, which the baselines don't need: n^2 C at the two scored layers
    scores = 32 * (torch.tensor(LENGTHS) ** 2 + found.kept[:, 0] ** 2)
    assert torch.equal(again.rows_used, found.rows_used - scores)
    # a method that scores as well uses exactly as many, and topk repeats itself
    same = predicting.predict(predicting.replayed(model, "topk", found.kept), data)
    assert same.macs_used == found.macs_used
    assert torch.allclose(same.logits, found.logits, atol=1e-4)


def test_replay_of_adaptive_counts():
    model, data = pruned(method=LTP(target_flops=0.5)), rows()
    with torch.no_grad():
        for parameter in model.token_pruner.parameters():
            parameter.fill_(0.9)
    found = predicting.predict(model, data)
    assert len(set((found.kept[:, 0] / found.tokens).tolist())) > 2
    assert torch.equal(predicting.predict(predicting.replayed(model, "random", found.kept), data).kept, found.kept)


def test_replay_refuses_what_does_not_fit():
    model = pruned()
    kept = predicting.predict(model, rows()).kept
    with pytest.raises(ValueError, match="topk, random, firstk"):
        predicting.replayed(model, "ltp", kept)
    with pytest.raises(ValueError, match=r"expected \(N, 2\)"):
        predicting.replayed(model, "random", kept[:, :1])
    with pytest.raises(ValueError, match="of 16 rows, not of these 2"):
        predicting.predict(predicting.replayed(model, "random", kept), rows((4, 5)))


# --- measure ---------------------------------------------------------------------------------------------------------
def test_one_row_per_mode_and_batch_size(measured):
    found = measured[2]
    names = ["dense", "dense", "topk", "random", "firstk", "smaller"]
    modes = ["dense-padded", "dense-unpadded", "pruned", "pruned", "pruned", "dense-unpadded"]
    expected = [(size, *pair) for size in (1, 4) for pair in zip(names, modes, strict=True)]
    assert sorted((r["batch_size"], r["method"], r["mode"]) for r in found) == sorted(expected)
    assert [r["mode"] for r in found[:3]] == list(bench.MODES)
    for r in found:
        assert list(r)[: len(report.ROW_FIELDS)] == list(report.ROW_FIELDS)
        assert r["task"] == "synthetic" and r["metric"] == "accuracy" and r["precision"] == "fp32"
        assert r["n_examples"] == 16 and r["max_length"] == 30 and r["tokens_mean"] == np.mean(LENGTHS)
        assert (r["split"], r["seed"], r["trained_steps"]) == ("test", 3, 7)
        assert r["peak_memory_mb"] is None and r["threads"] == 1 and r["repeats"] == 3
        assert r["n_timed"] == (8 if r["batch_size"] == 1 else 16)
        layouts = {
            "dense-padded": {"padded"},
            "pruned": {"packed"},
            "dense-unpadded": {"length-sorted", "packed", "padded"},
        }
        assert r["layout"] in layouts[r["mode"]]
        if r["mode"] == "dense-unpadded":
            assert r["layout"] != "packed" or r["batch_size"] > 1
        assert "/" not in r["command"].split()[0] and r["hardware"] and r["versions"] and r["date"]


def test_ratios_agree(measured):
    found = measured[2]
    for size in (1, 4):
        own = [r for r in found if r["batch_size"] == size]
        padded, unpadded = own[0], own[1]
        assert padded["mode"] == "dense-padded" and unpadded["mode"] == "dense-unpadded"
        assert padded["speedup_padded"] == unpadded["speedup_unpadded"] == 1
        assert padded["flops_ratio_padded"] == unpadded["flops_ratio"] == unpadded["flops_ratio_timed"] == 1
        for r in own:
            rate = r["samples_per_second"]
            assert r["speedup_unpadded"] == pytest.approx(rate / unpadded["samples_per_second"])
            assert r["speedup_padded"] == pytest.approx(rate / padded["samples_per_second"])
            assert r["speedup_reference"] == r["speedup_padded"]
            assert r["flops_ratio"] == pytest.approx(unpadded["flops_used"] / r["flops_used"])
            assert r["flops_ratio_padded"] == pytest.approx(padded["flops_used"] / r["flops_used"])
            assert r["efficiency"] == pytest.approx(r["speedup_unpadded"] / r["flops_ratio"])
            assert 0 < r["latency_ms_p50"] <= r["latency_ms_p95"] and r["spread"] >= 0


def test_rows_hold_the_quality_of_all_examples(measured):
    model, data, found = measured
    said = predicting.predict(model, data)
    with dense(model):
        base = predicting.predict(model, data)
    by_method = {r["method"]: r for r in found}
    assert by_method["topk"]["quality"] == predicting.quality(said, data, "accuracy")
    assert (
        by_method["dense"]["quality"]
        == by_method["topk"]["quality_dense"]
        == predicting.quality(base, data, "accuracy")
    )
    assert by_method["topk"]["flops_used"] == said.macs_used and by_method["topk"]["flops_dense"] == said.macs_dense
    drop = by_method["topk"]["quality_dense"] - by_method["topk"]["quality"]
    assert by_method["topk"]["interval_low"] <= drop <= by_method["topk"]["interval_high"]
    assert by_method["random"]["flops_used"] == by_method["firstk"]["flops_used"]
    assert by_method["smaller"]["flops_ratio"] == pytest.approx(2)
    assert "interval_low" not in by_method["dense"]


def test_limit_threads_and_known_predictions():
    model, data = pruned(), rows()
    baseline = predicting.replayed(model, "random", predicting.predict(model, data).kept)
    known, said = {}, []
    options = {"max_length": 24, "batch_sizes": (32,), "repeats": 1, "limit": 6, "baselines": {"random": baseline}}
    found = bench.measure(
        model, data, task(), **options, modes=("pruned",), predictions=known, progress=lambda *x: said.append(x)
    )
    assert [(r["method"], r["n_examples"], r["batch_size"]) for r in found] == [("topk", 6, 6), ("random", 6, 6)]
    assert all(r["speedup_unpadded"] is r["efficiency"] is r["spread"] is None for r in found)
    assert all(r["speedup_padded"] == r["speedup_reference"] > 0 for r in found)
    assert torch.equal(known["random"].kept, known["pruned"].kept) and set(known) == {"pruned", "dense", "random"}
    assert ("evaluating dense", 6, 6) in said and said[-1] == ("timing batch size 6", 2, 2)
    known["pruned"].logits = -known["pruned"].logits  # what is known is taken as it is
    again = bench.measure(model, data, task(), **options, modes=("pruned",), predictions=known)
    assert again[0]["quality"] != found[0]["quality"]


def test_where_packed_does_not_run_dense_is_sorted_by_length_or_padded():
    model = pruned("mpnet", TopK(keep=0.5, at=(1, 2)))
    found = bench.measure(model, rows(labels=None), task(), max_length=24, batch_sizes=(4,), repeats=1)
    padded, dense, pruned_one = (r["layout"] for r in found)
    assert padded == pruned_one == "padded" and dense in ("length-sorted", "padded"), "whichever is faster"
    assert all(r["quality"] is None and r["quality_dense"] is None for r in found)


def test_against_another_dense_model():
    model, data, other = pruned(), rows(), FAMILIES["bert"].build(seed=1)
    weight = other.state_dict()["classifier.weight"].clone()
    found = bench.measure(model, data, task(), max_length=24, batch_sizes=(4,), repeats=1, against=other)
    expected = predicting.quality(predicting.predict(other, data), data, "accuracy")
    assert {r["quality_dense"] for r in found} == {expected} and not hasattr(other, "token_pruner")
    assert found[1]["mode"] == "dense-unpadded" and torch.equal(other.state_dict()["classifier.weight"], weight)


# --- the dense baseline ----------------------------------------------------------------------------------------------
def test_the_plain_model_has_no_hook_and_shares_the_weights():
    model, data = pruned().train(), rows()
    bare, net, dense_rows = FAMILIES["bert"].build().eval(), predicting.plain(model), predicting.packed(model)
    assert hooks_of(bare) == hooks_of(net) == 0 < hooks_of(model) and not hasattr(net, "token_pruner")
    assert not net.training and model.training and model.token_pruner.name == "topk"
    own = [*bare.state_dict()]
    for other in (net, dense_rows):
        places = [(other.get_parameter(name).data_ptr(), model.get_parameter(name).data_ptr()) for name in own]
        assert places and all(here == there for here, there in places)
    batch = FAMILIES["bert"].batch()
    assert torch.equal(net(**batch).logits, bare(**batch).logits), "bit for bit"
    expected = predicting.predict(bare, data)
    for other in (net, dense_rows):
        found = predicting.predict(other, data)
        assert torch.allclose(found.logits, expected.logits, atol=1e-5) and found.macs_used == expected.macs_used
    assert torch.equal(predicting.plain(bare)(**batch).logits, bare(**batch).logits)
    assert not torch.allclose(predicting.predict(model, data).logits, expected.logits, atol=1e-3), "still pruned"


def test_rows_that_cannot_be_packed_are_none():
    assert predicting.packed(pruned("mpnet", TopK(keep=0.5, at=(1, 2)))) is None


@pytest.mark.parametrize("kind", ["own", "against", "bf16"])
def test_the_dense_model_is_timed_without_hooks(kind, monkeypatch):
    ran = set()

    def run(self, rows, inputs):
        net = self.forward
        ran.add((self.row["mode"], self.row["layout"], len(rows) > 1, hooks_of(net) > 0, net.training, str(net.dtype)))
        return 1.0

    monkeypatch.setattr(bench.Runner, "run", run)
    model = pruned()
    options = {"against": FAMILIES["bert"].build(seed=1)} if kind == "against" else {}
    options |= {"precisions": ("bf16",)} if kind == "bf16" else {}
    bench.measure(model, rows(), task(), max_length=24, batch_sizes=(1, 4), repeats=1, **options)
    own = "torch.bfloat16" if kind == "bf16" else "torch.float32"
    expected = {("dense-padded", "padded", batch, False, False, own) for batch in (False, True)}
    expected |= {("dense-unpadded", "length-sorted", batch, False, False, own) for batch in (False, True)}
    expected |= {("pruned", "packed", batch, True, False, own) for batch in (False, True)}
    expected.add(("dense-unpadded", "packed", True, True, False, own))  # at batch size 1 the plain model alone
    expected |= {("dense-padded", "padded", batch, False, False, "torch.float32") for batch in (False, True)}
    assert ran == expected


@pytest.mark.parametrize(
    "packed, alone, padded, wins, slower",
    [
        (3.0, 2.0, 9.0, "length-sorted", "packed: 1.50 times as long; padded: 4.50 times as long"),
        (2.0, 3.0, 9.0, "packed", "length-sorted: 1.50 times as long; padded: 4.50 times as long"),
        (4.0, 3.0, 2.0, "padded", "length-sorted: 1.50 times as long; packed: 2.00 times as long"),
    ],
)
def test_the_fastest_way_is_the_baseline(packed, alone, padded, wins, slower, monkeypatch):
    seconds = {"packed": packed, "length-sorted": alone, "padded": padded}

    def run(self, rows, inputs):
        return 1.0 if self.row["mode"] == "pruned" else seconds[self.row["layout"]]

    monkeypatch.setattr(bench.Runner, "run", run)
    baselines = {"smaller": FAMILIES["bert"].build(num_hidden_layers=2)}
    options = {"max_length": 24, "batch_sizes": (1, 4), "repeats": 3, "baselines": baselines}
    found = bench.measure(pruned(), rows(), task(), **options)
    assert len(found) == 2 * 4
    for r in found:
        if r["mode"] != "dense-unpadded":
            assert "slower" not in r
        elif r["batch_size"] == 4 and r["method"] == "dense":
            assert r["layout"] == wins and r["slower"] == slower and r["flops_ratio"] == 1
        elif r["method"] == "dense":
            assert r["layout"] == ("padded" if wins == "padded" else "length-sorted")
    by_mode = {r["mode"]: r for r in found if r["batch_size"] == 4 and r["method"] != "smaller"}
    assert by_mode["pruned"]["speedup_unpadded"] == 2 and by_mode["pruned"]["speedup_padded"] == padded
    assert by_mode["dense-unpadded"]["speedup_unpadded"] == 1


def test_bf16_is_referred_to_fp32():
    model = pruned()
    found = bench.measure(model, rows(), task(), max_length=24, batch_sizes=(4,), repeats=1, precisions=("bf16",))
    assert [r["mode"] for r in found] == list(bench.MODES) and model.dtype == torch.float32
    assert found[0]["speedup_padded"] == 1 != found[0]["speedup_reference"]
    ratio = found[0]["speedup_reference"] / found[0]["samples_per_second"]
    for r in found:
        assert r["precision"] == "bf16"
        assert r["speedup_reference"] / r["samples_per_second"] == pytest.approx(ratio)


def test_runners_take_turns():
    """Every runner is first, second, ... equally often, and the first pass is not counted."""
    calls = []

    class Recorder(bench.Runner):
        def run(self, rows, inputs):
            calls.append((self.row["mode"], inputs["input_ids"].shape))
            return float(len(calls))

    model = FAMILIES["bert"].build()
    text = predicting.Text(model, rows((3, 5, 8, 4)), None)
    runners = [Recorder({"mode": m}, model, None, None, pad_to=9 if m == "a" else None) for m in "abc"]
    bench.time_all(runners, [[0, 1], [2, 3]], text, model.device, 2, lambda *_: None)
    assert "".join(mode for mode, _ in calls) == "abc" + "bca" + "bca" + "cab" + "cab" + "abc"
    assert [r.times.shape for r in runners] == [(2, 2)] * 3
    assert {shape for m, shape in calls if m == "a"} == {(2, 9)} and {s for m, s in calls if m == "b"} == {
        (2, 5),
        (2, 8),
    }
    assert runners[0].seconds == np.median(runners[0].times, axis=0).sum()
