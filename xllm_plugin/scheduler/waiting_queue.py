"""The requests in the queue, kept in the orders that plans ask for.

Under overload a thousand requests wait, and a plan is made before every step.  From one plan to the
next a few come and go; so their order is kept and not made anew, and what a plan asks of all of
them is asked of numpy columns in that order.  Imports neither torch nor vLLM.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["Ranked", "Sifted", "Waiting", "WaitingQueue"]

Columns = NDArray[np.float64]


class Waiting(msgspec.Struct, frozen=True, gc=False):
    """A request in the queue.

    Attributes:
        request_id: vLLM's.
        is_online: whether its promise counts.
        deadline_s: when its first token is due, on the view's clock.
        tpot_ms: promised.
        arrival_s: on the view's clock.
        priority: lower is earlier.
        todo_tokens: of its prompt, without a cached prefix.
        computed_tokens: of the cached prefix.
        is_lost: whether its promise was broken before it was preempted.
    """

    request_id: str
    is_online: bool
    deadline_s: float
    tpot_ms: float
    arrival_s: float
    priority: int
    todo_tokens: int
    computed_tokens: int = 0
    is_lost: bool = False


# Priority, what to sort by (s), the least time to read the prompt (s), number.
Ranked = tuple[int, float, float, int]
# Priority, deadline or arrival, number; the number is unique, so requests are never compared.
_Key = tuple[int, float, int, Waiting]

PRIORITY, DEADLINE_S, TODO_TOKENS, COMPUTED_TOKENS, ARRIVAL_S, IS_LOST, NUMBER = range(7)
NUM_COLUMNS: Final = 7
LEAST_CAPACITY: Final = 64


class WaitingQueue:
    """Waiting requests, online ones by priority and deadline, offline ones by priority and arrival.

    Each has a number, which counts up as they come: it decides between equals.

    Args:
        requests: in the order in which they came.
    """

    def __init__(self, requests: Iterable[Waiting] = ()) -> None:
        self._next_number = 0
        self._keys: dict[str, _Key] = {}
        for request in requests:
            self._keys[request.request_id] = self._key(request)
        keys = self._keys.values()
        self._online = sorted(key for key in keys if key[3].is_online)
        self._offline = sorted(key for key in keys if not key[3].is_online)
        num = len(self._online)
        self._columns: Columns = np.empty((NUM_COLUMNS, max(LEAST_CAPACITY, 2 * num)))
        if num:
            self._columns[:, :num] = np.array([_column(key) for key in self._online]).T

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Waiting]:
        """Online requests, most urgent first, then offline ones, oldest first."""
        yield from (key[3] for key in self._online)
        yield from (key[3] for key in self._offline)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._keys

    def __getitem__(self, request_id: str) -> Waiting:
        return self._keys[request_id][3]

    @property
    def num_online(self) -> int:
        """How many of them have a promise that counts."""
        return len(self._online)

    def add(self, request: Waiting) -> None:
        """Put a request in, once."""
        assert request.request_id not in self._keys, "a request waits twice"
        key = self._keys[request.request_id] = self._key(request)
        if not request.is_online:
            bisect.insort(self._offline, key)
            return
        num, place = len(self._online), bisect.bisect(self._online, key)
        self._online.insert(place, key)
        if num == self._columns.shape[1]:
            self._columns = np.concatenate([self._columns, np.empty_like(self._columns)], axis=1)
        self._columns[:, place + 1 : num + 1] = self._columns[:, place:num]
        self._columns[:, place] = _column(key)

    def remove(self, request_id: str) -> None:
        """Take a request out that is in it."""
        key = self._keys.pop(request_id)
        if not key[3].is_online:
            del self._offline[bisect.bisect_left(self._offline, key)]
            return
        num, place = len(self._online), bisect.bisect_left(self._online, key)
        del self._online[place]
        self._columns[:, place : num - 1] = self._columns[:, place + 1 : num]

    def offline(self, most: int) -> list[Waiting]:
        """The first offline requests by priority and arrival."""
        return [key[3] for key in self._offline[:most]]

    def oldest_online(self) -> Waiting | None:
        """The online request that came first; None without any."""
        if not self._online:
            return None
        arrivals_s = self._column(ARRIVAL_S)
        oldest = np.flatnonzero(arrivals_s == arrivals_s.min())
        place = oldest[self._column(NUMBER)[oldest].argmin()]
        return self._online[place][3]

    def sift(self, now_s: float, least_s: Callable[[Columns, Columns], Columns]) -> Sifted:
        """Part those that can still be on time from those that cannot.

        Args:
            now_s: on the clock of deadlines.
            least_s: the least time that a prompt takes, of its tokens to compute and computed.
        """
        needed_s = least_s(self._column(TODO_TOKENS), self._column(COMPUTED_TOKENS))
        return Sifted(self._online, self._columns, needed_s, now_s)

    def _key(self, request: Waiting) -> _Key:
        self._next_number += 1
        when_s = request.deadline_s if request.is_online else request.arrival_s
        return request.priority, when_s, self._next_number, request

    def _column(self, index: int) -> Columns:
        column: Columns = self._columns[index, : len(self._online)]
        return column


class Sifted:
    """The online requests of a queue at one moment, parted by whether they can be on time.

    Valid until the queue changes.

    Attributes:
        num_late: that cannot be.
    """

    def __init__(
        self, online: list[_Key], columns: Columns, needed_s: Columns, now_s: float
    ) -> None:
        self._online, self._columns, self._needed_s = online, columns, needed_s
        num = len(online)
        self._is_in_time = now_s + needed_s <= columns[DEADLINE_S, :num]
        self._is_in_time &= columns[IS_LOST, :num] == 0
        self.num_late = num - int(np.count_nonzero(self._is_in_time))
        self._by_number: dict[int, Waiting] = {}

    def request(self, number: int) -> Waiting:
        """The request of an entry that was returned."""
        return self._by_number[number]

    def in_time(self, most: int) -> list[Ranked]:
        """The first by priority, deadline and least time: `most`, or more if these are equal."""
        places = np.flatnonzero(self._is_in_time)
        num = min(most, len(places))
        if num:
            last = self._online[places[num - 1]][:2]
            while num < len(places) and self._online[places[num]][:2] == last:
                num += 1
        found = self._entries(places[:num])
        return [(key[0], key[1], needed_s, key[2]) for key, needed_s in found]

    def late(self, most: int) -> list[Ranked]:
        """The first by priority and least time: `most`, or more if these are equal."""
        places = np.flatnonzero(~self._is_in_time)
        if len(places) > most:
            places = places[self._least_work(places, most)]
        found = self._entries(places)
        return [(key[0], needed_s, needed_s, key[2]) for key, needed_s in found]

    def _least_work(self, places: NDArray[np.intp], most: int) -> NDArray[np.bool_]:
        priorities, needed_s = self._columns[PRIORITY, places], self._needed_s[places]
        last = np.partition(priorities, most - 1)[most - 1]
        is_before, is_last = priorities < last, priorities == last
        num_left = most - int(np.count_nonzero(is_before))
        most_s = np.partition(needed_s[is_last], num_left - 1)[num_left - 1]
        chosen: NDArray[np.bool_] = is_before | (is_last & (needed_s <= most_s))
        return chosen

    def _entries(self, places: NDArray[np.intp]) -> list[tuple[_Key, float]]:
        keys = [self._online[place] for place in places.tolist()]
        self._by_number |= {key[2]: key[3] for key in keys}
        return list(zip(keys, self._needed_s[places].tolist(), strict=True))


def _column(key: _Key) -> tuple[float, ...]:
    priority, deadline_s, number, request = key
    return (
        priority,
        deadline_s,
        request.todo_tokens,
        request.computed_tokens,
        request.arrival_s,
        request.is_lost,
        number,
    )
