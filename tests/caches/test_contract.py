"""Budgets, bytes, the report, what is saved, and what is refused."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForSequenceClassification,
    QuantizedCache,
    StaticCache,
    TrainingArguments,
)
from transformers.cache_utils import DynamicLayer, HQQQuantizedLayer, QuantoQuantizedLayer

import thresher
from support.decoders import GROUPED, LENGTHS, METHODS, SMALL, alone, build, difference, feed, make, prompts, run
from support.families import FAMILIES
from thresher import H2O, TOVA, KeyDiff, Knorm, KVzip, SnapKV, StreamingLLM, TopK, calling, dense, prune, unprune
from thresher.caches.hooks import ours
from thresher.caches.layer import PrunedLayer
from thresher.core.method import METHODS as REGISTRY
from thresher.core.method import pruner_of
from thresher.evaluation.benchmark import measure
from thresher.evaluation.predict import predict, replayed
from thresher.exporting.export import export
from thresher.reports.trace import trace
from thresher.streaming.classifier import Stream
from thresher.training.trainer import PruningTrainer, param_groups

ENTRY = 2 * 2 * 8 * 4  # bytes of one entry of one row and layer: keys and values, 2 heads of 8 channels, fp32


@torch.no_grad()
def filled(model, batch=None, steps: int = 0):
    cache = DynamicCache(config=model.config)
    batch = prompts(LENGTHS[:1]) if batch is None else batch
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model(**batch, position_ids=places, past_key_values=cache)
    for _ in range(steps):
        model(input_ids=torch.full((len(batch["input_ids"]), 1), 7), past_key_values=cache)
    return cache


# --- bytes and budgets -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "entry"), [("llama", ENTRY), ("gpt2", 2 * 4 * 8 * 4), ("deepseek-v3", (16 + 8) * 4)]
)
def test_bytes_are_really_freed(family, entry):
    for batch in (prompts(LENGTHS[:1]), prompts()):
        cache = filled(prune(build(family), make("keydiff")), batch)
        for layer in ours(cache).values():
            storages = [x.untyped_storage().nbytes() for x in (layer.keys, layer.values)]
            assert sum(storages) == len(batch["input_ids"]) * 12 * entry == layer.nbytes


def test_crop_frees_its_bytes():
    cache = filled(prune(build("llama"), make("keydiff")), steps=3)
    cache.crop(-3)
    assert {layer.nbytes for layer in ours(cache).values()} == {12 * ENTRY} and cache.get_seq_length() == 40


@pytest.mark.parametrize(("keep", "held"), [(0.3, 12), (0.05, 6), (12, 12), (60, 40), (1.0, 40)])
def test_a_prompt_is_kept_to_a_share_or_a_number(keep, held):
    cache = filled(prune(build("llama"), KeyDiff(keep, **SMALL)), steps=5)
    assert {layer.held for layer in ours(cache).values()} == {held + 5}


def test_each_row_keeps_its_own_share():
    cache = filled(prune(build("llama"), KeyDiff(keep=0.3, **SMALL)), prompts())
    assert {tuple(layer.counts) for layer in ours(cache).values()} == {(12, 9)}


def test_while_decoding_entries_leave_every_few_steps():
    model = prune(build("llama"), KeyDiff(hold=12, every=4, **SMALL))
    cache, held = filled(model), []
    for _ in range(9):
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        held.append(cache.layers[0].held)
    assert held == [13, 14, 15, 12, 13, 14, 15, 12, 13]


@pytest.mark.parametrize("rows", [1, 2])
def test_megabytes_are_never_exceeded_after_a_step(rows):
    target = 3 * rows * 20 * ENTRY / 1e6
    model = prune(build("llama"), KeyDiff(target_cache_mb=target, every=4, **SMALL))
    batch = prompts(LENGTHS[:rows])
    cache, most = filled(model, batch), 0
    for _ in range(9):
        model(input_ids=torch.full((rows, 1), 7), past_key_values=cache)
        most = max(most, sum(layer.nbytes for layer in cache.layers))
    assert most == round(target * 1e6)
    with pytest.raises(ValueError, match=r"target_cache_mb=0.001 has room for \d+ entries of each row.*give more"):
        filled(prune(build("llama"), KeyDiff(target_cache_mb=0.001, every=4, **SMALL)), batch)


@pytest.mark.parametrize("method", [KeyDiff(target_cache_mb=0.001, **SMALL), KVzip(keep=12, **SMALL)])
def test_a_refusal_leaves_nothing_in_the_cache(method):
    model, cache = prune(build("gemma3"), method), DynamicCache()
    given = {"inputs_embeds": model.get_input_embeddings()(prompts(LENGTHS[:1])["input_ids"])}
    with torch.no_grad(), pytest.raises(ValueError, match=r"has room for 0 entries|needs its input_ids"):
        model(**given, past_key_values=cache)
    assert cache.get_seq_length() == 0 and all(layer.get_seq_length() == 0 for layer in cache.layers)


def test_a_pyramid_of_megabytes_pays_for_its_upper_layers():
    """They keep the first and last tokens, more than their share: the lower ones give as much up."""
    target = 6 * 50 * ENTRY
    model = prune(build("llama", num_hidden_layers=6), KeyDiff(target_cache_mb=target / 1e6, layers="pyramid", every=1))
    report = filled(model, prompts((120,)), steps=1) and model.token_pruner.report
    held, total = [row["held"] for row in report], sum(row["bytes"] for row in report)
    assert target - 6 * ENTRY <= total <= target == 38_400
    assert held == sorted(held, reverse=True) and held[0] > 50 and held[-1] == 36


@pytest.mark.parametrize("budget", [{"keep": 50}, {"hold": 50, "every": 1}, {"keep": 0.42}])
def test_a_pyramid_holds_no_more_than_its_mean(budget):
    model = prune(build("llama", num_hidden_layers=6), KeyDiff(**budget, layers="pyramid"))
    report = filled(model, prompts((120,))) and model.token_pruner.report
    assert 6 * 49 <= sum(row["held"] for row in report) <= 6 * (51 if budget == {"keep": 0.42} else 50)


def test_megabytes_count_what_slides():
    model = prune(build("gemma3"), KeyDiff(target_cache_mb=(2 * 20 + 12) * ENTRY / 1e6, every=1, **SMALL))
    cache = filled(model)
    assert {layer.held for layer in ours(cache).values()} == {20}


# --- the report ------------------------------------------------------------------------------------------------------
def test_the_report_says_what_is_held():
    model = prune(build("llama"), make("snapkv"))
    with pytest.raises(RuntimeError, match="no forward has been recorded"):
        model.token_pruner.report  # noqa: B018
    filled(model, prompts(), steps=1)
    row = model.token_pruner.report[1]
    assert row.pop("seconds") > 0 and row.pop("extra_bytes") == 2 * 2 * 13 * 4
    assert row == {"layer": 1, "kind": "pruned", "seen": 69, "held": 26, "bytes": 2 * 13 * ENTRY, "evictions": 1} | {
        "dense_bytes": 2 * 41 * ENTRY
    }


def test_layers_that_slide_are_left_alone_and_reported():
    model = prune(build("gemma3"), make("keydiff", "hold"))
    cache = filled(model, steps=2)
    assert not isinstance(cache.layers[0], PrunedLayer)
    report = model.token_pruner.report
    assert [row["kind"] for row in report] == ["sliding", "pruned", "pruned"]
    assert report[0]["bytes"] == report[0]["dense_bytes"] and report[0]["seen"] == 42


def test_where_most_bytes_slide_a_line_says_so():
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    model = prune(build("gemma3", layer_types=kinds, sliding_window=32), make("keydiff"))
    with pytest.warns(UserWarning, match=r"layers that slide, and are left alone, hold \d+% of this cache"):
        filled(model)
    filled(model)  # once


def test_a_report_belongs_to_its_thread():
    model = prune(build("llama"), make("keydiff"))
    filled(model)
    other = threading.Thread(target=filled, args=(model, prompts()))
    other.start()
    other.join()
    assert model.token_pruner.report[0]["seen"] == 40


# --- what is saved, copied, changed ----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_model_prunes_as_it_did(method, tmp_path):
    model = prune(build("llama"), make(method, "hold"))
    answers = run(model, prompts(), "turn")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    prune(again)
    assert again.token_pruner.to_dict() == model.token_pruner.to_dict()
    assert difference(run(again, prompts(), "turn"), answers) == 0.0


def test_a_cache_can_be_copied_and_pickled():
    model = prune(build("llama"), make("h2o", "hold"))
    cache = filled(model, prompts())
    step = {"input_ids": torch.tensor([[7], [8]])}
    others = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    answer = model(**step, past_key_values=cache).logits
    for other in others:
        assert torch.equal(model(**step, past_key_values=other).logits, answer)


def test_a_copied_model_prunes():
    model = prune(build("llama"), make("keydiff"))
    other = copy.deepcopy(model)
    answers = run(model, prompts(), "step")
    unprune(model)
    assert difference(run(other, prompts(), "step"), answers) == 0.0


def test_rows_of_a_cache_can_be_chosen_and_repeated():
    model = prune(build("llama"), make("snapkv", "hold"))
    cache, batch = filled(model, prompts()), prompts()
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert cache.layers[0].counts == [12, 12] and cache.layers[0].real == [27, 40]
    more = torch.tensor([[7], [7]])
    mask = torch.cat([batch["attention_mask"].flip(0), torch.ones(2, 1, dtype=torch.long)], 1)
    places = torch.tensor([[27], [40]])
    answer = model(input_ids=more, attention_mask=mask, position_ids=places, past_key_values=cache).logits
    fed = feed(model, batch, [40])
    assert len(fed) == 1
    for row, other in ((0, 1), (1, 0)):
        single = filled(model, alone(batch, other))
        assert difference([answer[row]], [model(input_ids=more[:1], past_key_values=single).logits[0]]) <= 1e-5
    cache.reset()
    assert cache.get_seq_length() == 0
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert difference([model(**batch, position_ids=places, past_key_values=cache).logits[:, -1]], fed) == 0.0


def test_another_method_takes_its_place():
    model = prune(build("llama"), make("keydiff"))
    with pytest.warns(UserWarning, match="was pruned with keydiff; topk replaces it"):
        prune(model, TopK(keep=0.5))
    with pytest.warns(UserWarning, match="was pruned with topk; tova replaces it"):
        prune(model, make("tova"))
    assert {layer.held for layer in filled(model).layers} == {12}
    plain = unprune(model)
    assert not hasattr(plain.config, "token_pruning") and type(filled(plain).layers[0]) is DynamicLayer


def test_uneven_rows_do_not_go_on_without_the_method():
    """Nothing would hide their dead slots."""
    step, answers = {"input_ids": torch.tensor([[7], [8]])}, []
    for lengths in (LENGTHS, (40, 40)):
        model = prune(build("llama"), SnapKV(keep=0.3, **SMALL))
        cache, mask = filled(model, prompts(lengths)), torch.ones(2, 41, dtype=torch.long)
        with dense(model):
            answers.append(model(**step, past_key_values=copy.deepcopy(cache)).logits)
        unprune(model)
        if lengths == LENGTHS:
            with pytest.raises(
                ValueError, match="was pruned and its rows or layers are uneven: go on with the pruned model"
            ):
                model(**step, attention_mask=mask, past_key_values=cache)
            assert cache.layers[0].held == 12 and cache.get_seq_length() == 40  # nothing was appended
        else:
            given = {"attention_mask": mask, "position_ids": torch.full((2, 1), 40), "past_key_values": cache}
            assert difference([model(**step, **given).logits], answers[-1:]) <= 1e-5
    model, batch = prune(build("llama"), SnapKV(keep=64)), prompts()
    cache, mask = filled(model, batch), torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    unprune(model)(**step, attention_mask=mask, past_key_values=cache)  # it holds everything: the padding is masked


def test_tokens_that_were_evicted_cannot_be_taken_back():
    cache = filled(prune(build("llama"), make("keydiff")))
    with pytest.raises(ValueError, match=r"5 tokens cannot be taken back: eviction has left only the last 4.*recent=5"):
        cache.crop(-5)


# --- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make_it", "says"),
    [
        (lambda: KeyDiff(), "KeyDiff got no budget: give one of keep, hold, target_cache_mb"),
        (lambda: KeyDiff(keep=0.5, hold=64), "KeyDiff got keep and hold: give one"),
        (lambda: KeyDiff(keep=1.5), "keep=1.5: expected a share of the prompt"),
        (lambda: KeyDiff(keep=True), "keep=True: expected a share"),
        (lambda: KeyDiff(hold=0.5), "hold=0.5: expected a number of entries"),
        (lambda: KeyDiff(hold=20), "hold=20 is below the 4 first and 32 last tokens that never leave: give 36"),
        (lambda: KeyDiff(keep=20), "keep=20 is below the 4 first"),
        (lambda: KeyDiff(target_cache_mb=-1), "target_cache_mb=-1: expected megabytes"),
        (lambda: KeyDiff(keep=64, every=0), "every=0: expected a whole number, 1 or more"),
        (lambda: KeyDiff(keep=64, heads="mine"), "heads='mine': expected own, shared"),
        (lambda: KeyDiff(keep=64, layers="cone"), "layers='cone': expected equal, pyramid"),
        (lambda: SnapKV(keep=64, value="norm"), "value='norm': expected none, vatp, critical"),
        (lambda: KeyDiff(keep=64, value="vatp"), "value='vatp' weighs attention, which KeyDiff does not look at"),
        (lambda: TOVA(keep=64, heads="own"), "heads='own': TOVA makes one choice for a layer"),
        (lambda: SnapKV(keep=64, kernel=4), "kernel=4: expected an odd number"),
        (lambda: SnapKV(keep=64, pool="sum"), "pool='sum': expected avg or max"),
    ],
)
def test_options_that_cannot_be_are_refused(make_it, says):
    with pytest.raises(ValueError, match=says):
        make_it()


def packed_by(kind):
    """A cache of transformers' that needs a package: its layers, without a backend."""
    cache = DynamicCache()
    cache.layers = [kind.__new__(kind) for _ in range(3)]
    return cache


