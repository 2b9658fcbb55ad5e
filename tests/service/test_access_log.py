"""The access log: a line for each request, however it ended, that is JSON and nothing else."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from select import PIPE_BUF
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.errors import ConfigError
from xllm_plugin.service import access_log
from xllm_plugin.service.kv_index.index import packed
from xllm_plugin.service.kv_index.prompts import Prompt
from xllm_plugin.service.policy import Choice, RoutingPolicy
from xllm_plugin.testing.fake_instance import FakeInstance, Received, answer, answer_raw
from xllm_plugin.testing.fake_streams import Death, FakeModel, stream_instance
from xllm_plugin.testing.service_harness import Harness, request, serving

STREAM = b'{"model":"fake","stream":true,"prompt":"hush"}'
PIECES = [b"a", b"b", b"c", b"d"]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """Where the lines go; the logger is as it was afterwards."""
    path = tmp_path / "access.log"
    logger = access_log.logger
    before = (logger.handlers[:], logger.level, logger.propagate)
    access_log.open_log(path)
    yield path
    for handler in logger.handlers:
        handler.close()
    logger.handlers, logger.level, logger.propagate = before


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def logged(harness: Harness, path: Path, raw: bytes) -> dict[str, Any]:
    """The one line that a request has added."""
    before = len(lines(path))
    client = await harness.connect()
    client.send(raw)
    await client.read_all()
    await harness.settle()
    (line,) = lines(path)[before:]
    return line


CLOSE = b"connection: close\r\n"


def test_a_continued_stream_names_both_instances_and_its_tokens(run: Any, file: Path) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        one, two = stream_instance(model, Death(400)), stream_instance(model)
        async with serving(one, two, log={"access": True}) as harness:
            headers = b"x-request-id: mine\r\nauthorization: s3cret\r\n"
            raw = request(STREAM, headers=CLOSE + headers)
            line = await logged(harness, file, raw)
            assert line["id"] == "mine"
            assert line["response_id"] == "fake-1"
            assert line["continued"] == 1
            assert set(line["instances"]) == {f"127.0.0.1:{each.port}" for each in (one, two)}
            assert line["instance"] == line["instances"][-1]
            assert line["output_tokens"] == len(PIECES)
            assert (line["status"], line["ending"]) == (200, "complete")
            assert 0 <= line["ttft_ms"] <= line["duration_ms"] if line["ttft_ms"] else True

    run(check())
    assert "hush" not in file.read_text()
    assert "s3cret" not in file.read_text()


def test_a_hedged_request_names_both_and_last_who_has_answered(run: Any, file: Path) -> None:
    async def check() -> None:
        asked = asyncio.Event()

        async def silent(received: Received, _: asyncio.StreamWriter) -> None:
            asked.set()
            await received.gone.wait()

        async def slow(received: Received, writer: asyncio.StreamWriter) -> None:
            await asked.wait()
            await answer(b"one")(received, writer)

        one, two = FakeInstance(script=slow), FakeInstance(script=silent)
        sections: dict[str, Any] = {"log": {"access": True}, "routing": {"hedge_after_s": 0.02}}
        async with serving(one, two, policy=_first, **sections) as harness:
            line = await logged(harness, file, request(b'{"stream":true}', headers=CLOSE))
            names = [f"127.0.0.1:{each.port}" for each in (two, one)]
            assert (line["instances"], line["instance"]) == (names, names[-1])
            assert (line["status"], line["ending"]) == (200, "complete")

    run(check())


def test_each_ending_has_its_line(run: Any, file: Path) -> None:
    async def check() -> None:
        instance = FakeInstance()
        async with serving(instance, log={"access": True}) as harness:
            line = await logged(harness, file, request(headers=CLOSE))
            assert (line["ending"], line["status"]) == ("complete", 200)
            assert len(line["id"]) == 16
            line = await logged(harness, file, request(b'{"model":"none"}', headers=CLOSE))
            assert (line["ending"], line["status"], line["instances"]) == ("refused", 404, [])
            half = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"
            instance.script = answer_raw(half, close=True, pause_s=0.01)
            line = await logged(harness, file, request(headers=CLOSE))
            assert (line["ending"], line["status"]) == ("broken", 200)
            line = await logged(harness, file, b"nonsense\r\n\r\n")
            assert (line["ending"], line["status"]) == ("refused", 400)
            assert (line["prompt_tokens"], line["output_tokens"]) == (None, None)
            instance.script = answer(b'{"usage":{"prompt_tokens":3,"completion_tokens":5}}')
            line = await logged(harness, file, request(headers=CLOSE))
            assert (line["prompt_tokens"], line["output_tokens"]) == (3, 5)

    run(check())


TOO_LARGE = b"POST /v1/y HTTP/1.1\r\n%bHost: x\r\nContent-Length: 99999999\r\n\r\n"


@pytest.mark.parametrize(
    ("raw", "status", "method", "path"),
    [
        (b"GET /sleep?level=1 HTTP/1.1\r\nHost: x\r\n%b\r\n", 403, "GET", "/sleep"),
        (b"HEAD /sleep HTTP/1.1\r\nHost: x\r\n%b\r\n", 403, "HEAD", "/sleep"),
        (b"POST /v1/chat HTTP/1.1\r\n%b\r\n", 400, "POST", "/v1/chat"),
        (TOO_LARGE, 413, "POST", "/v1/y"),
        (b"POST /v1/x HTTP/1.1\r\n%bA: " + b"b" * 70_000, 431, "POST", "/v1/x"),
        (b"POST /v1/x HTTP/1.1\r\n%bHost: x\r\nbad header\r\n", 400, "POST", "/v1/x"),
        (b"CONNECT x:1 HTTP/1.1\r\n%b\r\n", 405, "CONNECT", "x:1"),
        (b"POST /v1/x?" + b"c" * 70_000, 431, "", ""),
    ],
)
def test_what_is_refused_by_its_head_is_named_as_far_as_it_was_read(  # noqa: PLR0917
    run: Any, file: Path, raw: bytes, status: int, method: str, path: str
) -> None:
    async def check() -> None:
        async with serving(FakeInstance(), log={"access": True}) as harness:
            whole = raw.replace(b"%b", b"x-request-id: mine\r\nconnection: close\r\n")
            line = await logged(harness, file, whole)
            assert (line["status"], line["method"], line["path"]) == (status, method, path)
            assert (line["id"] == "mine") is bool(method)

    run(check())


class _Known:
    """Stands for the KV index and its reader: every prompt has seven tokens, nobody holds any."""

    is_useful = True

    def look(self, *_: object) -> Prompt:
        return Prompt(packed([1] * 7), ())

    def lookup(self, *_: object) -> dict[str, float]:
        return {}


@pytest.mark.looks_inside
def test_a_prompt_that_was_counted_to_route_it_stays_so_after_a_retry(run: Any, file: Path) -> None:
    async def check() -> None:
        dead, alive = FakeInstance(), FakeInstance()
        async with serving(dead, alive, log={"access": True}) as harness:
            known: Any = _Known()
            harness.proxy.use_kv_index(known, known)
            harness.proxy.router.policy = RoutingPolicy("t", "", _first, uses_prefixes=True)
            await dead.die()
            line = await logged(harness, file, request(headers=CLOSE))
            assert len(line["instances"]) == 2
            assert line["prompt_tokens"] == 7

    run(check())


def _first(_: Any, __: Any) -> Choice:
    return Choice(0, "the first")


def test_a_moved_file_is_opened_anew(file: Path) -> None:
    access_log.logger.info("1")
    file.rename(file.with_suffix(".1"))
    access_log.logger.info("2")
    assert file.read_text() == "2\n"


def test_a_file_that_cannot_be_opened_is_said_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"log.access_file .*no/such.* cannot be opened"):
        access_log.open_log(tmp_path / "no" / "such")


def test_a_line_is_one_that_any_locale_can_write(run: Any, file: Path) -> None:
    """What the client calls its model costs nobody's line."""

    async def check() -> None:
        async with serving(FakeInstance(), log={"access": True}) as harness:
            body = '{"model":"\u4f60\u00e9\U0001f409"}'.encode()
            line = await logged(harness, file, request(body, headers=CLOSE))
            assert line["model"] == "\u4f60\u00e9\U0001f409"
            body = b'{"model":"\\ud800"}'
            line = await logged(harness, file, request(body, headers=CLOSE))
            assert line["ending"] in {"refused", "complete"}

    run(check())
    assert file.read_bytes().isascii()


