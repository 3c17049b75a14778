"""What a tower attends to, as a score of each token of the prompt."""

from __future__ import annotations

import copy

import pytest
import torch

from support.visual import VISUAL, states, tiny
from thresher import VisionZip, prune
from thresher.core import compat
from thresher.core.architecture import find_layers
from thresher.core.pictures import Prompt, find_reader, placeholders
from thresher.core.tower import PREFIX, Watch

OUT = ("out_proj", "o_proj", "projection_layer", "proj")  # of an attention module
SOUNDS = ("qwen2-audio", "voxtral")


def watched(family: str):
    model = copy.deepcopy(tiny(family))
    reader, language = find_reader(model)
    watch = Watch(reader, language)
    watch.attach()
    return model, reader, watch


@pytest.mark.parametrize("family", [name for name in VISUAL if name not in SOUNDS])
@torch.no_grad()
def test_scores_go_where_their_patches_go(family):
    """In a tower whose tokens do not mix, a changed patch changes the tokens that get its score, and no others. Patches
    are followed to the first layer of the tower, in the order in which that has them."""
    _, reader, watch = watched(family)
    for module in watch.towers[0].modules():
        if compat.calls_attention_interface(module):
            (out,) = (m for n, m in module.named_children() if n in OUT)
            for parameter in out.parameters():
                parameter.zero_()
    given = VISUAL[family].pixels(2, torch.Generator().manual_seed(0))
    name = next(key for key in given if key.startswith("pixel"))
    get = getattr(reader, f"get_{VISUAL[family].kind}_features")
    entered, prefix = [], watch.watched[0][1]
    layers = find_layers(watch.towers[0])[1]
    layers[0].register_forward_pre_hook(lambda m, a, k: entered.append((a or tuple(k.values()))[0]), with_kwargs=True)

    def run(x):
        entered.clear()
        features = get(**given | {name: x}).pooler_output
        parts = features if isinstance(features, (list, tuple)) else [features]
        patches = entered[0][:, prefix:] if entered[0].dim() == 3 else entered[0][None]
        return torch.cat([part.flatten(0, -2) for part in parts]), patches

    before, was = run(given[name])
    generator, seen = torch.Generator().manual_seed(1), set()
    for _ in range(12):
        x = given[name].clone()
        if x.dim() == 2:  # a row is a patch
            x[torch.randint(len(x), (1,), generator=generator)] += 3.0
        else:
            flat = x.view(-1, *x.shape[-3:])
            row, column = 4 * torch.randint(x.shape[-1] // 4, (2,), generator=generator)
            flat[torch.randint(len(flat), (1,), generator=generator), :, row : row + 4, column : column + 4] += 3.0
        after, patches = run(x)
        gap = (after - before).norm(dim=-1)
        change = (patches - was).norm(dim=-1)
        last = watch.runs[-1]
        if last.packed is not None:  # the packing of what was scored, anew of what is known
            last.packed, shape = None, last.scores[0].shape
            last.scores = [change.view(-1, shape[-1])]
            features = [torch.empty(n, shape[-1], 1) for n in tiles(reader, given)]
            more = {"vision_feature_select_strategy": "default"} if family == "llava-next" else {}
            watch.pack(features, (given["image_sizes"],), {"image_newline": reader.image_newline, **more})
        else:
            last.scores = [change.view(-1, change.shape[-1])]
        scores = last.of_tokens(0)
        assert len(scores) == len(before)
        assert torch.equal(scores > 0, gap > 0)
        seen.add(int(scores.argmax()))
    assert len(seen) >= 4


def tiles(reader, given) -> list[int]:
    """How many tiles each picture has, as the pictures of these tests have them."""
    return [3] * len(given["image_sizes"])


@pytest.mark.parametrize("family", ["llava", "paligemma"])
@torch.no_grad()
def test_scores_are_the_attention_of_the_class_token_or_of_all(family):
    model, reader, watch = watched(family)
    batch = VISUAL[family].batch(model, (1, 2))
    model(**batch)
    scores = watch.scores(Prompt(reader, batch), placeholders(reader.config))
    eager = VISUAL[family].build(attn_implementation="eager").model.vision_tower
    weights = eager(batch["pixel_values"], output_attentions=True).attentions[-2].mean(1)
    expected = weights[:, 0, 1:] if VISUAL[family].tower_cls else weights.sum(1)
    found = scores[batch["input_ids"] == VISUAL[family].token].view_as(expected)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (scores[batch["input_ids"] != VISUAL[family].token] == 0).all()


@torch.no_grad()
def test_a_tower_is_watched_alone_and_left_as_it_was():
    model, _, watch = watched("llava")
    tower, language = model.model.vision_tower, model.model.language_model
    assert tower.config._attn_implementation == f"{PREFIX}sdpa" and language.config._attn_implementation == "sdpa"
    watch.detach()
    assert tower.config._attn_implementation == "sdpa"
    batch = VISUAL["llava"].batch(model)
    assert torch.equal(states(model, batch), states(tiny("llava"), batch))


@torch.no_grad()
def test_what_the_tower_never_saw_is_refused():
    batch = VISUAL["llava"].batch(tiny("llava"))
    model = prune(copy.deepcopy(tiny("llava")), VisionZip(keep=4))
    features = {"image": tiny("llava").model.get_image_features(batch.pop("pixel_values"))}
    with pytest.raises(ValueError, match="the tower did not run: give the model the pictures"):
        model(**batch, mm_encoder_outputs=features)
    with pytest.raises(ValueError, match="runs 'flex_attention', which shows no scores"):
        prune(VISUAL["llava"].build(attn_implementation={"vision_config": "flex_attention"}), VisionZip())


@torch.no_grad()
def test_a_forward_that_failed_leaves_nothing_to_the_next_one():
    batch = VISUAL["llava"].batch(tiny("llava"), (1, 1))
    model = prune(copy.deepcopy(tiny("llava")), VisionZip(keep=4))
    expected = states(model, batch)
    with pytest.raises(ValueError, match="do not match"):
        model(**batch | {"pixel_values": batch["pixel_values"][:1]})
    assert torch.equal(states(model, batch), expected)