@pytest.mark.parametrize(
    ("cache", "says"),
    [
        (lambda c: packed_by(QuantoQuantizedLayer), "cannot prune a DynamicCache, whose entries are quantized"),
        (lambda c: packed_by(HQQQuantizedLayer), "cannot prune a DynamicCache, whose entries are quantized"),
        (lambda c: ((torch.zeros(1, 2, 1, 8),) * 2,) * 3, "cannot prune a tuple as past_key_values: give a DynamicC"),
        (lambda c: StaticCache(config=c, max_cache_len=64), "cannot prune a StaticCache, whose size is fixed"),
        (lambda c: QuantizedCache("fp8", c), "cannot prune a QuantizedCache, whose entries are quantized"),
        (lambda c: DynamicCache(config=c, offloading=True), "cannot prune a cache that is offloaded"),
    ],
)
def test_caches_of_other_kinds_are_refused(cache, says):
    model = prune(build("llama"), make("keydiff"))
    with pytest.raises(ValueError, match=says):
        model(**prompts(), past_key_values=cache(model.config))


def test_a_cache_that_a_dense_call_filled_is_refused():
    model = prune(build("llama"), make("keydiff"))
    with dense(model):
        cache = filled(model)
    with pytest.raises(ValueError, match=r"this cache was filled without keydiff.*within dense\(model\)"):
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)


