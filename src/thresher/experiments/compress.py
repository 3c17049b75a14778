"""Shorten a prompt to what its end asks for, or to what it says: a text in, a text out."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.spec import option
from .spec import ModelSpec, job, one_share

if TYPE_CHECKING:
    from ..prompts.compress import Compressed


@dataclass(frozen=True, kw_only=True)
class CompressSpec(ModelSpec):
    """Name the decoder or token classifier that chooses, the prompt, and how much of it stays."""

    file: Path | None = option("A text with the question at its end; - or none: standard input.", argument=True)
    keep: float | int = option(
        "Share (0.25) or number (1024) of tokens that stay.", 0.25, metavar="K", parser=one_share
    )
    at: int | None = option("The layer that chooses; default: 13 of 32.", metavar="N", min=0)
    sinks: int = option("First tokens that stay.", 4, metavar="N", min=0)
    recent: int = option("Last tokens that stay, as the question.", 32, metavar="N", min=1)
    threads: int | None = option("Threads of the processor; default: all.", metavar="N", min=1)


@job(CompressSpec)
def compressed(spec: CompressSpec, prompt: str | None = None) -> Compressed:
    """The shorter prompt; ``prompt``: the text, in place of the file's.

    Raises:
        ValueError: no such model, an option of decoders for a classifier, or a text that cannot be read or shortened.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

    from ..data.models import opened, reading
    from ..prompts.compress import compress
    from ..prompts.gemfilter import GemFilter
    from ..prompts.llmlingua2 import LLMLingua2

    known = reading(AutoConfig.from_pretrained, spec.model).architectures or ()
    method: Any = None
    kind: Any = AutoModelForCausalLM
    if any(name.endswith("ForTokenClassification") for name in known):
        usual = {one.name: one.default for one in fields(spec)}
        if given := [name for name in ("at", "sinks", "recent") if getattr(spec, name) != usual[name]]:
            raise ValueError(f"{spec.model} is a token classifier, and only a decoder takes {given[0]}: leave it out")
        method, kind = LLMLingua2(spec.keep), AutoModelForTokenClassification
    else:
        method = GemFilter(spec.keep, at=spec.at, sinks=spec.sinks, recent=spec.recent)
    text = prompt_of(spec.file) if prompt is None else prompt
    tokenizer = reading(AutoTokenizer.from_pretrained, spec.model)
    if kind is AutoModelForCausalLM:
        model = reading(kind.from_pretrained, spec.model).eval()
    else:
        model = opened(lambda: reading(kind.from_pretrained, spec.model), spec.model, "auto")
    return compress(model, text, method, tokenizer=tokenizer)


def prompt_of(file: Path | None) -> str:
    """The text in a file, or on standard input.

    Raises:
        ValueError: it is no text.
    """
    try:
        if file is None or str(file) == "-":
            return sys.stdin.read()
        with file.open(encoding="utf-8", newline="") as opened:  # line ends stay as they are
            return opened.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file or 'standard input'} is no text in UTF-8 ({error.reason})") from None
