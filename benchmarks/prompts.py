"""Prompts that shorten: ``python benchmarks/prompts.py``, 8 minutes on two quiet cores at most.

SmolLM2-135M-Instruct, dequantised (``python benchmarks/weights.py smollm2-135m-dequantised``), reads

* texts of SQuAD with one number in them, at depths from 0 to 1, and the question behind: does it still say the number
  with ``LazyLLM``, ``TopK``, with ``SnapKV`` on top, and on what ``compress`` leaves of the text;
* texts of 4,096 and 8,000 tokens, for the time to the first token, full and pruned, in turns.

Answers come first and take half of ``--minutes`` at most; where they end earlier fewer prompts were asked, and the rows
say how many. Times are medians of rounds in which all take turns; nothing else may run meanwhile. ``--only answers``
and ``--only times`` make one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

MODEL, DATA = "smollm2-135m-dequantised", Path(os.environ.get("THRESHER_DATA", "data")) / "squad" / "validation.parquet"
QUESTION = "\n\nQuestion: What is the secret number of the harbour?\nAnswer: The secret number of the harbour is"
NEEDLE = " The secret number of the harbour is {}. "
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS = (4096, 8000)  # of the prompts that are timed
ROUNDS = 3
SEED = 1  # of the prompts; LazyLLM's layers were chosen on the first ones of 0


def paragraphs() -> list[str]:
    """The paragraphs of SQuAD's validation part, each once."""
    import datasets

    file = DATA if DATA.exists() else next(DATA.parent.glob("validation*"))
    rows = datasets.load_dataset(file.suffix.removeprefix(".").replace("jsonl", "json"), data_files=str(file))["train"]
    return list(dict.fromkeys(rows["context"]))


def needles(tokenizer: Any, count: int, tokens: int) -> Iterator[tuple[str, str, float]]:
    """(prompt, number, depth) of ``count`` texts of about ``tokens`` tokens."""
    import random

    texts, draw = paragraphs(), random.Random(SEED)
    draw.shuffle(texts)
    for number in range(count):
        parts: list[str] = []
        while len(tokenizer(" ".join(parts))["input_ids"]) < tokens - 60:
            parts += texts.pop().split(". ")
        code, depth = str(draw.randint(10_000, 99_999)), DEPTHS[number % len(DEPTHS)]
        parts.insert(round(depth * len(parts)), NEEDLE.format(code).strip())
        yield ". ".join(parts) + QUESTION, code, depth


def methods() -> dict[str, Callable[[Any], Any]]:
    """What is asked, by name: each prunes a model."""
    from thresher import LazyLLM, SnapKV, TopK, prune

    return {
        "full": lambda model: model,
        "lazyllm .7": lambda model: prune(model, LazyLLM(keep=0.7)),
        "lazyllm .5": lambda model: prune(model, LazyLLM(keep=0.5)),
        "topk .5": lambda model: prune(model, TopK(keep=0.5, protect=(0, 1, 2, 3, *range(-32, 0)))),
        "lazyllm .7, snapkv .5": lambda model: prune(model, LazyLLM(keep=0.7), cache=SnapKV(keep=0.5)),
    }


def answers(model: Any, tokenizer: Any, count: int, tokens: int, until: float) -> list[dict]:
    """Of each prompt and method, whether the number was said."""
    from thresher import GemFilter, compress, unprune

    rows = []
    for prompt, code, depth in needles(tokenizer, count, tokens):
        if perf_counter() > until:
            break
        ids = tokenizer(prompt, return_tensors="pt")
        about = {"depth": depth, "tokens_in": ids["input_ids"].shape[1]}
        for name, pruned in methods().items():
            row = said(pruned(model), tokenizer, ids, code)
            rows.append(about | {"method": name, "tokens_out": about["tokens_in"]} | row)
            if name != "full":
                unprune(model)
        for keep in (0.5, 0.25):
            short = compress(model, prompt, GemFilter(keep), tokenizer=tokenizer)
            row = said(model, tokenizer, tokenizer(short.text, return_tensors="pt"), code)
            found = {"tokens_out": short.tokens_out, "compress_seconds": short.seconds, "kept": code in short.text}
            rows.append(about | {"method": f"compress {keep}"} | row | found)
    return rows


