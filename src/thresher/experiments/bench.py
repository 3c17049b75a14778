"""Time a pruned model beside the dense one and baselines, in every runtime and precision that is asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..data.task import Task
from ..evaluation.benchmark import measure
from ..evaluation.predict import plain, predict, replayed
from ..evaluation.roofline import roofline
from ..exporting import export as exporting
from ..exporting.runtime import Runtime, load_runtime
from ..reports import plots
from .cache_spec import decodes, reads
from .decoders import bench_decoder
from .evaluate import dense_of, tested
from .export import export_model
from .readers import bench_reader
from .spec import BenchSpec, job

PAIRS = {"torch": ("fp32", "bf16"), **exporting.FORMATS}  # the precisions of each runtime
Tell = Callable[[str, int, "int | None"], Any]


@job(BenchSpec)
def bench(spec: BenchSpec, *, progress: Tell | None = None) -> list[dict]:
    """Rows of time and quality: a pruned model beside the dense one, padded and unpadded, and beside baselines; of a
    decoder as ``bench_decoder`` says, of a model that reads pictures as ``bench_reader`` does.

    The baselines choose as many tokens of each text as the model does, on its own weights: what they lose is what the
    choice is worth. ``against`` names the dense model, by default ``dense`` in the model's folder, else the model
    itself without pruning. All that fit of ``runtime`` x ``precision`` are timed in one run; graphs are exported first,
    into the folder ``graphs``, where they are used again, or a temporary one.

    Raises:
        ValueError: a model that is not pruned; a runtime or precision that goes with nothing else.
    """
    if reads(spec.model):
        return bench_reader(spec, progress=progress)
    if spec.image or spec.ask:
        raise ValueError(f"{spec.model} reads no pictures beside text: leave --image and --ask out")
    if decodes(spec.model):
        return bench_decoder(spec, progress=progress)
    pairs, tell = pairs_of(spec), progress or (lambda *_: None)
    net, max_length, task, test = tested(spec, spec.layout)
    if not hasattr(net, "token_pruner"):
        raise ValueError(
            f"{spec.model} is not pruned: there is nothing to compare; thresher train makes a pruned model"
        )
    other = dense_of(spec.model, spec.against)
    kept = predict(net, test).kept
    with tempfile.TemporaryDirectory() as temporary:
        both = {"dense": other or plain(net), "pruned": net} if {*spec.runtime} != {"torch"} else {}
        exports = Exports(spec, Path(spec.graphs or temporary), task, max_length, tell)
        rows = measure(
            net,
            test,
            task,
            max_length=max_length,
            batch_sizes=spec.batch_size,
            repeats=spec.repeats,
            examples=spec.examples,
            batches=spec.batches,
            threads=spec.threads,
            baselines={name: replayed(net, name, kept) for name in spec.baselines},
            against=other,
            precisions=[kind for one, kind in pairs if one == "torch"],
            graphs={(one, kind): exports.opened(both, one, kind) for one, kind in pairs if one != "torch"},
            line=roofline(spec.threads) if net.device.type == "cpu" else None,
            fields={"model": Path(spec.model).name, "split": "test"},
            progress=progress,
        )
    if spec.plot:
        plots.bench(rows, spec.plot)
    return rows


def pairs_of(spec: BenchSpec) -> list[tuple[str, str]]:
    """The runtimes and precisions that go together; ValueError where one goes with nothing."""
    pairs = [(one, kind) for one in spec.runtime for kind in spec.precision if kind in PAIRS.get(one, ())]
    for given, there in ((spec.runtime, {one for one, _ in pairs}), (spec.precision, {kind for _, kind in pairs})):
        if lost := [value for value in given if value not in there]:
            known = "; ".join(f"{one}: {', '.join(kinds)}" for one, kinds in PAIRS.items())
            raise ValueError(f"{lost[0]!r} does not go with what else was asked for; there is {known}")
    return pairs


class Exports:
    """The graphs of a run: exported into a folder, or used again where they are of the same weights and length."""

    def __init__(self, spec: BenchSpec, folder: Path, task: Task, max_length: int, tell: Tell):
        self.spec, self.folder, self.task, self.max_length, self.tell = spec, folder, task, max_length, tell

    def opened(self, models: Mapping[str, PreTrainedModel], runtime: str, precision: str) -> dict[str, Runtime]:
        """The graphs of the models by their names, ready to run."""
        graphs = {}
        for name, model in models.items():
            place = self.folder / f"{name}-{runtime}-{precision}"
            if exporting.source_of(place) != (exporting.fingerprint(model), self.max_length):
                self.tell(f"writing {place.name}", 0, None)
                how = {"format": runtime, "precision": precision, "max_length": self.max_length}
                export_model(model, self.spec.model, place, self.task, **how)
            graphs[name] = load_runtime(place, threads=self.spec.threads)
        return graphs
