"""A load client that costs little: a closed loop on raw sockets, in a process of its own.

``python load.py --port N --clients 32 --seconds 4 [--stream] [--prompt-bytes 2000] [--key KEY]``
writes one JSON line: requests, events, TTFT and duration percentiles in ms, errors.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import cast

import click
import httptools
import uvloop

from xllm_plugin.bench.curve import percentile

_WARM_UP_S = 0.5


def request_bytes(prompt_bytes: int, *, is_stream: bool, max_tokens: int, key: str) -> bytes:
    """A chat request as the openai client sends it."""
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "word " * (prompt_bytes // 5)}],
            "model": "mock",
            "max_tokens": max_tokens,
            "stream": is_stream,
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept-Encoding: gzip\r\n"
        "Connection: keep-alive\r\nAccept: application/json\r\nContent-Type: application/json\r\n"
        "User-Agent: OpenAI/Python 2.25.0\r\nX-Stainless-Lang: python\r\n"
        "X-Stainless-Package-Version: 2.25.0\r\nX-Stainless-OS: Linux\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Client(asyncio.Protocol):
    """One connection that asks again and again."""

    def __init__(self, request: bytes, tally: Tally) -> None:
        self._request = request
        self._tally = tally
        self._sent_s = 0.0
        self._first_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count a connection that the other side closed."""
        del exc
        if not self._tally.is_over:
            self._tally.errors += 1

    def data_received(self, data: bytes) -> None:
        """Parse."""
        self._tally.events += data.count(b"data: {")
        self._parser.feed_data(data)

    def on_body(self, _: bytes) -> None:
        """Note the first bytes."""
        if not self._first_s:
            self._first_s = time.perf_counter()

    def on_message_complete(self) -> None:
        """Count, and ask again."""
        tally = self._tally
        now_s = time.perf_counter()
        if self._parser.get_status_code() != 200:  # noqa: PLR2004
            tally.errors += 1
        tally.requests += 1
        tally.ttft_ms.append((self._first_s - self._sent_s) * 1e3)
        tally.duration_ms.append((now_s - self._sent_s) * 1e3)
        if not tally.is_over:
            asyncio.get_running_loop().call_soon(self._ask)

    def _ask(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._first_s = 0.0
        self._sent_s = time.perf_counter()
        self._transport.write(self._request)


class Tally:
    """What all connections count."""

    def __init__(self) -> None:
        self.is_over = False
        self.reset()

    def reset(self) -> None:
        """Begin to count."""
        self.requests = self.events = self.errors = 0
        self.ttft_ms: list[float] = []
        self.duration_ms: list[float] = []


async def _load(port: int, num_clients: int, seconds: float, request: bytes) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    tally = Tally()
    for _ in range(num_clients):
        await loop.create_connection(lambda: Client(request, tally), "127.0.0.1", port)
    await asyncio.sleep(_WARM_UP_S)
    tally.reset()
    print("counting", flush=True)
    began_s = time.perf_counter()
    await asyncio.sleep(seconds)
    took_s = time.perf_counter() - began_s
    print("counted", flush=True)
    tally.is_over = True
    return {
        "requests": tally.requests,
        "events": tally.events,
        "errors": tally.errors,
        "seconds": took_s,
        "ttft_p50_ms": percentile(tally.ttft_ms or [0.0], 50),
        "ttft_p99_ms": percentile(tally.ttft_ms or [0.0], 99),
        "duration_p50_ms": percentile(tally.duration_ms or [0.0], 50),
    }


@click.command()
@click.option("--port", type=int, required=True)
@click.option("--clients", type=int, default=32)
@click.option("--seconds", type=float, default=4.0)
@click.option("--stream", "is_stream", is_flag=True)
@click.option("--prompt-bytes", type=int, default=2000)
@click.option("--max-tokens", type=int, default=64)
@click.option("--key", default="none")
def main(
    *,
    port: int,
    clients: int,
    seconds: float,
    is_stream: bool,
    prompt_bytes: int,
    max_tokens: int,
    key: str,
) -> None:
    """Load one port and write what came of it."""
    request = request_bytes(prompt_bytes, is_stream=is_stream, max_tokens=max_tokens, key=key)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(_load(port, clients, seconds, request))), flush=True)


if __name__ == "__main__":
    main()
