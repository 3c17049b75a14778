"""Write a saved model as a graph, with its tokenizer; what is calibrated is so on texts that are not tested."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from ..data.embedder import Embedder, is_embedder, load_embedder
from ..data.files import reading
from ..data.load import load_task
from ..data.models import clip, load
from ..data.task import Task
from ..data.tokenize import tokenize
from ..evaluation.predict import Text
from ..exporting import export as exporting
from .spec import ExportSpec, job

STATIC = ("openvino", "int8")  # calibrated on texts
CALIBRATED = 300  # texts, NNCF's own number


@job(ExportSpec)
def export(spec: ExportSpec, *, progress: Callable[[str, int, int | None], Any] | None = None) -> dict[str, Any]:
    """Write a saved model as a graph into ``out`` (see ``exporting.export``); returns what its thresher.json says."""
    net = load_embedder(spec.model)[0] if is_embedder(spec.model) else load(spec.model)[0]
    # cut as bench cuts it, so that no tested text calibrates
    task = load_task(spec) if spec.wants_data or (spec.data and spec.format == exporting.MOBILE) else None
    if progress:
        progress(f"writing a graph for {spec.format}", 0, None)
    how = {"format": spec.format, "precision": spec.precision, "max_length": clip(spec.max_length, net.config)}
    return export_model(net, spec.model, spec.out, task, lengths=spec.lengths, **how)


def export_model(
    net: PreTrainedModel | Embedder, folder: str, out: Path, task: Task | None, **how: Any
) -> dict[str, Any]:
    """Export a model with the tokenizer in ``folder``; ``how``: format, precision, max_length and lengths."""
    tokenizer = reading(AutoTokenizer.from_pretrained, folder)
    static = (how["format"], how["precision"]) == STATIC or how["format"] == exporting.MOBILE
    calibration = calibration_of(net, tokenizer, task, how["max_length"]) if task is not None and static else None
    return exporting.export(net, out, tokenizer=tokenizer, calibration=calibration, **how)


def calibration_of(net: Any, tokenizer: Any, task: Task, max_length: int) -> list[dict[str, Tensor]]:
    """Inputs of the first texts of the train part, one by one."""
    part = task.validation if task.train is None else task.train
    if part is None:
        raise ValueError(f"{task.name} has a test part only: int8 in OpenVINO is calibrated on texts of a train part")
    prompt = net.prompt(tokenizer, max_length) if isinstance(net, Embedder) else None
    rows = tokenize(part.select(range(min(CALIBRATED, len(part)))), task, tokenizer, max_length, prompt)[0]
    text = Text(net, rows, max_length)
    return [text.batch([i], None, net.device) for i in range(len(rows))]
