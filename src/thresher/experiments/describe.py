"""What is in a saved model and how it prunes, read from its files."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig
from transformers.utils import cached_file

from ..api import CONFIG_KEY, MODULE
from ..core.architecture import Architecture
from ..core.pruner import TokenPruner
from ..data.models import positions


def describe(model: str) -> dict[str, Any]:
    """What the files of a saved or exported model say; of the weights only the pruner's are read."""
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model!r} cannot be read as a model: {str(error).strip().splitlines()[0]}") from None
    names = ("config.json", "model.safetensors", "training_summary.json", "thresher.json")
    files = [cached_file(model, name, _raise_exceptions_for_missing_entries=False) for name in names]
    summary = _read(files[2]) | _read(files[3])
    if "format" in summary:  # a graph, whose weights are not safetensors
        told = ("format", "precision", "architecture", "pruning", "max_length", "difference", "versions")
        return {"model": model, **{name: summary.get(name) for name in told}}
    parameters = 0
    weights: dict[str, Any] = {}
    for file in sorted(Path(files[0]).parent.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
            parameters += sum(prod(shape) for shape in shapes.values())
            own = [name for name in shapes if name.startswith(f"{MODULE}.")]
            weights |= {name.removeprefix(f"{MODULE}."): tensors.get_tensor(name).tolist() for name in own}
    result = (summary.get("rows") or [{}])[-1]
    measured = ("task", "metric", "quality", "quality_dense", "flops_ratio")
    return {
        "model": model,
        "architecture": (config.architectures or [None])[0],
        "layers": getattr(config, "num_hidden_layers", None),
        "hidden_size": getattr(config, "hidden_size", None),
        "parameters": parameters or None,
        "labels": list((config.id2label or {}).values()),
        "max_length": positions(config),
        **_describe_pruning(getattr(config, CONFIG_KEY, None), weights, config.num_hidden_layers),
        "flops_fraction": (summary.get("reached") or summary).get("flops_fraction"),
        "result": {key: result.get(key) for key in measured} if result else None,
        "training": summary.get("recipe"),
        "versions": result.get("versions") or f"transformers {config.transformers_version}",
    }


def _describe_pruning(config: Any, weights: dict[str, list], depth: int) -> dict[str, Any]:
    """Method, layers and thresholds, None for a dense model. Raises ValueError where weights are missing."""
    if config is None:
        return {"pruning": None, "sites": None, "thresholds": None}
    if not isinstance(config, dict):
        raise ValueError(f"corrupted checkpoint: token_pruning in config.json is {config!r}, not a method with fields")
    method = TokenPruner.from_dict(config)
    method.bind(Architecture.sketch(method.name, depth))
    missing = sorted(set(method.state_dict()) - set(weights))
    if missing:
        raise ValueError(f"corrupted checkpoint: the weights of {method.name} ({', '.join(missing)}) are missing")
    values = weights.get("threshold", getattr(method, "thresholds", None))
    thresholds = None if values is None else {str(i): round(v, 4) for i, v in zip(method.sites, values, strict=True)}
    return {"pruning": method.to_dict(), "sites": list(method.sites), "thresholds": thresholds}


def _read(file: str | None) -> dict[str, Any]:
    """The content of a JSON file, if there is one."""
    try:
        return {} if file is None else dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"corrupted checkpoint: {file} does not hold names and values in JSON") from None
