"""The fleet as a worker has it: the control process says who is there, all workers book load.

What traffic meets here (an instance that refuses a connection) holds here at once, and is told to
the control process, whose answer replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from xllm_plugin.service import lifecycle
from xllm_plugin.service.config import InstanceEntry
from xllm_plugin.service.fleet import Fleet, Instance
from xllm_plugin.service.lifecycle import Life, State, Timings
from xllm_plugin.service.processes.messages import Failure, FleetNews, InstanceNews
from xllm_plugin.service.processes.news import IN_FLIGHT, LOAD_WORDS, OFFLINE, PREFILL, TOKENS
from xllm_plugin.service.processes.shared import CounterTable
from xllm_plugin.service.upstream import Pool

__all__ = ["MirrorFleet"]

_MAX_TTFTS: Final = 4096
"""Between two reports; more teach nothing."""


class MirrorFleet(Fleet):
    """A copy of the control process's fleet, with connections of its own.

    Args:
        timings: when failures count, until the control process has judged them.
        make_pool: makes the connection pool of an entry.
        loads: where all workers count what they book.
        tell: takes what traffic has met to the control process.
        clock: monotonic seconds; may stand still while the event loop works.
    """

    def __init__(
        self,
        timings: Timings,
        make_pool: Callable[[InstanceEntry], Pool],
        *,
        loads: CounterTable,
        tell: Callable[[Failure], None],
        clock: Callable[[], float],
    ) -> None:
        super().__init__(timings, make_pool, clock)
        self.number = 0
        """Of the last news taken in."""
        self.ttfts: list[tuple[str, float, float]] = []
        """Instance, tokens computed before a first token, seconds; taken by reports."""
        self._loads = loads
        self._tell = tell
        self._num_slots = 0
        self._looked_s = -1.0

    # -- what the control process says ----------------------------------------------------------

    def take(self, news: FleetNews) -> None:
        """Bring the fleet to what the control process says."""
        for change in news.changed:
            self._change(change)
        for figures in news.figures:
            instance = self._instances.get(figures.name)
            if instance is not None:
                instance.foreign_requests = figures.foreign_requests
                instance.num_waiting = figures.num_waiting
                if figures.speed != instance.speed:  # else the object stays: rankings compare that
                    instance.speed = figures.speed
                self.touched(instance)
        for name, life in news.gone.items():
            instance = self._instances.get(name)
            if instance is not None:
                instance.life = life  # requests that still run there see why
                self._retire(instance, life.reason)
        self.number = news.number
        self._looked_s = -1.0

    # -- what traffic does ----------------------------------------------------------------------

    def candidates(self, model: str | None) -> Sequence[Instance]:
        """Who can take a request for `model`, with the load of all workers."""
        self._look()
        return super().candidates(model)

    def book(self, instance: Instance, cost_tokens: int, *, is_offline: bool = False) -> None:
        """Count a request as running there, for all workers to see."""
        super().book(instance, cost_tokens, is_offline=is_offline)
        self._loads.add(instance.slot, IN_FLIGHT, 1)
        if is_offline:
            self._loads.add(instance.slot, OFFLINE, 1)
        self._loads.add(instance.slot, TOKENS, cost_tokens)

    def release(self, instance: Instance, cost_tokens: int, *, is_offline: bool = False) -> None:
        """Take back what `book` counted."""
        super().release(instance, cost_tokens, is_offline=is_offline)
        self._loads.add(instance.slot, IN_FLIGHT, -1)
        if is_offline:
            self._loads.add(instance.slot, OFFLINE, -1)
        self._loads.add(instance.slot, TOKENS, -cost_tokens)

    def expect_prefill(self, instance: Instance, num_tokens: int) -> None:
        """Count prompt tokens that it has to compute; below 0: take them back."""
        super().expect_prefill(instance, num_tokens)
        self._loads.add(instance.slot, PREFILL, num_tokens)

    def report(self, instance: Instance, event: lifecycle.Event) -> None:
        """Stop choosing an instance that has failed, and say so to who judges it."""
        life = instance.life
        if not isinstance(event, lifecycle.Failed) or life.state is not State.READY:
            return  # a thousand broken streams are one piece of news
        if self._instances.get(instance.name) is not instance:
            return
        self._become(instance, lifecycle.next_life(life, event, self.clock(), self.timings))
        self._tell(Failure(instance.name, life.incarnation, event.reason, event.certain))

    def observe_ttft(self, instance: Instance, num_tokens: float, seconds: float) -> None:
        """Keep a measurement for the control process, which fits the speeds."""
        if len(self.ttfts) < _MAX_TTFTS:
            self.ttfts.append((instance.name, num_tokens, seconds))

    def tick(self) -> None:
        """States and speeds change by news alone."""

    # -- parts ----------------------------------------------------------------------------------

    def _change(self, news: InstanceNews) -> None:
        entry = news.entry
        known = self._instances.get(entry.name)
        if known is not None and known.entry == entry:
            instance = known
            if news.life.incarnation != known.life.incarnation:
                self._forget_incarnation(known)
        else:
            instance = Instance(entry, news.source, news.life, self._make_pool(entry))
            if known is not None:
                instance.stats = known.stats
                self._retire(known, "replaced")
            self._instances[entry.name] = instance
        instance.slot = news.slot
        instance.models = news.models
        instance.kv_events = news.kv_events
        instance.resumes, instance.scales_out = news.resumes, news.scales_out
        self._num_slots = max(self._num_slots, news.slot + 1)
        self._become(instance, news.life)

    def _become(self, instance: Instance, life: Life) -> None:
        instance.life = life
        self._forget_candidates()

    def _retire(self, instance: Instance, reason: str) -> None:
        """Forget it, without a line in the log: the control process has written one."""
        del reason
        instance.pool.close_idle()
        if self._instances.get(instance.name) is instance:
            del self._instances[instance.name]
        self._forget_candidates()

    def _look(self) -> None:
        """Take in what other workers have booked: once for each time that the clock shows.

        The loop's clock has milliseconds, and what this worker has booked in one it knows.
        """
        now_s = self.clock()
        if now_s == self._looked_s:
            return
        self._looked_s = now_s
        in_flight, tokens, prefill, offline = (
            self._loads.totals(word, self._num_slots) for word in LOAD_WORDS
        )
        for instance in self._instances.values():
            slot = instance.slot
            load = in_flight[slot], tokens[slot], prefill[slot], offline[slot]
            if load != (
                instance.in_flight,
                instance.outstanding_tokens,
                instance.prefill_tokens,
                instance.offline_requests,
            ):
                instance.in_flight, instance.outstanding_tokens, instance.prefill_tokens, _ = load
                instance.offline_requests = offline[slot]
                self.touched(instance)
