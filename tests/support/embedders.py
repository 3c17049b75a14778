"""A tiny embedder on disk."""

from __future__ import annotations

from pathlib import Path

from support.families import FAMILIES
from support.tiny import tiny_tokenizer
from thresher import prune
from thresher.data.embedder import Embedder

SIZE = 32  # numbers of its vectors


def save_embedder(folder: Path, method=None) -> Path:
    """BERT, the mean of its states, length 1, cut at 64 tokens; with the prompts "query" and "passage"."""
    model = FAMILIES["bert"].build().base_model
    model = model if method is None else prune(model, method)
    prompts = {"query": "the farmer ", "passage": "wheat "}
    Embedder(model, longest=64, prompts=prompts).save_pretrained(folder, tiny_tokenizer())
    return folder
