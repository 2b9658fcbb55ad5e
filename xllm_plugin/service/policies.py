"""The built-in routing policies, registered through the hook that third parties use."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from xllm_plugin.hookspecs import hookimpl
from xllm_plugin.service.policy import Choice, InstanceView, RequestView, RoutingPolicy

__all__ = [
    "FOREIGN_REQUEST_TOKENS",
    "Cost",
    "cost_in_seconds",
    "cost_of",
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
at a load of 0.8.  From 3 to 30 the simulated fleet hardly cares (benchmarks/fleet)."""


def work_tokens(instance: InstanceView) -> float:
    """Tokens in front of a new request there, for an instance of capacity 1."""
    foreign = FOREIGN_REQUEST_TOKENS * instance.foreign_requests
    return (instance.outstanding_tokens + foreign) / instance.capacity


def round_robin(request: RequestView, candidates: Sequence[InstanceView]) -> Choice:
    """Take each in turn."""
    return Choice(request.sequence % len(candidates), "its turn")


def power_of_two(request: RequestView, candidates: Sequence[InstanceView]) -> Choice:
    """Draw two at random and take the less loaded (Mitzenmacher 2001)."""
    count = len(candidates)
    first = request.draw % count
    if count == 1:
        return Choice(0, "the only one")
    second = (first + 1 + (request.draw >> 32) % (count - 1)) % count
    ours, other = work_tokens(candidates[first]), work_tokens(candidates[second])
    if other < ours:
        first, ours, other = second, other, ours
    return Choice(first, f"{ours:.0f} tokens outstanding; the other drawn has {other:.0f}")


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
    return Choice(best, f"{least:.0f} tokens outstanding")


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
    """Predict a request's cost at `instance`, to itself and to others.

    Two kinds of others are delayed.  Those that run there get no token while its prompt is computed,
    or later ones.  And those who will come wait for it: with work u there, rate r of arrivals and
    load p, work x more costs them r / (1 - p) * (u x + x^2 / 2) in all, the value function of an
    M/G/1 queue (E. Hyytia, A. Penttinen, S. Aalto, "Size- and state-aware dispatching problem with
    queue-specific job sizes", EJOR 217, 2012).  The rate follows from what is there by Little's law.
    """
    speed = instance.speed
    uncached = max(1.0, request.prompt_tokens - request.cached_tokens.get(instance.name, 0.0))
    num_others = instance.in_flight + instance.foreign_requests
    tpot_s = speed.tpot_base_s + speed.tpot_s_per_request * (num_others + 1)
    work_s = speed.prefill_s_per_token * uncached
    queue_s = speed.prefill_s_per_token * instance.prefill_tokens
    prefill_s = speed.ttft_base_s + work_s
    decode_s = tpot_s * request.output_tokens
    delay_s = 0.0
    stay_s = queue_s + prefill_s + decode_s
    if num_others and stay_s > 0:
        waiting = _BUSY_PERIOD / stay_s * (queue_s + work_s / 2)
        delay_s = num_others * work_s * (1 + waiting)
    return Cost(queue_s, prefill_s, decode_s, delay_s)


def cost_in_seconds(request: RequestView, candidates: Sequence[InstanceView]) -> Choice:
    """Take the instance where the least time is lost: the request's own and that of others.

    One sum in one unit.  Affinity to a cache and balance of load are not modes between which a
    threshold switches: a hot prefix moves as soon as its queue costs more than computing it
    elsewhere, and what computing costs grows with those whom it delays.  Equals take turns.
    """
    count = len(candidates)
    best = request.sequence % count
    least = cost_of(request, candidates[best])
    next_s = float("inf")
    for index, candidate in enumerate(candidates):
        if index == best:
            continue
        cost = cost_of(request, candidate)
        if cost.total_s < least.total_s:
            best, least, next_s = index, cost, least.total_s
        else:
            next_s = min(next_s, cost.total_s)
    cached = request.cached_tokens.get(candidates[best].name, 0.0)
    return Choice(
        best,
        f"{least.total_s:.3f} s = queue {least.queue_s:.3f} + prefill {least.prefill_s:.3f} "
        f"({cached:.0f} of {request.prompt_tokens} tokens cached) + decode {least.decode_s:.3f} "
        f"+ delay of others {least.delay_s:.3f}; next best {next_s:.3f} s",
    )


def session_affinity(request: RequestView, candidates: Sequence[InstanceView]) -> Choice:
    """Send a session where it was before, by rendezvous hashing (Thaler and Ravishankar 1998).

    An instance that comes or goes moves only the sessions that it gains or had.  A request without
    a session goes to the least loaded.
    """
    if not request.session_key:
        choice = least_loaded(request, candidates)
        return Choice(choice.index, f"no session key; {choice.reason}")
    key = _key_hash(request.session_key)
    best, highest = 0, -1
    for index, candidate in enumerate(candidates):
        weight = _mix(key ^ candidate.name_hash)
        if weight > highest:
            best, highest = index, weight
    return Choice(best, "its session's place")


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
