"""Data with a part cut: copies of a folder of parquet files, each made once and aside first."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "runs" / "data"


def shorter_half(source: Path) -> Path:
    """Train without its longer half, the rows of more words than the median, to see what a method makes of longer ones
    (LTP's last table)."""

    def cut(train):
        words = sum(train[column].str.split().str.len() for column in train if isinstance(train[column].iloc[0], str))
        return train[words <= words.median()]

    return _copy(source, FOLDER / f"{source.name}-shorter", "train", cut)


def some_of_test(source: Path, rows: int) -> Path:
    """``rows`` of the test part, drawn once for all entries, where the whole takes hours on two cores."""
    return _copy(
        source,
        FOLDER / f"test-{rows}" / source.name,
        "test",
        lambda test: test.sample(rows, random_state=0).sort_index(),
    )


def _copy(source: Path, target: Path, part: str, cut: Callable) -> Path:
    """A copy with one part cut."""
    import pandas

    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as aside:
        made = Path(aside) / "made"
        made.mkdir()
        for file in source.glob("*.parquet"):
            shutil.copyfile(file, made / file.name)
        cut(pandas.read_parquet(made / f"{part}.parquet")).to_parquet(made / f"{part}.parquet", index=False)
        made.rename(target)
    return target
