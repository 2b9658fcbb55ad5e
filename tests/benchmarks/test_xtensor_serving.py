"""What elastic memory costs a server, in small: turns, ratios, checks that can fail, tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from msgspec import structs
from rich.console import Console

from xllm_plugin.bench import readme, schema
from xllm_plugin.bench.fleet import Fleet
from xllm_plugin.bench.load import Load, LoadResult
from xllm_plugin.bench.outputs import self_noise
from xllm_plugin.bench.peers import PeerServer
from xllm_plugin.bench.progress import Reporter
from xllm_plugin.bench.replay import Measured, Plan
from xllm_plugin.bench.servers import Server, find_free_port
from xllm_plugin.bench.traces import Lengths, Request, Vocabulary
from xllm_plugin.errors import InternalError
from xllm_plugin.testing.equality import Completion
from xllm_plugin.testing.fake_memory import memory_section
from xllm_plugin.xtensor.messages import MemoryReport, MemorySection

FOLDER = Path(__file__).parents[2] / "benchmarks" / "xtensor_serving"
LOADS = (Load(clients=2), Load(clients=4))
ANSWERS = (Completion("0", (1,), (0.0,), ({1: 0.0},)),)
PAGES = MemoryReport(
    page_bytes=4096,
    num_free=0,
    num_allocated=0,
    num_mapped=3,
    num_retired=0,
    num_reusable=0,
    num_created=5,
    num_released=2,
    num_maps=5,
    num_unmaps=2,
    num_reused=0,
    num_premapped=0,
    commit_s=0.3,
    release_s=0.2,
    num_commits=7,
    num_releases=4,
)


class FakeClient:
    """Notes what it is asked to send, and has it answered in full at the speed of the URL."""

    def __init__(self, output_tok_s: dict[str, float]) -> None:
        self._output_tok_s = output_tok_s  # by URL
        self.asked: list[tuple[str, Load, tuple[Request, ...]]] = []

    def measure(
        self, url: str, model: str, load: Load, requests: Sequence[Request], **_: Any
    ) -> LoadResult:
        assert model == "model"
        self.asked.append((url, load, tuple(requests)))
        tokens = [request.output_tokens for request in requests]
        duration_s = sum(tokens) / self._output_tok_s.get(url, 100.0)
        raw = {
            "duration": duration_s,
            "output_lens": tokens,
            "input_lens": [len(request.prompt) for request in requests],
            "ttfts": [0.1] * len(tokens),
            "latencies": [duration_s] * len(tokens),
            "itls": [],
            "errors": [],
            "client_cpu_s": 0.0,
        }
        return LoadResult.of(load, requests, raw)


def make_plan(repeats: int) -> Plan:
    return Plan(
        loads=LOADS,
        repeats=repeats,
        requests_per_load=3,
        is_quick=False,
        tpot_ms=float("inf"),
        lengths=(Lengths(8, 5), Lengths(4, 9)),
        vocabulary=Vocabulary(1000),
        max_input=8,
        max_output=8,
        seed=0,
    )


def fake_peers(*flags: str) -> tuple[PeerServer, PeerServer]:
    """Two servers that answer alike; the second gets `flags`."""

    def fake(name: str, *more: str) -> PeerServer:
        where = ("--port", str(find_free_port()), "--model", "model")
        command = (sys.executable, "-m", "xllm_plugin.testing.fake_openai", *where, *more)
        return PeerServer(name, "a fake", command)

    return fake("xllm"), fake("xllm-elastic", *flags)


class GrowingMemory:
    """As `kv_memory` sees an elastic server that does as much as `PAGES` says between two looks."""

    def __init__(self, *, from_look: int = 0) -> None:
        self._num_looks = -from_look

    def __call__(self, server: Server) -> MemorySection | None:
        if server.name != "xllm-elastic":
            return None
        self._num_looks += 1
        totals = ("num_commits", "num_releases", "commit_s", "release_s")
        num = max(1, self._num_looks)  # as many at the first look as a start takes
        grown = {name: num * getattr(PAGES, name) for name in totals}
        return memory_section(pages=structs.replace(PAGES, **grown))


def run(
    bench: ModuleType, tmp_path: Path, peers: Sequence[PeerServer], repeats: int = 2
) -> tuple[list[Measured], MemorySection, FakeClient]:
    client = FakeClient({f"http://127.0.0.1:{peers[1].port}": 96.0})
    with (
        Fleet(tmp_path, lambda _: None) as fleet,
        Reporter(Console(quiet=True), 99, first="-") as reporter,
    ):
        session = bench.Session(make_plan(repeats), fleet, client, reporter)
        measured, memory = session.measure(peers)
    return measured, memory, client


def test_both_of_a_pair_get_the_same_requests_in_an_order_that_changes(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "kv_memory", GrowingMemory())
    peers = fake_peers()
    measured, memory, client = run(bench, tmp_path, peers)
    assert memory.pages is not None
    assert (memory.pages.num_commits, memory.pages.num_releases) == (7, 4), "in the turns alone"
    assert memory.pages.commit_s + memory.pages.release_s == pytest.approx(0.5)
    warm_ups, turns = client.asked[:2], client.asked[2:]
    assert [load.clients for _, load, _ in warm_ups] == [bench.WARM_UP_CLIENTS] * 2
    fixed, elastic = (f"http://127.0.0.1:{peer.port}" for peer in peers)
    assert [url for url, _, _ in turns] == [fixed, elastic] * 2 + [elastic, fixed] * 2
    assert [load for _, load, _ in turns] == [LOADS[0], LOADS[0], LOADS[1], LOADS[1]] * 2
    sent = [requests for _, _, requests in turns]
    assert sent[::2] == sent[1::2]
    assert len({request.prompt for requests in sent[::2] for request in requests}) == 12
    assert [len(points) for one in measured for points in one.repeats] == [2, 2, 2, 2]
    for load in LOADS:
        assert bench.ratios(measured, load, "output_tok_s") == pytest.approx([0.96, 0.96])
    found = bench.checks(measured, LOADS, memory, is_quick=False)
    assert [check.passed for check in found] == [True, True, True, False, False]
    assert found[-1].detail == "0.960 times, by the median"


def test_memory_that_was_taken_before_the_turns_is_not_taken_while_it_served(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "kv_memory", GrowingMemory(from_look=9))
    measured, memory, _ = run(bench, tmp_path, fake_peers(), repeats=1)
    took = bench.checks(measured, LOADS, memory, is_quick=True)[-1]
    assert (took.passed, took.detail) == (False, "in 0 steps")


def test_other_outputs_fail_the_run(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "kv_memory", GrowingMemory())
    measured, memory, _ = run(bench, tmp_path, fake_peers("--token-shift", "1"), repeats=1)
    _, equal, _ = bench.checks(measured, LOADS, memory, is_quick=True)
    assert not equal.passed


def test_a_server_with_the_other_memory_is_our_bug(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "kv_memory", lambda server: memory_section())
    fleet = SimpleNamespace(server=lambda peer: SimpleNamespace(name=peer.name))
    with Reporter(Console(quiet=True), 1, first="-") as reporter:
        session = bench.Session(make_plan(1), fleet, FakeClient({}), reporter)
        with pytest.raises(InternalError, match="the KV cache of xllm is that of the other"):
            session.measure(bench.peers("/m"))


def made_up(bench: ModuleType, elastic_tok_s: float, pairs: int = 6) -> list[Measured]:
    """As of `pairs` pairs."""
    speeds = {"a": 100.0, "b": elastic_tok_s}
    client = FakeClient(speeds)
    found = []
    for url, peer in zip(speeds, bench.peers("/m"), strict=True):
        one = Measured(peer, outputs=ANSWERS, noise=self_noise(ANSWERS, ANSWERS))
        one.repeats = [
            [
                client.measure(url, "model", load, make_plan(1).requests(load))
                for load in make_plan(1).loads
            ]
            for _ in range(pairs)
        ]
        found.append(one)
    return found


@pytest.mark.parametrize(
    ("elastic_tok_s", "num_commits", "passed"),
    [
        (97.1, 1, [True, True, True]),
        (96.9, 1, [True, False, False]),
        (97.1, 0, [False, True, True]),
    ],
)
def test_throughput_that_is_lost_and_memory_that_was_not_elastic_fail_the_run(
    bench: ModuleType, elastic_tok_s: float, num_commits: int, passed: list[bool]
) -> None:
    memory = memory_section(pages=structs.replace(PAGES, num_commits=num_commits))
    measured = made_up(bench, elastic_tok_s)
    _, _, *found = bench.checks(measured, LOADS, memory, is_quick=False)
    assert [check.passed for check in found] == passed
    assert len(bench.checks(measured, LOADS, memory, is_quick=True)) == 3


def test_the_tables_can_be_rendered(bench: ModuleType) -> None:
    measured, memory = made_up(bench, 98.0), memory_section(pages=PAGES)
    begun = schema.begin(bench.NAME, question=bench.QUESTION, command="xllm bench xtensor_serving")
    result = begun.finish(
        peers=[peer.record("/m") for peer in bench.peers("/m")],
        rows=bench.rows(measured, LOADS, memory),
        notes=bench.notes(make_plan(6), "m"),
        not_shown=bench.NOT_SHOWN,
    )
    text = readme.render(result)
    assert "**Served: output throughput**" in text
    assert "| 2 clients | 100 | 98 | 0.980 | 0.980 | 0.980 |" in text
    assert "XLLM_XTENSOR__ENABLED=1 " in text
    assert "| xllm-elastic | 0.0048 | 7 | 4 | 500 |" in text
    (row, *_) = bench.rows(made_up(bench, 98.0, pairs=2), LOADS, memory)
    assert row.figure("95 % interval from") is None


def test_the_servers_differ_in_one_setting(bench: ModuleType) -> None:
    fixed, elastic = bench.peers("/m")
    assert fixed.port != elastic.port
    assert set(elastic.environment.items()) ^ set(fixed.environment.items()) == {
        ("XLLM_XTENSOR__ENABLED", "1")
    }


def test_the_readme_has_a_place_for_the_table() -> None:
    assert readme.section((FOLDER / "README.md").read_text(), "xtensor_serving")
