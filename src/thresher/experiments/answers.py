"""What a finished model says of texts, asked once: many trainings start from one dense model and judge it again."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset

from ..data.embedder import PROMPTED
from ..evaluation.hardware import cache_folder
from ..evaluation.predict import Predictions, predict
from ..evaluation.rows import whole
from ..exporting.export import fingerprint

LEAST = 1000  # texts: what takes no time is asked again
MOST = 16  # files that stay, those last used
SOURCES = Path(__file__).parents[1]


def kept_answers(
    net: Any,
    folder: Path,
    texts: Dataset,
    *,
    place: Path | None = None,
    least: int = LEAST,
    most: int | None = MOST,
    **how: Any,
) -> Predictions:
    """``predict(net, texts, **how)``, asked once and looked up afterwards.

    Known by the weights, the pruning and the configuration of the model, by the tokens of its texts, by ``how`` it is
    asked and by this library and those below it. A file that cannot be read, or written, is one that is not there.

    Args:
        folder: of the model; not read.
        place: where answers are kept; default: ``answers`` in ``$THRESHER_CACHE`` or ~/.cache/thresher.
        least: texts below which nothing is kept.
        most: files that stay; None: all.
    """
    if len(texts) < least:
        return predict(net, texts, **how)
    file = (place or cache_folder() / "answers") / f"{digest(net, texts, how)}.pt"
    with suppress(Exception):  # of many kinds: a broken file fails wherever it is used first
        known = Predictions(**torch.load(file, weights_only=True))
        file.touch()
        return known
    answers = predict(net, texts, **how)
    with suppress(OSError), whole(file) as aside:
        torch.save({field.name: getattr(answers, field.name) for field in fields(answers)}, aside)
    with suppress(OSError):
        kept = sorted(file.parent.glob("*.pt"), key=lambda one: one.stat().st_mtime_ns)
        for old in kept[:-most] if most else ():
            old.unlink(missing_ok=True)
    return answers


def digest(net: Any, texts: Dataset, how: dict[str, Any]) -> str:
    """Of all that answers hang on."""
    about: list[Any] = [how, str(net.device), getattr(net.config, "_attn_implementation", None)]
    about += [torch.__version__, transformers.__version__, torch.get_num_threads(), sources()]
    told = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    told.update(fingerprint(net).encode())
    for name in sorted({"input_ids", "token_type_ids", PROMPTED} & {*texts.column_names}):
        told.update(json.dumps([name, list(texts[name])]).encode())
    return told.hexdigest()


@cache
def sources() -> str:
    """A digest of this library."""
    told = hashlib.sha256()
    for file in sorted(SOURCES.rglob("*.py")):
        told.update(file.read_bytes())
    return told.hexdigest()
