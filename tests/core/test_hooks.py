"""Pruning sits on a model without changing it: copied, taken off, replaced, threaded; never inactive unnoticed."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import BertModel, PreTrainedModel

from support.families import FAMILIES, difference
from support.methods import METHODS, REFUSES
from thresher import LTP, FirstK, Random, Threshold, TopK, dense, prune, unprune
from thresher.core.tokens import LAYOUTS

KINDS = ("bert", "distilbert", "mpnet", "modernbert", "vit", "llama")
everywhere = pytest.mark.parametrize("layout", LAYOUTS)
of_all_kinds = pytest.mark.parametrize("family", KINDS)


def answer(family: str, model, batch: dict | None = None) -> torch.Tensor:
    with torch.no_grad():
        return FAMILIES[family].answers(model, FAMILIES[family].batch() if batch is None else batch)


@everywhere
def test_a_deep_copy_is_pruned_and_independent(layout):
    model = prune(FAMILIES["bert"].build(), LTP(init=1.6), layout=layout)
    expected = answer("bert", model)
    twin = copy.deepcopy(model)
    assert difference(answer("bert", twin), expected) == 0
    with torch.no_grad():
        twin.token_pruner.threshold.fill_(0.0)
    assert difference(answer("bert", twin), expected) > 1e-3
    assert difference(answer("bert", model), expected) == 0
    unprune(twin)
    assert difference(answer("bert", model), expected) == 0


@of_all_kinds
def test_unprune_gives_the_model_back(family):
    model = FAMILIES[family].build()
    expected, config, keys = answer(family, model), model.config.to_dict(), list(model.state_dict())
    implementation = [m.config._attn_implementation for m in model.modules() if isinstance(m, PreTrainedModel)]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    prune(model, LTP(init=1.6))
    assert difference(answer(family, model), expected) > 1e-3
    assert unprune(model) is model
    assert difference(answer(family, model), expected) == 0
    assert model.config.to_dict() == config and list(model.state_dict()) == keys
    assert [m.config._attn_implementation for m in model.modules() if isinstance(m, PreTrainedModel)] == implementation
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    with pytest.raises(ValueError, match="is not pruned"):
        unprune(model)


def test_the_weights_keep_their_names():
    model = FAMILIES["bert"].build()
    keys = list(model.state_dict())
    assert list(prune(model, TopK()).state_dict()) == [*keys, "token_pruner._extra_state"]
    unprune(model)
    assert list(prune(model, LTP()).state_dict()) == [*keys, "token_pruner.threshold", "token_pruner._extra_state"]


def test_pruning_again_replaces_and_says_so():
    model = prune(FAMILIES["bert"].build(), TopK(keep=0.2))
    with pytest.warns(UserWarning, match="pruned with topk; threshold replaces it"):
        prune(model, Threshold((0.4, 0.6, 0.8)))
    expected = answer("bert", prune(FAMILIES["bert"].build(), Threshold((0.4, 0.6, 0.8))))
    assert difference(answer("bert", model), expected) == 0
    assert model.config.token_pruning["method"] == "threshold"


@everywhere
@of_all_kinds
def test_within_dense_nothing_is_pruned(family, layout):
    layout = layout if FAMILIES[family].packed else "padded"
    model = FAMILIES[family].build()
    expected = answer(family, model)
    prune(model, TopK(keep=0.3), layout=layout)
    with dense(model) as same:
        assert same is model and difference(answer(family, model), expected) == 0
    with dense(model, unpadded=True):
        assert difference(answer(family, model), expected) <= (1e-5 if layout == "packed" else 0)
        report = model.token_pruner.report
    assert report[-1]["tokens_kept"] == report[0]["tokens_in"] and sum(r["macs"] - r["dense_macs"] for r in report) == 0
    assert difference(answer(family, model), expected) > 1e-3
    with pytest.raises(ValueError, match="is not pruned"), dense(unprune(model)):
        pass


def test_dense_ends_when_something_goes_wrong():
    model = prune(FAMILIES["bert"].build(), TopK(keep=0.3))
    expected = answer("bert", model)
    with pytest.raises(KeyError), dense(model):
        raise KeyError
    assert difference(answer("bert", model), expected) == 0


def test_unpadded_runs_without_padding():
    model = prune(FAMILIES["bert"].build(), TopK(keep=0.3), layout="packed")
    with dense(model, unpadded=True):
        assert rows_through(model, FAMILIES["bert"].batch()) == {i: (52, 52) for i in range(4)}


def test_a_model_without_layers_is_refused():
    class Headless(BertModel):
        _can_record_outputs = None

    config = FAMILIES["bert"].build().config
    model = Headless(config)
    model.encoder.layer = nn.Sequential(*model.encoder.layer)
    with pytest.raises(ValueError, match="no transformer layers were found in Headless"):
        prune(model, TopK())


def test_what_cannot_be_pruned_is_refused():
    model = FAMILIES["bert"].build()
    with pytest.raises(TypeError, match="PEFT or sentence-transformers around one; got Linear"):
        prune(nn.Linear(2, 2), TopK())
    for wrong in (TopK, "topk", 0.5):
        with pytest.raises(TypeError, match=r"takes a method such as TopK"):
            prune(model, wrong)
    with pytest.raises(ValueError, match="layout='fast': expected auto, mask, padded, packed"):
        prune(model, TopK(), layout="fast")
    with pytest.raises(ValueError, match="no token_pruning entry"):
        prune(model)
    assert not hasattr(model, "token_pruner") and not hasattr(model.config, "token_pruning")


@pytest.mark.parametrize("at", [(4,), (-1,), (0, 9)])
def test_a_layer_that_does_not_exist_is_refused(at):
    with pytest.raises(ValueError, match=r"layer -?\d is not possible in BertForSequenceClassification; its 4 layers"):
        prune(FAMILIES["bert"].build(), TopK(at=at))


@pytest.mark.parametrize("at", [(2, 1), (1, 1)])
def test_layers_out_of_order_are_refused(at):
    with pytest.raises(ValueError, match="expected rising layers"):
        prune(FAMILIES["bert"].build(), TopK(at=at))


def test_the_last_layer_can_be_a_site_where_tokens_leave_before_its_ffn():
    found = {}
    for layout in LAYOUTS:
        model = prune(FAMILIES["bert"].build(), TopK(keep=0.5, at=(3,)), layout=layout)
        found[layout] = answer("bert", model)
        assert [row["tokens_kept"] for row in model.token_pruner.report] == [52, 52, 52, 26]
        head = {"output": found[layout]["output"]}
        assert difference(head, answer("bert", unprune(model))) <= 1e-5, "the head reads the first token alone"
        assert difference(found[layout], found["mask"]) <= 1e-5
    with pytest.raises(ValueError, match=r"can be pruned at 0\.\.2"):
        prune(FAMILIES["vit"].build(), TopK(at=(3,)))


@pytest.mark.parametrize("method", [TopK, FirstK])
@pytest.mark.parametrize("family", [f for f in KINDS if f != "mpnet"])  # whose attention cannot be exchanged
def test_attention_exchanged_after_prune_is_an_error(family, method):
    model = prune(FAMILIES[family].build(), method(keep=0.5))
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match=r"was changed after prune.*, to 'eager', so nothing would be pruned"):
        answer(family, model)
    assert difference(answer(family, unprune(model)), answer(family, FAMILIES[family].build())) == 0


def test_a_scored_layer_that_shows_nothing_is_an_error():
    model = prune(FAMILIES["bert"].build(), TopK(keep=0.5), layout="padded")
    attention = model.bert.encoder.layer[1].attention.self
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "sdpa"
    with pytest.raises(RuntimeError, match=r"layer 1 of .* delivered no attention, so nothing would be pruned"):
        answer("bert", model)


def test_an_error_within_a_forward_leaves_nothing_behind():
    model = prune(FAMILIES["bert"].build(), TopK(keep=0.5))
    expected = answer("bert", model)
    handle = model.bert.encoder.layer[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer("bert", model)
    handle.remove()
    assert difference(answer("bert", model), expected) == 0


def test_a_mask_of_four_dimensions_is_refused():
    model, batch = prune(FAMILIES["bert"].build(), TopK()), FAMILIES["bert"].batch()
    batch["attention_mask"] = batch["attention_mask"][:, None, None].float()
    with pytest.raises(ValueError, match=r"takes the 2-D attention mask .* got a 4-D one"):
        model(**batch)


def test_a_layer_that_is_left_out_is_an_error():
    model = prune(FAMILIES["bert"].build(), TopK(keep=0.5))
    model.bert.encoder.layer = model.bert.encoder.layer[:3]
    with pytest.raises(RuntimeError, match="3 of 4 layers ran"):
        answer("bert", model)


def rows_through(model, batch: dict) -> dict:
    """{layer: (rows entering its query map, rows entering its FFN)} of a BERT, padding and all."""
    found = {}

    def count(layer, place):
        def hook(module, args):
            found.setdefault(layer, [0, 0])[place] += args[0].shape[:-1].numel()

        return hook

    handles = []
    for i, layer in enumerate(model.bert.encoder.layer):
        handles.append(layer.attention.self.query.register_forward_pre_hook(count(i, 0)))
        handles.append(layer.intermediate.dense.register_forward_pre_hook(count(i, 1)))
    answer("bert", model, batch)
    for handle in handles:
        handle.remove()
    return {layer: tuple(rows) for layer, rows in found.items()}


RAGGED = (
    "threshold",
    "ltp",
    "ltp-fused",
    "ltmp",
    "ats",
    "transkimmer",
    "trbert",
    "adapler",
)  # keep as many as the input says, and padded the most of a batch


@pytest.mark.parametrize(
    "method, layout, lengths",
    [
        (method, layout, lengths)
        for method in METHODS
        if "bert" not in REFUSES.get(method, {})
        for layout, lengths in (("padded", (20, 20, 20)), ("packed", (20, 20, 20)), ("packed", (24, 18, 10)))
        if layout == "packed" or method not in RAGGED
    ],
)
def test_tensors_shrink_as_the_report_says(method, layout, lengths):
    model = prune(FAMILIES["bert"].build(), METHODS[method][1](), layout=layout)
    rows = rows_through(model, FAMILIES["bert"].batch(lengths))
    report = model.token_pruner.report
    assert rows == {row["layer"]: (row["tokens_in"], row["tokens_kept"]) for row in report}
    assert rows[3][1] < sum(lengths) * (0.9 if method == "threshold" else 0.5)


def test_masked_tensors_keep_their_shape():
    model = prune(FAMILIES["bert"].build(), TopK(keep=0.5), layout="mask")
    assert rows_through(model, FAMILIES["bert"].batch()) == {i: (72, 72) for i in range(4)}


@everywhere
@pytest.mark.parametrize(
    "method", [TopK(keep=1), Random(keep=1), FirstK(keep=1), Threshold(99.0), LTP(init=99.0, min_keep=1)], ids=repr
)
@pytest.mark.parametrize("family, kept", [("bert", {0}), ("deit", {0, 1}), ("llama", {-1})])
def test_special_tokens_always_stay(family, kept, method, layout):
    source, method = FAMILIES[family], copy.deepcopy(method)
    model = prune(source.build(), method, layout=layout)
    batch = source.batch((24, 18, 10))
    answer(family, model, batch)
    last = model.token_pruner.record.sites[-1].after
    lengths = batch["attention_mask"].sum(1).tolist() if "attention_mask" in batch else [0] * 3
    for index, alive, length in zip(last.index, last.alive, lengths, strict=True):
        assert {p - length if family == "llama" else p for p in index[alive].tolist()} == kept


@everywhere
def test_two_threads_run_one_model(layout):
    model = prune(FAMILIES["bert"].build(), TopK(keep=0.5), layout=layout)
    batches = [FAMILIES["bert"].batch((n, n - 3), seed=n) for n in range(8, 24, 2)]
    expected = [answer("bert", model, batch) for batch in batches]
    logits = lambda batch: {"output": FAMILIES["bert"].run(model, batch).detach()}  # noqa: E731
    with ThreadPoolExecutor(2) as pool:
        for found, wanted in zip(pool.map(logits, batches * 3), expected * 3, strict=True):
            assert difference(found, wanted) <= 1e-6


@everywhere
@of_all_kinds
def test_half_precision_runs(family, layout):
    layout = layout if FAMILIES[family].packed else "padded"
    for autocast in (False, True):
        model = FAMILIES[family].build()
        model = prune(model if autocast else model.bfloat16(), LTP(init=1.6), layout=layout)
        batch = FAMILIES[family].batch()
        batch = {k: v if v.dtype == torch.long or autocast else v.bfloat16() for k, v in batch.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = answer(family, model, batch)
        assert all(v.isfinite().all() for v in found.values())
        assert model.token_pruner.threshold.dtype == (torch.float32)
        assert model.token_pruner.report[-1]["tokens_kept"] < model.token_pruner.report[0]["tokens_in"]
