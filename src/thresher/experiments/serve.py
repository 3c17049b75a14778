"""Serve a model over HTTP until a signal ends it."""

from __future__ import annotations

import time
from typing import Any

from ..serving.engine import Opening
from ..serving.service import Limits, Service, usual_tokens
from .spec import ServeSpec, job, log


@job(ServeSpec)
def serve(spec: ServeSpec) -> dict[str, Any]:
    """Serve a classifier, a reranker or an embedder; returns what was answered, when SIGTERM or Ctrl-C has ended it.

    Raises:
        ValueError: no such model, one that neither classifies nor embeds, or no such host or port.
        ImportError: starlette or uvicorn is missing.
    """
    from ..serving import server  # which needs them

    how = Opening(spec.model, spec.max_length, spec.layout, spec.threads, spec.device)
    limits = Limits(spec.tokens or usual_tokens(spec.device), spec.wait_ms, spec.queue_tokens, spec.max_client_batch)
    service, began = Service(how, limits, spec.name), time.perf_counter()
    listening = server.listen(spec.host, spec.port)
    host, port = listening.getsockname()[:2]
    place = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    log.info("loading %s (%s); %s/health is 503 until it is ready", spec.model, service.about.kind, place)
    finished = server.serve(
        service,
        listening,
        spec.api_key,
        lambda: log.info("ready on %s after %.1f s", place, time.perf_counter() - began),
    )
    if not finished:
        log.error("not all requests were answered within %g s", server.GRACE)
    total = service.metrics.total
    tokens, padded = total("thresher_tokens_in"), total("te_batch_next_tokens")
    return {
        "model": spec.model,
        "kind": service.about.kind,
        "requests": int(total("te_request_success")),
        "refused": int(total("te_request_failure")),
        "rows": int(total("te_batch_next_size")),
        "tokens": int(tokens),
        "tokens_kept": int(total("thresher_tokens_kept")) or None,
        "padding_ratio": padded / tokens if tokens else None,
        "seconds": time.perf_counter() - began,
        "finished": finished,
    }
