"""The page pool over a fake device: by example, against a model, and between threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from xllm_plugin.accelerator.memory import PageHandle
from xllm_plugin.errors import InternalError, PagesExhaustedError
from xllm_plugin.testing.fakes import FakeFence, FakeMemoryDriver, ManualClock
from xllm_plugin.xtensor.keeper import PoolKeeper
from xllm_plugin.xtensor.page import Page, PageState
from xllm_plugin.xtensor.page_pool import PagePool, PoolPolicy

SIZE = 4
SLOTS = 10
NOTHING_READY = PoolPolicy(premap_pages=0, keep_mapped_pages=SLOTS, idle_s=1e9)


class Scene:
    """A pool over a fake device, and ten addresses."""

    def __init__(
        self,
        budget_pages: int = 8,
        policy: PoolPolicy = NOTHING_READY,
        driver: FakeMemoryDriver | None = None,
    ) -> None:
        self.clock = ManualClock()
        self.driver = driver or FakeMemoryDriver(granularity_bytes=SIZE, capacity_pages=64)
        self.pool = PagePool(
            self.driver, budget_pages=budget_pages, policy=policy, clock=self.clock
        )
        start = self.driver.reserve(SLOTS * SIZE)
        self.at = [start + slot * SIZE for slot in range(SLOTS)]

    def states(self) -> dict[str, int]:
        self.pool.check_integrity()
        return {name: n for name, n in self.pool.statistics().num_by_state.items() if n}

    def pages(self, *slots: int) -> list[PageHandle | None]:
        return [self.pool.page_at(self.at[slot]) for slot in slots]


def test_a_page_goes_from_state_to_state() -> None:
    scene = Scene()
    pool, at = scene.pool, scene.at
    assert scene.states() == {}
    assert pool.take("a", at[:2]) == 0
    assert scene.states() == {"mapped": 2}
    scene.driver.launch(at[0])
    pool.retire("a", at[:1])
    assert scene.states() == {"mapped": 1, "retired": 1}
    scene.driver.finish_work()
    pool.num_available()
    assert scene.states() == {"mapped": 1, "reusable": 1}
    assert pool.evict(5) == 1
    assert scene.states() == {"mapped": 1, "free": 1}
    pool.drop_owner("a")
    pool.close()
    assert (scene.driver.num_pages, scene.driver.num_mapped) == (0, 0)


def test_an_address_that_is_still_mapped_needs_nothing_of_the_device() -> None:
    scene = Scene()
    scene.pool.take("a", scene.at[:3])
    before = scene.pages(0, 1, 2)
    scene.pool.retire("a", scene.at[:3])
    assert scene.pool.is_mapped(scene.at[0])
    scene.driver.fail_map()
    assert scene.pool.take("b", [scene.at[2], scene.at[0]]) == 2
    assert scene.pages(0, 1, 2) == before
    statistics = scene.pool.statistics()
    assert (statistics.num_created, statistics.num_mapped, statistics.num_reused) == (3, 3, 2)


def test_pages_are_created_once_and_used_at_other_addresses() -> None:
    scene = Scene()
    for slot in range(SLOTS):
        scene.pool.take("a", [scene.at[slot]])
        scene.pool.drop_owner("a")
    assert scene.driver.num_pages == 1
    assert scene.pool.statistics().num_created == 1


def test_nothing_is_taken_while_work_may_read_it() -> None:
    scene = Scene(budget_pages=2)
    pool, at = scene.pool, scene.at
    pool.take("a", at[:2])
    scene.driver.launch(*at[:2])
    pool.retire("a", at[:2])
    assert pool.num_available() == 0
    with pytest.raises(PagesExhaustedError, match=r"1 pages asked for, 0 left .* 2 of them wait"):
        pool.take("b", at[2:3])
    with pytest.raises(PagesExhaustedError, match="may still read"):
        pool.take("b", at[:1])
    scene.driver.finish_work()
    assert pool.num_available() == 2
    pool.take("b", at[1:3])


def test_a_fence_of_the_caller_counts_instead_of_the_device_s() -> None:
    scene = Scene()
    scene.pool.take("a", scene.at[:1])
    scene.driver.launch()
    last_step = scene.driver.fence()
    scene.driver.launch()
    scene.pool.retire("a", scene.at[:1], last_step)
    scene.driver.finish_work(1)
    assert scene.pool.num_available() == 8


def test_a_shared_page_stays_until_its_last_owner_gives_it_up() -> None:
    scene = Scene()
    pool, at = scene.pool, scene.at
    pool.take("a", at[:1])
    scene.driver.write(at[0], b"abcd")
    pool.share("b", {at[5]: at[0]})
    assert scene.pages(0)[0] == scene.pages(5)[0]
    pool.retire("a", at[:1])
    assert scene.states() == {"mapped": 1}
    assert not pool.is_mapped(at[0])  # whoever takes this address must not get b's page
    pool.take("c", at[:1])
    assert scene.pages(0)[0] != scene.pages(5)[0]
    assert scene.driver.read(at[5], SIZE) == b"abcd"
    pool.retire("b", at[5:6])
    assert scene.states() == {"mapped": 1, "reusable": 1}


def test_a_shared_page_that_goes_leaves_all_its_addresses() -> None:
    scene = Scene()
    pool, at = scene.pool, scene.at
    pool.take("a", at[:1])
    pool.share("a", {at[1]: at[0], at[2]: at[0]})
    pool.drop_owner("a")
    assert scene.states() == {"reusable": 1}
    assert pool.evict(1) == 1
    assert scene.states() == {"free": 1}
    assert scene.driver.num_mapped == 0


@pytest.mark.parametrize("fault", ["create", "map"])
def test_a_batch_that_fails_part_way_leaves_the_owner_as_it_was(fault: str) -> None:
    scene = Scene()
    pool, at = scene.pool, scene.at
    pool.take("a", at[:3])
    pool.retire("a", at[1:3])  # slots 1 and 2 stay mapped
    kept = scene.pages(0, 2)
    {"create": scene.driver.fail_create, "map": scene.driver.fail_map}[fault](at=2)
    with pytest.raises(PagesExhaustedError, match="no memory for it") as caught:
        pool.take("a", [at[2], *at[4:8]])
    assert isinstance(caught.value.__cause__, MemoryError)
    assert scene.pages(0, 2) == kept
    assert scene.pages(4, 5, 6, 7) == [None] * 4
    assert scene.states()["mapped"] == 1
    assert sum(scene.states().values()) == scene.driver.num_pages
    assert pool.num_available() == 7
    pool.take("a", [at[2], *at[4:8]])


def test_an_unmap_that_fails_leaves_everything_as_it_was() -> None:
    scene = Scene(budget_pages=3)
    pool, at = scene.pool, scene.at
    pool.take("a", at[:3])
    pool.share("a", {at[8]: at[1]})
    pool.drop_owner("a")
    scene.driver.fail_unmap()
    with pytest.raises(PagesExhaustedError):
        pool.take("b", [at[0], *at[4:6]])
    scene.driver.fail_unmap()
    with pytest.raises(PagesExhaustedError):
        pool.evict(2)
    assert scene.states() == {"reusable": 3}
    assert scene.driver.num_mapped == 4
    pool.take("b", [at[0], *at[4:6]])
    assert scene.states() == {"mapped": 3}


def test_a_share_that_fails_leaves_everything_as_it_was() -> None:
    scene = Scene()
    pool, at = scene.pool, scene.at
    pool.take("a", at[:2])
    scene.driver.fail_map(at=2)
    with pytest.raises(PagesExhaustedError):
        pool.share("b", {at[4]: at[0], at[5]: at[1]})
    assert scene.pages(4, 5) == [None, None]
    assert pool.drop_owner("b") == 0
    assert scene.states() == {"mapped": 2}


def test_a_page_retired_while_a_share_of_it_fails_is_reusable() -> None:
    class RetireMeanwhile(FakeMemoryDriver):
        def map(self, pages: Mapping[int, PageHandle]) -> None:
            if len(pages) == 1 and self.num_mapped == 2:
                scene.pool.retire("a", scene.at[:1])
                raise MemoryError("no page tables")
            super().map(pages)

    driver = RetireMeanwhile(granularity_bytes=SIZE, capacity_pages=64)
    scene = Scene(driver=driver)
    scene.pool.take("a", scene.at[:2])
    with pytest.raises(PagesExhaustedError):
        scene.pool.share("b", {scene.at[4]: scene.at[0]})
    assert scene.states() == {"mapped": 1, "reusable": 1}
    assert scene.pool.take("b", scene.at[:1]) == 1


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda pool, at: pool.take("b", [at[1], at[1]]), "named twice"),
        (lambda pool, at: pool.take("b", [at[0]]), "in use by 'a'"),
        (lambda pool, at: pool.take("b", [at[0] - 10 * SIZE]), "not reserved"),
        (lambda pool, at: pool.retire("b", [at[0]]), "'b' has nothing at"),
        (lambda pool, at: pool.retire("a", [at[0], at[3]]), "'a' has nothing at"),
        (lambda pool, at: pool.retire("a", [at[0], at[0]]), "named twice"),
        (lambda pool, at: pool.share("b", {at[4]: at[3]}), "nobody uses"),
        (lambda pool, at: pool.share("b", {at[1]: at[0]}), "in use by 'a'"),
        (lambda pool, at: pool.set_budget(-1), "zero or more"),
    ],
)
def test_misuse_is_refused_and_changes_nothing(
    misuse: Callable[[PagePool, list[int]], Any], message: str
) -> None:
    scene = Scene()
    scene.pool.take("a", scene.at[:2])
    with pytest.raises(ValueError, match=message):
        misuse(scene.pool, scene.at)
    assert scene.states().pop("mapped") == 2
    assert scene.pool.num_available() == 6


def test_a_smaller_budget_takes_effect_as_pages_come_back() -> None:
    scene = Scene(budget_pages=6)
    pool, at = scene.pool, scene.at
    pool.take("a", at[:5])
    assert pool.set_budget(2) == 3
    assert pool.num_available() == 0
    pool.retire("a", at[:4])
    pool.maintain()
    assert scene.driver.num_pages == 2
    assert pool.num_available() == 1
    assert pool.set_budget(8) == 0
    pool.take("a", at[:4])


def test_the_next_addresses_are_mapped_ahead() -> None:
    scene = Scene(policy=PoolPolicy(premap_pages=2, keep_mapped_pages=4, idle_s=5.0))
    pool, at = scene.pool, scene.at
    pool.expect(at[3:8])
    pool.maintain()
    assert scene.states() == {"reusable": 2}
    assert pool.take("a", at[3:5]) == 2
    scene.clock.advance(60)  # however long: what is ahead stays
    pool.maintain()
    pool.expect(at[5:8])
    pool.maintain()
    pool.maintain()
    assert [pool.is_mapped(at[slot]) for slot in (5, 6, 7)] == [True, True, False]
    assert pool.statistics().num_premapped == 4


def test_mapping_ahead_takes_nothing_away_and_may_fail() -> None:
    scene = Scene(budget_pages=2, policy=PoolPolicy(premap_pages=4, keep_mapped_pages=4))
    pool, at = scene.pool, scene.at
    pool.take("a", at[:2])
    pool.expect(at[5:9])
    pool.maintain()
    assert scene.states() == {"mapped": 2}
    pool.set_budget(4)
    scene.driver.fail_create()
    pool.maintain()
    assert pool.statistics().num_premap_failures == 1
    assert scene.states() == {"mapped": 2}


def test_unused_pages_stay_mapped_up_to_a_number_and_for_a_time() -> None:
    scene = Scene(policy=PoolPolicy(premap_pages=0, keep_mapped_pages=2, idle_s=10.0))
    pool, at = scene.pool, scene.at
    pool.take("a", at[:4])
    scene.clock.advance(1)
    pool.retire("a", [at[1]])
    scene.clock.advance(1)
    pool.retire("a", [at[0], at[2], at[3]])
    pool.maintain()
    assert [pool.is_mapped(address) for address in at[:4]] == [False, False, True, True]
    assert scene.states() == {"reusable": 2, "free": 2}
    scene.clock.advance(9)
    pool.maintain()
    assert scene.states() == {"reusable": 2, "free": 1}
    scene.clock.advance(1)
    pool.maintain()
    assert scene.states() == {}
    assert scene.driver.num_pages == 0


def test_closing_with_a_page_in_use_is_a_bug() -> None:
    scene = Scene()
    scene.pool.take("a", scene.at[:1])
    with pytest.raises(InternalError, match="1 pages are in use"):
        scene.pool.close()


def test_a_state_follows_only_those_it_may() -> None:
    page = Page(PageHandle(1))
    with pytest.raises(InternalError, match="from free to mapped"):
        page.becomes(PageState.MAPPED)


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool, at: setattr(pool._books.mappings[at[0]].page, "state", PageState.RETIRED),
        lambda pool, at: pool._books.states.update({PageState.FREE: 1}),
        lambda pool, at: pool._books.mappings.pop(at[0]),
        lambda pool, at: pool._books.owned["a"].pop(at[0]),
        lambda pool, at: pool._books.warm.update({at[0]: pool._books.mappings[at[0]]}),
        lambda pool, at: pool._books.free.append(pool._books.mappings[at[0]].page),
        lambda pool, at: setattr(pool._books.mappings[at[0]], "owner", None),
        lambda pool, at: pool._books.mappings.update({at[0]: pool._books.mappings[at[1]]}),
    ],
)
def test_integrity_notices_damage(damage: Callable[[PagePool, list[int]], Any]) -> None:
    scene = Scene()
    scene.pool.take("a", scene.at[:3])
    scene.pool.retire("a", scene.at[2:3])
    scene.pool.check_integrity()
    damage(scene.pool, scene.at)
    with pytest.raises((InternalError, AssertionError)):
        scene.pool.check_integrity()


class PoolMachine(RuleBasedStateMachine):
    """The pool against a model: who owns which address, and what each should show.

    Every page taken is stamped; so a page that two owners have, or that is taken from under a step,
    shows.  The fake device refuses to unmap what unfinished work uses.
    """

    owners = st.sampled_from("abc")
    some_slots = st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=5, unique=True)

    @initialize(budget=st.integers(1, 5), premap=st.integers(0, 3), keep=st.integers(0, 4))
    def start(self, budget: int, premap: int, keep: int) -> None:
        policy = PoolPolicy(premap_pages=premap, keep_mapped_pages=keep, idle_s=10.0)
        self.scene = Scene(budget, policy)
        self.pool, self.driver, self.at = self.scene.pool, self.scene.driver, self.scene.at
        self.owned: dict[int, str] = {}
        self.shows: dict[int, bytes] = {}
        self.stamps = iter(range(1, 2**31))
        self.steps: list[dict[int, bytes]] = []  # address -> what the step must find there

    # The life of a request

    @rule(
        owner=owners,
        slots=some_slots,
        fault=st.sampled_from(["", "", "create", "map", "unmap"]),
        when=st.integers(1, 3),
    )
    def take(self, owner: str, slots: list[int], fault: str, when: int) -> None:
        addresses = [self.at[slot] for slot in slots]
        if any(address in self.owned for address in addresses):
            with pytest.raises((ValueError, PagesExhaustedError)):
                self.pool.take(owner, addresses)
            return
        waiting = any(self.waits(address) for address in addresses)
        fits = len(addresses) <= self.pool.num_available() and not waiting
        with self.fault(fault, when):
            try:
                self.pool.take(owner, addresses)
            except PagesExhaustedError:
                assert fault or not fits
                return
        assert fits
        for address in addresses:
            self.owned[address] = owner
            self.shows[address] = next(self.stamps).to_bytes(SIZE, "little")
            self.driver.write(address, self.shows[address])

    @precondition(lambda self: self.owned)
    @rule(
        data=st.data(),
        owner=owners,
        slots=some_slots,
        fault=st.sampled_from(["", "", "map", "unmap"]),
        when=st.integers(1, 2),
    )
    def share(
        self, data: st.DataObject, owner: str, slots: list[int], fault: str, when: int
    ) -> None:
        sources = st.sampled_from(sorted(self.owned))
        shown = {self.at[slot]: data.draw(sources) for slot in slots}
        with self.fault(fault, when):
            try:
                self.pool.share(owner, shown)
            except ValueError:
                assert any(address in self.owned for address in shown)
                return
            except PagesExhaustedError:
                assert fault or any(self.waits(address) for address in shown)
                return
        for address, source in shown.items():
            self.owned[address], self.shows[address] = owner, self.shows[source]

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(set(self.owned.values()))))
        own = sorted(address for address, who in self.owned.items() if who == owner)
        going = data.draw(st.lists(st.sampled_from(own), min_size=1, unique=True))
        self.pool.retire(owner, going)
        self.forget(going)

    @rule(owner=owners)
    def owner_dies(self, owner: str) -> None:
        own = [address for address, who in self.owned.items() if who == owner]
        assert self.pool.drop_owner(owner) == len(own)
        self.forget(own)

    # The device

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def launch_a_step(self, data: st.DataObject) -> None:
        reads = data.draw(st.lists(st.sampled_from(sorted(self.owned)), min_size=1, unique=True))
        self.driver.launch(*reads)
        self.steps.append({address: self.shows[address] for address in reads})

    @precondition(lambda self: self.steps)
    @rule()
    def finish_a_step(self) -> None:
        self.driver.finish_work(1)
        self.steps.pop(0)

    # What is not urgent

    @rule(num_pages=st.integers(0, 8))
    def resize(self, num_pages: int) -> None:
        in_use = sum(self.in_use().values())
        assert self.pool.set_budget(num_pages) == max(0, in_use - num_pages)

    @rule(num_pages=st.integers(0, 4), fault=st.sampled_from(["", "unmap"]))
    def evict(self, num_pages: int, fault: str) -> None:
        with self.fault(fault, 1):
            try:
                assert self.pool.evict(num_pages) <= num_pages
            except PagesExhaustedError:
                assert fault

    @rule(slots=some_slots)
    def expect(self, slots: list[int]) -> None:
        self.pool.expect([self.at[slot] for slot in slots])

    @rule(
        fault=st.sampled_from(["", "", "create", "map", "unmap"]),
        seconds=st.sampled_from([0, 1, 20]),
    )
    def maintain(self, fault: str, seconds: int) -> None:
        self.scene.clock.advance(seconds)
        with self.fault(fault, 1):
            try:
                self.pool.maintain()
            except PagesExhaustedError:
                assert fault == "unmap"
                return
        budget = self.pool.budget_pages
        assert self.driver.num_pages <= max(budget, sum(self.in_use().values()))

    # What holds at every moment

    @invariant()
    def owners_have_what_they_took(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.driver.check_integrity()
        self.pool.check_integrity()
        for address, stamp in self.shows.items():
            assert self.driver.read(address, SIZE) == stamp

    @invariant()
    def steps_find_what_they_were_launched_with(self) -> None:
        for step in getattr(self, "steps", []):
            for address, stamp in step.items():
                assert self.driver.read(address, SIZE) == stamp

    @invariant()
    def no_page_is_lost(self) -> None:
        if hasattr(self, "pool"):
            counted = self.pool.statistics().num_by_state
            assert sum(counted.values()) == self.driver.num_pages
            assert counted["allocated"] == 0
            assert counted["mapped"] == len(set(self.shows.values()))

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for owner in "abc":
            self.pool.drop_owner(owner)
        self.driver.finish_work()
        self.pool.close()
        assert (self.driver.num_pages, self.driver.num_mapped) == (0, 0)

    def forget(self, addresses: Collection[int]) -> None:
        for address in addresses:
            del self.owned[address], self.shows[address]

    def waits(self, address: int) -> bool:
        mapping = self.pool._books.mappings.get(address)
        return mapping is not None and mapping.fence is not None and not mapping.fence.is_done()

    def in_use(self) -> dict[str, int]:
        self.pool.num_available()
        counted = self.pool.statistics().num_by_state
        return {name: counted[name] for name in ("allocated", "mapped", "retired")}

    @contextmanager
    def fault(self, kind: str, when: int) -> Iterator[None]:
        faults = {
            "create": self.driver._create_fault,
            "map": self.driver._map_fault,
            "unmap": self.driver._unmap_fault,
        }
        if kind:
            faults[kind].set(1 if kind == "unmap" else when)
        yield
        for countdown in faults.values():
            countdown._left = None


PoolMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


class OneAtATime(FakeMemoryDriver):
    """Notices calls that come while another is under way; a fence's may, and is counted."""

    def __init__(self) -> None:
        super().__init__(granularity_bytes=SIZE, capacity_pages=64)
        self.entered = threading.Lock()
        self.overlaps = self.fences_beside = 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        if not self.entered.acquire(blocking=False):
            self.overlaps += 1
            self.entered.acquire()
        try:
            yield
        finally:
            self.entered.release()

    def create(self, num_pages: int) -> list[PageHandle]:
        with self.alone():
            return super().create(num_pages)

    def map(self, pages: Mapping[int, PageHandle]) -> None:
        with self.alone():
            super().map(pages)

    def unmap(self, addresses: Collection[int], *, keep: bool = True) -> None:
        with self.alone():
            super().unmap(addresses, keep=keep)

    def release(self, pages: Collection[PageHandle]) -> None:
        with self.alone():
            super().release(pages)

    def fence(self) -> FakeFence:
        self.fences_beside += self.entered.locked()
        return super().fence()


