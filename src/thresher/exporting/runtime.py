"""Run what ``export`` wrote, in its runtime: texts in, labels, answers, ranks or vectors out.

Shapes: B batch, N tokens, K classes, C channels.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.compat import instructions, open_exported
from ..data import qa
from ..data.embedder import PROMPTED, Prompt
from ..data.files import reading
from ..data.scores import judged, settle_activation
from .shapes import check_lengths


class Runtime:
    """An exported model; ``runtime(texts)`` gives what a transformers pipeline would, ``rank`` and ``encode`` what a
    CrossEncoder and a SentenceTransformer would.

    Attributes:
        spec: what thresher.json says: format, precision, pruning, max_length, ...
        config: the model's configuration, with its labels.
        lengths: widths to which batches are padded, rising; empty: each to its longest text.
    """

    def __init__(self, exported: Any, tokenizer: Any, spec: dict, lengths: Iterable[int] = ()):
        self.exported, self.tokenizer, self.spec, self.config = exported, tokenizer, spec, exported.config
        self.lengths = sorted(lengths)
        self.answers, self.embeds = spec["architecture"].endswith("ForQuestionAnswering"), "pooling" in spec

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """logits (B, K), start_logits and end_logits (B, N) or sentence_embedding (B, C), of input_ids, ... (B, N).

        What may be left out: ``token_type_ids``, they are 0, as in the model; ``attention_mask``, all are tokens; and
        ``pooling_mask``, all of them are pooled.

        Raises:
            ValueError: the graph would drop token types that are not 0.
        """
        takes, kinds = self.spec["inputs"], inputs.get("token_type_ids")
        if kinds is None and "token_type_ids" in takes:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        if PROMPTED in takes and PROMPTED not in inputs:
            inputs[PROMPTED] = inputs["attention_mask"]
        dropped = kinds is not None and "token_type_ids" not in takes and getattr(self.config, "type_vocab_size", 0) > 1
        if dropped and kinds is not None and kinds.any():
            raise ValueError("this graph was exported for a tokenizer without token_type_ids: it would drop them")
        output = self.exported(**{name: value.long() for name, value in inputs.items() if name in takes})
        one = "sentence_embedding" if self.embeds else "logits"
        names = ("start_logits", "end_logits") if self.answers else (one,)
        return {name: torch.as_tensor(output[name]) for name in names}

    def width(self, longest: int) -> int:
        """The width of a batch whose longest text has so many tokens."""
        at = bisect.bisect_left(self.lengths, longest)
        return self.lengths[at] if at < len(self.lengths) else longest

    def __call__(
        self, texts: str | Sequence[str], pairs: str | Sequence[str] | None = None, *, batch_size: int = 32
    ) -> list[dict] | dict:
        """{"label", "score"} of each text, or pair of texts; of a model that answers questions ``texts`` are the
        questions, ``pairs`` the paragraphs, and it is {"answer", "score", "start", "end"}. One text gives one.

        Texts are run in batches of neighbours in length. What is over ``max_length`` is cut; paragraphs are read in
        several windows.
        """
        if self.embeds:
            raise ValueError("this is an embedder, which gives texts no labels: call encode(texts)")
        self._check_tokenizer()
        one = isinstance(texts, str)
        texts = [texts] if isinstance(texts, str) else texts
        pairs = [pairs] if isinstance(pairs, str) else pairs
        if self.answers and pairs is None:
            raise ValueError("a model that answers questions needs paragraphs: runtime(questions, paragraphs)")
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts and {len(pairs)} pairs: expected as many of both")
        if not texts:
            return []
        if self.answers and pairs is not None:
            found = self._answer(texts, pairs, batch_size)
        else:
            found = self._classify(texts, pairs, batch_size)
        return found[0] if one else found

    def encode(self, texts: str | Sequence[str], *, prompt_name: str | None = None, batch_size: int = 32) -> np.ndarray:
        """(N, C) fp32: the vectors of texts, (C,) that of one; ``prompt_name``: of what the model sets before them,
        default: what its folder names, mostly nothing.

        Raises:
            ValueError: the model is no embedder, or has no such prompt.
        """
        if not self.embeds:
            raise ValueError(f"{self.spec['architecture']} gives no vectors: encode() needs an exported embedder")
        self._check_tokenizer()
        prompts, name = self.spec.get("prompts") or {}, prompt_name or self.spec.get("default_prompt")
        if prompt_name is not None and prompt_name not in prompts:
            raise ValueError(f"prompt_name={prompt_name!r}: the model has {', '.join(prompts) or 'no prompts'}")
        one = isinstance(texts, str)
        texts = [texts] if isinstance(texts, str) else texts
        if not texts:
            return np.zeros((0, self.spec.get("size", self.config.hidden_size)), np.float32)
        pooled = self.spec["pooling"].get("include_prompt", True)
        prompt = Prompt.of(prompts.get(name or "", ""), pooled, self.tokenizer, self.spec["max_length"])
        rows = self._encoded([prompt.text + text for text in texts])
        if not pooled:
            rows = [{**row, PROMPTED: prompt.mask(len(row["input_ids"]))} for row in rows]
        vectors = torch.stack([output["sentence_embedding"] for output in self._run(rows, batch_size)]).float().numpy()
        return vectors[0] if one else vectors

    def rank(
        self, query: str, texts: Sequence[str], *, top_k: int | None = None, return_text: bool = False, **options: Any
    ) -> list[dict]:
        """{"index", "score"} of the ``top_k`` texts (all) that answer a query best, the best first; and "text" where it
        is asked for. The score is that of a CrossEncoder: by the function that its folder names, else the logit's
        sigmoid; the number itself of a model that was trained for numbers (``data.scores.judged``).

        Raises:
            ValueError: the model does not give one number, or the query alone is as long as it takes.
        """
        if self.embeds or self.answers or self.config.num_labels != 1:
            what = "vectors" if self.embeds else "answers" if self.answers else f"{self.config.num_labels} classes"
            raise ValueError(f"{self.spec['architecture']} gives {what}: rank() needs a model of one number")
        self._check_tokenizer()
        if not texts:
            return []
        tokens, most = len(self.tokenizer(query)["input_ids"]), self.spec["max_length"]
        if tokens >= most:
            raise ValueError(f"the query has {tokens} tokens, the model takes {most}: there is no room for a text")
        outputs = self._run(self._encoded([query] * len(texts), texts), **{"batch_size": 32, **options})
        logits = torch.stack([output["logits"][0] for output in outputs]).float()
        scores = judged(logits[:, None], self.config)[:, 0].tolist()  # of which several may be 1.0
        best = sorted(range(len(texts)), key=lambda i: -logits[i].item())[:top_k]
        return [{"index": i, "score": scores[i], **({"text": texts[i]} if return_text else {})} for i in best]

    def _check_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise ValueError("this model was exported without its tokenizer: call forward(input_ids=..., ...)")

    def _encoded(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[dict]:
        """Tokenized rows, none too long."""
        both = [list(texts)] if pairs is None else [list(texts), list(pairs)]
        encoded = self.tokenizer(*both, truncation="longest_first", max_length=self.spec["max_length"])
        return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]

    def _run(self, rows: list[dict], batch_size: int) -> list[dict[str, Tensor]]:
        """The outputs of tokenized rows, in their order."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
        found: list = [None] * len(rows)
        for i in range(0, len(order), batch_size):
            chosen = order[i : i + batch_size]
            width = self.width(len(rows[chosen[0]]["input_ids"]))
            masks = [rows[j].pop(PROMPTED) for j in chosen if PROMPTED in rows[j]]
            side = "right" if self.answers else None  # spans count from the first token
            form = {"padding": "max_length", "max_length": width, "padding_side": side, "return_tensors": "pt"}
            inputs = self.tokenizer.pad([rows[j] for j in chosen], **form)
            if masks:
                inputs[PROMPTED] = padded_masks(masks, inputs["attention_mask"])
            outputs = self.forward(**inputs)
            for k, j in enumerate(chosen):
                found[j] = {name: x[k] for name, x in outputs.items()}
        return found

    def _classify(self, texts: Sequence[str], pairs: Sequence[str] | None, batch_size: int) -> list[dict]:
        rows = self._encoded(texts, pairs)
        labels, found = self.config.id2label, []
        for output in self._run(rows, batch_size):
            scores = judged(output["logits"].float(), self.config)
            best = int(scores.argmax())
            found.append({"label": labels[best], "score": float(scores[best])})
        return found

    def _answer(self, questions: Sequence[str], paragraphs: Sequence[str], batch_size: int) -> list[dict]:
        from datasets import Dataset

        nothing: list[dict] = [{"text": [], "start": []}] * len(questions)
        data = Dataset.from_dict({"question": [*questions], "context": [*paragraphs], "answers": nothing})
        cut, _ = qa.windows(data, self.tokenizer, self.spec["max_length"])
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in cut.column_names]
        outputs = self._run([{name: row[name] for name in names} for row in cut], batch_size)
        logits = [
            torch.stack([o["start_logits"], o["end_logits"]])[:, : len(r["input_ids"])].float().numpy()
            for o, r in zip(outputs, cut, strict=True)
        ]
        return [{n: x for n, x in span.items() if n != "logit"} for span in qa.best_spans(logits, cut)]


