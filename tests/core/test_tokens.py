"""The three layouts hold the same tokens: whatever is dropped, they put back the same (B, N0, C)."""

from __future__ import annotations

import copy
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.families import FAMILIES
from thresher import LTP, TopK, prune
from thresher.core.tokens import LAYOUTS, ByLength, Masked, Packed, Padded, take

LOWEST = torch.finfo(torch.float32).min
# Packed rows cut their masks in the attention function, one sequence at a time: test_equivalence.py.
shaped = pytest.mark.parametrize("layout", [Masked, Padded])


@st.composite
def histories(draw):
    """(mask (B, N0), drops: for each step a bool (B, N0) of the tokens that may stay)."""
    batch, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    bits = st.integers(0, 2 ** (batch * width) - 1)

    def grid(number):
        return torch.tensor([bool(number >> i & 1) for i in range(batch * width)]).view(batch, width)

    mask = draw(st.none() | bits)
    return None if mask is None else grid(mask), [grid(n) for n in draw(st.lists(bits, max_size=4))], (batch, width)


def live(tokens) -> list[set[int]]:
    return [set(index[alive].tolist()) for index, alive in zip(tokens.index, tokens.alive, strict=True)]


def play(layout, hidden, mask, drops):
    """Run a history as a model would, every step changing all states; returns tokens, their states, those put back."""
    tokens = layout.start(hidden, mask)
    x = tokens.enter(hidden)
    for stay in drops:
        keep = stay.gather(1, tokens.index) & tokens.alive
        keep = torch.where(keep.any(1, keepdim=True), keep, tokens.alive)  # no row may become empty
        after = tokens.drop(keep)
        if after is not tokens:
            after.leave(tokens, x)
            x = after.take(x)
        tokens, x = after, x * 1.25 + 1
    return tokens, x, tokens.restore(x)


def real(mask, batch, width):
    """Tokens whose states mean something; a row without any counts as a row of its first."""
    if mask is None:
        return torch.ones(batch, width, dtype=torch.bool)
    alone = (torch.arange(width) == 0) & ~mask.any(1, keepdim=True)
    return mask | alone


@given(histories())
def test_layouts_put_back_the_same(history):
    mask, drops, shape = history
    hidden = torch.randn(*shape, 3)
    tokens, _, expected = play(Masked, hidden, mask, drops)
    for layout in (Padded, Packed):
        other, _, found = play(layout, hidden, mask, drops)
        assert live(other) == live(tokens)
        assert torch.equal(found[real(mask, *shape)], expected[real(mask, *shape)])
        assert found.shape == hidden.shape


@given(histories())
def test_layouts_follow_the_sets_that_were_kept(history):
    mask, drops, shape = history
    alive = real(mask, *shape)
    for stay in drops:
        alive = torch.where((stay & alive).any(1, keepdim=True), stay & alive, alive)
    for layout in LAYOUTS.values():
        tokens, _, _ = play(layout, torch.randn(*shape, 1), mask, drops)
        assert live(tokens) == [set(row.nonzero()[:, 0].tolist()) for row in alive]
        assert tokens.live.tolist() == alive.sum(1).tolist()


