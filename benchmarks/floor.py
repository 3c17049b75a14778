"""One text at a time, int8, phones and targets of time: what is left of pruning where little is to be computed.

    python benchmarks/floor.py graphs [NAME ...]   write the graphs that a timing needs, once
    python benchmarks/floor.py time NAME ...       one interleaved run each; rows in results/floor
    python benchmarks/floor.py target RUNTIME PRECISION    ask for milliseconds, and measure what was reached

| name | what |
|---|---|
| `batch1-minilm-l6`, `batch1-bert-base` | texts of 25, 53, 128 and 512 tokens, 2.4x and 3.5x fewer FLOPs at 128: ONNX Runtime fp32 and int8, OpenVINO fp32 and bf16 |
| `torch1-minilm-l6`, `torch1-bert-base` | the same, as far as code is compiled for them: torch as it is and compiled |
| `int8-8x128` | BERT-base's shape, 8 texts of 128 tokens, 2.1x, 4x and 8x: int8 in ONNX Runtime and OpenVINO |
| `int8-20newsgroups` | MiniLM-L6's shape, 64 texts as long as those of 20 Newsgroups, up to 512 tokens, by length in batches of 8, 2.4x, 3.5x and 8x: int8 in both; torch in fp32 with all texts padded to 512 |
| `packed-bf16` | BERT-base's shape, 32 texts of 16 to 256 tokens in packed rows, 2.1x, 4x and 8x: torch in bf16 |
| `phone` | MiniLM-L6 with a linear head on SST-2, 2.4x: ExecuTorch fp32 and int8, megabytes, agreement with torch (in the environment of the extra `mobile`) |

Weights are random, but of MiniLM-L6 where texts are answered: time does not depend on them. Each pruned row is compared with
the fastest dense one of its runtime. Runtimes take turns; each begins a turn when the threads of the one before are asleep,
with a call that does not count. `--threads N` are those of every runtime, and in the names of what is written;
`THRESHER_DATA` names the data. `--tiny` shows that it works.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from weights import pretrained  # noqa: E402

RUNS, RESULTS = HERE.parent / "runs" / "benchmarks" / "floor", HERE / "results" / "floor"
DATA = Path(os.environ.get("THRESHER_DATA", "data"))
LENGTHS = (25, 53, 128, 512)
BUCKETS = {"minilm-l6": (32, 64, 128, 512), "bert-base": (32, 64, 128)}  # of compiled code, which takes long to make
SHAPES = {"minilm-l6": (384, 12, 6), "bert-base": (768, 12, 12)}  # width, heads, layers
AT = {"minilm-l6": (0, 1, 3), "bert-base": (1, 3, 6)}
RATIOS = {"2.4x": 2.4, "3.5x": 3.5}
GRAPHS = (("onnx", "fp32"), ("onnx", "int8"), ("openvino", "fp32"), ("openvino", "bf16"))
HARD = {"2.1x": (0.66, (1, 3, 6)), "4x": (0.4, (1, 3, 6)), "8x": (0.3, (0, 2, 5))}  # of int8-8x128
PHONE, TEXTS, HEAD = (32, 64, 128), 400, 1000  # lengths; texts that are answered, and that a head is fitted on
ASKED = 0.6  # of the dense model's milliseconds
REPEATS = {"minilm-l6": 20, "bert-base": 10, "int8": 12, "packed": 5, "phone": 20}
OF: dict[str, Any] = {"folder": RUNS, "results": RESULTS, "backend": "inductor", "repeats": None}  # of this call
SPEC = "thresher.json"


def network(shape: str) -> Any:
    """A classifier of a shape, with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    width, heads, layers = SHAPES[shape]
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
    return BertForSequenceClassification(BertConfig(**sizes, intermediate_size=4 * width)).eval()


def minilm() -> tuple[Any, Any]:
    """MiniLM-L6 with a new head of two classes, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    folder = pretrained("minilm-l6")
    net = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return net.eval(), AutoTokenizer.from_pretrained(folder)


def text(tokens: int, batch: int = 1) -> dict[str, torch.Tensor]:
    """Random texts of so many tokens."""
    return texts([tokens] * batch)


def texts(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Random texts of these lengths."""
    draw = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(1000, 30_000, (len(lengths), max(lengths)), generator=draw)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def texts_of(batch: dict, width: int) -> dict[str, torch.Tensor]:
    """A batch padded to ``width`` tokens."""
    more = width - batch["input_ids"].shape[1]
    return {name: torch.nn.functional.pad(rows, (0, more)) for name, rows in batch.items()}


