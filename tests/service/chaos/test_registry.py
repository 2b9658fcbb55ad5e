"""A registry that is slow, gone, or tells what was: streams and new requests go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from xllm_plugin.testing.chaos import Chaos, Fault, Trial
from xllm_plugin.testing.etcd_server import EtcdServer

pytestmark = pytest.mark.full
Run = Callable[[Fault], None]


@pytest.fixture(scope="module")
def chaos(etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    """A service whose instances are in etcd and nowhere else."""
    patience = {"poll_s": 0.2, "command_timeout_s": 1.0, "dial_timeout_s": 1.0}
    lease = {"lease_s": 300, "suspect_s": 300, "static": []}
    folder = tmp_path_factory.mktemp("etcd-chaos")
    url = {"url": f"{etcd.url}/chaos"}
    with Chaos(folder, instances=lease, etcd={**patience, **url}) as it:
        yield it


@pytest.fixture
def trial(run: Any, chaos: Chaos) -> Run:
    return lambda fault: run(chaos.trial(fault))


async def until_registry(it: Trial, state: str) -> None:
    async with asyncio.timeout(60):
        while (await it.admin("GET", "/v1/instances"))[1]["registry"]["state"] != state:
            await asyncio.sleep(0.01)


async def serve_without(it: Trial, etcd_is_back: Callable[[], None]) -> None:
    """Streams that run and streams that come while the registry is away."""
    try:
        await until_registry(it, "away")
        for first in ("a", "b"):
            assert await it.require_whole(first=first) == [first]
    finally:
        etcd_is_back()
    await until_registry(it, "connected")
    await it.require_whole()


def test_a_registry_that_is_slow(trial: Run, etcd: EtcdServer) -> None:
    async def fault(it: Trial) -> None:
        async with it.load(6, pause_s=0.1):
            etcd.freeze()
            await it.behave("a", times=0)
            await serve_without(it, etcd.thaw)

    trial(fault)


def test_a_registry_that_is_gone_while_an_instance_dies(
    trial: Run, chaos: Chaos, etcd: EtcdServer
) -> None:
    async def fault(it: Trial) -> None:
        async with it.load(6, pause_s=0.2):
            etcd.kill()
            await until_registry(it, "away")
            chaos.kill("a")
            await it.until("a", state="suspect")
            assert await it.require_whole() == ["b"]
            await asyncio.to_thread(chaos.restart, "a")
            await it.until("a", state="ready")
            await serve_without(it, etcd.start)

    trial(fault)


def test_a_registry_that_names_who_is_dead(trial: Run, chaos: Chaos) -> None:
    """Its record stays for as long as its lease; probes and traffic find out."""

    async def fault(it: Trial) -> None:
        async with it.load(6, pause_s=0.1):
            chaos.kill("a")
            assert await it.require_whole() == ["b"]
        await it.until("a", state="suspect")
        assert await it.require_whole() == ["b"]

    trial(fault)


def test_a_registry_that_has_forgotten_everything(
    trial: Run, chaos: Chaos, etcd: EtcdServer
) -> None:
    """Who was known is suspect, and used, until it registers again."""

    async def fault(it: Trial) -> None:
        async with it.load(6, pause_s=0.1):
            etcd.kill()
            etcd.forget()
            etcd.start()
            for name in ("a", "b"):
                await it.until(name, state="suspect")
            await it.require_whole()
        chaos.register()

    trial(fault)
