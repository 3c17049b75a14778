"""``thresher score`` on two processes against plain loops, and killed: ``python benchmarks/scoring.py [--rows N]``.

Pieces of the reviews of IMDB below ``THRESHER_DATA``, 2 to 14 words each and 32 tokens at most, through MiniLM-L6 with
a random head, dense and pruned. Prints rows as JSON and writes them to ``--out``:

* ``speed``: loops as one writes them by hand (transformers, batches of 32, one process of two threads; as the texts
  come, and sorted by length) and the command on two processes of one thread, in turns, on the first ``--loop-rows``
  texts, every one in a process of its own; then the command on all of them;
* ``kill -9``: one worker or all processes, at random moments, and the command again until it is done;
* ``ray``: a local cluster of two actors, one of them killed; where ray is installed.

The last two compare every byte with a run that was left alone, and count the rows. With 100,000 texts it takes about 20
minutes of two quiet cores. Interrupted, the same call goes on with the part that it was at; ``--fresh`` starts anew.
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
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import psutil

from entries import DATA
from weights import pretrained

LONGEST, SHARDS, BATCH = 32, 100, 32
WORDS = (2, 14)  # of a text
RUNS = Path(__file__).parents[1] / "runs" / "scoring"
LOOPS = ("loop, dense, as they come", "loop, dense, sorted", "loop, pruned, sorted")
SCORE = "thresher score, pruned"
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


def loop(model: Path, data: Path, out: Path, ordered: bool, threads: int) -> float:
    """Score a file as one does by hand, ``ordered`` by length or not; returns the seconds from the opened model to the
    written file."""
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
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]) if ordered else i)
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
        self.every = max(1, -(-rows // SHARDS))

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

    def scored(self, out: Path) -> dict:
        """What the command says of a run that nobody disturbs."""
        self.ended(self.started(out, "--json", out.with_suffix(".json")))
        return json.loads(out.with_suffix(".json").read_text())["rows"][0]

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
    """Rows of the loops and of the command, the medians of runs that took turns."""
    import pandas as pd

    runs: dict[str, list[dict]] = {name: [] for name in (*LOOPS, SCORE)}
    told: dict = {}
    for number in range(repeats):
        for name, seen in runs.items():
            began, out = time.perf_counter(), scoring.folder / f"{name.replace(', ', '-').replace(' ', '-')}-{number}"
            if name == SCORE:
                shutil.rmtree(out, ignore_errors=True)
                told = scoring.scored(out)
                within = told["rows"] / told["rows_per_second"]
            else:
                model, file = scoring.folder / name.split(", ")[1], out.with_suffix(".parquet")
                call = [sys.executable, __file__, "--loop", model, scoring.data, file, name.split(", ")[2]]
                within = float(subprocess.run([*map(str, call)], check=True, stdout=subprocess.PIPE).stdout)
            seen.append({"seconds": time.perf_counter() - began, "rows_per_second": scoring.rows / within})
    rows = []
    for name, seen in runs.items():
        middle = {key: statistics.median(run[key] for run in seen) for key in seen[0]}
        every = [round(run["rows_per_second"], 1) for run in seen]
        rows.append({"part": "speed", "what": name, "rows": scoring.rows, **middle, "rows_per_second_each": every})
    rows[-1] |= {key: told[key] for key in ("tokens", "padding_ratio", "flops_ratio")}
    mine = pd.read_parquet(scoring.folder / "thresher-score-pruned-0")["probability"]
    by_hand = pd.read_parquet(scoring.folder / "loop-pruned-sorted-0.parquet")["probability"]
    rows[-1]["largest_difference_from_the_loop"] = float((mine - by_hand).abs().max())
    return rows


def whole(scoring: Scoring, out: Path) -> dict:
    """The row of the command on all texts, left alone."""
    began = time.perf_counter()
    told = scoring.scored(out)
    known = {key: told[key] for key in ("rows_per_second", "tokens", "padding_ratio", "flops_ratio")}
    return {"part": "all", "what": SCORE, "seconds": time.perf_counter() - began, **known}


class Parts:
    """The rows of the parts that are done, in a file; a part is never run again."""

    def __init__(self, folder: Path, shared: dict, out: Path | None):
        self.file, self.shared, self.out = folder / "rows.json", shared, out
        self.known: dict[str, list[dict]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def run(self, name: str, make: Callable[[], list[dict]]) -> list[dict]:
        """The rows of a part, with the circumstances."""
        if name not in self.known:
            self.known[name] = [row | {k: v for k, v in self.shared.items() if k not in row} for row in make()]
            self.file.write_text(json.dumps(self.known, indent=1))
        for row in self.known[name]:
            print(json.dumps({key: value for key, value in row.items() if key not in self.shared}), flush=True)
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            rows = [row for rows in self.known.values() for row in rows]
            self.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
        return self.known[name]


def run(options: argparse.Namespace, folder: Path) -> None:
    """All parts that are not done yet."""
    from thresher.evaluation.hardware import environment

    shared = {"rows": options.rows, "model": "minilm-l6", "method": f"topk {PRUNED}", "processes": 2, **environment()}
    parts = Parts(folder, shared, options.out)
    if not (folder / "pruned" / "tokenizer.json").exists():
        make_models(folder)
    for name, count in (("few", min(options.loop_rows, options.rows)), ("all", options.rows)):
        (folder / name).mkdir(exist_ok=True)
        if not (folder / name / "texts.parquet").exists():
            make_texts(folder / name, count)
    few = Scoring(folder, folder / "few" / "texts.parquet", min(options.loop_rows, options.rows))
    if options.repeats:
        parts.run("speed", lambda: speed(few, options.repeats))
    scoring, undisturbed = Scoring(folder, folder / "all" / "texts.parquet", options.rows), folder / "undisturbed"
    if "all" not in parts.known:
        shutil.rmtree(undisturbed, ignore_errors=True)
    (alone,) = parts.run("all", lambda: [whole(scoring, undisturbed)])
    within = options.rows / alone["rows_per_second"]
    pace, opening = 2 * within / SHARDS, alone["seconds"] - within

    def kills() -> list[dict]:
        shutil.rmtree(folder / "killed", ignore_errors=True)
        row = killed(scoring, folder / "killed", options.kills, pace, opening)
        return [{"part": "kill -9", **row, **scoring.judged(folder / "killed", undisturbed)}]

    def cluster() -> list[dict]:
        shutil.rmtree(folder / "ray", ignore_errors=True)
        row = on_ray(scoring, folder / "ray", pace)
        return [{"part": "ray", **row, **scoring.judged(folder / "ray", undisturbed)}]

    parts.run("kill -9", kills)
    if find_spec("ray"):
        parts.run("ray", cluster)


def main() -> None:
    """Run all parts; print their rows, and write them with the circumstances."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--loop-rows", type=int, default=20_000, help="of them, on which the loops are timed")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2, help="of the loops; 0: none")
    parser.add_argument("--out", type=Path, help="a file for the rows")
    parser.add_argument(
        "--work", type=Path, default=Path(__file__).parents[1] / "runs" / "scoring", help="what is made"
    )
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier call has made")
    parser.add_argument("--loop", nargs=4, metavar=("MODEL", "DATA", "FILE", "ORDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        *paths, order = options.loop
        print(loop(*map(Path, paths), ordered=order == "sorted", threads=2))
        return
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # else actors give way to all others
    folder = options.work / f"{options.rows}-{options.loop_rows}"
    if options.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    run(options, folder)


if __name__ == "__main__":
    main()
