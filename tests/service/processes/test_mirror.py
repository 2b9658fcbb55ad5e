"""Workers see the control process's fleet, and all workers' load."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from xllm_plugin.registration import Load
from xllm_plugin.service import lifecycle
from xllm_plugin.service.config import InstanceEntry
from xllm_plugin.service.decision import Asked
from xllm_plugin.service.fleet import Fleet
from xllm_plugin.service.lifecycle import State, Timings
from xllm_plugin.service.policies import LeastLoadedRanking, least_loaded
from xllm_plugin.service.policy import RoutingPolicy
from xllm_plugin.service.processes import messages
from xllm_plugin.service.processes.messages import Failure, FleetNews, decoder, encode
from xllm_plugin.service.processes.mirror import MirrorFleet
from xllm_plugin.service.processes.news import LOAD_WORDS, Audience, ControlFleet
from xllm_plugin.service.processes.shared import SharedMemory
from xllm_plugin.service.processes.slots import Ledger, Slots
from xllm_plugin.service.roster import Roster
from xllm_plugin.service.upstream import Pool

NUM_WORKERS = 2
TIMINGS = Timings()


def pool(entry: InstanceEntry) -> Pool:
    return Pool(entry.host, entry.port, tls=None, connect_timeout_s=1.0)


def entry_of(name: str, port: int = 1) -> InstanceEntry:
    return InstanceEntry(url=f"http://h:{port}", name=name)


class Post:
    """A control process's fleet and two workers, and what lies between them."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.memory = SharedMemory(NUM_WORKERS)
        self.ledger = Ledger()
        loads = self.memory.instances
        slots = Slots(8, lambda slot: loads.is_idle(slot, LOAD_WORDS), "instances", self.ledger)
        self.num_changes = 0
        self.fleet = ControlFleet(TIMINGS, pool, loads=loads, slots=slots, changed=self.changed)
        self.failures: list[Failure] = []
        self.workers = [self.worker(index) for index in range(NUM_WORKERS)]
        self.audiences = [Audience() for _ in range(NUM_WORKERS)]

    def changed(self) -> None:
        self.num_changes += 1

    def clock(self) -> float:
        return self.now_s

    def worker(self, index: int) -> MirrorFleet:
        memory = SharedMemory(NUM_WORKERS, descriptor=self.memory.descriptor, writer=index)
        return MirrorFleet(
            TIMINGS, pool, loads=memory.instances, tell=self.failures.append, clock=self.clock
        )

    def tell(self, index: int) -> None:
        news = self.audiences[index].news(self.fleet)
        if news is not None:
            news.number = self.ledger.sent(index)
            found: FleetNews = decoder(messages.FromControl).decode(encode(news))
            self.workers[index].take(found)
            self.ledger.taken(index, self.workers[index].number)

    def tell_all(self) -> None:
        for index in range(NUM_WORKERS):
            self.tell(index)
        self.now_s += 0.001

    def join(self, *names: str) -> None:
        for name in names:
            instance = self.fleet.register(entry_of(name), source="test")
            self.fleet.set_models(instance, {"m": {"id": "m"}})
            self.fleet.report(instance, lifecycle.Alive(""))
        self.tell_all()


def chosen(fleet: Fleet, sequence: int = 0) -> Any:
    candidates = fleet.candidates("m")
    asked = Asked(sequence, 0, "", 100, 50, 50, {})
    return candidates[least_loaded(asked, candidates).index]


def test_a_worker_chooses_by_what_others_have_booked() -> None:
    post = Post()
    post.join("a", "b")
    one, other = post.workers
    first = chosen(one)
    one.book(first, 100, is_offline=True)
    one.expect_prefill(first, 50)
    post.now_s += 0.001
    second = chosen(other)
    assert {first.name, second.name} == {"a", "b"}
    seen = other.get(first.name)
    assert seen is not None
    assert (seen.in_flight, seen.outstanding_tokens, seen.prefill_tokens) == (1, 100, 50)
    assert seen.offline_requests == 1
    (control,) = [found for found in post.fleet if found.name == first.name]
    assert (control.in_flight, control.outstanding_tokens) == (1, 100)
    assert control.offline_requests == 1
    one.expect_prefill(first, -50)
    one.release(first, 100, is_offline=True)
    post.now_s += 0.001
    for fleet in (one, other):
        fleet.candidates("m")
        fleet.check_integrity()
    post.fleet.check_integrity()


