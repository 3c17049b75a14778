"""An opened model: texts become rows of tokens, and rows become rows of numbers. Files and requests share it.

Shapes: N texts, B rows of a batch, K logits or D numbers of an embedding.
"""

from __future__ import annotations

import copy
import ctypes
import inspect
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from ..core.cost import dense_macs, macs
from ..core.pruner import TokenPruner, pruner_of
from ..data.embedder import PROMPTED, Prompt, config_of, is_embedder, load_embedder
from ..data.files import reading
from ..data.models import clip, load, name_of, positions
from ..data.scores import settle_activation
from ..exporting.runtime import load_runtime
from .batching import BUDGET, WINDOW, Batcher
from .inputs import is_text

HEAD = "ForSequenceClassification"
CHUNK = 512  # texts that are tokenized at once
TIDY = 8  # batches after which free memory is handed back
LONGEST = 512  # tokens of a text, where nobody says
SPEC = "thresher.json"
Row = dict[str, np.ndarray]  # the inputs of one text, each (n,) int32, without padding


@dataclass
class Tally:
    """Count what was done: texts, those without an answer, those that were cut; tokens, alone and padded; MACs, used
    and those of the dense model, of pruned models in torch."""

    rows: int = 0
    unread: int = 0
    cut: int = 0
    tokens: int = 0
    padded: int = 0
    macs_used: int = 0
    macs_dense: int = 0

    def __add__(self, other: Tally) -> Tally:
        mine, its = asdict(self), asdict(other)
        return Tally(**{name: mine[name] + its[name] for name in mine})


@dataclass(frozen=True)
class Outline:
    """What a folder says of a model before its weights are read.

    Attributes:
        kind: "classifier" of several labels, "reranker" of one number, "embedding".
        graph: whether it is an exported model.
        spec: what thresher.json says.
    """

    model: str
    kind: str
    config: Any
    graph: bool
    spec: dict[str, Any]


@dataclass(frozen=True)
class Opening:
    """Say how a model is opened: see ``Scorer`` for the fields."""

    model: str
    max_length: int | None = None
    layout: str = "auto"
    threads: int | None = None
    device: str = "cpu"

    def open(self) -> Engine:
        """Return the opened model.

        Raises:
            ValueError: no such model, one that neither classifies nor embeds, or options that it does not take.
        """
        if self.threads:
            torch.set_num_threads(self.threads)
        about = outline(self.model)
        return open_graph(self, about) if about.graph else open_torch(self, about)


