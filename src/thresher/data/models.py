"""Models from folders and the hub, for a task or for evaluation; whatever is wrong with one is told in one line."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from ..api import CONFIG_KEY, prune
from ..core.pruner import METHODS, TokenPruner
from .files import reading
from .scores import forget_activation, settle_activation
from .task import Task

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "classifier_dropout")
HEADS = ("ForSequenceClassification", "ForQuestionAnswering")
PROBLEMS = {"classification": "single_label_classification", "regression": "regression"}
PROBLEMS["reranking"] = (
    "multi_label_classification"  # whose loss is that of one label there or not, and score a sigmoid
)


def load(model: str, layout: str = "auto", **options) -> tuple[PreTrainedModel, Any]:
    """Return a saved classifier, or model that answers questions, and its tokenizer: in evaluation mode, in the
    precision of its checkpoint, pruned if its configuration says so.

    Raises:
        ValueError: no such model, one that cannot be read, or one without a head.
    """
    net = opened(lambda: open_model(model, **options), model, layout)
    known = reading(AutoConfig.from_pretrained, model).architectures or ()
    if known and not any(name.endswith(HEADS) for name in known):
        raise ValueError(
            f"{model} is {', '.join(known)}, whose head would be random: expected a model that classifies or answers "
            "questions, or an embedder, whose modules.json says how its states are pooled"
        )
    if type(net).__name__.endswith("ForSequenceClassification"):
        settle_activation(model, net.config)
    return net, reading(AutoTokenizer.from_pretrained, model)


def load_vision(model: str, layout: str = "auto") -> tuple[PreTrainedModel, Any]:
    """Return a saved model that reads pictures, and its image processor; else as ``load``.

    Raises:
        ValueError: no such model, one that cannot be read or reads no pictures, or a library that its image processor
            needs is missing.
    """
    known = reading(AutoConfig.from_pretrained, model).architectures or ()
    classifies = any(name.endswith("ForImageClassification") for name in known)
    kind = AutoModelForImageClassification if classifies else AutoModel
    net = opened(lambda: reading(kind.from_pretrained, model), model, layout)
    if net.main_input_name != "pixel_values":
        raise ValueError(f"{model} is a {type(net).__name__}, which reads {net.main_input_name} and no pictures")
    try:
        return net, reading(AutoImageProcessor.from_pretrained, model)
    except ImportError as error:
        needs = next(line.strip() for line in str(error).splitlines() if line.strip())
        raise ValueError(f"the image processor of {model} needs a library that is missing: {needs}") from error


def is_decoder(model: str) -> bool:
    """Whether a folder, or a name on the hub, is a decoder that generates text."""
    try:
        known = AutoConfig.from_pretrained(model).architectures or ()
    except Exception:  # of many kinds; whoever opens the model says what is wrong with it
        return False
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in known)


def load_decoder(model: str, layout: str = "auto") -> tuple[PreTrainedModel, Any]:
    """Return a saved decoder and its tokenizer; else as ``load``."""
    net = opened(lambda: reading(AutoModelForCausalLM.from_pretrained, model), model, layout)
    return net, reading(AutoTokenizer.from_pretrained, model)


def is_tagger(model: str) -> bool:
    """Whether a folder, or a name on the hub, is a model that gives each token a label."""
    try:
        known = AutoConfig.from_pretrained(model).architectures or ()
    except Exception:  # of many kinds; whoever opens the model says what is wrong with it
        return False
    return any(name.endswith("ForTokenClassification") for name in known)


def load_tagger(model: str, layout: str = "auto") -> tuple[PreTrainedModel, Any]:
    """Return a saved model that gives each token a label, and its tokenizer; else as ``load``."""
    if not is_tagger(model):
        raise ValueError(f"{model} gives no label to each token: expected a folder of a model ForTokenClassification")
    net = opened(lambda: reading(AutoModelForTokenClassification.from_pretrained, model), model, layout)
    return net, reading(AutoTokenizer.from_pretrained, model)


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a precision: float16."""
    return str(dtype).removeprefix("torch.")


def opened(opening: Callable[[], PreTrainedModel], model: str, layout: str) -> PreTrainedModel:
    """Return the model that ``opening`` gives, in the precision of its checkpoint, as its configuration prunes it."""
    with _without_report():
        net = opening()
    if net.dtype != torch.float32:
        own = name_of(net.dtype)
        what = f"{model} is saved in {own} and runs in it: its answers are not those of float32"
        warnings.warn(what, stacklevel=3)
    if getattr(net.config, CONFIG_KEY, None) is not None:
        prune(net, layout=layout)
    return net.eval()


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence transformers, which reports the pruner's weights as unexpected; ``prune`` reads them itself."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def open_model(model: str, *, answers: bool | None = None, **options) -> PreTrainedModel:
    """Return a sequence classifier from a folder or the hub as it lies there, or a model that ``answers`` questions
    (None: as its configuration says)."""
    if os.path.isdir(model) and not os.path.exists(os.path.join(model, "config.json")):
        raise ValueError(f"{model} holds no config.json: expected the folder of a saved transformers model")
    if answers is None:
        known = reading(AutoConfig.from_pretrained, model).architectures or ()
        answers = any(name.endswith("ForQuestionAnswering") for name in known)
    kind = AutoModelForQuestionAnswering if answers else AutoModelForSequenceClassification
    return reading(kind.from_pretrained, model, **options)


