"""A server under load: ``python benchmarks/serving.py MODEL [--seconds 60] [--threads 1]``.

Starts ``thresher serve MODEL`` (a classifier or a reranker) and prints rows as JSON: what the server can do at most,
times at 80 % of that, with far too many requests, and after SIGTERM. Four of five texts are short; who is refused waits
a second. Clients share the machine with the server. ``--seconds`` is that of the load at 80 %, of the three others a
quarter, 150 s at most: 10 minutes are ``--seconds 600``, 18 in all. Interrupted, the same call with the same ``--out``
goes on with the part that it was at.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

CLIENTS = 200
SHORT, LONG = (5, 60), (250, 500)  # words of a text
LONG_SHARE = 0.2
COMMAND = [sys.executable, "-c", "from thresher.cli.app import main; main()", "serve"]


def drawn(draw: random.Random) -> tuple[str, str]:
    """A text and its kind."""
    kind, bounds = ("long", LONG) if draw.random() < LONG_SHARE else ("short", SHORT)
    words = draw.choices(("wheat", "chaff", "grain", "field", "of", "the", "and", "farmer"), k=draw.randint(*bounds))
    return " ".join(words), kind


class Client:
    """One connection that stays, and what its requests took: (kind, status, seconds)."""

    def __init__(self, port: int, path: str, seed: int):
        self.port, self.path, self.draw = port, path, random.Random(seed)
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.seen: list[tuple[str, int, float]] = []

    async def ask(self) -> int:
        """Send a text; its status, 0 where there is no answer."""
        text, kind = drawn(self.draw)
        body = {"inputs": text} if self.path == "/predict" else {"query": "wheat", "texts": [text]}
        began, status = time.perf_counter(), 0
        try:
            status, answer = await self.post(json.dumps(body).encode())
            if status == 200 and not json.loads(answer):
                status = 0
        except (OSError, asyncio.IncompleteReadError):
            self.streams = None
        self.seen.append((kind, status, time.perf_counter() - began))
        return status

    async def post(self, body: bytes) -> tuple[int, bytes]:
        """The status and the body of an answer."""
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        head = f"POST {self.path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        answer = await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            writer.close()
            self.streams = None
        return int(lines[0].split()[1]), answer


async def load(port: int, path: str, seconds: float, rate: float | None, clients: int = CLIENTS) -> list[tuple]:
    """What requests took that ``clients`` sent for some seconds: ``rate`` a second in all, or as fast as can be."""
    end = time.perf_counter() + seconds
    made = [Client(port, path, seed) for seed in range(clients)]

    async def work(client: Client) -> None:
        due = time.perf_counter()
        while True:
            if rate is not None:
                due += client.draw.expovariate(rate / clients)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if time.perf_counter() > end:
                return
            if await client.ask() == 429:
                await asyncio.sleep(1)

    await asyncio.gather(*map(work, made))
    return [one for client in made for one in client.seen]


def summary(seen: list[tuple], seconds: float) -> dict:
    """Counts by status, and times by kind, of those that were answered."""
    row = {"requests": len(seen), "answered": sum(s == 200 for _, s, _ in seen)}
    row |= {"refused": sum(s == 429 for _, s, _ in seen), "lost": sum(s not in (200, 429) for _, s, _ in seen)}
    row["answered_per_second"] = round(row["answered"] / seconds, 1)
    for kind in ("short", "long"):
        times = [1000 * t for k, s, t in seen if k == kind and s == 200]
        if times:
            row |= {f"{kind}_ms_p{q}": round(float(np.percentile(times, q)), 1) for q in (50, 99)}
    return row


def got(port: int, path: str) -> tuple[int, str]:
    """The status and the text of a page."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except OSError:
        return 0, ""


