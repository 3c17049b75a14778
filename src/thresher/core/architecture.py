"""Find the layers of any transformers model, and what must be known of them. No registry of architectures."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from . import compat
from .cost import LayerCost
from .pictures import find_reader, placeholders

PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")


@dataclass(frozen=True, eq=False)
class Architecture:
    """The layers of a model and what they can do."""

    name: str  # class of the model that was given to ``prune``
    base: PreTrainedModel  # the innermost model that holds the layers; it is given the 2-D mask
    layers: list[nn.Module]  # each once
    depth: int  # layer calls of one forward: more than ``len(layers)`` where layers are shared
    block: str  # name of the attention block within a layer
    # where tokens leave: before the FFN of their layer, as the attention block returns the state after the residual, or
    # after the layer
    drops_inside: bool
    shows_inputs: bool  # the block hands its keyword arguments to the attention function, which then sees the site
    passes_arguments: bool  # the layer hands its keyword arguments to the block
    relative: bool  # positions enter as a bias between pairs, which packed rows cannot carry
    binary_mask: bool  # the block reads its attention mask as 0/1, whatever the type
    causal: bool  # a decoder
    causal_by_default: bool  # attention takes the absence of a mask for causal, as sdpa does of a silent module
    arguments: list[str]  # names of the layer's arguments, the hidden states first
    costs: tuple[LayerCost, ...]  # MACs of each layer call
    first_site: int  # tokens may leave from this layer on
    last_site: int  # to this one
    reads_first_only: bool  # the head reads the first token alone
    protected: tuple[int, ...]  # the model's own special tokens, as positions among the live tokens
    max_tokens: int | None  # positions that the model has; None: it does not say
    hidden: int  # channels C of a state
    reader: PreTrainedModel | None = None  # the model that puts pictures or sounds into the input of ``base``
    placeholders: dict[str, int] = field(default_factory=dict)  # the token id of each kind of them

    @classmethod
    def sketch(cls, name: str, depth: int) -> Architecture:
        """Describe a model of which no more than its depth is known, to read what a checkpoint says of its pruning."""
        flags = ("drops_inside", "shows_inputs", "passes_arguments", "relative", "binary_mask", "causal")
        unknown: dict[str, Any] = dict.fromkeys((*flags, "causal_by_default", "reads_first_only"), False)
        unknown |= {"base": None, "block": "", "layers": [], "arguments": [], "costs": (), "protected": ()}
        return cls(name=name, depth=depth, first_site=0, last_site=depth - 1, max_tokens=None, hidden=0, **unknown)

    @property
    def text(self) -> bool:
        """Whether the model reads token ids."""
        return self.base.main_input_name == "input_ids"

    @property
    def enterable(self) -> bool:
        """Whether tokens may leave before the first layer: those of pictures and sounds; of a sketch nobody knows."""
        return self.base is None or bool(self.placeholders) or not self.text

    @property
    def packable(self) -> bool:
        """Whether packed rows fit the layers."""
        return self.shows_inputs and self.passes_arguments and not self.relative and self.reader is None

    def check_words(self, ids: Tensor) -> None:
        """Raise ValueError where token ``ids`` stand for pictures or sounds, which are not there."""
        found = set(ids.flatten().tolist()) & {*self.placeholders.values()}
        if found:
            raise ValueError(
                f"the prompt holds placeholders of pictures or sounds (id {min(found)}), which cannot be read from "
                "token ids: give one of text alone"
            )

    def fits(self, other: Architecture) -> bool:
        """Whether what a method learned for one model fits the other."""
        facts = ("name", "depth", "first_site", "last_site", "protected", "max_tokens", "hidden", "costs", "causal")
        return all(getattr(self, fact) == getattr(other, fact) for fact in facts)

    @property
    def finds_answers(self) -> bool:
        """Whether the head finds an answer in the text."""
        return self.name.endswith("ForQuestionAnswering")


def find_architecture(model: PreTrainedModel) -> Architecture:
    """Find the layers of ``model``; of an encoder-decoder, the encoder's; of a model that reads pictures or sounds, the
    language model's.

    Raises:
        ValueError: no layers, no attention block in them, or more than one stack was found.
    """
    reader, language = find_reader(model) or (None, model)
    base, layers = find_layers(language)
    layer, arguments = layers[0], list(inspect.signature(layers[0].forward).parameters)
    name = attention_block(layer)
    block = layer.get_submodule(name)
    groups = getattr(base.config, "num_hidden_groups", None)  # ALBERT calls the same few layers again and again
    depth = base.config.num_hidden_layers * base.config.inner_group_num if groups else len(layers)
    cores = [m for m in block.modules() if compat.calls_attention_interface(m)]
    check_alike(layers, name, bool(cores))
    inside = returns_residual_state(layer, block)
    decodes = reader is not None and not getattr(language.config, "is_encoder_decoder", False)
    causal = decodes or any(getattr(m, "is_causal", False) is True for m in block.modules())
    text, head = base.main_input_name == "input_ids", type(model).__name__
    mixes = any(getattr(m, "conv", None) is not None for m in (base, getattr(base, "encoder", None)))
    return Architecture(
        name=head,
        base=base,
        layers=layers,
        depth=depth,
        block=name,
        drops_inside=inside,
        shows_inputs=bool(cores) and compat.hands_on(cores[0], compat.ATTENTION_CALL),
        passes_arguments=compat.hands_on(layer, f"self.{name}("),
        relative=any(argument in arguments for argument in ("relative_pos", "position_bias")),
        binary_mask=any(compat.reads_binary_mask(m) for m in block.modules()),
        causal=causal,
        causal_by_default=bool(getattr(cores[0], "is_causal", True)) if cores else causal,
        arguments=arguments,
        costs=tuple(layer_cost(layers[i % len(layers)], name, base.config) for i in range(depth)),
        first_site=int(text and mixes),  # DeBERTa may mix neighbours after its first layer: none may leave there
        last_site=depth - 1 if inside else depth - 2,
        reads_first_only=text and not causal and head.endswith("ForSequenceClassification"),
        protected=special_positions(base, text, causal),
        max_tokens=getattr(base.config, "max_position_embeddings", None),
        hidden=base.config.hidden_size,
        reader=reader,
        placeholders={} if reader is None else placeholders(reader.config),
    )


def find_layers(model: PreTrainedModel) -> tuple[PreTrainedModel, list[nn.Module]]:
    """The model that holds the layers, and the layers; of an encoder-decoder, the encoder's."""
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
        paths = {id(m): path for path, m in model.named_modules()}
        names = ", ".join(f"{paths[id(m)] or 'the model itself'} ({type(m).__name__})" for m in inner)
        raise ValueError(
            f"{type(model).__name__} holds several stacks of layers: {names}. Prune one of these sub-models, as in "
            f"prune(model.{paths[id(inner[0])]}, ...)"
        )
    return inner[0], layers_of(inner[0])


