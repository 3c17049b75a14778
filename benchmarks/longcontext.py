"""A shorter KV cache in a real decoder: ``python benchmarks/longcontext.py STEP [--model MODEL]``.

Wants ``python benchmarks/weights.py smollm2-135m-dequantised`` first, and THRESHER_DATA with SQuAD. Steps:

* ``quality``: pass keys, codes among others and SQuAD's questions in texts of ``--length`` tokens, over the full cache
  and those of every method at equal bytes, with the question before and after what leaves; resumes;
* ``fluency``: likelihood of what follows, and divergence from the full cache; resumes;
* ``rows``: writes what these two have found so far;
* ``time``: ms for a token over 1k, 4k and 16k entries against 1k held, and time spent on scores;
* ``memory``: the peak of memory while 16k tokens are read in pieces;
* ``endless``: 20,000 tokens of a text in a cache that holds 1,024 entries, against a window that is read anew.

``time``, ``memory`` and ``endless`` want a machine on which nothing else runs. Rows go to ``results/longcontext``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402

from run import RESULTS, as_json  # noqa: E402
from thresher import H2O, TOVA, ExpectedAttention, KeyDiff, Knorm, KVzip, RandomCache, SnapKV, StreamingLLM  # noqa: E402
from thresher.evaluation.hardware import environment  # noqa: E402
from weights import SMOLLM2, available, pretrained  # noqa: E402

RUNS = HERE.parent / "runs" / "longcontext"
KEEPS = (0.5, 0.2)
KEYS = 4  # codes in a text of multikey, also of rows that do not say it
SAME = 100  # texts of which the name of a file has a digest
METHODS: dict[str, Any] = {
    "random-cache": RandomCache,
    "streamingllm": StreamingLLM,
    "snapkv": SnapKV,
    "snapkv-avg": partial(SnapKV, kernel=5, pool="avg"),
    "tova": TOVA,
    "keydiff": KeyDiff,
    "expectedattention": ExpectedAttention,
    "h2o": H2O,
    "knorm": Knorm,
}
BASELINES = ("random-cache", "streamingllm")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def opened(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = pretrained(options.model) if options.model.endswith("dequantised") else options.model
    if folder != options.model and not available(options.model):
        raise SystemExit(f"{options.model} is not there: python benchmarks/weights.py {options.model}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=PRECISIONS[options.precision])
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def methods_of(tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """All methods, or those that are named, at all shares; KVzip, which takes as long as all others, alone: as in the
    paper, and with equal shares of all heads and layers."""
    from thresher.evaluation.longcontext import repeat_request

    if options.kvzip:
        request, own = repeat_request(tokenizer), {"heads": "own", "layers": "equal"}
        shares, kinds = (0.5, 0.3, 0.2), {"kvzip": KVzip, "kvzip-own": partial(KVzip, **own)}
        names = options.methods.split(",") if options.methods else kinds
        return {f"{name}@{keep}": kinds[name](keep=keep, request=request) for keep in shares for name in names}
    names = options.methods.split(",") if options.methods else METHODS
    return {f"{name}@{keep}": METHODS[name](keep=keep) for keep in KEEPS for name in names}


def quality(options: argparse.Namespace) -> None:
    """Questions about texts."""
    from thresher.data.load import load_task
    from thresher.data.longcontext import book_of, contexts
    from thresher.evaluation.longcontext import Judge

    model, tokenizer = opened(options)
    task = load_task(os.path.join(os.environ["THRESHER_DATA"], "squad"))
    book = book_of(task.test, task.text_columns, lambda text: len(tokenizer(text, verbose=False)["input_ids"]))
    when = ("after",) if options.kvzip else tuple(options.when.split(","))
    judge = Judge(model, tokenizer, methods_of(tokenizer, options), when)
    tasks = tuple(options.tasks.split(","))
    made = partial(contexts, book, tasks, options.length, keys=options.keys, digits=options.digits)
    first = [(one.text, [*map(astuple, one.cases)]) for one in made(SAME)]
    texts = made(options.count)
    if options.ask:
        texts = (replace(one, cases=tuple(c for c in one.cases if c.task in options.ask)) for one in texts)
    sizes = f"{options.length}-{options.keys}-{options.digits}"
    name = f"quality-{'-'.join(tasks)}-{sizes}-{digest(first)}+{'-'.join(when)}" + f"+{options.ask}" * bool(options.ask)
    resume(options, f"{name}+{told(judge.methods)}", ((c.number, lambda c=c: judge(c)) for c in texts))


def fluency(options: argparse.Namespace) -> None:
    """The 64 tokens that follow on a text."""
    from thresher.data.load import load_task
    from thresher.evaluation.longcontext import fluency as measured

    model, tokenizer = opened(options)
    task = load_task(os.path.join(os.environ["THRESHER_DATA"], "squad"))
    text = "\n\n".join(dict.fromkeys(task.test["context"]))
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    size = options.length + 64
    methods = methods_of(tokenizer, options)
    pieces = ((n, ids[:, n * size : (n + 1) * size]) for n in range(min(options.count, ids.shape[1] // size)))
    name = f"fluency-{options.length}-{digest(ids.tolist())}+{told(methods)}"
    resume(options, name, ((n, lambda i=i: measured(model, i, 64, methods)) for n, i in pieces))


def told(methods: dict[str, Any]) -> str:
    """What methods and shares a file is of, and a digest of all their options."""
    return f"{len(methods)}-{digest({name: method.to_dict() for name, method in methods.items()})}"


def digest(known: Any) -> str:
    """Eight characters that differ where what is known differs."""
    return f"{zlib.crc32(json.dumps(known).encode()):08x}"


def resume(options: argparse.Namespace, name: str, parts: Iterator[tuple[int, Callable[[], list[dict]]]]) -> Path:
    """Run the parts that have not run yet; a line of JSON for each. Returns the file of these lines."""
    file = RUNS / f"{Path(options.model).name}-{options.precision}-{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {json.loads(line)["number"] for line in file.read_text().splitlines()} if file.exists() else set()
    for number, run in parts:
        if number in done:
            continue
        began, spent = perf_counter(), process_time()
        rows = [{"number": number, **row} for row in run()]
        with file.open("a") as out:
            out.write(json.dumps({"number": number, "rows": rows}) + "\n")
        print(f"{name} {number}: {process_time() - spent:.1f} s of {perf_counter() - began:.1f}", flush=True)
    return file


def results(file: Path) -> list[dict]:
    """The results of all parts that have run."""
    return [row for line in file.read_text().splitlines() for row in json.loads(line)["rows"]]


def land(options: argparse.Namespace, step: str, rows: list[dict]) -> None:
    """Write rows where they belong, as a whole; one of fewer examples than the row that is there does not take its
    place."""
    from thresher.evaluation.rows import whole

    model = Path(options.model).name
    place = (options.results or RESULTS) / "longcontext" / f"{model}-{step}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/longcontext.py {step} --model {model}"
    rows = [{**row, "command": command, **environment()} for row in rows]
    there = json.loads(place.read_text())["rows"] if place.exists() else []
    counted = {alike(row): row.get("n_examples", 0) for row in there}
    new = [row for row in rows if row.get("n_examples", 0) >= counted.get(alike(row), 0)]
    made = {alike(row) for row in new}
    rows = [*(row for row in there if alike(row) not in made), *new]
    with whole(place) as aside:
        aside.write_text(as_json({"rows": rows}))
    for row in new:
        print({key: value for key, value in row.items() if key not in ("model", "precision", "threads", "gains")})
    print(f"wrote {place}")


def alike(row: dict) -> tuple:
    """What a later row has in common with the one whose place it takes; all others stay."""
    row = {"keys": KEYS, **row}
    names = ["precision", "digits", "keys", "length", "texts", "task", "when", "method", "keep", "context", "prompt"]
    return (*map(row.get, names + ["tokens"] * ("n_examples" not in row)),)


def rows(options: argparse.Namespace) -> None:
    """Write what ``quality`` and ``fluency`` have found so far."""
    from thresher.evaluation.longcontext import summary

    for kind in ("quality", "fluency"):
        made: list[dict] = []
        for name, found in of_same_texts(RUNS.glob(f"{Path(options.model).name}-{options.precision}-{kind}-*.jsonl")):
            if kind == "fluency":
                made += [{"length": int(name.split("-")[-2])} | row for row in means(found)]
                continue
            against = [f"{name}@{keep}" for keep in KEEPS for name in BASELINES]
            *sizes, texts = name.split("-")[-4:]
            known = dict(zip(("length", "keys", "digits"), map(int, sizes), strict=True)) | {"texts": texts}
            made += [known | row | split(row["method"]) for row in summary(found, against)]
        if made:
            land(options, kind, [about(options) | row for row in made])


def of_same_texts(files: Iterator[Path]) -> Iterator[tuple[str, list[dict]]]:
    """What files of the same texts hold, and what their names begin with. Of a method that lies in several ones, with
    other options maybe, the last file counts; the full cache is the same in all."""
    from thresher.evaluation.longcontext import FULL

    groups: dict[str, dict[tuple, list[dict]]] = {}
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        known, own = groups.setdefault(file.stem.partition("+")[0], {}), {}
        for row in results(file):
            own.setdefault((row["method"], row.get("task"), row.get("when")), []).append(row)
        for key, rows in own.items():
            known[key] = [*known.get(key, []), *rows] if key[0] == FULL else rows
    for name, known in groups.items():
        yield name, [row for rows in known.values() for row in rows]


def means(found: list[dict]) -> list[dict]:
    """The mean likelihood and divergence of each method."""
    import numpy as np

    made = []
    for method in dict.fromkeys(row["method"] for row in found):
        own = [row for row in found if row["method"] == method]
        mean = {name: float(np.mean([row[name] for row in own])) for name in ("tokens", "nll", "kl")}
        made.append({**split(method), **mean, "n_examples": len(own)})
    return made


def split(method: str) -> dict:
    """A method and its share of the cache."""
    name, _, keep = method.partition("@")
    return {"method": name, "keep": float(keep or 1)}


# --- time and memory --------------------------------------------------------------------------------------------------
ENTRIES, HELD, EVERY = (1024, 4096, 16384), 1024, 64  # of a cache; that a pruned one returns to; steps between
TURNS, CHUNK = 2, 512  # rounds of EVERY steps; tokens of a piece of a prompt
HOLDING = {"streamingllm": StreamingLLM, "keydiff": KeyDiff, "snapkv": SnapKV, "h2o": H2O, "tova": TOVA}


def filled(model: Any, entries: int, seen: int | None) -> Any:
    """A cache of random entries; with ``seen`` as one of a pruned model that has read so many tokens."""
    from transformers import DynamicCache

    from thresher.caches.layer import Coming, PrunedLayer

    config, cache = model.config, DynamicCache(config=model.config)
    for number in range(config.num_hidden_layers):
        if seen is not None:
            cache.layers[number] = layer = PrunedLayer()
            layer.coming = Coming(torch.arange(seen - entries, seen)[None], [entries], [entries], entries)
            layer.seen = seen - entries
            layer.real, layer.arrived, layer.counts = [layer.seen], [layer.seen], [0]
        shape = (1, config.num_key_value_heads, entries, config.hidden_size // config.num_attention_heads)
        cache.layers[number].update(*torch.randn(2, *shape, dtype=model.dtype).unbind())
    return cache


@torch.no_grad()
def steps(model: Any, cache: Any, count: int) -> list[float]:
    """Seconds of each of ``count`` steps."""
    spent, token = [], torch.tensor([[17]])
    for _ in range(count):
        began = perf_counter()
        model(input_ids=token, past_key_values=cache)
        spent.append(perf_counter() - began)
    return spent


def time(options: argparse.Namespace) -> None:
    """Milliseconds of a token, of all ways in turn."""
    from statistics import mean

    from thresher import prune, unprune
    from thresher.caches.hooks import ours

    model, _ = opened(options)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    found: dict[tuple, list] = {}
    for turn in range(TURNS + 1):
        for entries in options.entries:
            for name in ("full", *HOLDING):
                kind = HOLDING.get(name)
                if kind is not None:
                    prune(model, kind(hold=HELD, every=1 if kind is TOVA else EVERY))
                cache = filled(model, entries if kind is None else HELD, None if kind is None else entries)
                size = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
                spent = steps(model, cache, EVERY)
                scored = sum(layer.seconds for layer in ours(cache).values()) / EVERY
                if kind is not None:
                    unprune(model)
                if turn:
                    found.setdefault((entries, name), []).append((mean(spent), scored, size))
        if turn:
            land(options, "time", [about(options) | row | {"weights_bytes": weights} for row in timed(found)])


def timed(found: dict[tuple, list]) -> Iterator[dict]:
    """The rows of what each way took in the turns so far."""
    from statistics import median

    for (entries, name), own in found.items():
        total, scored, sizes = zip(*own, strict=True)
        dense = median(one[0] for one in found[entries, "full"])
        row = {"method": name, "context": entries, "held": entries if name == "full" else HELD, "bytes": sizes[0]}
        row |= {"ms_per_token": 1e3 * median(total), "ms_scoring": 1e3 * median(scored), "turns": len(own)}
        row |= {"speedup": dense / median(total), "spread": (max(total) - min(total)) / median(total)}
        yield row


def memory(options: argparse.Namespace) -> None:
    """The peak of memory of each way to read a prompt, in a process of its own."""
    import subprocess

    made = []
    for name in ("full", "keydiff", "streamingllm"):
        command = [sys.executable, __file__, "prefill", "--model", options.model, "--precision", options.precision]
        command += ["--entries", *map(str, options.entries), "--threads", str(options.threads)]
        run = subprocess.run([*command, "--method", name], check=True, capture_output=True, text=True)
        made.append(about(options) | json.loads(run.stdout.splitlines()[-1]))
        land(options, "memory", made)


@torch.no_grad()
def prefill(options: argparse.Namespace) -> None:
    """Read the longest prompt in pieces, and say how much memory that took; ``memory`` starts it."""
    import resource

    from transformers import DynamicCache

    from thresher import prune

    model, _ = opened(options)
    if options.method != "full":
        prune(model, HOLDING[options.method](hold=HELD, every=EVERY))
    cache, tokens = DynamicCache(config=model.config), max(options.entries)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, perf_counter()
    for first in range(0, tokens, CHUNK):
        model(input_ids=ids[:, first : first + CHUNK], past_key_values=cache, logits_to_keep=1)
    size = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
    row: dict[str, Any] = {"method": options.method, "prompt": tokens, "chunk": CHUNK, "bytes": size}
    row |= {"peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, "start_mb": before / 1e3}
    print(json.dumps(row | {"prefill_ms": 1e3 * (perf_counter() - began)}))


# --- without end ------------------------------------------------------------------------------------------------------
BLOCK, WINDOWS, TAIL = 1000, 2, 32  # tokens of a row; windows of a block that are read anew, and tokens of each


@torch.no_grad()
def endless(options: argparse.Namespace) -> None:
    """Feed a text token by token to a cache that returns to 1,024 entries; after each block of tokens, read windows of
    as many tokens anew, and write what was found so far."""
    from thresher import dense, prune
    from thresher.data.load import load_task

    model, tokenizer = opened(options)
    task = load_task(os.path.join(os.environ["THRESHER_DATA"], "squad"))
    text = "\n\n".join(dict.fromkeys(task.test["context"]))
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, : options.tokens + 1]
    cache, made, nll, anew, streamed = None, [], [], [], []
    until = perf_counter() + 60 * options.minutes
    prune(model, StreamingLLM(hold=HELD, every=EVERY))
    for first in range(0, ids.shape[1] - BLOCK, BLOCK):
        cache, row = streamed_block(model, ids[:, first : first + BLOCK + 1], cache, nll)
        made.append(about(options) | {"method": "streamingllm", "held": HELD, "tokens": first + BLOCK} | row)
        for end in torch.linspace(max(HELD, first + BLOCK // 2), first + BLOCK, WINDOWS).long().tolist():
            if end < 2 * HELD:
                continue  # the beginning, of which both know most
            with dense(model):
                anew.append(read_anew(model, ids[:, end - HELD : end + 1]))
            streamed.append(sum(nll[end - TAIL : end]) / TAIL)
        known = [*made]
        if anew:
            seconds, found = zip(*anew, strict=True)
            row = {"method": "window read anew", "held": HELD, "ms_per_token": 1e3 * sorted(seconds)[len(anew) // 2]}
            row |= {"nll": sum(found) / len(anew), "nll_streamed_there": sum(streamed) / len(anew)}
            known.append(about(options) | row | {"windows": len(anew), "tail": TAIL})
        land(options, "endless", known)
        if perf_counter() > until:
            break


def streamed_block(model: Any, ids: torch.Tensor, cache: Any, nll: list[float]) -> tuple[Any, dict]:
    """Feed all but the last of ``ids`` (1, n + 1) one by one; ``nll`` gets how well each next one was foreseen. Returns
    the cache and what is known of the block."""
    import torch.nn.functional as F

    spent, sizes, before = [], [], len(nll)
    for place in range(ids.shape[1] - 1):
        began = perf_counter()
        output = model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        spent.append(1e3 * (perf_counter() - began))
        nll.append(float(F.cross_entropy(output.logits[0].float(), ids[:, place + 1])))
        sizes.append(sum(layer.nbytes for layer in cache.layers))
    row = {"ms_per_token": sorted(spent)[len(spent) // 2], "bytes": max(sizes)}
    return cache, row | {"nll": sum(nll[before:]) / len(spent)}


def read_anew(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds that a window takes, all but the last of ``ids`` (1, n + 1), and how well its end is foreseen."""
    import torch.nn.functional as F

    began = perf_counter()
    logits = model(input_ids=ids[:, :-1], logits_to_keep=TAIL).logits[0].float()
    spent = perf_counter() - began
    return spent, float(F.cross_entropy(logits, ids[0, -TAIL:]))


