"""A model, pruned or not, as a graph for ONNX Runtime, OpenVINO or ExecuTorch: tokens that leave are absent from it.

transformers' exporters do the work; here is what pruning adds: the layout that a graph can hold, inputs on which every
branch is traced, calibration of int8, and a check of the graph against the model on other shapes than the traced ones.

Shapes: B batch, N tokens; both stay open in the graph, but of ExecuTorch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..api import MODULE
from ..core.attachment import at_rest
from ..core.compat import graph_exporter
from ..core.pruner import token_pruner_of
from ..core.view import Widths
from ..data.embedder import PROMPTED, Embedder, facts_of
from ..data.models import positions
from ..evaluation.hardware import environment
from ..evaluation.rows import folder_written_whole
from .shapes import check_encoder, check_lengths, length_for, one_shape, outputs_of, row_of, spread, widths_of

HEADS = ("ForSequenceClassification", "ForQuestionAnswering")
FORMATS = {"onnx": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8"), "executorch": ("fp32", "int8")}
MOBILE = "executorch"  # of which a program takes one text at a time, of some lengths
SPEC = "thresher.json"
# At which a graph is compared with its model, besides the longest text; at the last one inexact remainders show.
SHAPES = ((1, 1), (1, 7), (3, 24), (2, 60), (1, 451))
CLOSE = 1e-4  # logits of an fp32 graph and of its model, where all tokens of both are the same


def export(
    model: PreTrainedModel | Embedder,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    format: str = "onnx",
    precision: str = "fp32",
    calibration: Iterable[dict[str, Tensor]] | None = None,
    max_length: int | None = None,
    lengths: Sequence[int] = (),
) -> dict[str, Any]:
    """Write ``model`` as a graph with open batch size and length, and what is needed to run it, into ``folder``.

    The folder gets the graph (``model.onnx``, ``openvino_model.xml`` or ``model.pte``), config.json, the tokenizer and
    thresher.json; ``load_runtime`` runs it, and so does the plain runtime. Thresholds and masks of trained methods are
    constants of the graph. The model is as before afterwards. An ExecuTorch program takes one text at a time: it has a
    method for each of some lengths, which share their weights.

    Args:
        model: a text model that classifies, ranks or answers questions, or an embedder, whose pooling is then part of
            the graph; pruned or not.
        tokenizer: saved with the graph, which takes the inputs that it makes; without one the graph takes all that the
            model tells apart, and ``load_runtime`` takes tensors alone.
        format, precision: "onnx", "openvino" or "executorch"; "fp32", "bf16" (in which OpenVINO computes), or "int8":
            weights per channel, activations dynamic (onnxruntime.quantization, XNNPACK) or static (nncf).
        calibration: batches of inputs, a few hundred examples of the training part: for int8 in OpenVINO, and in
            ExecuTorch for methods of which the data says how many tokens stay.
        max_length: tokens of the longest input to serve, default 512 or what the positions allow; for the check, and
            where ``load_runtime`` cuts.
        lengths: of ExecuTorch: one text at a time runs in the least of these lengths that has room for it; default: 32,
            64, 128, 256 and 512 as far as ``max_length`` goes.

    Returns:
        What thresher.json says; ``difference``: the largest one of logits, over random inputs of several shapes;
        ``megabytes``: of the graph; ``cut``: by length, the share of calibration texts of which tokens leave that would
        have stayed.

    Raises:
        ValueError: unknown format or precision, int8 in OpenVINO without calibration, another kind of model, a folder
            that holds something else than an exported model; the fp32 graph answers otherwise than the model.
        ImportError: a package is missing.
    """
    folder = Path(folder)
    _check_request(model, format, precision, calibration)
    _check_folder(folder)
    spec = _spec_of(model, format, precision, max_length)
    with padded_layout(model):
        exported = (_program if format == MOBILE else _graph)(model, tokenizer, spec, calibration, lengths)
        with folder_written_whole(folder, replace=True) as aside:
            exported.save_pretrained(aside)
            spec["megabytes"] = round(sum(file.stat().st_size for file in aside.iterdir()) / 1e6, 2)
            if tokenizer is not None:
                tokenizer.save_pretrained(aside)
            (aside / SPEC).write_text(json.dumps(spec, indent=1) + "\n")
            spec["difference"] = _checked(model, tokenizer, aside, spec)
            (aside / SPEC).write_text(json.dumps(spec, indent=1) + "\n")
            _check_folder(folder)  # what came there meanwhile is not ours to replace
    return spec


def _graph(
    model: PreTrainedModel | Embedder, tokenizer: Any, spec: dict[str, Any], calibration: Any, lengths: Sequence[int]
) -> Any:
    """The graph of a model for texts of any length."""
    if lengths:
        raise ValueError(f"lengths={tuple(lengths)}: a graph for {spec['format']} takes any; they are for {MOBILE}")
    inputs = inputs_of(model, tokenizer, 2, min(16, spec["max_length"]))
    batches = None if calibration is None else [completed(given, inputs) for given in calibration]
    with _quiet():
        exporter, config = graph_exporter(spec["format"], spec["precision"] == "int8", batches)
        return exporter.export(model, inputs, config=config)


def completed(given: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The inputs of a graph: what a batch does not say is as in the model, all are tokens of the first segment."""
    mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))
    usual = {"token_type_ids": torch.zeros_like(given["input_ids"])}
    return {name: given.get(name, usual.get(name, mask)) for name in names}


