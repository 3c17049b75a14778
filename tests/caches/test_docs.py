"""The lines of docs/long-prompts.md run as they stand, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import BertConfig, BertModel

from support.decoders import build
from support.tiny import VOCABULARY, tiny_tokenizer

DOCS = Path(__file__).parents[2] / "docs" / "long-prompts.md"


def test_the_lines_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    build("llama").save_pretrained("my-decoder")
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained("my-decoder")
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(**small, vocab_size=len(VOCABULARY))).save_pretrained("my-encoder")
    tokenizer.save_pretrained("my-encoder")
    cache, learned, prompts, words, once = re.findall(
        r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL
    )
    scope: dict = {}
    exec(cache, scope)
    assert len(capsys.readouterr().out.splitlines()) == 3 and scope["answer"].shape == scope["reference"].shape
    exec(learned, scope)
    assert "kl_equal" in capsys.readouterr().out
    exec(prompts, scope)
    short = scope["short"]
    assert 0.4 * short.tokens_in < short.tokens_out <= 0.5 * short.tokens_in + 1 and short.text.endswith("the grain")
    held = scope["model"].token_pruner.cache.report
    assert held[2]["held"] < held[0]["held"] < held[0]["seen"]
    exec(words, scope)
    assert scope["short"].tokens_out == -(-scope["short"].tokens_in // 2)
    exec(once, scope)
    assert scope["cache"].layers[0].held == -(-scope["prompt"].ids.shape[1] // 2)
