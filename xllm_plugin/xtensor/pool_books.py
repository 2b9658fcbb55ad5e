"""`PoolBooks`: which page is where, whose it is, and what the device is to do about it.

What `PagePool` writes down, without the device and without a lock: the pool holds its lock around
every call, and none takes longer than the pages concerned.  A *warm* mapping is one that is kept
though nobody uses it; a *stale* one shows a page that others use, and only waits to be unmapped.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from xllm_plugin.accelerator.memory import Fence, PageHandle
from xllm_plugin.errors import PagesExhaustedError
from xllm_plugin.xtensor.page import Mapping as PageMapping
from xllm_plugin.xtensor.page import Page, PageState

__all__ = ["Plan", "PoolBooks", "PoolPolicy", "PoolStatistics"]


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
        num_map_calls, num_unmap_calls: of the device; each does several addresses.
        map_s, unmap_s: they took, whoever waited for them.
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
    num_map_calls: int
    num_unmap_calls: int
    map_s: float
    unmap_s: float


@dataclass(slots=True)
class Counts:
    """Totals since the pool was made; `PoolStatistics` says of what."""

    created: int = 0
    released: int = 0
    mapped: int = 0
    unmapped: int = 0
    reused: int = 0
    premapped: int = 0
    premap_failures: int = 0
    map_calls: int = 0
    unmap_calls: int = 0
    map_s: float = 0.0
    unmap_s: float = 0.0


@dataclass(slots=True)
class Plan:
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


class PoolBooks:
    """See the module; the rules are those of `PagePool`.

    Args:
        budget_pages: how many pages may be in use at once.
        clock: seconds, monotonic.

    Raises:
        ValueError: the budget is negative.
    """

    def __init__(self, budget_pages: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.set_budget(budget_pages)
        self.pages: dict[PageHandle, Page] = {}
        self.states: Counter[PageState] = Counter()
        self.mappings: dict[int, PageMapping] = {}  # by address
        self.owned: dict[Hashable, dict[int, PageMapping]] = {}
        self.free: list[Page] = []  # the last is the one used last
        self.warm: OrderedDict[int, PageMapping] = OrderedDict()  # longest unused first
        self.stale: dict[int, PageMapping] = {}
        self.retired: list[tuple[Fence, list[PageMapping]]] = []
        self.counts = Counts()

    # The budget

    def set_budget(self, budget_pages: int) -> None:
        """Change it.  Raises `ValueError` for a negative one."""
        if budget_pages < 0:
            raise ValueError(f"a budget of {budget_pages} pages; give zero or more")
        self.budget_pages = budget_pages

    def num_in_use(self) -> int:
        """Pages that count against the budget."""
        return sum(
            self.states[state]
            for state in (PageState.ALLOCATED, PageState.MAPPED, PageState.RETIRED)
        )

    def available(self) -> int:
        """How many pages the budget has left."""
        return max(0, self.budget_pages - self.num_in_use())

    def check_budget(self, num_pages: int) -> None:
        """Raise `PagesExhaustedError` unless the budget has so many pages left."""
        left = self.budget_pages - self.num_in_use()
        if num_pages > left:
            raise PagesExhaustedError(
                f"{num_pages} pages asked for, {max(0, left)} left of a budget of "
                f"{self.budget_pages}, {self.states[PageState.RETIRED]} of them waiting for work "
                "to end; try again when a request has ended, or raise the budget."
            )

    # Plans for the device, and what came of them

    def plan(self, wanted: Sequence[int]) -> Plan:
        """Choose pages and mappings; nothing is changed if it raises."""
        found = {address: self.mappings.get(address) for address in wanted}
        for mapping in found.values():
            if mapping is not None:
                self.check_unused(mapping)
        self.check_budget(len(wanted))
        plan = Plan(cold=sorted(address for address in wanted if address not in self.warm))
        plan.warm = [self.promise(self.warm.pop(at)) for at in wanted if at in self.warm]
        for address in plan.cold:
            if (mapping := found[address]) is not None:
                self.withdraw(mapping, plan)
        # Pages that are mapped where nobody wants them come before new ones: memory stays small.
        num_short = len(plan.cold) - len(self.free)
        for mapping in list(self.warm.values())[: max(0, num_short)]:
            self.withdraw(mapping, plan)
        num_free = min(len(plan.cold), len(self.free))
        plan.pages = [*self.pop_free(num_free), *(mapping.page for mapping in plan.going)]
        plan.num_to_create = len(plan.cold) - len(plan.pages)
        return plan

    def withdrawn(self, mappings: Iterable[PageMapping]) -> Plan:
        """A plan to be rid of mappings that nobody uses."""
        plan = Plan()
        for mapping in mappings:
            self.withdraw(mapping, plan)
        return plan

    def withdraw(self, mapping: PageMapping, plan: Plan) -> None:
        """Note in the plan that a mapping goes; with a warm one goes all else its page shows at."""
        if self.stale.pop(mapping.address, None) is not None:
            plan.stale.append(mapping)
        elif self.warm.pop(mapping.address, None) is not None:
            plan.going.append(self.promise(mapping))
            for other in mapping.page.mappings:
                if self.stale.pop(other.address, None) is not None:
                    plan.stale.append(other)

    def premap_plan(self, ahead: Sequence[int]) -> Plan:
        """Map addresses as far as pages can be had without taking any away."""
        cold = [address for address in ahead if address not in self.mappings]
        room = self.budget_pages - len(self.pages) + len(self.free)
        plan = Plan(cold=sorted(cold[: max(0, room)]))
        plan.pages = self.pop_free(min(len(plan.cold), len(self.free)))
        plan.num_to_create = len(plan.cold) - len(plan.pages)
        return plan

    def created(self, handles: Collection[PageHandle]) -> list[Page]:
        """Enter new pages, promised to whoever had them made."""
        now_s = self._clock()
        pages = [Page(handle, PageState.ALLOCATED, idle_since_s=now_s) for handle in handles]
        self.pages.update((page.handle, page) for page in pages)
        self.states[PageState.ALLOCATED] += len(pages)
        self.counts.created += len(pages)
        return pages

    def cleared(self, plan: Plan) -> None:
        """Note that what is to go is unmapped; pages that the plan has no use for become free."""
        promised = {page.handle for page in plan.pages}
        for mapping in (*plan.going, *plan.stale):
            del self.mappings[mapping.address]
            mapping.page.mappings.remove(mapping)
        for mapping in plan.going:
            if mapping.page.handle not in promised:
                self.freed(mapping.page)
        self.counts.unmapped += len(plan.going) + len(plan.stale)

    def restore(self, plan: Plan) -> None:
        """Undo a plan of which nothing was done."""
        for mapping in plan.going:
            self._move(mapping.page, PageState.REUSABLE)
            self.warm[mapping.address] = mapping
            self.warm.move_to_end(mapping.address, last=False)
        for mapping in plan.stale:
            self.stale[mapping.address] = mapping
        plan.pages = [page for page in plan.pages if page.state is PageState.ALLOCATED]
        self.take_back(plan)

    def take_back(self, plan: Plan) -> None:
        """Give up a plan after its surplus is gone."""
        for mapping in plan.warm:
            self._move(mapping.page, PageState.REUSABLE)
            self.warm[mapping.address] = mapping
        for page in plan.pages:
            self.freed(page)

    # Owners

    def check_unused(self, mapping: PageMapping) -> None:
        """Raise unless nobody uses the address: `ValueError`, or what `PagePool.take` says."""
        if mapping.owner is not None:
            raise ValueError(f"{mapping.address:#x} is in use by {mapping.owner!r}")
        if mapping.fence is not None:
            raise PagesExhaustedError(
                f"work launched earlier may still read at {mapping.address:#x}; try again when it "
                "is done, or take another address."
            )

    def promise(self, mapping: PageMapping) -> PageMapping:
        """Keep a warm mapping's page from everybody else."""
        self._move(mapping.page, PageState.ALLOCATED)
        return mapping

    def adopt(self, owner: Hashable, warm: Iterable[PageMapping]) -> None:
        """Give promised mappings to an owner as they are."""
        for mapping in warm:
            self._move(mapping.page, PageState.MAPPED)
            mapping.owner = owner
            self.owned.setdefault(owner, {})[mapping.address] = mapping
            self.counts.reused += 1

    def own(self, owner: Hashable, placed: Mapping[int, Page]) -> None:
        """Note pages as an owner's, each at its address."""
        for address, page in placed.items():
            mapping = self._noted(address, page)
            mapping.owner = owner
            self.owned.setdefault(owner, {})[address] = mapping
            if page.state is not PageState.MAPPED:
                self._move(page, PageState.MAPPED)

    def unshare(self, owner: Hashable, addresses: Iterable[int]) -> None:
        """Undo `own` for pages that others had, and may have given up since."""
        for address in addresses:
            mapping = self.mappings.pop(address)
            page = mapping.page
            page.mappings.remove(mapping)
            del self.owned[owner][address]
            if all(other.owner is None for other in page.mappings):
                self._move(page, PageState.RETIRED)
                if all(other.fence is None for other in page.mappings):
                    self._settled(self.stale.pop(page.mappings[-1].address))
        if not self.owned[owner]:
            del self.owned[owner]

    def give_up(self, owner: Hashable, given_up: list[PageMapping], fence: Fence) -> None:
        """Take mappings from their owner; `fence` holds them back."""
        now_s = self._clock()
        own = self.owned[owner]
        for mapping in given_up:
            del own[mapping.address]
            mapping.owner, mapping.fence, mapping.idle_since_s = None, fence, now_s
            mapping.page.idle_since_s = now_s
            if all(other.owner is None for other in mapping.page.mappings):
                self._move(mapping.page, PageState.RETIRED)
        if not own:
            del self.owned[owner]
        self.retired.append((fence, given_up))
        self.settle()

    def settle(self) -> None:
        """Look which fences have passed; what they held back is nobody's from now on."""
        waiting: list[tuple[Fence, list[PageMapping]]] = []
        for fence, batch in self.retired:
            if fence.is_done():
                for mapping in batch:
                    self._settled(mapping)
            else:
                waiting.append((fence, batch))
        self.retired = waiting

    def _settled(self, mapping: PageMapping) -> None:
        page = mapping.page
        mapping.fence = None
        if page.state is PageState.RETIRED and all(m.fence is None for m in page.mappings):
            self._move(page, PageState.REUSABLE)
            self.warm[mapping.address] = mapping
        else:
            # Others use the page: whoever takes this address next must not get it.
            self.stale[mapping.address] = mapping

    # What nobody uses

    def pop_free(self, num_pages: int) -> list[Page]:
        """Promise so many free pages, those used last."""
        if not num_pages:
            return []
        pages = self.free[-num_pages:]
        del self.free[-num_pages:]
        for page in pages:
            self._move(page, PageState.ALLOCATED)
        return pages

    def freed(self, page: Page) -> None:
        """Take a promised page back."""
        self._move(page, PageState.FREE)
        self.free.append(page)

    def cooled(self, policy: PoolPolicy, expected: Sequence[int]) -> list[PageMapping]:
        """What nobody uses and need not stay mapped: stale, too many, too long unused."""
        ahead = set(expected[: policy.premap_pages])
        kept = [mapping for at, mapping in self.warm.items() if at not in ahead]
        num_beyond = max(
            len(kept) - policy.keep_mapped_pages,
            len(self.pages) - len(self.free) - self.budget_pages,
        )
        oldest_s = self._clock() - policy.idle_s
        going = [m for at, m in enumerate(kept) if at < num_beyond or m.idle_since_s <= oldest_s]
        if num_beyond > len(kept):  # the budget goes before what is mapped ahead
            going += [m for at, m in self.warm.items() if at in ahead][: num_beyond - len(kept)]
        return [*self.stale.values(), *going]

    def premapped(self, made: Mapping[int, Page]) -> None:
        """Note pages that are mapped ahead, of nobody."""
        for address, page in made.items():
            mapping = self._noted(address, page)
            self._move(page, PageState.REUSABLE)
            self.warm[address] = mapping
        self.counts.premapped += len(made)

    def forget(self, going: Collection[Page]) -> list[PageHandle]:
        """Strike free pages off the books."""
        for page in going:
            del self.pages[page.handle]
        self.free = [page for page in self.free if page.handle in self.pages]
        self.states[PageState.FREE] -= len(going)
        self.counts.released += len(going)
        return [page.handle for page in going]

    def surplus(self, idle_s: float) -> list[Page]:
        """Free pages beyond the budget, and those unused for longer than `idle_s`."""
        oldest_s = self._clock() - idle_s
        num_beyond = max(0, len(self.pages) - self.budget_pages)
        by_age = sorted(self.free, key=lambda page: page.idle_since_s)
        return [p for at, p in enumerate(by_age) if at < num_beyond or p.idle_since_s <= oldest_s]

    # What can be seen

    def statistics(self) -> PoolStatistics:
        """Count the pages."""
        counts = self.counts
        return PoolStatistics(
            budget_pages=self.budget_pages,
            num_by_state={state.value: self.states[state] for state in PageState},
            num_created=counts.created,
            num_released=counts.released,
            num_mapped=counts.mapped,
            num_unmapped=counts.unmapped,
            num_reused=counts.reused,
            num_premapped=counts.premapped,
            num_premap_failures=counts.premap_failures,
            num_map_calls=counts.map_calls,
            num_unmap_calls=counts.unmap_calls,
            map_s=counts.map_s,
            unmap_s=counts.unmap_s,
        )

    def problems(self) -> Iterable[str]:
        """What is not as the rules say."""
        if Counter(page.state for page in self.pages.values()) != +self.states:
            yield "the states are counted wrong"
        listed = [mapping for page in self.pages.values() for mapping in page.mappings]
        if len(listed) != len(self.mappings):
            yield f"{len(listed)} mappings of pages, {len(self.mappings)} of addresses"
        waiting = {id(m) for _, batch in self.retired for m in batch}
        for page in self.pages.values():
            if _derived_state(page, self.warm) is not page.state:
                yield f"page {page.handle} is {page.state.value}, but its mappings say otherwise"
        for mapping in listed:
            if self.mappings.get(mapping.address) is not mapping:
                yield f"{mapping.address:#x} shows another page than its own"
            own = self.owned.get(mapping.owner, {}) if mapping.owner is not None else {}
            kinds = (
                own.get(mapping.address) is mapping,
                id(mapping) in waiting and mapping.fence is not None,
                self.warm.get(mapping.address) is mapping,
                self.stale.get(mapping.address) is mapping,
            )
            if sum(kinds) != 1:
                yield f"{mapping.address:#x} is owned, waiting, warm and stale: {kinds}"
        if sorted(page.handle for page in self.free) != sorted(
            page.handle for page in self.pages.values() if page.state is PageState.FREE
        ):
            yield "the list of free pages is not that of pages in the state Free"
        if sum(map(len, self.owned.values())) != sum(m.owner is not None for m in listed):
            yield "an owner has what is not mapped"

    # Inside

    def _noted(self, address: int, page: Page) -> PageMapping:
        mapping = PageMapping(address, page, idle_since_s=self._clock())
        self.mappings[address] = mapping
        page.mappings.append(mapping)
        return mapping

    def _move(self, page: Page, state: PageState) -> None:
        before = page.state
        page.becomes(state)
        self.states[before] -= 1
        self.states[state] += 1


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
