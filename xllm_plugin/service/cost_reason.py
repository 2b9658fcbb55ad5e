"""Why an instance was chosen by cost."""

from __future__ import annotations

import msgspec

from xllm_plugin.service.cost import LATE_WEIGHT, Cost, Due, Parts, cost_from

__all__ = ["CostReason"]


class CostReason(msgspec.Struct, frozen=True, gc=False):
    """Why an instance was chosen; a cost and text only if somebody reads it, which few do."""

    parts: Parts
    crowding: float
    cached: float
    prompt_tokens: int
    next_s: float
    """Cost of the next best candidate; inf if there is none."""
    due: Due | None = None
    slowed_s: float = 0.0
    """By how much its decoding slows others, as far as `due` counts that."""

    @property
    def cost(self) -> Cost:
        """Of the one that was chosen."""
        return cost_from(self.parts, self.crowding, self.due, self.slowed_s)

    def __str__(self) -> str:
        cost, due = self.cost, self.due
        own = (
            f"queue {cost.queue_s:.3f} + prefill {cost.prefill_s:.3f} "
            f"({self.cached:.0f} of {self.prompt_tokens} tokens cached) + decode "
            f"{cost.decode_s:.3f}"
        )
        late = ""
        if cost.own_weight != 1:
            own = f"{cost.own_weight:g} x ({own})"
        elif due is not None:
            late = f" + {LATE_WEIGHT:g} x late {cost.late_s:.3f}"
        return (
            f"{cost.total_s:.3f} s = {own} + delay of others {cost.delay_s:.3f}{late}; next best "
            f"{self.next_s:.3f} s"
        )
