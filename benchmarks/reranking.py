"""A cross-encoder on SQuAD's articles, one step after the other; each resumes, and is not run again once it is done.

    python benchmarks/reranking.py warm       MiniLM-L6 learns which sentence answers a question: short pairs, of the
                                              articles to train on
    python benchmarks/reranking.py train      and which paragraph of an article does
    python benchmarks/reranking.py prune      and is pruned, without labels: early and late, by the
                                              query's attention and by that of all tokens
    python benchmarks/reranking.py graphs     int8 graphs of the dense model and of two that are pruned
    python benchmarks/reranking.py measure    reciprocal rank and nDCG of all, graphs too, with paired intervals over
                                              questions
    python benchmarks/reranking.py time       milliseconds for 100 candidates in every runtime, interleaved

``--tiny`` does it all at a size that says nothing, to see that it works, and lands nothing. Models lie in
``runs/benchmarks/passages``, rows in ``results/passages``. ``THRESHER_DATA`` names the folder that holds ``squad``.

``graphs`` and ``time`` need no trained model: where one is missing they take one of its shape and schedule, untrained,
and the rows say so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from weights import pretrained  # noqa: E402

RUNS = HERE.parent / "runs" / "benchmarks"
DATA = Path(os.environ.get("THRESHER_DATA", "data")) / "squad"
LONGEST = 256
PRUNED: dict[str, tuple[str, dict[str, Any], int]] = {  # method, options, epochs
    "early": ("topk", {"at": (1, 2, 3), "keep": (0.5, 0.25, 0.1)}, 1),
    "late": ("topk", {"at": (2, 3), "keep": (0.25, 0.1)}, 0),
    "late-all": ("topk", {"at": (2, 3), "keep": (0.25, 0.1), "votes": "all"}, 0),  # what the query's votes are worth
}
EXPORTED = ("dense", "early", "late")  # whose graphs are made
TIMED = "early"  # the first of the pruned ones in a timing
UNTRAINED = "untrained"  # what models that stand in for trained ones are called besides
METRICS = ("mrr", "ndcg@10")
CANDIDATES, BATCH = 100, 25  # beside the question that is timed; pairs in a forward
CALIBRATING = 128  # pairs of the articles to train on, for int8 in OpenVINO
GRAPHS = (("onnx", "int8"), ("openvino", "int8"))  # that are judged; in a timing also those of
WITH_AMX = ("openvino", "bf16")


@dataclass(frozen=True)
class Size:
    """How much is done: rows of the trainings, questions of the test part (None: all), tokens and repeats that are
    timed."""

    name: str
    rows: int
    pruning: int
    batch: int
    questions: int | None
    widths: tuple[int, ...]
    repeats: int


FULL = Size("passages", 8_000, 16_000, 32, None, (128, 256, 512), 5)
TINY = Size("passages-tiny", 64, 64, 16, 8, (64, 96), 2)


def data_of(size: Size) -> str:
    """Where the data are: all articles, or short ones."""
    if size.questions is None:
        return str(DATA)
    import pandas

    from thresher.evaluation.rows import whole

    file = RUNS / size.name / "data" / "squad" / "validation.parquet"
    if not file.exists():
        rows = pandas.read_parquet(DATA / "validation.parquet")
        kept = rows.groupby("title").context.transform(lambda column: column.isin(column.unique()[:3]))
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as aside:
            rows[kept & rows["title"].isin(rows["title"].unique()[:12])].to_parquet(aside)
    return str(file.parent)


def common(size: Size, rows: int) -> dict[str, Any]:
    """What all trainings share."""
    settings = {"data": data_of(size), "max_length": LONGEST, "metric": "mrr", "task": "rerank", "threads": 1}
    settings |= {"dropout": 0.0}  # one pass; half of a step's time on a processor that has AMX
    return settings | {"limit": rows, "batch_size": size.batch, "progress": False}


def folder(name: str, size: Size) -> Path:
    """Where a model lies."""
    return RUNS / size.name / f"minilm-l6-{name}"


def models(size: Size) -> dict[str, Path]:
    """The models that are there, the dense one first."""
    return {name: folder(name, size) for name in ("dense", *PRUNED) if (folder(name, size) / "config.json").exists()}


def sentences(size: Size) -> str:
    """Where the short pairs are: each question with the sentence that holds its answer, with another one of that
    paragraph and with one of another paragraph of its article."""
    import random
    import re

    import pandas

    from thresher.data.load import load_task
    from thresher.evaluation.rows import whole

    place = RUNS / size.name / "data" / "sentences" / "train.parquet"
    if place.exists():
        return str(place)
    train = load_task(data_of(size), metric=METRICS[0]).train.to_pandas()
    relevant = train[train["label"] == 1]
    known = {*zip(relevant["query"], relevant["passage"], strict=True)}
    asked = pandas.read_parquet(Path(data_of(size)) / "validation.parquet")
    draw, rows = random.Random(0), []
    cut = {text: re.split(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])", text) for text in asked["context"].unique()}
    beside = asked.groupby("title")["context"].unique()
    columns = (asked[name] for name in ("title", "context", "question", "answers"))
    for title, text, question, answers in zip(*columns, strict=True):
        if (question.strip(), text) not in known or not len(answers["text"]):
            continue
        answer = answers["text"][0]
        right = next((one for one in cut[text] if answer in one), None)
        others = [one for one in cut[text] if answer not in one]
        away = [one for other in beside[title] if other != text for one in cut[other] if answer not in one]
        if right is not None and away:
            rows += [(question, right, 1.0), (question, draw.choice(away), 0.0)]
            rows += [(question, draw.choice(others), 0.0)] if others else []
    place.parent.mkdir(parents=True, exist_ok=True)
    with whole(place) as aside:
        pandas.DataFrame(rows, columns=["query", "passage", "label"]).to_parquet(aside)
    return str(place)


def warm(size: Size) -> None:
    """Train on short pairs, of which a step takes little: two passes."""
    from thresher.experiments.train import train as job

    own = {"method": "dense", "prune_epochs": 0, "epochs": 2, "lr": 1e-4, "batch_size": 32, "max_length": 96}
    given = common(size, size.rows) | {"data": sentences(size), "limit": None}
    job(model=pretrained("minilm-l6"), out=folder("warm", size), **given | own)


def train(size: Size) -> None:
    """Train the dense cross-encoder: one pass, with labels."""
    from thresher.experiments.train import train as job

    own = {"method": "dense", "prune_epochs": 0, "epochs": 1, "lr": 1e-4}
    job(model=str(folder("warm", size)), out=folder("dense", size), **own, **common(size, size.rows))


def prune(size: Size) -> None:
    """Prune it, taught by itself alone."""
    from thresher.experiments.train import train as job

    dense = str(folder("dense", size))
    for name, (method, options, epochs) in PRUNED.items():
        if not epochs:
            untrained(dense, method, options, folder(name, size))
            continue
        own = {"method": method, "method_options": dict(options), "distill": 1.0, "dense_model": dense}
        own |= {"epochs": 0, "prune_epochs": epochs, "lr": 5e-5, "prune_lr": 2e-4}
        job(model=dense, out=folder(name, size), **own, **common(size, size.pruning))
        found = json.loads((folder(name, size) / "thresher.json").read_text())
        land(size, name, {key: found[key] for key in ("rows", "predictions")})


def timed_models(size: Size) -> dict[str, Path]:
    """The models whose time is taken; those of ``EXPORTED`` that are missing are made, untrained."""
    there = models(size)
    if {*EXPORTED} <= {*there}:
        return {name: place for name, place in there.items() if name != "late-all"}
    made = {name: folder(f"{name}-{UNTRAINED}", size) for name in EXPORTED}
    if not made["dense"].exists():
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from thresher.evaluation.rows import folder_written_whole

        net = AutoModelForSequenceClassification.from_pretrained(pretrained("minilm-l6"), num_labels=1)
        tokenizer = AutoTokenizer.from_pretrained(pretrained("minilm-l6"))
        with folder_written_whole(made["dense"]) as aside:
            net.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
    for name in EXPORTED[1:]:
        method, options, _ = PRUNED[name]
        untrained(str(made["dense"]), method, options, made[name])
    return made


def untrained(dense: str, method: str, options: dict[str, Any], out: Path) -> None:
    """Write the dense model, pruned, and its tokenizer."""
    from thresher.api import prune
    from thresher.core.pruner import METHODS
    from thresher.data.models import load
    from thresher.evaluation.rows import folder_written_whole

    if out.exists():
        return
    net, tokenizer = load(dense)
    prune(net, METHODS[method](**options, protect={"until": [tokenizer.sep_token_id]}))
    with folder_written_whole(out) as aside:
        net.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


def measure(size: Size) -> None:
    """Judge the order of the test part's passages."""
    from functools import partial

    import numpy as np

    from thresher.data.load import load_task
    from thresher.data.models import load
    from thresher.data.tokenize import tokenize
    from thresher.evaluation.hardware import environment
    from thresher.evaluation.predict import Text, logits_of, outcome
    from thresher.evaluation.rows import row
    from thresher.experiments.answers import kept_answers
    from thresher.stats.bootstrap import bootstrap_interval

    nets = {name: load(str(place)) for name, place in models(size).items()}
    task = load_task(data_of(size), metric=METRICS[0])
    test = tokenize(task.test, task, nets["dense"][1], LONGEST)[0]
    test = test.select([i for i, question in enumerate(test["row"]) if question < (size.questions or np.inf)])
    ask = partial(kept_answers, batch_size=size.batch, most=None)
    said = {(name, "torch", "fp32"): ask(net, folder(name, size), test) for name, (net, _) in nets.items()}
    for (runtime, precision), graphs in opened({name: folder(name, size) for name in nets}, size).items():
        for name, graph in graphs.items():
            logits = logits_of(graph.forward, Text(nets[name][0], test, LONGEST))
            said[name, runtime, precision] = replace(said[name, "torch", "fp32"], logits=logits)
    rows, gains = [], {who: {m: outcome(own, test, m)[0] for m in METRICS} for who, own in said.items()}
    for metric in METRICS:
        before = gains["dense", "torch", "fp32"][metric]
        for (name, runtime, precision), own in said.items():
            after = gains[name, runtime, precision][metric]
            values = {"quality": 100 * float(after.mean()), "quality_dense": 100 * float(before.mean())}
            if (name, runtime) != ("dense", "torch"):
                low, high = bootstrap_interval(metric, np.ones(len(before)), before, after)
                values |= {"interval_low": low, "interval_high": high}
            mode = "dense-unpadded" if name == "dense" else "pruned"
            values |= {"task": "passages", "model": "minilm-l6", "method": name, "metric": metric, "mode": mode}
            values |= {"split": "test", "selected_on": task.selected_on, "max_length": LONGEST, "runtime": runtime}
            values |= {"precision": precision, "n_examples": len(before), "tokens_mean": own.tokens_mean, "seed": 0}
            rows.append(row(**values, flops_ratio=own.macs_dense / own.macs_used, **environment()))
    names = {who: who[0] if who[1] == "torch" else " ".join(who) for who in gains}
    predictions = {names[who]: {m: own[m].round(5).tolist() for m in METRICS} for who, own in gains.items()}
    land(size, "quality", {"rows": rows, "predictions": predictions})


