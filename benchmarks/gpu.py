"""What pruning gives on a GPU, in ten minutes: checked first, then timed. Needs torch and transformers alone.

    PYTHONPATH=src python benchmarks/gpu.py --out gpu.json              all of it, on the first GPU
    PYTHONPATH=src python benchmarks/gpu.py --out x.json --tiny         to see that it works, on a CPU as well

Random weights of MiniLM-L6's and BERT-base's shape; lengths of 20 Newsgroups, cut at 512 tokens. A section that fails
says so and the next one runs; what is done is written after each. Rows have the form of all others; times are by the
device's own events and, with what the host adds, by the clock. Exit code 1 where answers differ: then nothing is timed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
LENGTHS = HERE / "lengths-20newsgroups.json"  # of 768 texts of its test part, drawn once
SHAPES = {  # layers, width, heads, inner width
    "minilm-l6": (6, 384, 12, 1536),
    "bert-base": (12, 768, 12, 3072),
}
KEEPS = {  # layers (as a share of all) and what stays there: about 2, 4 and 8 times fewer MACs
    "2x": (0.5, 0.5),
    "4x": (0.25, 0.25),
    "8x": (0.1, 0.1),
}
EXACT, ROUGH = 1e-5, 1e-2  # of the answers in fp32; of bf16 beside fp32, relative
METHODS = ("TopK", "Random")


@dataclass
class Run:
    """What a call is about, and what it has found so far."""

    device: torch.device
    out: Path
    tiny: bool
    repeats: int
    warm: int
    found: dict[str, Any] = field(default_factory=lambda: {"rows": []})

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def shapes(self) -> dict[str, tuple[int, int, int, int]]:
        return {"tiny": (2, 32, 2, 64)} if self.tiny else SHAPES

    @property
    def sizes(self) -> tuple[int, ...]:
        return (1, 4) if self.tiny else (1, 32, 256)

    def write(self) -> None:
        """Land what is there, whole."""
        aside = self.out.with_suffix(".partial")
        aside.write_text(json.dumps(self.found, indent=1) + "\n")
        os.replace(aside, self.out)


def lengths(count: int, seed: int = 0, most: int = 512) -> list[int]:
    """So many lengths, drawn."""
    return [min(most, n) for n in random.Random(seed).sample(json.loads(LENGTHS.read_text()), count)]


def model(shape: tuple[int, int, int, int], run: Run, dtype: torch.dtype) -> Any:
    """A classifier of the shape, random weights, always the same ones."""
    from transformers import BertConfig, BertForSequenceClassification

    layers, width, heads, inner = shape
    config = BertConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner)
    torch.manual_seed(0)
    return BertForSequenceClassification(config).to(run.device, dtype).eval()


def batch(some: list[int], run: Run, width: int | None = None) -> dict[str, Tensor]:
    """Rows of so many tokens each, padded to the longest or to ``width``."""
    width, draw = width or max(some), torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30_000, (len(some), width), generator=draw)
    mask = torch.arange(width)[None] < torch.tensor(some)[:, None]
    return {"input_ids": (ids * mask).to(run.device), "attention_mask": mask.long().to(run.device)}


def sites(layers: int) -> tuple[int, int]:
    """The two layers at which tokens leave."""
    return max(0, layers // 6), max(1, layers // 2)


def pruned(net: Any, ratio: str, method: str = "TopK", layout: str = "packed") -> Any:
    """The model with tokens leaving at two layers, in place."""
    import thresher

    at = sites(net.config.num_hidden_layers)
    return thresher.prune(net, getattr(thresher, method)(keep=KEEPS[ratio], at=at), layout=layout, check=False)


# --- timing -----------------------------------------------------------------------------------------------------------
def timed(run: Run, calls: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Milliseconds of each call, interleaved: median by the device's events, by the clock, and the spread."""
    cuda = run.device.type == "cuda"
    for call in calls.values():
        for _ in range(run.warm):
            call()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(run.repeats):
        for name, call in calls.items():
            if cuda:
                torch.cuda.synchronize()
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin = time.perf_counter()
                first.record()
                call()
                last.record()
                torch.cuda.synchronize()
                taken[name].append((first.elapsed_time(last), 1e3 * (time.perf_counter() - begin)))
            else:
                begin = time.perf_counter()
                call()
                taken[name].append((1e3 * (time.perf_counter() - begin),) * 2)
    return {name: told([e for e, _ in both], [c for _, c in both]) for name, both in taken.items()}


