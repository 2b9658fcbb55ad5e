"""`xllm service --processes 2` as its users run it: signals, and no process left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from xllm_plugin.bench.servers import find_free_port

PATIENCE_S = 60.0


class Started:
    """A service without instances: `/health` tells whether it answers."""

    def __init__(self, folder: Path) -> None:
        self.port, admin_port = find_free_port(), find_free_port()
        self.log = folder / "log"
        arguments = ("--host", "127.0.0.1", "--port", str(self.port), "--processes", "2")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "xllm_plugin.cli", "service", *arguments),
                    *("--admin-port", str(admin_port)),
                ],
                env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
                stderr=log,
            )

    def answers(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health").status_code == 503
        except httpx.TransportError:
            return False

    def workers(self) -> dict[int, int]:
        """Number -> process, of those that were last said to be up."""
        found = re.findall(r"worker (\d) \(pid (\d+)\) is up", self.log.read_text())
        return {int(number): int(pid) for number, pid in found}

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < deadline_s, self.log.read_text()
            time.sleep(0.02)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    tmp_path.chmod(0o700)
    it = Started(tmp_path)
    yield it
    it.process.kill()
    it.process.wait()


def is_alive(pid: int) -> bool:
    """Runs; one that has ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_workers_end_when_the_control_process_is_killed(started: Started) -> None:
    started.until(lambda: len(started.workers()) == 2)
    assert started.answers()
    pids = started.workers()
    started.process.kill()
    started.process.wait()
    started.until(lambda: not any(map(is_alive, pids.values())))
    assert not started.answers()


@pytest.mark.full
def test_a_worker_that_is_told_to_end_is_replaced_and_sigterm_ends_all(started: Started) -> None:
    started.until(lambda: len(started.workers()) == 2)
    first = started.workers()[0]
    os.kill(first, signal.SIGTERM)
    started.until(lambda: started.workers()[0] != first)
    assert "worker 0" in started.log.read_text()
    pids = [first, *started.workers().values()]
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(PATIENCE_S) == 0, started.log.read_text()
    assert not any(map(is_alive, pids))
    assert "Traceback" not in started.log.read_text()