def said(model: Any, tokenizer: Any, ids: dict, code: str) -> dict:
    """Whether a model says the number, greedily, and how long it took."""
    begun = perf_counter()
    told = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(told[0, ids["input_ids"].shape[1] :])
    return {"right": code in text, "said": text, "seconds": perf_counter() - begun}


def times(model: Any, tokenizer: Any, until: float, lengths: tuple[int, ...] = LENGTHS) -> list[dict]:
    """The time to the first token at ``lengths``, in turns; the longest length in as many rounds as there is time."""
    import torch

    from thresher import GemFilter, LazyLLM, SnapKV, compress, prune, unprune

    ids = tokenizer(" ".join(paragraphs()[:200]), return_tensors="pt", verbose=False)["input_ids"]

    def first(pruned: Any, part: Any) -> None:
        with torch.no_grad():
            pruned(input_ids=part, use_cache=True, logits_to_keep=1)

    def compressed(part: Any) -> None:
        first(model, torch.tensor([compress(model, part, GemFilter(0.25)).ids]))

    def by(method: Any, cache: Any = None) -> Callable[[Any], None]:
        def run(part: Any) -> None:
            first(prune(model, method(), cache=cache and cache(), check=False), part)
            unprune(model)

        return run

    ways: dict[str, Callable[[Any], None]] = {
        "full": lambda part: first(model, part),
        "lazyllm .7": by(lambda: LazyLLM(keep=0.7)),
        "lazyllm .5": by(lambda: LazyLLM(keep=0.5)),
        "lazyllm .5, snapkv .5": by(lambda: LazyLLM(keep=0.5), lambda: SnapKV(keep=0.5)),
        "compress .25, then full": compressed,
    }
    rows, took = [], {name: 0.0 for name in ways}
    for way in ways.values():
        way(ids[:, :256])  # once for all that is made at the first call
    for length in lengths:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for number in range(ROUNDS):
            if number and perf_counter() + sum(took.values()) > until:
                break
            for name, way in ways.items():
                begun, worked = perf_counter(), process_time()
                way(ids[:, :length])
                took[name] = perf_counter() - begun
                found[name].append((took[name], process_time() - worked))
        for name, runs in found.items():
            wall = [run[0] for run in runs]
            spread = {"least": min(wall), "most": max(wall), "processor": median(run[1] for run in runs)}
            ratios = [full[0] / run[0] for full, run in zip(found["full"], runs, strict=True)]
            row = {"length": length, "method": name, "rounds": len(runs), "seconds": median(wall), **spread}
            rows.append(row | {"times_full": median(ratios)})
        took = {name: 4 * one for name, one in took.items()}  # twice the tokens take four times as long at most
    return rows


def summary(rows: list[dict]) -> list[str]:
    """Lines for a reader."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        of = [row for row in rows if row["method"] == name]
        if "right" in of[0]:
            right, tokens = sum(row["right"] for row in of), sum(row["tokens_out"] for row in of) / len(of)
            kept = f", number kept {sum(row['kept'] for row in of)}" if "kept" in of[0] else ""
            lines.append(f"{name:24} right {right} of {len(of)}, {tokens:.0f} tokens{kept}")
        else:
            lines += [
                f"{name:24} {r['length']:6} tokens {r['seconds']:7.2f} s ({r['least']:.2f}-{r['most']:.2f}), "
                f"{r['times_full']:.2f}x, {r['rounds']} rounds"
                for r in of
            ]
    return lines


def main() -> int:
    """Ask, time, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("answers", "times"))
    parser.add_argument("--prompts", type=int, default=40, metavar="N")
    parser.add_argument("--tokens", type=int, default=600, metavar="N", help="of a text with a number in it")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of prompts that are timed")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prompts")
    asked = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from weights import pretrained

    if asked.threads:
        torch.set_num_threads(asked.threads)
    folder, begun = pretrained(MODEL), perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.max_length = None
    half = begun + 60 * asked.minutes * (0.5 if asked.only is None else 1)
    made = {}
    if asked.only != "times":
        made["answers"] = answers(model, tokenizer, asked.prompts, asked.tokens, half)
    if asked.only != "answers":
        made["times"] = times(model, tokenizer, begun + 60 * asked.minutes, tuple(asked.lengths))
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, rows in made.items():
        print(*summary(rows), sep="\n")
        row = {"model": MODEL, "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
        (asked.out / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