def told(events: list[float], clock: list[float]) -> dict[str, float]:
    """Median and spread of some repeats."""
    low, middle, high = statistics.quantiles(events, n=4)
    return {"ms": middle, "wall_ms": statistics.median(clock), "spread": (high - low) / middle}


# --- sections ---------------------------------------------------------------------------------------------------------
def machine(run: Run) -> dict[str, Any]:
    """What this device is and can do."""
    said: dict[str, Any] = {"torch": torch.__version__, "device": str(run.device)}
    if run.device.type != "cuda":
        return said
    said["gpu"] = torch.cuda.get_device_name()
    said["cuda"] = torch.version.cuda
    size = 1024 if run.tiny else 8192
    a = torch.randn(size, size, device=run.device, dtype=run.dtype)
    b = torch.randn(size, size, device=run.device, dtype=run.dtype)
    copied = torch.empty(2**30, dtype=torch.uint8, device=run.device)
    into = torch.empty_like(copied)
    took = timed(run, {"product": lambda: a @ b, "copy": lambda: into.copy_(copied)})
    said["tflops"] = 2 * size**3 / took["product"]["ms"] / 1e9
    said["tb_per_s"] = 2 * 2**30 / took["copy"]["ms"] / 1e9
    return said | {"varlen": varlen_of(run)}


