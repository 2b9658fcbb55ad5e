"""Which LoRA adapters a step computes with: vLLM has room for so many (``--max-loras``).

vLLM lets a request join only while there is room for its adapter beside those that run, and asserts
that those that run are never more.  It counts what is in the step and not what is held out of it,
so held requests could come back to a full house.  Under the policy `slo` the batch may therefore
hold requests of more adapters than a step has room for, and each step takes the most urgent ones;
who is left out keeps its KV blocks and is more urgent in the next.

On a CPU, requests without an adapter take steps of their own.  vLLM 0.32 computes their rows with
the adapter of the last slot where others in the step have one (index -1 in
`lora/ops/torch_ops/lora_ops.py`, unmasked).  Imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["NO_ADAPTER", "Urgency", "adapters_to_run"]

Urgency = tuple[bool, float]
"""Whether nobody waits, and when it is due or came, in s."""

NO_ADAPTER = 0


def adapters_to_run(
    claims: Iterable[tuple[int, Urgency]], most: int, *, is_base_apart: bool
) -> frozenset[int]:
    """The adapters of the most urgent requests.

    Args:
        claims: of each request its adapter's number, and its urgency: smaller is more urgent.
        most: how many adapters a step has room for.
        is_base_apart: whether requests without an adapter share no step with others.

    Returns:
        At most `most` numbers, and `NO_ADAPTER`; either these or that if they share no step.
    """
    first: dict[int, Urgency] = {}
    for adapter, urgency in claims:
        first[adapter] = min(urgency, first.get(adapter, urgency))
    urgent = sorted(first, key=lambda adapter: (first[adapter], adapter))
    chosen = [adapter for adapter in urgent if adapter != NO_ADAPTER][:most]
    if not is_base_apart:
        return frozenset((NO_ADAPTER, *chosen))
    return frozenset(chosen if urgent[:1] == chosen[:1] else (NO_ADAPTER,))
