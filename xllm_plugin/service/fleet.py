"""The instances that the service knows, with their load and state.  One object owns all of it.

Registries and probes report events; `Fleet` runs them through `lifecycle` and keeps the lists of
candidates that routing reads.  Routing changes load counters only, through `book`, `release` and
`expect_prefill`.  Whatever a policy may look at changes here, or is said here (`touched`).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from xllm_plugin.errors import InternalError, MisuseError
from xllm_plugin.registration import KvEventSource, Load
from xllm_plugin.service import lifecycle
from xllm_plugin.service.config import InstanceEntry
from xllm_plugin.service.lifecycle import Life, State, Timings
from xllm_plugin.service.speed import Paces, Speed, SpeedMeter
from xllm_plugin.service.stats import Stats
from xllm_plugin.service.upstream import Pool

__all__ = ["Fleet", "Instance", "Queue"]

logger = logging.getLogger(__name__)


class _Models(NamedTuple):
    """What is served, summed up over instances."""

    candidates: Sequence[Instance]
    """Of any model."""
    merged: dict[str, dict[str, Any]]
    """Name -> record; of equal names, the first candidate's."""
    common: frozenset[str]
    """That every candidate has."""
    names: frozenset[str]
    """That any instance has, in whatever state."""


class Queue(NamedTuple):
    """What an instance has on its hands, requests of others included, as it said last."""

    num_running: int
    num_waiting: int
    kv_usage: float
    """Share of its KV cache in use, 0 to 1."""


class Instance:
    """One server: its entry, its life, its load and its connections."""

    def __init__(self, entry: InstanceEntry, source: str, life: Life, pool: Pool) -> None:
        self.entry = entry
        self.source = source
        self.life = life
        self.pool = pool
        self.has_incarnation = life.incarnation != ""
        """It says itself which one it is; a plain server is told apart by its start time."""
        self.name = entry.name
        self.capacity = entry.capacity
        self.max_in_flight: float | None = entry.max_in_flight
        digest = hashlib.blake2b(entry.name.encode(), digest_size=8).digest()
        self.name_hash = int.from_bytes(digest, "little")
        self.models: dict[str, dict[str, Any]] = {}
        """Name -> its record in /v1/models."""
        self.slot = -1
        """Its column in counters that several processes share (`processes/`)."""
        self.in_flight = 0
        self.offline_requests = 0
        self.outstanding_tokens = 0
        self.foreign_requests = 0
        self.num_waiting = 0
        """Requests that wait there, by its last report."""
        self.reported: dict[str, float] = {}
        """What its /metrics said last."""
        self.metrics_fault = ""
        """Why they say nothing, if they do not."""
        self.lease_s: float | None = None
        """For how long its lease at a coordinator was renewed last; None: the settings say it."""
        self.load: Load | None = None
        """What its heartbeat said last; plain servers send none."""
        self.resumes = self.has_incarnation
        """It can continue the streams of others: it has this plugin, as far as it has been told."""
        self.scales_out: bool | None = None
        """It has vLLM's scale-out routes, which continue some streams; None: not asked yet."""
        self.kv_events: tuple[KvEventSource, ...] = ()
        """Where it says that it publishes its prefix cache, if its entry does not."""
        self.prefill_tokens = 0
        """Prompt tokens sent there that it has not computed yet, as far as we know."""
        self.paces = Paces()
        self.speed = Speed()
        self.stats = Stats()
        self.num_idle_elsewhere = 0
        """Idle connections that other processes of ours have there."""

    @property
    def num_idle_connections(self) -> int:
        """Open, and unused at the moment."""
        return len(self.pool) + self.num_idle_elsewhere

    @property
    def continues(self) -> str:
        """How it continues the streams of others: "plugin", "scale-out", or "no"."""
        if self.resumes:
            return "plugin"
        return "scale-out" if self.scales_out else "no"

    @property
    def queue(self) -> Queue | None:
        """By its heartbeat, or else by its /metrics; None if it has said nothing."""
        if self.load is not None:
            return Queue(self.load.num_running, self.load.num_waiting, self.load.kv_usage)
        said = self.reported
        if "vllm:num_requests_running" not in said:
            return None
        return Queue(
            round(said["vllm:num_requests_running"]),
            round(said.get("vllm:num_requests_waiting", 0.0)),
            said.get("vllm:kv_cache_usage_perc", 0.0),
        )


