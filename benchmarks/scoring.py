"""``thresher score`` on two processes against a plain loop, and killed: ``python benchmarks/scoring.py [--rows N]``.

Pieces of the reviews of IMDB below ``THRESHER_DATA``, 5 to 45 words each and 64 tokens at most, through MiniLM-L6 with
a random head, dense and pruned. Prints rows as JSON and writes them to ``--out``:

* ``speed``: a loop as one writes it by hand (transformers, sorted by length, batches of 32, one process of two threads)
  and the command on two processes of one thread, in turns, every one in a process of its own;
* ``kill -9``: one worker or all processes, at random moments, and the command again until it is done;
* ``ray``: a local cluster of two actors, one of them killed; where ray is installed.

The last two compare every byte with a run that was left alone, and count the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import psutil

from entries import DATA
from weights import pretrained

LONGEST, SHARDS, BATCH = 64, 100, 32
WORDS = (5, 45)  # of a text
PRUNED = {"keep": 0.5, "at": (1, 3)}
COMMAND = [sys.executable, "-c", "from thresher.cli.app import main; main()", "score"]


def make_texts(folder: Path, count: int) -> Path:
    """Write a file of so many rows."""
    import pandas as pd

    reviews = pd.concat(
        [pd.read_parquet(DATA / "imdb" / f"{part}.parquet", columns=["text"]) for part in ("train", "test")]
    )
    draw, texts = random.Random(0), []
    for review in draw.sample(reviews["text"].tolist(), len(reviews)):
        words = review.replace("<br />", " ").split()
        while words and len(texts) < count:
            size = draw.randint(*WORDS)
            texts.append(" ".join(words[:size]))
            words = words[size:]
    if len(texts) < count:
        raise SystemExit(f"--rows {count}: the reviews make {len(texts)} texts")
    pd.DataFrame({"id": range(count), "text": texts}).to_parquet(folder / "texts.parquet")
    return folder / "texts.parquet"


def make_models(folder: Path) -> None:
    """Save the same model dense and pruned."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from thresher import TopK, prune

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(pretrained("minilm-l6"), num_labels=2)
    for name in ("dense", "pruned"):
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(pretrained("minilm-l6")).save_pretrained(folder / name)
        if name == "dense":
            prune(model, TopK(**PRUNED))


def loop(model: Path, data: Path, out: Path, threads: int) -> float:
    """Score a file as one does by hand; returns the seconds from the opened model to the written file."""
    import pandas as pd
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from thresher import prune

    torch.set_num_threads(threads)
    net = AutoModelForSequenceClassification.from_pretrained(model).eval()
    net = prune(net) if getattr(net.config, "token_pruning", None) else net
    tokenizer = AutoTokenizer.from_pretrained(model)
    began = time.perf_counter()
    frame = pd.read_parquet(data)
    encoded = tokenizer(frame["text"].tolist(), truncation=True, max_length=LONGEST)["input_ids"]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    found = torch.zeros(len(encoded), 2)
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            inputs = tokenizer.pad({"input_ids": [encoded[i] for i in rows]}, return_tensors="pt")
            found[rows] = net(**inputs).logits.softmax(-1)
    frame.assign(probability=found.max(-1).values.numpy()).to_parquet(out)
    return time.perf_counter() - began


class Scoring:
    """Run the command over one file with one model, and judge what it made."""

    def __init__(self, folder: Path, data: Path, rows: int):
        self.folder, self.data, self.rows = folder, data, rows
        self.every = -(-rows // SHARDS)

    def started(self, out: Path, *options: object) -> subprocess.Popen:
        """The command, in a group of processes of its own."""
        call = [*COMMAND, self.folder / "pruned", "--data", self.data, "--out", out, "--shard-rows", self.every]
        call += ["--max-length", LONGEST, "--keep", "id", "--workers", 2, "--quiet", *options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*map(str, call)], start_new_session=True, **quiet)

    def ended(self, process: subprocess.Popen) -> None:
        """Wait for the end of a run that nobody disturbs any more."""
        said = process.communicate()[1]
        if process.returncode:
            raise SystemExit(f"the command ended with code {process.returncode}: {said}")

    def judged(self, out: Path, undisturbed: Path) -> dict:
        """Whether the result is that of the undisturbed run, and how often each row is there."""
        import pandas as pd

        files, expected = ({p.name: p.read_bytes() for p in sorted(place.iterdir())} for place in (out, undisturbed))
        times = pd.read_parquet(out)["id"].value_counts()
        once = int((times == 1).sum())
        return {
            "rows_once": once,
            "rows_lost": self.rows - len(times),
            "rows_twice": len(times) - once,
            "files": len(files),
            "files_of_equal_bytes": sum(files.get(name) == content for name, content in expected.items()),
            "files_left_over": len(files.keys() - expected.keys()),
        }


