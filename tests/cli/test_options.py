"""Options that mean the same are on every command where they make sense; docs/cli.md says which."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from thresher.cli import app as cli

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"
DATA = "--data --config --text --label --train-split --test-split --max-length --threads --limit"
SCREEN = "--json --quiet --verbose --help"
SHARED = {  # beside --json, --quiet and --verbose, which all have
    "train": f"{DATA} --metric --batch-size --seed",
    "prepare": f"{DATA} --batch-size --seed".replace(" --label", ""),
    "tune": f"{DATA} --batch-size --seed",
    "eval": f"{DATA} --metric --batch-size --layout",
    "bench": f"{DATA} --metric --batch-size --layout",
    "compare": f"{DATA} --metric --batch-size --seeds",
    "export": DATA,
    "score": "--data --text --max-length --threads --tokens --layout",
    "serve": "--max-length --threads --tokens --layout",
    "show": f"{DATA} --layout".replace(" --label", "").replace("--text", "--columns"),
    "compress": "--threads",
    "audit": f"{DATA} --metric --batch-size --layout",
    "info": "",
}
TRAINING = "--epochs --prune-epochs --lr --dropout --bf16 --no-bf16 --freeze-embeddings --no-freeze-embeddings --at"
OWN = {
    "train": f"--out --task --method --max-drop --target-flops --target-latency --target-latency-ms --keep --recipe "
    f"--fresh --distill-states --runtime --precision --serve-batch {TRAINING}",
    "prepare": "--out --steps --minutes --lr --bf16 --no-bf16 --fresh",
    "tune": "--out --target-flops --target-latency-ms --max-disagreement --max-drop --method --plot --min-length "
    "--runtime --precision --serve-batch",
    "eval": "",
    "bench": "--against --runtime --precision --repeats --graphs --roofline --plot --method --keep --hold --contexts "
    "--image --ask",
    "compare": f"--out --methods --targets --untrained --time --no-time --tasks --when {TRAINING}",
    "export": "--out --format --precision --lengths",
    "score": "--out --keep --prefix --best --prompt --shard-rows --workers --ray --device --fresh",
    "serve": "--host --port --api-key --name --wait-ms --queue-tokens --max-client-batch --device",
    "show": "--text --pair --file --image --ask --new --html --png --method --keep --hold",
    "compress": "--keep --at --sinks --recent",
    "audit": "--against --by --examples --html",
    "info": "",
}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_command_has_these_options_and_no_others(command):
    result = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"})
    listed = "\n".join(line for line in result.stdout.split("Options:")[1].splitlines())
    names = {name for line in listed.splitlines() for name in re.findall(r"--[a-z0-9-]+", line[:70])}
    assert names == set(f"{SHARED[command]} {OWN[command]} {SCREEN}".split())


def test_the_table_of_the_docs_is_this_one():
    section = DOCS.read_text(encoding="utf-8").split("## Options")[1].split("\n## ")[0]
    head, _, *lines = (line for line in section.splitlines() if "|" in line)
    commands = [cell.strip(" `") for cell in head.strip("| ").split("|")][1:]
    assert commands == [*cli.COMMANDS]
    shown: dict[str, set[str]] = {command: set() for command in commands}
    for line in lines:
        names, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for command, cell in zip(commands, cells, strict=True):
            own = re.findall(r"--[a-z-]+", cell)  # another name, or the same
            shown[command] |= set(own or (re.findall(r"--[a-z-]+", names) if cell == "×" else ()))
    assert shown == {command: set(SHARED[command].split()) | {*SCREEN.split()} for command in commands}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_is_explained_in_one_line(command):
    kind, _ = cli.COMMANDS[command]
    for field in fields(kind):
        if text := field.metadata.get("help"):
            assert text.endswith(".") and len(text) < 100, f"{field.name}: {text}"
