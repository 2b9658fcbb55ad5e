"""The states of an instance: a pure function from a life, an event and a time to the next life.

::

    joining --alive--> ready --failed, or lease lapsed--> suspect --alive--> ready
       any of them --drain--> draining --undrain--> joining
       any of them --withdrawn--> gone; with a lease also: suspect or joining too long, drained and
       silent

Rule 1: only `Registered` begins a life or changes its incarnation.  A restarted server is another
incarnation, and what is said about the one before it is ignored.
Rule 2: an entry without a lease here (configured, not registered) never goes by itself: it stays
suspect and is asked again, because only who configured it can take it away.  Where somebody else
keeps the lease (etcd) it is such an entry until he says that it has lapsed.
Rule 3: gone is final for its incarnation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

__all__ = [
    "DRAINED",
    "LEFT",
    "Alive",
    "Drain",
    "Event",
    "Failed",
    "Lapsed",
    "Life",
    "Registered",
    "State",
    "Tick",
    "Timings",
    "Undrain",
    "Withdrawn",
    "begin",
    "next_life",
]


DRAINED, LEFT = "drained", "deregistered itself"
"""Why an instance is gone that stops, or has stopped, what still runs there."""
_MOMENT_S: Final = 1e-3
"""A lease that has just lapsed is silent for longer than it lasts."""


class State(StrEnum):
    """Only ready instances are chosen; suspect ones when there is no ready one."""

    JOINING = "joining"
    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Timings:
    """When silence and failures count; all in seconds but the number of failures."""

    lease_s: float = 6.0
    suspect_s: float = 30.0
    joining_s: float = 600.0
    drain_s: float = 300.0
    num_failures: int = 2


@dataclass(frozen=True, slots=True)
class Registered:
    """A server says that it is there, or was found with another start time than before."""

    incarnation: str
    leased: bool = False


@dataclass(frozen=True, slots=True)
class Alive:
    """A sign of life: a probe that found it usable, or a heartbeat, which alone renews a lease."""

    incarnation: str
    ready: bool = True
    renews: bool = True


@dataclass(frozen=True, slots=True)
class Failed:
    """A probe that failed, or a request that was refused for no reason that could be seen.

    `certain` if traffic met it: the connection was refused or cut.
    """

    reason: str
    certain: bool = False


@dataclass(frozen=True, slots=True)
class Lapsed:
    """Who keeps its lease says that there was no sign of life for that long."""

    reason: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Send nothing new there; what runs may finish."""


@dataclass(frozen=True, slots=True)
class Undrain:
    """Use it again once it has shown that it is alive."""


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """It deregistered, or its entry was taken away."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed.  `in_flight` is how many requests still run there."""

    in_flight: int = 0


Event = Registered | Alive | Failed | Lapsed | Drain | Undrain | Withdrawn | Tick


@dataclass(frozen=True, slots=True)
class Life:
    """One incarnation of one instance."""

    incarnation: str
    leased: bool
    state: State
    since_s: float
    """When it came into this state."""
    seen_s: float
    """When it was last known to be alive."""
    failures: int = 0
    reason: str = ""


def begin(event: Registered, now_s: float) -> Life:
    """A new life."""
    return Life(event.incarnation, event.leased, State.JOINING, now_s, now_s, reason="registered")


def next_life(life: Life, event: Event, now_s: float, timings: Timings) -> Life:  # noqa: C901, PLR0911 - one case an event
    """The life after `event` at `now_s`; the same object when nothing changes."""
    if isinstance(event, Registered):
        return _registered(life, event, now_s)
    if life.state is State.GONE:
        return life
    match event:
        case Alive():
            return _alive(life, event, now_s, timings)
        case Failed():
            return _failed(life, event, now_s, timings)
        case Lapsed():
            return _lapsed(life, event, now_s, timings)
        case Drain():
            return _to(life, State.DRAINING, now_s, "drained by hand")
        case Undrain():
            if life.state is not State.DRAINING:
                return life
            return _to(life, State.JOINING, now_s, "drain taken back")
        case Withdrawn():
            return _to(life, State.GONE, now_s, event.reason)
        case Tick():
            return _tick(life, event, now_s, timings)


def _registered(life: Life, event: Registered, now_s: float) -> Life:
    if event.incarnation != life.incarnation:
        return begin(event, now_s)
    if life.state is State.GONE and event.leased:
        # Cut off for longer than its lease and back again: nothing was sent there meanwhile.
        return begin(event, now_s)
    return life if life.state is State.GONE else replace(life, seen_s=now_s, leased=event.leased)


def _alive(life: Life, event: Alive, now_s: float, timings: Timings) -> Life:
    if event.incarnation != life.incarnation:
        return life
    seen = replace(life, seen_s=now_s) if event.renews else life
    if not event.ready or (life.leased and now_s - seen.seen_s > timings.lease_s):
        return seen
    if life.state in (State.JOINING, State.SUSPECT):
        return replace(_to(seen, State.READY, now_s, "answers"), failures=0)
    return replace(seen, failures=0)


def _failed(life: Life, event: Failed, now_s: float, timings: Timings) -> Life:
    failures = life.failures + 1
    counted = replace(life, failures=failures)
    if life.state is State.READY and (event.certain or failures >= timings.num_failures):
        return _to(counted, State.SUSPECT, now_s, event.reason)
    if life.state in (State.JOINING, State.SUSPECT):
        return replace(counted, reason=event.reason)
    return counted


def _lapsed(life: Life, event: Lapsed, now_s: float, timings: Timings) -> Life:
    silent = replace(
        life, leased=True, seen_s=min(life.seen_s, now_s - timings.lease_s - _MOMENT_S)
    )
    if life.state is not State.READY:
        return replace(silent, reason=event.reason)
    return _to(silent, State.SUSPECT, now_s, event.reason)


def _tick(life: Life, event: Tick, now_s: float, timings: Timings) -> Life:
    if not life.leased:
        return life
    silent_s, age_s = now_s - life.seen_s, now_s - life.since_s
    if life.state is State.READY and silent_s > timings.lease_s:
        return _to(life, State.SUSPECT, now_s, f"no heartbeat for {silent_s:.1f} s")
    if life.state is State.SUSPECT and min(age_s, silent_s) > timings.suspect_s:
        return _to(life, State.GONE, now_s, f"no heartbeat for {silent_s:.1f} s")
    if life.state is State.JOINING and (
        age_s > timings.joining_s or silent_s > timings.lease_s + timings.suspect_s
    ):
        return _to(life, State.GONE, now_s, "never became ready")
    # While it sends heartbeats it stays: forgotten, it would register again and be used again.
    is_drained = age_s > timings.drain_s or not event.in_flight
    if life.state is State.DRAINING and silent_s > timings.lease_s and is_drained:
        return _to(life, State.GONE, now_s, DRAINED)
    return life


def _to(life: Life, state: State, now_s: float, reason: str) -> Life:
    if life.state is state:
        return life
    return replace(life, state=state, since_s=now_s, reason=reason)