def test_workers_know_who_can_continue_the_streams_of_others() -> None:
    post = Post()
    post.join("a", "b")
    found = post.fleet.get_without_load("b")
    assert found is not None
    found.resumes = True
    other = post.fleet.get_without_load("a")
    assert other is not None
    other.scales_out = True
    post.tell_all()
    told = [{one.name: one.continues for one in worker} for worker in post.workers]
    assert told == [{"a": "scale-out", "b": "plugin"}] * 2


def test_a_ranking_is_told_of_it_too() -> None:
    """It does not look at all of them for each request, as a list of candidates is looked at."""
    post = Post()
    post.join(*(f"i{number}" for number in range(6)))
    one, other = post.workers
    candidates = other.candidates("m")
    policy = RoutingPolicy("t", "", least_loaded, ranking=LeastLoadedRanking)
    roster = Roster(candidates, policy, None, other.watch())

    def chosen_name() -> str:
        assert other.candidates("m") is candidates
        found = roster.choose(Asked(0, 0, "", 100, 50, 50, {}))
        assert found is not None
        return candidates[found[0].index].name

    for expected in ("i0", "i1", "i2"):
        assert chosen_name() == expected
        there = one.get(expected)
        assert there is not None
        one.book(there, 100)
        post.now_s += 0.001
    there = one.get("i1")
    assert there is not None
    one.release(there, 100)
    post.now_s += 0.001
    assert chosen_name() == "i1"


def test_a_hundred_requests_at_two_workers_are_spread_evenly() -> None:
    post = Post()
    post.join("a", "b", "c", "d")
    for number in range(100):
        post.now_s += 0.001
        worker = post.workers[number % NUM_WORKERS]
        worker.book(chosen(worker, number), 100)
    assert [instance.in_flight for instance in post.fleet] == [25] * 4


def test_what_a_dead_worker_had_booked_is_taken_out() -> None:
    post = Post()
    post.join("a")
    for worker in post.workers:
        worker.book(chosen(worker), 10)
    post.memory.instances.clear(0, LOAD_WORDS, 1)
    post.now_s += 0.001
    assert chosen(post.workers[1]).in_flight == 1
    assert post.fleet.get("a").in_flight == 1  # type: ignore[union-attr]


def test_a_refused_connection_counts_here_at_once_and_everywhere_when_judged() -> None:
    post = Post()
    post.join("a", "b")
    one, other = post.workers
    failed = one.get("a")
    assert failed is not None
    for _ in range(1000):
        one.report(failed, lifecycle.Failed("refused", certain=True))
    assert [found.name for found in one.candidates("m")] == ["b"]
    assert len(other.candidates("m")) == 2
    assert post.failures == [Failure("a", "", "refused", certain=True)], "told once"
    judged = post.fleet.get("a")
    assert judged is not None
    num_changes = post.num_changes
    post.fleet.report(judged, lifecycle.Failed("refused", certain=True))
    assert post.num_changes == num_changes + 1, "workers are told at once"
    post.tell_all()
    assert [found.name for found in other.candidates("m")] == ["b"]


def test_a_guess_that_the_control_process_does_not_share_is_taken_back() -> None:
    post = Post()
    post.join("a", "b")
    one = post.workers[0]
    failed = one.get("a")
    assert failed is not None
    one.report(failed, lifecycle.Failed("refused", certain=True))
    post.audiences[0].forget("a")  # as on every failure that is told
    post.tell_all()
    assert len(one.candidates("m")) == 2


def test_an_instance_that_fails_when_it_is_gone_already_is_forgotten() -> None:
    post = Post()
    post.join("a")
    instance, one = post.fleet.get("a"), post.workers[0]
    assert instance is not None
    post.fleet.report(instance, lifecycle.Withdrawn("left"))
    post.audiences[0].forget("a")
    post.tell_all()
    assert not list(one)


def test_requests_at_an_instance_that_is_gone_see_why_and_release_its_line() -> None:
    post = Post()
    post.join("a")
    one = post.workers[0]
    held = chosen(one)
    one.book(held, 10)
    instance = post.fleet.get("a")
    assert instance is not None
    post.fleet.report(instance, lifecycle.Withdrawn(lifecycle.LEFT))
    post.tell_all()
    assert (held.life.state, held.life.reason) == (State.GONE, lifecycle.LEFT)
    assert one.get("a") is None
    one.release(held, 10)
    assert post.memory.instances.is_idle(held.slot, LOAD_WORDS)