@torch.no_grad()
def ratio_of(net: Any, *batches: dict) -> float:
    """How many times fewer MACs a pruned model needs."""
    dense = used = 0.0
    for given in batches:
        net(**given)
        record = net.token_pruner.last_record()
        dense, used = dense + float(record.dense), used + float(record.used)
    return dense / used


def keep_for(shape: str, ratio: float) -> float:
    """The share of ``TopK`` at the sites of a shape that leaves so many times fewer MACs of 128 tokens; remembered."""
    from thresher import TopK, prune, unprune
    from thresher.evaluation.rows import whole

    place = OF["folder"] / "keeps.json"
    known = json.loads(place.read_text()) if place.exists() else {}
    name = f"{shape} {ratio}"
    if name not in known:
        net, low, high = network(shape), 0.02, 1.0
        while high - low > 0.002:
            middle = (low + high) / 2
            prune(net, TopK(keep=middle, at=AT[shape]), check=False)
            low, high = (middle, high) if ratio_of(net, text(128)) > ratio else (low, middle)
            unprune(net)
        known[name] = round(high, 3)
        with whole(place) as aside:
            aside.write_text(json.dumps(known))
    return known[name]


def variants(shape: str, **ratios: float) -> dict[str, Any]:
    """The dense model of a shape, and those that are pruned, by default to ``RATIOS``."""
    from thresher import TopK, prune

    found = {"dense": network(shape)}
    for name, ratio in (ratios or RATIOS).items():
        found[name] = prune(network(shape), TopK(keep=keep_for(shape, ratio), at=AT[shape]), check=False)
    return found


def hard() -> dict[str, Any]:
    """The models of int8-8x128."""
    from thresher import TopK, prune

    pruned = {
        name: prune(network("bert-base"), TopK(keep=keep, at=at), check=False) for name, (keep, at) in HARD.items()
    }
    return {"dense": network("bert-base"), **pruned}


def graph(net: Any, folder: str, format: str, precision: str) -> Any:
    """The runtime of a graph, which is exported where it is missing; others than fp32 are made of that of fp32, as
    ``export`` makes them, without tracing the model again."""
    from speed import graph_of
    from thresher import load_runtime
    from thresher.evaluation.rows import folder_written_whole
    from thresher.exporting.export import source_of

    places = {one: OF["folder"] / f"{folder}-{format}-{one}" for one in ("fp32", precision)}
    whole = graph_of(net, places["fp32"], 512, format=format)
    if precision == "fp32":
        return whole
    if source_of(places[precision]) != source_of(places["fp32"]):
        with folder_written_whole(places[precision], replace=True) as aside:
            shutil.copytree(places["fp32"], aside, dirs_exist_ok=True)
            if precision == "int8":
                in_int8(places["fp32"], aside, format)
            told = json.loads((aside / SPEC).read_text())
            (aside / SPEC).write_text(json.dumps(told | {"precision": precision}))
    return load_runtime(places[precision])


def in_int8(source: Path, place: Path, format: str) -> None:
    """Write the graph in ``source`` in int8."""
    from thresher.core.compat import graph_exporter

    exporter, config = graph_exporter(format, True, [text(128)] * 4)
    name = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}[format]
    made = config.quantizer.quantize(exporter.load_program(source / name), text(128), config.export_format)
    exporter.save_program(made, place / name)


Call = Callable[[dict], Any]
Rows = Iterator[list[dict]]  # as they come


def pool_of(name: str) -> str:
    """Whose threads a call "runtime precision model" uses: compiled code has torch's."""
    runtime = name.split()[0]
    return "torch" if runtime == "compiled" else runtime


def timed(calls: dict[str, Call], batches: dict[str, Any], repeats: int) -> dict[tuple[str, str], list[float]]:
    """ms of each call on each batch, interleaved, after two rounds that do not count.

    The calls of one runtime follow each other, another one first in each round; before them its threads get the
    processor for themselves: what spins falls asleep, and one call wakes them.
    """
    from thresher.evaluation.benchmark import ASLEEP

    pools: dict[str, list[str]] = {}
    for name in calls:
        pools.setdefault(pool_of(name), []).append(name)
    taken: dict[tuple[str, str], list[float]] = {}
    with torch.inference_mode():
        for size, given in batches.items():
            for turn in range(-2, repeats):
                for pool in turned([*pools], turn):
                    names = turned(pools[pool], turn)
                    sleep(ASLEEP)
                    calls[names[-1]](given)
                    for name in names:
                        start = perf_counter()
                        calls[name](given)
                        if turn >= 0:
                            taken.setdefault((name, size), []).append(1000 * (perf_counter() - start))
    return taken


