"""Fakes of the boundaries below this package: device memory, device graphs, clocks, families.

They keep the contracts of `xllm_plugin.testing.conformance`, and fail when a test asks them to.
What a real device would answer with a fault raises `DeviceFaultError` here, so that a test notices.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from typing import Any, TypeVar

from xllm_plugin.accelerator.family import Capabilities, DeviceFamily, Probe
from xllm_plugin.accelerator.graphs import GraphHandle
from xllm_plugin.accelerator.memory import PageHandle
from xllm_plugin.testing.conformance import GraphKit, GraphProbe, MemoryKit, MemoryProbe
from xllm_plugin.testing.conformance.graphs import GraphWork

__all__ = [
    "GRAPH_KIT",
    "MEMORY_KIT",
    "DeviceFaultError",
    "FakeFence",
    "FakeGraphBackend",
    "FakeMemoryDriver",
    "FakePlatform",
    "ManualClock",
    "make_family",
    "probe_graphs",
    "probe_memory",
]

FIRST_ADDRESS = 2**32
ADDRESS_SPACE_BYTES = 2**47


class DeviceFaultError(Exception):
    """The device touched memory that was not there."""


class ManualClock:
    """Seconds that pass when told to; goes wherever ``clock: Callable[[], float]`` does."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def __call__(self) -> float:
        """The time in seconds."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass.

        Raises:
            ValueError: they are negative; clocks of this kind never go back.
        """
        if not seconds >= 0:
            raise ValueError(f"a clock cannot advance by {seconds} s; give zero or more")
        self._now_s += seconds


class Countdown:
    """Fires once, at the n-th time from when it was set."""

    def __init__(self) -> None:
        self._left: int | None = None

    def set(self, at: int) -> None:
        """Fire at the `at`-th time from now; 1 is the next."""
        if at < 1:
            raise ValueError(f"the fault cannot come at time {at}; 1 is the next")
        self._left = at

    def clear(self) -> None:
        """Do not fire."""
        self._left = None

    def fires(self) -> bool:
        """Count one time."""
        if self._left is None:
            return False
        self._left -= 1
        if self._left:
            return False
        self._left = None
        return True


class WorkQueue:
    """The device's work, done in order and when the test says so; safe between threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pending: list[frozenset[int]] = []
        self.num_finished = 0

    @property
    def num_launched(self) -> int:
        with self._changed:  # of two numbers that change together
            return self.num_finished + len(self._pending)

    def launch(self, addresses: frozenset[int]) -> None:
        with self._changed:
            self._pending.append(addresses)

    def finish(self, num_launches: int | None) -> None:
        with self._changed:
            done = len(self._pending) if num_launches is None else num_launches
            if not 0 <= done <= len(self._pending):
                raise ValueError(f"cannot finish {done} launches of {len(self._pending)} pending")
            del self._pending[:done]
            self.num_finished += done
            self._changed.notify_all()

    def wait(self, mark: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.num_finished >= mark)

    def uses(self, addresses: range) -> bool:
        return any(address in addresses for pending in self._pending for address in pending)


@dataclass(frozen=True, slots=True)
class FakeFence:
    """The moment after the first `mark` launches.

    `wait` blocks until another thread finishes them, unless `finish_on_wait` lets it do so itself.
    """

    work: WorkQueue
    mark: int
    finish_on_wait: bool

    def is_done(self) -> bool:
        """Say whether the launches are finished."""
        return self.work.num_finished >= self.mark

    def wait(self) -> None:
        """Return when they are."""
        if self.finish_on_wait and not self.is_done():
            self.work.finish(self.mark - self.work.num_finished)
        self.work.wait(self.mark)


class PagedBytes(ABC):
    """Memory of pages that are Python's, as a kernel on the device reads and writes it."""

    def read(self, address: int, num_bytes: int) -> bytes:
        """Bytes at an address, across neighbouring pages.

        Raises:
            DeviceFaultError: a page is missing.
        """
        return bytes(page[offset] for page, offset in self._bytes_at(address, num_bytes))

    def write(self, address: int, data: bytes) -> None:
        """Put bytes at an address, across neighbouring pages.

        Raises:
            DeviceFaultError: a page is missing; nothing is written.
        """
        for (page, offset), byte in zip(self._bytes_at(address, len(data)), data, strict=True):
            page[offset] = byte

    @abstractmethod
    def _bytes_at(self, address: int, num_bytes: int) -> list[tuple[bytearray, int]]:
        """Page and offset of each byte.  Raises `DeviceFaultError` where a kernel may not look."""


