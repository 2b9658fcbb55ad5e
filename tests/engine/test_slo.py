"""The policy slo answers what vLLM's own order answers, token by token in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.engine

SCENARIOS = {
    "mixed": 24,
    "sampling": 16,
    "structured_output": 12,
    "prefix_caching": 12,
    "preemption": 12,
    "wrong_promise": 2,
}


@pytest.fixture(scope="module", params=["sync", pytest.param("async", marks=pytest.mark.full)])
def found(request: pytest.FixtureRequest, drive: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return drive("slo_driver", request.param)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_tokens_are_those_of_vllm_s_own_order(found: dict[str, Any], scenario: str) -> None:
    ours, theirs = found[scenario]["ours"], found[scenario]["theirs"]
    assert [name for name, _ in theirs] == [f"{i:03}" for i in range(SCENARIOS[scenario])]
    assert ours == theirs


def test_the_policy_was_at_work(found: dict[str, Any]) -> None:
    """Equality would show nothing if plans changed nothing."""
    counts = {name: found[name]["counts"] for name in SCENARIOS}
    assert counts["mixed"]["held"] > 0
    assert counts["sampling"]["held"] > 0
    assert counts["mixed"]["bounds"]["tpot"] > 0, "chunks were cut for decodes"
    assert counts["mixed"]["offline_tokens"] > 6 * 16
    assert counts["preemption"]["preempted"] > 0, "offline requests gave way"
    assert counts["wrong_promise"]["invalid"] == 1
    for count in counts.values():
        assert count["planned"] > 0


def test_who_is_not_aborted_gets_its_tokens(found: dict[str, Any]) -> None:
    """When a step is aborted differs, so does who has finished before; what they got does not."""
    ours, theirs = (dict(found["aborts"][side]) for side in ("ours", "theirs"))
    never = {f"{i:03}" for step in (9, 14, 19) for i in range(step, 24, 7)}
    expected = {f"{i:03}" for i in range(24)} - never
    assert expected <= ours.keys()
    assert expected <= theirs.keys()
    assert {name: ours[name] for name in expected} == {name: theirs[name] for name in expected}


def test_nothing_is_left_behind(found: dict[str, Any]) -> None:
    for scenario in (*SCENARIOS, "aborts"):
        assert set(found[scenario]["leftovers"].values()) == {0}, scenario
    assert found["limits"] == [8, 128, 0], "vLLM's own limits are as they were"


def test_promises_are_counted(found: dict[str, Any]) -> None:
    snapshot = found["snapshot"]
    groups = {group["service_class"]: group for group in snapshot["attainment"]}
    assert set(groups) == {"online", "offline"}
    for group in groups.values():
        assert 0 <= group["num_kept"] <= group["num_finished"]
    num_online_tokens = sum(snapshot["slack_counts"])
    assert num_online_tokens > 16 * groups["online"]["num_finished"] / 2


def test_the_last_step_is_reported_beside_its_prediction(found: dict[str, Any]) -> None:
    report = found["report"]
    assert report["online"]["num_running"] == report["online"]["num_waiting"] == 0
    assert report["step"]["num_sequences"] > 0
    assert report["step"]["predicted_ms"] > 0
    assert report["step"]["measured_ms"] > 0
