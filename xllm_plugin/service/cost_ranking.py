"""`cost_in_seconds` before many candidates: the same choice, with a look at a few of them.

Rule 1: candidates of about the same speed form a group.  What a request would cost at the group's
best speeds is at most what it costs at any of them, for the same requests and queue there.
Rule 2: within a group they are sorted by requests, then by queue.  Both only add to the cost, so
when a bound is above the second least cost found, what follows need not be looked at.
Rule 3: bounds are computed by the operations of the cost itself, in their order.  Rounding keeps an
order, so a bound is never above the cost that it bounds, not by a bit either.
Rule 4: bounds are for what most candidates hold of the prompt, and so for those that hold less
too; those that hold more are all looked at.
Rule 5: who is offline at a candidate makes it cheaper for requests with a promise.  So its row says
how many are; where the rest of a group is passed over, it is taken to be as cheap by them as the
cheapest of that group.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Container, Mapping, Sequence
from typing import Final

from xllm_plugin.service.cached import usual_and_others
from xllm_plugin.service.cost import (
    STALL_WEIGHT,
    Due,
    caring_of,
    crowding_of,
    due_of,
    parts_of,
    promised_s,
)
from xllm_plugin.service.cost_choice import cause_of, reason_of
from xllm_plugin.service.policy import Choice, InstanceView, RequestView
from xllm_plugin.service.speed import Speed

__all__ = ["CostRanking"]

_GROUP_SIZE: Final = 32
_INFINITE: Final = float("inf")


_Row = tuple[int, float, int, int]
"""Of a candidate: requests there, prompt tokens in its queue, its index, offline requests there."""


class _Group:
    """Candidates of about the same speed; its own speeds are the best of theirs.

    Args:
        speeds: of all of them.
    """

    __slots__ = (
        "is_uniform",
        "least_caring",
        "prefill_s_per_token",
        "rows",
        "tpot_base_s",
        "tpot_s_per_request",
        "ttft_base_s",
    )

    def __init__(self, speeds: Sequence[Speed]) -> None:
        self.rows: list[_Row] = []
        """Of those that are open, sorted."""
        self.least_caring = 1.0
        """Of all rows (`caring_of`), those included that were here since the group was made."""
        self.is_uniform = all(one == speeds[0] for one in speeds)
        self.ttft_base_s = min(one.ttft_base_s for one in speeds)
        self.prefill_s_per_token = min(one.prefill_s_per_token for one in speeds)
        self.tpot_base_s = min(one.tpot_base_s for one in speeds)
        self.tpot_s_per_request = min(one.tpot_s_per_request for one in speeds)


class _Search:
    """The least cost found so far, whose it is, and the second least.

    Args:
        request: to be placed.
        candidates: all of them.
        crowding: among those that are open.
    """

    __slots__ = (
        *("_candidates", "_crowding", "_due", "_output", "_request"),
        *("least_s", "limit_s", "next_s", "ties"),
    )

    def __init__(
        self, request: RequestView, candidates: Sequence[InstanceView], crowding: float
    ) -> None:
        self._candidates = candidates
        self._crowding = crowding
        self._request = request
        self._due = due_of(request)
        self._output = request.output_tokens
        self.least_s = self.next_s = _INFINITE
        self.limit_s = _INFINITE
        """What costs more cannot change what was found."""
        self.ties: list[int] = []
        """Candidates that cost the least."""

    def look_at(self, index: int, uncached: float) -> None:
        """Take candidate `index` into account, where `uncached` tokens have to be computed."""
        one = self._candidates[index]
        if self._due is not None:
            parts = parts_of(self._request, one)
            self._take(index, promised_s(self._due, one, parts, self._crowding))
            return
        speed = one.speed
        num_others = one.in_flight + one.foreign_requests
        queue_s = speed.prefill_s_per_token * one.prefill_tokens
        prefill_s = speed.ttft_base_s + speed.prefill_s_per_token * uncached
        tpot_s = speed.tpot_base_s + speed.tpot_s_per_request * (num_others + 1)
        self._take(
            index,
            queue_s
            + prefill_s
            + tpot_s * self._output
            + prefill_s * (STALL_WEIGHT * num_others + self._crowding * (queue_s + prefill_s / 2)),
        )

    def look_into(
        self, group: _Group, uncached: float, less: Mapping[int, float], known: Container[int]
    ) -> None:
        """Take a group into account.

        Args:
            group: of candidates.
            uncached: tokens to compute at most of them.
            less: at those that hold less of the prompt.
            known: those that hold more, and were looked at.
        """
        if self._due is not None:
            self._look_by_promise(self._due, group, uncached, less, known)
            return
        crowding, output, is_uniform = self._crowding, self._output, group.is_uniform
        prefill_s = group.ttft_base_s + group.prefill_s_per_token * uncached
        last, last_tokens = -1, -1.0
        decode_s = stall = bound_s = 0.0
        for num_others, tokens, index, _ in group.rows:
            if num_others != last:
                last, last_tokens, stall = num_others, -1.0, STALL_WEIGHT * num_others
                tpot_s = group.tpot_base_s + group.tpot_s_per_request * (num_others + 1)
                decode_s = tpot_s * output
                least_s = prefill_s + decode_s + prefill_s * (stall + crowding * (prefill_s / 2))
                if least_s > self.limit_s:
                    return  # all that follow have as many requests or more
            if tokens != last_tokens:
                last_tokens = tokens
                queue_s = group.prefill_s_per_token * tokens
                delay_s = prefill_s * (stall + crowding * (queue_s + prefill_s / 2))
                bound_s = queue_s + prefill_s + decode_s + delay_s
            if bound_s > self.limit_s or index in known:
                continue
            if index in less:
                self.look_at(index, less[index])
            elif is_uniform:
                self._take(index, bound_s)
            else:
                self.look_at(index, uncached)

    def _look_by_promise(
        self,
        due: Due,
        group: _Group,
        uncached: float,
        less: Mapping[int, float],
        known: Container[int],
    ) -> None:
        """`look_into` for a request with a promise."""
        crowding, output, pace_s = self._crowding, self._output, group.tpot_s_per_request
        prefill_s = group.ttft_base_s + group.prefill_s_per_token * uncached
        least_caring = group.least_caring
        last, decode_s = -1, 0.0
        for num_others, tokens, index, num_offline in group.rows:
            if num_others != last:
                last = num_others
                decode_s = (group.tpot_base_s + pace_s * (num_others + 1)) * output
                caring = num_others * least_caring
                least_s = due.total_s(
                    0.0, prefill_s, decode_s, caring, crowding * least_caring, pace_s
                )
                if least_s > self.limit_s:
                    return  # all that follow have as many requests or more
            caring = caring_of(num_others, num_offline)
            bound_s = due.total_s(
                group.prefill_s_per_token * tokens,
                prefill_s,
                decode_s,
                num_others * caring,
                crowding * caring,
                pace_s,
            )
            if bound_s > self.limit_s or index in known:
                continue
            if group.is_uniform and index not in less:
                self._take(index, bound_s)
            else:
                self.look_at(index, less.get(index, uncached))

    def _take(self, index: int, total_s: float) -> None:
        if total_s == self.least_s:
            self.ties.append(index)
            self.limit_s = total_s
        elif total_s < self.least_s:
            self.limit_s = self.next_s = self.least_s
            self.least_s, self.ties = total_s, [index]
        elif total_s < self.next_s:
            self.next_s = total_s
            self.limit_s = min(self.limit_s, total_s)


class CostRanking:
    """A `Ranking` that gives what `cost_in_seconds` does.

    Args:
        candidates: all of them, closed at first.
    """

    def __init__(self, candidates: Sequence[InstanceView]) -> None:
        self.candidates = candidates
        self._index_of = {one.name: index for index, one in enumerate(candidates)}
        self._open: list[int] = []
        """Indices of those that can take a request, sorted."""
        self._rows: list[_Row | None] = [None] * len(candidates)
        """As they are in their groups; None of those that are closed."""
        self._speeds = [one.speed for one in candidates]
        """As they were when the groups were made."""
        self._group_of: list[_Group] = []
        self._groups: list[_Group] = []
        self._is_grouped = False
        # Sums over those that are open; anew with the groups, so that rounding cannot pile up.
        self._num_others = 0
        self._queue_s = self._ttft_base_s = self._prefill_s = self._tpot_s = 0.0

    @property
    def num_open(self) -> int:
        """Candidates that can take a request."""
        return len(self._open)

    def put(self, index: int) -> None:
        """Candidate `index` can take a request; it is new, or looks different."""
        one = self.candidates[index]
        num_others = one.in_flight + one.foreign_requests
        row = (num_others, one.prefill_tokens, index, one.offline_requests)
        before = self._rows[index]
        if one.speed is not self._speeds[index]:
            self._is_grouped = False  # all change together, about once a second
        if before is None:
            insort(self._open, index)
        elif self._is_grouped and before == row:
            return
        else:
            self._take_out(before)
        self._rows[index] = row
        if self._is_grouped:
            insort(self._group_of[index].rows, row)
            self._count(row, 1)

    def drop(self, index: int) -> None:
        """Candidate `index` can take none."""
        row = self._rows[index]
        if row is not None:
            self._rows[index] = None
            del self._open[bisect_left(self._open, index)]
            self._take_out(row)

    def choose(self, request: RequestView) -> Choice:
        """The least cost among those that are open; equals take turns."""
        if not self._is_grouped:
            self._make_groups()
        cached = request.cached_tokens
        usual, others = usual_and_others(cached)
        uncached = max(1.0, request.prompt_tokens - usual)
        less, more = self._apart(request, uncached, others)
        crowding = self._crowding(request, uncached, less, more)
        search = _Search(request, self.candidates, crowding)
        for index, tokens in more.items():
            search.look_at(index, tokens)
        for group in self._by_bound(request, uncached, crowding):
            search.look_into(group, uncached, less, more)
        turn = self._open[request.sequence % len(self._open)]
        ties = sorted(search.ties)
        best = ties[bisect_left(ties, turn) % len(ties)]
        held = cached.get(self.candidates[best].name, 0.0)
        next_s = search.least_s if len(ties) > 1 else search.next_s
        reason = reason_of(request, self.candidates[best], crowding, next_s)
        return Choice(best, reason, cause_of(held, cached))

    # -- parts ----------------------------------------------------------------------------------

    def _apart(
        self, request: RequestView, uncached: float, others: Mapping[str, float]
    ) -> tuple[dict[int, float], dict[int, float]]:
        """Uncached tokens of open candidates that hold less than most, and of those with more."""
        prompt_tokens, rows, index_of = request.prompt_tokens, self._rows, self._index_of
        less: dict[int, float] = {}
        more: dict[int, float] = {}
        for name, held in others.items():
            index = index_of.get(name)
            if index is None or rows[index] is None:
                continue
            tokens = prompt_tokens - held
            if tokens > uncached:
                less[index] = tokens
            else:
                more[index] = max(1.0, tokens)
        return less, more

    def _crowding(
        self, request: RequestView, uncached: float, *apart: Mapping[int, float]
    ) -> float:
        stay_s = (
            self._queue_s
            + self._ttft_base_s
            + self._prefill_s * uncached
            + self._tpot_s * request.output_tokens
        )
        for tokens_of in apart:
            for index, tokens in tokens_of.items():
                stay_s += self._speeds[index].prefill_s_per_token * (tokens - uncached)
        return crowding_of(self._num_others, stay_s)

    def _by_bound(self, request: RequestView, uncached: float, crowding: float) -> list[_Group]:
        """Groups in order of what they may cost at least: the sooner the best, the less to do."""
        output = request.output_tokens
        found = []
        for number, group in enumerate(self._groups):
            if not group.rows:
                continue
            num_others = group.rows[0][0]
            prefill_s = group.ttft_base_s + group.prefill_s_per_token * uncached
            tpot_s = group.tpot_base_s + group.tpot_s_per_request * (num_others + 1)
            stall = STALL_WEIGHT * num_others
            cost_s = tpot_s * output + prefill_s * (1 + stall + crowding * (prefill_s / 2))
            found.append((cost_s, number))
        found.sort()
        return [self._groups[number] for _, number in found]

    def _make_groups(self) -> None:
        """Sort into stripes by the speed of prefill, and each by that of decoding."""
        speeds = self._speeds = [one.speed for one in self.candidates]
        count = len(speeds)
        in_order = sorted(range(count), key=lambda index: speeds[index].prefill_s_per_token)
        width = math.ceil(count / math.ceil(math.sqrt(count / _GROUP_SIZE)))
        groups: list[_Group | None] = [None] * count
        self._groups = []
        for start in range(0, count, width):
            stripe = sorted(
                in_order[start : start + width], key=lambda index: speeds[index].tpot_base_s
            )
            for first in range(0, len(stripe), _GROUP_SIZE):
                members = stripe[first : first + _GROUP_SIZE]
                group = _Group([speeds[index] for index in members])
                self._groups.append(group)
                for index in members:
                    groups[index] = group
        self._group_of = [group for group in groups if group is not None]
        self._is_grouped = True
        self._num_others = 0
        self._queue_s = self._ttft_base_s = self._prefill_s = self._tpot_s = 0.0
        for index in self._open:
            row = self._rows[index]
            assert row is not None
            self._group_of[index].rows.append(row)
            self._count(row, 1)
        for group in self._groups:
            group.rows.sort()

    def _take_out(self, row: _Row) -> None:
        if self._is_grouped:
            rows = self._group_of[row[2]].rows
            del rows[bisect_left(rows, row)]
            self._count(row, -1)

    def _count(self, row: _Row, sign: int) -> None:
        """Add a row to the sums, or take it away."""
        num_others, tokens, index, num_offline = row
        speed = self._speeds[index]
        tpot_s = speed.tpot_base_s + speed.tpot_s_per_request * (num_others + 1)
        if num_offline:
            group = self._group_of[index]
            group.least_caring = min(group.least_caring, caring_of(num_others, num_offline))
        self._num_others += sign * num_others
        self._queue_s += sign * speed.prefill_s_per_token * tokens
        self._ttft_base_s += sign * speed.ttft_base_s
        self._prefill_s += sign * speed.prefill_s_per_token
        self._tpot_s += sign * tpot_s
