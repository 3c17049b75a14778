"""Tiny random models of every family of transformers, and inputs for them: sizes by the names of attributes."""

from __future__ import annotations

import dataclasses
import inspect

import torch
import transformers
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LARGEST = 40_000_000  # parameters; what stays larger needs sizes of its own below
VOCABULARY = 97
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embed_dim", "embedding_size", "width"), 32),
    **dict.fromkeys(("pooler_hidden_size", "decoder_hidden_size", "out_hidden_size", "emb_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "depth"), 4),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads",), 4),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("n_inner", "ffn_hidden_size"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_key_value_heads", "moe_topk", "type_vocab_size"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "projection_dim", "num_mel_bins"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim", "head_dim", "d_kv", "sliding_window"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "patch_size"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("num_channels", "in_channels"), 3),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "image_size": 20,
    "hidden_size_per_layer_input": 8,
    "classifier_proj_size": 16,
}
RANDOM = ("dropout", "drop_rate", "pdrop", "drop_prob", "layerdrop", "drop_path_rate", "mask_prob", "mask_time_prob")
LATENT = {"head_dim": 4, "num_key_value_heads": 4}  # of attention with latent keys: the rotary part, no groups
SWIN = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "image_size": 32, "window_size": 4, "patch_size": 4}
MROPE = {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
WAVE = {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
OVERRIDES: dict[str, dict] = {
    "bamba": MAMBA,
    "granitemoehybrid": MAMBA,
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "cpmant": {"prompt_types": 2, "prompt_length": 2, "segment_types": 4},
    **dict.fromkeys(("hubert", "unispeech", "unispeech-sat", "wav2vec2", "wav2vec2-conformer", "wavlm"), WAVE),
    "data2vec-audio": {"conv_dim": (16,) * 7, "conv_pos_kernel_size": 3},
    "dots1": {"n_shared_experts": 1},
    "esmc": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "glm5_next_text": {"num_key_value_heads": 4},
    **dict.fromkeys(("cosmos3_edge_text", "glm4v_moe_text", "glm4v_text", "glm_image_text", "glm_ocr_text"), MROPE),
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"num_hidden_layers": 6, "layer_types": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"]},
    "flaubert": {"n_words": VOCABULARY},
    "xlm": {"n_words": VOCABULARY},
    "fsmt": {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8},
    **dict.fromkeys(("donut-swin", "maskformer-swin", "swin", "swinv2"), SWIN),
    "levit": {"drop_path_rate": 0},
    "timesformer": {"drop_path_rate": 0, "num_frames": 2},
    "gptj": {"rotary_dim": 4},
    "longcat_flash": {"expert_ffn_hidden_size": 16, "zero_expert_num": 2, "num_layers": 2, "ffn_hidden_size": 64},
    "luke": {"entity_vocab_size": 11, "entity_emb_size": 16},
    "codegen": {"rotary_dim": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "prophetnet": {"num_encoder_layers": 4, "num_encoder_attention_heads": 4},
    "reformer": {"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16), "attn_layers": ["local", "local"]},
    "roc_bert": {"pronunciation_vocab_size": 11, "shape_vocab_size": 11, "enable_pronunciation": False},
    "seamless_m4t": {"vocoder_embed_dim": 16},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 0},
    "xmod": {"default_language": "en_XX", "languages": ("en_XX", "de_DE")},
    "gemma2": {"attn_logit_softcapping": 2.0},
    "modernbert": {"local_attention": 8},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "share_att_key": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "conv_kernel_size": 0,
    },
    "convbert": {"head_ratio": 1},
    "yolos": {"image_size": (20, 20), "num_detection_tokens": 3},
    "audio-spectrogram-transformer": {"max_length": 32, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
    "whisper": {"max_source_positions": 30},
    "canine": {"num_hash_buckets": 64, "local_transformer_stride": 8},
}


def configuration(family: str, **options):
    """A small configuration of ``family``: sizes by the names of its attributes, and what it needs beside them."""
    cls, given = CONFIG_MAPPING[family], {}
    names = {field.name for field in dataclasses.fields(cls)}
    for field in dataclasses.fields(cls):
        if field.name in SIZES and not isinstance(field.default, (list, tuple)):
            given[field.name] = SIZES[field.name]
            if "qk_rope_head_dim" in names and field.name in LATENT:
                given[field.name] = LATENT[field.name]
        elif any(word in field.name for word in RANDOM) and isinstance(field.default, float):
            given[field.name] = 0.0
        elif field.name.endswith("_token_id") and isinstance(field.default, int) and field.default >= VOCABULARY:
            given[field.name] = 3
    return cls(**{**given, **OVERRIDES.get(family, {}), **options})


def head_of(family: str) -> str:
    """The model class to sweep: with a head that classifies where there is one."""
    for names in (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    ):
        if family in names:
            return names[family] if isinstance(names[family], str) else names[family][0]
    raise KeyError(family)


def families() -> tuple[list[str], int]:
    """The model types of the auto classes that are not made of others, and how many are."""
    names = {**auto.MODEL_MAPPING_NAMES, **auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    names.update(auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    single = [name for name in names if not getattr(CONFIG_MAPPING[name], "sub_configs", None)]
    return single, len(names) - len(single)


def build(family: str, sharpen: float = 4.0):
    """A tiny model of ``family`` with random weights, sharpened."""
    model_class = getattr(transformers, head_of(family))
    config = configuration(family)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > LARGEST:
        raise OverflowError(f"{size / 1e6:.0f}M parameters from a tiny configuration")
    torch.manual_seed(0)
    config = configuration(family)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all() or (parameter.numel() and parameter.abs().max() > 1e3):
                parameter.normal_(0, 0.02)
            elif parameter.dim() == 2:
                parameter.mul_(sharpen)
            elif parameter.dim() == 1 and "norm" not in name.lower():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


KINDS = {"input_ids": "text", "pixel_values": "vision", "input_values": "audio", "input_features": "audio"}


def batches(model) -> dict[str, dict]:
    """Inputs by name, those that the dense model takes are used."""
    name, config = model.main_input_name, model.config
    accepted = {*inspect.signature(model.forward).parameters}
    if "use_cache" in inspect.signature(model.base_model.forward).parameters:
        accepted.add("use_cache")
    if KINDS.get(name) == "text":
        return _text_batches(model, accepted)
    generator = torch.Generator().manual_seed(1)
    found = {}
    if name == "pixel_values":
        size = getattr(config, "image_size", 20)
        height, width = size if isinstance(size, (list, tuple)) else (size or 20, size or 20)
        channels = getattr(config, "num_channels", 3)
        for shape in ((channels, height, width), (2, channels, height, width)):
            x = torch.randn(3, *shape, generator=generator)
            found[f"pictures {len(shape)}-D"], found[f"one picture {len(shape)}-D"] = {name: x}, {name: x[:1]}
        return found
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 16
    frames = 2 * (getattr(config, "max_source_positions", None) or 30)
    for shape in ((6400,), (getattr(config, "max_length", 32), bins), (bins, frames), (frames, bins), (1, 6400)):
        x = torch.randn(2, *shape, generator=generator)
        tag = "x".join(map(str, shape))
        found[f"sound {tag}"], found[f"one sound {tag}"] = {name: x}, {name: x[:1]}
        if "attention_mask" in accepted and shape[0] != bins:
            mask = torch.ones(2, shape[0], dtype=torch.long)
            mask[1, shape[0] // 2 :] = 0
            found[f"padded sound {tag}"] = {name: x * mask.view(2, -1, *[1] * (x.dim() - 2)), "attention_mask": mask}
            found[f"short sound {tag}"] = {name: x[1:, : shape[0] // 2], "attention_mask": mask[1:, : shape[0] // 2]}
    return found


def _text_batches(model, accepted) -> dict[str, dict]:
    pad = getattr(model.config, "pad_token_id", None) or 0
    lengths, width = (14, 9, 4), 14
    found = {}
    rows = [
        torch.randint(5, VOCABULARY, (n,), generator=torch.Generator().manual_seed(i)) for i, n in enumerate(lengths)
    ]
    full = torch.randint(5, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(7))
    eos = getattr(model.config, "eos_token_id", None)
    if model.config.is_encoder_decoder and isinstance(eos, int):  # heads of encoder-decoders look for it
        for row in (*rows, *full):
            row[-1] = eos
    for side in ("right", "left"):
        ids, mask = torch.full((3, width), pad), torch.zeros(3, width, dtype=torch.long)
        for i, row in enumerate(rows):
            at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[i, at], mask[i, at] = row, 1
        found[f"padded {side}"] = {"input_ids": ids, "attention_mask": mask}
    found["no mask"] = {"input_ids": full}
    found["one row"] = {"input_ids": rows[1][None], "attention_mask": torch.ones(1, len(rows[1]), dtype=torch.long)}
    found["full mask"] = {"input_ids": full, "attention_mask": torch.ones_like(full)}
    found["cached"] = dict(found["padded right"])
    for name, batch in found.items():
        shape = batch["input_ids"].shape
        if "attention_mask" not in accepted:
            batch.pop("attention_mask", None)
        if "use_cache" in accepted and name != "cached":
            batch["use_cache"] = False
        if "bbox" in accepted:
            corner = torch.arange(shape[1])[None, :, None].expand(shape[0], -1, 4) * torch.tensor([1, 1, 2, 2])
            batch["bbox"] = corner.float() / 100 if model.config.model_type == "bros" else corner
        decodes = model.config.is_encoder_decoder and "decoder_input_ids" in accepted
        if decodes and "ForSequenceClassification" not in type(model).__name__:
            batch["decoder_input_ids"] = batch["input_ids"][:, :3].clone()
    return found