def check_alike(layers: list[nn.Module], name: str, shows: bool) -> None:
    """Raise ValueError where a layer mixes tokens otherwise than by attention, or otherwise than the first one."""
    for number, layer in enumerate(layers):
        block = dict(layer.named_children()).get(name)
        if block is None or shows != any(compat.calls_attention_interface(m) for m in block.modules()):
            raise ValueError(
                f"layer {number} ({type(layer).__name__}) has no attention block like {name!r} of layer 0: tokens "
                "that leave would change what its other mixing (convolution, state space, linear attention) "
                "gives their neighbours; such hybrid models cannot be pruned"
            )
        mixers = {type(m).__name__ for m in layer.modules() if isinstance(m, nn.Conv1d) and m.kernel_size[0] > 1}
        if mixers:
            raise ValueError(
                f"layer {number} ({type(layer).__name__}) mixes neighbouring tokens by a convolution beside its "
                "attention: tokens that leave would change it; such models cannot be pruned"
            )


def attention_block(layer: nn.Module) -> str:
    """The name of the attention block within a layer."""
    names = [n for n, m in layer.named_children() if re.search("attn|attention", n) and linear_size(m)]
    if not names:
        raise ValueError(
            f"no attention block was found in {type(layer).__name__}: expected a child named like attn or attention"
        )
    return names[0]


def special_positions(base: PreTrainedModel, text: bool, causal: bool) -> tuple[int, ...]:
    """The model's own special tokens, as positions among the live tokens."""
    if text:
        return (-1,) if causal else (0,)
    return tuple(range(prefix_length(base)))


def prefix_length(tower: nn.Module) -> int:
    """How many class, distillation and register tokens come before the patches."""
    prefix = [p for n, p in tower.named_parameters() if n.rpartition(".")[2] in PREFIX_TOKENS]
    return sum(p.shape[1] if p.dim() == 3 else 1 for p in prefix)


def layers_of(holder: PreTrainedModel) -> list[nn.Module]:
    """The transformer layers in ``holder``, by transformers' own record of them, else by the usual names of lists."""
    target = compat.recorded_layer_class(holder)
    if target is not None:
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


def returns_residual_state(layer: nn.Module, block: nn.Module) -> bool:
    """Post-LN layers of BERT's kind: one of the two norms lies within the attention block, after its residual."""
    norms = [m for m in layer.modules() if isinstance(m, nn.LayerNorm)]
    if len(norms) != 2 or norms[0].weight is None or norms[0].weight.shape != norms[1].weight.shape:
        return False
    return sum(m in norms for m in block.modules()) == 1


def linear_size(module: nn.Module) -> int:
    """Weights of all linear maps below ``module``: its MACs per token. Those that torch quantized give theirs when
    called."""
    plain = sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Linear, compat.Conv1D)))
    known: list[Any] = [*module.modules()]
    quantized = [m for m in known if callable(getattr(m, "weight", None)) and hasattr(m, "in_features")]
    return plain + sum(m.in_features * m.out_features for m in quantized)


def layer_cost(layer: nn.Module, block: str, config) -> LayerCost:
    """MACs of one layer per token and per pair of tokens."""
    attention = linear_size(layer.get_submodule(block))
    known = (getattr(m, "head_dim", None) for m in layer.get_submodule(block).modules())
    head_dim = next((size for size in known if isinstance(size, int)), None)
    heads: Any = getattr(config, "num_attention_heads", None)
    if head_dim is not None and not isinstance(heads, int):
        raise ValueError(
            f"{type(config).__name__} names no single number of attention heads, so its layers differ in width: such "
            "hierarchical models cannot be pruned"
        )
    width = config.hidden_size if head_dim is None else head_dim * heads
    return LayerCost(attention, linear_size(layer) - attention, width)
