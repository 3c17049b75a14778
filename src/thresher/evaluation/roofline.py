"""What this machine can do at most, and the least time that a forward can take on it.

Two rates bound a product of tokens and weights: the arithmetic, and the reading of the weights from memory. With few
tokens the reading takes longer, and fewer tokens gain nothing there. Rates are in GFLOP/s (two FLOPs per MAC) and
GB/s, times in milliseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from ..core.compat import int8_product
from ..core.cost import LayerCost, LayerCount
from .hardware import environment, hardware, remembered, torch_threads

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
ROWS = (256, 512, 1024, 2048, 4096)  # tokens of the products that are timed, until one takes too long
LEAST, MOST = 2**28, 2**31  # bytes that are read for the bandwidth
PIECES = {"cpu": 32, "cuda": 2}  # that many reads of them; on a GPU each is long against the start of a kernel


@dataclass(frozen=True)
class Roofline:
    """The most that was measured on one machine.

    Attributes:
        peak: GFLOP/s of torch's matrix products by precision; what this machine and torch cannot do is absent. That of
            int8 is torch's own, a weak ceiling: other runtimes may be faster.
        bandwidth: GB/s at which weights are read that lie beyond the caches.
        threads, hardware, device, versions, date: of the measurement.
    """

    peak: dict[str, float]
    bandwidth: float
    threads: int
    hardware: str
    device: str = "cpu"
    versions: str = ""
    date: str = ""

    def floor(
        self, costs: Sequence[LayerCost], tokens: Tensor | Sequence[LayerCount], precision: str = "fp32"
    ) -> float:
        """The least ms of one forward of a batch: for each attention block and FFN, arithmetic or reading its weights.

        A bound for encoders, no forecast: embeddings, norms, softmax, scores, head and Python are not in it, arithmetic
        runs at its peak and reading beside it. It does not bind int8 products better than torch's (see ``peak``), nor
        the reading of weights that the caches hold from one forward to the next: a small model can be faster.

        Args:
            costs: one entry per layer, as ``Architecture.costs`` or ``Record.costs``.
            tokens: (B,) tokens of each row where all of them stay (of a padded batch, its width), or the tokens of each
                layer, as ``Record.counts``.
            precision: of weights and products.

        Raises:
            ValueError: the precision was not measured, or there are not as many counts as costs.
        """
        peak, size = self._of(precision)
        counts = [LayerCount(tokens, tokens)] * len(costs) if isinstance(tokens, Tensor) else tokens
        total = 0.0
        for cost, count in zip(costs, counts, strict=True):
            attention = cost.macs(count.n_attention, 0).sum().item()  # squares are summed over rows
            ffn = cost.macs(0, count.n_ffn).sum().item()
            for weights, macs in ((cost.attention, attention), (cost.ffn, ffn)):
                total += max(2 * macs / peak, size * weights / self.bandwidth)
        return total / 1e6

    def break_even(self, precision: str = "fp32") -> float:
        """M*, the tokens in a batch below which a product takes as long as reading its weights, however few they are.

        Raises:
            ValueError: the precision was not measured.
        """
        peak, size = self._of(precision)
        return size * peak / (2 * self.bandwidth)

    def to_dict(self) -> dict[str, Any]:
        """The fields and M* by precision, for JSON."""
        return asdict(self) | {"break_even": {name: self.break_even(name) for name in self.peak}}

    def _of(self, precision: str) -> tuple[float, int]:
        """GFLOP/s, and the bytes of a weight."""
        if precision not in self.peak:
            raise ValueError(f"precision {precision!r} was not measured here; there is {', '.join(self.peak)}")
        return self.peak[precision], PRECISIONS[precision].itemsize


def roofline(
    threads: int | None = None, *, seconds: float = 1.0, device: str = "cpu", cache: str | Path | None = None
) -> Roofline:
    """Measure this machine, a few seconds; remembered per machine, threads and version of torch.

    The best of many runs counts, which a busy machine does not spoil as easily as a mean. What it can spoil is too low:
    measure on a quiet one, with another ``seconds`` if a bad one is remembered.

    Args:
        threads: of torch; default: as many as it uses now. They are set back at the end.
        seconds: to spend on each of the three precisions and on the bandwidth.
        device: "cpu" or "cuda".
        cache: folder of what was measured before, default ``$THRESHER_CACHE`` or ~/.cache/thresher.

    Raises:
        ValueError: ``threads`` is below 1, or ``device`` is something else.
    """
    threads = torch.get_num_threads() if threads is None else threads
    if device not in PIECES:
        raise ValueError(f"device={device!r}: expected {' or '.join(PIECES)}")

    def measure() -> Roofline:
        with torch_threads(threads):
            return _measure(threads, seconds, device)

    about = [hardware(), device, threads, seconds, torch.__version__]
    return remembered("roofline", about, lambda known: Roofline(**known), measure, cache)


def table(line: Roofline) -> Table:
    """The roofline as a table for the screen."""
    title = f"{line.hardware}; {line.threads} thread{'s' * (line.threads > 1)}"
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("precision")
    for name in ("peak, GFLOP/s", "bandwidth, GB/s", "M*, tokens"):
        shown.add_column(name, justify="right")
    for name, peak in line.peak.items():
        shown.add_row(name, f"{peak:,.0f}", f"{line.bandwidth:,.1f}", f"{line.break_even(name):,.0f}")
    return shown


def _measure(threads: int, seconds: float, device: str) -> Roofline:
    peak = {}
    for name, dtype in PRECISIONS.items():
        with suppress(RuntimeError):  # no kernel for it here
            peak[name] = _peak(dtype, seconds, device)
    about = {name: value for name, value in environment().items() if name != "command"}
    return Roofline(peak, _bandwidth(seconds, device), threads, device=device, **about)


def _peak(dtype: torch.dtype, seconds: float, device: str) -> float:
    """GFLOP/s of the best product of ever more tokens with ever larger weights, which lie as nn.Linear holds them."""
    product = int8_product if dtype == torch.int8 else torch.mm
    best = 0.0
    for rows, width in ((rows, factor * rows) for rows in ROWS for factor in (1, 4)):
        x = torch.ones(rows, width, dtype=dtype, device=device)
        weight = torch.ones(width, width, dtype=dtype, device=device).t()
        product(x, weight)  # kernels are made in the first call
        end, fastest = time.perf_counter() + seconds / 6, float("inf")
        for _ in _at_least(2, end):
            fastest = min(fastest, _timed(partial(product, x, weight), device))
        best = max(best, 2e-9 * rows * width * width / fastest)
        if fastest > seconds / 100:  # the next may take 16 times as long
            break
    return best


def _bandwidth(seconds: float, device: str) -> float:
    """GB/s of reading several times what the caches hold, in turn: by the time a piece's turn comes again it is gone.

    Of a pass over all pieces the median counts, since caches may keep some pieces and interruptions fall on others; of
    the passes the best.
    """
    size = min(max(4 * _caches(device), LEAST), MOST)
    pieces = torch.ones(PIECES[device], size // PIECES[device] // 4096, 1024, device=device)  # written, so really there
    vector = torch.ones(1024, device=device)
    best, end = 0.0, time.perf_counter() + seconds
    for _ in _at_least(2, end):
        for read in (lambda piece: torch.mv(piece, vector), torch.sum):
            times = [_timed(partial(read, piece), device) for piece in pieces]
            best = max(best, 1e-9 * pieces[0].nbytes / statistics.median(times))
    return best


def _caches(device: str) -> int:
    """Bytes of all caches together; 0 where nobody says."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = {}  # several cores share one cache
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        with suppress(OSError, ValueError):
            shared = (index / "shared_cpu_list").read_text()
            sizes[index.name, shared] = 1024 * int((index / "size").read_text().strip().removesuffix("K"))
    return sum(sizes.values())


def _timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of one run."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def _at_least(times: int, end: float):
    """Go on until the clock says ``end``, and so many times in any case."""
    while times > 0 or time.perf_counter() < end:
        times -= 1
        yield
