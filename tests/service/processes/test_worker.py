"""What a worker asks the control process while requests wait."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from xllm_plugin.service.carrier import Carrier
from xllm_plugin.service.config import LimitsConfig, ServiceConfig
from xllm_plugin.service.processes import worker as module
from xllm_plugin.service.processes.messages import (
    FromWorker,
    OwnerAnswer,
    OwnerQuestion,
    decoder,
)
from xllm_plugin.service.processes.worker import Worker, WorkerProxy


class Line:
    """Stands for the channel."""

    def __init__(self) -> None:
        self.is_heard = True
        self.said: list[Any] = []

    def send(self, payload: bytes) -> None:
        self.said.append(decoder(FromWorker).decode(payload))


def worker_and_line() -> tuple[Worker, Line]:
    ours, theirs = socket.socketpair()
    ours.close()
    theirs.close()
    worker, line = Worker(ours, -1), Line()
    worker._channel = line  # type: ignore[assignment]
    worker._is_open = True
    return worker, line


@pytest.mark.parametrize(("num_workers", "part_bytes"), [(1, 4000), (2, 2000), (8, 1500)])
def test_a_worker_has_its_part_of_the_memory_of_bodies_and_room_for_one(
    run: Any, num_workers: int, part_bytes: int
) -> None:
    limits = LimitsConfig(max_body_bytes=1500, max_total_body_bytes=4000)

    async def check() -> None:
        worker, _ = worker_and_line()
        worker.num_workers = num_workers
        carrier = Carrier(
            ServiceConfig(limits=limits),
            make_proxy=lambda *arguments: WorkerProxy(*arguments, worker),
        )
        assert carrier.proxy.bodies.max_bytes == part_bytes

    run(check())


def test_a_question_is_asked_once_and_answered_to_all(run: Any) -> None:
    async def check() -> None:
        worker, line = worker_and_line()
        asked = [asyncio.create_task(worker.owner_of("r")) for _ in range(3)]
        await asyncio.sleep(0)
        assert line.said == [OwnerQuestion("r")]
        worker._take(OwnerAnswer("r", "a"))
        assert await asyncio.gather(*asked) == ["a"] * 3
        assert not worker._questions

    run(check())


def test_nothing_is_asked_of_a_control_process_that_does_not_listen(run: Any) -> None:
    async def check() -> None:
        worker, line = worker_and_line()
        line.is_heard = False
        assert await worker.owner_of("r") == ""
        assert line.said == []

    run(check())


def test_who_gives_up_takes_no_later_question_with_it(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        worker, _ = worker_and_line()
        monkeypatch.setattr(module, "_OWNER_TIMEOUT_S", 0.0)
        early = asyncio.create_task(worker.owner_of("r"))
        await asyncio.sleep(0)
        del worker._questions["r"]  # as one that asked before it has given up
        monkeypatch.setattr(module, "_OWNER_TIMEOUT_S", 60.0)
        late = asyncio.create_task(worker.owner_of("r"))
        assert await early == ""
        worker._take(OwnerAnswer("r", "a"))
        assert await late == "a"

    run(check())
