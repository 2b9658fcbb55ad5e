"""Draining, leaving, reloading and stopping while streams run."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from xllm_plugin.service.kv_index.wire import AllBlocksCleared, Batch, BlockHash, BlockStored
from xllm_plugin.testing.chaos import Chaos, Fault, Trial
from xllm_plugin.testing.fake_publisher import FakePublisher

Run = Callable[[Fault], None]
CLEARED = msgspec.msgpack.encode(Batch(0.0, [AllBlocksCleared()]))


def test_a_drain_in_mid_stream(trial: Run) -> None:
    """What runs there finishes there; what comes goes elsewhere."""

    async def fault(it: Trial) -> None:
        async with it.load(4, pause_s=0.02) as streams:
            assert (await it.admin("POST", "/v1/instances/a/drain"))[0] == 200
            assert await it.require_whole() == ["b"]
        for stream in streams:
            assert it.chaos.require_balance(stream.result().user) == ["a"]

    trial(fault)


@pytest.mark.full
def test_an_instance_that_leaves_in_mid_stream(trial: Run, chaos: Chaos) -> None:
    """Its streams move, though it goes on sending."""

    async def fault(it: Trial) -> None:
        await it.behave("b", times=0, pause_s=1.0)  # which is `c` too
        registration = {"url": chaos.url("b"), "name": "c", "incarnation": "1", "models": ["fake"]}
        assert (await it.admin("POST", "/v1/registrations", registration))[0] == 200
        await it.until("c", state="ready")
        for name in ("a", "b"):
            await it.admin("POST", f"/v1/instances/{name}/drain")
        async with it.load(4) as streams:
            await it.admin("POST", "/v1/instances/a/undrain")
            await it.until("a", state="ready")
            await it.admin("DELETE", "/v1/registrations/c?incarnation=1")
        for stream in streams:
            assert it.chaos.require_balance(stream.result().user) == ["b", "a"]

    trial(fault)


def test_a_reload_in_mid_stream(trial: Run) -> None:
    async def fault(it: Trial) -> None:
        async with it.load(4, pause_s=0.02), it.settings(routing={"policy": "cost"}):
            await it.require_whole()

    trial(fault)


@pytest.mark.full
def test_a_service_that_is_told_to_stop_in_mid_stream(run: Any, tmp_path: Path) -> None:
    """It finishes what runs, takes nothing new and ends with 0."""
    with Chaos(tmp_path) as chaos:

        async def fault(it: Trial) -> None:
            for name in ("a", "b"):
                await it.behave(name, times=0, pause_s=0.02)
            async with it.load(6):
                assert chaos.service.pid is not None
                os.kill(chaos.service.pid, signal.SIGTERM)
                async with asyncio.timeout(30):
                    while True:
                        try:
                            client = await it.connect()
                        except ConnectionResetError:
                            continue  # it was in the port's queue when that closed
                        except ConnectionRefusedError:
                            break
                        client.writer.close()

        run(chaos.trial(fault, ends_service=True))
        assert chaos.service.exit_code(60.0) == 0


def blocks(first: int, count: int) -> bytes:
    """A batch that stores a chain of blocks."""
    hashes: list[BlockHash] = [str(first + number).encode() for number in range(count)]
    parent = str(first - 1).encode() if first else None
    tokens = list(range(4 * first, 4 * (first + count)))
    return msgspec.msgpack.encode(Batch(0.0, [BlockStored(hashes, parent, tokens, 4)]))


def test_kv_events_out_of_order(trial: Run) -> None:
    """The index says that it is not exact, or has the truth replayed; requests do not notice."""

    async def fault(it: Trial) -> None:
        with FakePublisher() as publisher:
            source = (
                f'{{"0": {{"topic": "", "endpoint": "{publisher.endpoint}", '
                f'"replay_endpoint": "{publisher.replay_endpoint}"}}}}'
            )
            await it.behave("a", times=0, lies={"/kv_event_sources": source})

            async def until(num_blocks: int, state: str = "live") -> None:
                async with asyncio.timeout(60):
                    while True:
                        (rank,) = (await it.seen("a"))["kv_index"] or ({},)
                        if (rank.get("num_blocks"), rank.get("state")) == (num_blocks, state):
                            return
                        await asyncio.sleep(0.01)

            await until(0)
            publisher.publish(blocks(0, 2))
            await until(2)
            publisher.publish(blocks(2, 2), lose=True)  # a gap, which is replayed
            publisher.publish(blocks(4, 2))
            await until(6)
            publisher.send(1, blocks(9, 1))  # one from before: another engine, as it seems
            publisher.send(2**64 - 1, b"\xc1")
            publisher.send(2**64 - 2, blocks(0, 1))
            publisher.send_raw(b"", b"no number of eight bytes" * 10, CLEARED)
            await it.require_whole()
            publisher.publish(CLEARED)
            publisher.publish(blocks(0, 3))
            await until(3)
        await it.require_whole()

    async def with_prefixes(it: Trial) -> None:
        async with it.settings(routing={"policy": "cost"}):
            await fault(it)

    trial(with_prefixes)