def graphs(size: Size) -> None:
    """Make the graphs, of trained models where these are there."""
    opened(timed_models(size), size, timed_graphs())


def opened(
    places: dict[str, Path], size: Size, graphs: tuple[tuple[str, str], ...] = GRAPHS
) -> dict[tuple[str, str], dict[str, Any]]:
    """The graphs of the models of ``EXPORTED`` among ``places``, by runtime and precision; made where they are missing
    or of another model."""
    import torch

    from speed import graph_of
    from thresher.data.load import load_task
    from thresher.data.models import load
    from thresher.data.tokenize import tokenize

    nets = {name: load(str(places[name])) for name in EXPORTED if name in places}
    tokenizer, task = nets["dense"][1], load_task(data_of(size), metric=METRICS[0])
    pairs = task.train.shuffle(seed=0).select(range(min(CALIBRATING, len(task.train))))
    pairs = tokenize(pairs, task, tokenizer, LONGEST)[0]
    names = [name for name in tokenizer.model_input_names if name in pairs.column_names]
    calibration = [{name: torch.tensor([pair[name]]) for name in names} for pair in pairs]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for runtime, precision in graphs:
        how = {"format": runtime, "precision": precision, "tokenizer": tokenizer, "calibration": calibration}
        for name, (net, _) in nets.items():
            place = RUNS / size.name / "graphs" / f"{places[name].name}-{runtime}-{precision}"
            graph = graph_of(net, place, max(size.widths), **how)
            found.setdefault((runtime, precision), {})[name] = graph
    return found


