"""A tiny model and its tokenizer, in memory and on disk."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from support.families import FAMILIES
from thresher import prune

LETTERS = "abcdefghijklmnopqrstuvwxyz"


WORDS = ("the", "farmer", "wheat", "chaff", "and", "grain", "script", "##ing", "##s", "thresh")


SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


VOCABULARY = [*SPECIAL, *"<>/.,!?&", *LETTERS, *(f"##{x}" for x in LETTERS if x != "s"), *WORDS]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer with fewer words than the tiny models have rows."""
    vocabulary = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, model_input_names=inputs, **names)


def tiny_model(method=None, layout: str = "auto", **options):
    model = FAMILIES["bert"].build(**options)
    return model if method is None else prune(model, method, layout=layout)


def save_tiny(folder: Path, method=None, **options) -> Path:
    """A tiny model and its tokenizer, as they lie on disk."""
    tiny_model(method, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
