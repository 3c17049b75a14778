"""Pictures and sounds in the prompt of a language model: what leaves is as hidden, in forward and in generate."""

from __future__ import annotations

import copy

import pytest
import torch

from support.visual import AUDIO, END, IMAGE, START, VIDEO, VISUAL, states, tiny
from thresher import (
    DART,
    CDPruner,
    DivPrune,
    FastV,
    Grid,
    Pool,
    PyramidDrop,
    Random,
    SparseVLM,
    TopK,
    VisionZip,
    VisPruner,
    prune,
)
from thresher.core.view import View

TOLERANCE = 1e-5
QUIET = {"do_sample": False, "suppress_tokens": [IMAGE, VIDEO, AUDIO, START, END]}


def made(family: str, method, layout: str = "auto"):
    return prune(copy.deepcopy(tiny(family)), method, layout=layout)


class Stripes(TopK):
    """Keep what stands at even places: the same tokens whatever follows."""

    needs_attention = False

    def score(self, view: View) -> torch.Tensor:
        return (view.tokens.index % 2 == 0).double()


# name: keeps as much as it is told
METHODS = {
    "random": lambda keep: Random(keep=keep, at=(-1,)),
    "topk": lambda keep: TopK(keep=keep, at=(1,)),
    "both": lambda keep: Random(keep=keep, at=(-1, 1)),
    "fastv": lambda keep: FastV(keep=keep),
    "pyramiddrop": lambda keep: PyramidDrop(keep=keep),
    "divprune": lambda keep: DivPrune(keep=keep),
    "cdpruner": lambda keep: CDPruner(keep=keep),
    "visionzip": lambda keep: VisionZip(keep=keep),
    "vispruner": lambda keep: VisPruner(keep=keep),
    "dart": lambda keep: DART(keep=keep),
    "sparsevlm": lambda keep: SparseVLM(keep=keep),
    "grid": lambda keep: Grid(keep=keep),
    "pool": lambda keep: Pool(side=100 if keep == 1.0 else 2),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", VISUAL)
@torch.no_grad()
def test_dropped_is_hidden_and_all_is_dense(family, method):
    """In a batch of rows of two pictures, with padding on the left."""
    make, model = METHODS[method], tiny(family)
    batch = VISUAL[family].batch(model, (2, 2), gap=2)
    dense = states(model, batch)
    assert torch.equal(states(made(family, make(1.0)), batch), dense)
    dropped, masked = made(family, make(0.5)), made(family, make(0.5), "mask")
    answer, reference = states(dropped, batch), states(masked, batch)
    scale = reference.abs().max().clamp(min=1)
    assert ((answer - reference).abs().max() / scale).item() <= TOLERANCE
    assert (answer - dense).abs().max() > 1e-3
    left = dropped.token_pruner.record.left
    assert left.alive.shape[1] < batch["input_ids"].shape[1]


@torch.no_grad()
def steps(model, batch: dict, count: int = 4, **options):
    """The ids (B, count) that a model generates, and the logits (B, count, V) that it went by."""
    found = model.generate(
        **batch, max_new_tokens=count, return_dict_in_generate=True, output_logits=True, **QUIET, **options
    )
    return found.sequences[:, -count:], torch.stack(found.logits, 1)


@pytest.mark.parametrize("at", [(-1,), (1,), (-1, 1)], ids=str)
@pytest.mark.parametrize("pictures", [(1,), (2, 1)], ids=["one", "padded"])
@pytest.mark.parametrize("family", VISUAL)
@torch.no_grad()
def test_each_step_of_generate_sees_what_is_left(family, pictures, at):
    """Against the whole text without a cache, in which what left is hidden, at every step."""
    if family in ("idefics3", "smolvlm") and len(pictures) > 1:
        pictures = (1, 1)  # rows of as many pictures
    batch = VISUAL[family].batch(tiny(family), pictures)
    model, whole = made(family, Stripes(keep=0.5, at=at)), made(family, Stripes(keep=0.5, at=at), "mask")
    ids, logits = steps(model, batch)
    for step in range(ids.shape[1]):
        longer = VISUAL[family].longer(batch, ids[:, :step])
        expected = whole(**longer, use_cache=False).logits[:, -1]
        gap = (logits[:, step] - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert gap.item() <= TOLERANCE, step
    kept, _ = steps(made(family, Stripes(keep=1.0, at=at)), batch)
    dense, _ = steps(tiny(family), batch)
    assert torch.equal(kept, dense)
