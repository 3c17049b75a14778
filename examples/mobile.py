"""Run a model on a phone's runtime, as an app would: ExecuTorch and the tokenizer, neither Thresher nor transformers.

    thresher export runs/reviews --format executorch --precision int8 --out runs/reviews-phone
    python examples/mobile.py runs/reviews-phone "Wonderful acting."

An app ships three files of that folder: model.pte, tokenizer.json and thresher.json. In C++, Kotlin and Swift the steps
are the same: see docs/runtimes.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter

import torch
from executorch.runtime import Runtime
from tokenizers import Tokenizer


def main(folder: str, text: str) -> dict:
    """The label of a text, its probability, and how long the program took."""
    place = Path(folder)
    spec = json.loads((place / "thresher.json").read_text())
    config = json.loads((place / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(spec["max_length"])
    encoded = tokenizer.encode(text)
    length = next(n for n in spec["lengths"] if n >= len(encoded.ids))  # the least that has room
    rest = length - len(encoded.ids)
    columns = {
        "input_ids": encoded.ids + [config.get("pad_token_id") or 0] * rest,
        "attention_mask": encoded.attention_mask + [0] * rest,
        "token_type_ids": encoded.type_ids + [0] * rest,
    }
    method = Runtime.get().load_program(place / "model.pte").load_method(f"forward_{length}")
    inputs = [torch.tensor([columns[name]]) for name in spec["inputs"]]
    method.execute(inputs)  # the first call lays out the weights
    start = perf_counter()
    (logits,) = method.execute(inputs)
    took = 1000 * (perf_counter() - start)
    chances = logits[0].softmax(0)
    best = int(chances.argmax())
    label = config["id2label"][str(best)]
    return {"label": label, "score": float(chances[best]), "method": f"forward_{length}", "ms": round(took, 2)}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit('usage: python examples/mobile.py FOLDER "TEXT"')
    print(json.dumps(main(*sys.argv[1:])))
