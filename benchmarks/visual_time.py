"""What a shorter picture saves in time: a model of SmolVLM-256M's shape with random weights, one thread or more.

    python benchmarks/visual_time.py --threads 2 --out benchmarks/results/visual/time.json

Prompts with 9 and with 31 crops of a picture, 64 tokens each (576 and 1,984), and 40 tokens of text. The language model
(30 layers of 576, 9 heads over 3) reads states of random numbers in the place of a picture, dense and with half, a
quarter, a ninth and an eighteenth of the tokens; all take turns, three times after a warm-up. The tower (12 layers of
768, 1,024 patches a crop) is timed apart, on one crop: it takes the crops of a picture as rows of a batch. Under four
minutes on two quiet cores. Weights are random: no answer means anything, and choices cost what they cost.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from thresher import CDPruner, DivPrune, FastV, PyramidDrop, Random, SparseVLM
from thresher.evaluation.asking import FEATURES, measure_asking
from thresher.evaluation.hardware import torch_threads
from thresher.evaluation.rows import whole

IMAGE, WORDS, TOKENS, CROPS = 49190, 40, 64, (9, 31)
SHARES = (0.5, 0.25, 1 / 9, 1 / 18)
TEXT = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
TEXT |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280, "max_position_embeddings": 8192}
TOWER = {"model_type": "smolvlm_vision", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
TOWER |= {"num_attention_heads": 12, "image_size": 512, "patch_size": 16}


def methods() -> dict[str, Any]:
    """The methods that are timed, by their names."""
    kept = {f"{name}@{share:.3g}": kind(keep=share) for share in SHARES for name, kind in (("divprune", DivPrune),)}
    kept |= {f"random@{share:.3g}": Random(keep=share, at=(-1,)) for share in SHARES[1:2]}
    kept |= {f"cdpruner@{share:.3g}": CDPruner(keep=share) for share in SHARES[1:2]}
    return kept | {"fastv@0.25": FastV(keep=0.25), "pyramiddrop": PyramidDrop(), "sparsevlm": SparseVLM()}


def prompt(crops: int, width: int) -> dict[str, Any]:
    """A prompt of a picture of so many crops, and what the tower would make of it."""
    generator = torch.Generator().manual_seed(crops)
    ids = torch.randint(5, 40_000, (1, WORDS + crops * (TOKENS + 1)), generator=generator)
    for crop in range(crops):  # a word before each of them, as its place in the picture is one
        start = WORDS // 2 + crop * (TOKENS + 1) + 1
        ids[0, start : start + TOKENS] = IMAGE
    states = torch.randn(crops, TOKENS, width, generator=generator)
    features = BaseModelOutputWithPooling(pooler_output=[*states])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), FEATURES: {"image": features}}


def tower(model: Any, repeats: int) -> float:
    """Milliseconds of a crop, the median."""
    crop, taken = torch.randn(1, 1, 3, TOWER["image_size"], TOWER["image_size"]), []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        with torch.no_grad():
            model.get_image_features(crop)
        taken.append(time.perf_counter() - began)
    return 1e3 * float(np.median(taken[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new", type=int, default=8, help="tokens after the prompt")
    parser.add_argument("--crops", type=int, nargs="+", default=CROPS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = SmolVLMConfig(vision_config=TOWER, text_config=TEXT, image_token_id=IMAGE, scale_factor=4)
    model = SmolVLMForConditionalGeneration(config).eval()
    rows = []
    with torch_threads(args.threads):
        crop_ms = tower(model, args.repeats)
        for crops in args.crops:
            inputs = prompt(crops, TEXT["hidden_size"])
            fields = {"model": "SmolVLM-256M's shape, random weights", "task": f"{crops * TOKENS} visual tokens"}
            found = measure_asking(model, methods(), inputs, new=args.new, repeats=args.repeats, fields=fields)
            dense = found[0]["prefill_ms"]
            for row in found:
                row["tower_ms"] = crop_ms * crops
                print(
                    f"{row['task']}, {row['method']}: {row['visual_mean']:.0f} tokens a layer, "
                    f"{row['flops_ratio']:.2f}x fewer MACs, prefill {row['prefill_ms']:.0f} ms "
                    f"({dense / row['prefill_ms']:.2f}x), {row['latency_ms_p50']:.1f} ms a token, cache "
                    f"{row['cache_mb']:.1f} MB, tower {row['tower_ms']:.0f} ms ({crop_ms:.0f} a crop)",
                    flush=True,
                )
            rows += found
            if args.out is not None:
                with whole(args.out) as aside:
                    aside.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
