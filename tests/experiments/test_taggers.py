"""A tagger is audited by the type of its entities, without labels."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import AutoModelForTokenClassification, BertConfig
from typer.testing import CliRunner

from support.families import NO_DROPOUT, TEXT
from support.tiny import WORDS, tiny_tokenizer
from thresher import FirstK, TopK, prune
from thresher.cli import app as cli
from thresher.data.task import DataError
from thresher.evaluation.entities import entities
from thresher.experiments.audit import audit

LABELS = ["O", "B-FIELD", "I-FIELD", "B-CROP", "I-CROP"]


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    """Folders of a tagger of random weights, dense and pruned to the first five tokens, and its texts."""
    folder = tmp_path_factory.mktemp("tagger")
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    net = AutoModelForTokenClassification.from_config(BertConfig(**TEXT, **NO_DROPOUT, **names)).eval()
    for parameter in net.parameters():
        parameter.data *= 5 if parameter.dim() == 2 else 1
    draw, words = random.Random(0), [word for word in WORDS if not word.startswith("##")]
    texts = [" ".join(draw.choices(words, k=draw.randint(4, 14))) for _ in range(500)]
    (folder / "texts.csv").write_text("text\n" + "\n".join(texts) + "\n")
    net.save_pretrained(folder / "tagger")
    prune(net, FirstK(keep=5)).save_pretrained(folder / "pruned")
    for name in ("tagger", "pruned"):
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def by_hand(folder, texts):
    """The entities of each text, dense and pruned, a text at a time."""
    tokenizer, found = tiny_tokenizer(), {}
    for name in ("tagger", "pruned"):
        net = AutoModelForTokenClassification.from_pretrained(folder / name).eval()
        net = prune(net) if name == "pruned" else net
        with torch.no_grad():
            best = [net(**tokenizer(text, return_tensors="pt")).logits[0, 1:-1].argmax(-1).tolist() for text in texts]
        found[name] = [{*entities([None, *(LABELS[i] for i in own), None])} for own in best]
    return found["tagger"], found["pruned"]


@pytest.mark.filterwarnings("ignore:(input length|entity)")
def test_an_entity_of_the_dense_model_is_an_example(farm):
    rows = audit(str(farm / "pruned"), str(farm / "texts.csv"), against=str(farm / "tagger"))
    whole, kinds = rows[0], {row["slice"]: row for row in rows if row["by"] == "entity"}
    assert {"FIELD", "CROP"} >= {*kinds} and kinds, "types are slices"
    assert sum(row["n"] for row in kinds.values()) <= whole["n"]
    assert whole["dense"] == 100 and whole["pruned"] < 100 and whole["lost"] > 0 and whole["gained"] == 0
    assert whole["metric"] == "entity f1" and 0 < whole["metric_pruned"] < 100 and whole["macs"] < 1


@pytest.mark.filterwarnings("ignore:(input length|entity)")
def test_what_is_found_is_counted_as_by_hand(farm):
    from thresher.experiments.spec import AuditSpec
    from thresher.experiments.taggers import compare_tags

    spec = AuditSpec(
        model=str(farm / "pruned"), data=str(farm / "texts.csv"), against=str(farm / "tagger"), max_length=128
    )
    tagged = compare_tags(spec)
    wanted, said = by_hand(farm, [*tagged.task.test["text"]])
    both = sum(len(one & other) for one, other in zip(wanted, said, strict=True))
    assert tagged.total == (both, sum(map(len, wanted)), sum(map(len, said)))
    assert tagged.found.sum() == both and len(tagged.kinds) == len(tagged.owners) == tagged.total.dense


@pytest.mark.filterwarnings("ignore:(input length|entity)")
def test_keeping_everything_finds_everything_without_a_dense_model(farm, tmp_path):
    net = AutoModelForTokenClassification.from_pretrained(farm / "tagger")
    prune(net, TopK(keep=1.0)).save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    rows = audit(str(tmp_path / "whole"), str(farm / "texts.csv"))
    assert rows[0]["pruned"] == rows[0]["metric_pruned"] == 100 and rows[0]["against"] is None
    assert all(row["drop"] == 0 for row in rows)


def test_what_cannot_be_is_said(farm):
    pruned, data = str(farm / "pruned"), str(farm / "texts.csv")
    with pytest.raises(ValueError, match="leave place out of by"):
        audit(pruned, data, by=("place",))
    with pytest.raises(ValueError, match="is not pruned"):
        audit(str(farm / "tagger"), data)
    nothing = AutoModelForTokenClassification.from_pretrained(farm / "tagger")
    nothing.classifier.bias.data[0] = 1e3
    prune(nothing, TopK(keep=0.5)).save_pretrained(farm / "nothing")
    tiny_tokenizer().save_pretrained(farm / "nothing")
    with pytest.raises(DataError, match="finds no entity in"):
        audit(str(farm / "nothing"), data)


@pytest.mark.filterwarnings("ignore:(input length|entity)")
def test_the_command_tells_it(farm, tmp_path):
    given = ["audit", str(farm / "pruned"), "--data", str(farm / "texts.csv"), "--against", str(farm / "tagger")]
    run = CliRunner().invoke(cli.app, [*given, "--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")])
    assert run.exit_code == 0, run.output
    assert "share of the dense model's entities" in " ".join(run.output.split())
    assert json.loads((tmp_path / "a.json").read_text())
