"""Padding of batches cut by a budget of tokens, over what the texts need: ``python benchmarks/padding.py``.

The test part of 20 Newsgroups below ``THRESHER_DATA``, cut at 512 tokens, in a random order.
"""

from __future__ import annotations

import random

from entries import TASKS
from weights import pretrained

BUDGETS = (4096, 8192, 16_384)


def main() -> None:
    """Print a line for each budget, and one for batches of 32 in the order in which texts come."""
    from transformers import AutoTokenizer

    from thresher.data.files import reading
    from thresher.data.load import load_task
    from thresher.data.tokenize import tokenize
    from thresher.serving.batching import batches

    task = load_task(TASKS["20newsgroups"].path)
    tokenizer = reading(AutoTokenizer.from_pretrained, pretrained("minilm-l6"))
    lengths = [len(ids) for ids in tokenize(task.test, task, tokenizer, 512)[0]["input_ids"]]
    random.Random(0).shuffle(lengths)
    cuts = {f"{budget:,} tokens": list(batches(lengths, budget)) for budget in BUDGETS}
    cuts["32 texts as they come"] = [[*range(i, min(i + 32, len(lengths)))] for i in range(0, len(lengths), 32)]
    print(f"{len(lengths):,} texts, {sum(lengths) / len(lengths):.0f} tokens on average")
    for name, cut in cuts.items():
        padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in cut)
        print(f"{name}: {padded / sum(lengths):.4f} of what the texts need, {len(cut)} batches")


if __name__ == "__main__":
    main()
