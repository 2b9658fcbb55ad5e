"""The contract of `xllm_plugin.accelerator.memory.MemoryDriver`, clause by clause."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from xllm_plugin.accelerator.memory import Fence, MemoryDriver, PageHandle
from xllm_plugin.testing.conformance.contract import (
    Contract,
    Unchecked,
    UncheckedError,
    refuses,
    require,
)

__all__ = ["MEMORY", "MemoryKit", "MemoryProbe", "check_memory_driver"]

DriverT = TypeVar("DriverT", bound=MemoryDriver)

TOO_LARGE_BYTES = 2**60
"""More than the 57 bits of address that the largest page tables of today translate."""

NO_PAGE = PageHandle(2**62 + 1)
"""A handle that no driver has given out."""

HOLD_S = 0.2
"""How long the device is kept busy while `Fence.wait` waits; a right driver passes for any value,
a wrong one has this long to be caught."""

PATIENCE_S = 10.0
"""How long `Fence.is_done` may block before the device is let go, so that a check ends."""


@dataclass(frozen=True, slots=True)
class MemoryProbe:
    """What the checks need beyond the protocol, for one driver.  None: clauses go unchecked.

    Attributes:
        read: bytes at (address, num_bytes), as the device sees them.
        write: put bytes at an address, for the device to see.
        max_pages: `create` runs out after at most so many pages, at least 4 and better below 1000.
        fail_map: makes the device fail half-way at the n-th page that it maps from now, as for
            want of page tables, once; 1 is the next.
        busy: a context in which the device has work to do and cannot finish it; it may be left
            from another thread.
    """

    read: Callable[[int, int], bytes]
    write: Callable[[int, bytes], None]
    max_pages: int | None = None
    fail_map: Callable[[int], None] | None = None
    busy: Callable[[], AbstractContextManager[object]] | None = None


@dataclass(frozen=True, slots=True)
class MemoryKit(Generic[DriverT]):
    """How to check a driver: make a fresh one, and look behind it."""

    make_driver: Callable[[], DriverT]
    probe: Callable[[DriverT], MemoryProbe]


MEMORY: Contract[MemoryKit[Any]] = Contract("MemoryDriver")


def check_memory_driver(
    make_driver: Callable[[], DriverT], probe: Callable[[DriverT], MemoryProbe]
) -> tuple[Unchecked, ...]:
    """Check that a driver keeps the contract of `MemoryDriver`.

    Args:
        make_driver: makes a fresh driver, once or more for each clause.
        probe: looks behind a driver that `make_driver` made.

    Returns:
        The clauses that the probe brings no means to check.

    Raises:
        AssertionError: the first broken clause.
    """
    return MEMORY.check(MemoryKit(make_driver, probe))


class Scene:
    """Four slots in one range: page A at slots 0 and 1, page B at slot 2, nothing at slot 3."""

    def __init__(self, kit: MemoryKit[Any]) -> None:
        self.driver: MemoryDriver = kit.make_driver()
        self.probe = kit.probe(self.driver)
        self.page_bytes: int = self.driver.granularity_bytes
        self.start: int = self.driver.reserve(self.num_bytes)
        self.page_a = self.driver.create(1)[0]
        self.page_b = self.driver.create(1)[0]
        for slot, page in enumerate((self.page_a, self.page_a, self.page_b)):
            self.driver.map({self.address(slot): page})
        self.probe.write(self.address(0), pattern(self.page_bytes, 1))
        self.probe.write(self.address(2), pattern(self.page_bytes, 2))

    @property
    def num_bytes(self) -> int:
        return 4 * self.page_bytes

    def address(self, slot: int) -> int:
        return self.start + slot * self.page_bytes

    def refuses(
        self, error: type[Exception], what: str, call: Callable[..., Any], *args: Any
    ) -> None:
        """Require that `call` on `args` raises `error` and leaves the mapped bytes alone."""
        refuses(error, what, call, *args)
        self.check_bytes(f"after {what} raised {error.__name__}")

    def check_bytes(self, when: str) -> None:
        for slot, seed in enumerate((1, 1, 2)):
            require(
                self.probe.read(self.address(slot), self.page_bytes)
                == pattern(self.page_bytes, seed),
                f"{when}, the page mapped at slot {slot} shows other bytes.",
            )

    def close(self, when: str) -> None:
        """Take everything down, which works only if it is all as it was built."""
        step = "map a page at the free slot"
        try:
            self.driver.map({self.address(3): self.page_b})
            for slot in range(4):
                step = f"unmap slot {slot}"
                self.driver.unmap([self.address(slot)])
            step = "release the two pages"
            self.driver.release([self.page_a])
            self.driver.release([self.page_b])
            step = "unreserve the range"
            self.driver.unreserve(self.start, self.num_bytes)
        except (ValueError, MemoryError) as error:
            raise AssertionError(f"{when}, the driver refused to {step}: {error}") from error


@contextmanager
def unchanged_scene(kit: MemoryKit[Any]) -> Iterator[Scene]:
    """A `Scene` that must be the same at the end."""
    scene = Scene(kit)
    try:
        yield scene
    except UncheckedError:
        scene.close("in a clause that goes unchecked")
        raise
    scene.check_bytes("at the end")
    scene.close("at the end")


def pattern(num_bytes: int, seed: int) -> bytes:
    """Bytes that differ between seeds and between neighbouring positions."""
    return bytes((seed * 37 + i) % 256 for i in range(256)) * (num_bytes // 256) + bytes(
        (seed * 37 + i) % 256 for i in range(num_bytes % 256)
    )


def max_pages_of(probe: MemoryProbe) -> int:
    if probe.max_pages is None:
        raise UncheckedError("MemoryProbe.max_pages is not given")
    return probe.max_pages


def busy_of(probe: MemoryProbe) -> Callable[[], AbstractContextManager[object]]:
    if probe.busy is None:
        raise UncheckedError("MemoryProbe.busy is not given")
    return probe.busy


def fail_map_of(probe: MemoryProbe) -> Callable[[int], None]:
    if probe.fail_map is None:
        raise UncheckedError("MemoryProbe.fail_map is not given")
    return probe.fail_map


def create_all(driver: MemoryDriver, max_pages: int) -> list[PageHandle]:
    """Create pages until the device is out of memory."""
    pages: list[PageHandle] = []
    for _ in range(max_pages):
        try:
            pages.append(driver.create(1)[0])
        except MemoryError:
            return pages
    refuses(MemoryError, f"create(1) after {max_pages} pages", driver.create, 1)
    return pages


def count_free(driver: MemoryDriver, max_pages: int) -> int:
    """How many pages can be created now; they are released again."""
    pages = create_all(driver, max_pages)
    for page in pages:
        driver.release([page])
    return len(pages)


# What works


@MEMORY.clause
def has_every_method(kit: MemoryKit[Any]) -> None:
    """A driver has every method of the protocol."""
    driver = kit.make_driver()
    require(isinstance(driver, MemoryDriver), f"{type(driver).__name__} lacks one.")


@MEMORY.clause
def granularity_stays_the_same(kit: MemoryKit[Any]) -> None:
    """`granularity_bytes` is above one, the same at every call."""
    driver = kit.make_driver()
    size = driver.granularity_bytes
    require(size > 1, f"it is {size}.")
    start, page = driver.reserve(size), driver.create(1)[0]
    again = driver.granularity_bytes
    driver.release([page])
    driver.unreserve(start, size)
    require(again == size, f"it was {size} and then {again}.")


@MEMORY.clause
def ranges_are_aligned_and_disjoint(kit: MemoryKit[Any]) -> None:
    """`reserve` returns multiples of the granularity; no two ranges share an address."""
    driver = kit.make_driver()
    page_bytes = driver.granularity_bytes
    ranges = [(driver.reserve(pages * page_bytes), pages * page_bytes) for pages in (1, 3, 2)]
    for start, _ in ranges:
        require(start % page_bytes == 0, f"reserve returned {start:#x}, granularity {page_bytes}.")
    ranges.sort()
    for (start, size), (following, _) in itertools.pairwise(ranges):
        require(
            start + size <= following, f"{start:#x} + {size} bytes reaches into {following:#x}."
        )
    for start, size in ranges:
        driver.unreserve(start, size)


@MEMORY.clause
def neighbouring_pages_form_one_range(kit: MemoryKit[Any]) -> None:
    """Pages hold `granularity_bytes` each, and side by side read as consecutive bytes."""
    driver: MemoryDriver = kit.make_driver()
    probe, page_bytes = kit.probe(driver), driver.granularity_bytes
    start = driver.reserve(2 * page_bytes)
    pages = [driver.create(1)[0], driver.create(1)[0]]
    for slot in (1, 0):
        driver.map({start + slot * page_bytes: pages[slot]})
    for slot in (0, 1):
        probe.write(start + slot * page_bytes, pattern(page_bytes, slot))
    require(
        probe.read(start, 2 * page_bytes) == pattern(page_bytes, 0) + pattern(page_bytes, 1),
        "two pages side by side do not show what was written to each.",
    )
    for slot in (0, 1):
        driver.unmap([start + slot * page_bytes])
        driver.release([pages[slot]])
    driver.unreserve(start, 2 * page_bytes)


@MEMORY.clause
def a_page_shows_the_same_bytes_at_every_address(kit: MemoryKit[Any]) -> None:
    """One page may be mapped at several addresses; all of them show the same bytes."""
    with unchanged_scene(kit) as scene:
        scene.check_bytes("after a write through the first of two addresses")
        scene.probe.write(scene.address(1), pattern(scene.page_bytes, 3))
        require(
            scene.probe.read(scene.address(0), scene.page_bytes) == pattern(scene.page_bytes, 3),
            "a write through the second of two addresses does not show at the first.",
        )
        scene.probe.write(scene.address(1), pattern(scene.page_bytes, 1))


@MEMORY.clause
def an_unmapped_page_lives_on(kit: MemoryKit[Any]) -> None:
    """`unmap` leaves the page, its contents and its other addresses as they are."""
    with unchanged_scene(kit) as scene:
        scene.driver.unmap([scene.address(0)])
        require(
            scene.probe.read(scene.address(1), scene.page_bytes) == pattern(scene.page_bytes, 1),
            "its other address shows other bytes.",
        )
        scene.driver.unmap([scene.address(1)])
        for slot in (0, 1):
            scene.driver.map({scene.address(slot): scene.page_a})


@MEMORY.clause
def a_page_that_is_not_kept_shows_elsewhere_or_can_be_used_again(kit: MemoryKit[Any]) -> None:
    """`unmap` with `keep=False` leaves other addresses as they are, and the page to be mapped."""
    with unchanged_scene(kit) as scene:
        driver, size = scene.driver, scene.page_bytes
        driver.unmap([scene.address(0)], keep=False)
        refuses(ValueError, "unmap once more", driver.unmap, [scene.address(0)])
        require(
            scene.probe.read(scene.address(1), size) == pattern(size, 1),
            "its other address shows other bytes.",
        )
        driver.map({scene.address(0): scene.page_a})
        driver.unmap([scene.address(2), scene.address(1), scene.address(0)], keep=False)
        driver.map({scene.address(slot): scene.page_a for slot in (0, 1)})
        driver.map({scene.address(2): scene.page_b})
        for slot, seed in ((0, 1), (2, 2)):
            scene.probe.write(scene.address(slot), pattern(size, seed))


@MEMORY.clause
def handles_are_given_out_once(kit: MemoryKit[Any]) -> None:
    """A driver gives each handle out only once, so that a stale one is always found out."""
    driver: MemoryDriver = kit.make_driver()
    seen: set[PageHandle] = set()
    for _ in range(8):
        page = driver.create(1)[0]
        require(page not in seen, f"handle {page} came twice.")
        seen.add(page)
        driver.release([page])


@MEMORY.clause
def calls_may_come_from_any_thread(kit: MemoryKit[Any]) -> None:
    """Calls come one at a time, but not always from one thread."""
    driver: MemoryDriver = kit.make_driver()
    page_bytes = driver.granularity_bytes
    errors: list[Exception] = []

    def elsewhere() -> None:
        try:
            start = driver.reserve(page_bytes)
            page = driver.create(1)[0]
            driver.map({start: page})
            driver.fence().wait()
            driver.unmap([start])
            driver.release([page])
            driver.unreserve(start, page_bytes)
        except Exception as error:  # noqa: BLE001 - carried to the thread that reports it
            errors.append(error)

    thread = threading.Thread(target=elsewhere, name="conformance-elsewhere")
    thread.start()
    thread.join()
    require(not errors, f"in another thread, {errors and repr(errors[0])} was raised.")


# What is refused


@MEMORY.clause
def reserve_refuses_odd_sizes(kit: MemoryKit[Any]) -> None:
    """`reserve` raises ValueError unless the size is a positive multiple of the granularity."""
    with unchanged_scene(kit) as scene:
        for num_bytes in (0, 1, scene.page_bytes + 1, scene.page_bytes // 2, -scene.page_bytes):
            scene.refuses(ValueError, f"reserve({num_bytes})", scene.driver.reserve, num_bytes)


@MEMORY.clause
def reserve_without_room_raises_memory_error(kit: MemoryKit[Any]) -> None:
    """`reserve` raises MemoryError when the address space has no such range left."""
    with unchanged_scene(kit) as scene:
        num_bytes = TOO_LARGE_BYTES - TOO_LARGE_BYTES % scene.page_bytes
        what = f"reserve of {num_bytes} bytes"
        scene.refuses(MemoryError, what, scene.driver.reserve, num_bytes)


@MEMORY.clause
def map_refuses_misaligned_addresses(kit: MemoryKit[Any]) -> None:
    """`map` raises ValueError unless the address is a multiple of the granularity."""
    with unchanged_scene(kit) as scene:
        for address in (scene.address(3) + 1, scene.address(3) + scene.page_bytes // 2):
            what = f"map at slot 3 + {address - scene.address(3)} bytes"
            scene.refuses(ValueError, what, scene.driver.map, {address: scene.page_b})


@MEMORY.clause
def map_refuses_addresses_that_are_not_reserved(kit: MemoryKit[Any]) -> None:
    """`map` raises ValueError outside the reserved ranges."""
    with unchanged_scene(kit) as scene:
        gone = scene.driver.reserve(scene.page_bytes)
        scene.driver.unreserve(gone, scene.page_bytes)
        for what, address in (
            ("map before the range", scene.start - scene.page_bytes),
            ("map at the range's end", scene.start + scene.num_bytes),
            ("map in a range given back", gone),
        ):
            scene.refuses(ValueError, what, scene.driver.map, {address: scene.page_b})


@MEMORY.clause
def map_refuses_an_address_that_is_mapped(kit: MemoryKit[Any]) -> None:
    """`map` raises ValueError where a page is mapped, be it the same page."""
    with unchanged_scene(kit) as scene:
        for page in (scene.page_b, scene.page_a):
            scene.refuses(
                ValueError,
                "map where page A is mapped",
                scene.driver.map,
                {scene.address(0): page},
            )


@MEMORY.clause
def map_refuses_unknown_pages(kit: MemoryKit[Any]) -> None:
    """`map` raises ValueError for a page that was not created or has been released."""
    with unchanged_scene(kit) as scene:
        released = scene.driver.create(1)[0]
        scene.driver.release([released])
        for what, page in (("never created", NO_PAGE), ("released", released)):
            scene.refuses(
                ValueError,
                f"map of a page {what}",
                scene.driver.map,
                {scene.address(3): page},
            )


@MEMORY.clause
def unmap_refuses_misaligned_addresses(kit: MemoryKit[Any]) -> None:
    """`unmap` raises ValueError unless the address is a multiple of the granularity."""
    with unchanged_scene(kit) as scene:
        for offset in (1, scene.page_bytes // 2):
            scene.refuses(
                ValueError,
                f"unmap at slot 0 + {offset} bytes",
                scene.driver.unmap,
                [scene.start + offset],
            )


@MEMORY.clause
def unmap_refuses_an_address_where_nothing_is_mapped(kit: MemoryKit[Any]) -> None:
    """`unmap` raises ValueError where nothing is mapped: never, no longer, or outside."""
    with unchanged_scene(kit) as scene:
        scene.driver.map({scene.address(3): scene.page_b})
        scene.driver.unmap([scene.address(3)])
        for what, address in (
            ("the second unmap of one address", scene.address(3)),
            ("unmap past the range's end", scene.start + scene.num_bytes),
        ):
            scene.refuses(ValueError, what, scene.driver.unmap, [address])


@MEMORY.clause
def release_refuses_a_mapped_page(kit: MemoryKit[Any]) -> None:
    """`release` raises ValueError while the page is mapped, be it at one of its addresses."""
    with unchanged_scene(kit) as scene:
        what = "release of a page mapped at two addresses"
        scene.refuses(ValueError, what, scene.driver.release, [scene.page_a])
        # The latest address first: a driver that remembers only one of them is wrong once.
        for slot in (1, 0):
            scene.driver.unmap([scene.address(slot)])
            what = f"release of a page mapped at two addresses, after unmap of slot {slot},"
            refuses(ValueError, what, scene.driver.release, [scene.page_a])
            scene.driver.map({scene.address(slot): scene.page_a})


@MEMORY.clause
def release_refuses_unknown_pages(kit: MemoryKit[Any]) -> None:
    """`release` raises ValueError for a page that was not created or has been released."""
    with unchanged_scene(kit) as scene:
        released = scene.driver.create(1)[0]
        scene.driver.release([released])
        for what, page in (("never created", NO_PAGE), ("released", released)):
            scene.refuses(ValueError, f"release of a page {what}", scene.driver.release, [page])


@MEMORY.clause
def unreserve_refuses_what_reserve_did_not_return(kit: MemoryKit[Any]) -> None:
    """`unreserve` raises ValueError unless it gets a range as `reserve` returned it."""
    with unchanged_scene(kit) as scene:
        page_bytes, size = scene.page_bytes, 4 * scene.page_bytes
        start = scene.driver.reserve(size)
        for what, address, num_bytes in (
            ("its first half", start, size // 2),
            ("its second half", start + size // 2, size // 2),
            ("a longer range", start, size + page_bytes),
            ("a size that is no multiple of the granularity", start, size - 1),
            ("an address that is no multiple of the granularity", start + 1, size),
        ):
            scene.refuses(
                ValueError,
                f"unreserve of {what}",
                scene.driver.unreserve,
                address,
                num_bytes,
            )
        scene.driver.unreserve(start, size)
        scene.refuses(ValueError, "the second unreserve", scene.driver.unreserve, start, size)


@MEMORY.clause
def unreserve_refuses_a_range_with_a_mapped_page(kit: MemoryKit[Any]) -> None:
    """`unreserve` raises ValueError while a page is mapped in the range."""
    with unchanged_scene(kit) as scene:
        scene.refuses(
            ValueError,
            "unreserve of a range with mapped pages",
            scene.driver.unreserve,
            scene.start,
            scene.num_bytes,
        )


# What runs out


@MEMORY.clause
def create_out_of_memory_raises_memory_error(kit: MemoryKit[Any]) -> None:
    """`create` raises MemoryError when the device is out of memory, and changes nothing."""
    with unchanged_scene(kit) as scene:
        max_pages = max_pages_of(scene.probe)
        pages = create_all(scene.driver, max_pages)
        for _ in range(2):
            scene.refuses(MemoryError, "create(1) when out of memory", scene.driver.create, 1)
        for page in pages:
            scene.driver.release([page])
        free = count_free(scene.driver, max_pages)
        require(
            free == len(pages), f"after a failed create {free} pages were free, not {len(pages)}."
        )


@MEMORY.clause
def a_released_page_can_be_created_again(kit: MemoryKit[Any]) -> None:
    """`release` gives the page back to the device, also after it was mapped."""
    driver: MemoryDriver = kit.make_driver()
    max_pages = max_pages_of(kit.probe(driver))
    free = count_free(driver, max_pages)
    start = driver.reserve(driver.granularity_bytes)
    for _ in range(2):
        page = driver.create(1)[0]
        driver.map({start: page})
        driver.unmap([start])
        driver.release([page])
    driver.unreserve(start, driver.granularity_bytes)
    left = count_free(driver, max_pages)
    require(left == free, f"{free} pages were free and, all released, {left}.")


@MEMORY.clause
def a_reserved_range_takes_no_pages(kit: MemoryKit[Any]) -> None:
    """`reserve` puts no memory behind the addresses."""
    driver: MemoryDriver = kit.make_driver()
    max_pages = max_pages_of(kit.probe(driver))
    free = count_free(driver, max_pages)
    num_bytes = 4 * max_pages * driver.granularity_bytes
    start = driver.reserve(num_bytes)
    left = count_free(driver, max_pages)
    driver.unreserve(start, num_bytes)
    require(left == free, f"{free} pages were free before reserve and {left} after.")


@MEMORY.clause
def refused_calls_take_no_pages(kit: MemoryKit[Any]) -> None:
    """A call that raises changes nothing: every page can be released and created afterwards."""
    with unchanged_scene(kit) as scene:
        driver, max_pages = scene.driver, max_pages_of(scene.probe)
        free = count_free(driver, max_pages)
        refused: tuple[tuple[str, Callable[..., Any], tuple[Any, ...]], ...] = (
            ("reserve(1)", driver.reserve, (1,)),
            ("map where a page is mapped", driver.map, ({scene.address(0): scene.page_b},)),
            ("unmap of nothing", driver.unmap, ([scene.address(3)],)),
            ("release of a mapped page", driver.release, ([scene.page_a],)),
            ("a wrong unreserve", driver.unreserve, (scene.start, scene.page_bytes)),
        )
        for what, call, args in refused:
            scene.refuses(ValueError, what, call, *args)
            left = count_free(driver, max_pages)
            require(left == free, f"{free} pages were free before {what} and {left} after.")
    left = count_free(driver, max_pages)
    require(left == free + 2, f"{left} pages were free at the end, not {free + 2}.")


@MEMORY.clause
def a_map_that_the_device_fails_changes_nothing(kit: MemoryKit[Any]) -> None:
    """`map` raises MemoryError when the device fails it half-way, and changes nothing."""
    with unchanged_scene(kit) as scene:
        fail_map = fail_map_of(scene.probe)
        page = scene.driver.create(1)[0]
        fail_map(1)
        what = "map on a device that fails it"
        scene.refuses(MemoryError, what, scene.driver.map, {scene.address(3): page})
        scene.refuses(ValueError, "unmap after it", scene.driver.unmap, [scene.address(3)])
        scene.driver.release([page])


# Several at once


@MEMORY.clause
def nothing_may_be_asked(kit: MemoryKit[Any]) -> None:
    """An empty batch does nothing; a negative number of pages is refused."""
    with unchanged_scene(kit) as scene:
        driver = scene.driver
        require(list(driver.create(0)) == [], "create(0) made pages.")
        driver.map({})
        driver.unmap([])
        driver.release([])
        scene.refuses(ValueError, "create(-1)", driver.create, -1)


@MEMORY.clause
def a_batch_maps_each_page_at_its_address(kit: MemoryKit[Any]) -> None:
    """`map` and `unmap` take pages side by side and apart, in any order."""
    driver: MemoryDriver = kit.make_driver()
    probe, page_bytes = kit.probe(driver), driver.granularity_bytes
    start = driver.reserve(6 * page_bytes)
    pages = driver.create(4)
    slots = (5, 1, 0, 3)
    for order in (1, -1):
        placed = {start + slot * page_bytes: page for slot, page in zip(slots, pages, strict=True)}
        driver.map(placed)
        for slot in slots:
            probe.write(start + slot * page_bytes, pattern(page_bytes, slot))
        driver.unmap(list(placed)[::order])
        # Now each alone, in another order: what was written to a page is in that page.
        driver.map(dict(zip((start + slot * page_bytes for slot in range(4)), pages, strict=True)))
        for place, slot in enumerate(slots):
            require(
                probe.read(start + place * page_bytes, page_bytes) == pattern(page_bytes, slot),
                f"the page of place {place} of a batch does not show what was written to it.",
            )
        driver.unmap([start + slot * page_bytes for slot in range(4)])
    driver.release(pages)
    driver.unreserve(start, 6 * page_bytes)


@MEMORY.clause
def create_is_all_or_nothing(kit: MemoryKit[Any]) -> None:
    """`create` of more pages than are left raises MemoryError and takes none."""
    with unchanged_scene(kit) as scene:
        max_pages = max_pages_of(scene.probe)
        free = count_free(scene.driver, max_pages)
        what = f"create({free + 1}) with {free} left"
        scene.refuses(MemoryError, what, scene.driver.create, free + 1)
        left = count_free(scene.driver, max_pages)
        require(left == free, f"{free} pages were free before {what} and {left} after.")


@MEMORY.clause
def a_batch_with_one_wrong_item_changes_nothing(kit: MemoryKit[Any]) -> None:
    """`map`, `unmap` and `release` refuse a batch as a whole."""
    with unchanged_scene(kit) as scene:
        driver, free_slot = scene.driver, scene.address(3)
        for wrong in ({scene.address(0): scene.page_b}, {free_slot + 1: scene.page_b}):
            scene.refuses(
                ValueError,
                "map of a good item and a wrong one",
                driver.map,
                {free_slot: scene.page_b} | wrong,
            )
        page = driver.create(1)[0]
        for what, call, batch in (
            ("unmap of slots 0 and 3", driver.unmap, [scene.address(0), free_slot]),
            ("unmap of slot 0 twice", driver.unmap, [scene.address(0), scene.address(0)]),
            ("release of a free page and a mapped one", driver.release, [page, scene.page_a]),
            ("release of one page twice", driver.release, [page, page]),
        ):
            scene.refuses(ValueError, what, call, batch)
        driver.release([page])


@MEMORY.clause
def a_batch_that_the_device_fails_changes_nothing(kit: MemoryKit[Any]) -> None:
    """`map` of several pages of which the device fails one raises MemoryError and maps none."""
    driver: MemoryDriver = kit.make_driver()
    fail_map, page_bytes = fail_map_of(kit.probe(driver)), driver.granularity_bytes
    start, pages = driver.reserve(5 * page_bytes), driver.create(3)
    # Not side by side, so that no driver takes two of them for one.
    placed = {start + 2 * at * page_bytes: page for at, page in enumerate(reversed(pages))}
    for at in (1, 2, 3):
        fail_map(at)
        what = f"map of three pages on a device that fails number {at}"
        refuses(MemoryError, what, driver.map, placed)
        for address in placed:
            refuses(ValueError, f"unmap after {what}", driver.unmap, [address])
    driver.map(placed)
    driver.unmap(list(placed))
    driver.release(pages)
    driver.unreserve(start, 5 * page_bytes)


# Fences


@MEMORY.clause
def the_fence_of_an_idle_device_passes(kit: MemoryKit[Any]) -> None:
    """A fence is a `Fence`, and after `wait` it is done."""
    fence = kit.make_driver().fence()
    require(isinstance(fence, Fence), f"{type(fence).__name__} lacks a method of Fence.")
    fence.wait()
    require(fence.is_done(), "is_done() was False after wait() had returned.")


@MEMORY.clause
def a_fence_waits_for_earlier_work(kit: MemoryKit[Any]) -> None:
    """`is_done` says False, without blocking, while the device has earlier work to do."""
    driver: MemoryDriver = kit.make_driver()
    with ExitStack() as busy:
        busy.enter_context(busy_of(kit.probe(driver))())
        fence = driver.fence()
        watchdog = threading.Timer(PATIENCE_S, busy.close)
        watchdog.start()
        try:
            done = fence.is_done()
        finally:
            watchdog.cancel()
            watchdog.join()
        require(not done, "is_done() said True with work to do, or blocked until it was done.")
    fence.wait()
    require(fence.is_done(), "is_done() was False after the work was done.")


@MEMORY.clause
def wait_returns_no_earlier(kit: MemoryKit[Any]) -> None:
    """`wait` returns when the device has passed the moment, and no earlier."""
    driver: MemoryDriver = kit.make_driver()
    with ExitStack() as busy:
        busy.enter_context(busy_of(kit.probe(driver))())
        let_go = threading.Event()

        def finish() -> None:
            let_go.set()
            busy.close()

        fence = driver.fence()
        later = threading.Timer(HOLD_S, finish)
        later.start()
        fence.wait()
        early = not let_go.is_set()
        later.join()
    require(not early, "wait() returned while the device still had earlier work to do.")


@MEMORY.clause
def a_passed_fence_stays_passed(kit: MemoryKit[Any]) -> None:
    """A fence does not wait for later work, and once done stays done."""
    driver: MemoryDriver = kit.make_driver()
    make_busy = busy_of(kit.probe(driver))
    fence = driver.fence()
    fence.wait()
    with make_busy():
        require(fence.is_done(), "is_done() was False again when the device got more to do.")
