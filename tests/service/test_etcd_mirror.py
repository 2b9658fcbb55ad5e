"""What lies in etcd becomes a fleet: told once or many times, whole or in part, with junk in it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xllm_plugin.etcd.records import DrainRecord, InstanceRecord
from xllm_plugin.etcd.view import View
from xllm_plugin.etcd.wire import KeyValue, Snapshot
from xllm_plugin.service import lifecycle
from xllm_plugin.service.config import InstanceEntry
from xllm_plugin.service.etcd_mirror import FleetMirror
from xllm_plugin.service.fleet import Fleet
from xllm_plugin.service.lifecycle import State, Timings
from xllm_plugin.service.upstream import Pool

TIMINGS = Timings(lease_s=6, suspect_s=30)


class Etcd:
    """Keys that a test sets, a fleet that follows them, and a clock in hand."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.fleet = Fleet(TIMINGS, _pool, lambda: self.now_s)
        self.mirror = FleetMirror(self.fleet, "/x")
        self.view = View()
        self.records: dict[str, KeyValue] = {}
        self.revision = 1

    def put(self, key: str, value: str) -> None:
        self.revision += 1
        self.records[key] = KeyValue(key, value.encode(), self.revision, lease=7)

    def put_instance(self, name: str = "a", *, incarnation: str = "1", **fields: Any) -> None:
        record = InstanceRecord(
            **{"url": f"http://{name}:1", "incarnation": incarnation, "models": ("m",), **fields}
        )
        self.put(f"/x/instances/{name}", record.model_dump_json())

    def put_drain(self, name: str = "a", incarnation: str = "1") -> None:
        drain = DrainRecord(incarnation=incarnation)
        self.put(f"/x/drains/{name}", drain.model_dump_json())

    def delete(self, *keys: str) -> None:
        self.revision += 1
        for key in keys:
            del self.records[key]

    def follow(self) -> None:
        """As after a message of the watch."""
        changed = self.view.replace(Snapshot(self.revision, dict(self.records)))
        self.mirror.follow(self.view, changed)

    def state(self, name: str = "a") -> State | None:
        instance = self.fleet.get(name)
        return instance.life.state if instance else None

    def probe(self, name: str = "a") -> None:
        """A probe that finds it usable."""
        instance = self.fleet.get(name)
        assert instance is not None
        life = instance.life
        self.fleet.report(instance, lifecycle.Alive(life.incarnation, renews=not life.leased))


def _pool(entry: InstanceEntry) -> Pool:
    return Pool(entry.host, entry.port, tls=None, connect_timeout_s=1.0)


def ready() -> Etcd:
    etcd = Etcd()
    etcd.put_instance()
    etcd.follow()
    assert etcd.state() is State.JOINING
    etcd.probe()
    assert etcd.state() is State.READY
    return etcd


def test_an_instance_joins_with_what_its_record_says() -> None:
    etcd = Etcd()
    etcd.put_instance(capacity=2.0, role="decode")
    etcd.follow()
    instance = etcd.fleet.get("a")
    assert instance is not None
    assert (instance.capacity, instance.entry.role, set(instance.models)) == (2.0, "decode", {"m"})
    assert (instance.source, instance.life.incarnation) == ("etcd", "1")


def test_its_lease_is_etcds_business() -> None:
    """However long nothing is heard of etcd: probes alone judge."""
    etcd = ready()
    etcd.now_s += 1e6
    etcd.fleet.tick()
    assert etcd.state() is State.READY


def test_a_lease_that_lapses_makes_it_suspect_then_forgotten() -> None:
    etcd = ready()
    etcd.delete("/x/instances/a")
    etcd.follow()
    assert etcd.state() is State.SUSPECT
    etcd.probe()  # it answers, and is cut off from etcd or about to die
    assert etcd.state() is State.SUSPECT
    assert [one.name for one in etcd.fleet.candidates("m")] == ["a"]
    etcd.now_s += TIMINGS.suspect_s + 1
    etcd.fleet.tick()
    assert etcd.state() is None