def timed_graphs() -> tuple[tuple[str, str], ...]:
    """The runtimes and precisions of the graphs that are timed on this processor."""
    from thresher.evaluation.hardware import has_bf16

    return (*GRAPHS, WITH_AMX) if has_bf16() else GRAPHS


def candidates(size: Size, tokenizer: Any, width: int, seed: int = 0) -> Any:
    """The tokens of a question with 100 passages of the test part's paragraphs, one behind the other: ``width`` / 2 to
    ``width`` tokens in all, drawn evenly."""
    import random

    from datasets import Dataset

    from thresher.data.load import load_task

    task, draw = load_task(data_of(size), metric=METRICS[0]), random.Random(seed)
    passages, question = list(dict.fromkeys(task.test["passage"])), task.test["query"][0]
    made = []
    for i in range(CANDIDATES):
        text = " ".join(passages[(i + j) % len(passages)] for j in range(8))
        given = {"truncation": "only_second", "max_length": draw.randint(width // 2, width)}
        made.append(dict(tokenizer(question, text, return_attention_mask=True, **given)))
    return Dataset.from_list(made)


def time(size: Size) -> None:
    """Time 100 candidates of one question: dense as it is mostly run, without padding, and pruned. Rows of processors
    with AMX have a file of their own."""
    from thresher.core.compat import instructions
    from thresher.data.models import load
    from thresher.data.task import Task
    from thresher.evaluation.benchmark import measure as timed

    places = timed_models(size)
    trained = places["dense"] == folder("dense", size)
    nets = {name: load(str(place)) for name, place in places.items()}
    tokenizer, graphs = nets["dense"][1], opened(places, size, timed_graphs())
    graphs = {w: {"pruned" if n == TIMED else n: graph for n, graph in own.items()} for w, own in graphs.items()}
    found = []
    for width in size.widths:
        data = candidates(size, tokenizer, width)
        task = Task(None, None, data, ("query", "passage"), None, [], "reranking", "mrr", "passages", "nothing", {})
        given = {"model": "minilm-l6", "split": "test", "seed": 0, "metric": None}
        made = timed(
            nets[TIMED][0],
            data,
            task,
            max_length=width,
            against=nets["dense"][0],
            baselines={name: nets[name][0] for name in nets if name not in (TIMED, "dense")},
            graphs=graphs,
            batch_sizes=(BATCH,),
            batches=CANDIDATES // BATCH,
            repeats=size.repeats,
            fields=given,
        )
        for row in made:
            spent = 1000 * CANDIDATES / row["samples_per_second"]
            note = f"{spent:.1f} ms for {CANDIDATES} candidates"
            found.append({**row, "note": note if trained else f"{note}; models of this shape, untrained"})
    land(size, "time-amx" if "AMX" in instructions() else "time", {"rows": found})


def land(size: Size, name: str, result: dict[str, Any]) -> None:
    """Write rows where they belong, as a whole; those of no meaning beside the models."""
    from run import RESULTS, as_json
    from thresher.evaluation.rows import whole

    place = RESULTS / "passages" if size.name == FULL.name else RUNS / size.name
    step = {"quality": "measure", "time": "time", "time-amx": "time"}.get(name, "prune")
    command = f"python benchmarks/reranking.py {step}"
    rows = [{**row, "command": command} for row in result["rows"]]
    with whole(place / f"minilm-l6-{name}-s0.json") as aside:
        aside.write_text(as_json({**result, "rows": rows}))


STEPS = {"warm": warm, "train": train, "prune": prune, "graphs": graphs, "measure": measure, "time": time}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--tiny", action="store_true", help="at a size that says nothing")
    parser.add_argument("--threads", type=int, help="threads of measure and time (default: torch's)")
    parser.add_argument("--repeats", type=int, help="of time (default: 5)")
    options = parser.parse_args()
    size = TINY if options.tiny else FULL
    size = replace(size, repeats=options.repeats or size.repeats)
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    STEPS[options.step](size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
