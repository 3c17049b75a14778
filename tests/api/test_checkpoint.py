"""The thresholds come from where the weights came from: folder, subfolder, variant, revision, shards, or an error."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification as Auto
from transformers import CLIPConfig, CLIPModel

from support.families import FAMILIES, difference
from thresher import LTP, ToP, TopK, Transkimmer, prune, unprune
from thresher import checkpoint as module

BERT = FAMILIES["bert"]


def answers(model):
    with torch.no_grad():
        return BERT.answers(model, BERT.batch())


def save(folder, threshold: float, **how):
    """The same weights, with thresholds of their own."""
    model = prune(BERT.build(), LTP(target_flops=0.5))
    with torch.no_grad():
        model.token_pruner.threshold.fill_(threshold)
    model.save_pretrained(folder, **how)
    return model


def thresholds(model) -> set[float]:
    return {round(value, 4) for value in model.token_pruner.threshold.tolist()}


def forget(folder, key: str = "weights"):
    """As an older checkpoint, or one of another hand."""
    config = json.loads((folder / "config.json").read_text())
    del config["token_pruning"][key]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("sub", ["strong", "runs/strong"])
@pytest.mark.parametrize("root", [True, False], ids=["beside another", "alone"])
def test_a_subfolder(tmp_path, sub, root):
    if root:
        save(tmp_path, 0.25)
        save(tmp_path / "weak", 0.5)
    save(tmp_path / sub, 1.0)
    assert thresholds(prune(Auto.from_pretrained(tmp_path, subfolder=sub))) == {1.0}
    if root:
        assert thresholds(prune(Auto.from_pretrained(tmp_path))) == {0.25}


@pytest.mark.parametrize("method", [ToP, Transkimmer, LTP])
def test_methods_with_other_parameters_are_told_apart(tmp_path, method):
    """Buffers of bits as well as perceptrons; two draws of the same shapes."""
    for name, seed in (("one", 1), ("other", 2)):
        model = prune(BERT.build(), method())
        torch.manual_seed(seed)
        with torch.no_grad():
            for tensor in module.tensors_of(model.token_pruner).values():
                tensor.copy_(torch.rand(tensor.shape) > 0.5 if tensor.dtype == torch.bool else torch.rand(tensor.shape))
        model.save_pretrained(tmp_path / name)
        again = prune(Auto.from_pretrained(tmp_path, subfolder=name))
        for key, tensor in module.tensors_of(model.token_pruner).items():
            assert torch.equal(tensor, again.token_pruner.state_dict()[key]), key


def test_a_variant(tmp_path):
    save(tmp_path, 0.25)
    save(tmp_path, 1.0, variant="strong")
    assert thresholds(prune(Auto.from_pretrained(tmp_path, variant="strong"))) == {1.0}


def test_several_weight_files_without_a_name_in_config_json_are_not_clear(tmp_path):
    save(tmp_path, 0.25)
    save(tmp_path, 1.0, variant="strong")
    forget(tmp_path)
    with pytest.raises(
        ValueError, match=r"not clear which .*: its config.json does not say. Found: .*strong.*Pass check"
    ):
        prune(Auto.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="expected a folder with one token pruner, it holds"):
        prune(Auto.from_pretrained(tmp_path), checkpoint=tmp_path)


def test_one_weight_file_without_a_name_in_config_json_is_clear(tmp_path):
    save(tmp_path, 0.25)
    forget(tmp_path)
    assert thresholds(prune(Auto.from_pretrained(tmp_path))) == {0.25}


def test_a_subfolder_that_is_not_named_is_refused(tmp_path):
    """Its weights have gone: those of the root are not taken for it."""
    save(tmp_path, 0.25)
    save(tmp_path / "strong", 1.0)
    model = Auto.from_pretrained(tmp_path, subfolder="strong")
    (tmp_path / "strong" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"which are not those that config\.json names\. Pass checkpoint="):
        prune(model)
    assert not hasattr(model, "token_pruner")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache with two revisions of one repository, the second in shards."""
    place = tmp_path / "hub"
    repository = place / "models--thresher--pruned"
    for name, commit, threshold, shards in (("main", "a" * 40, 0.25, "1GB"), ("strong", "b" * 40, 1.0, "20KB")):
        save(repository / "snapshots" / commit, threshold, max_shard_size=shards)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    for library in ("huggingface_hub.constants", "transformers.utils.hub", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{library}.HF_HUB_CACHE", str(place), raising=False)
    monkeypatch.setattr(module, "HF_HUB_CACHE", str(place))
    return place


@pytest.mark.parametrize("revision, expected", [("main", 0.25), ("strong", 1.0)])
def test_a_revision_and_shards_of_the_hub(hub, revision, expected):
    model = Auto.from_pretrained("thresher/pruned", revision=revision, cache_dir=hub, local_files_only=True)
    assert thresholds(prune(model)) == {expected}


def test_an_unknown_cache_is_told(hub, monkeypatch, tmp_path):
    model = Auto.from_pretrained("thresher/pruned", cache_dir=hub, local_files_only=True)
    monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=r"no weights of the pruner .* Pass checkpoint="):
        prune(model)
    assert thresholds(prune(model, checkpoint=hub / "models--thresher--pruned" / "snapshots" / ("a" * 40))) == {0.25}


