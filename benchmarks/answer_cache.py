"""Many entries start from one dense model and replay one method's counts: what a finished model answers is kept."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path

import torch
import transformers

import thresher
from thresher.evaluation.predict import Predictions, predict


def cached_answers(runs: Path, net, folder: Path, part, **how) -> Predictions:
    """``predict(net, part, **how)`` of the model in ``folder``, asked once and looked up afterwards.

    Known by the bytes of the model, of its texts and of all that could change what it says of them (the library and
    those below it); kept beside the entries' models, in ``runs``.
    """
    inputs = {name: list(part[name]) for name in ("input_ids", "token_type_ids") if name in part.column_names}
    about = hashlib.sha256(json.dumps([how, inputs, torch.__version__, transformers.__version__]).encode())
    sources = sorted(Path(thresher.__file__).parent.rglob("*.py"))
    for file in (*sources, folder / "config.json", folder / "model.safetensors"):
        about.update(file.read_bytes())
    file = runs / "answers" / f"{about.hexdigest()}.pt"
    if file.exists():
        return Predictions(**torch.load(file, weights_only=True))
    answers = predict(net, part, **how)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}")
    torch.save({field.name: getattr(answers, field.name) for field in fields(answers)}, aside)
    os.replace(aside, file)
    return answers
