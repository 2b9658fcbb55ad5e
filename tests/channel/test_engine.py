"""What a scheduler uses: publishing, sections, calls between steps."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.channel import (
    ChannelClient,
    ChannelConfig,
    EngineChannel,
    EngineIdentity,
    EngineLoad,
    ExponentialMean,
    Snapshot,
    SnapshotPublisher,
)
from xllm_plugin.channel.messages import Request, encode_frame
from xllm_plugin.errors import ChannelError


def look(engine: Any) -> Snapshot:
    with ChannelClient(engine.path, 30) as client:
        return client.snapshot()


def test_the_first_snapshot_is_there_from_the_start(engine: Any) -> None:
    snapshot = look(engine)
    assert snapshot.sequence == 1
    assert snapshot.engine == engine.channel.identity
    assert snapshot.load.num_blocks_total == 100
    assert (snapshot.monotonic_s, snapshot.wall_time_s) == (1000.0, 1.7e9)


def test_a_snapshot_is_published_when_its_time_has_come(engine: Any) -> None:
    engine.load = EngineLoad(num_running=2)
    assert not engine.channel.publish_if_due(1000.0999)
    assert look(engine).load.num_running == 0
    assert engine.channel.publish_if_due(1000.1)
    assert look(engine).load.num_running == 2
    assert look(engine).sequence == 2
    assert not engine.channel.publish_if_due(1000.15)


def test_an_engine_going_idle_publishes_at_once(engine: Any) -> None:
    engine.load = EngineLoad(num_running=1)
    engine.channel.publish_if_due(1000.2)
    engine.load = EngineLoad(num_generated_tokens=5)
    assert engine.channel.publish_if_due(1000.21, force=True)
    assert look(engine).load == EngineLoad(num_generated_tokens=5)


def test_the_load_is_built_only_when_due(engine: Any) -> None:
    def unexpected() -> EngineLoad:
        raise AssertionError

    engine.channel._build_load = unexpected
    engine.channel.publish_if_due(1000.05)


def test_the_clock_is_read_when_no_time_is_given(engine: Any) -> None:
    assert not engine.channel.publish_if_due()
    engine.clock.now_s += 1
    assert engine.channel.publish_if_due()


def test_sections_join_the_snapshot(make_engine: Callable[..., Any]) -> None:
    engine = make_engine()
    engine.channel.add_section("memory", lambda: {"num_pages": 7})
    engine.channel.start()
    assert look(engine).sections == {"memory": {"num_pages": 7}}


def test_engine_calls_run_on_the_engine_thread(engine: Any, engine_thread: Any) -> None:
    engine.channel.register_call(
        "who", lambda: threading.current_thread().name, on_engine_thread=True
    )
    with engine_thread(engine.channel) as running, ChannelClient(engine.path, 30) as client:
        assert client.call("who") == running.thread.name


def test_a_queued_call_wakes_the_engine(directory: Path) -> None:
    woken = threading.Event()
    identity = EngineIdentity(instance_id="w", model="m", platform="p", device="d", pid=1)
    channel = EngineChannel(
        ChannelConfig(directory=directory), identity, EngineLoad, on_queued=woken.set
    )
    channel.register_call("work", lambda: "done", on_engine_thread=True)
    channel.start()
    results: list[Any] = []

    def ask() -> None:
        with ChannelClient(directory / "w.dp0.sock", 30) as client:
            results.append(client.call("work"))

    caller = threading.Thread(target=ask)
    caller.start()
    try:
        assert woken.wait(30)
        assert channel.has_pending_calls
        assert channel.drain_calls() == 1
        assert not channel.has_pending_calls
        caller.join(30)
        assert results == ["done"]
    finally:
        channel.close()


def test_a_call_that_no_step_executes_is_given_up_and_dropped(engine: Any) -> None:
    seen: list[int] = []
    engine.channel.register_call("work", lambda: seen.append(1), on_engine_thread=True)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(engine.path))
        connection.sendall(encode_frame(Request(id=1, call="work", timeout_s=0.0)))
        assert b"took no step within 0 s" in connection.recv(65536)
    assert engine.channel.drain_calls() == 0
    assert seen == []


def test_snapshots_are_served_while_an_engine_call_waits(engine: Any) -> None:
    engine.channel.register_call("work", lambda: None, on_engine_thread=True)
    caller = threading.Thread(target=lambda: ChannelClient(engine.path, 30).call("work"))
    caller.start()
    assert look(engine).sequence == 1
    while not engine.channel.drain_calls():
        pass
    caller.join(30)
    assert not caller.is_alive()


def test_close_gives_up_on_waiting_calls(engine: Any) -> None:
    engine.channel.register_call("work", lambda: None, on_engine_thread=True)
    errors: list[Exception] = []

    def ask() -> None:
        try:
            ChannelClient(engine.path, 30).call("work")
        except ChannelError as error:
            errors.append(error)

    caller = threading.Thread(target=ask)
    caller.start()
    while not engine.channel.has_pending_calls:
        pass
    engine.channel.close()
    caller.join(30)
    assert len(errors) == 1


def test_a_disabled_channel_does_nothing(directory: Path) -> None:
    identity = EngineIdentity(instance_id="off", model="m", platform="p", device="d", pid=1)
    channel = EngineChannel(ChannelConfig(enabled=False, directory=directory), identity, EngineLoad)
    channel.register_call("work", lambda: None)
    channel.start()
    assert not channel.publish_if_due(1e12)
    assert not channel.publish_if_due(1e12, force=True)
    assert channel.drain_calls() == 0
    assert not channel.has_pending_calls
    channel.close()
    assert list(directory.iterdir()) == []


def test_nothing_is_published_before_the_start_or_after_the_end(
    make_engine: Callable[..., Any],
) -> None:
    engine = make_engine()
    assert not engine.channel.publish_if_due(5000.0)
    engine.channel.start()
    engine.channel.close()
    assert not engine.channel.publish_if_due(5000.0)


def test_a_publisher_without_a_snapshot_says_so() -> None:
    with pytest.raises(ChannelError, match="has published no snapshot yet"):
        SnapshotPublisher().latest()


def test_the_exponential_mean_starts_at_its_first_sample() -> None:
    mean = ExponentialMean(weight=0.5)
    assert mean.value == 0.0
    mean.add(8.0)
    assert mean.value == 8.0
    mean.add(4.0)
    assert mean.value == 6.0
