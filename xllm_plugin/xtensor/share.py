"""`BudgetShare`: how much of a machine's pool one engine holds, decided before each step.

The rules, for an engine that shares:

1. It never holds less than its minimum, so that it can always serve one request of full length.
2. It leases ahead of need, so that a step finds what vLLM was promised when it was scheduled.
   Nobody waits for that: another has to give only what requests can use next.
3. First come, first leased: what requests use stays with them until they end.  Cached blocks and
   room to spare beyond an engine's share (`leases.fair_shares`) go to those who wait for less than
   theirs, and of those to who has waited longer.  So two that are busy at once come to a share
   each and stay there.
4. A lease shrinks only when the workers have said that the memory is with the system again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from xllm_plugin.errors import ConfigError, NotNowError
from xllm_plugin.xtensor.config import XTensorConfig
from xllm_plugin.xtensor.leases import PoolMember, pool_path
from xllm_plugin.xtensor.messages import MemoryReport, PoolSection

__all__ = ["RETURN_LOOK_S", "BudgetShare", "Demand", "PoolDemand", "join_pool"]

LOOK_S = 0.1
"""How often an idle engine looks whether another waits, while it holds more than its minimum.
Until then the other has only its own: 0.1 s are ten steps of a small model."""
JOIN_LOOK_S = 0.1
RETURN_LOOK_S = 0.05
"""How often workers are asked while memory is on its way back."""


class Demand(NamedTuple):
    """What an engine has on its hands, in slabs.

    Attributes:
        num_in_use: with blocks of requests.
        num_resident: those, and with cached blocks or none.
        num_requests: that are not finished.
    """

    num_in_use: int
    num_resident: int
    num_requests: int


class PoolDemand(NamedTuple):
    """What an engine asks of a pool as long as it lives.

    Attributes:
        name: of its model.
        slab_bytes: what one slab takes.
        slab_blocks: blocks of a slab.
        full_request_slabs: what one request of full length takes, the null block included; the
            least minimum.
        max_slabs: never to go above.
        max_requests: that run at once.
    """

    name: str
    slab_bytes: int
    slab_blocks: int
    full_request_slabs: int
    max_slabs: int
    max_requests: int

    def ahead(self, num_requests: int) -> int:
        """Slabs that requests may take in a step: each begins a block, or one has a long prompt."""
        num_running = min(num_requests, self.max_requests)
        return max(self.full_request_slabs, -(-num_running // self.slab_blocks))

    def needed(self, now: Demand) -> int:
        """Slabs that the requests there are have and can use next."""
        next_slabs = now.num_in_use + self.ahead(now.num_requests)
        return max(now.num_in_use, min(next_slabs, now.num_requests * self.full_request_slabs))


class BudgetShare:
    """See the module.  All calls come on the engine's thread.

    Args:
        member: of the pool; it has leased its minimum.
        demand: of the engine; its `max_slabs` are no more than the member's most.
        min_slabs: never to go below.
        keep_s: how long a lease outlives the last request, if nobody waits.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        member: PoolMember,
        demand: PoolDemand,
        *,
        min_slabs: int,
        keep_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._member = member
        self._demand = demand
        self._slab_bytes = demand.slab_bytes
        self._min_slabs = self._need_slabs = min_slabs
        self._max_slabs = demand.max_slabs
        self._keep_s = keep_s
        self._clock = clock
        self._target_slabs = self._leased_slabs = min_slabs
        self._idle_from_s = clock()
        self._look_s = math.inf
        self._told = (min_slabs, 0)  # the last target that workers were told, and in which change

    @property
    def min_slabs(self) -> int:
        """What it can always have."""
        return self._min_slabs

    @property
    def total_slabs(self) -> int:
        """What the pool has for all."""
        return self._member.total_bytes // self._slab_bytes

    @property
    def num_leased_slabs(self) -> int:
        """What the pool has granted; at least the budget."""
        return self._leased_slabs

    def plan(self, demand: Demand) -> int:
        """Lease more or decide to give back; return the budget of the next step, in slabs."""
        now_s = self._clock()
        wish = demand.num_resident
        if demand.num_requests:
            self._idle_from_s = now_s
            wish += self._demand.ahead(self._demand.max_requests)
        wish, self._need_slabs = self._within(wish), self._within(self._demand.needed(demand))
        awaited_bytes = self._member.awaited_bytes(self._need_slabs * self._slab_bytes)
        num_awaited = math.ceil(awaited_bytes / self._slab_bytes)
        if num_awaited:
            kept = max(demand.num_in_use, self._leased_slabs - num_awaited)
            wish = self._within(min(wish, kept))
        elif now_s - self._idle_from_s < self._keep_s:
            wish = self._within(max(wish, self._leased_slabs))
        self._lease(max(wish, self._leased_slabs))
        self._target_slabs = min(wish, self._leased_slabs)
        is_at_rest = self._need_slabs <= self._leased_slabs == self._min_slabs
        self._look_s = math.inf if is_at_rest else now_s + LOOK_S
        return self._target_slabs

    def set_most(self, max_slabs: int) -> None:
        """Never go above so many slabs from the next step on.

        Args:
            max_slabs: `min_slabs` to `total_slabs`.
        """
        self._max_slabs = max_slabs
        self._member.set_most(max_slabs * self._slab_bytes)

    def tell(self, change: int) -> None:
        """Note that the workers are told of the target with the change of that number."""
        if self._told[0] != self._target_slabs:
            self._told = (self._target_slabs, change)

    def record(self, report: MemoryReport) -> None:
        """Give back what a worker no longer has."""
        target, change = self._told
        if not self.is_returning or target != self._target_slabs or report.change < change:
            return
        num_slabs = max(target, math.ceil(report.num_bytes / self._slab_bytes))
        if num_slabs < self._leased_slabs:
            self._lease(num_slabs)

    @property
    def is_returning(self) -> bool:
        """Whether memory is on its way back, and workers are to be asked for it."""
        return self._target_slabs < self._leased_slabs

    def next_look_s(self) -> float:
        """When, by the clock, `plan` is to be called though no request asks for a step."""
        return self._look_s

    def section(self) -> PoolSection:
        """What is shown of the pool."""
        members = self._member.members()
        return PoolSection(
            name=self._member.pool,
            total_bytes=self._member.total_bytes,
            leased_bytes=self._leased_slabs * self._slab_bytes,
            min_bytes=self._min_slabs * self._slab_bytes,
            max_bytes=self._max_slabs * self._slab_bytes,
            members=members,
        )

    def close(self) -> None:
        """Leave the pool; the workers are gone."""
        self._member.leave()

    def _within(self, num_slabs: int) -> int:
        return min(max(num_slabs, self._min_slabs), self._max_slabs)

    def _lease(self, wish_slabs: int) -> None:
        size = self._slab_bytes
        granted = self._member.lease(wish_slabs * size, self._need_slabs * size, size)
        self._leased_slabs = granted // size


