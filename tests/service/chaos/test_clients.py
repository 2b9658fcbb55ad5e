"""Clients that send what is no request: they are told so, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.testing.chaos import MAX_BODY_BYTES, Chaos, Fault, Trial
from xllm_plugin.testing.fake_streams import Death
from xllm_plugin.testing.service_harness import request

Run = Callable[[Fault], None]
NUM_BYTES = 100 * 2**20
HELLO_OF_TLS = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200))


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/3.0\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nContent-Length: 8\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        HELLO_OF_TLS,
    ],
)
def test_malformed_http(trial: Run, raw: bytes) -> None:
    """It is answered with an error of HTTP, and no instance sees it."""

    async def fault(it: Trial) -> None:
        before = [await it.count(name) for name in ("a", "b")]
        client = await it.connect()
        client.send(raw)
        answer = await client.read_all()
        status = int(answer[9:12])
        assert 400 <= status < 600
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == status
        assert [await it.count(name) for name in ("a", "b")] == before
        await it.require_whole()

    trial(fault)


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b'"text"',
        b"5",
        b"{",
        b"\xff\xfe\x00",
        b'{"model": 5, "prompt": "x"}',
        b'{"model": ["fake"], "stream": "yes"}',
        b'{"model": "fake", "stream": true, "prompt": {"a": [1]}}',
        b'{"model": "fake", "max_tokens": -1e999, "n": "2"}',
        b'{"model": "fake", "user": "\\ud800", "prompt_cache_key": {}}',
        b'{"model": "fake", "vllm_xargs": [], "priority": "first"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_json_of_the_wrong_shape(trial: Run, body: bytes) -> None:
    """The instance judges it: what comes back is a whole answer."""

    async def fault(it: Trial) -> None:
        client = await it.connect()
        client.send(request(body, headers=b"Connection: close\r\n"))
        head, _ = await client.read_answer()
        assert 200 <= int(head[9:12]) < 500
        await it.require_whole()

    trial(fault)


def test_an_unknown_model(trial: Run) -> None:
    async def fault(it: Trial) -> None:
        status, body = await it.ask({"model": "absent"})
        error = json.loads(body)["error"]
        assert (status, error["code"], error["param"]) == (404, 404, "model")
        assert "`fake`" in error["message"]

    trial(fault)


def resident_bytes(chaos: Chaos) -> int:
    assert chaos.service.pid is not None
    pages = Path(f"/proc/{chaos.service.pid}/statm").read_text().split()[1]
    return int(pages) * 4096


def test_a_body_of_100_mb_that_is_announced(trial: Run) -> None:
    async def fault(it: Trial) -> None:
        client = await it.connect()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        client.send(head % NUM_BYTES + b"{")
        answer, _ = await client.read_answer()
        assert answer.startswith(b"HTTP/1.1 413")
        await it.require_whole()

    trial(fault)


def test_a_body_of_100_mb_in_chunks(trial: Run, chaos: Chaos) -> None:
    """It is refused at the limit, and what was read of it is not kept."""

    async def fault(it: Trial) -> None:
        before = resident_bytes(chaos)
        client = await it.connect()
        client.send(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        reading = asyncio.create_task(client.read_answer())
        try:
            for _ in range(NUM_BYTES // 65536):
                client.writer.write(chunk)
                await client.writer.drain()
                if reading.done():
                    break
        except ConnectionError:
            pass  # the service has hung up on it
        head, _ = await reading
        assert head.startswith(b"HTTP/1.1 413")
        assert resident_bytes(chaos) - before < 8 * MAX_BODY_BYTES

    trial(fault)


def test_a_large_body_that_may_be_sent(trial: Run) -> None:
    async def fault(it: Trial) -> None:
        status, body = await it.ask({"prompt": "x" * (MAX_BODY_BYTES - 1000)})
        assert (status, json.loads(body)["usage"]["completion_tokens"]) == (200, 20)

    trial(fault)


@pytest.mark.parametrize("num_read", [0, 1, 5])
def test_clients_that_hang_up(trial: Run, num_read: int) -> None:
    """Before the answer, at its first token, later: nothing goes on for them.

    Their streams never end by themselves: they stop, and wait until the service hangs up.
    """

    async def fault(it: Trial) -> None:
        for name in ("a", "b"):
            await it.behave(name, death=Death(2000, "silence"), times=8)
        body: dict[str, Any] = {"model": "fake", "stream": True, "prompt": "x", "user": "gone"}
        for _ in range(8):
            client = await it.connect()
            client.send(request(json.dumps(body).encode()))
            for _ in range(num_read):
                await client.reader.readuntil(b"data: ")
            client.writer.transport.abort()
        for name in ("a", "b"):
            await it.until(name, in_flight=0)
        sent = it.chaos.journal("gone")
        assert not any(entry.begins for entry in sent), "one went on at another instance"

    trial(fault)
