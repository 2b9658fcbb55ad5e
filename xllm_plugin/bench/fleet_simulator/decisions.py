"""What one decision costs: processor time of the router's choice before fleets of several sizes.

Nothing else runs: no engine, no event.  The fleet is in the midst of its work (requests, queues,
speeds of its own for each instance, a prefix that all hold and longer ones that few do), and
between two decisions changes what changes between two requests.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from xllm_plugin.service.cached import CachedTokens
from xllm_plugin.service.config import InstanceEntry
from xllm_plugin.service.decision import Sent
from xllm_plugin.service.fleet import Fleet, Instance
from xllm_plugin.service.lifecycle import Alive, Timings
from xllm_plugin.service.policy import RoutingPolicy
from xllm_plugin.service.router import Router
from xllm_plugin.service.upstream import Pool
from xllm_plugin.testing.fake_exchange import FakeExchange

__all__ = ["decision_us", "working_fleet"]

_MODEL = "measured"
_MEAN_REQUESTS = 12
_SHARED_TOKENS = 512
_NUM_HOLDERS = 4


class _Clock:
    """Monotonic seconds, moved by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def working_fleet(num_instances: int, clock: Callable[[], float], seed: int = 0) -> Fleet:
    """Instances that have worked for a while, each with its own load and its own measured speed."""
    draw = random.Random(seed)  # noqa: S311 - no secret is made of it
    fleet = Fleet(Timings(lease_s=1e9), _pool, clock=clock)
    for number in range(num_instances):
        entry = InstanceEntry(url=f"http://i{number}:80", name=f"i{number}")
        instance = fleet.register(entry, source="bench", incarnation="1", leased=True)
        fleet.set_models(instance, {_MODEL: {"id": _MODEL}})
        fleet.report(instance, Alive("1"))
        slowness = draw.uniform(0.8, 1.25)
        for _ in range(30):
            tokens = draw.randrange(100, 20_000)
            seconds = slowness * (0.02 + 1e-4 * tokens) * draw.uniform(0.7, 1.5)
            fleet.observe_ttft(instance, tokens, seconds)
            instance.paces.tpot.observe(_MEAN_REQUESTS, slowness * draw.uniform(0.02, 0.03))
        for _ in range(round(draw.gauss(_MEAN_REQUESTS, 2))):
            fleet.book(instance, draw.randrange(100, 10_000))
        if draw.random() < 0.3:  # noqa: PLR2004
            fleet.expect_prefill(instance, draw.randrange(1, 20_000))
    fleet.tick()
    return fleet


def decision_us(
    policy: RoutingPolicy, num_instances: int, *, repeats: int = 5, decisions: int = 100
) -> list[float]:
    """Mean processor time of a decision in microseconds, one figure a repeat.

    Args:
        policy: that chooses.
        num_instances: of the fleet.
        repeats: of which each begins as it would after a second: with new speeds.
        decisions: that are made in each.
    """
    clock = _Clock()
    fleet = working_fleet(num_instances, clock)
    router = Router(fleet, policy, num_decisions=256, retry_after_s=1.0, clock=time.time)
    draw = random.Random(1)  # noqa: S311
    instances: Sequence[Instance] = fleet.candidates(_MODEL)
    names = [instance.name for instance in instances]
    found = []
    for _ in range(repeats):
        clock.now_s += 1.0
        fleet.tick()
        requests = [_request(draw, names) for _ in range(decisions)]
        spent_s = 0.0
        for request in requests:
            began_s = time.process_time()
            instance = router.choose(cast("Any", request))
            fleet.book(instance, request.cost_tokens)
            spent_s += time.process_time() - began_s
            # Somebody else's prompt is computed meanwhile, and somebody else's answer ends.
            router.left(cast("Any", request))
            fleet.release(instance, request.cost_tokens)
            other = draw.choice(instances)
            fleet.book(other, 1)
            fleet.release(other, 1)
        found.append(spent_s / decisions * 1e6)
    return found


def _request(draw: random.Random, names: Sequence[str]) -> FakeExchange:
    cached = _cached(draw, names)
    body = b" " * draw.choice((2_000, 8_000, 60_000))
    request = FakeExchange(
        _MODEL, body, draw=draw.getrandbits(64), session_key=f"session {draw.randrange(1000)}"
    )
    request.sent = Sent(len(body) // 4, cached)
    return request


def _cached(draw: random.Random, names: Sequence[str]) -> CachedTokens:
    """All hold the first block, a few hold more."""
    holders = draw.sample(names, min(_NUM_HOLDERS, len(names)))
    more = {name: float(_SHARED_TOKENS * draw.randrange(2, 20)) for name in holders}
    return CachedTokens(float(_SHARED_TOKENS), more, names)


def _pool(entry: InstanceEntry) -> Pool:
    """No connection is ever opened."""
    return Pool(entry.host, entry.port, tls=None, connect_timeout_s=1.0)
