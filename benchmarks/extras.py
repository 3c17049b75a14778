"""Install the wheel into fresh environments, one for each extra, use what the extra is for, and time the examples.

    python benchmarks/extras.py               all of them; what has a row already is left out
    python benchmarks/extras.py onnx ray      some
    python benchmarks/extras.py --examples    seconds of each example, in an environment of its own

An environment is a new folder, with ``pip install WHEEL[EXTRA] -c constraints.txt``; it is removed afterwards. Rows
land in ``results/release``, as each ends, and the tables in ``docs/install.md`` are written from them. Needs ``build``
(pip install build).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT, RESULTS = HERE.parent, HERE / "results" / "release"
PAGE = ROOT / "docs" / "install.md"
DISTRIBUTION = "thresher-pruning"
TINY = """
import torch, transformers, thresher
from transformers import BertConfig, BertForSequenceClassification as Net
net = thresher.prune(Net(BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
                                    vocab_size=99)).eval(), thresher.TopK(keep=0.5))
ids = torch.arange(12)[None]
logits = net(input_ids=ids).logits
"""
GRAPH = (
    TINY
    + """
import tempfile, pathlib
with tempfile.TemporaryDirectory() as folder:
    thresher.export(net, folder, format=FORMAT, max_length=16)
    graph = thresher.load_runtime(folder)
    found = graph.forward(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert (torch.as_tensor(found) - logits).abs().max() < 1e-4
"""
)
USED = {  # what an extra is for, in a few lines; "" is the library alone
    "": TINY,
    "onnx": GRAPH.replace("FORMAT", "'onnx'"),
    "openvino": GRAPH.replace("FORMAT", "'openvino'"),
    "mobile": TINY + "from executorch.exir import to_edge_transform_and_lower",
    "st": "import sentence_transformers, thresher; thresher.prune",
    "serve": TINY + "import uvicorn\nfrom thresher.serving.server import *",
    "ray": "import ray; from thresher.serving.ray import *; ray.init(num_cpus=1); ray.shutdown()",
    "plot": "from thresher.reports import plots, style; import matplotlib",
    "demo": "from thresher.data.load import load_task; assert len(load_task('bbc-news').train)",
}
EXAMPLES = ("classify", "embed", "long_prompt", "ask_picture", "pictures", "edge")


def wheel(folder: Path) -> Path:
    """Build the wheel; raises SystemExit without ``build``."""
    if find_spec("build") is None:
        raise SystemExit("the wheel is made by the package build, which is missing: pip install build")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "-o", str(folder), str(ROOT)], check=True, stdout=-3)
    return next(folder.glob("*.whl"))


def installed(place: Path, what: str) -> dict[str, Any]:
    """Make an environment with ``what``: packages, megabytes and seconds."""
    start = perf_counter()
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    pip = [str(place / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "-c", str(ROOT / "constraints.txt"), what], check=True)
    seconds = perf_counter() - start
    packages = json.loads(subprocess.run([*pip, "list", "--format", "json"], check=True, stdout=-1).stdout)
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file() and not file.is_symlink())
    return {"packages": len(packages), "megabytes": round(size / 1e6), "install_seconds": round(seconds)}


def extra_row(extra: str, built: Path) -> dict[str, Any]:
    """Install an extra and use it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "env"
        row = {"extra": extra} | installed(place, f"{built}[{extra}]" if extra else str(built))
        start = perf_counter()
        said = ran([str(place / "bin" / "python"), "-W", "ignore", "-c", USED[extra]], folder)
        row |= {"works": said.returncode == 0, "use_seconds": round(perf_counter() - start, 1)}
        if said.returncode:
            print(said.stderr[-2000:], file=sys.stderr)
        return row


def ran(command: list[str], folder: str) -> subprocess.CompletedProcess:
    """Run something outside of the repository, without a hub."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def example_rows(built: Path) -> list[dict[str, Any]]:
    """Run the examples in an environment of the extras that they name."""
    with tempfile.TemporaryDirectory() as folder:
        place, rows = Path(folder) / "env", []
        installed(place, f"{built}[onnx,openvino,st,demo,serve]")
        for name in EXAMPLES:
            start = perf_counter()
            said = ran([str(place / "bin" / "python"), str(ROOT / "examples" / f"{name}.py")], folder)
            rows.append({"example": name, "works": said.returncode == 0, "seconds": round(perf_counter() - start, 1)})
            if said.returncode:
                print(said.stderr[-2000:], file=sys.stderr)
        return rows


def land(name: str, rows: list[dict[str, Any]]) -> None:
    """Write rows, each with the machine."""
    from run import as_json
    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import whole

    RESULTS.mkdir(parents=True, exist_ok=True)
    with whole(RESULTS / f"{name}.json") as aside:
        aside.write_text(as_json({"rows": [environment() | row for row in rows]}))


def known(name: str) -> list[dict[str, Any]]:
    """The rows that are there."""
    place = RESULTS / f"{name}.json"
    return json.loads(place.read_text())["rows"] if place.exists() else []


def tables() -> None:
    """Write the tables of the page between their marks."""
    from thresher.evaluation.rows import whole

    text = PAGE.read_text()
    lines = ["", "Each extra in a fresh environment, with the versions of `constraints.txt`, used once:", ""]
    lines += ["| `pip install` | works | packages | MB | seconds to install |", "|---|---|---|---|---|"]
    for row in known("extras"):
        what = f"'{DISTRIBUTION}[{row['extra']}]'" if row["extra"] else DISTRIBUTION
        cells = ("yes" if row["works"] else "**no**", row["packages"], f"{row['megabytes']:,}", row["install_seconds"])
        lines.append(f"| `{what}` | {' | '.join(map(str, cells))} |")
    for name, made in (("extras", lines), ("examples", example_table())):
        marked = "\n".join([f"<!-- {name} -->", *(made if known(name) else []), f"<!-- /{name} -->"])
        text = re.sub(f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, said=marked: said, text, flags=re.S)
    with whole(PAGE) as aside:
        aside.write_text(text)


def example_table() -> list[str]:
    """The lines of the table of the examples."""
    rows = known("examples")
    cells = [f"| [{r['example']}](../examples/{r['example']}.py) | {r['seconds']:g} |" for r in rows if r["works"]]
    return ["", "| example | seconds |", "|---|---|", *cells, ""]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", help="default: all that have no row")
    parser.add_argument("--examples", action="store_true", help="run the examples instead")
    options = parser.parse_args()
    if strange := {*options.extras} - {*USED}:
        parser.error(f"no such extra: {', '.join(sorted(strange))}; there are {', '.join(filter(None, USED))}")
    sys.path.insert(0, str(HERE))
    with tempfile.TemporaryDirectory() as folder:
        built = wheel(Path(folder))
        if options.examples:
            land("examples", example_rows(built))
        else:
            there = {row["extra"]: row for row in known("extras")}
            for extra in options.extras or [name for name in USED if name not in there]:
                there[extra] = extra_row(extra, built)
                print(there[extra], flush=True)
                land("extras", [there[name] for name in USED if name in there])
    tables()
    return 0


if __name__ == "__main__":
    sys.exit(main())
