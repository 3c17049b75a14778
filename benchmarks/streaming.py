"""A classifier of texts that arrive in pieces: ``python benchmarks/streaming.py DENSE PRUNED DATA``.

DENSE and PRUNED are folders that ``thresher train`` wrote, DATA is what they were trained on. The test part is read in
pieces of 32 words by

* ``stream``: the pruned model, with a memory of the tokens that survived;
* ``window``: the dense model on the last tokens, as many as the stream reads;
* ``prefix``: the dense model on all that was read so far, up to its 512 tokens;

and by ``early``: the stream again, with the margin that the validation part allows. Rows go to ``--out``.

``python benchmarks/streaming.py draw DATA FOLDER`` writes a few texts of DATA to a folder, to train a small model on:
``thresher train minilm --data FOLDER --max-length 256 --epochs 2 --prune-epochs 1 --lr 1e-4 --method topk --keep 0.5``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

TRAIN, TEST = 1500, 400  # texts that ``draw`` takes of each part
WORDS, LIMIT = 32, 0.05  # of a piece; share of early answers that may differ from the last one


@dataclass
class Said:
    """An answer of a baseline."""

    label: str
    margin: float
    read: int
    macs: float


class Again:
    """The dense model on the last ``room`` tokens of what was read."""

    def __init__(self, model: Any, tokenizer: Any, room: int, costs: Any):
        self.model, self.tokenizer, self.room, self.costs = model, tokenizer, room, costs
        self.reset()

    def reset(self) -> None:
        """Begin a new text."""
        self.ids: list[int] = []

    def __call__(self, piece: str) -> Said:
        """Read all again."""
        import torch

        from thresher.core.cost import dense_macs

        self.ids += self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        first, last = self.tokenizer("")["input_ids"]
        ids = torch.tensor([[first, *self.ids[-self.room :], last]])
        with torch.no_grad():
            shares = self.model(input_ids=ids).logits[0].softmax(-1)
        best = shares.topk(2)
        spent = dense_macs(self.costs, torch.tensor([ids.shape[1]])).item()
        label = self.model.config.id2label[int(best.indices[0])]
        return Said(label, float(best.values[0] - best.values[1]), len(self.ids), spent)


def draw(source: Path, target: Path) -> None:
    """Write a few texts of each part to a folder; seed 0."""
    import datasets

    target.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", TRAIN), ("test", TEST)):
        rows = datasets.load_dataset("parquet", data_files=str(source / f"{part}.parquet"))["train"]
        rows.shuffle(seed=0).select(range(count)).to_parquet(target / f"{part}.parquet")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("pruned")
    parser.add_argument("data")
    parser.add_argument("--memory", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--limit", type=int, default=300, help="texts of a part")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.dense == "draw":
        draw(Path(options.pruned), Path(options.data))
        return 0

    from run import as_json
    from thresher.data.load import load_task
    from thresher.data.models import load
    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import whole
    from thresher.evaluation.streams import read_all, streamed, sure_margin
    from thresher.streaming import Stream

    task = load_task(options.data)
    (dense, tokenizer), (pruned, _) = load(options.dense), load(options.pruned)

    def part(rows: Any) -> tuple[list[str], list[str]]:
        rows = rows.filter(lambda row: bool(row["text"].split())).shuffle(seed=0)
        rows = rows.select(range(min(len(rows), options.limit)))
        return list(rows["text"]), [dense.config.id2label[label] for label in rows["label"]]

    (texts, labels), (held_out, _) = part(task.test), part(task.validation)
    costs = pruned.token_pruner.architecture.costs
    readers: dict[str, Any] = {"prefix": Again(dense, tokenizer, tokenizer.model_max_length - 2, costs)}
    for memory in options.memory:
        readers[f"window-{memory}"] = Again(dense, tokenizer, memory + 45, costs)
        readers[f"stream-{memory}"] = stream = Stream(pruned, tokenizer, memory)
        sure = sure_margin(read_all(stream, held_out, WORDS), LIMIT)
        if sure is not None:
            readers[f"early-{memory}"] = Stream(pruned, tokenizer, memory, sure)
    rows = []
    for name, reader in readers.items():
        began = perf_counter()
        runs = read_all(reader, texts, WORDS)
        row = {"way": name, **streamed(runs, labels), "seconds": perf_counter() - began, "texts": len(texts)}
        row["share_read"] = sum(r[-1].read for r in runs) / sum(len(tokenizer(t)["input_ids"]) - 2 for t in texts)
        rows.append(row | {"sure": getattr(reader, "sure", None), "words": WORDS, "data": Path(options.data).name})
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()})
    if options.out is not None:
        command = f"python benchmarks/streaming.py DENSE PRUNED {Path(options.data).name}"
        with whole(options.out) as aside:
            aside.write_text(as_json({"rows": [{**row, "command": command, **environment()} for row in rows]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