def test_it_comes_back_as_the_same_incarnation() -> None:
    etcd = ready()
    etcd.delete("/x/instances/a")
    etcd.follow()
    etcd.put_instance()
    etcd.follow()
    etcd.probe()
    assert etcd.state() is State.READY
    etcd.now_s += 1e6
    etcd.fleet.tick()
    assert etcd.state() is State.READY


def test_one_that_said_it_leaves_has_left() -> None:
    etcd = ready()
    etcd.put_instance(is_draining=True)
    etcd.follow()
    assert etcd.state() is State.DRAINING
    etcd.delete("/x/instances/a")
    etcd.follow()
    assert etcd.state() is None


def test_an_operators_drain_holds_for_one_incarnation() -> None:
    etcd = ready()
    etcd.put_drain()
    etcd.follow()
    assert etcd.state() is State.DRAINING
    etcd.probe()
    etcd.mirror.follow(etcd.view, set(etcd.view.records))
    assert etcd.state() is State.DRAINING
    etcd.put_instance(incarnation="2")
    etcd.follow()
    assert etcd.state() is State.JOINING
    etcd.put_drain(incarnation="2")
    etcd.follow()
    assert etcd.state() is State.DRAINING
    etcd.delete("/x/drains/a")
    etcd.follow()
    etcd.probe()
    assert etcd.state() is State.READY


def test_a_drain_that_etcd_does_not_know_is_left_alone() -> None:
    etcd = ready()
    instance = etcd.fleet.get("a")
    assert instance is not None
    etcd.fleet.report(instance, lifecycle.Drain())
    etcd.mirror.follow(etcd.view, set(etcd.view.records))
    assert etcd.state() is State.DRAINING


def test_a_server_that_was_cut_off_while_it_drained_does_so_no_longer_when_it_is_back() -> None:
    etcd = ready()
    etcd.put_drain()
    etcd.follow()
    etcd.delete("/x/instances/a", "/x/drains/a")
    etcd.follow()
    etcd.mirror.mend(etcd.view)
    assert etcd.state() is State.DRAINING
    etcd.put_instance()
    etcd.follow()
    etcd.probe()
    assert etcd.state() is State.READY


def test_junk_is_said_once_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    etcd = ready()
    for key in ("/x/instances/a", "/x/instances/b", "/x/drains/a"):
        etcd.put(key, "\x00{")
    etcd.put("/x/instances/c", '{"url": "ftp://c", "incarnation": "1"}')
    for key in ("/x/instances/", "/x/instances/a/b", "/x/other/a", "/x/instances/" + "y" * 129):
        etcd.put(key, "not ours")
    with caplog.at_level(logging.ERROR):
        etcd.follow()
        etcd.mirror.mend(etcd.view)
    assert etcd.state() is State.READY
    assert [one.name for one in etcd.fleet] == ["a"]
    assert set(etcd.mirror.problems) == {
        "/x/instances/a",
        "/x/instances/b",
        "/x/instances/c",
    }
    errors = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert len(errors) == 3
    etcd.put_instance()
    etcd.delete("/x/instances/b", "/x/instances/c")
    etcd.follow()
    assert set(etcd.mirror.problems) == {"/x/drains/a"}
    etcd.delete("/x/drains/a")
    etcd.follow()
    assert not etcd.mirror.problems


def test_a_name_that_the_settings_have_is_theirs_until_they_let_it_go() -> None:
    etcd = Etcd()
    static = etcd.fleet.register(InstanceEntry(url="http://other:1", name="a"), source="static")
    etcd.put_instance()
    etcd.follow()
    assert "known from source 'static'" in etcd.mirror.problems["/x/instances/a"]
    etcd.mirror.mend(etcd.view)
    assert etcd.fleet.get("a") is static
    etcd.fleet.report(static, lifecycle.Withdrawn("no longer in the list"))
    etcd.mirror.mend(etcd.view)
    instance = etcd.fleet.get("a")
    assert instance is not None
    assert instance.source == "etcd"
    assert not etcd.mirror.problems


