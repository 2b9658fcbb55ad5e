"""Limits of API keys that hold over all workers: who is let in is decided where the request is.

Every worker has its own view of a rate's bucket.  What all of them have taken and given back lies
in shared memory, as sums that only grow, and a view takes in what was added since it last looked.
So there is no lock, no lease and no message on the way of a request, and no part of a limit lies
unused at a worker that has no traffic.

* Concurrency: a request is counted before it is looked whether there was a place, so of two that
  come at once for the last one at least one sees the other; if both do, both are refused.  What can
  pass is a count on its way from one core to another, some nanoseconds: at most one request for
  each other worker.  Four processes on two cores that did nothing else had none in 267,000.
* A rate may be exceeded by one request for each other worker, if all decide before any of them sees
  what the others take: some microseconds.  It is paid for before the next one is let in, so that
  over time the rate holds.
* A view errs to the safe side: what others took since it last looked counts as taken just now, so
  that it never shows more than is left.  It looks once a second at least.
* What a request of a dead worker had reserved stays taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from xllm_plugin.errors import ConfigError, MisuseError
from xllm_plugin.service.flow.bucket import Bucket
from xllm_plugin.service.key_file import KeyRecord
from xllm_plugin.service.keys import Account, KeyRing
from xllm_plugin.service.processes.messages import BucketView, KeyNews, Keys
from xllm_plugin.service.processes.shared import CounterTable
from xllm_plugin.service.processes.slots import Slots
from xllm_plugin.service.replies import Refusal

__all__ = [
    "IN_FLIGHT",
    "ControlKeyRing",
    "SharedAccount",
    "SharedBucket",
    "WorkerKeyRing",
    "require_room",
]

IN_FLIGHT: Final = 0
_REQUESTS: Final = 1
_TOKENS: Final = 3
"""Words of what was taken; in the one after each is what was given back."""


class SharedBucket(Bucket):
    """A process's view of a bucket that several take from.

    Args:
        table: where they count.
        slot: of the key.
        word: of what was taken; what was given back is in the next.
        view: the state to begin with.
    """

    __slots__ = ("_returned", "_slot", "_table", "_taken", "_word")

    def __init__(self, table: CounterTable, slot: int, word: int, view: BucketView) -> None:
        super().__init__(view.per_minute, view.at_s)
        self._level = view.level
        self._table = table
        self._slot = slot
        self._word = word
        self._taken = view.taken
        self._returned = view.returned

    def level(self, now_s: float) -> float:
        """What is left, after what others have done."""
        # In this order: whoever has given something back had taken it before.
        returned = self._table.total(self._slot, self._word + 1)
        taken = self._table.total(self._slot, self._word)
        level = super().level(now_s)
        if taken != self._taken or returned != self._returned:
            self._fill_to(level + returned - self._returned)
            self._level -= taken - self._taken
            self._taken, self._returned = taken, returned
        return self._level

    def take(self, amount: float, now_s: float) -> None:
        """Use `amount`, a whole number, or give it back if it is below zero."""
        del now_s
        if amount >= 0:
            self._table.add(self._slot, self._word, int(amount))
        else:
            self._table.add(self._slot, self._word + 1, int(-amount))

    def view(self, now_s: float) -> BucketView:
        """What another process begins with."""
        level = self.level(now_s)
        return BucketView(self.per_minute, level, self._at_s, self._taken, self._returned)


class SharedAccount(Account):
    """What one key has used of its limits, at all workers.

    Args:
        table: where they count.
        slot: of the key.
        record: its limits.
        num_replicas: services that share them; the workers of one are not several.
        now_s: monotonic seconds.
    """

    def __init__(
        self,
        table: CounterTable,
        slot: int,
        record: KeyRecord,
        num_replicas: int,
        now_s: float,
    ) -> None:
        self.slot = slot
        self._table = table
        super().__init__(record, num_replicas, now_s)

    def take_over(self, record: KeyRecord, num_replicas: int, now_s: float) -> None:
        """Have other limits; a bucket whose rate has not changed is kept."""
        super().take_over(record, num_replicas, now_s)
        self.requests = self._shared(self.requests, _REQUESTS, now_s)
        self.tokens = self._shared(self.tokens, _TOKENS, now_s)

    def show(self, news: KeyNews) -> None:
        """Begin with the buckets that another process shows."""
        self.requests = self._shown(news.requests, _REQUESTS)
        self.tokens = self._shown(news.tokens, _TOKENS)

    def news(self, now_s: float) -> KeyNews:
        """What `show` takes."""
        requests, tokens = (
            bucket.view(now_s) if isinstance(bucket, SharedBucket) else None
            for bucket in (self.requests, self.tokens)
        )
        return KeyNews(self.record, self.slot, requests, tokens)

    def look(self, now_s: float) -> None:
        """Take in what others have done."""
        self.in_flight = self._table.total(self.slot, IN_FLIGHT)
        for bucket in (self.requests, self.tokens):
            if bucket is not None:
                bucket.level(now_s)

    def admit(self, num_tokens: int, now_s: float) -> None:
        """Let a request in, and count it.  Raises `Refusal` with 429, a limit is reached."""
        table, slot, most = self._table, self.slot, self.max_concurrency
        self.in_flight = table.total(slot, IN_FLIGHT)
        if most is not None and self.in_flight >= most:
            super().admit(num_tokens, now_s)  # refuses; a claim would only be in others' way
        table.add(slot, IN_FLIGHT, 1)  # before looking again, so that others see it
        self.in_flight = table.total(slot, IN_FLIGHT) - 1
        try:
            super().admit(num_tokens, now_s)
        except Refusal:
            table.add(slot, IN_FLIGHT, -1)
            raise

    def settle(self, reserved_tokens: int, used_tokens: int, now_s: float) -> None:
        """A request that was let in has ended."""
        super().settle(reserved_tokens, used_tokens, now_s)
        self._table.add(self.slot, IN_FLIGHT, -1)

    def _shared(self, bucket: Bucket | None, word: int, now_s: float) -> Bucket | None:
        if bucket is None or isinstance(bucket, SharedBucket):
            return bucket
        table, slot = self._table, self.slot
        taken, returned = table.total(slot, word), table.total(slot, word + 1)
        view = BucketView(bucket.per_minute, bucket.level(now_s), now_s, taken, returned)
        return SharedBucket(table, slot, word, view)

    def _shown(self, view: BucketView | None, word: int) -> Bucket | None:
        return None if view is None else SharedBucket(self._table, self.slot, word, view)


def require_room(slots: Slots, path: Path, records: Iterable[KeyRecord]) -> None:
    """Raise `ConfigError` unless keys of a file can be counted, beside those in force."""
    try:
        slots.require_room(record.name for record in records)
    except MisuseError as error:
        raise ConfigError(f"keys.file {path}: {error}") from error


class _SharedKeyRing(KeyRing):
    """Its accounts are shared ones."""

    _table: CounterTable
    _taken: list[tuple[int, int]]
    """What was taken of each slot's rates, when it was last looked at."""

    def by_name(self) -> dict[str, SharedAccount]:
        """Every account, as it was when somebody last looked."""
        return {account.record.name: account for account in self._shared()}

    def _look_at_changed(self) -> None:
        """Without this a view would be as old as the key's last request here."""
        accounts = self._shared()
        num_slots = max((account.slot for account in accounts), default=-1) + 1
        before = self._taken
        sums = (self._table.totals(word, num_slots) for word in (_REQUESTS, _TOKENS))
        self._taken = taken = list(zip(*sums, strict=True))
        now_s = self._clock()
        for account in accounts:
            slot = account.slot
            if slot >= len(before) or before[slot] != taken[slot]:
                account.look(now_s)

    def _shared(self) -> list[SharedAccount]:
        return [one for one in self._accounts.values() if isinstance(one, SharedAccount)]


