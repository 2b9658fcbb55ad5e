"""The server against real clients, well-behaved and not."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.channel import CallQueue, ChannelClient, ChannelServer
from xllm_plugin.channel.messages import MAX_FRAME_BYTES, Request, encode_frame
from xllm_plugin.errors import ChannelError, ConfigError, InternalError, MisuseError


@pytest.fixture
def make_server(directory: Path) -> Iterator[Callable[..., ChannelServer]]:
    servers: list[ChannelServer] = []

    def make(**options: Any) -> ChannelServer:
        servers.append(ChannelServer(directory / "e.dp0.sock", **options))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def server(make_server: Callable[..., ChannelServer]) -> ChannelServer:
    server = make_server()
    server.start()
    return server


def raw_connection(server: ChannelServer) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    connection.connect(str(server.path))
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def pings(server: ChannelServer) -> bool:
    with ChannelClient(server.path, 30) as client:
        return client.call("ping") == "pong"


def test_ping_and_describe_are_always_there(server: ChannelServer) -> None:
    def set_limit(limit: int, *, hard: bool = False) -> None:
        """Limit something.

        More about it.
        """

    server.register_call("set_limit", set_limit, on_engine_thread=True)
    assert pings(server)
    with ChannelClient(server.path, 30) as client:
        calls = {call.name: call for call in client.describe()}
    assert set(calls) == {"ping", "describe", "set_limit"}
    assert calls["set_limit"].summary == "Limit something."
    assert calls["set_limit"].parameters == ("limit: 'int'", "hard: 'bool' = False")
    assert calls["set_limit"].thread == "engine"
    assert calls["ping"].thread == "server"


def test_calls_run_on_the_server_thread_with_their_arguments(server: ChannelServer) -> None:
    def add(left: int, right: int = 1) -> dict[str, Any]:
        return {"sum": left + right, "thread": threading.current_thread().name}

    server.register_call("add", add)
    with ChannelClient(server.path, 30) as client:
        assert client.call("add", left=2) == {"sum": 3, "thread": "xllm-channel"}
        assert client.call("add", left=2, right=5)["sum"] == 7


def test_wrong_arguments_are_the_callers_fault(server: ChannelServer) -> None:
    server.register_call("scale", lambda factor: factor)
    with ChannelClient(server.path, 30) as client:
        with pytest.raises(MisuseError, match=r"got \['size'\], parameters: factor"):
            client.call("scale", size=1)
        with pytest.raises(MisuseError, match="unknown call 'shrink'; this engine knows: ping"):
            client.call("shrink")
        assert client.call("scale", factor=3) == 3


def test_what_a_call_raises_reaches_its_caller_and_nobody_else(server: ChannelServer) -> None:
    def refuse() -> None:
        raise ConfigError("too many moons: 3; at most 2. Remove one.")

    def crash() -> None:
        raise ZeroDivisionError("oops")

    server.register_call("refuse", refuse)
    server.register_call("crash", crash)
    server.register_call("unsendable", object)
    with ChannelClient(server.path, 30) as client:
        with pytest.raises(ConfigError, match="too many moons"):
            client.call("refuse")
        with pytest.raises(InternalError, match="'crash' failed: ZeroDivisionError: oops"):
            client.call("crash")
        with pytest.raises(MisuseError, match="result cannot be sent"):
            client.call("unsendable")
        assert client.call("ping") == "pong"


def test_a_result_that_is_too_long_is_an_error_not_an_end(server: ChannelServer) -> None:
    server.register_call("flood", lambda: "x" * (MAX_FRAME_BYTES + 1))
    with ChannelClient(server.path, 30) as client:
        with pytest.raises(ChannelError, match="over the limit"):
            client.call("flood")
        assert client.call("ping") == "pong"


def test_a_name_is_registered_once(server: ChannelServer) -> None:
    with pytest.raises(InternalError, match="'ping' is registered twice"):
        server.register_call("ping", lambda: None)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"does not speak the xllm channel protocol"),
        (struct.pack(">2sBBI", b"xL", 1, 0, MAX_FRAME_BYTES + 1), b"was announced"),
        (struct.pack(">2sBBI", b"xL", 2, 0, 0), b"version 2 of the channel protocol"),
        (struct.pack(">2sBBI", b"xL", 1, 0, 3) + b"\xc1\xff\x00", b"is no Request"),
        (struct.pack(">2sBBI", b"xL", 1, 0, 4) + b"\xa3\xff\xfe\xfd", b"is no Request"),
    ],
)
def test_garbage_gets_one_error_and_is_closed(
    sent: bytes, said: bytes, server: ChannelServer
) -> None:
    with raw_connection(server) as connection:
        connection.sendall(sent)
        assert said in read_to_end(connection)
    assert pings(server)


def test_good_frames_before_garbage_are_answered(server: ChannelServer) -> None:
    with raw_connection(server) as connection:
        connection.sendall(encode_frame(Request(id=1, call="ping")) + b"rubbish")
        answer = read_to_end(connection)
    assert b"pong" in answer
    assert b"does not speak" in answer


def test_clients_that_leave_in_the_middle_do_no_harm(server: ChannelServer) -> None:
    frame = encode_frame(Request(id=1, call="describe"))
    for num_bytes in range(len(frame) + 1):
        with raw_connection(server) as connection:
            connection.sendall(frame[:num_bytes])
    assert pings(server)


def test_a_client_that_resets_while_its_call_runs_does_no_harm(server: ChannelServer) -> None:
    entered, leave = threading.Event(), threading.Event()

    def linger() -> str:
        entered.set()
        assert leave.wait(30)
        return "x" * 1_000_000

    server.register_call("linger", linger)
    with raw_connection(server) as connection:
        connection.sendall(encode_frame(Request(id=1, call="linger")))
        assert entered.wait(30)
    leave.set()
    assert pings(server)


def test_a_client_that_does_not_read_is_dropped_and_others_are_served(
    make_server: Callable[..., ChannelServer],
) -> None:
    server = make_server(write_timeout_s=0.05)
    server.register_call("page", lambda: "x" * 1_000_000)
    server.start()
    with raw_connection(server) as lazy:
        lazy.sendall(encode_frame(Request(id=1, call="page")) * 20)
        assert pings(server)
        with pytest.raises((ConnectionError, TimeoutError)):  # noqa: PT012 - any of the sends
            while True:
                lazy.sendall(encode_frame(Request(id=1, call="page")))
    assert pings(server)


def test_too_many_clients_are_told_so(make_server: Callable[..., ChannelServer]) -> None:
    server = make_server(max_clients=1)
    server.start()
    with ChannelClient(server.path, 30) as first:
        assert first.call("ping") == "pong"
        with raw_connection(server) as second:
            assert b"already has 1 clients" in read_to_end(second)
        assert first.call("ping") == "pong"


def test_many_clients_at_once_each_get_their_own_answer(server: ChannelServer) -> None:
    server.register_call("echo", lambda value: value)

    def ask(number: int) -> list[Any]:
        with ChannelClient(server.path, 30) as client:
            return [client.call("echo", value=[number, turn]) for turn in range(20)]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    assert answers == [[[number, turn] for turn in range(20)] for number in range(16)]


def test_two_servers_on_one_path_are_an_error_and_the_first_lives(
    server: ChannelServer, make_server: Callable[..., ChannelServer]
) -> None:
    second = make_server()
    with pytest.raises(ChannelError, match="already listens"):
        second.start()
    second.close()
    assert pings(server)


def test_close_removes_the_file_frees_the_path_and_may_be_repeated(
    server: ChannelServer, make_server: Callable[..., ChannelServer]
) -> None:
    client = ChannelClient(server.path, 30)
    assert client.call("ping") == "pong"
    server.close()
    server.close()
    assert not server.path.exists()
    with pytest.raises(ChannelError, match="is gone"):
        client.call("ping")
    successor = make_server()
    successor.start()
    assert client.call("ping") == "pong"  # the same client connects again
    client.close()


def test_close_leaves_no_thread_and_no_descriptor(
    make_server: Callable[..., ChannelServer],
) -> None:
    before = num_descriptors()
    server = make_server()
    server.start()
    with ChannelClient(server.path, 30) as client:
        client.call("ping")
        server.close()
    assert "xllm-channel" not in {thread.name for thread in threading.enumerate()}
    assert num_descriptors() == before


def test_a_server_starts_once(server: ChannelServer) -> None:
    with pytest.raises(InternalError, match="started twice"):
        server.start()


class TestCallQueue:
    def test_executes_in_order_on_the_draining_thread(self) -> None:
        queue, seen = CallQueue(), []
        futures = [
            queue.submit(lambda n=n: seen.append((n, threading.current_thread())) or n)  # type: ignore[misc]
            for n in range(3)
        ]
        assert seen == []
        assert queue.drain() == 3
        assert [future.result(0) for future in futures] == [0, 1, 2]
        assert seen == [(n, threading.current_thread()) for n in range(3)]
        assert queue.drain() == 0

    def test_an_error_goes_to_the_future_and_the_rest_is_executed(self) -> None:
        queue = CallQueue()
        bad, good = queue.submit(lambda: 1 // 0), queue.submit(lambda: "fine")
        assert queue.drain() == 2
        assert isinstance(bad.exception(0), ZeroDivisionError)
        assert good.result(0) == "fine"

    def test_cancelled_calls_are_dropped(self) -> None:
        queue, seen = CallQueue(), []
        queue.submit(lambda: seen.append(1)).cancel()
        assert queue.drain() == 0
        assert seen == []

    def test_calls_queued_by_a_call_wait_for_the_next_drain(self) -> None:
        queue, seen = CallQueue(), []
        queue.submit(lambda: queue.submit(lambda: seen.append("later")))
        assert queue.drain() == 1
        assert seen == []
        assert queue.drain() == 1
        assert seen == ["later"]
