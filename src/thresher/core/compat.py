"""Every private name of transformers, accelerate and torch that Thresher relies on, with the version it was seen in.

One test per name (tests/core/test_compat.py) says that it is still there and still means this, so that a release that
moves one is a single red line with the name of the thing.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, QuantizedCache
from transformers.cache_utils import BaseQuantizedLayer, StaticLayer  # 5.23
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, sdpa_mask  # 5.23
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # 5.23
from transformers.pytorch_utils import Conv1D  # 5.23
from transformers.utils.import_utils import is_tracing  # 5.23
from transformers.vision_utils import get_vision_window_index  # 5.23

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:  # a mixin: what is above it is the Trainer of the class that takes it
    _Trainer = object

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "Conv1D",
    "bidirectional_mask_function",
    "is_tracing",
    "sdpa_mask",
]
OUTPUT_MAPS = ("o_proj", "out_proj", "c_proj", "dense")  # 5.23: what blocks call the map from their heads to the state
ATTENTION_CALL = "attention_interface("  # 5.23: how an attention module's forward calls the configured function


# --- the attention implementation: 5.23 ------------------------------------------------------------------------------
def attention_implementation(model: PreTrainedModel) -> str:
    """The name of the attention function that ``model`` is configured with."""
    return model.config._attn_implementation


def can_set_attention(model: PreTrainedModel) -> bool:
    """Whether the attention function of ``model`` can be exchanged."""
    return model._can_set_attn_implementation()


def attention_function(module: nn.Module, name: str):
    """transformers' attention function of that name; "eager" lives in the model's own file."""
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(module).__module__].eager_attention_forward


# --- what a layer is and does: 5.23 ----------------------------------------------------------------------------------
def recorded_layer_class(model: PreTrainedModel) -> type[nn.Module] | None:
    """The class of the layers of ``model``, by transformers' own record of where hidden states come from."""
    spec = (getattr(model, "_can_record_outputs", None) or {}).get("hidden_states")
    spec = spec[0] if isinstance(spec, (list, tuple)) and spec else spec
    target = getattr(spec, "target_class", spec)
    return target if isinstance(target, type) else None


def source(kind: type[nn.Module]) -> str:
    """The text of the forward of a class of modules; empty where there is none to read."""
    try:
        return _text(inspect.unwrap(kind.forward))
    except (OSError, TypeError):
        return ""


@cache
def _text(function: Callable) -> str:
    return inspect.getsource(function)


def calls_attention_interface(module: nn.Module) -> bool:
    """Whether a module calls the configured attention function."""
    return ATTENTION_CALL in source(type(module))


def hands_on(module: nn.Module, call: str) -> bool:
    """Whether a forward passes its ``**kwargs`` to ``call``; read from the source, as transformers does itself."""
    return bool(re.search(r"\*\*\w+", source(type(module)).partition(call)[2]))


def reads_binary_mask(module: nn.Module) -> bool:
    """Whether a module reads its attention mask as 0/1 (DeBERTa)."""
    return "attention_mask.bool()" in source(type(module))


def frames_mask(model: PreTrainedModel, frames: int, mask: Tensor) -> Tensor | None:
    """(B, ``frames``): the mask of samples (B, samples) for the frames that the layers see; None: there is no rule."""
    rule = getattr(model, "_get_feature_vector_attention_mask", None)
    return None if rule is None else rule(frames, mask)


def window_order(tower: Any, grid: Tensor) -> Tensor | None:
    """(T,) long: the order in which a tower has the tokens of its windows (Qwen2.5-VL); None: it has none."""
    size = getattr(tower, "window_size", None)
    if size is None or not hasattr(tower, "spatial_merge_size"):
        return None
    return get_vision_window_index(
        grid, spatial_merge_size=tower.spatial_merge_size, window_size=size, patch_size=tower.patch_size, kwargs={}
    )[0]


# --- the cache of a decoder: 5.23 -------------------------------------------------------------------------------------
def wants_cache(model: PreTrainedModel, given: bool | None) -> bool:
    """Whether a forward keeps keys and values, where its caller says ``given``."""
    return bool(getattr(model.config, "use_cache", False) if given is None else given)


PREPARE_CACHE = "_prepare_cache_for_generation"  # of a model: makes the cache of ``generate``, or takes the one given
START_PAGES = "init_continuous_batching"  # of a model


