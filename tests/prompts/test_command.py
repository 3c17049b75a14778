"""``thresher compress``: a text in, a text out."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from prompts.test_compress import TEXT, tokenizer
from prompts.test_llmlingua2 import LONG, classifier
from support.decoders import build
from support.tiny import tiny_tokenizer
from thresher import LLMLingua2, TopK, compress, prune
from thresher.cli.app import app
from thresher.experiments.compress import compressed

OPTIONS = ("--at", "1", "--sinks", "2", "--recent", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    place = tmp_path_factory.mktemp("decoder")
    build("llama").save_pretrained(place)
    tokenizer().save_pretrained(place)
    return str(place)


def run(*arguments: object, **given):
    return CliRunner().invoke(app, ["compress", *map(str, arguments)], **given)


def test_a_text_comes_from_a_file_or_standard_input(folder, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(TEXT, encoding="utf-8")
    told = run(folder, file, "--keep", "0.4", *OPTIONS)
    short = compressed(folder, file=file, keep=0.4, at=1, sinks=2, recent=4)
    assert told.exit_code == 0, told.stderr
    assert told.stdout == short.text and short.tokens_out < short.tokens_in
    assert f"{short.tokens_in} tokens in, {short.tokens_out} out (0.4" in told.stderr and "2 of 3 layers" in told.stderr
    for place in ((), ("-",)):
        assert run(folder, *place, "--keep", "0.4", *OPTIONS, input=TEXT).stdout == short.text


def test_json_has_the_text_and_the_counts(folder):
    told = run(folder, "--keep", "20", *OPTIONS, "--json", "-", input=TEXT)
    (row,) = json.loads(told.stdout)["rows"]
    assert row["tokens_out"] == len(row["ids"]) == len(row["kept"]) <= 20 and row["text"].endswith("which code ?")


def test_line_ends_stay_as_they_are(folder, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"one code\r\nis 48213")
    assert compressed(folder, file=file, keep=1.0).text == "one code\r\nis 48213"


def test_mistakes_are_told_in_one_line(folder, tmp_path):
    spoiled = tmp_path / "spoiled.txt"
    spoiled.write_bytes(b"\xff\xfe wheat")
    for arguments, what in (
        ((folder, tmp_path / "no.txt"), "no.txt: No such file"),
        ((folder, spoiled), "is no text in UTF-8"),
        ((folder, "--keep", "1.5"), "keep=1.5: expected a share"),
        ((folder, "--at", "9", "--keep", "0.1"), "has layers 0 to 2"),
        ((tmp_path, "--keep", "0.5"), "cannot be loaded, expected a model folder"),
    ):
        told = run(*arguments, input=TEXT)
        (line,) = told.stderr.splitlines()
        assert told.exit_code == 2 and line.startswith("error: ") and what in line and not told.stdout
    assert "prompt is empty" in run(folder, input="").stderr


def test_a_token_classifier_shortens_as_it_is_pruned(tmp_path):
    prune(classifier(), TopK(keep=0.5)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    told = run(tmp_path, "--keep", "0.5", input=LONG)
    wanted = compress(prune(classifier(), TopK(keep=0.5)), LONG, LLMLingua2(0.5), tokenizer=tiny_tokenizer())
    assert told.exit_code == 0, told.stderr
    assert told.stdout == wanted.text and "3 of 3 layers" in told.stderr
    told = run(tmp_path, "--at", "1", input=LONG)
    assert told.exit_code != 0 and "only a decoder takes at: leave it out" in " ".join(told.stderr.split())
