"""The command line: what it asks the library for, what it writes, and how it fails: one line and code 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

import thresher
from support.families import FAMILIES
from support.tiny import save_tiny
from support.toy import OPTIONS, make_toy
from thresher import LTP, Threshold, TopK
from thresher.cli import app as cli
from thresher.cli.console import Group
from thresher.cli.options import add_command
from thresher.evaluation.rows import row
from thresher.experiments import spec as specs
from thresher.experiments.train import train

TRAIN = ("train", "a-model", "--data", "some.csv")


def run(*arguments: object, app: typer.Typer = cli.app):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(*arguments: object, app: typer.Typer = cli.app) -> str:
    """The one line that a mistake is answered with."""
    result = run(*arguments, app=app)
    assert result.exit_code == 2, result.output
    assert not result.stdout and "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def app_of(command: str, does) -> typer.Typer:
    """The command line with one command, which does something else."""
    app = typer.Typer(cls=Group, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    add_command(app, command, cli.COMMANDS[command][0], does)
    return app


def asked(*arguments: object):
    """The specification that a call makes."""
    noted = []
    result = run(*arguments, app=app_of(str(arguments[0]), lambda spec, screen: noted.append(spec)))
    assert result.exit_code == 0, result.output
    return noted[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("models")
    methods = {"dense": None, "topk": TopK(keep=0.6), "ltp": LTP(init=1.3), "threshold": Threshold((0.4, 0.5, 0.6))}
    return SimpleNamespace(**{name: save_tiny(folder / name, method) for name, method in methods.items()})


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> SimpleNamespace:
    """A data set, and a folder that was trained on it at 32 tokens."""
    toy = make_toy(tmp_path_factory.mktemp("toy"))
    toy.out = Path(toy.data).parent / "out"
    train(toy.model, toy.data, toy.out, **OPTIONS | {"epochs": 0, "prune_epochs": 0})
    return toy


@pytest.fixture
def broken(models, tmp_path):
    """A function that copies a model and spoils a file of it."""

    def spoil(name: str, file: str, change) -> Path:
        for source in getattr(models, name).iterdir():
            (tmp_path / source.name).write_bytes(source.read_bytes())
        (tmp_path / file).write_bytes(change((tmp_path / file).read_bytes()))
        return tmp_path

    return spoil


# --- help and version ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_gives_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert len(re.findall(rf"^    thresher {command} ", result.stdout, re.MULTILINE)) in (2, 3, 4, 5)


def test_without_arguments_there_is_help_and_the_version_is_told():
    assert "Commands:" in run().output
    assert run("--version").stdout.strip() == f"thresher {thresher.__version__}"


@pytest.mark.parametrize("words", [(), ("train",), ("show",)])
def test_help_needs_no_heavy_import(words):
    heavy = "{'torch', 'transformers', 'datasets', 'pandas', 'numpy'}"
    code = (
        "import sys\nfrom thresher.cli.app import main\ntry:\n    main()\n"
        f"finally:\n    print(*({heavy} & {{*sys.modules}}), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *words, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Usage:" in result.stdout and result.stderr.split() == []


# --- what the library is asked for -----------------------------------------------------------------------------------
def test_a_call_becomes_a_specification(tmp_path):
    options = ("--at", "1,2,4", "--keep", "0.5", "--text", "a, b", "--no-bf16", "--fresh", "-q")
    spec = asked(*TRAIN, "--out", tmp_path / "out", *options)
    expected = {"model": "a-model", "data": "some.csv", "out": tmp_path / "out", "at": (1, 2, 4), "keep": 0.5}
    assert spec == specs.TrainSpec(**expected, bf16=False, fresh=True, text=("a", "b"))
    assert not (tmp_path / "out").exists()
    assert asked(*TRAIN, "--out", tmp_path) == specs.TrainSpec(model="a-model", data="some.csv", out=tmp_path)


@pytest.mark.parametrize(("given", "keep"), [("32", 32), ("1.0", 1.0), ("0.9,0.5", (0.9, 0.5)), ("64,8", (64, 8))])
def test_keep_is_a_share_or_a_number(tmp_path, given, keep):
    assert repr(asked(*TRAIN, "--out", tmp_path, "--keep", given).keep) == repr(keep)


def test_values_with_commas_and_flags():
    assert asked("bench", "m", "--precision", "fp32,bf16", "--batch-size", "8") == specs.BenchSpec(
        model="m", precision=("fp32", "bf16"), batch_size=(8,)
    )
    assert asked("bench", "--roofline", "--threads", "1") == specs.BenchSpec(roofline=True, threads=1)
    out = ("--out", "nowhere")
    spec = asked("compare", "m", *out, "--targets", "0.5,0.3", "--seeds", "0,1", "--no-time", "--untrained")
    assert (spec.targets, spec.seeds, spec.time, spec.untrained) == ((0.5, 0.3), (0, 1), False, True)
    assert asked("audit", "m", "--by", "dialect, source").by == ("dialect", "source")
    spec = asked("show", "m", "--text", "one, two", "--text", "three")
    assert (spec.texts, spec.text) == (["one, two", "three"], None)


@pytest.mark.parametrize("option", [("--at", "1,x"), ("--keep", "half"), ("--epochs", "-1"), ("--target-flops", "low")])
def test_options_that_make_no_sense(tmp_path, option):
    result = run(*TRAIN, "--out", tmp_path / "out", *option)
    assert result.exit_code == 2 and f"Error: Invalid value for '{option[0]}'" in result.stderr
    assert not (tmp_path / "out").exists()


# --- results ---------------------------------------------------------------------------------------------------------
def test_rows_go_to_a_file_or_alone_to_the_screen(tmp_path):
    rows = [row(task="some", method="ltp", mode="pruned", quality=float("nan"), flops_ratio=2.5, quality_dense=91.0)]

    def work(spec, screen):
        with screen.aside():
            print("what a library prints is not the result")
        screen.show(rows, lambda rows, width: f"{len(rows)} row in {width} columns")
        screen.say("a notice")

    app, file = app_of("eval", work), tmp_path / "new" / "rows.json"
    shown = run("eval", "m", "--json", file, app=app)
    assert shown.stdout == "1 row in 80 columns\n" and "not the result" in shown.stderr and "a notice" in shown.stderr
    alone = run("eval", "m", "--json", "-", "--quiet", app=app)
    assert json.loads(alone.stdout) == json.loads(file.read_text(encoding="utf-8")) and "notice" not in alone.stderr
    assert json.loads(alone.stdout)["rows"][0]["quality"] is None


def test_results_that_cannot_be_written_stop_before_the_work(models, tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    assert "it is a file" in fails(*TRAIN, "--out", file)
    assert "cannot write" in fails(*TRAIN, "--out", file / "below")
    assert "it is a folder" in fails(*TRAIN, "--out", tmp_path / "out", "--json", folder)
    assert "it is a folder" in fails("bench", *TRAIN[1:], "--plot", folder)
    assert "cannot write" in fails("eval", *TRAIN[1:], "--json", "/proc/rows.json")
    assert "it is a folder" in fails("show", models.topk, "--text", "wheat", "--html", folder)
    if os.geteuid():
        folder.chmod(0o500)
        assert "Permission denied" in fails("eval", *TRAIN[1:], "--json", folder / "rows.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


# --- what goes wrong -------------------------------------------------------------------------------------------------
def raising(error: BaseException, command: str = "eval") -> typer.Typer:
    def fail(*_):
        raise error

    return app_of(command, fail)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no such\nthing"), "no such"),
        (FileNotFoundError(2, "No such file", "x"), "x: No such file"),
        (ImportError("pip install 'thresher-pruning[onnx]'"), "pip install 'thresher-pruning[onnx]'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_mistakes_are_told_in_one_line(monkeypatch, error, said):
    assert fails("eval", "m", app=raising(error)) == f"error: {said}"
    monkeypatch.setenv("THRESHER_DEBUG", "1")
    assert run("eval", "m", app=raising(error)).exception is error


@pytest.mark.parametrize(
    "error",
    [
        TypeError("a bug"),
        RuntimeError("a bug"),
        KeyError("a bug"),
        AssertionError(),
        ModuleNotFoundError("x", name="x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_faults_of_the_library_keep_their_traceback(error):
    result = run("eval", "m", app=raising(error))
    assert result.exception is error and result.exit_code == 1 and "error: " not in result.stderr


@pytest.mark.parametrize(
    ("command", "line"),
    [("train", "interrupted; run the same command again to resume"), ("eval", "interrupted")],
)
def test_an_interruption_says_how_to_go_on(tmp_path, command, line):
    out = ("--out", tmp_path / "out") if command == "train" else ()
    result = run(command, "m", *out, app=raising(KeyboardInterrupt(), command))
    assert (result.exit_code, result.stderr.strip()) == (130, line)


CONFIGS = {  # a file that was spoiled; Python itself complains of it in many ways
    "size": lambda c: c.replace(b'"hidden_size": 32', b'"hidden_size": 48'),
    "heads": lambda c: c.replace(b'"num_attention_heads": 4', b'"num_attention_heads": 0'),
    "word": lambda c: c.replace(b'"num_hidden_layers": 4', b'"num_hidden_layers": "four"'),
    "layers": lambda c: c.replace(b'"num_hidden_layers": 4', b'"num_hidden_layers": null'),
    "act": lambda c: c.replace(b'"hidden_act": "gelu"', b'"hidden_act": "gelee"'),
    "list": lambda c: b"[]",
}


@pytest.mark.parametrize("spoiled", CONFIGS)
def test_whatever_is_wrong_with_a_configuration_is_one_line(broken, spoiled):
    folder = broken("topk", "config.json", CONFIGS[spoiled])
    assert str(folder) in fails("show", folder, "--text", "wheat")


METHODS = {
    "shares": (("--method", "topk", "--keep", "0.9,0.5,0.4"), "keep"),
    "negative": (("--method", "topk", "--keep", "-1"), "keep"),
    "layer": (("--at", "9"), "layer 9 is not possible"),
    "no such field": (("--method", "firstk", "--target-latency", "0.5"), "has no target_latency"),
    "two targets": (("--method", "top", "--target-flops", "0.5", "--target-latency", "0.5"), "target"),
    "no method": (("--method", "magic"), "unknown pruning method 'magic'"),
    "no recipe": (("--recipe", "magic"), "there is no recipe"),
}


@pytest.mark.parametrize("mistake", METHODS)
def test_options_that_a_method_does_not_take_are_one_line(toy, tmp_path, mistake):
    options, said = METHODS[mistake]
    call = ("train", toy.model, "--data", toy.data, "--epochs", "0", "--prune-epochs", "0", "--out", tmp_path / "out")
    assert said in fails(*call, "--max-length", "32", *options)


# --- what a folder remembers -----------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("default")  # which the command tells
@pytest.mark.parametrize("command", ["eval", "bench", "audit", "show"])
def test_a_command_takes_data_and_length_from_the_folder_and_says_so(toy, command):
    few = {"bench": ("--repeats", "1", "--batch-size", "4"), "audit": ("--examples", "0")}.get(command, ())
    result = run(command, toy.out, "--limit", "20", *few, "--json", "-")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("as trained: ")]
    assert len(lines) == 1 and toy.data in lines[0] and "max_length 32" in lines[0]
    if command in ("eval", "bench"):
        assert {one["max_length"] for one in json.loads(result.stdout)["rows"]} == {32}


@pytest.mark.filterwarnings("default")
def test_another_length_is_not_taken_in_silence(toy):
    result = run("eval", toy.out, "--limit", "4", "--max-length", "64")
    assert result.exit_code == 0 and "max_length=64: the model was trained at 32" in result.stderr
    assert "the data (--data)" in fails("eval", toy.model)


# --- info ------------------------------------------------------------------------------------------------------------
def described(model: Path) -> dict:
    result = run("info", model, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["rows"][0]


def test_info_of_a_dense_model(models):
    shown = described(models.dense)
    assert shown["pruning"] is None and shown["thresholds"] is None and shown["flops_fraction"] is None
    assert (shown["architecture"], shown["layers"], shown["hidden_size"]) == ("BertForSequenceClassification", 4, 32)
    assert shown["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"] and shown["max_length"] == 512
    assert shown["parameters"] == sum(p.numel() for p in FAMILIES["bert"].build().parameters())
    assert re.search(r"pruning +none: the model is dense", run("info", models.dense).stdout)


def test_info_of_pruned_models(models):
    assert described(models.topk)["pruning"] == {
        "method": "topk",
        "version": 1,
        "at": [0, 1, 2],
        "votes": "all",
        "protect": None,
        "min_tokens": 0,
        "pooling": "put-back",
        "modality": None,
        "keep": 0.6,
        "target_flops": None,
    }
    shown = described(models.ltp)
    assert shown["thresholds"].keys() == {"0", "1", "2", "3"} and shown["thresholds"]["3"] == pytest.approx(0.975)
    assert described(models.threshold)["thresholds"] == {"0": 0.4, "1": 0.5, "2": 0.6}
    assert "0.975" in run("info", models.ltp).stdout


def test_info_shows_what_the_training_recorded(broken):
    rows = [row(task="reviews", metric="accuracy", quality=90.5, quality_dense=91.0, flops_ratio=2.4)]
    summary = {"recipe": {"epochs": 3}, "reached": {"flops_fraction": 0.4}, "rows": rows, "predictions": {"dense": [1]}}
    folder = broken("ltp", "config.json", lambda content: content)
    (folder / "thresher.json").write_text(json.dumps(summary))
    shown = described(folder)
    assert (shown["flops_fraction"], shown["result"]["quality"], shown["training"]) == (0.4, 90.5, {"epochs": 3})
    assert "quality: 90.5" in run("info", folder).stdout


@pytest.mark.parametrize(
    ("name", "file", "change", "expected"),
    [
        ("ltp", "config.json", lambda content: content[:50], "config"),
        ("ltp", "config.json", lambda content: content.replace(b'"ltp"', b'"guess"'), "unknown pruning method 'guess'"),
        ("ltp", "config.json", lambda content: content.replace(b'"version": 1', b'"version": 9'), "update thresher"),
        ("ltp", "model.safetensors", lambda content: content[:-100], "corrupted checkpoint"),
        ("ltp", "model.safetensors", lambda content: content[:5], "corrupted checkpoint"),
        ("dense", "config.json", lambda c: c.replace(b"{", b'{"token_pruning": {"method": "ltp"},', 1), "threshold"),
        ("dense", "config.json", lambda c: c.replace(b"{", b'{"token_pruning": "ltp",', 1), "corrupted checkpoint"),
    ],
    ids=["config", "method", "version", "truncated", "header", "weights", "entry"],
)
def test_info_of_a_corrupted_folder(broken, name, file, change, expected):
    assert expected in fails("info", broken(name, file, change))


@pytest.mark.parametrize("command", ["info", "show"])
def test_folders_without_a_model(tmp_path, command):
    text = ("--text", "wheat") if command == "show" else ()
    for model in (tmp_path, tmp_path / "nothing", "no-such/model"):
        assert str(model) in fails(command, model, *text)


# --- show ------------------------------------------------------------------------------------------------------------
def test_show_in_the_terminal_and_in_the_browser(models, tmp_path):
    page, file = tmp_path / "page.html", tmp_path / "tokens.json"
    result = run("show", models.topk, "--text", "The farmer keeps the wheat.", "--html", page, "--json", file)
    assert result.exit_code == 0 and not result.stderr, result.output
    assert "The farmer keeps the wheat." in result.stdout and "tokens survive" in result.stdout
    assert "farmer" in page.read_text(encoding="utf-8")
    (shown,) = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert shown["tokens"][0]["text"] == "[CLS]" and shown["method"] == "topk"


def test_show_reads_files_data_and_pairs(models, tmp_path):
    lines, table = tmp_path / "texts.txt", tmp_path / "some.csv"
    lines.write_text("the wheat\n\nthe chaff\n", encoding="utf-8")
    pairs = [f"who {letter},a farmer\nwhat {letter},the grain\n" for letter in "abcdefghij"]
    table.write_text("question,answer\n" + "".join(pairs), encoding="utf-8")

    def texts(*arguments):
        result = run("show", models.topk, "--json", "-", *arguments)
        assert result.exit_code == 0, result.output
        return [shown["texts"] for shown in json.loads(result.stdout)["rows"]]

    assert texts("--file", lines) == [["the wheat"], ["the chaff"]]
    assert texts("--file", lines, "--limit", 1) == [["the wheat"]]
    assert texts("--text", "who", "--pair", "a farmer") == [["who", "a farmer"]]
    assert all(len(pair) == 2 for pair in texts("--data", table, "--limit", 2))
    assert all(text[0].split()[0] in ("who", "what") for text in texts("--data", table, "--columns", "question"))


def test_what_show_refuses(models, tmp_path):
    assert "one of --text, --file, --data and --image" in fails("show", models.topk)
    assert "one of" in fails("show", models.topk, "--text", "wheat", "--file", "x")
    assert "one --text" in fails("show", models.topk, "--text", "a", "--text", "b", "--pair", "c")
    assert "texts.txt" in fails("show", models.topk, "--file", tmp_path / "texts.txt")
    assert "dense" in fails("show", models.dense, "--text", "wheat")
    assert "layout" in fails("show", models.topk, "--text", "wheat", "--layout", "fast")
    assert "no text" in fails("show", models.topk, "--file", os.devnull, "--html", tmp_path / "page.html")


# --- all together ----------------------------------------------------------------------------------------------------
def test_a_process_ends_in_code_2_without_a_traceback(tmp_path):
    command = [sys.executable, "-c", "from thresher.cli.app import main; main()", "show", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and not result.stdout
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")


def test_from_text_to_measurements(models, tmp_path):
    data, out = tmp_path / "fields.csv", tmp_path / "out"
    rows = [
        f"{('the chaff', 'wheat and grain')[i % 2]} {chr(97 + i % 26)} {chr(97 + i // 26)},{('bad', 'good')[i % 2]}"
        for i in range(60)
    ]
    data.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    short = ("--data", data, "--max-length", "16", "--batch-size", "16")
    result = run(
        "train", models.dense, *short, "--target-flops", "0.9", "--epochs", "1", "--prune-epochs", "1", "--out", out
    )
    assert result.exit_code == 0, result.output
    assert described(out)["pruning"]["target_flops"] == 0.9
    for command in (("eval", out, *short), ("bench", out, *short, "--repeats", "1", "--limit", "4")):
        result = run(*command, "--json", "-")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["rows"]
    assert run("show", out, "--data", data, "--limit", "1").exit_code == 0