def brings_drafts(generation_mode: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether ``generate`` in such a mode feeds drafts, of which the first comes with the prompt."""
    return getattr(generation_mode, "value", None) == "assisted_generation"


def borrows_entries(block: nn.Module) -> bool:
    """Whether an attention block uses the keys and values of another layer, as the last ones of Gemma 3n do."""
    return bool(getattr(block, "is_kv_shared_layer", False))


def is_static(cache: Any) -> bool:
    """Whether a cache has a size of its own, from the beginning."""
    return any(isinstance(layer, StaticLayer) for layer in getattr(cache, "layers", None) or ())


def is_quantized(cache: Any) -> bool:
    """Whether a cache holds its entries quantized."""
    return any(isinstance(layer, BaseQuantizedLayer) for layer in cache.layers) or isinstance(cache, QuantizedCache)


def is_paged(arguments: dict[str, Any]) -> bool:
    """Whether continuous batching calls a model: its pages come as ``cache``."""
    return arguments.get("cache") is not None


def expands_latents(block: nn.Module) -> bool:
    """Whether a block caches latents, of which it makes keys and values for each head (MLA)."""
    return callable(getattr(block, "expand_kv", None))


def expanded(block: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of each head (B, H, P, d), of what such a block caches."""
    return block.expand_kv(keys, values)


def normalizes_keys(block: nn.Module) -> bool:
    """Whether a block normalizes each key (QK-norm)."""
    return any(getattr(block, name, None) is not None for name in ("k_norm", "k_layernorm", "key_norm"))


# --- rotary positions: 5.23 -------------------------------------------------------------------------------------------
def rotary_module(model: nn.Module) -> nn.Module | None:
    """The module that makes cos and sin of positions; None: there is none."""
    return next(
        (m for m in model.modules() if any(n.endswith("inv_freq") for n, _ in m.named_buffers(recurse=False))), None
    )


def rotary_by_layer(module: Any) -> bool:
    """Whether kinds of layers have rotary positions of their own (Gemma 3)."""
    return isinstance(getattr(module, "rope_type", None), dict)


def rotary_frequencies(module: Any, layer_type: str | None) -> Tensor:
    """(f,) radians per position."""
    return getattr(module, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq")


def rotary_scaling(module: Any, layer_type: str | None) -> float:
    """What cos and sin are multiplied by."""
    return float(getattr(module, "attention_scaling" if layer_type is None else f"{layer_type}_attention_scaling", 1.0))


def rotary_kinds(module: Any) -> set[str]:
    """The kinds of rotary positions: "default", "yarn", "dynamic", ..."""
    kinds = getattr(module, "rope_type", "default")
    return set(kinds.values()) if isinstance(kinds, dict) else {kinds}


def rotary_pairs(block: nn.Module) -> str:
    """Which channels of a block's keys turn against each other as they are cached: "halves", the first half against the
    second; "neighbours"; empty: it does not turn them, or in a way that is not known."""
    function = getattr(sys.modules[type(block).__module__], "rotate_half", None)
    if function is None or getattr(block, "use_rope", True) is False:
        return ""
    text = _text(inspect.unwrap(function))
    return "halves" if "shape[-1] // 2" in text else "neighbours" if "::2]" in text else ""


# --- sentence-transformers: 6.2 --------------------------------------------------------------------------------------
def transformer_module(model: nn.Module) -> nn.Module | None:
    """The first module of a SentenceTransformer, CrossEncoder or MultiVectorEncoder; None for any other model.

    It holds the transformers model as ``auto_model`` and calls its ``forward``; its answer is a dict of tensors, in
    which later modules pool what ``attention_mask`` (B, N) says.
    """
    first = next(model.children(), None)
    return first if isinstance(getattr(first, "auto_model", None), nn.Module) else None


def flattens_inputs(module: nn.Module) -> bool:
    """Whether it hands its model all texts of a batch as one row, without a mask."""
    return bool(getattr(module, "can_flatten_inputs", False))


def pooled_alone(model: nn.Module) -> list[str]:
    """How a SentenceTransformer pools single tokens ("cls", "lasttoken") or weighs by place; empty: it does not."""
    modes = [getattr(module, "pooling_mode", ()) for module in model.children()]
    flat = [mode for own in modes for mode in ([own] if isinstance(own, str) else own)]
    return [mode for mode in flat if mode in ("cls", "lasttoken", "weightedmean")]


def mask_survivors(answer: dict[str, Any], token_mask: Tensor) -> None:
    """Have later modules pool the tokens in ``token_mask`` (B, N) alone."""
    answer["attention_mask"] = token_mask


def prepared_texts(model: Any, texts: list) -> dict[str, Any]:
    """The arguments of the transformers model for a batch of texts, or of pairs, as such a model tokenizes them."""
    known = inspect.signature(transformer_module(model).auto_model.forward).parameters  # type: ignore[union-attr]
    return {name: value for name, value in model.preprocess(texts).items() if name in known}


# --- torch: 2.13 -----------------------------------------------------------------------------------------------------
def check(condition: Any) -> None:
    """Tell a graph under construction that a symbolic condition holds."""
    torch._check(condition)


# --- the Trainer: transformers 5.17 and 5.23 --------------------------------------------------------------------------
class TrainerNames(_Trainer):
    """Give names of our own to what a Trainer keeps private; a base class before ``Trainer``."""

    loss_is_scaled_for_ga = False  # 5.23: the loss is a mean over a batch, not over the batches that are accumulated

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # 5.17: the same

    def extra_columns(self) -> set[str]:
        """The columns of a data set that are kept, beside those that the model's forward takes."""
        return set()

    def row_order(self, data: Any) -> Any:
        """The sampler of the training rows; None: the Trainer's own."""
        return None

    def may_be_best(self) -> bool:
        """Whether the model as it is may be the best one."""
        return True

    def used_columns(self, data: Any) -> Any:
        """The data set without the columns that nothing reads."""
        return self._remove_unused_columns(data)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: Any = list({*self._signature_columns, *self.extra_columns()})

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        own = self.row_order(self.train_dataset if train_dataset is None else train_dataset)
        return super()._get_train_sampler(train_dataset) if own is None else own

    def _determine_best_metric(self, metrics: dict, trial: Any) -> bool:
        return self.may_be_best() and super()._determine_best_metric(metrics, trial)


class SentenceTrainerNames(_Trainer):
    """Give names of our own to what a Trainer of sentence-transformers 6.2 keeps private; a base class before it."""

    def saved_model(self, folder: str) -> nn.Module:
        """The model of a checkpoint."""
        raise NotImplementedError

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        net: Any = self.model if model is None else model
        net.load_state_dict(self.saved_model(resume_from_checkpoint).state_dict())


TRAINER_STATE = "trainer_state.json"  # transformers.trainer.TRAINER_STATE_NAME: the last file of a checkpoint


# --- accelerate 1.15: what it puts away, and where it runs ------------------------------------------------------------
def load_offloaded(module: nn.Module) -> None:
    """Load the weights that accelerate has put away; it does so itself before a forward alone."""
    for part in module.modules():
        if any(tensor.is_meta for tensor in (*part.parameters(False), *part.buffers(False))):
            hook: Any = part._hf_hook
            hook.pre_forward(part)


def execution_device(model: nn.Module) -> torch.device | str | int:
    """The device that ``model`` runs on; where its weights are put away, accelerate's hooks say so."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            return parameter.device
    devices = (getattr(getattr(part, "_hf_hook", None), "execution_device", None) for part in model.modules())
    return next((device for device in devices if device is not None), "cpu")


# --- the exporters: transformers 5.23 ---------------------------------------------------------------------------------
def graph_exporter(format: str, int8: bool, calibration: Any = None) -> tuple[Any, Any]:
    """The exporter of a format ("onnx", "openvino") and its configuration, of which batch and length are open.

    ``int8``: dynamic in ONNX Runtime, static in OpenVINO, on ``calibration``. Raises ImportError where a package is
    missing.
    """
    try:
        from transformers import exporters

        if format == "onnx":
            config = exporters.OnnxRuntimeDynamicConfig(per_channel=True)
            quantizer = exporters.OnnxRuntimeQuantizer(config) if int8 else None
            return exporters.OnnxExporter(), exporters.OnnxConfig(dynamic=True, quantizer=quantizer)
        nncf = _quantizer_of_linear_layers(calibration) if int8 else None
        return exporters.OpenVINOExporter(), exporters.OpenVINOConfig(dynamic=True, quantizer=nncf)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"the {format} export needs pip install 'thresher-pruning[{format}]': {error}") from error


def _quantizer_of_linear_layers(calibration: Any) -> Any:
    """nncf's quantizer, which leaves products of two activations alone.

    Where a layer shows its probabilities attention is no single operation of the graph: nncf would quantize them, and
    OpenVINO would convert them there and back.
    """
    import nncf
    from transformers import exporters
    from transformers.exporters.quantizers.quantizer_nncf import NNCFQuantizationConfig

    def constant(node: Any) -> bool:
        while node.get_type_name() in ("Convert", "Transpose", "Reshape", "Multiply", "Subtract"):
            node = node.input_value(0).get_node()
        return node.get_type_name() == "Constant"

    class OfLinearLayers(exporters.NNCFOpenVINOQuantizer):
        def quantize(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            products = [node for node in model.get_ops() if node.get_type_name() == "MatMul"]
            names = [node.get_friendly_name() for node in products if not any(map(constant, inputs_of(node)))]
            if names:
                self.config = NNCFQuantizationConfig(ignored_scope=nncf.IgnoredScope(names=names))
            return super().quantize(model, *args, **kwargs)

    def inputs_of(node: Any) -> list:
        return [node.input_value(i).get_node() for i in range(2)]

    return OfLinearLayers(None, calibration)


@contextmanager
def _executorch_patches():
    """What the exporter changes of torch and ExecuTorch while it works; and ``sort``, which becomes the ``topk`` that
    there is a portable kernel of."""
    from transformers.exporters.utils import apply_patches, patch_attributes

    def by_topk(original):
        def sort(input, dim=-1, descending=False, stable=False):
            return input.topk(input.shape[dim], dim=dim, largest=descending, sorted=True)

        return sort

    mine = patch_attributes([(torch.Tensor, "sort", by_topk)])
    with apply_patches("executorch"), apply_patches("executorch.xnnpack"), mine:
        yield


def executorch_program(model: Any, methods: Iterable[tuple[str, dict[str, Tensor]]], int8: bool) -> Any:
    """An ExecutorchProgramManager for XNNPACK, with ``methods`` by name, of the shapes of their inputs. They share
    constants; the model is traced as each is looked up. ``int8``: weights of linear layers per channel, their
    activations dynamic.

    Raises:
        ImportError: a package is missing.
    """
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
        from executorch.exir.program import to_edge_transform_and_lower
        from transformers import exporters
        from transformers.exporters import exporter_executorch as own
        from transformers.exporters.utils import apply_fx_node_fixes, apply_fx_program_fixes

        exporter = exporters.ExecutorchExporter()
    except (ImportError, AttributeError) as error:
        raise ImportError(f"the executorch export needs pip install 'thresher-pruning[mobile]': {error}") from error
    traced = {}
    with _executorch_patches():
        for name, given in methods:
            quantizer = None
            if int8:
                config = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
                linear = xnnpack.XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear.default, config)
                linear.transform_for_annotation = lambda graph: graph  # which makes floats of whole numbers
                quantizer = exporters.PT2EQuantizer(linear, [given])
            config = exporters.ExecutorchConfig(backend="xnnpack", quantizer=quantizer)
            program, _ = exporters.DynamoExporter.export_program(exporter, model, given, config=config)
            apply_fx_program_fixes("executorch", program)
            apply_fx_node_fixes("executorch", program.graph_module)
            traced[name] = program
        lowered = to_edge_transform_and_lower(
            traced, partitioner=[XnnpackPartitioner()], compile_config=own._get_edge_compile_config("xnnpack")
        )
        return lowered.to_executorch()


def executorch_methods(file: str, threads: int) -> Any:
    """The ``executorch.runtime.Program`` in a file. The threads are those of the process."""
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    if portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)
    return Runtime.get().load_program(file)


def open_exported(folder: str, **options: Any) -> tuple[Any, tuple[str, ...]]:
    """The model that an exporter wrote, ready to run on the processor, and the names of its inputs."""
    from transformers.exporters import ExportedModel

    exported = ExportedModel.from_pretrained(folder, device="cpu", **options)
    (runner,) = exported.runners.values()
    return exported, tuple(runner.metadata.kwargs)


# --- torch 2.13: what a processor can do ------------------------------------------------------------------------------
def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """(n, m) int32: the product of int8 matrices (n, k) and (k, m). Raises RuntimeError where there is no kernel."""
    return torch._int_mm(x, weight)


INSTRUCTIONS = {
    "AMX": "_is_amx_tile_supported",
    "AVX-512 BF16": "_is_avx512_bf16_supported",
    "VNNI": "_is_vnni_supported",
}


def instructions() -> tuple[str, ...]:
    """Which instructions for matrices in bf16 and int8 the processor has; none where torch does not say."""
    return tuple(name for name, asked in INSTRUCTIONS.items() if getattr(torch.cpu, asked, lambda: False)())
