"""Which of many candidates can take a request, kept up to date; any policy can choose among them.

Policies that would look at each candidate have a ranking of their own, derived from this one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from xllm_plugin.service.policy import Choice, InstanceView, RequestView

__all__ = ["ListRanking", "check_choice"]


def check_choice(choice: Choice, num_candidates: int) -> None:
    """Raise `TypeError` or `ValueError` for what a plugin may give and nobody could use."""
    if not (isinstance(choice.index, int) and isinstance(choice.cause, str)):
        raise TypeError(f"index {choice.index!r} and cause {choice.cause!r}: no number and text")
    if not 0 <= choice.index < num_candidates:
        raise ValueError(f"index {choice.index} of {num_candidates} candidates")


class ListRanking:
    """A `Ranking` by a policy's own function: of use to those that look at few candidates.

    Args:
        candidates: all of them, closed at first.
        choose: the policy's function.
    """

    def __init__(
        self,
        candidates: Sequence[InstanceView],
        choose: Callable[[RequestView, Sequence[InstanceView]], Choice],
    ) -> None:
        self.candidates = candidates
        self._choose = choose
        self._open: list[int] = []
        """Indices of those that can take a request, sorted."""
        self._is_open = [False] * len(candidates)
        self._listed: list[InstanceView] = []

    @property
    def num_open(self) -> int:
        """Candidates that can take a request."""
        return len(self._open)

    def put(self, index: int) -> None:
        """Candidate `index` can take a request; it is new, or looks different."""
        if not self._is_open[index]:
            self._is_open[index] = True
            position = bisect_left(self._open, index)
            self._open.insert(position, index)
            self._listed.insert(position, self.candidates[index])

    def drop(self, index: int) -> None:
        """Candidate `index` can take none."""
        if self._is_open[index]:
            self._is_open[index] = False
            position = bisect_left(self._open, index)
            del self._open[position]
            del self._listed[position]

    def choose(self, request: RequestView) -> Choice:
        """What the policy's function says of those that are open."""
        choice = self._choose(request, self._listed)
        check_choice(choice, len(self._listed))
        return Choice(self._open[choice.index], choice.reason, choice.cause)
