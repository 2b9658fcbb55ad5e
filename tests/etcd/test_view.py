"""Whatever order reads and watches come in, a view ends as etcd is, and never mixes two states."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from xllm_plugin.etcd.view import View
from xllm_plugin.etcd.wire import Event, KeyValue, Snapshot

KEYS = st.sampled_from("abc")


class Watching(RuleBasedStateMachine):
    """A model of etcd (its whole history), a watch that lags, and reads that arrive late."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[dict[str, KeyValue]] = [{}]
        """State by revision."""
        self.events: list[Event] = []
        self.view = View()
        self.reads: list[Snapshot] = []
        """Answers under way, of any age since the last beginning."""
        self.next_event: int | None = None
        """Of the watch; None: there is none."""

    @property
    def revision(self) -> int:
        return len(self.history) - 1

    def read_now(self) -> Snapshot:
        return Snapshot(self.revision, dict(self.history[-1]))

    @initialize()
    def begin(self) -> None:
        self.begin_anew()

    @rule(keys=st.sets(KEYS, min_size=1), is_gone=st.booleans())
    def change(self, keys: set[str], is_gone: bool) -> None:
        """One revision; a transaction or a lease that lapses may change several keys."""
        state, revision = dict(self.history[-1]), len(self.history)
        for key in keys:
            if is_gone and key not in state:
                continue
            record = None if is_gone else KeyValue(key, str(revision).encode(), revision)
            self.events.append(Event(key, revision, record))
            if record is None:
                del state[key]
            else:
                state[key] = record
        self.history.append(state)

    @rule(count=st.integers(1, 4))
    def tell(self, count: int) -> None:
        """The watch brings some revisions, each as a whole."""
        if self.next_event is None:
            return
        told: list[Event] = []
        pending = self.events[self.next_event :]
        revisions = sorted({event.mod_revision for event in pending})[:count]
        told = [event for event in pending if event.mod_revision in revisions]
        self.next_event += len(told)
        before = self.view.revision
        assert self.view.apply(told) == {e.key for e in told if e.mod_revision > before}

    @rule(is_late=st.booleans())
    def read(self, is_late: bool) -> None:
        """Asked now; the answer comes at once or later."""
        self.reads.append(self.read_now())
        if not is_late:
            self.answer(-1)

    @rule(which=st.integers(0, 9))
    def answer(self, which: int) -> None:
        if not self.reads:
            return
        before = dict(self.view.records)
        changed = self.view.replace(self.reads.pop(which % len(self.reads)))
        after = self.view.records
        assert changed == {k for k in before | after if before.get(k) != after.get(k)}

    def begin_anew(self) -> None:
        """Read, then watch from the next revision on."""
        self.reads.clear()
        self.view.replace(self.read_now(), anew=True)
        self.next_event = len(self.events)

    @rule(is_lost=st.booleans(), is_watched=st.booleans())
    def lose_the_connection(self, is_lost: bool, is_watched: bool) -> None:
        """Perhaps no watch begins; perhaps etcd has lost its data, and counts from 1 again."""
        if is_lost:
            self.history, self.events = [{}], []
        self.begin_anew()
        assert self.view.records == self.history[-1]
        if not is_watched:
            self.next_event = None

    @invariant()
    def it_is_a_state_that_was(self) -> None:
        """Revisions in which nothing of ours changed look alike."""
        assert self.view.revision <= self.revision
        assert self.view.records == self.history[self.view.revision]

    @invariant()
    def a_watch_that_has_told_all_leaves_nothing_unknown(self) -> None:
        if self.next_event == len(self.events):
            assert self.view.records == self.history[-1]


def test_a_watch_behind_a_read_and_a_read_behind_a_watch() -> None:
    view, old, new = View(), KeyValue("a", b"1", 1), KeyValue("a", b"2", 2)
    assert view.replace(Snapshot(2, {"a": new})) == {"a"}
    assert view.apply([Event("a", 1, old), Event("a", 2, new)]) == set()
    assert view.apply([Event("b", 3, None), Event("a", 4, None)]) == {"a", "b"}
    assert view.replace(Snapshot(3, {"a": new})) == set()
    assert (view.records, view.revision) == ({}, 4)
    assert view.replace(Snapshot(1, {"a": old}), anew=True) == {"a"}
    assert (view.records, view.revision) == ({"a": old}, 1)


TestWatching: Any = Watching.TestCase
TestWatching.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
