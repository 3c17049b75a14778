"""Models of sentence-transformers: pruned in place through encode, predict and rank, saved, loaded and copied."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch

from support.families import FAMILIES
from support.tiny import save_tiny, tiny_tokenizer
from thresher import LTP, Random, ToMe, ToP, TopK, dense, prune, unprune

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries that it opens
    from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:sentence_transformers", "ignore::FutureWarning")
TEXTS = [
    "the farmer and the wheat and the script and the grain and the chaff",
    "thresh the wheat and the grain and the farmer",
    "the chaff and the script",
    "grain",
]
QUERY = "the wheat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny encoder with its tokenizer, with a head of one number and without one."""
    root = tmp_path_factory.mktemp("models")
    FAMILIES["bert"].build(max_position_embeddings=128).bert.save_pretrained(root / "encoder")
    tiny_tokenizer().save_pretrained(root / "encoder")
    save_tiny(root / "ranker", num_labels=1, max_position_embeddings=128)
    return root


@pytest.fixture
def embedder(folder):
    return SentenceTransformer(str(folder / "encoder"), device="cpu")


@pytest.fixture
def ranker(folder):
    return CrossEncoder(str(folder / "ranker"), device="cpu")


def scores(model) -> np.ndarray:
    return model.predict([(QUERY, text) for text in TEXTS])


@pytest.mark.parametrize("pooling", ["put-back", "survivors"])
@pytest.mark.parametrize("make", [lambda **o: TopK(keep=0.5, **o), lambda **o: ToMe(r=0.3, **o)])
def test_encode_is_the_padded_reference(embedder, make, pooling):
    before = embedder.encode(TEXTS)
    prune(embedder, make(pooling=pooling), layout="mask")
    reference = embedder.encode(TEXTS)
    unprune(embedder)
    assert np.array_equal(embedder.encode(TEXTS), before) and not embedder[0]._forward_hooks
    prune(embedder, make(pooling=pooling))
    pruned = embedder.encode(TEXTS)
    assert np.abs(pruned - reference).max() <= 1e-5 < np.abs(pruned - before).max()
    assert np.abs(embedder.encode(TEXTS[2:]) - pruned[2:]).max() <= 1e-5  # whatever the batch mates
    with dense(embedder):
        assert np.abs(embedder.encode(TEXTS) - before).max() <= 1e-5


def test_survivors_are_pooled_alone(embedder):
    back = prune(embedder, TopK(keep=0.4)).encode(TEXTS)
    with pytest.warns(UserWarning, match="replaces it"):
        alone = prune(embedder, TopK(keep=0.4, pooling="survivors")).encode(TEXTS)
    assert np.abs(back - alone).max() > 1e-3
    inner = embedder[0].auto_model
    inputs = embedder.tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = inner(**inputs)
    mask = output.token_mask[..., None]
    assert 0 < mask.sum() < inputs["attention_mask"].sum()
    expected = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
    assert np.abs(expected.numpy() - alone).max() <= 1e-5


def test_keeping_everything_is_dense(embedder, ranker):
    vectors, ranks = embedder.encode(TEXTS), scores(ranker)
    for pooling in ("put-back", "survivors"):
        prune(embedder, TopK(keep=1.0, pooling=pooling))
        assert np.abs(embedder.encode(TEXTS) - vectors).max() <= 1e-5
        unprune(embedder)
    assert np.abs(scores(prune(ranker, TopK(keep=1.0))) - ranks).max() <= 1e-5


@pytest.mark.parametrize("pooling", ["put-back", "survivors"])
def test_saved_copied_and_sent_on(embedder, tmp_path, pooling):
    pruned = prune(embedder, TopK(keep=0.5, min_tokens=5, pooling=pooling)).encode(TEXTS)
    embedder.save_pretrained(str(tmp_path))
    for other in (
        prune(SentenceTransformer(str(tmp_path), device="cpu")),
        copy.deepcopy(embedder),
        pickle.loads(pickle.dumps(embedder)),
    ):
        assert np.abs(other.encode(TEXTS) - pruned).max() <= 1e-6


