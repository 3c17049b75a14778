"""Graphs beside torch: their rows; which ``bench`` makes, of which models, on which texts, and which it uses again."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from support.bench import one_by_one, pruned, rows, task
from support.families import FAMILIES
from support.toy import OPTIONS, make_toy
from thresher.data.load import load_task
from thresher.data.models import load
from thresher.data.tokenize import tokenize
from thresher.evaluation import benchmark as bench
from thresher.evaluation import predict as predicting
from thresher.evaluation.roofline import Roofline
from thresher.experiments import bench as benching
from thresher.experiments import train as jobs
from thresher.experiments.bench import bench as timed_rows
from thresher.exporting.export import fingerprint
from thresher.stats.metrics import compute_metric

FEW = {"repeats": 1, "limit": 8, "max_length": 32, "batch_size": (4,), "baselines": ()}
ALL = {"runtime": ("torch", "onnx", "openvino"), "precision": ("fp32", "int8")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    toy = make_toy(tmp_path_factory.mktemp("toy"))
    out = toy.data + "-out"
    jobs.train(toy.model, toy.data, out, **OPTIONS | {"epochs": 1, "prune_epochs": 1})
    return toy.data, out


@pytest.fixture
def made(monkeypatch) -> dict:
    """The exports that were asked for, by name: models stand where their graphs would."""
    noted = {}

    def export(net, out, **options):
        Path(out).mkdir(parents=True, exist_ok=True)
        spec = {"source": fingerprint(net), "max_length": options["max_length"]}
        Path(out, "thresher.json").write_text(json.dumps(spec))
        noted[Path(out).name] = {"net": copy.deepcopy(net).eval(), **options}

    class Opened:
        def __init__(self, folder, threads=None):
            self.net = models[folder.name]
            threads_of[folder.name] = threads

        def forward(self, **inputs):
            with torch.no_grad():
                return {"logits": self.net(**inputs).logits}

    models, threads_of = {}, {}

    def opened(folder, threads=None):
        if folder.name in noted:
            models[folder.name] = noted[folder.name]["net"]
        return Opened(folder, threads)

    monkeypatch.setattr(benching.exporting, "export", export)
    monkeypatch.setattr(benching, "load_runtime", opened)
    noted["threads"] = threads_of
    return noted


def test_graphs_are_of_the_right_models_and_texts(trained, made, tmp_path):
    data, out = trained
    timed = timed_rows(out, data, **FEW, **ALL, threads=1, graphs=tmp_path)
    pairs = {"onnx-fp32", "onnx-int8", "openvino-fp32", "openvino-int8"}
    assert set(made) - {"threads"} == {f"{name}-{pair}" for name in ("dense", "pruned") for pair in pairs}
    assert set(made["threads"].values()) == {1} and {r["threads"] for r in timed} == {1}
    net, tokenizer = load(out)
    farm = load_task(data)
    train = tokenize(farm.train, farm, tokenizer, 32)[0]["input_ids"]
    for name, given in made.items():
        if name == "threads":
            continue
        assert hasattr(given["net"], "token_pruner") == name.startswith("pruned")
        assert name == f"{name.split('-')[0]}-{given['format']}-{given['precision']}"
        assert (given["calibration"] is None) == (not name.endswith("openvino-int8"))
        if given["calibration"]:
            assert [batch["input_ids"][0].tolist() for batch in given["calibration"]] == list(train)[:300]
    dense = load(out + "/dense")[0]
    assert torch.equal(made["dense-onnx-fp32"]["net"].classifier.weight, dense.classifier.weight)
    assert torch.equal(made["pruned-onnx-fp32"]["net"].classifier.weight, net.classifier.weight)
    where = {(r["runtime"], r["precision"], r["mode"]) for r in timed}
    modes = ("dense-padded", "dense-unpadded", "pruned")
    kinds = [("torch", "fp32"), *(tuple(pair.split("-")) for pair in pairs)]
    assert where == {(*kind, mode) for kind in kinds for mode in modes}


@pytest.mark.filterwarnings("ignore:max_length=31")
def test_graphs_are_used_again_and_never_those_of_another_model(trained, made, tmp_path):
    data, out = trained
    options = {**FEW, "runtime": ("onnx",), "precision": ("fp32",), "graphs": tmp_path}
    timed_rows(out, data, **options)
    first = set(made) - {"threads"}
    made_before = {name: made.pop(name) for name in first}
    timed_rows(out, data, **options)
    assert set(made) == {"threads"}, "nothing is exported anew"
    timed_rows(out, data, **options | {"max_length": 31})
    assert set(made) - {"threads"} == first, "another longest input is another graph"
    for name in first:
        made.pop(name)
    made |= made_before
    spec = tmp_path / "pruned-onnx-fp32" / "thresher.json"
    spec.write_text(json.dumps(json.loads(spec.read_text()) | {"source": "of another model"}))
    for name in first:
        made.pop(name)
    timed_rows(out, data, **options | {"max_length": 31})
    assert set(made) - {"threads"} == {"pruned-onnx-fp32"}


def test_what_does_not_go_together_is_refused(trained):
    data, out = trained
    for wrong in ({"runtime": ("tensorrt",)}, {"precision": ("int4",)}, {"runtime": ("onnx",), "precision": ("bf16",)}):
        with pytest.raises(ValueError, match="does not go with what else was asked for; there is torch: fp32, bf16"):
            timed_rows(out, data, **FEW, **wrong)


def test_what_follows_another_runtime_runs_once_untimed():
    calls = []

    class Recorder(bench.Runner):
        def run(self, rows, inputs):
            calls.append(self.row["mode"])
            return float(len(calls))

    model = FAMILIES["bert"].build()
    text = predicting.Text(model, rows((3, 5)), None)
    kinds = {"a": "torch", "b": "torch", "c": "onnx"}
    runners = [Recorder({"mode": m, "runtime": kind}, model, None, None) for m, kind in kinds.items()]
    bench.time_all(runners, [[0, 1]], text, model.device, 1, lambda *_: None)
    assert "".join(calls) == "abcc" + "bb" + "cc" + "aa", "b after c and c after b and a after c are warmed"
    assert [r.times.tolist() for r in runners] == [[[10.0]], [[6.0]], [[8.0]]]


class Graph:
    """Stands where an opened graph does: a model behind ``forward``, as ``Runtime`` has it, that notes its calls."""

    def __init__(self, model):
        self.model, self.shapes = model, []

    def forward(self, **inputs):
        self.shapes.append(tuple(inputs["input_ids"].shape))
        with torch.no_grad():
            return {"logits": self.model(**inputs).logits}


def test_graphs_stand_beside_torch():
    model, data = pruned(), rows()
    whole, cut = Graph(FAMILIES["bert"].build()), Graph(pruned(seed=5))  # one that answers otherwise
    line = Roofline(peak={"fp32": 1.0, "int8": 4.0}, bandwidth=1.0, threads=1, hardware="none")
    graphs = {("onnx", "fp32"): {"dense": whole, "pruned": cut}, ("openvino", "bf16"): {"dense": whole, "pruned": cut}}
    options = {"max_length": 30, "batch_sizes": (1, 4), "repeats": 2, "examples": 6, "line": line}
    found = bench.measure(model, data, task(), **options, graphs=graphs)
    assert len(found) == 2 * 3 * 3
    assert {r["layout"] for r in found if r["runtime"] == "onnx"} == {"padded", "length-sorted"}
    assert (1, 30) in whole.shapes and (1, 30) not in cut.shapes
    for r in found:
        where = (r["runtime"], r["precision"], r["batch_size"])
        base = {m["mode"]: m for m in found if (m["runtime"], m["precision"], m["batch_size"]) == where}
        rate = r["samples_per_second"]
        assert r["speedup_unpadded"] == pytest.approx(rate / base["dense-unpadded"]["samples_per_second"])
        assert r["speedup_padded"] == pytest.approx(rate / base["dense-padded"]["samples_per_second"])
        first = next(m for m in found if m["runtime"] == "torch" and m["batch_size"] == r["batch_size"])
        assert r["speedup_reference"] == pytest.approx(rate / first["samples_per_second"])
        if r["runtime"] != "torch" and r["mode"] == "pruned":
            own = compute_metric("accuracy", one_by_one(cut.model, data), data["labels"])
            assert r["quality"] == own != next(m for m in found if m["mode"] == "pruned")["quality"]
        assert ("floor_ms" in r) == (r["precision"] == "fp32")
    floors = {(r["mode"], r["batch_size"]): r["floor_ms"] for r in found if r["runtime"] == "torch"}
    for size in (1, 4):
        assert floors["pruned", size] < floors["dense-unpadded", size] < floors["dense-padded", size]
    # one text of 30 tokens: 4 layers, attention and FFN, two FLOPs per MAC at 1 GFLOP/s, more than reading takes
    macs = 4 * (30 * 4 * 32**2 + 2 * 30**2 * 32 + 30 * 2 * 32 * 64)
    assert floors["dense-padded", 1] == pytest.approx(2 * macs / 1e6)
    # alone: the reference is timed beside them and not shown
    alone = bench.measure(model, data, task(), **options, graphs=graphs, precisions=())
    assert {r["runtime"] for r in alone} == {"onnx", "openvino"} and all(r["speedup_reference"] for r in alone)
