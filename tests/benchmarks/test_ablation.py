"""The ablation benchmark without a server: switches, tables and checks."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from xllm_plugin.bench.load import Load, LoadResult
from xllm_plugin.bench.replay import Measured, Plan
from xllm_plugin.bench.traces import Lengths, Vocabulary
from xllm_plugin.config import load_config
from xllm_plugin.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "ablation"
LOADS = (Load(clients=1), Load(clients=8))


def point(load: Load, tpot_ms: float, ttft_ms: float, *, failed: int = 0) -> LoadResult:
    return LoadResult(
        load=load,
        duration_s=10.0,
        requests=8,
        failed=failed,
        short=0,
        input_tokens=100,
        output_tokens=100,
        output_tok_s=1000.0 / tpot_ms,
        ttft_p50_ms=ttft_ms,
        ttft_p90_ms=ttft_ms,
        ttft_p99_ms=ttft_ms,
        tpot_p50_ms=tpot_ms,
        tpot_p90_ms=tpot_ms,
        tpot_p95_ms=tpot_ms,
        tpot_p99_ms=tpot_ms,
        itl_p99_ms=tpot_ms,
        client_cpu_s=0.1,
    )


def plan() -> Plan:
    return Plan(
        loads=LOADS,
        repeats=1,
        requests_per_load=None,
        is_quick=False,
        tpot_ms=float("inf"),
        lengths=(Lengths(input_tokens=8, output_tokens=8),),
        vocabulary=Vocabulary(size=10, special=frozenset()),
        max_input=8,
        max_output=8,
        seed=0,
    )


def test_the_server_as_it_comes_goes_first_and_once(bench: ModuleType) -> None:
    peers = bench.changed_peers(("eager", bench.BASE), "/m", port=8000, flags=())
    assert [peer.name for peer in peers] == [bench.BASE, "eager"]


def test_an_unknown_change_is_refused_with_those_there_are(bench: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"turbo unknown; choose from .*eager"):
        bench.changed_peers(("turbo",), "/m", port=8000, flags=())


def test_every_switch_is_a_setting_or_an_option_that_exists(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renamed setting would silently measure the server as it comes."""
    for name, change in bench.CHANGES.items():
        assert (name == bench.BASE) != bool(change.environment or change.flags)
        with monkeypatch.context() as patch:
            before = load_config({})
            for variable, value in change.environment:
                patch.setenv(variable, value)
            assert (load_config({}) != before) == bool(change.environment)


def test_the_readme_lists_every_switch(bench: ModuleType) -> None:
    text = (FOLDER / "README.md").read_text()
    for name, change in bench.CHANGES.items():
        if name != bench.BASE:
            asked = [f"{variable}={value}" for variable, value in change.environment]
            assert f"| {name} | `{' '.join((*asked, *change.flags))}`" in text


def test_ratios_are_to_the_server_as_it_comes(bench: ModuleType) -> None:
    base, other = (
        Measured(peer) for peer in bench.changed_peers(("eager",), "/m", port=8000, flags=())
    )
    base.repeats = [[point(LOADS[0], 10.0, 100.0), point(LOADS[1], 20.0, 400.0)]]
    other.repeats = [[point(LOADS[0], 15.0, 100.0), point(LOADS[1], 40.0, 800.0)]]
    base.ready_s, other.ready_s = [11.0], [12.0]
    first, second = bench.rows([base, other], plan())
    assert first.figure("TPOT ratio").median == 1.0
    assert second.figure("TPOT ratio").median == 1.5
    assert second.figure("throughput ratio").median == 0.5
    assert second.figure("TTFT p50, 8 clients").median == 800.0
