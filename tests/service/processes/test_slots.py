"""A line of the table is another's only when nobody counts in it any more."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xllm_plugin.errors import MisuseError
from xllm_plugin.service.processes.slots import Ledger, Slots

NAMES = st.sampled_from("abcdef")
NUM_SLOTS = 3
WORKERS = st.integers(0, 1)


def test_a_forgotten_slot_waits_for_workers_and_requests() -> None:
    ledger, busy = Ledger(), {0}
    slots = Slots(1, lambda slot: slot not in busy, "instances", ledger)
    assert slots.slot("a") == 0
    slots.forget("a")
    with pytest.raises(MisuseError, match=r"1 instances are known.*service.processes=1"):
        slots.slot("b")
    number = ledger.sent(0)
    busy.clear()
    with pytest.raises(MisuseError):
        slots.slot("b")
    ledger.taken(0, number)
    assert slots.slot("b") == 0
    with pytest.raises(MisuseError):
        slots.slot("a")


def test_a_worker_that_is_gone_is_not_waited_for() -> None:
    ledger = Ledger()
    slots = Slots(1, lambda _: True, "instances", ledger)
    slots.slot("a")
    slots.forget("a")
    ledger.sent(0)
    ledger.gone(0)
    assert slots.slot("b") == 0


def test_what_was_taken_in_counts_while_more_is_under_way() -> None:
    """With news four times a second there may be no moment at which all have been answered."""
    ledger = Ledger()
    first, other, second = ledger.sent(0), ledger.sent(1), ledger.sent(0)
    ledger.taken(0, first)
    assert not ledger.is_taken(first)
    ledger.taken(1, other)
    assert ledger.is_taken(first)
    assert not ledger.is_taken(second)
    ledger.taken(0, second)
    ledger.taken(0, first)
    assert ledger.is_taken(other)
    assert not ledger.is_taken(ledger.number + 1), "nobody was told yet"


def test_room_is_what_can_be_given_beside_what_is_held() -> None:
    ledger, busy = Ledger(), {0, 1}
    slots = Slots(3, lambda slot: slot not in busy, "API keys", ledger)
    for name in "ab":
        slots.slot(name)
    slots.require_room("abc")
    with pytest.raises(MisuseError, match="3 API keys are known"):
        slots.require_room("cd")
    slots.slot("c")
    for name in "ab":
        slots.forget(name)
    slots.require_room("abc")
    ledger.taken(0, ledger.sent(0))
    with pytest.raises(MisuseError):
        slots.require_room("d")
    busy.remove(0)
    slots.require_room("d")
    slots.require_room("abc")
    with pytest.raises(MisuseError):
        slots.require_room("ad")


class SlotMachine(RuleBasedStateMachine):
    """Two workers that use names until they have taken in that these are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.counted: dict[int, set[str]] = {}
        self.slots = Slots(
            NUM_SLOTS, lambda slot: not self.counted.get(slot), "instances", self.ledger
        )
        self.known: dict[str, int] = {}
        self.is_told = True
        self.workers: list[dict[str, int]] = [{}, {}]
        self.inbox: list[list[tuple[int, dict[str, int]]]] = [[], []]

    @rule(name=NAMES)
    def come(self, name: str) -> None:
        try:
            self.known[name] = self.slots.slot(name)
        except MisuseError:
            assert len(set(self.known) | {name}) > NUM_SLOTS or self.is_waiting()

    def is_waiting(self) -> bool:
        """Somebody is to be told of a name that is gone, or counts for it."""
        return not self.is_told or any(self.inbox) or any(self.counted.values())

    @rule(name=NAMES)
    def go(self, name: str) -> None:
        if self.known.pop(name, None) is not None:
            self.slots.forget(name)
            self.is_told = False

    @rule()
    def tell(self) -> None:
        self.is_told = True
        for index, inbox in enumerate(self.inbox):
            inbox.append((self.ledger.sent(index), dict(self.known)))

    @precondition(lambda self: any(self.inbox))
    @rule(index=WORKERS)
    def take_in(self, index: int) -> None:
        if self.inbox[index]:
            number, self.workers[index] = self.inbox[index].pop(0)
            self.ledger.taken(index, number)

    @rule(index=WORKERS, name=NAMES)
    def book(self, index: int, name: str) -> None:
        slot = self.workers[index].get(name)
        if slot is not None:
            self.counted.setdefault(slot, set()).add(name)

    @rule(slot=st.integers(0, NUM_SLOTS - 1))
    def finish(self, slot: int) -> None:
        self.counted.pop(slot, None)

    @invariant()
    def nobody_counts_in_anothers_line(self) -> None:
        assert len(set(self.known.values())) == len(self.known)
        for slot, names in self.counted.items():
            assert len(names) == 1, (slot, names)
            holders = {name for name, held in self.known.items() if held == slot}
            assert holders <= names, "it was given away while requests were counted in it"


TestSlotMachine = SlotMachine.TestCase
TestSlotMachine.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
