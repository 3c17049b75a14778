"""Sweep every text, vision and audio family of transformers that builds from a tiny configuration.

    python benchmarks/families.py                   # sweep all of them and write docs/models.md
    python benchmarks/families.py --only bert,vit   # some, on screen alone

A family ends as one of four: *served* under some layouts, *refused* by prune() with a reason, *failing* (prune() takes
it and a forward raises) or *lying* (it runs and differs). The last two are faults. A family is served if, for each
batch below and both attention implementations, keeping everything is the dense model, and removing half of the tokens
or uneven counts under a layout is the same as hiding them, to 1e-5 of the largest value. The weights are random and
sharpened, so that attention is not uniform and ties do not decide.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import multiprocessing
import resource
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from thresher import FirstK, Threshold, TopK, prune, unprune

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
TOLERANCE = 1e-5
LARGEST = 12_000_000  # parameters; what stays larger needs sizes of its own below
VOCABULARY = 97
SECONDS, MEMORY = 20, 8 << 30  # for one family
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
METHODS = {
    "all": lambda: TopK(keep=1.0),
    "half": lambda: TopK(keep=0.5),
    "first": lambda: FirstK(keep=0.5),
    "uneven": lambda: Threshold(threshold=1.0),
}
SKIPPED = {"auto": ("all", "first", "uneven"), "eager": ("first",)}  # what another run has shown already
BRIEF = ("padded right", "one row", "pictures", "sound", "padded sound")  # the batches under eager
LAYOUTS = ("mask", "padded", "packed", "auto")


@dataclasses.dataclass
class Verdict:
    """What became of one family."""

    family: str
    model: str
    kind: str
    worst: float = 0.0
    runs: int = 0
    faults: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # of state "failing" or "lying"
    refusals: dict[str, str] = dataclasses.field(default_factory=dict)  # by layout
    notes: list[str] = dataclasses.field(default_factory=list)  # warnings of prune()

    @property
    def state(self) -> str:
        """served, refused, failing or lying."""
        if self.faults:
            return "failing" if any(state == "failing" for state, _ in self.faults) else "lying"
        return "refused" if "auto" in self.refusals else "served"

    @property
    def layouts(self) -> list[str]:
        """The layouts that prune() takes."""
        return [name for name in LAYOUTS if name not in self.refusals]

    @property
    def reason(self) -> str:
        """The faults, or why it is refused."""
        if self.faults:
            return "; ".join(dict.fromkeys(text for _, text in self.faults))
        return self.refusals["auto"] if self.state == "refused" else "; ".join(self.notes)


# --- tiny models ------------------------------------------------------------------------------------------------------
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
    accepted = inspect.signature(model.forward).parameters
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


# --- answers ----------------------------------------------------------------------------------------------------------
def answers(model, batch: dict) -> dict[str, Tensor]:
    """What the model and its base say of the live tokens, by name."""
    seen: dict[str, Tensor] = {}

    def note(prefix, output):
        for key in ("logits", "last_hidden_state", "pooler_output", "encoder_last_hidden_state"):
            value = output.get(key) if hasattr(output, "get") else None
            if isinstance(value, Tensor) and value.is_floating_point():
                seen[prefix + key] = value.detach()

    base = model.base_model
    handle = base.register_forward_hook(lambda m, a, output: note("base ", output)) if base is not model else None
    try:
        with torch.no_grad():
            output = model(**batch)
    finally:
        if handle is not None:
            handle.remove()
    note("", output)
    if not seen and isinstance(output, (tuple, list)):
        seen["output"] = output[0]
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2 and not bool(mask.all()):
        seen = {k: _live(model, v, mask) for k, v in seen.items()}
    return {k: v for k, v in seen.items() if v.numel()}


def _live(model, value: Tensor, mask: Tensor) -> Tensor:
    if value.dim() == 3 and value.shape[:2] == mask.shape:
        return value[mask.bool()]
    if value.dim() == 3 and len(value) == len(mask) and KINDS.get(model.main_input_name) == "audio":
        return value[mask.bool().all(1)]  # frames: which of them are padding is the model's own affair
    return value


def difference(a: dict, b: dict) -> float:
    """The largest difference between two answers, relative where values are larger than 1; infinite for NaN."""
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
        return float("inf")
    worst = [((a[k] - b[k]).abs().max() / b[k].abs().max().clamp(min=1)).item() for k in b]
    return max(float("inf") if x != x else x for x in worst)


# --- the sweep --------------------------------------------------------------------------------------------------------
def dense_answers(model) -> tuple[dict[str, dict], dict[str, dict], str]:
    """Batches that the dense model takes, its answers, and why there are none."""
    taken, dense, why = {}, {}, "no batch"
    for name, batch in batches(model).items():
        try:
            first, second = answers(model, batch), answers(model, batch)
        except Exception as error:  # which batches a family takes is found by trying
            why = f"{type(error).__name__}: {error}".split("\n")[0][:120]
            continue
        if not first or difference(first, second) > 0:
            why = "answers differ from call to call" if first else "no output of states"
            continue
        if all(v.isfinite().all() for v in first.values()):
            taken[name], dense[name] = batch, first
        else:
            why = "answers are not finite"
    return taken, dense, why


def sweep(family: str, sharpen: float = 4.0) -> Verdict:
    """The verdict on ``family``. Raises LookupError where no tiny dense model of it runs."""
    model = build(family, sharpen)
    verdict = Verdict(family, head_of(family), KINDS.get(model.main_input_name, model.main_input_name))
    for implementation in ("sdpa", "eager"):
        if model._can_set_attn_implementation():
            try:
                model.set_attn_implementation(implementation)
            except (ValueError, ImportError):
                continue
        elif implementation == "eager" and verdict.runs:
            continue
        taken, dense, why = dense_answers(model)
        if not taken:
            raise LookupError(f"the dense model does not run: {why}")
        Judge(verdict, model, implementation, taken, dense).run()
    return verdict


@dataclasses.dataclass
class Judge:
    """The runs of one model under one attention implementation, against its ``dense`` answers to the ``taken``
    batches."""

    verdict: Verdict
    model: torch.nn.Module
    implementation: str
    taken: dict[str, dict]
    dense: dict[str, dict]
    hidden: dict[tuple[str, str], dict] = dataclasses.field(default_factory=dict)  # by method and batch, under mask
    tried: set[str] = dataclasses.field(default_factory=set)

    def run(self) -> None:
        unread = pooled_from_padding(self.dense)
        for layout in LAYOUTS:
            for how, method in METHODS.items():
                if how in SKIPPED.get(layout, ()) or how in SKIPPED.get(self.implementation, ()):
                    continue
                if not self.pruned(layout, method()):
                    break
                for name, batch in self.taken.items():
                    if layout == "packed" and name == "cached":
                        continue  # packed rows do not fit a cache, and say so
                    if self.implementation == "sdpa" or name.startswith(BRIEF):
                        self.compare(layout, how, name, batch, unread if name == "padded left" else set())
                with suppress(ValueError):
                    unprune(self.model)
        for name, batch in self.taken.items():
            if difference(answers(self.model, batch), self.dense[name]) > 0:
                self.fault("lying", f"unprune() does not give the dense model back/{name}")
        for how in ("half", "first", "uneven"):
            self.independent(how)

    def pruned(self, layout: str, method) -> bool:
        """Prune the model; whether prune() took it."""
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                prune(self.model, method, layout=layout, check=layout not in self.tried)
        except (ValueError, TypeError) as error:
            self.verdict.refusals[layout] = str(error).split("\n")[0]
            if hasattr(self.model, "token_pruner"):
                self.fault("failing", f"{layout}: prune() refuses and leaves a token_pruner")
            return False
        except Exception as error:
            self.fault("failing", f"{layout}: prune() raises {type(error).__name__}: {error}"[:200])
            self.verdict.refusals[layout] = str(error)
            return False
        self.tried.add(layout)
        self.verdict.notes += [str(w.message) for w in told if str(w.message) not in self.verdict.notes]
        return True

    def compare(self, layout: str, how: str, name: str, batch: dict, unread: set[str]) -> None:
        """Run a batch, and hold it against the dense model or against hidden tokens."""
        at = f"{layout}/{how}/{name}"
        try:
            got = answers(self.model, batch)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{at}: {type(error).__name__}: {error}".split("\n")[0][:220]
            self.fault("failing", f"{text} ({Path(frame.filename).name}:{frame.lineno})")
            return
        self.verdict.runs += 1
        expected = self.dense[name] if how == "all" else self.hidden.get((how, name))
        if layout == "mask" and how != "all":
            self.hidden[how, name] = got
        elif expected is not None:
            got, expected = ({k: v for k, v in x.items() if k not in unread} for x in (got, expected))
            gap = difference(got, expected) if expected else 0.0
            self.verdict.worst = max(self.verdict.worst, gap)
            if gap > TOLERANCE:
                self.fault("lying", f"{at}: {gap:.1e}")

    def independent(self, how: str) -> None:
        """What makes no difference to the dense model makes none to the pruned one: padding, and a mask of ones."""
        for other, alone in (("padded right", "one row"), ("padded left", "one row"), ("full mask", "no mask")):
            if (how, other) not in self.hidden or (how, alone) not in self.hidden:
                continue
            gaps = []
            for source in (self.dense, {name: self.hidden[how, name] for name in (other, alone)}):
                a, b = source[other], source[alone]
                if other != "full mask":  # per token rows are no longer apart
                    a = {k: v[1:2] for k, v in a.items() if v.dim() == 2 and len(v) == 3}
                    b = {k: b[k] for k in a}
                gaps.append(difference(a, b) if b else 0.0)
            if gaps[0] <= TOLERANCE < gaps[1]:
                self.fault("lying", f"mask/{how}: {other} differs from {alone}: {gaps[1]:.1e}")

    def fault(self, state: str, text: str) -> None:
        self.verdict.faults.append((state, f"{text} ({self.implementation})"))


def pooled_from_padding(dense: dict[str, dict]) -> set[str]:
    """Pooled answers that say something else once padding stands before a row: they read the padding."""
    if "padded left" not in dense or "one row" not in dense:
        return set()
    left, alone = dense["padded left"], dense["one row"]
    pooled = [key for key, value in left.items() if value.dim() == 2 and len(value) == 3]
    return {key for key in pooled if (left[key][1] - alone[key][0]).abs().max() > TOLERANCE}


def apart(family: str, sharpen: float) -> Verdict | str:
    """``sweep`` in a process of its own, with bounds on its time and memory; a string says why there is no verdict."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send, args=(theirs, family, sharpen), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(30 * SECONDS) else "its process hangs"
    except EOFError:
        return f"a tiny model that takes more than {SECONDS} s or {MEMORY >> 30} GiB"
    finally:
        process.kill()
        process.join()
        ours.close()


