"""A rate per minute, as a token bucket: unused allowance is kept for a minute, no longer."""

from __future__ import annotations

from typing import Final

__all__ = ["Bucket"]

_MINUTE_S: Final = 60.0


class Bucket:
    """What is left of an allowance.  It may fall below zero: what was used has to be paid.

    Args:
        per_minute: the rate, and the most that can be kept; over 0.
        now_s: monotonic seconds; the bucket begins full.
    """

    __slots__ = ("_at_s", "_level", "per_minute")

    def __init__(self, per_minute: float, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = per_minute
        self._at_s = now_s

    def level(self, now_s: float) -> float:
        """What is left at `now_s`, which never lies before the last one given."""
        if now_s > self._at_s:  # an event loop's time stands still while it works
            self._fill_to(self._level + (now_s - self._at_s) * self.per_minute / _MINUTE_S)
            self._at_s = now_s
        return self._level

    def wait_s(self, amount: float, now_s: float) -> float:
        """How long until `amount` may be taken; 0: now.

        More than a minute's allowance may be taken from a full bucket, and is paid for later.
        """
        level = self.level(now_s)
        if level >= amount:
            return 0.0
        missing = min(amount, self.per_minute) - level
        return max(0.0, missing * _MINUTE_S / self.per_minute)

    def take(self, amount: float, now_s: float) -> None:
        """Use `amount`, or give it back if it is below zero."""
        self._fill_to(self.level(now_s) - amount)

    def left(self, now_s: float) -> tuple[float, float]:
        """What is left, and in how many seconds it is full again if nothing is taken."""
        level = self.level(now_s)
        return level, (self.per_minute - level) * _MINUTE_S / self.per_minute

    def _fill_to(self, level: float) -> None:
        self._level = min(self.per_minute, level)
