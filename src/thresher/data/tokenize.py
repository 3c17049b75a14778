"""Token ids of a part of a task, cut to a length and counted."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from . import qa
from .embedder import PROMPTED, Prompt
from .reranking import is_ranking
from .task import PAIRED, DataError, Task

if TYPE_CHECKING:
    from datasets import Dataset


def tokenize(
    dataset: Dataset, task: Task, tokenizer: Any, max_length: int | None, prompt: Prompt | None = None
) -> tuple[Dataset, int]:
    """Return the token ids of a part of ``task``, without padding, and how many rows were cut.

    Rows hold input_ids, attention_mask, token_type_ids and labels, the last two where there are any; for reranking also
    ``row``, the number of the query, and for texts in pairs what says of which. A text without any token becomes one
    end-of-text (or padding) token. Paragraphs with questions are cut into windows instead (``qa.windows``), and those
    of several windows are counted.

    Args:
        max_length: tokens of a row, special ones included; the longer text of a pair is cut first, and a warning counts
            the rows. None cuts nothing.
        prompt: what an embedder sets before each text; where it is not pooled rows have the column ``pooling_mask``.
    """
    import pandas
    from datasets import Dataset, concatenate_datasets
    from datasets.utils import tqdm

    if task.kind == "qa":
        if max_length is None:
            raise DataError("paragraphs are read in windows: max_length is None, expected their tokens")
        return qa.windows(dataset, tokenizer, max_length)
    limits = {"truncation": "longest_first", "max_length": max_length} if max_length else {"verbose": False}
    end = tokenizer.eos_token_id or tokenizer.pad_token_id or 0
    empty = {"input_ids": [end], "attention_mask": [1], "token_type_ids": [0]}
    chunks, cut = [], 0
    for start in tqdm(range(0, len(dataset), 1000), desc="Tokenizing", disable=len(dataset) <= 5000):
        rows = dataset[start : start + 1000]
        texts = [
            [prompt.text + text for text in rows[column]] if prompt else rows[column] for column in task.text_columns
        ]
        encoded = tokenizer(*texts, return_attention_mask=True, **limits)
        if encoded.encodings is not None:
            cut += sum(bool(row.overflowing) for row in encoded.encodings)
        elif max_length:  # a tokenizer written in Python
            whole = tokenizer(*texts, verbose=False)["input_ids"]
            cut += sum(len(ids) > max_length for ids in whole)
        chunk = {key: [row or empty[key] for row in encoded[key]] for key in empty if key in encoded}
        chunk |= {name: [float("nan") if x is None else x for x in rows[name]] for name in PAIRED if name in rows}
        if prompt is not None and prompt.tokens:
            chunk[PROMPTED] = [prompt.mask(len(ids)) for ids in chunk["input_ids"]]
        chunks.append(Dataset.from_dict(chunk | ({"labels": rows[task.label_column]} if task.label_column else {})))
    if cut:
        warnings.warn(f"{cut} of {len(dataset)} texts are longer than {max_length} tokens and were cut", stacklevel=2)
    whole = concatenate_datasets(chunks)
    if is_ranking(task.metric):
        queries = pandas.Series([*dataset[task.text_columns[0]]])
        whole = whole.add_column("row", queries.factorize()[0].tolist())
    return whole, cut