def varlen_of(run: Run) -> dict[str, Any]:
    """Whether torch's attention over rows of unequal lengths runs here, and at which widths of a head."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return {"missing": str(error)}
    said: dict[str, Any] = {"signature": str(inspect.signature(varlen_attn))}
    for width in (32, 64):
        x = torch.randn(8, 2, width, device=run.device, dtype=run.dtype)
        cu = torch.tensor([0, 3, 8], dtype=torch.int32, device=run.device)
        try:
            varlen_attn(x, x, x, cu, cu, 5, 5)
            said[f"heads of {width}"] = True
        except (RuntimeError, NotImplementedError, ValueError) as error:
            said[f"heads of {width}"] = str(error).split("\n")[0]
    return said


@torch.inference_mode()
def equality(run: Run) -> dict[str, Any]:
    """That removing is masking on this device, and what bf16 rounds."""
    import thresher

    said: dict[str, Any] = {}
    for name, shape in run.shapes.items():
        inputs = batch(lengths(8, seed=1, most=48 if run.tiny else 512), run)
        answers: dict[str, Tensor] = {}
        for dtype in (torch.float32, run.dtype):
            net = model(shape, run, dtype)
            short = str(dtype).removeprefix("torch.")
            answers[f"dense {short}"] = net(**inputs).logits.float()
            for layout in ("mask", "padded", "packed"):
                for ratio in ("2x", "8x"):
                    pruned(net, ratio, layout=layout)
                    answers[f"{ratio} {layout} {short}"] = net(**inputs).logits.float()
                    thresher.unprune(net)
            thresher.prune(net, thresher.TopK(keep=1.0, at=sites(shape[0])), layout="packed", check=False)
            answers[f"all {short}"] = net(**inputs).logits.float()
            thresher.unprune(net)
        for ratio in ("2x", "8x"):
            for layout in ("padded", "packed"):
                apart = (answers[f"{ratio} {layout} float32"] - answers[f"{ratio} mask float32"]).abs().max().item()
                said[f"{name} {ratio} {layout} over mask"] = apart
        said[f"{name} all over dense"] = (answers["all float32"] - answers["dense float32"]).abs().max().item()
        if run.dtype is not torch.float32:
            exact, rough = answers["dense float32"], answers["dense bfloat16"]
            said[f"{name} bf16, relative"] = ((rough - exact).norm() / exact.norm()).item()
    wrong = [k for k, v in said.items() if not v <= (ROUGH if "relative" in k else EXACT)]
    return said | {"wrong": wrong}


@torch.inference_mode()
def attention(run: Run) -> dict[str, Any]:
    """Attention alone, over rows of unequal lengths: one call a row, one call for all, and padded; and the scores."""
    said: dict[str, Any] = {}
    for name, (_, width, heads, _) in run.shapes.items():
        some = lengths(run.sizes[-1], seed=2, most=48 if run.tiny else 512)
        total, longest, channels = sum(some), max(some), width // heads
        q, k, v = (torch.randn(total, heads, channels, device=run.device, dtype=run.dtype) for _ in range(3))
        ends = torch.tensor([0, *some]).cumsum(0)
        cu = ends.to(run.device, torch.int32)
        cuts = list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
        real = (torch.arange(longest)[None] < torch.tensor(some)[:, None]).to(run.device)

        def rows(x: Tensor, real=real) -> Tensor:
            full = x.new_zeros(*real.shape, *x.shape[1:])
            full[real] = x
            return full.transpose(1, 2)

        padded = [rows(x) for x in (q, k, v)]
        mask = real[:, None, None]

        def loop(q=q, k=k, v=v, cuts=cuts) -> Tensor:
            each = [F.scaled_dot_product_attention(*(x[None, a:b].transpose(1, 2) for x in (q, k, v))) for a, b in cuts]
            return torch.cat([one[0].transpose(0, 1) for one in each])

        def padding(padded=padded, mask=mask, real=real) -> Tensor:
            return F.scaled_dot_product_attention(*padded, attn_mask=mask).transpose(1, 2)[real]

        def scores(padded=padded, mask=mask, real=real, step=64) -> Tensor:
            parts = []
            for i in range(0, len(real), step):
                q, k = padded[0][i : i + step], padded[1][i : i + step]
                product = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
                weights = product.masked_fill(~mask[i : i + step], float("-inf")).softmax(-1)
                parts.append((weights * real[i : i + step, None, :, None]).sum(2).mean(1))
            return torch.cat(parts)

        calls: dict[str, Callable[[], Any]] = {"a call a row": loop, "padded": padding, "scores, padded": scores}
        if run.device.type == "cuda" and varlen_of(run).get(f"heads of {channels}") is True:
            from torch.nn.attention.varlen import varlen_attn

            calls["one call"] = lambda q=q, k=k, v=v, cu=cu, n=longest: varlen_attn(q, k, v, cu, cu, n, n)
        want = loop().float()
        apart = {
            other: ((calls[other]().float() - want).norm() / want.norm()).item()
            for other in ("padded", "one call")
            if other in calls
        }
        said[name] = {"tokens": total, "rows": len(some), **timed(run, calls), "differences": apart}
    return said


def measured(run: Run, name: str, how: dict[str, Any], took: dict[str, float], fraction: float) -> dict[str, Any]:
    """A row of a time; ``fraction``: MACs over the dense model's on the same texts without padding."""
    size, tokens = how.pop("size"), how.pop("tokens")
    row = {"task": "20newsgroups", "model": name, "seed": 0, "runtime": "torch", "split": "none", "max_length": 512}
    row |= {"precision": "bf16" if run.dtype is torch.bfloat16 else "fp32", "batch_size": size, "tokens_mean": tokens}
    row |= {"latency_ms_p50": took["ms"], "wall_ms": took["wall_ms"], "spread": took["spread"], "repeats": run.repeats}
    row |= {"samples_per_second": 1e3 * size / took["ms"], "flops_ratio": 1 / fraction}
    row |= {"hardware": run.found["machine"].get("gpu", "cpu"), "versions": f"torch {torch.__version__}"}
    return (
        row | {"command": " ".join(sys.argv[1:]), "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())} | how
    )


def compared(rows: list[dict[str, Any]]) -> None:
    """Fill in speed-ups over the fastest dense way and over padding, and efficiency, in place."""
    dense = [row for row in rows if row["method"] == "dense"]
    fastest = min(row["latency_ms_p50"] for row in dense)
    padded = next(row["latency_ms_p50"] for row in dense if row["mode"] == "dense-padded-512")
    for row in rows:
        row["speedup_unpadded"] = fastest / row["latency_ms_p50"]
        row["speedup_padded"] = padded / row["latency_ms_p50"]
        row["efficiency"] = row["speedup_unpadded"] / row["flops_ratio"]


@torch.inference_mode()
def forwards(run: Run, compiled: bool = False) -> list[dict[str, Any]]:
    """Whole forwards: dense in every way, and pruned, interleaved; with the layers compiled, or as they are."""
    import thresher

    rows: list[dict[str, Any]] = []
    most = 48 if run.tiny else 512
    for name, shape in run.shapes.items():
        nets = {"plain": model(shape, run, run.dtype), "packed": model(shape, run, run.dtype)}
        thresher.prune(nets["packed"], thresher.TopK(keep=1.0, at=()), layout="packed", check=False)
        for ratio in KEEPS:
            for method in METHODS:
                nets[f"{method} {ratio} packed"] = pruned(model(shape, run, run.dtype), ratio, method)
        nets["TopK 4x padded"] = pruned(model(shape, run, run.dtype), "4x", layout="padded")
        if compiled:
            for net in nets.values():
                for layer in net.bert.encoder.layer:
                    layer.intermediate.forward = torch.compile(layer.intermediate.forward, dynamic=True)
                    layer.output.forward = torch.compile(layer.output.forward, dynamic=True)
        for size in run.sizes[1:] if compiled else run.sizes:
            some = sorted(lengths(size, seed=3, most=most))
            wide, near = batch(some, run, most), batch(some, run)
            calls: dict[str, Callable[[], Any]] = {
                "dense-padded-512": lambda net=nets["plain"], x=wide: net(**x),
                "dense-padded": lambda net=nets["plain"], x=near: net(**x),
                "dense-packed": lambda net=nets["packed"], x=near: net(**x),
            }
            for key, net in nets.items():
                if key not in ("plain", "packed"):
                    calls[key] = lambda net=net, x=near: net(**x)
            took, here = timed(run, calls), []
            for key, one in took.items():
                method, _, rest = key.partition(" ")
                is_dense = key.startswith("dense")
                how = {"method": "dense" if is_dense else method.lower(), "mode": key if is_dense else "pruned"}
                how |= {"layout": "padded" if "padded" in key else "packed", "size": size, "target_flops": None}
                how |= {"tokens": sum(some) / size, "recipe": rest or None, "compiled": compiled}
                here.append(measured(run, name, how, one, 1.0 if is_dense else fraction_of(nets[key])))
            compared(here)
            rows += here
        del nets
    return rows


def fraction_of(net: Any) -> float:
    """MACs of the last call over the dense model's on the same texts."""
    report = net.token_pruner.report
    return sum(row["macs"] for row in report) / sum(row["dense_macs"] for row in report)


@torch.inference_mode()
def graphs(run: Run) -> dict[str, Any]:
    """A CUDA graph of the dense model, padded, one text and 32: what launches cost."""
    if run.device.type != "cuda":
        return {"skipped": "no CUDA"}
    said: dict[str, Any] = {}
    for name, shape in run.shapes.items():
        net = model(shape, run, run.dtype)
        for size, width in ((1, 128), (1, 512), (32, 128), (32, 512)):
            inputs = batch([width] * size, run)
            inputs.pop("attention_mask")
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):
                    net(**inputs)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                net(**inputs)
            said[f"{name} {size} x {width}"] = timed(
                run, {"eager": lambda net=net, x=inputs: net(**x), "graph": graph.replay}
            )
    return said


