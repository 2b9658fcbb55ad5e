"""`make service-demo`: two servers and `xllm service`; one server is killed under load.

Every stream is asked for twice: undisturbed, and while kill -9 ends one of the two servers in the
middle.  Exit code 0 if each stream of the second time is the one of the first, event by event.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from xllm_plugin.bench.servers import Server, Waiting, clean_environment, find_free_port
from xllm_plugin.errors import XllmError
from xllm_plugin.models import prepare

READY_TIMEOUT_S = 600.0
PROGRESS_INTERVAL_S = 10.0
PATIENCE_S = 600.0
ADMIN_TOKEN = "demo"  # noqa: S105 - of a service on loopback that ends with this script
MODEL_NAME = "smollm2"
# Float32: the tokens of a request then do not depend on what else is in its batch.
FLAGS = (
    *("--served-model-name", MODEL_NAME, "--dtype", "float32", "--max-model-len", "2048"),
    *("--kv-cache-memory-bytes", str(2**28)),
)
PROMPTS = (
    "Tell me about the sea.",
    "Write a story about a fox.",
    "Explain how bread is made.",
    "What is a mountain?",
    "Describe the moon to a child.",
    "Why do leaves fall?",
    "How does a ship float?",
    "What makes music sad?",
)


@dataclass
class Stream:
    """What a client has got of one stream."""

    events: list[Any] = field(default_factory=list)
    is_whole: bool = False
    error: str = ""
    longest_pause_s: float = 0.0

    def comparable(self) -> list[Any]:
        """The events without what differs from one request to the next."""
        return [{**event, "id": "", "created": 0} for event in self.events]


def main() -> int:
    """Run the demonstration; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=96, help="of each stream")
    parser.add_argument("--logs", type=Path, help="folder for the logs; default: a temporary one")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            return demonstrate(arguments.streams, arguments.tokens, arguments.logs or Path(folder))
    except XllmError as error:
        error.stop()


def demonstrate(num_streams: int, num_tokens: int, logs: Path) -> int:
    """Start everything, kill one server, compare."""
    model = str(prepare(MODEL_NAME))
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(instance(number, model, logs)) for number in (1, 2)]
        url, admin_url = stack.enter_context(service([one.url for one in servers], logs))
        asyncio.run(until_both_are_ready(admin_url))
        say(f"{num_streams} streams of {num_tokens} tokens, undisturbed ...")
        wanted = asyncio.run(load(url, num_streams, num_tokens, None))
        say("the same again, and kill -9 for server 1 in the middle ...")
        found = asyncio.run(load(url, num_streams, num_tokens, servers[0]))
        report = asyncio.run(instances(admin_url))
    return judge(wanted, found, report)


def judge(wanted: list[Stream], found: list[Stream], report: list[Any]) -> int:
    """Say what happened; 0 if nobody could tell."""
    moved = sum(one["resumes"] for one in report)
    whole = sum(stream.is_whole for stream in found)
    pairs = zip(wanted, found, strict=True)
    equal = sum(one.is_whole and one.comparable() == two.comparable() for one, two in pairs)
    for one in report:
        say(f"{one['name']} is {one['state']} ({one['reason']}); errors {one['errors'] or 'none'}")
    for error in filter(None, (stream.error for stream in found)):
        say(f"a stream ended in an error: {error}")
    pause_s = max(stream.longest_pause_s for stream in found)
    say(f"streams that were on the killed server and went on elsewhere: {moved}")
    say(f"longest pause between two events of a stream: {pause_s:.2f} s")
    say(f"streams that completed: {whole} of {len(found)}")
    say(f"streams that are equal to the undisturbed ones: {equal} of {len(found)}")
    if not moved:
        say("FAILED: the kill met no stream, so nothing was shown.")
        return 1
    is_good = whole == equal == len(found)
    say("nothing was lost." if is_good else "FAILED.")
    return 0 if is_good else 1


# -- processes ----------------------------------------------------------------------------------


