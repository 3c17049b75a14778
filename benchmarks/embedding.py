"""An embedder with fewer tokens, tuned alone and trained without labels: how well it finds documents, and how fast.

    python benchmarks/embedding.py tune       all-MiniLM-L6-v2, a schedule for each budget, nothing trained
    python benchmarks/embedding.py merge      the same share merged in every layer, by keys or states, nothing chosen
    python benchmarks/embedding.py train      and trained by the dense model's vectors, to 3x for longer as well
    python benchmarks/embedding.py measure    Cranfield and 20 Newsgroups: nDCG@10, overlap, cosine
    python benchmarks/embedding.py time       documents per second beside dense unpadded, graphs too

``measure`` and ``time`` cut texts to ``--length`` tokens (256).

The texts to learn from are the train part of 20 Newsgroups; Cranfield is not seen. Each step resumes and is not run
again once it is done. ``THRESHER_PEERS`` names the python of an environment with other libraries (see ``peers.py``),
which are then timed as well. Models lie in ``runs/benchmarks/embedding``, rows in ``results/embedding``;
``THRESHER_DATA`` names the folder of the data.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from peers import ENGINES  # noqa: E402
from weights import pretrained  # noqa: E402

RUNS = HERE.parent / "runs" / "benchmarks" / "embedding"
DATA = Path(os.environ.get("THRESHER_DATA", "data"))
TARGETS = {"2x": 0.5, "3x": 0.333}
MERGED = {  # by what tokens are compared: share of the tokens in each layer
    "tome": {"1.5x": 0.13, "2x": 0.22},
    "tome-states": {"1.9x": 0.222},
}
BY_STATES = {"metric": "states", "rounds": 2, "min_tokens": 64}
LONGEST, PAUSE = 256, 0.5  # tokens of a text; seconds between turns
POSTS, SAME = 2000, 10  # to judge; neighbours that are judged
SHORT = {"limit": 6000, "prune_epochs": 1, "prune_lr": 1e-4}  # a training
LONG = {"limit": None, "prune_epochs": 2, "prune_lr": 2e-4}  # of four times as many steps
TRAINED: dict[tuple[str, str], dict[str, Any]] = {("tome-trained", budget): SHORT for budget in TARGETS}
TRAINED |= {("tome-trained-long", "3x"): LONG}
TIMED, REPEATS = 200, 3
GRAPHED = {"dense": None, "tome-trained-2x": ("tome-trained", "2x"), "tome-trained-3x": ("tome-trained", "3x")}
GRAPHS = (("onnx", "int8"), ("openvino", "int8"), ("openvino", "bf16"))  # the last where the processor computes in it
CALIBRATING = 128  # texts to train on, for int8 in OpenVINO
WAYS = ("tuned", "topk", "top", *MERGED, "tome-trained", "tome-trained-long")


def folder(way: str, budget: str) -> Path:
    """Where a model lies."""
    return RUNS / f"minilm-l6-{way}-{budget}"


def models() -> dict[tuple[str, str], Path]:
    """The folders of what is there, by way and budget."""
    named = {(way, budget): folder(way, budget) for way in WAYS for budget in ("1.5x", "1.9x", *TARGETS)}
    return {name: place for name, place in named.items() if (place / "config.json").exists()}


def tune() -> None:
    """Look for the schedules that move the vectors least."""
    from thresher.experiments.tune import tune as job

    for budget, target in TARGETS.items():
        if not folder("tuned", budget).exists():
            given = {"data": str(DATA / "20newsgroups"), "text": ("text",), "max_length": LONGEST}
            job(model=pretrained("minilm-l6"), target_flops=target, out=folder("tuned", budget), **given)


def merge() -> None:
    """Merge by ToMe, as anybody can without data."""
    from thresher import ToMe, prune
    from thresher.data.embedder import load_embedder
    from thresher.evaluation.rows import folder_written_whole

    for way, budget, share in ((way, *own) for way, shares in MERGED.items() for own in shares.items()):
        if not folder(way, budget).exists():
            net, tokenizer = load_embedder(pretrained("minilm-l6"))
            with folder_written_whole(folder(way, budget)) as aside:
                method = ToMe(r=share, **(BY_STATES if way == "tome-states" else {}))
                prune(net, method).save_pretrained(aside, tokenizer)


def unlabelled() -> str:
    """Where the posts to learn from are, without what they are about."""
    from thresher.data.load import load_task
    from thresher.evaluation.rows import whole

    place = RUNS / "data" / "posts.parquet"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with whole(place) as aside:
            load_task(str(DATA / "20newsgroups")).train.select_columns(["text"]).to_parquet(str(aside))
    return str(place)


def train() -> None:
    """Train to the budgets, as ``thresher train --task embed`` does where no method is named."""
    from thresher.experiments.train import train as job

    given = {"data": unlabelled(), "text": ("text",), "max_length": LONGEST, "threads": 1, "task": "embed"}
    given |= {"batch_size": 16, "epochs": 0, "progress": False}
    for name, own in TRAINED.items():
        job(model=pretrained("minilm-l6"), out=folder(*name), target_flops=TARGETS[name[1]], **given | own)


def tokens_of(texts: list[str], tokenizer: Any, length: int) -> Any:
    """Tokenized rows of some texts, cut."""
    from datasets import Dataset

    encoded = tokenizer(texts, truncation=True, max_length=length)
    return Dataset.from_dict({name: encoded[name] for name in ("input_ids", "token_type_ids")})


def judged(task: str, name: tuple[str, str], answers: Any, gains: tuple[Any, Any], length: int) -> dict[str, Any]:
    """The row of a model on a task; ``gains``: of each query, of the dense model and of this one."""
    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import row

    before, values = gains
    summary = folder(*name) / "thresher.json" if name[1] else Path()
    steps = json.loads(summary.read_text()).get("steps", {}) if summary.is_file() else {}
    return row(
        task=task,
        model="minilm-l6",
        method="-".join(filter(None, name)),
        target_flops=TARGETS.get(name[1]),
        seed=0,
        runtime="torch",
        precision="fp32",
        mode="pruned" if name[1] else "dense-unpadded",
        metric="ndcg@10",
        quality=100 * float(values.mean()),
        quality_dense=100 * float(before.mean()),
        flops_ratio=answers.macs_dense / answers.macs_used,
        split="test",
        selected_on="validation part of 20newsgroups",
        max_length=length,
        n_examples=len(values),
        tokens_mean=answers.tokens_mean,
        trained_steps=steps.get("prune"),
        **environment(),
    )


def measure(length: int) -> None:
    """Judge all models on what they have not seen. Rows of models that are not here stay."""
    import numpy as np

    from thresher.data.embedder import load_embedder
    from thresher.data.load import load_task
    from thresher.data.retrieval import load_retrieval
    from thresher.evaluation.retrieval import compare_embeddings, nearest, retrieval_gains
    from thresher.experiments.answers import kept_answers
    from thresher.stats.bootstrap import bootstrap_interval
    from thresher.stats.ranking import gain

    cranfield, posts = load_retrieval(DATA / "cranfield"), load_task(str(DATA / "20newsgroups")).test
    posts = posts.shuffle(seed=0).select(range(POSTS))
    labels = np.asarray(posts["label"])
    dense, tokenizer = load_embedder(pretrained("minilm-l6"))
    nets = {("dense", ""): dense} | {name: load_embedder(str(place))[0] for name, place in models().items()}
    texts = {"documents": cranfield.documents, "queries": cranfield.queries, "posts": list(posts["text"])}
    parts = {name: tokens_of(own, tokenizer, length) for name, own in texts.items()}
    kept = {"place": RUNS / "answers", "most": None}
    said = {
        name: {part: kept_answers(net, folder(*name), rows, **kept) for part, rows in parts.items()}
        for name, net in nets.items()
    }

    def same(vectors: Any) -> np.ndarray:
        found = nearest(vectors, vectors, SAME + 1)
        grades = [(labels[own] == labels[i])[own != i][:SAME].astype(float) for i, own in enumerate(found)]
        return np.array([gain(own, (labels == labels[i]).astype(float), "ndcg@10") for i, own in enumerate(grades)])

    rows, first = [], {}
    for name, own in said.items():
        vectors = {part: answers.logits.numpy() for part, answers in own.items()}
        gains = {
            "cranfield": retrieval_gains(cranfield, vectors["queries"], vectors["documents"], ["ndcg@10"])["ndcg@10"],
            "20newsgroups": same(vectors["posts"]),
        }
        first = first or {"vectors": vectors, "gains": gains}
        both = [(them["queries"], them["documents"]) for them in (vectors, first["vectors"])]
        near = {
            "cranfield": compare_embeddings(*both[0], *both[1]),
            "20newsgroups": {"cosine": float((vectors["posts"] * first["vectors"]["posts"]).sum(1).mean())},
        }
        for task, values in gains.items():
            before, parted = first["gains"][task], ("posts",) if task == "20newsgroups" else ("documents",)
            low, high = bootstrap_interval("ndcg@10", np.ones(len(before)), before, values)
            said_of = judged(task, name, own[parted[0]], (before, values), length)
            rows.append(said_of | {"interval_low": low, "interval_high": high, **near[task]})
    land("quality", rows, length)


class Peer:
    """Another library, in a process of its own that waits between turns."""

    def __init__(self, python: str, engine: str, texts: Path, length: int):
        command = [python, str(HERE / "peers.py"), engine, pretrained("minilm-l6"), str(texts), str(length)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.vectors = texts.with_name(f"{engine}.npy")
        if "ready" not in self.said():
            raise SystemExit(f"{engine} did not start: run it by hand, {' '.join(command)}")

    def said(self) -> dict[str, Any]:
        """The next line of JSON that it prints, empty at its end."""
        assert self.process.stdout is not None
        line = next((line for line in self.process.stdout if line.startswith("{")), "{}")
        return json.loads(line)

    def turn(self) -> float:
        """Embed the texts once; the seconds it took."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.said()["seconds"]