def padded_masks(masks: Sequence[list[int]], attention_mask: Tensor) -> Tensor:
    """(B, N) masks of texts, each where ``attention_mask`` (B, N) has its tokens."""
    found = torch.zeros_like(attention_mask)
    found[attention_mask.bool()] = torch.as_tensor([one for mask in masks for one in mask]).to(found)
    return found


def load_runtime(folder: str | Path, *, threads: int | None = None, lengths: Iterable[int] = ()) -> Runtime:
    """Open what ``export`` wrote, in onnxruntime, OpenVINO or ExecuTorch.

    Args:
        threads: of the runtime; default: torch's number of threads now.
        lengths: widths to which batches are padded, as in (32, 64, 128, 256): a runtime that pays for shapes it has not
            seen sees few of them.

    Raises:
        ValueError: the folder holds no exported model, or one that does not take texts of ``lengths``.
        ImportError: the runtime is not installed.

    Example:
        >>> classify = load_runtime("runs/reviews-onnx")
        >>> first, second = classify(["Wonderful acting.", "Far too long."])
        >>> best = load_runtime("runs/ranker-onnx").rank("who wrote it?", passages, top_k=3)
        >>> vectors = load_runtime("runs/embedder-onnx").encode(passages)
    """
    try:
        spec = json.loads((Path(folder) / "thresher.json").read_text())
        kind, _ = spec["format"], spec["precision"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{folder} holds no exported model (thresher export makes one)"
        if any(Path(folder).glob("*.safetensors")):
            raise ValueError(f"{what}, but one of torch: open that with from_pretrained and prune()") from None
        raise ValueError(f"{what}: {error}") from None
    lengths = tuple(lengths)
    if lengths:
        check_lengths(lengths, spec["max_length"])
    try:
        exported, names = _opened(Path(folder), spec, threads or torch.get_num_threads())
    except ImportError as error:
        extra = {"executorch": "mobile"}.get(kind, kind)
        raise ImportError(f"running {folder} needs pip install 'thresher-pruning[{extra}]': {error}") from error
    if "pooling" not in spec:
        settle_activation(str(folder), exported.config)
    tokenizer = None
    if (Path(folder) / "tokenizer_config.json").exists():
        from transformers import AutoTokenizer

        tokenizer = reading(AutoTokenizer.from_pretrained, str(folder))
    return Runtime(exported, tokenizer, spec | {"inputs": names}, lengths)


def _opened(folder: Path, spec: dict, threads: int) -> tuple[Any, Sequence[str]]:
    """The model in a folder, ready to run, and the names of its inputs."""
    if spec["format"] == "executorch":
        from .mobile import Program

        return Program(folder, spec, threads), spec["inputs"]
    return open_exported(str(folder), **_options(spec["format"], spec["precision"], threads))


def _options(kind: str, precision: str, threads: int) -> dict[str, Any]:
    """What the runtime is told: its threads and the precision of what is not int8."""
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads, session.log_severity_level = threads, 3
        # threads that go on spinning between calls take the cores from whatever else runs: another session, torch
        session.add_session_config_entry("session.force_spinning_stop", "1")
        return {"session_options": session}
    import openvino  # noqa: F401  to say early that it is missing

    # OpenVINO computes in bf16 by itself where the processor is made for it; fp32 has to be asked for, and what is not
    # int8 in an int8 graph, which transformers' exporter marks as fp32, released from it
    hint = {"fp32": "f32", "bf16": "bf16", "int8": "bf16" if "AMX" in instructions() else "f32"}[precision]
    return {"config": {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint}}
