"""Sides of one engine differ in their scheduler alone, and are told what they understand."""

from __future__ import annotations

import pytest

from xllm_plugin.bench.promises import Promise
from xllm_plugin.bench.schedulers import OFFLINE_PRIORITY, choose_sides, reference_of
from xllm_plugin.errors import ConfigError

FLAGS = ("--max-model-len", "2048")
NAMES = ("stock-best", "fcfs", "fcfs-256", "priority", "slo")
PROMISE = Promise(1000, 50)


def test_sides_of_one_engine_differ_in_their_scheduler() -> None:
    _, *sides = choose_sides("/m", NAMES, FLAGS)
    fcfs = sides[0].server
    ports = {side.server.port for side in sides}
    assert len(ports) == len(sides)
    further = {}
    for side in sides:
        command = list(side.server.command)
        command[command.index("--port") + 1] = str(fcfs.port)
        assert command[: len(fcfs.command)] == list(fcfs.command)
        further[side.name] = (
            command[len(fcfs.command) :],
            side.server.environment["XLLM_SCHEDULER__POLICY"],
        )
        assert side.engine == "xllm"
        assert "xllm's engine" in side.server.what
    assert further == {
        "fcfs": ([], "fcfs"),
        "fcfs-256": (["--max-num-batched-tokens", "256"], "fcfs"),
        "priority": (["--scheduling-policy", "priority"], "fcfs"),
        "slo": ([], "slo"),
    }


def test_stock_is_without_us() -> None:
    (stock,) = choose_sides("/m", ["stock-best"], FLAGS)
    assert stock.engine == "stock"
    assert stock.server.environment["XLLM_PLATFORM"] == "native"
    assert "XLLM_SCHEDULER__POLICY" not in stock.server.environment


def test_what_a_request_says() -> None:
    stock, fcfs, chunked, priority, slo = choose_sides("/m", NAMES, FLAGS)
    for side in (stock, fcfs, chunked):
        assert side.fields(PROMISE, 7) == side.fields(PROMISE, 7, is_offline=True) == {}
    assert priority.fields(PROMISE, 7) == {"priority": 7}
    assert priority.fields(PROMISE, 7, is_offline=True) == {"priority": OFFLINE_PRIORITY}
    assert slo.fields(PROMISE, 7) == {
        "vllm_xargs": {"xllm_ttft_ms": 1000, "xllm_tpot_ms": 50, "xllm_class": "online"}
    }
    assert slo.fields(PROMISE, 7, is_offline=True)["vllm_xargs"]["xllm_class"] == "offline"
    assert [side.is_slo for side in (fcfs, priority, slo)] == [False, False, True]


def test_the_reference_runs_vllms_scheduler_on_our_engine() -> None:
    assert reference_of(choose_sides("/m", NAMES, FLAGS)).name == "fcfs"
    assert reference_of(choose_sides("/m", ["stock", "slo"], FLAGS)).name == "slo"
    assert reference_of(choose_sides("/m", ["stock"], FLAGS)).name == "stock"


@pytest.mark.parametrize("names", [["xllm"], ["fcfs-"], ["fcfs-0"], ["fcfs-x"], ["slo-2"], []])
def test_other_names_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="choose from stock, stock-2t, stock-best, fcfs, fcfs-N"):
        choose_sides("/m", names, FLAGS)