def join_pool(
    config: XTensorConfig,
    demand: PoolDemand,
    *,
    path: Path | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> BudgetShare:
    """Join the pool that the settings name, and lease the minimum.

    Args:
        config: the settings; `pool` is named.
        demand: of the engine.
        path: of the pool's file, if it is not `pool_path` of the name.
        sleep: seconds; while others hold what the minimum takes.
        clock: of the share.

    Raises:
        ConfigError: the minimum is more than the maximum or the pool, or see `PoolMember`.
        NotNowError: others still use what the minimum takes.
    """
    assert config.pool is not None
    size = demand.slab_bytes
    min_slabs = max(demand.full_request_slabs, -(-(config.min_bytes or 0) // size))
    if min_slabs > demand.max_slabs:
        raise ConfigError(
            f"xtensor.min_bytes={config.min_bytes}: this server can take {demand.max_slabs * size} "
            "bytes at most. Give no more than that, or a larger --kv-cache-memory-bytes."
        )
    member = PoolMember(
        path or pool_path(config.pool),
        pool=config.pool,
        total_bytes=config.pool_bytes,
        name=demand.name,
        least_bytes=min_slabs * size,
        most_bytes=demand.max_slabs * size,
    )
    max_slabs = min(demand.max_slabs, member.total_bytes // size)
    waited_s = 0.0
    while (leased := member.lease(min_slabs * size, unit_bytes=size)) < min_slabs * size:
        if waited_s >= config.pool_wait_s:
            holders = ", ".join(f"{m.name} {m.leased_bytes}" for m in member.members())
            member.leave()
            raise NotNowError(
                f"{leased} of the minimum of {min_slabs * size} bytes could be leased from the "
                f"pool {config.pool} in {waited_s:.0f} s; it is in use by {holders}. Try again "
                "when they have less to do, or raise xtensor.pool_wait_s."
            )
        sleep(JOIN_LOOK_S)
        waited_s += JOIN_LOOK_S
    return BudgetShare(
        member,
        demand._replace(max_slabs=max_slabs),
        min_slabs=min_slabs,
        keep_s=config.keep_idle_s,
        clock=clock,
    )
