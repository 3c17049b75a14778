"""Little data files for tests."""

import csv
import json

from datasets import Dataset


def write(path, rows):
    """Rows (dicts) as a file whose type its suffix says; the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if path.suffix == ".tsv" else {}
            writer = csv.DictWriter(file, rows[0], **tabs)
            writer.writeheader()
            writer.writerows(rows)
    return path


def reviews(n, classes=("bad", "good"), start=0):
    return [{"text": f"text number {i}", "label": classes[i % len(classes)]} for i in range(start, start + n)]
