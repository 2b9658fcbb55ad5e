"""A child process that answers one JSON object a line; `replies.py` is its side of it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from xllm_plugin.bench.servers import clean_environment, tail
from xllm_plugin.errors import NotNowError

__all__ = ["JsonProcess"]

POLL_S = 0.5


class JsonProcess:
    """The process, for the length of a `with` block.

    Args:
        what: it is, for messages.
        command: ends when its standard input does.
        additions: to the cleaned environment.
        log_path: gets what it prints beside its answers.
        grace_s: how long it may take to end; after an error it is killed at once.
    """

    def __init__(
        self,
        what: str,
        command: Sequence[str],
        additions: Mapping[str, str],
        log_path: Path,
        *,
        grace_s: float = 0.0,
    ) -> None:
        self.log_path = log_path
        self._what = what
        self._command = tuple(command)
        self._environment = clean_environment(additions)
        self._grace_s = grace_s
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches the benchmark alone, which ends the child
            )
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        process, self._process = self._running(), None
        with contextlib.suppress(BrokenPipeError):
            _opened(process.stdin).close()
        try:
            if kind is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=self._grace_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a compiler's processes too
            process.wait()
            _opened(process.stdout).close()

    def send(self, message: Mapping[str, Any]) -> None:
        """Say something.  Raises `NotNowError` if nobody is there any more."""
        pipe = _opened(self._running().stdin)
        try:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()
        except BrokenPipeError as error:
            raise self._ended() from error

    def receive(
        self, timeout_s: float, *, to: str = "", on_wait: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        """Its next answer.

        Args:
            timeout_s: how long that may take.
            to: what was asked, for people.
            on_wait: called twice a second; may raise.

        Raises:
            NotNowError: it has ended, or takes too long.
        """
        replies = _opened(self._running().stdout)
        for _ in range(max(1, round(timeout_s / POLL_S))):
            if select.select([replies], [], [], min(POLL_S, timeout_s))[0]:
                line = replies.readline()
                if not line:
                    raise self._ended()
                answer = json.loads(line)
                assert isinstance(answer, dict)
                return answer
            if on_wait is not None:
                on_wait()
        asked = f" to {to!r}" if to else ""
        raise NotNowError(
            f"{self._what} gave no answer{asked} within {timeout_s:g} s; end of its log:\n"
            f"{tail(self.log_path)}"
        )

    def _running(self) -> subprocess.Popen[str]:
        assert self._process is not None, "use it in a `with` block"
        return self._process

    def _ended(self) -> NotNowError:
        return NotNowError(f"{self._what} ended; end of its log:\n{tail(self.log_path)}")


def _opened(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