def graphs(length: int, runtimes: list[str]) -> dict[str, Any]:
    """Graphs of the dense model and of the trained ones, by name; made where they are missing."""
    import torch

    from speed import graph_of
    from thresher.data.embedder import load_embedder
    from thresher.data.load import load_task
    from thresher.evaluation.hardware import has_bf16

    texts = load_task(str(DATA / "20newsgroups")).train.shuffle(seed=0).select(range(CALIBRATING))["text"]
    found = {}
    for name, own in GRAPHED.items():
        if own and own not in models():
            continue
        net, tokenizer = load_embedder(str(folder(*own)) if own else pretrained("minilm-l6"))
        rows = tokens_of([*texts], tokenizer, length)
        calibration = [{key: torch.tensor([value]) for key, value in row.items()} for row in rows]
        how = {"tokenizer": tokenizer, "calibration": calibration}
        for runtime, precision in (one for one in GRAPHS if one[0] in runtimes and (one[1] != "bf16" or has_bf16())):
            place = RUNS / "graphs" / f"{name}-{length}-{runtime}-{precision}"
            found[f"{name} {runtime} {precision}"] = graph_of(
                net, place, length, format=runtime, precision=precision, **how
            )
    return found


def time(length: int, engines: list[str], runtimes: list[str]) -> None:
    """Time documents of 20 Newsgroups, interleaved: dense in sorted batches and packed, and pruned, in torch and as
    int8 graphs; other libraries. Texts become tokens within the time of graphs and of other libraries."""
    from statistics import median
    from tempfile import TemporaryDirectory
    from time import perf_counter, sleep

    import numpy as np
    import torch

    from thresher.data.embedder import load_embedder
    from thresher.data.load import load_task
    from thresher.evaluation.hardware import environment
    from thresher.evaluation.predict import packed, plain, predict

    texts = list(load_task(str(DATA / "20newsgroups")).test.shuffle(seed=1).select(range(TIMED))["text"])
    dense, tokenizer = load_embedder(pretrained("minilm-l6"))
    rows, nets = tokens_of(texts, tokenizer, length), {"dense": plain(dense), "dense-packed": packed(dense)}
    nets |= {"-".join(name): load_embedder(str(place))[0] for name, place in models().items()}
    opened, python = graphs(length, runtimes), os.environ.get("THRESHER_PEERS")
    vectors: dict[str, Any] = {}
    with TemporaryDirectory() as place:
        file = Path(place) / "texts.json"
        file.write_text(json.dumps(texts))
        peers = {name: Peer(python, name, file, length) for name in engines} if python else {}
        spent: dict[str, list[float]] = {name: [] for name in (*nets, *opened, *peers)}
        for turn in range(REPEATS + 1):
            for name in spent:
                sleep(PAUSE)  # threads of the runtime before it still spin
                start = perf_counter()
                if name in peers:
                    peers[name].turn()
                elif name in opened:
                    vectors[name] = opened[name].encode(texts)
                else:
                    vectors[name] = predict(nets[name], rows).logits.numpy()
                if turn:
                    spent[name].append(perf_counter() - start)
        vectors |= {name: np.load(peer.vectors) for name, peer in peers.items()}
    near = {name: float((own * vectors["dense"]).sum(1).mean()) for name, own in vectors.items()}
    best = min(median(spent[name]) for name in ("dense", "dense-packed"))
    land(
        "time",
        [
            {
                "method": name,
                "documents_per_second": TIMED / median(own),
                "speedup": best / median(own),
                "cosine": near[name],
                "spread": (max(own) - min(own)) / median(own),
                "threads": torch.get_num_threads(),
                "max_length": length,
                "repeats": REPEATS,
                **environment(),
            }
            for name, own in spent.items()
        ],
        length,
    )


