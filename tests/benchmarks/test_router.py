"""The router benchmark: its mock, its client and its tables, with the real service in between."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import psutil
import pytest
from click.testing import CliRunner

from xllm_plugin.bench import readme, schema
from xllm_plugin.bench.commands import beside
from xllm_plugin.bench.servers import find_free_port
from xllm_plugin.errors import ConfigError
from xllm_plugin.service.body import StreamWishes
from xllm_plugin.service.continuation import arm
from xllm_plugin.service.kv_index.index import PrefixIndex, packed
from xllm_plugin.service.kv_index.wire import decode
from xllm_plugin.service.routes import route_of

FOLDER = Path(__file__).parents[2] / "benchmarks" / "router"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def mock() -> Any:
    return beside(FOLDER, "mock")


@pytest.mark.full
def test_a_quick_run_of_ours_passes_its_checks(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    routers = f"{bench.OURS},{bench.FLOOR}"
    arguments = ["--quick", "--seconds", "0.3", "--routers", routers, "--json", str(path)]
    done = CliRunner().invoke(bench.command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = schema.load(path)
    assert all(check.passed for check in result.checks)
    names = {*(case.name for case in bench.CASES), bench.KILLED}
    assert {row.table.lower() for row in result.rows} == {name.lower() for name in names}
    used = [row.figure("CPU") for row in result.rows if row.labels["router"] == bench.OURS]
    assert all(figure.median > 0 for figure in used if figure is not None)
    assert any(used)
    above = [row.labels["router"] for row in result.rows if row.figure("above the relay")]
    assert above.count(bench.OURS) == 3
    assert bench.FLOOR not in above


BURNER = """
import subprocess, sys, time
child = [] if sys.argv[1:] else [subprocess.Popen([sys.executable, __file__, "child"])]
while time.process_time() < 0.25:
    pass
