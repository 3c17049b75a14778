"""Tiny random models of every family, with sharpened weights: near-uniform attention would let ties decide."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers as t

from thresher.core.architecture import find_architecture

TEXT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 97}
VISION = {k: v for k, v in TEXT.items() if k != "vocab_size"} | {"image_size": 20, "patch_size": 4, "num_channels": 3}
DECODER = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of a family, and what it is given."""

    model: str
    config: str
    options: dict
    kind: str = "text"  # text, decoder, vision, audio
    packed: bool = True
    sharpen: float = 10.0
    implementation: str = "sdpa"

    def build(self, seed: int = 0, **options):
        torch.manual_seed(seed)
        config = getattr(t, self.config)(**{"attn_implementation": self.implementation, **self.options, **options})
        model = getattr(t, self.model)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(self.sharpen)
        return model

    def batch(self, lengths=(24, 18, 10), side: str = "right", width: int | None = None, seed: int = 1) -> dict:
        """Inputs with rows of ``lengths`` tokens (pictures and sound have no padding and ignore them)."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "vision":
            return {"pixel_values": torch.randn(len(lengths), 3, 20, 20, generator=generator)}
        if self.kind == "audio":
            return {"input_features": torch.randn(len(lengths), 80, 60, generator=generator)}
        width = max(lengths) if width is None else width
        ids, mask = (
            torch.zeros(len(lengths), width, dtype=torch.long),
            torch.zeros(len(lengths), width, dtype=torch.long),
        )
        for row, length in enumerate(lengths):
            at = slice(0, length) if side == "right" else slice(width - length, width)
            generator = torch.Generator().manual_seed(seed + row)
            ids[row, at] = torch.randint(5, 97, (length,), generator=generator)
            mask[row, at] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def run(self, model, batch: dict):
        """Output of the head, or of the stack where there is none."""
        if self.kind == "decoder":
            batch = {"use_cache": False, **batch}
        output = model(**batch)
        return output.logits if "logits" in output else output.last_hidden_state

    def answers(self, model, batch: dict) -> dict:
        """{"output": of the head, "states": last hidden states of the stack}; per token (T, C), padding left out."""
        found = {}
        base = find_architecture(model).base
        handle = base.register_forward_hook(lambda m, a, output: found.update(states=output.last_hidden_state))
        found["output"] = self.run(model, batch)
        handle.remove()
        mask = batch.get("attention_mask")
        if mask is not None:
            found = {k: v[mask.bool()] if v.shape[:2] == mask.shape and v.dim() == 3 else v for k, v in found.items()}
        return found


def difference(a: dict, b: dict) -> float:
    """The largest difference between two answers, relative where states are larger than 1."""
    return max(((a[k] - b[k]).abs().max() / b[k].abs().max().clamp(min=1)).item() for k in a)


def _text(name: str, config: str | None = None, head="ForSequenceClassification", **options) -> Family:
    return Family(name + head, (config or name) + "Config", TEXT | NO_DROPOUT | {"num_labels": 3} | options)


FAMILIES: dict[str, Family] = {
    "bert": _text("Bert"),
    "roberta": _text("Roberta", max_position_embeddings=64),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "dim": 32,
            "n_layers": 4,
            "n_heads": 4,
            "hidden_dim": 64,
            "vocab_size": 97,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        }
        | {"seq_classif_dropout": 0.0},
    ),
    "electra": _text("Electra", embedding_size=16),
    "albert": _text("Albert", embedding_size=16, classifier_dropout_prob=0.0),
    "mpnet": Family(
        "MPNetForSequenceClassification", "MPNetConfig", TEXT | NO_DROPOUT, packed=False, implementation="eager"
    ),
    "deberta-v2": Family(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        TEXT
        | NO_DROPOUT
        | {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "share_att_key": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "pooler_hidden_size": 32,
        },
        packed=False,
        implementation="eager",
    ),
    "modernbert": Family(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        TEXT
        | {
            "local_attention": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        sharpen=4.0,
    ),
    "vit": Family("ViTForImageClassification", "ViTConfig", VISION | NO_DROPOUT, "vision"),
    "deit": Family("DeiTForImageClassification", "DeiTConfig", VISION | NO_DROPOUT, "vision"),
    "dinov2": Family("Dinov2ForImageClassification", "Dinov2Config", VISION | NO_DROPOUT, "vision"),
    "clip-vision": Family("CLIPVisionModel", "CLIPVisionConfig", VISION, "vision", sharpen=4.0),
    "siglip-vision": Family("SiglipVisionModel", "SiglipVisionConfig", VISION, "vision", False, 2.0, "eager"),
    "whisper-encoder": Family(
        "WhisperForAudioClassification",
        "WhisperConfig",
        {
            "d_model": 32,
            "encoder_layers": 4,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "max_source_positions": 30,
            "dropout": 0.0,
            "decoder_layers": 1,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 64,
            "vocab_size": 97,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "classifier_proj_size": 16,
        },
        "audio",
    ),
    "llama": Family("LlamaForCausalLM", "LlamaConfig", DECODER, "decoder", sharpen=4.0),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", DECODER, "decoder", sharpen=4.0),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        DECODER | {"head_dim": 8, "attn_logit_softcapping": 2.0, "sliding_window": 8, "query_pre_attn_scalar": 8},
        "decoder",
        sharpen=6.0,
        implementation="eager",
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        DECODER | {"head_dim": 8, "sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        "decoder",
        sharpen=4.0,
        implementation="eager",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 97, "pad_token_id": 0}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "decoder",
        sharpen=4.0,
    ),
    "layoutlm": _text("LayoutLM"),
    "roformer": Family(
        "RoFormerForSequenceClassification",
        "RoFormerConfig",
        TEXT | NO_DROPOUT | {"embedding_size": 32},
        packed=False,
        sharpen=4.0,
        implementation="eager",
    ),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", DECODER | {"head_dim": 8}, "decoder", sharpen=4.0),
}