def counted(port: int) -> dict[str, float]:
    """What the server has counted."""
    lines = [line for line in got(port, "/metrics")[1].splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def padding(before: dict[str, float], after: dict[str, float]) -> float:
    """Padded tokens over needed ones, between two counts."""
    name = ("te_batch_next_tokens_sum", "thresher_tokens_in")
    padded, needed = (after[one] - before[one] for one in name)
    return round(padded / needed, 4)


class Parts:
    """The rows of the parts that are done, in a file where one is named; a part is never run again."""

    def __init__(self, out: Path | None, about: dict):
        self.out, self.about = out, about
        known = json.loads(out.read_text())["rows"] if out is not None and out.exists() else []
        self.rows = [row for row in known if all(row.get(name) == value for name, value in about.items())]

    def run(self, name: str, make: Callable[[], dict]) -> dict:
        """The row of a part."""
        from run import as_json
        from thresher.evaluation.hardware import environment
        from thresher.evaluation.rows import whole

        row = next((row for row in self.rows if row["part"] == name), None)
        if row is None:
            made = {"part": name, **make()}
            row = {**made, **environment(), **self.about}
            self.rows.append(row)
            print(json.dumps(made), flush=True)
        if self.out is not None:
            with whole(self.out) as aside:
                aside.write_text(as_json({"rows": self.rows}))
        return row


def ended(process: subprocess.Popen, port: int, path: str) -> dict:
    """Stop the server while 50 requests are in flight; how many were answered, and how it ended."""

    async def stop() -> list[int]:
        clients = [Client(port, path, seed) for seed in range(50)]
        before = sum(value for name, value in counted(port).items() if name.startswith("te_request_count"))
        asking = [asyncio.create_task(client.ask()) for client in clients]
        while True:
            await asyncio.sleep(0.01)
            now = await asyncio.to_thread(counted, port)
            if sum(value for name, value in now.items() if name.startswith("te_request_count")) >= before + 50:
                break
        process.send_signal(signal.SIGTERM)
        return await asyncio.gather(*asking)

    answers = asyncio.run(stop())
    began = time.perf_counter()
    code = process.wait(60)
    return {
        "in_flight": 50,
        "answered": answers.count(200),
        "exit": code,
        "seconds": round(time.perf_counter() - began, 2),
    }


def loaded(port: int, path: str, seconds: float, memory: Callable[[], Any], **how: Any) -> dict:
    """The row of a load: what requests took, how much was padded, what the process took before and after."""
    first, before = counted(port), memory().rss
    row = summary(asyncio.run(load(port, path, seconds, **how)), seconds)
    row |= {"rss_mb_start": before >> 20, "rss_mb_end": memory().rss >> 20}
    return {"padding_ratio": padding(first, counted(port)), "load_seconds": seconds, **row}


def main() -> None:
    """Print a row for each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, help="of a batch; default: the server's own")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--out", type=Path, help="where the rows go as well")
    options = parser.parse_args()
    port, began = options.port, time.perf_counter()
    given = {"port": port, "threads": options.threads, "queue-tokens": 32768}
    given |= {} if options.tokens is None else {"tokens": options.tokens}
    command = [*COMMAND, options.model, *(str(x) for name, value in given.items() for x in (f"--{name}", value))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while got(port, "/health")[0] != 200:
            if process.poll() is not None:
                raise SystemExit(f"the server ended with code {process.returncode}")
            time.sleep(0.1)
        memory = psutil.Process(process.pid).memory_info
        info = json.loads(got(port, "/info")[1])
        kind, tokens = next(iter(info["model_type"])), info["max_batch_tokens"]
        path = "/rerank" if kind == "reranker" else "/predict"
        how = f"--seconds {options.seconds:g} --threads {options.threads} --tokens {tokens}"
        about = {"model": Path(options.model).name, "command": f"python benchmarks/serving.py MODEL {how}"}
        parts, short = Parts(options.out, about), min(options.seconds / 4, 150)
        opened = {"kind": kind, "tokens": tokens, "seconds": round(time.perf_counter() - began, 1)}
        parts.run("start", lambda: opened)
        most = parts.run(
            "as fast as can be, 32 clients", lambda: loaded(port, path, short, memory, rate=None, clients=32)
        )
        rate = round(0.8 * most["answered_per_second"], 1)
        for name, seconds, options_of in (
            (f"{CLIENTS} clients at 80 %", options.seconds, {"rate": rate}),
            (f"{3 * CLIENTS} clients, as fast as can be", short, {"rate": None, "clients": 3 * CLIENTS}),
            ("80 % again", short, {"rate": rate}),
        ):
            parts.run(name, lambda: {"asked_per_second": rate, **loaded(port, path, seconds, memory, **options_of)})  # noqa: B023
        parts.run("SIGTERM", lambda: ended(process, port, path))
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
