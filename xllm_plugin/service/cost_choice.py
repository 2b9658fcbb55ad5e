"""The default policy's choice (`cost.py` says what is weighed)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from xllm_plugin.service.cached import most_cached
from xllm_plugin.service.cost import (
    STALL_WEIGHT,
    caring_of,
    crowding_of,
    due_of,
    parts_of,
    promised_s,
)
from xllm_plugin.service.cost_reason import CostReason
from xllm_plugin.service.policy import Choice, InstanceView, RequestView

__all__ = ["cause_of", "cost_in_seconds", "reason_of"]

_INFINITE: Final = float("inf")


def reason_of(
    request: RequestView, instance: InstanceView, crowding: float, next_s: float
) -> CostReason:
    """Why `instance` was chosen.

    Args:
        request: that was placed.
        instance: where.
        crowding: of `crowding_of`.
        next_s: cost of the next best; inf if there is none.
    """
    parts, due = parts_of(request, instance), due_of(request)
    held, prompt = request.cached_tokens.get(instance.name, 0.0), request.prompt_tokens
    if due is None:
        return CostReason(parts, crowding, held, prompt, next_s)
    queue_s, prefill_s, decode_s, _ = parts
    num_others = instance.in_flight + instance.foreign_requests
    caring = caring_of(num_others, instance.offline_requests)
    parts = queue_s, prefill_s, decode_s, STALL_WEIGHT * (num_others * caring)
    slowed_s = due.slowing_tokens * instance.speed.tpot_s_per_request * (num_others * caring)
    return CostReason(parts, crowding * caring, held, prompt, next_s, due, slowed_s)


def cost_in_seconds(request: RequestView, candidates: Sequence[InstanceView]) -> Choice:
    """Take the instance where the least time is lost: the request's own and that of others.

    One sum in one unit.  Affinity to a cache and balance of load are not modes between which a
    threshold switches: a hot prefix moves as soon as its queue costs more than computing it
    elsewhere, and what computing costs grows with those whom it delays.  Equals take turns.
    """
    # As `parts_of` and `cost_from`, in line: this runs for every request.
    prompt, output, cached = request.prompt_tokens, request.output_tokens, request.cached_tokens
    parts = []
    all_others, stay_s = 0, 0.0
    for one in candidates:
        speed = one.speed
        uncached = prompt - cached.get(one.name, 0.0) if cached else prompt
        num_others = one.in_flight + one.foreign_requests
        queue_s = speed.prefill_s_per_token * one.prefill_tokens
        if uncached < 1.0:  # noqa: PLR1730 - a call for each of them would show
            uncached = 1.0
        prefill_s = speed.ttft_base_s + speed.prefill_s_per_token * uncached
        decode_s = (speed.tpot_base_s + speed.tpot_s_per_request * (num_others + 1)) * output
        all_others += num_others
        stay_s += queue_s + prefill_s + decode_s
        parts.append((queue_s, prefill_s, decode_s, STALL_WEIGHT * num_others))
    crowding = crowding_of(all_others, stay_s)
    due = None if request.slo is None else due_of(request)
    if due is None:
        totals = [
            queue_s
            + prefill_s
            + decode_s
            + prefill_s * (stall + crowding * (queue_s + prefill_s / 2))
            for queue_s, prefill_s, decode_s, stall in parts
        ]
    else:
        totals = [
            promised_s(due, one, own, crowding) for one, own in zip(candidates, parts, strict=True)
        ]
    least_s = min(totals)
    # Begin at another one each time, so that equals take turns.
    begin = request.sequence % len(totals)
    try:
        best = totals.index(least_s, begin)
    except ValueError:
        best = totals.index(least_s)
    chosen = candidates[best]
    del totals[best]
    held = cached.get(chosen.name, 0.0) if cached else 0.0
    next_s = min(totals, default=_INFINITE)
    reason = (
        CostReason(parts[best], crowding, held, prompt, next_s)
        if due is None
        else reason_of(request, chosen, crowding, next_s)
    )
    return Choice(best, reason, cause_of(held, cached))


def cause_of(held: float, cached: Mapping[str, float]) -> str:
    """What decided, in a few words.

    Args:
        held: tokens of the prompt that the chosen one holds.
        cached: tokens that each candidate holds.
    """
    if not cached:
        return "load"
    return "prefix" if held >= most_cached(cached) else "load over prefix"
