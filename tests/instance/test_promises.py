"""Promises in headers and bodies, on a FastAPI app whose handler calls the engine as vLLM's do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from xllm_plugin.errors import PromiseError
from xllm_plugin.instance.promises import (
    HEADERS,
    PromiseMiddleware,
    current_request,
    promise_args,
)


def raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]


def test_each_header_is_an_entry_of_vllm_xargs() -> None:
    headers = {
        "x-xllm-ttft-ms": "500",
        "x-xllm-tpot-ms": "35.5",
        "x-xllm-class": "offline",
        "x-xllm-priority": "-3",
        "x-xllm-tenant": "team-a",
        "x-xllm-explain": "1",
        "content-type": "application/json",
    }
    assert promise_args(raw(headers)) == {
        "xllm_ttft_ms": "500",
        "xllm_tpot_ms": "35.5",
        "xllm_class": "offline",
        "xllm_priority": "-3",
        "xllm_tenant": "team-a",
    }


def test_a_request_without_our_headers_promises_nothing() -> None:
    assert promise_args(raw({"host": "x", "authorization": "Bearer y"})) == {}


WRONG = [
    ("x-xllm-ttft-ms", "-1"),
    ("x-xllm-ttft-ms", "nan"),
    ("x-xllm-ttft-ms", "inf"),
    ("x-xllm-ttft-ms", ""),
    ("x-xllm-tpot-ms", "0"),
    ("x-xllm-tpot-ms", "fast"),
    ("x-xllm-class", "batch"),
    ("x-xllm-priority", "1.5"),
    ("x-xllm-tenant", "a" * 65),
    ("x-xllm-tenant", "a b"),
    ("x-xllm-tenant", "m\xfcller"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_names_its_header(name: str, value: str) -> None:
    with pytest.raises(PromiseError, match=rf"^{name} is .*; accepted is ") as caught:
        promise_args(raw({name: value}))
    assert caught.value.field == name


def test_a_header_given_twice_is_refused() -> None:
    with pytest.raises(PromiseError, match="x-xllm-ttft-ms is given twice"):
        promise_args([(b"x-xllm-ttft-ms", b"1"), (b"x-xllm-ttft-ms", b"1")])


def make_app() -> FastAPI:
    app = FastAPI()
    app.add_middleware(PromiseMiddleware)

    @app.post("/ask")
    async def ask(request: Request) -> Any:
        # vLLM's `with_cancellation` runs its handlers in a task of their own.
        context = await asyncio.create_task(_context())
        assert context is not None
        context.response_headers["x-xllm-slo"] = "at-risk"
        return {"args": context.promise_args, "body": (await request.body()).decode()}

    return app


async def _context() -> Any:
    return current_request.get()


def post(app: FastAPI, headers: list[tuple[str, str]], content: bytes = b"") -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/ask", headers=headers, content=content)

    return asyncio.run(ask())


def test_headers_reach_the_handlers_task_and_the_body_is_untouched() -> None:
    content = b'{"vllm_xargs": {}, "prompt": "x"}'
    response = post(make_app(), [("X-XLLM-TTFT-MS", "500")], content)
    assert response.json() == {"args": {"xllm_ttft_ms": "500"}, "body": content.decode()}
    assert response.headers["x-xllm-slo"] == "at-risk"
    assert current_request.get() is None


@pytest.mark.parametrize("name", HEADERS)
def test_a_wrong_header_is_400_in_the_form_of_openais_errors(name: str) -> None:
    response = post(make_app(), [(name, "?")])
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "BadRequestError"
    assert error["code"] == 400
    assert error["param"] == name
    assert error["message"].startswith(f"{name} is '?'; accepted is ")


def test_requests_at_the_same_time_do_not_see_each_others_promises() -> None:
    app = FastAPI()
    app.add_middleware(PromiseMiddleware)
    both_are_here = asyncio.Event()
    here: list[str] = []

    @app.post("/ask")
    async def ask() -> dict[str, str]:
        context = current_request.get()
        assert context is not None
        here.append(context.promise_args["xllm_tenant"])
        if len(here) == 2:
            both_are_here.set()
        await both_are_here.wait()
        assert current_request.get() is context
        return context.promise_args

    async def ask_both() -> list[Any]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.gather(
                *(client.post("/ask", headers={"x-xllm-tenant": name}) for name in ("a", "b"))
            )

    found = [response.json()["xllm_tenant"] for response in asyncio.run(ask_both())]
    assert found == ["a", "b"]


def test_a_stream_is_passed_on_piece_by_piece() -> None:
    """The second piece is made only when the first has been sent."""
    sent: list[bytes] = []

    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"
        assert b"one" in sent
        yield b"two"

    app = FastAPI()
    app.add_middleware(PromiseMiddleware)

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(pieces())

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "path": "/stream",
        "raw_path": b"/stream",
        "query_string": b"",
        "headers": [],
        "state": {},
    }
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    assert sent == [b"", b"one", b"two", b""]


def test_what_is_no_http_request_passes_untouched() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["type"], receive, send, current_request.get()))

    ends = (SimpleNamespace(), SimpleNamespace())
    asyncio.run(PromiseMiddleware(app)({"type": "lifespan"}, *ends))  # type: ignore[arg-type]
    assert seen == [("lifespan", *ends, None)]
