"""What a method sees of a layer: the same numbers as the model's own probabilities, whatever runs the layer."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from support.families import FAMILIES
from thresher import TokenPruner, prune
from thresher.core.attention import key_mask
from thresher.core.pruner import Choice
from thresher.core.scoring import additive
from thresher.core.tokens import LAYOUTS, Masked
from thresher.core.view import Site

SEEN = ("bert", "distilbert", "albert", "mpnet", "deberta-v2", "modernbert", "vit", "whisper-encoder", "llama", "qwen3")
AT = (0, 1, 2)


class Watcher(TokenPruner):
    """Keeps every token (or those in ``leave`` not), and notes what it sees."""

    leave = None

    def choose(self, score, view):
        self.seen = [*getattr(self, "seen", [])[: view.site], self.look(view)]
        if self.leave is None:
            return Choice(view.alive)
        return Choice(~torch.isin(view.tokens.index, torch.tensor(self.leave)))

    @staticmethod
    def look(view):
        """Every quantity with its original positions, since slots differ between layouts."""
        first = view.alive.int().argmax(1)
        last = view.alive.shape[1] - 1 - view.alive.int().flip(1).argmax(1)
        ready = view._shown.inputs is not None
        return {
            "received": view.attention_received(),
            "hidden": view.hidden,
            "first": view.attention_from(first).transpose(1, 2),
            "last": view.attention_from(last).transpose(1, 2),
            "key": view.key.transpose(1, 2) if ready else view.hidden,
            "alive": view.alive,
        }


def watch(family: str, layout: str, batch: dict, leave=None, **options):
    """What the sites of a tiny model saw."""
    model = prune(FAMILIES[family].build(**options), Watcher(at=AT), layout=layout)
    model.token_pruner.leave = leave
    with torch.no_grad():
        FAMILIES[family].answers(model, batch)
    return model.token_pruner.seen


def own_attention(family: str, batch: dict):
    """The probabilities (B, H, N, N) of each layer by the model's own eager code."""
    model = FAMILIES[family].build(attn_implementation="eager")
    if family == "whisper-encoder":
        model = model.get_encoder()
    with torch.no_grad():
        return model(**batch, output_attentions=True).attentions


def mask_of(batch: dict, attentions) -> torch.Tensor:
    mask = batch.get("attention_mask")
    return torch.ones(attentions[0].shape[0], attentions[0].shape[-1]) if mask is None else mask.float()


def layouts(family: str):
    return [e for e in LAYOUTS if FAMILIES[family].packed or e != "packed"]


CASES = [(family, layout) for family in SEEN for layout in layouts(family)]


@pytest.mark.parametrize("family, layout", CASES)
def test_received_is_the_column_mean_of_the_models_own_probabilities(family, layout):
    batch = FAMILIES[family].batch()
    attentions = own_attention(family, batch)
    mask = mask_of(batch, attentions)
    for site, seen in enumerate(watch(family, layout, batch)):
        columns = (attentions[site] * mask[:, None, :, None]).sum(2).mean(1) * mask  # only real rows vote
        torch.testing.assert_close(seen["received"][seen["alive"]], columns[mask.bool()], atol=1e-5, rtol=1e-5)
        assert (seen["received"][~seen["alive"]] == 0).all()


