"""A whole service with many kinds of instances and a load, to look at: for the dashboard's tests.

The service is the real one; the instances are scripts that stream tokens at their own speeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from xllm_plugin.instance.resumption import RESUME_PATH, Resumption
from xllm_plugin.service.app import Service
from xllm_plugin.service.config import ServiceConfig
from xllm_plugin.service.kv_index.wire import Batch, BlockHash, BlockStored
from xllm_plugin.service.lifecycle import Drain, State
from xllm_plugin.testing.fake_instance import FakeInstance, Received
from xllm_plugin.testing.fake_publisher import FakePublisher
from xllm_plugin.testing.fake_streams import FakeModel

__all__ = ["TOKEN", "BusyService", "busy_service", "drain"]

TOKEN = "for-the-admin"  # noqa: S105 - of a service on loopback that lives as long as a test
MODEL = "smollm2"
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_BLOCK_TOKENS = 16
_NUM_PUBLISHERS = 6
_PATIENCE_S = 60.0


@dataclass
class BusyService:
    """What runs."""

    service: Service
    instances: list[FakeInstance]
    session: aiohttp.ClientSession
    draw: random.Random = field(default_factory=lambda: random.Random(7))  # noqa: S311 - a load

    @property
    def url(self) -> str:
        """Of the dashboard."""
        return f"http://127.0.0.1:{self.service.admin_port}/dashboard"

    async def stream(self, prompt: list[int], num_tokens: int = 20) -> None:
        """One request, read to its end."""
        body = {"model": MODEL, "stream": True, "prompt": prompt, "max_tokens": num_tokens}
        url = f"http://127.0.0.1:{self.service.port}/v1/completions"
        with contextlib.suppress(aiohttp.ClientError):
            async with self.session.post(url, json=body) as reply:
                await reply.read()

    async def load(self, num_requests: int, gap_s: float) -> None:
        """Streams with shared and own prefixes, one begun each `gap_s` on average."""
        running = set()
        for number in range(num_requests):
            shared = [self.draw.randrange(4)] * _BLOCK_TOKENS * self.draw.randrange(1, 9)
            prompt = [*shared, *self.draw.choices(range(100, 30_000), k=100)]
            running.add(asyncio.create_task(self.stream(prompt, 10 + number % 30)))
            await asyncio.sleep(self.draw.expovariate(1 / gap_s))
        await asyncio.gather(*running)

    async def until_ready(self, num_instances: int) -> None:
        """Wait until so many instances are ready."""
        async with asyncio.timeout(_PATIENCE_S):
            while sum(one.life.state is State.READY for one in self.service.fleet) < num_instances:
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def busy_service(
    num_instances: int, *, sample_interval_s: float = 0.2, **sections: Any
) -> AsyncIterator[BusyService]:
    """A service over `num_instances` that are ready; `sections` are sections of `ServiceConfig`."""
    async with contextlib.AsyncExitStack() as stack:
        instances = []
        for number in range(num_instances):
            instance = await stack.enter_async_context(_instance(number))
            instances.append(instance)
            if number < _NUM_PUBLISHERS:
                _publish(stack.enter_context(FakePublisher()), instance, number)
        entries = [
            {"url": one.url, "name": f"gpu-{number:02}"} for number, one in enumerate(instances)
        ]
        config: dict[str, Any] = {
            "listen": {"host": "127.0.0.1", "port": 0},
            "admin": {"port": 0, "token": TOKEN, "sample_interval_s": sample_interval_s},
            "instances": {"static": entries, "probe_interval_s": 0.3, "probe_timeout_s": 20.0},
            "timeouts": {"drain_s": 0.0},
        }
        for name, values in sections.items():
            config[name] = {**config.get(name, {}), **values}
        service = Service(ServiceConfig(**config))
        stack.push_async_callback(service.stop)
        await service.start()
        session = await stack.enter_async_context(aiohttp.ClientSession())
        busy = BusyService(service, instances, session)
        await busy.until_ready(num_instances)
        yield busy


def drain(busy: BusyService, number: int) -> None:
    """Drain one instance by hand."""
    instance = busy.service.fleet.get(f"gpu-{number:02}")
    assert instance is not None
    busy.service.fleet.report(instance, Drain())


def _instance(number: int) -> FakeInstance:
    """Each is a little slower than the one before it."""
    pace_s = 0.012 + 0.001 * (number % 7)

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        num_sent, body = 0, received.body
        if received.target.decode() == RESUME_PATH:
            resumption = msgspec.json.decode(body, type=Resumption)
            num_sent, body = len(resumption.chunks), bytes(resumption.body)
        wanted = json.loads(body)
        model = FakeModel([b" token"] * int(wanted["max_tokens"]))
        writer.write(_HEAD)
        await asyncio.sleep(0.03 + len(wanted["prompt"]) * 1e-4)
        for event in model.events("/v1/completions", wanted)[num_sent:]:
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
            await asyncio.sleep(pace_s)
        writer.write(b"0\r\n\r\n")

    instance = FakeInstance(models=[MODEL], script=script)
    instance.metrics = (
        f"vllm:num_requests_running {number % 5 + 1}\n"
        f"vllm:num_requests_waiting {max(0, number % 4 - 2)}\n"
        f"vllm:kv_cache_usage_perc {(0.31 + 0.17 * number) % 1:.3f}\n"
        f"process_start_time_seconds {1000 + number}\n"
    )
    return instance


def _publish(publisher: FakePublisher, instance: FakeInstance, number: int) -> None:
    """Let an instance hold one of the shared prefixes, and say so."""
    replay = publisher.replay_endpoint or ""
    source = {"endpoint": publisher.endpoint, "replay_endpoint": replay, "topic": ""}
    instance.kv_event_sources = {"0": source}
    tokens = [number % 4] * _BLOCK_TOKENS * 8
    hashes: list[BlockHash] = [f"{number}-{block}".encode() for block in range(8)]
    event = BlockStored(hashes, None, tokens, _BLOCK_TOKENS)
    publisher.publish(msgspec.msgpack.encode(Batch(0.0, [event])))
