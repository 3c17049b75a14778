"""A data set that a tiny model can learn, and the model."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import BertConfig, BertForSequenceClassification

from support.families import NO_DROPOUT, TEXT
from support.tiny import tiny_tokenizer

FILLERS = ("the", "farmer", "and", "grain", "script", "thresh")
OPTIONS = {"batch_size": 16, "max_length": 32, "epochs": 3, "prune_epochs": 2, "lr": 4e-3, "bf16": False}
OPTIONS |= {"method": "ltp", "target_flops": 0.5, "progress": False}


def write(path: Path, count: int, seed: int, labels=("chaff", "wheat")) -> Path:
    """Distinct texts of 4 to 13 words; the one that is "wheat" or "chaff" is the class."""
    draw = random.Random(seed)
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("text", "label"))
        texts: list[str] = []
        while len(texts) < count:
            label = labels[len(texts) % len(labels)]
            words = draw.choices(FILLERS, k=draw.randint(3, 12))
            words.insert(draw.randint(0, len(words)), label)
            if (text := " ".join(words)) not in texts:
                texts.append(text)
                table.writerow((text, label))
    return path


def make_toy(folder: Path) -> SimpleNamespace:
    """A model that knows nothing, and a data set."""
    write(folder / "farm" / "train.csv", 160, 0)
    write(folder / "farm" / "test.csv", 48, 1)
    torch.manual_seed(0)
    config = BertConfig(**TEXT | NO_DROPOUT | {"num_hidden_layers": 2, "initializer_range": 0.1})
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return SimpleNamespace(data=str(folder / "farm"), model=str(folder / "model"))
