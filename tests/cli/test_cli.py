"""The command line: what it hands to the library, what it writes, and how it fails: one line and code 2."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import thresher
import thresher.experiments.train
from support.families import FAMILIES
from support.tiny import save_tiny
from thresher import LTP, Threshold, TopK
from thresher.cli import app as cli
from thresher.cli import console, inspecting, options
from thresher.evaluation.rows import row

COMMANDS = {
    "train": "--data --out --method --target-flops --keep --at --epochs --prune-epochs --lr --seed --max-length",
    "tune": "--data --out --target-flops --target-latency-ms --max-disagreement --max-drop --method --plot --limit",
    "eval": "--data --text --label --config --metric --batch-size --max-length --limit",
    "bench": "--data --against --runtime --precision --batch-size --threads --plot --graphs --roofline",
    "compare": "--data --out --methods --targets --seeds --untrained --no-time --epochs --limit --at",
    "export": "--data --out --format --precision --max-length --threads",
    "show": "--text --file --data --image --limit --html --png",
    "audit": "--data --against --by --examples --html --config --batch-size --max-length --limit --layout",
    "info": "",
}
TRAIN = ("train", "a-model", "--data", "some.csv")


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def fails(*arguments: object) -> str:
    """The one line that a mistake is answered with."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert not result.stdout and "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("models")
    methods = {"dense": None, "topk": TopK(keep=0.6), "ltp": LTP(init=1.3), "threshold": Threshold((0.4, 0.5, 0.6))}
    return SimpleNamespace(**{name: save_tiny(folder / name, method) for name, method in methods.items()})


@pytest.fixture
def broken(models, tmp_path):
    """A function that copies a model and spoils a file of it."""

    def spoil(name: str, file: str, change) -> Path:
        for source in getattr(models, name).iterdir():
            (tmp_path / source.name).write_bytes(source.read_bytes())
        (tmp_path / file).write_bytes(change((tmp_path / file).read_bytes()))
        return tmp_path

    return spoil


@pytest.fixture
def calls(monkeypatch) -> list:
    """The library's jobs, replaced by ones that note how they were called and return two rows."""
    noted = []

    def job(name: str):
        def called(*arguments, **options):
            noted.append((name, arguments, options))
            print("what the library prints is not the result")
            common = {"task": "some", "model": "a-model", "quality_dense": 91.0, "batch_size": 1}
            return [
                row(**common, method="dense", mode="dense-unpadded", quality=91.0),
                row(**common, method="ltp", mode="pruned", quality=float("nan"), flops_ratio=2.5),
            ]

        return called

    jobs = SimpleNamespace(**{name: job(name) for name in ("train", "evaluate", "bench")})
    monkeypatch.setitem(sys.modules, "thresher.experiments.train", jobs)
    monkeypatch.setattr("thresher.experiments.train", jobs)
    return noted


# --- help and version ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_options_and_gives_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert set((COMMANDS[command] + " --json --help").split()) <= set(re.findall(r"--[a-z0-9-]+", result.stdout))
    assert len(re.findall(rf"^    thresher {command} ", result.stdout, re.MULTILINE)) in (2, 3, 4)


def test_without_arguments_there_is_help_and_the_version_is_told():
    assert "Commands:" in run().output
    assert run("--version").stdout.strip() == f"thresher {thresher.__version__}"


def test_help_needs_no_heavy_import():
    commands = {"console", "options"}
    for module, own in ((cli, commands | {"inspecting"}), (inspecting, commands), (options, set()), (console, set())):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        names = [a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names]
        names += [node.module or "." for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names) | {"typer", "rich"} | own


# --- what the library is given ---------------------------------------------------------------------------------------
def test_train_hands_over_what_was_asked(calls, tmp_path):
    out = tmp_path / "out"
    result = run(*TRAIN, "--out", out, "--at", "1,2,4", "--keep", "0.5", "--text", "a, b", "--no-bf16", "--fresh", "-q")
    assert result.exit_code == 0, result.output
    ((name, arguments, options),) = calls
    assert (name, arguments) == ("train", ("a-model", "some.csv", str(out)))
    assert options == {
        "keep": 0.5,
        "at": (1, 2, 4),
        "bf16": False,
        "freeze_embeddings": True,
        "fresh": True,
        "seed": 0,
        "text": ("a", "b"),
        "progress": False,
    }
    assert not out.exists() and "2.50" in result.stdout and "the library prints" not in result.stdout