def turned(names: list[str], turn: int) -> list[str]:
    """``names`` from another one on."""
    first = turn % len(names)
    return names[first:] + names[:first]


def rows_of(
    taken: dict[tuple[str, str], list[float]], ratios: dict[tuple[str, str], float], **fields: Any
) -> list[dict]:
    """Rows of calls "runtime precision model" on sizes "batch x tokens"; compiled code and torch are one runtime."""
    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import row

    middle = {key: statistics.median(times) for key, times in taken.items()}
    rows = []
    for (name, size), times in taken.items():
        (runtime, precision, model), (batch, tokens) = name.split(), map(int, size.split("x"))
        dense = min(
            ms
            for (other, there), ms in middle.items()
            if there == size and pool_of(other) == pool_of(name) and other.split()[1:] == [precision, "dense"]
        )
        low, _, high = statistics.quantiles(times, n=4)
        ratio, gain = ratios.get((model, size), 1.0), dense / middle[name, size]
        common = {"task": "synthetic", "method": "dense" if model == "dense" else "topk", "runtime": runtime}
        common |= {"precision": precision, "mode": "dense" if model == "dense" else "pruned", "batch_size": batch}
        common |= {"threads": torch.get_num_threads(), "max_length": tokens, "tokens_mean": tokens, "split": "none"}
        common |= {"flops_ratio": ratio, "latency_ms_p50": middle[name, size], "speedup_unpadded": gain}
        common |= {"efficiency": gain / ratio, "spread": (high - low) / middle[name, size], "repeats": len(times)}
        rows.append(row(**common, recipe=f"untrained, {model}", **fields, **environment()))
    return rows


def batch1(shape: str, ready: bool) -> Rows:
    """One text at a time in graphs."""
    nets, calls = variants(shape), {}
    for name, net in nets.items():
        for format, precision in GRAPHS:
            run = graph(net, f"{shape}-{name}", format, precision)
            calls[f"{format} {precision} {name}"] = lambda given, run=run: run.forward(**given)
    if ready:
        yield from one_by_one(shape, nets, calls, LENGTHS)


def torch1(shape: str, ready: bool) -> Rows:
    """One text at a time in torch, as it is and compiled."""
    from thresher import compiled

    if not ready:
        return
    nets, calls = variants(shape), {}
    for name, net in nets.items():
        fast = compiled(net, BUCKETS[shape], backend=OF["backend"])
        calls[f"compiled fp32 {name}"] = lambda given, fast=fast: fast(**given)
        calls[f"torch fp32 {name}"] = lambda given, net=net: net(**given)
    yield from one_by_one(shape, nets, calls, [n for n in LENGTHS if n <= BUCKETS[shape][-1]])


def one_by_one(shape: str, nets: dict[str, Any], calls: dict[str, Call], lengths: Sequence[int]) -> Rows:
    """The rows of each length as soon as it was timed."""
    for n in lengths:
        taken = timed(calls, {f"1x{n}": text(n)}, OF["repeats"] or REPEATS[shape])
        yield rows_of(taken, {(name, f"1x{n}"): ratio_of(nets[name], text(n)) for name in RATIOS}, model=shape)


def int8(ready: bool) -> Rows:
    """Eight texts of 128 tokens in int8."""
    return batched(hard(), "bert-base", {"8x128": [text(128, 8)]}, ready)


def newsgroups(ready: bool) -> Rows:
    """Texts of 20 Newsgroups by length in int8."""
    lengths = sorted(json.loads((HERE / "lengths-20newsgroups.json").read_text())[:64])
    batches = [texts(lengths[i : i + 8]) for i in range(0, len(lengths), 8)]
    nets = variants("minilm-l6", **RATIOS, **{"8x": 8.0})
    longest = [texts_of(batch, 512) for batch in batches]
    padded: dict[str, Call] = {"torch fp32 dense": lambda _: [nets["dense"](**given) for given in longest]}
    return batched(nets, "minilm-l6", {"8x512": batches}, ready, **padded)


