"""The conformance checks catch a breach of every clause, and pass what keeps the contract."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin.accelerator.family import Capabilities, DeviceFamily, Probe
from xllm_plugin.accelerator.graphs import GraphHandle
from xllm_plugin.accelerator.memory import PageHandle
from xllm_plugin.testing.conformance import (
    FAMILY,
    GRAPHS,
    MEMORY,
    GraphKit,
    GraphProbe,
    MemoryKit,
    MemoryProbe,
    UncheckedError,
    check_device_family,
    check_graph_backend,
    check_memory_driver,
    load_kit,
    memory,
)
from xllm_plugin.testing.fakes import (
    FakeFence,
    FakeGraph,
    FakeGraphBackend,
    FakeMemoryDriver,
    make_family,
    probe_graphs,
    probe_memory,
)

# Memory drivers, each wrong in one way.


class WithoutFence(FakeMemoryDriver):
    fence = None  # type: ignore[assignment]  # the breach


class NoGranularity(FakeMemoryDriver):
    @property
    def granularity_bytes(self) -> int:
        return 1


class GrowingGranularity(FakeMemoryDriver):
    @property
    def granularity_bytes(self) -> int:
        return self._granularity_bytes << self.num_pages


class MisalignedRanges(FakeMemoryDriver):
    def reserve(self, num_bytes: int) -> int:
        return super().reserve(num_bytes) + 1


class OverlappingRanges(FakeMemoryDriver):
    def reserve(self, num_bytes: int) -> int:
        address = super().reserve(num_bytes)
        self._next_address = address + self.granularity_bytes
        return address


class OneStoreForAllPages(FakeMemoryDriver):
    def _create_one(self) -> PageHandle:
        page = super()._create_one()
        self._pages[page] = next(iter(self._pages.values()))
        return page


class CopyForEachAddress(FakeMemoryDriver):
    def _map_one(self, address: int, page: PageHandle) -> None:
        super()._map_one(address, page)
        if list(self._mapped.values()).count(page) > 1:
            self._mapped[address] = self._create_one()
            self._pages[self._mapped[address]][:] = self._pages[page]


class WipeOnUnmap(FakeMemoryDriver):
    def _unmap_one(self, address: int) -> None:
        page = self._mapped.get(address)
        super()._unmap_one(address)
        assert page is not None
        self._pages[page][:] = bytes(self.granularity_bytes)


class UnmapEverywhere(FakeMemoryDriver):
    def _unmap_one(self, address: int) -> None:
        page = self._mapped.get(address)
        super()._unmap_one(address)
        self._mapped = {at: other for at, other in self._mapped.items() if other != page}


class ReusedHandles(FakeMemoryDriver):
    def _create_one(self) -> PageHandle:
        page = super()._create_one()
        lowest = PageHandle(next(i for i in range(1, 99) if i not in self._pages or i == page))
        self._pages[lowest] = self._pages.pop(page)
        return lowest


class OneThreadOnly(FakeMemoryDriver):
    def __init__(self) -> None:
        super().__init__()
        self._owner = threading.get_ident()

    def _create_one(self) -> PageHandle:
        if threading.get_ident() != self._owner:
            raise RuntimeError("no device context in this thread")
        return super()._create_one()


class NoContext(FakeMemoryDriver):
    def reserve(self, num_bytes: int) -> int:
        raise RuntimeError("no device context")


class RoundSizesUp(FakeMemoryDriver):
    def reserve(self, num_bytes: int) -> int:
        pages = max(1, -(-num_bytes // self.granularity_bytes))
        return super().reserve(pages * self.granularity_bytes)


class AddressSpaceIsAValueError(FakeMemoryDriver):
    def reserve(self, num_bytes: int) -> int:
        try:
            return super().reserve(num_bytes)
        except MemoryError as error:
            raise ValueError(str(error)) from error


class MapRoundsDown(FakeMemoryDriver):
    def _map_one(self, address: int, page: PageHandle) -> None:
        super()._map_one(address - address % self.granularity_bytes, page)


class MapAnywhere(FakeMemoryDriver):
    def _is_reserved(self, address: int) -> bool:
        return True


class MapReplaces(FakeMemoryDriver):
    def _map_one(self, address: int, page: PageHandle) -> None:
        self._mapped.pop(address, None)
        super()._map_one(address, page)


class MapReplacesThenRefuses(FakeMemoryDriver):
    def _map_one(self, address: int, page: PageHandle) -> None:
        if address in self._mapped and page in self._pages:
            self._mapped[address] = page
        super()._map_one(address, page)


class IgnoreUnknownPages(FakeMemoryDriver):
    def _map_one(self, address: int, page: PageHandle) -> None:
        if page in self._pages:
            super()._map_one(address, page)


class IgnoreReleasedPages(FakeMemoryDriver):
    def _map_one(self, address: int, page: PageHandle) -> None:
        if page in self._pages or page > 99:
            super()._map_one(address, page)


class UnmapRoundsDown(FakeMemoryDriver):
    def _unmap_one(self, address: int) -> None:
        super()._unmap_one(address - address % self.granularity_bytes)


class UnmapNothing(FakeMemoryDriver):
    def _unmap_one(self, address: int) -> None:
        if address in self._mapped or address % self.granularity_bytes:
            super()._unmap_one(address)


class ReleaseMapped(FakeMemoryDriver):
    def _release_one(self, page: PageHandle) -> None:
        mapped, self._mapped = self._mapped, {}
        super()._release_one(page)
        self._mapped = {at: other for at, other in mapped.items() if other != page}


class ReleaseForgetsOtherAddresses(FakeMemoryDriver):
    """Remembers of each page only where it was mapped last."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[PageHandle, int] = {}

    def _map_one(self, address: int, page: PageHandle) -> None:
        super()._map_one(address, page)
        self._last[page] = address

    def _release_one(self, page: PageHandle) -> None:
        if self._last.get(page) not in self._mapped:
            self._mapped = {at: other for at, other in self._mapped.items() if other != page}
        super()._release_one(page)


