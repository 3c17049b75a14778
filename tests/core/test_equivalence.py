"""The first property: a model that hides tokens, one that shortens its tensors and one that packs them answer the same.

The matrix is method x family x layout; ``python tests/test_equivalence.py`` prints what it covers.
"""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache

import pytest
import torch

from support.families import FAMILIES, difference
from support.methods import METHODS, refusal
from thresher import TopK, prune
from thresher.core.tokens import LAYOUTS, Packed

TOLERANCE = 1e-5


@cache
def tiny(family: str):
    return FAMILIES[family].build()


@cache
@torch.no_grad()
def dense_answers(family: str) -> dict:
    return FAMILIES[family].answers(tiny(family), FAMILIES[family].batch())


@torch.no_grad()
def answers_of(family: str, method, layout: str, batch: dict):
    """(answers, report) of the tiny model of a family, pruned."""
    model = prune(copy.deepcopy(tiny(family)), method, layout=layout)
    return FAMILIES[family].answers(model, batch), model.token_pruner.report


@cache
def matrix(method: str, prunes: bool, family: str, layout: str):
    """(answers, report) of one place in the matrix."""
    return answers_of(family, METHODS[method][prunes](), layout, FAMILIES[family].batch())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_keeping_every_token_is_dense(method, family, layout):
    if why := refusal(method, family, layout):
        with pytest.raises((ValueError, RuntimeError), match=why):
            matrix(method, False, family, layout)
        return
    answers, report = matrix(method, False, family, layout)
    assert {row["tokens_kept"] for row in report} == {report[0]["tokens_in"]}
    assert difference(answers, dense_answers(family)) <= (TOLERANCE if layout == "packed" else 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_layouts_agree(method, family, layout):
    if why := refusal(method, family, layout):
        with pytest.raises((ValueError, RuntimeError), match=why):
            matrix(method, True, family, layout)
        return
    answers, report = matrix(method, True, family, layout)
    assert report[-1]["tokens_kept"] < report[0]["tokens_in"]
    assert difference(answers, matrix(method, True, family, "mask")[0]) <= TOLERANCE
    assert difference(answers, dense_answers(family)) > 1e-3, "tokens left and nothing changed"


@pytest.mark.parametrize("method", ["topk", "threshold"])
@pytest.mark.parametrize("lengths", [(9, 9, 9), (12, 12, 5, 5, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_agree_without_padding_and_on_runs_of_equal_length(family, lengths, method):
    batch = FAMILIES[family].batch(lengths)
    if len(set(lengths)) == 1:
        batch.pop("attention_mask", None)
    layouts = [e for e in LAYOUTS if not refusal("topk", family, e)]
    answers = [answers_of(family, METHODS[method][1](), e, batch)[0] for e in layouts]
    assert all(difference(a, answers[0]) <= TOLERANCE for a in answers)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.packed])
def test_spare_rows_change_nothing(family, monkeypatch):
    monkeypatch.setattr("thresher.core.tokens.EVEN", (torch.float32,))
    monkeypatch.setattr("thresher.core.tokens.FEW", 20)  # more rows than that come in larger steps
    seen, enter = [], Packed.enter
    monkeypatch.setattr(Packed, "enter", lambda *given: seen.append(enter(*given)) or seen[-1])
    answers = answers_of(family, METHODS["topk"][1](), "packed", FAMILIES[family].batch())[0]
    assert seen and all(len(x[0]) % 64 == 0 for x in seen)
    assert difference(answers, matrix("topk", True, family, "mask")[0]) <= TOLERANCE


@pytest.mark.parametrize(
    "family, method",
    [
        *((name, "topk") for name in ("bert", "distilbert", "albert", "modernbert", "vit", "llama")),
        *(("bert", name) for name in ("tome", "tofu", "ltmp", "evit")),
    ],
)
def test_eager_attention_agrees_with_sdpa(family, method):
    batch, expected = FAMILIES[family].batch(), matrix(method, True, family, "mask")[0]
    for layout in LAYOUTS:
        model = prune(FAMILIES[family].build(attn_implementation="eager"), METHODS[method][1](), layout=layout)
        with torch.no_grad():
            assert difference(FAMILIES[family].answers(model, batch), expected) <= TOLERANCE


@torch.no_grad()
def test_the_reference_equals_layers_called_by_hand():
    """BERT, one row, tokens cut out of the tensor between attention and FFN in plain torch."""
    family, at, keep = FAMILIES["bert"], (0, 2), 0.5
    model, batch = family.build(attn_implementation="eager"), family.batch((13,))
    x = model.bert.embeddings(input_ids=batch["input_ids"])
    for number, layer in enumerate(model.bert.encoder.layer):
        x, weights = layer.attention(x, None)
        if number in at:
            score = weights.mean((1, 2))[0]
            score[0] = torch.inf
            k = -(-x.shape[1] // 2)
            x = x[:, score.topk(k).indices.sort().values]
        x = layer.output(layer.intermediate(x), x)
    expected = model.classifier(model.bert.pooler(x))
    for layout in LAYOUTS:
        pruned = prune(family.build(), TopK(keep=keep, at=at), layout=layout)
        torch.testing.assert_close(pruned(**batch).logits, expected, atol=TOLERANCE, rtol=0)
    assert x.shape[1] == pruned.token_pruner.report[-1]["tokens_kept"] == 4


def summary() -> str:
    """How many combinations the matrix runs and which it refuses."""
    combinations = [(m, f, e) for m in METHODS for f in FAMILIES for e in LAYOUTS]
    why = Counter((f, reason) for m, f, e in combinations if (reason := refusal(m, f, e)))
    lines = [f"{len(METHODS)} methods x {len(FAMILIES)} families x {len(LAYOUTS)} layouts: {len(combinations)} places"]
    lines += [f"{len(combinations) - why.total()} run", f"{why.total()} are refused with an error:"]
    return "\n".join(lines + [f"  {count} with {family}: {reason}" for (family, reason), count in why.items()])


if __name__ == "__main__":
    print(summary())
