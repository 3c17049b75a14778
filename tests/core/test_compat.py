"""The private names of other libraries are still there, and still mean what core/compat.py takes them for."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook
from datasets import Dataset
from torch import nn
from transformers import DynamicCache, QuantizedCache, Trainer, TrainingArguments
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.trainer import TRAINER_STATE_NAME

from support import decoders
from support.families import FAMILIES
from support.visual import tiny
from thresher.core import compat
from thresher.core.architecture import find_architecture
from thresher.core.attention import register


class Ours(compat.TrainerNames, Trainer):
    best = True

    def extra_columns(self):
        return {"teacher_logits"}

    def may_be_best(self):
        return self.best


@pytest.fixture
def trainer(tmp_path):
    data = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [0], "teacher_logits": [[0.0]], "text": ["a"]})
    options = {"metric_for_best_model": "loss", "greater_is_better": False, "use_cpu": True, "report_to": []}
    return Ours(FAMILIES["bert"].build(), TrainingArguments(str(tmp_path), **options), train_dataset=data)


def test_signature_columns(trainer):
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "labels", "teacher_logits"} <= {*trainer._signature_columns}


def test_remove_unused_columns(trainer):
    assert {*trainer.used_columns(trainer.train_dataset).column_names} == {"input_ids", "labels", "teacher_logits"}


def test_determine_best_metric(trainer):
    trainer.best = False
    assert not trainer._determine_best_metric({"eval_loss": 0.1}, None) and trainer.state.best_metric is None
    trainer.best = True
    assert trainer._determine_best_metric({"eval_loss": 0.5}, None) and trainer.state.best_metric == 0.5


def test_loss_is_scaled_for_ga_or_model_accepts_loss_kwargs(trainer):
    """One of the two decides whether the loss of an accumulated batch is divided."""
    source = inspect.getsource(Trainer.training_step)
    assert "loss_is_scaled_for_ga" in source or "model_accepts_loss_kwargs" in source
    assert trainer.model_accepts_loss_kwargs is False and trainer.loss_is_scaled_for_ga is False


def test_trainer_state_name():
    assert compat.TRAINER_STATE == TRAINER_STATE_NAME


def test_hf_hook():
    model = cpu_offload(nn.Sequential(nn.Linear(2, 2)), execution_device="cpu")
    assert isinstance(model[0]._hf_hook, AlignDevicesHook) or hasattr(model[0]._hf_hook, "hooks")
    assert model[0].weight.is_meta and str(compat.execution_device(model)) == "cpu"
    compat.load_offloaded(model)
    assert not model[0].weight.is_meta and model[0].weight.abs().sum() > 0
    assert compat.execution_device(nn.Linear(2, 2)) == torch.device("cpu")


def test_int_mm():
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-9, 9, (32, 32), generator=draw, dtype=torch.int8) for _ in range(2))
    product = compat.int8_product(x, weight.t())
    assert product.dtype == torch.int32 and torch.equal(product, (x.long() @ weight.long().t()).int())


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the kernel says nothing of the processor")
@pytest.mark.parametrize(
    ("name", "flags"),
    [("AMX", {"amx_tile"}), ("AVX-512 BF16", {"avx512_bf16"}), ("VNNI", {"avx512_vnni", "avx_vnni"})],
)
def test_instructions(name, flags):
    """The names are there, and say what the kernel says of the processor."""
    assert all(isinstance(getattr(torch.cpu, asked)(), bool) for asked in compat.INSTRUCTIONS.values())
    assert (name in compat.instructions()) <= bool(flags & {*Path("/proc/cpuinfo").read_text().split()})


@pytest.mark.parametrize(("format", "int8"), [("onnx", False), ("onnx", True), ("openvino", False), ("openvino", True)])
def test_exporters(format, int8):
    """Their names, and that batch and length of their graphs are open."""
    exporter, config = compat.graph_exporter(format, int8, [{}])
    assert callable(exporter.export) and config.dynamic is True and (config.quantizer is not None) == int8


@pytest.mark.filterwarnings("ignore")  # of the libraries below, of one another
def test_exported_model_names_its_inputs(tmp_path):
    model, inputs = FAMILIES["bert"].build(), {"input_ids": torch.tensor([[5, 6], [7, 8]])}
    exporter, config = compat.graph_exporter("onnx", False)
    exporter.export(model, inputs, config=config).save_pretrained(tmp_path)
    exported, names = compat.open_exported(str(tmp_path))
    assert names == ("input_ids",) and exported.config.num_labels == model.config.num_labels
    with torch.no_grad():
        torch.testing.assert_close(exported(**inputs)["logits"], model(**inputs).logits, atol=1e-4, rtol=0)


def test_ranks_are_made_by_topk_for_phones():
    before, x = torch.Tensor.sort, torch.tensor([[2.0, 3.0, 1.0]])
    with compat._executorch_patches():
        assert torch.Tensor.sort is not before
        assert x.sort(dim=1, descending=True, stable=True).indices.tolist() == [[1, 0, 2]]
        assert x.sort(dim=1).values.tolist() == [[1.0, 2.0, 3.0]]
    assert torch.Tensor.sort is before


# --- the cache of a decoder -------------------------------------------------------------------------------------------
def test_use_cache_is_on_where_the_configuration_says_so():
    model = decoders.build("llama")
    assert compat.wants_cache(model.model, None) and not compat.wants_cache(model.model, False)
    model.config.use_cache = False
    assert not compat.wants_cache(model.model, None) and model(torch.tensor([[5]])).past_key_values is None


def test_the_layers_of_a_dynamic_cache_can_be_exchanged():
    config = decoders.build("gemma3").config
    kinds = [DynamicSlidingWindowLayer, DynamicLayer, DynamicLayer]
    assert [type(layer) for layer in DynamicCache(config=config).layers] == kinds
    empty = DynamicCache()
    assert not empty.layers and empty.layer_class_to_replicate is DynamicLayer and empty.offloading is False


def test_generate_prepares_its_cache_before_it_speaks_of_drafts(monkeypatch):
    model, told = decoders.build("llama"), []

    def prepare(config, arguments, *args):
        answer = getattr(type(model), compat.PREPARE_CACHE)(model, config, arguments, *args)
        told.append(bool(config.is_assistant))
        monkeypatch.setattr(arguments["past_key_values"], "activate_past_recording", lambda: told.append("drafts"))
        return answer

    monkeypatch.setattr(model, compat.PREPARE_CACHE, prepare, raising=False)
    model.generate(**decoders.prompts((12,)), max_new_tokens=3, do_sample=False, prompt_lookup_num_tokens=2)
    assert told == [False, "drafts"]


def test_quantized_caches_are_known():
    config = decoders.build("llama").config
    assert compat.is_quantized(QuantizedCache("fp8", config)) and not compat.is_quantized(DynamicCache(config=config))


def test_continuous_batching_calls_its_pages_cache():
    assert "cache" in PagedAttentionArgs.__annotations__
    assert compat.is_paged({"cache": object()}) and not compat.is_paged({"past_key_values": object()})


@torch.no_grad()
def test_latents_are_expanded_as_attention_does():
    model, seen = decoders.build("deepseek-v3"), {}
    block = model.model.layers[1].self_attn
    cache = DynamicCache(config=model.config)
    model.set_attn_implementation(register("sdpa"))
    site = SimpleNamespace(statistic=None, tokens=None, voters=None)
    handle = block.register_forward_pre_hook(lambda m, a, k: (a, k | {"token_site": site}), with_kwargs=True)
    model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    handle.remove()
    seen = compat.expanded(block, cache.layers[1].keys, cache.layers[1].values)
    assert torch.equal(seen[0], site.inputs.key) and torch.equal(seen[1], site.inputs.value)
    assert compat.expands_latents(block) and not compat.expands_latents(
        decoders.build("llama").model.layers[0].self_attn
    )


@pytest.mark.parametrize("family", decoders.DECODERS)
def test_norms_of_keys_are_found(family):
    layer = find_architecture(decoders.build(family)).layers[1]
    found = [compat.normalizes_keys(block) for block in layer.modules()]
    assert any(found) == (family in ("qwen3", "gemma3"))


@pytest.mark.parametrize("family", [*decoders.DECODERS, *decoders.OTHERS])
@torch.no_grad()
def test_rotary_positions_are_what_the_model_turns_by(family):
    """A key of the second token, turned one position further, is that key in the place of the third; in the last layer
    that turns its keys, as some do not."""
    arch = find_architecture(decoders.build(family))
    model, caches = arch.base, []
    block = arch.layers[1].get_submodule(arch.block)
    if family == "gpt2":
        assert compat.rotary_module(model) is None and not compat.rotary_pairs(block)
        return
    for place in (1, 2):
        caches.append(DynamicCache(config=model.config))
        model(torch.tensor([[7]]), position_ids=torch.tensor([[place]]), past_key_values=caches[-1])
    turning = "values" if compat.expands_latents(block) else "keys"
    layers = [[getattr(layer, turning) for layer in cache.layers] for cache in caches]
    number = max(i for i, (a, b) in enumerate(zip(*layers, strict=True)) if i < 2 and not torch.equal(a, b))
    one, two = (layer[number] for layer in layers)
    block = arch.layers[number].get_submodule(arch.block)
    module = compat.rotary_module(model)
    kind = block.layer_type if compat.rotary_by_layer(module) else None
    angle = compat.rotary_frequencies(module, kind)
    assert compat.rotary_scaling(module, kind) == 1.0 and compat.rotary_kinds(module) == {"default"}
    size = len(angle)
    pairs = compat.rotary_pairs(block)
    assert pairs == ("neighbours" if family in ("cohere", "cohere2") else "halves")
    first, second = (
        (slice(0, 2 * size, 2), slice(1, 2 * size, 2))
        if pairs == "neighbours"
        else (
            slice(0, size),
            slice(size, 2 * size),
        )
    )
    a, b = one[..., first], one[..., second]
    turned = one.clone()
    turned[..., first], turned[..., second] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    assert (turned - two).abs().max() < 1e-4 and (one - two).abs().max() > 1e-2


def test_output_maps_have_the_names_that_are_known():
    for family in decoders.DECODERS:
        arch = find_architecture(decoders.build(family))
        block = arch.layers[1].get_submodule(arch.block)
        named = [name for name in compat.OUTPUT_MAPS if hasattr(block, name)]
        assert len(named) == 1 and getattr(block, named[0]).weight.shape[0] in (32, 64)


def test_windows_of_a_tower_have_an_order():
    windows, grid = tiny("qwen2.5-vl").model.visual, torch.tensor([[1, 8, 12], [1, 4, 6]])
    order = compat.window_order(windows, grid)
    assert order.sort().values.tolist() == list(range(30)) and order.tolist() != list(range(30))
    assert compat.window_order(tiny("qwen2-vl").model.visual, grid) is None
