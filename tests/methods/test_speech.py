"""A-ToMe merges neighbours, and Silence, before the first layer of an encoder, what nobody says."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.families import FAMILIES, difference
from thresher import AToMe, Random, Silence, prune
from thresher.experiments.describe import describe

WHISPER = FAMILIES["whisper-encoder"]
QUIET, LOUD = -1.5, 0.5  # of a spectrogram: 80 decibels apart


def spectrum(*heard: slice) -> torch.Tensor:
    """(B, 80, 60) of 30 tokens: loud where something is heard."""
    x = torch.full((len(heard), 80, 60), QUIET)
    for row, one in zip(x, heard, strict=True):
        row[:, one] = LOUD
    return x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(method, features, layout="padded"):
    model = prune(WHISPER.build(), method, layout=layout)
    return model(input_features=features).logits, model.token_pruner.record


@pytest.mark.parametrize("group", [2, 4, None])
def test_silence_becomes_few_tokens_of_its_window_alone(group):
    features = spectrum(slice(20, 40), slice(0, 8))
    _, record = run(Silence(margin=1, group=group), features)
    left = record.left.spread_votes()
    silent = torch.ones(2, 30, dtype=torch.bool)
    silent[0, 9:21], silent[1, :5] = False, False  # tokens 10 to 19 and 0 to 3 are heard, and one more on either side
    assert torch.equal(left.bool() & ~silent, ~silent)
    expected = [0, 0] if group is None else [-(-9 // group) * 2, -(-25 // group)]
    assert (left * silent).sum(1).tolist() == expected
    if group is not None:
        home = record.left.home
        assert (home[~silent] == torch.arange(30).expand(2, 30)[~silent]).all()
        assert ((torch.arange(30) - home).masked_fill(~silent, 0) < group).all()


def test_a_window_does_not_depend_on_its_neighbours():
    features = spectrum(slice(20, 40), slice(0, 8), slice(0, 60))
    together, _ = run(Silence(margin=1, group=4, r=0.2), features)
    alone = torch.cat([run(Silence(margin=1, group=4, r=0.2), one[None])[0] for one in features])
    assert difference({"logits": together}, {"logits": alone}) <= 1e-5


def test_without_silence_nothing_changes():
    features = spectrum(slice(0, 60))
    with torch.no_grad():
        expected = WHISPER.build()(input_features=features).logits
    assert torch.equal(run(Silence(), features)[0], expected)


@pytest.mark.parametrize("method", [Silence(margin=1, group=4, r=0.1), Silence(margin=1, group=None), AToMe(r=0.2)])
def test_what_is_gone_is_as_what_is_hidden_also_for_the_decoder(method):
    features, ids = spectrum(slice(20, 40), slice(0, 8)), torch.tensor([[1, 5, 7], [1, 8, 9]])
    answers = []
    for layout in ("mask", "padded"):
        model = replace(WHISPER, model="WhisperForConditionalGeneration").build()
        prune(model, copy.deepcopy(method), layout=layout)
        with torch.no_grad():
            answers.append(model(input_features=features, decoder_input_ids=ids).logits)
    assert (answers[0] - answers[1]).abs().max() <= 1e-5
    assert model.token_pruner.record.flops_fraction() < 1


@pytest.mark.parametrize("threshold, merges", [(-1.0, True), (1.0, False)])
def test_neighbours_are_merged_down_to_a_likeness(threshold, merges):
    _, record = run(AToMe(r=0.5, threshold=threshold), spectrum(slice(0, 60)))
    home = record.left.home
    assert (home is not None) == merges
    if merges:
        assert (home.diff(dim=1) != 0).sum(1).tolist() == (record.left.live - 1).tolist(), "runs of neighbours"
        assert record.left.live.tolist() == [4]  # 30, 15 pairs; 15, 7; 8, 4


@pytest.mark.parametrize("family", ["vit", "whisper-encoder"])
def test_tokens_leave_before_the_first_layer_of_an_encoder(family):
    answers = []
    for layout in ("mask", "padded"):
        model = prune(FAMILIES[family].build(), Random(keep=0.5, at=(-1, 1)), layout=layout)
        with torch.no_grad():
            answers.append(FAMILIES[family].answers(model, FAMILIES[family].batch()))
    assert difference(*answers) <= 1e-5
    entered = model.token_pruner.report[0]["tokens_in"]
    assert entered < model.token_pruner.record.started.sum()


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Silence(below=0), "decibels above 0"),
        (lambda: Silence(margin=-1), "from 0 up"),
        (lambda: Silence(group=1), "from 2 up"),
        (lambda: AToMe(threshold=2.0), "a cosine in"),
        (lambda: AToMe(metric="states"), "compares keys"),
        (lambda: prune(WHISPER.build(), Silence(at=(0, 1))), "before the first layer"),
        (lambda: prune(FAMILIES["vit"].build(), Silence()), "encoder of Whisper's kind"),
        (lambda: prune(FAMILIES["bert"].build(), Random(at=(-1,))), "layer -1 is not possible"),
        (lambda: prune(FAMILIES["vit"].build(), AToMe(at=(-1, 0))), "there is no attention to go by"),
    ],
)
def test_what_cannot_be_is_said(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_saved_model_is_what_it_was_and_says_so(tmp_path):
    model, features = prune(WHISPER.build(), Silence(margin=1, group=4, r=0.1)), spectrum(slice(20, 40))
    model.save_pretrained(tmp_path)
    again = prune(type(model).from_pretrained(tmp_path).eval())
    with torch.no_grad():
        assert torch.equal(again(input_features=features).logits, model(input_features=features).logits)
    told = describe(str(tmp_path))
    assert told["sites"] == [-1, 0, 1, 2] and told["pruning"]["method"] == "silence"


def test_the_page_about_speech_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "vision.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall("```python\n(.*?)```", page, re.DOTALL) if "my-whisper" in block)
    monkeypatch.chdir(tmp_path)
    options = WHISPER.options | {"max_source_positions": 1500}
    model = replace(WHISPER, model="WhisperForConditionalGeneration", options=options).build()
    model.generation_config.no_timestamps_token_id = 90
    model.save_pretrained("my-whisper")
    exec(code, {"torch": torch})
