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

Two locks: `_books` for what is written here, held for microseconds, and `_device` around every
call of the driver and the plan that leads to it, taken first.  Taking addresses that are still
mapped needs the books alone, so it never waits for the device.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from xllm_plugin.accelerator.memory import Fence, MemoryDriver, PageHandle
from xllm_plugin.errors import InternalError, PagesExhaustedError
from xllm_plugin.xtensor.page import Mapping as PageMapping
from xllm_plugin.xtensor.page import Page, PageState

__all__ = ["PagePool", "PoolPolicy", "PoolStatistics"]


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """How much is kept ready.

    Attributes:
        premap_pages: of the addresses expected next, how many are mapped ahead.
        keep_mapped_pages: how many pages that nobody uses stay mapped; the longest unused go first.
        idle_s: pages unused for longer go back to the system, but for those mapped ahead.
    """

    premap_pages: int = 8
    keep_mapped_pages: int = 64
    idle_s: float = 10.0


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """The pool at one moment; the counters run since it was made.

    Attributes:
        budget_pages: how many pages may be in use.
        num_by_state: pages, by `PageState.value`; every state is named.
        num_created, num_released: pages.
        num_mapped, num_unmapped: addresses.
        num_reused: addresses taken that were still mapped.
        num_premapped: addresses mapped ahead.
        num_premap_failures: times that the device refused to map ahead.
    """

    budget_pages: int
    num_by_state: Mapping[str, int]
    num_created: int
    num_released: int
    num_mapped: int
    num_unmapped: int
    num_reused: int
    num_premapped: int
    num_premap_failures: int


@dataclass(slots=True)
class _Counts:
    created: int = 0
    released: int = 0
    mapped: int = 0
    unmapped: int = 0
    reused: int = 0
    premapped: int = 0
    premap_failures: int = 0


