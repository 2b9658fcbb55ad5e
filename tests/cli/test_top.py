"""`xllm top` against real engine channels, a real HTTP server and a real pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from xllm_plugin.channel import (
    ChannelConfig,
    EngineChannel,
    EngineIdentity,
    EngineLoad,
    Reading,
    Readings,
    Snapshot,
)
from xllm_plugin.cli.top import _Keys, top
from xllm_plugin.cli.top_view import Rates, frame
from xllm_plugin.errors import ChannelError
from xllm_plugin.scheduler.report import ClassReport, SchedulerReport, StepReport
from xllm_plugin.testing.fake_memory import memory_section
from xllm_plugin.xtensor.messages import MemoryReport, PoolSection

Start = Callable[..., EngineChannel]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This user's directory of sockets, for this test."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "xllm"


def make_identity(instance_id: str = "e1", dp_rank: int = 0) -> EngineIdentity:
    return EngineIdentity(
        instance_id=instance_id,
        model="tiny[0]",
        platform="xllm",
        device="cpu",
        pid=os.getpid(),
        dp_rank=dp_rank,
    )


@pytest.fixture
def start_engine(directory: Path) -> Iterator[Start]:
    channels: list[EngineChannel] = []

    def start(instance_id: str = "e1", dp_rank: int = 0) -> EngineChannel:
        load = EngineLoad(num_running=7, num_blocks_total=8, num_blocks_free=2, num_steps=42)
        channels.append(
            EngineChannel(ChannelConfig(), make_identity(instance_id, dp_rank), lambda: load)
        )
        channels[-1].start()
        return channels[-1]

    yield start
    for channel in channels:
        channel.close()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(top, list(arguments))


def failure(*arguments: str) -> ChannelError:
    result = run(*arguments)
    assert isinstance(result.exception, ChannelError), result.output
    assert result.exception.exit_code == 75
    return result.exception


def test_once_shows_a_table_of_all_engines(start_engine: Start) -> None:
    start_engine("e1")
    start_engine("e2", 1)
    result = run("--once")
    assert result.exit_code == 0, result.exception
    for text in ("e1 dp0", "e2 dp1", "tiny[0]", "75.0", "42", "tok/s", "preempted"):
        assert text in result.output


def test_an_elastic_kv_cache_has_a_line_below_the_table(start_engine: Start) -> None:
    engine = start_engine("e1")
    engine.add_section("memory", lambda: memory_section(block_bytes=2**20))
    engine.publish_if_due(force=True)
    assert "dp0: KV memory 10 of 16 MiB, 20 % of it unused" in run("--once").output


def test_its_pages_have_a_line_by_state_and_with_what_mapping_takes(start_engine: Start) -> None:
    pages = MemoryReport(
        page_bytes=2**21,
        num_free=1,
        num_allocated=0,
        num_mapped=50,
        num_retired=0,
        num_reusable=4,
        num_created=55,
        num_released=0,
        num_maps=90,
        num_unmaps=20,
        num_reused=30,
        num_premapped=5,
        commit_s=0.25,
        release_s=0.5,
        num_commits=6,
        num_releases=7,
        num_map_calls=8,
        num_unmap_calls=4,
        map_s=0.002,
        unmap_s=0.006,
    )
    engine = start_engine("e1")
    engine.add_section("memory", lambda: memory_section(pages=pages))
    engine.publish_if_due(force=True)
    shown = " ".join(run("--once").output.split())
    assert "dp0: pages: 1 free, 50 mapped, 4 reusable; 0.25 ms to map a batch; 1.50 ms" in shown


def test_a_shared_pool_is_named_beside_it(start_engine: Start) -> None:
    pool = PoolSection(
        name="box", total_bytes=2**30, leased_bytes=2**29, min_bytes=0, max_bytes=2**30
    )
    engine = start_engine("e1")
    engine.add_section("memory", lambda: memory_section(pool=pool))
    engine.publish_if_due(force=True)
    shown = " ".join(run("--once").output.split())
    assert "unused; pool box: 1024 of 1024 MiB free, 0 members" in shown


def test_once_json_is_one_document_for_scripts(start_engine: Start) -> None:
    start_engine()
    result = run("--once", "--json")
    assert result.exit_code == 0, result.exception
    (engine,) = json.loads(result.output)["engines"]
    assert engine["snapshot"]["load"]["num_running"] == 7
    assert engine["snapshot"]["engine"]["instance_id"] == "e1"
    assert engine["age_s"] >= 0


def test_socket_may_be_one_socket_or_a_directory(start_engine: Start, directory: Path) -> None:
    start_engine("e1")
    start_engine("e2")
    one = run("--once", "--json", "--socket", str(directory / "e2.dp0.sock"))
    assert [e["snapshot"]["engine"]["instance_id"] for e in json.loads(one.output)["engines"]] == [
        "e2"
    ]
    both = run("--once", "--json", "--socket", str(directory))
    assert len(json.loads(both.output)["engines"]) == 2


def test_no_engine_says_what_was_looked_for_and_how_to_start_one(directory: Path) -> None:
    message = str(failure("--once"))
    assert str(directory) in message
    assert "xllm serve MODEL" in message


def test_a_socket_that_is_not_there_is_exit_75(directory: Path) -> None:
    assert "no engine listens at" in str(failure("--socket", str(directory / "x.dp0.sock")))


def test_socket_and_url_exclude_each_other() -> None:
    result = run("--socket", "x", "--url", "y")
    assert result.exit_code == 2
    assert "exclude each other" in result.output


@pytest.fixture
def serve() -> Iterator[Callable[[int, bytes], str]]:
    """Starts an HTTP server with one answer; its URL."""
    servers: list[tuple[HTTPServer, threading.Thread]] = []

    def start(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = self.path == "/xllm/snapshot"
                self.send_response(status if found else 404)
                self.end_headers()
                self.wfile.write(body if found else b"wrong path")

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its own name
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def make_snapshot(sequence: int, monotonic_s: float, **load: Any) -> Snapshot:
    return Snapshot(
        sequence=sequence,
        monotonic_s=monotonic_s,
        wall_time_s=0.0,
        engine=make_identity(),
        load=EngineLoad(**load),
    )


def look(snapshot: Snapshot, age_s: float = 0.0) -> Readings:
    return Readings(engines=(Reading(dp_rank=0, snapshot=snapshot, age_s=age_s),))


def test_url_reads_a_server(serve: Callable[[int, bytes], str]) -> None:
    url = serve(200, msgspec.json.encode(look(make_snapshot(3, 10.0, num_steps=9), 0.5)))
    result = run("--once", "--json", "--url", url)
    assert result.exit_code == 0, result.exception
    assert json.loads(result.output)["engines"][0]["snapshot"]["sequence"] == 3


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (503, b'{"error": "down"}', "answered 503: .*down"),
        (200, b"<html>", "but not with snapshots"),
        (200, b'{"engines": 3}', "but not with snapshots"),
    ],
)
def test_a_server_that_is_not_ours_is_told_apart(
    status: int, body: bytes, said: str, serve: Callable[[int, bytes], str]
) -> None:
    assert re.search(said, str(failure("--once", "--url", serve(status, body))))


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "not a url", "localhost:8000"])
def test_an_address_without_a_server_is_exit_75(url: str) -> None:
    assert "no answer from" in str(failure("--once", "--url", url))


class TestRates:
    def test_a_rate_needs_two_snapshots(self) -> None:
        rates = Rates()
        first = make_snapshot(1, 10.0, num_running=1, num_generated_tokens=100)
        rates.update(look(first))
        assert rates.of(first) is None
        second = make_snapshot(5, 12.0, num_running=1, num_generated_tokens=160)
        rates.update(look(second))
        assert rates.of(second) == 30.0

    def test_a_busy_engine_without_news_keeps_its_rate_and_an_idle_one_has_none(self) -> None:
        rates = Rates()
        for snapshot in (
            make_snapshot(1, 10.0, num_running=1),
            busy := make_snapshot(2, 11.0, num_running=1, num_generated_tokens=50),
            busy,
        ):
            rates.update(look(snapshot))
        assert rates.of(busy) == 50.0
        idle = make_snapshot(3, 12.0, num_generated_tokens=60)
        rates.update(look(idle))
        rates.update(look(idle, age_s=1.0))
        assert rates.of(idle) == 0.0

    def test_time_spent_idle_before_the_last_look_does_not_dilute_the_rate(self) -> None:
        rates = Rates()
        rates.update(look(make_snapshot(1, 10.0), age_s=60.0))
        busy = make_snapshot(2, 71.0, num_running=1, num_generated_tokens=40)
        rates.update(look(busy))
        assert rates.of(busy) == 40.0

    def test_an_engine_that_is_gone_is_forgotten(self) -> None:
        rates = Rates()
        snapshot = make_snapshot(1, 10.0)
        rates.update(look(snapshot))
        rates.update(Readings())
        assert rates.of(snapshot) is None


REPORT = SchedulerReport(
    policy="slo",
    online=ClassReport(num_running=5, num_held=1, num_waiting=3, num_late=2, least_slack_ms=-120.4),
    offline=ClassReport(num_waiting=40),
    step=StepReport(
        num_sequences=5,
        decode_tokens=4,
        prefill_tokens=256,
        context_tokens=9000,
        predicted_ms=41.2,
        measured_ms=43.9,
        bound="tpot",
    ),
    error=0.062,
)


def show(*snapshots: Snapshot) -> list[list[str]]:
    """The words of each line of a frame, as a terminal of 100 columns shows it."""
    console = Console(record=True, width=100, file=io.StringIO())
    engines = tuple(Reading(dp_rank=0, snapshot=snapshot, age_s=0.0) for snapshot in snapshots)
    console.print(frame(Readings(engines=engines), Rates()))
    return [line.split() for line in console.export_text().splitlines()]


def with_section(value: Any) -> Snapshot:
    return msgspec.structs.replace(make_snapshot(1, 10.0), sections={"scheduler": value})


class TestFrame:
    def test_it_shows_requests_by_class_and_the_last_step(self) -> None:
        lines = show(with_section(msgspec.to_builtins(REPORT)))
        assert ["e1", "dp0", "online", "5", "1", "3", "2", "-120"] in lines
        assert ["e1", "dp0", "offline", "0", "0", "40", "0", "-"] in lines
        step = ["e1", "dp0", "slo", "5", "4", "256", "9000", "41.2", "43.9", "6.2", "tpot"]
        assert step in lines

    def test_an_engine_that_reports_nothing_of_it_has_its_row_alone(self) -> None:
        lines = show(make_snapshot(1, 10.0), with_section(REPORT))
        assert len([line for line in lines if line[:2] == ["e1", "dp0"]]) == 2 + 2 + 1
        assert ["requests"] not in show(make_snapshot(1, 10.0))

    def test_without_a_model_of_steps_nothing_was_predicted(self) -> None:
        step = StepReport(num_sequences=2, measured_ms=20.0)
        lines = show(with_section(SchedulerReport(policy="fcfs", step=step)))
        assert ["e1", "dp0", "fcfs", "2", "0", "0", "0", "-", "20.0", "-", "-"] in lines

    def test_another_versions_report_is_a_remark(self) -> None:
        text = " ".join(" ".join(line) for line in show(with_section({"policy": 3})))
        assert "e1 dp0: section 'scheduler' of the snapshot does not fit" in text
        assert "tiny[0]" in text

    def test_the_section_travels_through_a_socket(self, start_engine: Start) -> None:
        channel = start_engine()
        channel.add_section("scheduler", lambda: REPORT)
        channel.publish_if_due(force=True)
        result = run("--once")
        assert "-120" in result.output
        (engine,) = json.loads(run("--once", "--json").output)["engines"]
        assert engine["snapshot"]["sections"]["scheduler"]["online"]["num_held"] == 1


class TestKeys:
    @pytest.fixture
    def terminal(self) -> Iterator[tuple[int, Any]]:
        controller, terminal = os.openpty()
        with os.fdopen(terminal) as stream:
            yield controller, stream
        os.close(controller)

    def test_q_ends_the_watch_without_enter(self, terminal: tuple[int, Any]) -> None:
        controller, stream = terminal
        with _Keys(stream) as keys:
            os.write(controller, b"xyq")
            assert keys.wait_for_quit(30)

    def test_other_keys_are_ignored_and_the_terminal_is_restored(
        self, terminal: tuple[int, Any]
    ) -> None:
        import termios

        controller, stream = terminal
        before = termios.tcgetattr(stream.fileno())
        with _Keys(stream) as keys:
            assert termios.tcgetattr(stream.fileno()) != before
            os.write(controller, b"xy")
            assert not keys.wait_for_quit(0.01)
        assert termios.tcgetattr(stream.fileno()) == before

    def test_without_a_terminal_it_only_waits(self, tmp_path: Path) -> None:
        file = tmp_path / "stdin"
        file.touch()
        with file.open() as stream, _Keys(stream) as keys:
            assert not keys.wait_for_quit(0.0)


def test_watching_goes_on_when_the_engine_goes_and_ends_with_ctrl_c(
    start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock's fake is the key reader: it closes the engine, then presses ctrl-C."""
    channel = start_engine()
    turns = iter([channel.close, lambda: None])

    def wait(self: _Keys, timeout_s: float) -> bool:
        assert timeout_s == 0.5
        action = next(turns, None)
        if action is None:
            raise KeyboardInterrupt
        action()
        return False

    monkeypatch.setattr(_Keys, "wait_for_quit", wait)
    result = run("--json", "--interval", "0.5")
    assert result.exit_code == 0, result.exception
    counts = [len(json.loads(line)["engines"]) for line in result.output.splitlines()]
    assert counts == [1, 0, 0]


def test_the_live_table_ends_with_q(start_engine: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    start_engine()
    answers = iter([False, True])
    monkeypatch.setattr(_Keys, "wait_for_quit", lambda self, timeout_s: next(answers))
    result = run()
    assert result.exit_code == 0, result.exception
    assert "e1 dp0" in result.output