class Fleets(RuleBasedStateMachine):
    """Two services over the same keys.  One is told every change, the other some, now and then."""

    names = st.sampled_from("ab")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Etcd(), Etcd()
        self.second.records = self.first.records
        self.incarnations = {"a": 0, "b": 0}

    def tell(self, *, second: bool) -> None:
        self.first.follow()
        if second:
            self.second.revision = self.first.revision
            self.second.follow()

    @rule(name=names, second=st.booleans(), is_same=st.booleans())
    def register(self, name: str, second: bool, is_same: bool) -> None:
        """A server that was restarted, or was cut off and is back."""
        self.incarnations[name] += not is_same
        self.first.put_instance(name, incarnation=str(self.incarnations[name]))
        self.tell(second=second)

    @rule(name=names, is_draining=st.booleans(), second=st.booleans())
    def say(self, name: str, is_draining: bool, second: bool) -> None:
        incarnation = str(self.incarnations[name])
        if f"/x/instances/{name}" in self.first.records:
            self.first.put_instance(name, incarnation=incarnation, is_draining=is_draining)
            self.tell(second=second)

    @rule(name=names, second=st.booleans(), is_old=st.booleans())
    def drain(self, name: str, second: bool, is_old: bool) -> None:
        incarnation = self.incarnations[name] - is_old
        self.first.put_drain(name, str(incarnation))
        self.tell(second=second)

    @rule(name=names, second=st.booleans())
    def undrain(self, name: str, second: bool) -> None:
        if f"/x/drains/{name}" in self.first.records:
            self.first.delete(f"/x/drains/{name}")
            self.tell(second=second)

    @rule(name=names, second=st.booleans())
    def lapse(self, name: str, second: bool) -> None:
        keys = (f"/x/instances/{name}", f"/x/drains/{name}")
        self.first.delete(*(key for key in keys if key in self.first.records))
        self.tell(second=second)

    @rule(seconds=st.sampled_from([0.5, 7, 40]), is_alive=st.booleans())
    def wait(self, seconds: float, is_alive: bool) -> None:
        for one in (self.first, self.second):
            one.now_s += seconds
            for instance in one.fleet:
                if is_alive:
                    one.probe(instance.name)
            one.fleet.tick()

    @precondition(lambda self: self.first.records)
    @rule()
    def again(self) -> None:
        before = {one.name: one.life.state for one in self.first.fleet}
        self.first.mirror.follow(self.first.view, set(self.first.view.records))
        self.first.mirror.mend(self.first.view)
        assert {one.name: one.life.state for one in self.first.fleet} == before

    @rule()
    def both_are_told_everything_and_probe(self) -> None:
        self.tell(second=True)
        for one in (self.first, self.second):
            for instance in one.fleet:
                one.probe(instance.name)
        usable = [
            {i.name: (i.life.incarnation, i.life.state) for i in one.fleet if i.name in held}
            for one in (self.first, self.second)
            if (held := one.mirror.held) is not None
        ]
        assert usable[0] == usable[1]

    @invariant()
    def what_has_a_record_is_there_and_what_drains_drains(self) -> None:
        for name in "ab":
            found = self.first.records.get(f"/x/instances/{name}")
            state = self.first.state(name)
            if found is None:
                assert state in (None, State.SUSPECT, State.JOINING, State.DRAINING)
                continue
            record = InstanceRecord.model_validate_json(found.value)
            drain = self.first.records.get(f"/x/drains/{name}")
            is_drained = drain and DrainRecord.model_validate_json(drain.value)
            is_drained = is_drained and is_drained.incarnation == record.incarnation
            assert (state is State.DRAINING) == bool(record.is_draining or is_drained)


TestFleets: Any = Fleets.TestCase
TestFleets.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