@dataclass(slots=True)
class _Plan:
    """What the device has to do before an owner has the addresses that it asked for.

    Attributes:
        warm: mappings that are there already.
        cold: the other addresses, in order.
        going: warm mappings to take away first; their pages are promised.
        stale: stale mappings to take away first; their pages are none of the plan's matter.
        pages: for `cold`, as far as they exist; some of them are those of `going`.
        num_to_create: the rest of them.
    """

    warm: list[PageMapping] = field(default_factory=list)
    cold: list[int] = field(default_factory=list)
    going: list[PageMapping] = field(default_factory=list)
    stale: list[PageMapping] = field(default_factory=list)
    pages: list[Page] = field(default_factory=list)
    num_to_create: int = 0


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
        self._clock = clock
        self._budget_pages = _checked_budget(budget_pages)
        self._books = threading.RLock()
        self._device = threading.RLock()
        self._pages: dict[PageHandle, Page] = {}
        self._states: Counter[PageState] = Counter()
        self._mappings: dict[int, PageMapping] = {}  # by address
        self._owned: dict[Hashable, dict[int, PageMapping]] = {}
        self._free: list[Page] = []  # the last is the one used last
        self._warm: OrderedDict[int, PageMapping] = OrderedDict()  # longest unused first
        self._stale: dict[int, PageMapping] = {}  # of shared pages, nobody's, to be unmapped
        self._retired: list[tuple[Fence, list[PageMapping]]] = []
        self._expected: tuple[int, ...] = ()
        self._counts = _Counts()
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
        with self._books:
            self._raise_fault()
            self._settle()
            if all(address in self._warm for address in wanted):
                self._check_budget(len(wanted))
                self._adopt(owner, [self._promise(self._warm.pop(at)) for at in wanted])
                return len(wanted)
        with self._device:
            with self._books:
                self._settle()
                plan = self._plan(wanted)
            made = self._carry_out(plan)
            with self._books:
                self._adopt(owner, plan.warm)
                self._own(owner, made)
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
        with self._device:
            with self._books:
                self._raise_fault()
                self._settle()
                for source in shown.values():
                    if (mapping := self._mappings.get(source)) is None or mapping.owner is None:
                        raise ValueError(f"nobody uses {source:#x}, so it cannot be shared")
                there = [m for at in shown if (m := self._mappings.get(at)) is not None]
                for mapping in there:
                    self._check_unused(mapping)
                plan = _Plan()
                for mapping in there:
                    self._withdraw(mapping, plan)
            self._clear(plan)
            with self._books:
                # Owned before they are mapped: the pages stay in use, whoever retires them now.
                pages = {address: self._mappings[source].page for address, source in shown.items()}
                self._own(owner, pages)
            self._map(pages, partial(self._unshare, owner, list(pages)))

    def retire(self, owner: Hashable, addresses: Iterable[int], fence: Fence | None = None) -> None:
        """Give up what `owner` has at `addresses`; it is used again when `fence` has passed.

        Args:
            owner: who took or shared them.
            addresses: some of its addresses.
            fence: after the last work that reads or writes there; the driver's of now by default.

        Raises:
            ValueError: an address is named twice or not the owner's; nothing is given up.
        """
        with self._books:
            self._raise_fault()
            own = self._owned.get(owner, {})
            given_up = []
            for address in addresses:
                if address not in own:
                    raise ValueError(f"{owner!r} has nothing at {address:#x}")
                given_up.append(own[address])
            if len({mapping.address for mapping in given_up}) != len(given_up):
                raise ValueError("an address is named twice; name each once")
            if given_up:
                self._give_up(owner, given_up, fence or self.driver.fence())
        self.on_change()

    def drop_owner(self, owner: Hashable, fence: Fence | None = None) -> int:
        """Give up everything that `owner` has, as when it died; return how many addresses."""
        with self._device, self._books:  # behind a `take` of its that is under way
            own = list(self._owned.get(owner, ()))
            self.retire(owner, own, fence)
        return len(own)

    # The budget and what is kept ready

    @property
    def budget_pages(self) -> int:
        """How many pages may be in use at once."""
        return self._budget_pages

    def set_budget(self, budget_pages: int) -> int:
        """Change the budget; pages in use stay with their owners until they are given back.

        Returns:
            How many pages are still in use beyond it.

        Raises:
            ValueError: it is negative.
        """
        with self._books:
            self._budget_pages = _checked_budget(budget_pages)
            beyond = max(0, self._num_in_use() - budget_pages)
        self.on_change()
        return beyond

    def num_available(self) -> int:
        """How many pages `take` can give now, as far as the budget goes."""
        with self._books:
            self._settle()
            return max(0, self._budget_pages - self._num_in_use())

    def expect(self, addresses: Iterable[int]) -> None:
        """Say which addresses will be taken next, in order; this replaces what was said before."""
        with self._books:
            self._expected = tuple(dict.fromkeys(addresses))
        self.on_change()

    def is_mapped(self, address: int) -> bool:
        """Say whether taking the address needs nothing of the device at this moment."""
        return address in self._warm

    def evict(self, num_pages: int) -> int:
        """Unmap up to so many pages that nobody uses, the longest unused first; return how many."""
        with self._device:
            with self._books:
                self._settle()
                plan = self._withdrawn(list(self._warm.values())[:num_pages])
            self._clear(plan)
        return len(plan.going)

    def maintain(self) -> None:
        """Do one round of what is not urgent: unmap, release, map ahead.

        Raises:
            PagesExhaustedError: the device cannot unmap for want of memory; later it may.
        """
        with self._device:
            with self._books:
                self._settle()
                plan = self._withdrawn(self._cooled())
            self._clear(plan)
            self._release_surplus()
            self._premap()

    def close(self) -> None:
        """Give every page back to the device.

        Raises:
            InternalError: a page is in use, or waits for its fence.
        """
        with self._device:
            with self._books:
                self._settle()
                if self._num_in_use():
                    raise InternalError(f"{self._num_in_use()} pages are in use; retire them first")
                self._expected = ()
                plan = self._withdrawn([*self._stale.values(), *self._warm.values()])
            self._clear(plan)
            with self._books:
                going = self._forget(list(self._free))
            self.driver.release(going)

    def fail(self, error: BaseException) -> None:
        """Tell that the keeper has met `error`; `take`, `share` and `retire` raise it from then."""
        with self._books:
            self._fault = error

    # What can be seen

    def page_at(self, address: int) -> PageHandle | None:
        """The page that shows at an address, or None."""
        mapping = self._mappings.get(address)
        return None if mapping is None else mapping.page.handle

    def addresses_of(self, owner: Hashable) -> set[int]:
        """Where an owner has pages."""
        with self._books:
            return set(self._owned.get(owner, ()))

    def statistics(self) -> PoolStatistics:
        """Count the pages."""
        with self._books:
            counts = self._counts
            return PoolStatistics(
                budget_pages=self._budget_pages,
                num_by_state={state.value: self._states[state] for state in PageState},
                num_created=counts.created,
                num_released=counts.released,
                num_mapped=counts.mapped,
                num_unmapped=counts.unmapped,
                num_reused=counts.reused,
                num_premapped=counts.premapped,
                num_premap_failures=counts.premap_failures,
            )

    def check_integrity(self) -> None:
        """Check the rules above.

        Raises:
            InternalError: one is broken; the message says which and where.
        """
        with self._device, self._books:
            for problem in self._problems():
                raise InternalError(f"page pool: {problem}; please report this with the log")

    # Inside, with the books locked

    def _problems(self) -> Iterable[str]:
        if Counter(page.state for page in self._pages.values()) != +self._states:
            yield "the states are counted wrong"
        listed = [mapping for page in self._pages.values() for mapping in page.mappings]
        if len(listed) != len(self._mappings):
            yield f"{len(listed)} mappings of pages, {len(self._mappings)} of addresses"
        waiting = {id(m) for _, batch in self._retired for m in batch}
        for page in self._pages.values():
            if _derived_state(page, self._warm) is not page.state:
                yield f"page {page.handle} is {page.state.value}, but its mappings say otherwise"
        for mapping in listed:
            if self._mappings.get(mapping.address) is not mapping:
                yield f"{mapping.address:#x} shows another page than its own"
            own = self._owned.get(mapping.owner, {}) if mapping.owner is not None else {}
            kinds = (
                own.get(mapping.address) is mapping,
                id(mapping) in waiting and mapping.fence is not None,
                self._warm.get(mapping.address) is mapping,
                self._stale.get(mapping.address) is mapping,
            )
            if sum(kinds) != 1:
                yield f"{mapping.address:#x} is owned, waiting, warm and stale: {kinds}"
        if sorted(page.handle for page in self._free) != sorted(
            page.handle for page in self._pages.values() if page.state is PageState.FREE
        ):
            yield "the list of free pages is not that of pages in the state Free"
        if sum(map(len, self._owned.values())) != sum(m.owner is not None for m in listed):
            yield "an owner has what is not mapped"

    def _num_in_use(self) -> int:
        return sum(
            self._states[state]
            for state in (PageState.ALLOCATED, PageState.MAPPED, PageState.RETIRED)
        )

    def _move(self, page: Page, state: PageState) -> None:
        before = page.state
        page.becomes(state)
        self._states[before] -= 1
        self._states[state] += 1

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise InternalError(
                f"the keeper of the page pool has ended: {self._fault!r}; restart the engine and "
                "report this with the log"
            ) from self._fault

    def _check_budget(self, num_pages: int) -> None:
        left = self._budget_pages - self._num_in_use()
        if num_pages > left:
            raise PagesExhaustedError(
                f"{num_pages} pages asked for, {max(0, left)} left of a budget of "
                f"{self._budget_pages}, {self._states[PageState.RETIRED]} of them waiting for work "
                "to end; try again when a request has ended, or raise the budget."
            )

    def _check_unused(self, mapping: PageMapping) -> None:
        if mapping.owner is not None:
            raise ValueError(f"{mapping.address:#x} is in use by {mapping.owner!r}")
        if mapping.fence is not None:
            raise PagesExhaustedError(
                f"work launched earlier may still read at {mapping.address:#x}; try again when it "
                "is done, or take another address."
            )

    def _settle(self) -> None:
        """Look which fences have passed; what they held back is nobody's from now on."""
        waiting: list[tuple[Fence, list[PageMapping]]] = []
        for fence, batch in self._retired:
            if fence.is_done():
                for mapping in batch:
                    self._settled(mapping)
            else:
                waiting.append((fence, batch))
        self._retired = waiting

    def _settled(self, mapping: PageMapping) -> None:
        page = mapping.page
        mapping.fence = None
        if page.state is PageState.RETIRED and all(m.fence is None for m in page.mappings):
            self._move(page, PageState.REUSABLE)
            self._warm[mapping.address] = mapping
        else:
            # Others use the page: whoever takes this address next must not get it.
            self._stale[mapping.address] = mapping

    def _give_up(self, owner: Hashable, given_up: list[PageMapping], fence: Fence) -> None:
        now_s = self._clock()
        own = self._owned[owner]
        for mapping in given_up:
            del own[mapping.address]
            mapping.owner, mapping.fence, mapping.idle_since_s = None, fence, now_s
            mapping.page.idle_since_s = now_s
            if all(other.owner is None for other in mapping.page.mappings):
                self._move(mapping.page, PageState.RETIRED)
        if not own:
            del self._owned[owner]
        self._retired.append((fence, given_up))
        self._settle()

    def _promise(self, mapping: PageMapping) -> PageMapping:
        self._move(mapping.page, PageState.ALLOCATED)
        return mapping

    def _withdrawn(self, mappings: Iterable[PageMapping]) -> _Plan:
        plan = _Plan()
        for mapping in mappings:
            self._withdraw(mapping, plan)
        return plan

    def _withdraw(self, mapping: PageMapping, plan: _Plan) -> None:
        """Note in the plan that a mapping goes; with a warm one goes all else its page shows at."""
        if self._stale.pop(mapping.address, None) is not None:
            plan.stale.append(mapping)
        elif self._warm.pop(mapping.address, None) is not None:
            plan.going.append(self._promise(mapping))
            for other in mapping.page.mappings:
                if self._stale.pop(other.address, None) is not None:
                    plan.stale.append(other)

    def _plan(self, wanted: Sequence[int]) -> _Plan:
        """Choose pages and mappings; nothing is changed if it raises."""
        found = {address: self._mappings.get(address) for address in wanted}
        for mapping in found.values():
            if mapping is not None:
                self._check_unused(mapping)
        self._check_budget(len(wanted))
        plan = _Plan(cold=sorted(address for address in wanted if address not in self._warm))
        plan.warm = [self._promise(self._warm.pop(at)) for at in wanted if at in self._warm]
        for address in plan.cold:
            if (mapping := found[address]) is not None:
                self._withdraw(mapping, plan)
        # Pages that are mapped where nobody wants them come before new ones: memory stays small.
        num_short = len(plan.cold) - len(self._free)
        for mapping in list(self._warm.values())[: max(0, num_short)]:
            self._withdraw(mapping, plan)
        num_free = min(len(plan.cold), len(self._free))
        plan.pages = [*self._popped_free(num_free), *(mapping.page for mapping in plan.going)]
        plan.num_to_create = len(plan.cold) - len(plan.pages)
        return plan

    def _popped_free(self, num_pages: int) -> list[Page]:
        if not num_pages:
            return []
        pages = self._free[-num_pages:]
        del self._free[-num_pages:]
        for page in pages:
            self._move(page, PageState.ALLOCATED)
        return pages

    def _freed(self, page: Page) -> None:
        self._move(page, PageState.FREE)
        self._free.append(page)

    def _adopt(self, owner: Hashable, warm: Iterable[PageMapping]) -> None:
        for mapping in warm:
            self._move(mapping.page, PageState.MAPPED)
            mapping.owner = owner
            self._owned.setdefault(owner, {})[mapping.address] = mapping
            self._counts.reused += 1

    def _own(self, owner: Hashable, placed: Mapping[int, Page]) -> None:
        for address, page in placed.items():
            mapping = self._noted(address, page)
            mapping.owner = owner
            self._owned.setdefault(owner, {})[address] = mapping
            if page.state is not PageState.MAPPED:
                self._move(page, PageState.MAPPED)

    def _unshare(self, owner: Hashable, addresses: Iterable[int]) -> None:
        """Undo `_own` for pages that others had, and may have given up since."""
        with self._books:
            for address in addresses:
                mapping = self._mappings.pop(address)
                page = mapping.page
                page.mappings.remove(mapping)
                del self._owned[owner][address]
                if all(other.owner is None for other in page.mappings):
                    self._move(page, PageState.RETIRED)
                    if all(other.fence is None for other in page.mappings):
                        self._settled(self._stale.pop(page.mappings[-1].address))
            if not self._owned[owner]:
                del self._owned[owner]

    def _noted(self, address: int, page: Page) -> PageMapping:
        mapping = PageMapping(address, page, idle_since_s=self._clock())
        self._mappings[address] = mapping
        page.mappings.append(mapping)
        return mapping

    def _cooled(self) -> list[PageMapping]:
        """What nobody uses and need not stay mapped: stale, too many, too long unused."""
        ahead = set(self._expected[: self.policy.premap_pages])
        kept = [mapping for at, mapping in self._warm.items() if at not in ahead]
        num_beyond = max(
            len(kept) - self.policy.keep_mapped_pages,
            len(self._pages) - len(self._free) - self._budget_pages,
        )
        oldest_s = self._clock() - self.policy.idle_s
        going = [m for at, m in enumerate(kept) if at < num_beyond or m.idle_since_s <= oldest_s]
        if num_beyond > len(kept):  # the budget goes before what is mapped ahead
            going += [m for at, m in self._warm.items() if at in ahead][: num_beyond - len(kept)]
        return [*self._stale.values(), *going]

    def _forget(self, going: Collection[Page]) -> list[PageHandle]:
        """Strike free pages off the books."""
        for page in going:
            del self._pages[page.handle]
        self._free = [page for page in self._free if page.handle in self._pages]
        self._states[PageState.FREE] -= len(going)
        self._counts.released += len(going)
        return [page.handle for page in going]

    # Inside, with the device locked: each of these calls the driver

    def _carry_out(self, plan: _Plan) -> dict[int, Page]:
        """Do what a plan says; if the device fails, every page is free or warm again."""
        self._clear(plan)
        with _or_undo(partial(self._take_back, plan)):
            handles = self.driver.create(plan.num_to_create) if plan.num_to_create else []
        with self._books:
            now_s = self._clock()
            for handle in handles:
                page = Page(handle, PageState.ALLOCATED, idle_since_s=now_s)
                self._pages[handle] = page
                self._states[PageState.ALLOCATED] += 1
                plan.pages.append(page)
            self._counts.created += len(handles)
        # Neighbours in the device's memory at neighbouring addresses: it can do them in one.
        plan.pages.sort(key=lambda page: page.handle)
        made = dict(zip(plan.cold, plan.pages, strict=True))
        self._map(made, partial(self._take_back, plan))
        return made

    def _clear(self, plan: _Plan) -> None:
        """Unmap what is to go; pages that the plan has no use for become free."""
        surplus = [*plan.going, *plan.stale]
        if not surplus:
            return
        with _or_undo(partial(self._restore, plan)):
            self.driver.unmap([mapping.address for mapping in surplus])
        promised = {page.handle for page in plan.pages}
        with self._books:
            for mapping in surplus:
                del self._mappings[mapping.address]
                mapping.page.mappings.remove(mapping)
            for mapping in plan.going:
                if mapping.page.handle not in promised:
                    self._freed(mapping.page)
            self._counts.unmapped += len(surplus)

    def _map(self, placed: Mapping[int, Page], undo: Callable[[], None]) -> None:
        if not placed:
            return
        with _or_undo(undo):
            self.driver.map({address: page.handle for address, page in placed.items()})
        with self._books:
            self._counts.mapped += len(placed)

    def _restore(self, plan: _Plan) -> None:
        """Undo a plan of which nothing was done."""
        with self._books:
            for mapping in plan.going:
                self._move(mapping.page, PageState.REUSABLE)
                self._warm[mapping.address] = mapping
                self._warm.move_to_end(mapping.address, last=False)
            for mapping in plan.stale:
                self._stale[mapping.address] = mapping
            plan.pages = [page for page in plan.pages if page.state is PageState.ALLOCATED]
            self._take_back(plan)

    def _take_back(self, plan: _Plan) -> None:
        """Give up a plan after its surplus is gone."""
        with self._books:
            for mapping in plan.warm:
                self._move(mapping.page, PageState.REUSABLE)
                self._warm[mapping.address] = mapping
            for page in plan.pages:
                self._freed(page)

    def _release_surplus(self) -> None:
        """Release free pages beyond the budget, and those unused for long."""
        with self._books:
            oldest_s = self._clock() - self.policy.idle_s
            num_beyond = max(0, len(self._pages) - self._budget_pages)
            by_age = sorted(self._free, key=lambda page: page.idle_since_s)
            going = self._forget(
                [p for at, p in enumerate(by_age) if at < num_beyond or p.idle_since_s <= oldest_s]
            )
        if going:
            self.driver.release(going)

    def _premap(self) -> None:
        """Map the addresses expected next, as far as pages can be had without taking any away."""
        with self._books:
            ahead = self._expected[: self.policy.premap_pages]
            cold = [address for address in ahead if address not in self._mappings]
            room = self._budget_pages - len(self._pages) + len(self._free)
            plan = _Plan(cold=sorted(cold[: max(0, room)]))
            plan.pages = self._popped_free(min(len(plan.cold), len(self._free)))
            plan.num_to_create = len(plan.cold) - len(plan.pages)
        try:
            made = self._carry_out(plan)
        except PagesExhaustedError:
            # Only something that would have been early is not: `take` will ask again.
            with self._books:
                self._counts.premap_failures += 1
                self._expected = ()
            return
        with self._books:
            for address, page in made.items():
                mapping = self._noted(address, page)
                self._move(page, PageState.REUSABLE)
                self._warm[address] = mapping
            self._counts.premapped += len(made)


def _checked_budget(num_pages: int) -> int:
    if num_pages < 0:
        raise ValueError(f"a budget of {num_pages} pages; give zero or more")
    return num_pages


@contextmanager
def _or_undo(undo: Callable[[], None]) -> Iterator[None]:
    """Undo when the device fails; its lack of memory is "not now" to the pool's callers."""
    try:
        yield
    except MemoryError as error:
        undo()
        raise PagesExhaustedError(
            f"the device has no memory for it: {error}; try again when a request has ended, or "
            "lower the budget."
        ) from error
    except BaseException:
        undo()
        raise


def _derived_state(page: Page, warm: Collection[int]) -> PageState:
    """The state that a page's mappings imply, while no call is under way."""
    if not page.mappings:
        return PageState.FREE
    if any(mapping.owner is not None for mapping in page.mappings):
        return PageState.MAPPED
    if any(mapping.fence is not None for mapping in page.mappings):
        return PageState.RETIRED
    assert any(mapping.address in warm for mapping in page.mappings)
    return PageState.REUSABLE
