"""torch.compile takes a pruned model as one graph, whether kept counts follow from the shape or from the data."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from support.families import FAMILIES, difference
from thresher import ATS, LTP, TRBERT, VATP, AdapLeR, Entropy, FirstK, SpAtten, Threshold, TopK, Transkimmer, prune

METHODS = {
    "topk": lambda: TopK(keep=0.6),
    "counts": lambda: TopK(keep=(9, 6, 3)),
    "firstk": lambda: FirstK(keep=0.6),
    "threshold": lambda: Threshold((0.4, 0.6, 0.8)),
    "ltp": lambda: LTP(init=1.6),
    "spatten": lambda: SpAtten(keep=0.6, at=(0, 1, 2)),
    "vatp": lambda: VATP(keep=0.6),
    "entropy": lambda: Entropy(keep=0.6),
    "ats": lambda: ATS(keep=0.6),
    "transkimmer": lambda: Transkimmer(start=0.0),
    "trbert": lambda: TRBERT(start=0.0),
    "adapler": lambda: AdapLeR(init=1.0),
}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check(family: str, method, backend: str, batches: list[dict], dynamic: bool | None = None) -> None:
    """One graph, and the answers of the model that is not compiled."""
    source = FAMILIES[family]
    model = prune(source.build(), method, layout="padded")
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        for batch in batches:
            expected = source.run(model, batch)
            found = compiled(**batch)
            found = found.logits if "logits" in found else found.last_hidden_state
            assert difference({"output": found}, {"output": expected}) <= 1e-5
            report = model.token_pruner.report
            assert report[-1]["tokens_kept"] < report[0]["tokens_in"]


@pytest.mark.parametrize("family, method", [("bert", "threshold"), ("vit", "topk")])
def test_one_graph(family, method):
    check(family, METHODS[method](), "eager", [FAMILIES[family].batch()])


@pytest.mark.parametrize("options", [{"protect": {"until": [3]}}, {"votes": "protected"}], ids=["query", "class"])
def test_one_graph_where_some_tokens_vote(options):
    batch = FAMILIES["bert"].batch()
    batch["input_ids"][:, 5] = batch["input_ids"][1, 2] = 3
    check("bert", TopK(keep=0.6, at=(0, 1), **options), "eager", [batch])


@pytest.mark.parametrize("at", [(0, 1), (1,), (2,)])
def test_a_row_without_a_token_is_answered_alike_by_other_attention(at, monkeypatch):
    """Runtimes differ in what a query gets that sees nobody: in a graph every query sees somebody."""
    source, method = FAMILIES["bert"], TopK(keep=0.6, at=at)
    batch = source.batch((12, 9, 5))
    batch["attention_mask"][2] = 0
    model = prune(source.build(), method, layout="padded")
    with torch.no_grad():
        expected = source.run(model, batch)
    plain, blind = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def other(module, query, key, value, attention_mask, **kwargs):
        output, weights = plain(module, query, key, value, attention_mask, **kwargs)
        if attention_mask is None:
            return output, weights
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask > float("-inf")
        blind.append(~seen.any(-1)[:, 0])
        return output + 3.0 * blind[-1][..., None, None], weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", other)
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(**batch)
    found = found.logits if "logits" in found else found.last_hidden_state
    assert difference({"output": found}, {"output": expected}) <= 1e-5
    assert blind and not any(rows.any() for rows in blind), (
        "a blank row counts as a row of one token, which sees itself"
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "vit", "dinov2"])
def test_one_graph_of_every_method(family, method):
    check(family, METHODS[method](), "eager", [FAMILIES[family].batch()])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["topk", "threshold"])
def test_one_graph_for_all_shapes(method):
    batches = [FAMILIES["bert"].batch(lengths) for lengths in ((24, 18, 10), (17, 17), (20, 3, 9, 12))]
    check("bert", METHODS[method](), "eager", batches, dynamic=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "family, method", [("bert", "topk"), ("bert", "threshold"), ("vit", "threshold"), ("modernbert", "ltp")]
)
def test_compiled_code(family, method):
    check(family, METHODS[method](), "inductor", [FAMILIES[family].batch(seed=seed) for seed in (1, 30)])


@pytest.mark.slow
def test_packed_rows_give_way_to_padded_ones_while_compiling():
    model = prune(FAMILIES["bert"].build(), TopK(keep=0.6))
    batch = FAMILIES["bert"].batch()
    with torch.no_grad():
        expected = model(**batch).logits
        found = torch.compile(model, fullgraph=True, backend="eager")(**batch).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