class Encoder:
    """Turn texts into rows of tokens; several threads may use one encoder.

    A fast tokenizer keeps its truncation as a state, which must not change while another thread is in it. There is
    therefore a copy for each way to cut, and none is changed after its first use.

    Attributes:
        longest: where texts are cut.
        names: the inputs that the model takes.
        vocabulary: how many tokens there are.
    """

    def __init__(self, tokenizer: Any, longest: int, names: Sequence[str], vocabulary: int):
        self.tokenizer, self.longest, self.names, self.vocabulary = tokenizer, longest, names, vocabulary
        self._copies: dict[str | None, Any] = {}
        self._lock = threading.Lock()

    def _copy(self, side: str | None) -> Any:
        """The tokenizer that cuts at this side ("right", "left"), or never (None)."""
        with self._lock:
            if side not in self._copies:
                made = copy.deepcopy(self.tokenizer)
                made.truncation_side = side or "right"
                made("a", **self._options(side))  # from here on its state stays
                self._copies[side] = made
            return self._copies[side]

    def _options(self, side: str | None) -> dict[str, Any]:
        cut = {"truncation": "longest_first", "max_length": self.longest} if side else {"truncation": False}
        return cut | {"verbose": False}

    def prompt(self, text: str) -> Prompt:
        """What stands before a text, measured."""
        return Prompt.of(text, PROMPTED not in self.names, self._copy("right"), self.longest)

    def __call__(
        self, texts: Sequence[list[str]], side: str | None = "right", before: str = ""
    ) -> tuple[list[Row], int]:
        """The rows of N texts with a prompt ``before`` each, or of pairs (a list for each side of them), and how many
        were cut."""
        tokenizer, prompt = self._copy(side), self.prompt(before)
        texts = [[before + text for text in texts[0]]] if before else texts
        encoded = tokenizer(*texts, **self._options(side))
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded and name in self.names]
        if side is None:
            cut = 0
        elif encoded.encodings is not None:
            cut = sum(bool(row.overflowing) for row in encoded.encodings)
        else:  # a tokenizer written in Python
            cut = sum(len(ids) > self.longest for ids in tokenizer(*texts, verbose=False)["input_ids"])
        end = tokenizer.eos_token_id or tokenizer.pad_token_id or 0
        empty = {"input_ids": [end], "token_type_ids": [0]}
        rows = [
            {name: np.array(ids or empty[name], np.int32) for name, ids in zip(names, row, strict=True)}
            for row in zip(*(encoded[name] for name in names), strict=True)
        ]
        if PROMPTED in self.names:
            for row in rows:
                row[PROMPTED] = np.array(prompt.mask(len(row["input_ids"])), np.int32)
        return rows, cut

    def of_ids(self, ids: Sequence[int], side: str | None) -> Row:
        """The row of a text that comes as tokens, cut as a text is."""
        kept = ids if side is None else ids[: self.longest] if side == "right" else ids[-self.longest :]
        row = {"input_ids": np.array(kept, np.int32)}
        if "token_type_ids" in self.names and "token_type_ids" in self.tokenizer.model_input_names:
            row["token_type_ids"] = np.zeros(len(kept), np.int32)
        if PROMPTED in self.names:
            row[PROMPTED] = np.ones(len(kept), np.int32)
        return row

    def pieces(self, text: str, special: bool) -> list[dict[str, Any]]:
        """The tokens of a text, uncut: id, text, whether it is a special one, and where it stands.

        Raises:
            ValueError: the tokenizer does not tell where.
        """
        encoded = self._copy(None)(text, add_special_tokens=special, truncation=False, verbose=False)
        if encoded.encodings is None:
            raise ValueError("the tokenizer of this model does not tell where its tokens stand")
        (one,) = encoded.encodings
        found = []
        for number, token, kind, (start, stop) in zip(
            one.ids, one.tokens, one.special_tokens_mask, one.offsets, strict=True
        ):
            place = {"start": None, "stop": None} if kind else {"start": start, "stop": stop}
            found.append({"id": number, "text": token if kind else text[start:stop], "special": bool(kind), **place})
        return found


