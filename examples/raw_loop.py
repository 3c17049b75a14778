"""LTP in a training loop of one's own: the lines marked with numbers are all that it takes.

python examples/raw_loop.py 200                    a toy, in which one word decides
python examples/raw_loop.py 600 reviews.csv MODEL  a table of texts and labels, and a model for it
"""

import sys
from functools import partial
from itertools import chain, islice, repeat
from math import ceil

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, DataCollatorWithPadding

from thresher import LTP, prune
from thresher.data.load import load_task
from thresher.data.models import for_task
from thresher.data.tokenize import tokenize
from thresher.training.trainer import freeze_without_gradient, param_groups


def toy():
    """A small model, and texts of 8 to 32 words one of which, 7 or 8, makes the class."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    texts = [torch.randint(10, 100, (n,)) for n in torch.randint(8, 33, (256,))]
    rows = [(torch.cat([torch.tensor([1]), ids, torch.tensor([7 + i % 2])]), i % 2) for i, ids in enumerate(texts)]
    return BertForSequenceClassification(BertConfig(vocab_size=100, **sizes)), rows[:192], rows[192:], pad, 1e-3


def pad(rows: list) -> dict:
    ids, labels = zip(*rows, strict=True)
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor(labels)}


def table(path: str, name: str):
    task, tokenizer = load_task(path), AutoTokenizer.from_pretrained(name)
    parts = [tokenize(part, task, tokenizer, 256)[0] for part in (task.train, task.validation)]
    return for_task(name, task), *parts, DataCollatorWithPadding(tokenizer), 5e-5


def main(steps: str = "200", *source: str) -> None:
    steps, (model, rows, held_out, collate, lr) = int(steps), table(*source) if source else toy()
    batches = chain.from_iterable(repeat(DataLoader(rows, batch_size=32, shuffle=True, collate_fn=collate)))
    held_out = [*DataLoader(held_out, batch_size=32, collate_fn=collate)]
    pruner = prune(model, LTP(target_flops=0.4)).token_pruner  # 1
    optimizer = torch.optim.AdamW(param_groups(model, lr=lr, pruner_lr=2e-2))  # 2: thresholds learn faster
    optimizer.register_step_pre_hook(freeze_without_gradient)  # 3: in the hard stage, whatever Adam remembers

    def record_of(batch: dict):
        model.eval()(**batch)
        return pruner.record

    for step, batch in enumerate(islice(batches, steps)):
        pruner.progress = step / steps  # 5: soft gates at first, then real removal
        loss = model.train()(**batch).loss + pruner.loss(partial(model, **batch), batch, pruner.record)  # 4
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in (ceil(pruner.soft_until * steps), steps):
            reached = pruner.calibrate(record_of, held_out)  # 6: the thresholds are shifted until the budget is met
    with torch.no_grad():
        right = torch.cat([model.eval()(**batch).logits.argmax(1) == batch["labels"] for batch in held_out])
    print(f"accuracy {right.float().mean():.3f} with {reached['flops_fraction']:.2f} of the dense MACs")


if __name__ == "__main__":
    main(*sys.argv[1:])
