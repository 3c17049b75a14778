"""Find the layers of any transformers model, and what must be known of them. No registry of architectures."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from functools import cache

from torch import nn
from transformers import PreTrainedModel

from .cost import LayerCost
from .pruner import ModelInfo

PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")


@dataclass
class Stack:
    """The layers of a model.

    Attributes:
        base: the innermost model that holds them; it is given the 2-D mask.
        layers: the layers, each once.
        depth: layer calls of one forward: more than ``len(layers)`` where layers are shared.
        block: name of the attention block within a layer.
        inside: the block returns the state after the residual, so tokens can leave before the FFN.
        shown: the block hands its keyword arguments to the attention function, which then sees the view.
        carried: the layer hands its keyword arguments to the block.
        relative: positions enter as a bias between pairs, which packed rows cannot carry.
        binary: the block reads its attention mask as 0/1, whatever the type.
        causal: a decoder.
        arguments: names of the layer's arguments, the hidden states first.
    """

    base: PreTrainedModel
    layers: list[nn.Module]
    depth: int
    block: str
    inside: bool
    shown: bool
    carried: bool
    relative: bool
    binary: bool
    causal: bool
    arguments: list[str]
    costs: list[LayerCost]

    @property
    def text(self) -> bool:
        """Whether the model reads token ids."""
        return self.base.main_input_name == "input_ids"


def find_stack(model: PreTrainedModel) -> Stack:
    """Find the layers of ``model``; of an encoder-decoder, the encoder's.

    Raises:
        ValueError: no layers, no attention block in them, or more than one stack was found.
    """
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        model = model.get_encoder()
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    holders = [m for m in models if layers_of(m)]
    holders = [m for m in holders if embeds(m)] or holders  # an encoder below the embeddings never sees the 2-D mask
    inner = [m for m in holders if not any(h is not m and h in set(m.modules()) for h in holders)]
    if not inner:
        raise ValueError(
            f"no transformer layers were found in {type(model).__name__}: neither "
            f"_can_record_outputs['hidden_states'] nor a "
            "list called layer, layers, h or blocks; pass the sub-model that holds the layers"
        )
    if len(inner) > 1:
        names = ", ".join(type(m).__name__ for m in inner)
        raise ValueError(
            f"{type(model).__name__} holds several stacks of layers ({names}): prune one of these sub-models"
        )
    base, layers = inner[0], layers_of(inner[0])
    layer = layers[0]
    names = [n for n, m in layer.named_children() if re.search("attn|attention", n) and linear_size(m)]
    if not names:
        raise ValueError(
            f"no attention block was found in {type(layer).__name__}: expected a child named like attn or attention"
        )
    block = layer.get_submodule(names[0])
    cores = [m for m in block.modules() if "attention_interface(" in source(m)]
    arguments = list(inspect.signature(layer.forward).parameters)
    groups = getattr(base.config, "num_hidden_groups", None)  # ALBERT calls the same few layers again and again
    depth = base.config.num_hidden_layers * base.config.inner_group_num if groups else len(layers)
    return Stack(
        base=base,
        layers=layers,
        depth=depth,
        block=names[0],
        inside=returns_residual_state(layer, block),
        shown=bool(cores) and hands_on(cores[0], "attention_interface("),
        carried=hands_on(layer, f"self.{names[0]}("),
        relative=any(name in arguments for name in ("relative_pos", "position_bias")),
        binary=any("attention_mask.bool()" in source(m) for m in block.modules()),
        causal=any(getattr(m, "is_causal", False) is True for m in block.modules()),
        arguments=arguments,
        costs=[layer_cost(layers[i % len(layers)], names[0], base.config) for i in range(depth)],
    )


def describe(model: PreTrainedModel, stack: Stack) -> ModelInfo:
    """What a method may know of the model."""
    if stack.text:
        protected = (-1,) if stack.causal else (0,)
    else:
        prefix = [p for n, p in stack.base.named_parameters() if n.rpartition(".")[2] in PREFIX_TOKENS]
        protected = tuple(range(sum(p.shape[1] if p.dim() == 3 else 1 for p in prefix)))
    name = type(model).__name__
    mixes = any(getattr(m, "conv", None) is not None for m in (stack.base, getattr(stack.base, "encoder", None)))
    return ModelInfo(
        name=name,
        depth=stack.depth,
        first_site=int(stack.text and mixes),  # DeBERTa may mix neighbours after its first layer: none may leave there
        last_site=stack.depth - 1 if stack.inside else stack.depth - 2,
        reads_first_only=stack.text and not stack.causal and name.endswith("ForSequenceClassification"),
        protected=protected,
        max_tokens=getattr(stack.base.config, "max_position_embeddings", None),
        costs=tuple(stack.costs),
        inside=stack.inside,
        hidden=stack.base.config.hidden_size,
        causal=stack.causal,
    )


def layers_of(holder: PreTrainedModel) -> list[nn.Module]:
    """The transformer layers in ``holder``, by transformers' own record of them, else by the usual names of lists."""
    spec = (getattr(holder, "_can_record_outputs", None) or {}).get("hidden_states")
    spec = spec[0] if isinstance(spec, (list, tuple)) and spec else spec
    target = getattr(spec, "target_class", spec)
    if isinstance(target, type):
        return [m for m in holder.modules() if isinstance(m, target)]
    for name, module in holder.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in ("layer", "layers", "h", "blocks"):
            return list(module)
    return []


def embeds(model: PreTrainedModel) -> bool:
    """Whether ``model`` holds the input embeddings."""
    try:
        return model.get_input_embeddings() is not None
    except (NotImplementedError, AttributeError):
        return False


def source(module: nn.Module) -> str:
    """The text of a module's forward; empty where there is none to read."""
    return _source(type(module))


@cache
def _source(kind: type[nn.Module]) -> str:
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return ""


def hands_on(module: nn.Module, call: str) -> bool:
    """Whether a forward passes its ``**kwargs`` to ``call``; read from the source, as transformers does in such
    questions."""
    return bool(re.search(r"\*\*\w+", source(module).partition(call)[2]))


def returns_residual_state(layer: nn.Module, block: nn.Module) -> bool:
    """Post-LN layers of BERT's kind: one of the layer's two norms lies within the attention block, after its
    residual."""
    norms = [m for m in layer.modules() if isinstance(m, nn.LayerNorm)]
    if len(norms) != 2 or norms[0].weight is None or norms[0].weight.shape != norms[1].weight.shape:
        return False
    return sum(m in norms for m in block.modules()) == 1


def linear_size(module: nn.Module) -> int:
    """Weights of all linear maps below ``module``: its MACs per token."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def layer_cost(layer: nn.Module, block: str, config) -> LayerCost:
    """MACs of one layer per token and per pair of tokens."""
    attention = linear_size(layer.get_submodule(block))
    head_dim = getattr(config, "head_dim", None)
    width = config.hidden_size if head_dim is None else head_dim * config.num_attention_heads
    return LayerCost(attention, linear_size(layer) - attention, width)
