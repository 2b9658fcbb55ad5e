"""What the user sees while a model is made: lines and bars on stderr, for stdout is the path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["ConsoleReporter", "Reporter", "SilentReporter"]

Advance = Callable[[int], None]


class Reporter(Protocol):
    """Told what happens.  Implementations must not raise."""

    def say(self, message: str) -> None:
        """Show one line."""

    def bar(
        self, title: str, total: int, *, done: int = 0, is_bytes: bool = False
    ) -> AbstractContextManager[Advance]:
        """Show a progress bar while the block runs.

        Args:
            title: what is going on.
            total: steps or bytes in all; 0 when unknown.
            done: steps or bytes there already.
            is_bytes: count in bytes, with speed and time left.

        Returns:
            A context manager giving `advance(count)`.
        """


class SilentReporter:
    """Shows nothing."""

    def say(self, message: str) -> None:
        """Ignore `message`."""

    @contextmanager
    def bar(
        self, title: str, total: int, *, done: int = 0, is_bytes: bool = False
    ) -> Iterator[Advance]:
        """Count for nobody."""
        del title, total, done, is_bytes
        yield lambda _: None


class ConsoleReporter:
    """Writes to stderr with rich; on a pipe a bar becomes one line when it starts."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    def say(self, message: str) -> None:
        """Show one line, wrapped only by the terminal."""
        self._console.print(message, markup=False, soft_wrap=True)

    @contextmanager
    def bar(
        self, title: str, total: int, *, done: int = 0, is_bytes: bool = False
    ) -> Iterator[Advance]:
        """Show a bar that disappears when done."""
        from rich import progress

        if not self._console.is_terminal:
            size = f" ({total / 1e6:.0f} MB)" if is_bytes and total else ""
            self.say(f"{title}{size}")
            yield lambda _: None
            return
        counters: tuple[progress.ProgressColumn, ...] = (progress.MofNCompleteColumn(),)
        if is_bytes:
            counters = (progress.DownloadColumn(), progress.TransferSpeedColumn())
        with progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            *counters,
            progress.TimeRemainingColumn(),
            console=self._console,
            transient=True,
        ) as shown:
            task = shown.add_task(title, total=total or None, completed=done)
            yield lambda count: shown.advance(task, count)