class ReleaseTwice(FakeMemoryDriver):
    def _release_one(self, page: PageHandle) -> None:
        if page in self._pages:
            super()._release_one(page)


class UnreserveParts(FakeMemoryDriver):
    def unreserve(self, address: int, num_bytes: int) -> None:
        if num_bytes < self._ranges.get(address, 0):
            self._check_size(num_bytes)
            self._ranges[address + num_bytes] = self._ranges[address] - num_bytes
            self._ranges[address] = num_bytes
        super().unreserve(address, num_bytes)


class UnreserveTwice(FakeMemoryDriver):
    def __init__(self) -> None:
        super().__init__()
        self._gone: set[tuple[int, int]] = set()

    def unreserve(self, address: int, num_bytes: int) -> None:
        if (address, num_bytes) not in self._gone:
            super().unreserve(address, num_bytes)
            self._gone.add((address, num_bytes))


class UnreserveUnmaps(FakeMemoryDriver):
    def unreserve(self, address: int, num_bytes: int) -> None:
        if self._ranges.get(address) == num_bytes:
            inside = range(address, address + num_bytes)
            self._mapped = {at: page for at, page in self._mapped.items() if at not in inside}
        super().unreserve(address, num_bytes)


class OutOfMemoryIsARuntimeError(FakeMemoryDriver):
    def _create_one(self) -> PageHandle:
        try:
            return super()._create_one()
        except MemoryError as error:
            raise RuntimeError(str(error)) from error


class EndlessPages(FakeMemoryDriver):
    def _create_one(self) -> PageHandle:
        self.capacity_pages = self.num_pages + 1
        return super()._create_one()


class FailedCreateTakesAPage(FakeMemoryDriver):
    def _create_one(self) -> PageHandle:
        try:
            return super()._create_one()
        except MemoryError:
            self.capacity_pages -= 1
            raise


class ReleaseLeaksMappedPages(FakeMemoryDriver):
    def __init__(self) -> None:
        super().__init__()
        self._once_mapped: set[PageHandle] = set()

    def _map_one(self, address: int, page: PageHandle) -> None:
        super()._map_one(address, page)
        self._once_mapped.add(page)

    def _release_one(self, page: PageHandle) -> None:
        super()._release_one(page)
        self.capacity_pages -= page in self._once_mapped