def killed(scoring: Scoring, out: Path, kills: int, pace: float, opening: float) -> dict:
    """Kill a worker or everything so many times, each time some shards and some moment later; then let it end.

    ``pace``: seconds of a shard; ``opening``: those until the first one is begun.
    """
    draw, counts, stamps, again = random.Random(1), {"worker": 0, "all": 0}, {}, 0
    most = max(0, SHARDS // kills - 3)
    for _ in range(kills):
        process, before = scoring.started(out), len(shards(out))
        more, moment = draw.randint(0, most), draw.random()
        wait_for(lambda: process.poll() is not None or len(shards(out)) >= before + more)  # noqa: B023
        time.sleep(moment * (pace if more else opening))
        if process.poll() is not None:
            raise SystemExit(f"the run ended by itself after {sum(counts.values())} kills: take more --rows")
        below = psutil.Process(process.pid).children(recursive=True)
        workers = [one for one in below if "spawn_main" in " ".join(one.cmdline())]
        kind = draw.choice(["worker", "all"]) if workers else "all"
        if kind == "worker":
            draw.choice(workers).kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        counts[kind] += 1
        process.communicate()
        psutil.wait_procs(below, timeout=30)
        for path in shards(out):
            again += stamps.setdefault(path.name, path.stat().st_mtime_ns) != path.stat().st_mtime_ns
    scoring.ended(scoring.started(out))
    return {"kills_of_a_worker": counts["worker"], "kills_of_all": counts["all"], "finished_shards_made_again": again}


def on_ray(scoring: Scoring, out: Path, pace: float) -> dict:
    """Score on a local cluster, and kill one of two actors."""
    draw, began = random.Random(2), time.perf_counter()
    process = scoring.started(out, "--ray", "local", "--json", out.with_suffix(".json"))
    enough = draw.randint(2, SHARDS // 2)
    wait_for(lambda: process.poll() is not None or len(shards(out)) >= enough)
    time.sleep(draw.random() * pace)
    below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    actors = [one for one in below if " ".join(one.cmdline()).startswith("ray::Worker")]
    if len(actors) != 2:
        raise SystemExit(f"{len(actors)} actors were found, expected 2: {process.communicate()[1]}")
    actors[0].kill()
    at = len(shards(out))
    scoring.ended(process)
    told = json.loads(out.with_suffix(".json").read_text())["rows"][0]
    seconds = {"seconds": time.perf_counter() - began, "rows_per_second": told["rows_per_second"]}
    return {"kills_of_an_actor": 1, "shards_at_the_kill": at, **seconds}


def shards(out: Path) -> list[Path]:
    """The finished ones."""
    return [*out.glob("part-*.parquet")]


def wait_for(condition: Callable[[], bool]) -> None:
    """Look a hundred times a second."""
    while not condition():
        time.sleep(0.01)


def speed(scoring: Scoring, repeats: int) -> list[dict]:
    """Rows of the loops and of the command, the medians of runs that took turns; what the first run made stays.

    Without repeats the command runs alone, once.
    """
    import pandas as pd

    loops = ["loop, dense", "loop, pruned"] if repeats else []
    runs: dict[str, list[dict]] = {name: [] for name in (*loops, "thresher score, pruned")}
    for number in range(max(1, repeats)):
        for name, seen in runs.items():
            began, out = time.perf_counter(), scoring.folder / f"{name.partition(',')[0]}-{number}"
            if name.startswith("loop"):
                model, file = scoring.folder / name.rpartition(" ")[2], out.with_suffix(".parquet")
                call = [sys.executable, __file__, "--loop", model, scoring.data, file]
                within = float(subprocess.run([*map(str, call)], check=True, stdout=subprocess.PIPE).stdout)
            else:
                scoring.ended(scoring.started(out, "--json", out.with_suffix(".json")))
                told = json.loads(out.with_suffix(".json").read_text())["rows"][0]
                within = told["rows"] / told["rows_per_second"]
            seen.append({"seconds": time.perf_counter() - began, "rows_per_second": scoring.rows / within})
    rows = []
    for name, seen in runs.items():
        middle = {key: statistics.median(run[key] for run in seen) for key in seen[0]}
        every = [round(run["rows_per_second"], 1) for run in seen]
        rows.append({"part": "speed", "what": name, **middle, "rows_per_second_each": every})
    rows[-1] |= {key: told[key] for key in ("tokens", "padding_ratio", "flops_ratio")}
    if loops:
        mine = pd.read_parquet(scoring.folder / "thresher score-0")["probability"]
        by_hand = pd.read_parquet(scoring.folder / "loop-0.parquet")[
            "probability"
        ]  # of the pruned model, the later one
        rows[-1]["largest_difference_from_the_loop"] = float((mine - by_hand).abs().max())
    return rows


def main() -> None:
    """Run all parts; print their rows, and write them with the circumstances."""
    from thresher.evaluation.hardware import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2, help="of the loops; 0: none")
    parser.add_argument("--out", type=Path, help="a file for the rows")
    parser.add_argument("--loop", nargs=3, type=Path, metavar=("MODEL", "DATA", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        print(loop(*options.loop, threads=2))
        return
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # else actors give way to all others
    rows: list[dict] = []
    shared = {"rows": options.rows, "model": "minilm-l6", "method": f"topk {PRUNED}", "processes": 2, **environment()}

    def told(row: dict) -> None:
        rows.append(row | {key: value for key, value in shared.items() if key not in row})
        print(json.dumps(row), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")

    folder = Path(tempfile.mkdtemp(prefix="scoring-"))
    try:
        make_models(folder)
        scoring = Scoring(folder, make_texts(folder, options.rows), options.rows)
        for row in speed(scoring, options.repeats):
            told(row)
        scored, undisturbed, out = rows[-1], folder / "thresher score-0", folder / "killed"
        within = options.rows / scored["rows_per_second"]
        pace = 2 * within / SHARDS
        row = killed(scoring, out, options.kills, pace, scored["seconds"] - within)
        told({"part": "kill -9", **row, **scoring.judged(out, undisturbed)})
        if find_spec("ray"):
            row = on_ray(scoring, folder / "ray", pace)
            told({"part": "ray", **row, **scoring.judged(folder / "ray", undisturbed)})
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