print("burnt", flush=True)
time.sleep(600)
"""


def test_cpu_time_is_that_of_a_process_and_its_children(bench: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "burner.py"
    script.write_text(BURNER)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as burner:
        assert burner.stdout is not None
        assert [burner.stdout.readline() for _ in range(2)] == [b"burnt\n"] * 2
        (child,) = psutil.Process(burner.pid).children()
        both_s, one_s = bench.cpu_seconds(burner.pid), bench.cpu_seconds(child.pid)
        child.kill()
        burner.kill()
    assert 0.25 <= one_s <= both_s - 0.25


def test_routers_that_are_not_here(bench: ModuleType, tmp_path: Path) -> None:
    done = CliRunner().invoke(bench.command, ["--routers", "envoy", "--peers-bin", str(tmp_path)])
    assert isinstance(done.exception, ConfigError)
    assert "installed are bare relay; xllm service" in str(done.exception)


def test_the_readme_has_the_markers() -> None:
    assert readme.section((FOLDER / "README.md").read_text(), "router")


def test_commands_are_filled_with_ports_and_files(bench: ModuleType, tmp_path: Path) -> None:
    for router in bench.our_routers():
        command = router.filled(1000, 2000, [3000, 3001], tmp_path)
        assert command.count("--instance") == 2
        assert not [part for part in command if "{" in part]
    haproxy = bench.Router("h", "", ("haproxy", "-f", "{CONFIG}"), config=bench.HAPROXY)
    config = Path(haproxy.filled(1000, 2000, [3000, 3001], tmp_path)[-1]).read_text()
    assert "bind 127.0.0.1:1000" in config
    assert "server s3001 127.0.0.1:3001" in config


def test_what_is_no_wheel_is_said(bench: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"no archive")
    done = CliRunner().invoke(bench.command, ["--quick", "--wheel", str(wheel)])
    assert isinstance(done.exception, ConfigError)
    assert "make one by `make wheel`" in str(done.exception)


def test_a_wheel_that_is_not_compiled_is_not_measured(bench: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    package = FOLDER.parents[1] / "xllm_plugin"
    with zipfile.ZipFile(wheel, "w") as packed:
        for file in package.rglob("*.*"):
            packed.write(file, file.relative_to(package.parent))
    folder = bench._unpacked(wheel, tmp_path / "wheel")
    router = next(
        one for one in bench.compiled_routers(folder) if one.name == bench.OURS + bench.COMPILED
    )
    with contextlib.ExitStack() as stack:
        measured = bench.Bench(0.1, tmp_path, stack)
        backend = find_free_port()
        stack.enter_context(measured._backend(backend, ()))
        with pytest.raises(ConfigError, match="not a compiled one"):
            stack.enter_context(measured._router(router, find_free_port(), [backend]))


def test_what_is_not_installed_is_said(bench: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    known = bench.known_routers(tmp_path)
    ours = [router.name for router in bench.our_routers()]
    assert list(known) == [bench.FLOOR, *ours]
    (said,) = bench.not_here(known)
    assert said.startswith("vllm-router, sglang-router, smg, haproxy: neither on PATH")
    assert bench._names("xllm service", known) == ours


def test_the_relay_carries_bytes_both_ways_and_ends_with_either_end() -> None:
    relay = beside(FOLDER, "relay")

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            if data == b"end":
                break
            writer.write(data)
        writer.close()

    async def check() -> None:
        loop = asyncio.get_running_loop()
        backend = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = backend.sockets[0].getsockname()[1]
        server = await loop.create_server(lambda: relay.ClientLeg(loop, port), "127.0.0.1", 0)
        async with asyncio.timeout(30), backend, server:
            for sent in (b"x", b"y" * 2**20):
                address = server.sockets[0].getsockname()
                reader, writer = await asyncio.open_connection(*address)
                writer.write(sent)
                assert await reader.readexactly(len(sent)) == sent
                writer.write(b"end")
                assert await reader.read() == b""
                writer.close()

    asyncio.run(check())


def unchunked(chunks: list[bytes]) -> bytes:
    return b"".join(chunk.partition(b"\r\n")[2][:-2] for chunk in chunks).removesuffix(b"\r\n0\r\n")


def test_an_armed_stream_of_the_mock_is_read_by_position(mock: ModuleType) -> None:
    """As those of vLLM are: else the benchmark would measure the reading of JSON."""
    body = b'{"model":"mock","stream":true,"max_tokens":8}'
    wishes = msgspec.json.decode(body, type=StreamWishes)
    stream = arm(route_of(CHAT.encode()), body, wishes)
    assert stream is not None
    backend = mock.Backend(0.0, None)
    stream.parts.append(unchunked(backend.stream(stream.body)))
    assert stream.take() == unchunked(backend.stream(body))
    assert stream.is_done
    assert stream.can_resume
    assert stream.num_tokens == 8
    assert stream.num_prompt_tokens == 3
    _, asked = stream.next_request(b"POST x HTTP/1.1\r\ncontent-length: 0\r\n\r\n", b"x")
    assert json.loads(asked)["chunks"] == [[number] for number in range(8)]


def test_a_resumed_stream_begins_where_the_other_ended(mock: ModuleType) -> None:
    body = b'{"stream":true,"max_tokens":8}'
    backend = mock.Backend(0.0, None)
    assert backend.stream(body, 3) == backend.stream(body)[4:]
    assert json.loads(unchunked(backend.stream(body, 3)).split(b"\n\n")[0][6:])["choices"][0][
        "delta"
    ] == {"content": " 3"}


def test_the_mock_publishes_the_prompts_that_it_is_asked(mock: ModuleType) -> None:
    index = PrefixIndex()
    cache = index.add()
    for event in decode(mock.cached_prompt()).events:
        index.apply(cache, event)
    answer = mock.Backend(0.0, None).answer(b"/tokenize", b"x" * 220_000)
    tokens = json.loads(answer.partition(b"\r\n\r\n")[2])["tokens"]
    assert len(tokens) == 55_000
    (found,) = index.holders(packed(tokens))
    assert found.held.device == 55_000 // 16 - (55_000 % 16 == 0)


def test_streams_are_whole_only_with_every_token_in_order(
    bench: ModuleType, monkeypatch: Any
) -> None:
    texts = iter(
        "".join(f'data: {{"content":" {number}"}}\n\n' for number in numbers) + end
        for numbers, end in (
            (range(64), "data: [DONE]\n\n"),
            (range(64), ""),
            ((*range(30), *range(31, 64)), "data: [DONE]\n\n"),
            ((*range(30), *range(29, 64)), "data: [DONE]\n\n"),
        )
    )

    async def read(*_: Any) -> str:
        return next(texts)

    class Client:
        def __init__(self, **_: Any) -> None: ...

        async def __aenter__(self) -> Any:
            return self

        async def __aexit__(self, *_: object) -> None: ...

        async def get(self, _: str) -> Any:
            return type("Reply", (), {"text": "2"})

    killed: list[int] = []
    monkeypatch.setattr(bench, "NUM_STREAMS", 4)
    monkeypatch.setattr(bench, "KILL_AFTER_S", 0.0)
    monkeypatch.setattr(bench, "_read", read)
    monkeypatch.setattr(bench.httpx, "AsyncClient", Client)
    monkeypatch.setattr(bench.os, "kill", lambda pid, _: killed.append(pid))
    found = asyncio.run(bench._killed(1, 2, 3, {}))
    assert found == {"in_flight": 2.0, "broken": 3.0}
    assert killed == [3]


def test_an_answer_in_another_form_is_told_from_another_answer(bench: ModuleType) -> None:
    whole = {
        "choices": [{"message": {"content": " a b"}, "finish_reason": "stop"}],
        "usage": {"completion_tokens": 2},
    }
    chunk = '{"choices": [{"delta": {"content": " a"}, "finish_reason": %s}], "logprobs": null}'
    streamed = f"data: {chunk % 'null'}\n\ndata: {chunk % json.dumps('stop')}\n\ndata: [DONE]\n\n"
    direct = (whole, streamed)
    assert bench.compared(direct, direct) == bench.EQUAL
    anew = streamed.replace(', "logprobs": null', "")
    assert bench.compared((whole, anew), direct) == bench.REWRITTEN
    assert bench.compared((whole, streamed.replace(" a", "", 1)), direct) == "differ"
    assert bench.compared((whole, streamed.replace("data: [DONE]", "")), direct) == "differ"
    assert bench.compared(({**whole, "usage": None}, streamed), direct) == "differ"