class ReserveTakesPages(FakeMemoryDriver):
    def reserve(self, num_bytes: int) -> int:
        address = super().reserve(num_bytes)
        self.capacity_pages -= num_bytes // self.granularity_bytes
        return address

    def unreserve(self, address: int, num_bytes: int) -> None:
        super().unreserve(address, num_bytes)
        self.capacity_pages += num_bytes // self.granularity_bytes


class RefusedMapTakesAPage(FakeMemoryDriver):
    def _map_one(self, address: int, page: PageHandle) -> None:
        try:
            super()._map_one(address, page)
        except ValueError:
            self.capacity_pages -= 1
            raise


class HalfMapStays(FakeMemoryDriver):
    def _undo_map(self, address: int) -> None:
        pass


class NegativeIsNothing(FakeMemoryDriver):
    def create(self, num_pages: int) -> list[PageHandle]:
        return super().create(max(0, num_pages))


class BatchInAnyOrder(FakeMemoryDriver):
    """Pairs addresses and pages after sorting each."""

    def map(self, pages: Mapping[int, PageHandle]) -> None:
        super().map(dict(zip(sorted(pages), sorted(pages.values()), strict=True)))


class CreatesWhatIsLeft(FakeMemoryDriver):
    def create(self, num_pages: int) -> list[PageHandle]:
        left = self.capacity_pages - self.num_pages
        if num_pages > 1 and left:
            super().create(min(num_pages, left))
        return super().create(num_pages)


class ForgetsWhatItDoesNotKeep(FakeMemoryDriver):
    def unmap(self, addresses: Collection[int], *, keep: bool = True) -> None:
        pages = {self._mapped.get(address) for address in addresses}
        super().unmap(addresses, keep=keep)
        for page in pages if not keep else ():
            if page not in self._mapped.values():
                del self._pages[page]  # type: ignore[arg-type]


class MapsUpToTheWrongItem(FakeMemoryDriver):
    def map(self, pages: Mapping[int, PageHandle]) -> None:
        for address, page in pages.items():
            super().map({address: page})


class UnmapsUpToTheWrongItem(FakeMemoryDriver):
    def unmap(self, addresses: Collection[int], *, keep: bool = True) -> None:
        for address in addresses:
            super().unmap([address], keep=keep)


class ReleasesUpToTheWrongItem(FakeMemoryDriver):
    def release(self, pages: Collection[PageHandle]) -> None:
        for page in pages:
            super().release([page])


class FailedBatchStays(FakeMemoryDriver):
    def map(self, pages: Mapping[int, PageHandle]) -> None:
        try:
            super().map(pages)
        except MemoryError:
            for address in list(pages)[:1]:
                super().map({address: pages[address]})
            raise


class FenceNeverDone(FakeFence):
    def is_done(self) -> bool:
        return False


class FenceAlwaysDone(FakeFence):
    def is_done(self) -> bool:
        return True


class FenceBlocks(FakeFence):
    def is_done(self) -> bool:
        self.wait()
        return True


class FenceWaitsForNothing(FakeFence):
    def wait(self) -> None:
        pass


class FenceAsksWhetherIdle(FakeFence):
    def is_done(self) -> bool:
        return self.work.num_finished == self.work.num_launched


def with_fence(fence: type[FakeFence]) -> type[FakeMemoryDriver]:
    class Driver(FakeMemoryDriver):
        def fence(self) -> FakeFence:
            return fence(self._work, self._work.num_launched, finish_on_wait=False)

    Driver.__name__ = fence.__name__
    return Driver


