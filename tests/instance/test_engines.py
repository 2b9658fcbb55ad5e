"""Which engines an API server looks for, and what it reads from them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from xllm_plugin.channel import ChannelConfig, EngineChannel, EngineLoad
from xllm_plugin.channel.messages import Reading
from xllm_plugin.errors import ChannelError
from xllm_plugin.instance.engines import (
    AsyncEngineReader,
    EngineGroup,
    EngineReader,
    EngineWatch,
)

Start = Callable[[int], EngineChannel]


def test_the_group_follows_vllms_configuration(vllm_config: Any, directory: Path) -> None:
    vllm_config.parallel_config.data_parallel_index = 2
    vllm_config.parallel_config.data_parallel_size_local = 2
    group = EngineGroup.from_vllm(ChannelConfig(directory=directory), vllm_config)
    assert group == EngineGroup("abcde", directory, (2, 3))
    named = ChannelConfig(directory=directory, instance_id="mine")
    assert EngineGroup.from_vllm(named, vllm_config).instance_id == "mine"


def test_one_of_several_api_servers_finds_the_engines_of_its_launcher(
    vllm_config: Any, directory: Path, start_engine: Start
) -> None:
    """Its own configuration has another instance id than theirs; the parent process is the same."""
    (directory / "dead.dp0.sock").touch()
    start_engine(0)
    vllm_config.instance_id = "other"
    vllm_config.parallel_config._api_process_count = 2
    config = ChannelConfig(directory=directory)
    assert EngineGroup.from_vllm(config, vllm_config).instance_id == "abcde"
    vllm_config.parallel_config._api_process_count = 1
    assert EngineGroup.from_vllm(config, vllm_config).instance_id == "other"


def test_engines_of_another_launcher_are_not_taken(
    vllm_config: Any, directory: Path, start_engine: Start
) -> None:
    channel = start_engine(0)
    channel.identity = msgspec.structs.replace(channel.identity, parent_pid=os.getppid() + 1)
    channel.publish_if_due(force=True)
    vllm_config.instance_id = "other"
    vllm_config.parallel_config._api_process_count = 2
    group = EngineGroup.from_vllm(ChannelConfig(directory=directory), vllm_config)
    assert group.instance_id == "other"


def test_sockets_are_those_expected_and_those_found(directory: Path) -> None:
    for name in ("abcde.dp5.sock", "other.dp1.sock"):
        (directory / name).touch()
    group = EngineGroup("abcde", directory, (0, 1))
    assert list(group.sockets()) == [0, 1, 5]


def test_async_reader_reports_each_rank(directory: Path, start_engine: Start) -> None:
    start_engine(1)

    async def read() -> tuple[Any, ...]:
        reader = AsyncEngineReader(EngineGroup("abcde", directory, (0, 1)), 30)
        first = await reader.read()
        again = await reader.read()  # over the connections that are kept
        assert [r.snapshot for r in again] == [r.snapshot for r in first]
        await reader.close()
        return first

    absent, present = asyncio.run(read())
    assert absent.dp_rank == 0
    assert absent.snapshot is None
    assert "no engine listens" in absent.error
    assert present.snapshot.engine.dp_rank == 1
    assert present.error is None
    assert present.age_s >= 0


def test_reader_keeps_what_an_engine_said_last(directory: Path, start_engine: Start) -> None:
    now_s = [10.0]
    group = EngineGroup("abcde", directory)
    reader = EngineReader(group, 30, clock=lambda: now_s[0])
    assert reader.recall() == ()
    channel = start_engine(0)
    (fresh,) = reader.read()
    channel.close()
    assert fresh.snapshot is not None
    now_s[0] = fresh.snapshot.monotonic_s + 7
    (kept,) = reader.read()
    assert kept.snapshot == fresh.snapshot
    assert kept.age_s == 7
    assert kept.error is not None
    assert reader.recall() == (kept,)
    reader.close()


def test_the_time_out_is_shared_by_all_ranks(directory: Path, start_engine: Start) -> None:
    """With no time left, later ranks are not asked, and say so."""
    start_engine(0)
    ticks = iter([0.0, 5.0])
    reader = EngineReader(EngineGroup("abcde", directory), 1.0, clock=lambda: next(ticks))
    (reading,) = reader.read()
    assert reading.snapshot is None
    assert reading.error is not None
    assert "did not answer" in reading.error


def num_running(readings: tuple[Reading, ...]) -> int:
    (reading,) = readings
    if reading.snapshot is None:
        raise ChannelError("no engine")
    return reading.snapshot.load.num_running


async def settle(watch: EngineWatch[int]) -> None:
    while watch._looking is not None:
        await asyncio.sleep(0)


def test_a_watch_answers_at_once_and_looks_meanwhile(
    directory: Path, start_engine: Start, caplog: pytest.LogCaptureFixture
) -> None:
    channel = start_engine(0)
    now_s = 0.0

    async def follow() -> None:
        nonlocal now_s
        reader = AsyncEngineReader(EngineGroup("abcde", directory), 30)
        watch = EngineWatch(reader, num_running, 0.05, clock=lambda: now_s)
        assert watch.latest() is None
        await settle(watch)
        assert watch.latest() == 3
        assert watch._looking is None  # nothing is asked while it is fresh
        channel._build_load = lambda: EngineLoad(num_running=4)
        channel.publish_if_due(force=True)
        now_s = 0.06
        assert watch.latest() == 3
        assert watch._looking is not None
        await settle(watch)
        assert watch.latest() == 4
        channel.close()
        for later_s in (1.0, 2.0):
            now_s = later_s
            watch.latest()
            await settle(watch)
        assert watch.latest() is None
        await reader.close()

    asyncio.run(follow())
    assert [record.message for record in caplog.records] == ["no engine"]
