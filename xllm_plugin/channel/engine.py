"""What the scheduler holds: publish a snapshot when one is due, execute queued calls, nothing else.

Both are called each step by the engine thread, so the path taken when nothing is due is a
comparison (about 0.1 us).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

import msgspec

from xllm_plugin.channel.config import ChannelConfig
from xllm_plugin.channel.messages import EngineIdentity, EngineLoad, Snapshot
from xllm_plugin.channel.paths import socket_path
from xllm_plugin.channel.server import ChannelServer
from xllm_plugin.errors import ChannelError

__all__ = ["EngineChannel", "ExponentialMean", "SnapshotPublisher"]


class ExponentialMean:
    """A mean in which each older sample weighs `1 - weight` times the next one.

    The first sample is taken whole.  `weight=0.1` follows about the last ten steps.
    """

    def __init__(self, weight: float = 0.1) -> None:
        self._weight = weight
        self._mean: float | None = None

    def add(self, sample: float) -> None:
        """Take one sample."""
        mean = sample if self._mean is None else self._mean
        self._mean = mean + self._weight * (sample - mean)

    @property
    def value(self) -> float:
        """The mean; 0 before the first sample."""
        return self._mean or 0.0


class SnapshotPublisher:
    """Holds the latest snapshot: written by the engine thread, read by any.

    Replacing one reference is atomic and a snapshot is frozen, so neither side waits.
    """

    def __init__(self) -> None:
        self._latest: Snapshot | None = None

    def publish(self, snapshot: Snapshot) -> None:
        """Make `snapshot` the one that readers get."""
        self._latest = snapshot

    def latest(self) -> Snapshot:
        """Return the latest snapshot of this engine.

        Raises:
            ChannelError: nothing has been published yet.
        """
        if self._latest is None:
            raise ChannelError("the engine has published no snapshot yet. Try again in a moment.")
        return self._latest


class EngineChannel:
    """One engine's end of the channel; owned, started and closed by the scheduler.

    ::

        channel = EngineChannel(config, identity, build_load)
        channel.start()                                 # end of the scheduler's __init__
        channel.drain_calls()                           # begin of schedule()
        channel.publish_if_due(now_s, force=went_idle)  # end of update_from_output()
        channel.close()                                 # shutdown()

    Publish with `force=True` when the last request has left.  An idle engine takes no steps: the
    snapshot before that would show its requests as running until the next one comes.

    Args:
        config: with `enabled=False` every method here does nothing.
        identity: who this engine is; `instance_id` and `dp_rank` name the socket.
        build_load: makes the load of now; called on the engine thread, only when one is due.
        clock: seconds on CLOCK_MONOTONIC, the clock that readers compute a snapshot's age with.
        wall_clock: seconds since 1970.
        on_queued: wakes an idle engine for a queued call, see `ChannelServer`.
    """

    def __init__(
        self,
        config: ChannelConfig,
        identity: EngineIdentity,
        build_load: Callable[[], EngineLoad],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        on_queued: Callable[[], None] | None = None,
    ) -> None:
        self.identity = msgspec.structs.replace(identity, parent_pid=os.getppid())
        self._build_load = build_load
        self._clock = clock
        self._wall_clock = wall_clock
        self._interval_s = config.snapshot_interval_ms / 1000
        self._next_due_s = math.inf
        self._sequence = 0
        self._sections: dict[str, Callable[[], Any]] = {}
        self._publisher = SnapshotPublisher()
        self._server: ChannelServer | None = None
        if config.enabled:
            path = socket_path(identity.instance_id, identity.dp_rank, config.directory)
            self._server = ChannelServer(path, on_queued=on_queued)
            self._server.register_call("snapshot", self._publisher.latest)

    def add_section(self, name: str, build: Callable[[], Any]) -> None:
        """Let `build` add `Snapshot.sections[name]` to each snapshot.

        It is called on the engine thread and returns a frozen msgspec struct, or plain values.
        """
        assert name not in self._sections, f"section {name!r} is added twice"
        self._sections[name] = build

    def register_call(
        self, name: str, function: Callable[..., Any], *, on_engine_thread: bool = False
    ) -> None:
        """Offer a control call; see `ChannelServer.register_call`."""
        if self._server is not None:
            self._server.register_call(name, function, on_engine_thread=on_engine_thread)

    def start(self) -> None:
        """Publish the first snapshot and open the socket; errors as of `ChannelServer.start`."""
        if self._server is None:
            return
        self._publish(self._clock())
        self._server.start()

    def publish_if_due(self, now_s: float | None = None, *, force: bool = False) -> bool:
        """Publish if the interval has passed, or at once if forced; returns whether it did.

        Args:
            now_s: time on `clock`, for a caller that has just read it.
            force: publish now, see the class's docstring.
        """
        if now_s is None:
            now_s = self._clock()
        if now_s < self._next_due_s and not (force and self._server is not None):
            return False
        self._publish(now_s)
        return True

    def drain_calls(self) -> int:
        """Execute the calls queued for the engine thread; returns how many."""
        return 0 if self._server is None else self._server.engine_calls.drain()

    @property
    def has_pending_calls(self) -> bool:
        """Whether calls wait for `drain_calls`: work, even for an engine without requests."""
        return self._server is not None and len(self._server.engine_calls) > 0

    def close(self) -> None:
        """Close the socket and remove its file.  Safe to repeat."""
        self._next_due_s = math.inf
        if self._server is not None:
            self._server.close()

    def _publish(self, now_s: float) -> None:
        self._next_due_s = now_s + self._interval_s
        self._sequence += 1
        snapshot = Snapshot(
            sequence=self._sequence,
            monotonic_s=now_s,
            wall_time_s=self._wall_clock(),
            engine=self.identity,
            load=self._build_load(),
            sections={name: build() for name, build in self._sections.items()},
        )
        self._publisher.publish(snapshot)
