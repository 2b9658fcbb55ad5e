"""What is known of the keys, put together from whole reads and from a watch, in any order.

etcd numbers its states (revisions).  A view is always that of one revision, and only goes back when
it is begun anew: an etcd that has lost its data counts from 1 again.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm_plugin.etcd.wire import Event, KeyValue, Snapshot

__all__ = ["View"]


class View:
    """The keys of a prefix at `revision`."""

    def __init__(self) -> None:
        self.revision = 0
        self.records: dict[str, KeyValue] = {}

    def replace(self, snapshot: Snapshot, *, anew: bool = False) -> set[str]:
        """Take a whole read; returns the keys that it has changed.

        A read that a watch has overtaken changes nothing, unless this begins `anew`.
        """
        if snapshot.revision < self.revision and not anew:
            return set()
        before, now = self.records, snapshot.records
        self.revision, self.records = snapshot.revision, dict(now)
        return {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}

    def apply(self, events: Iterable[Event]) -> set[str]:
        """Take one message of a watch; returns the keys that it has changed.

        What a read has brought already is skipped.  A message has all events of a revision.
        """
        new = [event for event in events if event.mod_revision > self.revision]
        for event in new:
            if event.record is None:
                self.records.pop(event.key, None)
            else:
                self.records[event.key] = event.record
            self.revision = max(self.revision, event.mod_revision)
        return {event.key for event in new}
