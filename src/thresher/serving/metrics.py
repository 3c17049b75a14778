"""Counters in the text format of Prometheus, by the names of Text Embeddings Inference where it has them."""

from __future__ import annotations

import bisect
import math
import threading
from collections.abc import Callable

SECONDS = tuple(0.001 * 2**i for i in range(16))  # 1 ms to 33 s
SIZES = tuple(2**i for i in range(11))
TOKENS = tuple(2**i for i in range(3, 18))
RATIOS = (1.0, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 4.0)
COUNTERS = {
    "te_request_count": "Requests that came in, single texts and batches.",
    "te_request_success": "Requests that were answered.",
    "te_request_failure": "Requests that were refused or failed, by the reason.",
    "thresher_tokens_in": "Tokens that the model read, without padding.",
    "thresher_tokens_kept": "Tokens that were left behind the last layer, where the model tells.",
}
HISTOGRAMS = {
    "te_request_duration": ("Seconds from the head of a request to its answer.", SECONDS),
    "te_request_tokenization_duration": ("Seconds of a request until its texts were tokens.", SECONDS),
    "te_request_queue_duration": ("Seconds in the queue, the mean of the rows of a request.", SECONDS),
    "te_request_inference_duration": ("Seconds in the model, the mean of the rows of a request.", SECONDS),
    "te_batch_next_size": ("Rows of a batch.", SIZES),
    "te_batch_next_tokens": ("Tokens of a batch, with padding.", TOKENS),
    "thresher_batch_padding_ratio": ("Tokens of a batch with padding over those without.", RATIOS),
}
GAUGES = {"te_queue_size": "Rows that wait.", "thresher_queue_tokens": "Tokens that wait."}


class Metrics:
    """Count, from any thread, and write it all as text. ``gauges`` gives what is true at the moment."""

    def __init__(self, gauges: Callable[[], dict[str, float]]):
        self._gauges, self._lock = gauges, threading.Lock()
        self._counts: dict[str, dict[str, float]] = {name: {} for name in COUNTERS}
        self._seen = {name: ([0] * (len(edges) + 1), [0.0]) for name, (_, edges) in HISTOGRAMS.items()}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        key = ",".join(f'{label}="{value}"' for label, value in labels.items())
        with self._lock:
            counts = self._counts[name]
            counts[key] = counts.get(key, 0) + amount

    def observe(self, **values: float) -> None:
        """Add one value to each of these histograms."""
        with self._lock:
            for name, value in values.items():
                buckets, total = self._seen[name]
                buckets[bisect.bisect_left(HISTOGRAMS[name][1], value)] += 1
                total[0] += value

    def total(self, name: str) -> float:
        """The sum of a counter, or of a histogram, over all labels."""
        with self._lock:
            return sum(self._counts[name].values()) if name in self._counts else self._seen[name][1][0]

    def text(self) -> str:
        """All of it, as a scraper reads it."""
        lines = []
        gauges = self._gauges()
        with self._lock:
            for name, about in COUNTERS.items():
                lines += [f"# HELP {name} {about}", f"# TYPE {name} counter"]
                counts = self._counts[name] or {"": 0}
                lines += [
                    f"{name}{{{key}}} {value:.15g}" if key else f"{name} {value:.15g}" for key, value in counts.items()
                ]
            for name, about in GAUGES.items():
                lines += [f"# HELP {name} {about}", f"# TYPE {name} gauge", f"{name} {gauges[name]:g}"]
            for name, (about, edges) in HISTOGRAMS.items():
                lines += [f"# HELP {name} {about}", f"# TYPE {name} histogram"]
                buckets, total = self._seen[name]
                so_far = 0
                for edge, number in zip((*edges, math.inf), buckets, strict=True):
                    so_far += number
                    lines.append(f'{name}_bucket{{le="{"+Inf" if edge == math.inf else f"{edge:g}"}"}} {so_far}')
                lines += [f"{name}_sum {total[0]:.15g}", f"{name}_count {so_far}"]
        return "\n".join(lines) + "\n"
