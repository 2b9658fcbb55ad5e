"""The fakes keep their contracts, fail when asked to, and agree with simple models of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from xllm_plugin.accelerator.discover import choose
from xllm_plugin.accelerator.graphs import GraphBackend
from xllm_plugin.accelerator.memory import Fence, MemoryDriver, PageHandle
from xllm_plugin.errors import PlatformError
from xllm_plugin.testing.conformance import (
    check_device_family,
    check_graph_backend,
    check_memory_driver,
)
from xllm_plugin.testing.fakes import (
    DeviceFaultError,
    FakeFence,
    FakeGraphBackend,
    FakeMemoryDriver,
    ManualClock,
    make_family,
    probe_graphs,
    probe_memory,
)

PAGE_BYTES = 4
CAPACITY_PAGES = 3


def mapped_driver() -> tuple[FakeMemoryDriver, int, PageHandle]:
    """A driver with one page, mapped at the first of two slots."""
    driver = FakeMemoryDriver(granularity_bytes=PAGE_BYTES, capacity_pages=CAPACITY_PAGES)
    start, page = driver.reserve(2 * PAGE_BYTES), driver.create(1)[0]
    driver.map({start: page})
    return driver, start, page


def test_the_fakes_pass_every_clause() -> None:
    driver: MemoryDriver = FakeMemoryDriver()  # mypy checks the signatures here
    backend: GraphBackend = FakeGraphBackend()
    assert (driver.granularity_bytes, backend.memory_used_bytes()) == (64, 0)
    assert check_memory_driver(FakeMemoryDriver, probe_memory) == ()
    assert check_memory_driver(partial(FakeMemoryDriver, granularity_bytes=48), probe_memory) == ()
    assert check_graph_backend(FakeGraphBackend, probe_graphs) == ()
    assert check_device_family(make_family()) == ()


@pytest.mark.parametrize("granularity_bytes", [0, 1, -4])
def test_a_granularity_is_above_one(granularity_bytes: int) -> None:
    with pytest.raises(ValueError, match="not above one"):
        FakeMemoryDriver(granularity_bytes=granularity_bytes)


def test_create_fails_once_at_the_nth_time() -> None:
    driver = FakeMemoryDriver()
    driver.fail_create(at=2)
    driver.create(1)[0]
    with pytest.raises(MemoryError, match="as the test asked"):
        driver.create(1)[0]
    driver.create(1)[0]
    assert driver.num_pages == 2


def test_map_fails_half_way_at_the_nth_time_and_is_undone() -> None:
    driver, start, page = mapped_driver()
    driver.fail_map(at=2)
    driver.unmap([start])
    driver.map({start: page})
    with pytest.raises(ValueError, match="mapped already"):  # a refused map does not count
        driver.map({start: page})
    with pytest.raises(MemoryError, match="half-way"):
        driver.map({start + PAGE_BYTES: page})
    assert driver.num_mapped == 1
    driver.map({start + PAGE_BYTES: page})
    driver.check_integrity()


def test_a_slow_unmap_ends_when_the_test_says_so() -> None:
    driver, start, _ = mapped_driver()
    unmapping = threading.Thread(target=driver.unmap, args=([start],))
    with driver.slow_unmap():
        unmapping.start()
        assert driver.num_mapped == 1
    unmapping.join()
    assert driver.num_mapped == 0


def test_a_batch_that_meets_unfinished_work_is_left_alone() -> None:
    driver, start, page = mapped_driver()
    driver.map({start + PAGE_BYTES: page})
    driver.launch(start + PAGE_BYTES)
    with pytest.raises(DeviceFaultError):
        driver.unmap([start, start + PAGE_BYTES])
    assert driver.num_mapped == 2


def test_a_fault_lies_in_the_future() -> None:
    with pytest.raises(ValueError, match="1 is the next"):
        FakeMemoryDriver().fail_map(at=0)


def test_an_access_where_nothing_is_mapped_faults_and_writes_nothing() -> None:
    driver, start, _ = mapped_driver()
    driver.write(start, b"abcd")
    with pytest.raises(DeviceFaultError, match="nothing is mapped"):
        driver.read(start, PAGE_BYTES + 1)
    with pytest.raises(DeviceFaultError):
        driver.write(start + 2, b"1234")
    with pytest.raises(DeviceFaultError):
        driver.launch(start, start + PAGE_BYTES)
    assert driver.read(start + 1, 2) == b"bc"
    assert driver.fence().is_done()


def test_an_unmap_under_unfinished_work_faults() -> None:
    driver, start, _ = mapped_driver()
    driver.launch(start + 1)  # any address inside the page
    with pytest.raises(DeviceFaultError, match="unfinished work"):
        driver.unmap([start])
    driver.finish_work()
    driver.unmap([start])
    assert driver.num_mapped == 0


def test_fences_pass_in_order_when_the_test_says_so() -> None:
    driver = FakeMemoryDriver()
    fences = [driver.fence()]
    for _ in range(2):
        driver.launch()
        fences.append(driver.fence())
    assert [fence.is_done() for fence in fences] == [True, False, False]
    driver.finish_work(1)
    assert [fence.is_done() for fence in fences] == [True, True, False]
    driver.finish_work()
    assert all(fence.is_done() for fence in fences)
    with pytest.raises(ValueError, match="cannot finish 1"):
        driver.finish_work(1)


def test_a_wait_ends_when_another_thread_finishes_the_work() -> None:
    driver = FakeMemoryDriver()
    driver.launch()
    waiting = threading.Thread(target=driver.fence().wait)
    waiting.start()
    assert waiting.is_alive()
    driver.finish_work()
    waiting.join()


def test_a_wait_can_finish_the_work_before_the_fence_and_no_more() -> None:
    driver = FakeMemoryDriver(finish_on_wait=True)
    driver.launch()
    fence: Fence = driver.fence()
    driver.launch()
    fence.wait()
    assert fence.is_done()
    assert not driver.fence().is_done()


def test_a_busy_device_is_idle_again_after_an_error() -> None:
    driver = FakeMemoryDriver()

    def fail() -> None:
        with driver.busy():
            assert not driver.fence().is_done()
            raise OSError("on purpose")

    with pytest.raises(OSError, match="on purpose"):
        fail()
    assert driver.fence().is_done()


@pytest.mark.parametrize(
    "damage",
    [
        lambda driver: driver._mapped.update({2**40: PageHandle(1)}),
        lambda driver: driver._pages.clear(),
        lambda driver: driver._mapped.update({driver._next_address + 1: PageHandle(1)}),
        lambda driver: driver._ranges.update({min(driver._ranges) + PAGE_BYTES: PAGE_BYTES}),
        lambda driver: driver._pages[PageHandle(1)].append(0),
        lambda driver: setattr(driver, "capacity_pages", 0),
    ],
    ids=["not reserved", "released", "misaligned", "overlap", "page size", "capacity"],
)
def test_integrity_notices_damage(damage: Callable[[FakeMemoryDriver], None]) -> None:
    driver, _, _ = mapped_driver()
    driver.check_integrity()
    damage(driver)
    with pytest.raises(AssertionError):
        driver.check_integrity()


class MemoryMachine(RuleBasedStateMachine):
    """`FakeMemoryDriver` against dictionaries: what is reserved, what is where, what it shows."""

    ranges = Bundle("ranges")
    pages = Bundle("pages")

    @initialize()
    def start(self) -> None:
        self.driver = FakeMemoryDriver(granularity_bytes=PAGE_BYTES, capacity_pages=CAPACITY_PAGES)
        self.contents: dict[PageHandle, bytes | None] = {}  # None: not written yet
        self.mapped: dict[int, PageHandle] = {}
        self.reserved: dict[int, int] = {}
        self.fences: list[tuple[FakeFence, int]] = []
        self.launched: list[set[int]] = []
        self.num_finished = 0

    @rule(target=ranges, num_pages=st.integers(1, 3))
    def reserve(self, num_pages: int) -> tuple[int, int]:
        num_bytes = num_pages * PAGE_BYTES
        address = self.driver.reserve(num_bytes)
        self.reserved[address] = num_bytes
        return address, num_bytes

    @rule(num_bytes=st.integers(-8, 8).filter(lambda n: n <= 0 or n % PAGE_BYTES))
    def reserve_an_odd_size(self, num_bytes: int) -> None:
        with pytest.raises(ValueError, match="multiple"):
            self.driver.reserve(num_bytes)

    @rule(target=pages, fault=st.booleans())
    def create(self, fault: bool) -> object:
        if fault:
            self.driver.fail_create()
        if fault or len(self.contents) == CAPACITY_PAGES:
            with pytest.raises(MemoryError):
                self.driver.create(1)[0]
            return multiple()
        page = self.driver.create(1)[0]
        assert page not in self.contents
        self.contents[page] = None
        return page

    @rule(place=ranges, slot=st.integers(-1, 3), page=pages, odd=st.integers(0, PAGE_BYTES - 1))
    def map(self, place: tuple[int, int], slot: int, page: PageHandle, odd: int) -> None:
        address = place[0] + slot * PAGE_BYTES + (odd if odd == 1 else 0)
        fits = self.is_reserved(address) and address % PAGE_BYTES == 0
        if not fits or address in self.mapped or page not in self.contents:
            with pytest.raises(ValueError):  # noqa: PT011 - which of the reasons does not matter
                self.driver.map({address: page})
            return
        self.driver.map({address: page})
        self.mapped[address] = page

    @precondition(lambda self: self.contents and self.free_slots())
    @rule(data=st.data(), fault=st.integers(0, 3))
    def map_where_it_fits(self, data: st.DataObject, fault: int) -> None:
        address = data.draw(st.sampled_from(self.free_slots()))
        page = data.draw(st.sampled_from(sorted(self.contents)))
        if fault == 1:
            self.driver.fail_map()
            with pytest.raises(MemoryError, match="half-way"):
                self.driver.map({address: page})
            return
        self.driver.map({address: page})
        self.mapped[address] = page

    @precondition(lambda self: self.mapped)
    @rule(data=st.data())
    def unmap_what_is_mapped(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted(self.mapped)))
        self.driver.finish_work()
        self.num_finished += len(self.launched)
        self.launched.clear()
        self.driver.unmap([address])
        del self.mapped[address]

    @rule(place=ranges, slot=st.integers(-1, 3))
    def unmap(self, place: tuple[int, int], slot: int) -> None:
        address = place[0] + slot * PAGE_BYTES
        if address not in self.mapped:
            with pytest.raises(ValueError, match="nothing is mapped"):
                self.driver.unmap([address])
        elif any(address in work for work in self.launched):
            with pytest.raises(DeviceFaultError):
                self.driver.unmap([address])
        else:
            self.driver.unmap([address])
            del self.mapped[address]

    @precondition(lambda self: self.mapped)
    @rule(data=st.data(), written=st.binary(min_size=PAGE_BYTES, max_size=PAGE_BYTES))
    def write(self, data: st.DataObject, written: bytes) -> None:
        address = data.draw(st.sampled_from(sorted(self.mapped)))
        self.driver.write(address, written)
        self.contents[self.mapped[address]] = written

    @rule(page=pages)
    def release(self, page: PageHandle) -> None:
        if page not in self.contents or page in self.mapped.values():
            with pytest.raises(ValueError, match="page"):
                self.driver.release([page])
            return
        self.driver.release([page])
        del self.contents[page]

    @precondition(lambda self: self.mapped)
    @rule(data=st.data())
    def release_what_is_mapped(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.mapped.values())))
        with pytest.raises(ValueError, match="still mapped"):
            self.driver.release([page])

    @rule(place=ranges, longer=st.integers(-1, 1))
    def unreserve(self, place: tuple[int, int], longer: int) -> None:
        address, num_bytes = place[0], place[1] + longer * PAGE_BYTES
        inside = range(address, address + num_bytes)
        if self.reserved.get(address) != num_bytes or any(at in inside for at in self.mapped):
            with pytest.raises(ValueError):  # noqa: PT011 - which of the reasons does not matter
                self.driver.unreserve(address, num_bytes)
            return
        self.driver.unreserve(address, num_bytes)
        del self.reserved[address]

    @rule(data=st.data())
    def launch(self, data: st.DataObject) -> None:
        addresses = data.draw(st.sets(st.sampled_from(sorted(self.mapped)))) if self.mapped else ()
        self.driver.launch(*addresses)
        self.launched.append(set(addresses))

    @precondition(lambda self: self.launched)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        num_launches = data.draw(st.integers(1, len(self.launched)))
        self.driver.finish_work(num_launches)
        del self.launched[:num_launches]
        self.num_finished += num_launches

    @rule()
    def fence(self) -> None:
        self.fences.append((self.driver.fence(), self.num_finished + len(self.launched)))

    @invariant()
    def books_agree(self) -> None:
        self.driver.check_integrity()
        counts = (self.driver.num_pages, self.driver.num_mapped, self.driver.num_ranges)
        assert counts == (len(self.contents), len(self.mapped), len(self.reserved))

    @invariant()
    def every_address_shows_its_page(self) -> None:
        for address, page in self.mapped.items():
            expected = self.contents[page]
            found = self.driver.read(address, PAGE_BYTES)
            assert expected is None or found == expected

    @invariant()
    def fences_know_their_moment(self) -> None:
        for fence, mark in self.fences:
            assert fence.is_done() == (self.num_finished >= mark)

    def free_slots(self) -> list[int]:
        slots = [
            at for start, n in self.reserved.items() for at in range(start, start + n, PAGE_BYTES)
        ]
        return sorted(set(slots) - set(self.mapped))

    def is_reserved(self, address: int) -> bool:
        return any(start <= address < start + size for start, size in self.reserved.items())


MemoryMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestMemoryMachine = MemoryMachine.TestCase


def test_a_capture_records_and_a_replay_does() -> None:
    backend = FakeGraphBackend()
    seen: list[str] = []
    graph = backend.capture(lambda: backend.launch(lambda: seen.append("work")))
    assert seen == []
    backend.replay(graph)
    backend.replay(graph)
    backend.launch(lambda: seen.append("outside"))
    assert seen == ["work", "work", "outside"]
    assert backend.num_replays == 2


def test_graph_memory_runs_out_and_comes_back() -> None:
    backend = FakeGraphBackend(graph_bytes=100, capacity_bytes=250)
    graphs = [backend.capture(lambda: None) for _ in range(2)]
    with pytest.raises(MemoryError, match="250 bytes"):
        backend.capture(lambda: None)
    assert backend.memory_used_bytes() == 200
    backend.drop(graphs[0])
    backend.capture(lambda: None)


def test_a_capture_fails_once_at_the_nth_time() -> None:
    backend = FakeGraphBackend()
    backend.fail_capture(at=2)
    backend.capture(lambda: None)
    with pytest.raises(MemoryError, match="as the test asked"):
        backend.capture(lambda: None)
    backend.capture(lambda: None)
    assert backend.memory_used_bytes() == 2048


def test_captures_do_not_nest() -> None:
    backend = FakeGraphBackend()
    with pytest.raises(RuntimeError, match="nest"):
        backend.capture(lambda: backend.capture(lambda: None))
    backend.capture(lambda: None)


def test_a_clock_advances_only_when_told() -> None:
    clock = ManualClock(10.0)
    now: Callable[[], float] = clock
    assert (now(), now()) == (10.0, 10.0)
    clock.advance(0.5)
    clock.advance(0)
    assert now() == 10.5
    for seconds in (-1, float("nan")):
        with pytest.raises(ValueError, match="zero or more"):
            clock.advance(seconds)
    assert now() == 10.5


def test_a_fake_family_can_be_chosen_or_not() -> None:
    absent = make_family("absent", preference=2, usable=False)
    present = make_family("present", preference=1)
    assert choose([absent, present], None).family is present
    with pytest.raises(PlatformError, match="the device absent, which does not exist"):
        choose([absent, present], "absent")
