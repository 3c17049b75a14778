"""HTTP around a service: routes, keys, limits of bodies, signals. Needs starlette and uvicorn."""

from __future__ import annotations

import asyncio
import ctypes
import hmac
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Route
except ImportError as error:
    raise ImportError(f"serving needs pip install 'thresher-pruning[serve]': {error}") from error

from .service import Reply, Service
from .wire import Body, Order, Refusal

GRACE = 30.0  # seconds to answer what was let in, after a signal
BLOCK = 2**20  # bytes: larger blocks of memory are handed back when they are free
PATIENCE = 30.0  # seconds for a body to arrive
BACKLOG = 2048
KEEP = 75  # seconds for which a connection without requests stays: longer than those of load balancers


def application(service: Service, api_key: str | None = None) -> Starlette:
    """Return the ASGI application; the service is started and stopped by whoever made it.

    The key is asked for on all routes but those of health and metrics.
    """
    wire = service.wire
    usual = {"classifier": wire.predict, "reranker": wire.rerank, "embedding": wire.embed}[service.about.kind]
    orders: dict[str, Callable[[Body], Order]] = {
        "/predict": wire.predict,
        "/rerank": wire.rerank,
        "/embed": wire.embed,
        "/similarity": wire.similarity,
        "/v1/embeddings": wire.openai,
        "/embeddings": wire.openai,
        "/v1/rerank": wire.rerank_v1,
        "/v2/rerank": wire.rerank_v2,
        "/": usual,
        "/invocations": usual,
    }
    guard = Guard(service, api_key)
    posts = [Route(path, guard.ordered(read), methods=["POST"]) for path, read in orders.items()]
    return Starlette(
        routes=[
            *posts,
            Route("/tokenize", guard.posted(service.tokenize), methods=["POST"]),
            Route("/info", guard.info, methods=["GET"]),
            *(Route(path, guard.health, methods=["GET"]) for path in ("/health", "/ping", "/")),
            Route("/metrics", guard.metrics, methods=["GET"]),
        ]
    )


class Guard:
    """Make endpoints: who may ask, how much, and what a refusal looks like."""

    def __init__(self, service: Service, api_key: str | None):
        self.service = service
        self.key = None if api_key is None else f"Bearer {api_key}".encode()

    def knows(self, request: Request) -> bool:
        """Whether a request has the key."""
        given = request.headers.get("authorization", "").encode("latin-1")
        return self.key is None or hmac.compare_digest(given, self.key)

    def ordered(self, read: Callable[[Body], Order]) -> Callable:
        """The endpoint of one kind of order."""
        return self.posted(lambda data: self.service.answer(read, data))

    def posted(self, answer: Callable[[bytes], Any]) -> Callable:
        """The endpoint that answers a body of JSON."""
        service = self.service

        async def endpoint(request: Request) -> Response:
            if not self.knows(request):
                return Response(status_code=401)
            try:
                with admitted(service):
                    data = await body_of(request, service.limits.body)
                    return sent(await while_connected(request, answer(data)))
            except Refusal as refusal:
                return self.refused(refusal, request)

        return endpoint

    def refused(self, refusal: Refusal, request: Request) -> Response:
        """The answer to a request that gets none, counted."""
        self.service.metrics.count("te_request_failure", err=refusal.label)
        headers = {"retry-after": str(refusal.wait)} if refusal.wait else {}
        body = json.dumps(refusal.body(request.url.path), ensure_ascii=False).encode()
        return sent(Reply(refusal.status, body, headers))

    async def info(self, request: Request) -> Response:
        """GET /info."""
        if not self.knows(request):
            return Response(status_code=401)
        if not self.service.healthy:
            return self.refused(Refusal("Unhealthy", "unhealthy", "unhealthy"), request)
        return sent(Reply(200, json.dumps(self.service.info(), ensure_ascii=False).encode()))

    async def health(self, request: Request) -> Response:
        """GET /health, and what asks the same."""
        if self.service.healthy:
            return Response(status_code=200)
        return sent(Reply(503, json.dumps(Refusal("Unhealthy", "unhealthy").body("/health")).encode()))

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4")