class Engine:
    """An opened model: ``forward`` from tensors (B, N) to one row of numbers a text (B, K), with its encoder.

    Attributes:
        about: what the folder says of it.
        encode: the encoder.
        width: of a batch whose longest text has so many tokens.
        device: where the inputs go.
        precision: of the weights.
        pruner: the method of a pruned model in torch.
        batches: of files and frames, so far.
        pooling, prompts: how an embedder makes one vector of a text, and what stands before a text, by name.
        default_prompt: the name of that which stands before a text where none is named.
    """

    def __init__(self, about: Outline, forward: Callable[..., torch.Tensor], encode: Encoder, precision: str):
        self.about, self.config, self.forward = about, about.config, forward
        self.encode, self.precision = encode, precision
        self.width: Callable[[int], int] = int
        self.device = torch.device("cpu")
        self.pruner: TokenPruner | None = None
        self.batches = 0
        self.pooling: str | None = None
        self.prompts: dict[str, str] = {}
        self.default_prompt: str | None = None

    @cached_property
    def size(self) -> int:
        """K, the numbers of one answer."""
        if self.about.kind == "embedding":
            return int(self.run(self.encode([["a"]])[0])[0].shape[1])
        return int(self.config.num_labels)

    def before(self, name: str | None) -> str:
        """The prompt of that name, by default that which stands before every text. Raises ValueError for another."""
        if name is not None and name not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise ValueError(f"prompt={name!r}: {self.about.model} has no prompt of that name (it has: {known})")
        return self.prompts.get(name or self.default_prompt or "", "")

    def answers(
        self,
        texts: Sequence[Sequence[Any]],
        tokens: int = BUDGET,
        told: Callable[[int], Any] | None = None,
        prompt: str | None = None,
    ) -> tuple[np.ndarray, np.ndarray, Tally]:
        """(N, K) fp32, NaN where a text is no string; (N,) whether there is an answer; and what it took.

        No more than ``WINDOW`` texts are held as tokens at a time. Batches depend on the texts alone. ``prompt``: the
        name of what stands before each.
        """
        before = self.before(prompt)
        count, waiting = len(texts[0]), Batcher(tokens)
        answered = np.array([all(map(is_text, row)) for row in zip(*texts, strict=True)], bool)
        values = np.full((count, self.size), np.nan, np.float32)
        tally, good = Tally(rows=count, unread=count - int(answered.sum())), np.flatnonzero(answered)

        def run() -> None:
            nonlocal tally
            rows, encoded = zip(*waiting.take(), strict=True)
            found, spent, _ = self.run(encoded)
            tally, values[list(rows)], self.batches = tally + spent, found, self.batches + 1
            if self.batches % TIDY == 0:
                tidy()
            if told:
                told(len(rows))

        for start in range(0, len(good), CHUNK):
            chosen = good[start : start + CHUNK]
            encoded, cut = self.encode([[column[row] for row in chosen] for column in texts], before=before)
            tally.cut += cut
            for row, one in zip(chosen, encoded, strict=True):
                waiting.add((row, one), len(one["input_ids"]))
            while len(waiting) >= WINDOW:
                run()
        while len(waiting):
            run()
        if told and tally.unread:
            told(tally.unread)
        wrong = np.flatnonzero(answered & ~np.isfinite(values).all(1))
        if len(wrong):
            text = texts[0][wrong[0]]
            raise ValueError(f"the model's answer to {text[:60]!r} is no number: score in float32, or repair the model")
        return values, answered, tally

    def run(self, encoded: Sequence[Row]) -> tuple[np.ndarray, Tally, np.ndarray | None]:
        """(B, K) fp32 of one batch, padded on the right; what it took; (B,) tokens of each row behind the last layer,
        None where the model does not tell."""
        lengths = np.array([len(one["input_ids"]) for one in encoded])
        width = self.width(int(lengths.max()))
        fill = {"input_ids": getattr(self.config, "pad_token_id", None) or 0}
        inputs = {name: np.full((len(encoded), width), fill.get(name, 0), np.int64) for name in encoded[0]}
        inputs["attention_mask"] = (np.arange(width) < lengths[:, None]).astype(np.int64)
        for i, one in enumerate(encoded):
            for name, values in one.items():
                inputs[name][i, : len(values)] = values
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(values).to(self.device) for name, values in inputs.items()}
            takes = self.encode.names
            found = self.forward(**{name: x for name, x in tensors.items() if name in takes}).float().cpu().numpy()
        spent = Tally(tokens=int(lengths.sum()), padded=len(encoded) * width)
        kept = None if self.about.graph else lengths
        if self.pruner is not None:
            record = self.pruner.last_record()
            spent.macs_used = int(macs(record.costs, record.counts).sum())
            spent.macs_dense = int(dense_macs(record.costs, torch.from_numpy(lengths)).sum())
            kept = record.kept()[-1].cpu().numpy()
        return found, spent, kept


