"""Other libraries on the same texts and weights: ``python benchmarks/peers.py ENGINE MODEL TEXTS LENGTH``.

To be run with the python of an environment that holds them, which ask for other versions than Thresher:
pip install "torch==2.13.0" "infinity-emb[torch]" fastembed "optimum[onnxruntime]" "numpy<2"

Prints one line of JSON for each turn, and waits for a line of input before each: ``embedding.py time`` starts it, so
that turns of all engines alternate. ENGINE: sentence-transformers, sentence-transformers-onnx-int8, infinity,
fastembed. MODEL is a folder of sentence-transformers, TEXTS a JSON list. The vectors of the
first turn are written beside TEXTS.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

BATCH, THREADS = 32, 2
LONGEST = int(sys.argv[4]) if __name__ == "__main__" and len(sys.argv) > 4 else 256  # tokens of a text
Embed = Callable[[list[str]], Any]


def onnx_file(model: str, folder: Path, int8: bool) -> Any:
    """sentence-transformers on its own graph, which it makes."""
    from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

    net = SentenceTransformer(model, backend="onnx", model_kwargs={"export": True})
    net.save_pretrained(str(folder))
    if int8:
        export_dynamic_quantized_onnx_model(net, "avx512_vnni", str(folder))
        name = next(path.name for path in (folder / "onnx").glob("*qint8*.onnx"))
        net = SentenceTransformer(str(folder), backend="onnx", model_kwargs={"file_name": f"onnx/{name}"})
    net.max_seq_length = LONGEST
    return net


def sentence_transformers(model: str, folder: Path) -> Embed:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(THREADS)
    net = SentenceTransformer(model)
    net.max_seq_length = LONGEST
    return lambda texts: net.encode(texts, batch_size=BATCH, normalize_embeddings=True)


def sentence_transformers_onnx_int8(model: str, folder: Path) -> Embed:
    net = onnx_file(model, folder, int8=True)
    return lambda texts: net.encode(texts, batch_size=BATCH, normalize_embeddings=True)


def infinity(model: str, folder: Path) -> Embed:
    import asyncio

    import torch
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    torch.set_num_threads(THREADS)
    settings = {"engine": "torch", "device": "cpu", "bettertransformer": False, "batch_size": BATCH, "compile": False}
    engine = AsyncEmbeddingEngine.from_args(EngineArgs(model_name_or_path=model, **settings))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(engine.astart())
    return lambda texts: loop.run_until_complete(engine.embed(texts))[0]


def fastembed(model: str, folder: Path) -> Embed:
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    onnx_file(model, folder, int8=False)
    limit = folder / "tokenizer_config.json"  # fastembed cuts where this file says
    limit.write_text(json.dumps(json.loads(limit.read_text()) | {"max_length": LONGEST, "model_max_length": LONGEST}))
    about = {"pooling": PoolingType.MEAN, "normalization": True, "sources": ModelSource(hf="local/model"), "dim": 384}
    TextEmbedding.add_custom_model(model="local/model", model_file="onnx/model.onnx", **about)
    net = TextEmbedding("local/model", specific_model_path=str(folder), threads=THREADS)
    return lambda texts: list(net.embed(texts, batch_size=BATCH))


ENGINES = {name.__name__.replace("_", "-"): name for name in (sentence_transformers, infinity, fastembed)}
ENGINES["sentence-transformers-onnx-int8"] = sentence_transformers_onnx_int8


def main() -> int:
    """Embed the texts once for each line of input."""
    engine, model, texts = sys.argv[1:4]
    rows = json.loads(Path(texts).read_text())
    with tempfile.TemporaryDirectory() as folder:
        embed = ENGINES[engine](model, Path(folder))
        print(json.dumps({"ready": engine}), flush=True)
        for turn, _ in enumerate(sys.stdin):
            began = perf_counter()
            vectors = embed(rows)
            print(json.dumps({"seconds": perf_counter() - began}), flush=True)
            if not turn:
                import numpy as np

                np.save(Path(texts).with_name(f"{engine}.npy"), np.asarray(vectors, dtype=np.float32))
    os._exit(0)  # infinity's threads would wait for more


if __name__ == "__main__":
    sys.exit(main())