def _program(
    model: PreTrainedModel | Embedder, tokenizer: Any, spec: dict[str, Any], calibration: Any, lengths: Sequence[int]
) -> Any:
    """The program of a model for ExecuTorch; ``spec`` is told what it takes and gives."""
    from .mobile import lowered

    check_encoder(model)
    found = list(check_lengths(lengths, spec["max_length"]))
    widths, cut = widths_of(model, found, calibration)
    inputs = {n: inputs_of(model, tokenizer, 1, n) for n in found}
    outputs = outputs_of(model, inputs_of(model, tokenizer, 1, 2), inputs_of(model, tokenizer, 1, 3))
    spec |= {"max_length": found[-1], "lengths": found, "inputs": list(inputs[found[0]]), "outputs": dict(outputs)}
    spec |= {"widths": {str(n): each and list(each.slots) for n, each in widths.items()}}
    spec["cut"] = {str(n): share for n, share in cut.items()}
    with _quiet():
        return lowered(model, inputs, widths, spec["precision"] == "int8")


def _spec_of(model: PreTrainedModel | Embedder, format: str, precision: str, max_length: int | None) -> dict[str, Any]:
    """What thresher.json says of a graph before it is written."""
    pruner, usual = getattr(model, MODULE, None), model.longest if isinstance(model, Embedder) else 512
    longest = min(max_length or usual, positions(model) or math.inf)
    spec: dict[str, Any] = {
        "format": format,
        "precision": precision,
        "architecture": type(model).__name__,
        "pruning": None if pruner is None else pruner.to_dict(),
        "max_length": longest,
        **(
            {
                "pooling": asdict(model.pooling),
                "prompts": model.prompts,
                "default_prompt": model.default_prompt,
                "size": model.size,
            }
            if isinstance(model, Embedder)
            else {}
        ),
        "source": fingerprint(model),
        "versions": environment()["versions"],
    }
    return spec


def _check_request(model: PreTrainedModel | Embedder, format: str, precision: str, calibration: Any) -> None:
    """Raise ValueError for a graph that cannot be made."""
    token_pruner_of(model, "export")
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: expected {', '.join(FORMATS)}")
    if precision not in FORMATS[format]:
        reason = " (onnxruntime has no bf16 on processors)" if precision == "bf16" else ""
        raise ValueError(f"precision={precision!r}: {format} takes {', '.join(FORMATS[format])}{reason}")
    if precision == "int8" and format == "openvino" and not calibration:
        raise ValueError(
            "int8 in OpenVINO needs inputs to calibrate on: give calibration= (--data on the command line)"
        )
    serves = isinstance(model, Embedder) or type(model).__name__.endswith(HEADS)
    if model.main_input_name != "input_ids" or not serves:
        what = f"{type(model).__name__} reads {model.main_input_name}"
        raise ValueError(
            f"{what}: models of tokens are exported that classify or answer questions ({', '.join(HEADS)}), and "
            "embedders (thresher.data.embedder.load_embedder)"
        )


