"""What silently goes wrong elsewhere when tokens of pictures leave: here it is right, or refused with its reason."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, DynamicCache

from core.test_pictures import METHODS, QUIET, TOLERANCE, Stripes, made, steps
from support.visual import IMAGE, VISUAL, states, tiny
from thresher import (
    ATS,
    CDPruner,
    DivPrune,
    DynamicViT,
    EViT,
    FastV,
    Pool,
    Random,
    SnapKV,
    ToMe,
    TopK,
    VisionZip,
    dense,
    prune,
    unprune,
)
from thresher.core.architecture import find_architecture

PAGE = Path(__file__).parents[2] / "docs" / "pictures.md"


def striped(family: str, layout: str = "auto", at=(-1, 1)):
    return made(family, Stripes(keep=0.5, at=at), layout)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item() <= TOLERANCE


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "gemma3"])
@torch.no_grad()
def test_a_forward_without_a_mask_is_one_text(family):
    batch = VISUAL[family].batch(tiny(family))
    without = {k: v for k, v in batch.items() if k != "attention_mask"}
    for training in (False, True):
        model = striped(family).train(training)
        assert torch.equal(model(**without, use_cache=False).logits, model(**batch, use_cache=False).logits)


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "qwen3-vl", "paligemma", "gemma3", "voxtral"])
@torch.no_grad()
def test_decoding_by_hand_needs_no_positions(family):
    batch = VISUAL[family].batch(tiny(family))
    model, whole, cache = striped(family), striped(family, "mask"), DynamicCache(config=tiny(family).config)
    model(**batch, past_key_values=cache)
    ids = torch.tensor([[7, 11, 13]])
    for step in range(1, 4):
        longer = VISUAL[family].longer(batch, ids[:, :step])
        given = {"input_ids": ids[:, step - 1 : step]}
        if "qwen" not in family:  # whose own forward places as many tokens as the mask has columns
            given["attention_mask"] = longer["attention_mask"]
        answer = model(**given, past_key_values=cache).logits[:, -1]
        assert close(answer, whole(**longer, use_cache=False).logits[:, -1])


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "gemma3"])
@torch.no_grad()
def test_a_second_turn_goes_on_where_the_first_one_ended(family):
    batch = VISUAL[family].batch(tiny(family))
    model, whole = striped(family), striped(family, "mask")
    first = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True, **QUIET)
    added = torch.cat([first.sequences[:, batch["input_ids"].shape[1] :], torch.tensor([[9, 8, 7]])], 1)
    longer = VISUAL[family].longer(batch, added)
    text = {k: v for k, v in longer.items() if not k.startswith(("pixel", "image", "mm_", "token"))}
    second = model.generate(
        **text, past_key_values=first.past_key_values, max_new_tokens=1, return_dict_in_generate=True,
        output_logits=True, **QUIET,
    )  # fmt: skip
    assert close(second.logits[0], whole(**longer, use_cache=False).logits[:, -1])


@torch.no_grad()
def test_pictures_of_a_later_turn_and_chunks_are_refused():
    batch = VISUAL["llava"].batch(tiny("llava"))
    model = striped("llava")
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**batch, max_new_tokens=2, prefill_chunk_size=8, **QUIET)
    cache = model(input_ids=torch.tensor([[5, 6, 7]])).past_key_values
    with pytest.raises(ValueError, match=r"added to a filled cache \(a later turn, or prefill_chunk_size\) are not"):
        model(**batch | {"attention_mask": None}, past_key_values=cache)
    with dense(model):
        model(**batch | {"attention_mask": None}, past_key_values=cache)


@pytest.mark.parametrize("kind", ["static", "offloaded"])
@torch.no_grad()
def test_caches_that_cannot_be_uneven_are_refused(kind):
    batch, model = VISUAL["llava"].batch(tiny("llava")), striped("llava")
    with pytest.raises(
        ValueError, match="cannot tell which tokens of a picture it holds: generate with a DynamicCache"
    ):
        model.generate(**batch, max_new_tokens=2, cache_implementation=kind, **QUIET)


@torch.no_grad()
def test_a_window_shorter_than_the_prompt_slides_over_places():
    """Layers that keep the last entries would reach further back once some have left."""
    family = VISUAL["gemma3"]
    options = family.options()
    options["text_config"] |= {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    torch.manual_seed(0)
    base = type(tiny("gemma3"))(type(tiny("gemma3").config)(**options, attn_implementation="sdpa")).eval()
    batch = family.batch(base, (2, 1))
    for at in ((-1,), (1,)):
        model, whole = (
            prune(copy.deepcopy(base), Stripes(keep=0.5, at=at), layout=layout) for layout in ("auto", "mask")
        )
        ids, logits = steps(model, batch, 6)
        for step in range(6):
            longer = family.longer(batch, ids[:, :step])
            assert close(logits[:, step], whole(**longer, use_cache=False).logits[:, -1]), step


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen3-vl", "gemma3", "qwen2-audio"])
def test_losses_and_gradients_into_the_tower_agree(family, checkpointing):
    """With a label for every token of text: what is asked for a label does not leave."""
    batch = VISUAL[family].batch(tiny(family), (1, 1), gap=1)
    labels = batch["input_ids"].masked_fill(
        (batch["attention_mask"] == 0) | (batch["input_ids"] == VISUAL[family].token), -100
    )
    answers = []
    for layout in ("padded", "mask"):
        model = striped(family, layout).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        answers.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
        tower = next(m for n, m in model.model.named_children() if n in ("vision_tower", "visual", "audio_tower"))
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in tower.parameters())
        asked = (torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:] != -100) & batch["attention_mask"].bool()
        assert not (asked & ~model.token_pruner.record.left.spread_votes().bool()).any()
    (loss, grads), (expected, others) = answers
    assert close(loss, expected) and len(grads) == len(others)
    assert all(close(a, b) for a, b in zip(grads, others, strict=True))


@pytest.mark.parametrize("name", ["random", "visionzip", "fastv", "pool"])
@torch.no_grad()
def test_beams_see_what_is_left(name):
    """Rows repeat the pictures, and what the tower said of them."""
    batch = VISUAL["llava"].batch(tiny("llava"), (1, 2))
    found = [
        made("llava", METHODS[name](0.3), layout).generate(
            **batch, max_new_tokens=4, num_beams=3, return_dict_in_generate=True, output_scores=True, **QUIET
        )
        for layout in ("auto", "mask")
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert close(found[0].sequences_scores, found[1].sequences_scores)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_a_row_answers_in_a_batch_as_alone(name):
    family = VISUAL["llava"]
    batch = family.batch(tiny("llava"), (1, 3), gap=2)
    together = made("llava", METHODS[name](0.4))(**batch, use_cache=False).logits[:, -1]
    first = 0
    for row, count in enumerate((1, 3)):
        live = batch["attention_mask"][row].bool()
        alone = {"input_ids": batch["input_ids"][row, live][None], "attention_mask": torch.ones(1, int(live.sum()))}
        alone["pixel_values"], first = batch["pixel_values"][first : first + count], first + count
        answer = made("llava", METHODS[name](0.4))(**alone, use_cache=False).logits[0, -1]
        assert close(together[row], answer)


@torch.no_grad()
def test_newlines_tags_and_text_never_leave():
    family = VISUAL["llava-next"]
    batch, model = family.batch(tiny("llava-next")), made("llava-next", Random(keep=1, at=(-1,)))
    model(**batch)
    kept = model.token_pruner.record.left.spread_votes().bool()
    features = tiny("llava-next").model.get_image_features(batch["pixel_values"], batch["image_sizes"]).pooler_output[0]
    ends = (features == tiny("llava-next").model.image_newline).all(-1)
    assert ends.sum() > 1 and kept[batch["input_ids"] == IMAGE][ends].all()
    assert kept[batch["input_ids"] != IMAGE].all() and kept[batch["input_ids"] == IMAGE].sum() == ends.sum() + 1


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_a_prompt_of_text_passes_untouched(name):
    batch = VISUAL["llava"].batch(tiny("llava"), (0, 0), gap=3)
    model = made("llava", METHODS[name](0.2))
    assert torch.equal(model(**batch).logits, tiny("llava")(**batch).logits)
    assert all(row["tokens_kept"] == row["tokens_in"] for row in model.token_pruner.report)
    assert torch.equal(steps(model, batch)[0], steps(tiny("llava"), batch)[0])


@torch.no_grad()
def test_states_in_place_of_ids():
    batch = VISUAL["llava"].batch(tiny("llava"))
    model = made("llava", Random(keep=0.4, at=(-1,)))
    expected = model(**batch).logits
    embedded = {k: v for k, v in batch.items() if k != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])
    assert close(model(**embedded).logits, expected)
    with pytest.raises(ValueError, match="inputs_embeds hold no placeholder of a picture or sound"):
        model(inputs_embeds=torch.randn(1, 9, 32))
    with pytest.raises(RuntimeError, match="called without LlavaModel around it"):
        model.model.language_model(input_ids=batch["input_ids"])


@pytest.mark.parametrize(
    "family, method, message",
    [
        ("llava", lambda: TopK(at=(-1,)), "before layer 0 there is no attention to go by, which topk needs"),
        ("llava", lambda: VisionZip(at=(1,)), r"visionzip acts before .* at=-1; got at=\[1\]"),
        ("llava", lambda: DivPrune(modality="video"), "modality='video': LlavaForConditionalGeneration reads image"),
        ("llava", lambda: DivPrune(modality="smell"), "modality='smell': expected image, video, audio or all"),
        ("llava", ToMe, "a decoder: a merged token"),
        ("llava", lambda: DynamicViT(at=(-1,)), "tokens fade within the layers and not before them; give soft_until=0"),
        ("llava", EViT, "a decoder: a merged token"),
        ("llava", lambda: Pool(side=0), "side=0: expected a number"),
        ("llava", lambda: CDPruner(keep=1.5), r"keep=1.5: expected a share in \(0, 1\] or a whole number"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(family, method, message):
    model = copy.deepcopy(tiny(family))
    with pytest.raises(ValueError, match=message):
        prune(model, method())
    assert not hasattr(model, "token_pruner") and not hasattr(model.config, "token_pruning")


def test_text_models_read_no_pictures():
    llama = copy.deepcopy(tiny("llava").model.language_model)
    for method, message in (
        (DivPrune(), "reads none"),
        (Random(at=(-1,)), "layer -1 is not possible in LlamaModel"),
        (TopK(modality="image"), "reads text alone"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(llama, method)
    with pytest.raises(ValueError, match="layout='packed' is not possible"):
        made("llava", DivPrune(), "packed")
    with pytest.raises(ValueError, match="'flex_attention', which reads positions with gaps as several texts"):
        prune(VISUAL["llava"].build(attn_implementation={"text_config": "flex_attention"}), DivPrune())


def test_a_language_model_is_a_decoder_whatever_its_attention_says():
    assert all(find_architecture(tiny(family)).causal for family in VISUAL)
    assert find_architecture(tiny("paligemma")).base is tiny("paligemma").model.language_model


@torch.no_grad()
def test_what_is_taken_off_leaves_no_trace():
    batch = VISUAL["llava"].batch(tiny("llava"))
    model = made("llava", VisionZip(keep=4))
    before = states(model, batch)
    copied = copy.deepcopy(model)
    unprune(model)
    assert torch.equal(states(model, batch), states(tiny("llava"), batch))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny("llava").modules()]
    assert "get_image_features" not in vars(model.model)
    assert torch.equal(states(copied, batch), before)


@torch.no_grad()
def test_what_is_saved_comes_back(tmp_path):
    batch, model = VISUAL["llava"].batch(tiny("llava")), made("llava", DivPrune(keep=3, modality="image"))
    expected = states(model, batch)
    model.save_pretrained(tmp_path)
    again = prune(AutoModelForImageTextToText.from_pretrained(tmp_path).eval())
    assert isinstance(again.token_pruner, DivPrune) and again.token_pruner.modality == "image"
    assert torch.equal(states(again, batch), expected)


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "paligemma", "gemma3", "voxtral"])
@torch.no_grad()
def test_a_cache_method_alone_serves_a_model_that_reads_pictures(family):
    batch = VISUAL[family].batch(tiny(family), (1, 2))
    answers = [
        steps(made(family, SnapKV(keep=keep, sinks=2, recent=4), layout), batch)[1]
        for keep, layout in ((1.0, "auto"), (0.4, "auto"), (0.4, "mask"))
    ]
    assert close(answers[0], steps(tiny(family), batch)[1]) and close(answers[1], answers[2])
    assert not close(answers[0], answers[1])


@torch.no_grad()
def test_a_cache_method_works_on_what_is_left():
    batch = VISUAL["llava"].batch(tiny("llava"), (1, 2))
    methods = Stripes(keep=0.5, at=(-1,)), SnapKV(keep=0.5, sinks=2, recent=4)
    model = prune(copy.deepcopy(tiny("llava")), methods[0], cache=methods[1])
    found = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True, **QUIET)
    held = found.past_key_values.layers[0].keys.shape[-2]
    assert held < 0.4 * batch["input_ids"].shape[1]
    whole = prune(copy.deepcopy(tiny("llava")), Stripes(keep=0.5, at=(-1,)), cache=SnapKV(keep=1.0, sinks=2, recent=4))
    assert torch.equal(steps(whole, batch)[0], steps(striped("llava", at=(-1,)), batch)[0])


@torch.no_grad()
def test_scores_of_the_last_row_are_those_of_the_last_token():
    """FastV against the probabilities of eager attention, in rows that are padded on either side."""
    model = VISUAL["llava"].build(attn_implementation="eager")
    batch = VISUAL["llava"].batch(model, (1, 2))
    weights = model(**batch, output_attentions=True, use_cache=False).attentions[1].mean(1)[:, -1]
    prune(model, FastV(keep=5))
    model(**batch, use_cache=False)
    (site,) = model.token_pruner.record.sites
    assert close(site.score, weights.masked_fill(batch["attention_mask"] == 0, 0.0))
    for row in range(2):
        for picture in range(int(site.pictures[row].max()) + 1):
            own = (site.pictures[row] == picture).nonzero()[:, 0]
            best = own[site.score[row, own].topk(5).indices].sort().values
            assert (site.keep[row] & (site.pictures[row] == picture)).nonzero()[:, 0].tolist() == best.tolist()


@torch.no_grad()
def test_methods_that_sample_take_a_share_of_the_pictures():
    batch = VISUAL["llava"].batch(tiny("llava"))
    model = made("llava", ATS(keep=0.2, at=(1,), protect=(-1,)))
    model(**batch, use_cache=False)
    (site,) = model.token_pruner.record.sites
    kept = site.keep & (site.pictures >= 0)
    assert 1 <= kept.sum() <= 8


def test_the_lines_of_the_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny("llava").save_pretrained("my-vlm")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    scope: dict = {}
    exec(code, scope)
    report = ast.literal_eval(capsys.readouterr().out)
    assert report["pictures"] == [[36]] and report["kept"] == [[4]] and report["by_layer"] == [4, 4, 4, 4]
    assert report["mean"] == 4.0 and report["cache_fraction"] == pytest.approx(8 / 40)
    assert scope["answer"].shape == scope["reference"].shape
