"""The engines behind one API server: which there should be, and what each says right now.

An API server talks to one engine process per data-parallel rank.  Those on its own machine have a
socket; ranks on other machines of a multi-node deployment cannot be asked and are not listed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from xllm_plugin.channel.client import AsyncChannelClient, ChannelClient
from xllm_plugin.channel.config import ChannelConfig
from xllm_plugin.channel.messages import Reading
from xllm_plugin.channel.paths import channel_directory, socket_path, sockets_in
from xllm_plugin.errors import ChannelError, XllmError

__all__ = ["AsyncEngineReader", "EngineGroup", "EngineReader", "EngineWatch"]

logger = logging.getLogger("vllm.xllm_plugin")

T = TypeVar("T")
Clock = Callable[[], float]
# Twenty looks a second at most, each about 0.1 ms: engines publish ten times a second.
_MAX_AGE_S = 0.05


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """Where the sockets of one server's engines are.

    Attributes:
        instance_id: that names them.
        directory: that holds them.
        expected_ranks: data-parallel ranks that run on this machine by the configuration.
    """

    instance_id: str
    directory: Path
    expected_ranks: tuple[int, ...] = (0,)

    @classmethod
    def from_vllm(cls, config: ChannelConfig, vllm_config: Any) -> EngineGroup:
        """The group that belongs to a `vllm.config.VllmConfig`; call it once the engines run.

        One API server hands its configuration to the engines it starts, `instance_id` included.
        With several (the default under data parallelism) a launcher starts them and the engines,
        and each makes its own configuration with an `instance_id` of its own: there the engines
        are those that have the same parent process.  Asking for it may take a moment.
        """
        parallel = vllm_config.parallel_config
        first = parallel.data_parallel_index
        directory = config.directory or channel_directory()
        instance_id = config.resolve_instance_id(vllm_config.instance_id)
        if not config.instance_id and parallel._api_process_count > 1:  # noqa: SLF001  vLLM's own
            instance_id = _instance_launched_by(os.getppid(), directory) or instance_id
        return cls(
            instance_id=instance_id,
            directory=directory,
            expected_ranks=tuple(range(first, first + parallel.data_parallel_size_local)),
        )

    def sockets(self) -> dict[int, Path]:
        """Rank -> socket: those expected, and those found (elastic scaling adds ranks)."""
        paths = {
            rank: socket_path(self.instance_id, rank, self.directory)
            for rank in self.expected_ranks
        }
        try:
            listed = sockets_in(self.directory)
        except ChannelError as error:
            # The expected ranks can still be asked; listing only finds those that joined later.
            logger.warning("%s", error)
            listed = []
        for found in listed:
            if found.instance_id == self.instance_id:
                paths[found.dp_rank] = found.path
        return dict(sorted(paths.items()))


def _instance_launched_by(parent_pid: int, directory: Path) -> str | None:
    """Id of the engines whose parent process is `parent_pid`."""
    for entry in sockets_in(directory):
        try:
            with ChannelClient(entry.path) as client:
                engine = client.snapshot().engine
        except ChannelError:
            continue
        if engine.parent_pid == parent_pid:
            return engine.instance_id
    return None


class AsyncEngineReader:
    """Asks all engines at once from the API server's event loop, over kept connections."""

    def __init__(
        self, group: EngineGroup, timeout_s: float = 1.0, *, clock: Clock = time.monotonic
    ) -> None:
        self._group = group
        self._timeout_s = timeout_s
        self._clock = clock
        self._clients: dict[int, AsyncChannelClient] = {}

    async def read(self) -> tuple[Reading, ...]:
        """One reading a rank, in order; an engine that does not answer is a reading with error."""
        sockets = self._group.sockets()
        return tuple(await asyncio.gather(*(self._read_one(*entry) for entry in sockets.items())))

    async def close(self) -> None:
        """Drop all connections."""
        for client in self._clients.values():
            await client.close()
        self._clients.clear()

    async def _read_one(self, dp_rank: int, path: Path) -> Reading:
        client = self._clients.setdefault(dp_rank, AsyncChannelClient(path, self._timeout_s))
        try:
            snapshot = await client.snapshot()
        except XllmError as error:
            return Reading(dp_rank=dp_rank, error=str(error))
        return Reading(dp_rank=dp_rank, snapshot=snapshot, age_s=snapshot.age_s(self._clock()))


class EngineWatch(Generic[T]):
    """What follows from the engines' latest snapshots, for callers that may not wait.

    `latest` answers at once with what is known, and when that has become old, asks the engines
    meanwhile; without callers nobody asks.  Use it on one event loop.

    Args:
        reader: asks the engines.
        derive: makes of one reading of all engines what callers want.
        max_age_s: of what is known, before the engines are asked again.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        reader: AsyncEngineReader,
        derive: Callable[[tuple[Reading, ...]], T],
        max_age_s: float = _MAX_AGE_S,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        self._reader = reader
        self._derive = derive
        self._max_age_s = max_age_s
        self._clock = clock
        self._next_look_s = -math.inf
        self._known: T | None = None
        self._looking: asyncio.Task[None] | None = None
        self._problem = ""

    def latest(self) -> T | None:
        """What is known now; None before the first look, and after one that failed."""
        if self._clock() >= self._next_look_s and self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self.look())
            self._looking.add_done_callback(self._looked)
        return self._known

    async def look(self) -> None:
        """Ask the engines now."""
        readings = await self._reader.read()
        self._next_look_s = self._clock() + self._max_age_s
        try:
            self._known = self._derive(readings)
        except XllmError as error:
            self._known = None
            if str(error) != self._problem:
                self._problem = str(error)
                logger.warning("%s", error)

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._looking = None
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("asking the engines failed", exc_info=error)


class EngineReader:
    """Asks the engines one after the other from a thread, and remembers what each said last.

    Args:
        group: the engines.
        timeout_s: for all of them together.
        clock: monotonic seconds.
    """

    def __init__(
        self, group: EngineGroup, timeout_s: float = 0.25, *, clock: Clock = time.monotonic
    ) -> None:
        self._group = group
        self._timeout_s = timeout_s
        self._clock = clock
        self._clients: dict[int, ChannelClient] = {}
        self._last: dict[int, Reading] = {}

    def read(self) -> tuple[Reading, ...]:
        """One reading a rank; with an error *and* the last known snapshot if it did not answer."""
        deadline_s = self._clock() + self._timeout_s
        return tuple(
            self._read_one(rank, path, deadline_s) for rank, path in self._group.sockets().items()
        )

    def recall(self) -> tuple[Reading, ...]:
        """What `read` found last, without asking again."""
        return tuple(self._aged(reading) for reading in tuple(self._last.values()))

    def close(self) -> None:
        """Drop all connections."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def _read_one(self, dp_rank: int, path: Path, deadline_s: float) -> Reading:
        client = self._clients.setdefault(dp_rank, ChannelClient(path))
        client.timeout_s = max(0.0, deadline_s - self._clock())
        snapshot, problem = None, None
        try:
            snapshot = client.snapshot()
        except XllmError as error:
            problem = str(error)
            if dp_rank in self._last:
                snapshot = self._last[dp_rank].snapshot
        self._last[dp_rank] = Reading(dp_rank=dp_rank, snapshot=snapshot, error=problem)
        return self._aged(self._last[dp_rank])

    def _aged(self, reading: Reading) -> Reading:
        if reading.snapshot is None:
            return reading
        age_s = reading.snapshot.age_s(self._clock())
        return msgspec.structs.replace(reading, age_s=age_s)
