"""The startup benchmark without a server: peers, caches, streams and tables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from xllm_plugin.bench import readme, schema
from xllm_plugin.bench.commands import model_folder, names_in
from xllm_plugin.bench.peers import PEER_NAMES
from xllm_plugin.bench.traces import Vocabulary
from xllm_plugin.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "startup"
FLAGS = ("--max-model-len", "2048")


def peers(bench: ModuleType, names: Sequence[str]) -> list[Any]:
    return list(bench.startup_peers("/m/tiny", port=8123, flags=FLAGS, names=names))


def start(bench: ModuleType, first_token_s: float, **changes: Any) -> Any:
    values = {
        "ready_s": first_token_s - 0.5,
        "first_token_s": first_token_s,
        "tpot_ms": 20.0,
        "second_at_s": 15.0,
        "second_tpot_ms": 10.0,
        "rss_bytes": 3 * 2**30,
        "marks_s": {},
        "compiled_again": False,
    }
    return bench.Start(**values | changes)


def measured(bench: ModuleType, starts: dict[str, list[Any]], condition: str) -> list[Any]:
    return [
        bench.Measured(peer, {condition: starts[peer.name]}) for peer in peers(bench, list(starts))
    ]


def test_every_shared_peer_and_the_eager_one(bench: ModuleType) -> None:
    assert set(bench.PEERS) == {*PEER_NAMES, bench.EAGER}
    assert [peer.name for peer in peers(bench, bench.PEERS)] == list(bench.PEERS)


def test_the_eager_peer_differs_by_its_flag_alone(bench: ModuleType) -> None:
    compiled, eager = peers(bench, ["stock-best", "stock-best-eager"])
    assert eager.command == (*compiled.command, "--enforce-eager")
    assert eager.environment == compiled.environment


@pytest.mark.parametrize("names", [["fast"], []])
def test_unknown_peers_are_refused(bench: ModuleType, names: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"choose from stock, .*stock-best-eager, xllm"):
        peers(bench, names)


def test_a_cold_start_finds_no_cache_and_the_warm_one_finds_what_it_left(
    bench: ModuleType,
) -> None:
    with bench.cache_folder(("cold", "warm")) as caches:
        environment = bench.cache_environment(caches)
        assert set(environment) >= {"VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "XLLM_CACHE_DIR"}
        assert len(set(environment.values())) == len(environment)
        assert all(Path(folder).parent == caches for folder in environment.values())
        assert not any(caches.iterdir())
        Path(environment["VLLM_CACHE_ROOT"]).mkdir()
    assert not caches.exists()


def test_warm_alone_uses_the_caches_that_the_user_has(bench: ModuleType) -> None:
    with bench.cache_folder(("warm",)) as caches:
        assert caches is None
        assert bench.cache_environment(caches) == {}


def test_a_server_gets_its_caches_and_nothing_else_of_the_caller(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/the/user/s")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    (peer,) = peers(bench, ["xllm"])
    cold = bench.server_of(peer, tmp_path, tmp_path / "log", lambda _: None)
    assert cold._environment["VLLM_CACHE_ROOT"] == str(tmp_path / "vllm")
    assert cold._environment["XLLM_CACHE_DIR"] == str(tmp_path / "xllm")
    assert "OMP_NUM_THREADS" not in cold._environment
    warm = bench.server_of(peer, None, tmp_path / "log", lambda _: None)
    assert warm._environment["VLLM_CACHE_ROOT"] == "/the/user/s"


def test_cold_goes_first(bench: ModuleType) -> None:
    assert bench.chosen_conditions("warm, cold") == ("cold", "warm")
    assert bench.chosen_conditions("warm") == ("warm",)


def test_a_model_is_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path.parent)
    assert model_folder(tmp_path.name) == tmp_path


def test_names_keep_their_order_and_come_once() -> None:
    assert names_in(" b, a,,b ") == ("b", "a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "fast"], "peers fast unknown"),
        (["--peers", ","], "peers \\(none\\) unknown"),
        (["--conditions", "lukewarm"], "conditions 'lukewarm'"),
    ],
)
def test_misuse_ends_before_anything_starts(
    bench: ModuleType, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(bench.command, arguments)
    assert isinstance(result.exception, ConfigError)
    with pytest.raises(ConfigError, match=message):
        raise result.exception


def event(*tokens: int) -> str:
    return f"data: {json.dumps({'choices': [{'text': 'x', 'token_ids': list(tokens)}]})}"


def stream_of(bench: ModuleType, lines: Sequence[str]) -> Any:
    clock: Iterator[float] = iter(range(100))
    events = bench.stream.read_events(lines, lambda: next(clock))
    return bench.stream.Streamed(tuple(events))


def test_a_stream_is_timed_token_by_token(bench: ModuleType) -> None:
    lines = ["", event(1), ": ping", event(2), event(3), "data: [DONE]"]
    streamed = stream_of(bench, lines)
    assert (streamed.first_at_s, streamed.num_tokens, streamed.tpot_ms) == (0, 3, 1000)


def test_tokens_that_come_together_count_each(bench: ModuleType) -> None:
    streamed = stream_of(bench, [event(1, 2), event(3, 4), event(5, 6), event()])
    assert (streamed.num_tokens, streamed.tpot_ms) == (6, 500)


def test_an_error_in_the_stream_is_told(bench: ModuleType) -> None:
    with pytest.raises(ValueError, match="out of memory"):
        stream_of(bench, ['data: {"error": {"message": "out of memory"}}'])


def test_ratios_are_taken_within_a_repeat(bench: ModuleType) -> None:
    starts = {
        "stock-best": [start(bench, 60.0), start(bench, 100.0)],
        "xllm": [start(bench, 30.0, second_tpot_ms=8.0), start(bench, 10.0, second_tpot_ms=9.0)],
    }
    stock, xllm = bench.rows(measured(bench, starts, "warm"), ("warm",))
    assert {row.table for row in (stock, xllm)} == {"Warm start"}
    ratio = xllm.figure("times stock-best")
    assert (ratio.minimum, ratio.maximum) == (0.1, 0.5)
    assert stock.figure("times stock-best").median == 1
    assert xllm.figure("its TPOT, times stock-best").minimum == 0.8
    assert xllm.figure("memory (RSS)").median == 3


def test_without_the_reference_there_are_no_ratios(bench: ModuleType) -> None:
    (row,) = bench.rows(measured(bench, {"xllm": [start(bench, 9.0)]}, "cold"), ("cold",))
    assert row.table == "Cold start"
    assert row.figure("times stock-best") is None


def test_a_peer_that_compiles_is_compared_in_the_repeat_it_took_part_in(bench: ModuleType) -> None:
    starts = {
        "stock-best": [start(bench, 60.0)],
        "stock-best-eager": [start(bench, 30.0), start(bench, 40.0)],
        "xllm": [start(bench, 15.0), start(bench, 10.0)],
    }
    *_, xllm = bench.rows(measured(bench, starts, "warm"), ("warm",))
    ratio = xllm.figure("times stock-best")
    assert (ratio.n, ratio.median) == (1, 0.25)
    ratio = xllm.figure("times stock-best-eager")
    assert (ratio.n, ratio.minimum, ratio.maximum) == (2, 0.25, 0.5)


def test_peers_that_compile_start_once(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(
        bench, "measure_repeat", lambda plan, one, *_, **__: started.append(one.peer.name)
    )
    plan = bench.Plan(Path("/m"), Vocabulary(10), ("warm",), 3, Path("/logs"))
    bench.measure(plan, peers(bench, bench.PEERS), Console(quiet=True))
    assert [started.count(name) for name in bench.PEERS] == [1, 1, 1, 3, 3]
    assert started[5:7] != started[7:9]  # each repeat begins with another one


def test_phases_are_read_off_the_log(bench: ModuleType, tmp_path: Path) -> None:
    log, now = tmp_path / "log", iter([2.0, 5.0, 9.0])
    watch = bench.LogWatch(log, lambda: next(now))
    watch.look()
    for mark in bench.MARKS.values():
        log.open("a").write(f"INFO (EngineCore pid=7) {mark} x\n")
        watch.look()
        watch.look()
    assert list(watch.marks_at_s.values()) == [2.0, 5.0, 9.0]
    told = start(bench, 12.0, marks_s=watch.marks_at_s)
    untold = start(bench, 12.0, marks_s={"loading": 9.0})
    durations = [figure.median for figure in bench.phases([told], {})]
    assert durations == [2.0, 3.0, 4.0, 2.5, 0.5]
    assert bench.phases([told, untold], {}) == ()


def test_warm_starts_that_compiled_are_told(bench: ModuleType) -> None:
    starts = {"stock": [start(bench, 9.0, compiled_again=True), start(bench, 9.0)]}
    assert "stock in 1 of 2" in bench.compiled_again(measured(bench, starts, "warm"))
    assert bench.compiled_again(measured(bench, starts, "cold")) == ""


def test_the_memory_of_a_process_tree_is_summed(bench: ModuleType) -> None:
    pytest.importorskip("psutil")

    class Fake:
        pid = os.getpid()

    assert bench.tree_rss_bytes(Fake()) > 2**20


def test_the_tables_can_be_rendered(bench: ModuleType, tmp_path: Path) -> None:
    starts = {"stock-best": [start(bench, 60.0)], "xllm": [start(bench, 15.0)]}
    run = schema.begin(bench.NAME, question=bench.QUESTION, command="xllm bench startup")
    found = measured(bench, starts, "cold")
    plan = bench.Plan(Path("/m/tiny"), Vocabulary(10), ("cold",), 1, tmp_path)
    result = run.finish(
        peers=[one.peer.record("/m/tiny") for one in found],
        rows=bench.rows(found, ("cold",)),
        notes=bench.notes(plan, found),
    )
    text = readme.render(result)
    assert "| xllm | 14.5 | 15 | 0.250 | 20 | 15 | 10 | 1 | 3 |" in text
    assert "/m/tiny" not in text
    assert "Outputs compared" in text


def test_the_readme_has_a_place_for_the_table() -> None:
    assert readme.section((FOLDER / "README.md").read_text(), "startup")