def test_a_folder_saved_again_without_pruning(tmp_path):
    save(tmp_path / "pruned", 1.0)
    Auto.from_pretrained(tmp_path / "pruned").save_pretrained(tmp_path / "again")
    assert "token_pruning" in json.loads((tmp_path / "again" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"again holds no weights of the pruner .* was saved there"):
        prune(Auto.from_pretrained(tmp_path / "again"))
    assert thresholds(prune(Auto.from_pretrained(tmp_path / "again"), checkpoint=tmp_path / "pruned")) == {1.0}
    fresh = prune(Auto.from_pretrained(tmp_path / "again"), LTP())
    assert thresholds(fresh) == {0.0, 0.25, 0.5, 0.75}


def test_a_part_is_pruned_and_the_whole_is_saved(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    clip = CLIPModel(
        CLIPConfig(text_config=sizes | {"vocab_size": 97}, vision_config=sizes | {"image_size": 20, "patch_size": 4})
    ).eval()
    pixels = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    prune(clip.vision_model, LTP())
    with torch.no_grad():
        clip.vision_model.token_pruner.threshold.fill_(1.05)
        expected = clip.get_image_features(pixels).pooler_output
    clip.save_pretrained(tmp_path)
    again = CLIPModel.from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match=r"no token_pruning entry in its config.json: .* or pass checkpoint="):
        prune(again.vision_model)
    prune(again.vision_model, checkpoint=tmp_path)
    with torch.no_grad():
        assert torch.equal(again.get_image_features(pixels).pooler_output, expected)
    assert again.vision_model.token_pruner.report == clip.vision_model.token_pruner.report


def test_a_method_takes_what_another_folder_learned(tmp_path):
    save(tmp_path, 1.0)
    model = prune(BERT.build(), LTP(target_flops=0.7), checkpoint=tmp_path)
    assert thresholds(model) == {1.0} and model.token_pruner.target_flops == 0.7
    with pytest.raises(ValueError, match="what was saved is of ltp, the model is pruned with topk"):
        prune(unprune(model), TopK(), checkpoint=tmp_path)
    prune(BERT.build(), TopK(keep=(0.4, 0.5, 0.6))).save_pretrained(tmp_path / "topk")
    method = prune(BERT.build(), TopK(target_flops=0.7), checkpoint=tmp_path / "topk").token_pruner
    assert method.keep == (0.4, 0.5, 0.6) and method.target_flops == 0.7


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_a_folder_without_a_pruner_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(pickle.dumps({"token_pruner.threshold": [1.0]}))
    with pytest.raises(ValueError, match=r"checkpoint='.*': expected a folder with one.*none|is no folder: expected"):
        prune(BERT.build(), checkpoint=tmp_path / folder)


def test_methods_without_tensors_need_no_weight_file(tmp_path):
    model = prune(BERT.build(), TopK(keep=0.4))
    model.save_pretrained(tmp_path)
    again = Auto.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)
    assert difference(answers(prune(again)), answers(model)) == 0
