"""How long a step may take follows from the tightest TTFT."""

from __future__ import annotations

import pytest

from xllm_plugin.scheduler.step_limit import max_step_ms


@pytest.mark.parametrize(
    ("recent_ttft_ms", "expected_ms"),
    [([], 500), ([4000], 500), ([9000, 500], 250), ([1], 125)],
    ids=["default", "longer", "tightest", "not as short as anybody may ask"],
)
def test_a_step_takes_half_of_the_tightest_ttft(
    recent_ttft_ms: list[float], expected_ms: float
) -> None:
    assert max_step_ms(1000, recent_ttft_ms, runs_ahead=False) == expected_ms
    assert max_step_ms(1000, recent_ttft_ms, runs_ahead=True) == expected_ms / 2