@pytest.mark.parametrize(("given", "keep"), [("32", 32), ("1.0", 1.0), ("0.9,0.5", (0.9, 0.5)), ("64,8", (64, 8))])
def test_keep_is_a_share_or_a_number(calls, tmp_path, given, keep):
    assert run(*TRAIN, "--out", tmp_path, "--keep", given, "--target-flops", "0.3").exit_code == 0
    assert repr(calls[0][2]["keep"]) == repr(keep) and calls[0][2]["target_flops"] == 0.3


def test_eval_and_bench_hand_over_what_was_asked(calls):
    assert run("eval", "a-model", "--data", "some.csv", "--layout", "padded").exit_code == 0
    assert run("bench", "a-model", "--data", "some.csv", "--precision", "fp32,bf16", "--batch-size", "8").exit_code == 0
    assert calls[0] == (
        "evaluate",
        ("a-model", "some.csv"),
        {"batch_size": 32, "max_length": 256, "layout": "padded"},
    )
    calls[1][2].pop("progress")("predicting", 1, 2)
    assert calls[1] == (
        "bench",
        ("a-model", "some.csv"),
        {"runtime": ("torch",), "precision": ("fp32", "bf16"), "batch_size": (8,), "repeats": 5, "max_length": 256},
    )


@pytest.mark.parametrize("command", [(*TRAIN, "--out", "nowhere"), ("eval", *TRAIN[1:]), ("bench", *TRAIN[1:])])
def test_rows_go_to_a_file_or_alone_to_the_screen(calls, tmp_path, command):
    file = tmp_path / "new" / "rows.json"
    assert run(*command, "--json", file).exit_code == 0
    shown = run(*command, "--json", "-")
    assert json.loads(shown.stdout) == json.loads(file.read_text(encoding="utf-8"))
    assert json.loads(shown.stdout)["rows"][1]["quality"] is None


# --- what goes wrong -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "error",
    [
        ValueError("no such\nthing"),
        TypeError("wrong"),
        FileNotFoundError(2, "No such file", "x"),
        RuntimeError(""),
        ImportError("y"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_mistakes_are_told_in_one_line(calls, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(thresher.experiments.train, "evaluate", fail)
    expected = {ValueError: "no such", FileNotFoundError: "x: No such file", RuntimeError: "RuntimeError"}
    assert fails("eval", *TRAIN[1:]) == f"error: {expected.get(type(error), error)}"
    monkeypatch.setenv("THRESHER_DEBUG", "1")
    assert run("eval", *TRAIN[1:]).exception is error


def test_faults_of_the_library_are_not_hidden(calls, monkeypatch):
    monkeypatch.setattr(thresher.experiments.train, "evaluate", lambda *_, **__: {}["missing"])
    assert isinstance(run("eval", *TRAIN[1:]).exception, KeyError)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ((*TRAIN, "--out", "nowhere"), "interrupted; run the same command again to resume"),
        (("eval", *TRAIN[1:]), "interrupted"),
    ],
)
def test_an_interruption_says_how_to_go_on(calls, monkeypatch, command, line):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for job in ("train", "evaluate"):
        monkeypatch.setattr(thresher.experiments.train, job, interrupt)
    result = run(*command)
    assert (result.exit_code, result.stderr.strip()) == (130, line)


def test_results_that_cannot_be_written_stop_before_the_work(calls, models, tmp_path):
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
    assert not calls and sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("option", [("--at", "1,x"), ("--keep", "half"), ("--epochs", "-1"), ("--target-flops", "low")])
def test_options_that_make_no_sense(calls, tmp_path, option):
    result = run(*TRAIN, "--out", tmp_path, *option)
    assert result.exit_code == 2 and f"Error: Invalid value for '{option[0]}'" in result.stderr and not calls


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
        "protect": None,
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
