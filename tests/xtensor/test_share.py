"""Engines that are busy at once come to a fair part of their pool each, and stay there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_plugin.testing.fakes import ManualClock
from xllm_plugin.xtensor.config import XTensorConfig
from xllm_plugin.xtensor.messages import MemoryReport
from xllm_plugin.xtensor.share import BudgetShare, Demand, PoolDemand, join_pool

SLAB = 1000
TOTAL_SLABS = 60
REQUEST_SLABS = 3
FULL_SLABS = REQUEST_SLABS + 1  # and the null block's
MAX_REQUESTS = 128  # vLLM's default for a server on a CPU
TRIP_ROUNDS = 120  # enough for all of the pool to go from one server to another


class Server:
    """An engine's demand: requests of one length, which end and are followed by others at once."""

    def __init__(self, share: BudgetShare) -> None:
        self.share = share
        self.num_requests = 0
        self.num_in_use = self.num_resident = 1
        self.num_steps = 0
        self.num_evicted = 0

    @property
    def takes(self) -> int:
        """Slabs, if there are enough for all requests."""
        return 1 + REQUEST_SLABS * self.num_requests

    def step(self) -> None:
        """A request ends, as many begin as there is room for; whatever was used stays cached."""
        self.num_in_use = max(1, min(self.takes, self.num_in_use - REQUEST_SLABS))
        demand = Demand(self.num_in_use, self.num_resident, self.num_requests)
        budget = self.share.plan(demand)
        self.num_evicted += max(0, self.num_resident - budget)
        self.num_in_use = max(self.num_in_use, min(self.takes, budget))
        self.num_resident = max(self.num_in_use, min(self.num_resident, budget))
        self.num_steps += 1
        self.share.tell(self.num_steps)
        self.share.record(report(self.num_resident * SLAB, self.num_steps))

    def unmet_bytes(self) -> int:
        return self.share.section().unmet_bytes


def report(num_bytes: int, change: int) -> MemoryReport:
    return MemoryReport(
        page_bytes=1,
        num_free=0,
        num_allocated=0,
        num_mapped=num_bytes,
        num_retired=0,
        num_reusable=0,
        num_created=num_bytes,
        num_released=0,
        num_maps=num_bytes,
        num_unmaps=0,
        num_reused=0,
        num_premapped=0,
        commit_s=0.0,
        release_s=0.0,
        num_commits=1,
        num_releases=0,
        change=change,
    )


class Box:
    """A machine: servers, and the time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "p.pool"
        self.clock = ManualClock()
        self.servers: list[Server] = []

    def start(self, min_slabs: int = FULL_SLABS, max_requests: int = MAX_REQUESTS) -> Server:
        share = join_pool(
            XTensorConfig(
                enabled=True,
                pool="p",
                pool_bytes=TOTAL_SLABS * SLAB,
                min_bytes=min_slabs * SLAB,
            ),
            PoolDemand(
                name="model",
                slab_bytes=SLAB,
                slab_blocks=1,
                full_request_slabs=FULL_SLABS,
                max_slabs=TOTAL_SLABS,
                max_requests=max_requests,
            ),
            path=self.path,
            clock=self.clock,
        )
        self.servers.append(Server(share))
        return self.servers[-1]

    def run(self, num_rounds: int = TRIP_ROUNDS) -> None:
        for _ in range(num_rounds):
            for server in self.servers:
                server.step()
            leased = [server.share.num_leased_slabs for server in self.servers]
            assert sum(leased) <= TOTAL_SLABS
            self.clock.advance(0.1)

    def close(self) -> None:
        for server in self.servers:
            server.share.close()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path)
    yield made
    made.close()


def test_one_request_does_not_hold_what_it_cannot_use(box: Box) -> None:
    first, second = box.start(), box.start()
    first.num_requests = 1
    box.run()
    assert first.share.num_leased_slabs == TOTAL_SLABS - FULL_SLABS, "nobody else wants it"
    assert first.unmet_bytes() == 0, "what it may run at most is no reason to wait"
    second.num_requests = 10
    box.run()
    assert second.num_in_use == second.takes == 31
    second.num_requests = 30
    box.run()
    leased = [server.share.num_leased_slabs for server in box.servers]
    assert leased == [FULL_SLABS, TOTAL_SLABS - FULL_SLABS]
    assert first.num_in_use == first.takes


def test_two_that_are_busy_at_once_have_half_each_and_take_nothing_from_each_other(
    box: Box,
) -> None:
    first, second = box.start(), box.start()
    first.num_requests = 30
    box.run()
    second.num_requests = 30
    box.run()
    for _ in range(TRIP_ROUNDS):
        evicted = [server.num_evicted for server in box.servers]
        box.run(1)
        assert [server.share.num_leased_slabs for server in box.servers] == [30, 30]
        assert [server.num_evicted for server in box.servers] == evicted
    assert first.unmet_bytes() == 0


def test_what_one_does_not_need_any_more_another_has(box: Box) -> None:
    first, second = box.start(), box.start()
    first.num_requests = second.num_requests = 30
    box.run()
    first.num_requests = 5
    box.run()
    assert first.num_in_use == first.takes == 16
    assert second.num_in_use >= TOTAL_SLABS - 5 * FULL_SLABS
    first.num_requests = 0
    box.run()
    assert second.share.num_leased_slabs == TOTAL_SLABS - FULL_SLABS
    first.num_requests = 30
    box.run()
    assert (first.num_in_use, second.num_in_use) == (30, 30)


@settings(max_examples=30, deadline=None)
@given(
    least=st.lists(st.integers(FULL_SLABS, 15), min_size=2, max_size=4),
    max_requests=st.sampled_from([4, 16, MAX_REQUESTS]),
    data=st.data(),
)
def test_each_has_what_it_needs_or_an_equal_part(
    least: list[int], max_requests: int, data: st.DataObject
) -> None:
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        box = Box(Path(folder))
        stack.callback(box.close)
        for min_slabs in least:
            box.start(min_slabs, max_requests)
        num_requests: Callable[[], int] = lambda: data.draw(st.integers(0, 40))  # noqa: E731
        for _ in range(2):
            for server in box.servers:
                server.num_requests = min(num_requests(), max_requests)
                box.run(data.draw(st.integers(0, TRIP_ROUNDS)))
        box.run(3 * TRIP_ROUNDS)
        evicted = [server.num_evicted for server in box.servers]
        part = (TOTAL_SLABS - sum(least)) // len(least)
        for server, min_slabs in zip(box.servers, least, strict=True):
            assert server.num_in_use >= min(server.takes, min_slabs + part)
        box.run(TRIP_ROUNDS)
        assert [server.num_evicted for server in box.servers] == evicted, "memory goes to and fro"