def land(name: str, rows: list[dict], length: int) -> None:
    """Write rows where they belong, as a whole."""
    from run import RESULTS, as_json
    from thresher.evaluation.rows import whole

    command = f"python benchmarks/embedding.py {name.replace('quality', 'measure')} --length {length}"
    rows = [{**row, "command": command} for row in rows]
    place = RESULTS / "embedding" / f"minilm-l6-{name}.json"
    if place.exists():
        old = json.loads(place.read_text())["rows"]
        if name == "time":  # one run, one table
            rows = [row for row in old if row["max_length"] != length] + rows
        else:
            new = {which(row) for row in rows}
            rows = [row for row in old if which(row) not in new] + rows
    place.parent.mkdir(parents=True, exist_ok=True)
    with whole(place) as aside:
        aside.write_text(as_json({"rows": rows}))
    for row in rows:
        print({key: value for key, value in row.items() if value is not None and key not in ("versions", "command")})


def which(row: dict) -> tuple:
    """What no two rows of a file have in common."""
    return row.get("task"), row["method"], row["max_length"]


STEPS: dict[str, Any] = {"tune": tune, "merge": merge, "train": train, "measure": measure, "time": time}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--engines", default=",".join(ENGINES), help="other libraries, in time (default: all)")
    parser.add_argument("--graphs", default="onnx,openvino", help="runtimes of graphs, in time (default: both)")
    parser.add_argument("--length", type=int, default=LONGEST, help="tokens of a text, in measure and time")
    given = parser.parse_args()
    engines, runtimes = ([name for name in own.split(",") if name] for own in (given.engines, given.graphs))
    told: dict[str, tuple] = {"measure": (given.length,), "time": (given.length, engines, runtimes)}
    STEPS[given.step](*told.get(given.step, ()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