class FakeMemoryDriver(PagedBytes):
    """A `MemoryDriver` in pure Python; pages are bytearrays.

    Args:
        granularity_bytes: the size of a page.
        capacity_pages: how many pages the device has.
        finish_on_wait: waiting for a fence finishes the work before it, for tests with one thread.

    Without `launch` the device is idle and every fence is done.
    """

    def __init__(
        self,
        *,
        granularity_bytes: int = 64,
        capacity_pages: int = 16,
        finish_on_wait: bool = False,
    ) -> None:
        if granularity_bytes < 2:  # noqa: PLR2004
            raise ValueError(f"granularity {granularity_bytes} is not above one")
        self._granularity_bytes = granularity_bytes
        self.capacity_pages = capacity_pages
        self._finish_on_wait = finish_on_wait
        self._handles = count(1)
        self._next_address = -(-FIRST_ADDRESS // granularity_bytes) * granularity_bytes
        self._ranges: dict[int, int] = {}  # first address -> bytes
        self._pages: dict[PageHandle, bytearray] = {}
        self._mapped: dict[int, PageHandle] = {}  # address -> page
        self._work = WorkQueue()
        self._create_fault = Countdown()
        self._map_fault = Countdown()
        self._unmap_fault = Countdown()
        self._unmaps_go_on = threading.Event()
        self._unmaps_go_on.set()

    # The protocol

    @property
    def granularity_bytes(self) -> int:
        """The size of a page."""
        return self._granularity_bytes

    def reserve(self, num_bytes: int) -> int:
        """Reserve a range; addresses are never reserved twice, so that a stale one is found out."""
        self._check_size(num_bytes)
        if self._next_address + num_bytes > ADDRESS_SPACE_BYTES:
            raise MemoryError(f"no range of {num_bytes} bytes is left in the address space")
        address = self._next_address
        self._ranges[address] = num_bytes
        # One page between ranges, so that running over an end is a fault.
        self._next_address += num_bytes + self._granularity_bytes
        return address

    def create(self, num_pages: int) -> list[PageHandle]:
        """Create pages, filled with 0xDB: their contents are undefined."""
        if num_pages < 0:
            raise ValueError(f"cannot create {num_pages} pages")
        created: list[PageHandle] = []
        try:
            for _ in range(num_pages):
                created.append(self._create_one())  # noqa: PERF401 - what was made is undone below
        except MemoryError:
            for page in created:
                del self._pages[page]
            raise
        return created

    def map(self, pages: Mapping[int, PageHandle]) -> None:
        """Put pages at addresses."""
        done: list[int] = []
        try:
            for address, page in pages.items():
                self._map_one(address, page)
                done.append(address)
        except (ValueError, MemoryError):
            for address in done:
                self._undo_map(address)
            raise

    def unmap(self, addresses: Collection[int], *, keep: bool = True) -> None:
        """Take the pages at addresses away; those that are not kept are filled with 0xDB.

        Raises:
            DeviceFaultError: unfinished work uses a page at one of them.
        """
        self._unmaps_go_on.wait()
        if self._unmap_fault.fires():
            raise MemoryError("no memory to note an unmap, as the test asked")
        before = dict(self._mapped)
        try:
            for address in addresses:
                self._unmap_one(address)
        except (ValueError, DeviceFaultError):
            self._mapped = before
            raise
        if not keep:
            for page in {before[address] for address in addresses} - set(self._mapped.values()):
                self._pages[page][:] = b"\xdb" * self._granularity_bytes

    def release(self, pages: Collection[PageHandle]) -> None:
        """Give pages back."""
        before = dict(self._pages)
        try:
            for page in pages:
                self._release_one(page)
        except ValueError:
            self._pages = before
            raise

    def unreserve(self, address: int, num_bytes: int) -> None:
        """Give a range back."""
        self._check_address(address)
        self._check_size(num_bytes)
        if self._ranges.get(address) != num_bytes:
            raise ValueError(f"{num_bytes} bytes at {address:#x} are no range that was reserved")
        if any(address <= mapped < address + num_bytes for mapped in self._mapped):
            raise ValueError(f"a page is mapped in the range at {address:#x}")
        del self._ranges[address]

    def fence(self) -> FakeFence:
        """Mark the moment after what has been launched."""
        return FakeFence(self._work, self._work.num_launched, self._finish_on_wait)

    # One page at a time

    def _create_one(self) -> PageHandle:
        if self._create_fault.fires():
            raise MemoryError("out of pages, as the test asked")
        if len(self._pages) >= self.capacity_pages:
            raise MemoryError(f"all {self.capacity_pages} pages are in use")
        page = PageHandle(next(self._handles))
        self._pages[page] = bytearray(b"\xdb" * self._granularity_bytes)
        return page

    def _map_one(self, address: int, page: PageHandle) -> None:
        self._check_address(address)
        if not self._is_reserved(address):
            raise ValueError(f"address {address:#x} is not reserved")
        if address in self._mapped:
            raise ValueError(f"address {address:#x} is mapped already")
        self._check_page(page)
        self._mapped[address] = page
        if self._map_fault.fires():
            self._undo_map(address)
            raise MemoryError("mapping failed half-way, as the test asked")

    def _unmap_one(self, address: int) -> None:
        self._check_address(address)
        if address not in self._mapped:
            raise ValueError(f"nothing is mapped at {address:#x}")
        if self._work.uses(range(address, address + self._granularity_bytes)):
            raise DeviceFaultError(f"unmap of {address:#x}, which unfinished work still uses")
        del self._mapped[address]

    def _release_one(self, page: PageHandle) -> None:
        self._check_page(page)
        if page in self._mapped.values():
            raise ValueError(f"page {page} is still mapped")
        del self._pages[page]

    # What a test may do

    def fail_create(self, at: int = 1) -> None:
        """Be out of pages at the `at`-th page created from now, once."""
        self._create_fault.set(at)

    def fail_map(self, at: int = 1) -> None:
        """Fail half-way at the `at`-th page mapped from now that is not refused, once."""
        self._map_fault.set(at)

    def fail_unmap(self, at: int = 1) -> None:
        """Fail the `at`-th `unmap` from now, once."""
        self._unmap_fault.set(at)

    @contextmanager
    def failing(self, call: str, at: int = 1) -> Iterator[None]:
        """Inside the context the `at`-th such call fails.

        Args:
            call: "map", "create" or "unmap"; empty for none.
            at: as `fail_map` and the others have it.
        """
        fail = {"map": self.fail_map, "create": self.fail_create, "unmap": self.fail_unmap}
        if call:
            fail[call](at)
        try:
            yield
        finally:
            for countdown in (self._map_fault, self._create_fault, self._unmap_fault):
                countdown.clear()

    @contextmanager
    def slow_unmap(self) -> Iterator[None]:
        """Inside the context `unmap`, called from another thread, does not come to an end."""
        self._unmaps_go_on.clear()
        try:
            yield
        finally:
            self._unmaps_go_on.set()

    def launch(self, *addresses: int) -> None:
        """Give the device work that uses the pages at `addresses` until `finish_work`.

        Raises:
            DeviceFaultError: nothing is mapped at one of them.
        """
        for address in addresses:
            self._page_at(address)
        self._work.launch(frozenset(addresses))

    def finish_work(self, num_launches: int | None = None) -> None:
        """Finish the oldest `num_launches` launches; None finishes all."""
        self._work.finish(num_launches)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Keep the device busy inside the context."""
        self.launch()
        try:
            yield
        finally:
            self.finish_work()

    @property
    def num_pages(self) -> int:
        """Physical pages in use."""
        return len(self._pages)

    @property
    def num_mapped(self) -> int:
        """Addresses at which a page is mapped."""
        return len(self._mapped)

    @property
    def num_ranges(self) -> int:
        """Reserved ranges."""
        return len(self._ranges)

    def check_integrity(self) -> None:
        """Check that the books agree.

        Raises:
            AssertionError: they do not.
        """
        size = self._granularity_bytes
        assert len(self._pages) <= self.capacity_pages, "more pages than the device has"
        assert all(len(page) == size for page in self._pages.values()), "a page of another size"
        for address, page in self._mapped.items():
            assert address % size == 0, f"{address:#x} is misaligned"
            assert self._is_reserved(address), f"{address:#x} is mapped but not reserved"
            assert page in self._pages, f"{address:#x} shows page {page}, which was released"
        ranges = sorted(self._ranges.items())
        for (start, num_bytes), (following, _) in pairwise(ranges):
            assert start + num_bytes <= following, f"range {start:#x} reaches into {following:#x}"

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes <= 0 or num_bytes % self._granularity_bytes:
            raise ValueError(
                f"{num_bytes} bytes are no positive multiple of {self._granularity_bytes}"
            )

    def _check_address(self, address: int) -> None:
        if address % self._granularity_bytes:
            raise ValueError(f"address {address:#x} is no multiple of {self._granularity_bytes}")

    def _check_page(self, page: PageHandle) -> None:
        if page not in self._pages:
            raise ValueError(f"page {page} is unknown or released")

    def _is_reserved(self, address: int) -> bool:
        return any(start <= address < start + size for start, size in self._ranges.items())

    def _undo_map(self, address: int) -> None:
        del self._mapped[address]

    def _page_at(self, address: int) -> bytearray:
        page = self._mapped.get(address - address % self._granularity_bytes)
        if page is None:
            raise DeviceFaultError(f"access to {address:#x}, where nothing is mapped")
        return self._pages[page]

    def _bytes_at(self, address: int, num_bytes: int) -> list[tuple[bytearray, int]]:
        return [
            (self._page_at(at), at % self._granularity_bytes)
            for at in range(address, address + num_bytes)
        ]


DriverT = TypeVar("DriverT", bound=FakeMemoryDriver)


def probe_memory(driver: FakeMemoryDriver) -> MemoryProbe:
    """Everything the checks can ask for."""
    return MemoryProbe(
        read=driver.read,
        write=driver.write,
        max_pages=driver.capacity_pages,
        fail_map=driver.fail_map,
        busy=driver.busy,
    )


MEMORY_KIT = MemoryKit(FakeMemoryDriver, probe_memory)


@dataclass(frozen=True, slots=True)
class FakeGraph:
    """What was launched during a capture, in order, and what the captured code returned."""

    operations: tuple[Callable[[], None], ...]
    result: Any
    num_bytes: int


class FakeGraphBackend:
    """A `GraphBackend` that records what is given to `launch` and does it again at `replay`.

    Args:
        graph_bytes: the memory of a graph.
        capacity_bytes: the device's memory for graphs.
    """

    def __init__(self, *, graph_bytes: int = 1024, capacity_bytes: int = 2**20) -> None:
        self.graph_bytes = graph_bytes
        self.capacity_bytes = capacity_bytes
        self._handles = count(1)
        self._graphs: dict[GraphHandle, FakeGraph] = {}
        self._recording: list[Callable[[], None]] | None = None
        self._capture_fault = Countdown()
        self.num_replays = 0

    def launch(self, operation: Callable[[], None]) -> None:
        """Give the device work: done at once, or only recorded inside `capture`."""
        if self._recording is None:
            operation()
        else:
            self._recording.append(operation)

    def capture(self, run: Callable[[], Any]) -> GraphHandle:
        """Record what `run` launches, without doing it.

        Raises:
            RuntimeError: another capture is under way.
        """
        if self._recording is not None:
            raise RuntimeError("captures do not nest")
        self._recording = []
        try:
            result = run()
            operations = tuple(self._recording)
        finally:
            self._recording = None
        if self._capture_fault.fires():
            raise MemoryError("out of memory, as the test asked")
        if self.memory_used_bytes() + self.graph_bytes > self.capacity_bytes:
            raise MemoryError(f"{self.capacity_bytes} bytes for graphs are used up")
        graph = GraphHandle(next(self._handles))
        self._graphs[graph] = FakeGraph(operations, result, self.graph_bytes)
        return graph

    def replay(self, graph: GraphHandle) -> Any:
        """Do what was recorded."""
        found = self._get(graph)
        self.num_replays += 1
        for operation in found.operations:
            operation()
        return found.result

    def drop(self, graph: GraphHandle) -> None:
        """Forget a graph."""
        self._get(graph)
        del self._graphs[graph]

    def memory_used_bytes(self) -> int:
        """The memory of all graphs."""
        return sum(graph.num_bytes for graph in self._graphs.values())

    def fail_capture(self, at: int = 1) -> None:
        """Be out of memory at the `at`-th `capture` from now whose code runs through, once."""
        self._capture_fault.set(at)

    def _get(self, graph: GraphHandle) -> FakeGraph:
        if graph not in self._graphs:
            raise ValueError(f"graph {graph} is unknown or dropped")
        return self._graphs[graph]


def probe_graphs(backend: FakeGraphBackend) -> GraphProbe:
    """Everything the checks can ask for; a tensor is a list of one integer."""

    def make_work() -> GraphWork:
        source = [0]

        def run() -> list[int]:
            output = [0]

            def add_one() -> None:
                output[0] = source[0] + 1

            backend.launch(add_one)
            return output

        def write(value: int) -> None:
            source[0] = value

        return GraphWork(write=write, run=run, read=lambda output: int(output[0]))

    return GraphProbe(make_work=make_work, fail_next_capture=backend.fail_capture)


GRAPH_KIT = GraphKit(FakeGraphBackend, probe_graphs)


class FakePlatform:
    """Stands where a vLLM platform would; vLLM does not know it."""


def make_family(
    name: str = "fake",
    *,
    preference: int = 1,
    usable: bool = True,
    capabilities: Capabilities | None = None,
) -> DeviceFamily:
    """Make a device family with a fake memory driver and graph backend.

    Args:
        name: of the family.
        preference: as in `DeviceFamily`.
        usable: what its probe says.
        capabilities: instead of the fakes.
    """
    return DeviceFamily(
        name=name,
        preference=preference,
        platform_class=f"{__name__}.{FakePlatform.__name__}",
        probe=partial(_probe, name, usable),
        capabilities=capabilities
        or Capabilities(
            graph_modes=("eager", "partial", "full"),
            memory_driver=f"{__name__}.{FakeMemoryDriver.__name__}",
            graph_backend=f"{__name__}.{FakeGraphBackend.__name__}",
        ),
    )


def _probe(name: str, usable: bool) -> Probe:
    return Probe(usable, f"the device {name}, which does not exist", "it" if usable else "nothing")
