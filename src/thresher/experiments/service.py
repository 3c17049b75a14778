"""What a budget of time holds for: the runtime, the precision and the batch that will serve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import Tensor

from ..core.cost import LatencyTable
from ..evaluation.latency import compare, latency_table
from ..evaluation.predict import Text, plain

TIMED = 64  # texts that a target of time is measured on
CALIBRATED = 64  # texts that int8 in OpenVINO is calibrated on
RUNTIMES = {"torch": ("fp32",), "onnx": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8")}


@dataclass(frozen=True)
class Service:
    """Price and measure a model where it will run.

    Attributes:
        runtime, precision: "torch" in "fp32", or a graph as of ``export``.
        batch: texts at once; times are per text.

    Raises:
        ValueError: a runtime or a precision that there is not, a batch below 1.
    """

    runtime: str = "torch"
    precision: str = "fp32"
    batch: int = 1

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise ValueError(f"runtime={self.runtime!r}: expected {', '.join(RUNTIMES)}")
        if self.precision not in RUNTIMES[self.runtime]:
            known = ", ".join(RUNTIMES[self.runtime])
            raise ValueError(f"precision={self.precision!r}: a budget of time in {self.runtime} takes {known}")
        if self.batch < 1:
            raise ValueError(f"serve_batch={self.batch}: expected 1 or more")

    @classmethod
    def of(cls, spec: Any, timed: bool) -> Service:
        """What a specification says. Raises ValueError where it says something and the budget is not one of time."""
        service = cls(spec.runtime, spec.precision, spec.serve_batch)
        if service != cls() and not timed:
            raise ValueError(
                "runtime, precision and serve_batch say where a budget of time holds: give target_latency_ms as well"
            )
        return service

    def table(self, net: Any, tokenizer: Any, rows: Dataset) -> LatencyTable:
        """The prices of the layers of a model; ``rows`` calibrate int8 in OpenVINO."""
        if self.runtime == "torch":
            return latency_table(net) if self.batch == 1 else latency_table(net, batch_size=self.batch)
        from ..exporting.latency import graph_latency_table

        return graph_latency_table(net, self.runtime, batch_size=self.batch, **self._how(net, tokenizer, rows))

    def times(self, net: Any, tokenizer: Any, rows: Dataset) -> dict[str, float]:
        """Mean ms per text of the dense model and of ``net`` as it is, interleaved, on texts spread over ``rows``."""
        if self.runtime == "torch":
            dense, pruned = compare(net, self._batches(net, rows, TIMED))
        else:
            from ..exporting.latency import graph_times

            models, how = {"dense": plain(net), "pruned": net}, self._how(net, tokenizer, rows)
            took = graph_times(models, self._batches(net, rows, TIMED), format=self.runtime, **how)
            dense, pruned = took["dense"], took["pruned"]
        return {"latency_ms_dense": dense, "latency_ms": pruned, "latency_fraction_measured": pruned / dense}

    def _how(self, net: Any, tokenizer: Any, rows: Dataset) -> dict[str, Any]:
        static = (self.runtime, self.precision) == ("openvino", "int8")
        calibration = [*self._batches(net, rows, CALIBRATED)] if static else None
        return {"precision": self.precision, "tokenizer": tokenizer, "calibration": calibration}

    def _batches(self, net: Any, rows: Dataset, count: int) -> Iterator[dict[str, Tensor]]:
        """Inputs of about ``count`` texts, spread over ``rows``, in batches of neighbours in length."""
        text = Text(net, rows, None)
        some = range(0, len(rows), -(-len(rows) // count))
        cut = [[row] for row in some] if self.batch == 1 else text.batches(some, self.batch)
        return (text.batch(lines, None, net.device) for lines in cut)
