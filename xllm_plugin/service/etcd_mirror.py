"""Brings the fleet to what lies in etcd.  Level-triggered: it may be told the same again.

What etcd says of an instance, and what that means here:

* its record is there: it is known, and its lease is etcd's business; probes decide if it is ready;
* its record, or an operator's beside it, says that it drains: it drains, at every service;
* its record is gone after it said that it drains: it has left;
* its record is gone without a word: its lease has lapsed.  It is suspect, and forgotten later.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pydantic import ValidationError

from xllm_plugin.errors import MisuseError
from xllm_plugin.etcd.records import (
    DRAINS,
    INSTANCES,
    DrainRecord,
    InstanceRecord,
    key_of,
    split_key,
)
from xllm_plugin.etcd.view import View
from xllm_plugin.etcd.wire import KeyValue
from xllm_plugin.service import lifecycle
from xllm_plugin.service.config import InstanceEntry
from xllm_plugin.service.fleet import Fleet, Instance
from xllm_plugin.service.registry import entry_of

__all__ = ["SOURCE", "FleetMirror", "Held"]

logger = logging.getLogger(__name__)

SOURCE = "etcd"


@dataclass(frozen=True, slots=True)
class Held:
    """One instance as etcd has it."""

    found: KeyValue
    record: InstanceRecord
    entry: InstanceEntry


class FleetMirror:
    """The instances of a fleet that come from etcd.

    Args:
        fleet: brought up to date.
        prefix: of the keys.
    """

    def __init__(self, fleet: Fleet, prefix: str) -> None:
        self.held: dict[str, Held] = {}
        """By name."""
        self.problems: dict[str, str] = {}
        """Key -> why its value is not used."""
        self._fleet = fleet
        self._prefix = prefix
        self._drained: set[str] = set()
        """Names that drain because etcd says so, or did until their lease lapsed.  Others were
        drained here alone."""

    def follow(self, view: View, changed: set[str]) -> None:
        """Take over what has changed."""
        names = {found[1] for key in changed if (found := split_key(self._prefix, key))}
        for name in sorted(names):
            self._follow(view, name)

    def mend(self, view: View) -> None:
        """Try again what could not be taken over: a name may be free now."""
        self._drained = {name for name in self._drained if self.mine(name) is not None}
        missing = {self._key(name) for name in self.held if self.mine(name) is None}
        self.follow(view, missing | self.problems.keys())

    def mine(self, name: str) -> Instance | None:
        """The instance of that name, if it comes from etcd."""
        instance = self._fleet.get(name)
        return instance if instance is not None and instance.source == SOURCE else None

    def _follow(self, view: View, name: str) -> None:
        found = view.records.get(self._key(name))
        if found is None:
            self._lose(name)
            return
        held = self.held.get(name)
        if held is None or held.found != found:
            held = self._read(found, name)
        if held is None:
            return  # said; what it was before stays in force
        self.held[name] = held
        incarnation = held.record.incarnation
        try:
            instance = self._fleet.register(held.entry, source=SOURCE, incarnation=incarnation)
        except MisuseError as error:
            self._complain(found.key, str(error))
            return
        self.problems.pop(found.key, None)
        if not instance.models:
            models = {model: {"id": model} for model in held.record.models}
            self._fleet.set_models(instance, models)
        self._drain(instance, is_wanted=held.record.is_draining or self._is_drained(view, held))

    def _drain(self, instance: Instance, *, is_wanted: bool) -> None:
        if is_wanted:
            self._drained.add(instance.name)
            self._fleet.report(instance, lifecycle.Drain())
        elif instance.name in self._drained:
            self._drained.discard(instance.name)
            self._fleet.report(instance, lifecycle.Undrain())

    def _lose(self, name: str) -> None:
        held, instance = self.held.pop(name, None), self.mine(name)
        for kind in (INSTANCES, DRAINS):
            self.problems.pop(key_of(self._prefix, kind, name), None)
        if held is None or instance is None:
            return
        if held.record.is_draining:
            self._drained.discard(name)
            self._fleet.report(instance, lifecycle.Withdrawn(lifecycle.LEFT))
        else:
            self._fleet.report(instance, lifecycle.Lapsed("its lease at etcd has lapsed"))

    def _is_drained(self, view: View, held: Held) -> bool:
        key = key_of(self._prefix, DRAINS, held.entry.name)
        found = view.records.get(key)
        try:
            drain = DrainRecord.model_validate_json(found.value) if found else None
        except ValidationError as error:
            self._complain(key, str(error))
            return False
        self.problems.pop(key, None)
        return drain is not None and drain.incarnation == held.record.incarnation

    def _read(self, found: KeyValue, name: str) -> Held | None:
        try:
            record = InstanceRecord.model_validate_json(found.value)
            entry = entry_of(record.model_copy(update={"name": name}))
        except ValidationError as error:
            self._complain(found.key, str(error))
            return None
        return Held(found, record, entry)

    def _complain(self, key: str, problem: str) -> None:
        problem = " ".join(problem.split())
        if self.problems.get(key) != problem:
            logger.error("etcd: %s is not used: %s", key, problem)
        self.problems[key] = problem

    def _key(self, name: str) -> str:
        return key_of(self._prefix, INSTANCES, name)
