"""The registry that several services share: etcd v3.

::

    away --read--> following: a watch tells what changes, a read now and then checks it
      ^               |  neither answers
      +---------------+

While etcd is away the service goes on with what it knew last: the fleet is not touched, probes go
on, and no lease lapses here.  When it is back, the first whole read puts right what has changed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from itertools import groupby
from typing import Any

from xllm_plugin.errors import EtcdError, MisuseError
from xllm_plugin.etcd import wire
from xllm_plugin.etcd.client import AsyncEtcdClient
from xllm_plugin.etcd.config import EtcdConfig, parse_url
from xllm_plugin.etcd.records import (
    DRAINS,
    INSTANCES,
    DrainRecord,
    InstanceRecord,
    key_of,
)
from xllm_plugin.etcd.view import View
from xllm_plugin.registration import Heartbeat, Registration
from xllm_plugin.service import lifecycle
from xllm_plugin.service.etcd_mirror import SOURCE, FleetMirror, Held
from xllm_plugin.service.fleet import Fleet, Instance
from xllm_plugin.service.registry import entry_of

__all__ = ["EtcdRegistry"]

logger = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 2.0


class EtcdRegistry:
    """Follows the instances that lie in etcd, and puts those there that register here.

    Args:
        fleet: brought up to date.
        config: says where etcd is.
        clock: monotonic seconds.

    Raises:
        ConfigError: a TLS file cannot be read.
    """

    def __init__(
        self, fleet: Fleet, config: EtcdConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        address = parse_url(config.url)
        self.is_connected = False
        self.num_failures = 0
        self.confirmed_s: float | None = None
        """When etcd last answered; None: never."""
        self._problem = "not asked yet"
        self._watch_problem = ""
        self._fleet = fleet
        self._config = config
        self._clock = clock
        self._prefix = address.prefix
        self._client = AsyncEtcdClient(address, config)
        self._view = View()
        self._mirror = FleetMirror(fleet, address.prefix)
        self._changed = asyncio.Event()

    # -- follow ---------------------------------------------------------------------------------

    async def run(self, fleet: Fleet) -> None:
        """Follow etcd until cancelled."""
        del fleet  # the one that it was made for
        retry_s = _FIRST_RETRY_S
        async with self._client:
            while True:
                began_s = self._clock()
                try:
                    await self._follow()
                except EtcdError as error:
                    self._lost(str(error))
                # A watch that ends at once is no reason to read the whole in a loop.
                lasted = self._clock() - began_s > self._config.poll_s
                retry_s = _FIRST_RETRY_S if lasted else min(_LAST_RETRY_S, 2 * retry_s)
                await asyncio.sleep(retry_s)

    async def _follow(self) -> None:
        """Until the watch ends, or has missed something.  `EtcdError`: etcd does not answer."""
        await self._read(anew=True)
        watching = asyncio.create_task(self._watch())
        try:
            while True:
                done, _ = await asyncio.wait({watching}, timeout=self._config.poll_s)
                is_complete = await self._read()
                if done:
                    watching.result()  # a fault of ours is raised
                if done or not is_complete:
                    return
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _read(self, *, anew: bool = False) -> bool:
        """Read everything; returns whether it was known already."""
        snapshot = await self._client.send(wire.read_all(self._prefix + "/"))
        changed = self._view.replace(snapshot, anew=anew)
        self._mirror.follow(self._view, changed)
        self._mirror.mend(self._view)
        self._heard()
        return not changed

    async def _watch(self) -> None:
        events = self._client.watch(self._prefix + "/", self._view.revision + 1)
        try:
            async for told in events:
                # A server that leaves says so one revision before its key goes.
                for _, one in groupby(told, key=lambda event: event.mod_revision):
                    self._mirror.follow(self._view, self._view.apply(one))
                self._heard()
                self._watch_problem = ""
        except EtcdError as error:
            if not self._watch_problem:  # where watches never work, that is said once
                logger.info("etcd: %s Reading anew.", error)
            self._watch_problem = str(error)
        finally:
            await events.aclose()

    def _heard(self) -> None:
        if not self.is_connected:
            logger.info("etcd: following %s, %d instances", self._prefix, len(self._mirror.held))
        self.is_connected, self._problem = True, ""
        self._fleet.troubles.pop(SOURCE, None)
        self.confirmed_s = self._clock()
        self._changed.set()
        self._changed = asyncio.Event()

    def _lost(self, problem: str) -> None:
        self.num_failures += 1
        if self.is_connected or self.num_failures == 1:
            logger.warning(
                "etcd is away (%s). Serving goes on with the %d instances that are known; nobody "
                "new is seen until it is back.",
                problem,
                len(self._mirror.held),
            )
        self.is_connected, self._problem = False, problem
        self._fleet.troubles[SOURCE] = f"away, its last known instances are used: {problem}"

    # -- see ------------------------------------------------------------------------------------

    @property
    def age_s(self) -> float | None:
        """Seconds since etcd last answered; None: never."""
        return None if self.confirmed_s is None else self._clock() - self.confirmed_s

    @property
    def num_problems(self) -> int:
        """Keys whose value is not used."""
        return len(self._mirror.problems)

    def describe(self) -> dict[str, Any]:
        """State of the connection, and keys that are not used."""
        age_s = self.age_s
        return {
            "kind": "etcd",
            "url": self._config.url,
            "state": "connected" if self.is_connected else "away",
            "problem": self._problem,
            "watch_problem": self._watch_problem,
            "age_s": None if age_s is None else round(age_s, 3),
            "revision": self._view.revision,
            "num_instances": len(self._mirror.held),
            "unused": dict(self._mirror.problems),
        }

    # -- instances that register at this service --------------------------------------------------

    async def register(self, asked: Registration) -> Instance:
        """Put an instance into etcd, and wait until it is seen there, as others see it.

        Raises:
            MisuseError: another source, or another address, has an instance of that name.
            EtcdError: etcd is away.
        """
        entry = entry_of(asked)
        known = self._fleet.get(entry.name)
        if known is not None and known.source != SOURCE:
            raise MisuseError(
                f"instance {entry.name!r} is known from source {known.source!r} already; give the "
                "one that registers another name."
            )
        record = InstanceRecord(**{**asked.model_dump(), "name": entry.name})
        held = self._mirror.held.get(entry.name)
        if held and held.entry.url != entry.url:
            raise MisuseError(
                f"instance {entry.name!r} is at {held.entry.url}; give the one at {entry.url} "
                "another name, or wait until the lease of that one has lapsed."
            )
        lease = held.found.lease if held and held.record.incarnation == asked.incarnation else 0
        ttl_s = await self._client.send(wire.keep_alive(lease)) if lease else 0
        if not ttl_s:
            granted = await self._client.send(wire.grant(math.ceil(self._fleet.timings.lease_s)))
            lease, ttl_s = granted.lease, granted.ttl_s
        await self._put(record, lease)
        instance = await self._seen(record, lease)
        instance.lease_s = ttl_s
        return instance

    async def heartbeat(self, name: str, beat: Heartbeat) -> Instance:
        """Renew a lease, whichever service it was given by, and take the load over.

        Raises:
            MisuseError: there is no such lease (any more): register again.
            EtcdError: etcd is away.
        """
        held, instance = self._leased(name, beat.incarnation)
        if beat.load is not None:
            instance.load = beat.load
            self._fleet.set_load(instance, beat.load)
        ttl_s = await self._client.send(wire.keep_alive(held.found.lease))
        if not ttl_s:
            raise _no_lease(name, beat.incarnation)
        instance.lease_s = ttl_s  # as it was granted, whatever the settings say by now
        if beat.is_draining and not held.record.is_draining:
            self._fleet.report(instance, lifecycle.Drain())
            await self._put(held.record.model_copy(update={"is_draining": True}), held.found.lease)
        return instance

    async def deregister(self, name: str, incarnation: str) -> None:
        """Let an instance go.  Errors as `heartbeat`."""
        await self.heartbeat(name, Heartbeat(incarnation=incarnation, is_draining=True))
        held, _ = self._leased(name, incarnation)
        await self._client.send(wire.revoke(held.found.lease))

    async def drain(self, instance: Instance) -> None:
        """Send it nothing new, and tell the other services.

        Raises:
            EtcdError: etcd is away: it drains here, and the others do not know.
        """
        self._fleet.report(instance, lifecycle.Drain())
        held = self._held(instance)
        if held is not None:
            drain = DrainRecord(incarnation=held.record.incarnation).model_dump_json().encode()
            key = key_of(self._prefix, DRAINS, instance.name)
            await self._share(wire.put(key, drain, held.found.lease), "drains")

    async def undrain(self, instance: Instance) -> None:
        """Take that back, here and there.  Raises `EtcdError` as `drain`."""
        self._fleet.report(instance, lifecycle.Undrain())
        if self._held(instance) is not None:
            call = wire.delete(key_of(self._prefix, DRAINS, instance.name))
            await self._share(call, "is used again")

    def in_flight(self, instance: Instance) -> int | None:
        """Requests that run there; None for nothing of ours: other services may have some."""
        return instance.in_flight or None

    def _held(self, instance: Instance) -> Held | None:
        return self._mirror.held.get(instance.name) if instance.source == SOURCE else None

    async def _share(self, call: wire.Call[None], what: str) -> None:
        try:
            await self._client.send(call)
        except EtcdError as error:
            raise EtcdError(
                f"it {what} here only; other services could not be told ({error}). Say it again "
                "when etcd is back."
            ) from error

    async def _put(self, record: InstanceRecord, lease: int) -> None:
        key = key_of(self._prefix, INSTANCES, record.name)
        await self._client.send(wire.put(key, record.model_dump_json().encode(), lease))

    async def _seen(self, record: InstanceRecord, lease: int) -> Instance:
        """The instance, once the watch has told of it."""
        try:
            async with asyncio.timeout(self._config.command_timeout_s):
                while True:
                    held, changed = self._mirror.held.get(record.name), self._changed
                    instance = self._mirror.mine(record.name)
                    if instance and held and held.record == record and held.found.lease == lease:
                        return instance
                    await changed.wait()
        except TimeoutError as error:
            raise EtcdError(
                f"{record.name} was put into etcd, which has not told of it within "
                f"{self._config.command_timeout_s:g} s."
            ) from error

    def _leased(self, name: str, incarnation: str) -> tuple[Held, Instance]:
        held, instance = self._mirror.held.get(name), self._mirror.mine(name)
        if held is None or instance is None or held.record.incarnation != incarnation:
            raise _no_lease(name, incarnation)
        return held, instance


def _no_lease(name: str, incarnation: str) -> MisuseError:
    return MisuseError(
        f"no lease of {name!r} with incarnation {incarnation!r} is known here; register again."
    )