def about(options: argparse.Namespace) -> dict:
    """What all rows say."""
    return {"model": Path(options.model).name, "precision": options.precision, "threads": torch.get_num_threads()}


STEPS = {one.__name__: one for one in (quality, fluency, rows, time, memory, prefill, endless)}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=1000, help="tokens of a text")
    parser.add_argument("--count", type=int, default=100, help="texts")
    parser.add_argument("--tasks", default="needle,multikey", help="asked about each text")
    parser.add_argument("--when", default="after,before", help="when the question is read, see thresher compare")
    parser.add_argument("--ask", help="one of the tasks, whose questions alone are asked")
    parser.add_argument("--keys", type=int, default=KEYS, help="codes in a text of multikey")
    parser.add_argument("--methods", help="some of them, with commas between; default: all")
    parser.add_argument("--kvzip", action="store_true", help="KVzip alone, which reads each text twice")
    parser.add_argument("--digits", type=int, default=3, help="of a key; each of them is a token")
    parser.add_argument("--method", default="full", help="of prefill")
    parser.add_argument("--tokens", type=int, default=20_000, help="of endless, fed one by one")
    parser.add_argument("--minutes", type=float, default=30.0, help="of endless")
    parser.add_argument("--results", type=Path, help="where rows go")
    parser.add_argument("--entries", type=int, nargs="+", default=ENTRIES, help="of a cache, 1,024 or more; of time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    STEPS[options.step](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