@given(histories())
def test_every_slot_knows_its_original_place(history):
    mask, drops, (batch, width) = history
    places = torch.arange(batch * width, dtype=torch.float32).view(batch, width, 1)
    for layout in LAYOUTS.values():
        tokens = layout.start(places, mask)
        x = tokens.enter(places)
        for stay in drops:
            keep = stay.gather(1, tokens.index) & tokens.alive
            after = tokens.drop(torch.where(keep.any(1, keepdim=True), keep, tokens.alive))
            x, tokens = after.take(x) if after is not tokens else x, after
            slots = tokens.pad(x)[..., 0].long()
            assert torch.equal((slots % width)[tokens.alive], tokens.index[tokens.alive])
            assert torch.equal((slots // width)[tokens.alive], tokens.alive.nonzero()[:, 0])
            assert all((row[alive].diff() > 0).all() for row, alive in zip(tokens.index, tokens.alive, strict=True))


@given(histories())
def test_nothing_dropped_is_the_identity(history):
    mask, _, shape = history
    hidden = torch.randn(*shape, 2)
    for layout in LAYOUTS.values():
        tokens = layout.start(hidden, mask)
        assert torch.equal(tokens.restore(tokens.enter(hidden)), hidden)
        assert tokens.drop(tokens.alive) is tokens


@given(histories())
def test_narrowing_an_argument_is_taking_along(history):
    """What is cut from the original at once equals what is cut step by step."""
    mask, drops, (batch, width) = history
    for layout in LAYOUTS.values():
        for rows in (1, batch):  # position embeddings may be the same for all rows
            whole = torch.randn(rows, width, 2)
            tokens, x = layout.start(whole.expand(batch, -1, -1), mask), None
            x = tokens.enter(whole.expand(batch, -1, -1))
            for stay in drops:
                keep = stay.gather(1, tokens.index) & tokens.alive
                after = tokens.drop(torch.where(keep.any(1, keepdim=True), keep, tokens.alive))
                x, tokens = after.take(x) if after is not tokens else x, after
            found = tokens.pad(tokens.narrow(whole, (1,)).expand(x.shape[0], -1, -1))
            assert torch.equal(found[tokens.alive], tokens.pad(x)[tokens.alive])
            assert torch.equal(tokens.narrow(whole.mT, (-1,)).mT, tokens.narrow(whole, (-2,)))


@given(histories())
def test_gradients_are_counted_once(history):
    """A token that lived through s steps has the slope 1.25^s, whoever shares its row."""
    mask, drops, shape = history
    found = {}
    for name, layout in LAYOUTS.items():
        hidden = torch.zeros(*shape, 1, dtype=torch.float64, requires_grad=True)
        restored = play(layout, hidden, mask, drops)[2]
        restored[real(mask, *shape)].sum().backward()
        found[name] = hidden.grad[real(mask, *shape)]
        slope = (restored.detach() + 4) / 4  # x -> 1.25 x + 1 from 0 gives 4 (1.25^s - 1)
        torch.testing.assert_close(found[name], slope[real(mask, *shape)])
    assert torch.equal(found["mask"], found["padded"]) and torch.equal(found["mask"], found["packed"])


@pytest.mark.parametrize("wide", [False, True], ids=["same for all queries", "one row per query"])
@shaped
def test_masks_of_every_kind_hide_the_same(layout, wide):
    alive = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
    tokens = layout.start(torch.randn(2, 5, 1), alive)
    tokens = tokens.drop(torch.tensor([1, 0, 1, 1, 0]).bool() & alive)
    assert tokens.index[tokens.alive].tolist() == [0, 2, 3, 0, 2]
    boolean = alive[:, None, None].expand(2, 1, 5, 5).clone() if wide else alive[:, None, None]
    bias = torch.zeros(boolean.shape).masked_fill(~boolean, LOWEST)
    kinds = {
        "bool": tokens.mask(boolean, torch.float32, False, False),
        "0/1": tokens.mask(boolean.long(), torch.float32, False, False).bool(),
        "additive": tokens.mask(bias, torch.float32, False, True) == 0,
    }
    for name, mask in kinds.items():
        for row in range(2):
            queries = mask[row, 0][tokens.alive[row]] if wide else mask[row, 0]
            assert torch.equal(queries, tokens.alive[row].expand_as(queries)), name
        assert not wide or mask.any(-1).all(), "a query that sees nobody is not a number"


@shaped
def test_no_mask_means_causal_in_decoders_alone(layout):
    tokens = layout.start(torch.randn(1, 4, 1), None).drop(torch.tensor([[True, False, True, True]]))
    position, alive = tokens.index[0], tokens.alive[0]
    everyone = tokens.mask(None, torch.float32, causal=False, additive=False, needed=True)
    assert torch.equal(everyone[0, 0, 0], alive)
    causal = tokens.mask(None, torch.float32, causal=True, additive=False, needed=True)[0, 0]
    assert torch.equal(causal[alive], (position[:, None] >= position)[alive] & alive)
    unneeded = tokens.mask(None, torch.float32, causal=False, additive=False)
    assert (unneeded is None) == alive.all(), "no mask where every slot is alive: then none says the same"
    bias = tokens.mask(None, torch.float32, causal=True, additive=True, needed=True)[0, 0]
    assert torch.equal(bias, torch.zeros(causal.shape).masked_fill(~causal, LOWEST))


@shaped
def test_gates_enter_as_their_logarithm(layout):
    gates = torch.tensor([[1.0, 0.5, 0.0, 0.25]])
    tokens = layout.start(torch.randn(1, 4, 1), None).gate(gates.log().clamp(min=-100))
    assert tokens.live.item() == pytest.approx(1.75)
    bias = tokens.mask(None, torch.float32, causal=False, additive=False)
    torch.testing.assert_close(bias.softmax(-1)[0, 0, 0], gates[0] / 1.75)
    again = tokens.gate(gates.log().clamp(min=-100))
    torch.testing.assert_close(again.votes, gates**2)


def test_gathering_broadcasts_the_first_dimension():
    x, index = torch.arange(12.0).view(1, 3, 4), torch.tensor([[0, 2], [1, 1]])
    assert torch.equal(take(x, index, 1), x[0][index])
    assert torch.equal(take(x, index, -1), x[0].T[index].mT)


@torch.no_grad()
def test_what_a_site_shows_is_not_written_over():
    """Packed rows of equal lengths start as the states themselves; putting tokens back writes into a copy."""
    shown: list[torch.Tensor] = []

    class Looks(TopK):
        def score(self, view):
            shown.append(view._shown.hidden)
            shown.append(view._shown.hidden.clone())
            return super().score(view)

    model = prune(FAMILIES["bert"].build(), Looks(keep=0.5, at=(0, 1, 2)), layout="packed")
    model(**FAMILIES["bert"].batch((12, 12, 12)))
    assert len(shown) == 6 and all(torch.equal(a, b) for a, b in zip(shown[::2], shown[1::2], strict=True))


def test_by_length_puts_equal_ones_together_and_back():
    lengths = [3, 1, 3, 1, 2, 3, 1, 3]
    order = ByLength.of(lengths, torch.device("cpu"))
    assert order.lengths == sorted(lengths)
    row = torch.arange(sum(lengths) + 2.0)  # two spare ones behind
    states = order.sort(row[None, None, :, None])
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    begins = [0, *accumulate(order.lengths)]
    for i, length in enumerate(order.lengths):  # each run is one sequence, in its own order
        rows = states[0, 0, begins[i] : begins[i] + length, 0]
        assert (rows.diff() == 1).all() and len({*owner[rows.long()].tolist()}) == 1
    back = order.restore(torch.cat([states[0, 0, :, 0], row[-2:]]))
    assert torch.equal(back, row)
    assert ByLength.of([3, 2, 2, 1], torch.device("cpu")).rows is None


@pytest.mark.parametrize("method", (TopK(keep=0.6), TopK(keep=0.6, at=(0, 1, 2)), LTP(init=0.9)))
@pytest.mark.parametrize("family", ("bert", "modernbert"))
def test_equal_lengths_apart_answer_as_padded(family, method):
    family = FAMILIES[family]
    batch = family.batch(lengths=(24, 10, 18, 24, 10, 18, 24, 10, 18, 10))
    found = {}
    for layout in ("mask", "packed"):
        model = prune(family.build(), copy.deepcopy(method), layout=layout)
        with torch.no_grad():
            found[layout] = family.answers(model, batch)
        if layout == "packed" and isinstance(method, TopK):
            assert model.token_pruner.record.left.by_length.rows is not None
    for name, states in found["mask"].items():
        assert (states - found["packed"][name]).abs().max() <= 1e-5
