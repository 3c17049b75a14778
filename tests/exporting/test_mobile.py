"""Programs for phones answer as their models, at every length of theirs and for shorter texts.

ExecuTorch wants one minor version of torch, so the tests run in an environment of their own: the folder
THRESHER_MOBILE, else ``thresher/mobile`` in the user's cache, which is made where it is missing (2 GB).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertForQuestionAnswering

from support.environments import python_of
from support.families import FAMILIES
from support.tiny import tiny_tokenizer
from thresher import Threshold, ToP, TopK, export, load_runtime, prune
from thresher.data.embedder import Embedder
from thresher.exporting.export import inputs_of
from thresher.exporting.mobile import Int8Embedding

ROOT = Path(__file__).parents[2]
HERE = importlib.util.find_spec("executorch") is not None
PACKAGES = [f"{ROOT}[mobile]", "-c", f"{ROOT}/constraints.txt", "pytest", "pytest-timeout", "hypothesis"]
LENGTHS = (8, 16)
TEXTS = ["the farmer and the grain", "thresh", "the grain and the script and the farmer and the wheat", "chaff"]

there = pytest.mark.skipif(not HERE, reason="run in its own environment by the first test of this file")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.skipif(HERE, reason="this is that environment")
def test_in_an_environment_of_its_own():
    python = python_of("THRESHER_MOBILE", "mobile", PACKAGES)
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    ran = subprocess.run(
        [python, "-m", "pytest", "-q", "-x", "-m", "slow", "-p", "no:cacheprovider", __file__],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    assert " passed" in ran.stdout and "failed" not in ran.stdout


def classifier(method=None, **options):
    options = {"vocab_size": 1200, "pad_token_id": 0, "num_labels": 3, "num_hidden_layers": 2, **options}
    model = FAMILIES["bert"].build(**options)
    return model if method is None else prune(model, method)


def halved() -> ToP:
    """ToP as if trained: half of the ranks leave at its first site."""

    class Halved(ToP):
        name = "top-halved"

        def build(self, model):
            super().build(model)
            self.mask[0, 16:] = False

    return Halved()


METHODS = {"dense": None, "topk": TopK(keep=0.5), "top": halved(), "threshold": Threshold((0.4, 0.8))}
METHODS["query"] = TopK(keep=0.5, at=(0, 1), protect={"until": [7]})  # whose tokens alone vote


def answers(model, program, lengths) -> tuple[float, float]:
    """The largest difference of logits to the model, and the share of equal labels."""
    worst, same, seen = 0.0, 0, 0
    for n in lengths:
        rows = inputs_of(model, tiny_tokenizer(), 1, n)
        with torch.no_grad():
            expected = model(**rows).logits
        found = program.forward(**rows)["logits"]
        worst = max(worst, float((found - expected).abs().max()))
        same, seen = same + int((found.argmax(1) == expected.argmax(1)).sum()), seen + len(found)
    return worst, same / seen


@there
@pytest.mark.parametrize("name", METHODS)
def test_a_program_answers_as_its_model(name, tmp_path):
    model = classifier(METHODS[name])
    asks = name in ("threshold", "query")  # for texts
    texts = [inputs_of(model, tiny_tokenizer(), 1, n) for n in range(3, 17)] if asks else None
    how = {"tokenizer": tiny_tokenizer(), "format": "executorch", "lengths": LENGTHS, "calibration": texts}
    spec = export(model, tmp_path / "program", **how)
    assert spec["difference"] <= 1e-4 and spec["lengths"] == [8, 16] and spec["max_length"] == 16
    program = load_runtime(tmp_path / "program", threads=1)
    if not asks:
        assert answers(model, program, range(1, 17))[0] <= 1e-4
    else:
        assert set(spec["cut"]) == {"8", "16"} and all(0 <= share < 1 for share in spec["cut"].values())
    assert [one["label"] for one in program(TEXTS)] == [program(text)["label"] for text in TEXTS]
    with pytest.raises(ValueError, match="17 tokens: this program takes 16 at most"):
        program.forward(**inputs_of(model, tiny_tokenizer(), 1, 17))


@there
def test_methods_share_their_weights(tmp_path):
    model = classifier(TopK(keep=0.5), hidden_size=64, intermediate_size=256)
    how = {"tokenizer": tiny_tokenizer(), "format": "executorch"}
    one = export(model, tmp_path / "one", lengths=(16,), **how)["megabytes"]
    three = export(model, tmp_path / "three", lengths=(8, 12, 16), **how)["megabytes"]
    weights = sum(p.numel() * 4 for p in model.parameters()) / 1e6
    assert one >= weights and three - one < 0.5 * weights


@there
def test_int8(tmp_path):
    model = classifier(TopK(keep=0.5), hidden_size=64, intermediate_size=256, vocab_size=4000)
    how = {"tokenizer": tiny_tokenizer(), "format": "executorch", "lengths": LENGTHS}
    whole, small = (export(model, tmp_path / p, precision=p, **how)["megabytes"] for p in ("fp32", "int8"))
    assert small < 0.45 * whole
    worst, same = answers(model, load_runtime(tmp_path / "int8", threads=1), [*range(1, 17)] * 3)
    assert worst < 1 and same >= 0.9
    assert not any(isinstance(module, Int8Embedding) for module in model.modules()), "the model is as before"


@there
def test_a_program_of_a_reader_and_of_an_embedder(tmp_path):
    reader = prune(BertForQuestionAnswering(classifier(num_labels=2).config).eval(), TopK(keep=0.5))
    embedder = Embedder(prune(classifier().bert, TopK(keep=0.5)))
    how = {"tokenizer": tiny_tokenizer(), "format": "executorch", "lengths": LENGTHS}
    for model, name in ((reader, "reader"), (embedder, "embedder")):
        assert export(model, tmp_path / name, **how)["difference"] <= 1e-4
        rows = inputs_of(model, tiny_tokenizer(), 3, 11)
        real = rows["attention_mask"].bool()
        with torch.no_grad():
            expected = model(**rows)
        for key, found in load_runtime(tmp_path / name, threads=1).forward(**rows).items():
            difference = (found - expected[key]).abs()
            assert (difference[real] if difference.shape == real.shape else difference).max() <= 1e-4


@pytest.fixture(scope="module")
def phone(tmp_path_factory) -> Path:
    """The folder of a program."""
    folder = tmp_path_factory.mktemp("phone") / "program"
    model = classifier(TopK(keep=0.5), id2label={0: "bad", 1: "fair", 2: "good"})
    export(model, folder, tokenizer=tiny_tokenizer(), format="executorch", lengths=LENGTHS)
    return folder


@there
def test_the_example_runs_it(phone):
    script = [sys.executable, ROOT / "examples" / "mobile.py", phone, TEXTS[0]]
    ran = subprocess.run(script, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    expected = load_runtime(phone, threads=1)(TEXTS[0])
    assert told["label"] == expected["label"] and told["score"] == pytest.approx(expected["score"], abs=1e-4)
    assert told["method"] in ("forward_8", "forward_16")


@there
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_runner_in_cpp_gives_its_logits(phone, tmp_path):
    import executorch

    source = ROOT / "examples" / "mobile.cpp"
    told = [line.removeprefix("//").strip() for line in source.read_text().splitlines() if line.startswith("//     ")]
    command = " ".join(line.removesuffix("\\") for line in told[1:-1])  # what the file says of building it
    assert command.startswith("g++ ")
    command = command.replace("$ET", executorch.__path__[0]).replace("examples/mobile.cpp", str(source))
    built = subprocess.run(shlex.split(command), capture_output=True, text=True, cwd=tmp_path)
    assert built.returncode == 0, built.stderr[-2000:]
    rows = tiny_tokenizer()(TEXTS[0], return_tensors="pt")
    given = [tmp_path / "mobile", phone / "model.pte", 16, *rows["input_ids"][0].tolist()]
    ran = subprocess.run([*map(str, given)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    expected = load_runtime(phone, threads=1).forward(**rows)["logits"][0]
    found = torch.tensor([float(line) for line in ran.stdout.splitlines()])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert subprocess.run([*map(str, given), *["5"] * 16], capture_output=True).returncode == 2
