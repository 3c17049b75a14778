"""A tiny embedder on disk, as sentence-transformers lays one out: BERT, the mean of its states, length 1."""

from __future__ import annotations

import json
from pathlib import Path

from support.families import FAMILIES
from support.tiny import tiny_tokenizer
from thresher import prune

SIZE = 32  # numbers of its vectors


def save_embedder(folder: Path, method=None) -> Path:
    """An encoder, its tokenizer and its modules, with the prompts "query" and "passage"."""
    model = FAMILIES["bert"].build().base_model
    model = model if method is None else prune(model, method)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    names = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(names.items())
    ]
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": SIZE, "pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": "the farmer ", "passage": "wheat "}},
    }
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content), encoding="utf-8")
    return folder
