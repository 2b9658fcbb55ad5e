"""The built-in routing policies, registered through the hook that third parties use."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from functools import lru_cache
from heapq import nlargest

from xllm_plugin.hookspecs import hookimpl
from xllm_plugin.service.cost_choice import cost_in_seconds
from xllm_plugin.service.cost_ranking import CostRanking
from xllm_plugin.service.policy import Choice, InstanceView, RequestView, RoutingPolicy

__all__ = [
    "FOREIGN_REQUEST_TOKENS",
    "LeastLoadedRanking",
    "SessionRanking",
    "least_loaded",
    "power_of_two",
    "round_robin",
    "session_affinity",
    "work_tokens",
]

FOREIGN_REQUEST_TOKENS = 512
"""What a request of somebody else counts for; its size is not known."""

_MASK = 2**64 - 1
_NUM_PLACES = 8
_MAX_SESSIONS = 4096


def work_tokens(instance: InstanceView) -> float:
    """Tokens in front of a new request there, for an instance of capacity 1."""
    foreign = FOREIGN_REQUEST_TOKENS * instance.foreign_requests
    return (instance.outstanding_tokens + foreign) / instance.capacity


def round_robin(request: RequestView, candidates: Sequence[InstanceView]) -> Choice:
    """Take each in turn."""
    return Choice(request.sequence % len(candidates), "its turn", "turn")


def power_of_two(request: RequestView, candidates: Sequence[InstanceView]) -> Choice:
    """Draw two at random and take the less loaded (Mitzenmacher 2001)."""
    count = len(candidates)
    first = request.draw % count
    if count == 1:
        return Choice(0, "the only one", "load")
    second = (first + 1 + (request.draw >> 32) % (count - 1)) % count
    ours, other = work_tokens(candidates[first]), work_tokens(candidates[second])
    if other < ours:
        first, ours, other = second, other, ours
    return Choice(first, f"{ours:.0f} tokens outstanding; the other drawn has {other:.0f}", "load")


def least_loaded(request: RequestView, candidates: Sequence[InstanceView]) -> Choice:
    """Take the one with the fewest outstanding tokens; equals take turns."""
    count = len(candidates)
    # Begin at another one each time, so that idle instances share the requests.
    best = request.sequence % count
    least = work_tokens(candidates[best])
    for index, candidate in enumerate(candidates):
        work = work_tokens(candidate)
        if work < least:
            best, least = index, work
    return Choice(best, f"{least:.0f} tokens outstanding", "load")


class LeastLoadedRanking:
    """A `Ranking` that gives what `least_loaded` does: candidates sorted by their work.

    Args:
        candidates: all of them, closed at first.
    """

    def __init__(self, candidates: Sequence[InstanceView]) -> None:
        self.candidates = candidates
        self._work: list[float | None] = [None] * len(candidates)
        """None of those that are closed."""
        self._open: list[int] = []
        self._by_work: list[tuple[float, int]] = []

    @property
    def num_open(self) -> int:
        """Candidates that can take a request."""
        return len(self._open)

    def is_open(self, index: int) -> bool:
        """Whether candidate `index` can take a request."""
        return self._work[index] is not None

    def put(self, index: int) -> None:
        """Candidate `index` can take a request; it is new, or looks different."""
        before, work = self._work[index], work_tokens(self.candidates[index])
        if before == work:
            return
        if before is None:
            insort(self._open, index)
        else:
            del self._by_work[bisect_left(self._by_work, (before, index))]
        self._work[index] = work
        insort(self._by_work, (work, index))

    def drop(self, index: int) -> None:
        """Candidate `index` can take none."""
        before = self._work[index]
        if before is not None:
            self._work[index] = None
            del self._open[bisect_left(self._open, index)]
            del self._by_work[bisect_left(self._by_work, (before, index))]

    def choose(self, request: RequestView) -> Choice:
        """The least loaded of those that are open; equals take turns."""
        least, best = self._by_work[0]
        turn = self._open[request.sequence % len(self._open)]
        if self._work[turn] == least:
            best = turn
        return Choice(best, f"{least:.0f} tokens outstanding", "load")


def session_affinity(request: RequestView, candidates: Sequence[InstanceView]) -> Choice:
    """Send a session where it was before, by rendezvous hashing (Thaler and Ravishankar 1998).

    An instance that comes or goes moves only the sessions that it gains or had.  A request without
    a session goes to the least loaded.
    """
    if not request.session_key:
        choice = least_loaded(request, candidates)
        return Choice(choice.index, f"no session key; {choice.reason}", "load")
    key = _key_hash(request.session_key)
    best, highest = 0, -1
    for index, candidate in enumerate(candidates):
        weight = _mix(key ^ candidate.name_hash)
        if weight > highest:
            best, highest = index, weight
    return Choice(best, "its session's place", "session")


class SessionRanking:
    """A `Ranking` that gives what `session_affinity` does.

    The first places of a session are remembered: they change only with the candidates.

    Args:
        candidates: all of them, closed at first.
    """

    def __init__(self, candidates: Sequence[InstanceView]) -> None:
        self._hashes = [one.name_hash for one in candidates]
        self._by_load = LeastLoadedRanking(candidates)
        self._places: dict[str, list[int]] = {}

    @property
    def num_open(self) -> int:
        """Candidates that can take a request."""
        return self._by_load.num_open

    def put(self, index: int) -> None:
        """Candidate `index` can take a request; it is new, or looks different."""
        self._by_load.put(index)

    def drop(self, index: int) -> None:
        """Candidate `index` can take none."""
        self._by_load.drop(index)

    def choose(self, request: RequestView) -> Choice:
        """The open candidate with the highest weight."""
        session = request.session_key
        if not session:
            choice = self._by_load.choose(request)
            return Choice(choice.index, f"no session key; {choice.reason}", choice.cause)
        is_open = self._by_load.is_open
        places = self._places.get(session) or self._first(1, session)
        best = next(filter(is_open, places), None)
        if best is None:
            best = next(filter(is_open, self._first(len(self._hashes), session)))
        return Choice(best, "its session's place", "session")

    def _first(self, count: int, session: str) -> list[int]:
        """The first so many candidates for a session; some of them are remembered."""
        key = _key_hash(session)
        weights = [_mix(key ^ one) for one in self._hashes]
        places = nlargest(count, range(len(weights)), key=weights.__getitem__)
        self._places[session] = places[:_NUM_PLACES]
        if len(self._places) > _MAX_SESSIONS:
            del self._places[next(iter(self._places))]
        return places


@hookimpl
def register_routing_policies(register: Callable[[RoutingPolicy], None]) -> None:
    """Register the policies of this module."""
    register(
        RoutingPolicy(
            "cost",
            "least predicted seconds",
            cost_in_seconds,
            uses_prefixes=True,
            ranking=CostRanking,
        )
    )
    register(
        RoutingPolicy(
            "least-loaded", "fewest outstanding tokens", least_loaded, ranking=LeastLoadedRanking
        )
    )
    register(RoutingPolicy("round-robin", "each in turn", round_robin))
    register(RoutingPolicy("power-of-two", "the less loaded of two drawn", power_of_two))
    register(
        RoutingPolicy(
            "session", "a session stays at its place", session_affinity, ranking=SessionRanking
        )
    )


@lru_cache(maxsize=4096)
def _key_hash(key: str) -> int:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mix(value: int) -> int:
    """The finaliser of splitmix64: every input bit changes half of the output bits."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
