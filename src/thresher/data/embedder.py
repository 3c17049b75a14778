"""A text embedder: a transformers model, the pooling of its states, and their length.

Folders are those of sentence-transformers, which need not be installed.

Shapes: B batch, N tokens, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from ..api import CONFIG_KEY, MODULE, unprune
from ..core.pruner import POOLINGS, PUT_BACK, SURVIVORS
from .files import find_file, read_json, reading
from .models import opened, positions

MODULES, POOLING, TEXTS, MODEL = (
    "modules.json",
    "config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
KINDS = {"Transformer", "Pooling", "Dense", "Normalize"}  # modules of sentence-transformers that are understood
WEIGHTS, LINEAR, RESIDUAL = "model.safetensors", "linear", "residual"  # of a Dense module
ACTIVATIONS = {  # of a Dense module; a name chooses one of these and is never run
    f"torch.nn.modules.{where}.{kind.__name__}": kind
    for where, kinds in {
        "activation": (nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Mish, nn.LeakyReLU, nn.ELU),
        "linear": (nn.Identity,),
    }.items()
    for kind in kinds
}
TANH = next(iter(ACTIVATIONS))  # where a folder says nothing
FLAGS = {  # of its older folders
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
USUAL = 512  # tokens of a text, where nobody says
NAMES = (
    "_name_or_path",
    "architectures",
    "dtype",
    "transformers_version",
    CONFIG_KEY,
)  # of a configuration; change nothing
PROMPTED = "pooling_mask"  # the input, and the column, that leave a prompt out of the pooling


@dataclass(frozen=True)
class Pooling:
    """One vector of the states of a text.

    Attributes:
        mode: "mean", "max", "cls" (the first token) or "lasttoken".
        normalize: whether an embedder gives the vector the length 1 at the end.
        include_prompt: whether the tokens of a prompt, and those before it, are pooled as well.
    """

    mode: str = "mean"
    normalize: bool = True
    include_prompt: bool = True

    def __post_init__(self) -> None:
        if self.mode not in FLAGS.values():
            raise ValueError(f"pooling {self.mode!r} is not understood: {', '.join(FLAGS.values())} are")

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """(B, C) of states (B, N, C); ``mask`` (B, N): what each token weighs, 0 where it is none."""
        weight = mask[..., None].to(states.dtype)
        if self.mode == "mean":
            vector = (states * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        elif self.mode == "max":
            vector = states.masked_fill(weight == 0, torch.finfo(states.dtype).min).amax(1)
        else:
            place = torch.arange(mask.shape[1], device=mask.device) * (mask != 0)
            place = place.argmax(1) if self.mode == "lasttoken" else (mask != 0).long().argmax(1)
            vector = states.gather(1, place[:, None, None].expand(-1, -1, states.shape[-1]))[:, 0]
        return vector


@dataclass(frozen=True)
class Prompt:
    """What stands before a text, and how many tokens at its beginning are read and not pooled."""

    text: str = ""
    tokens: int = 0

    def mask(self, length: int) -> list[int]:
        """Return (length,) 1 for each token that is pooled, else 0."""
        return [int(place >= self.tokens) for place in range(length)]

    @classmethod
    def of(cls, text: str, pooled: bool, tokenizer: Any, longest: int) -> Prompt:
        """Measure a prompt; ``pooled``: whether its tokens are pooled.

        As in sentence-transformers, its tokens are those of the prompt alone, without a special one at their end.
        """
        if pooled or not text:
            return cls(text)
        ids = tokenizer(text, truncation=True, max_length=longest, verbose=False)["input_ids"]
        return cls(text, len(ids) - (bool(ids) and ids[-1] in tokenizer.all_special_ids))


class Projection(nn.Module):
    """A Dense module of sentence-transformers: (B, C) -> (B, D), a linear layer, an activation, and what it was given
    on top where ``residual`` says so."""

    def __init__(self, given: int, size: int, bias: bool = True, activation: str = "", residual: bool = False):
        super().__init__()
        self.linear, self.name = nn.Linear(given, size, bias), activation or TANH
        self.activation: nn.Module = ACTIVATIONS[self.name]()
        self.residual = None if not residual else nn.Identity() if given == size else nn.Linear(given, size, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        found = self.activation(self.linear(vectors))
        return found if self.residual is None else found + self.residual(vectors)

    def save(self, folder: Path) -> None:
        """Write it as sentence-transformers does."""
        folder.mkdir(exist_ok=True)
        known = {
            "in_features": self.linear.in_features,
            "out_features": self.linear.out_features,
            "bias": self.linear.bias is not None,
            "activation_function": self.name,
            **({"use_residual": True} if self.residual is not None else {}),
        }
        (folder / POOLING).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS)

    @classmethod
    def load(cls, model: str, path: str) -> Projection:
        """Read it from a folder, or the hub. Raises ValueError for one that is not understood."""
        said, weights = read_json(model, f"{path}/{POOLING}") or {}, find_file(model, f"{path}/{WEIGHTS}")
        name = said.get("activation_function", TANH)
        if name not in ACTIVATIONS:
            known = ", ".join(each.rpartition(".")[2] for each in ACTIVATIONS)
            raise ValueError(f"{model}: the activation {name!r} in {path} is not understood: {known} of torch.nn are")
        names = {said.get(f"module_{way}_name") or "sentence_embedding" for way in ("input", "output")}
        if names != {"sentence_embedding"} or weights is None or not {"in_features", "out_features"} <= {*said}:
            what = f"{path} has no {WEIGHTS}" if weights is None else f"{path} projects something else than the vector"
            raise ValueError(f"{model}: {what}: a linear layer of the vector in safetensors is understood")
        sizes = said["in_features"], said["out_features"], said.get("bias", True)
        layer = cls(*sizes, name, bool(said.get("use_residual")))
        try:
            layer.load_state_dict(load_file(weights))
        except RuntimeError as error:
            raise ValueError(f"{model}: the weights in {path} are not those of its {POOLING}: {error}") from None
        return layer


@dataclass
class EmbeddingOutput(ModelOutput):
    """Hold ``sentence_embedding`` (B, C), the states (B, N, C) that were pooled and what each weighed (B, N)."""

    sentence_embedding: Tensor | None = None
    last_hidden_state: Tensor | None = None
    token_mask: Tensor | None = None


class Embedder(nn.Module):
    """A transformers model, pruned or not, and its pooling; ``prune``, ``unprune`` and ``dense`` take it.

    Where its method pools survivors (``TopK(pooling="survivors")``), the tokens that are left at the end are pooled
    alone; else all, those that left with their last states. Of a text of which nothing is left but a prompt that is not
    pooled, all but the prompt is.

    Attributes:
        longest: tokens at which texts are cut.
        prompts: by name, what stands before a text.
        default_prompt: the name of that which stands before a text where none is named; None: nothing does.
        projections: what the pooled vector goes through before it gets its length.
        vectors_alone: whether the states are left out of its output.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pooling: Pooling | None = None,
        longest: int = USUAL,
        prompts: Mapping[str, str] | None = None,
        projections: Iterable[Projection] = (),
    ):
        super().__init__()
        self.projections = nn.ModuleList(projections)
        self.model, self.pooling, self.longest = model, pooling or Pooling(), longest
        self.prompts, self.default_prompt, self.vectors_alone = dict(prompts or {}), cast("str | None", None), False

    main_input_name = "input_ids"

    @property
    def config(self) -> Any:
        """The configuration of its transformers model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.model.dtype

    @property
    def size(self) -> int:
        """How many numbers a vector has."""
        last: Any = self.projections[-1] if len(self.projections) else None
        return self.config.hidden_size if last is None else last.linear.out_features

    @property
    def pools_all(self) -> bool:
        """Whether all states are pooled, so that it matters which of them are."""
        return self.pooling.mode in ("mean", "max")

    @property
    def token_pruner(self) -> Any:
        """The method that prunes it, None where nothing does."""
        return getattr(self.model, MODULE, None)

    def prompt(self, tokenizer: Any, max_length: int, *names: str) -> Prompt:
        """Return what stands before a text: the first of the named prompts that there is, nothing where none is; where
        none is named, that by default."""
        named = names or (self.default_prompt,)
        text = next((self.prompts[name] for name in named if name in self.prompts), "")
        return Prompt.of(text, self.pooling.include_prompt, tokenizer, max_length)

    def get_base_model(self) -> PreTrainedModel:
        """Return the transformers model that ``prune`` takes."""
        return self.model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pooling_mask: Tensor | None = None,
        **inputs: Any,
    ) -> EmbeddingOutput:
        """Embed a batch of texts (B, N); ``pooling_mask`` (B, N): 1 for each token that is pooled (default: all)."""
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        states = output.last_hidden_state
        mask = getattr(output, "token_mask", None)
        if mask is not None and not self.pools_all:
            raise ValueError(
                f"pooling='survivors' says nothing of an embedder that pools one token ({self.pooling.mode}): leave it "
                "out"
            )
        every = states.new_ones(states.shape[:2]) if attention_mask is None else attention_mask
        mask = every if mask is None else mask
        if pooling_mask is not None:
            left, own = mask * pooling_mask, every * pooling_mask
            mask = torch.where((left != 0).any(1, keepdim=True), left, own.to(left.dtype))
        vectors = self.pooling(states, mask)
        for projection in self.projections:
            vectors = projection(vectors)
        vectors = F.normalize(vectors, dim=-1) if self.pooling.normalize else vectors
        return EmbeddingOutput(vectors) if self.vectors_alone else EmbeddingOutput(vectors, states, mask)

    def save_pretrained(self, folder: str | Path, tokenizer: Any) -> None:
        """Write a folder that ``load_embedder`` and sentence-transformers read."""
        folder = Path(folder)
        self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        names = ["Transformer", "Pooling", *["Dense"] * len(self.projections), *["Normalize"] * self.pooling.normalize]
        paths = ["", *(f"{i}_{name}" for i, name in enumerate(names) if i)]
        kind = "sentence_transformers.models."
        files: dict[str, Any] = {
            MODULES: [
                {"idx": i, "name": str(i), "path": path, "type": kind + name}
                for i, (name, path) in enumerate(zip(names, paths, strict=True))
            ],
            TEXTS: {"max_seq_length": self.longest, "do_lower_case": False},
            MODEL: {
                "prompts": self.prompts,
                "default_prompt_name": self.default_prompt,
                "similarity_fn_name": "cosine",
            },
            f"1_Pooling/{POOLING}": {
                "word_embedding_dimension": self.config.hidden_size,
                **{flag: mode == self.pooling.mode for flag, mode in FLAGS.items()},
                "include_prompt": self.pooling.include_prompt,
            },
        }
        for path, content in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        for projection, path in zip(self.projections, paths[2:], strict=False):
            cast("Projection", projection).save(folder / path)
        for path in paths[2:]:
            (folder / path).mkdir(exist_ok=True)


def facts_of(model: Any) -> dict[str, Any]:
    """All but weights and pruning that the answers of a model, or an embedder, and their time hang on, for JSON."""
    inner = model.model if isinstance(model, Embedder) else model
    config = {name: value for name, value in inner.config.to_dict().items() if name not in NAMES}
    facts: dict[str, Any] = {"classes": [type(model).__name__, type(inner).__name__], "config": config}
    if isinstance(model, Embedder):
        facts |= {"pooling": asdict(model.pooling), "longest": model.longest}
        facts |= {"projections": [repr(one) for one in model.projections]}
    return json.loads(json.dumps(facts, default=str))


def best_pooling(net: Embedder, judge: Callable[[], float]) -> dict[str, Any]:
    """Leave a pruned embedder with the pooling that is judged best, "put-back" where both are alike.

    Returns:
        "chosen", and "judged": of both poolings what ``judge`` says, which reads the embedder as it is then.
    """
    judged = {}
    for way in POOLINGS:
        net.token_pruner.pooling = way
        judged[way] = judge()
    chosen = SURVIVORS if judged[SURVIVORS] > judged[PUT_BACK] else PUT_BACK
    net.token_pruner.pooling = chosen
    return {"chosen": chosen, "judged": judged}


def is_embedder(model: str) -> bool:
    """Whether a folder, or a name on the hub, is an embedder of sentence-transformers."""
    try:
        modules = read_json(model, MODULES)
    except ValueError:
        return False
    return bool(modules) and any(_kind(module) == "Pooling" for module in modules)


def load_embedder(model: str, layout: str = "auto", pooling: str | None = None, **options: Any) -> tuple[Embedder, Any]:
    """Return a saved embedder and its tokenizer: in evaluation mode, pruned if its configuration says so.

    Args:
        model: a folder or a name on the hub, of sentence-transformers; or of a plain transformers model with
            ``pooling``.
        pooling: "mean", "cls", "max" or "lasttoken", normalised; where the folder says nothing of it.
        options: as ``AutoModel.from_pretrained`` takes them.

    Raises:
        ValueError: no such model, one that cannot be read, says nothing of its pooling or has modules that are not
            understood.
    """
    modules = read_json(model, MODULES)
    if modules is None and pooling is None:
        raise ValueError(
            f"{model} does not say how its states are pooled (no {MODULES}): name it, as in pooling='mean', or "
            "train it as an embedder first"
        )
    way, where, longest = Pooling(pooling or "mean"), model, None
    prompts: dict[str, str] = {}
    default = None
    if modules is not None:
        way, path = _pooling_of(model, modules)
        where = str(Path(model) / path) if path and Path(model).is_dir() else model
        if path and where == model:
            options["subfolder"] = path
        longest = (read_json(model, "/".join(filter(None, (path, TEXTS)))) or {}).get("max_seq_length")
        prompts, default = _prompts_of(model)
    dense = [module["path"] for module in modules or () if _kind(module) == "Dense"]
    layers = [Projection.load(model, path) for path in dense]
    net = opened(lambda: reading(AutoModel.from_pretrained, where, **options), model, layout)
    if net.main_input_name != "input_ids":
        raise ValueError(f"{model} is a {type(net).__name__}, which reads {net.main_input_name} and no text")
    subfolder = {"subfolder": options["subfolder"]} if "subfolder" in options else {}
    tokenizer = reading(AutoTokenizer.from_pretrained, where, **subfolder)
    most = [limit for limit in (longest, positions(net), tokenizer.model_max_length) if limit]
    layers = [layer.to(net.device, net.dtype) for layer in layers]
    embedder = Embedder(net, way, min(most, default=USUAL), prompts, layers)
    embedder.default_prompt = default
    return embedder.eval(), tokenizer


def default_prompt_of(model: str, tokenizer: Any, max_length: int) -> Prompt:
    """Return what a folder, or the hub, says that stands before every text; nothing for what is no embedder."""
    modules = read_json(model, MODULES)
    if not modules:
        return Prompt()
    prompts, name = _prompts_of(model)
    return Prompt.of(prompts.get(name or "", ""), _pooling_of(model, modules)[0].include_prompt, tokenizer, max_length)


def _prompts_of(model: str) -> tuple[dict[str, str], str | None]:
    """The prompts of an embedder by name, and the name of that which stands before every text."""
    said = read_json(model, MODEL) or {}
    known = (said.get("prompts") or {}) if isinstance(said, dict) else None
    if not isinstance(known, dict) or not all(isinstance(text, (str, type(None))) for text in known.values()):
        raise ValueError(f"{model}: {MODEL} holds no prompts: expected an object with a text for each name")
    prompts = {name: text or "" for name, text in known.items()}
    default = said.get("default_prompt_name")
    if default is not None and default not in {*prompts, "query", "document"}:  # these two are there without a text
        known = ", ".join(prompts) or "none"
        raise ValueError(f"{model}: {MODEL} names the prompt {default!r} as default_prompt_name, and has {known}")
    return prompts, default


def embedder_for(
    model: str,
    *,
    dropout: float | None = None,
    freeze_embeddings: bool = False,
    layers: int | None = None,
    again: bool = False,
    learns: bool = True,
) -> Embedder:
    """Return an embedder to train, in fp32; arguments as those of ``models.for_task``.

    Raises:
        ValueError: as ``load_embedder``; or the checkpoint is pruned; or ``layers`` are asked for.
    """
    if layers is not None:
        raise ValueError(f"layers={layers}: an embedder is trained with all its layers")
    on_cpu: dict[str, Any] = {"attn_implementation": "eager"} if learns and not torch.cuda.is_available() else {}
    net, _ = load_embedder(model, dtype=torch.float32, **on_cpu)
    if net.token_pruner is not None:
        if not again:
            raise ValueError(f"{model} is pruned already: train from its dense model")
        unprune(net)
    for module in net.modules():
        if isinstance(module, nn.Dropout) and dropout is not None:
            module.p = dropout
    embeddings = [part for name, part in net.model.named_children() if "embedding" in name]
    for part in [net.model.get_input_embeddings(), *embeddings] if freeze_embeddings else ():
        part.requires_grad_(False)
    return net


def config_of(model: str) -> Any:
    """The configuration of the transformers model of an embedder."""
    modules = read_json(model, MODULES)
    path = _pooling_of(model, modules)[1] if modules else ""
    if path and Path(model).is_dir():
        return reading(AutoConfig.from_pretrained, str(Path(model) / path))
    return reading(AutoConfig.from_pretrained, model, **({"subfolder": path} if path else {}))


def _kind(module: Mapping) -> str:
    """The last name of a module's type."""
    return str(module.get("type", "")).rpartition(".")[2]


