"""Held requests and adapters.

vLLM counts the adapters of a step over the requests that it schedules; it admits another one while
they are fewer than `max_loras`, and asserts later that the running ones are not more.  A request
that is held is not seen by that count.  So where there are more adapters than may run at once, a
request is held only beside one of its adapter that runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

__all__ = ["not_to_hold"]


def not_to_hold(
    held: Sequence[Request], offered: Iterable[Request], known: Iterable[Request], max_loras: int
) -> list[Request]:
    """Of the requests to be held, those that have to be offered to the step as well, in order.

    Args:
        held: to be left out of the step.
        offered: to it.
        known: all requests of the engine.
        max_loras: adapters that may run at once.
    """
    if len({_adapter(request) for request in known} - {0}) <= max_loras:
        return []
    seen = {_adapter(request) for request in offered} | {0}
    return [request for request in held if _adapter(request) not in seen]


def _adapter(request: Request) -> int:
    return request.lora_request.lora_int_id if request.lora_request else 0