def _checked(model: PreTrainedModel | Embedder, tokenizer: Any, folder: Path, spec: dict[str, Any]) -> float:
    """The largest difference of logits; ValueError where an fp32 graph answers otherwise than its model."""
    longest = spec["max_length"]
    least = 1 if _separator(model) is None else 3  # tokens, two of them the query
    each = [(1, n) for length in spec.get("lengths", ()) for n in (max(1, length * 3 // 4), length)]
    shapes = [shape for shape in (*SHAPES, *each) if least <= shape[1] <= longest] + [(1, longest)]
    difference = _difference(model, tokenizer, folder, shapes)
    if spec["precision"] == "fp32" and not difference <= CLOSE:  # nor where it is no number
        raise ValueError(
            f"{type(model).__name__} cannot be exported: the {spec['format']} graph answers otherwise than the model "
            f"(logits differ by {difference:.2g}, expected {CLOSE} at most); nothing was written"
        )
    return difference


def _separator(model: PreTrainedModel | Embedder) -> int | None:
    """What ends the query of a pair, where the method protects it."""
    protect = getattr(getattr(model, MODULE, None), "protect", None)
    return protect["until"][0] if isinstance(protect, Mapping) and "until" in protect else None


def fingerprint(model: PreTrainedModel | Embedder) -> str:
    """Of the weights, the pruning, the configuration and the pooling of a model: graphs of equal ones answer alike."""
    pruner, told = getattr(model, MODULE, None), hashlib.sha256()
    about = [None if pruner is None else pruner.to_dict(), facts_of(model)]
    told.update(json.dumps(about, default=str, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        told.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        told.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return told.hexdigest()


def source_of(folder: Path) -> tuple[str | None, int | None] | None:
    """Fingerprint and longest input of the model that an exported graph was made from; None where there is none."""
    try:
        spec = json.loads((folder / SPEC).read_text())
        return spec["source"], spec["max_length"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def inputs_of(model: PreTrainedModel | Embedder, tokenizer: Any, batch: int, length: int) -> dict[str, Tensor]:
    """Random inputs (B, N) of a model, the first row without padding, the others shorter and shorter.

    ``token_type_ids`` are among them if the tokenizer makes them; without a tokenizer, if the model tells segments
    apart: a graph that was not traced with them would drop them. Where the query is protected it ends early in a row.
    An embedder that leaves prompts out of its pooling is told which tokens are one.
    """
    draw = torch.Generator().manual_seed(batch * 1000 + length)
    ids = torch.randint(5, model.config.vocab_size, (batch, length), generator=draw)
    if (separator := _separator(model)) is not None:
        ids[:, max(1, length // 4)] = separator
    own = torch.arange(length) < torch.linspace(length, max(1, length // 2), batch).long()[:, None]
    ids[~own] = getattr(model.config, "pad_token_id", None) or 0
    inputs = {"input_ids": ids, "attention_mask": own.long()}
    segments = getattr(model.config, "type_vocab_size", 0)
    made = segments > 1 if tokenizer is None else segments > 0 and "token_type_ids" in tokenizer.model_input_names
    if made and "token_type_ids" in inspect.signature(model.forward).parameters:
        second = (torch.arange(length) >= (length + 1) // 2).long() * (segments > 1)
        inputs["token_type_ids"] = second.expand_as(ids).contiguous()
    if isinstance(model, Embedder) and not model.pooling.include_prompt:
        inputs[PROMPTED] = (own & (torch.arange(length) >= length // 4)).long()
    return {name: x.to(model.device) for name, x in inputs.items()}


@contextmanager
def padded_layout(model: PreTrainedModel | Embedder) -> Iterator[None]:
    """In evaluation mode, pruned, and in the one layout that a graph can hold."""
    pruner, alone = getattr(model, MODULE, None), getattr(model, "vectors_alone", None)
    before = None if pruner is None else pruner.hooks.layout
    if isinstance(model, Embedder):
        model.vectors_alone = True
    try:
        with at_rest(model), torch.no_grad():
            if pruner is not None:
                pruner.hooks.layout = "padded"
                pruner.hooks.passed = frozenset(site for site in range(len(pruner.sites)) if pruner.keeps_all(site))
            with nullcontext() if pruner is None else pruner.hooks.asking(mode="pruned"):
                yield
    finally:
        if isinstance(model, Embedder):
            model.vectors_alone = bool(alone)
        if pruner is not None:
            pruner.hooks.layout, pruner.hooks.passed = before, frozenset()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters tell their stages to stdout, and libraries below them warn of one another."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _difference(
    model: PreTrainedModel | Embedder, tokenizer: Any, folder: Path, shapes: Iterable[tuple[int, int]]
) -> float:
    """The largest difference of logits between a model and its graph."""
    from .runtime import load_runtime

    graph, worst = load_runtime(folder), torch.zeros(())
    for shape in shapes:
        inputs = inputs_of(model, tokenizer, *shape)
        real, here = inputs["attention_mask"].bool(), _answers(model, inputs, graph.spec)
        for name, there in graph.forward(**inputs).items():
            difference = (here[name].float() - there.to(model.device).float()).abs()
            difference = difference[real] if difference.shape == real.shape else difference
            worst = torch.maximum(worst, difference.max().cpu())  # which is no number as soon as one of them is none
    return float(worst)


def _answers(model: PreTrainedModel | Embedder, inputs: dict[str, Tensor], spec: dict[str, Any]) -> dict[str, Tensor]:
    """What the model answers; of a program that cuts texts row by row, cut as the program does."""
    if not spec.get("cut"):
        return model(**inputs)
    wide, rows = inputs["input_ids"].shape[1], []
    for row in (row_of(inputs, i) for i in range(len(inputs["input_ids"]))):
        tokens = row["input_ids"].shape[1]
        slots = spec["widths"][str(length_for(spec["lengths"], tokens))]
        with one_shape(model, Widths(tuple(slots), capped=True)):
            found = model(**row)
        each = spec["outputs"].items()
        rows.append({name: spread(found[name], tokens, wide) if spans else found[name] for name, spans in each})
    return {name: torch.cat([row[name] for row in rows]) for name in spec["outputs"]}


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds anything but an exported model."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        if json.loads((folder / SPEC).read_text())["format"] in FORMATS:
            return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something else than an exported model: name an empty or new folder")
