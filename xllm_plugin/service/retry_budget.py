"""How many requests may be sent again to instances that may only be busy.

A request that met a dead instance is always sent again: its work is lost, and who is dead is not
asked twice.  But where instances refuse (503) or are silent because there is too much to do, every
retry is one more request, and three tries each are three times the load that was too much.  So
these are a share of all requests ("retry budget": Finagle's `RetryBudget`).
"""

from __future__ import annotations

from typing import Final

__all__ = ["RetryBudget"]

_REQUESTS_KEPT: Final = 500
"""What so many requests have earned is kept for a burst; a new service has it."""


class RetryBudget:
    """Retries that requests have earned and nobody has taken.

    Args:
        share: that each request earns of one.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._level = self._most = max(1.0, share * _REQUESTS_KEPT) if share else 0.0
        self._num_counted = 0

    def take(self, num_requests: int) -> bool:
        """Take one retry; False if there is none.

        Args:
            num_requests: sent so far, retries included.
        """
        earned = self.share * (num_requests - self._num_counted)
        self._num_counted = num_requests
        self._level = min(self._most, self._level + earned)
        if self._level < 1.0:
            return False
        self._level -= 1.0
        return True
