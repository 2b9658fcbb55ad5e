"""Both clients against a real engine channel, and against sockets that misbehave."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.channel import AsyncChannelClient, ChannelClient
from xllm_plugin.errors import ChannelError, MisuseError


class LeapingClock:
    """Each look at it is `step_s` later than the one before."""

    def __init__(self, step_s: float) -> None:
        self._now_s = 0.0
        self._step_s = step_s

    def __call__(self) -> float:
        self._now_s += self._step_s
        return self._now_s


@pytest.fixture
def silent(directory: Path) -> Iterator[Path]:
    """A socket whose owner accepts and never says a word."""
    path = directory / "silent.dp0.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield path


def test_no_socket_says_how_to_start_an_engine(directory: Path) -> None:
    with pytest.raises(ChannelError, match=r"no engine listens at .*xllm serve MODEL"):
        ChannelClient(directory / "none.dp0.sock").snapshot()


def test_a_dead_socket_says_that_the_engine_is_gone(silent: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        path = silent.parent / "dead.dp0.sock"
        dead.bind(str(path))
    with pytest.raises(ChannelError, match="is gone"):
        ChannelClient(path).snapshot()


def test_the_time_out_covers_the_whole_call(silent: Path) -> None:
    client = ChannelClient(silent, 10.0, clock=LeapingClock(4.0))
    with pytest.raises(ChannelError, match="did not answer within 10 s"):
        client.call("ping")


def test_a_connection_is_dropped_after_a_time_out(engine: Any, engine_thread: Any) -> None:
    """The late reply to a call that was given up is not taken for the next one's."""
    engine.channel.register_call("slow", lambda: "late", on_engine_thread=True)
    with ChannelClient(engine.path, 0.05) as client:
        with pytest.raises(ChannelError):
            client.call("slow")
        client.timeout_s = 30
        with engine_thread(engine.channel):
            assert client.call("ping") == "pong"


def test_one_connection_serves_many_calls(engine: Any) -> None:
    with ChannelClient(engine.path, 30) as client:
        client.snapshot()
        first = client._socket
        client.describe()
        assert client._socket is first


def test_errors_of_a_call_leave_the_connection_open(engine: Any) -> None:
    with ChannelClient(engine.path, 30) as client:
        client.snapshot()
        first = client._socket
        with pytest.raises(MisuseError):
            client.call("nonsense")
        assert client._socket is first
        assert client.call("ping") == "pong"


def test_garbage_from_the_other_side_is_a_channel_error(directory: Path) -> None:
    path = directory / "odd.dp0.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400")

        odd = threading.Thread(target=serve)
        odd.start()
        with pytest.raises(ChannelError, match="does not speak"):
            ChannelClient(path, 30).call("ping")
        odd.join(30)


def test_async_client_does_all_the_same(engine: Any) -> None:
    async def converse() -> None:
        async with AsyncChannelClient(engine.path, 30) as client:
            assert (await client.snapshot()).sequence == 1
            assert await client.call("ping") == "pong"
            assert {call.name for call in await client.describe()} >= {"snapshot", "ping"}
            with pytest.raises(MisuseError):
                await client.call("nonsense")
            assert await client.call("ping") == "pong"

    asyncio.run(converse())


def test_async_tasks_share_a_client(engine: Any) -> None:
    async def converse() -> list[Any]:
        engine.channel.register_call("echo", lambda value: value)
        async with AsyncChannelClient(engine.path, 30) as client:
            return await asyncio.gather(*(client.call("echo", value=n) for n in range(50)))

    assert asyncio.run(converse()) == list(range(50))


def test_async_waiting_does_not_block_the_loop(silent: Path) -> None:
    async def converse() -> int:
        async with AsyncChannelClient(silent, 30) as client:
            waiting = asyncio.create_task(client.snapshot())
            num_turns = 0
            for _ in range(100):
                await asyncio.sleep(0)
                num_turns += 1
            assert not waiting.done()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert client._streams is None  # a reply yet to come must not be the next one's
            return num_turns

    assert asyncio.run(converse()) == 100


def test_async_time_out_and_absence_are_channel_errors(silent: Path) -> None:
    async def converse() -> None:
        with pytest.raises(ChannelError, match=r"did not answer within 0\.01 s"):
            await AsyncChannelClient(silent, 0.01).snapshot()
        with pytest.raises(ChannelError, match="no engine listens"):
            await AsyncChannelClient(silent.parent / "none.dp0.sock", 30).snapshot()

    asyncio.run(converse())


def test_async_client_reconnects_to_a_restarted_engine(engine: Any, make_engine: Any) -> None:
    async def converse() -> None:
        client = AsyncChannelClient(engine.path, 30)
        await client.snapshot()
        engine.channel.close()
        with pytest.raises(ChannelError, match="is gone"):
            await client.snapshot()
        make_engine().channel.start()
        assert (await client.snapshot()).sequence == 1
        await client.close()

    asyncio.run(converse())