def batched(nets: dict[str, Any], shape: str, sizes: dict[str, list[dict]], ready: bool, **calls: Call) -> Rows:
    """Batches in int8; other ``calls`` on them take turns with these."""
    for name, net in nets.items():
        for format in ("onnx", "openvino"):
            run = graph(net, f"{shape}-{name}", format, "int8")
            calls[f"{format} int8 {name}"] = lambda batches, run=run: [run.forward(**given) for given in batches]
    if not ready:
        return
    ratios = {(name, size): ratio_of(nets[name], *of) for name in nets if name != "dense" for size, of in sizes.items()}
    yield rows_of(timed(calls, sizes, OF["repeats"] or REPEATS["int8"]), ratios, model=shape)


def ragged(ready: bool) -> Rows:
    """Texts of many lengths in packed rows, in bf16."""
    from thresher.evaluation.predict import in_precision, packed

    if not ready:
        return
    draw = torch.Generator().manual_seed(0)
    batches = [texts(torch.randint(16, 257, (32,), generator=draw).tolist()) for _ in range(2)]
    nets = {name: in_precision(net, torch.bfloat16) for name, net in hard().items()}
    ratios = {(name, "32x256"): ratio_of(net, *batches) for name, net in nets.items() if name != "dense"}
    nets["dense"] = packed(nets["dense"])
    calls: dict[str, Call] = {
        f"torch bf16 {name}": lambda given, net=net: [net(**batch) for batch in given] for name, net in nets.items()
    }
    yield rows_of(timed(calls, {"32x256": batches}, OF["repeats"] or REPEATS["packed"]), ratios, model="bert-base")


@torch.no_grad()
def with_head(net: Any, tokenizer: Any, texts: Any, place: Path) -> Any:
    """``net`` with a linear head on its pooled states, fitted on labelled ``texts`` once and kept in ``place``."""
    from safetensors.torch import load_file, save_file

    from thresher.evaluation.rows import whole

    if place.exists():
        net.classifier.load_state_dict(load_file(place))
        return net
    from sklearn.linear_model import LogisticRegression

    states = []
    for i in range(0, len(texts), 32):
        given = tokenizer(texts["sentence"][i : i + 32], padding=True, return_tensors="pt")
        states.append(net.bert(**given).pooler_output)
    fitted = LogisticRegression(max_iter=1000).fit(torch.cat(states).numpy(), texts["label"])
    weight, bias = torch.tensor(fitted.coef_[0]).float(), float(fitted.intercept_[0])
    net.classifier.weight.copy_(torch.stack([-weight, weight]) / 2)
    net.classifier.bias.copy_(torch.tensor([-bias, bias]) / 2)
    with whole(place) as aside:
        save_file({name: x.contiguous() for name, x in net.classifier.state_dict().items()}, aside)
    return net


def phone(ready: bool) -> Rows:
    """MiniLM-L6 in ExecuTorch, pruned and dense."""
    from datasets import load_dataset

    from speed import graph_of
    from thresher import TopK, prune

    data = load_dataset(
        "parquet", data_files={p: str(DATA / f"glue/sst2/{p}*.parquet") for p in ("train", "validation")}
    )
    nets, calls, runs = {}, {}, {}
    for name in ("dense", "2.4x"):
        net, tokenizer = minilm()
        if name != "dense":
            prune(net, TopK(keep=keep_for("minilm-l6", RATIOS[name]), at=AT["minilm-l6"]))
        some = data["train"].shuffle(seed=0).select(range(HEAD))
        nets[name] = with_head(net.eval(), tokenizer, some, RUNS / f"phone-{name}-head.safetensors")
        for precision in ("fp32", "int8"):
            how = {"tokenizer": tokenizer, "format": "executorch", "precision": precision, "lengths": PHONE}
            run = graph_of(net, RUNS / f"phone-{name}-{precision}", max(PHONE), **how)
            runs[precision, name] = run
            calls[f"executorch {precision} {name}"] = lambda given, run=run: run.forward(**given)
    if not ready:
        return
    asked = answered(tokenizer, data["validation"]["sentence"][:TEXTS])
    notes = {
        (*key, length): agreement(nets[key[1]], run, some)
        for key, run in runs.items()
        for length, some in asked.items()
    }
    batches = {f"1x{n}": text(n) for n in PHONE}
    ratios = {("2.4x", f"1x{n}"): ratio_of(nets["2.4x"], text(n)) for n in PHONE}
    rows = rows_of(timed(calls, batches, OF["repeats"] or REPEATS["phone"]), ratios, model="minilm-l6")
    yield [{**one, "note": notes[one["precision"], one["recipe"].split(", ")[1], one["max_length"]]} for one in rows]