class ControlKeyRing(_SharedKeyRing):
    """Follows the file, for itself and the workers.

    Args:
        path: of the file.
        num_replicas: services that share the limits.
        clock: monotonic seconds.
        table: where workers count.
        slots: of keys.
        changed: is called when workers have to be told.

    Raises:
        ConfigError: the file is not one of keys, or has too many.
    """

    def __init__(
        self,
        path: Path,
        num_replicas: int,
        clock: Callable[[], float],
        *,
        table: CounterTable,
        slots: Slots,
        changed: Callable[[], None],
    ) -> None:
        self._table = table
        self._slots = slots
        self._changed = changed
        self._taken = []
        super().__init__(path, num_replicas, clock)

    def __iter__(self) -> Iterator[Account]:
        """Every account, as it is now."""
        now_s = self._clock()
        for account in self._shared():
            account.look(now_s)
            yield account

    def refresh(self) -> None:
        """Take over the file if it has changed, and look at what workers have taken."""
        super().refresh()
        self._look_at_changed()

    def news(self) -> Keys:
        """What a worker's ring takes."""
        now_s = self._clock()
        return Keys(self.num_replicas, [one.news(now_s) for one in self._shared()])

    def make_room(self, successor: KeyRing | None) -> None:
        """Another ring is in force, or none: give back the lines of keys that it has not."""
        kept = {account.record.name for account in successor or ()}
        for name in self.by_name().keys() - kept:
            self._slots.forget(name)

    def _take(self, records: Iterable[KeyRecord]) -> None:
        wanted, before = list(records), set(self.by_name())
        require_room(self._slots, self.path, wanted)
        super()._take(wanted)
        for name in before - set(self.by_name()):
            self._slots.forget(name)
        self._changed()

    def _open(self, record: KeyRecord, now_s: float) -> Account:
        slot = self._slots.slot(record.name)
        return SharedAccount(self._table, slot, record, self.num_replicas, now_s)


class WorkerKeyRing(_SharedKeyRing):
    """The keys that the control process has said; no file is read here.

    Args:
        path: of the file that the control process follows.
        clock: monotonic seconds.
        table: where this worker counts.
        keys: in force.
    """

    def __init__(
        self, path: Path, clock: Callable[[], float], table: CounterTable, keys: Keys
    ) -> None:
        self.path = path
        self._clock = clock
        self._table = table
        self._taken = []
        self._accounts = {}
        self.take(keys)

    def take(self, keys: Keys) -> None:
        """Put other keys in force; what was used of a limit is what the control process says."""
        now_s, known = self._clock(), self.by_name()
        self._num_replicas = keys.num_replicas
        self._accounts = {}
        for news in keys.keys:
            account = known.get(news.record.name)
            if account is None or account.slot != news.slot:
                account = SharedAccount(
                    self._table, news.slot, news.record, keys.num_replicas, now_s
                )
            else:
                account.take_over(news.record, keys.num_replicas, now_s)
            account.show(news)
            self._accounts[news.record.sha256] = account

    def refresh(self) -> None:
        """Look at what other workers have taken; who is let in changes by `take` alone."""
        self._look_at_changed()

    def _take(self, records: Iterable[KeyRecord]) -> None:
        """A share of another size comes with other keys, from the control process."""