BROKEN_DRIVERS: list[tuple[str, type[FakeMemoryDriver]]] = [
    ("has_every_method", WithoutFence),
    ("granularity_stays_the_same", NoGranularity),
    ("a_page_that_is_not_kept_shows_elsewhere_or_can_be_used_again", ForgetsWhatItDoesNotKeep),
    ("granularity_stays_the_same", GrowingGranularity),
    ("ranges_are_aligned_and_disjoint", MisalignedRanges),
    ("ranges_are_aligned_and_disjoint", OverlappingRanges),
    ("neighbouring_pages_form_one_range", OneStoreForAllPages),
    ("a_page_shows_the_same_bytes_at_every_address", CopyForEachAddress),
    ("an_unmapped_page_lives_on", WipeOnUnmap),
    ("an_unmapped_page_lives_on", UnmapEverywhere),
    ("handles_are_given_out_once", ReusedHandles),
    ("calls_may_come_from_any_thread", OneThreadOnly),
    ("reserve_refuses_odd_sizes", RoundSizesUp),
    ("reserve_without_room_raises_memory_error", AddressSpaceIsAValueError),
    ("map_refuses_misaligned_addresses", MapRoundsDown),
    ("map_refuses_addresses_that_are_not_reserved", MapAnywhere),
    ("map_refuses_an_address_that_is_mapped", MapReplaces),
    ("map_refuses_an_address_that_is_mapped", MapReplacesThenRefuses),
    ("map_refuses_unknown_pages", IgnoreUnknownPages),
    ("map_refuses_unknown_pages", IgnoreReleasedPages),
    ("unmap_refuses_misaligned_addresses", UnmapRoundsDown),
    ("unmap_refuses_an_address_where_nothing_is_mapped", UnmapNothing),
    ("release_refuses_a_mapped_page", ReleaseMapped),
    ("release_refuses_a_mapped_page", ReleaseForgetsOtherAddresses),
    ("release_refuses_unknown_pages", ReleaseTwice),
    ("unreserve_refuses_what_reserve_did_not_return", UnreserveParts),
    ("unreserve_refuses_what_reserve_did_not_return", UnreserveTwice),
    ("unreserve_refuses_a_range_with_a_mapped_page", UnreserveUnmaps),
    ("create_out_of_memory_raises_memory_error", OutOfMemoryIsARuntimeError),
    ("create_out_of_memory_raises_memory_error", EndlessPages),
    ("create_out_of_memory_raises_memory_error", FailedCreateTakesAPage),
    ("a_released_page_can_be_created_again", ReleaseLeaksMappedPages),
    ("a_reserved_range_takes_no_pages", ReserveTakesPages),
    ("refused_calls_take_no_pages", RefusedMapTakesAPage),
    ("a_map_that_the_device_fails_changes_nothing", HalfMapStays),
    ("nothing_may_be_asked", NegativeIsNothing),
    ("a_batch_maps_each_page_at_its_address", BatchInAnyOrder),
    ("create_is_all_or_nothing", CreatesWhatIsLeft),
    ("a_batch_with_one_wrong_item_changes_nothing", MapsUpToTheWrongItem),
    ("a_batch_with_one_wrong_item_changes_nothing", UnmapsUpToTheWrongItem),
    ("a_batch_with_one_wrong_item_changes_nothing", ReleasesUpToTheWrongItem),
    ("a_batch_that_the_device_fails_changes_nothing", FailedBatchStays),
    ("the_fence_of_an_idle_device_passes", with_fence(FenceNeverDone)),
    ("a_fence_waits_for_earlier_work", with_fence(FenceAlwaysDone)),
    ("a_fence_waits_for_earlier_work", with_fence(FenceBlocks)),
    ("wait_returns_no_earlier", with_fence(FenceWaitsForNothing)),
    ("a_passed_fence_stays_passed", with_fence(FenceAsksWhetherIdle)),
]

# Graph backends, likewise.


class WithoutDrop(FakeGraphBackend):
    drop = None  # type: ignore[assignment]  # the breach


class ReplayOnce(FakeGraphBackend):
    def replay(self, graph: GraphHandle) -> Any:
        result = super().replay(graph)
        self._graphs[graph] = replace(self._graphs[graph], operations=())
        return result


class FlattenResult(FakeGraphBackend):
    def replay(self, graph: GraphHandle) -> Any:
        result = super().replay(graph)
        return result["output"][0] if isinstance(result, dict) else result


class CopyResult(FakeGraphBackend):
    def replay(self, graph: GraphHandle) -> Any:
        return copy.deepcopy(super().replay(graph))


class ShareResults(FakeGraphBackend):
    def replay(self, graph: GraphHandle) -> Any:
        result = super().replay(graph)
        for other in self._graphs.values():
            if isinstance(other.result, list):
                other.result[:] = result
        return result


class ReusedGraphHandles(FakeGraphBackend):
    def capture(self, run: Any) -> GraphHandle:
        graph = super().capture(run)
        again = GraphHandle(len(self._graphs))
        self._graphs[again] = self._graphs.pop(graph)
        return again