@pytest.mark.parametrize("family, layout", CASES)
def test_received_averages_one(family, layout):
    for seen in watch(family, layout, FAMILIES[family].batch((24, 18, 10, 1)), leave=(3, 4, 8)):
        mean = seen["received"].sum(1) / seen["alive"].sum(1)
        torch.testing.assert_close(mean, torch.ones_like(mean), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family, layout", CASES)
def test_rows_are_the_models_own(family, layout):
    batch = FAMILIES[family].batch()
    attentions = own_attention(family, batch)
    mask = mask_of(batch, attentions)
    last = mask.sum(1).long() - 1
    for site, seen in enumerate(watch(family, layout, batch)):
        for name, row in (("first", torch.zeros_like(last)), ("last", last)):
            expected = attentions[site][torch.arange(len(row)), :, row].transpose(1, 2)[mask.bool()]
            torch.testing.assert_close(seen[name][seen["alive"]], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family, layout", [case for case in CASES if case[1] != "mask"])
def test_a_view_shows_the_same_whatever_the_layout(family, layout):
    """With tokens gone: dead slots and padding neither vote nor show."""
    batch = FAMILIES[family].batch()
    pairs = zip(
        watch(family, layout, batch, leave=(2, 5, 6, 11)),
        watch(family, "mask", batch, leave=(2, 5, 6, 11)),
        strict=True,
    )
    for found, expected in pairs:
        assert torch.equal(found["alive"].sum(1), expected["alive"].sum(1))
        for name in set(found) - {"alive"}:
            a, b = found[name][found["alive"]], expected[name][expected["alive"]]
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_are_the_projections_of_the_layer(layout):
    batch = FAMILIES["bert"].batch((9, 9))
    layer = FAMILIES["bert"].build().bert.encoder.layer[1].attention.self
    seen = watch("bert", layout, batch)[1]
    torch.testing.assert_close(seen["key"].flatten(2), layer.key(seen["hidden"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
def test_scores_do_not_depend_on_how_many_probabilities_fit_at_once(family, monkeypatch):
    batch = FAMILIES[family].batch((10, 10, 10, 6))
    expected = watch(family, "packed", batch)
    monkeypatch.setattr("thresher.core.view.CHUNK", 150)
    for layout in LAYOUTS:
        for found, wanted in zip(watch(family, layout, batch), expected, strict=True):
            torch.testing.assert_close(
                found["received"][found["alive"]], wanted["received"][wanted["alive"]], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
def test_eager_probabilities_and_recomputed_ones_are_the_same(family, layout):
    batch = FAMILIES[family].batch()
    for a, b in zip(
        watch(family, layout, batch, attn_implementation="eager"), watch(family, layout, batch), strict=True
    ):
        torch.testing.assert_close(a["received"], b["received"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [[4, 4], [4, 2], [1, 0]], ids=["full", "ragged", "blank"])
@pytest.mark.parametrize("kind", [bidirectional_mask_function, causal_mask_function])
@pytest.mark.parametrize("skip", [True, False])
def test_the_mask_of_keys_is_that_of_transformers_and_one_row_of_it(rows, kind, skip):
    real = (torch.arange(4) < torch.tensor(rows)[:, None]).long()
    given = {"batch_size": 2, "q_length": 4, "kv_length": 4, "mask_function": kind, "attention_mask": real}
    given |= {"allow_is_bidirectional_skip": skip and kind is bidirectional_mask_function, "allow_is_causal_skip": skip}
    mine, theirs = key_mask(**given), sdpa_mask(**given | {"attention_mask": real.bool()})
    assert (mine is None) == (theirs is None)
    if mine is not None:
        assert torch.equal(mine, theirs)
        assert (mine.stride(-2) == 0) == (kind is bidirectional_mask_function)


def test_a_mask_that_is_traced_is_there_for_batches_with_padding():
    given = {"batch_size": 2, "q_length": 4, "kv_length": 4, "mask_function": bidirectional_mask_function}
    given |= {"allow_is_bidirectional_skip": True}
    with FakeTensorMode():
        assert key_mask(**given, attention_mask=torch.ones(2, 4, dtype=torch.long)).shape == (2, 1, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: key_mask(**given, attention_mask=x), torch.ones(2, 4, dtype=torch.long))
    padded = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert torch.equal(traced(padded), key_mask(**given, attention_mask=padded))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt-oss"])
def test_rows_and_columns_of_a_decoder_that_is_given_no_mask(family, layout):
    """What a token sees ends with itself; soft caps and sinks are in the probabilities."""
    batch = FAMILIES[family].batch((9, 9))
    del batch["attention_mask"]
    attentions = own_attention(family, batch | {"use_cache": False})
    for site, seen in enumerate(watch(family, layout, batch)):
        for name, row in (("first", 0), ("last", 8)):
            torch.testing.assert_close(seen[name], attentions[site][:, :, row].transpose(1, 2), atol=1e-5, rtol=1e-4)
        received = attentions[site].sum(2).mean(1)
        torch.testing.assert_close(seen["received"], received, atol=1e-5, rtol=1e-4)


def test_the_readout_is_the_first_protected_token_else_the_first_live_one():
    tokens = Masked.start(torch.zeros(3, 4, 1), None).drop(
        torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]).bool()
    )
    protected = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert Site(0, 0, tokens, protected, None).view.readout.tolist() == [2, 0, 2]


def test_a_query_that_sees_nobody_has_no_nan():
    bias = additive(torch.tensor([[0.0, float("-inf")], [float("-inf"), float("-inf")]]), 2, False, torch.device("cpu"))
    assert bias.softmax(-1).isfinite().all() and bias[0].softmax(-1).tolist() == [1.0, 0.0]
