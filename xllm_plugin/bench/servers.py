"""Run a server for the length of a `with` block, and leave nothing of it behind.

The server is the leader of its own process group, so that Ctrl-C reaches the benchmark alone, which
then stops the whole group: vLLM's engine processes are its children and would otherwise keep their
memory.  Only that group is ever signalled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import httpx

from xllm_plugin.errors import MisuseError, NotNowError, XllmError

__all__ = [
    "Server",
    "Waiting",
    "clean_environment",
    "find_free_port",
    "group_cpu_s",
    "last_line",
    "tail",
]

LOOPBACK = "127.0.0.1"
READY_TIMEOUT_S, GRACE_S, POLL_S = 600.0, 20.0, 0.5
_SCRUBBED = ("XLLM_", "VLLM_", "OMP_", "GOMP_", "KMP_", "LD_PRELOAD")
_KEPT = ("VLLM_CACHE_ROOT", "XLLM_CACHE_DIR")


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a progress line can say while a server starts."""

    server: str
    elapsed_s: float
    last_log_line: str


def find_free_port() -> int:
    """A loopback TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def clean_environment(additions: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what would tune a server, plus `additions`.

    Dropping the caller's `VLLM_*`, `XLLM_*` and OpenMP settings makes the additions, which results
    record, the whole truth.  Cache locations stay.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or not name.startswith(_SCRUBBED)
    }
    return {**kept, **additions}


class Server:
    """A server process on loopback, ready when `/health` answers 200.

    Args:
        name: shown in messages.
        command: argument list; must make the server listen on `port`.
        port: where to ask for health.
        log_path: gets stdout and stderr.
        environment: the complete environment of the process.
        ready_timeout_s: how long the start may take.
        grace_s: how long SIGTERM may take before SIGKILL.
        poll_s: how often to ask for health, which is how exact `ready_after_s` is.
        on_wait: called after each of these while the server starts.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        port: int,
        log_path: Path,
        environment: Mapping[str, str],
        ready_timeout_s: float = READY_TIMEOUT_S,
        grace_s: float = GRACE_S,
        poll_s: float = POLL_S,
        on_wait: Callable[[Waiting], None] | None = None,
    ) -> None:
        self.name = name
        self.command = tuple(command)
        self.url = f"http://{LOOPBACK}:{port}"
        self.log_path = log_path
        self.ready_after_s = 0.0
        self._port = port
        self._environment = dict(environment)
        self._ready_timeout_s = ready_timeout_s
        self._grace_s = grace_s
        self._poll_s = poll_s
        self._on_wait = on_wait or (lambda _: None)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Self:
        _require_unused(self.name, self._port)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._start()
            self._wait_until_ready()
        except BaseException:  # __exit__ does not run for what __enter__ raises; raised again
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process (and process group) number while the server is started."""
        return None if self._process is None else self._process.pid

    def check_alive(self) -> None:
        """Raise `NotNowError` with the log's tail if the server has died."""
        if self._process is None or self._process.poll() is not None:
            raise self._died()

    def client(self, timeout_s: float = 60.0) -> httpx.Client:
        """A client of it alone: a proxy from the environment is never meant for a server here."""
        return httpx.Client(base_url=self.url, trust_env=False, timeout=timeout_s)

    def exit_code(self, limit_s: float) -> int:
        """Wait until it has ended by itself.  Raises `subprocess.TimeoutExpired`."""
        assert self._process is not None
        return self._process.wait(limit_s)

    def pause(self) -> None:
        """Take all processors from it (SIGSTOP), with its memory and connections kept."""
        if self._process is not None:
            _signal_group(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run again.  Safe to repeat."""
        if self._process is not None:
            _signal_group(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """SIGTERM the group, SIGKILL what is left after the grace period.  Safe to repeat."""
        self.resume()  # a paused process would not see SIGTERM
        process, self._process = self._process, None
        if process is not None:
            try:
                _signal_group(process.pid, signal.SIGTERM)
                _wait_for_group(process, self._grace_s)
            finally:
                _signal_group(process.pid, signal.SIGKILL)
                process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _start(self) -> None:
        self._log = self.log_path.open("wb")
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        except OSError as error:
            raise MisuseError(f"server {self.name!r} cannot be started: {error}") from error

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        started = time.monotonic()
        # trust_env=False: a proxy from the environment is never meant for loopback.
        with httpx.Client(trust_env=False, timeout=2.0) as client:
            while not _is_healthy(client, self.url):
                elapsed_s = time.monotonic() - started
                if elapsed_s > self._ready_timeout_s:
                    raise NotNowError(
                        f"server {self.name!r} was not ready after {elapsed_s:.0f} s (limit "
                        f"{self._ready_timeout_s:g} s); end of its log:\n{tail(self.log_path)}"
                    )
                self._on_wait(Waiting(self.name, elapsed_s, last_line(self.log_path)))
                # Waiting on the process is the pause, and ends at once when it dies.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=self._poll_s)
                    raise self._died()
        self.ready_after_s = time.monotonic() - started

    def _died(self) -> XllmError:
        code = None if self._process is None else self._process.poll()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return NotNowError(
            f"server {self.name!r} died ({how}); end of its log:\n{tail(self.log_path)}"
        )


def tail(path: Path, *, lines: int = 30) -> str:
    """The last lines of a log, or a note that there is none."""
    try:
        text = path.read_bytes()[-64 * 1024 :].decode(errors="replace")
    except FileNotFoundError:
        return "(no log)"
    return "\n".join(text.splitlines()[-lines:]) or "(empty log)"


def last_line(path: Path) -> str:
    """The last line of a log that has text in it, for a progress line."""
    return next((line for line in reversed(tail(path).splitlines()) if line.strip()), "")


def _require_unused(name: str, port: int) -> None:
    """Someone else's server on the port would answer the health check in our server's name."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        if probe.connect_ex((LOOPBACK, port)) == 0:
            raise MisuseError(
                f"port {port} for server {name!r} is in use; stop what listens there, or give "
                "another --port"
            )


def _is_healthy(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _wait_for_group(process: subprocess.Popen[bytes], limit_s: float) -> None:
    """Wait until the leader and all its children are gone, at most `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=limit_s)
    while _has_living_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)


def group_cpu_s(group: int) -> float:
    """Processor seconds, user and system, that the living processes of a group have used."""
    # Fields 14 and 15 of proc(5) are the 12th and 13th behind the name.
    ticks = sum(int(fields[11]) + int(fields[12]) for fields in _processes(group))
    return ticks / os.sysconf("SC_CLK_TCK")


def _has_living_members(group: int) -> bool:
    """Whether any process of the group is neither gone nor a zombie (which nobody may reap)."""
    return any(fields[0] not in "ZX" for fields in _processes(group))


def _processes(group: int) -> Iterator[list[str]]:
    """What /proc says of every process of the group, from its state on."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (name) state ppid pgrp ...", where the name may hold spaces and brackets.
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                yield fields
