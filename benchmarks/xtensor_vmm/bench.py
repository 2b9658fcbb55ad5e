"""What does a page of KV memory cost, new and used again?  See README.md beside this file."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Protocol, TypeVar

import click
import torch
from rich.console import Console

from xllm_plugin.accelerator.memory import PageHandle
from xllm_plugin.bench import schema
from xllm_plugin.bench.commands import conclude
from xllm_plugin.bench.options import command_line, common_options
from xllm_plugin.bench.schema import Check, Figure, Peer, Row
from xllm_plugin.cpu.memory import PAGE_BYTES, CpuMemoryDriver
from xllm_plugin.xtensor.page_pool import PagePool, PoolPolicy

NAME = "xtensor_vmm"
QUESTION = "What does a page of KV memory cost, created for each mapping, moved, or used again?"
NUM_PAGES, NUM_PAGES_QUICK = 64, 8
REPEATS, REPEATS_QUICK = 9, 3
AT_LEAST: Final = 5.0
"""How much cheaper a page that is used again has to be than one created for each mapping."""

KVCACHED: Final = {"create": 193.0, "map": 1.45, "set access": 36.0, "unmap": 25.6}
"""Microseconds for a page of 2 MiB on an A100, average; ovg-project/kvcached at e8e6406 (2026-08),
benchmarks/bench_vmm/README.md."""

OWNER = "bench"

ResultT = TypeVar("ResultT")


class Side(Protocol):
    """A way to have pages behind addresses, and to be rid of them."""

    name: str
    what: str
    start: int
    """Of the range; its first half is what is asked for."""

    def get(self, slots: Sequence[int]) -> Sequence[int]:
        """Have pages behind slots; return the addresses to use."""
        ...

    def give(self, addresses: Sequence[int]) -> None:
        """Be rid of them."""
        ...


class CreatePerMap:
    """A page is created for each mapping and released after it, as kvcached does."""

    name = "create per map"
    what = "create and map, unmap and release; as kvcached does on a GPU"

    def __init__(self, driver: CpuMemoryDriver, num_pages: int) -> None:
        self.driver = driver
        self.start = driver.reserve(num_pages * PAGE_BYTES)
        self._pages: dict[int, list[PageHandle]] = {}  # by the first address of a batch

    def get(self, slots: Sequence[int]) -> Sequence[int]:
        """Create and map."""
        addresses = [self.start + slot * PAGE_BYTES for slot in slots]
        pages = self.driver.create(len(slots))
        self.driver.map(dict(zip(addresses, pages, strict=True)))
        self._pages[addresses[0]] = pages
        return addresses

    def give(self, addresses: Sequence[int]) -> None:
        """Unmap and release."""
        self.driver.unmap(addresses)
        self.driver.release(self._pages.pop(addresses[0]))


class Pooled:
    """Pages of a pool, each time at another address (`moving`) or at the same one."""

    def __init__(self, driver: CpuMemoryDriver, num_pages: int, *, moving: bool) -> None:
        self.name = "pool, other addresses" if moving else "pool, same addresses"
        self.what = (
            "`PagePool`: pages that exist, unmapped where they were, mapped where they are wanted"
            if moving
            else "`PagePool`: pages still mapped at the address from the last time (Reusable)"
        )
        policy = PoolPolicy(premap_pages=0, keep_mapped_pages=num_pages, idle_s=1e9)
        self.pool = PagePool(driver, budget_pages=num_pages, policy=policy)
        self.start = driver.reserve(2 * num_pages * PAGE_BYTES)
        self._num_pages = num_pages
        self._moving = moving
        self._turns = [0] * num_pages

    def get(self, slots: Sequence[int]) -> Sequence[int]:
        """Take; the half of the range alternates for each slot."""
        addresses = []
        for slot in slots:
            half = self._turns[slot] % 2 if self._moving else 0
            self._turns[slot] += 1
            addresses.append(self.start + (half * self._num_pages + slot) * PAGE_BYTES)
        self.pool.take(OWNER, addresses)
        return addresses

    def give(self, addresses: Sequence[int]) -> None:
        """Retire."""
        self.pool.retire(OWNER, addresses)


class Lazy:
    """No pages at all: anonymous memory that the kernel fills at the first write, dropped after."""

    name = "kernel, lazily"
    what = "private anonymous memory with MADV_HUGEPAGE; MADV_DONTNEED drops it; no sharing"

    def __init__(self, num_pages: int) -> None:
        # One page more, so that a whole huge page lies at every slot.
        size = (num_pages + 1) * PAGE_BYTES
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.start = -(-first // PAGE_BYTES) * PAGE_BYTES
        self._skipped = self.start - first

    def get(self, slots: Sequence[int]) -> Sequence[int]:
        """Nothing to do: the first write does it."""
        return [self.start + slot * PAGE_BYTES for slot in slots]

    def give(self, addresses: Sequence[int]) -> None:
        """Drop them; neighbours, as the slots are, in one call."""
        offset = addresses[0] - self.start + self._skipped
        self._memory.madvise(mmap.MADV_DONTNEED, offset, len(addresses) * PAGE_BYTES)


@dataclass(slots=True)
class Times:
    """Microseconds a page, one entry a repeat."""

    get: list[float] = field(default_factory=list)
    write: list[float] = field(default_factory=list)
    give: list[float] = field(default_factory=list)

    def totals(self) -> list[float]:
        """What a page costs from being asked for to being given back."""
        return [sum(parts) for parts in zip(self.get, self.write, self.give, strict=True)]


def write_once(addresses: Sequence[int]) -> None:
    """Write one byte in every 4 KiB: whatever a side has put off, happens here."""
    for address in addresses:
        page = (ctypes.c_int8 * PAGE_BYTES).from_address(address)
        torch.frombuffer(page, dtype=torch.int8)[:: mmap.PAGESIZE] = 1


def time_cycle(side: Side, batches: Sequence[Sequence[int]], times: Times | None) -> None:
    """Get, write and give each batch of slots; `times` gets the mean a page, None is a warm-up."""
    spent_s = [0.0, 0.0, 0.0]
    for batch in batches:
        marks = [time.perf_counter()]
        addresses = side.get(batch)
        marks.append(time.perf_counter())
        write_once(addresses)
        marks.append(time.perf_counter())
        side.give(addresses)
        marks.append(time.perf_counter())
        for part in range(3):
            spent_s[part] += marks[part + 1] - marks[part]
    if times is not None:
        num_pages = sum(map(len, batches))
        for values, seconds in zip((times.get, times.write, times.give), spent_s, strict=True):
            values.append(seconds / num_pages * 1e6)


def time_calls(driver: CpuMemoryDriver, start: int, size: int, count: int) -> dict[str, float]:
    """Microseconds a page of each call of the driver, `size` pages a call and `count` calls."""
    spent_s = dict.fromkeys(("create", "map", "unmap", "release"), 0.0)

    def timed(name: str, call: Callable[[], ResultT]) -> ResultT:
        began = time.perf_counter()
        result = call()
        spent_s[name] += time.perf_counter() - began
        return result

    for at in range(count):
        first = start + at * size * PAGE_BYTES
        pages = timed("create", partial(driver.create, size))
        placed = {first + slot * PAGE_BYTES: page for slot, page in enumerate(pages)}
        timed("map", partial(driver.map, placed))
        timed("unmap", partial(driver.unmap, list(placed)))
        timed("release", partial(driver.release, pages))
    return {name: seconds / (size * count) * 1e6 for name, seconds in spent_s.items()}


@dataclass(slots=True)
class Measured:
    """All times, by side and batch size; and the driver's calls by batch size."""

    sides: dict[str, dict[int, Times]] = field(default_factory=dict)
    calls: dict[int, list[dict[str, float]]] = field(default_factory=dict)