def test_measured_times_go_to_the_control_process_and_speeds_come_back() -> None:
    post = Post()
    post.join("a")
    one = post.workers[0]
    instance = one.get("a")
    assert instance is not None
    for _ in range(5000):
        one.observe_ttft(instance, 100.0, 0.5)
    assert len(one.ttfts) == 4096, "a bound, whatever happens"
    judged = post.fleet.get("a")
    assert judged is not None
    for name, num_tokens, seconds in one.ttfts:
        assert name == "a"
        post.fleet.observe_ttft(judged, num_tokens, seconds)
    before = instance.speed
    post.fleet.tick()
    post.tell_all()
    assert instance.speed == judged.speed != before
    before = instance.speed
    post.fleet.set_load(judged, Load(num_running=1))
    post.tell_all()
    assert instance.foreign_requests == 1
    assert instance.speed is before, "a ranking sorts all anew for another object"


def test_ours_are_told_from_others_by_what_runs_now() -> None:
    post = Post()
    post.join("a")
    judged = post.fleet.get("a")
    assert judged is not None
    for worker in post.workers:
        worker.book(chosen(worker), 10)
    post.fleet.set_load(judged, Load(num_running=3))
    assert judged.foreign_requests == 1


class NewsMachine(RuleBasedStateMachine):
    """Whatever happened, a worker that was told everything sees what the control process does."""

    def __init__(self) -> None:
        super().__init__()
        self.post = Post()

    @rule(name=st.sampled_from("abc"), port=st.integers(1, 2), incarnation=st.sampled_from("12"))
    def register(self, name: str, port: int, incarnation: str) -> None:
        self.post.fleet.register(entry_of(name, port), source="t", incarnation=incarnation)

    @rule(
        name=st.sampled_from("abc"),
        event=st.sampled_from(
            [
                lifecycle.Alive("1"),
                lifecycle.Alive("2"),
                lifecycle.Failed("why", certain=True),
                lifecycle.Drain(),
                lifecycle.Undrain(),
                lifecycle.Withdrawn("left"),
            ]
        ),
    )
    def happen(self, name: str, event: lifecycle.Event) -> None:
        instance = self.post.fleet.get(name)
        if instance is not None:
            self.post.fleet.report(instance, event)

    @rule(name=st.sampled_from("abc"), number=st.integers(0, 3))
    def load(self, name: str, number: int) -> None:
        instance = self.post.fleet.get(name)
        if instance is not None:
            self.post.fleet.set_models(instance, {f"m{number}": {"id": f"m{number}"}})
            self.post.fleet.set_load(instance, Load(num_running=number, num_waiting=number))

    @rule(index=st.integers(0, NUM_WORKERS - 1), name=st.sampled_from("abc"))
    def meet_failure(self, index: int, name: str) -> None:
        instance = self.post.workers[index].get(name)
        if instance is not None:
            self.post.workers[index].report(instance, lifecycle.Failed("met", certain=True))
            self.post.audiences[index].forget(name)

    @rule(index=st.integers(0, NUM_WORKERS - 1))
    def restart(self, index: int) -> None:
        self.post.workers[index] = self.post.worker(index)
        self.post.audiences[index] = Audience()

    @rule(index=st.integers(0, NUM_WORKERS - 1))
    def tell(self, index: int) -> None:
        self.post.tell(index)
        worker = self.post.workers[index]
        ours = {one.name: self.seen(one) for one in self.post.fleet}
        assert {one.name: self.seen(one) for one in worker} == ours
        for model in ("m0", "m1", None):
            names = {one.name for one in self.post.fleet.candidates(model)}
            assert {one.name for one in worker.candidates(model)} == names

    @staticmethod
    def seen(instance: Any) -> tuple[Any, ...]:
        life = instance.life
        return (
            *(instance.entry, life.state, life.incarnation, life.reason, instance.models),
            *(instance.slot, instance.foreign_requests, instance.num_waiting, instance.speed),
        )

    @invariant()
    def a_line_is_one_instances(self) -> None:
        slots = [one.slot for one in self.post.fleet]
        assert len(set(slots)) == len(slots)


TestNewsMachine = NewsMachine.TestCase
TestNewsMachine.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
