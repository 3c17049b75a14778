"""The lines of docs/long-prompts.md run as they stand, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

from support.decoders import build
from support.tiny import tiny_tokenizer

DOCS = Path(__file__).parents[2] / "docs" / "long-prompts.md"


def test_the_lines_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    build("llama").save_pretrained("my-decoder")
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained("my-decoder")
    code = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    scope: dict = {}
    exec("\n".join(code), scope)
    assert len(capsys.readouterr().out.splitlines()) == 3 + 1 and scope["answer"].shape == scope["reference"].shape
