"""kvpress and Thresher on the same model and prompts: ``python benchmarks/kvpress.py ENGINE MODEL OUT [--time]``.

To be run twice, ENGINE thresher with this environment's python, and ENGINE kvpress with that of an environment of its
own, which asks for an older transformers: pip install kvpress "transformers<5.3" "torch==2.13.0". MODEL is a folder,
OUT a JSON file of rows. Of each method, at half of the cache:

* ``bytes`` that the cache holds at the end, and ``bytes_full``; with ``--time``, on a machine on which nothing else
  runs, ``prefill_ms`` and ``ms_per_token``, medians;
* ``batch``: a prompt in a batch, padded on the left, against the same prompt alone: the largest difference of the
  logits of the first generated token and of those after it;
* ``turn``: a second turn, given to ``generate`` as a conversation with its cache, against the same tokens fed by hand
  at their places: the largest difference of logits.

Differences are counted up to the first token that differs: what follows another token is another text.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

KEEP, NEW, TURNS = 0.5, 8, 3
TEXTS = (
    "The farmer rose before the sun and walked along the river to the barley. The code of the red door is 48213. He "
    "cut the grain until noon, bound it in sheaves, and carried them to the barn, where his daughters threshed it. ",
    "In the town the miller waited for the carts. Rain had filled the river, and the wheels turned day and night. ",
)
QUESTION = "What is the code of the red door? The code of the red door is"
SECOND = " What did the daughters of the farmer do in the barn? The daughters"
FULL = "full"  # nothing leaves: the differences of the model itself
NAMES = (FULL, "snapkv", "tova", "knorm", "keydiff", "expectedattention", "streamingllm", "random")


class Kvpress:
    """Press each prompt within the context."""

    def __init__(self) -> None:
        sys.path[:] = [place for place in sys.path if Path(place) != Path(__file__).parent]  # this file has its name
        import kvpress

        ratio = {"compression_ratio": 1 - KEEP}
        self.made = {
            "snapkv": kvpress.SnapKVPress(window_size=16, **ratio),
            "tova": kvpress.TOVAPress(**ratio),
            "knorm": kvpress.KnormPress(**ratio),
            "keydiff": kvpress.KeyDiffPress(**ratio),
            "expectedattention": kvpress.ExpectedAttentionPress(**ratio),
            "streamingllm": kvpress.StreamingLLMPress(**ratio),
            "random": kvpress.RandomPress(**ratio),
        }

    def on(self, model: Any, name: str) -> Any:
        """A context in which prompts are pruned."""
        return nullcontext() if name == FULL else self.made[name](model)


class Thresher:
    """The same with the methods of Thresher."""

    def __init__(self) -> None:
        import thresher as t

        kinds = (t.SnapKV, t.TOVA, t.Knorm, t.KeyDiff, t.ExpectedAttention, t.StreamingLLM, t.RandomCache)
        self.kinds = dict(zip(NAMES[1:], kinds, strict=True))

    @contextmanager
    def on(self, model: Any, name: str) -> Any:
        """A context in which prompts are pruned."""
        from thresher import prune, unprune

        if name == FULL:
            yield model
            return
        prune(model, self.kinds[name](keep=KEEP))
        try:
            yield model
        finally:
            unprune(model)


def generated(model: Any, inputs: dict, cache: Any) -> torch.Tensor:
    """(B, NEW, V), the logits of the tokens that follow; the tokens are those of the first row alone."""
    told = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    answer = model.generate(
        **inputs, past_key_values=cache, output_logits=True, return_dict_in_generate=True, pad_token_id=0, **told
    )
    return torch.stack(answer.logits, 1).float()


def at_least(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of logits up to where the most likely token differs, which changes all that follows."""
    same = (a.argmax(-1) == b.argmax(-1)).long().cumprod(-1)
    count = min(a.shape[0], int(same.sum()) + 1)
    return float((a[:count] - b[:count]).abs().max())


@torch.no_grad()
def row(engine: Any, name: str, model: Any, tokenizer: Any, turns: int) -> dict:
    """What is measured of one method."""
    texts = [TEXTS[0] * 4 + QUESTION, TEXTS[1] * 4 + QUESTION]
    alone, cache = tokenizer(texts[1], return_tensors="pt"), DynamicCache()
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with engine.on(model, name):
        single = generated(model, dict(alone), cache)[0]
        both = generated(model, dict(batch), DynamicCache())[1]
        turn, conversation = second(model, tokenizer, texts[0])
        times = [timed(model, tokenizer) for _ in range(turns)]
        held, seen = size(cache), alone["input_ids"].shape[1] + NEW - 1
    plain = DynamicCache()
    generated(model, dict(alone), plain)
    found = {"method": name, "bytes": held, "bytes_full": size(plain), "prompt": seen}
    found |= {"batch": at_least(both, single), "turn": at_least(conversation, turn)}
    medians = [1e3 * median(times) for times in zip(*times, strict=True)]
    return found | dict(zip(("prefill_ms", "ms_per_token"), medians, strict=False))


def second(model: Any, tokenizer: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits behind a second turn: its tokens fed by hand at their places, and given to ``generate``."""
    first, more = (tokenizer(part, return_tensors="pt")["input_ids"] for part in (text, SECOND))
    caches = [DynamicCache(), DynamicCache()]
    for cache in caches:
        model(input_ids=first, past_key_values=cache, use_cache=True)
    both = torch.cat([first, more], 1)
    told = {"input_ids": both, "attention_mask": torch.ones_like(both)}
    conversation = generated(model, told, caches[1])[0]
    logits, place = [], first.shape[1]
    ids = more
    for _ in range(NEW):
        positions = torch.arange(place, place + ids.shape[1])[None]
        output = model(input_ids=ids, position_ids=positions, past_key_values=caches[0], use_cache=True)
        place, ids = place + ids.shape[1], output.logits[:, -1:].argmax(-1)
        logits.append(output.logits[0, -1].float())
    return torch.stack(logits), conversation


def timed(model: Any, tokenizer: Any) -> tuple[float, float]:
    """Seconds of a prompt and of a token after it."""
    ids, cache = tokenizer(TEXTS[0] * 16, return_tensors="pt")["input_ids"], DynamicCache()
    began = perf_counter()
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    read = perf_counter()
    for step in range(NEW):
        place = torch.tensor([[ids.shape[1] + step]])
        model(input_ids=ids[:, :1], position_ids=place, past_key_values=cache, use_cache=True)
    return read - began, (perf_counter() - read) / NEW


def size(cache: Any) -> int:
    """Bytes of its storage."""
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))


def main() -> int:
    """Write the rows of one engine."""
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("kvpress", "thresher"))
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--time", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name, folder = options.engine, options.model
    engine = Kvpress() if name == "kvpress" else Thresher()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for method in options.methods:
        known = {"engine": name, "transformers": transformers.__version__, "keep": KEEP, "model": Path(folder).name}
        rows.append(known | row(engine, method, model, tokenizer, TURNS if options.time else 0))
        print(json.dumps(rows[-1]), flush=True)
    options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
