"""The server beside its model: what clients send, what they get, and what is refused in which words."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from support.embedders import SIZE, save_embedder
from support.served import asked, in_threads, serving
from support.tiny import save_tiny, tiny_model, tiny_tokenizer
from thresher import TopK
from thresher.data.embedder import load_embedder
from thresher.serving.engine import outline
from thresher.serving.score import Scorer
from thresher.serving.wire import Wire

TEXTS = ["the wheat", "the farmer and the grain", "chaff"]
HEADERS = ("compute-type", "compute-time", "compute-characters", "compute-tokens", "total-time", "tokenization-time")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    labels = {"num_labels": 3, "id2label": {0: "bad", 1: "fair", 2: "good"}}
    return {
        "classifier": save_tiny(folder / "classifier", TopK(keep=0.6), **labels),
        "reranker": save_tiny(folder / "reranker", TopK(keep=0.6), num_labels=1),
    }


@pytest.fixture(scope="module")
def classifier(folders):
    with serving(folders["classifier"]) as client:
        yield client


@pytest.fixture(scope="module")
def reranker(folders):
    with serving(folders["reranker"], name="ranker") as client:
        yield client


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    with serving(save_embedder(tmp_path_factory.mktemp("models") / "embedder", TopK(keep=0.6, at=(1,)))) as client:
        yield client


def probabilities(folders, given) -> np.ndarray:
    scored = Scorer(folders["classifier"])(given)
    return np.stack([scored[f"probability_{name}"] for name in ("bad", "fair", "good")], 1)


def as_rows(answer) -> np.ndarray:
    return np.array(
        [[{one["label"]: one["score"] for one in row}[n] for n in ("bad", "fair", "good")] for row in answer]
    )


# --- /predict --------------------------------------------------------------------------------------------------------
def test_predict_answers_as_the_scorer(classifier, folders):
    batch = asked(classifier, "/predict", {"inputs": [[text] for text in TEXTS]})
    assert np.abs(as_rows(batch) - probabilities(folders, TEXTS)).max() < 1e-5
    assert all([one["score"] for one in row] == sorted((one["score"] for one in row), reverse=True) for row in batch)
    one = asked(classifier, "/predict", {"inputs": TEXTS[0]})
    assert [sorted(x) for x in one] == [["label", "score"]] * 3 and np.abs(
        as_rows([one]) - as_rows(batch)[:1]
    ).max() < 1e-5
    assert asked(classifier, "/predict", {"inputs": [TEXTS[0]]}) == one  # a list of one text is that text


def test_two_flat_strings_are_a_pair_and_not_two_texts(classifier, folders):
    pair = asked(classifier, "/predict", {"inputs": TEXTS[:2]})
    expected = probabilities(folders, [tuple(TEXTS[:2])])
    assert np.abs(as_rows([pair]) - expected).max() < 1e-5
    mixed = asked(classifier, "/predict", {"inputs": [[TEXTS[2]], TEXTS[:2]]})
    assert np.abs(as_rows(mixed) - np.concatenate([probabilities(folders, TEXTS[2:]), expected])).max() < 1e-5
    assert "a pair of strings" in asked(classifier, "/predict", {"inputs": TEXTS}, 422)["error"]


def test_raw_scores_are_logits(classifier):
    raw = as_rows([asked(classifier, "/predict", {"inputs": TEXTS[0], "raw_scores": True})])
    expected = as_rows([asked(classifier, "/predict", {"inputs": TEXTS[0]})])
    assert np.abs(np.exp(raw) / np.exp(raw).sum() - expected).max() < 1e-5 and abs(raw.sum() - 1) > 1e-3


def test_texts_are_cut_at_either_side_or_refused(classifier, folders):
    long = " ".join(["wheat"] * 500 + ["chaff"] * 500)
    right = asked(classifier, "/predict", {"inputs": long})
    assert right == asked(classifier, "/predict", {"inputs": long, "truncate": True, "truncation_direction": "Right"})
    left = asked(classifier, "/predict", {"inputs": long, "truncation_direction": "Left"})
    assert np.abs(as_rows([left]) - as_rows([asked(classifier, "/predict", {"inputs": "chaff " * 600})])).max() > 0
    assert np.abs(as_rows([left]) - as_rows([right])).max() > 1e-4
    refused = asked(classifier, "/predict", {"inputs": long, "truncate": False}, 422)
    said = "Input validation error: `inputs` must have less than 512 tokens. Given: 1002"
    assert refused == {"error": said, "error_type": "Validation"}


def test_huge_logits_are_scores_and_nan_is_an_error(tmp_path):
    for value, status in ((-1e30, 200), (float("nan"), 424)):
        model = tiny_model()
        torch.nn.init.constant_(model.classifier.bias, value)
        folder = tmp_path / str(status)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        with serving(folder) as client:
            answer = asked(client, "/predict", {"inputs": "the wheat"}, status)
            if status == 424:
                assert answer == {"error": "score is NaN", "error_type": "Backend"}
                assert 'te_request_failure{err="inference"} 1' in client.get("/metrics").text
            else:
                assert sum(one["score"] for one in answer) == pytest.approx(1, abs=1e-6)


def test_numbers_and_several_labels_are_judged_as_trained(tmp_path):
    number = save_tiny(tmp_path / "number", num_labels=1, problem_type="regression")
    expected = Scorer(number)(["the wheat"])["score"][0]
    with serving(number) as client:
        (one,) = asked(client, "/predict", {"inputs": "the wheat"})
        assert one == {"score": pytest.approx(float(expected), abs=1e-6), "label": "LABEL_0"}
    several = save_tiny(tmp_path / "several", num_labels=3, problem_type="multi_label_classification")
    with serving(several) as client:
        assert abs(sum(one["score"] for one in asked(client, "/predict", {"inputs": "the wheat"})) - 1) > 1e-3


# --- /rerank and its relatives ---------------------------------------------------------------------------------------
def test_rerank_is_the_model_on_pairs_best_first(reranker, folders):
    expected = Scorer(folders["reranker"])([("wheat", text) for text in TEXTS])["score"]
    got = asked(reranker, "/rerank", {"query": "wheat", "texts": TEXTS})
    assert [one["index"] for one in got] == [*np.argsort(-expected)] and all(set(x) == {"index", "score"} for x in got)
    assert np.abs(np.array([one["score"] for one in got]) - np.sort(expected)[::-1]).max() < 1e-5
    back = asked(reranker, "/rerank", {"query": "wheat", "texts": TEXTS, "return_text": True, "raw_scores": True})
    assert [one["text"] for one in back] == [TEXTS[one["index"]] for one in back]
    logits = np.array([one["score"] for one in back])
    assert np.abs(1 / (1 + np.exp(-logits)) - np.sort(expected)[::-1]).max() < 1e-5


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_are_ranked_in_the_shape_of_cohere(reranker, path):
    plain = asked(reranker, "/rerank", {"query": "wheat", "texts": TEXTS})
    got = asked(reranker, path, {"model": "m", "query": "wheat", "documents": [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]})
    assert got["id"] and got["model"] == "ranker" and got["usage"]["total_tokens"] > 0 and "meta" in got
    assert [one["index"] for one in got["results"]] == [one["index"] for one in plain]
    scores = [(one["relevance_score"], other["score"]) for one, other in zip(got["results"], plain, strict=True)]
    assert all(abs(a - b) < 1e-6 for a, b in scores)
    few = asked(reranker, path, {"query": "wheat", "documents": TEXTS, "top_n": 2, "return_documents": True})
    shown = [TEXTS[one["index"]] for one in few["results"]]
    assert len(shown) == 2
    assert [one["document"] for one in few["results"]] == (shown if path == "/rerank" else [{"text": x} for x in shown])


# --- embeddings ------------------------------------------------------------------------------------------------------
def test_embed_is_the_model(embedder):
    net, tokenizer = load_embedder(embedder.service.how.model)
    got = np.array(asked(embedder, "/embed", {"inputs": TEXTS}))
    with torch.no_grad():
        expected = [net(**tokenizer(text, return_tensors="pt")).sentence_embedding[0].numpy() for text in TEXTS]
    assert got.shape == (3, SIZE) and np.abs(got - np.stack(expected)).max() < 1e-5
    one = np.array(asked(embedder, "/embed", {"inputs": TEXTS[0]}))
    assert one.shape == (1, SIZE) and np.abs(one - got[:1]).max() < 1e-5
    ids = tokenizer(TEXTS)["input_ids"]
    assert np.abs(np.array(asked(embedder, "/embed", {"inputs": ids[0]})) - one).max() < 1e-5
    assert np.abs(np.array(asked(embedder, "/embed", {"inputs": ids})) - got).max() < 1e-5
    assert embedder.get("/info").json()["model_type"] == {"embedding": {"pooling": "mean"}}
    scored = Scorer(embedder.service.how.model)(TEXTS)["embedding"]
    assert scored.dtype == np.float32 and np.abs(scored - got).max() < 1e-5


def test_dimensions_prompts_and_similarity(embedder):
    whole = np.array(asked(embedder, "/embed", {"inputs": TEXTS}))
    short = np.array(asked(embedder, "/embed", {"inputs": TEXTS, "dimensions": 8}))
    assert np.abs(short - whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)).max() < 1e-6
    plain = np.array(asked(embedder, "/embed", {"inputs": TEXTS, "dimensions": 8, "normalize": False}))
    assert np.abs(plain - whole[:, :8]).max() < 1e-6
    assert "at most 32" in asked(embedder, "/embed", {"inputs": TEXTS, "dimensions": 33}, 422)["error"]
    prompted = asked(embedder, "/embed", {"inputs": "grain", "prompt_name": "query"})
    assert np.abs(np.array(prompted) - asked(embedder, "/embed", {"inputs": "the farmer grain"})).max() < 1e-6
    assert "`query`, `passage`" in asked(embedder, "/embed", {"inputs": "a", "prompt_name": "no"}, 422)["error"]
    assert "token ids" in asked(embedder, "/embed", {"inputs": [5], "prompt_name": "query"}, 422)["error"]
    got = asked(
        embedder, "/similarity", {"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS}, "parameters": {}}
    )
    assert np.abs(np.array(got) - whole @ whole[0]).max() < 1e-5


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings"])
def test_the_openai_route_in_numbers_and_in_base64(embedder, path):
    whole = np.array(asked(embedder, "/embed", {"inputs": TEXTS}), np.float32)
    got = asked(embedder, path, {"input": TEXTS, "model": "any", "user": "me"})
    assert got["object"] == "list" and [one["index"] for one in got["data"]] == [0, 1, 2]
    assert {one["object"] for one in got["data"]} == {"embedding"}
    assert got["usage"]["prompt_tokens"] == got["usage"]["total_tokens"] == 4 + 7 + 3
    assert np.abs(np.array([one["embedding"] for one in got["data"]]) - whole).max() < 1e-6
    coded = asked(embedder, path, {"input": TEXTS, "model": "any", "encoding_format": "base64"})
    vectors = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in coded["data"]]
    assert np.abs(np.stack(vectors) - whole).max() < 1e-6
    assert len(asked(embedder, path, {"input": "a", "dimensions": 4})["data"][0]["embedding"]) == 4
    refused = asked(embedder, path, {"input": []}, 400)
    assert refused == {"message": "`inputs` cannot be empty", "code": 400, "type": "Empty", "error_type": "Empty"}


def test_token_ids_that_there_are_not_and_those_that_are_too_many(embedder):
    refused = asked(embedder, "/embed", {"inputs": [5, 97]}, 422)
    assert refused["error"] == "Input validation error: token id 97: the model has tokens 0 to 96"
    assert "tokens 0 to" in asked(embedder, "/embed", {"inputs": [[-1]]}, 422)["error"]
    asked(embedder, "/embed", {"inputs": [5] * 100})
    assert "Given: 100" in asked(embedder, "/embed", {"inputs": [5] * 100, "truncate": False}, 422)["error"]


# --- clients, by what they send --------------------------------------------------------------------------------------
def best(answer):
    return max(answer, key=lambda one: one["score"])


CLASSIFIER_CLIENTS = {
    "huggingface_hub text_classification": ("/predict", {"inputs": "the wheat", "parameters": {}}),
    "huggingface_hub, the root": ("/", {"inputs": "the wheat", "parameters": {}}),
    "sagemaker": ("/invocations", {"inputs": "the wheat"}),
}
RERANKER_CLIENTS = {
    "llama-index": ("/rerank", {"query": "wheat", "texts": TEXTS}),
    "haystack": ("/rerank", {"query": "wheat", "texts": TEXTS, "raw_scores": False}),
    "litellm huggingface": ("/rerank", {"query": "wheat", "texts": TEXTS, "raw_scores": False, "return_text": True}),
    "litellm infinity": ("/rerank", {"model": "m", "query": "wheat", "documents": TEXTS, "return_documents": True}),
    "cohere": ("/v2/rerank", {"model": "m", "query": "wheat", "documents": TEXTS, "top_n": 3}),
    "the root": ("/", {"query": "wheat", "texts": TEXTS}),
    "sagemaker": ("/invocations", {"query": "wheat", "texts": TEXTS}),
}
EMBEDDER_CLIENTS = {
    "huggingface_hub feature_extraction": ("/", {"inputs": "the wheat", "normalize": None, "truncate": None}),
    "huggingface_hub sentence_similarity": (
        "/similarity",
        {"inputs": {"source_sentence": "the wheat", "sentences": TEXTS}, "parameters": {}},
    ),
    "llama-index": ("/embed", {"inputs": TEXTS, "truncate": True}),
    "haystack": ("/", {"inputs": TEXTS, "normalize": False, "truncate": True}),
    "openai": ("/v1/embeddings", {"input": TEXTS, "model": "m", "encoding_format": "base64"}),
    "sagemaker": ("/invocations", {"inputs": TEXTS}),
}


@pytest.mark.parametrize("client", CLASSIFIER_CLIENTS)
def test_clients_of_classifiers(classifier, client):
    expected = asked(classifier, "/predict", {"inputs": "the wheat"})
    assert asked(classifier, *CLASSIFIER_CLIENTS[client]) == expected


@pytest.mark.parametrize("client", RERANKER_CLIENTS)
def test_clients_of_rerankers(reranker, client):
    order = [one["index"] for one in asked(reranker, "/rerank", {"query": "wheat", "texts": TEXTS})]
    got = asked(reranker, *RERANKER_CLIENTS[client])
    assert [one["index"] for one in (got["results"] if isinstance(got, dict) else got)] == order


@pytest.mark.parametrize("client", EMBEDDER_CLIENTS)
def test_clients_of_embedders(embedder, client):
    path, body = EMBEDDER_CLIENTS[client]
    got = asked(embedder, path, body)
    if path == "/similarity":
        assert got[0] == pytest.approx(1, abs=1e-5) and len(got) == 3
    elif path == "/v1/embeddings":
        assert all(len(base64.b64decode(one["embedding"])) == 4 * SIZE for one in got["data"])
    else:
        assert np.array(got).shape == (len(TEXTS) if isinstance(body["inputs"], list) else 1, SIZE)


def test_many_clients_of_mixed_lengths_all_get_their_own_answer(classifier, folders):
    draw = np.random.default_rng(0)
    given = ["wheat " * int(n) for n in draw.integers(1, 40, 59)] + ["wheat chaff " * 250]
    calls = [lambda text=text: asked(classifier, "/predict", {"inputs": text}) for text in given]
    threads, answers = in_threads(calls)
    for thread in threads:
        thread.join(60)
    assert np.abs(as_rows(answers) - probabilities(folders, given)).max() < 1e-4


# --- what is told beside ---------------------------------------------------------------------------------------------
def test_headers_say_what_an_answer_took(classifier):
    answer = classifier.post("/predict", json={"inputs": [[text] for text in TEXTS]})
    for name in (*HEADERS, "queue-time", "inference-time"):
        assert f"x-{name}" in answer.headers
    assert answer.headers["x-compute-type"] == "cpu" and answer.headers["x-compute-tokens"] == str(4 + 7 + 3)
    assert answer.headers["x-compute-characters"] == str(sum(map(len, TEXTS)))
    assert 3 <= int(answer.headers["x-thresher-tokens-kept"]) < 4 + 7 + 3
    assert all(
        int(answer.headers[f"x-{n}-time"]) >= 0 for n in ("compute", "total", "tokenization", "queue", "inference")
    )


def test_info_says_what_is_served(classifier, reranker, folders):
    info = classifier.get("/info").json()
    labels = {"0": "bad", "1": "fair", "2": "good"}
    assert info["model_type"] == {"classifier": {"id2label": labels, "label2id": {"bad": 0, "fair": 1, "good": 2}}}
    assert info["model_id"] == info["served_model_name"] == str(folders["classifier"])
    assert (info["max_input_length"], info["max_batch_tokens"], info["max_client_batch_size"]) == (512, 1024, 128)
    assert info["auto_truncate"] is True and info["model_dtype"] == "float32" and info["tokenization_workers"] >= 1
    other = reranker.get("/info").json()
    assert [*other["model_type"]] == ["reranker"] and other["served_model_name"] == "ranker"


def test_metrics_are_counted_and_can_be_read(folders):
    with serving(folders["classifier"]) as client:
        asked(client, "/predict", {"inputs": "the wheat"})
        asked(client, "/predict", {"inputs": [["the wheat"], ["chaff"]]})
        asked(client, "/rerank", {"query": "a", "texts": ["b"]}, 424)
        text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert all(re.fullmatch(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})?', name) for name in values)
    assert values['te_request_count{method="single"}'] == values['te_request_count{method="batch"}'] == "1"
    assert values['te_request_success{method="batch"}'] == "1" and values['te_request_failure{err="model_type"}'] == "1"
    assert float(values["thresher_tokens_in"]) == 4 + 4 + 3 > float(values["thresher_tokens_kept"]) > 0
    assert values["te_queue_size"] == "0" and values["te_request_duration_count"] == "2"
    assert (
        values["te_batch_next_size_sum"] == "3"
        and values['te_batch_next_size_bucket{le="+Inf"}'] == values["te_batch_next_size_count"]
    )
    assert float(values["thresher_batch_padding_ratio_sum"]) >= float(values["thresher_batch_padding_ratio_count"])
    durations = [float(values[f"te_request_{n}duration_sum"]) for n in ("", "tokenization_", "queue_", "inference_")]
    assert all(one > 0 for one in durations) and durations[0] >= sum(durations[1:])
    for name in {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE") and "histogram" in line}:
        buckets = [int(n) for key, n in values.items() if key.startswith(f"{name}_bucket")]
        assert buckets == sorted(buckets) and buckets[-1] == int(values[f"{name}_count"])


def test_tokens_of_a_text(classifier):
    (tokens,) = asked(classifier, "/tokenize", {"inputs": "wheatx"})
    assert tokens[0] == {"id": 2, "text": "[CLS]", "special": True, "start": None, "stop": None}
    assert [one["text"] for one in tokens] == ["[CLS]", "wheat", "x", "[SEP]"]
    assert (tokens[2]["start"], tokens[2]["stop"]) == (5, 6)
    assert len(asked(classifier, "/tokenize", {"inputs": ["a", "b c"], "add_special_tokens": False})[1]) == 2
    assert len(asked(classifier, "/tokenize", {"inputs": "a " * 900})[0]) == 902
    assert asked(classifier, "/tokenize", {"inputs": []}, 400)["error_type"] == "Empty"


@pytest.mark.slow
def test_a_graph_is_served_as_its_model(folders, tmp_path):
    from support.families import FAMILIES
    from thresher import export, prune

    options = {"pad_token_id": 0, "num_labels": 3, "vocab_size": len(tiny_tokenizer())}
    export(
        prune(FAMILIES["bert"].build(**options), TopK(keep=0.6)),
        tmp_path / "graph",
        tokenizer=tiny_tokenizer(),
        max_length=32,
    )
    expected = Scorer(tmp_path / "graph", threads=1)(TEXTS)
    with serving(Path(tmp_path / "graph")) as client:
        got = [best(row) for row in asked(client, "/predict", {"inputs": [[text] for text in TEXTS]})]
        assert [one["label"] for one in got] == expected["label"].tolist()
        assert np.abs(np.array([one["score"] for one in got]) - expected["probability"]).max() < 1e-5
        info = client.get("/info").json()
        assert (info["model_dtype"], info["max_input_length"]) == ("fp32", 32)
        assert "x-thresher-tokens-kept" not in client.post("/predict", json={"inputs": "a"}).headers


def test_the_graph_of_an_embedder_is_scored_and_served_as_its_model(tmp_path):
    from thresher import export

    net, tokenizer = load_embedder(save_embedder(tmp_path / "embedder", TopK(keep=0.6, at=(1,))))
    export(net, tmp_path / "graph", tokenizer=tokenizer)
    expected, scorer = Scorer(tmp_path / "embedder")(TEXTS)["embedding"], Scorer(tmp_path / "graph", threads=1)
    assert np.abs(scorer(TEXTS)["embedding"] - expected).max() < 1e-5
    holes = scorer([TEXTS[0], None])["embedding"]
    assert holes.shape == (2, SIZE) and np.isnan(holes[1]).all() and not np.isnan(holes[0]).any()
    with serving(tmp_path / "graph") as client:
        assert np.abs(np.array(asked(client, "/embed", {"inputs": TEXTS})) - expected).max() < 1e-5
        prompted = asked(client, "/embed", {"inputs": "grain", "prompt_name": "query"})
        assert (
            np.abs(np.array(prompted) - Scorer(tmp_path / "embedder")(["the farmer grain"])["embedding"]).max() < 1e-5
        )
        info = client.get("/info").json()
        assert (info["model_type"], info["max_input_length"]) == ({"embedding": {"pooling": "mean"}}, 64)
        assert "not a re-ranker" in asked(client, "/rerank", {"query": "a", "texts": ["b"]}, 424)["error"]


# --- what is refused -------------------------------------------------------------------------------------------------
EMPTY, WRONG = "Input validation error: `inputs` cannot be empty", "model is not a re-ranker model"
REFUSED = {
    "no text": ("/predict", {"inputs": ""}, 400, "Empty", EMPTY),
    "no text in a batch": ("/predict", {"inputs": [["a"], [""]]}, 400, "Empty", EMPTY),
    "no text in both of a pair": ("/predict", {"inputs": ["", ""]}, 400, "Empty", EMPTY),
    "no inputs": ("/predict", {}, 422, "Validation", "missing field `inputs`"),
    "null": ("/predict", {"inputs": None}, 422, "Validation", "missing field `inputs`"),
    "a number": ("/predict", {"inputs": 7}, 422, "Validation", "`inputs`: expected a string, a pair"),
    "an empty list": ("/predict", {"inputs": []}, 422, "Validation", "`inputs`: expected a string, a pair"),
    "a triple": ("/predict", {"inputs": [["a", "b", "c"]]}, 422, "Validation", "`inputs`: expected"),
    "mixed": ("/predict", {"inputs": [["a"], "b"]}, 422, "Validation", "`inputs`: expected"),
    "half a character": ("/predict", {"inputs": "\ud800"}, 422, "Validation", "half of a character"),
    "a flag that is none": (
        "/predict",
        {"inputs": "a", "raw_scores": "yes"},
        422,
        "Validation",
        "`raw_scores` is a string",
    ),
    "a side": ("/predict", {"inputs": "a", "truncation_direction": "Up"}, 422, "Validation", "`truncation_direction`"),
    "a list": ("/predict", ["a"], 422, "Validation", "expected an object"),
    "too many": (
        "/predict",
        {"inputs": [["a"]] * 129},
        422,
        "Validation",
        "batch size 129 > maximum allowed batch size 128",
    ),
    "rerank": ("/rerank", {"query": "a", "texts": ["b"]}, 424, "Backend", f"Backend error: {WRONG}"),
    "rerank documents": ("/rerank", {"query": "a", "documents": ["b"]}, 424, "Backend", f"Backend error: {WRONG}"),
    "embed": ("/embed", {"inputs": "a"}, 424, "Backend", "Backend error: Model is not an embedding model"),
    "similarity": (
        "/similarity",
        {"inputs": {"source_sentence": "a", "sentences": ["b"]}},
        424,
        "Backend",
        "Backend error: Model is not an embedding model",
    ),
    "no sentences": (
        "/similarity",
        {"inputs": {"source_sentence": "a", "sentences": []}},
        400,
        "Empty",
        "`inputs.sentences` cannot be empty",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_told_in_these_words(classifier, case):
    path, body, status, kind, said = REFUSED[case]
    answer = classifier.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error_type"]) == (status, kind)
    assert said in answer.json()["error"] and set(answer.json()) == {"error", "error_type"}
    assert classifier.get("/health").status_code == 200


def test_rerankers_refuse_too(reranker):
    assert asked(reranker, "/rerank", {"query": "a", "texts": []}, 400)["error"] == "`texts` cannot be empty"
    assert "`texts` is a string" in asked(reranker, "/rerank", {"query": "a", "texts": "b"}, 422)["error"]
    assert "missing field `query`" in asked(reranker, "/rerank", {"texts": ["b"]}, 422)["error"]
    assert "batch size 129" in asked(reranker, "/rerank", {"query": "a", "texts": ["b"] * 129}, 422)["error"]
    refused = asked(reranker, "/v2/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, 422)
    assert (refused["code"], refused["type"]) == (422, "Validation") and "`top_n` is 0" in refused["message"]
    assert asked(reranker, "/v1/rerank", {"query": "a", "documents": []}, 400)["code"] == 400
    assert "objects with `text`" in asked(reranker, "/v1/rerank", {"query": "a", "documents": [7]}, 422)["message"]
    asked(reranker, "/rerank", {"query": "a", "texts": [""]})  # half of a pair may be empty


def test_bodies_that_are_no_json(classifier):
    head = {"content-type": "application/json"}
    for body in (b"{", b"", b"\xff", b'{"inputs": ' + b"[" * 100_000, b'{"inputs": ' + b"9" * 5000 + b"}"):
        answer = classifier.post("/predict", content=body, headers=head)
        assert answer.status_code == 400 and answer.json()["error_type"] == "Validation", body[:20]
    plain = classifier.post("/predict", content=b'{"inputs": "a"}', headers={"content-type": "text/plain"})
    assert plain.status_code == 415 and "application/json" in plain.json()["error"]
    assert (
        classifier.post(
            "/predict", content=b"{}", headers={"content-type": "application/json; charset=utf-8"}
        ).status_code
        == 422
    )
    assert classifier.get("/predict").status_code == 405 and classifier.post("/decode", json={}).status_code == 404
    assert classifier.post("/embed_all", json={"inputs": "a"}).status_code == 404


def test_large_bodies_are_refused_with_and_without_a_length(folders):
    with serving(folders["classifier"], body=1000) as client:
        assert asked(client, "/predict", {"inputs": "a" * 2000}, 413)["error_type"] == "Validation"
        parts = [b'{"inputs": "', *[b"a" * 300] * 5, b'"}']
        head = {"content-type": "application/json"}
        answer = client.post("/predict", content=iter(parts), headers=head)
        assert answer.status_code == 413 and "1000 bytes at most" in answer.json()["error"]
        asked(client, "/predict", {"inputs": "a" * 500})
        assert client.service.active == 0


def test_a_key_is_asked_for_where_it_matters(folders):
    with serving(folders["classifier"], api_key="secret") as client:
        for head in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "secret"},
            {"authorization": "Bearer sécret"},
        ):
            head = {name: value.encode("latin-1") for name, value in head.items()}
            for answer in (
                client.post("/predict", json={"inputs": "a"}, headers=head),
                client.get("/info", headers=head),
            ):
                assert answer.status_code == 401 and answer.content == b""
        good = {"authorization": "Bearer secret"}
        assert client.post("/predict", json={"inputs": "a"}, headers=good).status_code == 200
        assert client.get("/info", headers=good).status_code == 200
        assert all(client.get(path).status_code == 200 for path in ("/health", "/ping", "/", "/metrics"))


def test_a_reranker_that_keeps_its_query_is_served(tmp_path):
    """As ``thresher train --task rerank`` and ``prune(CrossEncoder)`` make it; it is warmed up by pairs."""
    method = TopK(keep=0.6, at=(1,), protect={"until": [3]})
    with serving(save_tiny(tmp_path / "keeps", method, num_labels=1)) as client:
        answer = client.post("/rerank", json={"query": "the wheat", "texts": ["grain and chaff", "script"]})
        assert answer.status_code == 200 and len(answer.json()) == 2


def test_scores_that_are_all_one_have_an_order(folders):
    wire = Wire(outline(str(folders["reranker"])), "ranker", 8)
    assert [score for _, score in wire.ranked(np.array([[17.5], [25.0]], np.float32), False)] == [1.0, 1.0]
    assert [i for i, _ in wire.ranked(np.array([[17.5], [25.0]], np.float32), False)] == [1, 0]


def test_a_prompt_by_default_stands_before_every_text(tmp_path):
    """As sentence-transformers sets it; a named one takes its place, and token ids get none."""
    folder = save_embedder(tmp_path / "embedder")
    plain = Scorer(folder, threads=1)
    expected, named = plain(["the farmer grain"])["embedding"], plain(["wheat grain"])["embedding"]
    bare = plain(["grain"])["embedding"]
    place = folder / "config_sentence_transformers.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"default_prompt_name": "query"}))
    ids = tiny_tokenizer()("grain")["input_ids"]
    with serving(folder) as client:
        for path, name in (("/embed", "inputs"), ("/v1/embeddings", "input")):
            got = asked(client, path, {name: "grain"})
            got = got if path == "/embed" else [got["data"][0]["embedding"]]
            assert np.abs(np.array(got) - expected).max() < 1e-5
        got = asked(client, "/embed", {"inputs": "grain", "prompt_name": "passage"})
        assert np.abs(np.array(got) - named).max() < 1e-5
        assert np.abs(np.array(asked(client, "/embed", {"inputs": ids})) - bare).max() < 1e-5
