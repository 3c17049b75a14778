"""Tiny decoders of many families, and ways to run them with a cache."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache

from thresher import (
    H2O,
    TOVA,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    KVzip,
    LTPCache,
    RandomCache,
    SnapKV,
    StreamingLLM,
    TriAttention,
    prune,
)

LENGTHS = (40, 27)  # of the rows of a batch
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 97}
TINY |= {"max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
GROUPED = TINY | {"num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "vocab_size": 97, "pad_token_id": 0}
GPT2 |= {"bos_token_id": 1, "eos_token_id": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LATENT = TINY | {"num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
LATENT |= {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16}
LATENT |= {"q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
HYBRID = ["sliding_attention", "full_attention", "full_attention"]
SHARED = GROUPED | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8, "sliding_window": 12}
SHARED |= {"layer_types": HYBRID[:2] * 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
SHARED |= {"laurel_rank": 4, "altup_num_inputs": 2}
OTHERS = {  # besides the families of the matrix
    "cohere": ("Cohere", GROUPED),
    "cohere2": ("Cohere2", GROUPED | {"layer_types": HYBRID, "sliding_window": 12, "logit_scale": 1.0}),
    "exaone4": ("Exaone4", GROUPED | {"layer_types": HYBRID, "sliding_window": 12}),
    "gemma3n": ("Gemma3n", SHARED),
}
DECODERS = {
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 8}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": None, "head_dim": 8}),
    "gemma2": ("Gemma2", GROUPED | {"head_dim": 8, "sliding_window": 12, "layer_types": HYBRID}),
    "gemma3": ("Gemma3", GROUPED | {"head_dim": 8, "sliding_window": 12, "layer_types": HYBRID}),
    "gpt2": ("GPT2", GPT2),
    "gpt-neox": ("GPTNeoX", TINY),
    "phi": ("Phi", GROUPED),
    "phi3": ("Phi3", GROUPED),
    "deepseek-v3": ("DeepseekV3", LATENT),
}
EAGER_ONLY = ("gemma2",)  # whose logits have a soft cap, which sdpa has no place for
SMALL = {"sinks": 2, "recent": 4}


class Centred(TriAttention):
    """With centres of its own, so that nothing has to be calibrated."""

    def bind(self, model) -> None:
        super().bind(model)
        self.centre.copy_(torch.randn(self.centre.shape, generator=torch.Generator().manual_seed(5)))
        self.length.copy_(self.centre.abs() + 1.5)
        self.queries.fill_(1)


class Levelled(LTPCache):
    """With the threshold of uniform attention in each layer, so that nothing has to be learned."""

    def bind(self, model) -> None:
        super().bind(model)
        self.threshold.fill_(0.0)


# name: what makes the method, by the budget: 12 of 40 tokens of the prompt, or 12 entries while decoding
METHODS = {
    "streamingllm": StreamingLLM,
    "keydiff": KeyDiff,
    "knorm": Knorm,
    "random-cache": RandomCache,
    "snapkv": SnapKV,
    "tova": TOVA,
    "h2o": H2O,
    "expectedattention": ExpectedAttention,
    "kvzip": partial(KVzip, heads="own", layers="equal", request=(9, 8, 7), part=15, overlap=3),
    "triattention": Centred,
    "ltp-cache": partial(Levelled, heads="own"),
}
BUDGETS = {"share": {"keep": 0.3}, "count": {"keep": 12}, "hold": {"hold": 12, "every": 3}}


def build(family: str, implementation: str = "sdpa", seed: int = 0, **options):
    """A tiny decoder whose attention is far from uniform."""
    torch.manual_seed(seed)
    name, own = (DECODERS | OTHERS)[family]
    kind = f"{name}Text" if name.startswith("Gemma3") else name
    implementation = "eager" if family in EAGER_ONLY else implementation
    config = getattr(t, f"{kind}Config")(**own | options, attn_implementation=implementation)
    head = {"GPT2": "GPT2LMHeadModel", "Gemma3": "Gemma3ForCausalLM"}.get(name, f"{name}ForCausalLM")
    model = getattr(t, head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
        for name, parameter in model.named_parameters():
            if "k_norm" in name:  # else all keys are equally long, and rounding decides
                parameter.copy_(torch.rand(parameter.shape))
    return model


def make(method: str, budget: str = "count", **options):
    """A method with a small budget."""
    kind = METHODS[method]
    budget = "count" if method == "kvzip" and budget == "hold" else budget  # it has none while decoding
    budget = "share" if method == "ltp-cache" else budget  # which its thresholds were learned for
    own = {"sinks": 2} if kind is StreamingLLM else SMALL
    return kind(**own | BUDGETS[budget] | options)


def prompts(lengths=LENGTHS, seed: int = 1, width: int | None = None) -> dict:
    """Rows of ``lengths`` tokens, padded on the left."""
    width = max(lengths) if width is None else width
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(seed + length)
        ids[row, width - length :] = torch.randint(5, 97, (length,), generator=generator)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def alone(batch: dict, row: int) -> dict:
    """One row of a batch, without padding."""
    real = batch["attention_mask"][row].bool()
    return {
        "input_ids": batch["input_ids"][row][real][None],
        "attention_mask": batch["attention_mask"][row][real][None],
    }


def feed(model, batch: dict, parts: list[int]) -> list[torch.Tensor]:
    """Logits (B, V) behind each part of a text that comes in parts of so many tokens, over one cache.

    What goes beyond ``batch`` is the same for all rows.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    more = torch.randint(5, 97, (sum(parts) - ids.shape[1],), generator=torch.Generator().manual_seed(9))
    ids = torch.cat([ids, more.expand(len(ids), -1)], 1)
    mask = torch.cat([mask, torch.ones_like(mask[:, :1]).expand(-1, len(more))], 1)
    places, cache, answers, at = (mask.cumsum(1) - 1).clamp(min=0), DynamicCache(config=model.config), [], 0
    for part in parts:
        to = at + part
        output = model(
            input_ids=ids[:, at:to],
            attention_mask=mask[:, :to],
            position_ids=places[:, at:to],
            past_key_values=cache,
            use_cache=True,
        )
        answers.append(output.logits[:, -1])
        at = to
    return answers


