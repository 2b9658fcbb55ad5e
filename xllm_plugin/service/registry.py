"""Where instances come from.  Each registry keeps its own entries of the fleet, and no others.

The one that shares a fleet with other services is in `etcd_registry.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import TypeAdapter, ValidationError

from xllm_plugin.errors import ConfigError, MisuseError
from xllm_plugin.registration import Heartbeat, Registration
from xllm_plugin.service import lifecycle
from xllm_plugin.service.config import InstanceEntry
from xllm_plugin.service.fleet import Fleet, Instance

__all__ = [
    "Embedded",
    "Registrations",
    "Registry",
    "StaticList",
    "WatchedFile",
    "entry_of",
    "read_entries",
]

logger = logging.getLogger(__name__)

_ENTRIES = TypeAdapter(list[InstanceEntry])


class Registry(Protocol):
    """A source of instances."""

    async def run(self, fleet: Fleet) -> None:
        """Keep the fleet up to date until cancelled, or return when nothing will change.

        What keeps it from that stands in `fleet.troubles`, under a name of its own, meanwhile.
        """


class Registrations(Protocol):
    """Takes in instances that come by themselves, and what operators want of any instance.

    Its methods raise `MisuseError` for what is not so (no such lease), `ValidationError` for what
    is none (an address), and `NotNowError` if a coordinator is away.
    """

    async def register(self, asked: Registration) -> Instance:
        """Give an instance a lease."""

    async def heartbeat(self, name: str, beat: Heartbeat) -> Instance:
        """Renew a lease and take the load over."""

    async def deregister(self, name: str, incarnation: str) -> None:
        """Let an instance go."""

    async def drain(self, instance: Instance) -> None:
        """Send it nothing new."""

    async def undrain(self, instance: Instance) -> None:
        """Take that back."""

    def in_flight(self, instance: Instance) -> int | None:
        """Requests that run there; None if there may be some that are not known here."""

    def describe(self) -> dict[str, Any]:
        """What it is and how it is, for the admin port."""


class StaticList:
    """The instances that the settings name."""

    source = "static"

    def __init__(self, entries: Iterable[InstanceEntry]) -> None:
        self.entries = tuple(entries)

    async def run(self, fleet: Fleet) -> None:
        """Bring the fleet to the list; what was in an earlier list and is not in this one goes."""
        _apply(fleet, self.source, self.entries)


class WatchedFile:
    """A YAML or JSON list of entries; a file that cannot be read changes nothing and is said."""

    source = "file"

    def __init__(self, path: Path, poll_s: float = 1.0) -> None:
        self.path = path
        self._poll_s = poll_s

    @classmethod
    def forget(cls, fleet: Fleet) -> None:
        """Withdraw what a file brought that is no longer followed."""
        fleet.troubles.pop(cls.source, None)
        _apply(fleet, cls.source, ())

    async def run(self, fleet: Fleet) -> None:
        """Follow the file."""
        seen: object = None
        while True:
            try:
                status = self.path.stat()
                stamp: object = (status.st_mtime_ns, status.st_size, status.st_ino)
            except OSError as error:
                stamp = str(error)
            if stamp != seen:
                seen = stamp
                self._read(fleet)
            await asyncio.sleep(self._poll_s)

    def _read(self, fleet: Fleet) -> None:
        try:
            entries = read_entries(self.path)
        except ConfigError as error:
            logger.error("%s The instances stay as they are.", error)  # noqa: TRY400 - the user's
            fleet.troubles[self.source] = str(error)
            return
        fleet.troubles.pop(self.source, None)
        _apply(fleet, self.source, entries)


class Embedded:
    """Instances that register themselves over HTTP, hold a lease and send heartbeats.

    The admin port calls these methods; leases lapse in the fleet's own clock.

    Args:
        fleet: takes them in.
        has_workers: others carry the traffic, and learn a moment later who is not to be sent to.
    """

    source = "embedded"

    def __init__(self, fleet: Fleet, *, has_workers: bool = False) -> None:
        self._fleet = fleet
        self._has_workers = has_workers

    async def run(self, fleet: Fleet) -> None:
        """Nothing to follow: instances come by themselves."""

    def describe(self) -> dict[str, Any]:
        """This service knows its instances alone."""
        return {"kind": "embedded"}

    async def register(self, asked: Registration) -> Instance:
        """Take an instance in.  `MisuseError`: its name is somebody else's."""
        instance = self._fleet.register(
            entry_of(asked), source=self.source, incarnation=asked.incarnation, leased=True
        )
        if not instance.models:  # until it is asked: its models are known, though not ready
            self._fleet.set_models(instance, {name: {"id": name} for name in asked.models})
        return instance

    async def heartbeat(self, name: str, beat: Heartbeat) -> Instance:
        """Renew a lease and take the load over.

        Raises:
            MisuseError: there is no such lease (any more): register again.
        """
        instance = self._leased(name, beat.incarnation)
        # Whether it can take requests is what probes find out; a heartbeat keeps it known.
        self._fleet.report(instance, lifecycle.Alive(beat.incarnation, ready=False))
        if beat.is_draining:
            self._fleet.report(instance, lifecycle.Drain())
        if beat.load is not None:
            instance.load = beat.load
            self._fleet.set_load(instance, beat.load)
        return instance

    async def deregister(self, name: str, incarnation: str) -> None:
        """Let an instance go.  Raises `MisuseError` as `heartbeat` does."""
        self._fleet.report(self._leased(name, incarnation), lifecycle.Withdrawn(lifecycle.LEFT))

    async def drain(self, instance: Instance) -> None:
        """Send it nothing new."""
        self._fleet.report(instance, lifecycle.Drain())

    async def undrain(self, instance: Instance) -> None:
        """Take that back."""
        self._fleet.report(instance, lifecycle.Undrain())

    def in_flight(self, instance: Instance) -> int | None:
        """Requests that run there; None for none where a worker may be sending one just now."""
        return (instance.in_flight or None) if self._has_workers else instance.in_flight

    def _leased(self, name: str, incarnation: str) -> Instance:
        instance = self._fleet.get(name)
        if (
            instance is None
            or instance.source != self.source
            or instance.life.incarnation != incarnation
            or instance.life.state is lifecycle.State.GONE
        ):
            raise MisuseError(
                f"no lease of {name!r} with incarnation {incarnation!r} is known here; register "
                "again."
            )
        return instance


def entry_of(asked: Registration) -> InstanceEntry:
    """What is kept of a registration.  Raises `ValidationError` if its address is none."""
    return InstanceEntry(
        url=asked.url,
        name=asked.name,
        capacity=asked.capacity,
        max_in_flight=asked.max_in_flight,
        role=asked.role,
        kv_events=asked.kv_events,
    )


def read_entries(path: Path) -> list[InstanceEntry]:
    """Read a file of instances.  Raises `ConfigError` when it is not one."""
    try:
        return _ENTRIES.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")) or [])
    # RecursionError is what `yaml` makes of thousands of brackets.
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(
            f"instances.file {path} is not a list of instances ({detail}); write one URL a line: "
            "'- http://host:port'."
        ) from error


def _apply(fleet: Fleet, source: str, entries: Iterable[InstanceEntry]) -> None:
    wanted = {entry.name: entry for entry in entries}
    for instance in fleet:
        if instance.source == source and instance.name not in wanted:
            fleet.report(instance, lifecycle.Withdrawn(f"no longer in the {source} list"))
    for entry in wanted.values():
        try:
            fleet.register(entry, source=source)
        except MisuseError as error:
            logger.error("%s", error)  # noqa: TRY400 - two lists disagree; the others go on
