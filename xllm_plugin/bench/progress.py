"""What a long run shows while it runs."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from xllm_plugin.bench.load import LoadResult
from xllm_plugin.bench.servers import Waiting

__all__ = ["Reporter"]


class Reporter:
    """One progress bar for the whole run, and a line for each thing that is done."""

    def __init__(
        self, console: Console, total: int, *, first: str = "starting the load client"
    ) -> None:
        self._progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            TextColumn("[dim]{task.fields[detail]}", markup=True),
            console=console,
        )
        self._task = self._progress.add_task(first, total=total, detail="")
        self._where = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def peer(self, name: str, repeat: int, repeats: int) -> None:
        """A peer's turn begins."""
        self._where = f"repeat {repeat + 1}/{repeats}, {name}"

    def doing(self, what: str) -> None:
        """Show what runs now."""
        self._progress.update(self._task, description=f"{self._where}: {what}", detail="")

    def waiting(self, state: Waiting) -> None:
        """Show how a server's start goes."""
        detail = escape(f"{state.elapsed_s:.0f} s  {state.last_log_line[-60:]}")
        self._progress.update(
            self._task, description=f"{self._where}: starting the server", detail=detail
        )

    def done(self, steps: int = 1) -> None:
        """Move the bar."""
        self._progress.advance(self._task, steps)

    def point(self, point: LoadResult) -> None:
        """Print a finished load point."""
        self.line(
            f"{point.load}: {point.output_tok_s:.0f} tok/s, "
            f"TPOT p90 {point.tpot_p90_ms:.1f} ms, TTFT p90 {point.ttft_p90_ms:.0f} ms, "
            f"{point.duration_s:.0f} s, client {point.client_cpu_s:.1f} CPU s"
        )

    def line(self, text: str) -> None:
        """Print a line about what is done, also where there is no terminal for the bar."""
        console = self._progress.console
        console.print(f"{self._where}, {text}", highlight=False, soft_wrap=True)
        console.file.flush()  # a run into a file is watched with tail -f
