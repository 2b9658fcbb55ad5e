"""The default policy: one cost in seconds for each candidate, and the least wins.

It is what the request loses there itself, and what others lose by it.  Two kinds of others are
delayed by x seconds of prefill.  Those that run there get no token meanwhile.  And those who will
come wait: with u seconds of work there, r arrivals a second and load p, x more cost them
r / (1 - p) * (u x + x^2 / 2) in all (the value function of an M/G/1 queue: E. Hyytia, A. Penttinen,
S. Aalto, "Size- and state-aware dispatching problem with queue-specific job sizes", EJOR 217,
2012).  The rate is that of a mean instance, by Little's law: requests there over the time that they
are predicted to stay.

A request that names a promise adds seconds by which it would be late, at `LATE_WEIGHT`. That is
little, and on purpose: at 1 and above simulated fleets keep fewer promises the more it weighs (at
5, a third to half as many of the tight ones on Mooncake's traffic near saturation), for who insists
on being in time gives up cached prefixes, and all wait for what is computed twice. What helps is to
know who is not in a hurry. A second of an offline request weighs `OFFLINE_WEIGHT`, its own as well
as one that others take from it, while it pays in full for what it takes from them; so offline
requests gather where few others run, and those with a promise keep away by themselves. One weight
for both, no list of instances, no mode. Own decoding stands for two things elsewhere: n requests
slow this one as much as it slows them. Where only a part of its own counts, what it slows others by
is added.

Requests without a promise cost what they would if nobody had one, to the last bit.

`cost_in_seconds` (`cost_choice.py`) is the definition, and what is used before a few instances.
Before many `cost_ranking.py` finds the same one without looking at each.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from xllm_plugin.service.policy import InstanceView, RequestView

__all__ = [
    "LATE_WEIGHT",
    "OFFLINE_WEIGHT",
    "STALL_WEIGHT",
    "Cost",
    "Due",
    "caring_of",
    "cost_from",
    "crowding_of",
    "due_of",
    "parts_of",
    "promised_s",
]

_BUSY_PERIOD: Final = 5.0
"""A second of work delays those who come before the instance is next without any: 1 / (1 - load),
at a load of 0.8.  From 3 to 20 the simulated fleet hardly cares (benchmarks/fleet)."""

STALL_WEIGHT: Final = 0.3
"""Of a second in which a stream stands still, beside one of waiting for the first token.  At 1 long
prompts gather where few streams run, and wait there (Azure's conversations, simulated)."""

# These two are not Final: `xllm bench fleet --weights` tries others.
LATE_WEIGHT = 0.25
"""Of a second beyond what a request was promised, on top of its own."""

OFFLINE_WEIGHT = 0.2
"""Of a second that an offline request loses, its own or to others, beside one of an online one."""

_STEPS: Final = 2**20
Parts = tuple[float, float, float, float]
"""Seconds of the queue, of prefill and of decoding (`Cost`); and the requests that run there and
get no token meanwhile, times `STALL_WEIGHT`."""


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
    late_s: float = 0.0
    """Of its own time, what is beyond its promise."""
    own_weight: float = 1.0
    """Of its own seconds: queue, prefill and decoding."""

    @property
    def total_s(self) -> float:
        """What decides."""
        own_s = self.own_weight * (self.queue_s + self.prefill_s + self.decode_s)
        return own_s + self.delay_s + self.transfer_s + LATE_WEIGHT * self.late_s


class Due(NamedTuple):
    """How the time of a request with a promise of its own counts."""

    own_weight: float
    """Of its own seconds."""
    first_s: float
    """Until its first token is late."""
    decode_s: float
    """Its decoding may take so long."""
    slowing_tokens: float
    """By how many tokens it slows others, beyond what its own time stands for."""

    def late_s(self, wait_s: float, decode_s: float) -> float:
        """Seconds beyond the promise: to the first token, and over all later ones."""
        return max(0.0, wait_s - self.first_s) + max(0.0, decode_s - self.decode_s)

    def total_s(  # noqa: PLR0917 - as a sum has its terms
        self,
        queue_s: float,
        prefill_s: float,
        decode_s: float,
        num_caring: float,
        crowding: float,
        pace_s: float,
    ) -> float:
        """What one candidate costs; never falls where an argument grows, rounding included.

        Args:
            queue_s: as in `Cost`.
            prefill_s: as there.
            decode_s: as there.
            num_caring: of `caring_of`, times the requests there.
            crowding: of `crowding_of`, times `caring_of`.
            pace_s: by which a request there slows each other, a token.
        """
        wait_s = queue_s + prefill_s
        delay_s = prefill_s * (STALL_WEIGHT * num_caring + crowding * (queue_s + prefill_s / 2))
        delay_s += self.slowing_tokens * pace_s * num_caring
        late_s = self.late_s(wait_s, decode_s)
        return self.own_weight * (wait_s + decode_s) + delay_s + LATE_WEIGHT * late_s


def parts_of(request: RequestView, instance: InstanceView) -> Parts:
    """What `instance` would cost a request, but for the crowding among all candidates."""
    speed = instance.speed
    uncached = max(1.0, request.prompt_tokens - request.cached_tokens.get(instance.name, 0.0))
    num_others = instance.in_flight + instance.foreign_requests
    tpot_s = speed.tpot_base_s + speed.tpot_s_per_request * (num_others + 1)
    queue_s = speed.prefill_s_per_token * instance.prefill_tokens
    prefill_s = speed.ttft_base_s + speed.prefill_s_per_token * uncached
    return queue_s, prefill_s, tpot_s * request.output_tokens, STALL_WEIGHT * num_others


def due_of(request: RequestView) -> Due | None:
    """How the time of a request counts by its promise; None if it has none of its own."""
    slo = request.slo
    if slo is None:
        return None
    output = request.output_tokens
    if slo.is_offline:
        return Due(OFFLINE_WEIGHT, slo.ttft_s, slo.tpot_s * output, output)
    return Due(1.0, slo.ttft_s, slo.tpot_s * output, 0.0)


def caring_of(num_others: int, num_offline: int) -> float:
    """How much of what an instance's requests lose counts, for a request with a promise.

    Args:
        num_others: requests there.
        num_offline: those of them that are offline.
    """
    if num_offline <= 0 or num_others <= 0:  # of other processes they come one after the other
        return 1.0
    return max(OFFLINE_WEIGHT, 1.0 - (1.0 - OFFLINE_WEIGHT) * num_offline / num_others)


def promised_s(due: Due, instance: InstanceView, parts: Parts, crowding: float) -> float:
    """What a request with a promise costs at `instance`.

    Args:
        due: of `due_of`.
        instance: a candidate.
        parts: of `parts_of`.
        crowding: of `crowding_of`.
    """
    queue_s, prefill_s, decode_s, _ = parts
    num_others = instance.in_flight + instance.foreign_requests
    caring = caring_of(num_others, instance.offline_requests)
    pace_s = instance.speed.tpot_s_per_request
    return due.total_s(queue_s, prefill_s, decode_s, num_others * caring, crowding * caring, pace_s)


def cost_from(parts: Parts, crowding: float, due: Due | None = None, slowed_s: float = 0.0) -> Cost:
    """Add to what a request loses itself what others lose by its prefill.

    Args:
        parts: of `parts_of`.
        crowding: of `crowding_of`.
        due: of `due_of`.
        slowed_s: as in `CostReason`.
    """
    queue_s, prefill_s, decode_s, stall = parts
    delay_s = prefill_s * (stall + crowding * (queue_s + prefill_s / 2))
    if due is None:
        return Cost(queue_s, prefill_s, decode_s, delay_s)
    late_s = due.late_s(queue_s + prefill_s, decode_s)
    delay_s += slowed_s
    return Cost(queue_s, prefill_s, decode_s, delay_s, 0.0, late_s, due.own_weight)


def crowding_of(num_others: int, stay_s: float) -> float:
    """How much a second of prefill delays those who will come, a second of work there.

    Args:
        num_others: requests at all candidates together.
        stay_s: how long the request is predicted to stay, summed over the candidates.

    Rounded, so that it does not depend on the order in which `stay_s` was summed.
    """
    if stay_s <= 0:
        return 0.0
    return int(_BUSY_PERIOD * _STEPS * num_others / stay_s) / _STEPS