def test_a_pruned_cache_goes_on_within_dense():
    model = prune(build("llama"), make("keydiff", "hold"))
    caches = [filled(model, prompts()) for _ in range(2)]
    step = {"input_ids": torch.tensor([[7], [8]])}
    with dense(model):
        answer, *_ = [model(**step, past_key_values=caches[0]).logits for _ in range(4)]
        assert caches[0].layers[0].held == 16
    assert torch.equal(model(**step, past_key_values=caches[1]).logits, answer)


def test_options_of_tokens_are_not_for_caches():
    model, batch = prune(build("llama"), make("keydiff")), prompts(LENGTHS[:1])
    with (
        calling(model, protect=batch["attention_mask"]),
        pytest.raises(ValueError, match=r"calling\(\) is for tokens, and keydiff prunes a cache"),
    ):
        model(**batch)
    with dense(model, unpadded=True):
        assert filled(model).layers[0].keys.shape[2] == 40


VERBS = {
    "predict": lambda model, rows, folder: predict(model, rows),
    "replayed": lambda model, rows, folder: replayed(model, "random", torch.ones(2, 1)),
    "measure": lambda model, rows, folder: measure(model, rows, None, max_length=16),
    "export": lambda model, rows, folder: export(model, folder / "graph"),
    "trace": lambda model, rows, folder: trace(model, None, "a text"),
    "Stream": lambda model, rows, folder: Stream(model, None),
    "param_groups": lambda model, rows, folder: param_groups(model, 1e-3),
    "PruningTrainer": lambda model, rows, folder: PruningTrainer(
        model, TrainingArguments(str(folder), use_cpu=True, report_to=[]), train_dataset=rows
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_of_tokens_refuse_a_cache_method(verb, tmp_path):
    model = prune(LlamaForSequenceClassification(LlamaConfig(**GROUPED, num_labels=3)), make("snapkv"))
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": 1}] * 2)
    says = f"SnapKV prunes a KV cache; {verb} takes a method that prunes tokens"
    with pytest.raises(ValueError, match=says):
        VERBS[verb](model, rows, tmp_path)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # which peft asks for
def test_an_adapter_generates_over_a_pruned_cache():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    prune(model, make("keydiff"))
    cache = DynamicCache()
    model.generate(**prompts(LENGTHS[:1]), max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert {layer.held for layer in ours(cache).values()} == {12 + 3}
    assert {row["held"] for row in pruner_of(model.get_base_model()).report} == {12 + 3}


def test_every_method_is_public_and_documented():
    kinds = [kind for kind in REGISTRY.values() if kind.__module__.startswith("thresher.caches.")]
    page = (Path(__file__).parents[2] / "docs" / "long-prompts.md").read_text(encoding="utf-8")
    assert {kind.name for kind in kinds} == {*METHODS}
    for kind in kinds:
        assert getattr(thresher, kind.__name__) is kind and kind.__name__ in thresher.__all__
        assert f"| `{kind.__name__}` |" in page and "CachePruner" in kind.__doc__ + kind.__mro__[1].__name__


@pytest.mark.slow
def test_names_are_found_in_a_process_that_has_imported_none():
    code = "from thresher.core.method import Pruner; print(Pruner.from_dict({'method': 'tova', 'keep': 99}).keep)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["99"]


def test_a_call_without_a_cache_is_refused():
    model = prune(build("llama"), make("keydiff"))
    with pytest.raises(ValueError, match="called with use_cache=False, so keydiff has no cache to prune"):
        model(**prompts(), use_cache=False)
    assert model(**prompts()).past_key_values.layers[0].held == 12  # the model makes one itself
    assert len(ours(filled(model, prompts()))) == 3


def test_continuous_batching_is_refused():
    model = prune(build("llama"), make("keydiff"))
    with pytest.raises(ValueError, match="cannot prune the pages of continuous batching"):
        model(**prompts(), cache=object())
    for call in (
        lambda: model.generate_batch([[5, 6, 7]]),
        lambda: model.generate(**prompts(), cache_implementation="paged", max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match=r"cannot prune the pages of continuous batching: call generate"):
            call()
    assert "init_continuous_batching" not in vars(unprune(model))


def test_a_cache_without_a_layer_of_ours_is_an_error():
    class Own(DynamicLayer):
        """A layer of a kind that is not known."""

    model, cache = prune(build("llama"), make("keydiff")), DynamicCache()
    cache.layers = [Own() for _ in range(3)]
    with pytest.raises(ValueError, match="keydiff found no layer that it can prune in this DynamicCache: use a Dyn"):
        model(**prompts(), past_key_values=cache)


def test_a_layer_that_shows_no_attention_is_an_error(monkeypatch):
    model = prune(build("llama"), make("keydiff"))
    block = model.model.layers[1].self_attn
    monkeypatch.setattr(block, "forward", lambda hidden_states, **given: (hidden_states, None))
    with pytest.raises(RuntimeError, match="layer 1 of LlamaForCausalLM delivered no attention, so nothing would be"):
        model(**prompts())


def test_models_that_cannot_be_served_are_refused():
    with pytest.raises(
        ValueError, match="prunes the KV cache of a decoder, which BertForSequenceClassification is not"
    ):
        prune(FAMILIES["bert"].build(), make("keydiff"))
    with pytest.raises(ValueError, match="all of its layers slide and hold a window at most"):
        prune(build("mistral", sliding_window=8), make("keydiff"))
    with pytest.raises(ValueError, match="Knorm is not possible with DeepseekV3ForCausalLM, whose cache holds lat"):
        prune(build("deepseek-v3"), make("knorm"))
    with pytest.raises(ValueError, match="value='vatp' is not possible with DeepseekV3ForCausalLM"):
        prune(build("deepseek-v3"), H2O(keep=64, value="vatp"))
    with pytest.raises(ValueError, match="keydiff is not possible with Gemma3nForCausalLM: layers 2 to 3 use the key"):
        prune(build("gemma3n"), make("keydiff"))
    prune(build("gemma3n", num_kv_shared_layers=0), make("keydiff"))  # whose layers have keys of their own
    with pytest.raises(ValueError, match=r"layout='packed': expected auto, mask, evict"):
        prune(build("llama"), make("keydiff"), layout="packed")


def test_norms_of_normalized_keys_are_warned_of():
    with pytest.warns(UserWarning, match="normalizes its keys"):
        prune(build("qwen3"), Knorm(keep=64))


def test_masks_that_do_not_fit_are_refused():
    model, batch = prune(build("llama"), make("keydiff")), prompts()
    with pytest.raises(ValueError, match=r"takes the 2-D attention mask \(B, N\) of real tokens, got a 4-D one"):
        model(input_ids=batch["input_ids"], attention_mask=torch.ones(2, 1, 40, 40, dtype=torch.bool))
    cache = filled(model, batch)
    with pytest.raises(ValueError, match="mask has 1 columns, the cache has seen 40 tokens and 1 are new"):
        model(input_ids=torch.ones(2, 1, dtype=torch.long), attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_an_attention_function_that_was_changed_is_an_error():
    model = prune(build("llama"), make("keydiff"))
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="was changed after prune"):
        model(**prompts())


def test_streaming_needs_no_recent_tokens():
    assert StreamingLLM(hold=8, sinks=4).floor == 5
