"""A real engine channel on a real socket, with a load and a clock that tests set by hand."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

from xllm_plugin.channel import ChannelConfig, EngineChannel, EngineIdentity, EngineLoad


class ManualClock:
    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class Engine:
    """What a scheduler is to the channel."""

    def __init__(self, directory: Path, instance_id: str = "engine", dp_rank: int = 0) -> None:
        self.clock = ManualClock()
        self.load = EngineLoad(num_blocks_total=100, num_blocks_free=100)
        identity = EngineIdentity(
            instance_id=instance_id,
            model="tiny",
            platform="xllm",
            device="cpu",
            pid=os.getpid(),
            dp_rank=dp_rank,
        )
        self.channel = EngineChannel(
            ChannelConfig(directory=directory, snapshot_interval_ms=100),
            identity,
            lambda: self.load,
            clock=self.clock,
            wall_clock=lambda: 1.7e9,
        )
        self.path = directory / f"{instance_id}.dp{dp_rank}.sock"


class EngineThread:
    """Drains calls as fast as it can, as an engine does between steps."""

    def __init__(self, channel: EngineChannel) -> None:
        self._channel = channel
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._channel.drain_calls()
            self._stop.wait(0.001)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "s"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def make_engine(directory: Path) -> Iterator[Callable[..., Engine]]:
    """Makes engines, not started; closes them all."""
    engines: list[Engine] = []

    def make(instance_id: str = "engine", dp_rank: int = 0) -> Engine:
        engines.append(Engine(directory, instance_id, dp_rank))
        return engines[-1]

    yield make
    for engine in engines:
        engine.channel.close()


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    """One engine, started."""
    engine = make_engine()
    engine.channel.start()
    return engine


@pytest.fixture
def engine_thread() -> type[EngineThread]:
    return EngineThread
