"""Merging tokens, beside the papers' sums in plain loops."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from support.families import FAMILIES, difference
from thresher import ATS, LTMP, LTP, EViT, ToFu, ToMe, ToP, prune
from thresher.core.tokens import LAYOUTS
from thresher.methods.tome import METRICS, bipartite_matching

VIT, BERT = FAMILIES["vit"], FAMILIES["bert"]


def matched(alike, free: list[int], r: int) -> dict[int, int]:
    """Which token goes into which, by how much ``alike`` (n, n) they are, in two loops."""
    first, second = free[::2], free[1::2]
    best = {i: max(second, key=lambda j: alike[i, j]) for i in first}
    return {i: best[i] for i in sorted(first, key=lambda i: -alike[i, best[i]])[:r]}


def likeness(key, x, metric: str) -> torch.Tensor:
    """(n, n): the cosine of keys (n, d), or how near states (n, C) are."""
    if metric == "states":
        return -torch.cdist(x[None].double(), x[None].double())[0]
    return torch.cosine_similarity(key[:, None], key[None], dim=-1)


def by_hand(model, pixels, rounds, sites, mlerp=(), metric="keys") -> torch.Tensor:
    """(n, C) states behind the last layer of a ViT for one picture, its layers run one by one."""
    base = model.vit
    x = base.embeddings(pixels)[0]
    members = [[i] for i in range(len(x))]
    for number, layer in enumerate(base.layers):
        block, normed = layer.attention, layer.layernorm_before(x)
        query, key, value = (
            p(normed).view(len(x), block.num_attention_heads, -1).transpose(0, 1)
            for p in (block.q_proj, block.k_proj, block.v_proj)
        )
        size = torch.tensor([float(len(m)) for m in members])
        weights = (query @ key.transpose(1, 2) * block.scaling + size.log()).softmax(-1)
        x = x + block.o_proj((weights @ value).transpose(0, 1).flatten(1))
        x = x + layer.mlp(layer.layernorm_after(x))
        near = key.mean(0)
        for count in rounds if number in sites else ():
            into, rows, keys, groups = matched(likeness(near, x, metric), list(range(1, len(x))), count), [], [], []
            size = torch.tensor([float(len(m)) for m in members])
            for j in range(len(x)):
                if j in into:
                    continue
                group = [j, *(i for i in into if into[i] == j)]
                mean = sum(size[i] * x[i] for i in group) / sum(size[i] for i in group)
                if number in mlerp:
                    mean = mean / mean.norm() * max(x[i].norm() for i in group)
                rows.append(mean)
                keys.append(sum(size[i] * near[i] for i in group) / sum(size[i] for i in group))
                groups.append([m for i in group for m in members[i]])
            x, near, members = torch.stack(rows), torch.stack(keys), groups
    out = x.new_zeros(sum(map(len, members)), x.shape[1])
    for row, group in zip(x, members, strict=True):
        out[group] = row
    return base.layernorm(out)


@pytest.mark.parametrize("layout", ["mask", "padded"])
@pytest.mark.parametrize(
    ("method", "mlerp"),
    [
        (ToMe(r=3), ()),
        (ToMe(r=3, rounds=2), ()),
        (ToMe(r=3, metric="states"), ()),
        (ToMe(r=3, metric="states", rounds=2), ()),
        (ToFu(r=3, prunes=0.0), (0, 1, 2)),
    ],
)
def test_merging_is_the_papers(layout, method, mlerp):
    model, pixels = VIT.build(), VIT.batch((1,))["pixel_values"]
    with torch.no_grad():
        wanted = by_hand(model, pixels, (3,) if method.rounds == 1 else (1, 2), (0, 1, 2), mlerp, method.metric)
        prune(model, copy.deepcopy(method), layout=layout)
        found = model.vit(pixels).last_hidden_state[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert len({tuple(row) for row in found.round(decimals=6).tolist()}) == len(found) - 9


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evit_fuses_the_rest_by_the_attention_of_the_class_token(layout):
    model, batch = BERT.build(attn_implementation="eager"), BERT.batch((12,))
    with torch.no_grad():
        given = model.bert(**batch, output_attentions=True, output_hidden_states=True)
        layer, x = model.bert.encoder.layer[1], given.hidden_states[1]
        inner, weights = layer.attention(x)[0][0], given.attentions[1][0].mean(0)[0]
        order = sorted(range(1, 12), key=lambda j: -weights[j].item())
        kept, rest = [0, *order[:5]], order[5:]
        fused = sum(weights[j] * inner[j] for j in rest)
        rows = {j: inner[j] for j in kept} | {rest[0]: fused}
        x = torch.stack([rows[j] for j in sorted(rows)])[None]
        x = layer.output(layer.intermediate(x), x)
        for later in model.bert.encoder.layer[2:]:
            x = later(x)[0] if isinstance(later(x), tuple) else later(x)
        prune(model, EViT(keep=6, at=(1,)), layout=layout)
        found = model.bert(**batch).last_hidden_state[0]
    place = {j: i for i, j in enumerate(sorted(rows))}
    wanted = torch.stack([x[0, place[rest[0] if j in rest else j]] for j in range(12)])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    (view,) = model.token_pruner.record.sites
    assert view.keep.sum() == 7


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["ltp", "top"])
def test_ltp_and_top_fuse_what_leaves_into_its_mean_by_attention(method, layout):
    """By hand, after one site; what the floor of a row keeps stays as it is."""
    model, batch = BERT.build(attn_implementation="eager"), BERT.batch((12,))
    with torch.no_grad():
        given = model.bert(**batch, output_attentions=True, output_hidden_states=True)
        layer, x = model.bert.encoder.layer[1], given.hidden_states[1]
        inner, score = layer.attention(x)[0][0], given.attentions[1][0].mean((0, 1)) * 12
        order = sorted(range(1, 12), key=lambda j: -score[j].item())
        kept, rest = [0, *order[:4]], order[4:]
        fused = sum(score[j] * inner[j] for j in rest) / sum(score[j] for j in rest)
        rows = {j: inner[j] for j in kept} | {rest[0]: fused}
        x = torch.stack([rows[j] for j in sorted(rows)])[None]
        x = layer.output(layer.intermediate(x), x)
        for later in model.bert.encoder.layer[2:]:
            x = later(x)[0] if isinstance(later(x), tuple) else later(x)
        chosen = LTP(at=(1,), fuse=True, min_keep=5) if method == "ltp" else ToP(at=(1,), fuse=True, floor=4)
        prune(model, chosen, layout=layout)
        if method == "ltp":
            chosen.threshold.fill_(99.0)
        else:
            chosen.mask.zero_()
        found = model.bert(**batch).last_hidden_state[0]
    place = {j: i for i, j in enumerate(sorted(rows))}
    wanted = torch.stack([x[0, place[rest[0] if j in rest else j]] for j in range(12)])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert chosen.record.counts[2].n_attention.tolist() == [6]


def test_evit_without_fusing_drops_and_serves_decoders():
    family = FAMILIES["llama"]
    model = prune(family.build(), EViT(keep=0.5, at=(1,), fuse=False))
    with torch.no_grad():
        family.run(model, family.batch((24, 18)))
    assert model.token_pruner.record.counts[2].n_attention.tolist() == [12, 9]


def test_no_more_are_merged_than_the_first_set_holds():
    model = prune(BERT.build(), ToMe(r=0.9, at=(1,)))
    with torch.no_grad():
        BERT.run(model, BERT.batch((24, 9, 2, 1)))
    assert model.token_pruner.record.counts[2].n_attention.tolist() == [12, 5, 2, 1]


def test_matching_is_counted():
    method = ToMe(r=0.25, at=(1,))
    model = prune(BERT.build(), method)
    with torch.no_grad():
        BERT.run(model, BERT.batch((24,)))
    cost, count = model.token_pruner.architecture.costs[1], method.record.counts[1]
    head = method.architecture.hidden // model.config.num_attention_heads
    wanted = cost.macs(24, 18) + 24 * 24 * head / 4
    assert method.report[1]["macs"] == wanted == cost.macs(24, 18, spent=count.spent).item()


@pytest.mark.parametrize("scale", [1e-2, 1.0, 10.0, 100.0, 1e3])
def test_large_states_have_the_partners_of_small_ones(scale):
    """The nearest states, however far these are from each other; and none is as near as another."""
    x = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0))
    nearest = torch.cdist(x.double(), x.double())[:, ::2, 1::2].min(2)
    similarity, partner = (found[:, ::2] for found in bipartite_matching(scale * x, torch.ones(3, 16) > 0, "states"))
    assert partner.tolist() == (2 * nearest.indices + 1).tolist()
    assert similarity.argsort(1).tolist() == nearest.values.argsort(1, descending=True).tolist()
    torch.testing.assert_close(similarity.double(), 1 / (1 + scale**2 * nearest.values**2 / 64), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("metric", METRICS)
def test_autocast_leaves_the_partners_as_they_are(metric):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 384, generator=generator) + 0.5 * torch.randn(4, 64, 384, generator=generator)
    plain = bipartite_matching(x, torch.ones(4, 64) > 0, metric)
    with torch.autocast("cpu", torch.bfloat16):
        found = bipartite_matching(x, torch.ones(4, 64) > 0, metric)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])


@pytest.mark.parametrize("r", [-1, 1.5, True, "many", (0.1, 0.2)])
def test_bad_r_is_named(r):
    with pytest.raises((ValueError, TypeError), match=r"r(=| has)"):
        prune(BERT.build(), ToMe(r=r, at=(0, 1, 2)))


def test_ltmp_merges_what_is_alike_and_drops_what_is_not():
    model, batch = BERT.build(attn_implementation="eager"), BERT.batch((16,))
    method = LTMP(at=(1,), merge_init=0.8, min_keep=1)
    with torch.no_grad():
        given = model.bert(**batch, output_attentions=True, output_hidden_states=True)
        layer, x = model.bert.encoder.layer[1], given.hidden_states[1]
        inner, received = layer.attention(x)[0][0], given.attentions[1][0].mean(0).sum(0)
        key = layer.attention.self.key(x)[0].view(16, 4, -1).transpose(0, 1)
        prune(model, method)
        method.threshold.fill_(0.9)
        model(**batch)
    (view,) = method.record.sites
    into, near = (
        matched(likeness(key.mean(0), None, "keys"), list(range(1, 16)), 8),
        torch.nn.functional.normalize(key.mean(0), dim=-1),
    )
    merged = {i: j for i, j in into.items() if near[i] @ near[j] >= 0.8}
    kept = [j for j in range(16) if j == 0 or (j not in merged and received[j] >= 0.9)]
    assert view.keep[0].nonzero()[:, 0].tolist() == kept
    assert 0 < len(merged) < 8
    assert len(kept) + len(merged) < 16
    states = view.after.take(inner[None])[0]
    for row, j in enumerate(kept):
        group = [j, *(i for i in merged if merged[i] == j)]
        torch.testing.assert_close(states[row], inner[group].mean(0), atol=1e-5, rtol=1e-5)
    sizes = [1 + sum(i == j for i in merged.values()) for j in kept]
    torch.testing.assert_close(view.after.sizes[0], torch.tensor(sizes, dtype=torch.float32))


@pytest.mark.parametrize(
    ("name", "method"), [("whisper-encoder", EViT), ("whisper-encoder", ATS), ("siglip-vision", EViT)]
)
def test_a_named_token_stands_in_for_a_class_token(name, method):
    family, answers = FAMILIES[name], {}
    for layout in LAYOUTS if family.packed else ("mask", "padded"):
        model = prune(family.build(), method(keep=0.6, at=(0, 1), protect=(0,)), layout=layout)
        with torch.no_grad():
            answers[layout] = family.answers(model, family.batch())
        counts = model.token_pruner.record.counts
        assert all((b.n_attention < a.n_attention).all() for a, b in itertools.pairwise(counts[:3]))
    assert max(difference(found, answers["mask"]) for found in answers.values()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merging_takes_other_precisions(dtype):
    model = prune(BERT.build(attn_implementation="eager").to(dtype), ToMe(r=0.3), layout="padded")
    with torch.no_grad():
        assert BERT.run(model, BERT.batch((24, 13))).isfinite().all()


@pytest.mark.parametrize("method", [ToMe(r=0.3), LTMP(init=0.8, merge_init=0.5)], ids=["tome", "ltmp"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "compiled"])
def test_a_row_without_a_token_is_a_row_of_one(layout, method):
    model, batch = BERT.build(), BERT.batch((24, 13, 7))
    batch["attention_mask"][1] = 0
    one = {name: values.clone() for name, values in batch.items()}
    one["attention_mask"][1, 0] = 1
    with torch.no_grad():
        dense = BERT.run(model, one)[1]  # of one token none can leave
        prune(model, copy.deepcopy(method), layout="padded" if layout == "compiled" else layout)
        found = BERT.run(torch.compile(model, backend="eager") if layout == "compiled" else model, batch)
    assert found.isfinite().all() and (found[1] - dense).abs().max() <= 1e-5
