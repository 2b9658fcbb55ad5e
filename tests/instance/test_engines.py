"""Which engines an API server looks for, and what it reads from them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from xllm_plugin.channel import ChannelConfig, EngineChannel
from xllm_plugin.instance.engines import AsyncEngineReader, EngineGroup, EngineReader

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
    channel.identity = msgspec.structs.replace(channel.identity, parent_pid=1)
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