def instance(number: int, model: str, logs: Path) -> Server:
    """One vLLM server with our plugin."""
    port = find_free_port()
    command = [sys.executable, "-m", "xllm_plugin.cli", "serve", model, "--host", "127.0.0.1"]
    say(f"starting server {number} on port {port} (about a quarter of a minute) ...")
    return Server(
        f"server {number}",
        [*command, "--port", str(port), *FLAGS],
        port=port,
        log_path=logs / f"server-{number}.log",
        environment=clean_environment({"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}),
        ready_timeout_s=READY_TIMEOUT_S,
        on_wait=Progress(),
    )


@contextlib.contextmanager
def service(urls: list[str], logs: Path) -> Iterator[tuple[str, str]]:
    """`xllm service` over `urls`: its public and its admin URL."""
    port, admin_port = find_free_port(), find_free_port()
    command = [sys.executable, "-m", "xllm_plugin.cli", "service", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--admin-port", str(admin_port)]
    for url in urls:
        command += ["--instance", url]
    environment = clean_environment({"XLLM_SERVICE_ADMIN__TOKEN": ADMIN_TOKEN})
    log_path = logs / "service.log"
    with Server(
        "service", command, port=port, log_path=log_path, environment=environment
    ) as server:
        yield server.url, f"http://127.0.0.1:{admin_port}"


class Progress:
    """A line now and then while a server starts."""

    def __init__(self) -> None:
        self._said_s = 0.0

    def __call__(self, waiting: Waiting) -> None:
        """Print it, if the last one is long enough ago."""
        if waiting.elapsed_s - self._said_s >= PROGRESS_INTERVAL_S:
            self._said_s = waiting.elapsed_s
            say(f"{waiting.server} is still starting, {waiting.elapsed_s:.0f} s")


# -- clients ------------------------------------------------------------------------------------


async def load(url: str, num_streams: int, num_tokens: int, victim: Server | None) -> list[Stream]:
    """All streams at once; `victim` is killed when each of them has a quarter of its tokens."""
    streams = [Stream() for _ in range(num_streams)]
    # This machine's own servers are reached without any proxy.
    client = httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False)
    async with client, asyncio.TaskGroup() as group:
        for number, stream in enumerate(streams):
            prompt = PROMPTS[number % len(PROMPTS)]
            group.create_task(read(client, prompt, num_tokens, stream))
        if victim is not None:
            await kill(victim, streams, num_tokens // 4)
    return streams


async def kill(victim: Server, streams: list[Stream], num_events: int) -> None:
    """Kill a server once every stream has so many events."""
    while not is_underway(streams, num_events):  # noqa: ASYNC110 - a demonstration
        await asyncio.sleep(0.02)
    assert victim.pid is not None
    os.killpg(victim.pid, signal.SIGKILL)
    say(f"killed {victim.name} (process group {victim.pid})")


def is_underway(streams: list[Stream], num_events: int) -> bool:
    """Whether every stream has begun in earnest, or is over."""
    return all(len(one.events) > num_events or one.is_whole or one.error for one in streams)


async def read(client: httpx.AsyncClient, prompt: str, num_tokens: int, stream: Stream) -> None:
    """Ask for one stream and note every event of it."""
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    last_s = None
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if not line.startswith("data: "):
                    continue
                now_s = time.monotonic()
                pause_s = 0.0 if last_s is None else now_s - last_s
                stream.longest_pause_s = max(stream.longest_pause_s, pause_s)
                last_s = now_s
                take(stream, line.removeprefix("data: "))
    except httpx.HTTPError as error:
        stream.error = stream.error or f"{type(error).__name__}: {error}"


def take(stream: Stream, event: str) -> None:
    """Note one event."""
    if event == "[DONE]":
        stream.is_whole = not stream.error
        return
    content = json.loads(event)
    if "error" in content:
        stream.error = str(content["error"]["message"])
    stream.events.append(content)


async def instances(admin_url: str) -> list[Any]:
    """What the service says of its instances."""
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    async with httpx.AsyncClient(trust_env=False, headers=headers) as client:
        reply = await client.get(f"{admin_url}/v1/instances")
    found: list[Any] = reply.raise_for_status().json()["instances"]
    return found


async def until_both_are_ready(admin_url: str) -> None:
    """Wait for the service's first probes."""
    while [one["state"] for one in await instances(admin_url)] != ["ready"] * 2:  # noqa: ASYNC110
        await asyncio.sleep(0.1)


def say(text: str) -> None:
    """Print at once, beside what the servers log elsewhere."""
    sys.stderr.write(f"make service-demo: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
