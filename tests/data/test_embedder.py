"""Embedders: the folders of sentence-transformers, read and written without it, and their pooling."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset

from support.families import FAMILIES
from support.tiny import save_tiny, tiny_tokenizer
from thresher import LTP, ToMe, TopK, dense, prune, unprune
from thresher.data.embedder import Embedder, Pooling, best_pooling, is_embedder, load_embedder
from thresher.data.task import Task
from thresher.data.tokenize import tokenize
from thresher.evaluation.predict import predict
from thresher.serving.score import Scorer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries that it opens
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling as Theirs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:sentence_transformers", "ignore::FutureWarning")
TEXTS = ["the farmer and the wheat and the script and the grain", "thresh the wheat and the grain", "grain"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    FAMILIES["bert"].build(max_position_embeddings=128).bert.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def vectors(embedder, tokenizer) -> np.ndarray:
    return embedder(**tokenizer(TEXTS, return_tensors="pt", padding=True)).sentence_embedding.numpy()


def rows(tokenizer) -> Dataset:
    return Dataset.from_dict(dict(tokenizer(TEXTS))).remove_columns("attention_mask")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken"])
def test_a_folder_of_sentence_transformers(encoder, tmp_path, mode, normalize):
    modules = [Transformer(str(encoder)), Theirs(32, mode), *[Normalize()] * normalize]
    theirs = SentenceTransformer(modules=modules, device="cpu")
    theirs.max_seq_length = 100
    theirs.save_pretrained(str(tmp_path))
    assert is_embedder(str(tmp_path))
    embedder, tokenizer = load_embedder(str(tmp_path))
    assert embedder.pooling == Pooling(mode, normalize) and embedder.longest == 100
    assert np.abs(vectors(embedder, tokenizer) - theirs.encode(TEXTS)).max() <= 1e-6


@pytest.mark.parametrize("pooling", ["put-back", "survivors"])
@pytest.mark.parametrize("method", [TopK, LTP])
def test_what_is_saved_comes_back(encoder, tmp_path, method, pooling):
    embedder, tokenizer = load_embedder(str(encoder), pooling="mean")
    embedder.prompts = {"query": "the "}
    before = vectors(embedder, tokenizer)
    prune(embedder, method(pooling=pooling))
    with torch.no_grad():
        for parameter in embedder.token_pruner.parameters():
            parameter.fill_(1.0)
    pruned = vectors(embedder, tokenizer)
    assert np.abs(pruned - before).max() > 1e-4
    embedder.save_pretrained(tmp_path, tokenizer)
    again, its = load_embedder(str(tmp_path))
    assert again.prompts == {"query": "the "} and again.longest == embedder.longest
    assert np.abs(vectors(again, its) - pruned).max() <= 1e-6
    theirs = prune(SentenceTransformer(str(tmp_path), device="cpu"))
    assert np.abs(theirs.encode(TEXTS) - pruned).max() <= 1e-5
    with dense(again):
        assert np.abs(vectors(again, its) - before).max() <= 1e-5
    assert np.abs(vectors(unprune(again), its) - before).max() <= 1e-6


@pytest.mark.parametrize("pooling", ["put-back", "survivors"])
def test_predict_gives_vectors_and_their_price(encoder, pooling):
    embedder, tokenizer = load_embedder(str(encoder), pooling="mean")
    dense_answers = predict(embedder, rows(tokenizer))
    assert dense_answers.macs_used == dense_answers.macs_dense
    assert np.abs(dense_answers.logits.numpy() - vectors(embedder, tokenizer)).max() <= 1e-5
    prune(embedder, TopK(keep=0.5, pooling=pooling))
    pruned = predict(embedder, rows(tokenizer), batch_size=2)
    assert pruned.macs_used < 0.8 * pruned.macs_dense == 0.8 * dense_answers.macs_dense
    assert np.abs(pruned.logits.numpy() - vectors(embedder, tokenizer)).max() <= 1e-5


def test_folders_that_do_not_serve(encoder, tmp_path):
    with pytest.raises(ValueError, match="does not say how its states are pooled"):
        load_embedder(str(encoder))
    with pytest.raises(ValueError, match="pooling 'mode' is not understood"):
        load_embedder(str(encoder), pooling="mode")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_embedder(str(tmp_path / "nothing"))
    assert not is_embedder(str(encoder)) and not is_embedder(str(tmp_path / "nothing"))
    embedder, tokenizer = load_embedder(str(encoder), pooling="mean")
    embedder.save_pretrained(tmp_path, tokenizer)
    modules = json.loads((tmp_path / "modules.json").read_text())

    def written(name: str, content) -> str:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path)

    strange = {"idx": 2, "name": "2", "path": "2_CNN", "type": "sentence_transformers.models.CNN"}
    with pytest.raises(ValueError, match="has a module CNN: a transformer, its pooling"):
        load_embedder(written("modules.json", [*modules[:2], strange]))
    with pytest.raises(ValueError, match="has Transformer and Pooling and Normalize and Normalize: a transformer"):
        load_embedder(written("modules.json", [*modules, modules[2]]))
    with pytest.raises(ValueError, match="has Transformer: a transformer, its pooling"):
        load_embedder(written("modules.json", modules[:1]))
    with pytest.raises(ValueError, match=r"modules.json cannot be read"):
        load_embedder(written("modules.json", "[{"))
    written("modules.json", modules)
    for said in ({"pooling_mode": ["mean", "cls"]}, {"pooling_mode_weightedmean_tokens": True}):
        with pytest.raises(ValueError, match="joins or weighs states"):
            load_embedder(written("1_Pooling/config.json", said))
    with pytest.raises(ValueError, match="reads pixel_values and no text"):
        FAMILIES["vit"].build().save_pretrained(tmp_path / "vit")
        load_embedder(str(tmp_path / "vit"), pooling="mean")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "layers",
    [
        [{"out_features": 16}],
        [{"out_features": 48, "bias": False, "activation_function": torch.nn.GELU()}, {"out_features": 8}],
        [{"out_features": 16, "use_residual": True, "activation_function": torch.nn.Identity()}],
        [{"out_features": 32, "use_residual": True}],
    ],
)
def test_dense_modules(encoder, tmp_path, layers, normalize):
    given, made = 32, []
    torch.manual_seed(0)
    for layer in layers:
        made.append(Dense(in_features=given, **layer))
        given = layer["out_features"]
    modules = [Transformer(str(encoder)), Theirs(32, "mean"), *made, *[Normalize()] * normalize]
    theirs = SentenceTransformer(modules=modules, device="cpu")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    embedder, tokenizer = load_embedder(str(tmp_path / "theirs"))
    assert np.abs(vectors(embedder, tokenizer) - theirs.encode(TEXTS)).max() <= 1e-6
    prune(embedder, TopK(keep=0.5))
    pruned = vectors(embedder, tokenizer)
    assert pruned.shape == (3, given) and np.abs(pruned - theirs.encode(TEXTS)).max() > 1e-4
    embedder.save_pretrained(tmp_path / "ours", tokenizer)
    again, its = load_embedder(str(tmp_path / "ours"))
    assert np.abs(vectors(again, its) - pruned).max() <= 1e-6
    opened = prune(SentenceTransformer(str(tmp_path / "ours"), device="cpu"))
    assert np.abs(opened.encode(TEXTS) - pruned).max() <= 1e-5


def test_dense_modules_that_are_not_understood(encoder, tmp_path):
    made = Dense(in_features=32, out_features=8)
    SentenceTransformer(modules=[Transformer(str(encoder)), Theirs(32, "mean"), made], device="cpu").save_pretrained(
        str(tmp_path)
    )
    place = tmp_path / "2_Dense" / "config.json"
    said = json.loads(place.read_text())
    for change, told in (
        ({"activation_function": "os.system"}, "the activation 'os.system' in 2_Dense is not understood: Tanh, ReLU"),
        ({"module_input_name": "token_embeddings"}, "2_Dense projects something else than the vector"),
        ({"out_features": 9}, "the weights in 2_Dense are not those of its config.json"),
    ):
        place.write_text(json.dumps(said | change))
        with pytest.raises(ValueError, match=told):
            load_embedder(str(tmp_path))
    place.write_text(json.dumps(said))
    (tmp_path / "2_Dense" / "model.safetensors").rename(tmp_path / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"2_Dense has no model.safetensors: a linear layer of the vector in safetens"):
        load_embedder(str(tmp_path))


def prompted(encoder, folder, mode: str, include: bool, default: str | None = "query") -> SentenceTransformer:
    """A saved embedder of sentence-transformers with prompts."""
    theirs = SentenceTransformer(
        modules=[Transformer(str(encoder)), Theirs(32, mode, include_prompt=include), Normalize()],
        prompts={"query": "the farmer ", "passage": "wheat and "},
        default_prompt_name=default,
        device="cpu",
    )
    theirs.save_pretrained(str(folder))
    return theirs


def set_before(embedder, tokenizer, *names: str) -> np.ndarray:
    """The vectors of TEXTS with a prompt before each."""
    task = Task(None, None, None, ("text",), None, [], "embedding", "cosine", "", "", {})
    before = embedder.prompt(tokenizer, 64, *names)
    rows = tokenize(Dataset.from_dict({"text": TEXTS}), task, tokenizer, 64, before)[0]
    return predict(embedder, rows, batch_size=2).logits.numpy()


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken"])
def test_prompts_are_those_of_sentence_transformers(encoder, tmp_path, mode, include):
    theirs = prompted(encoder, tmp_path / "theirs", mode, include)
    embedder, tokenizer = load_embedder(str(tmp_path / "theirs"))
    assert embedder.default_prompt == "query" and embedder.pooling.include_prompt == include
    embedder.save_pretrained(tmp_path / "ours", tokenizer)
    again = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    scorer = Scorer(tmp_path / "ours", threads=1)
    by_default = theirs.encode(TEXTS)
    assert np.abs(by_default - theirs.encode(TEXTS, prompt="")).max() > 1e-3
    for found in (set_before(embedder, tokenizer), again.encode(TEXTS), scorer(TEXTS)["embedding"]):
        assert np.abs(found - by_default).max() <= 1e-5
    named = theirs.encode(TEXTS, prompt_name="passage")
    scorer = Scorer(tmp_path / "ours", threads=1, prompt="passage")
    for found in (set_before(embedder, tokenizer, "passage"), scorer(TEXTS)["embedding"]):
        assert np.abs(found - named).max() <= 1e-5
    with pytest.raises(ValueError, match="has no prompt of that name"):
        Scorer(tmp_path / "ours", prompt="corpus").open()


@pytest.mark.parametrize("pooling", ["put-back", "survivors"])
def test_a_pruned_embedder_pools_no_prompt(encoder, tmp_path, pooling):
    """The prompt is read, and pruned, and has no weight in the vector; where nothing else is left the text has it."""
    prompted(encoder, tmp_path, "mean", False)
    embedder, tokenizer = load_embedder(str(tmp_path))
    prune(embedder, TopK(keep=0.6, at=(1,), pooling=pooling))
    inputs = tokenizer(["the farmer thresh the wheat and the grain"], return_tensors="pt")
    mask = torch.tensor([embedder.prompt(tokenizer, 64).mask(inputs["input_ids"].shape[1])])
    assert mask[0, :3].tolist() == [0, 0, 0] and mask[0, 3:].all()
    with torch.no_grad():
        states = embedder.model(**inputs)
        weight = mask * (states.token_mask if pooling == "survivors" else 1)
        vector = (states.last_hidden_state * weight[..., None]).sum(1) / weight.sum()
        expected = torch.nn.functional.normalize(vector, dim=-1)
        torch.testing.assert_close(embedder(**inputs, pooling_mask=mask).sentence_embedding, expected)
        gone = torch.zeros_like(mask)
        gone[0, int((states.token_mask[0] == 0).nonzero()[0, 0]) if pooling == "survivors" else 3] = 1
        assert embedder(**inputs, pooling_mask=gone).sentence_embedding.norm().item() == pytest.approx(1.0)


def test_a_prompt_by_default_has_to_be_there(encoder, tmp_path):
    prompted(encoder, tmp_path, "mean", True)
    place = tmp_path / "config_sentence_transformers.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"default_prompt_name": "corpus"}))
    with pytest.raises(ValueError, match="names the prompt 'corpus' as default_prompt_name, and has"):
        load_embedder(str(tmp_path))
    for said in ([1], {"prompts": ["a"]}, {"prompts": {"a": 3}, "default_prompt_name": "a"}):
        place.write_text(json.dumps(said))
        with pytest.raises(ValueError, match="holds no prompts: expected an object with a text for each name"):
            load_embedder(str(tmp_path))


def test_one_token_has_no_survivors(encoder):
    embedder, tokenizer = load_embedder(str(encoder), pooling="lasttoken")
    prune(embedder, TopK(keep=0.3, pooling="survivors"))
    with pytest.raises(ValueError, match="says nothing of an embedder that pools one token"):
        vectors(embedder, tokenizer)


def test_put_back_weighs_merged_tokens_by_size(encoder):
    """The mean of put-back states is that of the merged ones, each as often as it counts."""
    embedder, tokenizer = load_embedder(str(encoder), pooling="mean")
    embedder.pooling = Pooling("mean", False)
    prune(embedder, ToMe(r=0.5, at=(0, 1)))
    with torch.no_grad():
        output = embedder(**tokenizer(TEXTS[:1], return_tensors="pt"))
    merged, sizes = torch.unique(output.last_hidden_state[0], dim=0, return_counts=True)
    assert sizes.max() > 1 and len(merged) < output.last_hidden_state.shape[1]
    weighed = (merged * sizes[:, None]).sum(0) / sizes.sum()
    torch.testing.assert_close(output.sentence_embedding[0], weighed)


def test_the_better_pooling_stays(encoder):
    embedder, _ = load_embedder(str(encoder), pooling="mean")
    prune(embedder, TopK(keep=0.5))
    for better in ("survivors", "put-back"):
        found = best_pooling(embedder, lambda: float(embedder.token_pruner.pooling == better))  # noqa: B023
        assert found["chosen"] == embedder.token_pruner.pooling == better and found["judged"][better] == 1.0
    assert best_pooling(embedder, lambda: 0.5)["chosen"] == "put-back"


def test_a_mask_weighs():
    states, mask = torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1.0, 0.5, 0.0]])
    assert Pooling("mean", False)(states, mask).item() == pytest.approx(2.5 / 1.5)
    assert Pooling("max", False)(states, mask).item() == 3.0
    assert Pooling("lasttoken", False)(states, mask).item() == 3.0
    assert Pooling("cls", False)(states, mask.flip(1)).item() == 3.0


def test_an_encoder_with_a_head_alone(tmp_path):
    """The weights of a classifier make an embedder: its head is left out."""
    folder = save_tiny(tmp_path, max_position_embeddings=128)
    embedder, _ = load_embedder(str(folder), pooling="cls")
    assert isinstance(embedder, Embedder) and type(embedder.model).__name__ == "BertModel"
