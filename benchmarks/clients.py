"""Real clients against servers: ``python benchmarks/clients.py CLASSIFIER RERANKER EMBEDDER``, three addresses.

To be run with the python of an environment that holds the clients, which ask for other versions than Thresher:
pip install huggingface_hub openai cohere litellm langchain-openai huggingface-api-haystack
llama-index-embeddings-text-embeddings-inference llama-index-postprocessor-tei-rerank
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.pop("HF_HUB_OFFLINE", None)  # which shuts this machine off, too
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody is there
TEXTS = ["the wheat", "the farmer and the grain", "chaff"]
QUERY = "who threshes?"


def huggingface(classifier: str, reranker: str, embedder: str) -> Any:
    from huggingface_hub import InferenceClient

    labels = InferenceClient(f"{classifier}/predict").text_classification(TEXTS[0])
    cosines = InferenceClient(f"{embedder}/similarity").sentence_similarity(TEXTS[0], TEXTS)
    return labels, cosines, InferenceClient(embedder).feature_extraction(TEXTS[0]).shape


def openai(classifier: str, reranker: str, embedder: str) -> Any:
    from openai import OpenAI

    answer = OpenAI(base_url=f"{embedder}/v1", api_key="any").embeddings.create(model="any", input=TEXTS)
    return len(answer.data), len(answer.data[0].embedding), answer.usage.total_tokens


def langchain(classifier: str, reranker: str, embedder: str) -> Any:
    from langchain_openai import OpenAIEmbeddings

    options = {"base_url": f"{embedder}/v1", "api_key": "any", "model": "any", "check_embedding_ctx_length": False}
    return [len(vector) for vector in OpenAIEmbeddings(**options).embed_documents(TEXTS)]


def cohere(classifier: str, reranker: str, embedder: str) -> Any:
    from cohere import Client, ClientV2

    asked = {"model": "any", "query": QUERY, "documents": TEXTS, "top_n": 2}
    first = Client(base_url=reranker, api_key="any").rerank(**asked, return_documents=True)
    second = ClientV2(base_url=reranker, api_key="any").rerank(**asked)
    return [[(one.index, one.relevance_score) for one in answer.results] for answer in (first, second)]


def litellm(classifier: str, reranker: str, embedder: str) -> Any:
    from litellm import rerank

    asked = {"query": QUERY, "documents": TEXTS, "api_base": reranker, "api_key": "any"}
    return [rerank(model=f"{kind}/any", **asked).results for kind in ("infinity", "huggingface")]


def haystack(classifier: str, reranker: str, embedder: str) -> Any:
    from haystack import Document
    from haystack_integrations.components.embedders.huggingface_api import HuggingFaceAPITextEmbedder
    from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker

    kind = {"api_type": "text_embeddings_inference", "api_params": {"url": embedder}}
    vector = HuggingFaceAPITextEmbedder(**kind, token=None).run(TEXTS[0])["embedding"]
    documents = [Document(content=text) for text in TEXTS]
    ranked = HuggingFaceTEIRanker(url=reranker, token=None).run(query=QUERY, documents=documents)["documents"]
    return len(vector), [one.score for one in ranked]


def llama_index(classifier: str, reranker: str, embedder: str) -> Any:
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    vectors = TextEmbeddingsInference(model_name="any", base_url=embedder).get_text_embedding_batch(TEXTS)
    nodes = [NodeWithScore(node=TextNode(text=text), score=0) for text in TEXTS]
    ranked = TextEmbeddingInference(base_url=reranker, top_n=2).postprocess_nodes(nodes, query_str=QUERY)
    return len(vectors), [one.score for one in ranked]


CLIENTS: list[Callable] = [huggingface, openai, langchain, cohere, litellm, haystack, llama_index]


def main() -> None:
    """Print what each client got; the exit code is the number of those that failed."""
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    failed = 0
    for client in CLIENTS:
        try:
            print(f"{client.__name__}: {client(*sys.argv[1:])}", flush=True)
        except Exception as error:
            failed += 1
            print(f"{client.__name__}: FAILED, {type(error).__name__}: {str(error)[:300]}", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
