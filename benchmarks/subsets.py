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


def headlines(_: Path) -> Path:
    """The headlines of BBC News: very short texts of five classes."""
    from thresher.data.load import load_task

    def first_line(rows):
        return rows.assign(text=rows["text"].str.strip().str.split("\n").str[0])

    task = load_task("bbc-news")
    whole = {"train": (task.train, task.validation), "test": (task.test,)}
    names, text = task.labels, task.text_columns[0]

    def made(parts):
        import pandas

        rows = pandas.concat([part.to_pandas() for part in parts])
        labels = [names[label] for label in rows[task.label_column]]
        return first_line(pandas.DataFrame({"text": rows[text], "label": labels}))

    return _written(FOLDER / "headlines", {part: made(rows) for part, rows in whole.items()})


def long_reviews(data: Path) -> Path:
    """1,500 reviews of IMDB of 250 words or more to train on, 1,000 to test on."""
    counts = {"train": 1500, "test": 1000}
    parts = {part: _read(data / "imdb", part) for part in counts}
    parts = {part: rows[rows["text"].str.split().str.len() >= 250] for part, rows in parts.items()}
    return _written(FOLDER / "long-reviews", {p: rows.sample(counts[p], random_state=0) for p, rows in parts.items()})


def rare_class(data: Path) -> Path:
    """3,000 phrases of SST-2, one of twenty negative; 5 % of the test part as well."""

    import pandas

    def rare(rows, most):
        few, many = rows[rows["label"] == 0], rows[rows["label"] == 1].head(most)
        both = [many, few.sample(len(many) // 19, random_state=0)]
        return pandas.concat(both).sample(frac=1, random_state=0)

    parts = {"train": rare(_read(data / "glue/sst2", "train").sample(20_000, random_state=0), 2850)}
    return _written(FOLDER / "rare-class", parts | {"test": rare(_read(data / "glue/sst2", "validation"), 440)})


def many_classes(data: Path) -> Path:
    """60 articles of each of the twenty newsgroups to train on, 75 to test on."""
    parts = {}
    for part, count in (("train", 60), ("test", 75)):
        rows = _read(data / "20newsgroups", part)
        label = "label" if "label" in rows else "label_text"
        rows = rows[rows["text"].str.strip() != ""].groupby(label, group_keys=False)
        parts[part] = rows.sample(count, random_state=0)
    return _written(FOLDER / "many-classes", parts)


def noisy_labels(data: Path) -> Path:
    """4,000 phrases of SST-2, of which one in five has the wrong label; the test part is as it was."""
    train = _read(data / "glue/sst2", "train").sample(4000, random_state=0)
    wrong = train.sample(frac=0.2, random_state=1).index
    train.loc[wrong, "label"] = 1 - train.loc[wrong, "label"]
    return _written(FOLDER / "noisy-labels", {"train": train, "test": _read(data / "glue/sst2", "validation")})


MADE = {
    "headlines": headlines,
    "long-reviews": long_reviews,
    "rare-class": rare_class,
    "many-classes": many_classes,
    "noisy-labels": noisy_labels,
}


def _read(source: Path, part: str):
    import pandas

    return pandas.read_parquet(source / f"{part}.parquet")


def _written(target: Path, parts: dict) -> Path:
    """A folder of parts, made once and aside first."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as aside:
            (Path(aside) / "made").mkdir()
            for part, rows in parts.items():
                rows.to_parquet(Path(aside) / "made" / f"{part}.parquet", index=False)
            (Path(aside) / "made").rename(target)
    return target


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