def sent(reply: Reply) -> Response:
    """A reply as a response of starlette's."""
    return Response(reply.body, reply.status, reply.headers, media_type="application/json")


@contextmanager
def admitted(service: Service) -> Iterator[None]:
    """Let a request in, or raise Refusal."""
    service.admit()
    service.active += 1
    try:
        yield
    finally:
        service.active -= 1


async def body_of(request: Request, most: int) -> bytes:
    """The body of a request. Raises Refusal for one that is no JSON by its head, too long or too slow."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise Refusal("Validation", "Expected request with `Content-Type: application/json`", status=415)
    large = Refusal("Validation", f"length limit exceeded: a body has {most} bytes at most", status=413)
    if int(request.headers.get("content-length") or 0) > most:
        raise large

    async def read() -> bytes:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > most:
                raise large
        return bytes(data)

    try:
        return await asyncio.wait_for(read(), PATIENCE)
    except asyncio.TimeoutError:
        raise Refusal("Validation", f"the body did not arrive within {PATIENCE:g} s", status=408) from None
    except ClientDisconnect:
        raise Refusal("Validation", "the client has left", "disconnected", status=400) from None


async def while_connected(request: Request, answer: Any) -> Reply:
    """The result of a coroutine, which is cancelled when the client leaves."""
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(request.receive())  # after the body there is nothing but the end to receive
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            with suppress(asyncio.CancelledError, Refusal):
                await work
            raise Refusal("Validation", "the client has left", "disconnected", status=400)
        return work.result()
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ValueError of one line where it cannot."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"cannot listen on {host} port {port} ({why}): choose another --host or --port") from None


class _Server(uvicorn.Server):
    """A server that leaves signals to whoever runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(service: Service, listening: socket.socket, api_key: str | None, ready: Callable[[], Any]) -> bool:
    """Serve until a signal comes, in this thread; returns whether everything that was let in was answered.

    SIGTERM and SIGINT end it: the health is 503, nobody is let in, and what was let in is answered within ``GRACE``
    seconds. A second signal ends the process at once.

    Args:
        ready: called when the model is open and warm.

    Raises:
        what the model raised when it was opened.
    """
    steady()
    return asyncio.run(_serve(service, listening, api_key, ready))


def steady() -> None:
    """Keep the memory of the process flat, in the C library of GNU; others are left alone.

    Left to itself it learns to keep large blocks. Batches of ever new shapes then leave holes, and a process that needs
    600 MB has 900 after a thousand of them.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(-3, BLOCK)  # M_MMAP_THRESHOLD


async def _serve(service: Service, listening: socket.socket, api_key: str | None, ready: Callable[[], Any]) -> bool:
    config = uvicorn.Config(
        application(service, api_key),
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP,
        timeout_graceful_shutdown=5,
    )
    server, loop, over = _Server(config), asyncio.get_running_loop(), asyncio.Event()

    def opened() -> None:
        if service.state == "ready":
            ready()
        elif service.state == "failed":
            over.set()

    with signals(lambda: loop.call_soon_threadsafe(over.set)):
        task = asyncio.ensure_future(server.serve(sockets=[listening]))
        service.start(lambda: loop.call_soon_threadsafe(opened))
        ended = asyncio.ensure_future(over.wait())
        await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
        finished = await service.stop(GRACE)
        server.should_exit = True
        await task
        ended.cancel()
    if service.error is not None:
        raise service.error
    return finished


@contextmanager
def signals(told: Callable[[], Any]) -> Iterator[None]:
    """Tell of the first SIGTERM or SIGINT, and end the process at the second; outside the main thread they are left
    alone."""
    seen: list[int] = []

    def heard(number: int, frame: Any) -> None:
        if seen:
            os._exit(128 + number)
        seen.append(number)
        told()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
