"""Real clients against servers: ``python benchmarks/clients.py CLASSIFIER RERANKER EMBEDDER [CLIENT...]``, three
addresses.

To be run with the python of an environment that holds the clients, which ask for other versions than Thresher:
pip install huggingface_hub openai cohere litellm langchain-openai huggingface-api-haystack
llama-index-embeddings-text-embeddings-inference llama-index-postprocessor-tei-rerank

Prints a line of JSON for each client: what it got, "labels" (label: score; the best) of the first text, "cosines" of
all texts with the first, "vectors" of all texts or the first, "scores" (text: score) of texts for the query; or
"failed", why.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

TEXTS = ["the wheat", "the farmer and the grain", "chaff"]
QUERY = "who threshes?"
Got = dict[str, Any]


def huggingface(classifier: str, reranker: str, embedder: str) -> Got:
    from huggingface_hub import InferenceClient

    best = InferenceClient(f"{classifier}/predict").text_classification(TEXTS[0])  # the first of what TEI answers
    cosines = InferenceClient(f"{embedder}/similarity").sentence_similarity(TEXTS[0], TEXTS)
    vectors = InferenceClient(embedder).feature_extraction(TEXTS[0]).tolist()
    return {"labels": {best.label: best.score}, "cosines": cosines, "vectors": vectors}


def openai(classifier: str, reranker: str, embedder: str) -> Got:
    from openai import OpenAI

    answer = OpenAI(base_url=f"{embedder}/v1", api_key="any").embeddings.create(model="any", input=TEXTS)
    return {"vectors": [one.embedding for one in answer.data]}


def langchain(classifier: str, reranker: str, embedder: str) -> Got:
    from langchain_openai import OpenAIEmbeddings

    options = {"base_url": f"{embedder}/v1", "api_key": "any", "model": "any", "check_embedding_ctx_length": False}
    return {"vectors": OpenAIEmbeddings(**options).embed_documents(TEXTS)}


def cohere(classifier: str, reranker: str, embedder: str) -> Got:
    from cohere import Client

    asked = {"model": "any", "query": QUERY, "documents": TEXTS, "top_n": 2, "return_documents": True}
    results = Client(base_url=reranker, api_key="any").rerank(**asked).results
    return {"scores": {one.document.text: one.relevance_score for one in results}}


def cohere_v2(classifier: str, reranker: str, embedder: str) -> Got:
    from cohere import ClientV2

    asked = {"model": "any", "query": QUERY, "documents": TEXTS, "top_n": 2}
    results = ClientV2(base_url=reranker, api_key="any").rerank(**asked).results
    return {"scores": {TEXTS[one.index]: one.relevance_score for one in results}}


def litellm(classifier: str, reranker: str, embedder: str, kind: str = "infinity") -> Got:
    from litellm import rerank

    asked = {"query": QUERY, "documents": TEXTS, "api_base": reranker, "api_key": "any"}
    results = rerank(model=f"{kind}/any", **asked).results
    return {"scores": {TEXTS[one["index"]]: one["relevance_score"] for one in results}}


def litellm_huggingface(classifier: str, reranker: str, embedder: str) -> Got:
    return litellm(classifier, reranker, embedder, "huggingface")


def haystack(classifier: str, reranker: str, embedder: str) -> Got:
    from haystack import Document
    from haystack_integrations.components.embedders.huggingface_api import HuggingFaceAPITextEmbedder
    from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker

    kind = {"api_type": "text_embeddings_inference", "api_params": {"url": embedder}}
    vector = HuggingFaceAPITextEmbedder(**kind, token=None).run(TEXTS[0])["embedding"]
    documents = [Document(content=text) for text in TEXTS]
    ranked = HuggingFaceTEIRanker(url=reranker, token=None).run(query=QUERY, documents=documents)["documents"]
    return {"vectors": [vector], "scores": {one.content: one.score for one in ranked}}


def llama_index(classifier: str, reranker: str, embedder: str) -> Got:
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    vectors = TextEmbeddingsInference(model_name="any", base_url=embedder).get_text_embedding_batch(TEXTS)
    nodes = [NodeWithScore(node=TextNode(text=text), score=0) for text in TEXTS]
    ranked = TextEmbeddingInference(base_url=reranker, top_n=2).postprocess_nodes(nodes, query_str=QUERY)
    return {"vectors": vectors, "scores": {one.node.text: one.score for one in ranked}}


CLIENTS: dict[str, Callable[[str, str, str], Got]] = {
    client.__name__: client
    for client in (
        huggingface,
        openai,
        langchain,
        cohere,
        cohere_v2,
        litellm,
        litellm_huggingface,
        haystack,
        llama_index,
    )
}


def main() -> None:
    """Print what each client got; the exit code is the number of those that failed."""
    if len(sys.argv) < 4 or not {*sys.argv[4:]} <= {*CLIENTS}:
        raise SystemExit(f"{__doc__}\nclients: {', '.join(CLIENTS)}")
    os.environ.pop("HF_HUB_OFFLINE", None)  # which shuts this machine off, too
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody is there
    failed = 0
    for name in sys.argv[4:] or CLIENTS:
        try:
            got = CLIENTS[name](*sys.argv[1:4])
        except Exception as error:
            failed += 1
            got = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps({"client": name, **got}), flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