@torch.inference_mode()
def profile(run: Run) -> dict[str, Any]:
    """Kernels and host time of one forward, batch of 32: dense padded and pruned packed."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    said: dict[str, Any] = {}
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if run.device.type == "cuda" else [])
    for name, shape in run.shapes.items():
        plain, short = model(shape, run, run.dtype), pruned(model(shape, run, run.dtype), "4x")
        inputs = batch(sorted(lengths(run.sizes[1], seed=3, most=48 if run.tiny else 512)), run)
        for key, net in (("dense-padded", plain), ("TopK 4x packed", short)):
            for _ in range(run.warm):
                net(**inputs)
            with recorded(activities=kinds) as found:
                net(**inputs)
            events = sorted(found.key_averages(), key=lambda e: -e.count)
            launches = sum(e.count for e in events if "LaunchKernel" in e.key)
            host = sum(e.self_cpu_time_total for e in events) / 1e3
            top = [[e.key, e.count] for e in events[:10]]
            said[f"{name} {key}"] = {"launches": launches, "host_ms": host, "most_called": top}
    return said


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of times as text."""
    head = (
        f"{'model':10} {'batch':>5} {'':>20} {'ms':>8} {'wall':>8} {'x dense':>8} {'x 512':>7} {'MACs':>6} {'eff.':>5}"
    )
    lines = [head]
    for row in rows:
        label = row["mode"] if row["method"] == "dense" else f"{row['method']} {row['recipe']}"
        label += " compiled" if row["compiled"] else ""
        numbers = (row["latency_ms_p50"], row["wall_ms"], row["speedup_unpadded"], row["speedup_padded"])
        lines.append(
            f"{row['model']:10} {row['batch_size']:>5} {label:>20} {numbers[0]:8.2f} {numbers[1]:8.2f} "
            f"{numbers[2]:8.2f} {numbers[3]:7.2f} {row['flops_ratio']:6.2f} {row['efficiency']:5.2f}"
        )
    return "\n".join(lines)


