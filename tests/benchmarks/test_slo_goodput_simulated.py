"""The planner keeps more promises than any static form, on a simulated machine (`simulated.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.bench.commands import beside
from xllm_plugin.bench.promises import Promise

FOLDER = Path(__file__).parents[2] / "benchmarks" / "slo_goodput"
simulated: Any = beside(FOLDER, "simulated")

PROMISE = Promise(1000, 50)
RATE = 2.5
"""Requests a second that the planner sustains."""
STATIC_RATE = RATE / 1.5


def kept(side: str, rate: float) -> float:
    found: float = simulated.attainment(side, rate, PROMISE, seeds=2, noise=0.06)
    return found


def test_the_planner_sustains_a_rate() -> None:
    assert kept("slo", RATE) >= simulated.GOAL


@pytest.mark.parametrize("side", ["fcfs", "fcfs-256", "fcfs-64", "priority"])
def test_no_static_form_sustains_two_thirds_of_it(side: str) -> None:
    assert kept(side, STATIC_RATE) < simulated.GOAL
