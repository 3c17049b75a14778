"""A model that answers requests: bodies in, bodies out. No HTTP here; the server is around it.

Bodies are read and texts tokenized in a pool of threads, the model runs in one thread of its own, and one event loop
waits for both.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .batching import BUDGET
from .engine import Engine, Opening, Row, outline
from .metrics import Metrics
from .queue import Call, Full, Queue, Stopped
from .wire import Body, Order, Refusal, Wire

BODY = 2_000_000  # bytes of a request
REQUESTS = 1024  # at a time
LARGE = 4096  # numbers of an answer that are written in the pool, and not in the event loop
TOKENS = {"cpu": 1024}  # padded tokens of a batch, which is how long the next text waits; elsewhere ``BUDGET``
GUESS = 3  # characters of a token, until it is one


def usual_tokens(device: str) -> int:
    """Padded tokens of a batch, where nobody says: a processor takes as long for each token of few as of many."""
    return TOKENS.get(device, BUDGET)


@dataclass(frozen=True)
class Limits:
    """Say how much a service takes on.

    Attributes:
        tokens: padded tokens of a batch.
        wait_ms: milliseconds that the first batch after a pause waits for company.
        queue_tokens: tokens that may wait.
        client_batch: texts of one request.
        body: bytes of one request.
        requests: at a time.
    """

    tokens: int = TOKENS["cpu"]
    wait_ms: float = 2.0
    queue_tokens: int = 262_144
    client_batch: int = 128
    body: int = BODY
    requests: int = REQUESTS


@dataclass
class Reply:
    """Hold an answer: the status, the JSON, further headers."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class Service:
    """Serve a model.

    Attributes:
        about: what the folder says of the model.
        state: "loading", "ready", "stopping" or "failed".
        error: why it failed.
        active: requests that were let in and have no answer yet.

    Raises:
        ValueError: no such model, or one that neither classifies nor embeds.
    """

    def __init__(self, how: Opening, limits: Limits, name: str | None = None):
        self.how, self.limits, self.about = how, limits, outline(how.model)
        self.wire = Wire(self.about, name or how.model, limits.client_batch)
        self.state, self.active = "loading", 0
        self.error: Exception | None = None
        self.queue = Queue(
            lambda rows: self.engine.run(rows),
            tokens=limits.tokens,
            limit=limits.queue_tokens,
            wait=limits.wait_ms / 1000,
            told=self._told,
        )
        self.metrics = Metrics(lambda: {"te_queue_size": self.queue.size, "thresher_queue_tokens": self.queue.queued})
        self.workers = max(1, min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4))
        self.pool = ThreadPoolExecutor(self.workers, thread_name_prefix="thresher-text")
        self.engine: Engine

    # --- its life ---------------------------------------------------------------------------------------------------
    def start(self, told: Callable[[], Any] = lambda: None) -> None:
        """Open the model in its thread, warm it up and begin; ``told`` is called when that went well or failed."""

        def first() -> bool:
            try:
                self.engine = self.how.open()
                self.warm_up()
                self.state = "ready" if self.state == "loading" else self.state
            except Exception as error:
                self.state, self.error = "failed", error
            told()
            return self.state == "ready"

        self.queue.start(first)

    def warm_up(self) -> None:
        """Run a text of every width that is likely, and the largest batch: kernels are made and memory is taken now."""
        encode = self.engine.encode
        first = [["a"]] if self.about.kind == "reranker" else []  # a method may keep the query of a pair alone
        for side in ("right", "left", None):
            encode([*first, ["a"]], side)
        ((whole,), _) = encode([*first, ["a " * encode.longest]])
        longest = len(whole["input_ids"])
        widths = [n for n in (2**i for i in range(3, 20)) if n < longest]
        for width in (*widths, longest):
            self.engine.run([{name: values[:width] for name, values in whole.items()}])
        self.engine.run([whole] * max(1, self.limits.tokens // longest))

    @property
    def healthy(self) -> bool:
        """Whether requests are let in and answered."""
        return self.state == "ready" and self.queue.alive

    async def stop(self, seconds: float) -> bool:
        """Let nobody in, and wait until all have their answers; returns whether they got them in time."""
        loading, self.state = self.state == "loading", "stopping"
        end = time.monotonic() + seconds
        while self.active and time.monotonic() < end:
            await asyncio.sleep(0.01)
        finished = not self.active
        self.queue.stop(now=True)
        while self.active and time.monotonic() < end + 1:  # who gets no answer is told so
            await asyncio.sleep(0.01)
        if not loading:
            await asyncio.get_running_loop().run_in_executor(self.pool, self.queue.join, 1.0)
        self.pool.shutdown(wait=False, cancel_futures=True)
        return finished

    def close(self) -> None:
        """End the threads."""
        self.state = "stopping"
        self.queue.stop(now=True)
        self.queue.join()
        self.pool.shutdown()

    # --- requests ---------------------------------------------------------------------------------------------------
    def admit(self) -> None:
        """Raise Refusal where a request cannot be let in now."""
        if not self.healthy:
            raise Refusal("Unhealthy", "unhealthy", "unhealthy")
        if self.active >= self.limits.requests:
            raise Refusal("Overloaded", "Model is overloaded", "overloaded", wait=self.queue.patience())

    async def answer(self, read: Callable[[Body], Order], data: bytes) -> Reply:
        """Answer a request that was let in. Raises Refusal. Cancelled, its rows leave the queue."""
        began, call, loop = time.perf_counter(), Call(), asyncio.get_running_loop()
        try:
            order = await loop.run_in_executor(self.pool, self._prepare, read, data, call)
            values = await asyncio.wrap_future(call.future)
        except asyncio.CancelledError:
            call.dropped = True
            raise
        except Stopped:
            raise Refusal("Unhealthy", "unhealthy", "unhealthy") from None
        except Full as full:
            raise Refusal("Overloaded", "Model is overloaded", "overloaded", wait=full.wait) from None
        except Refusal:
            raise
        except Exception as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise Refusal("Backend", f"Backend error: {line}", "inference") from None
        if not np.isfinite(values).all():
            raise Refusal("Backend", "score is NaN", "inference")
        if values.size > LARGE:
            body = await loop.run_in_executor(self.pool, written, order, values, call.tokens)
        else:
            body = written(order, values, call.tokens)
        return Reply(200, body, self._headers(order, call, began))

    def _prepare(self, read: Callable[[Body], Order], data: bytes, call: Call) -> Order:
        """Read a body, make its rows and let them wait."""
        order = read(Body.of(data))
        self.metrics.count("te_request_count", method="single" if order.single else "batch")
        before = self._prompt(order)
        longest = self.engine.encode.longest
        guess = sum(
            min(longest, 2 + ((len(before) + sum(map(len, row))) // GUESS if isinstance(row, tuple) else len(row)))
            for row in order.rows
        )
        with self.queue.place(guess):
            if not call.dropped:
                call.rows = self._rows(order, before)
            self.queue.add(call)
        return order

    def _prompt(self, order: Order) -> str:
        """What stands before every text of an order: the prompt that it names, else that by default."""
        if order.prompt is None:
            return self.engine.before(None)
        if order.prompt not in self.engine.prompts:
            known = ", ".join(f"`{name}`" for name in self.engine.prompts) or "none"
            raise Refusal("Validation", f"`prompt_name`: the model has no prompt `{order.prompt}` (it has: {known})")
        if not all(isinstance(row, tuple) for row in order.rows):
            raise Refusal("Validation", "`prompt_name` cannot be used with token ids")
        return self.engine.before(order.prompt)

    def _rows(self, order: Order, before: str) -> list[Row]:
        """The rows of an order, with the prompt ``before`` each text: texts, pairs and token ids each at once."""
        encode, side = self.engine.encode, order.side if order.truncate else None
        rows: list[Any] = [None] * len(order.rows)
        for width in (1, 2):
            chosen = [i for i, row in enumerate(order.rows) if isinstance(row, tuple) and len(row) == width]
            if not all(any(order.rows[i]) for i in chosen):
                raise Refusal("Empty", "Input validation error: `inputs` cannot be empty")
            if chosen:
                texts = [[order.rows[i][k] for i in chosen] for k in range(width)]
                try:
                    made, _ = encode(texts, side, before)
                except Exception as error:
                    line = (str(error).splitlines() or [type(error).__name__])[0]
                    raise Refusal("Tokenizer", f"tokenizer error {line}", "tokenization") from None
                for i, row in zip(chosen, made, strict=True):
                    rows[i] = row
        for i, row in enumerate(order.rows):
            if isinstance(row, list):
                wrong = next((one for one in row if not 0 <= one < encode.vocabulary), None)
                if wrong is not None:
                    message = f"token id {wrong}: the model has tokens 0 to {encode.vocabulary - 1}"
                    raise Refusal("Validation", f"Input validation error: {message}")
                rows[i] = encode.of_ids(row, side)
        longest = max(len(row["input_ids"]) for row in rows)
        if longest > encode.longest:
            message = f"`inputs` must have less than {encode.longest} tokens. Given: {longest}"
            raise Refusal("Validation", f"Input validation error: {message}")
        return rows

    async def tokenize(self, data: bytes) -> Reply:
        """Answer POST /tokenize. Raises Refusal."""

        def work() -> bytes:
            body = Body.of(data)
            value = body.get("inputs")
            texts = [body.text("inputs")] if isinstance(value, str) else body.texts("inputs")
            if not texts or not all(texts):
                raise Refusal("Empty", "`inputs` cannot be empty")
            self.wire.count(len(texts))
            special = body.flag("add_special_tokens", True)
            try:
                return json.dumps([self.engine.encode.pieces(text, special) for text in texts]).encode()
            except ValueError as error:
                raise Refusal("Tokenizer", f"tokenizer error {error}", "tokenization") from None

        return Reply(200, await asyncio.get_running_loop().run_in_executor(self.pool, work))

    def info(self) -> dict[str, Any]:
        """What GET /info says."""
        from .. import __version__

        config, limits = self.about.config, self.limits
        if self.about.kind == "embedding":
            kind: dict[str, Any] = {"embedding": {"pooling": self.engine.pooling}}
        else:
            labels = {str(i): str(name) for i, name in config.id2label.items()}
            kind = {self.about.kind: {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}}}
        return {
            "model_id": self.how.model,
            "model_sha": None,
            "model_dtype": self.engine.precision,
            "served_model_name": self.wire.name,
            "model_type": kind,
            "max_concurrent_requests": limits.requests,
            "max_input_length": self.engine.encode.longest,
            "max_batch_tokens": limits.tokens,
            "max_batch_requests": None,
            "max_client_batch_size": limits.client_batch,
            "auto_truncate": True,
            "tokenization_workers": self.workers,
            "version": __version__,
        }

    def _headers(self, order: Order, call: Call, began: float) -> dict[str, str]:
        """What is told beside an answer, and counted."""
        total, rows = time.perf_counter() - began, len(call.rows)
        self.metrics.count("te_request_success", method="single" if order.single else "batch")
        spent = {"tokenization": call.since - began, "queue": call.waited / rows, "inference": call.ran / rows}
        self.metrics.observe(
            te_request_duration=total, **{f"te_request_{name}_duration": value for name, value in spent.items()}
        )
        ms = {name: str(round(1000 * value)) for name, value in (*spent.items(), ("total", total))}
        kept = {} if call.kept is None else {"x-thresher-tokens-kept": str(call.kept)}
        return {
            "x-compute-type": str(self.engine.device.type),
            "x-compute-time": ms["total"],
            "x-compute-characters": str(order.characters),
            "x-compute-tokens": str(call.tokens),
            "x-total-time": ms["total"],
            **{f"x-{name}-time": ms[name] for name in spent},
            **kept,
        }

    def _told(self, rows: int, tokens: int, padded: int, kept: int | None) -> None:
        """Count a batch."""
        self.metrics.count("thresher_tokens_in", tokens)
        if kept is not None:
            self.metrics.count("thresher_tokens_kept", kept)
        self.metrics.observe(
            te_batch_next_size=rows, te_batch_next_tokens=padded, thresher_batch_padding_ratio=padded / tokens
        )


def written(order: Order, values: np.ndarray, tokens: int) -> bytes:
    """The answer to an order as JSON."""
    return json.dumps(order.answer(values, tokens), ensure_ascii=False).encode()
