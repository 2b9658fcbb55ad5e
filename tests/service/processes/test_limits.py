"""Limits of keys over several workers: never more than one exact limit would let in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from xllm_plugin.errors import ConfigError
from xllm_plugin.service.flow.bucket import Bucket
from xllm_plugin.service.key_file import KeyRecord, hash_of, make_key, write
from xllm_plugin.service.processes import limits
from xllm_plugin.service.processes.limits import ControlKeyRing, SharedAccount, WorkerKeyRing
from xllm_plugin.service.processes.shared import SharedMemory
from xllm_plugin.service.processes.slots import Ledger, Slots
from xllm_plugin.service.replies import Refusal

NUM_WORKERS = 3
KEY = make_key()


def record(**given: Any) -> KeyRecord:
    return KeyRecord(name=given.pop("name", "ann"), sha256=hash_of(given.pop("key", KEY)), **given)


class Office:
    """A control process's ring and those of its workers, without sockets."""

    def __init__(self, path: Path, num_slots: int = 8) -> None:
        self.now_s = 100.0
        self.num_changes = 0
        self.memory = SharedMemory(NUM_WORKERS)
        self.ledger = Ledger()
        self.slots = Slots(
            num_slots,
            lambda slot: self.memory.keys.is_idle(slot, (limits.IN_FLIGHT,)),
            "API keys",
            self.ledger,
        )
        self.ring = ControlKeyRing(
            path, 1, self.clock, table=self.memory.keys, slots=self.slots, changed=self.changed
        )
        self.workers = [self.worker(path, index) for index in range(NUM_WORKERS)]

    def clock(self) -> float:
        return self.now_s

    def changed(self) -> None:
        self.num_changes += 1

    def worker(self, path: Path, index: int) -> WorkerKeyRing:
        memory = SharedMemory(NUM_WORKERS, descriptor=self.memory.descriptor, writer=index)
        return WorkerKeyRing(path, self.clock, memory.keys, self.ring.news())

    def tell(self) -> None:
        for worker in self.workers:
            worker.take(self.ring.news())

    def account(self, index: int) -> SharedAccount:
        (account,) = self.workers[index].by_name().values()
        return account

    def admits(self, index: int, num_tokens: int = 1) -> bool:
        try:
            self.account(index).admit(num_tokens, self.now_s)
        except Refusal:
            return False
        return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


@pytest.fixture
def office(path: Path) -> Iterator[Any]:
    made: list[Office] = []

    def make(*records: KeyRecord, **given: Any) -> Office:
        write(path, records)
        made.append(Office(path, **given))
        return made[-1]

    yield make
    for one in made:
        one.memory.close()


def test_one_place_is_one_place_at_all_workers(office: Any) -> None:
    it = office(record(max_concurrency=2))
    assert [it.admits(index) for index in (0, 1, 2)] == [True, True, False]
    it.account(0).settle(1, 1, it.now_s)
    assert [it.admits(index) for index in (2, 0)] == [True, False]
    assert [account.in_flight for account in it.ring] == [2]


def test_two_that_claim_the_last_place_at_once_see_each_other(office: Any) -> None:
    """The worst order: the other one has counted itself, and not looked yet."""
    it = office(record(max_concurrency=1))
    other = it.account(1)
    other._table.add(other.slot, limits.IN_FLIGHT, 1)
    assert not it.admits(0)
    other._table.add(other.slot, limits.IN_FLIGHT, -1)
    assert it.admits(0)


def test_a_rate_is_used_up_once(office: Any) -> None:
    it = office(record(requests_per_minute=6))
    assert [it.admits(index % 3) for index in range(7)] == [True] * 6 + [False]
    it.ring.refresh()  # once a second
    it.now_s += 10.0
    assert [it.admits(index) for index in (2, 1)] == [True, False]
    (shown,) = it.ring
    assert shown.requests is not None
    assert shown.requests.level(it.now_s) == 0


def test_decided_at_the_same_moment_a_rate_is_over_by_the_others_and_paid_for(office: Any) -> None:
    it = office(record(requests_per_minute=6))
    for _ in range(5):
        it.admits(0)
    # All look before any takes: each sees one left.
    buckets = [it.account(index).requests for index in range(3)]
    assert [bucket.wait_s(1, it.now_s) for bucket in buckets] == [0, 0, 0]
    for bucket in buckets:
        bucket.take(1, it.now_s)
    assert buckets[0].level(it.now_s) == -2, "N - 1 requests too many"
    it.now_s += 29.0
    assert not it.admits(0), "nothing before the two are paid for, and a third is saved up"
    it.now_s += 1.0
    assert it.admits(1)


def test_tokens_are_estimated_at_one_worker_and_counted_for_all(office: Any) -> None:
    it = office(record(tokens_per_minute=100))
    assert it.admits(0, 80)
    assert not it.admits(1, 30)
    it.workers[2].refresh()
    it.account(0).settle(80, 20, it.now_s)
    assert it.admits(1, 30)
    assert it.account(2).tokens.level(it.now_s) == 50


def test_a_worker_that_was_killed_gives_places_back_and_no_tokens(office: Any, path: Path) -> None:
    it = office(record(max_concurrency=1, tokens_per_minute=100))
    assert it.admits(1, 60)
    it.memory.keys.clear(1, (limits.IN_FLIGHT,), it.slots.num_used)
    it.workers[1] = it.worker(path, 1)
    assert it.account(1).tokens.level(it.now_s) == 40, "its successor begins where all are"
    assert it.admits(1, 40)
    assert not it.admits(0, 1)


