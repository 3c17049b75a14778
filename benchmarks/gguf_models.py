"""A decoder out of a GGUF file: its weights dequantised, in the layout of transformers.

What comes out is not the model that was quantised: say "dequantised" wherever it is named. Layouts "llama" and "qwen2".
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
SPECIAL, ADDED = 3, 4  # kinds of tokens
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Reader:
    """A GGUF file. ``library``: the wheel of the package gguf, which is read from there and not installed."""

    def __init__(self, file: Path, library: Path):
        sys.path.insert(0, str(library))
        try:
            from gguf import GGUFReader
            from gguf.quants import dequantize
        finally:
            sys.path.remove(str(library))
        self.file, self.dequantize = GGUFReader(file), dequantize
        self.kind = self("general.architecture")
        if self.kind not in CLASSES:
            raise ValueError(f"{file} holds a model of the layout {self.kind!r}: expected {' or '.join(CLASSES)}")

    def __call__(self, key: str) -> Any:
        """A field."""
        return self.file.fields[key].contents()

    def own(self, key: str) -> Any:
        """A field of the architecture."""
        return self(f"{self.kind}.{key}")


def convert(reader: Reader, folder: Path) -> None:
    """Write config, weights and tokenizer; weights are stored in fp16, and load in fp32."""
    weights = weights_of(reader)
    config = config_of(reader, len(weights["model.embed_tokens.weight"]), "lm_head.weight" not in weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(tokens, indent=2))
    tokenizer_of(reader).save_pretrained(folder)


def config_of(reader: Reader, words: int, tied: bool) -> dict:
    """The config.json."""
    heads, hidden = int(reader.own("attention.head_count")), int(reader.own("embedding_length"))
    own = {"attention_bias": False, "mlp_bias": False} if reader.kind == "llama" else {"use_sliding_window": False}
    named = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return own | {
        "architectures": [CLASSES[reader.kind]],
        "model_type": reader.kind,
        "hidden_size": hidden,
        "intermediate_size": int(reader.own("feed_forward_length")),
        "num_hidden_layers": int(reader.own("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(reader.own("attention.head_count_kv")),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": int(reader.own("context_length")),
        "rms_norm_eps": float(reader.own("attention.layer_norm_rms_epsilon")),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(reader.own("rope.freq_base"))},
        "vocab_size": words,
        "tie_word_embeddings": tied,
        "dtype": "float32",
        **{f"{name}_token_id": int(reader(f"tokenizer.ggml.{key}_token_id")) for name, key in named.items()},
    }


def weights_of(reader: Reader) -> dict[str, torch.Tensor]:
    """The weights by the names of transformers."""
    heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
    weights = {}
    for one in reader.file.tensors:
        stem, kind = one.name.rsplit(".", 1)
        values = np.asarray(reader.dequantize(one.data, one.tensor_type), dtype=np.float32)
        values = values.reshape([int(size) for size in reversed(one.shape)])
        if in_block := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
            number, part = in_block.groups()
            name = f"model.layers.{number}.{BLOCK[part]}.{kind}"
            if reader.kind == "llama" and part in heads:  # where the two halves of a rotation alternate
                halves = values.reshape(int(reader.own(heads[part])), -1, 2, *values.shape[1:])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        else:
            name = f"{TOP[stem]}.{kind}"
        weights[name] = torch.from_numpy(values.copy()).half()
    return weights


def tokenizer_of(reader: Reader) -> PreTrainedTokenizerFast:
    """The tokenizer, byte-level BPE with the pre-tokenizer that the file names."""
    tokens, kinds = reader("tokenizer.ggml.tokens"), reader("tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ", 1)) for pair in reader("tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    if (kind := reader("tokenizer.ggml.pre")) == "smollm":
        split: Any = pre_tokenizers.Digits(individual_digits=True)
    elif kind == "qwen2":
        made.normalizer, split = normalizers.NFC(), pre_tokenizers.Split(Regex(QWEN2), behavior="isolated")
    else:
        raise ValueError(f"the pre-tokenizer {kind!r} is not known: expected smollm or qwen2")
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "smollm")
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([split, pieces]), decoders.ByteLevel()
    for which, special in ((SPECIAL, True), (ADDED, False)):
        some = [token for token, one in zip(tokens, kinds, strict=True) if one == which]
        made.add_tokens([AddedToken(token, special=special, normalized=False) for token in some])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=int(reader.own("context_length")),
        clean_up_tokenization_spaces=False,
        **{
            f"{name}_token": tokens[int(reader(f"tokenizer.ggml.{key}_token_id"))]
            for name, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items()
        },
    )
    tokenizer.chat_template = reader("tokenizer.chat_template")
    return tokenizer