class SwallowErrors(FakeGraphBackend):
    def capture(self, run: Any) -> GraphHandle:
        try:
            return super().capture(run)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - the breach
            return super().capture(lambda: None)


class TranslateErrors(FakeGraphBackend):
    def capture(self, run: Any) -> GraphHandle:
        try:
            return super().capture(run)
        except MemoryError:
            raise
        except Exception as error:
            raise RuntimeError("capture failed") from error


class KeepFailedGraph(FakeGraphBackend):
    def capture(self, run: Any) -> GraphHandle:
        try:
            return super().capture(run)
        except MemoryError:
            raise
        except Exception:  # the fault to be found: whatever `run` raises, a graph is kept
            super().capture(lambda: None)
            raise


class StayInCapture(FakeGraphBackend):
    def capture(self, run: Any) -> GraphHandle:
        try:
            return super().capture(run)
        except MemoryError:
            raise
        except Exception:  # the fault to be found: whatever `run` raises, capture goes on
            self._recording = []
            raise


class NoMemoryIsARuntimeError(FakeGraphBackend):
    def capture(self, run: Any) -> GraphHandle:
        try:
            return super().capture(run)
        except MemoryError as error:
            raise RuntimeError(str(error)) from error


class NoMemoryKeepsTheGraph(FakeGraphBackend):
    def capture(self, run: Any) -> GraphHandle:
        try:
            return super().capture(run)
        except MemoryError:
            self._graphs[GraphHandle(-1)] = FakeGraph((), None, self.graph_bytes)
            raise


class ReplayNothing(FakeGraphBackend):
    def replay(self, graph: GraphHandle) -> Any:
        return super().replay(graph) if graph in self._graphs else None


class DropTwice(FakeGraphBackend):
    def drop(self, graph: GraphHandle) -> None:
        self._graphs.pop(graph, None)


class DropAll(FakeGraphBackend):
    def drop(self, graph: GraphHandle) -> None:
        super().drop(graph)
        self._graphs.clear()


class DropKeepsMemory(FakeGraphBackend):
    dropped_bytes = 0

    def drop(self, graph: GraphHandle) -> None:
        super().drop(graph)
        self.dropped_bytes += self.graph_bytes

    def memory_used_bytes(self) -> int:
        return super().memory_used_bytes() + self.dropped_bytes


class CountNoMemory(FakeGraphBackend):
    def memory_used_bytes(self) -> int:
        return 0


BROKEN_BACKENDS: list[tuple[str, type[FakeGraphBackend]]] = [
    ("has_every_method", WithoutDrop),
    ("replay_reads_the_present_inputs", ReplayOnce),
    ("replay_returns_what_run_returned", FlattenResult),
    ("replay_returns_the_same_tensors", CopyResult),
    ("graphs_do_not_disturb_each_other", ShareResults),
    ("handles_are_given_out_once", ReusedGraphHandles),
    ("what_run_raises_passes_through", SwallowErrors),
    ("what_run_raises_passes_through", TranslateErrors),
    ("what_run_raises_passes_through", KeepFailedGraph),
    ("what_run_raises_passes_through", StayInCapture),
    ("capture_out_of_memory_raises_memory_error", NoMemoryIsARuntimeError),
    ("capture_out_of_memory_raises_memory_error", NoMemoryKeepsTheGraph),
    ("replay_refuses_unknown_graphs", ReplayNothing),
    ("drop_refuses_unknown_graphs", DropTwice),
    ("drop_leaves_other_graphs", DropAll),
    ("memory_is_counted_and_freed", DropKeepsMemory),
    ("memory_is_counted_and_freed", CountNoMemory),
]

# Families, likewise.


def raising_probe() -> Probe:
    raise OSError("no such device file")


