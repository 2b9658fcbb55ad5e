"""The candidates for one model where they are many: a request costs what has changed since.

::

    Fleet (book, release, heartbeats, speeds) --changed--> Roster --put, drop--> Ranking --> Choice
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from xllm_plugin.service.fleet import Instance
from xllm_plugin.service.policy import Choice, RequestView, RoutingPolicy
from xllm_plugin.service.ranking import ListRanking

__all__ = ["MANY", "Roster"]

MANY = 24
"""From so many candidates on a ranking costs less than a look at each (measured: README of
benchmarks/fleet)."""


class Roster:
    """One list of candidates in the order of one policy.

    Args:
        candidates: as the fleet lists them; while it gives this very object, they are the same.
        policy: to choose by.
        has_room: whether one may get another request; None: all may.
        changed: gets every candidate that looks different; those of other rosters do no harm.
    """

    def __init__(
        self,
        candidates: Sequence[Instance],
        policy: RoutingPolicy,
        has_room: Callable[[Instance], bool] | None,
        changed: set[Instance],
    ) -> None:
        self.changed = changed
        self._candidates = candidates
        self._policy = policy
        self._has_room = has_room
        make = policy.ranking or partial(ListRanking, choose=policy.choose)
        self._ranking = make(candidates)
        self._index_of = {instance: index for index, instance in enumerate(candidates)}
        changed.update(candidates)

    def is_of(
        self,
        candidates: Sequence[Instance],
        policy: RoutingPolicy,
        has_room: Callable[[Instance], bool] | None,
    ) -> bool:
        """Whether it was made for these."""
        return (
            self._candidates is candidates
            and self._policy is policy
            and self._has_room == has_room  # methods are equal, not the same
        )

    def choose(self, request: RequestView) -> tuple[Choice, int] | None:
        """The policy's choice among those that have room, and how many these are; None: none."""
        self._refresh()
        num_open = self._ranking.num_open
        return (self._ranking.choose(request), num_open) if num_open else None

    def _refresh(self) -> None:
        changed, ranking, has_room = self.changed, self._ranking, self._has_room
        for instance in changed:
            index = self._index_of.get(instance)
            if index is None:
                continue
            if has_room is None or has_room(instance):
                ranking.put(index)
            else:
                ranking.drop(index)
        changed.clear()