def answered(tokenizer: Any, sentences: list[str]) -> dict[int, list[dict]]:
    """Texts for each method of a program: one, two and five sentences, and none too long."""
    found: dict[int, list[dict]] = {length: [] for length in PHONE}
    for many in (1, 2, 5):
        for i in range(0, len(sentences), many):
            given = tokenizer(" ".join(sentences[i : i + many]), return_tensors="pt")
            length = next((n for n in PHONE if n >= given["input_ids"].shape[1]), None)
            if length is not None:
                found[length].append(given)
    return found


@torch.no_grad()
def agreement(net: Any, run: Any, texts: list[dict]) -> str:
    """How far a program's logits are from the model's, how many labels are equal, and its megabytes."""
    worst, same = 0.0, 0
    for given in texts:
        here, there = net(**given).logits, run.forward(**given)["logits"]
        worst, same = max(worst, float((here - there).abs().max())), same + int(here.argmax() == there.argmax())
    equal = 100 * same / len(texts)
    return (
        f"{run.spec['megabytes']} MB, logits differ by {worst:.2g} at most, {equal:.1f} % of {len(texts)} labels equal"
    )


KINDS: dict[str, Callable[[bool], Rows]] = {
    "batch1-minilm-l6": lambda ready: batch1("minilm-l6", ready),
    "batch1-bert-base": lambda ready: batch1("bert-base", ready),
    "torch1-minilm-l6": lambda ready: torch1("minilm-l6", ready),
    "torch1-bert-base": lambda ready: torch1("bert-base", ready),
    "int8-8x128": int8,
    "int8-20newsgroups": newsgroups,
    "packed-bf16": ragged,
    "phone": phone,
}


def target(runtime: str, precision: str) -> None:
    """Ask ``tune`` for a share of the dense model's milliseconds on MRPC, and write what was reached."""
    from thresher import load_runtime
    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import folder_written_whole, row, write_rows
    from thresher.experiments.tune import SUMMARY, tune

    model = RUNS / "minilm-l6-mrpc"
    if not model.exists():
        net, tokenizer = minilm()
        with folder_written_whole(model) as aside:
            net.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
    given = {"data": str(DATA / "glue" / "mrpc"), "runtime": runtime, "precision": precision, "max_length": 128}
    run = load_runtime(RUNS / f"minilm-l6-dense-{runtime}-{precision}")
    name, threads = f"{runtime} {precision} dense", torch.get_num_threads()
    times = timed({name: lambda batch: run.forward(**batch)}, {"1x53": text(53)}, 20)
    asked = round(ASKED * statistics.median(times[name, "1x53"]), 2)
    place = RUNS / f"target-{runtime}-{precision}-{threads}-threads"
    tune(model=str(model), target_latency_ms=asked, out=place, method="topk", **given)
    reached = json.loads((place / SUMMARY).read_text())["reached"]
    common = {"task": "mrpc", "model": "minilm-l6", "method": "topk", "runtime": runtime, "precision": precision}
    common |= {"batch_size": 1, "threads": threads, "split": "validation", "mode": "pruned"}
    note = f"asked {asked:g} ms, reached {reached['latency_ms']:.3g}, dense {reached['latency_ms_dense']:.3g}"
    one = row(**common, latency_ms_p50=reached["latency_ms"], note=note, **environment())
    write_rows(written(f"target-{runtime}-{precision}"), [one])
    print(note)


def written(name: str) -> Path:
    """The file of the rows of a step."""
    return RESULTS / f"{name}-{torch.get_num_threads()}-threads.json"


def main() -> None:
    """Run a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("graphs", "time", "target"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, help="of each timed call")
    parser.add_argument("--tiny", action="store_true", help="small models, to see that it works; no rows")
    given = parser.parse_args()
    if given.tiny:
        SHAPES.update({name: (64, 2, layers) for name, (_, _, layers) in SHAPES.items()})
        OF.update(folder=RUNS / "tiny", results=None, backend="eager")
    OF["repeats"] = given.repeats
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.step == "target":
        target(*given.names)
        return
    from thresher.evaluation.rows import write_rows

    for name in given.names or KINDS:
        rows: list[dict] = []
        for some in KINDS[name](given.step == "time"):
            rows += some
            if OF["results"]:
                write_rows(written(name), rows)
            for one in some:
                told = (one["latency_ms_p50"], one["speedup_unpadded"], one["flops_ratio"], one["efficiency"])
                what = (one["runtime"], one["precision"], one["recipe"], one["max_length"])
                print(*what, *(f"{number:.3g}" for number in told), one.get("note", ""), flush=True)


if __name__ == "__main__":
    main()
