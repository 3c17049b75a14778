"""Prompts that shorten: ``python benchmarks/prompts.py``, 8 minutes on two quiet cores at most.

``--only classifier``, once before, trains what ``LLMLingua2`` asks: MiniLM-L6, on what SmolLM2 foresees least in
paragraphs of SQuAD that no prompt has. Without it answers leave it out.

SmolLM2-135M-Instruct, dequantised (``python benchmarks/weights.py smollm2-135m-dequantised``), reads

* texts of SQuAD with one number in them, at depths from 0 to 1, and the question behind: does it still say the number
  with ``LazyLLM``, ``TopK``, with ``SnapKV`` on top, and on what ``compress`` leaves, by ``GemFilter`` and by
  ``LLMLingua2``, which does not know the question; resumes;
* texts of 4,096 and 8,000 tokens, for the time to the first token, full and pruned, in turns.

Answers come first and take half of ``--minutes`` at most; where they end earlier fewer prompts were asked, and the rows
say how many. Times are medians of rounds in which all take turns; nothing else may run meanwhile. ``--only answers``
and ``--only times`` make one of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, median
from time import perf_counter, process_time
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from longcontext import PRECISIONS, RUNS, about, digest, opened, results, resume  # noqa: E402
from run import as_json  # noqa: E402
from thresher.evaluation.hardware import environment  # noqa: E402
from thresher.evaluation.rows import folder_written_whole, whole  # noqa: E402

MODEL, DATA = "smollm2-135m-dequantised", Path(os.environ.get("THRESHER_DATA", "data")) / "squad" / "validation.parquet"
QUESTION = "\n\nQuestion: What is the secret number of the harbour?\nAnswer: The secret number of the harbour is"
NEEDLE = " The secret number of the harbour is {}. "
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS = (4096, 8000)  # of the prompts that are timed
ROUNDS = 3
TRAINED, EPOCHS, BATCH, RATE = 600, 2, 16, 1e-4  # paragraphs that a classifier learns from, and how
SEED = 1  # of the prompts; LazyLLM's layers were chosen on the first ones of 0


def paragraphs() -> list[str]:
    """The paragraphs of SQuAD's validation part, each once."""
    import datasets

    file = DATA if DATA.exists() else next(DATA.parent.glob("validation*"))
    rows = datasets.load_dataset(file.suffix.removeprefix(".").replace("jsonl", "json"), data_files=str(file))["train"]
    return list(dict.fromkeys(rows["context"]))


def shuffled() -> tuple[list[str], list[str], Any]:
    """The paragraphs that a classifier learns from, those of prompts, and what has drawn them."""
    import random

    texts, draw = paragraphs(), random.Random(SEED)
    draw.shuffle(texts)
    return texts[:TRAINED], texts[TRAINED:], draw


def needles(tokenizer: Any, count: int, tokens: int) -> Iterator[tuple[str, str, float]]:
    """(text, number, depth) of ``count`` texts of about ``tokens`` tokens; ``QUESTION`` goes behind each."""
    _, texts, draw = shuffled()
    for number in range(count):
        parts: list[str] = []
        while len(tokenizer(" ".join(parts))["input_ids"]) < tokens - 60:
            parts += texts.pop().split(". ")
        code, depth = str(draw.randint(10_000, 99_999)), DEPTHS[number % len(DEPTHS)]
        parts.insert(round(depth * len(parts)), NEEDLE.format(code).strip())
        yield ". ".join(parts), code, depth


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


def answers(model: Any, tokenizer: Any, text: str, code: str, classifiers: dict[str, Any]) -> list[dict]:
    """Of one text and each method, whether the number was said."""
    from thresher import GemFilter, LLMLingua2, compress, unprune

    ids, rows = tokenizer(text + QUESTION, return_tensors="pt"), []
    about = {"tokens_in": ids["input_ids"].shape[1]}
    for name, pruned in methods().items():
        row = said(pruned(model), tokenizer, ids, code)
        rows.append(about | {"method": name, "tokens_out": about["tokens_in"]} | row)
        if name != "full":
            unprune(model)
    for keep in (0.5, 0.25):
        made = {f"gemfilter {keep}": compress(model, text + QUESTION, GemFilter(keep), tokenizer=tokenizer)}
        for trained, (classifier, own) in classifiers.items():
            for forced, told in ((True, ""), (False, ", nothing forced")):
                method = LLMLingua2(keep, numbers=forced, names=forced)
                made[f"llmlingua2 {keep}, {trained}{told}"] = compress(classifier, text, method, tokenizer=own)
        for name, short in made.items():
            left = short.text if name.startswith("gemfilter") else short.text + QUESTION
            again = tokenizer(left, return_tensors="pt")
            found = {"tokens_out": again["input_ids"].shape[1], "compress_seconds": short.seconds}
            rows.append(about | {"method": name} | said(model, tokenizer, again, code) | found | {"kept": code in left})
    return rows


