"""accelerate's offload and device maps: what it puts away is loaded before it is needed."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForSequenceClassification as Auto

from support.families import FAMILIES
from support.methods import METHODS
from thresher import prune, unprune

BERT = FAMILIES["bert"]


def answers(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**BERT.batch()).logits


def put_away(model, how: str, folder):
    if how == "cpu":
        return cpu_offload(model, execution_device="cpu")
    if how == "disk":
        return disk_offload(model, folder, execution_device="cpu")
    parts = [name for name, _ in model.named_children()]
    return dispatch_model(model, {name: "disk" if name == "bert" else "cpu" for name in parts}, "cpu", None, folder)


@pytest.mark.parametrize("how", ["cpu", "disk", "map"])
@pytest.mark.parametrize("order", ["offload, then prune", "prune, then offload"])
@pytest.mark.parametrize("name", ["topk", "ltp", "top", "transkimmer", "powerbert"])
def test_offloaded_models_are_pruned_as_others(how, order, name, tmp_path):
    model = prune(BERT.build(), METHODS[name][1]())
    expected = answers(model)
    model.save_pretrained(tmp_path / "saved")
    model = Auto.from_pretrained(tmp_path / "saved").eval()
    if order.startswith("prune"):
        prune(model)
    put_away(model, how, tmp_path / "away")
    if order.startswith("offload"):
        prune(model)
    for _ in range(2):
        torch.testing.assert_close(answers(model), expected, atol=1e-5, rtol=0)
    assert model.config.to_dict()["token_pruning"] == Auto.from_pretrained(tmp_path / "saved").config.token_pruning
    unprune(model)
    torch.testing.assert_close(answers(model), answers(BERT.build()), atol=1e-5, rtol=0)


def test_a_device_map_puts_the_weights_on_disk(tmp_path):
    model = prune(BERT.build(), METHODS["ltp"][1]())
    expected = answers(model)
    model.save_pretrained(tmp_path / "saved")
    names = [f"bert.encoder.layer.{i}" for i in range(4)]
    places = {name: "disk" if i % 2 else "cpu" for i, name in enumerate(names)}
    places |= dict.fromkeys(("bert.embeddings", "bert.pooler", "classifier"), "cpu")
    model = prune(Auto.from_pretrained(tmp_path / "saved", device_map=places, offload_folder=tmp_path / "away"))
    torch.testing.assert_close(answers(model), expected, atol=1e-5, rtol=0)
