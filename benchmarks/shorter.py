"""Data whose train part holds short texts alone, to see what a method makes of longer ones (LTP's last table)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "runs" / "data"


def shorter_half(source: Path) -> Path:
    """A copy of a folder of parquet files whose train part has lost its longer half: the rows of more words than the
    median. Made once, aside first."""
    import pandas

    target = FOLDER / f"{source.name}-shorter"
    if target.exists():
        return target
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as aside:
        made = Path(aside) / "made"
        made.mkdir()
        for file in source.glob("*.parquet"):
            shutil.copy(file, made)
        train = pandas.read_parquet(made / "train.parquet")
        words = sum(train[column].str.split().str.len() for column in train if isinstance(train[column].iloc[0], str))
        train[words <= words.median()].to_parquet(made / "train.parquet", index=False)
        made.rename(target)
    return target