def classifier_at(place: str) -> tuple[Any, Any]:
    """A token classifier of two labels on a model, and its tokenizer."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer, set_seed

    set_seed(SEED)  # the head of one that has not been trained
    model = AutoModelForTokenClassification.from_pretrained(place, num_labels=2)
    return model.eval(), AutoTokenizer.from_pretrained(place)


def learn(teacher: Any, told: Any, place: Path) -> dict:
    """Train a classifier on what ``teacher`` foresees least, and write it to ``place``."""
    from transformers import DataCollatorForTokenClassification, Trainer, TrainingArguments

    from thresher import likelihood_labels
    from weights import pretrained

    begun = process_time()
    classifier, tokenizer = classifier_at(pretrained("minilm-l6"))
    rows = likelihood_labels(shuffled()[0], tokenizer, teacher, told)
    labelled = process_time() - begun
    settings = TrainingArguments(
        str(place.with_suffix(".training")),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        seed=SEED,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    held_out = len(rows) // 10
    trainer = Trainer(
        classifier,
        settings,
        DataCollatorForTokenClassification(tokenizer),
        train_dataset=rows[held_out:],
        eval_dataset=rows[:held_out],
        compute_metrics=agreement,
    )
    before = trainer.evaluate()["eval_agreement"]
    trainer.train()
    found = {"agreement_untrained": before, "agreement": trainer.evaluate()["eval_agreement"], "texts": len(rows)}
    with folder_written_whole(place, replace=True) as aside:
        classifier.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    spent = {"processor_labels": labelled, "processor": process_time() - begun}
    return {"method": "llmlingua2", "model_trained": "minilm-l6", "epochs": EPOCHS} | found | spent


def agreement(predicted: Any) -> dict[str, float]:
    """The share (%) of tokens of which a classifier says what their label says."""
    logits, labels = predicted
    return {"agreement": 100 * float((logits.argmax(-1) == labels)[labels >= 0].mean())}


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


def summary(rows: list[dict]) -> list[dict]:
    """Of each method the numbers that were said, and the loss against the full prompt with its paired 95 % interval."""
    from thresher.stats.paired import interval

    own = {name: [row for row in rows if row["method"] == name] for name in dict.fromkeys(r["method"] for r in rows)}
    lines = []
    for name, of in own.items():
        lost = np.array([100.0 * (full["right"] - row["right"]) for full, row in zip(own["full"], of, strict=True)])
        low, high = interval(lost, 100.0) or (None, None)
        line = {"method": name, "n_examples": len(of), "quality": 100 * mean(row["right"] for row in of)}
        line |= {"drop": float(lost.mean()), "interval_low": low, "interval_high": high}
        line |= {side: mean(row[side] for row in of) for side in ("tokens_in", "tokens_out")}
        lines.append(line | ({"kept": 100 * mean(row["kept"] for row in of)} if "kept" in of[0] else {}))
    return lines


def main() -> int:
    """Ask, time, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("classifier", "answers", "times"))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--prompts", type=int, default=40, metavar="N")
    parser.add_argument("--tokens", type=int, default=600, metavar="N", help="of a text with a number in it")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of prompts that are timed")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prompts")
    asked = parser.parse_args()
    import torch

    if asked.threads:
        torch.set_num_threads(asked.threads)
    begun, place = perf_counter(), RUNS / "words"
    model, tokenizer = opened(asked)
    model.generation_config.max_length = None
    half = begun + 60 * asked.minutes * (0.5 if asked.only is None else 1)
    made = {}
    if asked.only == "classifier":
        made["classifier"] = [learn(model, tokenizer, place)]
    if asked.only in (None, "answers"):
        from weights import pretrained

        there = (place / "config.json").exists()
        places = {"trained": str(place), "untrained": pretrained("minilm-l6")} if there else {}
        classifiers = {name: classifier_at(folder) for name, folder in places.items()}
        made["answers"] = list(ask(asked, model, tokenizer, classifiers, half))
    if asked.only in (None, "times"):
        made["times"] = times(model, tokenizer, begun + 60 * asked.minutes, tuple(asked.lengths))
    for name, rows in made.items():
        known = {**about(asked), "command": f"python benchmarks/prompts.py --only {name}", **environment()}
        lines, more = (rows, {}) if name != "answers" else (summary(rows), {"prompts": rows})
        print(*lines, sep="\n")
        text = as_json({"rows": [known | line for line in lines], **more})
        with whole(asked.out / f"{name}.json") as aside:
            aside.write_text(text, encoding="utf-8")
    return 0


def ask(asked: argparse.Namespace, model: Any, tokenizer: Any, classifiers: dict, until: float) -> Iterator[dict]:
    """The rows of all texts that are asked about before ``until``, and of those that were before."""
    texts = list(needles(tokenizer, asked.prompts, asked.tokens))
    name = f"answers-{len(classifiers)}-{digest([texts, QUESTION])}"

    def parts() -> Iterator[tuple[int, Callable[[], list[dict]]]]:
        for number, (text, code, depth) in enumerate(texts):
            if perf_counter() > until:
                return
            rows = partial(answers, model, tokenizer, text, code, classifiers)
            yield number, lambda rows=rows, depth=depth: [{"depth": depth, **row} for row in rows()]

    yield from results(resume(asked, name, parts()))


if __name__ == "__main__":
    sys.exit(main())