def test_standard_output_gets_the_bare_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    access_log.open_log(None)
    logging.getLogger("xllm_plugin.service.access").info("{}")
    assert capsys.readouterr().out == "{}\n"


class _Turn:
    """An event loop that ends its turn when it is told."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def call_soon(self, call: Any) -> None:
        self.calls.append(call)

    def end(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


@pytest.mark.looks_inside
def test_a_turns_lines_are_written_at_once_and_a_lost_folder_costs_only_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = access_log.logger
    before = (logger.handlers[:], logger.level, logger.propagate)
    folder = tmp_path / "logs"
    folder.mkdir()
    writer, turn = access_log._Writer(), _Turn()
    loop: Any = turn
    try:
        access_log.open_log(folder / "a.log")
        monkeypatch.setattr(access_log, "_LOOK_S", -1.0)
        writer.add("1\n", loop)
        writer.add("2 % s\n", loop)
        assert len(turn.calls) == 1
        turn.end()
        assert (folder / "a.log").read_text() == "1\n2 % s\n"
        folder.rename(tmp_path / "moved")
        writer.add("3\n", loop)
        turn.end()
        assert "the access log cannot be written" in caplog.text
        folder.mkdir()
        writer.add("4 % s\n", loop)
        turn.end()
        writer.add("5\n", loop)
        turn.end()
        assert (folder / "a.log").read_text() == "4 % s\n5\n"
        other = _Turn()
        writer.add("6\n", loop)  # a turn that never ends
        writer.add("7\n", other)  # type: ignore[arg-type]
        other.end()
        turn.end()
        assert (folder / "a.log").read_text() == "4 % s\n5\n6\n7\n"
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers, logger.level, logger.propagate = before


class _Pipe(io.StringIO):
    """Keeps apart what was written between two flushes."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def flush(self) -> None:
        self.writes.append(self.getvalue())
        self.seek(0)
        self.truncate()


@pytest.mark.looks_inside
@given(st.lists(st.integers(1, 2 * PIPE_BUF), max_size=40))
def test_processes_that_share_a_pipe_do_not_mix_their_lines(lengths: list[int]) -> None:
    """A kernel keeps together what is written at once, up to a length."""
    logger, pipe = access_log.logger, _Pipe()
    before = (logger.handlers[:], logger.level, logger.propagate)
    logger.handlers = [logging.StreamHandler(pipe)]
    writer, turn = access_log._Writer(), _Turn()
    written = [f"{number}".ljust(length, ".") + "\n" for number, length in enumerate(lengths)]
    try:
        for line in written:
            writer.add(line, turn)  # type: ignore[arg-type]
        turn.end()
    finally:
        logger.handlers, logger.level, logger.propagate = before
    assert "".join(pipe.writes) == "".join(written)
    assert all(text.endswith("\n") for text in pipe.writes)
    assert all(len(text) <= PIPE_BUF or text.count("\n") == 1 for text in pipe.writes)
    few = 2 * sum(map(len, written)) // PIPE_BUF + 1
    assert len(pipe.writes) <= few, "any two that follow each other are longer than one"
