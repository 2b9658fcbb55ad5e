"""One instance as a process, which can be killed, with faults on demand and books of what it sent.

::

    python -m xllm_plugin.testing.chaos_instance --port 8000 --name a --journal FILE

The answer to everything is `TOKENS` tokens, whose ids count from 0; so whoever reads a stream knows
what it has to hold.  `POST /chaos` says how to behave (`Behaviour`), `GET /chaos` counts what has
come.  Each event with tokens is entered in the journal before it is sent: what a client has
got is in it, whatever was killed meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from xllm_plugin.instance.resumption import RESUME_PATH, Resumption
from xllm_plugin.testing.fake_instance import FakeInstance, Received, answer, answer_raw
from xllm_plugin.testing.fake_streams import Death, FakeModel, continued, send_events
from xllm_plugin.testing.instance_faults import BEFORE_AN_ANSWER, HALF_ANSWERS

__all__ = ["MODEL", "TEXT", "TOKENS", "Behaviour", "Entry", "main"]

MODEL: Final = "fake"
# Some characters need two tokens.
PIECES: Final = [b"Gr", "ü".encode(), "😀".encode()[:2], "😀".encode()[2:], b' "token_ids":[1] ']
TOKENS: Final = list(range(4 * len(PIECES)))
TEXT: Final = b"".join(4 * PIECES).decode()


class Behaviour(msgspec.Struct, kw_only=True):
    """How to behave from now on.

    Attributes:
        fault: of `BEFORE_AN_ANSWER` or `HALF_ANSWERS`, "kill" or "silence", instead of an answer.
        death: how streams end.
        times: so many requests have the fault, or die; then all is well again.
        pause_s: between two events of a stream.
        is_healthy: what /health says.
        lies: what probes are answered, by path.
    """

    fault: str = ""
    death: Death | None = None
    times: int = 1
    pause_s: float = 0.0
    is_healthy: bool = True
    lies: dict[str, str] = {}


class Entry(msgspec.Struct, kw_only=True):
    """A line of the journal: a stream begins at a token, or some tokens of it are sent."""

    by: str
    user: str
    begins: int | None = None
    sent: list[int] = []


class ChaosInstance:
    """The server and its behaviour."""

    def __init__(self, name: str, journal: Path) -> None:
        self.fake = FakeInstance(models=[MODEL], script=self._serve)
        self._name = name
        self._model = FakeModel(4 * PIECES)
        self._behaviour = Behaviour()
        self._num_requests = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._journal = os.open(journal, flags, 0o600)

    async def _serve(self, received: Received, writer: asyncio.StreamWriter) -> None:
        if received.target == b"/chaos":
            await self._steer(received, writer)
            return
        self._num_requests += 1
        behaviour = self._behaviour
        has_fault = behaviour.times > 0
        behaviour.times -= 1
        if has_fault and behaviour.fault:
            await self._fail(behaviour.fault, received, writer)
            return
        try:
            body = msgspec.convert(json.loads(received.body), dict[str, Any])
            await self._answer(body, behaviour.death if has_fault else None, received, writer)
        except (ValueError, msgspec.ValidationError, RecursionError) as error:
            error_body = json.dumps({"error": {"message": str(error), "code": 400}}).encode()
            await answer(error_body, "400 Bad Request")(received, writer)

    async def _steer(self, received: Received, writer: asyncio.StreamWriter) -> None:
        if received.body:
            asked = self._behaviour = msgspec.json.decode(received.body, type=Behaviour)
            self.fake.is_healthy = asked.is_healthy
            self.fake.lies = {path: body.encode() for path, body in asked.lies.items()}
        found = {"num_requests": self._num_requests, "num_lies": self.fake.num_lies}
        await answer(json.dumps(found).encode(), headers=("Connection: close",))(received, writer)

    async def _fail(self, fault: str, received: Received, writer: asyncio.StreamWriter) -> None:
        if fault in BEFORE_AN_ANSWER:
            await BEFORE_AN_ANSWER[fault](received, writer)
        elif fault in HALF_ANSWERS:
            await answer_raw(HALF_ANSWERS[fault], close=True)(received, writer)
        elif fault == "silence":
            await received.gone.wait()
        else:
            os.kill(os.getpid(), 9)

    async def _answer(
        self,
        body: dict[str, Any],
        death: Death | None,
        received: Received,
        writer: asyncio.StreamWriter,
    ) -> None:
        if received.target == RESUME_PATH.encode():
            resumption = msgspec.json.decode(received.body, type=Resumption)
            user = str(json.loads(bytes(resumption.body)).get("user"))
            events = continued(self._model, resumption)
            begins = resumption.num_tokens
        elif body.get("stream") is not True:
            await answer(_whole(body))(received, writer)
            return
        else:
            user, begins = str(body.get("user")), 0
            events = self._model.events(received.target.decode(), body)
        self._enter(Entry(by=self._name, user=user, begins=begins))

        def enter(event: bytes) -> None:
            sent = _tokens_in(event)
            if sent:
                self._enter(Entry(by=self._name, user=user, sent=sent))

        await send_events(
            events, death, received, writer, pause_s=self._behaviour.pause_s, before=enter
        )

    def _enter(self, entry: Entry) -> None:
        os.write(self._journal, msgspec.json.encode(entry) + b"\n")


def _whole(body: dict[str, Any]) -> bytes:
    """An answer that is no stream."""
    usage = {"prompt_tokens": 3, "completion_tokens": len(TOKENS)}
    choice = {"index": 0, "text": TEXT, "finish_reason": "length"}
    found = {"id": "fake-1", "object": "text_completion", "model": body.get("model")}
    return json.dumps({**found, "choices": [choice], "usage": usage}).encode()


def _tokens_in(event: bytes) -> list[int]:
    content = event.removeprefix(b"data: ")
    if not content.startswith(b"{"):
        return []
    found: list[int] = []
    for choice in json.loads(content)["choices"]:
        found += choice.get("token_ids") or []
    return found


async def _run(name: str, port: int, journal: Path) -> None:
    instance = ChaosInstance(name, journal)
    instance.fake.port = port
    async with instance.fake:
        await asyncio.Event().wait()


@click.command()
@click.option("--port", type=int, required=True)
@click.option("--name", required=True)
@click.option("--journal", type=click.Path(path_type=Path), required=True)
def main(port: int, name: str, journal: Path) -> None:
    """Serve on loopback until killed."""
    asyncio.run(_run(name, port, journal))


if __name__ == "__main__":
    main()
