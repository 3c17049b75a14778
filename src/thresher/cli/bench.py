"""The command ``bench``."""

from __future__ import annotations

from importlib.util import find_spec

from ..experiments.spec import BenchSpec
from .console import Screen


def bench(spec: BenchSpec, screen: Screen) -> None:
    """Time a pruned model beside the dense one, padded and unpadded, on the same texts; a decoder with a shorter
    cache: the prompt, each token after it, and memory; or a model that reads a picture: its tower, and the same.

    \b
    Examples:
      thresher bench runs/reviews --batch-size 1,8,32 --plot reviews.png
      thresher bench runs/reviews --data reviews.csv --runtime torch,onnx,openvino --precision fp32,bf16,int8
      thresher bench a-decoder --method snapkv,keydiff --keep 0.25 --contexts 1024,4096
      thresher bench a-vlm --image field.jpg --ask "What grows here?" --method divprune,fastv --keep 0.25
      thresher bench --roofline --threads 1
    """
    if spec.roofline:
        return roofline(spec, screen)
    if spec.model is None:
        raise ValueError("name the folder of a pruned model, or ask for --roofline alone")
    if spec.plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'thresher-pruning[plot]'")
    from ..experiments.bench import bench as job
    from ..experiments.cache_spec import decodes, reads
    from ..reports import asked
    from ..reports.prompts import bench_table
    from ..reports.tables import table

    with screen.progress() as tell:
        rows = job(spec, progress=tell)
    drawn = asked.bench_table if reads(spec.model) else bench_table if decodes(spec.model) else table
    screen.show(rows, drawn)


def roofline(spec: BenchSpec, screen: Screen) -> None:
    """What this machine can do, and no model."""
    from ..evaluation.roofline import roofline as measured
    from ..evaluation.roofline import table

    line = measured(spec.threads)
    screen.show([line.to_dict()], lambda rows, width: table(line))