ANSWERS = iter((True, False))
BROKEN_FAMILIES: list[tuple[str, str, Any]] = [
    ("record_is_a_device_family", "a mere namespace", SimpleNamespace(name="fake")),
    ("name_is_a_folder_name", "a name with a space", make_family("my device")),
    (
        "class_paths_are_dotted",
        "a bare class name",
        replace(make_family(), platform_class="FakePlatform"),
    ),
    (
        "graph_modes_fit_the_backend",
        "an unknown mode",
        make_family(capabilities=Capabilities(graph_modes=("warp",), graph_backend="a.b.C")),
    ),
    (
        "graph_modes_fit_the_backend",
        "graphs without a backend",
        make_family(capabilities=Capabilities(graph_modes=("eager", "full"))),
    ),
    (
        "graph_modes_fit_the_backend",
        "a backend without graphs",
        make_family(capabilities=Capabilities(graph_backend="a.b.C")),
    ),
    ("probe_explains_itself", "a probe that raises", replace(make_family(), probe=raising_probe)),
    (
        "probe_explains_itself",
        "a probe without words",
        replace(make_family(), probe=lambda: Probe(False, "a device", " ")),
    ),
    (
        "probe_explains_itself",
        "a fickle probe",
        replace(make_family(), probe=lambda: Probe(next(ANSWERS), "a device", "something")),
    ),
    (
        "classes_can_be_loaded",
        "a platform that does not exist",
        replace(make_family(), platform_class="xllm_plugin.testing.fakes.Missing"),
    ),
    (
        "classes_can_be_loaded",
        "a driver that is none",
        make_family(capabilities=Capabilities(memory_driver="xllm_plugin.testing.fakes.FakeFence")),
    ),
]


def label(value: object) -> str:
    return value if isinstance(value, str) else str(getattr(value, "__name__", value))


