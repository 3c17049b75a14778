"""Ask about a picture: how long the first token takes and what the cache holds, with all visual tokens and with some.

python examples/ask_picture.py                           a small LLaVA of random weights, made here: times, no sense
python examples/ask_picture.py MODEL PICTURE "QUESTION"  a folder or a name on the hub, such as a SmolVLM
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from thresher import DivPrune, FastV, Grid, prune, unprune

PLACE = 5  # the token that stands for a piece of a picture
SEES = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SEES |= {"num_attention_heads": 4, "image_size": 336, "patch_size": 14}  # 576 pieces
SPEAKS = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12}
SPEAKS |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 500}


def made() -> tuple[Any, dict[str, torch.Tensor]]:
    """A LLaVA with random weights, and a prompt of one picture and ten words."""
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=SEES, text_config=SPEAKS, image_token_id=PLACE)
    ids = torch.tensor([[1, *[PLACE] * 576, *range(10, 20)]])
    picture = torch.randn(1, 3, 336, 336)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": picture}
    return LlavaForConditionalGeneration(config), inputs


def read(name: str, picture: str, question: str) -> tuple[Any, Any, Any]:
    """A model, what it reads of a picture and a question, and its processor."""
    processor = AutoProcessor.from_pretrained(name)
    asked = [{"type": "image", "path": picture}, {"type": "text", "text": question}]
    form = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": asked}], **form)
    return AutoModelForImageTextToText.from_pretrained(name), inputs, processor


def main(*given: str) -> dict[str, float]:
    """The share of the MACs of the first pass that is left, by method."""
    model, inputs, *processor = read(*given) if given else made()
    model.eval()
    share: dict[str, float] = {}
    for method in (None, DivPrune(keep=0.25), FastV(keep=0.25), Grid(keep=0.25)):
        if method is not None:
            prune(model, method)
        new = 32 if given else 1
        started = time.perf_counter()
        answer = model.generate(**inputs, max_new_tokens=new, do_sample=False)
        seconds = time.perf_counter() - started
        name, told = type(method).__name__ if method else "all visual tokens", ""
        if method is not None:
            report = model.token_pruner.picture_report
            share[name] = float(report["flops_fraction"])
            told = f"; {report['mean']:.0f} of {sum(map(sum, report['pictures']))} visual tokens in a layer, "
            told += f"{share[name]:.0%} of the MACs of the first pass, {report['cache_fraction']:.0%} of the cache"
            unprune(model)
        said = [one.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) for one in processor]
        print(f"{name}: {seconds:.2f} s for {new} token{'s' * (new > 1)}{told}", *said, sep="\n  ")
    return share


if __name__ == "__main__":
    main(*sys.argv[1:])