class Fleet:
    """All instances by name.

    Args:
        timings: when silence and failures count.
        make_pool: makes the connection pool of an entry.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        timings: Timings,
        make_pool: Callable[[InstanceEntry], Pool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.timings = timings
        self.clock = clock
        self._make_pool = make_pool
        self._instances: dict[str, Instance] = {}
        self._candidates: dict[str | None, list[Instance]] = {}
        self._models: _Models | None = None
        self._watchers: list[set[Instance]] = []
        self._meter = SpeedMeter()
        """Of all instances together, as if each had capacity 1: where a new one begins."""
        self._ticked_s = clock()
        self.troubles: dict[str, str] = {}
        """What the service goes on without: a part, such as a registry -> what is wrong with it."""

    def __iter__(self) -> Any:
        return iter(tuple(self._instances.values()))

    def get(self, name: str) -> Instance | None:
        """The instance of that name, or None."""
        return self._instances.get(name)

    def register(
        self, entry: InstanceEntry, *, source: str, incarnation: str = "", leased: bool = False
    ) -> Instance:
        """Add an instance, or begin a new incarnation of one that is known.

        A changed address is a new incarnation too: what is known of the old server is void.

        Raises:
            MisuseError: another source has an instance of that name.
        """
        event = lifecycle.Registered(incarnation, leased)
        known = self._instances.get(entry.name)
        if known is not None and known.source != source:
            raise MisuseError(
                f"instance {entry.name!r} is known from source {known.source!r} already; give the "
                f"one from {source!r} another name."
            )
        if known is not None and known.entry == entry:
            if leased or incarnation:
                self.report(known, event)
            return known
        life = lifecycle.begin(event, self.clock())
        instance = Instance(entry, source, life, self._make_pool(entry))
        self._reckon(instance)
        if known is not None:
            instance.stats = known.stats
            self._retire(known, "replaced")
        self._instances[entry.name] = instance
        self._forget_candidates()
        logger.info("instance %s: joining (%s)", entry.name, source)
        return instance

    def report(self, instance: Instance, event: lifecycle.Event) -> None:
        """Run one event through the state machine and act on what changed."""
        before = instance.life
        after = lifecycle.next_life(before, event, self.clock(), self.timings)
        if after is before:
            return
        instance.life = after
        if after.incarnation != before.incarnation:
            self._forget_incarnation(instance)
        if after.state is not before.state:
            logger.info("instance %s: %s (%s)", instance.name, after.state, after.reason)
            self._forget_candidates()
            if after.state is State.GONE:
                self._retire(instance, after.reason)

    def tick(self) -> None:
        """Let time pass for every instance, and learn from what was measured in it."""
        now_s = self.clock()
        passed_s, self._ticked_s = now_s - self._ticked_s, now_s
        fleet = self._meter.speed(Speed())
        for instance in self:
            instance.paces.fade(passed_s)
            self._reckon(instance, fleet)
            self.report(instance, lifecycle.Tick(instance.in_flight))

    def set_models(self, instance: Instance, models: Mapping[str, dict[str, Any]]) -> None:
        """Take over what its /v1/models said."""
        if instance.models != models:
            instance.models = dict(models)
            self._forget_candidates()

    def set_load(self, instance: Instance, load: Load) -> None:
        """Take over how many requests it has, ours included, and how fast it decodes them."""
        num_requests = load.num_running + load.num_waiting
        instance.foreign_requests = max(0, num_requests - instance.in_flight)
        instance.num_waiting = load.num_waiting
        self.touched(instance)
        if load.tpot_s is not None:
            instance.paces.tpot.observe(max(1, load.num_running), load.tpot_s)
            self._meter.observe_tpot(load.num_running, load.tpot_s * instance.capacity)

    def observe_ttft(self, instance: Instance, num_tokens: float, seconds: float) -> None:
        """A first token came `seconds` after its request, `num_tokens` computed before it."""
        instance.paces.ttft.observe(num_tokens, seconds)
        self._meter.observe_ttft(num_tokens, seconds * instance.capacity)

    def _reckon(self, instance: Instance, fleet: Speed | None = None) -> None:
        fleet, capacity = fleet or self._meter.speed(Speed()), instance.capacity
        prior = Speed(
            fleet.ttft_base_s / capacity,
            fleet.prefill_s_per_token / capacity,
            fleet.tpot_base_s / capacity,
            fleet.tpot_s_per_request / capacity,
        )
        speed = instance.paces.speed(prior)
        if speed != instance.speed:
            instance.speed = speed
            self.touched(instance)

    def candidates(self, model: str | None) -> Sequence[Instance]:
        """Who can take a request for `model` (None: for any): the ready, or else the suspect."""
        found = self._candidates.get(model)
        if found is None:
            found = self._find(model)
            if found:  # names come from clients: only those that exist are kept
                self._candidates[model] = found
        return found

    def models(self) -> dict[str, dict[str, Any]]:
        """Every model of every usable instance; of equal names, the first.  Not to be changed."""
        return self._all_models().merged

    def common_models(self) -> frozenset[str]:
        """Names of the models that every usable instance has."""
        return self._all_models().common

    def watch(self) -> set[Instance]:
        """A set that gets every instance that changes for policies, until candidates change."""
        changed: set[Instance] = set()
        self._watchers.append(changed)
        return changed

    def unwatch(self, changed: set[Instance]) -> None:
        """Give back what `watch` gave."""
        self._watchers = [one for one in self._watchers if one is not changed]

    def touched(self, instance: Instance) -> None:
        """What a policy may know of `instance` has changed."""
        for changed in self._watchers:
            changed.add(instance)

    def book(self, instance: Instance, cost_tokens: int, *, is_offline: bool = False) -> None:
        """Count a request as running there, from dispatch on."""
        instance.in_flight += 1
        instance.offline_requests += is_offline
        instance.outstanding_tokens += cost_tokens
        self.touched(instance)

    def release(self, instance: Instance, cost_tokens: int, *, is_offline: bool = False) -> None:
        """Take back what `book` counted."""
        instance.in_flight -= 1
        instance.offline_requests -= is_offline
        instance.outstanding_tokens -= cost_tokens
        self.touched(instance)

    def expect_prefill(self, instance: Instance, num_tokens: int) -> None:
        """Count prompt tokens that it has to compute; below 0: take them back."""
        instance.prefill_tokens += num_tokens
        self.touched(instance)

    def check_integrity(self) -> None:
        """Raise `InternalError` unless the counters are those of no request."""
        for instance in self:
            counts = instance.in_flight, instance.outstanding_tokens, instance.prefill_tokens
            if any(counts) or instance.offline_requests:
                raise InternalError(
                    f"idle, but {instance.name} counts {instance.in_flight} requests, "
                    f"{instance.outstanding_tokens} tokens, {instance.prefill_tokens} to compute "
                    f"and {instance.offline_requests} offline requests"
                )

    def _forget_candidates(self) -> None:
        """They are listed anew when asked for, and who watched the old lists is told no more."""
        self._candidates.clear()
        self._watchers.clear()

    def _find(self, model: str | None) -> list[Instance]:
        if model is not None and model not in self._all_models().names:
            return []  # clients may ask for any name, as often as they like
        for state in (State.READY, State.SUSPECT):
            found = [
                instance
                for instance in self._instances.values()
                if instance.life.state is state and (model is None or model in instance.models)
            ]
            if found:
                return found
        return []

    def _all_models(self) -> _Models:
        """Kept for as long as the candidates are these."""
        candidates, found = self.candidates(None), self._models
        if found is None or found.candidates is not candidates:
            merged: dict[str, dict[str, Any]] = {}
            for instance in candidates:
                for name, record in instance.models.items():
                    merged.setdefault(name, record)
            own = [frozenset(instance.models) for instance in candidates]
            common = frozenset.intersection(*own) if own else frozenset()
            names = frozenset(name for one in self._instances.values() for name in one.models)
            found = self._models = _Models(candidates, merged, common, names)
        return found

    def _forget_incarnation(self, instance: Instance) -> None:
        instance.pool.close_idle()
        instance.models = {}
        instance.reported = {}
        instance.metrics_fault = ""
        instance.load = None
        instance.resumes = instance.has_incarnation
        instance.scales_out = None
        instance.kv_events = ()
        instance.paces = Paces()
        self._reckon(instance)
        instance.foreign_requests = 0
        instance.num_waiting = 0
        self._forget_candidates()

    def _retire(self, instance: Instance, reason: str) -> None:
        """Forget it; requests that still run there finish on their own connections."""
        instance.pool.close_idle()
        if self._instances.get(instance.name) is instance:
            del self._instances[instance.name]
        self._forget_candidates()
        logger.info("instance %s: forgotten (%s)", instance.name, reason)
