"""The bodies of requests and answers: those of Text Embeddings Inference 1.9, OpenAI and Cohere.

A body becomes an ``Order``: the rows that it asks for, and what becomes of their numbers. Works without a server and
without a model. What is wrong with a body is a ``Refusal``, in the words that clients of these servers know.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .engine import Outline
from .inputs import is_text
from .score import judged

STATUS = {"Validation": 422, "Tokenizer": 422, "Empty": 400, "Backend": 424, "Overloaded": 429, "Unhealthy": 503}
PREDICTED = (
    "a string, a pair of strings [string, string] "
    "or a batch of mixed strings and pairs [[string], [string, string], ...]"
)
COMPATIBLE = ("/v1/", "/v2/", "/embeddings")  # routes whose errors have the shape of OpenAI's


class Refusal(Exception):
    """Say why there is no answer.

    Attributes:
        kind: the error type of the wire.
        status: the HTTP status; default: that of the kind.
        label: how it is counted.
        wait: seconds after which to try again.
    """

    def __init__(self, kind: str, message: str, label: str = "validation", *, status: int = 0, wait: int = 0):
        super().__init__(message)
        self.kind, self.message, self.label = kind, message, label
        self.status, self.wait = status or STATUS[kind], wait

    def body(self, path: str) -> dict[str, Any]:
        """The answer, in the shape of the route."""
        if path.startswith(COMPATIBLE):
            return {"message": self.message, "code": self.status, "type": self.kind, "error_type": self.kind}
        return {"error": self.message, "error_type": self.kind}


@dataclass
class Order:
    """Say what a request wants.

    Attributes:
        rows: (text,), (text, text) or a list of token ids, one for each row of the model.
        answer: from the values (n, K) fp32 and the number of tokens to what is sent.
        single: it is one text, and not a batch.
        truncate: whether to cut what is too long.
        side: at which side it is cut, "right" or "left".
        prompt: the name of what is put before every text.
    """

    rows: list[Any]
    answer: Callable[[np.ndarray, int], Any]
    single: bool = False
    truncate: bool = True
    side: str = "right"
    prompt: str | None = None

    @property
    def characters(self) -> int:
        """Characters of all texts; tokens, where these were sent."""
        return sum(sum(map(len, row)) if isinstance(row, tuple) else len(row) for row in self.rows)


@dataclass(frozen=True)
class Wire:
    """Read bodies for a model.

    Attributes:
        about: the model.
        name: how it is called in answers.
        most: texts in one request.
    """

    about: Outline
    name: str
    most: int

    # --- Text Embeddings Inference ----------------------------------------------------------------------------------
    def predict(self, body: Body) -> Order:
        """POST /predict: labels and scores of a text, a pair, or a batch of both."""
        rows, single = predicted(body.get("inputs"))
        raw = body.flag("raw_scores", False)
        self.count(len(rows))
        self.need("classifier", "reranker", message="Model is not a classifier model")
        labels = [str(self.about.config.id2label[i]) for i in range(self.about.config.num_labels)]

        def answer(values: np.ndarray, tokens: int) -> Any:
            scores = self.scores(values, raw).tolist()
            found = [
                sorted(
                    ({"score": x, "label": label} for x, label in zip(row, labels, strict=True)),
                    key=lambda one: -one["score"],
                )
                for row in scores
            ]
            return found[0] if single else found

        return Order(rows, answer, single, **body.cutting())

    def rerank(self, body: Body) -> Order:
        """POST /rerank: scores of texts for a query, best first; with ``documents`` in the shape of Cohere's."""
        if "documents" in body.fields and "texts" not in body.fields:
            return self.documents(body, lambda text: text)
        query, texts = body.text("query"), body.texts("texts")
        raw, back = body.flag("raw_scores", False), body.flag("return_text", False)
        if not texts:
            raise Refusal("Empty", "`texts` cannot be empty")
        self.need("reranker", message="model is not a re-ranker model")
        self.count(len(texts))

        def answer(values: np.ndarray, tokens: int) -> Any:
            return [
                {"index": i, **({"text": texts[i]} if back else {}), "score": score}
                for i, score in self.ranked(values, raw)
            ]

        return Order([(query, text) for text in texts], answer, **body.cutting())

    def embed(self, body: Body) -> Order:
        """POST /embed: a list of vectors."""
        rows, single = given(body.get("inputs"), "inputs")
        plain, size = body.flag("normalize", True), body.count("dimensions")
        self.embeds(rows, single)

        def answer(values: np.ndarray, tokens: int) -> Any:
            return shortened(values, size, plain).tolist()

        return Order(rows, answer, single, prompt=body.maybe("prompt_name"), **body.cutting())

    def similarity(self, body: Body) -> Order:
        """POST /similarity: the cosines of sentences with one."""
        inputs = Body(body.mapping("inputs"))
        source, sentences = inputs.text("source_sentence"), inputs.texts("sentences")
        if not sentences:
            raise Refusal("Empty", "`inputs.sentences` cannot be empty")
        self.embeds([source, *sentences], False)
        more = Body(body.mapping("parameters") if body.fields.get("parameters") is not None else {})

        def answer(values: np.ndarray, tokens: int) -> Any:
            vectors = shortened(values, None, True)
            return (vectors[1:] @ vectors[0]).tolist()

        return Order(
            [(text,) for text in (source, *sentences)], answer, prompt=more.maybe("prompt_name"), **more.cutting()
        )

    # --- OpenAI and Cohere ------------------------------------------------------------------------------------------
    def openai(self, body: Body) -> Order:
        """POST /v1/embeddings: vectors as numbers, or as little-endian fp32 in base64."""
        rows, single = given(body.get("input"), "input")
        form, size = body.maybe("encoding_format") or "float", body.count("dimensions")
        if form not in ("float", "base64"):
            raise Refusal("Validation", f"`encoding_format`: unknown variant `{form}`, expected `float` or `base64`")
        self.embeds(rows, single)

        def answer(values: np.ndarray, tokens: int) -> Any:
            vectors = shortened(values, size, True)
            if form == "float":
                made: Sequence[Any] = vectors.tolist()
            else:
                made = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
            return {
                "object": "list",
                "data": [{"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(made)],
                "model": self.name,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }

        return Order(rows, answer, single)

    def rerank_v1(self, body: Body) -> Order:
        """POST /v1/rerank: as Cohere's first version, and Jina's."""
        return self.documents(body, lambda text: {"text": text})

    def rerank_v2(self, body: Body) -> Order:
        """POST /v2/rerank: as Cohere's second version."""
        return self.documents(body, lambda text: {"text": text})

    def documents(self, body: Body, shown: Callable[[str], Any]) -> Order:
        """Scores of documents for a query, best first, ``top_n`` of them; ``shown`` makes what is handed back."""
        query, texts = body.text("query"), documented(body.get("documents"))
        top, back, raw = body.count("top_n"), body.flag("return_documents", False), body.flag("raw_scores", False)
        if not texts:
            raise Refusal("Empty", "`documents` cannot be empty")
        self.need("reranker", message="model is not a re-ranker model")
        self.count(len(texts))

        def answer(values: np.ndarray, tokens: int) -> Any:
            results = [
                {"index": i, "relevance_score": score, **({"document": shown(texts[i])} if back else {})}
                for i, score in self.ranked(values, raw)
            ]
            return {
                "id": str(uuid.uuid4()),
                "results": results[:top],
                "model": self.name,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
                "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
            }

        return Order([(query, text) for text in texts], answer, **body.cutting())

    # --- what they share --------------------------------------------------------------------------------------------
    def need(self, *kinds: str, message: str) -> None:
        """Raise Refusal for another kind of model."""
        if self.about.kind not in kinds:
            raise Refusal("Backend", f"Backend error: {message}", "model_type")

    def count(self, texts: int) -> None:
        """Raise Refusal for more texts than one request may have."""
        if texts > self.most:
            message = f"batch size {texts} > maximum allowed batch size {self.most}"
            raise Refusal("Validation", message, "batch_size")

    def embeds(self, rows: list[Any], single: bool) -> None:
        """Raise Refusal where a batch of texts cannot be embedded."""
        if not rows:
            raise Refusal("Empty", "`inputs` cannot be empty")
        if not single:
            self.count(len(rows))
        self.need("embedding", message="Model is not an embedding model")

    def scores(self, values: np.ndarray, raw: bool) -> np.ndarray:
        """(n, K) scores out of logits."""
        return values if raw else judged(values, self.about.config)

    def ranked(self, values: np.ndarray, raw: bool) -> list[tuple[int, float]]:
        """The texts by their number, with their scores, best first."""
        scores = self.scores(values, raw)[:, 0].tolist()
        best = sorted(range(len(scores)), key=lambda i: -values[i, 0])  # not by scores, of which several may be 1.0
        return [(i, scores[i]) for i in best]


@dataclass
class Body:
    """Read the fields of a body; those that nobody asks for are passed by, as are those that are null."""

    fields: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, data: bytes) -> Body:
        """Read JSON. Raises Refusal."""
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            what = "too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
            raise Refusal("Validation", f"Failed to parse the request body as JSON: {what}", status=400) from None
        if not isinstance(found, dict):
            raise Refusal("Validation", f"the request body is {named(found)}: expected an object")
        return cls(found)

    def get(self, name: str) -> Any:
        """Any value."""
        if self.fields.get(name) is None:
            raise Refusal("Validation", f"missing field `{name}`")
        return self.fields[name]

    def text(self, name: str) -> str:
        """One text."""
        return checked(self.get(name), name, "a string")

    def texts(self, name: str) -> list[str]:
        """Any number of texts."""
        return listed(self.get(name), name)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object."""
        value = self.get(name)
        if not isinstance(value, dict):
            raise Refusal("Validation", f"`{name}` is {named(value)}: expected an object")
        return value

    def maybe(self, name: str) -> str | None:
        """A text, or none."""
        return None if self.fields.get(name) is None else self.text(name)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.fields.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise Refusal("Validation", f"`{name}` is {named(value)}: expected a boolean")
        return value

    def count(self, name: str) -> int | None:
        """A whole number above 0, or none."""
        value = self.fields.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise Refusal("Validation", f"`{name}` is {named(value)}: expected a whole number of 1 or more")
        return value

    def cutting(self) -> dict[str, Any]:
        """Whether, and at which side, texts are cut."""
        side = (self.maybe("truncation_direction") or "Right").lower()
        if side not in ("left", "right"):
            message = f"`truncation_direction`: unknown variant `{side}`, expected `Left` or `Right`"
            raise Refusal("Validation", message)
        return {"truncate": self.flag("truncate", True), "side": side}


def named(value: Any) -> str:
    """What a value of JSON is."""
    if isinstance(value, (list, dict, str)):
        return {list: "a list", dict: "an object", str: "a string"}[type(value)]
    return json.dumps(value)[:40]


def checked(value: Any, name: str, expected: str) -> str:
    """A text. Raises Refusal for what is none."""
    if isinstance(value, str) and not is_text(value):
        raise Refusal("Validation", f"`{name}` holds half of a character (a lone surrogate)")
    if not isinstance(value, str):
        raise Refusal("Validation", f"`{name}` is {named(value)}: expected {expected}")
    return value


def listed(value: Any, name: str) -> list[str]:
    """Texts. Raises Refusal for what is no list of them."""
    if not isinstance(value, list):
        raise Refusal("Validation", f"`{name}` is {named(value)}: expected a list of strings")
    return [checked(one, name, "a list of strings") for one in value]


def is_ids(value: Any) -> bool:
    """Whether a value is a list of token ids."""
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def predicted(value: Any) -> tuple[list[Any], bool]:
    """The rows of /predict, and whether they are one text, or pair, alone."""
    wrong = Refusal("Validation", f"`inputs`: expected {PREDICTED}")
    if isinstance(value, str):
        return [(checked(value, "inputs", PREDICTED),)], True
    if not isinstance(value, list) or not value:
        raise wrong
    if isinstance(value[0], str):
        if len(value) > 2:
            raise wrong
        return [tuple(checked(one, "inputs", PREDICTED) for one in value)], True
    if not all(isinstance(one, list) and 1 <= len(one) <= 2 for one in value):
        raise wrong
    return [tuple(checked(text, "inputs", PREDICTED) for text in one) for one in value], False


def given(value: Any, name: str) -> tuple[list[Any], bool]:
    """The rows of /embed, and whether they are one text alone: a text, token ids, or a list of both."""
    if isinstance(value, str):
        return [(checked(value, name, "a string"),)], True
    if is_ids(value):
        return [value], True
    if not isinstance(value, list):
        raise Refusal("Validation", f"`{name}` is {named(value)}: expected a string, token ids, or a list of them")
    expected = "a list of strings or of lists of token ids"
    return [one if is_ids(one) else (checked(one, name, expected),) for one in value], False


def documented(value: Any) -> list[str]:
    """The texts of documents, which are strings or objects with a text."""
    if not isinstance(value, list):
        raise Refusal("Validation", f"`documents` is {named(value)}: expected a list of strings or objects with `text`")
    texts = [one.get("text") if isinstance(one, dict) else one for one in value]
    return [checked(one, "documents", "a list of strings or objects with `text`") for one in texts]


def shortened(values: np.ndarray, size: int | None, normalize: bool) -> np.ndarray:
    """(n, D) the first ``size`` numbers of vectors, of length 1 if asked for. Raises Refusal for a size above D."""
    if size is not None:
        if size > values.shape[1]:
            message = f"`dimensions` should be positive and at most {values.shape[1]}. Given: {size}"
            raise Refusal("Validation", message)
        values = values[:, :size]
    if not normalize:
        return values
    lengths = np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
    return (values / np.maximum(lengths, 1e-12)).astype(np.float32)