def for_task(
    model: str,
    task: Task,
    *,
    dropout: float | None = None,
    freeze_embeddings: bool = False,
    layers: int | None = None,
    again: bool = False,
    learns: bool = True,
) -> PreTrainedModel:
    """Return a model to train for ``task`` on the weights in ``model``, in fp32; a head of another size is made anew.

    Args:
        layers: take so many of the first layers alone.
        again: take the weights of a pruned checkpoint, without its pruning.
        learns: whether there are gradients; a model that only answers has the attention that is quickest forward.

    Raises:
        ValueError: the checkpoint is pruned, or cannot be read.
    """
    config, answers = reading(AutoConfig.from_pretrained, model), task.kind == "qa"
    if task.kind == "reranking" and config.num_labels == 1:
        settle_activation(model, config)
    else:  # it gets another head
        forget_activation(config)
    if answers:
        config.num_labels = 2  # start and end
    else:
        labels = task.labels or ["score"]
        config.num_labels = len(labels)
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
        config.problem_type = PROBLEMS[task.kind]
    for name in DROPOUTS:
        if dropout is not None and getattr(config, name, None) is not None:
            setattr(config, name, dropout)
    if getattr(config, CONFIG_KEY, None) is not None:
        if not again:
            raise ValueError(f"{model} is pruned already: train from its dense model")
        delattr(config, CONFIG_KEY)
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(f"layers={layers}: {model} has {config.num_hidden_layers}")
        config.num_hidden_layers = layers
    # The fused attention of CPUs has a slow backward: at 53 tokens, eager attention trains 2-3 times as fast.
    on_cpu = not torch.cuda.is_available()
    options: dict[str, Any] = {"attn_implementation": "eager"} if on_cpu and learns else {}
    if config.dtype not in (None, torch.float32):
        warnings.warn(f"{model} is saved in {name_of(config.dtype)}: it is trained in float32", stacklevel=2)
    options |= {"dtype": torch.float32, "ignore_mismatched_sizes": True}  # in fp16 AdamW's epsilon is 0
    with _without_report() if again else nullcontext():
        net = open_model(model, answers=answers, config=config, **options)
    net.get_input_embeddings().requires_grad_(not freeze_embeddings)
    if freeze_embeddings:
        for name, module in net.base_model.named_children():
            if "embedding" in name:
                module.requires_grad_(False)
    return net


def make_method(name: str, options: dict) -> TokenPruner:
    """Build a pruning method by name. Raises ValueError for an unknown name or option."""
    if name not in METHODS:
        raise ValueError(f"unknown pruning method {name!r}; known: {', '.join(sorted(METHODS))}")
    known = {field.name for field in fields(METHODS[name])}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"method {name} has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return METHODS[name](**options)


def clip(max_length: int, config) -> int:
    """Return ``max_length``, or the positions of the model with a warning where these are fewer."""
    limit = positions(config)
    if limit is not None and max_length > limit:
        warnings.warn(
            f"max_length={max_length} is more than the {limit} positions of the model; {limit} is used", stacklevel=2
        )
        return limit
    return max_length


def positions(model_or_config: Any) -> int | None:
    """Return the longest sequence that the position embeddings allow; None without a limit (relative positions)."""
    model, config = model_or_config, getattr(model_or_config, "config", model_or_config)
    if isinstance(model, PreTrainedConfig):
        with torch.device("meta"):  # no weights: only to see the tables
            model = AutoModel.from_config(config)
    tables = [m for n, m in model.named_modules() if n.endswith("position_embeddings") and hasattr(m, "num_embeddings")]
    if tables:  # RoBERTa and its kin count from padding_idx + 1: a table of 514 takes 512 tokens
        return min(t.num_embeddings - (0 if t.padding_idx is None else t.padding_idx + 1) for t in tables)
    limit = getattr(config, "max_position_embeddings", None) or 0  # XLNet's is -1, and DeBERTa-v3's is not used
    return limit if limit > 0 and getattr(config, "position_biased_input", True) else None


def is_reranker(config: Any) -> bool:
    """Tell whether a configuration is of a model that gives a pair one number, which orders candidates."""
    classifies = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    return classifies and config.num_labels == 1 and config.problem_type != "regression"


def class_names(model_or_config: Any) -> list[str] | None:
    """Return the classes of a model in their order: none of a model of numbers, None where it has no names for them."""
    classes: Any = getattr(model_or_config, "config", model_or_config).id2label
    names = [classes[i] for i in range(len(classes))]
    return [] if len(names) == 1 else names if not all(name.startswith("LABEL_") for name in names) else None
