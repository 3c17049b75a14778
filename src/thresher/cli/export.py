"""The command ``export``."""

from __future__ import annotations

from ..experiments.spec import ExportSpec
from .console import Screen


def export(spec: ExportSpec, screen: Screen) -> None:
    """Write a model, pruned or not, as a graph for ONNX Runtime, OpenVINO or ExecuTorch, without the dropped tokens.

    \b
    Examples:
      thresher export runs/reviews --out runs/reviews-onnx
      thresher export runs/reviews --format openvino --precision bf16 --out runs/reviews-ov
      thresher export runs/reviews --format openvino --precision int8 --data reviews.csv --out runs/reviews-int8
      thresher export runs/reviews --format executorch --precision int8 --lengths 64,128 --out runs/reviews-phone
    """
    from ..experiments.export import export as job

    with screen.progress() as tell:
        row = job(spec, progress=tell)
    screen.show([row])
    screen.say(f"the graph is in {spec.out}; its logits differ from the model's by {row['difference']:.2g} at most")
