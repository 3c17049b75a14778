"""Tiny language models that read pictures and sounds, of every family, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers as t
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from thresher import prune

IMAGE, VIDEO, AUDIO, START, END, FIRST_SPECIAL = 100, 101, 102, 103, 104, 95  # token ids; text lies below the last
TEXT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"intermediate_size": 64, "vocab_size": 112, "max_position_embeddings": 512, "pad_token_id": 0}
TEXT |= {"bos_token_id": 1, "eos_token_id": None}
TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TOWER |= {"image_size": 24, "patch_size": 4}  # 36 patches
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
SOUND = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
SOUND |= {"num_mel_bins": 16, "max_source_positions": 32}
HYBRID = ["sliding_attention", "full_attention"] * 2
TILES = [[24, 48], [48, 24], [48, 48]]


@dataclass(frozen=True)
class Visual:
    """How to build a tiny model of a family, and what its prompts hold."""

    model: str
    options: Callable[[], dict]
    pixels: Callable[[int, torch.Generator], dict]  # what so many pictures are
    token: int = IMAGE
    kind: str = "image"
    tower_cls: bool = False

    def build(self, seed: int = 0, **options):
        torch.manual_seed(seed)
        kind = self.model.replace("ForConditionalGeneration", "")
        config = getattr(t, f"{kind}Config")(**self.options(), **{"attn_implementation": "sdpa", **options})
        model = getattr(t, self.model)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4.0)
                if parameter.dim() == 2 and not parameter.any():  # the projector of Gemma 3 begins with zeros
                    parameter.normal_(std=0.1)
        return model

    def lengths(self, model, given: dict) -> list[int]:
        """How many tokens each picture of ``given`` is in the prompt."""
        if self.token == AUDIO:
            frames = model.model.audio_tower.config.max_source_positions
            return [frames // (4 if "Voxtral" in self.model else 2)] * len(given["input_features"])
        keep = {k: v for k, v in given.items() if k != "mm_token_type_ids"}
        features = getattr(model.model, f"get_{self.kind}_features")(**keep).pooler_output
        if "Idefics" in self.model or "SmolVLM" in self.model:  # whose pictures of one row come together
            count = given["pixel_values"].shape[0] * given["pixel_values"].shape[1]
            return [sum(feature.shape[:-1].numel() for feature in features) // count] * count
        return [len(feature) for feature in features]

    def batch(self, model, pictures=(1,), seed: int = 3, text: int = 5, gap: int = 0, adjacent=False) -> dict:
        """A prompt for each entry of ``pictures``, with so many of them; shorter ones padded on the left, by ``gap``
        more than they need."""
        generator = torch.Generator().manual_seed(seed)
        given = self.pixels(sum(pictures), generator) if sum(pictures) else {}
        sizes = iter(self.lengths(model, given) if given else ())
        words = lambda count: torch.randint(5, FIRST_SPECIAL, (count,), generator=generator).tolist()  # noqa: E731
        rows = []
        for number, count in enumerate(pictures):
            row = words(2 + number)
            for _ in range(count):
                row += [START] + [self.token] * next(sizes) + [END] + ([] if adjacent else words(2))
            rows.append(row + words(text))
        width = max(map(len, rows)) + gap
        ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, width - len(row) :], mask[number, width - len(row) :] = torch.tensor(row), 1
        if gap == 0 and len({len(row) for row in rows}) == 1:
            mask = torch.ones_like(ids)
        batch = {"input_ids": ids, "attention_mask": mask, **given}
        kinds = (ids == IMAGE).long() + 2 * (ids == VIDEO)
        if "Qwen" in self.model and self.token != AUDIO:
            batch["mm_token_type_ids"] = kinds
        if "Gemma" in self.model:  # of PaliGemma 0 is what sees itself whole, of Gemma 3 what is text
            batch["token_type_ids"] = kinds if "Gemma3" in self.model else 0 * kinds
        return batch

    def longer(self, batch: dict, ids: Tensor) -> dict:
        """A batch with tokens (B, n) behind it."""
        one = torch.ones_like(ids)
        added = {"input_ids": ids, "attention_mask": one, "mm_token_type_ids": 0 * one}
        added["token_type_ids"] = 0 * one if "Gemma3" in self.model else one
        return batch | {k: torch.cat([batch[k], more], 1) for k, more in added.items() if k in batch}


def _pictures(*shape: int, **more) -> Callable:
    return lambda count, generator: {"pixel_values": torch.randn(count, *shape, generator=generator)}


def _tiles(count: int, generator: torch.Generator) -> dict:
    sizes = torch.tensor([[24, 40], [48, 24]])[torch.arange(count) % 2]
    return {"pixel_values": torch.randn(count, 3, 3, 24, 24, generator=generator), "image_sizes": sizes}


def _row(count: int, generator: torch.Generator) -> dict:
    return {"pixel_values": torch.randn(1, count, 3, 24, 24, generator=generator)}


def _grids(count: int, generator: torch.Generator) -> dict:
    grids = torch.tensor([[1, 8, 6], [1, 4, 10], [1, 6, 6]])[torch.arange(count) % 3]
    patches = int(grids.prod(1).sum())
    return {"pixel_values": torch.randn(patches, 3 * 2 * 16, generator=generator), "image_grid_thw": grids}


def _frames(count: int, generator: torch.Generator) -> dict:
    grids = torch.tensor([[3, 4, 6], [2, 4, 4]])[torch.arange(count) % 2]
    patches = int(grids.prod(1).sum())
    return {"pixel_values_videos": torch.randn(patches, 3 * 2 * 16, generator=generator), "video_grid_thw": grids}


def _sounds(frames: int) -> Callable:
    def sounds(count: int, generator: torch.Generator) -> dict:
        features = torch.randn(count, 16, frames, generator=generator)
        return {"input_features": features, "feature_attention_mask": torch.ones(count, frames, dtype=torch.long)}

    return sounds


def _voices(count: int, generator: torch.Generator) -> dict:
    return {"input_features": torch.randn(count, 16, 64, generator=generator)}


def _clip(name: str = "clip_vision_model", text: str = "llama", tower: dict | None = None, **more) -> Callable:
    """The options of a model of a tower and a language model."""

    def options() -> dict:
        vision = {"model_type": name, **TOWER, **(tower or {})}
        return {"vision_config": vision, "text_config": {"model_type": text, **TEXT}, **more}

    return options


def _qwen(**tower) -> Callable:
    vision = {"depth": 3, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 4}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    return lambda: {"vision_config": vision | tower, "text_config": TEXT | MROPE, **ids}


def _gemma(**text) -> dict:
    return {"model_type": "gemma", **TEXT, "head_dim": 8, **text}


SIGLIP, HALF = "siglip_vision_model", {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
QWEN2 = {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
QWEN25 = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
QWEN3 = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 64}
QWEN3 |= {"deepstack_visual_indexes": [0, 1]}
CLS = {"tower_cls": True}
VISUAL: dict[str, Visual] = {
    "llava": Visual("LlavaForConditionalGeneration", _clip(image_token_index=IMAGE), _pictures(3, 24, 24), **CLS),
    "llava-next": Visual(
        "LlavaNextForConditionalGeneration", _clip(image_token_index=IMAGE, image_grid_pinpoints=TILES), _tiles, **CLS
    ),
    "llava-onevision": Visual(
        "LlavaOnevisionForConditionalGeneration",
        _clip(SIGLIP, "qwen2", image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=TILES, **HALF),
        _tiles,
    ),
    "qwen2-vl": Visual("Qwen2VLForConditionalGeneration", _qwen(**QWEN2), _grids),
    "qwen2-vl-video": Visual("Qwen2VLForConditionalGeneration", _qwen(**QWEN2), _frames, VIDEO, "video"),
    "qwen2.5-vl": Visual("Qwen2_5_VLForConditionalGeneration", _qwen(**QWEN25), _grids),
    "qwen3-vl": Visual("Qwen3VLForConditionalGeneration", _qwen(**QWEN3), _grids),
    "idefics3": Visual(
        "Idefics3ForConditionalGeneration", _clip("idefics3_vision", image_token_id=IMAGE, scale_factor=2), _row
    ),
    "smolvlm": Visual(
        "SmolVLMForConditionalGeneration", _clip("smolvlm_vision", image_token_id=IMAGE, scale_factor=2), _row
    ),
    "internvl": Visual(
        "InternVLForConditionalGeneration",
        _clip(
            "internvl_vision",
            "qwen2",
            {"image_size": [24, 24], "patch_size": [4, 4]},
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        ),
        _pictures(3, 24, 24),
        **CLS,
    ),
    "paligemma": Visual(
        "PaliGemmaForConditionalGeneration",
        lambda: _clip(SIGLIP)() | {"text_config": _gemma(), "image_token_index": IMAGE, "projection_dim": 32},
        _pictures(3, 24, 24),
    ),
    "gemma3": Visual(
        "Gemma3ForConditionalGeneration",
        lambda: (
            _clip(SIGLIP)()
            | {"mm_tokens_per_image": 9, "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}
            | {"text_config": _gemma(model_type="gemma3_text", sliding_window=256) | {"layer_types": HYBRID}}
        ),
        _pictures(3, 24, 24),
    ),
    "qwen2-audio": Visual(
        "Qwen2AudioForConditionalGeneration",
        lambda: {
            "audio_config": {"model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 3}
            | {"encoder_attention_heads": 4, "encoder_ffn_dim": 64, "num_mel_bins": 16, "max_source_positions": 32},
            "text_config": {"model_type": "qwen2", **TEXT},
            "audio_token_index": AUDIO,
        },
        _sounds(64),
        AUDIO,
        "audio",
    ),
    "voxtral": Visual(
        "VoxtralForConditionalGeneration",
        lambda: {
            "audio_config": {**SOUND, "intermediate_size": 128},
            "text_config": {"model_type": "llama", **TEXT, "head_dim": 8},
            "audio_token_id": AUDIO,
        },
        _voices,
        AUDIO,
        "audio",
    ),
}


@cache
def tiny(family: str):
    """The tiny model of a family; not to be changed."""
    return VISUAL[family].build()


def states(model, batch: dict) -> Tensor:
    """(T, V) the logits of the real tokens that hold no picture."""
    logits = model(**batch, use_cache=False).logits
    text = batch["attention_mask"].bool() & (batch["input_ids"] < IMAGE)
    return logits[text]


def save_reader(folder: Path, method=None, family: str = "llava") -> Path:
    """A tiny model that reads pictures and its processor, as they lie on disk; the words of its text are w5, w6, ..."""
    model = VISUAL[family].build()
    model.generation_config.suppress_tokens = [IMAGE, VIDEO, AUDIO, START, END]
    (model if method is None else prune(model, method)).save_pretrained(folder)
    words = {f"w{i}": i for i in range(112)} | {"<image>": IMAGE}
    del words[f"w{IMAGE}"]
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = {"pad_token": "w0", "unk_token": "w3", "extra_special_tokens": ["<image>"]}
    own["model_input_names"] = ["input_ids", "attention_mask"]
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=made, **own)
    pixels = t.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    strategy = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    t.LlavaProcessor(pixels, tokenizer, image_token="<image>", **strategy).save_pretrained(folder)
    return folder


def draw(file: Path, seed: int = 0) -> Path:
    """A picture of 24 x 24 with another colour in every patch."""
    values = torch.randint(0, 256, (6, 6, 3), generator=torch.Generator().manual_seed(seed)).byte().numpy()
    Image.fromarray(values.repeat(4, 0).repeat(4, 1)).save(file)
    return file