def measure(
    sides: Sequence[Side], driver: CpuMemoryDriver, num_pages: int, repeats: int
) -> Measured:
    """Interleave the sides; every repeat begins with another one.  The first round warms up."""
    measured = Measured(
        {side.name: {1: Times(), num_pages: Times()} for side in sides}, {1: [], num_pages: []}
    )
    start = driver.reserve(num_pages * PAGE_BYTES)
    slots = list(range(num_pages))
    for repeat in range(-1, repeats):
        turn = max(repeat, 0) % len(sides)
        for side in [*sides[turn:], *sides[:turn]]:
            for size, times in measured.sides[side.name].items():
                batches = [slots[at : at + size] for at in range(0, num_pages, size)]
                time_cycle(side, batches, times if repeat >= 0 else None)
        for size in (1, num_pages):
            calls = time_calls(driver, start, size, num_pages // size)
            if repeat >= 0:
                measured.calls[size].append(calls)
    return measured


def rows(measured: Measured, reference: str) -> list[Row]:
    """Tables: each side's cycle, the driver's calls, and what kvcached has published."""
    found = []
    for size in measured.calls:
        base = measured.sides[reference][size].totals()
        for name, by_size in measured.sides.items():
            times = by_size[size]
            found.append(
                Row(
                    table="From asking for a page to giving it back",
                    labels={"side": name, "pages a call": str(size)},
                    figures=(
                        Figure.of("get", "us a page", times.get),
                        Figure.of("first write", "us a page", times.write),
                        Figure.of("give back", "us a page", times.give),
                        Figure.of("all", "us a page", times.totals()),
                        Figure.ratio(
                            f"cheaper than {reference}", base, times.totals(), unit="times"
                        ),
                    ),
                )
            )
    for size, calls in measured.calls.items():
        found.append(
            Row(
                table="Calls of the CPU driver",
                labels={"pages a call": str(size)},
                figures=tuple(
                    Figure.of(call, "us a page", [repeat[call] for repeat in calls])
                    for call in calls[0]
                ),
            )
        )
    found.append(
        Row(
            table="Quoted, not measured: kvcached, 2 MiB page, A100",
            labels={"source": "benchmarks/bench_vmm/README.md of kvcached at e8e6406"},
            figures=tuple(Figure.of(call, "us", [value]) for call, value in KVCACHED.items()),
        )
    )
    return found


def checks(measured: Measured, reference: str, reuse: Pooled) -> list[Check]:
    """The pool is intact, and using a page again is as much cheaper as is claimed."""
    reuse.pool.check_integrity()
    statistics = reuse.pool.statistics()
    found = [
        Check(
            name="pages created once",
            passed=statistics.num_created == reuse.pool.budget_pages,
            detail=f"{statistics.num_created} created, {statistics.num_reused} times used again",
        )
    ]
    for size in measured.calls:
        ours = Figure.of("", "", measured.sides[reuse.name][size].totals()).median
        theirs = Figure.of("", "", measured.sides[reference][size].totals()).median
        found.append(
            Check(
                name=f"{reuse.name}, {size} a call: at least {AT_LEAST:g} times cheaper",
                passed=theirs >= AT_LEAST * ours,
                detail=f"{theirs / ours:.1f} times, by medians",
            )
        )
    return found


def huge_pages_of_memory_files() -> str:
    """What the kernel is set to, as it says."""
    path = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    text = path.read_text() if path.exists() else "[unknown]"
    return text.partition("[")[2].partition("]")[0]


def notes(num_pages: int) -> tuple[str, ...]:
    """How to read the figures."""
    return (
        (
            f"{num_pages} pages of {PAGE_BYTES // 2**20} MiB, one a call and all in one call. "
            "Ratios are taken within a repeat, of all three parts together."
        ),
        (
            "first write: one byte in every 4 KiB. It shows what a side has put off: page faults, "
            "and with 'kernel, lazily' the zeroing."
        ),
        (
            f"Huge pages for memory files on this machine: {huge_pages_of_memory_files()} "
            "(/sys/kernel/mm/transparent_hugepage/shmem_enabled). With `advise` or `always` a page "
            "is one entry of the page tables instead of 512, and creating it is cheaper."
        ),
    )


NOT_SHOWN = (
    "A GPU: the CUDA driver has not run on one yet. kvcached's figures are another machine's.",
    "A running engine: see benchmarks/xtensor_step.",
    "Pages shared between processes, and a machine short of memory.",
)


@click.command(NAME)
@common_options(NAME)
@click.option("--pages", type=click.IntRange(min=2), help=f"[default: {NUM_PAGES}]")
@click.option("--repeats", type=click.IntRange(min=1), help=f"[default: {REPEATS}]")
def command(*, quick: bool, json_path: Path, pages: int | None, repeats: int | None) -> None:
    """What does a page of KV memory cost, created for each mapping, moved, or used again?

    Runs on the CPU driver, in seconds; needs about 0.6 GiB.
    """
    num_pages = pages or (NUM_PAGES_QUICK if quick else NUM_PAGES)
    run = schema.begin(NAME, question=QUESTION, command=command_line())
    drivers = [CpuMemoryDriver(capacity_bytes=num_pages * PAGE_BYTES) for _ in range(4)]
    reference = CreatePerMap(drivers[0], num_pages)
    moving = Pooled(drivers[1], num_pages, moving=True)
    reuse = Pooled(drivers[2], num_pages, moving=False)
    sides: list[Side] = [reference, moving, reuse, Lazy(num_pages)]
    measured = measure(
        sides, drivers[3], num_pages, repeats or (REPEATS_QUICK if quick else REPEATS)
    )
    result = run.finish(
        peers=[Peer(name=side.name, what=side.what) for side in sides],
        rows=rows(measured, reference.name),
        checks=checks(measured, reference.name, reuse),
        notes=notes(num_pages),
        not_shown=NOT_SHOWN,
    )
    for driver in drivers:
        driver.close()
    conclude(result, json_path, Console())