# name: how the tokens come; generate()'s arguments, or the parts of a text
WAYS = {
    "step": [40, *[1] * 8],
    "chunk": [16, 16, 8, *[1] * 4],
    "turn": [40, 1, 1, 1, 9, 1, 1, 1],
    "beams": {"num_beams": 3, "max_new_tokens": 8},
    "lookup": {"prompt_lookup_num_tokens": 3, "max_new_tokens": 10},
}


@torch.no_grad()
def run(model, batch: dict, way: str) -> list[torch.Tensor]:
    """What a decoder answers in one of ``WAYS``: logits, and tokens where it generates."""
    how = WAYS[way]
    if isinstance(how, list):
        return feed(model, batch, how)
    if way == "lookup":  # a text that repeats itself, so that drafts are taken
        batch = {name: torch.cat([x[:, -20:]] * 2, 1) for name, x in batch.items()}
    told = model.generate(**batch, **how, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return [told.sequences.float(), *told.logits]


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest difference between answers, relative where they are larger than 1."""
    assert len(one) == len(other) and all(a.shape == b.shape for a, b in zip(one, other, strict=True))
    pairs = zip(one, other, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs)


def byte_tokenizer() -> t.PreTrainedTokenizerFast:
    """A tokenizer of bytes: it can say anything, and a digit is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: 1 + i for i, letter in enumerate(letters)} | {"<pad>": 0}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return t.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<pad>", model_max_length=4096)


def save_decoder(folder: Path, method=None, family: str = "llama") -> Path:
    """A tiny decoder of bytes and its tokenizer, as they lie on disk."""
    model = build(family, vocab_size=257, max_position_embeddings=2048)
    (model if method is None else prune(model, method)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