def _send(pipe, family: str, sharpen: float) -> None:
    torch.set_num_threads(1)
    used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, used + SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        pipe.send(sweep(family, sharpen))
    except Exception as error:  # one family must not stop the sweep
        pipe.send(f"{type(error).__name__}: {error}".split("\n")[0][:160])


# --- the page ---------------------------------------------------------------------------------------------------------
def page(verdicts: list[Verdict], left_out: dict[str, str], composed: int) -> str:
    """docs/models.md."""
    count = Counter(v.state for v in verdicts)
    runs, worst = sum(v.runs for v in verdicts), max((v.worst for v in verdicts if v.state == "served"), default=0.0)
    kinds = Counter(v.kind for v in verdicts if v.state == "served")
    lines = [
        "# Models",
        "",
        "Written by `python benchmarks/families.py`; do not edit.",
        "",
        f"Every text, vision and audio family of transformers {transformers.__version__} that builds from a tiny "
        "configuration is pruned with random, sharpened weights. *Served* means: keeping every token is the dense "
        "model, removing tokens is the same as hiding them, a row answers in a batch as alone, and `unprune()` gives "
        f"the dense model back bit for bit, within {TOLERANCE:.0e} of the largest value (or of 1). *Refused* means: "
        "`prune()` says why and leaves the model as it is.",
        "",
        "| swept | served | refused | failing in a forward | answering wrongly | forwards | worst difference, served |",
        "|---|---|---|---|---|---|---|",
        f"| {len(verdicts)} | {count['served']} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}) | "
        f"{count['refused']} | {count['failing']} | {count['lying']} | {runs:,} | {worst:.1e} |",
        "",
        f"Not swept: {composed} families that are made of others (several modalities), and {len(left_out)} of which no "
        "tiny dense model runs on inputs made up here (last table).",
        "",
    ]
    for state, title in (("failing", "Failing"), ("lying", "Answering wrongly"), ("served", "Served")):
        rows = [v for v in verdicts if v.state == state]
        if not rows:
            continue
        lines += [
            f"## {title}",
            "",
            "| family | model | reads | layouts | worst difference | |",
            "|---|---|---|---|---|---|",
        ]
        for v in rows:
            layouts = ", ".join(name for name in v.layouts if name != "auto")
            lines.append(f"| {v.family} | `{v.model}` | {v.kind} | {layouts} | {v.worst:.1e} | {_cell(v.reason)} |")
        lines.append("")
    lines += ["## Refused", "", "| family | model | reads | reason |", "|---|---|---|---|"]
    lines += [f"| {v.family} | `{v.model}` | {v.kind} | {_cell(v.reason)} |" for v in verdicts if v.state == "refused"]
    lines += ["", "## Without a tiny dense model", "", "| family | reason |", "|---|---|"]
    lines += [f"| {family} | {_cell(reason)} |" for family, reason in left_out.items()]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="families, with commas between; writes no page")
    parser.add_argument("--sharpen", type=float, default=4.0, help="factor of all weight matrices")
    options = parser.parse_args()
    logging.set_verbosity_error()
    names, composed = families()
    verdicts, left_out = [], {}
    for family in options.only.split(",") if options.only else names:
        start = time.perf_counter()
        verdict = apart(family, options.sharpen)
        seconds = time.perf_counter() - start
        if isinstance(verdict, str):
            left_out[family] = verdict
            print(f"{family:32} left out {seconds:5.1f}s {verdict}", flush=True)
            continue
        verdicts.append(verdict)
        layouts = ",".join(verdict.layouts)
        print(
            f"{family:32} {verdict.state:8} {seconds:5.1f}s {layouts:26} {verdict.worst:.1e} {verdict.reason}",
            flush=True,
        )
    print(dict(Counter(v.state for v in verdicts)), "left out", len(left_out))
    if not options.only:
        PAGE.write_text(page(verdicts, left_out, composed), encoding="utf-8")


if __name__ == "__main__":
    main()
