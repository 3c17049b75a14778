"""The command ``score``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..experiments.spec import ScoreSpec

if TYPE_CHECKING:
    from .console import Screen


def score(spec: ScoreSpec, screen: Screen) -> None:
    """Score the texts in any number of files, in several processes; interrupted, the same command goes on.

    \b
    Examples:
      thresher score runs/reviews --data reviews.parquet --out scored
      thresher score runs/reviews --data in/*.jsonl --text body --keep id,url --out scored --workers 4
      thresher score runs/reviews-onnx --data "in/**/*.parquet" --keep label --prefix model_ --out scored
      thresher score runs/reviews --data /shared/in --out /shared/scored --ray auto --workers 32
    """
    from ..experiments.score import score as job

    with screen.progress() as tell:
        row = job(spec, progress=tell)
    screen.show([row], lambda rows, width: listing(rows[0]))
    for line in notices(row):
        screen.say(line)


def listing(row: dict[str, Any]) -> Table:
    """Names and numbers, one below the other."""
    grid = Table.grid("name", "value", padding=(0, 2))
    shown = {"rows": f"{row['rows']:,}", "shards": f"{row['shards']:,}", "tokens": f"{row['tokens']:,}"}
    if row["padding_ratio"]:
        shown["padded / needed"] = f"{row['padding_ratio']:.3f}"
    if row["flops_ratio"]:
        shown["× fewer FLOPs"] = f"{row['flops_ratio']:.2f}"
    if row["rows_per_second"]:
        shown["rows a second"] = f"{row['rows_per_second']:.1f}"
    for name, value in shown.items():
        grid.add_row(name, value)
    return grid


def notices(row: dict[str, Any]) -> list[str]:
    """Say what the rows do not show: texts that were none, texts that were cut, where the result is."""
    lines = []
    if row["unread"]:
        what = "rows have no text (null, or no string)"
        lines.append(f"{row['unread']:,} of {row['rows']:,} {what}: their answers are null")
    if row["cut"]:
        lines.append(f"{row['cut']:,} of {row['rows']:,} texts were cut at --max-length tokens")
    if not row["shards_made"]:
        lines.append("all shards were there already: nothing was scored")
    return [*lines, f"the result is in {row['out']}"]