def tidy() -> None:
    """Hand free memory back to the system, in the C library of GNU; others are left alone.

    Batches of ever new shapes leave holes, with which a process grows for hours. A threshold above which blocks are
    handed back at once, as the server has, keeps it flatter, but the pages of every block are then made anew: of large
    batches that is a quarter of the time.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def open_torch(how: Opening, about: Outline) -> Engine:
    """Open a transformers model, pruned if its configuration says so."""
    embeds = about.kind == "embedding"
    net: Any
    net, tokenizer = (load_embedder if embeds else load)(how.model, how.layout)
    try:
        net = net.to(how.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={how.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    base, answer = (net.model, "sentence_embedding") if embeds else (net, "logits")
    trained = (about.spec.get("task") or {}).get("max_length")
    usual = trained or (net.longest if embeds else min(LONGEST, positions(base) or LONGEST))
    accepted = {*inspect.signature(base.forward).parameters}
    names: list[str] = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in accepted]
    names += [PROMPTED] if embeds and not net.pooling.include_prompt else []
    vocabulary = base.get_input_embeddings().num_embeddings
    encode = Encoder(tokenizer, clip(how.max_length or usual, base.config), names, vocabulary)
    engine = Engine(about, lambda **inputs: getattr(net(**inputs), answer), encode, name_of(base.dtype))
    engine.device, engine.pruner = base.device, pruner_of(base)
    if embeds:
        engine.pooling, engine.prompts, engine.default_prompt = net.pooling.mode, dict(net.prompts), net.default_prompt
    return engine


def open_graph(how: Opening, about: Outline) -> Engine:
    """Open what ``export`` wrote."""
    longest = about.spec["max_length"]
    if how.max_length and how.max_length > longest:
        raise ValueError(f"max_length={how.max_length}: {how.model} was exported for {longest} tokens at most")
    if how.device != "cpu":
        raise ValueError(f"device={how.device!r}: exported models run on the cpu")
    runtime = load_runtime(how.model, threads=how.threads)
    if runtime.tokenizer is None:
        raise ValueError(f"{how.model} was exported without its tokenizer: export it with one")
    answer = "sentence_embedding" if about.kind == "embedding" else "logits"
    names: list[str] = ["input_ids", "attention_mask", "token_type_ids"]
    names += [PROMPTED] if PROMPTED in runtime.spec["inputs"] else []
    vocabulary = getattr(runtime.config, "vocab_size", None) or len(runtime.tokenizer)
    encode = Encoder(runtime.tokenizer, how.max_length or longest, names, vocabulary)
    engine = Engine(about, lambda **inputs: runtime.forward(**inputs)[answer], encode, about.spec["precision"])
    engine.width = runtime.width
    if about.kind == "embedding":
        engine.pooling, engine.prompts = about.spec["pooling"]["mode"], dict(about.spec["prompts"])
        engine.default_prompt = about.spec.get("default_prompt")
    return engine


def outline(model: str) -> Outline:
    """Read what a folder, or the hub, says of a model.

    Raises:
        ValueError: it cannot be read, or neither classifies nor embeds; transformers would give such a model a random
            head.
    """
    spec = _spec(model)
    graph = "format" in spec
    if "pooling" in spec if graph else is_embedder(model):
        config = reading(AutoConfig.from_pretrained, model) if graph else config_of(model)
        return Outline(model, "embedding", config, graph, spec)
    config = reading(AutoConfig.from_pretrained, model)
    names = [spec["architecture"]] if graph else config.architectures or ()
    if not any(name.endswith(HEAD) for name in names):
        what = ", ".join(names) or "a model of no known architecture"
        raise ValueError(
            f"{model} is {what}: expected a classifier, a model of one number (...{HEAD}) or an embedder, a folder of "
            "sentence-transformers, whose modules.json says how states are pooled"
        )
    settle_activation(model, config)
    return Outline(model, "reranker" if config.num_labels == 1 else "classifier", config, graph, spec)


def _spec(model: str) -> dict[str, Any]:
    """What the folder says of itself."""
    try:
        return dict(json.loads((Path(model) / SPEC).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
