"""The built-in routing policies, registered through the hook that third parties use."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from xllm_plugin.hookspecs import hookimpl
from xllm_plugin.service.policy import Choice, InstanceView, RequestView, RoutingPolicy

__all__ = [
    "FOREIGN_REQUEST_TOKENS",
    "Cost",
    "cost_in_seconds",
    "cost_of",
    "costs_of",
    "least_loaded",
    "power_of_two",
    "round_robin",
    "session_affinity",
    "work_tokens",
]

FOREIGN_REQUEST_TOKENS = 512
"""What a request of somebody else counts for; its size is not known."""

_MASK = 2**64 - 1
_BUSY_PERIOD = 5.0
"""A second of work delays those who come before the instance is next without any: 1 / (1 - load),
at a load of 0.8.  From 3 to 20 the simulated fleet hardly cares (benchmarks/fleet)."""

_STALL_WEIGHT = 0.3
"""Of a second in which a stream stands still, beside one of waiting for the first token.  At 1 long
prompts gather where few streams run, and wait there (Azure's conversations, simulated)."""


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


class Cost(NamedTuple):
    """What a request is predicted to cost at one instance, in seconds."""

    queue_s: float
    """Until the prompts in front of it are computed."""
    prefill_s: float
    """Of the part of its prompt that is not cached there."""
    decode_s: float
    """Of its output, among the requests that run there."""
    delay_s: float = 0.0
    """Of others, all together, by the computing of its prompt."""
    transfer_s: float = 0.0
    """Of KV blocks from elsewhere; nothing moves them yet."""

    @property
    def total_s(self) -> float:
        """What decides."""
        return self.queue_s + self.prefill_s + self.decode_s + self.delay_s + self.transfer_s


def cost_of(request: RequestView, instance: InstanceView) -> Cost:
    """Predict what `instance` would cost the request itself; what it costs others is left at 0."""
    speed = instance.speed
    uncached = max(1.0, request.prompt_tokens - request.cached_tokens.get(instance.name, 0.0))
    num_running = instance.in_flight + instance.foreign_requests + 1
    tpot_s = speed.tpot_base_s + speed.tpot_s_per_request * num_running
    return Cost(
        queue_s=speed.prefill_s_per_token * instance.prefill_tokens,
        prefill_s=speed.ttft_base_s + speed.prefill_s_per_token * uncached,
        decode_s=tpot_s * request.output_tokens,
    )


def costs_of(request: RequestView, candidates: Sequence[InstanceView]) -> list[Cost]:
    """Predict what each of `candidates` would cost the request and others.

    Two kinds of others are delayed by x seconds of prefill.  Those that run there get no token
    meanwhile.  And those who will come wait: with u seconds of work there, r arrivals a second and
    load p, x more cost them r / (1 - p) * (u x + x^2 / 2) in all (the value function of an M/G/1
    queue: E. Hyytia, A. Penttinen, S. Aalto, "Size- and state-aware dispatching problem with
    queue-specific job sizes", EJOR 217, 2012).  The rate is that of a mean instance, by Little's
    law: requests there over the time that they are predicted to stay.
    """
    own = [cost_of(request, candidate) for candidate in candidates]
    others = [candidate.in_flight + candidate.foreign_requests for candidate in candidates]
    stay_s = sum(cost.queue_s + cost.prefill_s + cost.decode_s for cost in own)
    crowding = _BUSY_PERIOD * sum(others) / stay_s if stay_s > 0 else 0.0
    return [
        Cost(
            queue_s,
            prefill_s,
            decode_s,
            prefill_s * (_STALL_WEIGHT * num_others + crowding * (queue_s + prefill_s / 2)),
        )
        for (queue_s, prefill_s, decode_s, *_), num_others in zip(own, others, strict=True)
    ]


def cost_in_seconds(request: RequestView, candidates: Sequence[InstanceView]) -> Choice:
    """Take the instance where the least time is lost: the request's own and that of others.

    One sum in one unit.  Affinity to a cache and balance of load are not modes between which a
    threshold switches: a hot prefix moves as soon as its queue costs more than computing it
    elsewhere, and what computing costs grows with those whom it delays.  Equals take turns.
    """
    costs = costs_of(request, candidates)
    totals = [cost.total_s for cost in costs]
    # Begin at another one each time, so that equals take turns.
    begin = request.sequence % len(totals)
    least_s = min(totals)
    best = totals.index(least_s, begin) if least_s in totals[begin:] else totals.index(least_s)
    least = costs[best]
    next_s = min(totals[:best] + totals[best + 1 :], default=float("inf"))
    cached = request.cached_tokens.get(candidates[best].name, 0.0)
    return Choice(
        best,
        f"{least.total_s:.3f} s = queue {least.queue_s:.3f} + prefill {least.prefill_s:.3f} "
        f"({cached:.0f} of {request.prompt_tokens} tokens cached) + decode {least.decode_s:.3f} "
        f"+ delay of others {least.delay_s:.3f}; next best {next_s:.3f} s",
        _cause(cached, request.cached_tokens),
    )


def _cause(cached: float, held: Mapping[str, float]) -> str:
    if not held:
        return "load"
    return "prefix" if cached >= max(held.values()) else "load over prefix"


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


@hookimpl
def register_routing_policies(register: Callable[[RoutingPolicy], None]) -> None:
    """Register the policies of this module."""
    register(RoutingPolicy("cost", "least predicted seconds", cost_in_seconds, uses_prefixes=True))
    register(RoutingPolicy("least-loaded", "fewest outstanding tokens", least_loaded))
    register(RoutingPolicy("round-robin", "each in turn", round_robin))
    register(RoutingPolicy("power-of-two", "the less loaded of two drawn", power_of_two))
    register(RoutingPolicy("session", "a session stays at its place", session_affinity))


@lru_cache(maxsize=4096)
def _key_hash(key: str) -> int:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mix(value: int) -> int:
    """The finaliser of splitmix64: every input bit changes half of the output bits."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