def test_other_limits_reach_the_workers_and_what_was_used_stays(office: Any, path: Path) -> None:
    it = office(record(requests_per_minute=6, max_concurrency=1))
    assert it.admits(0)
    write(path, [record(requests_per_minute=6, max_concurrency=3)])
    it.ring.refresh()
    assert it.num_changes == 2
    it.tell()
    assert it.account(2).requests.level(it.now_s) == 5
    assert [it.admits(index) for index in (1, 2, 0)] == [True, True, False]


def test_a_key_that_is_removed_is_refused_and_its_line_used_again(office: Any, path: Path) -> None:
    others = [make_key(), make_key()]
    it = office(record(), num_slots=2)
    assert it.admits(0)
    account = it.workers[0].account(f"Bearer {KEY}".encode())

    def put(name: str, key: str) -> list[str]:
        write(path, [record(name=name, key=key)])
        it.ring.refresh()
        it.ledger.taken(0, it.ledger.sent(0))
        it.tell()
        return [one.record.name for one in it.ring]

    assert put("bob", others[0]) == ["bob"]
    with pytest.raises(Refusal) as caught:
        it.workers[0].account(f"Bearer {KEY}".encode())
    assert caught.value.status == 401
    assert put("cid", others[1]) == ["bob"], "no line is free: a request of ann's runs"
    account.settle(1, 1, it.now_s)
    assert put("cid", others[1]) == ["cid"]
    assert it.workers[2].account(f"Bearer {others[1]}".encode()).slot == 0


def test_a_ring_that_is_replaced_gives_its_lines_back(office: Any, path: Path) -> None:
    it = office(record(), record(name="bob", key=make_key()), num_slots=2)
    other = path.with_name("other.yaml")
    write(other, [record(), record(name="cid", key=make_key())])

    def make() -> ControlKeyRing:
        table = it.memory.keys
        return ControlKeyRing(other, 1, it.clock, table=table, slots=it.slots, changed=it.changed)

    with pytest.raises(ConfigError):
        make()
    it.slots.require_room(["ann", "bob"])
    assert not it.slots._forgotten, "the ring in force keeps what it has"
    it.ring.make_room(None)
    it.ledger.taken(0, it.ledger.sent(0))
    assert sorted(one.record.name for one in make()) == ["ann", "cid"]


def test_too_many_keys_are_said(path: Path) -> None:
    write(path, [record(), record(name="bob", key=make_key())])
    with pytest.raises(ConfigError, match=r"keys.yaml: 1 API keys are known"):
        Office(path, num_slots=1)


class LimitMachine(RuleBasedStateMachine):
    """Three workers against one exact bucket for each rate, and one count."""

    @initialize(requests=st.integers(1, 30), tokens=st.integers(10, 500), places=st.integers(1, 4))
    def begin(self, requests: int, tokens: int, places: int) -> None:
        self.now_s = 0.0
        self.places = places
        self.memory = SharedMemory(NUM_WORKERS)
        self.record = record(
            requests_per_minute=requests, tokens_per_minute=tokens, max_concurrency=places
        )
        self.control = SharedAccount(self.memory.keys, 0, self.record, 1, 0.0)
        self.accounts = [self.made(index) for index in range(NUM_WORKERS)]
        self.running: list[list[int]] = [[] for _ in range(NUM_WORKERS)]
        self.exact = (Bucket(requests, 0.0), Bucket(tokens, 0.0))

    def made(self, index: int) -> SharedAccount:
        memory = SharedMemory(NUM_WORKERS, descriptor=self.memory.descriptor, writer=index)
        account = SharedAccount(memory.keys, 0, self.record, 1, self.now_s)
        account.show(self.control.news(self.now_s))
        return account

    @rule(seconds=st.floats(0.01, 40))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(index=st.integers(0, NUM_WORKERS - 1), num_tokens=st.integers(0, 100))
    def ask(self, index: int, num_tokens: int) -> None:
        requests, tokens = self.exact
        would = (requests.wait_s(1, self.now_s), tokens.wait_s(num_tokens, self.now_s))
        try:
            self.accounts[index].admit(num_tokens, self.now_s)
        except Refusal:
            return
        assert would == (0, 0), "an exact limit would have refused it"
        requests.take(1, self.now_s)
        tokens.take(num_tokens, self.now_s)
        self.running[index].append(num_tokens)

    @rule(index=st.integers(0, NUM_WORKERS - 1), used=st.integers(0, 200))
    def end(self, index: int, used: int) -> None:
        if self.running[index]:
            reserved = self.running[index].pop(0)
            self.accounts[index].settle(reserved, used, self.now_s)
            self.exact[1].take(used - reserved, self.now_s)

    @rule(index=st.integers(0, NUM_WORKERS - 1))
    def look(self, index: int) -> None:
        self.accounts[index].look(self.now_s)

    @rule(index=st.integers(0, NUM_WORKERS - 1))
    def die(self, index: int) -> None:
        self.running[index] = []
        self.memory.keys.clear(index, (limits.IN_FLIGHT,), 1)
        self.control.look(self.now_s)
        self.accounts[index] = self.made(index)

    @rule()
    def rest(self) -> None:
        """Views that look while nothing happens end where an exact bucket is."""
        for _ in range(2):
            for account in (*self.accounts, self.control):
                account.look(self.now_s)
            self.now_s += 1e6
        for account in (*self.accounts, self.control):
            for bucket, exact in zip((account.requests, account.tokens), self.exact, strict=True):
                assert bucket is not None
                assert bucket.level(self.now_s) == exact.level(self.now_s) == exact.per_minute

    @invariant()
    def no_place_is_taken_twice(self) -> None:
        num_running = sum(map(len, self.running)) if hasattr(self, "running") else 0
        if num_running:
            assert num_running <= self.places
            assert self.memory.keys.total(0, limits.IN_FLIGHT) == num_running

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.memory.close()


TestLimitMachine = LimitMachine.TestCase
TestLimitMachine.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
