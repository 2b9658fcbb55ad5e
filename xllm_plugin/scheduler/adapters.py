"""Which LoRA adapters a step computes with: vLLM has room for so many (``--max-loras``).

vLLM lets a request join only while there is room for its adapter beside those that run, and asserts
that those that run are never more.  It counts what is in the step and not what is held out of it,
so held requests could come back to a full house.  Under the policy `slo` the batch may therefore
hold requests of more adapters than a step has room for, and each step takes the most urgent ones;
who is left out keeps its KV blocks and is more urgent in the next.  Imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["NO_ADAPTER", "Urgency", "adapters_to_run"]

Urgency = tuple[bool, float]
"""Whether nobody waits, and when it is due or came, in s."""

NO_ADAPTER = 0


def adapters_to_run(claims: Iterable[tuple[int, Urgency]], most: int) -> frozenset[int]:
    """The adapters of the most urgent requests.

    Args:
        claims: of each request its adapter's number, and its urgency: smaller is more urgent.
        most: how many adapters a step has room for.

    Returns:
        At most `most` numbers, and always `NO_ADAPTER`.
    """
    first: dict[int, Urgency] = {}
    for adapter, urgency in claims:
        if adapter != NO_ADAPTER:
            first[adapter] = min(urgency, first.get(adapter, urgency))
    urgent = sorted(first, key=lambda adapter: (first[adapter], adapter))
    return frozenset((NO_ADAPTER, *urgent[:most]))
