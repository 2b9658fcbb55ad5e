"""A server that answers like vLLM's completions endpoint, with latencies and faults on demand.

The boundary that load clients and benchmarks are tested against::

    python -m xllm_plugin.testing.fake_openai --port 8000 --ttft-ms 5 --tpot-ms 1

Output tokens count up from the prompt's last token, so that equal prompts give equal outputs.
Needs starlette and uvicorn, which come with vLLM.
"""

from __future__ import annotations

import asyncio
import json
import math
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import click

__all__ = ["Behaviour", "main", "make_app"]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the server does.

    `max_tokens` cuts every answer short; every `fail_every`-th request is answered 500;
    `token_shift` changes the tokens, as a wrong engine would.
    """

    model: str = "fake"
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    max_tokens: int | None = None
    fail_every: int | None = None
    token_shift: int = 0


def make_app(behaviour: Behaviour) -> Any:
    """Return the ASGI application."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    seen = 0

    async def health(_: Request) -> Response:
        return Response()

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": behaviour.model}]})

    async def completions(request: Request) -> Response:
        nonlocal seen
        seen += 1
        if behaviour.fail_every and seen % behaviour.fail_every == 0:
            return JSONResponse({"error": {"message": "a fault on demand"}}, status_code=500)
        body = await request.json()
        tokens = _tokens(behaviour, body)
        if body.get("stream"):
            stream = _events(behaviour, tokens, len(body["prompt"]))
            return StreamingResponse(stream, media_type="text/event-stream")
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
    behaviour: Behaviour, tokens: list[int], prompt_tokens: int
) -> AsyncIterator[str]:
    await asyncio.sleep(behaviour.ttft_ms / 1e3)
    for step, token in enumerate(tokens):
        if step:
            await asyncio.sleep(behaviour.tpot_ms / 1e3)
        yield _event({"choices": [{"index": 0, "text": f" {token}"}]})
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(tokens)}
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
@click.option("--token-shift", type=int, default=0)
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
