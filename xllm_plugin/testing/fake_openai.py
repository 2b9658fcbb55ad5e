"""A server that answers like vLLM's completions endpoint, with latencies and faults on demand.

The boundary that load clients and benchmarks are tested against::

    python -m xllm_plugin.testing.fake_openai --port 8000 --ttft-ms 5 --tpot-ms 1

Output tokens count up from the prompt's last token, so that equal prompts give equal outputs.
Needs starlette and uvicorn, which come with vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import click

__all__ = ["Behaviour", "main", "make_app"]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the server does.

    `max_tokens` cuts every answer short; every `fail_every`-th request is answered with
    `fail_status`, or breaks off in mid-stream if that is 200; `token_shift` changes the tokens, as
    a wrong engine would.  At most `slots` requests are served at once, the others wait in turn;
    with `offline_apart` those of class offline need no slot.
    """

    model: str = "fake"
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    max_tokens: int | None = None
    fail_every: int | None = None
    fail_status: int = 500
    token_shift: int = 0
    slots: int = 1_000_000
    offline_apart: bool = False


def make_app(behaviour: Behaviour) -> Any:
    """Return the ASGI application."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    seen = 0
    slots = asyncio.Semaphore(behaviour.slots)
    no_slot = contextlib.nullcontext()

    async def health(_: Request) -> Response:
        return Response()

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": behaviour.model}]})

    async def completions(request: Request) -> Response:
        nonlocal seen
        seen += 1
        is_fault = bool(behaviour.fail_every) and seen % (behaviour.fail_every or 1) == 0
        if is_fault and behaviour.fail_status != HTTPStatus.OK:
            fault = {"error": {"message": "a fault on demand"}}
            return JSONResponse(fault, status_code=behaviour.fail_status)
        body = await request.json()
        is_offline = body.get("vllm_xargs", {}).get("xllm_class") == "offline"
        slot = no_slot if behaviour.offline_apart and is_offline else slots
        tokens = _tokens(behaviour, body)
        if body.get("stream"):
            stream = _events(behaviour, tokens, body, slot, is_whole=not is_fault)
            return StreamingResponse(stream, media_type="text/event-stream")
        async with slot:
            await asyncio.sleep((behaviour.ttft_ms + behaviour.tpot_ms * len(tokens)) / 1e3)
        return JSONResponse(_answer(tokens, body.get("logprobs")))

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/completions", completions, methods=["POST"]),
        ]
    )


def _tokens(behaviour: Behaviour, body: dict[str, Any]) -> list[int]:
    count = min(body.get("max_tokens", 16), behaviour.max_tokens or sys.maxsize)
    prompt = body["prompt"]
    last = prompt[-1] if isinstance(prompt[-1], int) else len(prompt)
    return [last + behaviour.token_shift + step + 1 for step in range(count)]


async def _events(
    behaviour: Behaviour,
    tokens: list[int],
    body: dict[str, Any],
    slot: contextlib.AbstractAsyncContextManager[None],
    *,
    is_whole: bool,
) -> AsyncIterator[str]:
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 0}
    is_counted = (body.get("stream_options") or {}).get("continuous_usage_stats", False)
    async with slot:
        await asyncio.sleep(behaviour.ttft_ms / 1e3)
        for step, token in enumerate(tokens):
            if step:
                await asyncio.sleep(behaviour.tpot_ms / 1e3)
            usage["completion_tokens"] = step + 1
            chunk = {"choices": [{"index": 0, "text": f" {token}"}]}
            yield _event({**chunk, "usage": usage} if is_counted else chunk)
            if not is_whole:
                return
    yield _event({"choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _answer(tokens: list[int], logprobs: int | None) -> dict[str, Any]:
    """A non-streamed answer; the token has probability 1/2, each runner-up half of the last."""
    choice: dict[str, Any] = {"index": 0, "text": "".join(f" {token}" for token in tokens)}
    if logprobs:
        choice["logprobs"] = {
            "tokens": [f"token_id:{token}" for token in tokens],
            "token_logprobs": [math.log(0.5)] * len(tokens),
            "top_logprobs": [
                {
                    f"token_id:{token + rank}": math.log(0.5 ** (rank + 1))
                    for rank in range(logprobs)
                }
                for token in tokens
            ],
        }
    return {"object": "text_completion", "choices": [choice]}


@click.command()
@click.option("--port", type=int, required=True)
@click.option("--model", default="fake", show_default=True)
@click.option("--ttft-ms", type=float, default=0.0)
@click.option("--tpot-ms", type=float, default=0.0)
@click.option("--max-tokens", type=int)
@click.option("--fail-every", type=int)
@click.option("--fail-status", type=int, default=500)
@click.option("--token-shift", type=int, default=0)
@click.option("--slots", type=int, default=1_000_000)
@click.option("--offline-apart", is_flag=True)
@click.option("--die", help="Print this and exit with code 3, as an engine that cannot start.")
@click.option("--hang", is_flag=True, help="Never listen, and ignore SIGTERM.")
def main(port: int, die: str | None, hang: bool, **behaviour: Any) -> None:
    """Serve on loopback until told to stop."""
    if die is not None:
        click.echo(die, err=True)
        sys.exit(3)
    if hang:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        click.echo("hanging")
        while True:
            time.sleep(60)
    import uvicorn

    app = make_app(Behaviour(**behaviour))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
