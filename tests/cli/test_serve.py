"""The command ``serve``: its options, and what it refuses before it listens."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from support.tiny import save_tiny, tiny_model, tiny_tokenizer
from thresher.cli import app as cli
from thresher.cli.serve import listing
from thresher.experiments.spec import ServeSpec


def fails(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, ["serve", *map(str, arguments)])
    assert result.exit_code == 2 and not result.stdout, result.output
    return result.stderr


def test_what_it_refuses(tmp_path):
    assert "nowhere" in fails(tmp_path / "nowhere")
    tiny_model().base_model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    assert "is BertModel: expected a classifier" in fails(tmp_path / "base")
    model = save_tiny(tmp_path / "model")
    assert "the API key is empty" in fails(model, "--api-key", "")
    assert "Invalid value for '--port'" in fails(model, "--port", "-1")
    assert "port=99999: expected 0 to 65535" in fails(model, "--port", "99999")
    assert "cannot listen on no.such.host.invalid" in fails(model, "--host", "no.such.host.invalid")


def test_the_key_may_be_in_the_environment(monkeypatch):
    monkeypatch.delenv("THRESHER_API_KEY", raising=False)
    assert ServeSpec(model="m").completed().api_key is None
    monkeypatch.setenv("THRESHER_API_KEY", "secret")
    assert ServeSpec(model="m").completed().api_key == "secret"
    assert ServeSpec(model="m", api_key="other").completed().api_key == "other"
    monkeypatch.setenv("THRESHER_API_KEY", "")
    with pytest.raises(ValueError, match="key is empty"):
        ServeSpec(model="m").completed()
    with pytest.raises(ValueError, match="tokens=0: expected 1 or more"):
        ServeSpec(model="m", tokens=0)


def test_missing_packages_are_named(tmp_path):
    model = save_tiny(tmp_path / "model")
    hidden = "import sys; sys.modules['uvicorn'] = None; from thresher.cli.app import main; main()"
    command = [sys.executable, "-c", hidden, "serve", str(model)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "pip install 'thresher-pruning[serve]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_it_prints_at_the_end():
    row = {"requests": 1234, "refused": 5, "rows": 2000, "tokens": 90_000, "padding_ratio": None}
    assert listing(row).row_count == 4 and listing(row | {"padding_ratio": 1.02}).row_count == 5
