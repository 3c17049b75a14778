"""A pruned model is saved, loaded and resumed by transformers itself; what cannot be read is refused in one line."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification as Auto

from support.families import FAMILIES, difference
from thresher import LTP, FirstK, Random, Threshold, TopK, prune
from thresher.checkpoint import digest

BERT = FAMILIES["bert"]
WEIGHTS, CONFIG = "model.safetensors", "config.json"
METHODS = {
    "topk": lambda: TopK(keep=(0.7, 9, 3), at=(0, 1, 3)),
    "random": lambda: Random(keep=0.4, seed=7),
    "firstk": lambda: FirstK(keep=5, at=(1,)),
    "threshold": lambda: Threshold((0.4, 0.6), at=(0, 2), protect=(0, -1)),
    "ids": lambda: TopK(keep=2, protect={"ids": [7, 9]}),
    "ltp": lambda: LTP(target_flops=0.4, temperature=0.2, at=(0, 1, 2)),
}


def answers(model):
    with torch.no_grad():
        return BERT.answers(model, BERT.batch())


@pytest.fixture
def saved(tmp_path):
    """A folder with a model pruned by LTP whose thresholds have moved, and what it answers."""
    model = prune(BERT.build(), LTP(target_flops=0.4))
    with torch.no_grad():
        model.token_pruner.threshold.copy_(torch.tensor([0.3, 0.5, 0.6, 0.9]))
    model.save_pretrained(tmp_path)
    return tmp_path, answers(model)


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    config["token_pruning"].update(changes)
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_comes_back(method, tmp_path):
    model = prune(BERT.build(), METHODS[method]())
    if method == "ltp":
        with torch.no_grad():
            model.token_pruner.threshold.copy_(torch.tensor([0.3, 0.5, 0.9]))
    expected = answers(model)
    model.save_pretrained(tmp_path)
    restored = prune(Auto.from_pretrained(tmp_path))
    assert difference(answers(restored), expected) == 0
    assert restored.token_pruner.report == model.token_pruner.report
    assert restored.token_pruner.to_dict() == model.token_pruner.to_dict()
    assert type(restored.token_pruner) is type(model.token_pruner)
    again = tmp_path / "again"
    restored.save_pretrained(again)
    assert (again / CONFIG).read_text() == (tmp_path / CONFIG).read_text()


def test_the_configuration_says_what_prunes(saved):
    folder, _ = saved
    config = json.loads((folder / CONFIG).read_text())
    assert config["token_pruning"] == {
        "method": "ltp",
        "version": 1,
        "weights": digest({"threshold": torch.tensor([0.3, 0.5, 0.6, 0.9])}),
        "at": [0, 1, 2, 3],
        "votes": "all",
        "protect": None,
        "min_tokens": 0,
        "pooling": "put-back",
        "modality": None,
        "target_flops": 0.4,
        "weight": None,
        "temperature": 0.1,
        "init": 1.0,
        "soft_until": 0.3,
        "straight_through": True,
        "schedule": None,
        "fuse": False,
        "min_keep": 3,
    }
    assert "pruned|" not in json.dumps(config)
    assert not list(folder.glob("*.bin")) + list(folder.glob("*.pkl")) + list(folder.glob("*.pt"))


def test_counts_fractions_and_sites_keep_their_types(tmp_path):
    prune(BERT.build(), METHODS["topk"]()).save_pretrained(tmp_path)
    method = prune(Auto.from_pretrained(tmp_path)).token_pruner
    assert method.keep == (0.7, 9, 3) and [type(k) for k in method.keep] == [float, int, int]
    assert method.at == method.sites == (0, 1, 3)


def test_loading_without_pruning_gives_the_dense_model(saved):
    folder, _ = saved
    assert difference(answers(Auto.from_pretrained(folder)), answers(BERT.build())) == 0


def test_another_method_can_take_over(saved):
    folder, _ = saved
    model = prune(Auto.from_pretrained(folder), TopK(keep=0.5))
    assert model.config.token_pruning["method"] == "topk"
    assert difference(answers(model), answers(prune(BERT.build(), TopK(keep=0.5)))) == 0


def test_a_model_built_from_a_configuration_has_no_weights_to_look_for():
    config = prune(BERT.build(), TopK(keep=0.5)).config
    assert prune(Auto.from_config(config)).token_pruner.keep == 0.5
    config = prune(BERT.build(), LTP()).config
    with pytest.raises(ValueError, match=r"BertForSequenceC.* does not know its checkpoint, .*: pass checkpoint="):
        prune(Auto.from_config(config))


def test_the_same_method_can_start_afresh(saved):
    folder, _ = saved
    model = prune(Auto.from_pretrained(folder), LTP(target_flops=0.4))
    assert model.token_pruner.threshold.tolist() == [0.0, 0.25, 0.5, 0.75]


def test_state_dicts_resume(saved):
    """As the checkpoints of a training run do: into a model that is pruned already."""
    folder, expected = saved
    state = load_file(folder / WEIGHTS)
    assert state["token_pruner.threshold"].tolist() == pytest.approx([0.3, 0.5, 0.6, 0.9])
    model = prune(BERT.build(seed=5), LTP(target_flops=0.4))
    model.load_state_dict(state)
    assert difference(answers(model), expected) == 0


def test_sharded_weights_are_found(saved, tmp_path):
    folder, expected = saved
    model = prune(Auto.from_pretrained(folder))
    shards = tmp_path / "shards"
    model.save_pretrained(shards, max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert difference(answers(prune(Auto.from_pretrained(shards))), expected) == 0


def test_unknown_keys_are_no_obstacle(saved):
    folder, expected = saved
    change_config(folder, invented_later=3)
    assert difference(answers(prune(Auto.from_pretrained(folder))), expected) == 0


def test_a_newer_version_is_refused(saved):
    folder, _ = saved
    change_config(folder, version=2)
    with pytest.raises(ValueError, match="has version 2, this thresher reads up to 1: update thresher"):
        prune(Auto.from_pretrained(folder))


def test_an_unknown_method_is_refused(saved):
    folder, _ = saved
    change_config(folder, method="magic")
    with pytest.raises(ValueError, match=r"unknown pruning method 'magic'; known: .*firstk, .*ltp, .*random"):
        prune(Auto.from_pretrained(folder))


@pytest.mark.parametrize("entry", [None, "ltp", [1, 2], {"version": 1}, {"method": "ltp", "version": "one"}], ids=str)
def test_a_malformed_entry_is_refused(saved, entry):
    folder, _ = saved
    config = json.loads((folder / CONFIG).read_text())
    config["token_pruning"] = entry
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"token_pruning entry|unknown pruning method"):
        prune(Auto.from_pretrained(folder))


@pytest.mark.parametrize(
    "changes", [{"at": [99]}, {"temperature": -1.0}, {"target_flops": "much"}, {"at": "all"}], ids=str
)
def test_a_value_out_of_range_is_refused(saved, changes):
    folder, _ = saved
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=r"token_pruning entry of config.json is nothing that LTP can take|at=\[99\]"):
        prune(Auto.from_pretrained(folder))


def damage(folder, how: str):
    file = folder / WEIGHTS
    whole = file.read_bytes()
    if how == "truncated":
        file.write_bytes(whole[:-40])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "pickle":
        file.write_bytes(pickle.dumps({"token_pruner.threshold": [0.5] * 4}))
    else:
        file.write_bytes(b"\xff" * 8 + whole[8:])


@pytest.mark.parametrize("how", ["truncated", "empty", "pickle", "garbled"])
def test_damaged_weights_are_refused_in_one_line(saved, how):
    folder, _ = saved
    model = Auto.from_pretrained(folder)
    for parameter in model.parameters():  # which lie in the file itself until they are copied
        parameter.data = parameter.data.clone()
    damage(folder, how)
    with pytest.raises(ValueError, match=r"corrupted checkpoint: .*cannot be read") as error:
        prune(model)
    assert "\n" not in str(error.value)
    assert not hasattr(model, "token_pruner")


def rewrite(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def test_missing_thresholds_are_refused(saved):
    """As after from_pretrained and save_pretrained without prune between them."""
    folder, _ = saved
    rewrite(folder, lambda state: [state.pop(key) for key in list(state) if key.startswith("token_pruner.")])
    with pytest.raises(ValueError, match=r"holds no weights of the pruner that its config.json names: a model"):
        prune(Auto.from_pretrained(folder))


def test_foreign_weights_are_refused(saved):
    folder, _ = saved
    rewrite(folder, lambda state: state.update({"token_pruner.other": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"corrupted checkpoint: .* holds \{'other': \(1,\), 'threshold': \(4,\)\}"):
        prune(Auto.from_pretrained(folder))


@pytest.mark.parametrize("named", [True, False], ids=["named", "not named"])
def test_thresholds_of_another_shape_are_refused(saved, named):
    folder, _ = saved
    rewrite(folder, lambda state: state.update({"token_pruner.threshold": torch.ones(7)}))
    if not named:
        change_config(folder, weights=None)
    with pytest.raises(
        ValueError,
        match=r"corrupted checkpoint: .*model.safetensors holds \{'threshold': \(7,\)\} of the pruner's weights, "
        + (r"which are not" if named else r"ltp needs \{'threshold': \(4,\)\}"),
    ):
        prune(Auto.from_pretrained(folder))


def test_other_values_than_config_json_names_are_refused(saved):
    folder, _ = saved
    rewrite(folder, lambda state: state.update({"token_pruner.threshold": torch.ones(4)}))
    with pytest.raises(ValueError, match=r"which are not those that config\.json names"):
        prune(Auto.from_pretrained(folder))
    model = prune(Auto.from_pretrained(folder), checkpoint=folder)  # said by hand
    assert model.token_pruner.threshold.tolist() == [1.0] * 4


def test_a_refusal_leaves_the_model_as_it_was(saved):
    folder, _ = saved
    model = Auto.from_pretrained(folder)
    expected = answers(model)
    change_config(folder, version=2)
    model.config.token_pruning["version"] = 2
    with pytest.raises(ValueError):
        prune(model)
    assert difference(answers(model), expected) == 0 and not hasattr(model, "token_pruner")
