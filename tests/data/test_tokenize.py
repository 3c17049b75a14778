import warnings

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    ByT5Tokenizer,
    DebertaV2Config,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from support.files import write
from thresher.data.load import load_task
from thresher.data.models import positions
from thresher.data.tokenize import tokenize


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij"]
    vocabulary = {word: i for i, word in enumerate(words)}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    fast.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=special)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names, model_max_length=16
    )


# Tokens


def task_of(tmp_path, rows):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of texts that are empty or come twice
        return load_task(write(tmp_path / "test.jsonl", rows))


def test_tokenize_cuts_counts_and_does_not_pad(tmp_path, tokenizer):
    rows = [{"text": "a b c", "label": "x"}, {"text": "a b c d e f g h i j", "label": "y"}, {"text": "", "label": "x"}]
    task = task_of(tmp_path, rows)
    with pytest.warns(UserWarning, match="^1 of 3 texts are longer than 6 tokens and were cut$"):
        tokens, cut = tokenize(task.test, task, tokenizer, 6)
    assert cut == 1
    assert tokens["input_ids"][:] == [[2, 4, 5, 6, 3], [2, 4, 5, 6, 7, 3], [2, 3]]
    assert tokens["attention_mask"][:] == [[1] * 5, [1] * 6, [1] * 2]
    assert tokens["labels"][:] == [0, 1, 0] and not tokens.cache_files
    assert sorted(tokens.column_names) == ["attention_mask", "input_ids", "labels", "token_type_ids"]


def test_tokenize_does_not_count_texts_that_just_fit(tmp_path, tokenizer, caplog):
    task = task_of(tmp_path, [{"text": "a b c d", "label": 1}, {"text": "a " * 40, "label": 0}])
    tokens, cut = tokenize(task.test.select([0]), task, tokenizer, 6)
    assert cut == 0 and len(tokens["input_ids"][0]) == 6
    tokens, cut = tokenize(task.test, task, tokenizer, None)
    assert cut == 0 and len(tokens["input_ids"][1]) == 42
    assert not caplog.records


def test_tokenize_cuts_the_longer_text_of_a_pair(tmp_path, tokenizer):
    task = task_of(tmp_path, [{"question": "a b", "answer": "c d e f g h", "label": 1}])
    with pytest.warns(UserWarning, match="1 of 1"):
        tokens, _ = tokenize(task.test, task, tokenizer, 8)
    assert tokens["input_ids"][0] == [2, 4, 5, 3, 6, 7, 8, 3]
    assert tokens["token_type_ids"][0] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_tokenize_with_a_tokenizer_written_in_python(tmp_path):
    task = task_of(tmp_path, [{"text": "abcd", "label": 1}, {"text": "abcde", "label": 0}, {"text": "abc", "label": 0}])
    with pytest.warns(UserWarning, match="1 of 3 texts are longer than 5 tokens"):
        tokens, cut = tokenize(task.test, task, ByT5Tokenizer(), 5)
    assert cut == 1 and [len(ids) for ids in tokens["input_ids"]] == [5, 5, 4]


def test_tokenize_without_special_tokens_or_labels(tmp_path, tokenizer):
    bare = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="[PAD]", unk_token="[UNK]")
    path = write(tmp_path / "test.jsonl", [{"text": "a a"}, {"text": ""}])
    with pytest.warns(UserWarning, match="1 of 2 rows of test have an empty text"):
        task = load_task(path, need_labels=False)
    tokens, _ = tokenize(task.test, task, bare, 4)
    assert tokens["input_ids"][:] == [[2, 2], [0]] and tokens["attention_mask"][:] == [[1, 1], [1]]
    assert "labels" not in tokens.column_names


def test_tokenize_many_rows_keeps_their_order(tmp_path, tokenizer):
    rows = [{"text": "a " * (i % 7), "label": i % 2} for i in range(2300)]
    task = task_of(tmp_path, rows)
    tokens, cut = tokenize(task.test, task, tokenizer, 16)
    assert cut == 0 and [len(ids) - 2 for ids in tokens["input_ids"]] == [i % 7 for i in range(2300)]


TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 20}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BertConfig(**TINY, max_position_embeddings=64), 64),
        (RobertaConfig(**TINY, max_position_embeddings=66, pad_token_id=1), 64),
        (MPNetConfig(**TINY, max_position_embeddings=66), 64),
        (
            DebertaV2Config(**TINY, max_position_embeddings=64, position_biased_input=False, relative_attention=True),
            None,
        ),
        (T5Config(d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=20), None),
    ],
)
def test_positions(config, expected):
    assert positions(config) == expected
    assert positions(AutoModel.from_config(config)) == expected