def test_predict_and_rank(ranker, tmp_path):
    before = scores(ranker)
    method = TopK(keep=0.5)
    after = scores(prune(ranker, method))
    assert method.protect == {"until": [ranker.tokenizer.sep_token_id]} and method.at == (1, 2)
    assert np.abs(after - before).max() > 1e-4
    ranked = ranker.rank(QUERY, TEXTS)
    assert [row["corpus_id"] for row in ranked] == sorted(range(4), key=lambda i: -after[i])
    ranker.save_pretrained(str(tmp_path))
    assert np.abs(scores(prune(CrossEncoder(str(tmp_path), device="cpu"))) - after).max() <= 1e-6


def test_what_a_user_names_is_kept(ranker):
    method = TopK(keep=0.5, at=(0, 1), protect=(0,))
    prune(ranker, method)
    assert method.at == (0, 1) and method.protect == (0,)


@pytest.mark.parametrize(
    "make, sites", [(lambda: ToP(), (1, 2)), (lambda: LTP(), (1, 2, 3)), (lambda: Random(0.5), (1, 2))]
)
def test_nothing_leaves_early_in_a_ranker(ranker, make, sites):
    method = make()
    prune(ranker, method)
    assert method.sites == sites


def test_what_was_saved_prunes_as_it_did(folder, tmp_path):
    """A reranker that was pruned as a plain model keeps its own protection and layers as a CrossEncoder."""
    from transformers import AutoModelForSequenceClassification as Auto

    model = prune(Auto.from_pretrained(folder / "ranker"), TopK(keep=0.4))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    again = prune(CrossEncoder(str(tmp_path), device="cpu"))
    assert again[0].auto_model.token_pruner.to_dict() == model.token_pruner.to_dict()


def test_a_value_for_each_site_is_for_the_usual_sites(ranker):
    prune(ranker, TopK(keep=(0.9, 0.7, 0.5)))
    assert ranker[0].auto_model.token_pruner.sites == (0, 1, 2)


def test_several_classes_have_no_query(folder):
    method = TopK(keep=0.5)
    prune(CrossEncoder(str(save_tiny(folder / "classes", max_position_embeddings=128)), device="cpu"), method)
    assert method.protect is None and method.sites == (0, 1, 2)


def test_a_refused_method_is_as_it_was(ranker):
    method = TopK(keep=0.5, pooling="survivors")
    with pytest.raises(ValueError, match="a head that reads all states"):
        prune(ranker, method)
    again = TopK(keep=(0.5, 0.5))
    with pytest.raises(ValueError, match="keep has 2 entries for the 3 sites"):
        prune(ranker, again)
    for one in (method, again):
        assert one.at is None and one.protect is None and one.architecture is None


def test_the_index_of_a_late_interaction_model_is_its_survivors(folder):
    model = MultiVectorEncoder(str(folder / "encoder"), device="cpu")
    whole = model.encode_document(TEXTS)
    prune(model, TopK(keep=0.5, pooling="survivors"), layout="mask")
    reference = model.encode_document(TEXTS)
    unprune(model)
    pruned = prune(model, TopK(keep=0.5, pooling="survivors")).encode_document(TEXTS)
    assert [len(x) for x in pruned] == [len(x) for x in reference]
    assert sum(len(x) for x in pruned) < 0.3 * sum(len(x) for x in whole)
    assert all(np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-5 for a, b in zip(pruned, reference, strict=True))


@pytest.mark.parametrize("mode", ["cls", "lasttoken"])
def test_one_pooled_token_has_no_survivors(embedder, mode):
    embedder[1].pooling_mode = mode
    with pytest.raises(ValueError, match=f"is for means: this SentenceTransformer pools {mode}"):
        prune(embedder, TopK(keep=0.4, pooling="survivors"))
    prune(embedder, TopK(keep=0.4))


def test_what_cannot_be_pruned_is_refused(embedder):
    with pytest.raises(ValueError, match="is not pruned"):
        unprune(embedder)
    with pytest.raises(ValueError, match="not pruned: it is dense already"), dense(embedder):
        pass
    embedder[0].can_flatten_inputs = True
    with pytest.raises(ValueError, match="all texts of a batch as one row"):
        prune(embedder, TopK(keep=0.5))
    embedder[0].can_flatten_inputs = False
    with pytest.raises(ValueError, match="has no token_pruning entry"):
        prune(embedder)
    with pytest.raises(TypeError, match="got Linear"):
        prune(torch.nn.Linear(2, 2), TopK())