def test_threads_and_a_keeper_share_a_pool() -> None:
    driver = OneAtATime()
    policy = PoolPolicy(premap_pages=2, keep_mapped_pages=1, idle_s=0.0)
    scene = Scene(budget_pages=6, policy=policy, driver=driver)
    pool, errors = scene.pool, []

    def work(owner: str, mine: list[int]) -> None:
        rng = random.Random(owner)
        try:
            for round_ in range(200):
                wanted = rng.sample(mine, rng.randint(1, len(mine)))
                try:
                    pool.take(owner, wanted)
                except PagesExhaustedError:
                    continue
                for address in wanted:
                    driver.write(address, owner.encode() * SIZE)
                pool.expect(mine)
                assert all(driver.read(a, SIZE) == owner.encode() * SIZE for a in wanted)
                if round_ % 10:
                    pool.retire(owner, wanted)
                else:
                    pool.drop_owner(owner)
        except BaseException as error:  # noqa: BLE001 - carried to the thread that asserts
            errors.append(error)

    with PoolKeeper(pool, interval_s=0.001):
        threads = [
            threading.Thread(target=work, args=(owner, scene.at[3 * n : 3 * n + 3]))
            for n, owner in enumerate("abc")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert driver.overlaps == 0
    pool.check_integrity()
    pool.close()
    assert (driver.num_pages, driver.num_mapped) == (0, 0)


def test_taking_what_is_mapped_does_not_wait_for_a_slow_unmap() -> None:
    driver = OneAtATime()
    scene = Scene(driver=driver)
    pool, at = scene.pool, scene.at
    pool.take("a", at[:4])
    pool.drop_owner("a")
    with scene.driver.slow_unmap():
        evicting = threading.Thread(target=pool.evict, args=(1,))
        evicting.start()
        while pool.is_mapped(at[0]):  # until the unmap is under way
            pass
        assert pool.take("b", at[1:3]) == 2
        pool.retire("b", at[1:2])
        assert evicting.is_alive()
    evicting.join()
    assert (driver.fences_beside, driver.overlaps) == (1, 0)
    assert scene.states() == {"mapped": 1, "reusable": 2, "free": 1}


class SlowDriver(FakeMemoryDriver):
    """Takes two seconds to map and three to unmap, by the pool's clock."""

    def __init__(self) -> None:
        super().__init__(granularity_bytes=SIZE, capacity_pages=64)
        self.clock = ManualClock()

    def map(self, pages: Mapping[int, PageHandle]) -> None:
        self.clock.advance(2.0)
        super().map(pages)

    def unmap(self, addresses: Collection[int], *, keep: bool = True) -> None:
        self.clock.advance(3.0)
        super().unmap(addresses, keep=keep)


def test_the_calls_of_the_device_are_timed_whoever_waits_for_them() -> None:
    driver = SlowDriver()
    scene = Scene(policy=PoolPolicy(premap_pages=2, keep_mapped_pages=0), driver=driver)
    driver.clock = scene.clock
    pool, at = scene.pool, scene.at
    pool.take("a", at[:3])
    pool.retire("a", at[:3])
    pool.take("a", at[:1])  # is still mapped
    pool.expect(at[5:7])
    pool.maintain()
    found = pool.statistics()
    assert (found.num_map_calls, found.map_s) == (2, 4.0)
    assert (found.num_unmap_calls, found.unmap_s) == (1, 3.0)


def test_a_keeper_that_fails_tells_the_next_caller() -> None:
    scene = Scene(policy=PoolPolicy(premap_pages=0, keep_mapped_pages=0))

    class BrokenError(Exception):
        pass

    def broken() -> None:
        raise BrokenError("no device any more")

    scene.pool.take("a", scene.at[:1])
    scene.pool.maintain = broken  # type: ignore[method-assign]
    with PoolKeeper(scene.pool):
        scene.pool.expect(scene.at[1:2])
    with pytest.raises(InternalError, match="no device any more") as caught:
        scene.pool.take("a", scene.at[1:2])
    assert isinstance(caught.value.__cause__, BrokenError)