def _pooling_of(model: str, modules: list) -> tuple[Pooling, str]:
    """How the states are pooled, and the folder of the transformers model."""
    kinds = [_kind(module) for module in modules]
    strange = [kind for kind in kinds if kind not in KINDS]
    last = kinds[2:-1] if kinds[-1:] == ["Normalize"] else kinds[2:]
    if strange or kinds[:2] != ["Transformer", "Pooling"] or {*last} - {"Dense"}:
        what = f"a module {strange[0]}" if strange else " and ".join(kinds)
        expected = "a transformer, its pooling, Dense modules and a normalisation at the end are understood"
        raise ValueError(f"{model} has {what}: {expected}")
    said = read_json(model, f"{modules[1]['path']}/{POOLING}") or {}
    modes = said.get("pooling_mode", [mode for flag, mode in FLAGS.items() if said.get(flag)] or "mean")
    modes = [modes] if isinstance(modes, str) else list(modes)
    unknown = [name for name, on in said.items() if name.startswith("pooling_mode_") and on and name not in FLAGS]
    if len(modes) != 1 or unknown:
        what, one = ", ".join(unknown or modes), ", ".join(FLAGS.values())
        raise ValueError(f"{model} joins or weighs states ({what}): one of {one} is understood")
    return Pooling(modes[0], "Normalize" in kinds, said.get("include_prompt") is not False), modules[0]["path"]
