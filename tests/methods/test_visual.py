"""Which tokens of a picture the methods keep, against slow code of their definitions."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from support.families import FAMILIES
from support.visual import IMAGE, VISUAL, tiny
from thresher import (
    DART,
    EVS,
    CDPruner,
    DivPrune,
    Grid,
    Pool,
    PyramidDrop,
    Random,
    SparseVLM,
    VisionZip,
    VisPruner,
    prune,
)
from thresher.methods.spatial import blocks, spaced


@torch.no_grad()
def run(method, pictures=(1, 2), family: str = "llava"):
    """The only site of a batch, the states (P, M, C) of its pictures, and what was kept of each, in order."""
    model = prune(copy.deepcopy(tiny(family)), method)
    batch = VISUAL[family].batch(model, pictures)
    entered = []
    model.model.language_model.register_forward_pre_hook(
        lambda m, a, k: entered.append(k["inputs_embeds"]), with_kwargs=True
    )
    model(**batch, use_cache=False)
    (site,) = model.token_pruner.record.sites
    own = [(row, site.pictures[row] == n) for row in range(len(pictures)) for n in range(pictures[row])]
    states = torch.stack([entered[0][row, mask] for row, mask in own])
    return site, states, [site.keep[row, mask].nonzero()[:, 0].tolist() for row, mask in own], entered[0], batch


def test_divprune_takes_the_farthest_one_each_time():
    _, states, kept, *_ = run(DivPrune(keep=6))
    for x, found in zip(F.normalize(states.double(), dim=-1), kept, strict=True):
        far = 1 - x @ x.T
        chosen = [int((far + 9 * torch.eye(len(far))).amin(1).argmax())]
        while len(chosen) < 6:
            nearest = far[:, chosen].amin(1)
            nearest[chosen] = -1
            chosen.append(int(nearest.argmax()))
        assert found == sorted(chosen)


@pytest.mark.parametrize("relevance", [True, False])
def test_cdpruner_makes_the_determinant_largest_each_time(relevance):
    _, states, kept, entered, batch = run(CDPruner(keep=5, relevance=relevance))
    rows = [0, 1, 1]
    for row, x, found in zip(rows, F.normalize(states.double(), dim=-1), kept, strict=True):
        text = (batch["input_ids"][row] != IMAGE) & batch["attention_mask"][row].bool()
        words = F.normalize(entered[row, text].double(), dim=-1)
        r = (x @ words.T).mean(1)
        r = (r - r.min()) / (r.max() - r.min()) if relevance else torch.ones_like(r)
        kernel, chosen = r[:, None] * (x @ x.T) * r, []
        while len(chosen) < 5:
            gains = [
                -1.0 if i in chosen else round(float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]])), 12)
                for i in range(len(x))
            ]
            chosen.append(max(range(len(x)), key=gains.__getitem__))
        assert found == sorted(chosen)


def test_the_text_guides_cdpruner_and_not_divprune():
    kept = {}
    for method in (CDPruner, DivPrune):
        for text in (5, 6):
            pruned = prune(copy.deepcopy(tiny("llava")), method(keep=8))
            batch = VISUAL["llava"].batch(pruned, (1,))
            batch["input_ids"][:, -5:] = torch.arange(5) * text + 6
            with torch.no_grad():
                pruned(**batch, use_cache=False)
            (site,) = pruned.token_pruner.record.sites
            kept[method, text] = site.keep[0, site.pictures[0] >= 0]
    assert torch.equal(kept[DivPrune, 5], kept[DivPrune, 6])
    assert not torch.equal(kept[CDPruner, 5], kept[CDPruner, 6])


def entering(method):
    """The features (N, C) of a picture, the site before the first layer, and the states (1, M, C) that enter that."""
    model, seen = prune(copy.deepcopy(tiny("llava")), method), []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    batch = VISUAL["llava"].batch(model)
    with torch.no_grad():
        features = tiny("llava").model.get_image_features(batch["pixel_values"]).pooler_output[0]
        model(**batch, use_cache=False)
    (site,) = model.token_pruner.record.sites
    return features, site, seen[0]


def test_visionzip_keeps_what_the_tower_sees_and_merges_the_rest():
    """10 tokens are 8 dominant and 2 merged ones."""
    features, site, seen = entering(VisionZip(keep=10))
    own = site.pictures[0] >= 0
    score, keep = site.tower[0, own], site.keep[0, own]
    dominant = sorted(score.topk(8).indices.tolist())
    rest = [i for i in range(36) if i not in dominant]
    targets = rest[:: len(rest) // 2][:2]
    assert keep.nonzero()[:, 0].tolist() == sorted(dominant + targets)
    x, expected = F.normalize(features, dim=-1), features.clone()
    members = {target: [] for target in targets}
    for i in set(rest) - set(targets):
        members[max(targets, key=lambda t: float(x[i] @ x[t]))].append(i)
    for target, came in members.items():
        expected[target] = features[target] + features[came].mean(0)
    places = site.after.index[0]
    torch.testing.assert_close(seen[0][own[places]], expected[keep], atol=1e-5, rtol=1e-5)


def test_pyramiddrop_halves_at_each_quarter():
    model = prune(copy.deepcopy(tiny("llava")), PyramidDrop())
    with torch.no_grad():
        model(**VISUAL["llava"].batch(model), use_cache=False)
    assert [int((site.keep & (site.pictures >= 0)).sum()) for site in model.token_pruner.record.sites] == [18, 9, 5]
    assert model.token_pruner.sites == (0, 1, 2)


@pytest.mark.parametrize("length", [36, 49, 21, 576])
def test_a_grid_covers_the_picture(length):
    side = int(length**0.5)
    for count in range(1, length + 1):
        places = spaced(length, count, side if side * side == length else 3)
        assert len(set(places)) == count and min(places) >= 0 and max(places) < length
    if side * side == length and side % 2 == 0:
        rows = {place // side for place in spaced(length, length // 4, side)}
        columns = {place % side for place in spaced(length, length // 4, side)}
        assert len(rows) == len(columns) == side // 2
    assert len(run(Grid(keep=9))[2][0]) == 9


def test_a_pool_is_the_mean_of_blocks():
    assert [len(list(g)) for _, g in itertools.groupby(blocks(21, 2, 0))] == [6, 5, 5, 5]
    features, site, seen = entering(Pool(side=3))
    visual = site.pictures[0, site.after.index[0]] >= 0
    means = F.adaptive_avg_pool2d(features.T.reshape(1, -1, 6, 6), 3)[0].flatten(1).T
    torch.testing.assert_close(seen[0, visual], means, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_budgets_are_of_each_picture_and_costs_are_counted():
    model = prune(copy.deepcopy(tiny("llava-next")), Random(keep=0.25, at=(-1,)))
    batch = VISUAL["llava-next"].batch(model, (2, 1))
    model(**batch, use_cache=False)
    record = model.token_pruner.record
    (site,) = record.sites
    for row, count in ((0, 2), (1, 1)):
        for picture in range(count):
            own = site.pictures[row] == picture
            assert int((site.keep[row] & own).sum()) == -(-int(own.sum()) // 4)
    live = batch["attention_mask"].sum(1)
    assert torch.equal(record.started, live)
    assert float(record.dense) == sum(float(cost.macs(live, live).sum()) for cost in record.costs)
    assert model.token_pruner.report[0]["tokens_in"] == int(site.keep.sum())
    with_cost = prune(copy.deepcopy(tiny("llava")), DivPrune(keep=4))
    with_cost(**VISUAL["llava"].batch(with_cost), use_cache=False)
    assert int(with_cost.token_pruner.record.counts[0].spent) == 36 * (36 + 4) * 32


@torch.no_grad()
def test_rows_and_columns_are_those_of_the_positions():
    """A picture of 4 x 3 tokens and one of 2 x 5."""
    model = prune(copy.deepcopy(tiny("qwen2-vl")), Grid(keep=2))
    model(**VISUAL["qwen2-vl"].batch(model, (2,)), use_cache=False)
    (site,) = model.token_pruner.record.sites
    kept = [(site.keep[0, site.pictures[0] == n]).nonzero()[:, 0].tolist() for n in range(2)]
    assert kept == [[4, 10], [6, 8]]
    places = site.places[:, 0, site.pictures[0] == 1]
    assert (places - places[:, :1]).T.tolist() == [[0, row, column] for row in range(2) for column in range(5)]


def test_vispruner_takes_duplicates_away():
    site, states, kept, *_ = run(VisPruner(keep=10, step=3))
    for number, (row, picture) in enumerate(((0, 0), (1, 0), (1, 1))):
        score, x = site.tower[row, site.pictures[row] == picture], F.normalize(states[number].double(), dim=-1)
        best = set(score.topk(5).indices.tolist())
        left = [i for i in range(36) if i not in best]
        while len(left) > 5:
            first, second = left[::2], left[1::2]
            like = {i: float((x[i] @ x[second].T).max()) for i in first}
            gone = sorted(first, key=lambda i: -like[i])[: min(3, len(left) - 5)]
            left = [i for i in left if i not in gone]
        assert kept[number] == sorted(best | set(left))


def test_dart_keeps_pivots_and_what_is_least_alike():
    kept = run(DART(keep=12, at=(1,), pivots=2, text_pivots=2))[2]
    assert all(len(found) == 12 for found in kept)
    model = copy.deepcopy(tiny("llava"))
    batch, seen = VISUAL["llava"].batch(model, (1, 2)), {}
    layer = model.model.language_model.layers[1]
    layer.register_forward_pre_hook(lambda m, a: seen.update(hidden=a[0]))
    cache = DynamicCache()  # which holds the keys as they were turned
    with torch.no_grad():
        model(**batch, past_key_values=cache)
    x, row = F.normalize(seen["hidden"].double(), dim=-1), 0
    picture = (batch["input_ids"][row] == IMAGE).nonzero()[:, 0]
    text = ((batch["input_ids"][row] != IMAGE) & batch["attention_mask"][row].bool()).nonzero()[:, 0]
    norm = cache.layers[1].keys[row].square().sum((0, 2))
    pivots = picture[norm[picture].topk(2).indices].tolist()
    chosen = list(pivots)
    for number, pivot in enumerate([*pivots, *text[norm[text].topk(2).indices].tolist()]):
        free = [i for i in picture.tolist() if i not in chosen]
        free.sort(key=lambda i, pivot=pivot: float(x[row, i] @ x[row, pivot]))
        chosen += free[: 10 // 4 + (number < 10 % 4)]
    assert kept[0] == sorted(i - int(picture[0]) for i in chosen)


@torch.no_grad()
def test_sparsevlm_keeps_what_the_raters_look_at():
    """Two pictures in a row, whose raters differ; words before a picture never rate it."""
    site, *_ = run(SparseVLM(keep=9, at=(1,)))
    model, seen = copy.deepcopy(tiny("llava")), {}
    batch, layer = VISUAL["llava"].batch(model, (1, 2)), model.model.language_model.layers[1]
    layer.register_forward_pre_hook(lambda m, a, k: seen.update(k, hidden=a[0]), with_kwargs=True)
    model(**batch, use_cache=False)
    block, x = layer.self_attn, layer.input_layernorm(seen["hidden"])
    query, key = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (block.q_proj, block.k_proj))
    query, key = apply_rotary_pos_emb(query, key, *seen["position_embeddings"])
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5  # (B, H, N, N)
    frequency = 10000.0 ** (-torch.arange(4) / 4)
    places = torch.arange(x.shape[1])
    apart = (places[:, None] - places)[..., None] * frequency
    logits = logits / apart.cos().mean(-1).clamp(min=0.1)
    rated = []
    for row, number in ((0, 0), (1, 0), (1, 1)):
        real = batch["attention_mask"][row].bool()
        own = (site.pictures[row] == number).nonzero()[:, 0]
        words = [i for i in places.tolist() if i > own.max() and site.pictures[row, i] < 0]
        states = seen["hidden"][row].double()
        share = (states[own] @ states[words].T).softmax(1).mean(0)
        raters = [word for word, value in zip(words, share.tolist(), strict=True) if value >= 1 / len(words)]
        rated.append([word - int(own.max()) for word in raters])
        assert 0 < len(raters) < len(words)
        paid = []
        for rater in raters:
            before = real & (places <= rater)
            paid.append(logits[row, :, rater].masked_fill(~before, -torch.inf).softmax(-1)[:, own])
        by_head = torch.stack(paid).mean(0)
        heads = by_head.sum(1).topk(2).indices
        score = by_head[heads].mean(0)
        torch.testing.assert_close(site.score[row, own].float(), score, atol=1e-6, rtol=1e-4)
        assert site.keep[row, own].nonzero()[:, 0].tolist() == sorted(score.topk(9).indices.tolist())
    assert rated[1] != rated[2]


@torch.no_grad()
def test_a_picture_at_the_end_of_a_prompt_is_rated_by_its_last_token():
    model = prune(copy.deepcopy(tiny("llava")), SparseVLM(keep=0.25, at=(1,)))
    batch = VISUAL["llava"].batch(model, (1,), text=0)
    batch = {k: v[:, : int((v[0] == IMAGE).nonzero().max()) + 1] if k == "input_ids" else v for k, v in batch.items()}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    model(**batch, use_cache=False)
    (site,) = model.token_pruner.record.sites
    assert int(site.keep[0, site.pictures[0] >= 0].sum()) == 9
    with pytest.raises(ValueError, match="reads none"):
        prune(FAMILIES["llama"].build(), SparseVLM())


@torch.no_grad()
def test_evs_keeps_what_moves():
    """Of a clip of three frames whose second one repeats the first, the third and the first stay."""
    model = prune(copy.deepcopy(tiny("qwen2-vl-video")), EVS(keep=12))
    batch = VISUAL["qwen2-vl-video"].batch(model)
    frames = batch["pixel_values_videos"].view(3, 24, -1)
    frames[1] = frames[0]
    model(**batch, use_cache=False)
    (site,) = model.token_pruner.record.sites
    kept = site.keep[0, site.pictures[0] >= 0].view(3, 6)
    assert kept[0].all() and not kept[1].any() and kept[2].all()
    for family, message in (("llava", "modality='video'"), ("llava-onevision", "does not say which token")):
        with pytest.raises(ValueError, match=message):
            pruned = prune(copy.deepcopy(tiny(family)), EVS(modality=None if family == "llava" else "image"))
            pruned(**VISUAL[family].batch(pruned), use_cache=False)


@pytest.mark.parametrize("method", [DivPrune, CDPruner, VisionZip, VisPruner, DART, SparseVLM], ids=lambda m: m.name)
@torch.no_grad()
def test_autocast_rounds_no_distances(method):
    """Of equal states the same tokens stay, and merge with the same ones, as without autocast."""
    made = prune(copy.deepcopy(tiny("llava")), method(keep=12))
    pruner, compared = made.token_pruner, []
    decide = pruner.score_and_choose

    def twice(view):
        found = decide(view)
        with torch.autocast("cpu", enabled=False):
            expected = decide(view)
        compared.append((found, expected))
        return found

    pruner.score_and_choose = twice
    with torch.autocast("cpu", torch.bfloat16):
        made(**VISUAL["llava"].batch(made, (1, 2)), use_cache=False)
    ((score, choice), (plain, expected)) = compared[0]
    assert torch.equal(score, plain) and torch.equal(choice.keep, expected.keep)
    if choice.into is not None:
        assert torch.equal(choice.into, expected.into) and torch.equal(choice.weight, expected.weight)
