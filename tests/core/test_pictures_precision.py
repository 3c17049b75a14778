"""Pictures that are pruned in language models of bf16, and of int8 weights and activations."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from support.visual import AUDIO, END, IMAGE, START, VIDEO, VISUAL, states, tiny
from thresher import CDPruner, DivPrune, FastV, SparseVLM, VisionZip, prune

FAMILIES = ("llava", "qwen2.5-vl", "smolvlm")
METHODS = [DivPrune, CDPruner, VisionZip, FastV, SparseVLM]
QUIET = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO, AUDIO, START, END]}


def bf16(family: str):
    return copy.deepcopy(tiny(family)).bfloat16()


def int8(family: str):
    """The language model's linear maps in int8, activations with a scale of each call."""
    model = copy.deepcopy(tiny(family))
    name = next(n for n in ("language_model", "text_model") if hasattr(model.model, n))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch points to torchao, a library of its own
        quantized = torch.ao.quantization.quantize_dynamic(getattr(model.model, name), {nn.Linear}, dtype=torch.qint8)
    setattr(model.model, name, quantized)
    return model


def pruned(make, family: str, method, layout: str = "auto"):
    """A model of that precision, pruned; of int8 it is said that its rounding hides whether it was pruned rightly."""
    if make is bf16:
        return prune(make(family), method, layout=layout)
    with pytest.warns(UserWarning, match="pruned without a trial: its weights are quantised"):
        return prune(make(family), method, layout=layout)


def asked(family: str, model, pictures=(2, 2), gap: int = 2) -> dict:
    batch = VISUAL[family].batch(tiny(family), pictures, gap=gap)
    return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("make", [bf16, int8], ids=["bf16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_all_kept_is_dense_and_dropped_is_hidden_as_far_as_the_precision_goes(family, make, method):
    """Dropped and hidden differ by rounding, as the precision does from fp32: the scale of an int8 activation is that
    of all tokens of a call, so that it changes where some are gone."""
    batch = asked(family, make(family)) if make is bf16 else asked(family, make(family), (2,), 0)  # padding counts, too
    dense = states(make(family), batch)
    assert torch.equal(states(pruned(make, family, method(keep=1.0)), batch), dense)
    dropped, hidden = (pruned(make, family, method(keep=0.5), layout) for layout in ("auto", "mask"))
    answer, reference = states(dropped, batch), states(hidden, batch)
    first, other = (model.token_pruner.record.sites[0] for model in (dropped, hidden))
    if method in (DivPrune, CDPruner, VisionZip):  # of the same states the same tokens stay
        assert torch.equal(first.keep, other.keep)
        whole = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
        rounding = (dense.float() - states(tiny(family), whole)).abs().max()
        assert (answer.float() - reference.float()).abs().max() <= 2 * rounding
    assert answer.isfinite().all() and (answer != dense).any()
    assert torch.equal(first.keep.sum(1), other.keep.sum(1))


@pytest.mark.parametrize("make", [bf16, int8], ids=["bf16", "int8"])
@torch.no_grad()
def test_generate_goes_on_from_what_is_left(make):
    model = pruned(make, "llava", DivPrune(keep=9))
    batch = asked("llava", model, (1,), 0)
    found = model.generate(**batch, **QUIET, return_dict_in_generate=True)
    text = batch["attention_mask"].sum() - 36
    assert found.past_key_values.layers[0].keys.shape[2] == int(text) + 9 + 2
    assert found.sequences.shape[1] == batch["input_ids"].shape[1] + 3