def section(run: Run, name: str, what: Callable[[], Any]) -> Any:
    """Run one section and write what it found; what it raises is written in its place."""
    begin = time.perf_counter()
    try:
        said = what()
    except Exception as error:  # the next section may still work
        traceback.print_exc()
        said = {"failed": f"{type(error).__name__}: {error}".split("\n")[0]}
    if isinstance(said, list):
        run.found["rows"] += said
    else:
        run.found[name] = said
    run.found.setdefault("seconds", {})[name] = round(time.perf_counter() - begin, 1)
    run.write()
    print(f"{name}: {run.found['seconds'][name]} s", flush=True)
    return said


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a json file")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, few repeats; says nothing of speed")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not options.tiny:
        parser.error("no GPU is here; --tiny shows on a CPU that the script works")
    device = torch.device("cuda" if cuda else "cpu")
    run = Run(device, options.out, options.tiny, 3 if options.tiny else 20, 1 if options.tiny else 5)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    section(run, "machine", lambda: machine(run))
    checked = section(run, "equality", lambda: equality(run))
    if "failed" in checked or checked["wrong"]:
        print(f"answers differ, nothing is timed: {checked.get('failed') or checked['wrong']}", file=sys.stderr)
        return 1
    section(run, "attention", lambda: attention(run))
    section(run, "forwards", lambda: forwards(run))
    section(run, "compiled", lambda: forwards(run, compiled=True))
    section(run, "graphs", lambda: graphs(run))
    section(run, "profile", lambda: profile(run))
    print(table(run.found["rows"]))
    timed_ones = ("attention", "forwards", "compiled", "graphs", "profile")
    failed = [name for name in timed_ones if "failed" in run.found.get(name, {})]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
