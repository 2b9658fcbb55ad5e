"""What the micro benchmark of decisions measures is the router at work."""

from __future__ import annotations

import pytest

from xllm_plugin.bench.fleet_simulator.decisions import decision_us, working_fleet
from xllm_plugin.plugins import build_manager, routing_policies
from xllm_plugin.service.roster import MANY

POLICIES = routing_policies(build_manager(""))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("count", [2, MANY + 1])
def test_every_policy_can_be_measured(name: str, count: int) -> None:
    found = decision_us(POLICIES[name], count, repeats=2, decisions=3)
    assert len(found) == 2
    assert all(one > 0 for one in found)


def test_the_fleet_is_at_work() -> None:
    fleet = working_fleet(50, lambda: 0.0)
    instances = list(fleet)
    assert len({one.speed for one in instances}) == 50
    assert len({one.in_flight for one in instances}) > 3
    assert 0 < sum(one.prefill_tokens > 0 for one in instances) < 50
