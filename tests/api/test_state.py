"""What calibration and training find is part of the state dict and of config.json."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

from support.families import FAMILIES, difference
from support.methods import METHODS
from thresher import LAT, ToMe, TopK, prune

BERT = FAMILIES["bert"]
FOUND = {  # what is set as a calibration would, and how
    "topk": {"keep": (0.31, 0.52, 0.73)},
    "spatten": {"keep": (0.31, 0.52, 0.73)},
    "ats": {"keep": (0.31, 0.52, 0.73)},
    "evit": {"keep": (0.31, 0.52, 0.73)},
    "powerbert": {"keep": (0.31, 0.52, 0.73)},
    "dynamicvit": {"keep": (0.31, 0.52, 0.73)},
    "tome": {"r": (0.1, 0.2, 0.3, 0.05)},
    "tofu": {"r": (0.1, 0.2, 0.3, 0.05)},
    "lat": {"keep": (0.31, 0.52, 0.73), "frontier": ((0.5, (0.4, 0.4, 0.4)), (0.7, (0.6, 0.7, 0.8)))},
}


@pytest.mark.parametrize("name", FOUND)
def test_a_state_dict_holds_what_was_found(name):
    model, other = (prune(BERT.build(), METHODS[name][1]()) for _ in range(2))
    for field, value in FOUND[name].items():
        value = value[: len(model.token_pruner.sites)] if field != "frontier" else value
        setattr(model.token_pruner, field, value)
    assert other.token_pruner.to_dict() != model.token_pruner.to_dict()
    other.load_state_dict(model.state_dict())
    assert other.token_pruner.to_dict() == model.token_pruner.to_dict()
    with torch.no_grad():
        assert difference(BERT.answers(other, BERT.batch()), BERT.answers(model, BERT.batch())) == 0


def test_what_a_user_chose_stays():
    model, other = prune(BERT.build(), TopK(keep=0.4, target_flops=0.5)), prune(BERT.build(), TopK(target_flops=0.7))
    other.load_state_dict(model.state_dict())
    assert other.token_pruner.target_flops == 0.7 and other.token_pruner.keep == 0.4


def test_a_state_of_another_method_is_refused():
    state = prune(BERT.build(), TopK()).state_dict()
    with pytest.raises(ValueError, match="what was saved is of topk, the model is pruned with lat"):
        prune(BERT.build(), LAT()).load_state_dict(state)


@pytest.mark.parametrize("damaged", [b"", b"{", b"[1]", b'{"method": "topk", "version": 99}'])
def test_a_damaged_state_is_refused(damaged):
    model = prune(BERT.build(), TopK())
    state = model.state_dict()
    state["token_pruner._extra_state"] = torch.tensor(list(damaged), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"the state of the token pruner is no JSON|the token_pruning entry"):
        model.load_state_dict(state)


def test_a_state_dict_without_the_fields_fits_where_it_is_not_strict():
    model = prune(BERT.build(), TopK())
    state = model.state_dict()
    del state["token_pruner._extra_state"]
    missing = model.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["token_pruner._extra_state"] and model.token_pruner.keep == 0.5


def test_config_json_says_what_the_pruner_is_when_it_is_written(tmp_path):
    model = prune(BERT.build(), ToMe())
    model.token_pruner.r = 0.25
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["token_pruning"]["r"] == 0.25
    assert model.config.token_pruning["r"] == 0.25 and type(model.config.to_dict()["token_pruning"]) is dict


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_the_entry_follows_a_copy_of_the_model(how):
    model = prune(BERT.build(), TopK())
    if how == "pickle":
        again = pickle.loads(pickle.dumps(model.config)).token_pruning
        assert dict(again) == dict(model.config.token_pruning)
        return
    copied = copy.deepcopy(model)
    copied.token_pruner.keep = 0.9
    assert copied.config.token_pruning["keep"] == 0.9 and model.config.token_pruning["keep"] == 0.5
    copied.config.to_dict()
    assert copy.deepcopy(copied.config).token_pruning["keep"] == 0.9


@pytest.mark.parametrize("cast", ["bfloat16", "half", "to"])
@pytest.mark.parametrize("name", ["ltp", "ltmp", "top", "transkimmer", "powerbert"])
def test_a_cast_does_not_move_what_was_learned(cast, name):
    model = prune(BERT.build(), METHODS[name][1]())
    before = {k: v.clone() for k, v in model.token_pruner.state_dict().items()}
    model = model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    assert model.classifier.weight.dtype != torch.float32
    for key, value in model.token_pruner.state_dict().items():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key]), key
    if cast != "half":
        with torch.no_grad():
            assert model(**BERT.batch()).logits.isfinite().all()