@pytest.mark.parametrize(("clause", "driver"), BROKEN_DRIVERS, ids=label)
def test_a_broken_memory_driver_is_caught(
    clause: str, driver: type[FakeMemoryDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The one variant that blocks need not do so for ten seconds.
    monkeypatch.setattr(memory, "PATIENCE_S", 0.05)
    with pytest.raises(AssertionError, match=f"MemoryDriver, {clause}: "):
        MEMORY.check_clause(clause, MemoryKit(driver, probe_memory))
    with pytest.raises(AssertionError, match="MemoryDriver, "):
        check_memory_driver(driver, probe_memory)


@pytest.mark.parametrize(("clause", "backend"), BROKEN_BACKENDS, ids=label)
def test_a_broken_graph_backend_is_caught(clause: str, backend: type[FakeGraphBackend]) -> None:
    with pytest.raises(AssertionError, match=f"GraphBackend, {clause}: "):
        GRAPHS.check_clause(clause, GraphKit(backend, probe_graphs))
    with pytest.raises(AssertionError, match="GraphBackend, "):
        check_graph_backend(backend, probe_graphs)


@pytest.mark.parametrize(
    ("clause", "family"),
    [pytest.param(clause, family, id=what) for clause, what, family in BROKEN_FAMILIES],
)
def test_a_broken_family_is_caught(clause: str, family: DeviceFamily) -> None:
    with pytest.raises(AssertionError, match=f"DeviceFamily, {clause}: "):
        FAMILY.check_clause(clause, family)


def test_a_probe_that_imports_torch_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "heavy_family_of_a_test.py").write_text(
        "from xllm_plugin.accelerator.family import Probe\n"
        "def probe():\n"
        "    import torch\n"
        "    return Probe(True, 'torch', 'torch')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import heavy_family_of_a_test  # type: ignore[import-not-found]  # written above

    family = replace(make_family(), probe=heavy_family_of_a_test.probe)
    with pytest.raises(AssertionError, match=r"probe_imports_nothing_heavy: (.|\n)*imported torch"):
        FAMILY.check_clause("probe_imports_nothing_heavy", family)


def test_every_clause_has_a_broken_variant() -> None:
    assert {clause for clause, _ in BROKEN_DRIVERS} == set(MEMORY.clauses)
    assert {clause for clause, _ in BROKEN_BACKENDS} == set(GRAPHS.clauses)
    elsewhere = {"probe_imports_nothing_heavy"}
    assert {clause for clause, _, _ in BROKEN_FAMILIES} | elsewhere == set(FAMILY.clauses)


def test_a_failure_states_the_clause_and_what_was_seen() -> None:
    with pytest.raises(AssertionError) as caught:
        check_memory_driver(MapReplaces, probe_memory)
    assert str(caught.value) == (
        "MemoryDriver, map_refuses_an_address_that_is_mapped: "
        "`map` raises ValueError where a page is mapped, be it the same page.\n"
        "But map where page A is mapped returned None instead of raising ValueError."
    )


def test_an_unexpected_exception_is_a_breach() -> None:
    with pytest.raises(AssertionError, match="RuntimeError") as caught:
        check_memory_driver(NoContext, probe_memory)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_without_means_clauses_are_reported_unchecked_and_leave_nothing() -> None:
    drivers: list[FakeMemoryDriver] = []

    def make_driver() -> FakeMemoryDriver:
        drivers.append(FakeMemoryDriver())
        return drivers[-1]

    unchecked = check_memory_driver(make_driver, lambda d: MemoryProbe(d.read, d.write))
    assert {(item.clause, item.reason.split(" ")[0]) for item in unchecked} == {
        ("create_out_of_memory_raises_memory_error", "MemoryProbe.max_pages"),
        ("a_released_page_can_be_created_again", "MemoryProbe.max_pages"),
        ("a_reserved_range_takes_no_pages", "MemoryProbe.max_pages"),
        ("refused_calls_take_no_pages", "MemoryProbe.max_pages"),
        ("a_map_that_the_device_fails_changes_nothing", "MemoryProbe.fail_map"),
        ("create_is_all_or_nothing", "MemoryProbe.max_pages"),
        ("a_batch_that_the_device_fails_changes_nothing", "MemoryProbe.fail_map"),
        ("a_fence_waits_for_earlier_work", "MemoryProbe.busy"),
        ("wait_returns_no_earlier", "MemoryProbe.busy"),
        ("a_passed_fence_stays_passed", "MemoryProbe.busy"),
    }
    assert [(driver.num_pages, driver.num_mapped, driver.num_ranges) for driver in drivers] == [
        (0, 0, 0)
    ] * len(drivers)
    graphs = check_graph_backend(
        FakeGraphBackend, lambda backend: GraphProbe(probe_graphs(backend).make_work)
    )
    assert [item.clause for item in graphs] == ["capture_out_of_memory_raises_memory_error"]


def test_the_checks_leave_nothing_on_the_device() -> None:
    drivers: list[FakeMemoryDriver] = []

    def make_driver() -> FakeMemoryDriver:
        drivers.append(FakeMemoryDriver(capacity_pages=4))
        return drivers[-1]

    assert check_memory_driver(make_driver, probe_memory) == ()
    assert len(drivers) >= len(MEMORY.clauses)
    for driver in drivers:
        driver.check_integrity()
        assert (driver.num_pages, driver.num_mapped, driver.num_ranges) == (0, 0, 0)


@pytest.mark.parametrize("granularity_bytes", [2, 16, 4096])
def test_any_granularity_passes(granularity_bytes: int) -> None:
    def make_driver() -> FakeMemoryDriver:
        return FakeMemoryDriver(granularity_bytes=granularity_bytes)

    assert check_memory_driver(make_driver, probe_memory) == ()


def test_an_unusable_family_leaves_its_classes_unchecked() -> None:
    unchecked = check_device_family(make_family(usable=False))
    assert [item.clause for item in unchecked] == ["classes_can_be_loaded"]
    assert "not usable: looked for the device fake" in unchecked[0].reason


def test_a_probe_that_cannot_travel_is_reported_unchecked() -> None:
    family = replace(make_family(), probe=lambda: Probe(True, "it", "it"))
    with pytest.raises(UncheckedError, match="fresh interpreter"):
        FAMILY.check_clause("probe_imports_nothing_heavy", family)


def test_a_kit_is_found_beside_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "acme_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError, match=r"acme_of_a_test\.testkit.* does not exist"):
        load_kit("acme_of_a_test.memory.Driver", "MEMORY_KIT")
    (package / "testkit.py").write_text("from xllm_plugin.testing.fakes import MEMORY_KIT\n")
    monkeypatch.syspath_prepend(tmp_path)  # also forgets what was not found
    kit = load_kit("acme_of_a_test.memory.Driver", "MEMORY_KIT")
    assert MEMORY.check(kit) == ()
    with pytest.raises(AssertionError, match="has no GRAPH_KIT"):
        load_kit("acme_of_a_test.graphs.Backend", "GRAPH_KIT")


def test_the_test_kit_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, xllm_plugin.testing.conformance, xllm_plugin.testing.fakes\n"
        "print(sorted({'torch', 'vllm'} & set(sys.modules)))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout == "[]\n"
