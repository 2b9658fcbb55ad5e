"""`PagePool`: physical pages, created once and used again, under a budget that may change.

Creating a page is what costs (CUDA: 193 of 231 us for create, map and access, by the table in
kvcached's benchmarks/bench_vmm; a CPU's system zeroes it).  So the pool keeps pages when their
owner is done, and mapped while it can: whoever takes the same address next has the page at once.

Rules that hold at every moment, and that `check_integrity` checks:

1. A page is in one state (`PageState`), and its mappings agree with it.
2. An address shows at most one page and has at most one owner.  A page has several owners only by
   `share`.
3. Pages in use (allocated, mapped, retired) are never more than the budget, except those that were
   in use when it shrank.
4. A page that work may still read is neither unmapped nor given away: it waits for its fence.

Two locks: `_lock` for what is written down (`PoolBooks`), held for microseconds, and `_device`
around every call of the driver and the plan that leads to it, taken first.  Taking addresses that
are still mapped needs the former alone, so it never waits for the device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from xllm_plugin.accelerator.memory import Fence, MemoryDriver, PageHandle
from xllm_plugin.errors import InternalError, NotNowError, PagesExhaustedError
from xllm_plugin.xtensor.page import Page
from xllm_plugin.xtensor.pool_books import Plan, PoolBooks, PoolPolicy, PoolStatistics

__all__ = ["PagePool", "PoolPolicy", "PoolStatistics"]


class PagePool:
    """Owns every page of a driver; see the module for the rules.

    Args:
        driver: the device's memory.  Nobody else creates, maps or unmaps with it.
        budget_pages: how many pages may be in use at once.
        policy: how much is kept ready.
        clock: seconds, monotonic.

    Safe between threads.
    """

    def __init__(
        self,
        driver: MemoryDriver,
        *,
        budget_pages: int,
        policy: PoolPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.driver = driver
        self.policy = policy or PoolPolicy()
        self._books = PoolBooks(budget_pages, clock)
        self._clock = clock
        self._lock = threading.RLock()
        self._device = threading.RLock()
        self._expected: tuple[int, ...] = ()
        self._fault: BaseException | None = None
        self.on_change: Callable[[], None] = lambda: None
        """Called when `maintain` has work to do; a keeper sets it."""

    # Taking and giving back

    def take(self, owner: Hashable, addresses: Iterable[int]) -> int:
        """Put a page of `owner`'s own behind every address; contents are undefined.

        All or nothing: after an error the owner has what it had before, and no page is lost.

        Returns:
            How many of the addresses were still mapped.

        Raises:
            PagesExhaustedError: the budget or the device has fewer pages, or work that was launched
                before may still read at one of the addresses; later it may go.
            ValueError: an address is named twice, in use, or not reserved.
        """
        wanted = list(addresses)
        if len(set(wanted)) != len(wanted):
            raise ValueError("an address is named twice; name each once")
        with self._lock:
            self._raise_fault()
            self._books.settle()
            books = self._books
            if all(address in books.warm for address in wanted):
                books.check_budget(len(wanted))
                books.adopt(owner, [books.promise(books.warm.pop(at)) for at in wanted])
                return len(wanted)
        with self._device:
            with self._lock:
                self._books.settle()
                plan = self._books.plan(wanted)
            made = self._carry_out(plan)
            with self._lock:
                self._books.adopt(owner, plan.warm)
                self._books.own(owner, made)
        return len(plan.warm)

    def share(self, owner: Hashable, shown: Mapping[int, int]) -> None:
        """Show pages that are in use at further addresses, for `owner`.

        Args:
            owner: of the new addresses; it may own the old ones too.
            shown: new address -> an address in use that shows the page.

        Raises:
            PagesExhaustedError: the device has no memory for the mappings, or work that was
                launched before may still read at one of the new addresses.
            ValueError: nobody uses an old address, or somebody a new one, or a new one is not
                reserved.
        """
        books = self._books
        with self._device:
            with self._lock:
                self._raise_fault()
                books.settle()
                for source in shown.values():
                    if (mapping := books.mappings.get(source)) is None or mapping.owner is None:
                        raise ValueError(f"nobody uses {source:#x}, so it cannot be shared")
                there = [m for at in shown if (m := books.mappings.get(at)) is not None]
                for mapping in there:
                    books.check_unused(mapping)
                plan = books.withdrawn(there)
            self._clear(plan)
            with self._lock:
                # Owned before they are mapped: the pages stay in use, whoever retires them now.
                pages = {address: books.mappings[source].page for address, source in shown.items()}
                books.own(owner, pages)
            self._map(pages, partial(books.unshare, owner, list(pages)))

    def retire(self, owner: Hashable, addresses: Iterable[int], fence: Fence | None = None) -> None:
        """Give up what `owner` has at `addresses`; it is used again when `fence` has passed.

        Args:
            owner: who took or shared them.
            addresses: some of its addresses.
            fence: after the last work that reads or writes there; the driver's of now by default.

        Raises:
            ValueError: an address is named twice or not the owner's; nothing is given up.
        """
        with self._lock:
            self._raise_fault()
            own = self._books.owned.get(owner, {})
            given_up = []
            for address in addresses:
                if address not in own:
                    raise ValueError(f"{owner!r} has nothing at {address:#x}")
                given_up.append(own[address])
            if len({mapping.address for mapping in given_up}) != len(given_up):
                raise ValueError("an address is named twice; name each once")
            if given_up:
                self._books.give_up(owner, given_up, fence or self.driver.fence())
        self.on_change()

    def drop_owner(self, owner: Hashable, fence: Fence | None = None) -> int:
        """Give up everything that `owner` has, as when it died; return how many addresses."""
        with self._device, self._lock:  # behind a `take` of its that is under way
            own = list(self._books.owned.get(owner, ()))
            self.retire(owner, own, fence)
        return len(own)

    # The budget and what is kept ready

    @property
    def budget_pages(self) -> int:
        """How many pages may be in use at once."""
        return self._books.budget_pages

    def set_budget(self, budget_pages: int) -> int:
        """Change the budget; pages in use stay with their owners until they are given back.

        Returns:
            How many pages are still in use beyond it.

        Raises:
            ValueError: it is negative.
        """
        with self._lock:
            self._books.set_budget(budget_pages)
            beyond = max(0, self._books.num_in_use() - budget_pages)
        self.on_change()
        return beyond

    def num_available(self) -> int:
        """How many pages `take` can give now, as far as the budget goes."""
        with self._lock:
            self._books.settle()
            return self._books.available()

    def expect(self, addresses: Iterable[int]) -> None:
        """Say which addresses will be taken next, in order; this replaces what was said before."""
        with self._lock:
            self._expected = tuple(dict.fromkeys(addresses))
        self.on_change()

    def is_mapped(self, address: int) -> bool:
        """Say whether taking the address needs nothing of the device at this moment."""
        return address in self._books.warm

    def evict(self, num_pages: int) -> int:
        """Unmap up to so many pages that nobody uses, the longest unused first; return how many."""
        with self._device:
            with self._lock:
                self._books.settle()
                plan = self._books.withdrawn(list(self._books.warm.values())[:num_pages])
            self._clear(plan)
        return len(plan.going)

    def maintain(self) -> None:
        """Do one round of what is not urgent: unmap, release, map ahead.

        Raises:
            NotNowError: the device cannot unmap for want of memory, or takes no page back; later it
                may.
        """
        with self._device:
            with self._lock:
                self._books.settle()
                plan = self._books.withdrawn(self._books.cooled(self.policy, self._expected))
                keep = self._books.budget_pages > 0
            self._clear(plan, keep=keep)
            self._release_surplus()
            self._premap()

    def close(self) -> None:
        """Give every page back to the device.

        Raises:
            InternalError: a page is in use, or waits for its fence.
        """
        with self._device:
            with self._lock:
                books = self._books
                books.settle()
                if num_in_use := books.num_in_use():
                    raise InternalError(f"{num_in_use} pages are in use; retire them first")
                self._expected = ()
                plan = books.withdrawn([*books.stale.values(), *books.warm.values()])
            self._clear(plan)
            with self._lock:
                going = self._books.forget(list(self._books.free))
            self.driver.release(going)

    def fail(self, error: BaseException) -> None:
        """Tell that the keeper has met `error`; `take`, `share` and `retire` raise it from then."""
        with self._lock:
            self._fault = error

    # What can be seen

    def page_at(self, address: int) -> PageHandle | None:
        """The page that shows at an address, or None."""
        mapping = self._books.mappings.get(address)
        return None if mapping is None else mapping.page.handle

    def addresses_of(self, owner: Hashable) -> set[int]:
        """Where an owner has pages."""
        with self._lock:
            return set(self._books.owned.get(owner, ()))

    def statistics(self) -> PoolStatistics:
        """Count the pages."""
        with self._lock:
            return self._books.statistics()

    def check_integrity(self) -> None:
        """Check the rules above.

        Raises:
            InternalError: one is broken; the message says which and where.
        """
        with self._device, self._lock:
            for problem in self._books.problems():
                raise InternalError(f"page pool: {problem}; please report this with the log")

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise InternalError(
                f"the keeper of the page pool has ended: {self._fault!r}; restart the engine and "
                "report this with the log"
            ) from self._fault

    # Inside, with the device locked: each of these calls the driver

    def _carry_out(self, plan: Plan) -> dict[int, Page]:
        """Do what a plan says; if the device fails, every page is free or warm again."""
        self._clear(plan)
        with self._or_undo(partial(self._books.take_back, plan)):
            handles = self.driver.create(plan.num_to_create) if plan.num_to_create else []
        with self._lock:
            plan.pages += self._books.created(handles)
        # Neighbours in the device's memory at neighbouring addresses: it can do them in one.
        plan.pages.sort(key=lambda page: page.handle)
        made = dict(zip(plan.cold, plan.pages, strict=True))
        self._map(made, partial(self._books.take_back, plan))
        return made

    def _clear(self, plan: Plan, *, keep: bool = True) -> None:
        """Unmap what is to go; `keep` as in `MemoryDriver.unmap`."""
        surplus = [*plan.going, *plan.stale]
        if not surplus:
            return
        started_s = self._clock()
        with self._or_undo(partial(self._books.restore, plan)):
            self.driver.unmap([mapping.address for mapping in surplus], keep=keep)
        took_s = self._clock() - started_s
        with self._lock:
            self._books.cleared(plan)
            self._books.counts.unmap_calls += 1
            self._books.counts.unmap_s += took_s

    def _map(self, placed: Mapping[int, Page], undo: Callable[[], None]) -> None:
        if not placed:
            return
        started_s = self._clock()
        with self._or_undo(undo):
            self.driver.map({address: page.handle for address, page in placed.items()})
        took_s = self._clock() - started_s
        with self._lock:
            self._books.counts.mapped += len(placed)
            self._books.counts.map_calls += 1
            self._books.counts.map_s += took_s

    def _release_surplus(self) -> None:
        # Only here do free pages go, and only with the device locked are they taken: what is
        # surplus stays so until it is struck off, after the device has taken it.
        with self._lock:
            going = self._books.surplus(self.policy.idle_s)
        if not going:
            return
        try:
            self.driver.release([page.handle for page in going])
        except MemoryError as error:
            raise NotNowError(
                f"{error}; they are kept, to be used again or given back later. Try again."
            ) from error
        with self._lock:
            self._books.forget(going)

    def _premap(self) -> None:
        """Map the addresses expected next."""
        with self._lock:
            plan = self._books.premap_plan(self._expected[: self.policy.premap_pages])
        try:
            made = self._carry_out(plan)
        except PagesExhaustedError:
            # Only something that would have been early is not: `take` will ask again.
            with self._lock:
                self._books.counts.premap_failures += 1
                self._expected = ()
            return
        with self._lock:
            self._books.premapped(made)

    @contextmanager
    def _or_undo(self, undo: Callable[[], None]) -> Iterator[None]:
        """Undo when the device fails; its lack of memory is "not now" to the pool's callers.

        Args:
            undo: in the books, which are locked for it.
        """
        try:
            yield
        except BaseException as error:
            with self._lock:
                undo()
            if isinstance(error, MemoryError):
                raise PagesExhaustedError(
                    f"the device has no memory for it: {error}; try again when a request has "
                    "ended, or lower the budget."
                ) from error
            raise
