"""The fleet of the control process, and what each worker has been told of it.

Level-triggered: a worker is told what differs from what it was told last, so one that is slow, or
was started just now, needs no history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from xllm_plugin.registration import Load
from xllm_plugin.service import lifecycle
from xllm_plugin.service.config import InstanceEntry
from xllm_plugin.service.fleet import Fleet, Instance
from xllm_plugin.service.lifecycle import Life, State, Timings
from xllm_plugin.service.processes.messages import Figures, FleetNews, InstanceNews
from xllm_plugin.service.processes.shared import CounterTable
from xllm_plugin.service.processes.slots import Slots
from xllm_plugin.service.upstream import Pool

__all__ = ["IN_FLIGHT", "LOAD_WORDS", "OFFLINE", "PREFILL", "TOKENS", "Audience", "ControlFleet"]

IN_FLIGHT: Final = 0
TOKENS: Final = 1
PREFILL: Final = 2
OFFLINE: Final = 3
LOAD_WORDS: Final = (IN_FLIGHT, TOKENS, PREFILL, OFFLINE)
"""Words of an instance's line."""


class ControlFleet(Fleet):
    """The fleet as registries and probes make it; its load is what the workers have booked.

    Args:
        timings: when silence and failures count.
        make_pool: makes the connection pool of an entry, which is not used here.
        loads: what workers have booked.
        slots: of instances.
        changed: is called when workers should be told at once.
    """

    def __init__(
        self,
        timings: Timings,
        make_pool: Callable[[InstanceEntry], Pool],
        *,
        loads: CounterTable,
        slots: Slots,
        changed: Callable[[], None],
    ) -> None:
        super().__init__(timings, make_pool)
        self.last_lives: dict[str, Life] = {}
        """How those ended that are gone, until everybody was told."""
        self._loads = loads
        self._slots = slots
        self._changed = changed

    def __iter__(self) -> Iterator[Instance]:
        """Every instance, with its load of now."""
        for instance in self.all_without_load():
            self._look(instance)
            yield instance

    def get(self, name: str) -> Instance | None:
        """The instance of that name with its load of now, or None."""
        instance = self.get_without_load(name)
        if instance is not None:
            self._look(instance)
        return instance

    def all_without_load(self) -> Iterator[Instance]:
        """Every instance; its load is of some time ago: to add up the workers' takes time."""
        yield from super().__iter__()

    def get_without_load(self, name: str) -> Instance | None:
        """The instance of that name, its load of some time ago, or None."""
        return super().get(name)

    def register(
        self, entry: InstanceEntry, *, source: str, incarnation: str = "", leased: bool = False
    ) -> Instance:
        """Add an instance, or begin a new incarnation of one that is known.

        Raises:
            MisuseError: another source has an instance of that name, or there are too many.
        """
        slot = self._slots.slot(entry.name)
        instance = super().register(entry, source=source, incarnation=incarnation, leased=leased)
        self._slots.slot(entry.name)  # one that was replaced has been forgotten meanwhile
        self.last_lives.pop(entry.name, None)
        instance.slot = slot
        self._changed()
        return instance

    def report(self, instance: Instance, event: lifecycle.Event) -> None:
        """Run one event through the state machine and act on what changed."""
        before = instance.life
        super().report(instance, event)
        after = instance.life
        if after.state is not before.state or after.incarnation != before.incarnation:
            self._changed()

    def set_load(self, instance: Instance, load: Load) -> None:
        """Take over how many requests it has, ours of now included."""
        self._look(instance)
        super().set_load(instance, load)

    def _retire(self, instance: Instance, reason: str) -> None:
        super()._retire(instance, reason)
        if self.get_without_load(instance.name) is None:
            self._slots.forget(instance.name)
            self.last_lives[instance.name] = instance.life

    def _look(self, instance: Instance) -> None:
        total, slot = self._loads.total, instance.slot
        instance.in_flight = total(slot, IN_FLIGHT)
        instance.outstanding_tokens = total(slot, TOKENS)
        instance.prefill_tokens = total(slot, PREFILL)
        instance.offline_requests = total(slot, OFFLINE)


class Audience:
    """What one worker has been told of the fleet."""

    def __init__(self) -> None:
        self._told: dict[str, InstanceNews | None] = {}
        """None: it knows the instance, and is to be told again."""
        self._figures: dict[str, Figures] = {}
        self.edition: object = None
        """Of the API keys (`KeyRing.edition`)."""
        self.has_heard_else = False
        """It was told something that only the number of the next news stands for."""

    def forget(self, name: str) -> None:
        """Tell it of this instance again, or that it is gone, whatever it was told."""
        if name in self._told:
            self._told[name] = None

    def news(self, fleet: ControlFleet) -> FleetNews | None:
        """What it does not know yet, taken as told; None if there is nothing."""
        told, figures = self._told, self._figures
        news = FleetNews(number=0, changed=[], figures=[], gone={})
        names = set()
        for instance in fleet.all_without_load():
            name = instance.name
            names.add(name)
            now = _described(instance)
            if told.get(name) != now:
                told[name] = now
                news.changed.append(now)
                figures.pop(name, None)  # another incarnation has forgotten them
            figure = Figures(name, instance.foreign_requests, instance.num_waiting, instance.speed)
            if figures.get(name) != figure:
                figures[name] = figure
                news.figures.append(figure)
        for name in told.keys() - names:
            del told[name]
            figures.pop(name, None)
            news.gone[name] = fleet.last_lives.get(name) or _LOST
        is_news = bool(news.changed or news.figures or news.gone or self.has_heard_else)
        self.has_heard_else = False
        return news if is_news else None


_LOST: Final = Life("", leased=False, state=State.GONE, since_s=0.0, seen_s=0.0)


def _described(instance: Instance) -> InstanceNews:
    # Workers judge nothing by signs of life, which come every second.
    life = replace(instance.life, seen_s=0.0, failures=0)
    return InstanceNews(
        instance.entry,
        instance.source,
        instance.slot,
        life,
        instance.models,
        instance.kv_events,
        instance.resumes,
        instance.scales_out,
    )
